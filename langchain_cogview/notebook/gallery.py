"""Many pictures in a notebook: a gallery of what calls gave, and one picture drawn with different settings side by side."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.concurrency import in_thread
from langchain_cogview.cost import Charges, Money
from langchain_cogview.errors import CogViewError, CogViewInvalidRequestError, CogViewStorageError, printable
from langchain_cogview.images.remote import ANY_FILE, ImageAccess, image_access
from langchain_cogview.images.store import write_whole
from langchain_cogview.messages import images_from_messages, read_each
from langchain_cogview.notebook.display import MANY_BYTES, failure_tile, with_files
from langchain_cogview.notebook.html import MOST_TILES, Room, Tile, fitted, json_bytes, page_of, table_of
from langchain_cogview.result import GeneratedImage, ImageFailure, ImageResult

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from langchain_cogview.generator import CogViewImageGenerator

_PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
</head>
<body style="margin:24px;background-color:canvas;color:canvastext">
{body}
</body>
</html>
"""
_SAVED: Final = Room(320, 320, 400, 400, "all")

Item = GeneratedImage | ImageResult | ImageFailure | BaseException | Mapping[str, Any]
"""What a gallery takes: results, pictures, what went wrong, and artifacts."""


class Gallery:
    """Pictures side by side, or in a labelled table; a notebook shows it in at most 150 kB, from memory alone.

    It is made by `gallery`, `compare` or `acompare`, which read what they need of the pictures' files.

    Args:
        numbered: Number and result of each.
        rows: Labels of a table's rows.
        columns: Labels of its columns; none: the pictures stand side by side.
        prompt: Of all of them, where it is the same.
        access: What the images of artifacts may be read from.

    Attributes:
        results: What it shows, in its order; an artifact as the result that it is of, a damaged one as a list of those of its
            images that could be read, and of errors.
        charges: What the pictures cost, those of one result included.
    """

    def __init__(
        self,
        numbered: Iterable[tuple[int, Any]],
        *,
        rows: Sequence[str] = (),
        columns: Sequence[str] = (),
        prompt: str | None = None,
        access: ImageAccess = ANY_FILE,
    ) -> None:
        numbered = [(number, _read(item, access)) for number, item in numbered]
        self.results: tuple[Any, ...] = tuple(item for _, item in numbered)
        self._rows, self._columns = tuple(rows), tuple(columns)
        # Files are read here, so that they are not when the gallery is shown.
        cells = [list(_tiles(number, item)) for number, item in numbered]
        if prompt is not None:  # said once, above
            cells = [[replace(tile, caption="", label="") for tile in cell] for cell in cells]
        self._prompt = prompt
        self._cells = cells
        self._kinds = [tile.kind for cell in cells for tile in cell]
        self.charges = _charges(self.results)
        self._bundle = self._made_bundle()

    def save(self, path: str | Path, *, title: str = "CogView") -> Path:
        """Write a page that stands alone: static HTML with its pictures in it, for any browser.

        Args:
            path: The file, which is replaced; `.html` is added to a name without an ending.
            title: Of the page.

        Returns:
            Where it is.

        Raises:
            CogViewStorageError: When it cannot be written.
        """
        target = Path(path)
        page = _PAGE.format(title=html.escape(printable(title)), body=self._html(self._cells, _SAVED))
        try:
            target = target.expanduser()
            target = target if target.suffix else target.with_suffix(".html")
            write_whole(target, page.encode("utf-8", "replace"))
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CogViewStorageError(
                f"The gallery could not be written to {printable(str(target), 120)}: {printable(str(reason), 80)}.",
                hint="Check that the folder is writable and has space left.",
            ) from None
        return target

    def __repr__(self) -> str:
        return f"Gallery({self._summary().replace(' · ', ', ')})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return dict(self._bundle)

    def _made_bundle(self) -> dict[str, Any]:
        text = repr(self)
        cells, room = self._cells, Room.of(len(self._kinds))
        if self._columns:
            room = _room_of_columns(room, len(self._columns))
        if len(self._kinds) > MOST_TILES:
            cells = [*_first(cells, MOST_TILES)]
        flat = [tile for cell in cells for tile in cell]

        def render(tiles: Sequence[Tile]) -> str:
            given = iter(tiles)
            return self._html([[next(given) for _ in cell] for cell in cells], room)

        left = MANY_BYTES - json_bytes({"text/html": "", "text/plain": text})
        return {"text/html": render(fitted(flat, render, left, room)), "text/plain": text}

    def _html(self, cells: Sequence[Sequence[Tile]], room: Room) -> str:
        heading = f"{printable(self._prompt, 120)} · {self._summary()}" if self._prompt else self._summary()
        left_out = len(self._kinds) - sum(map(len, cells))
        if left_out:
            heading += f" · the last {left_out:,} are not shown here: save('gallery.html') writes them all"
        if self._columns and not left_out:
            return table_of(self._rows, self._columns, cells, room, heading)
        return page_of([tile for cell in cells for tile in cell], room, heading)

    def _summary(self) -> str:
        made = self._kinds.count("picture") + self._kinds.count("absent")
        parts = [f"{made:,} picture{'' if made == 1 else 's'}"]
        parts += [f"{count:,} {kind}" for kind in ("blocked", "failed") if (count := self._kinds.count(kind))]
        cost = str(self.charges)
        return " · ".join(parts if cost == "nothing" else [*parts, printable(cost, 300)])


def gallery(
    results: Iterable[Any] | Item,
    *,
    within: str | os.PathLike[str] | None = None,
    storage: str | Iterable[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    allowed_image_hosts: str | Iterable[str] | None = None,
) -> Gallery:
    """Show many pictures side by side, numbered; what failed or was blocked has its reason in its place.

    Saved files are read now; nothing is fetched. Without Pillow only small originals are shown.

    Args:
        results: Results, pictures, exceptions and artifacts, as `batch(..., return_exceptions=True)`, `images_from_messages` and
            the like give them; or pairs of number and result, as `stream_many` gives them, which are put in order. One alone, or
            an agent's output, is taken too.
        within: For artifacts, as in `images_from_messages`.
        storage: The same.
        storage_options: The same.
        allowed_image_hosts: The same.

    Raises:
        TypeError: When something else is among them.
        CogViewConfigurationError: When `storage` does not name remote folders.

    Example:
        >>> gallery(generator.batch(prompts, return_exceptions=True))    # doctest: +SKIP
        >>> gallery(generator.stream_many(prompts)).save("gallery.html")    # doctest: +SKIP
    """
    reading: dict[str, Any] = {
        "within": within,
        "storage": storage,
        "storage_options": storage_options,
        "allowed_image_hosts": allowed_image_hosts,
    }
    if isinstance(results, Mapping) and "messages" in results:
        results = images_from_messages(results, **reading)
    if isinstance(results, ImageResult):
        results = [*results.images, *results.failures]
    if isinstance(results, GeneratedImage | ImageFailure | BaseException | Mapping):
        results = [results]
    return Gallery(_numbered(results), access=image_access(**reading))


def compare(
    prompt: str,
    *,
    sizes: Iterable[str] | None = None,
    qualities: Iterable[str] | None = None,
    models: Iterable[str] | None = None,
    generator: CogViewImageGenerator | None = None,
    **settings: Any,
) -> Gallery:
    """Draw one prompt with every combination of settings, and show them in a labelled table.

    Each combination is one paid picture. One that is illegal, such as a quality that a model does not know, sends nothing and is
    told in its place.

    Args:
        prompt: What the pictures show.
        sizes: As in `ImageRequest`. None: the default alone.
        qualities: The same.
        models: The same.
        generator: None: a new one.
        **settings: Of the new generator; with `generator`, arguments of `ImageRequest` for its calls.

    Raises:
        CogViewInvalidRequestError: When there is nothing to compare.
        CogViewConfigurationError: As `CogViewImageGenerator` does.

    Example:
        >>> compare("a kitten", sizes=["square", "16:9"], qualities=["standard", "hd"])    # doctest: +SKIP
    """
    grid = _Grid(prompt, models=models, qualities=qualities, sizes=sizes)
    drawing, arguments = _drawing(generator, settings)
    return grid.shown(drawing.batch(grid.inputs, return_exceptions=True, **arguments))


async def acompare(
    prompt: str,
    *,
    sizes: Iterable[str] | None = None,
    qualities: Iterable[str] | None = None,
    models: Iterable[str] | None = None,
    generator: CogViewImageGenerator | None = None,
    **settings: Any,
) -> Gallery:
    """Draw one prompt with every combination of settings. The twin of `compare`."""
    grid = _Grid(prompt, models=models, qualities=qualities, sizes=sizes)
    drawing, arguments = _drawing(generator, settings)
    results = await drawing.abatch(grid.inputs, return_exceptions=True, **arguments)
    return await in_thread(grid.shown, results)


def _drawing(
    generator: CogViewImageGenerator | None, settings: dict[str, Any]
) -> tuple[CogViewImageGenerator, dict[str, Any]]:
    if generator is not None:
        return generator, settings
    from langchain_cogview.generator import CogViewImageGenerator  # noqa: PLC0415

    return CogViewImageGenerator(**settings), {}


class _Grid:
    """Every combination of settings: the last kind that is given goes across, the others go down."""

    def __init__(self, prompt: str, **axes: Iterable[str] | None) -> None:
        given = {
            name: [values] if isinstance(values, str) else list(dict.fromkeys(values))
            for name, values in axes.items()
            if values is not None
        }
        if not all(given.values()) or not given:
            raise CogViewInvalidRequestError(
                "There is nothing to compare.", hint="Pass sizes=, qualities= or models=, each with what to try."
            )
        *down, across = given
        self._prompt = prompt
        self._rows = [" · ".join(values) for values in product(*(given[name] for name in down))]
        self._columns = given[across]
        arguments = [_ARGUMENTS[name] for name in given]
        self.inputs: list[Any] = [
            {"prompt": prompt, **dict(zip(arguments, values, strict=True))} for values in product(*given.values())
        ]

    def shown(self, results: Iterable[Any]) -> Gallery:
        return Gallery(enumerate(results), rows=self._rows, columns=self._columns, prompt=self._prompt)


_ARGUMENTS: Final = {"models": "model", "qualities": "quality", "sizes": "size"}


def _numbered(results: Iterable[Any]) -> list[tuple[int, Any]]:
    found = []
    for place, item in enumerate(results):
        number, result = item if _is_pair(item) else (place, item)
        if not isinstance(result, GeneratedImage | ImageResult | ImageFailure | BaseException | Mapping):
            raise TypeError(
                f"A gallery takes results, pictures, exceptions and artifacts, not {type(result).__name__}. "
                "Of an agent's messages, pass images_from_messages(messages)."
            )
        found.append((number, result))
    return sorted(found, key=lambda each: each[0])


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], int)  # noqa: PLR2004


def _read(item: Any, access: ImageAccess) -> Any:
    """An item, or the result of an artifact; of a damaged one, what can be read of it."""
    if not isinstance(item, Mapping):
        return item
    try:
        return ImageResult.read_artifact(item, access)
    except CogViewError as error:
        images = read_each(item, access)
        return images if any(isinstance(image, GeneratedImage) for image in images) else error


def _tiles(number: int, item: Any) -> Iterator[Tile]:
    if isinstance(item, ImageResult):
        parts: list[Any] = [*item.images, *item.failures]
    else:
        parts = item if isinstance(item, list) else [item]
    for place, part in enumerate(parts, 1):
        label = f"{number}.{place}" if len(parts) > 1 else str(number)
        if isinstance(part, GeneratedImage):
            yield with_files(part, label=label)
        else:
            yield failure_tile(part, label=label, caption=getattr(item, "prompt", None) or "")


def _charges(results: Iterable[Any]) -> Charges:
    charges = Charges()
    for result in results:
        images = result.images if isinstance(result, ImageResult) else result if isinstance(result, list) else [result]
        for image in images:
            if isinstance(image, GeneratedImage):
                charges.add(Money.of_image(image))
    return charges


def _first(cells: Sequence[Sequence[Tile]], most: int) -> Iterator[list[Tile]]:
    for cell in cells:
        if most <= 0:
            return
        yield list(cell[:most])
        most -= len(cell)


def _room_of_columns(room: Room, columns: int) -> Room:
    width = max(90, min(240, 720 // columns))
    return replace(room, width=width, height=width, reason=160, facts="none")
