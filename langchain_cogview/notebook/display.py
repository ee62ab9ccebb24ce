"""How a result is shown: in a notebook as one picture with its caption, on a screen by the system's viewer.

What a notebook asks for is made from memory alone: no file is read and nothing is fetched. The picture stands in the HTML,
because a front end shows one representation only, and the caption belongs to it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

from langchain_cogview.catalog import money_text
from langchain_cogview.content_filter import most_severe
from langchain_cogview.errors import Scope, printable
from langchain_cogview.notebook.html import Room, Tile, fitted, json_bytes, page_of
from langchain_cogview.notebook.previews import PILLOW_MISSING, PREVIEW_BYTES, in_kernel, in_marimo, made_from

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from decimal import Decimal
    from pathlib import Path

    from langchain_cogview.content_filter import ContentFilter

ONE_BYTES: Final = 60_000
"""Of a notebook's output for one picture, as JSON."""
MANY_BYTES: Final = 150_000
"""Of a notebook's output for several."""

_MOST_WARNINGS: Final = 5


class Shown(Protocol):
    """A picture that can be shown."""

    @property
    def sha256(self) -> str | None:
        """Of the bytes."""

    @property
    def prompt(self) -> str:
        """What was asked for."""

    @property
    def model(self) -> str:
        """Which model drew."""

    @property
    def size(self) -> str | None:
        """As asked for."""

    @property
    def width(self) -> int | None:
        """In pixels."""

    @property
    def height(self) -> int | None:
        """In pixels."""

    @property
    def quality(self) -> str | None:
        """As asked for."""

    @property
    def cost(self) -> Decimal | None:
        """Its list price."""

    @property
    def currency(self) -> str | None:
        """ISO code."""

    @property
    def cached(self) -> bool:
        """Whether it came from the cache."""

    @property
    def sandbox(self) -> bool:
        """Whether it is a placeholder."""

    @property
    def content_filter(self) -> tuple[ContentFilter, ...]:
        """What the filter said of it."""

    @property
    def path(self) -> Path | None:
        """The saved file."""

    @property
    def uri(self) -> str | None:
        """Where it was saved elsewhere."""

    @property
    def url(self) -> str | None:
        """Where the service keeps it."""

    @property
    def expires_at(self) -> datetime | None:
        """When the link ends."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What could not be done."""

    def local_bytes(self) -> bytes | None:
        """The bytes without fetching them."""

    def read(self) -> bytes:
        """The bytes."""


class Failure(Protocol):
    """Why there is no picture: an `ImageFailure` or a `CogViewError`."""

    @property
    def message(self) -> str:
        """What happened."""

    @property
    def hint(self) -> str:
        """What to do."""


# --- what a notebook asks for


def bundle(image: Shown, content: bytes | None) -> dict[str, Any]:
    """The notebook's output for one picture: HTML with the picture and its caption, and a text. At most 60 kB as JSON.

    Args:
        image: The picture.
        content: Its bytes, where they are in memory.
    """
    return _one(image, content, repr(image))


def _one(image: Shown, content: bytes | None, name: str) -> dict[str, Any]:
    tile = picture_tile(image, content)
    lines = [printable(name, 800), " · ".join(printable(fact, 100) for fact in tile.facts)]
    if tile.preview is None:
        lines += [
            printable(tile.reason, 400),
            *(printable(warning, 300) for warning in image.warnings[:_MOST_WARNINGS] if warning not in tile.reason),
            "" if image.path or image.uri else printable(image.url or "", 2_000),
        ]
    return _output([tile], "\n".join(filter(None, lines)), ONE_BYTES)


def result_bundle(result: Any, contents: Sequence[bytes | None]) -> dict[str, Any]:
    """The notebook's output for a result: as for one picture, or all of them side by side, in at most 150 kB.

    Args:
        result: An `ImageResult`.
        contents: The bytes of its pictures, where they are in memory.
    """
    if len(result.images) == 1 and not result.failures:
        return _one(result.images[0], contents[0], repr(result))
    pictures = zip(result.images, contents, strict=True)
    tiles = [picture_tile(image, content, label=str(number)) for number, (image, content) in enumerate(pictures)]
    tiles += [failure_tile(failure) for failure in result.failures]
    return _output(tiles, printable(repr(result), 2_000), MANY_BYTES)


def _output(tiles: Sequence[Tile], text: str, limit: int) -> dict[str, Any]:
    room = Room.of(len(tiles))
    left = limit - json_bytes({"text/html": "", "text/plain": text})
    shown = fitted(tiles, lambda each: page_of(each, room), left, room)
    return {"text/html": page_of(shown, room), "text/plain": text}


def show(image: Shown, to_pil: Callable[[], Any]) -> None:
    """Show a picture: in a notebook as output, elsewhere with the system's viewer."""
    if in_marimo():
        marimo = sys.modules["marimo"]
        marimo.output.append(marimo.Html(bundle(image, image.read())["text/html"]))
    elif in_kernel():
        from IPython.display import display  # noqa: PLC0415

        display(bundle(image, image.read()), raw=True)  # type: ignore[no-untyped-call,unused-ignore]
    else:
        to_pil().show()


# --- tiles


def picture_tile(image: Shown, content: bytes | None, *, label: str = "") -> Tile:
    """The tile of a picture that was made, from memory alone.

    Args:
        image: The picture.
        content: Its bytes, where they are in memory.
        label: Stands before the caption.
    """
    try:
        return _picture_tile(image, content, label)
    except Exception as error:  # noqa: BLE001  a value that cannot be shown costs this tile alone
        return failure_tile(error, label=label)


def _picture_tile(image: Shown, content: bytes | None, label: str) -> Tile:
    shown = made_from(content, image.sha256)
    worst = most_severe(image.content_filter)
    return Tile(
        caption=image.prompt,
        label=label,
        facts=tuple(_facts(image)),
        brief=(*_size(image), cost_text(image)),
        badge=f"content filter: {worst}" if worst else "",
        kind="picture" if shown else "absent",
        preview=shown,
        shape=(image.width, image.height) if image.width and image.height else None,
        reason="" if shown else _where(image, content),
        link=None if image.path or image.uri or _ended(image) else image.url,
    )


def failure_tile(error: Failure | BaseException, *, label: str = "", caption: str = "") -> Tile:
    """The tile of a picture that was not made.

    Args:
        error: Our error, an `ImageFailure`, or any other exception.
        label: Stands before the caption.
        caption: What was asked for, where it is known.
    """
    name = printable(str(getattr(error, "error", None) or type(error).__name__), 80)
    message = getattr(error, "message", None)
    if not isinstance(message, str):
        message = f"{name}: {_text_of(error)}"
    hint = getattr(error, "hint", "")
    return Tile(
        caption=caption if isinstance(caption, str) else "",
        label=label,
        kind="blocked" if getattr(error, "scope", None) is Scope.PROMPT else "failed",
        reason=f"{message} {hint}".strip() if isinstance(hint, str) else message,
    )


def _text_of(error: object) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  a foreign exception's text is made by foreign code
        return "(no text)"


def _facts(image: Shown) -> Iterable[str]:
    yield image.model
    yield from _size(image)
    if image.quality:
        yield image.quality
    seconds = getattr(image, "seconds", None)
    if seconds is not None:
        yield f"{seconds:.1f} s"
    yield cost_text(image)
    if image.expires_at:
        yield f"link {'ended' if _ended(image) else 'ends'} {image.expires_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _size(image: Shown) -> Iterable[str]:
    size = f"{image.width}×{image.height}" if image.width and image.height else (image.size or "").replace("x", "×")
    return [size] if size else []


def _ended(image: Shown) -> bool:
    return image.expires_at is not None and image.expires_at <= datetime.now(UTC)


def cost_text(image: Shown) -> str:
    """What a picture cost, in a few words."""
    if image.cached:
        return "cached, no cost"
    if image.sandbox:
        return "sandbox, no cost"
    if image.cost is None:
        return "price unknown"
    return money_text(image.cost, image.currency) if image.cost else "no cost"


def _where(image: Shown, content: bytes | None) -> str:
    """Why a picture is not shown, and where it is."""
    if content is not None and len(content) > PREVIEW_BYTES:
        return f"{PILLOW_MISSING} Its bytes are in memory: image.save(path) writes them."
    if image.path:
        return f"Saved as {image.path}: image.show() shows it."
    if image.uri:
        return f"Saved as {image.uri}: image.show() fetches and shows it."
    told = " ".join(image.warnings) or "Its bytes were not fetched."
    return f"{told} image.show() fetches and shows it." if image.url and not _ended(image) else told


def with_files(image: Shown, *, label: str = "") -> Tile:
    """The tile of a picture, made from its saved file where it is not in memory."""
    content, problem = None, ""
    try:
        if made_from(None, image.sha256) is None:
            content = image.local_bytes()
    except Exception as error:  # noqa: BLE001  a file that is gone is told in its place
        problem = getattr(error, "message", type(error).__name__)
    tile = picture_tile(image, content, label=label)
    return tile if tile.preview else replace(tile, reason=problem or tile.reason)
