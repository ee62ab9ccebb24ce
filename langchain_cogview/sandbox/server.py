"""A sandbox on a port of this machine, for any client in any language.

It serves programs of this machine and no web pages of other hosts. A browser would send their requests here too, under a name
of the page's host that resolves to a loopback address (DNS rebinding). Therefore `Host` must be a loopback name or address,
and so must `Origin` if there is one.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import re
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

from langchain_cogview.addresses import SANDBOX_SERVERS
from langchain_cogview.sandbox.faults import SandboxReply, error_body, json_reply, to_json, too_long_reply
from langchain_cogview.sandbox.service import MAX_BODY, Sandbox
from langchain_cogview.sandbox.state import API_PREFIX

if TYPE_CHECKING:
    from types import TracebackType

RESET_ROUTE: Final = "/sandbox/reset"
"""A POST to it calls `Sandbox.reset`."""
MAX_CONNECTIONS: Final = 256
"""Connections at once, each with its own thread; one more gets 503."""
IDLE_SECONDS: Final = 60.0
"""How long a connection stays open without a request."""
HEAD_SECONDS: Final = 10.0
"""How long a client may take to send the request line and the headers."""
BODY_SECONDS: Final = 30.0
"""How long a client may take to send the body."""
WRITE_SECONDS: Final = 60.0
"""How long a client may take to receive the reply."""
MAX_HEAD: Final = 65_536
"""Bytes of the request line and the headers."""
_CLOSING_SECONDS: Final = 5
_DISCARD_SECONDS: Final = 2.0
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::([0-9]{1,5}))?")
_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?\r?\n")


class SandboxServer:
    """The service on a port of the loopback interface.

    A POST to `/sandbox/reset` calls `Sandbox.reset`.

    Example:
        >>> with SandboxServer() as server:
        ...     client = openai.OpenAI(base_url=server.base_url, api_key="any")
        ...     client.images.generate(model="cogview-4-250304", prompt="a kitten").data[0].url

    Args:
        sandbox: The sandbox that answers; None creates one.
        host: A loopback address or `localhost`: the server accepts any key, so it must not be reachable from elsewhere.
        port: The port; 0 selects a free one.

    Attributes:
        sandbox: The sandbox that answers.

    Raises:
        ValueError: The host is not a loopback address.
    """

    def __init__(self, sandbox: Sandbox | None = None, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.sandbox = Sandbox() if sandbox is None else sandbox
        self._address = (_loopback_address(host), port)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def origin(self) -> str:
        """Scheme, host and port, such as `http://127.0.0.1:8765`.

        Raises:
            RuntimeError: The server is not running.
        """
        if self._server is None:
            raise RuntimeError("The sandbox server is not running. Call start(), or use it in a with statement.")
        return self._server.origin

    @property
    def base_url(self) -> str:
        """The base URL for clients, such as `http://127.0.0.1:8765/api/paas/v4`.

        Raises:
            RuntimeError: The server is not running.
        """
        return self.origin + API_PREFIX

    def start(self) -> Self:
        """Open the port and serve it in background threads.

        Returns:
            The server itself.

        Raises:
            RuntimeError: The server is already running.
            OSError: The port is in use.
            OverflowError: The port is not between 0 and 65535.
        """
        if self._server is not None:
            raise RuntimeError(f"The sandbox server is already running at {self.base_url}. Call close() first.")
        self._server = _Server(self._address, self.sandbox)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="cogview-sandbox", daemon=True
        )
        self._thread.start()
        SANDBOX_SERVERS.add((self._server.host, self._server.port))
        return self

    def close(self) -> None:
        """Close the port and every connection. It may be called more than once."""
        server, thread, self._server, self._thread = self._server, self._thread, None, None
        if server is not None and thread is not None:
            SANDBOX_SERVERS.discard((server.host, server.port))
            server.shutdown()
            thread.join()
            server.end_connections()
            server.server_close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _is_loopback(host: str) -> bool:
    if host.lower().removesuffix(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _loopback_address(host: str) -> str:
    """Return the address of a loopback host.

    Raises:
        ValueError: The host is not a loopback address.
    """
    if _is_loopback(host):
        return "127.0.0.1" if host.lower().startswith("localhost") else host
    raise ValueError(
        f"The sandbox serves only this machine, not {host!r}, because it accepts any key. Use 127.0.0.1, ::1 or localhost."
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], sandbox: Sandbox) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.sandbox = sandbox
        self.is_closing = threading.Event()
        self._open: set[socket.socket] = set()
        self._changed = threading.Condition()
        super().__init__(address, _Handler)
        host, self.port = str(self.server_address[0]), int(self.server_address[1])
        self.host = host
        self.origin = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def server_bind(self) -> None:
        # HTTPServer.server_bind also looks up the name of the host, which can take seconds and uses the network.
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        with self._changed:
            self._open.add(connection)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            is_full = len(self._open) > MAX_CONNECTIONS
        if not is_full:
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.settimeout(0)
            request.send(_FULL)
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._changed:
            self._open.discard(request)
            self._changed.notify_all()

    def end_connections(self) -> None:
        """Wake every handler that reads or waits, so that it closes its socket."""
        self.is_closing.set()
        with self._changed:
            for connection in self._open:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # the client has disconnected already
                    continue
            self._changed.wait_for(lambda: not self._open, _CLOSING_SECONDS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that disconnects is no error
            super().handle_error(request, client_address)


class _TooLargeError(OSError):
    """A client sent more bytes than allowed."""


class _Input(io.RawIOBase):
    """The bytes that a client sends, bounded in number and in time by the last `allow`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._bytes_left = 0
        self._ends = 0.0

    def allow(self, size: int, seconds: float) -> None:
        self._bytes_left = size
        self._ends = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        seconds = self._ends - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        if self._bytes_left <= 0:
            raise _TooLargeError
        self._connection.settimeout(seconds)
        count = self._connection.recv_into(memoryview(buffer)[: self._bytes_left])
        self._bytes_left -= count
        return count


class _RefusedError(Exception):
    """A request that is answered with `reply` and whose connection is then closed."""

    def __init__(self, reply: SandboxReply) -> None:
        super().__init__()
        self.reply = reply


def _error(status: int, code: str, message: str) -> _RefusedError:
    return _RefusedError(json_reply(status, error_body(code, message)))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "cogview-sandbox"
    sys_version = ""
    disable_nagle_algorithm = True
    command = requestline = request_version = ""
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._input = _Input(self.connection)
        self._reader = self.rfile = io.BufferedReader(self._input)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name in the base class
        """Log nothing."""

    def handle_one_request(self) -> None:
        self.close_connection = True
        self._input.allow(MAX_HEAD, IDLE_SECONDS)
        try:
            received = self._reader.peek(1)
            if not received:
                return
            self._input.allow(MAX_HEAD - len(received), HEAD_SECONDS)
            super().handle_one_request()
        except TimeoutError:
            self.close_connection = True
        except _TooLargeError:
            self._refuse(json_reply(431, error_body("1210", f"The headers have more than {MAX_HEAD} bytes")))

    def _serve(self) -> None:
        try:
            body = self._body()
            self._check_sender()
        except _RefusedError as error:
            self._refuse(error.reply)
            return
        path = self.requestline.split()[1]  # as sent: `self.path` has leading slashes merged
        if (self.command, path) == ("POST", RESET_ROUTE):
            self.server.sandbox.reset()
            self._send(json_reply(200, to_json({"success": True})))
            return
        with self.server.sandbox.admit(
            self.command, path, dict(self.headers), body, origin=self.server.origin
        ) as reply:
            if reply.delay and self._disconnects_within(reply.delay):
                self.close_connection = True
                return
        self._send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _serve  # noqa: N815

    def _check_sender(self) -> None:
        hosts, origins = self.headers.get_all("host", []), self.headers.get_all("origin", [])
        host = _HOST.fullmatch(hosts[0].strip()) if len(hosts) == 1 else None
        if not host or not _is_loopback(host[1].strip("[]")) or int(host[2] or 80) != self.server.port:
            raise _error(403, "1220", f"The sandbox serves programs of this machine only. Use {self.server.origin}")
        if len(origins) > 1 or not all(map(_is_loopback_origin, origins)):
            raise _error(403, "1220", "The sandbox does not serve web pages of other hosts")

    def _body(self) -> bytes:
        lengths, codings = self.headers.get_all("content-length", []), self.headers.get_all("transfer-encoding", [])
        # Small chunks take several times the bytes of the body itself; the time is bounded as well.
        self._input.allow(8 * MAX_BODY, BODY_SECONDS)
        if codings:
            if lengths or [coding.strip().lower() for coding in codings] != ["chunked"]:
                raise _error(400, "1210", "The Transfer-Encoding of the body is not supported. Use chunked")
            return self._chunked_body()
        if not lengths:
            return b""
        if len(set(lengths)) > 1 or not lengths[0].isdecimal():
            raise _error(400, "1210", "The Content-Length is not a single number")
        if int(lengths[0][:20]) > MAX_BODY:
            raise _RefusedError(too_long_reply(MAX_BODY))
        return self._exactly(int(lengths[0]))

    def _chunked_body(self) -> bytes:
        body = bytearray()
        while size := self._chunk_size():
            if len(body) + size > MAX_BODY:
                raise _RefusedError(too_long_reply(MAX_BODY))
            body += self._exactly(size)
            if self._exactly(2) != b"\r\n":
                raise _error(400, "1210", "The body is not valid for Transfer-Encoding: chunked")
        while self.rfile.readline(MAX_HEAD).strip(b"\r\n"):
            pass  # trailers
        return bytes(body)

    def _chunk_size(self) -> int:
        match = _CHUNK_SIZE.fullmatch(self.rfile.readline(MAX_HEAD))
        if not match:
            raise _error(400, "1210", "The body is not valid for Transfer-Encoding: chunked")
        return int(match[1], 16)

    def _exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError("The client closed the connection before the end of its request.")
        return data

    def _disconnects_within(self, seconds: float) -> bool:
        """Return True as soon as the client or the server closes the connection, False after `seconds`."""
        ends = time.monotonic() + seconds
        self.connection.settimeout(seconds)
        try:
            if not self.connection.recv(1, socket.MSG_PEEK):
                return True
        except TimeoutError:
            return False
        except OSError:
            return True
        return self.server.is_closing.wait(ends - time.monotonic())  # the client has sent its next request

    def _refuse(self, reply: SandboxReply) -> None:
        self.close_connection = True
        self._send(reply)
        # Closing a socket with unread bytes resets the connection, and the client could lose the reply.
        self._input.allow(8 * MAX_BODY, _DISCARD_SECONDS)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read1(65_536):
                pass

    def _send(self, reply: SandboxReply) -> None:
        self.connection.settimeout(WRITE_SECONDS)
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(reply.body)))
        if self.close_connection:
            self.send_header("connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)


def _is_loopback_origin(origin: str) -> bool:
    try:
        parts = urlsplit(origin.strip())
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and _is_loopback(parts.hostname or "")


_FULL_BODY = error_body("1305", f"The sandbox serves {MAX_CONNECTIONS} connections at once")
_FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"x-cogview-sandbox: 1\r\ncontent-length: %d\r\n\r\n%s" % (len(_FULL_BODY), _FULL_BODY)
)
