"""Check PNG, JPEG and WebP files and read their dimensions, without decoding a pixel.

A file is whole when its own structure ends exactly at its last byte. This finds what a broken download leaves (a file that is
cut short, an error page, two files in one) and what should not be passed on (something hidden behind the end).

Sources: the PNG specification (third edition), ITU-T T.81 (JPEG), RFC 9649 (WebP).
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_IMAGE_BYTES: Final = 32 * 2**20
"""Bytes above which an image is refused."""

MAX_PIXELS: Final = 50_000_000
"""Width times height above which an image is refused; the service makes at most 4,194,304 pixels."""

MAX_PARTS: Final = 100_000
"""Chunks or segments above which a file is refused: a file of 32 MB could hold millions, and every one takes time."""

MAX_SCANS: Final = 64
"""Scans above which a JPEG is refused: encoders write about 20 at most, and one takes as long as the whole image."""

_WINDOW = 65_536
EXTENSIONS: Final = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTHS: Final = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}

_PNG_OPAQUE: Final = frozenset({0, 2})

_EOI, _SOS, _TEM = 0xD9, 0xDA, 0x01
_MISPLACED: Final = frozenset({0, *range(0xD0, 0xD9)})  # RSTn outside of a scan, a second SOI
_SEQUENTIAL: Final = frozenset({0xC0, 0xC1})
_LOSSLESS: Final = frozenset({0xC3, 0xC7, 0xCB, 0xCF})
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # without DHT, JPG and DAC
_JPEG_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_JPEG_FILL_END = re.compile(rb"[^\xff]", re.DOTALL)


class ImageFormatError(ValueError):
    """The bytes are not one whole PNG, JPEG or WebP image; the text says why, in a few words."""


class ImageRefusedError(ImageFormatError):
    """The image is larger, or has more parts, than is accepted; downloading it again gives the same image."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the bytes of an image say about it."""

    mime_type: str
    """`image/png`, `image/jpeg` or `image/webp`."""
    extension: str
    """`.png`, `.jpg` or `.webp`."""
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    decoding_bytes: int = field(default=0, compare=False)
    """The most memory that Pillow takes to decode the image, measured for every kind of file."""
    preview_bytes: int = field(default=0, compare=False)
    """The same for a preview; a JPEG can be decoded at a lower resolution."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """Width and height, and the bytes of memory per pixel: to decode the image, and to make a preview."""

    size: tuple[int, int]
    decoding: float
    preview: float


def sniff(head: bytes) -> str | None:
    """Recognise a format by the first bytes of a file.

    Args:
        head: At least 12 bytes.

    Returns:
        The mime type; None for anything but PNG, JPEG and WebP.
    """
    if head.startswith(_PNG_MAGIC):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    return None


def inspect(file: BinaryIO) -> ImageInfo:
    """Read the format and the dimensions of an image, and check that it is whole.

    Args:
        file: A binary file that can seek. It is read from start to end, at most 64 kB at a time; its position changes.

    Returns:
        What the bytes say about the image.

    Raises:
        ImageFormatError: The file is not a PNG, JPEG or WebP image, is damaged or cut short, has something behind the
            image's end, or has no pixels.
        ImageRefusedError: The image has more pixels, parts or scans than are accepted.
    """
    window = _Window(file)
    if not window.size:
        raise ImageFormatError("the file is empty")
    mime_type = sniff(window.read_at(0, min(12, window.size)))
    if mime_type is None:
        raise ImageFormatError("the file is not a PNG, JPEG or WebP image")
    measure = {"image/png": _measure_png, "image/jpeg": _measure_jpeg, "image/webp": _measure_webp}[mime_type]
    found = measure(window)
    width, height = found.size
    memory = (int(width * height * per_pixel) for per_pixel in (found.decoding, found.preview))
    return ImageInfo(mime_type, EXTENSIONS[mime_type], width, height, *memory)


class _Window:
    """A file behind one buffer of 64 kB, so that many small reads do not become many system calls."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, 2)
        self._start = 0
        self._buffer = b""

    def read_at(self, start: int, length: int) -> bytes:
        # Exactly `length` bytes, up to 64 kB.
        offset = start - self._start
        if offset < 0 or offset + length > len(self._buffer):
            self._load(start)
            offset = 0
        found = self._buffer[offset : offset + length]
        if len(found) < length:
            raise ImageFormatError("the image is cut short")
        return found

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        while start < end:
            piece = self.read_at(start, min(end - start, _WINDOW))
            yield piece
            start += len(piece)

    def find(self, pattern: re.Pattern[bytes], start: int) -> int:
        # The pattern matches one or two bytes.
        while start < self.size:
            if not self._start <= start < self._start + len(self._buffer) - 1:
                self._load(start)
            match = pattern.search(self._buffer, start - self._start)
            if match:
                return self._start + match.start()
            # The last byte is looked at again: it can be the first half of a match.
            start = max(start + 1, self._start + len(self._buffer) - 1)
        raise ImageFormatError("the image is cut short")

    def _load(self, start: int) -> None:
        self._file.seek(start)
        self._start, self._buffer = start, self._file.read(_WINDOW)


def _checked(width: int, height: int) -> tuple[int, int]:
    if not width or not height:
        raise ImageFormatError("the image has no pixels")
    if width * height > MAX_PIXELS:
        raise ImageRefusedError(f"the image has {width}x{height} pixels, more than the {MAX_PIXELS:,} allowed")
    return width, height


def _expect_end(window: _Window, end: int) -> None:
    if end > window.size:
        raise ImageFormatError("the image is cut short")
    if end < window.size:
        raise ImageFormatError("there is something behind the image's end")


def _measure_png(window: _Window) -> _Measured:
    size: tuple[int, int] | None = None
    colour = 0
    position, has_pixels = len(_PNG_MAGIC), False
    for _ in range(MAX_PARTS):
        head = window.read_at(position, 8)
        length, name = int.from_bytes(head[:4], "big"), head[4:]
        if length >> 31 or not name.isalpha():
            raise ImageFormatError("the PNG image is damaged: it has an impossible chunk")
        if (name == b"IHDR") != (size is None):
            raise ImageFormatError("the PNG image is damaged: its header is not at its start")
        end = position + 8 + length
        checksum = 0
        for piece in window.pieces(position + 4, end):
            checksum = zlib.crc32(piece, checksum)
        if checksum != int.from_bytes(window.read_at(end, 4), "big"):
            raise ImageFormatError("the PNG image is damaged: a checksum is wrong")
        if size is None:
            header = window.read_at(position + 8, length) if length == 13 else b""  # noqa: PLR2004
            size, colour = _png_header(header), header[9]
        has_pixels = has_pixels or (name == b"IDAT" and length > 0)
        position = end + 4
        if name == b"IEND":
            if length or not has_pixels:
                raise ImageFormatError("the PNG image is damaged: it ends before its pixels")
            _expect_end(window, position)
            # One byte for each of four channels; a preview takes a copy as well, opaque or premultiplied.
            return _Measured(size, 4, 6 if colour in _PNG_OPAQUE else 9)
    raise ImageRefusedError("the PNG image has too many chunks")


def _png_header(header: bytes) -> tuple[int, int]:
    if not header or header[8] not in _PNG_DEPTHS.get(header[9], ()) or header[10] or header[11] or header[12] > 1:
        raise ImageFormatError("the PNG image is damaged: its header is wrong")
    return _checked(int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big"))


def _measure_jpeg(window: _Window) -> _Measured:  # noqa: C901  one branch for each kind of marker
    size: tuple[int, int] | None = None
    position, scans, frame, components = 2, 0, 0, 0
    for _ in range(MAX_PARTS):
        if window.read_at(position, 1) != b"\xff":
            raise ImageFormatError("the JPEG image is damaged: a marker is missing")
        position = window.find(_JPEG_FILL_END, position) + 1
        marker = window.read_at(position - 1, 1)[0]
        if marker == _EOI:
            if not size or not scans:
                raise ImageFormatError("the JPEG image is damaged: it ends before its pixels")
            _expect_end(window, position)
            return _jpeg_memory(size, frame, components, scans)
        if marker == _TEM:
            continue
        if marker in _MISPLACED:
            raise ImageFormatError("the JPEG image is damaged: a marker is out of place")
        length = int.from_bytes(window.read_at(position, 2), "big")
        if length < 2 or (marker in _FRAMES and (size or length < 8)):  # noqa: PLR2004
            raise ImageFormatError("the JPEG image is damaged: its header is wrong")
        if marker in _FRAMES:
            head = window.read_at(position + 3, 5)
            size = _checked(int.from_bytes(head[2:4], "big"), int.from_bytes(head[:2], "big"))
            frame, components = marker, head[4]
        position += length
        if marker == _SOS:
            if size is None:
                raise ImageFormatError("the JPEG image is damaged: its header is not before its pixels")
            scans += 1
            if scans > MAX_SCANS:
                raise ImageRefusedError(f"the JPEG image has more than the {MAX_SCANS} scans allowed")
            position = window.find(_JPEG_MARKER_IN_SCAN, position)
    raise ImageRefusedError("the JPEG image has too many segments")


def _jpeg_memory(size: tuple[int, int], frame: int, components: int, scans: int) -> _Measured:
    if frame in _SEQUENTIAL and scans == 1:
        return _Measured(size, 4, 0.5)  # row by row, or an eighth of the width and height
    coefficients = 2 * max(components, 1)  # of the whole image, whatever the resolution
    return _Measured(size, 4 + coefficients, coefficients + (4 if frame in _LOSSLESS else 0.5))


def _measure_webp(window: _Window) -> _Measured:
    riff = int.from_bytes(window.read_at(4, 4), "little")
    _expect_end(window, 8 + riff + riff % 2)
    size: tuple[int, int] | None = None
    position, has_pixels = 12, False
    for _ in range(MAX_PARTS):
        if position == window.size:
            if size is None or not has_pixels:
                raise ImageFormatError("the WebP image is damaged: it has no pixels")
            return _Measured(size, 17, 17)  # Pillow treats every WebP as an animation, with four canvases
        head = window.read_at(position, 8)
        name, length = head[:4], int.from_bytes(head[4:], "little")
        position += 8
        end = position + length + length % 2
        if name in (b"VP8 ", b"VP8L", b"VP8X"):
            found = _checked(*_webp_size(name, window.read_at(position, min(length, 10))))
            if size not in (None, found):
                raise ImageFormatError("the WebP image is damaged: its sizes disagree")
            size = found
        elif size is None:
            raise ImageFormatError("the WebP image is damaged: its header is not at its start")
        has_pixels = has_pixels or name in (b"VP8 ", b"VP8L", b"ANMF")
        position = end
    raise ImageRefusedError("the WebP image has too many chunks")


def _webp_size(name: bytes, head: bytes) -> tuple[int, int]:
    if name == b"VP8X" and len(head) >= 10:  # noqa: PLR2004
        return int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1
    if name == b"VP8 " and len(head) >= 10 and not head[0] & 1 and head[3:6] == b"\x9d\x01\x2a":  # noqa: PLR2004
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    bits = int.from_bytes(head[1:5], "little")
    if name == b"VP8L" and len(head) >= 5 and head[0] == 0x2F and not bits >> 29:  # noqa: PLR2004
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise ImageFormatError("the WebP image is damaged: its header is wrong")
