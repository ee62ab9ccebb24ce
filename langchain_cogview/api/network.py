"""Connections under httpcore, by its public interface: `NetworkBackend` and `NetworkStream`.

A connection made here goes only to addresses that are allowed, gives each operation only the time that is left, and bounds what a
reply can do before httpcore has parsed it. `ReplyGuard` has these bounds once, for both the sync and the async streams.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import httpcore
import httpx

from langchain_cogview.addresses import aresolve, resolve
from langchain_cogview.api.sockets import READ_BYTES, Channel, SocketChannel, TLSChannel, wait_until_ready
from langchain_cogview.concurrency import Deadline, raised_by_signal

if TYPE_CHECKING:
    from langchain_cogview.addresses import AddressCheck

_FIRST_ADDRESSES_SECONDS: Final = 5.0
_WRITE_BYTES: Final = 2**14
"""The size of one write. A socket that is writable takes this much at once."""
_EARLY_CHECK_SECONDS: Final = 0.05
_INTERIM_HEAD = rb"HTTP/1\.[01] 1(?:(?!\n\r?\n).)*"
_INTERIM: Final = re.compile(rb"(?:%s\n\r?\n)*(?:%s)?" % (_INTERIM_HEAD, _INTERIM_HEAD), re.DOTALL)
"""Replies of class 1xx, the last one perhaps incomplete. A server may send them before it has the whole request."""
_SocketOptions = Iterable[Any] | None


class UnexpectedDataError(httpcore.ConnectError, httpx.ConnectError):
    """When the server sent something or closed the connection before the request. Nothing of the request was sent."""


def _connect_share(timeout: float | None, *, last: bool) -> float | None:
    """Return the seconds for one of several addresses, so that the first one cannot use up the time of the others."""
    if last:
        return timeout
    return _FIRST_ADDRESSES_SECONDS if timeout is None else min(_FIRST_ADDRESSES_SECONDS, timeout / 2)


# --- the bounds of a reply


class ReplyGuard:
    """Buffers received bytes and passes them to httpcore in pieces that bound what a reply can do.

    - The head of a reply comes alone, is at most 100 kB, and has no run of 256 blanks: h11 takes a time that grows with the
      square of such a run, half a minute for 64 kB. In a body, where the same holds between chunks, they come in small pieces.
    - The last byte that is there comes alone. httpcore asks for it only when the reply needs it, so that a connection with
      something behind its reply is known: it would answer the next request with it.
    - A body in a multitude of tiny chunks is refused.
    """

    _HEAD_END = re.compile(rb"\n\r?\n")
    _BLANKS = re.compile(rb"[ \t]{256}")
    _MOST_HEAD = 100 * 1024
    _PIECE = 2**10
    _MOST_BETWEEN_CHUNKS = 2**12
    _FREE_CHUNKS = 10_000
    _BYTES_A_CHUNK = 64

    def __init__(self) -> None:
        self._waiting, self._at = b"", 0
        self.expect_reply()

    def expect_reply(self) -> None:
        """A request is about to be sent; what is received from now on is its reply."""
        self._is_head = True
        self._is_chunked = self._is_request_sent = False
        self._head_size = 0
        self._unproductive = 0
        self._tail = b""
        self._chunks = self._size = 0

    @property
    def is_empty(self) -> bool:
        """Whether all received bytes were passed on. After a complete reply: whether nothing follows it."""
        return self._at == len(self._waiting)

    def put(self, data: bytes) -> None:
        """Store received bytes. The buffer has to be empty."""
        self._waiting, self._at = data, 0

    @property
    def is_reusable(self) -> bool:
        """Whether another request may follow a reply that was read to its end."""
        return self.is_empty and self._is_request_sent

    def put_early(self, data: bytes | None) -> bool:
        """Store bytes that were received while the request was being sent.

        Returns:
            Whether they are more than interim replies (1xx), so that the rest of the request need not be sent.
        """
        self._waiting += data or b""
        is_interim = _INTERIM.fullmatch(self._waiting) or b"HTTP/1.1 1".startswith(self._waiting)
        return not is_interim or len(self._waiting) > self._MOST_HEAD

    def request_was_sent(self) -> None:
        """The last byte of the request was written."""
        self._is_request_sent = True

    def read(self, max_bytes: int) -> bytes:
        """Return the next piece for httpcore.

        Returns:
            At most `max_bytes` bytes.

        Raises:
            httpcore.RemoteProtocolError: When the reply breaks a bound.
        """
        piece = self._head_piece(max_bytes) if self._is_head else self._body_piece(max_bytes)
        self._at += len(piece)
        self._tail = (self._tail + piece)[-256:]
        return piece

    def _head_piece(self, max_bytes: int) -> bytes:
        before = self._tail[-2:]
        piece = self._waiting[self._at : self._at + max_bytes]
        end = self._HEAD_END.search(before + piece)
        if end:
            piece = piece[: end.end() - len(before)]
        self._head_size += len(piece)
        if self._head_size > self._MOST_HEAD:
            raise httpcore.RemoteProtocolError("The head of the reply is larger than 100 kB.")
        if self._BLANKS.search(self._tail + piece):
            raise httpcore.RemoteProtocolError("The head of the reply has too many blanks in a row.")
        return piece

    def _body_piece(self, max_bytes: int) -> bytes:
        size = min(max(len(self._waiting) - self._at - 1, 1), max_bytes)
        piece = self._waiting[self._at : self._at + size]
        if self._is_chunked and self._BLANKS.search(self._tail + piece):
            piece = piece[: self._PIECE]
            self._unproductive += len(piece)
            if self._unproductive > self._MOST_BETWEEN_CHUNKS:
                raise httpcore.RemoteProtocolError("There is too much between two chunks of the reply.")
        return piece

    def head_was_read(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Httpcore has read the head of the reply; the body follows.

        Args:
            status: The status of the reply.
            headers: Its headers.

        Raises:
            httpcore.ReadError: When the reply is a success that came before the request was sent: it answers another request.
        """
        self._is_head = False
        self._tail = b""
        # Blanks between chunks take h11 long to read; where the length is known, the body may have any number of them.
        self._is_chunked = any(name.lower() == b"transfer-encoding" for name, _ in headers)
        if 200 <= status < 300 and not self._is_request_sent:  # noqa: PLR2004
            raise httpcore.ReadError("The server answered with a success before it had the whole request.")

    def chunk_was_read(self, size: int) -> None:
        """Httpcore has returned a part of the body.

        Raises:
            httpcore.RemoteProtocolError: When the parts are many and tiny.
        """
        self._unproductive = 0
        self._chunks += 1
        self._size += size
        if self._chunks > self._FREE_CHUNKS and self._size < self._chunks * self._BYTES_A_CHUNK:
            raise httpcore.RemoteProtocolError("The reply came in too many tiny chunks.")


def _is_unusable(came: bytes | None, *, was_used: bool) -> bool:
    """Return whether a connection is unusable, by what was received before the request.

    A new connection that is closed at once cannot be distinguished from one that is closed while the request is under way.
    """
    return came is not None and (came != b"" or was_used)


# --- sync connections


class SyncStream(httpcore.NetworkStream):
    """A connection of httpcore with a guard and a deadline."""

    def __init__(self, stream: httpcore.NetworkStream, backend: SyncBackend, *, is_encrypted: bool = False) -> None:
        self._stream, self._backend, self._is_encrypted = stream, backend, is_encrypted
        self._outgoing: list[bytes] = []
        self.guard = ReplyGuard()
        self.is_closed = self._was_used = False
        # The last stream made is the one that HTTP is spoken over: TLS wraps the connection, and that of a proxy.
        backend.stream = self

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return the next bytes; no bytes at the end."""
        self._send_outgoing(timeout)
        left = self._backend.time_left(timeout, httpcore.ReadTimeout)
        if self.guard.is_empty:
            self.guard.put(self._stream.read(READ_BYTES, left))
        return self.guard.read(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Collect the bytes of a request. httpcore ends a request by writing nothing; then it is sent."""
        if buffer:
            self._outgoing.append(buffer)
        else:
            self._send_outgoing(timeout)

    def _send_outgoing(self, timeout: float | None) -> None:
        if not self._outgoing:
            return
        buffer = b"".join(self._outgoing)
        self._outgoing.clear()
        if not self.guard.is_empty or _is_unusable(self._receive_now(), was_used=self._was_used):
            raise UnexpectedDataError("The server sent something, or closed the connection, before the request.")
        self._was_used = True
        self.guard.expect_reply()
        for start in range(0, len(buffer), _WRITE_BYTES):
            if start and self.guard.put_early(self._wait_until_writable(timeout)):
                return
            left = self._backend.time_left(timeout, httpcore.WriteTimeout)
            try:
                self._stream.write(buffer[start : start + _WRITE_BYTES], left)
            except httpcore.WriteError as error:
                # httpcore ignores this error, because a server may answer before it has read everything, and close.
                raise raised_by_signal(error) or error from None
        self.guard.request_was_sent()

    def _wait_until_writable(self, timeout: float | None) -> bytes | None:
        """Wait until more of the request can be written, or something is received.

        Returns:
            What was received; None if more can be written.
        """
        sock = self._stream.get_extra_info("socket")
        while True:
            left = self._backend.time_left(timeout, httpcore.WriteTimeout)
            is_writable = wait_until_ready(sock, left)
            received = self._receive_now()
            if is_writable or received is not None:
                return received

    def _receive_now(self) -> bytes | None:
        """Receive without waiting.

        Returns:
            What was received; None when nothing is there, and no bytes at the end.
        """
        try:
            # With TLS, what can be read from the socket itself may be a session ticket.
            if not self._is_encrypted and not self._stream.get_extra_info("is_readable"):
                return None
            return self._stream.read(READ_BYTES, timeout=0)
        except httpcore.ReadTimeout:
            return None
        except httpcore.ReadError as error:
            return None if isinstance(error.__cause__, BlockingIOError | ssl.SSLWantReadError) else b""

    def close(self) -> None:
        """Close the connection. A second call has no effect."""
        self.is_closed = True
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Start TLS. A handshake that fails or is interrupted closes the connection.

        Returns:
            The stream over TLS.

        Raises:
            httpcore.ConnectError: The handshake failed.
        """
        try:
            if not self.guard.is_empty:
                raise httpcore.ConnectError("The server sent something before the TLS handshake.")  # noqa: TRY301
            left = self._backend.time_left(timeout, httpcore.ConnectTimeout)
            stream = self._stream.start_tls(ssl_context, server_hostname, left)
        except BaseException:
            self.close()
            raise
        return SyncStream(stream, self._backend, is_encrypted=True)

    def get_extra_info(self, info: str) -> Any:
        """Return what httpcore calls by this name."""
        if info == "is_readable" and not self.guard.is_empty:
            return True
        return self._stream.get_extra_info(info)


class SyncBackend(httpcore.NetworkBackend):
    """Opens connections that keep to `deadline`, which is set for every request."""

    def __init__(self, check: AddressCheck | None) -> None:
        self._check, self._backend = check, httpcore.SyncBackend()
        self.deadline = Deadline(None)
        self.stream: SyncStream | None = None

    def time_left(self, timeout: float | None, error: type[Exception]) -> float | None:
        """Return the seconds for the next operation, or raise `error` if none are left."""
        left = self.deadline.clamp(timeout)
        if left is not None and left <= 0:
            raise error("The time limit passed.")
        return left

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: _SocketOptions = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address that answers.

        Returns:
            The stream.

        Raises:
            httpcore.ConnectError: No address can be connected to, or none is allowed.
            httpcore.ConnectTimeout: The time was over before.
        """
        addresses = resolve(host, port, self._check, self.deadline)
        for number, address in enumerate(addresses, 1):
            last = number == len(addresses)
            share = _connect_share(self.time_left(timeout, httpcore.ConnectTimeout), last=last)
            try:
                return SyncStream(self._backend.connect_tcp(address, port, share, local_address, socket_options), self)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if last:
                    raise
        raise httpcore.ConnectError(f"The name {host[:100]!r} has no address.")


# --- async connections. Their time limit is the caller's `asyncio.timeout` around the whole exchange.


class AsyncStream(httpcore.AsyncNetworkStream):
    """Async version of `SyncStream`."""

    def __init__(self, channel: Channel, backend: AsyncBackend) -> None:
        self._channel, self._backend = channel, backend
        self._outgoing: list[bytes] = []
        self.guard = ReplyGuard()
        self.is_closed = self._was_used = False
        backend.stream = self

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109  httpcore's interface
        """Return the next bytes; no bytes at the end.

        Raises:
            httpcore.ReadError: The connection was lost.
        """
        await self._send_outgoing()
        if self.guard.is_empty:
            try:
                self.guard.put(await self._channel.receive())
            except OSError as error:
                raise httpcore.ReadError(str(error)) from error
        return self.guard.read(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Async version of `SyncStream.write`."""
        if buffer:
            self._outgoing.append(buffer)
        else:
            await self._send_outgoing()

    async def _send_outgoing(self) -> None:
        if not self._outgoing:
            return
        buffer = b"".join(self._outgoing)
        self._outgoing.clear()
        if not self.guard.is_empty or _is_unusable(self._channel.receive_now(), was_used=self._was_used):
            raise UnexpectedDataError("The server sent something, or closed the connection, before the request.")
        self._was_used = True
        self.guard.expect_reply()
        try:
            is_sent = await self._send_parts(buffer)
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error
        if is_sent:
            self.guard.request_was_sent()

    async def _send_parts(self, buffer: bytes) -> bool:
        """Send a request.

        Returns:
            False when the server answers before it is sent.
        """
        if len(buffer) <= _WRITE_BYTES:
            await self._channel.send(buffer)
            return True
        for start in range(0, len(buffer), _WRITE_BYTES):
            if start and self.guard.put_early(self._channel.receive_now()):
                return False
            sending = asyncio.ensure_future(self._channel.send(buffer[start : start + _WRITE_BYTES]))
            try:
                while not (await asyncio.wait([sending], timeout=_EARLY_CHECK_SECONDS))[0]:
                    if self.guard.put_early(self._channel.receive_now()):
                        return False
                sending.result()
            finally:
                sending.cancel()
        return True

    async def aclose(self) -> None:
        """Close the connection. A second call has no effect."""
        self.close()

    def close(self) -> None:
        """Close the connection. This works without its event loop, too."""
        self.is_closed = True
        self._channel.close()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        """Async version of `SyncStream.start_tls`.

        Returns:
            The stream over TLS.

        Raises:
            httpcore.ConnectError: The handshake failed.
        """
        try:
            if not self.guard.is_empty:
                raise httpcore.ConnectError("The server sent something before the TLS handshake.")  # noqa: TRY301
            channel = TLSChannel(self._channel, ssl_context, server_hostname)
            await channel.shake_hands()
        except (OSError, ValueError) as error:
            self.close()
            raise httpcore.ConnectError(str(error)) from error
        except BaseException:
            self.close()
            raise
        return AsyncStream(channel, self._backend)

    def get_extra_info(self, info: str) -> Any:
        """Return what httpcore calls by this name."""
        if info == "is_readable" and not self.guard.is_empty:
            return True
        return self._channel.get_extra_info(info)


class AsyncBackend(httpcore.AsyncNetworkBackend):
    """Opens connections to checked addresses.

    Args:
        check: Which addresses may be connected to.
        open_sockets: Holds each socket while it is open, so that somebody can close it who does not know its event loop.
    """

    def __init__(self, check: AddressCheck | None, open_sockets: set[socket.socket]) -> None:
        self._check, self._open = check, open_sockets
        self.stream: AsyncStream | None = None

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's interface
        local_address: str | None = None,
        socket_options: _SocketOptions = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that answers.

        Returns:
            The stream.

        Raises:
            httpcore.ConnectError: No address can be connected to, or none is allowed.
            httpcore.ConnectTimeout: The time was over before.
        """
        addresses = await aresolve(host, port, self._check)
        for number, address in enumerate(addresses, 1):
            last = number == len(addresses)
            try:
                async with asyncio.timeout(_connect_share(timeout, last=last)):
                    return AsyncStream(await self._connected(address, port), self)
            except TimeoutError:
                if last:
                    raise httpcore.ConnectTimeout("The time limit passed.") from None
            except OSError as error:
                if last:
                    raise httpcore.ConnectError(str(error)) from error
        raise httpcore.ConnectError(f"The name {host[:100]!r} has no address.")

    async def _connected(self, address: str, port: int) -> SocketChannel:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        channel = SocketChannel(sock, self._open)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(sock, (address, port))
        except BaseException:
            channel.close()
            raise
        return channel
