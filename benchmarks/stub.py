"""The service of the benchmarks: the wire format of the endpoint and nothing else, in a process of its own.

    python -m benchmarks.stub

`POST /<seconds>/images/generations` answers after so many seconds, `GET /image-<n>.png` gives a whole PNG of 3 MB at once,
`GET /counts` returns what was served. It parses no more of HTTP than the clients that are measured send, on asyncio's protocols
and with the collector off, so that it is faster than any of them: `python -m benchmarks` prints how fast.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import struct
import subprocess
import sys
import zlib
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

SIDE = 1000
IMAGE_BYTES_AT_LEAST = 3 * SIDE * SIDE


def image() -> bytes:
    """A PNG of about 3 MB: noise, which nothing can make smaller."""
    noise = random.Random(1)
    rows = b"".join(b"\0" + noise.randbytes(3 * SIDE) for _ in range(SIDE))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b"")


class _Service(asyncio.Protocol):
    """One connection; requests come one after the other, as HTTP/1.1 clients send them."""

    counts: Counter[str] = Counter()
    image_reply = b""
    origin = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]
        self._received = b""
        self.counts["connections"] += 1

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._received[:end]
        if head.startswith(b"POST"):
            at = head.lower().find(b"content-length:")
            if len(self._received) < end + 4 + int(head[at + 15 :].partition(b"\r\n")[0]):
                return
        self._received = b""
        target = head.split(b" ", 2)[1].decode()
        if head.startswith(b"POST"):
            self.counts["posts"] += 1
            seconds = float(target.split("/")[1])
            if seconds:
                asyncio.get_running_loop().call_later(seconds, self._answer)
            else:
                self._answer()
        elif target == "/counts":
            self._send(json.dumps(self.counts).encode(), b"application/json")
        else:
            self.counts["images"] += 1
            self._transport.write(self.image_reply)

    def _answer(self) -> None:
        number = self.counts["answers"] = self.counts["answers"] + 1
        body = f'{{"created": 1760000000, "data": [{{"url": "{self.origin}/image-{number}.png"}}]}}'.encode()
        self._send(body, b"application/json")

    def _send(self, body: bytes, kind: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (kind, len(body))
        self._transport.write(head + body)


async def _serve() -> None:
    content = image()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(content)
    _Service.image_reply = head + content
    server = await asyncio.get_running_loop().create_server(_Service, "127.0.0.1", 0, backlog=2000)
    _Service.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    print(_Service.origin, flush=True)
    gc.disable()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until whoever started it closes it


class Stub(NamedTuple):
    """A stub that runs."""

    origin: str

    def base_url(self, seconds: float = 0) -> str:
        """Base URL of a service that takes so many seconds for an image."""
        return f"{self.origin}/{seconds}"

    def counts(self) -> Counter[str]:
        """`connections` (this one's own left out), `posts`, `images`."""
        import httpx

        reported = Counter(httpx.get(f"{self.origin}/counts", trust_env=False).json())
        _ASKED[self.origin] += 1
        reported["connections"] -= _ASKED[self.origin]
        return reported


_ASKED: Counter[str] = Counter()


@contextlib.contextmanager
def running() -> Iterator[Stub]:
    """Run the stub in another process."""
    command = [sys.executable, "-m", "benchmarks.stub"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Stub(process.stdout.readline().strip())  # type: ignore[union-attr]
    finally:
        process.communicate()


if __name__ == "__main__":
    asyncio.run(_serve())
