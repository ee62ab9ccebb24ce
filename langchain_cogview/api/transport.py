"""Connections: per process and event loop, with a total deadline and guarded addresses.

`SyncTransport` and `AsyncTransport` send what httpx's transports send, as plain requests and responses. Each request takes
one connection of its own, the last used first, which speaks by `http1`, and behind a proxy by httpcore. There is no pool to
search: what costs nothing with one in flight costs nothing with hundreds. A request may carry these extensions:

- `cogview.deadline`, a `Deadline`: every look-up, connect, read and write gets only the time that is left. (The async side
  is bounded by `asyncio.timeout` around the whole step.)
- `cogview.addresses`, an `AddressCheck`: which addresses the connection may go to. It is asked at the very connect, with
  the address that is connected to, so a name cannot resolve to something else afterwards.
- `cogview.stage`, a function: told what begins, so that it is known whether anything was sent.

Nothing hangs on a generator: the connections belong to the process, keyed by event loop, and are left behind by a fork.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import time
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

import httpcore
import httpx

from langchain_cogview.addresses import ADDRESSES, AddressCheck, AddressRefusedError
from langchain_cogview.api.environment import proxy_for, tls_context
from langchain_cogview.api.http1 import BODY_BYTES, HEAD_BYTES, Conversation
from langchain_cogview.api.network import AsyncBackend, SyncBackend, aresolve, resolve
from langchain_cogview.api.proxied import AsyncProxied, Route, SyncProxied, expired
from langchain_cogview.api.settings import is_sandbox
from langchain_cogview.deadline import DEADLINE, Deadline
from langchain_cogview.errors import CogViewConfigurationError
from langchain_cogview.plain import PlainResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from langchain_cogview.plain import AnyRequest, AnyResponse, Head
    from langchain_cogview.sandbox.transport import SandboxTransport

STAGE: Final = "cogview.stage"
"""The request extension that holds a function; it is told what begins: `connect`, `tls`, `send`, or `answer`."""
_MOST_IDLE = 1000
_ADVISORY_SECONDS = 2.0


def _route(request: AnyRequest) -> Route:
    url = request.url
    return Route(url.raw_scheme, url.raw_host, url.port, proxy_for(url), request.extensions.get(ADDRESSES))


def _raise_as_httpx(error: Exception) -> NoReturn:
    """Raise the httpx class of the same name; callers see one family whatever client they injected."""
    if isinstance(error, httpx.TransportError):
        raise error
    for base in type(error).__mro__:
        known = getattr(httpx, base.__name__, None) if base.__module__.startswith("httpcore") else None
        if isinstance(known, type) and issubclass(known, httpx.TransportError):
            raise known(str(error)) from error
    raise error


# --- the transports ----------------------------------------------------------------------------------------------


class _SyncSlot:
    """One connection, open or not, to one route."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.backend = SyncBackend(route.check)
        self.idle_since = 0.0
        self._http = Conversation()
        self._stream: Any = None  # httpcore's
        self._patience: float | None = None

    def send(self, request: AnyRequest) -> Head:
        """Send a request, and read status and headers of its reply."""
        stage = request.extensions.get(STAGE, _nobody)
        limits = request.extensions.get("timeout", {})
        self._patience = limits.get("read")
        if self._stream is None:
            self._connect(stage, limits.get("connect"))
        stage("send")
        with contextlib.suppress(httpcore.WriteError):  # a server may answer before it has read everything, and close
            self._stream.write(self._http.request(request), limits.get("write"))
        head = None
        while head is None:
            self._http.received(self._stream.read(HEAD_BYTES, self._patience))
            head = self._http.head()
        stage("answer")
        return head

    def _connect(self, stage: Callable[[str], None], timeout: float | None) -> None:
        stage("connect")
        tls = tls_context() if self.route.scheme == b"https" else None
        self._stream = self.backend.connect_tcp(self.route.name, self.route.number, timeout)
        if tls:
            stage("tls")
            self._stream = self._stream.start_tls(tls, self.route.name, timeout)

    def chunks(self) -> Iterator[bytes]:
        """The body of the reply."""
        while (chunk := self._http.chunk()) != b"":
            if chunk is not None:
                yield chunk
            else:
                self._http.received(self._stream.read(BODY_BYTES, self._patience))

    def renewed(self) -> bool:
        """Get ready for another request; False where there can be none."""
        return self._http.renewed()

    def has_expired(self) -> bool:
        """Whether it was idle for too long, or closed by the other side."""
        return expired(self.idle_since) or bool(self._stream.get_extra_info("is_readable"))

    def close(self) -> None:
        """Close it, or what is open of it."""
        if self._stream is not None:
            self._stream.close()


def _nobody(stage: str) -> None:
    pass


def _body(slot: _SyncSlot | SyncProxied) -> Iterator[bytes]:
    try:
        yield from slot.chunks()
    except Exception as error:  # noqa: BLE001
        _raise_as_httpx(error)


class SyncTransport:
    """Connections for sync calls, shared by the threads of a process."""

    def __init__(self) -> None:
        self._idle: dict[Route, deque[_SyncSlot | SyncProxied]] = {}
        self._process = os.getpid()

    def handle_request(self, request: AnyRequest) -> PlainResponse:
        """Send a request; the response's body is read by the caller, who closes it."""
        route = _route(request)
        deadline = request.extensions.get(DEADLINE) or Deadline(None)
        if route.proxy and route.check:
            _check_behind_proxy(request.url.host, route.check, deadline)
        slot = self._take(route)
        slot.backend.deadline = deadline
        try:
            head = slot.send(request)
        except BaseException as error:
            slot.close()
            if isinstance(error, Exception):
                _raise_as_httpx(error)
            raise
        return PlainResponse(head, _body(slot), partial(self._give_back, slot))

    def close(self) -> None:
        """Close the idle connections; the transport can be used again."""
        idle, self._idle = self._idle, {}
        for slots in idle.values():
            for slot in slots:
                slot.close()

    def _take(self, route: Route) -> _SyncSlot | SyncProxied:
        if self._process != os.getpid():
            # After a fork the sockets are shared with the parent: closed here, they stay open there.
            self.close()
            self._process = os.getpid()
        slots = self._idle.get(route)
        with contextlib.suppress(IndexError):  # another thread may take the last
            while slots:
                slot = slots.pop()
                if not slot.has_expired():
                    return slot
                slot.close()
        return SyncProxied(route) if route.proxy else _SyncSlot(route)

    def _give_back(self, slot: _SyncSlot | SyncProxied) -> None:
        slots = self._idle.setdefault(slot.route, deque())
        if slot.renewed() and self._process == os.getpid() and len(slots) < _MOST_IDLE:
            slot.idle_since = time.monotonic()
            slots.append(slot)
        else:
            slot.close()
        with contextlib.suppress(IndexError):
            while slots and expired(slots[0].idle_since):
                slots.popleft().close()


class _AsyncSlot:
    """The twin of `_SyncSlot`."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.idle_since = 0.0
        self._http = Conversation()
        self._stream: Any = None  # httpcore's

    async def send(self, request: AnyRequest) -> Head:
        stage = request.extensions.get(STAGE, _nobody)
        if self._stream is None:
            await self._connect(stage, request.extensions.get("timeout", {}).get("connect"))
        stage("send")
        with contextlib.suppress(httpcore.WriteError):
            await self._stream.write(self._http.request(request))
        head = None
        while head is None:
            self._http.received(await self._stream.read(HEAD_BYTES))
            head = self._http.head()
        stage("answer")
        return head

    async def _connect(self, stage: Callable[[str], None], timeout: float | None) -> None:  # noqa: ASYNC109
        stage("connect")
        tls = tls_context() if self.route.scheme == b"https" else None
        self._stream = await AsyncBackend(self.route.check).connect_tcp(self.route.name, self.route.number, timeout)
        if tls:
            stage("tls")
            self._stream = await self._stream.start_tls(tls, self.route.name)

    async def chunk(self) -> bytes:
        """More of the body; nothing at its end."""
        while (chunk := self._http.chunk()) is None:
            self._http.received(await self._stream.read(BODY_BYTES))
        return chunk

    async def renewed(self) -> bool:
        return self._http.renewed()

    def has_expired(self) -> bool:
        return expired(self.idle_since) or bool(self._stream.get_extra_info("is_readable"))

    async def aclose(self) -> None:
        if self._stream is not None:
            await self._stream.aclose()


class _AsyncBody:
    # No async generator: the event loop would have to know each of them, to end it at its own end.

    def __init__(self, slot: _AsyncSlot | AsyncProxied) -> None:
        self._slot = slot

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._slot.chunk()
        except Exception as error:  # noqa: BLE001
            _raise_as_httpx(error)
        if not chunk:
            raise StopAsyncIteration
        return chunk


class _LoopConnections:
    """The idle connections of one event loop, closed when the loop shuts down."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = weakref.ref(loop)
        self.process = os.getpid()
        self.idle: dict[Route, deque[_AsyncSlot | AsyncProxied]] = {}
        self._at_shutdown: Any = self._close_with_loop()

    async def start(self) -> None:
        # `asyncio.run` ends every async generator that is still open before it closes the loop: the only public moment at
        # which connections can be closed in the loop that they belong to.
        await anext(self._at_shutdown)

    async def _close_with_loop(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self.aclose()

    async def take(self, route: Route) -> _AsyncSlot | AsyncProxied:
        slots = self.idle.get(route)
        while slots:
            slot = slots.pop()
            if not slot.has_expired():
                return slot
            await slot.aclose()
        return AsyncProxied(route) if route.proxy else _AsyncSlot(route)

    async def give_back(self, slot: _AsyncSlot | AsyncProxied) -> None:
        slots = self.idle.setdefault(slot.route, deque())
        if await slot.renewed() and len(slots) < _MOST_IDLE:
            slot.idle_since = time.monotonic()
            slots.append(slot)
        else:
            await slot.aclose()
        while slots and expired(slots[0].idle_since):
            await slots.popleft().aclose()

    async def aclose(self) -> None:
        idle, self.idle = self.idle, {}
        for slots in idle.values():
            for slot in slots:
                await slot.aclose()


class AsyncTransport:
    """Connections for async calls, each kept with the event loop that opened it."""

    def __init__(self) -> None:
        self._loops: dict[int, _LoopConnections] = {}

    async def handle_async_request(self, request: AnyRequest) -> PlainResponse:
        """Send a request; the response's body is read by the caller, who closes it."""
        route = _route(request)
        if route.proxy and route.check:
            await _acheck_behind_proxy(request.url.host, route.check)
        connections = await self._connections()
        slot = await connections.take(route)
        try:
            head = await slot.send(request)
        except BaseException as error:
            await slot.aclose()
            if isinstance(error, Exception):
                _raise_as_httpx(error)
            raise
        return PlainResponse(head, _AsyncBody(slot), partial(connections.give_back, slot))

    async def aclose(self) -> None:
        """Close the idle connections of the running loop; the transport can be used again."""
        await (await self._connections()).aclose()

    async def _connections(self) -> _LoopConnections:
        loop = asyncio.get_running_loop()
        known = self._loops.get(id(loop))
        if known is None or known.loop() is not loop or known.process != os.getpid():
            for key, other in list(self._loops.items()):
                if (owner := other.loop()) is None or owner.is_closed():
                    self._loops.pop(key, None)
            known = self._loops[id(loop)] = _LoopConnections(loop)
            await known.start()
        return known


def _check_behind_proxy(host: str, check: AddressCheck, deadline: Deadline) -> None:
    """Refuse a target that is known here to be refused; a name that only the proxy can look up is the proxy's to judge."""
    try:
        resolve(host, 443, check, Deadline(deadline.clamp(_ADVISORY_SECONDS)))
    except AddressRefusedError:
        raise
    except (httpcore.ConnectError, httpcore.ConnectTimeout):
        return


async def _acheck_behind_proxy(host: str, check: AddressCheck) -> None:
    try:
        async with asyncio.timeout(_ADVISORY_SECONDS):
            await aresolve(host, 443, check)
    except AddressRefusedError:
        raise
    except (httpcore.ConnectError, TimeoutError):
        return


SHARED: Final = SyncTransport()
ASHARED: Final = AsyncTransport()
atexit.register(SHARED.close)


def sender(base_url: str | None) -> Callable[[Any], AnyResponse]:
    """What sends sync requests for a base URL: connections, or the sandbox in this process. None: connections."""
    # Looked up at each request: what sends does not keep a sandbox alive.
    return (
        (lambda request: _sandbox(base_url).handle_request(request)) if is_sandbox(base_url) else SHARED.handle_request
    )


def asender(base_url: str | None) -> Callable[[Any], Awaitable[AnyResponse]]:
    """The twin of `sender`."""
    if is_sandbox(base_url):
        return lambda request: _sandbox(base_url).handle_async_request(request)
    return ASHARED.handle_async_request


def _sandbox(base_url: str | None) -> SandboxTransport:
    from langchain_cogview.sandbox.service import sandbox_at  # noqa: PLC0415
    from langchain_cogview.sandbox.transport import SandboxTransport  # noqa: PLC0415

    try:
        return SandboxTransport(sandbox_at(base_url or "sandbox:"))
    except LookupError as error:
        raise CogViewConfigurationError(
            f"There is no sandbox {base_url!r} in this process.",
            hint="Keep the Sandbox object while its base_url is used, or use base_url='sandbox:'.",
        ) from error
