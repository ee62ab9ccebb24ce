"""HTTP/1.1 over one connection, without I/O: the bytes of a request, and what the bytes of its reply mean.

Both transports drive one `Conversation`: they write what `request` gives, and hand over what they read until `head`, and then
each `chunk`, is there. Above it there is no pool, no lock and no turn of the event loop, which take as long as all of this.

Replies are h11's to read: heads in pieces or with anything odd in them, bodies in chunks or up to the end of the connection.
Only the usual kind, with a plain head that came at once and tells the body's length, is read here, to the same effect: h11
takes an eighth of a call for it.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Self

import h11
import httpx

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_cogview.plain import AnyRequest, Head

HEAD_BYTES: Final = 2**16
"""What is asked of a connection at once for the head of a reply, with which a short body comes."""
BODY_BYTES: Final = 2**18
"""What is asked of a connection at once for the rest; of a picture of megabytes less would cost half as much time again."""
_MOST_HEAD: Final = 100 * 1024
_END: Final = h11.EndOfMessage()

# h11's patterns take a time that grows with the square of a run of blanks: on 64 kB, half a minute in which neither deadline nor
# event loop has a say. So it sees no head with such a run, and what stands around chunks it gets piece by piece, up to a limit.
_BLANKS: Final = re.compile(rb"[ \t]{256}")
_HEAD_END: Final = re.compile(rb"\n\r?\n")
_PIECE_BYTES: Final = 2**12
_MOST_AROUND_A_CHUNK: Final = 2**12

# A part of what h11 takes for a head. What one part of the pattern matches, the next cannot begin with: a head is gone through
# once, whatever is in it.
_PLAIN_HEAD: Final = re.compile(
    rb"HTTP/1\.1 ([2-5][0-9]{2})(?: [^\0\n\v\f\r]*)?\r\n((?:[-!#$%&'*+.^_`|~0-9a-zA-Z]+:[^\0\n\v\f\r]*\r\n)+)\r\n"
)
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_BODILESS: Final = (204, 304)


class Conversation:
    """Requests and replies on one connection, one after the other."""

    def __init__(self) -> None:
        self._method = ""
        self._reply: _SizedReply | _AnyReply | None = None

    def request(self, request: AnyRequest) -> bytes:
        """The bytes of a request whose content is in memory, and framed as its headers say.

        Raises:
            httpx.LocalProtocolError: A header would end its line.
        """
        lines = [b"%s: %s\r\n" % field for field in request.headers.raw]
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise httpx.LocalProtocolError("A header has a line break or a NUL character in it.")
        self._method, self._reply = request.method, None
        return b"%s %s HTTP/1.1\r\n%s\r\n%s" % (
            request.method.encode(),
            request.url.raw_path,
            head,
            request.content,
        )

    def received(self, data: bytes) -> None:
        """Take what was read; nothing at the end of the connection.

        Raises:
            httpx.RemoteProtocolError: The end came before the reply was whole.
        """
        if self._reply is not None:
            self._reply.received(data)
        elif data:
            self._reply = _SizedReply.of(self._method, data) or _AnyReply(self._method, data)
        else:
            raise _no_reply()

    def head(self) -> Head | None:
        """Status and headers of the reply; None while more has to be read.

        Raises:
            httpx.RemoteProtocolError: What came is no HTTP.
        """
        return None if self._reply is None else self._reply.head()

    def chunk(self) -> bytes | None:
        """More of the body, nothing at its end; None while more has to be read.

        Raises:
            httpx.RemoteProtocolError: The body is broken, or has ended before it was whole.
        """
        return None if self._reply is None else self._reply.chunk()

    def renewed(self) -> bool:
        """Whether another request may follow.

        A reply that was not read to its end, or that has something behind it, ends the connection: a server that sends more
        than it announced would answer the next request with it.
        """
        return self._reply is not None and self._reply.is_exact()


class _SizedReply:
    """A reply with a plain head that came at once and tells the body's length."""

    def __init__(self, head: Head, size: int, came: bytes) -> None:
        self._head, self._size, self._left, self._came = head, size, size, came

    @classmethod
    def of(cls, method: str, data: bytes) -> Self | None:
        """The reply that begins so; None for one of another kind."""
        found = _PLAIN_HEAD.match(data)
        if found is None or method not in {"POST", "GET"} or int(found[1]) in _BODILESS:
            return None
        fields = [
            (name, value.strip(b" \t"))
            for name, _, value in (line.partition(b":") for line in found[2].split(b"\r\n")[:-1])
        ]
        sizes = []
        for name, value in fields:
            low = name.lower()
            if low == b"content-length":
                sizes.append(value)
            elif low == b"transfer-encoding" or (low == b"connection" and value.lower() != b"keep-alive"):
                return None
        if len(sizes) != 1 or not _LENGTH.fullmatch(sizes[0]):
            return None
        return cls((int(found[1]), fields), int(sizes[0]), data[found.end() :])

    def received(self, data: bytes) -> None:
        if not data:
            raise httpx.RemoteProtocolError(
                f"The server closed the connection after {self._size - self._left} of {self._size} bytes."
            )
        self._came += data

    def head(self) -> Head:
        return self._head

    def chunk(self) -> bytes | None:
        if self._left and not self._came:
            return None
        chunk, self._came = self._came[: self._left], self._came[self._left :]
        self._left -= len(chunk)
        return chunk

    def is_exact(self) -> bool:
        return not self._left and not self._came


class _AnyReply:
    """A reply of any kind, as h11 reads it."""

    def __init__(self, method: str, data: bytes) -> None:
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST_HEAD)
        # The method is what h11 judges a reply by; no request here has a Connection header or a transfer coding.
        self._h11.send(_request_like(method))
        self._h11.send(_END)
        self._came = data
        self._tail = b""

    def received(self, data: bytes) -> None:
        if data:
            self._came += data
        elif self._h11.their_state is h11.SEND_RESPONSE:
            raise _no_reply()
        else:
            _checked(self._h11.receive_data, data)

    def head(self) -> Head | None:
        while (event := self._next()) is not h11.NEED_DATA:
            if isinstance(event, h11.Response):
                return event.status_code, event.headers.raw_items()
            # 100 to 199: the reply is still to come
        return None

    def chunk(self) -> bytes | None:
        event = self._next()
        if event is h11.NEED_DATA:
            return None
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    def is_exact(self) -> bool:
        connection = self._h11
        whole = connection.our_state is h11.DONE and connection.their_state is h11.DONE
        return whole and not self._came and connection.trailing_data == (b"", False)

    def _next(self) -> Any:
        while (event := _checked(self._h11.next_event)) is h11.NEED_DATA and self._came:
            piece, self._came = self._came[:_PIECE_BYTES], self._came[_PIECE_BYTES:]
            if self._h11.their_state is h11.SEND_RESPONSE:
                head = _HEAD_END.split(self._tail + piece, maxsplit=1)[0]
                if _BLANKS.search(head):
                    raise httpx.RemoteProtocolError("The head of the reply has too many blanks in a row.")
                self._tail = head[-256:]
            elif len(self._h11.trailing_data[0]) > _MOST_AROUND_A_CHUNK:
                raise httpx.RemoteProtocolError("There is too much between two chunks of the reply.")
            _checked(self._h11.receive_data, piece)
        return event


@cache
def _request_like(method: str) -> h11.Request:
    return h11.Request(method=method, target="/", headers=[("Host", "")])


def _no_reply() -> httpx.RemoteProtocolError:
    return httpx.RemoteProtocolError("Server disconnected without sending a response.")


def _checked(step: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return step(*arguments)
    except h11.RemoteProtocolError as error:
        raise httpx.RemoteProtocolError(str(error)) from error
