"""The one function that the endpoint and the download send with.

It sends by this package's transports, to the sandbox in this process, or by a client that was injected, of httpx or httpx2.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import httpx

from langchain_cogview.api.settings import is_sandbox
from langchain_cogview.api.transport import ASHARED, SHARED, raise_as_httpx
from langchain_cogview.errors import CogViewConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from langchain_cogview.sandbox.service import SandboxTransport


def sender(base_url: str | None, client: httpx.Client | None = None) -> Callable[[httpx.Request], httpx.Response]:
    """Return the function that sends sync requests: an injected client, a sandbox in this process, or `SyncTransport`.

    Args:
        base_url: The base URL that requests go to; None for `SyncTransport`.
        client: The injected client, if any.

    Returns:
        A function that sends a request and returns the response with its body unread.
    """
    if client is not None:
        return lambda request: _sent_by(client, request)
    # Looked up at each request: what sends does not keep a sandbox alive.
    return (
        (lambda request: _sandbox(base_url).handle_request(request)) if is_sandbox(base_url) else SHARED.handle_request
    )


def asender(
    base_url: str | None, client: httpx.AsyncClient | None = None
) -> Callable[[httpx.Request], Awaitable[httpx.Response]]:
    """Async version of `sender`.

    Returns:
        As `sender`.
    """
    if client is not None:
        return lambda request: _asent_by(client, request)
    if is_sandbox(base_url):
        return lambda request: _sandbox(base_url).handle_async_request(request)
    return ASHARED.handle_async_request


def _sandbox(base_url: str | None) -> SandboxTransport:
    from langchain_cogview.sandbox.service import SandboxTransport, sandbox_at  # noqa: PLC0415

    try:
        return SandboxTransport(sandbox_at(base_url or "sandbox:"))
    except LookupError as error:
        raise CogViewConfigurationError(
            f"There is no sandbox {base_url!r} in this process.",
            hint="Keep the Sandbox object while its base_url is used, or use base_url='sandbox:'.",
        ) from error


# --- injected clients, of httpx, httpx2 or anything of their form. They do not follow redirects, which would pass the key on and
# repeat the POST.


def is_client(value: object, *, is_async: bool) -> bool:
    """Return whether an object is an HTTP client of the form of httpx."""
    kind = type(value)
    send = getattr(kind, "send", None)
    return (
        not isinstance(value, type)
        and callable(send)
        and callable(getattr(kind, "build_request", None))
        and inspect.iscoroutinefunction(send) == is_async
    )


def checked_client(value: Any, *, sync: bool) -> Any:
    """Check an injected HTTP client.

    Returns:
        The client, unchanged.

    Raises:
        ValueError: The object is not a client of the right kind.
    """
    if value is None:
        return None
    if not is_client(value, is_async=not sync):
        kind = "Client" if sync else "AsyncClient"
        name = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
        raise ValueError(f"It takes an httpx.{kind} or httpx2.{kind}; this is of type {name}.")
    return value


def _rebuilt(client: Any, request: httpx.Request) -> Any:
    """Build the request with the client: of its own library's class, with its headers and parameters added.

    Returns:
        The request.
    """
    return client.build_request(
        request.method,
        str(request.url),
        headers=[item for item in request.headers.multi_items() if item[0] not in {"host", "content-length"}],
        content=request.content or None,
        extensions=request.extensions,
    )


def _response(theirs: Any, stream: httpx.SyncByteStream | httpx.AsyncByteStream) -> httpx.Response:
    headers = theirs.headers.multi_items()
    if theirs.is_stream_consumed:  # a hook of the client's has read, and decoded, the body
        headers = [item for item in headers if item[0].lower() != "content-encoding"]
    return httpx.Response(theirs.status_code, headers=headers, stream=stream, extensions=theirs.extensions)


class _ClientBody(httpx.SyncByteStream):
    def __init__(self, response: Any) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        try:
            if self._response.is_stream_consumed:
                yield self._response.content
            else:
                yield from self._response.iter_raw()
        except Exception as error:  # noqa: BLE001
            raise_as_httpx(error)

    def close(self) -> None:
        self._response.close()


class _AsyncClientBody(httpx.AsyncByteStream):
    def __init__(self, response: Any) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            if self._response.is_stream_consumed:
                yield self._response.content
                return
            parts = self._response.aiter_raw()
            async with contextlib.aclosing(parts):
                async for part in parts:
                    yield part
        except Exception as error:  # noqa: BLE001
            raise_as_httpx(error)

    async def aclose(self) -> None:
        await self._response.aclose()


def _sent_by(client: Any, request: httpx.Request) -> httpx.Response:
    try:
        theirs = client.send(_rebuilt(client, request), stream=True, follow_redirects=False)
    except Exception as error:  # noqa: BLE001
        raise_as_httpx(error)
    return _response(theirs, _ClientBody(theirs))


async def _asent_by(client: Any, request: httpx.Request) -> httpx.Response:
    try:
        theirs = await client.send(_rebuilt(client, request), stream=True, follow_redirects=False)
    except Exception as error:  # noqa: BLE001
        raise_as_httpx(error)
    return _response(theirs, _AsyncClientBody(theirs))
