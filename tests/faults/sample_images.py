"""Small images, and spoiled ones, made with the standard library alone."""

from __future__ import annotations

import base64
import hashlib
import struct
import zlib

JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAFA3PEY8MlBGQUZaVVBfeMiCeG5uePWvuZHI////////////////////////////////////////////"
    "////////wAALCAAQABABAREA/8QAFQABAQAAAAAAAAAAAAAAAAAAAAP/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/9oACAEBAAA/AJgP/9k="
)
WEBP = base64.b64decode("UklGRh4AAABXRUJQVlA4TBEAAAAvD8ADAAdQjyLXo/+BiOh/AAA=")
GIF = base64.b64decode("R0lGODdhEAAQAIEAAMgeHgAAAAAAAAAAACwAAAAAEAAQAEAIHQABCBxIsKDBgwgTKlzIsKHDhxAjSpxIsaLFgQEBADs=")
SVG = (
    b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><script>alert(1)</script></svg>'
)
HTML = b"<!DOCTYPE html><html><head><title>One moment</title></head><body>Checking your browser</body></html>"
NOT_YET = b'{"RetCode":-148654,"ErrMsg":"file not exist"}'


def chunk(kind: bytes, content: bytes) -> bytes:
    """One PNG chunk: length, kind, content, checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def header(width: int, height: int, *, depth: int = 8, colour: int = 2) -> bytes:
    """The PNG signature and its first chunk."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def png(width: int = 64, height: int = 64, *, noise: str | None = None) -> bytes:
    """A whole RGB image; with `noise` its pixels are drawn from that seed and hardly compress."""
    line = width * 3
    if noise is None:
        raw = (b"\0" + b"\xc8\x1e\x1e" * width) * height
    else:
        pixels = hashlib.shake_128(noise.encode()).digest(line * height)
        raw = b"".join(b"\0" + pixels[at : at + line] for at in range(0, len(pixels), line))
    return header(width, height) + chunk(b"IDAT", zlib.compress(raw, 1)) + chunk(b"IEND", b"")


def bomb(side: int = 20_000) -> bytes:
    """A well-formed image of `side` x `side` one-bit pixels (400 million by default) in a few dozen kilobytes."""
    lines = zlib.compressobj(9)
    row = b"\0" * (1 + (side + 7) // 8)
    squeezed = b"".join(lines.compress(row * 100) for _ in range(side // 100)) + lines.flush()
    return header(side, side, depth=1, colour=0) + chunk(b"IDAT", squeezed) + chunk(b"IEND", b"")


def header_bomb() -> bytes:
    """An image whose header promises 2^31 - 1 pixels a side and that holds a single byte of them."""
    return header(2**31 - 1, 2**31 - 1) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
