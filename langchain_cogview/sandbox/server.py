"""A sandbox on a port of this machine, for any client in any language.

Programs of this machine are served, and no web page: a browser sends a page's requests here too, under a name of the page's
own that resolves to a loopback address. So `Host` has to name a loopback address, and `Origin`, where there is one, too.
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
from langchain_cogview.sandbox.faults import SandboxReply, error_body, json_reply, to_json, too_long
from langchain_cogview.sandbox.service import MAX_BODY, Sandbox
from langchain_cogview.sandbox.state import API_PREFIX

if TYPE_CHECKING:
    from types import TracebackType

RESET_ROUTE: Final = "/sandbox/reset"
"""A POST to it makes the sandbox forget everything, as `Sandbox.reset` does."""
MAX_CONNECTIONS: Final = 256
"""Connections at once, each with a thread of its own; one more gets 503."""
IDLE_SECONDS: Final = 60.0
"""How long a connection is kept without a request."""
HEAD_SECONDS: Final = 10.0
BODY_SECONDS: Final = 30.0
WRITE_SECONDS: Final = 60.0
MAX_HEAD: Final = 65_536
"""Bytes of a request's line and headers."""
_CLOSING_SECONDS: Final = 5
_DISCARD_SECONDS: Final = 2.0
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::([0-9]{1,5}))?")
_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?\r?\n")


class SandboxServer:
    """The service on a port of the loopback interface.

    A POST to `/sandbox/reset` makes it forget everything, as `Sandbox.reset` does.

    Example:
        >>> with SandboxServer() as server:
        ...     client = openai.OpenAI(base_url=server.base_url, api_key="any")
        ...     client.images.generate(model="cogview-4-250304", prompt="a kitten").data[0].url

    Args:
        sandbox: What answers; its own one if None.
        host: A loopback address, since anybody who reaches the port is served.
        port: 0 takes a free one.

    Raises:
        ValueError: The host is not a loopback address.
    """

    def __init__(self, sandbox: Sandbox | None = None, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.sandbox = Sandbox() if sandbox is None else sandbox
        self._address = (_loopback(host), port)
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
        """What to give a client as base URL.

        Raises:
            RuntimeError: The server is not running.
        """
        return self.origin + API_PREFIX

    def start(self) -> Self:
        """Open the port and answer in threads of its own.

        Raises:
            RuntimeError: It is running already.
            OSError: The port is in use.
        """
        if self._server is not None:
            raise RuntimeError(f"The sandbox server is running already, at {self.base_url}.")
        self._server = _Server(self._address, self.sandbox)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="cogview-sandbox", daemon=True
        )
        self._thread.start()
        SANDBOX_SERVERS.add((self._server.host, self._server.port))
        return self

    def close(self) -> None:
        """Close the port and every connection; harmless if that was done before."""
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


def _loopback(host: str) -> str:
    if _is_loopback(host):
        return "127.0.0.1" if host.lower().startswith("localhost") else host
    raise ValueError(
        f"The sandbox serves only this machine, not {host!r}: it asks for no key. Use 127.0.0.1, ::1 or localhost."
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
        # The parent's own also looks up the host's name, which can take seconds and asks the network.
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
        """Wake every handler that reads or waits, and let it close its socket."""
        self.is_closing.set()
        with self._changed:
            for connection in self._open:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # the client has gone already
                    continue
            self._changed.wait_for(lambda: not self._open, _CLOSING_SECONDS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is no news
            super().handle_error(request, client_address)


class _TooLargeError(OSError):
    """A client sent more than was allowed."""


class _Input(io.RawIOBase):
    """What a client sends, bounded in bytes and in time from one `allow` to the next."""

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
    """A request is answered with `reply`, and its connection closed."""

    def __init__(self, reply: SandboxReply) -> None:
        super().__init__()
        self.reply = reply


def _refusal(status: int, code: str, message: str) -> _RefusedError:
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

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the parent's name
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
        path = self.requestline.split()[1]  # as it was sent: the parent's `path` has leading slashes merged
        if (self.command, path) == ("POST", RESET_ROUTE):
            self.server.sandbox.reset()
            self._send(json_reply(200, to_json({"success": True})))
            return
        with self.server.sandbox.admit(
            self.command, path, dict(self.headers), body, origin=self.server.origin
        ) as reply:
            if reply.delay and self._is_left_within(reply.delay):
                self.close_connection = True
                return
        self._send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _serve  # noqa: N815

    def _check_sender(self) -> None:
        hosts, origins = self.headers.get_all("host", []), self.headers.get_all("origin", [])
        host = _HOST.fullmatch(hosts[0].strip()) if len(hosts) == 1 else None
        if not host or not _is_loopback(host[1].strip("[]")) or int(host[2] or 80) != self.server.port:
            raise _refusal(
                403, "1220", f"The sandbox serves programs of this machine: address it as {self.server.origin}"
            )
        if len(origins) > 1 or not all(map(_is_loopback_origin, origins)):
            raise _refusal(403, "1220", "The sandbox does not serve web pages of other hosts")

    def _body(self) -> bytes:
        lengths, codings = self.headers.get_all("content-length", []), self.headers.get_all("transfer-encoding", [])
        # Both a long body and one that comes in small chunks fit; the time is bounded as well.
        self._input.allow(8 * MAX_BODY, BODY_SECONDS)
        if codings:
            if lengths or [coding.strip().lower() for coding in codings] != ["chunked"]:
                raise _refusal(400, "1210", "The body has a Transfer-Encoding that is not served: send it as chunked")
            return self._chunked_body()
        if not lengths:
            return b""
        if len(set(lengths)) > 1 or not lengths[0].isdecimal():
            raise _refusal(400, "1210", "The Content-Length is not a number")
        if int(lengths[0][:20]) > MAX_BODY:
            raise _RefusedError(too_long(MAX_BODY))
        return self._exactly(int(lengths[0]))

    def _chunked_body(self) -> bytes:
        body = bytearray()
        while size := self._chunk_size():
            if len(body) + size > MAX_BODY:
                raise _RefusedError(too_long(MAX_BODY))
            body += self._exactly(size)
            if self._exactly(2) != b"\r\n":
                raise _refusal(400, "1210", "The body is not chunked as its Transfer-Encoding says")
        while self.rfile.readline(MAX_HEAD).strip(b"\r\n"):
            pass  # trailers
        return bytes(body)

    def _chunk_size(self) -> int:
        match = _CHUNK_SIZE.fullmatch(self.rfile.readline(MAX_HEAD))
        if not match:
            raise _refusal(400, "1210", "The body is not chunked as its Transfer-Encoding says")
        return int(match[1], 16)

    def _exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError("The client closed the connection within its request.")
        return data

    def _is_left_within(self, seconds: float) -> bool:
        """Wait; True as soon as the client or the server ends the connection."""
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
        # Closing with bytes unread would reset the connection, and the client could lose the reply.
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
