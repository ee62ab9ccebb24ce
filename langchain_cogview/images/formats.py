"""PNG, JPEG, WebP: magic, dimensions, wholeness; read from the bytes alone and without decoding a pixel.

A file is whole when its own structure reaches exactly to its last byte. That catches what a broken download leaves
(a cut, an error page, two files glued together) and what should not be handed on (something hidden behind the end).

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
"""Bytes above which a picture is refused."""

MAX_PIXELS: Final = 50_000_000
"""Width times height above which a picture is refused; the service draws at most 4,194,304."""

MAX_PARTS: Final = 100_000
"""Chunks or segments above which a file is refused: a 32 MB file could hold millions, each costing time."""

MAX_SCANS: Final = 64
"""Scans above which a JPEG is refused: encoders write at most 20 or so, and each costs as much time as the whole image."""

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
    """The bytes are no whole PNG, JPEG or WebP picture; the text says in a few plain words why."""


class ImageRefusedError(ImageFormatError):
    """The image is larger, or made of more parts, than is accepted; fetching it again gives the same one."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the bytes of a picture say of it.

    Attributes:
        mime_type: `image/png`, `image/jpeg` or `image/webp`.
        extension: `.png`, `.jpg` or `.webp`.
        width: In pixels.
        height: In pixels.
        decoding_bytes: Memory that Pillow takes at most to decode it, measured for each kind of file.
        preview_bytes: The same for making it smaller, where a JPEG can be decoded at a lower resolution.
    """

    mime_type: str
    extension: str
    width: int
    height: int
    decoding_bytes: int = field(default=0, compare=False)
    preview_bytes: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class _Measured:
    """Width and height, and the memory for each pixel: to decode it, and to make it smaller."""

    size: tuple[int, int]
    decoding: float
    preview: float


def sniff(head: bytes) -> str | None:
    """The mime type told by the first 12 bytes of a file; None for anything but PNG, JPEG and WebP."""
    if head.startswith(_PNG_MAGIC):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    return None


def inspect(file: BinaryIO) -> ImageInfo:
    """Read a picture's format and dimensions, and make sure that it is whole.

    Args:
        file: Seekable and binary; it is read from its start to its end, at most 64 kB at a time, and left anywhere.

    Raises:
        ImageFormatError: The file is no PNG, JPEG or WebP, is damaged or cut short, goes on behind the picture's end,
            or has no pixels or more than `MAX_PIXELS`.
    """
    window = _Window(file)
    if not window.size:
        raise ImageFormatError("the file is empty")
    mime_type = sniff(window.take(0, min(12, window.size)))
    if mime_type is None:
        raise ImageFormatError("the file is not a PNG, JPEG or WebP picture")
    measure = {"image/png": _measure_png, "image/jpeg": _measure_jpeg, "image/webp": _measure_webp}[mime_type]
    found = measure(window)
    width, height = found.size
    memory = (int(width * height * each) for each in (found.decoding, found.preview))
    return ImageInfo(mime_type, EXTENSIONS[mime_type], width, height, *memory)


class _Window:
    """A file seen through one buffer of 64 kB, so that many small steps do not become many reads."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, 2)
        self._start = 0
        self._buffer = b""

    def take(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes (up to 64 kB) at `start`."""
        offset = start - self._start
        if offset < 0 or offset + length > len(self._buffer):
            self._load(start)
            offset = 0
        found = self._buffer[offset : offset + length]
        if len(found) < length:
            raise ImageFormatError("the picture is cut short")
        return found

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`, in pieces."""
        while start < end:
            piece = self.take(start, min(end - start, _WINDOW))
            yield piece
            start += len(piece)

    def find(self, pattern: re.Pattern[bytes], start: int) -> int:
        """Where a pattern of one or two bytes next matches."""
        while start < self.size:
            if not self._start <= start < self._start + len(self._buffer) - 1:
                self._load(start)
            match = pattern.search(self._buffer, start - self._start)
            if match:
                return self._start + match.start()
            # The last byte is looked at again: it can be the first half of a match.
            start = max(start + 1, self._start + len(self._buffer) - 1)
        raise ImageFormatError("the picture is cut short")

    def _load(self, start: int) -> None:
        self._file.seek(start)
        self._start, self._buffer = start, self._file.read(_WINDOW)


def _checked(width: int, height: int) -> tuple[int, int]:
    if not width or not height:
        raise ImageFormatError("the picture has no pixels")
    if width * height > MAX_PIXELS:
        raise ImageRefusedError(f"the picture has {width}x{height} pixels, more than the {MAX_PIXELS:,} allowed")
    return width, height


def _expect_end(window: _Window, end: int) -> None:
    if end > window.size:
        raise ImageFormatError("the picture is cut short")
    if end < window.size:
        raise ImageFormatError("there is something behind the picture's end")


def _measure_png(window: _Window) -> _Measured:
    size: tuple[int, int] | None = None
    colour = 0
    position, has_pixels = len(_PNG_MAGIC), False
    for _ in range(MAX_PARTS):
        head = window.take(position, 8)
        length, name = int.from_bytes(head[:4], "big"), head[4:]
        if length >> 31 or not name.isalpha():
            raise ImageFormatError("the PNG picture is damaged: it has an impossible chunk")
        if (name == b"IHDR") != (size is None):
            raise ImageFormatError("the PNG picture is damaged: its header is not at its start")
        end = position + 8 + length
        checksum = 0
        for piece in window.pieces(position + 4, end):
            checksum = zlib.crc32(piece, checksum)
        if checksum != int.from_bytes(window.take(end, 4), "big"):
            raise ImageFormatError("the PNG picture is damaged: a checksum is wrong")
        if size is None:
            header = window.take(position + 8, length) if length == 13 else b""  # noqa: PLR2004
            size, colour = _png_header(header), header[9]
        has_pixels = has_pixels or (name == b"IDAT" and length > 0)
        position = end + 4
        if name == b"IEND":
            if length or not has_pixels:
                raise ImageFormatError("the PNG picture is damaged: it ends before its pixels")
            _expect_end(window, position)
            # One byte for each of four channels; to make it smaller, a copy that is opaque or premultiplied.
            return _Measured(size, 4, 6 if colour in _PNG_OPAQUE else 9)
    raise ImageRefusedError("the PNG picture has too many chunks")


def _png_header(header: bytes) -> tuple[int, int]:
    if not header or header[8] not in _PNG_DEPTHS.get(header[9], ()) or header[10] or header[11] or header[12] > 1:
        raise ImageFormatError("the PNG picture is damaged: its header is wrong")
    return _checked(int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big"))


def _measure_jpeg(window: _Window) -> _Measured:  # noqa: C901  one branch for each kind of marker
    size: tuple[int, int] | None = None
    position, scans, frame, components = 2, 0, 0, 0
    for _ in range(MAX_PARTS):
        if window.take(position, 1) != b"\xff":
            raise ImageFormatError("the JPEG picture is damaged: a marker is missing")
        position = window.find(_JPEG_FILL_END, position) + 1
        marker = window.take(position - 1, 1)[0]
        if marker == _EOI:
            if not size or not scans:
                raise ImageFormatError("the JPEG picture is damaged: it ends before its pixels")
            _expect_end(window, position)
            return _jpeg_memory(size, frame, components, scans)
        if marker == _TEM:
            continue
        if marker in _MISPLACED:
            raise ImageFormatError("the JPEG picture is damaged: a marker is out of place")
        length = int.from_bytes(window.take(position, 2), "big")
        if length < 2 or (marker in _FRAMES and (size or length < 8)):  # noqa: PLR2004
            raise ImageFormatError("the JPEG picture is damaged: its header is wrong")
        if marker in _FRAMES:
            head = window.take(position + 3, 5)
            size = _checked(int.from_bytes(head[2:4], "big"), int.from_bytes(head[:2], "big"))
            frame, components = marker, head[4]
        position += length
        if marker == _SOS:
            if size is None:
                raise ImageFormatError("the JPEG picture is damaged: its header is not before its pixels")
            scans += 1
            if scans > MAX_SCANS:
                raise ImageRefusedError(f"the JPEG picture has more than the {MAX_SCANS} scans allowed")
            position = window.find(_JPEG_MARKER_IN_SCAN, position)
    raise ImageRefusedError("the JPEG picture has too many segments")


def _jpeg_memory(size: tuple[int, int], frame: int, components: int, scans: int) -> _Measured:
    if frame in _SEQUENTIAL and scans == 1:
        return _Measured(size, 4, 0.5)  # row by row, or an eighth of the width and height
    coefficients = 2 * max(components, 1)  # of the whole image, whatever the resolution
    return _Measured(size, 4 + coefficients, coefficients + (4 if frame in _LOSSLESS else 0.5))


def _measure_webp(window: _Window) -> _Measured:
    riff = int.from_bytes(window.take(4, 4), "little")
    _expect_end(window, 8 + riff + riff % 2)
    size: tuple[int, int] | None = None
    position, has_pixels = 12, False
    for _ in range(MAX_PARTS):
        if position == window.size:
            if size is None or not has_pixels:
                raise ImageFormatError("the WebP picture is damaged: it has no pixels")
            return _Measured(size, 17, 17)  # four canvases of an animation, which every WebP is to Pillow
        head = window.take(position, 8)
        name, length = head[:4], int.from_bytes(head[4:], "little")
        position += 8
        end = position + length + length % 2
        if name in (b"VP8 ", b"VP8L", b"VP8X"):
            found = _checked(*_webp_size(name, window.take(position, min(length, 10))))
            if size not in (None, found):
                raise ImageFormatError("the WebP picture is damaged: its sizes disagree")
            size = found
        elif size is None:
            raise ImageFormatError("the WebP picture is damaged: its header is not at its start")
        has_pixels = has_pixels or name in (b"VP8 ", b"VP8L", b"ANMF")
        position = end
    raise ImageRefusedError("the WebP picture has too many chunks")


def _webp_size(name: bytes, head: bytes) -> tuple[int, int]:
    if name == b"VP8X" and len(head) >= 10:  # noqa: PLR2004
        return int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1
    if name == b"VP8 " and len(head) >= 10 and not head[0] & 1 and head[3:6] == b"\x9d\x01\x2a":  # noqa: PLR2004
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    bits = int.from_bytes(head[1:5], "little")
    if name == b"VP8L" and len(head) >= 5 and head[0] == 0x2F and not bits >> 29:  # noqa: PLR2004
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise ImageFormatError("the WebP picture is damaged: its header is wrong")
