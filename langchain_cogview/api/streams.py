"""Connections of an event loop, on asyncio's own transports, and what one reply takes of a connection.

httpcore's stream is anyio's, which gives the loop a turn and asks the system to pause and resume at every read. This one
hands over what the loop has received already.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import httpcore

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

_MOST_WAITING: Final = 2**18


class Framing:
    """Counts what one reply took of a connection, so that one with something behind its reply is not used again.

    A server (or whoever sits in between) that sends more than it announced would answer the next request with it. For
    connections behind a proxy, where httpcore keeps to itself what was left over; elsewhere `Conversation` knows it.
    """

    _MAX_HEAD = 100_000

    def __init__(self) -> None:
        self._received = 0
        self._head = b""
        self._head_size: int | None = None

    def sent(self) -> None:
        """A request is being sent: what comes now is its reply."""
        if self._received:
            self.__init__()  # type: ignore[misc]

    def received(self, chunk: bytes) -> None:
        """The connection gave some bytes."""
        self._received += len(chunk)
        if self._head_size is None and len(self._head) < self._MAX_HEAD:
            self._head += chunk
            end = self._head.find(b"\r\n\r\n")
            if end >= 0:
                self._head_size = end + 4
                self._head = b""

    def is_exact(self, content_length: str | None) -> bool:
        """Whether the reply took exactly what its head announced; False for one without a length."""
        if self._head_size is None or not (content_length or "").isdecimal():
            return False
        return self._received == self._head_size + int(content_length or "")


class AsyncStream(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """One connection; what came over it and is not read yet, and beyond 256 kB the sender has to wait.

    Time limits are the caller's: `asyncio.timeout` around the whole exchange.
    """

    def __init__(self, framing: Callable[[], Framing | None]) -> None:
        self._new_framing = framing
        self._framing = framing()
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._paused = False
        self._over = False
        self._error: Exception | None = None
        self._transport: Any = None

    # --- the event loop's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Keep what came."""
        self._chunks.append(data)
        self._size += len(data)
        if self._size > _MOST_WAITING and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        _wake(self._reader)

    def eof_received(self) -> None:
        """The other side has said all; asyncio closes the connection."""
        self._over = True
        _wake(self._reader)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._over = True
        self._error = exc
        _wake(self._reader)
        _wake(self._room)

    def pause_writing(self) -> None:
        """The other side takes no more for the moment."""
        self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """It does again."""
        _wake(self._room)
        self._room = None

    # --- the reader's and writer's side

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109  httpcore's interface
        """The next bytes; none at the end."""
        while not self._chunks:
            if isinstance(self._error, OSError):
                raise httpcore.ReadError(str(self._error)) from self._error
            if self._error is not None:
                raise self._error
            if self._over:
                return b""
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        chunk = self._chunks.popleft()
        if len(chunk) > max_bytes:
            self._chunks.appendleft(chunk[max_bytes:])
            chunk = chunk[:max_bytes]
        self._size -= len(chunk)
        if self._paused and self._size <= _MOST_WAITING:
            self._paused = False
            self._transport.resume_reading()
        if self._framing:
            self._framing.received(chunk)
        return chunk

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Send bytes; waits until they are on their way."""
        if not buffer:
            return
        if self._framing:
            self._framing.sent()
        if self._transport.is_closing():
            raise httpcore.WriteError(str(self._error or "The connection was closed."))
        self._transport.write(buffer)
        if self._room is not None:
            await self._room

    async def aclose(self) -> None:
        """Close; what was not sent is thrown away."""
        try:
            self._transport.close()
            await asyncio.sleep(0)  # the goodbye of TLS
        finally:
            self._transport.abort()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        """Go on encrypted; a handshake that fails or is cancelled closes the connection."""
        loop = asyncio.get_running_loop()
        inner = self._transport
        encrypted = AsyncStream(self._new_framing)
        if self._waiting:
            inner.abort()
            raise httpcore.ConnectError("The server spoke, or left, before the TLS handshake.")
        try:
            encrypted._transport = await loop.start_tls(inner, encrypted, ssl_context, server_hostname=server_hostname)
        except OSError as error:
            inner.abort()
            raise httpcore.ConnectError(str(error)) from error
        except BaseException:
            inner.abort()
            raise
        return encrypted

    def get_extra_info(self, info: str) -> Any:
        """As httpcore names it."""
        if info == "is_readable":
            return self._waiting or self._transport.is_closing() or self._has_come()
        names = {"client_addr": "sockname", "server_addr": "peername"}
        return self._transport.get_extra_info(names.get(info, info))

    @property
    def _waiting(self) -> bool:
        """Whether something, be it the end, came and was not read."""
        return bool(self._chunks) or self._over

    def _has_come(self) -> bool:
        """Whether the system holds something that the loop has not looked at yet, such as the other side's goodbye."""
        socket = self._transport.get_extra_info("socket")
        if not hasattr(select, "poll"):  # Windows
            return bool(select.select([socket], [], [], 0)[0])
        poll = select.poll()
        poll.register(socket, select.POLLIN)
        return bool(poll.poll(0))


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


async def connected(address: str, port: int, framing: Callable[[], Framing | None]) -> AsyncStream:
    """Connect to one address.

    Args:
        address: An IP address.
        port: The port.
        framing: Gives what counts the bytes of a new stream, or None where nobody asks.

    Raises:
        httpcore.ConnectError: As the system says.
    """
    try:
        _, stream = await asyncio.get_running_loop().create_connection(partial(AsyncStream, framing), address, port)
    except OSError as error:
        said = f"[Errno {error.errno}] {os.strerror(error.errno)}" if error.errno else str(error)
        raise httpcore.ConnectError(said) from error
    return stream
