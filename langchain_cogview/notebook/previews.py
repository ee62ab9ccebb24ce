"""Small pictures to look at: made where a picture's bytes are at hand, and held in memory for a notebook's outputs.

What a notebook shows may neither read a file nor fetch. So inside a notebook (Jupyter, marimo) a preview is made when an image is
made, and found again by the image's hash: by its result, its artifact, or a gallery of either. Elsewhere none is made.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import sys
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from langchain_cogview.concurrency import in_thread
from langchain_cogview.errors import CogViewError, CogViewStorageError, printable
from langchain_cogview.images.formats import ImageFormatError, inspect

if TYPE_CHECKING:
    from collections.abc import Iterable

    from langchain_cogview.images.formats import ImageInfo

PREVIEW_BYTES: Final = 40_000
"""Of one preview at most: with base64's third and its caption it stays under 60 kB."""
HELD_BYTES: Final = 32 << 20
"""Of all previews held; those not looked at for longest go first."""
PILLOW_MISSING: Final = 'A preview needs Pillow: pip install "langchain-cogview[notebook]"'

PREVIEW_MEMORY: Final = 160_000_000
"""Bytes of memory that making a preview may take; an image that needs more has none."""
DECODING_MEMORY: Final = 220_000_000
"""Bytes of memory that decoding a whole image may take: enough for every PNG of 50 million pixels, and every usual JPEG."""

_SIDE: Final = 768
_FORMATS: Final = ("PNG", "JPEG", "WEBP")
_SMALLEST_SIDE: Final = 24
_WEBP_BELOW: Final = 12_000  # JPEG's tables alone are 600 bytes; a large WebP takes a hundred times as long to make

logger = logging.getLogger(__name__)


class Preview(NamedTuple):
    """A small picture.

    Attributes:
        content: Its bytes.
        mime_type: By its bytes.
    """

    content: bytes
    mime_type: str


class Previewable(Protocol):
    """A picture that a preview can be made of."""

    @property
    def sha256(self) -> str | None:
        """Of the bytes, in hexadecimal."""

    def local_bytes(self) -> bytes | None:
        """The bytes without fetching them."""


def in_kernel() -> bool:
    """Whether this is a Jupyter kernel. Where IPython is not loaded it is none; it is not loaded to find out."""
    ask = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return ask is not None and getattr(ask(), "kernel", None) is not None


def in_notebook() -> bool:
    """Whether this process shows its results in a notebook of Jupyter or marimo."""
    return in_kernel() or in_marimo()


def in_marimo() -> bool:
    """Whether this is a marimo notebook. Where marimo is not loaded it is not; it is not loaded to find out."""
    ask = getattr(sys.modules.get("marimo"), "running_in_notebook", None)
    if ask is not None and ask():
        _Marimo.seen = True
    return _Marimo.seen


class _Marimo:
    """marimo knows its notebook in the cell's own thread alone; what a cell starts in other threads belongs to it, too."""

    seen = False


def preview(content: bytes, limit: int = PREVIEW_BYTES, *, side: int = _SIDE) -> Preview | None:
    """A picture in few bytes: as it is where it fits, else smaller (needs Pillow).

    Args:
        content: A whole PNG, JPEG or WebP.
        limit: Bytes at most.
        side: Pixels of the longer side, at most, where it is made smaller.

    Returns:
        None where it cannot be made: no picture, no Pillow, no room, or more than 160 MB of memory needed.
    """
    try:
        info = inspect(io.BytesIO(content))
    except ImageFormatError:
        return None
    if info.preview_bytes > PREVIEW_MEMORY:  # nor does a browser decode it
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
    except Exception:  # whatever a foreign picture makes of the decoder, it is shown as text
        logger.debug("No preview could be made of a picture", exc_info=True)
        return None


def _opaque(pillow: Any, content: bytes, side: int) -> Any:
    """The image at about the size of its preview, before anything copies all of its pixels."""
    image = pillow.open(io.BytesIO(content), formats=_FORMATS)
    image.draft(None, (2 * side, 2 * side))  # a JPEG is decoded at a lower resolution
    if "transparency" in image.info and image.mode != "RGBA":
        image = image.convert("RGBA")
    elif image.mode not in {"L", "RGB", "RGBA"}:
        image = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    image.thumbnail((2 * side, 2 * side), reducing_gap=2.0)
    if image.mode != "RGBA":
        return image
    ground = pillow.new("RGB", image.size, "white")
    ground.paste(image, mask=image.getchannel("A"))
    return ground


def _shrunk(picture: Any, limit: int, side: int, form: str) -> Preview | None:
    while side >= _SMALLEST_SIDE:
        picture.thumbnail((side, side), reducing_gap=2.0)
        out = io.BytesIO()
        picture.save(out, form, quality=72)
        if out.tell() <= limit:
            return Preview(out.getvalue(), f"image/{form.lower()}")
        # Bytes go with the area; a picture made smaller has more detail for each pixel.
        side = int(max(picture.size) * min(0.9, 0.95 * math.sqrt(limit / out.tell())))
    return None


def decoded(content: bytes) -> Any:
    """An image as a `PIL.Image.Image`, decoded in at most 220 MB of memory.

    Raises:
        CogViewStorageError: When it would take more, or cannot be decoded.
    """
    from PIL import Image  # noqa: PLC0415

    try:
        _check_memory(inspect(io.BytesIO(content)))
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        image.load()
    except CogViewError:
        raise
    except Exception as error:  # noqa: BLE001  Pillow raises what it likes of a foreign image
        raise CogViewStorageError(
            f"The image cannot be decoded: {printable(str(error), 120).rstrip('.')}.",
            hint="image.read() gives its bytes.",
        ) from None
    return image


def _check_memory(info: ImageInfo) -> None:
    if info.decoding_bytes > DECODING_MEMORY:
        raise CogViewStorageError(
            f"The image is not decoded: its {info.width}x{info.height} pixels would take "
            f"{info.decoding_bytes // 1_000_000} MB of memory, more than the {DECODING_MEMORY // 1_000_000} MB allowed.",
            hint="image.read() gives its bytes for another decoder.",
        )


class HeldPreviews:
    """Previews by the hash of their picture. Thread-safe.

    Args:
        limit: Bytes of all of them.
    """

    def __init__(self, limit: int = HELD_BYTES) -> None:
        self._limit = limit
        self._size = 0
        self._previews: OrderedDict[str, Preview] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, sha256: str, made: Preview) -> None:
        """Hold a preview, in place of those that were not asked for since longest."""
        with self._lock:
            before = self._previews.pop(sha256, None)
            self._size += len(made.content) - (len(before.content) if before else 0)
            self._previews[sha256] = made
            while self._size > self._limit:
                self._size -= len(self._previews.popitem(last=False)[1].content)

    def get(self, sha256: str | None) -> Preview | None:
        """The preview of the picture with this hash; None where none is held."""
        with self._lock:
            if sha256 is None or sha256 not in self._previews:
                return None
            self._previews.move_to_end(sha256)
            return self._previews[sha256]

    def clear(self) -> None:
        """Forget them all."""
        with self._lock:
            self._previews.clear()
            self._size = 0


HELD: Final = HeldPreviews()
"""Of this process."""


def made_from(content: bytes | None, sha256: str | None) -> Preview | None:
    """The preview of an image: made of its bytes, or the one that is held of the image with the recorded hash.

    Args:
        content: The bytes, where they are in memory. The preview is held under the hash of these bytes.
        sha256: The recorded hash; finds a preview where there are no bytes.
    """
    if content is None:
        return HELD.get(sha256)
    found = hashlib.sha256(content).hexdigest()
    held = HELD.get(found)
    if held is None:
        held = preview(content)
        if held:
            HELD.keep(found, held)
    return held


def remember(images: Iterable[Previewable]) -> None:
    """Make and hold previews of pictures that were just made, from memory or their files; in a notebook only.

    Costs some 30 ms for each picture. Whatever goes wrong is logged: it must not cost a picture that was paid for.
    """
    if in_notebook():
        _remember(images)


async def aremember(images: Iterable[Previewable]) -> None:
    """Async version of `remember`."""
    if in_notebook():
        await in_thread(_remember, images)


def _remember(images: Iterable[Previewable]) -> None:
    for image in images:
        try:
            if image.sha256 and HELD.get(image.sha256) is None:
                made_from(image.local_bytes(), image.sha256)
        except Exception:
            logger.debug("No preview could be made of a picture", exc_info=True)
