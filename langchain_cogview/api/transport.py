"""httpx transports over single connections of httpcore, kept per process and event loop.

`SyncTransport` and `AsyncTransport` acquire one idle connection for each request, the last used first, or open one; there is no
pool to search, so that hundreds in flight cost no more than one. httpcore does HTTP, TLS and proxies; `network` has what
connections are made of. A request may carry these extensions, beside httpcore's own `timeout` and `trace`:

- `cogview.deadline`, a `Deadline`: every look-up, connect, read and write gets only the time that is left. (The async side
  is bounded by `asyncio.timeout` around the whole step.)
- `cogview.addresses`, an `AddressCheck`: which addresses the connection may go to. It is asked at the very connect, with
  the address that is connected to, so a name cannot resolve to something else afterwards.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, NoReturn, TypeVar

import httpcore
import httpx

from langchain_cogview.addresses import ADDRESSES, AddressCheck, check_literal
from langchain_cogview.api.network import AsyncBackend, SyncBackend, UnexpectedDataError
from langchain_cogview.api.settings import httpcore_proxy, proxy_for, tls_context
from langchain_cogview.concurrency import DEADLINE, Deadline

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Iterator


KEEPALIVE_SECONDS: Final = 30.0
"""Seconds that an idle connection can be used again. After a longer time, a gateway may have dropped it."""
MOST_IDLE: Final = 1000
"""Idle connections that are kept for each host."""
_CHUNKS_BETWEEN_YIELDS: Final = 64

ConnectionT = TypeVar("ConnectionT", bound="_Connection")


class _Route(NamedTuple):
    """Requests of the same route can share a connection."""

    scheme: bytes
    host: bytes
    port: int | None
    proxy: str | None
    check: AddressCheck | None

    @classmethod
    def of(cls, request: httpx.Request) -> _Route:
        """Find the route of a request; refuse what is not HTTP, and an address in its URL that a proxy would connect to.

        Returns:
            The route.

        Raises:
            httpx.UnsupportedProtocol: The request is not http or https.
        """
        url = request.url
        if url.scheme not in {"http", "https"}:
            raise httpx.UnsupportedProtocol(f"The URL is not of http or https, but of {url.scheme[:20]!r}.")
        route = cls(url.raw_scheme, url.raw_host, url.port, proxy_for(url), request.extensions.get(ADDRESSES))
        if route.proxy and route.check:
            check_literal(url.host, route.check)
        return route

    @property
    def origin(self) -> httpcore.Origin:
        return httpcore.URL(scheme=self.scheme, host=self.host, port=self.port, target=b"/").origin

    def options(self, keepalive_seconds: float) -> dict[str, Any]:
        scheme = self.scheme.decode()
        tls = tls_context() if scheme == "https" else None
        proxy = httpcore_proxy(self.proxy, scheme) if self.proxy else None
        return {"ssl_context": tls, "proxy": proxy, "keepalive_expiry": keepalive_seconds}


def _httpcore_request(request: httpx.Request) -> httpcore.Request:
    url = request.url
    return httpcore.Request(
        method=request.method,
        url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
        headers=request.headers.raw,
        content=request.stream,
        extensions=request.extensions,
    )


# --- errors and logs


def raise_as_httpx(error: BaseException) -> NoReturn:
    """Raise an error of httpcore, httpx2 or httpcore2 as httpx's class of the same name, and any other as it is.

    The callers see one family of errors, whatever sends their requests.
    """
    if not isinstance(error, httpx.HTTPError):
        for base in type(error).__mro__:
            if base.__module__.partition(".")[0] in {"httpcore", "httpcore2", "httpx2"}:
                known = getattr(httpx, base.__name__, None)
                if isinstance(known, type) and issubclass(known, httpx.RequestError | httpx.InvalidURL):
                    raise known(str(error)) from error
    raise error


_IN_HTTPCORE: Final[ContextVar[bool]] = ContextVar("cogview_request", default=False)


def _shorten_records(record: logging.LogRecord) -> bool:
    # httpcore's records are "event details"; the details can hold what a server has put into the head of its reply.
    if _IN_HTTPCORE.get():
        record.msg, record.args = str(record.msg).partition(" ")[0], ()
    return True


for _name in ("connection", "http11", "proxy", "socks"):
    logging.getLogger(f"httpcore.{_name}").addFilter(_shorten_records)


class _HttpcoreCall:
    """Around calls of httpcore: shorten its log records to the event, and raise its errors as those of httpx."""

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = _IN_HTTPCORE.set(True)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with contextlib.suppress(ValueError):  # a coroutine that is destroyed ends in another context
            _IN_HTTPCORE.reset(self._token)
        if isinstance(error, Exception):
            raise_as_httpx(error)


# --- connections


class _Connection(ABC):
    """One connection to one route, open or not."""

    backend: SyncBackend | AsyncBackend
    _http: httpcore.ConnectionInterface | httpcore.AsyncConnectionInterface

    def __init__(self, route: _Route) -> None:
        self.route = route
        self.idle_since = 0.0

    def is_usable(self) -> bool:
        """Return whether another request can be sent, as far as this side can see."""
        stream = self.backend.stream
        whole = stream is not None and not stream.is_closed and stream.guard.is_reusable
        return whole and self._http.is_idle() and not self._http.has_expired()

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""


class _SyncConnection(_Connection):
    backend: SyncBackend
    _http: httpcore.ConnectionInterface

    def __init__(self, route: _Route, keepalive_seconds: float) -> None:
        super().__init__(route)
        self.backend = SyncBackend(None if route.proxy else route.check)
        # A pool opens the right kind of connection for a proxy, too. The pool itself is not used.
        pool = httpcore.ConnectionPool(network_backend=self.backend, **route.options(keepalive_seconds))
        self._http = pool.create_connection(route.origin)

    def send(self, request: httpx.Request, deadline: Deadline) -> httpcore.Response:
        self.backend.deadline = deadline
        with _HttpcoreCall():
            response = self._http.handle_request(_httpcore_request(request))
            if self.backend.stream:
                self.backend.stream.guard.head_was_read(response.status, response.headers)
        return response

    def close(self) -> None:
        self._http.close()
        if self.backend.stream:
            self.backend.stream.close()


class _SyncBody(httpx.SyncByteStream):
    def __init__(
        self, connection: _SyncConnection, response: httpcore.Response, done: Callable[[_SyncConnection], None]
    ) -> None:
        self._connection, self._response, self._done = connection, response, done
        self._is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        parts = self._response.iter_stream()
        stream = self._connection.backend.stream
        while True:
            with _HttpcoreCall():
                part = next(parts, None)
                if part and stream:
                    stream.guard.chunk_was_read(len(part))
            if part is None:
                return
            yield part

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            try:
                with _HttpcoreCall():
                    self._response.close()
            except BaseException:
                self._connection.close()
                raise
            self._done(self._connection)


class _AsyncConnection(_Connection):
    backend: AsyncBackend
    _http: httpcore.AsyncConnectionInterface

    def __init__(self, route: _Route, keepalive_seconds: float, open_sockets: set[socket.socket]) -> None:
        super().__init__(route)
        self.backend = AsyncBackend(None if route.proxy else route.check, open_sockets)
        pool = httpcore.AsyncConnectionPool(network_backend=self.backend, **route.options(keepalive_seconds))
        self._http = pool.create_connection(route.origin)

    async def send(self, request: httpx.Request) -> httpcore.Response:
        with _HttpcoreCall():
            response = await self._http.handle_async_request(_httpcore_request(request))
            if self.backend.stream:
                self.backend.stream.guard.head_was_read(response.status, response.headers)
        return response

    def close(self) -> None:
        """Close the connection. This works without its event loop, too."""
        if self.backend.stream:
            self.backend.stream.close()


class _AsyncBody(httpx.AsyncByteStream):
    def __init__(
        self, connection: _AsyncConnection, response: httpcore.Response, done: Callable[[_AsyncConnection], None]
    ) -> None:
        self._connection, self._response, self._done = connection, response, done
        self._is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        stream = self._connection.backend.stream
        count = 0
        parts: Any = self._response.aiter_stream()
        async with contextlib.aclosing(parts):
            while True:
                with _HttpcoreCall():
                    part = await anext(parts, None)
                    if part and stream:
                        stream.guard.chunk_was_read(len(part))
                if part is None:
                    return
                yield part
                count += 1
                if count % _CHUNKS_BETWEEN_YIELDS == 0:
                    # What has come already is read without waiting: the loop and its timers run in between.
                    await asyncio.sleep(0)

    async def aclose(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            try:
                with _HttpcoreCall():
                    await self._response.aclose()
            except BaseException:
                self._connection.close()
                raise
            self._done(self._connection)


class _Idle(Generic[ConnectionT]):
    """The idle connections of the threads of a process, or of an event loop."""

    def __init__(self, keepalive_seconds: float) -> None:
        self._keepalive_seconds = keepalive_seconds
        self._connections: dict[_Route, deque[ConnectionT]] = {}

    def acquire(self, route: _Route) -> ConnectionT | None:
        """Return the connection that was used last, or None."""
        connections = self._connections.get(route)
        with contextlib.suppress(IndexError):  # another thread may acquire the last
            while connections:
                connection = connections.pop()
                if connection.is_usable():
                    return connection
                connection.close()
        return None

    def release(self, connection: ConnectionT) -> None:
        """Keep a connection if it can be used again, or close it. Close idle connections that are too old."""
        connections = self._connections.setdefault(connection.route, deque())
        if connection.is_usable() and len(connections) < MOST_IDLE:
            connection.idle_since = time.monotonic()
            connections.append(connection)
        else:
            connection.close()
        with contextlib.suppress(IndexError):
            while connections and time.monotonic() - connections[0].idle_since > self._keepalive_seconds:
                connections.popleft().close()

    def close(self) -> None:
        """Close all idle connections."""
        connections, self._connections = self._connections, {}
        for item in connections.values():
            for connection in item:
                connection.close()


# --- the transports


class SyncTransport(httpx.BaseTransport):
    """Connections for sync calls, shared by the threads of a process.

    Args:
        keepalive_seconds: How long an idle connection can be used again.
    """

    def __init__(self, *, keepalive_seconds: float = KEEPALIVE_SECONDS) -> None:
        self._keepalive_seconds = keepalive_seconds
        self._idle: _Idle[_SyncConnection] = _Idle(keepalive_seconds)
        self._process = os.getpid()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request. The caller reads the body of the response and closes it.

        Returns:
            The response, whose body has not been read.
        """
        route = _Route.of(request)
        deadline = request.extensions.get(DEADLINE) or Deadline(None)
        while True:
            idle = self._connections().acquire(route)
            connection = idle or _SyncConnection(route, self._keepalive_seconds)
            try:
                response = connection.send(request, deadline)
            except BaseException as error:
                connection.close()
                if idle and isinstance(error, UnexpectedDataError):
                    continue  # it became unusable in the last moment
                raise
            body = _SyncBody(connection, response, lambda connection: self._connections().release(connection))
            return httpx.Response(
                response.status, headers=response.headers, stream=body, extensions=response.extensions
            )

    def close(self) -> None:
        """Close the idle connections. The transport stays usable."""
        self._connections().close()

    def _connections(self) -> _Idle[_SyncConnection]:
        if self._process != os.getpid():
            # After a fork the sockets are shared with the parent: closed here, they stay open there.
            self._process = os.getpid()
            idle, self._idle = self._idle, _Idle(self._keepalive_seconds)
            idle.close()
        return self._idle


class _LoopConnections:
    """The connections of one event loop. Nothing here refers to the loop, because that would keep it alive."""

    def __init__(self, keepalive_seconds: float) -> None:
        self.process = os.getpid()
        self.idle: _Idle[_AsyncConnection] = _Idle(keepalive_seconds)
        self.open_sockets: set[socket.socket] = set()

    def close(self) -> None:
        """Close all connections, also those in use by a loop that is gone."""
        self.idle.close()
        for item in list(self.open_sockets):
            item.close()
        self.open_sockets.clear()


class AsyncTransport(httpx.AsyncBaseTransport):
    """Connections for async calls, each used only in the event loop that opened it.

    The idle connections of a loop are closed when the loop is garbage collected, or when another loop is used and this one is
    found closed.

    Args:
        keepalive_seconds: How long an idle connection can be used again.
    """

    def __init__(self, *, keepalive_seconds: float = KEEPALIVE_SECONDS) -> None:
        self._keepalive_seconds = keepalive_seconds
        self._loops: dict[int, tuple[weakref.ref[asyncio.AbstractEventLoop], _LoopConnections]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Async version of `SyncTransport.handle_request`.

        Returns:
            The response, whose body has not been read.
        """
        route = _Route.of(request)
        connections = self._connections()
        while True:
            idle = connections.idle.acquire(route)
            connection = idle or _AsyncConnection(route, self._keepalive_seconds, connections.open_sockets)
            try:
                response = await connection.send(request)
            except BaseException as error:
                connection.close()
                if idle and isinstance(error, UnexpectedDataError):
                    continue  # it became unusable in the last moment
                raise
            body = _AsyncBody(connection, response, connections.idle.release)
            return httpx.Response(
                response.status, headers=response.headers, stream=body, extensions=response.extensions
            )

    async def aclose(self) -> None:
        """Close the idle connections of the running loop. The transport stays usable."""
        self._connections().idle.close()

    def _connections(self) -> _LoopConnections:
        loop = asyncio.get_running_loop()
        owner, known = self._loops.get(id(loop), (None, None))
        if known is None or owner is None or owner() is not loop or known.process != os.getpid():
            for key, (other, connections) in list(self._loops.items()):
                closed = other()
                if closed is None or closed.is_closed() or connections.process != os.getpid():
                    self._loops.pop(key, None)
                    connections.close()
            known = _LoopConnections(self._keepalive_seconds)
            self._loops[id(loop)] = weakref.ref(loop), known
            # At the latest with the interpreter's exit.
            weakref.finalize(loop, known.close)
        return known


SHARED: Final = SyncTransport()
ASHARED: Final = AsyncTransport()
atexit.register(SHARED.close)
