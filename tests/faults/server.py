"""An HTTP server on 127.0.0.1 that answers as badly as it is told to.

A fault is one function `(connection, request)`: it sends raw bytes, dribbles, hangs, resets or lies, and returns. Faults run once the
whole request is in; one that is marked `@at("head")` runs before the body is read, and `@at("connect")` before anything is.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

from tests.faults.sample_images import png

MAX_CONNECTIONS = 64
PATIENCE = 60
"""Seconds that are waited for a thread to end; only one that hangs needs them."""
PREFIX = "/api/paas/v4"
IMAGE = png()

Stage = Literal["connect", "head", "request"]


@dataclass(frozen=True)
class Request:
    """One request as it arrived; `number` counts those of its method from 1, in order of arrival."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    head: bytes
    number: int

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name.lower()), None)

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """What a fault holds: one accepted socket."""

    def __init__(self, sock: socket.socket, server: FaultServer) -> None:
        self.sock = sock
        self.server = server
        self.keep = False

    def send(self, *parts: bytes) -> None:
        """Send raw bytes and, once the fault returns, close."""
        self.keep = False
        self.sock.sendall(b"".join(parts))

    def reply(self, status: int = 200, body: bytes = b"", *headers: str, reason: str = "Said So") -> None:
        """Send a well-formed reply and keep the connection open."""
        lines = [f"HTTP/1.1 {status} {reason}", f"Content-Length: {len(body)}", *headers]
        self.sock.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
        self.keep = True

    def json(self, value: Any, status: int = 200, *headers: str) -> None:
        """Send a well-formed reply with a JSON body."""
        self.reply(status, json.dumps(value, ensure_ascii=False).encode(), "Content-Type: application/json", *headers)

    def dribble(self, raw: bytes, pause: float = 0.05) -> None:
        """Send byte by byte, `pause` seconds apart, until the end or until nobody listens."""
        for at in range(len(raw)):
            self.send(raw[at : at + 1])
            if self.server.closing.wait(pause):
                return

    def flood(self, raw: bytes, limit: int = 2**31) -> None:
        """Send the same bytes over and over, `limit` bytes in all, until nobody listens."""
        for _ in range(limit // len(raw)):
            self.send(raw)

    def hang(self) -> None:
        """Say nothing until the other side, or the server, closes."""
        self.keep = False
        with contextlib.suppress(OSError):
            while self.sock.recv(65536):
                pass
        self.server.seen_closing.append(time.monotonic())

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        self.keep = False
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


Fault = Callable[[Connection, Request], None]
F = TypeVar("F", bound=Fault)


def at(stage: Stage) -> Callable[[F], F]:
    """Mark when a fault runs; the request that it is given is then incomplete."""

    def mark(fault: F) -> F:
        fault.stage = stage  # type: ignore[attr-defined]
        return fault

    return mark


def success(connection: Connection, request: Request) -> None:
    """The reply of a good day, with the address of this server's image."""
    connection.json(
        {
            "created": 1760335349,
            "data": [{"url": connection.server.image_url}],
            "id": "20260115",
            "request_id": request.json().get("request_id", "20260115") if request.body else "20260115",
        }
    )


def good_image(connection: Connection, request: Request) -> None:
    """A whole PNG."""
    connection.reply(200, IMAGE, "Content-Type: image/png")


class Canary:
    """An address where nobody should ever knock: it listens and never answers."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._listener = socket.create_server((host, 0))
        self._listener.setblocking(False)
        self._knocks = 0
        self.host = host
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://{host}:{self.port}"

    @property
    def knocks(self) -> int:
        """How many connections were ever made to it."""
        with contextlib.suppress(BlockingIOError):
            while True:
                knock, _ = self._listener.accept()
                self._knocks += 1
                knock.close()
        return self._knocks

    def close(self) -> None:
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class FaultServer:
    """Answers POST with `api` and GET with `image`; without them all is well.

    Attributes:
        posts: POSTs that arrived whole, head and body.
        gets: GETs that arrived.
        connections: Accepted connections.
        heads: Method and raw head of every request.
        requests: Every request that arrived whole.
        keep_requests: False for very long runs, where only the counts matter.
        seen_closing: When (monotonic seconds) a hanging fault saw the other side leave.
    """

    api: Fault | None = None
    image: Fault | None = None
    tls: ssl.SSLContext | None = None
    posts: int = 0
    gets: int = 0
    connections: int = 0
    others: int = 0
    heads: list[tuple[str, bytes]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    keep_requests: bool = True
    seen_closing: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.closing = threading.Event()
        self.arrived = threading.Event()
        self.canary = Canary()
        self._lock = threading.Lock()
        self._capacity = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._open: dict[threading.Thread, socket.socket] = {}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        # Where shutting a listener down does not wake `accept`, this does.
        self._listener.settimeout(0.25)
        self.port = int(self._listener.getsockname()[1])
        self._acceptor = threading.Thread(target=self._accept, name="fault-server", daemon=True)
        self._acceptor.start()

    @property
    def origin(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return self.origin + PREFIX

    @property
    def image_url(self) -> str:
        return self.origin + "/image.png"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every socket and wait for every thread."""
        self.closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(PATIENCE)
        self._listener.close()
        self.canary.close()
        with self._lock:
            rest = dict(self._open)
        for sock in rest.values():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in rest:
            thread.join(PATIENCE)
        if self._acceptor.is_alive() or any(thread.is_alive() for thread in rest):
            raise RuntimeError("A thread of the fault server did not end.")

    def _accept(self) -> None:
        while not self.closing.is_set():
            if not self._capacity.acquire(timeout=0.25):
                continue
            try:
                sock, _ = self._listener.accept()
            except OSError:
                self._capacity.release()
                continue
            sock.settimeout(None)
            with self._lock:
                self.connections += 1
                thread = threading.Thread(target=self._serve, args=(sock,), name="fault-connection", daemon=True)
                self._open[thread] = sock
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            # What a fault does to a peer that has left is no error of the server.
            with contextlib.suppress(OSError), sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.tls:
                    with self.tls.wrap_socket(sock, server_side=True) as secure:
                        self._talk(Connection(secure, self))
                else:
                    self._talk(Connection(sock, self))
        finally:
            with self._lock:
                self._open.pop(threading.current_thread(), None)
            self._capacity.release()

    def _talk(self, connection: Connection) -> None:
        for fault in (self.api, self.image):
            if getattr(fault, "stage", "") == "connect":
                fault(connection, Request("", "", [], b"", b"", self.connections))  # type: ignore[misc]
                return
        rest = b""
        while True:
            while b"\r\n\r\n" not in rest:
                more = connection.sock.recv(65536)
                if not more:
                    return
                rest += more
            head, rest = rest.split(b"\r\n\r\n", 1)
            request, rest = self._read(connection, head, rest)
            if request is None:
                return
            fault = {"POST": self.api or success, "GET": self.image or good_image}.get(request.method)
            connection.keep = False
            if fault is None:
                connection.reply(405)
            elif getattr(fault, "stage", "request") != "head":
                fault(connection, request)
            if not connection.keep or self.closing.is_set():
                return

    def _read(self, connection: Connection, head: bytes, rest: bytes) -> tuple[Request | None, bytes]:
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = [(name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        if self.keep_requests:
            with self._lock:
                self.heads.append((method, head))
        fault = self.api if method == "POST" else self.image
        if getattr(fault, "stage", "") == "head":
            fault(connection, Request(method, target, headers, b"", head, self.connections))  # type: ignore[misc]
            return None, b""
        length = int(next((value for name, value in headers if name == "content-length"), "0"))
        while len(rest) < length:
            more = connection.sock.recv(65536)
            if not more:
                return None, b""
            rest += more
        with self._lock:
            if method == "POST":
                self.posts += 1
                number = self.posts
            elif method == "GET":
                self.gets += 1
                number = self.gets
            else:
                self.others += 1
                number = self.others
            request = Request(method, target, headers, rest[:length], head, number)
            if self.keep_requests:
                self.requests.append(request)
        self.arrived.set()
        return request, rest[length:]
