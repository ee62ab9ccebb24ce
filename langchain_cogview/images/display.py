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
    texts = {"text/plain": repr(image)}
    return {shown[1]: base64.b64encode(shown[0]).decode(), **texts} if shown else texts


def result_bundle(result: Any) -> dict[str, Any]:
    """The notebook's output for a result: as for one picture, or several side by side."""
    if len(result.images) == 1:
        return {**bundle(result.images[0]), "text/plain": repr(result)}
    limit = MAX_ALL_BYTES // len(result.images)
    tiles = []
    for image in result.images:
        shown = _at_hand(image, limit)
        if shown:
            data = base64.b64encode(shown[0]).decode()
            alt = html.escape(image.prompt[:200], quote=True)
            tiles.append(f'<img src="data:{shown[1]};base64,{data}" alt="{alt}" style="width:240px;margin:4px">')
    return {"text/html": f"<div>{''.join(tiles)}</div>", "text/plain": repr(result)}


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
