"""How pictures are shown: in a notebook, on a screen."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING, Any, Final, Protocol

from langchain_cogview.errors import CogViewError

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_ONE_BYTES: Final = 44_000
"""Bytes of a picture in a notebook's output before base64, which adds a third: at most 60 kB stay in the file."""
MAX_ALL_BYTES: Final = 105_000
_FIRST_SIDE = 768


class Shown(Protocol):
    """A picture that can be shown."""

    @property
    def mime_type(self) -> str | None:
        """By the bytes."""

    @property
    def prompt(self) -> str:
        """What was asked for."""

    @property
    def url(self) -> str | None:
        """Where the service keeps it."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What could not be done."""

    def at_hand(self) -> bytes | None:
        """The bytes without fetching them."""

    def read(self) -> bytes:
        """The bytes."""


def small(content: bytes, mime_type: str | None, limit: int = MAX_ONE_BYTES) -> tuple[bytes, str] | None:
    """The picture in at most `limit` bytes, and its type: as it is where it fits, else smaller (needs Pillow).

    Returns:
        None where it does not fit and Pillow is not installed.
    """
    if mime_type in {"image/png", "image/jpeg"} and len(content) <= limit:
        return content, mime_type
    try:
        from PIL import Image  # noqa: PLC0415
    except ImportError:
        return None
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    side = _FIRST_SIDE
    while True:
        picture.thumbnail((side, side))
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=80)
        if out.tell() <= limit or side < 32:  # noqa: PLR2004
            return out.getvalue(), "image/jpeg"
        side = side * 3 // 4


def bundle(image: Shown) -> dict[str, Any]:
    """The notebook's output for one picture: one image and a text. Fetches nothing."""
    shown = _at_hand(image)
    if shown:
        return {shown[1]: base64.b64encode(shown[0]).decode(), "text/plain": repr(image)}
    return {"text/plain": "\n".join((repr(image), *image.warnings, image.url or ""))}


def result_bundle(result: Any) -> dict[str, Any]:
    """The notebook's output for a result: as for one picture, or several side by side."""
    if len(result.images) == 1 and not result.failures:
        alone = bundle(result.images[0])
        return {**alone, "text/plain": repr(result) if len(alone) > 1 else alone["text/plain"]}
    limit = MAX_ALL_BYTES // len(result.images)
    tiles = []
    for image in result.images:
        shown = _at_hand(image, limit)
        if shown:
            data = base64.b64encode(shown[0]).decode()
            alt = html.escape(image.prompt[:200], quote=True)
            tiles.append(f'<img src="data:{shown[1]};base64,{data}" alt="{alt}" style="width:240px;margin:4px">')
        else:
            tiles.append(_told(image.warnings or ("The bytes were not fetched.",)))
    tiles.extend(_told((failure.message,)) for failure in result.failures)
    return {"text/html": f"<div>{''.join(tiles)}</div>", "text/plain": repr(result)}


def _told(sentences: tuple[str, ...]) -> str:
    return f'<p style="width:240px;display:inline-block;margin:4px">{html.escape(" ".join(sentences)[:300])}</p>'


def show(image: Shown, to_pil: Callable[[], Any]) -> None:
    """Show a picture: in a notebook as output, elsewhere with the system's viewer."""
    try:
        from IPython import get_ipython  # noqa: PLC0415
        from IPython.display import display  # noqa: PLC0415
    except ImportError:
        inside = None
    else:
        inside = get_ipython()
    if inside is None:
        to_pil().show()
        return
    image.read()  # so that it is at hand
    display(image)  # type: ignore[no-untyped-call,unused-ignore]


def _at_hand(image: Shown, limit: int = MAX_ONE_BYTES) -> tuple[bytes, str] | None:
    try:
        content = image.at_hand()
    except CogViewError:
        return None
    return small(content, image.mime_type, limit) if content else None
