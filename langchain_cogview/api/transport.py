"""Connections: per process and event loop, with a total deadline and guarded addresses.

`SyncTransport` and `AsyncTransport` are httpx transports. Each request takes one connection of its own, the last used first;
httpcore does the HTTP and the TLS. A request may carry two extensions:

- `cogview.deadline`, a `Deadline`: every look-up, connect, read and write gets only the time that is left. (The async side
  is bounded by `asyncio.timeout` around the whole step.)
- `cogview.addresses`, an `AddressCheck`: which addresses the connection may go to. It is asked at the very connect, with
  the address that is connected to, so a name cannot resolve to something else afterwards.

Nothing hangs on a generator: the connections belong to the process, keyed by event loop, and are left behind by a fork.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import httpcore
import httpx

from langchain_cogview.addresses import ADDRESSES, AddressCheck, AddressRefusedError
from langchain_cogview.api.environment import httpcore_proxy, proxy_for, tls_context
from langchain_cogview.api.network import AsyncBackend, SyncBackend, aresolve, resolve
from langchain_cogview.api.settings import is_sandbox
from langchain_cogview.deadline import DEADLINE, Deadline
from langchain_cogview.errors import CogViewConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from langchain_cogview.sandbox.transport import SandboxTransport

KEEPALIVE_SECONDS: Final = 30.0
_IDLE_PER_ORIGIN = 64
_ADVISORY_SECONDS = 2.0


class _Route(NamedTuple):
    """What connections can be shared by."""

    scheme: bytes
    host: bytes
    port: int | None
    proxy: str | None
    check: AddressCheck | None


def _route(request: httpx.Request) -> _Route:
    url = request.url
    proxy = proxy_for(url)
    return _Route(url.raw_scheme, url.raw_host, url.port, proxy, request.extensions.get(ADDRESSES))


def _pool_options(route: _Route) -> dict[str, Any]:
    scheme = route.scheme.decode()
    return {
        "ssl_context": tls_context() if scheme == "https" else None,
        "proxy": httpcore_proxy(route.proxy, scheme) if route.proxy else None,
        "max_connections": 1,
        "max_keepalive_connections": 1,
        "keepalive_expiry": KEEPALIVE_SECONDS,
    }


def _httpcore_request(request: httpx.Request) -> httpcore.Request:
    url = request.url
    return httpcore.Request(
        method=request.method,
        url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
        headers=request.headers.raw,
        content=request.stream,
        extensions=request.extensions,
    )


def _length(response: httpcore.Response) -> str | None:
    lengths = [value for name, value in response.headers if name.lower() == b"content-length"]
    return lengths[0].decode("ascii", "replace").strip() if lengths else None


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

    def __init__(self, route: _Route) -> None:
        self.route = route
        self.backend = SyncBackend(None if route.proxy else route.check)
        self.pool = httpcore.ConnectionPool(network_backend=self.backend, **_pool_options(route))


class _SyncBody(httpx.SyncByteStream):
    def __init__(self, stream: Any, done: Callable[[], None]) -> None:
        self._stream, self._done = stream, done

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._stream
        except Exception as error:  # noqa: BLE001
            _raise_as_httpx(error)

    def close(self) -> None:
        self._stream.close()
        self._done()


class SyncTransport(httpx.BaseTransport):
    """Connections for sync calls, shared by the threads of a process."""

    def __init__(self) -> None:
        self._idle: dict[_Route, deque[_SyncSlot]] = {}
        self._process = os.getpid()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the response's body is read by the caller, who closes it."""
        route = _route(request)
        deadline = request.extensions.get(DEADLINE) or Deadline(None)
        if route.proxy and route.check:
            _check_behind_proxy(request.url.host, route.check, deadline)
        slot = self._take(route)
        slot.backend.deadline = deadline
        try:
            response = slot.pool.handle_request(_httpcore_request(request))
        except BaseException as error:
            slot.pool.close()
            if isinstance(error, Exception):
                _raise_as_httpx(error)
            raise
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_SyncBody(response.stream, lambda: self._give_back(slot, _length(response))),
            extensions=response.extensions,
        )

    def close(self) -> None:
        """Close the idle connections; the transport can be used again."""
        idle, self._idle = self._idle, {}
        for slots in idle.values():
            for slot in slots:
                slot.pool.close()

    def _take(self, route: _Route) -> _SyncSlot:
        if self._process != os.getpid():
            # After a fork the sockets are shared with the parent: closed here, they stay open there.
            self.close()
            self._process = os.getpid()
        slots = self._idle.get(route)
        try:
            return slots.pop() if slots else _SyncSlot(route)
        except IndexError:
            return _SyncSlot(route)

    def _give_back(self, slot: _SyncSlot, length: str | None) -> None:
        slots = self._idle.setdefault(slot.route, deque())
        usable = slot.pool.connections and slot.backend.framing.is_exact(length) and self._process == os.getpid()
        if usable and len(slots) < _IDLE_PER_ORIGIN:
            slots.append(slot)
        else:
            slot.pool.close()


class _AsyncSlot:
    def __init__(self, route: _Route) -> None:
        self.route = route
        self.backend = AsyncBackend(None if route.proxy else route.check)
        self.pool = httpcore.AsyncConnectionPool(network_backend=self.backend, **_pool_options(route))


class _AsyncBody(httpx.AsyncByteStream):
    def __init__(self, stream: Any, done: Callable[[], Any]) -> None:
        self._stream, self._done = stream, done

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._stream:
                yield chunk
        except Exception as error:  # noqa: BLE001
            _raise_as_httpx(error)

    async def aclose(self) -> None:
        await self._stream.aclose()
        await self._done()


class _LoopConnections:
    """The idle connections of one event loop, closed when the loop shuts down."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = weakref.ref(loop)
        self.process = os.getpid()
        self.idle: dict[_Route, deque[_AsyncSlot]] = {}
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

    async def aclose(self) -> None:
        idle, self.idle = self.idle, {}
        for slots in idle.values():
            for slot in slots:
                await slot.pool.aclose()


class AsyncTransport(httpx.AsyncBaseTransport):
    """Connections for async calls, each kept with the event loop that opened it."""

    def __init__(self) -> None:
        self._loops: dict[int, _LoopConnections] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the response's body is read by the caller, who closes it."""
        route = _route(request)
        if route.proxy and route.check:
            await _acheck_behind_proxy(request.url.host, route.check)
        connections = await self._connections()
        slots = connections.idle.get(route)
        slot = slots.pop() if slots else _AsyncSlot(route)
        try:
            response = await slot.pool.handle_async_request(_httpcore_request(request))
        except BaseException as error:
            await slot.pool.aclose()
            if isinstance(error, Exception):
                _raise_as_httpx(error)
            raise

        async def give_back() -> None:
            slots = connections.idle.setdefault(slot.route, deque())
            usable = slot.pool.connections and slot.backend.framing.is_exact(_length(response))
            if usable and len(slots) < _IDLE_PER_ORIGIN:
                slots.append(slot)
            else:
                await slot.pool.aclose()

        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_AsyncBody(response.stream, give_back),
            extensions=response.extensions,
        )

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


def sender(base_url: str | None) -> Callable[[httpx.Request], httpx.Response]:
    """What sends sync requests for a base URL: connections, or the sandbox in this process. None: connections."""
    return _sandbox(base_url).handle_request if is_sandbox(base_url) else SHARED.handle_request


def asender(base_url: str | None) -> Callable[[httpx.Request], Awaitable[httpx.Response]]:
    """The twin of `sender`."""
    return _sandbox(base_url).handle_async_request if is_sandbox(base_url) else ASHARED.handle_async_request


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
