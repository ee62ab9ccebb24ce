"""Previews: small versions of images, which are held in memory for notebook outputs.

A notebook output is made without reading a file or fetching anything. Inside a notebook (Jupyter or marimo), a preview is
therefore made when an image is made. It is found by the hash of the image, so that the result, its artifact and a gallery of
either show the same preview. Outside notebooks none is made.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import sys
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from langchain_cogview.concurrency import in_thread
from langchain_cogview.errors import CogViewError, CogViewStorageError, printable
from langchain_cogview.images.formats import ImageFormatError, inspect, sniff
from langchain_cogview.text import warn_caller

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from langchain_cogview.images.formats import ImageInfo
    from langchain_cogview.result import GeneratedImage

PREVIEW_BYTES: Final = 40_000
"""Largest size of one preview; as base64 and with its caption it stays below 60 kB."""
HELD_BYTES: Final = 32 << 20
"""Largest size of all previews in memory; the least recently used are dropped first."""
THUMBNAIL_SIDE: Final = 512
"""Longer side of the thumbnail that a chat model gets, in pixels."""
THUMBNAIL_BYTES: Final = 60_000
"""Largest size of such a thumbnail."""
PILLOW_MISSING: Final = 'A preview needs Pillow. Install it with: pip install "langchain-cogview[notebook]"'

PREVIEW_MEMORY: Final = 160_000_000
"""Bytes of memory that making a preview may take; an image that needs more has no preview."""
DECODING_MEMORY: Final = 220_000_000
"""Bytes of memory that decoding an image may take: enough for every PNG of 50 million pixels, and every ordinary JPEG."""

_SIDE: Final = 768
_FORMATS: Final = ("PNG", "JPEG", "WEBP")
_ENDINGS: Final = {"image/png": (".png",), "image/jpeg": (".jpg", ".jpeg"), "image/webp": (".webp",)}
_SMALLEST_SIDE: Final = 24
_WEBP_BELOW: Final = 12_000  # the tables of a JPEG take 600 bytes; a large WebP takes a hundred times as long to encode

logger = logging.getLogger(__name__)


class Preview(NamedTuple):
    """A small version of an image."""

    content: bytes
    """The bytes of the image file."""
    mime_type: str
    """Media type of the content."""


def in_kernel() -> bool:
    """Whether this process is a Jupyter kernel.

    Returns:
        False if IPython is not loaded; it is not loaded to find out.
    """
    ask = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return ask is not None and getattr(ask(), "kernel", None) is not None


def in_notebook() -> bool:
    """Whether this process shows results in a notebook.

    Returns:
        True for Jupyter and marimo.
    """
    return in_kernel() or in_marimo()


def in_marimo() -> bool:
    """Whether this process runs a marimo notebook.

    Returns:
        False if marimo is not loaded; it is not loaded to find out.
    """
    ask = getattr(sys.modules.get("marimo"), "running_in_notebook", None)
    if ask is not None and ask():
        _Marimo.seen = True
    return _Marimo.seen


class _Marimo:
    """Remembers that marimo was found: it answers in the thread of a cell only, and not in threads that the cell starts."""

    seen = False


def make_preview(content: bytes, limit: int = PREVIEW_BYTES, *, side: int = _SIDE) -> Preview | None:
    """Make a preview: the image itself if it is small enough, else a smaller version, which needs Pillow.

    Args:
        content: A whole PNG, JPEG or WebP.
        limit: Largest size in bytes.
        side: Largest number of pixels of the longer side of a smaller version.

    Returns:
        None if there is no preview: the content is not an image, Pillow is not installed, the limit is too small, or more than
        160 MB of memory would be needed.
    """
    try:
        info = inspect(io.BytesIO(content))
    except ImageFormatError:
        return None
    if info.preview_bytes > PREVIEW_MEMORY:  # a browser would need as much
        return None
    if len(content) <= limit:
        return Preview(content, info.mime_type)
    try:
        from PIL import Image, features  # noqa: PLC0415
    except ImportError:
        return None
    try:
        webp = limit < _WEBP_BELOW and features.check("webp")
        return _shrunk(_opaque(Image, content, side), limit, side, "WEBP" if webp else "JPEG")
    except Exception:  # an image can make a decoder raise anything; without a preview it is described in text
        logger.debug("No preview could be made of an image", exc_info=True)
        return None


def make_thumbnail(content: bytes, *, side: int = THUMBNAIL_SIDE, limit: int = THUMBNAIL_BYTES) -> Preview | None:
    """Make a small JPEG of an image, which needs Pillow.

    Args:
        content: A whole PNG, JPEG or WebP.
        side: Largest number of pixels of the longer side.
        limit: Largest size in bytes.

    Returns:
        None if there is no thumbnail, for the reasons of `make_preview`.
    """
    try:
        info = inspect(io.BytesIO(content))
    except ImageFormatError:
        return None
    if info.preview_bytes > PREVIEW_MEMORY:
        return None
    try:
        from PIL import Image  # noqa: PLC0415

        return _shrunk(_opaque(Image, content, side), limit, side, "JPEG")
    except Exception:  # as in `make_preview`
        logger.debug("No thumbnail could be made of an image", exc_info=True)
        return None


def _opaque(pillow: Any, content: bytes, side: int) -> Any:
    """Decode an image at about the size of its preview, before anything copies all of its pixels.

    Returns:
        The decoded image.
    """
    image = pillow.open(io.BytesIO(content), formats=_FORMATS)
    image.draft(None, (2 * side, 2 * side))  # a JPEG is decoded at a lower resolution
    if "transparency" in image.info and image.mode != "RGBA":
        image = image.convert("RGBA")
    elif image.mode not in {"L", "RGB", "RGBA"}:
        image = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    image.thumbnail((2 * side, 2 * side), reducing_gap=2.0)
    if image.mode != "RGBA":
        return image
    background = pillow.new("RGB", image.size, "white")
    background.paste(image, mask=image.getchannel("A"))
    return background


def _shrunk(image: Any, limit: int, side: int, form: str) -> Preview | None:
    while side >= _SMALLEST_SIDE:
        image.thumbnail((side, side), reducing_gap=2.0)
        out = io.BytesIO()
        image.save(out, form, quality=72)
        if out.tell() <= limit:
            return Preview(out.getvalue(), f"image/{form.lower()}")
        # The size grows with the area, and a smaller version has more detail in each pixel.
        side = int(max(image.size) * min(0.9, 0.95 * math.sqrt(limit / out.tell())))
    return None


def as_named(target: Path, content: bytes) -> bytes:
    """Convert an image to the format that a file name asks for: `.png`, `.jpg`, `.jpeg` or `.webp`.

    Args:
        target: A file, or an existing folder, for which nothing is converted.
        content: A whole PNG, JPEG or WebP.

    Returns:
        The bytes in that format; unchanged, with a warning, if Pillow is missing or the name asks for another format.
    """
    ending, found = target.suffix.lower(), sniff(content[:32])
    if not ending or found is None or ending in _ENDINGS[found] or os.path.isdir(os.path.expanduser(target)):  # noqa: PTH111, PTH112
        return content
    wanted = next((kind for kind, endings in _ENDINGS.items() if ending in endings), None)
    name = printable(target.name, 120)
    problem = f"{name} holds a {found.removeprefix('image/').upper()} image, which its ending does not say."
    if wanted is None:
        warn_caller(f"{problem} The endings .png, .jpg and .webp are converted.")
        return content
    try:
        image = decoded(content, "Converting an image")
        out = io.BytesIO()
        if wanted == "image/jpeg" and image.mode not in {
            "RGB",
            "L",
            "CMYK",
        }:  # JPEG has no transparency: it becomes white
            from PIL import Image  # noqa: PLC0415

            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image)
            image = white.convert("RGB")
        image.save(out, wanted.removeprefix("image/"), quality=95)
    except ImportError as error:
        warn_caller(f"{problem} {error}")
        return content
    except Exception as error:  # noqa: BLE001  a paid image is saved in any case
        warn_caller(f"{problem} It could not be converted: {getattr(error, 'message', type(error).__name__)}")
        return content
    return out.getvalue()


def decoded(content: bytes, method: str = "to_pil") -> Any:
    """Decode an image in at most 220 MB of memory.

    Args:
        content: A whole PNG, JPEG or WebP.
        method: The method that the caller used, for the message about a missing Pillow.

    Returns:
        A `PIL.Image.Image`.

    Raises:
        ImportError: Pillow is not installed; the message names the extra.
        CogViewStorageError: The image would take more memory, or it cannot be decoded.
        CogViewError: The image cannot be decoded in that memory.
    """
    try:
        from PIL import Image  # noqa: PLC0415
    except ImportError:
        raise ImportError(f'{method} needs Pillow. Install it with: pip install "langchain-cogview[images]"') from None

    try:
        _check_memory(inspect(io.BytesIO(content)))
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        image.load()
    except CogViewError:
        raise
    except Exception as error:  # noqa: BLE001  an image can make Pillow raise anything
        raise CogViewStorageError(
            f"The image cannot be decoded: {printable(str(error), 120).rstrip('.')}.",
            hint="image.read() returns its bytes.",
        ) from None
    return image


def _check_memory(info: ImageInfo) -> None:
    if info.decoding_bytes > DECODING_MEMORY:
        raise CogViewStorageError(
            f"The image is not decoded: its {info.width}x{info.height} pixels would take "
            f"{info.decoding_bytes // 1_000_000} MB of memory, more than the {DECODING_MEMORY // 1_000_000} MB allowed.",
            hint="image.read() returns its bytes for another decoder.",
        )


class HeldPreviews:
    """Previews in memory, by the hash of their image. Thread-safe.

    Args:
        limit: Largest size of all previews, in bytes.
    """

    def __init__(self, limit: int = HELD_BYTES) -> None:
        self._limit = limit
        self._size = 0
        self._previews: OrderedDict[str, Preview] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, sha256: str, preview: Preview) -> None:
        """Add a preview; the least recently used ones are dropped to make room.

        Args:
            sha256: Hash of the image, in hexadecimal.
            preview: Its preview.
        """
        with self._lock:
            before = self._previews.pop(sha256, None)
            self._size += len(preview.content) - (len(before.content) if before else 0)
            self._previews[sha256] = preview
            while self._size > self._limit:
                self._size -= len(self._previews.popitem(last=False)[1].content)

    def get(self, sha256: str | None) -> Preview | None:
        """Look up a preview.

        Args:
            sha256: Hash of the image, in hexadecimal; None if it is unknown.

        Returns:
            The preview; None if there is none.
        """
        with self._lock:
            if sha256 is None or sha256 not in self._previews:
                return None
            self._previews.move_to_end(sha256)
            return self._previews[sha256]

    def clear(self) -> None:
        """Drop all previews."""
        with self._lock:
            self._previews.clear()
            self._size = 0


HELD: Final = HeldPreviews()
"""The previews of this process."""


def preview_of(content: bytes | None, sha256: str | None) -> Preview | None:
    """Find the preview of an image in memory, or make it.

    Args:
        content: The bytes of the image; None if they are not in memory. A new preview is held under the hash of these bytes.
        sha256: The recorded hash of the image, which finds a preview if there are no bytes.

    Returns:
        The preview; None if there is none.
    """
    if content is None:
        return HELD.get(sha256)
    actual = hashlib.sha256(content).hexdigest()
    held = HELD.get(actual)
    if held is None:
        held = make_preview(content)
        if held:
            HELD.keep(actual, held)
    return held


def remember(images: Iterable[GeneratedImage]) -> None:
    """Make and hold the previews of images that were just made, in a notebook only.

    This takes about 30 ms for each image. Exceptions are logged, because they must not cost an image that was paid for.

    Args:
        images: The images; their bytes are read from memory or from their files.
    """
    if in_notebook():
        _remember(images)


async def aremember(images: Iterable[GeneratedImage]) -> None:
    """Async version of `remember`.

    Args:
        images: The images; their bytes are read from memory or from their files.
    """
    if in_notebook():
        await in_thread(_remember, images)


def _remember(images: Iterable[GeneratedImage]) -> None:
    for image in images:
        try:
            if image.sha256 and HELD.get(image.sha256) is None:
                preview_of(image.local_bytes(), image.sha256)
        except Exception:
            logger.debug("No preview could be made of an image", exc_info=True)
