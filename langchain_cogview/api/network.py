"""Look-ups and sockets under httpcore: each gets only the time that is left, and goes only where it may.

Public interface of httpcore: `NetworkBackend` and `AsyncNetworkBackend`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import queue
import socket
import threading
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import httpcore

from langchain_cogview.addresses import AddressRefusedError
from langchain_cogview.api.streams import Framing, connected
from langchain_cogview.deadline import Deadline

if TYPE_CHECKING:
    import ssl

    from langchain_cogview.addresses import AddressCheck

_FIRST_ADDRESSES_SECONDS: Final = 5.0
_SocketOptions = Iterable[Any] | None


@lru_cache(maxsize=256)
def literal_address(host: str) -> str | None:
    """The address that a host spells out in its usual form; None for a name."""
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return None


def _look_up(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _look_up_in_thread(host: str, port: int, deliver: Callable[[list[str] | Exception], None]) -> None:
    # A daemon thread: the system's resolver cannot be interrupted, and must hold up neither the call nor the exit.
    def work() -> None:
        try:
            answer: list[str] | Exception = _look_up(host, port)
        except (OSError, UnicodeError) as error:
            answer = error
        deliver(answer)

    threading.Thread(target=work, daemon=True, name="cogview-look-up").start()


def _allowed(
    host: str, answer: list[str] | Exception, check: AddressCheck | None, *, literal: bool = False
) -> list[str]:
    if isinstance(answer, Exception):
        raise httpcore.ConnectError(f"The name {host[:100]!r} could not be looked up: {answer}")
    if check is None:
        return answer
    addresses = [address for address in answer if check(ipaddress.ip_address(address.partition("%")[0]), literal)]
    if not addresses:
        raise AddressRefusedError(f"The host {host[:100]!r} has no address that may be connected to.")
    return addresses


def resolve(host: str, port: int, check: AddressCheck | None, deadline: Deadline) -> list[str]:
    """The addresses of a host that may be connected to.

    Raises:
        httpcore.ConnectError: When there is none; `AddressRefusedError` when the check refused them all.
        httpcore.ConnectTimeout: When the look-up takes longer than the deadline.
    """
    literal = literal_address(host)
    if literal:
        return _allowed(host, [literal], check, literal=True)
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()
    _look_up_in_thread(host, port, answers.put)
    try:
        answer = answers.get(timeout=deadline.remaining())
    except queue.Empty:
        raise httpcore.ConnectTimeout("The name look-up took too long.") from None
    return _allowed(host, answer, check)


async def aresolve(host: str, port: int, check: AddressCheck | None) -> list[str]:
    """The twin of `resolve`; the caller's `asyncio.timeout` bounds it."""
    literal = literal_address(host)
    if literal:
        return _allowed(host, [literal], check, literal=True)
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[str] | Exception] = loop.create_future()

    def settle(answer: list[str] | Exception) -> None:
        if not future.done():
            future.set_result(answer)

    def deliver(answer: list[str] | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
            loop.call_soon_threadsafe(settle, answer)

    _look_up_in_thread(host, port, deliver)
    return _allowed(host, await future, check)


def _connect_share(timeout: float | None, *, last: bool) -> float | None:
    """Seconds for one of several addresses: a dead first one must not use up the time of the others."""
    if last:
        return timeout
    return _FIRST_ADDRESSES_SECONDS if timeout is None else min(_FIRST_ADDRESSES_SECONDS, timeout / 2)


class _SyncStream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, backend: SyncBackend) -> None:
        self._inner, self._backend = inner, backend
        self._framing = backend.start_framing()

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        chunk = self._inner.read(max_bytes, self._backend.time_left(timeout, httpcore.ReadTimeout))
        if self._framing:
            self._framing.received(chunk)
        return chunk

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self._framing:
            self._framing.sent()
        self._inner.write(buffer, self._backend.time_left(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = self._backend.time_left(timeout, httpcore.ConnectTimeout)
        return _SyncStream(self._inner.start_tls(ssl_context, server_hostname, left), self._backend)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Framed:
    """Knows the `Framing` of the last stream that it made, when asked for one.

    The last stream is the one that HTTP is spoken over: TLS wraps the connection, and that of a proxy.
    """

    def __init__(self, *, framed: bool) -> None:
        self._framed = framed
        self.framing = Framing()

    def start_framing(self) -> Framing | None:
        """What counts the bytes of a new stream."""
        if not self._framed:
            return None
        self.framing = Framing()
        return self.framing


class SyncBackend(_Framed, httpcore.NetworkBackend):
    """Opens connections that look at `deadline`, which is set anew for every request."""

    def __init__(self, check: AddressCheck | None, *, framed: bool = False) -> None:
        super().__init__(framed=framed)
        self._check, self._inner = check, httpcore.SyncBackend()
        self.deadline = Deadline(None)

    def time_left(self, timeout: float | None, error: type[Exception]) -> float | None:
        """Seconds for the next operation; raises `error` when none are left."""
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
        """Connect to the first address that answers."""
        addresses = resolve(host, port, self._check, self.deadline)
        for number, address in enumerate(addresses, 1):
            last = number == len(addresses)
            share = _connect_share(self.time_left(timeout, httpcore.ConnectTimeout), last=last)
            try:
                inner = self._inner.connect_tcp(address, port, share, local_address, socket_options)
                return _SyncStream(inner, self)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if last:
                    raise
        raise httpcore.ConnectError(f"The name {host[:100]!r} has no address.")


class AsyncBackend(_Framed, httpcore.AsyncNetworkBackend):
    """Opens connections to checked addresses."""

    def __init__(self, check: AddressCheck | None, *, framed: bool = False) -> None:
        super().__init__(framed=framed)
        self._check = check

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's interface
        local_address: str | None = None,
        socket_options: _SocketOptions = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that answers."""
        addresses = await aresolve(host, port, self._check)
        for number, address in enumerate(addresses, 1):
            last = number == len(addresses)
            try:
                async with asyncio.timeout(_connect_share(timeout, last=last)):
                    return await connected(address, port, self.start_framing)
            except TimeoutError:
                if last:
                    raise httpcore.ConnectTimeout("The time limit passed.") from None
            except httpcore.ConnectError:
                if last:
                    raise
        raise httpcore.ConnectError(f"The name {host[:100]!r} has no address.")

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)
