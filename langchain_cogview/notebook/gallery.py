"""Many images in a notebook: a gallery of results, and a comparison of one prompt with different settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.concurrency import in_thread
from langchain_cogview.cost import NO_COST, Charges, Money
from langchain_cogview.errors import CogViewError, CogViewInvalidRequestError, CogViewStorageError, printable
from langchain_cogview.images.remote import ANY_FILE, ImageAccess, image_access
from langchain_cogview.images.store import write_whole
from langchain_cogview.messages import failures_from_messages, images_from_messages, read_each
from langchain_cogview.notebook.display import MANY_BYTES, failure_tile, file_tile, kinds_text, replace_status
from langchain_cogview.notebook.html import (
    MAX_TILES,
    SAVED_LAYOUT,
    Layout,
    Tile,
    fitted,
    grid,
    json_bytes,
    page,
    parts_of,
    table,
)
from langchain_cogview.result import GeneratedImage, ImageFailure, ImageResult

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.images.remote import Storage

Item = GeneratedImage | ImageResult | ImageFailure | BaseException | Mapping[str, Any]
"""An item of a gallery: a result, an image, a failure, an exception or an artifact."""


class Gallery:
    """Images side by side, or in a labelled table. A notebook shows it in at most 150 kB, from memory only.

    `gallery`, `compare` and `acompare` make it. The files of the images are read when it is made.

    Args:
        numbered: Indexes, or labels, and items.
        rows: Labels of the rows of a table.
        columns: Labels of its columns; without columns, the images are shown side by side.
        prompt: The prompt, if all items have the same.
        access: What the images of artifacts may be read from.

    Attributes:
        results: The items, in order. In place of an artifact there is its result; in place of a damaged one, a list of the
            images that could be read and of errors.
        charges: What the images cost.
    """

    def __init__(
        self,
        numbered: Iterable[tuple[int | str, Any]],
        *,
        rows: Sequence[str] = (),
        columns: Sequence[str] = (),
        prompt: str | None = None,
        access: ImageAccess = ANY_FILE,
    ) -> None:
        numbered = [(number, _read(item, access)) for number, item in numbered]
        self.results: tuple[Any, ...] = tuple(item for _, item in numbered)
        self._rows, self._columns = tuple(rows), tuple(columns)
        # Files are read now, because showing the gallery must not read any.
        cells = [list(_tiles(number, item)) for number, item in numbered]
        if prompt is not None:  # it is shown once, in the heading
            cells = [[replace(tile, caption="", label="") for tile in cell] for cell in cells]
        self._prompt = prompt
        self._cells = cells
        self._kinds = [tile.kind for cell in cells for tile in cell]
        self.charges = _charges(self.results)
        self._output = self._render_output()

    def save(self, path: str | Path, *, title: str = "CogView") -> Path:
        """Write the gallery as a static HTML page with embedded images, for any browser.

        Args:
            path: The file, which is replaced; `.html` is added to a name without a suffix.
            title: Title of the page.

        Returns:
            Path of the file.

        Raises:
            CogViewStorageError: The file cannot be written.
        """
        target = Path(path)
        content = page(self._html(self._cells, SAVED_LAYOUT), title=title)
        try:
            target = target.expanduser()
            target = target if target.suffix else target.with_suffix(".html")
            write_whole(target, content)
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
        replace_status(sum(kind in {"image", "absent"} for kind in self._kinds))
        return dict(self._output)

    def _render_output(self) -> dict[str, Any]:
        text = repr(self)
        cells, layout = self._cells, Layout.of(len(self._kinds))
        if self._columns:
            layout = _table_layout(layout, len(self._columns))
        if len(self._kinds) > MAX_TILES:
            cells = [*_first(cells, MAX_TILES)]
        flat = [tile for cell in cells for tile in cell]

        def render(tiles: Sequence[Tile]) -> str:
            remaining = iter(tiles)
            return self._html([[next(remaining) for _ in cell] for cell in cells], layout)

        left = MANY_BYTES - json_bytes({"text/html": "", "text/plain": text})
        return {"text/html": render(fitted(flat, render, left, layout)), "text/plain": text}

    def _html(self, cells: Sequence[Sequence[Tile]], layout: Layout) -> str:
        heading = f"{printable(self._prompt, 120)} · {self._summary()}" if self._prompt else self._summary()
        omitted = len(self._kinds) - sum(map(len, cells))
        if omitted:
            heading += f" · the last {omitted:,} are not shown here: save('gallery.html') writes all"
        if self._columns and not omitted:
            return table(self._rows, self._columns, cells, layout, heading)
        return grid([tile for cell in cells for tile in cell], layout, heading)

    def _summary(self) -> str:
        made = self._kinds.count("image") + self._kinds.count("absent")
        parts = [f"{made:,} image{'' if made == 1 else 's'}"]
        parts += kinds_text(self._kinds)
        cost = str(self.charges)
        return " · ".join(parts if cost == NO_COST else [*parts, printable(cost, 300)])


def gallery(
    results: Iterable[Any] | Item,
    *,
    within: str | os.PathLike[str] | None = None,
    storage: Storage | None = None,
    storage_options: Mapping[str, Any] | None = None,
    allowed_image_hosts: str | Iterable[str] | None = None,
) -> Gallery:
    """Show many images side by side, each with its index. In place of an image that failed or was blocked there is the reason.

    The label `[3]` is an image of `results[3]`, and `[3].images[1]` the second one of several.

    Saved files are read now; nothing is fetched. Without Pillow, only images of at most 40 kB are shown.

    Args:
        results: Results, images, exceptions and artifacts, such as the output of `batch(..., return_exceptions=True)` or
            `images_from_messages`; or pairs of a number and a result, as `stream_many` yields them, which are sorted. A single
            item and the output of an agent, whose failed calls are shown after the images, are accepted too.
        within: For artifacts, as in `images_from_messages`.
        storage: For artifacts, as in `images_from_messages`.
        storage_options: For artifacts, as in `images_from_messages`.
        allowed_image_hosts: For artifacts, as in `images_from_messages`.

    Returns:
        The gallery, which a notebook shows if it is the last value of a cell.

    Raises:
        CogViewInvalidRequestError: An item is something else.
        CogViewConfigurationError: `storage` does not name remote folders.

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
        results = [*images_from_messages(results, **reading), *failures_from_messages(results["messages"])]
    if isinstance(results, ImageResult):
        results = [*results.images, *results.failures]
    if isinstance(results, GeneratedImage | ImageFailure | BaseException | Mapping):
        results = [results]
    _check(results, Iterable)
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
    """Generate one prompt with every combination of settings, and show the images in a labelled table.

    Each combination is one paid image. A combination that is illegal, such as a quality that a model does not know, sends
    nothing; its cell shows the reason.

    Args:
        prompt: The prompt.
        sizes: Sizes, as in `ImageRequest`. None: the default size only.
        qualities: Qualities, as in `ImageRequest`. None: the default quality only.
        models: Names of models. None: the model of the generator only.
        generator: The generator. None: a new one.
        **settings: Fields of the new generator; with `generator`, arguments of `ImageRequest` for its calls.

    Returns:
        The gallery, which a notebook shows if it is the last value of a cell.

    Raises:
        CogViewInvalidRequestError: There is nothing to compare.
        CogViewConfigurationError: The settings of the generator are invalid.

    Example:
        >>> compare("a kitten", sizes=["square", "16:9"], qualities=["standard", "hd"])    # doctest: +SKIP
    """
    comparison = _Comparison(prompt, models=models, qualities=qualities, sizes=sizes)
    runnable, arguments = _generator_and_arguments(generator, settings)
    return comparison.gallery(runnable.batch(comparison.inputs, return_exceptions=True, **arguments))


async def acompare(
    prompt: str,
    *,
    sizes: Iterable[str] | None = None,
    qualities: Iterable[str] | None = None,
    models: Iterable[str] | None = None,
    generator: CogViewImageGenerator | None = None,
    **settings: Any,
) -> Gallery:
    """Async version of `compare`.

    Args:
        prompt: The prompt.
        sizes: As in `compare`.
        qualities: As in `compare`.
        models: As in `compare`.
        generator: As in `compare`.
        **settings: As in `compare`.

    Returns:
        The gallery, which a notebook shows if it is the last value of a cell.

    Raises:
        CogViewInvalidRequestError: There is nothing to compare.
        CogViewConfigurationError: The settings of the generator are invalid.
    """
    comparison = _Comparison(prompt, models=models, qualities=qualities, sizes=sizes)
    runnable, arguments = _generator_and_arguments(generator, settings)
    results = await runnable.abatch(comparison.inputs, return_exceptions=True, **arguments)
    return await in_thread(comparison.gallery, results)


def _generator_and_arguments(
    generator: CogViewImageGenerator | None, settings: dict[str, Any]
) -> tuple[CogViewImageGenerator, dict[str, Any]]:
    if generator is not None:
        return generator, settings
    from langchain_cogview.generator import CogViewImageGenerator  # noqa: PLC0415

    return CogViewImageGenerator(**settings), {}


class _Comparison:
    """Every combination of settings. The last axis that has values becomes the columns, the others become the rows."""

    def __init__(self, prompt: str, **axes: Iterable[str] | None) -> None:
        chosen = {
            name: [values] if isinstance(values, str) else list(dict.fromkeys(values))
            for name, values in axes.items()
            if values is not None
        }
        if not all(chosen.values()) or not chosen:
            raise CogViewInvalidRequestError(
                "There is nothing to compare.", hint="Pass one or more values for sizes, qualities or models."
            )
        *down, across = chosen
        self._prompt = prompt
        self._rows = [" · ".join(values) for values in product(*(chosen[name] for name in down))]
        self._columns = chosen[across]
        arguments = [_ARGUMENTS[name] for name in chosen]
        self.inputs: list[Any] = [
            {"prompt": prompt, **dict(zip(arguments, values, strict=True))} for values in product(*chosen.values())
        ]

    def gallery(self, results: Iterable[Any]) -> Gallery:
        return Gallery(enumerate(results), rows=self._rows, columns=self._columns, prompt=self._prompt)


_ARGUMENTS: Final = {"models": "model", "qualities": "quality", "sizes": "size"}


def _numbered(results: Iterable[Any]) -> list[tuple[int, Any]]:
    numbered = []
    for position, item in enumerate(results):
        number, result = item if _is_pair(item) else (position, item)
        _check(result, GeneratedImage | ImageResult | ImageFailure | BaseException | Mapping)
        numbered.append((number, result))
    return sorted(numbered, key=lambda pair: pair[0])


def _check(item: Any, kind: Any) -> None:
    if not isinstance(item, kind):
        raise CogViewInvalidRequestError(
            f"A gallery takes results, images, exceptions and artifacts, not {type(item).__name__}.",
            hint="For the messages of an agent, pass images_from_messages(messages).",
        )


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], int)  # noqa: PLR2004


def _read(item: Any, access: ImageAccess) -> Any:
    """Turn an artifact into its result, or a damaged one into the images that can be read; other items are unchanged.

    Returns:
        The result, or what the item was.
    """
    if not isinstance(item, Mapping):
        return item
    try:
        return ImageResult.read_artifact(item, access)
    except CogViewError as error:
        images = read_each(item, access)
        return images if any(isinstance(image, GeneratedImage) for image in images) else error


def _tiles(index: int | str, item: Any) -> Iterator[Tile]:
    for label, part in parts_of(item, f"[{index}]" if isinstance(index, int) else index):
        if isinstance(part, GeneratedImage):
            yield file_tile(part, label=label)
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


def _first(cells: Sequence[Sequence[Tile]], limit: int) -> Iterator[list[Tile]]:
    for cell in cells:
        if limit <= 0:
            return
        yield list(cell[:limit])
        limit -= len(cell)


def _table_layout(layout: Layout, columns: int) -> Layout:
    width = max(90, min(240, 720 // columns))
    return replace(layout, width=width, height=width, reason=160, facts="none")
