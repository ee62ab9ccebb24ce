"""Plain and encrypted sockets without a thread: what the async connections of `network` read from and write to.

They are plain sockets and not asyncio's transports: these hold their event loop, warn when they outlive it, and cannot be closed
without it. The sync connections use the two functions that ask what a socket is ready for.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import ssl
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

READ_BYTES: Final = 2**18
"""The most bytes that one read returns."""


class SocketChannel:
    """A socket that is read and written without blocking the event loop."""

    def __init__(self, sock: socket.socket, open_sockets: set[socket.socket]) -> None:
        self._socket, self._open = sock, open_sockets
        open_sockets.add(sock)

    async def receive(self) -> bytes:
        """Return the next bytes; no bytes at the end."""
        return await asyncio.get_running_loop().sock_recv(self._socket, READ_BYTES)

    async def send(self, data: bytes) -> None:
        """Send all of some bytes."""
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    def receive_now(self) -> bytes | None:
        """Receive without waiting.

        Returns:
            What was received; None when nothing is there, and no bytes at the end.
        """
        try:
            return self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def close(self) -> None:
        """Close the socket."""
        self._open.discard(self._socket)
        self._socket.close()

    def get_extra_info(self, info: str) -> Any:
        """Return what httpcore asks about a connection; None for what is not known."""
        if info == "is_readable":
            return is_readable(self._socket)
        return self._socket if info == "socket" else None


class TLSChannel:
    """TLS over another channel, with `ssl.MemoryBIO`."""

    def __init__(self, channel: Channel, context: ssl.SSLContext, host: str | None) -> None:
        self._channel = channel
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)

    async def shake_hands(self) -> None:
        """Agree on the encryption.

        Raises:
            ssl.SSLError: The other side is not trusted, or does not trust this one; it gets an alert.
        """
        try:
            await self._run(self._tls.do_handshake)
        except ssl.SSLError:
            with contextlib.suppress(OSError):
                await self._flush()  # the alert
            raise

    async def receive(self) -> bytes:
        """Return the next bytes, decrypted; no bytes at the end."""
        try:
            return bytes(await self._run(lambda: self._tls.read(READ_BYTES)))
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return b""

    async def send(self, data: bytes) -> None:
        """Encrypt some bytes and send them."""
        await self._run(lambda: self._tls.write(data))

    def receive_now(self) -> bytes | None:
        """Receive without waiting.

        Returns:
            What was received; None when nothing is there, and no bytes at the end.
        """
        while True:
            try:
                return self._tls.read(READ_BYTES)
            except ssl.SSLWantReadError:
                data = self._channel.receive_now()
                if data is None:
                    return None
                self._feed(data)
            except ssl.SSLError:
                return b""

    def close(self) -> None:
        """Close the channel below."""
        self._channel.close()

    def get_extra_info(self, info: str) -> Any:
        """Return what httpcore asks about a connection; None for what is not known."""
        if info == "ssl_object":
            return self._tls
        if info == "is_readable" and (self._incoming.pending or self._tls.pending()):
            return True
        return self._channel.get_extra_info(info)

    async def _run(self, operation: Callable[[], Any]) -> Any:
        while True:
            try:
                result = operation()
            except ssl.SSLWantReadError:
                await self._flush()
                self._feed(await self._channel.receive())
            else:
                await self._flush()
                return result

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await self._channel.send(self._outgoing.read())

    def _feed(self, data: bytes) -> None:
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()


def wait_until_ready(sock: socket.socket, timeout: float | None) -> bool:
    """Wait until a socket can be read from or written to.

    Returns:
        Whether it can be written to.
    """
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([sock], [sock], [], timeout)[1])
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLOUT)
    return any(event & select.POLLOUT for _, event in poll.poll(None if timeout is None else timeout * 1000))


def is_readable(sock: socket.socket) -> bool:
    """Return whether something can be read from a socket, its end included."""
    if sock.fileno() < 0:
        return True
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([sock], [], [], 0)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


Channel = SocketChannel | TLSChannel
