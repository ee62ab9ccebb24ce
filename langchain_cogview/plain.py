"""A request and a response as the transports and their callers need them, in place of httpx's.

httpx's own take an eighth of a call: they copy and parse what is known, and guard against uses that there are none of here.
httpx's requests come from the download and the doctor's probe, and go to the sandbox and to injected clients, whose responses
are httpx's too; they have what is named here under the same names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

Headers = list[tuple[bytes, bytes]]
Head = tuple[int, Headers]
"""Status and headers of a reply."""


class PlainHeaders(NamedTuple):
    """The headers of a `PlainRequest`."""

    raw: Headers


class PlainRequest:
    """A request.

    Args:
        method: In capitals.
        url: Where to; parsed once for many requests.
        headers: Beside `Host` and `Content-Length`, which it adds.
        content: The body; None for none.
        extensions: As `api.transport` says.
    """

    __slots__ = ("content", "extensions", "headers", "method", "url")

    def __init__(
        self, method: str, url: httpx.URL, *, headers: dict[str, str], content: bytes | None, extensions: dict[str, Any]
    ) -> None:
        self.method, self.url, self.extensions = method, url, extensions
        self.content = content or b""
        raw = [(b"Host", url.netloc), *((name.encode(), value.encode()) for name, value in headers.items())]
        if content is not None:
            raw.append((b"Content-Length", b"%d" % len(content)))
        self.headers = PlainHeaders(raw)


class PlainResponse:
    """A response whose body is unread.

    Args:
        head: Status and headers.
        body: What comes, as it comes; an async iterator for the async side.
        done: Called when the caller needs no more of it; gives an awaitable on the async side.

    Attributes:
        status_code: HTTP's.
        is_closed: Whether its connection was let go.
        headers: By name, in small letters; what came several times is joined by commas.
    """

    __slots__ = ("_body", "_done", "headers", "is_closed", "status_code")

    content = b""
    """What was read already."""
    is_stream_consumed = False

    def __init__(self, head: Head, body: Any, done: Callable[[], Any]) -> None:
        self.status_code, raw = head
        self.headers: dict[str, str] = {}
        for each, value in raw:
            name, text = each.decode("latin-1").lower(), value.decode("latin-1")
            self.headers[name] = f"{self.headers[name]}, {text}" if name in self.headers else text
        self._body, self._done = body, done
        self.is_closed = False

    def iter_raw(self) -> Iterator[bytes]:
        """The body as it comes."""
        body: Iterator[bytes] = self._body
        return body

    def aiter_raw(self) -> AsyncIterator[bytes]:
        """The body as it comes. The twin of `iter_raw`."""
        body: AsyncIterator[bytes] = self._body
        return body

    def close(self) -> None:
        """Let the connection go, once: to the next request when the body was read to its end."""
        if not self.is_closed:
            self.is_closed = True
            self._done()

    async def aclose(self) -> None:
        """Let the connection go. The twin of `close`."""
        if not self.is_closed:
            self.is_closed = True
            await self._done()


AnyRequest = httpx.Request | PlainRequest
AnyResponse = httpx.Response | PlainResponse
