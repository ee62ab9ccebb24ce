"""What connections are shared by, and those behind a proxy, which are httpcore's whole: it knows CONNECT and SOCKS."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import httpcore

from langchain_cogview.api.environment import httpcore_proxy, tls_context
from langchain_cogview.api.network import AsyncBackend, SyncBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from langchain_cogview.addresses import AddressCheck
    from langchain_cogview.plain import AnyRequest, Head

KEEPALIVE_SECONDS: Final = 30.0
_PORTS: Final = {b"http": 80, b"https": 443}


class Route(NamedTuple):
    """What connections can be shared by."""

    scheme: bytes
    host: bytes
    port: int | None
    proxy: str | None
    check: AddressCheck | None

    @property
    def name(self) -> str:
        """The host."""
        return self.host.decode("ascii")

    @property
    def number(self) -> int:
        """The port, be it the usual one."""
        return self.port or _PORTS[self.scheme]


def expired(since: float) -> bool:
    """Whether a connection that is idle since then is too old to be used: nobody knows what became of it."""
    return time.monotonic() - since > KEEPALIVE_SECONDS


def _pool_options(route: Route) -> dict[str, Any]:
    scheme = route.scheme.decode()
    return {
        "ssl_context": tls_context() if scheme == "https" else None,
        "proxy": httpcore_proxy(route.proxy or "", scheme),
        "max_connections": 1,
        "max_keepalive_connections": 1,
        "keepalive_expiry": KEEPALIVE_SECONDS,
    }


def _httpcore_request(request: AnyRequest) -> httpcore.Request:
    url = request.url
    return httpcore.Request(
        method=request.method,
        url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
        headers=request.headers.raw,
        content=request.content,
        extensions=request.extensions,  # its trace tells what was sent
    )


def _length(response: httpcore.Response) -> str | None:
    lengths = [value for name, value in response.headers if name.lower() == b"content-length"]
    return lengths[0].decode("ascii", "replace").strip() if lengths else None


class SyncProxied:
    """One connection, open or not, to one route behind a proxy. The proxy, not this machine, looks the name up."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.backend = SyncBackend(None, framed=True)
        self.idle_since = 0.0
        self._pool = httpcore.ConnectionPool(network_backend=self.backend, **_pool_options(route))
        self._response: Any = None

    def send(self, request: AnyRequest) -> Head:
        """Send a request, and read status and headers of its reply."""
        self._response = self._pool.handle_request(_httpcore_request(request))
        return self._response.status, self._response.headers

    def chunks(self) -> Iterator[bytes]:
        """The body of the reply."""
        return iter(self._response.stream)

    def renewed(self) -> bool:
        """Get ready for another request; False where there can be none."""
        self._response.close()
        return bool(self._pool.connections) and self.backend.framing.is_exact(_length(self._response))

    def has_expired(self) -> bool:
        """Whether it was idle for too long; the pool sees by itself what the other side closed."""
        return expired(self.idle_since)

    def close(self) -> None:
        """Close it, or what is open of it."""
        self._pool.close()


class AsyncProxied:
    """The twin of `SyncProxied`."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.backend = AsyncBackend(None, framed=True)
        self.idle_since = 0.0
        self._pool = httpcore.AsyncConnectionPool(network_backend=self.backend, **_pool_options(route))
        self._response: Any = None
        self._chunks: AsyncIterator[bytes] | None = None

    async def send(self, request: AnyRequest) -> Head:
        """Send a request, and read status and headers of its reply."""
        self._response = await self._pool.handle_async_request(_httpcore_request(request))
        self._chunks = aiter(self._response.stream)
        return self._response.status, self._response.headers

    async def chunk(self) -> bytes:
        """More of the body; nothing at its end."""
        return await anext(self._chunks, b"") if self._chunks else b""

    async def renewed(self) -> bool:
        """Get ready for another request; False where there can be none."""
        await self._response.aclose()
        return bool(self._pool.connections) and self.backend.framing.is_exact(_length(self._response))

    def has_expired(self) -> bool:
        """Whether it was idle for too long; the pool sees by itself what the other side closed."""
        return expired(self.idle_since)

    async def aclose(self) -> None:
        """Close it, or what is open of it."""
        await self._pool.aclose()
