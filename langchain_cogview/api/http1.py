"""HTTP/1.1 over one connection, without I/O: the bytes of a request, and what the bytes of its reply mean, which h11 reads.

Both transports drive one `Conversation`: they write what `request` gives, and hand over what they read until `head`, and then
each `chunk`, is there. Above h11 there is no pool, no lock and no turn of the event loop, which take as long as h11 itself.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

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


@cache
def _request_like(method: str) -> h11.Request:
    return h11.Request(method=method, target="/", headers=[("Host", "")])


class Conversation:
    """Requests and replies on one connection, one after the other."""

    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST_HEAD)

    def request(self, request: AnyRequest) -> bytes:
        """The bytes of a request whose content is in memory, and framed as its headers say.

        Raises:
            httpx.LocalProtocolError: A header would end its line.
        """
        lines = [b"%s: %s\r\n" % field for field in request.headers.raw]
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise httpx.LocalProtocolError("A header has a line break or a NUL character in it.")
        # h11 is told of a request with the same method, by which it judges the reply: none here has a Connection header or a
        # transfer coding. Writing this one itself, it would look at each header at every call, which takes as long as the reply.
        self._h11.send(_request_like(request.method))
        self._h11.send(_END)
        return b"%s %s HTTP/1.1\r\n%s\r\n%s" % (
            request.method.encode(),
            request.url.raw_path,
            head,
            request.content,
        )

    def received(self, data: bytes) -> None:
        """Take what was read; nothing at the end of the connection.

        Raises:
            httpx.RemoteProtocolError: The end came before the reply.
        """
        if not data and self._h11.their_state is h11.SEND_RESPONSE:
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
        _checked(self._h11.receive_data, data)

    def head(self) -> Head | None:
        """Status and headers of the reply; None while more has to be read.

        Raises:
            httpx.RemoteProtocolError: What came is no HTTP.
        """
        while True:
            event = _checked(self._h11.next_event)
            if isinstance(event, h11.Response):
                return event.status_code, event.headers.raw_items()
            if event is h11.NEED_DATA:
                return None
            # 100 to 199: the reply is still to come

    def chunk(self) -> bytes | None:
        """More of the body, nothing at its end; None while more has to be read.

        Raises:
            httpx.RemoteProtocolError: The body is broken, or ended before it was whole.
        """
        event = _checked(self._h11.next_event)
        if event is h11.NEED_DATA:
            return None
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    def renewed(self) -> bool:
        """Get ready for another request; False where there can be none.

        A reply that was not read to its end, or that has something behind it, ends the connection: a server that sends more
        than it announced would answer the next request with it.
        """
        connection = self._h11
        whole = connection.our_state is h11.DONE and connection.their_state is h11.DONE
        if not whole or connection.trailing_data != (b"", False):
            return False
        connection.start_next_cycle()
        return True


def _checked(step: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return step(*arguments)
    except h11.RemoteProtocolError as error:
        raise httpx.RemoteProtocolError(str(error)) from error
