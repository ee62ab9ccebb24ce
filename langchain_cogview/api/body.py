"""The body of a reply, read as it is received: bounded JSON, and apart from it the image data that gateways put there.

The service sends a link. Gateways and self-hosted servers send the image itself as base64 in a string of the JSON. Such a string
is decoded as it comes and leaves a short placeholder behind, so that a reply takes no more memory than its image.
"""

from __future__ import annotations

import binascii
import io
import re
import zlib
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_REPLY_BYTES: Final = 1_000_000
"""The most bytes of a reply, without its image data."""
MAX_IMAGE_BYTES: Final = 32 * 2**20
"""The most bytes of image data in a reply, as for a download."""
DATA_FIELDS: Final = ("b64_json", "base64", "b64")
"""Where gateways put an image's bytes; `url` may hold a `data:` URL too."""

_LONG: Final = 16_384
"""Characters from which a string may be image data; a shorter one stays where it is."""
_SAMPLE: Final = 64
_PART: Final = 2**16
"""Bytes that are looked at together."""
_COMPLETE: Final = re.compile(rb'[^"]*(?:"[^"\\]*(?:\\.[^"\\]*)*"[^"]*)*', re.DOTALL)
"""Whole strings and what stands between them. (One that is long and wholly in a part stays in the JSON.)"""
_STRING: Final = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_KEY_BYTES: Final = 64
_DATA_KEY: Final = re.compile(rb'"(?:%s|url)"\s*:\s*"\Z' % b"|".join(name.encode() for name in DATA_FIELDS))
_OPEN_ESCAPE: Final = re.compile(rb"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_MARK: Final = re.compile(r"\x00image (\d{1,3})\Z")
_DATA_URL: Final = re.compile(
    rb"\s*data:(?:[^,]{0,200}(;\s*base64\s*)|(?!\s*(?:text/|[;,]))[^,]{0,200}),", re.IGNORECASE
)
"""A `data:` URL. Without base64 it may not be of a text, which is also what one without a media type is."""
_OPEN_PERCENT: Final = re.compile(rb"%[0-9a-fA-F]?\Z")
_GZIP_MAGIC: Final = b"\x1f\x8b"
_BLANKS: Final = b" \t\r\n\f\v"
_STANDARD: Final = bytes.maketrans(b"-_", b"+/")
_ALPHABET: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
_NOT_PLAIN: Final = bytes({*range(32), *b'"\\', *range(127, 256)})
_ESCAPES: Final = (
    *((b"\\u%04x" % ord(sign), sign) for sign in (b"/", b"+", b"=", b"\n", b"\r", b"\t", b" ", b"-", b"_")),
    *((b"\\u%04X" % ord(sign), sign) for sign in (b"/", b"+", b"=", b"\n", b"\r", b"-", b"_")),
    *((b"\\/", b"/"), (b"\\n", b"\n"), (b"\\r", b"\r"), (b"\\t", b"\t")),
)
"""The JSON escapes that base64 can be behind: some writers escape the slash, others the plus sign."""


class ImageData:
    """Decodes base64, in either alphabet, with blanks and without its padding, or a `data:` URL, percent-encoded or not.

    Attributes:
        is_valid: Whether the text was valid so far.
        size: The number of bytes that were decoded so far.
    """

    def __init__(self) -> None:
        self.is_valid = True
        self.size = 0
        self._decoded = io.BytesIO()
        self._rest = b""
        self._is_at_start = True
        self._is_url = False
        self._is_base64 = True
        self._cut = b""  # the beginning of a percent escape

    def feed(self, text: bytes) -> None:
        """Decode more text. The first call needs the whole beginning of a `data:` URL."""
        if self._is_at_start:
            self._is_at_start = False
            url = _DATA_URL.match(text)
            if url:
                self._is_url, self._is_base64, text = True, bool(url[1]), text[url.end() :]
        if self._is_url:
            text = self._unquoted(self._cut + text)
        if not self._is_base64:
            self.size += self._decoded.write(text)
            return
        text = self._rest + text.translate(_STANDARD, _BLANKS)
        if text.translate(None, _ALPHABET):
            self.is_valid = False
        whole = len(text) // 4 * 4
        self._rest = text[whole:]
        self._decode(text[:whole])

    def result(self) -> bytes | None:
        """Return the decoded bytes; None if the text was not valid or empty."""
        rest = self._rest.rstrip(b"=")
        if len(rest) > 1:  # one character alone says nothing
            self._decode(rest + b"=" * (-len(rest) % 4))
        self._rest = b""
        return self._decoded.getvalue() if self.is_valid and self.size and not self._cut else None

    def _unquoted(self, text: bytes) -> bytes:
        cut = _OPEN_PERCENT.search(text)
        self._cut = cut[0] if cut else b""
        return unquote_to_bytes(text[: len(text) - len(self._cut)]) if b"%" in text else text

    def _decode(self, text: bytes) -> None:
        try:
            if self.is_valid:
                self.size += self._decoded.write(binascii.a2b_base64(text))
        except binascii.Error:
            self.is_valid = False


def image_data(value: object, images: Sequence[bytes | None]) -> bytes | None:
    """The image data that a string of a reply holds.

    Args:
        value: A value of the JSON: base64, a `data:` URL, or the placeholder of either.
        images: What `ReplyBody.images` gave for this reply.

    Returns:
        The bytes, or None.
    """
    if not isinstance(value, str):
        return None
    mark = _MARK.search(value)
    if mark:
        number = int(mark[1])
        return images[number] if number < len(images) else None
    if not value.isascii():
        return None
    decoder = ImageData()
    decoder.feed(value.encode())
    return decoder.result()


class ReplyBody:
    """The body of one reply.

    Args:
        encoding: Its `Content-Encoding`.

    Attributes:
        has_content: Whether anything has come.
    """

    def __init__(self, encoding: str = "") -> None:
        self.has_content = False
        self._inflater = _inflater(encoding)
        self._json = bytearray()
        self._images: list[bytes | None] = []
        self._image_bytes = self._data_bytes = 0
        self._start: int | None = None  # of the string in `_json` that is being read
        self._is_text = False  # whether that string is not image data
        self._data: ImageData | None = None
        self._carry = b""
        self._is_broken = False

    def add(self, chunk: bytes) -> bool:
        """Add a part of the body. Returns False if the body is larger than allowed or cannot be decompressed."""
        self.has_content = self.has_content or bool(chunk)
        try:
            for part in [chunk] if self._inflater is None else self._inflater.parts(chunk):
                self._read(part)
                if self._is_broken:
                    break
        except zlib.error:
            self._is_broken = True
        return not self._is_broken

    def json(self) -> bytes | None:
        """Return the JSON with placeholders for image data; None if it was too large or its compression is unknown."""
        if self._is_broken or (self._inflater and not self._inflater.is_at_end):
            return None
        return bytes(self._json) + self._carry

    @property
    def images(self) -> tuple[bytes | None, ...]:
        """The image data in the order of the reply; None for a string that was not valid image data."""
        return tuple(self._images)

    def _read(self, chunk: bytes) -> None:
        position = 0
        while position < len(chunk):
            part = self._carry + chunk[position : position + _PART]
            position += _PART
            self._carry = b""
            self._read_part(part)
            too_much_data = self._image_bytes > MAX_IMAGE_BYTES or self._data_bytes > 2 * MAX_IMAGE_BYTES
            if too_much_data or len(self._json) > MAX_REPLY_BYTES:
                self._is_broken = True
                return

    def _read_part(self, part: bytes) -> None:
        position = 0
        while position < len(part):
            if self._data is not None:
                position = self._read_data(self._data, part, position)
            elif self._start is not None:
                position = self._read_string(part, position)
            else:
                end = _end(_COMPLETE, part, position)
                self._json += part[position : end + 1]
                position = end + 1
                if end < len(part):  # a quote, behind which no other one comes
                    self._start = len(self._json)
                    self._is_text = not _DATA_KEY.search(self._json, max(0, self._start - _KEY_BYTES))

    def _read_string(self, part: bytes, position: int) -> int:
        end = _end(_STRING, part, position)
        self._json += part[position:end]
        if part[end : end + 1] == b"\\":  # the other half of the escape comes with the next part
            self._carry = part[end:]
            return len(part)
        is_at_quote = end < len(part)
        self._look_for_data(is_at_quote=is_at_quote)
        if is_at_quote and self._data is None:
            self._json += b'"'
            self._start = None
            end += 1
        return end

    def _look_for_data(self, *, is_at_quote: bool) -> None:
        """Take a long string out of the JSON, where it begins like base64."""
        start = self._start or 0
        if self._is_text or len(self._json) - start < _LONG:
            return
        string = bytes(self._json[start:])
        cut = None if is_at_quote else _OPEN_ESCAPE.search(string)
        carry = string[cut.start() :] if cut else b""
        text = _unescaped(string[: len(string) - len(carry)])
        data = ImageData()
        data.feed(text)
        if not data.is_valid:
            self._is_text = True
            return
        del self._json[start:]
        self._json += text[:_SAMPLE].translate(None, _NOT_PLAIN)
        self._data, self._carry = data, carry
        self._image_bytes += data.size

    def _read_data(self, data: ImageData, chunk: bytes, position: int) -> int:
        quote = chunk.find(b'"', position)
        end = len(chunk) if quote < 0 else quote
        text = chunk[position:end]
        if quote < 0 and (cut := _OPEN_ESCAPE.search(text)):
            self._carry, text = text[cut.start() :], text[: cut.start()]
        before = data.size
        data.feed(_unescaped(text))
        if quote >= 0:
            self._json += b'\\u0000image %d"' % len(self._images)
            self._images.append(data.result())
            self._data, self._start = None, None
            end += 1
        self._image_bytes += data.size - before
        self._data_bytes += len(text)
        return end


class _Inflater:
    """Undoes gzip or deflate as it comes, a little at a time."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(47)  # gzip or zlib, by their heads
        self._head: bytes | None = b""
        self._behind = b""

    @property
    def is_at_end(self) -> bool:
        return self._decoder.eof

    def parts(self, chunk: bytes) -> Iterator[bytes]:
        rest = chunk
        while rest:
            if self._decoder.eof:
                # A gzip file may have further members; anything else behind its end is left out.
                rest = self._behind + rest
                self._behind = rest[: len(_GZIP_MAGIC)]
                if self._behind != _GZIP_MAGIC:
                    return
                self._decoder, self._behind = zlib.decompressobj(47), b""
            part = self._inflated(rest)
            rest = self._decoder.unconsumed_tail or self._decoder.unused_data
            if part:
                self._head = None
                yield part

    def _inflated(self, chunk: bytes) -> bytes:
        try:
            part = self._decoder.decompress(chunk, _PART)
        except zlib.error:
            if self._head is None:
                raise
            self._decoder = zlib.decompressobj(-15)  # the headless deflate that some servers send
            head, self._head = self._head, None
            return self._decoder.decompress(head + chunk, _PART)
        if self._head is not None:
            self._head += chunk
        return part


class _Unknown(_Inflater):
    """A compression that was not asked for and is not known here."""

    def parts(self, chunk: bytes) -> Iterator[bytes]:
        raise zlib.error("unknown")


def _inflater(encoding: str) -> _Inflater | None:
    name = encoding.strip().lower()
    if name in {"", "identity"}:
        return None
    return _Inflater() if name in {"gzip", "x-gzip", "deflate"} else _Unknown()


def _end(pattern: re.Pattern[bytes], part: bytes, position: int) -> int:
    found = pattern.match(part, position)
    return found.end() if found else position


def _unescaped(text: bytes) -> bytes:
    if b"\\" in text:
        for escape, character in _ESCAPES:
            text = text.replace(escape, character)
    return text
