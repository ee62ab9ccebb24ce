"""A sandbox on a port of this machine, for any client in any language."""

from __future__ import annotations

import ipaddress
import socket
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final, Self

from langchain_cogview.sandbox.faults import JSON_TYPE, error_body
from langchain_cogview.sandbox.service import Sandbox

if TYPE_CHECKING:
    from types import TracebackType

PREFIX: Final = "/api/paas/v4"
MAX_BODY: Final = 1_000_000
"""Bytes of a request body; a longer one gets 413."""
_IDLE_SECONDS: Final = 120
_CLOSING_SECONDS: Final = 5


class SandboxServer:
    """The service on a port of the loopback interface.

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
        return self.origin + PREFIX

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
        return self

    def close(self) -> None:
        """Close the port and every connection; harmless if that was done before."""
        server, thread, self._server, self._thread = self._server, self._thread, None, None
        if server is not None and thread is not None:
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


def _loopback(host: str) -> str:
    if host == "localhost":
        return "127.0.0.1"
    try:
        if ipaddress.ip_address(host).is_loopback:
            return host
    except ValueError:
        pass
    raise ValueError(
        f"The sandbox serves only this machine, not {host!r}: it asks for no key. Use 127.0.0.1, ::1 or localhost."
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], sandbox: Sandbox) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.sandbox = sandbox
        self.closing = threading.Event()
        self._open: set[socket.socket] = set()
        self._changed = threading.Condition()
        super().__init__(address, _Handler)
        host, port = self.server_address[:2]
        self.origin = (
            f"http://[{host!s}]:{port}" if self.address_family == socket.AF_INET6 else f"http://{host!s}:{port}"
        )

    def server_bind(self) -> None:
        # The parent's own also looks up the host's name, which can take seconds and asks the network.
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        with self._changed:
            self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._changed:
            self._open.discard(request)
            self._changed.notify_all()

    def end_connections(self) -> None:
        """Wake every handler that reads or waits, and let it close its socket."""
        self.closing.set()
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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "cogview-sandbox"
    sys_version = ""
    disable_nagle_algorithm = True
    wbufsize = -1
    timeout = _IDLE_SECONDS
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the parent's name
        """Say nothing."""

    def _serve(self) -> None:
        body = self._body()
        if body is None:
            return
        sandbox, origin = self.server.sandbox, self.server.origin
        with sandbox.admit(self.command, self.path, dict(self.headers), body, origin=origin) as reply:
            if reply.delay and self.server.closing.wait(reply.delay):
                self.close_connection = True
                return
        self._send(reply.status, reply.headers, reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _serve  # noqa: N815

    def _body(self) -> bytes | None:
        length = self.headers.get("content-length", "0")
        if "transfer-encoding" in self.headers or not length.isdecimal():
            self._refuse(411, "Send the body with a Content-Length")
            return None
        if int(length[:20]) > MAX_BODY:
            self._refuse(413, f"The body has more than {MAX_BODY} bytes")
            return None
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            return None
        return body

    def _refuse(self, status: int, message: str) -> None:
        self.close_connection = True
        headers = {"content-type": JSON_TYPE, "connection": "close", "x-cogview-sandbox": "1"}
        self._send(status, headers, error_body("1210", message))

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()
