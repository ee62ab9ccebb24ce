"""Images as HTML: notebook outputs, saved galleries and the contact sheet of a job, all rendered from `Tile`s.

All texts may come from other people: they are escaped, put on one line and bounded. There is no script, and nothing is loaded
but the image files of a contact sheet. The inline styles are those that JupyterLab keeps in a notebook that is not trusted;
the colours work on light and dark backgrounds.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import quote

from langchain_cogview.notebook.previews import Preview, make_preview
from langchain_cogview.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

Kind = Literal["image", "absent", "blocked", "failed", "unknown"]
"""What a tile stands for: an image, an image that cannot be shown, or no image, for one of three reasons."""

_HEADINGS: Final[dict[Kind, str]] = {
    "image": "Image",
    "absent": "Not shown",
    "blocked": "Blocked",
    "failed": "Failed",
    "unknown": "Outcome unknown",
}
_TINTS: Final[dict[Kind, str]] = {
    "image": "128,128,128",
    "absent": "128,128,128",
    "blocked": "214,137,16",
    "failed": "205,70,60",
    "unknown": "88,110,214",
}
_FILTERS: Final[tuple[tuple[str, Kind], ...]] = (
    ("Made", "image"),
    ("Blocked", "blocked"),
    ("Failed", "failed"),
    ("Outcome unknown", "unknown"),
)
_LABELLED: Final = 'style="padding:4px 12px 4px 0;border:0;text-align:left;vertical-align:top;font-weight:600"'
_CELL: Final = 'style="padding:4px 0;border:0;text-align:left;vertical-align:top"'
_TABLE: Final = 'style="border-collapse:collapse;border:0;margin:0;font-size:13px"'
_ROW: Final = 'style="background-color:transparent"'
_MAX_LINK: Final = 2_000
_MAX_LINES: Final = 60
_UNIT: Final = re.compile(r"(?<=\d) (?=(?:s|kB|MB|CNY|USD)\b)")
"""The space between a number and its unit, where no line is broken."""
_FEWEST_BYTES: Final = 150  # a smaller preview shows nothing


@dataclass(frozen=True, slots=True)
class Tile:
    """One image in a grid, table or page, or the reason why there is none."""

    caption: str = ""
    """The prompt."""
    label: str = ""
    """Text before the caption, such as a number."""
    facts: tuple[str, ...] = ()
    """Facts below the caption."""
    brief: tuple[str, ...] = ()
    """The most important facts, for small tiles."""
    badge: str = ""
    """What the content filter reported of an image that was made."""
    kind: Kind = "image"
    """What the tile stands for."""
    preview: Preview | None = None
    """The preview of the image, which is embedded; None if there is none or it does not fit."""
    file: str | None = None
    """Path of the image file relative to the page, with `/`; used if there is no preview."""
    shape: tuple[int, int] | None = None
    """Width and height of the image in pixels; None if they are unknown."""
    reason: str = ""
    """Why no image is shown."""
    link: str | None = None
    """URL of an image that is not shown; it is linked only if it is http or https."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The size of each tile, and how much text it has."""

    width: int
    """Width of a tile in pixels."""
    height: int
    """Largest height of an image in pixels."""
    caption: int
    """Largest number of characters of the caption."""
    reason: int
    """Largest number of characters of the reason."""
    facts: Literal["all", "brief", "none"]
    """Which facts are shown."""

    @classmethod
    def of(cls, tiles: int) -> Layout:
        """Choose a layout.

        Args:
            tiles: Number of tiles.

        Returns:
            The layout with the largest tiles for this number.
        """
        for most, layout in _LAYOUTS:
            if tiles <= most:
                return layout
        return _LAYOUTS[-1][1]


_LAYOUTS: Final = (
    (1, Layout(512, 512, 160, 400, "all")),
    (4, Layout(240, 240, 120, 240, "brief")),
    (12, Layout(190, 190, 80, 160, "brief")),
    (30, Layout(140, 140, 48, 90, "none")),
    (100, Layout(104, 104, 24, 50, "none")),
)
MAX_TILES: Final = _LAYOUTS[-1][0]
"""Largest number of tiles in a notebook output; more would be too small to look at."""
SAVED_LAYOUT: Final = Layout(320, 320, 400, 400, "all")
"""The layout of a saved gallery."""
_SHEET_LAYOUT: Final = Layout(240, 240, 400, 400, "all")


# --- the size of a notebook output


def fitted(tiles: Sequence[Tile], render: Callable[[Sequence[Tile]], str], limit: int, layout: Layout) -> list[Tile]:
    """Reduce previews until the HTML of all tiles is small enough.

    Args:
        tiles: Tiles with previews of any size.
        render: Makes the HTML of the tiles.
        limit: Largest size of the HTML as JSON, in bytes.
        layout: Size of each tile.

    Returns:
        The tiles; those whose preview cannot be made small enough have none.
    """
    count = sum(tile.preview is not None for tile in tiles)
    if not count:
        return list(tiles)
    empty = Preview(b"", "image/jpeg")
    bare = json_bytes(render([replace(tile, preview=tile.preview and empty) for tile in tiles]))
    share = (limit - bare) // count * 3 // 4 - 2  # base64 makes four bytes of three, and pads the last ones
    side = min(2 * max(layout.width, layout.height), 768)  # screens have two dots for each pixel
    return [_fitted(tile, share, side) for tile in tiles]


def _fitted(tile: Tile, limit: int, side: int) -> Tile:
    if tile.preview is None or len(tile.preview.content) <= limit:
        return tile
    smaller = make_preview(tile.preview.content, limit, side=side) if limit >= _FEWEST_BYTES else None
    if smaller:
        return replace(tile, preview=smaller)
    return replace(tile, preview=None, kind="absent", reason="The output has no room for it.")


def json_bytes(value: object) -> int:
    """The size of a value in a notebook file.

    Args:
        value: Plain JSON.

    Returns:
        Upper limit in bytes.
    """
    return len(json.dumps(value))


# --- tiles


def parts_of(item: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return the images and failures of an item, each with the code that finds it, such as `[3].images[1]`.

    Whatever counts from 1, such as the lines of a contact sheet, has no brackets.

    Args:
        item: A result, an image, a failure, an exception, or a list of these.
        name: The code that finds the item.

    Returns:
        Labels and parts. The label of an only part is the name.
    """
    if hasattr(item, "images") and not isinstance(item, BaseException):
        parts = [(f"{name}.images[{index}]", image) for index, image in enumerate(item.images)]
        parts += [(f"{name}.failures[{index}]", failure) for index, failure in enumerate(item.failures)]
    else:
        parts = [(f"{name}[{index}]", part) for index, part in enumerate(item if isinstance(item, list) else [item])]
    return parts if len(parts) > 1 else [(name, part) for _, part in parts]


def grid(tiles: Sequence[Tile], layout: Layout, heading: str = "") -> str:
    """Render tiles side by side, in as many rows as the width of the window requires.

    Args:
        tiles: The tiles.
        layout: Size of each tile.
        heading: Text above them.

    Returns:
        HTML for a notebook output or the body of a page.
    """
    return _root(f"{_heading(heading)}<div>{''.join(_figure(tile, layout) for tile in tiles)}</div>")


def table(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Tile]], layout: Layout, heading: str = ""
) -> str:
    """Render tiles in a table.

    Args:
        rows: Labels of the rows.
        columns: Labels of the columns.
        cells: The tiles of each cell, row by row.
        layout: Size of each tile.
        heading: Text above the table.

    Returns:
        HTML for a notebook output or the body of a page.
    """
    parts = ["".join(f"<th {_LABELLED}>{_text(label, 60)}</th>" for label in ("", *columns))]
    for number, label in enumerate(rows):
        start = number * len(columns)
        row = cells[start : start + len(columns)]
        shown = (f"<td {_CELL}>{''.join(_figure(tile, layout) for tile in cell)}</td>" for cell in row)
        parts.append(f"<th {_LABELLED}>{_text(label, 80)}</th>{''.join(shown)}")
    body = "".join(f"<tr {_ROW}>{part}</tr>" for part in parts)
    return _root(f"{_heading(heading)}<table {_TABLE}>{body}</table>")


def _figure(tile: Tile, layout: Layout, *, classes: bool = False) -> str:
    if tile.preview:
        data = base64.b64encode(tile.preview.content).decode()
        shown = _image(tile, f"data:{tile.preview.mime_type};base64,{data}", layout)
    elif tile.file is not None:
        source = _relative_url(tile.file)
        shown = f'<a href="{source}">{_image(tile, source, layout, lazy=True)}</a>'
    else:
        shown = _placeholder(tile, layout)
    lines = []
    label = f"<b>{_text(tile.label, 24)}</b> " if tile.label else ""
    caption = _text(tile.caption, layout.caption)
    if label or caption:
        lines.append(f"{label}{caption}")
    facts = {"all": tile.facts, "brief": tile.brief, "none": ()}[layout.facts]
    if facts:
        joined = " · ".join(_UNIT.sub("&nbsp;", _text(fact, 100)) for fact in facts)
        lines.append(f'<div style="opacity:0.7">{joined}</div>')
    if tile.badge:
        shape = _tinted("blocked", "1px 7px", "display:inline-block;max-width:100%;")
        lines.append(f"<div><span {shape}>{_text(tile.badge, 80)}</span></div>")
    style = f"display:inline-block;vertical-align:top;width:{layout.width}px;max-width:100%;margin:0 12px 12px 0"
    below = f"<figcaption>{''.join(lines)}</figcaption>" if lines else ""
    kind = f' class="{tile.kind}"' if classes else ""
    return f'<figure{kind} style="{style}">{shown}{below}</figure>'


def _image(tile: Tile, source: str, layout: Layout, *, lazy: bool = False) -> str:
    width, height = tile.shape or (layout.width, layout.height)
    scale = min(layout.width / width, layout.height / height)
    size = f'width="{max(1, round(width * scale))}"'
    if tile.shape:
        size += f' height="{max(1, round(height * scale))}"'
    # Small tiles do not repeat the caption.
    alt = _text(tile.caption, layout.caption) if layout.facts == "all" else f"Image {_text(tile.label, 24)}".strip()
    style = "display:block;max-width:100%;height:auto;margin:0 0 4px 0;border-radius:6px"
    loading = f' loading="lazy" title="{alt}"' if lazy else ""
    return f'<img src="{source}" {size} alt="{alt}"{loading} style="{style}">'


def _relative_url(file: str) -> str:
    # quote takes bytes, because the name of a file need not be text.
    url = html.escape(quote(file.encode("utf-8", "surrogateescape")), quote=True)
    return url if not url.startswith("/") and ":" not in url else f"./{url}"


def _placeholder(tile: Tile, layout: Layout) -> str:
    kind: Kind = "absent" if tile.kind == "image" else tile.kind
    link = ""
    if tile.link and tile.link.lower().startswith(("https://", "http://")) and len(tile.link) <= _MAX_LINK:
        target = html.escape(tile.link, quote=True)
        link = f' <a href="{target}" target="_blank" rel="noopener noreferrer" style="color:inherit">Open the link</a>'
    return f"<div {_tinted(kind, '10px 12px')}><b>{_HEADINGS[kind]}</b> {_text(tile.reason, layout.reason)}{link}</div>"


def _tinted(kind: Kind, padding: str, more: str = "") -> str:
    tint = _TINTS[kind]
    return (
        f'style="{more}padding:{padding};margin:0 0 4px 0;border-radius:6px;border:1px solid rgba({tint},0.5);'
        f'background-color:rgba({tint},0.14);overflow:hidden"'
    )


def report(text: str, link: str, target: Path | None) -> str:
    """Render the lines of a report, and a link below them.

    Args:
        text: The lines.
        link: Text of the link.
        target: Path of the file that it opens; None for no link.

    Returns:
        HTML for a notebook output.
    """
    lines = [f"<div>{_text(line, 400)}</div>" for line in text.splitlines()[:_MAX_LINES]]
    if target is not None:
        with suppress(ValueError, OSError):  # a notebook opens paths that are relative to its folder
            target = target.relative_to(Path.cwd()) if target.is_absolute() else target
        opened = html.escape(quote(target.as_posix(), safe="/"), quote=True)
        lines.append(f'<div><a href="{opened}" target="_blank" rel="noopener">{_text(link, 120)}</a></div>')
    return _root("".join(lines))


def _heading(text: str) -> str:
    return f'<div style="opacity:0.7;margin:0 0 8px 0">{_text(text, 200)}</div>' if text else ""


# Notebooks typeset formulas in HTML too, and a formula can contain a link to a script: the classes exclude prompts from that.
_ROOT: Final = (
    '<div class="mathjax_ignore tex2jax_ignore" '
    'style="font-family:system-ui,sans-serif;font-size:13px;line-height:1.45;overflow-wrap:break-word">'
)


def _root(inner: str) -> str:
    return f"{_ROOT}{inner}</div>"


def _text(text: str, limit: int) -> str:
    return html.escape(printable(text, limit), quote=True)


# --- pages

_START: Final = (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
)
_SHEET_START: Final = f'{_START}<meta name="generator" content="langchain-cogview">\n'
_OLD_SHEET_START: Final = f"{_START}<title>CogView: "
"""Start of the contact sheets of versions that wrote no generator's name."""
_EMBEDDED_ONLY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_NO_SCRIPT: Final = "script-src 'none'; object-src 'none'"  # browsers disagree on how image files are to be allowed


def _head(start: str, title: str, policy: str) -> str:
    return (
        f'{start}<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>{_text(title, 200)}</title>\n'
        "<style>figure{content-visibility:auto;contain-intrinsic-size:auto 300px}</style>\n</head>\n"
        '<body style="margin:24px;background-color:canvas;color:canvastext">\n'
    )


_END: Final = "\n</body>\n</html>\n"


def page(body: str, *, title: str, script: str = "") -> bytes:
    """Render a page with embedded images.

    Args:
        body: HTML from `grid` or `table`.
        title: Title of the page.
        script: The only script that the page may run; empty for none.

    Returns:
        HTML in UTF-8, which loads nothing.
    """
    policy = _EMBEDDED_ONLY
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        body += f"<script>{script}</script>"
    return f"{_head(_START, title, policy)}{body}{_END}".encode("utf-8", "replace")


def contact_sheet(
    tiles: Iterable[Tile],
    *,
    title: str,
    facts: Iterable[str] = (),
    links: Iterable[tuple[str, str]] = (),
    counts: Mapping[Kind, int] | None = None,
) -> Iterator[bytes]:
    """Render a page that shows image files. Browsers load each file when it comes into view.

    Args:
        tiles: The tiles, with files relative to the folder of the page.
        title: Title of the page, which is also its heading.
        facts: Paragraphs above the tiles.
        links: Text and file of each other page, relative to the folder of this page; they are above and below the tiles.
        counts: How many tiles of each kind the page has. If there are several kinds, the reader can choose which are shown.

    Yields:
        HTML in UTF-8, piece by piece.
    """
    anchors = " · ".join(f'<a href="{_relative_url(file)}">{_text(text, 40)}</a>' for text, file in links)
    pages = f"<p>{anchors}</p>\n" if anchors else ""

    def parts() -> Iterator[str]:
        yield _head(_SHEET_START, title, _NO_SCRIPT)
        yield f"{_ROOT}<h1>{_text(title, 200)}</h1>\n"
        yield from (f"<p>{_text(fact, 1_000)}</p>\n" for fact in facts)
        yield pages
        yield f"{_filter(counts or {})}<main>\n"
        yield from (f"{_figure(tile, _SHEET_LAYOUT, classes=True)}\n" for tile in tiles)
        yield f"</main>\n{pages}</div>{_END}"

    yield from (part.encode("utf-8", "replace") for part in parts())


def _filter(counts: Mapping[Kind, int]) -> str:
    """Return radio buttons that choose which tiles of a page are shown, by style rules alone: the page has no script."""
    shown = [(text, kind, counts.get(kind, 0)) for text, kind in _FILTERS if counts.get(kind)]
    if len(shown) < 2:  # noqa: PLR2004
        return ""
    rules = "".join(f"#only-{kind}:checked~main figure:not(.{kind}){{display:none!important}}" for _, kind, _ in shown)
    choices = [("All", "all", sum(count for _, _, count in shown)), *shown]
    buttons = "".join(
        f'<input type="radio" name="only" id="only-{kind}"{" checked" if kind == "all" else ""}>'
        f'<label for="only-{kind}" style="margin:0 16px 0 4px">{text} {count:,}</label>\n'
        for text, kind, count in choices
    )
    return f"<style>{rules}main{{margin-top:12px}}</style>\n{buttons}"


def is_contact_sheet(head: bytes) -> bool:
    """Whether a file is a contact sheet, which a job may replace.

    Args:
        head: The first bytes of the file; a few hundred are enough.

    Returns:
        True if `contact_sheet` of this or an earlier version made it.
    """
    return head.startswith((_SHEET_START.encode(), _OLD_SHEET_START.encode()))
