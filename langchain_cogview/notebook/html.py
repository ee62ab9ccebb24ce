"""Pictures, and what took their place, as HTML for a notebook's output: one beside the other, or in a labelled table.

All texts may be foreign: they are escaped, one line each, and bounded. There is no script, no style sheet and nothing to load.
The inline styles are those that JupyterLab leaves in place where a notebook is not trusted; colours work on light and dark.
"""

from __future__ import annotations

import base64
import html
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from langchain_cogview.errors import printable
from langchain_cogview.notebook.previews import Preview, preview

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Kind = Literal["picture", "absent", "blocked", "failed"]

_HEADINGS: Final[dict[Kind, str]] = {
    "picture": "Picture",
    "absent": "Not shown",
    "blocked": "Blocked",
    "failed": "Failed",
}
_TINTS: Final[dict[Kind, str]] = {
    "picture": "128,128,128",
    "absent": "128,128,128",
    "blocked": "214,137,16",
    "failed": "205,70,60",
}
_LABELLED: Final = 'style="padding:4px 12px 4px 0;border:0;text-align:left;vertical-align:top;font-weight:600"'
_CELL: Final = 'style="padding:4px 0;border:0;text-align:left;vertical-align:top"'
_TABLE: Final = 'style="border-collapse:collapse;border:0;margin:0;font-size:13px"'
_ROW: Final = 'style="background-color:transparent"'
_MAX_LINK: Final = 2_000
_FEWEST_BYTES: Final = 150  # fewer show nothing


@dataclass(frozen=True, slots=True)
class Tile:
    """One place among others: a picture, or why there is none.

    Attributes:
        caption: What was asked for.
        label: Stands before it, such as its number.
        facts: Under it.
        brief: Under it where there is little room.
        badge: What the content filter said of a picture that was made.
        kind: Whether it is a picture, one that is not at hand, or none: blocked or failed.
        preview: The picture's; None where there is none, or it does not fit.
        shape: Width and height of the picture in pixels; None where unknown.
        reason: Why there is no picture.
        link: Where it can be had; shown where the picture is not, and only when it is http(s).
    """

    caption: str = ""
    label: str = ""
    facts: tuple[str, ...] = ()
    brief: tuple[str, ...] = ()
    badge: str = ""
    kind: Kind = "picture"
    preview: Preview | None = None
    shape: tuple[int, int] | None = None
    reason: str = ""
    link: str | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """How much room each tile of many gets.

    Attributes:
        width: In pixels.
        height: Of a picture, at most, in pixels.
        caption: Characters.
        reason: Characters.
        facts: Whether all are shown, the brief ones, or none.
    """

    width: int
    height: int
    caption: int
    reason: int
    facts: Literal["all", "brief", "none"]

    @classmethod
    def of(cls, tiles: int) -> Room:
        """The room of each of so many."""
        for most, room in _ROOMS:
            if tiles <= most:
                return room
        return _ROOMS[-1][1]


_ROOMS: Final = (
    (1, Room(512, 512, 160, 400, "all")),
    (4, Room(240, 240, 120, 240, "brief")),
    (12, Room(190, 190, 80, 160, "brief")),
    (30, Room(140, 140, 48, 90, "none")),
    (100, Room(104, 104, 24, 50, "none")),
)
MOST_TILES: Final = _ROOMS[-1][0]
"""More than these would be too small to look at."""


def fitted(tiles: Sequence[Tile], render: Callable[[Sequence[Tile]], str], limit: int, room: Room) -> list[Tile]:
    """The tiles with previews so small that all of them together fit.

    Args:
        tiles: With previews of any size.
        render: Makes the HTML.
        limit: Bytes of the HTML as JSON.
        room: Of each tile.
    """
    there = sum(tile.preview is not None for tile in tiles)
    if not there:
        return list(tiles)
    empty = Preview(b"", "image/jpeg")
    bare = json_bytes(render([replace(tile, preview=tile.preview and empty) for tile in tiles]))
    each = (limit - bare) // there * 3 // 4 - 2  # base64 makes four bytes of three, and fills up the last ones
    side = min(2 * max(room.width, room.height), 768)  # screens have two dots for a pixel
    return [_fitted(tile, each, side) for tile in tiles]


def _fitted(tile: Tile, limit: int, side: int) -> Tile:
    if tile.preview is None or len(tile.preview.content) <= limit:
        return tile
    smaller = preview(tile.preview.content, limit, side=side) if limit >= _FEWEST_BYTES else None
    return replace(tile, preview=smaller) if smaller else replace(tile, preview=None, kind="absent", reason="No room.")


def json_bytes(value: object) -> int:
    """Bytes of a value in a notebook's file, at most."""
    return len(json.dumps(value))


def page_of(tiles: Sequence[Tile], room: Room, heading: str = "") -> str:
    """Tiles one beside the other, as many in a row as there is room for."""
    return _root(f"{_heading(heading)}<div>{''.join(figure(tile, room) for tile in tiles)}</div>")


def table_of(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Tile]], room: Room, heading: str = ""
) -> str:
    """Tiles in a table.

    Args:
        rows: Their labels.
        columns: Their labels.
        cells: The tiles of each place, row by row.
        room: Of each tile.
        heading: Above it.
    """
    parts = ["".join(f"<th {_LABELLED}>{_text(label, 60)}</th>" for label in ("", *columns))]
    for number, label in enumerate(rows):
        start = number * len(columns)
        places = cells[start : start + len(columns)]
        shown = (f"<td {_CELL}>{''.join(figure(tile, room) for tile in place)}</td>" for place in places)
        parts.append(f"<th {_LABELLED}>{_text(label, 80)}</th>{''.join(shown)}")
    body = "".join(f"<tr {_ROW}>{part}</tr>" for part in parts)
    return _root(f"{_heading(heading)}<table {_TABLE}>{body}</table>")


def figure(tile: Tile, room: Room) -> str:
    """One tile."""
    shown = _picture(tile, tile.preview, room) if tile.preview else _placeholder(tile, room)
    lines = []
    label = f"<b>{_text(tile.label, 24)}</b> " if tile.label else ""
    caption = _text(tile.caption, room.caption)
    if label or caption:
        lines.append(f"{label}{caption}")
    facts = {"all": tile.facts, "brief": tile.brief, "none": ()}[room.facts]
    if facts:
        lines.append(f'<div style="opacity:0.7">{" · ".join(_text(fact, 100) for fact in facts)}</div>')
    if tile.badge:
        lines.append(f"<div><span {_tinted('blocked', '1px 7px')}>{_text(tile.badge, 80)}</span></div>")
    style = f"display:inline-block;vertical-align:top;width:{room.width}px;max-width:100%;margin:0 12px 12px 0"
    below = f"<figcaption>{''.join(lines)}</figcaption>" if lines else ""
    return f'<figure style="{style}">{shown}{below}</figure>'


def _picture(tile: Tile, shown: Preview, room: Room) -> str:
    width, height = tile.shape or (room.width, room.height)
    scale = min(room.width / width, room.height / height)
    size = f'width="{max(1, round(width * scale))}"'
    if tile.shape:
        size += f' height="{max(1, round(height * scale))}"'
    data = base64.b64encode(shown.content).decode()
    # Where there is little room the caption is not said twice.
    alt = _text(tile.caption, room.caption) if room.facts == "all" else f"Picture {_text(tile.label, 24)}".strip()
    style = "display:block;max-width:100%;height:auto;margin:0 0 4px 0;border-radius:6px"
    return f'<img src="data:{shown.mime_type};base64,{data}" {size} alt="{alt}" style="{style}">'


def _placeholder(tile: Tile, room: Room) -> str:
    kind: Kind = "absent" if tile.kind == "picture" else tile.kind
    link = ""
    if tile.link and tile.link.lower().startswith(("https://", "http://")) and len(tile.link) <= _MAX_LINK:
        target = html.escape(tile.link, quote=True)
        link = f' <a href="{target}" target="_blank" rel="noopener noreferrer" style="color:inherit">Open its link</a>'
    return f"<div {_tinted(kind, '10px 12px')}><b>{_HEADINGS[kind]}</b> {_text(tile.reason, room.reason)}{link}</div>"


def _tinted(kind: Kind, padding: str) -> str:
    tint = _TINTS[kind]
    return (
        f'style="padding:{padding};margin:0 0 4px 0;border-radius:6px;border:1px solid rgba({tint},0.5);'
        f'background-color:rgba({tint},0.14);overflow:hidden"'
    )


def _heading(text: str) -> str:
    return f'<div style="opacity:0.7;margin:0 0 8px 0">{_text(text, 200)}</div>' if text else ""


def _root(inner: str) -> str:
    # A notebook typesets formulas in HTML too, and a formula can hold a link to a script: the classes keep prompts out of that.
    classes = "mathjax_ignore tex2jax_ignore"
    style = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.45;overflow-wrap:break-word"
    return f'<div class="{classes}" style="{style}">{inner}</div>'


def _text(text: str, limit: int) -> str:
    return html.escape(printable(text, limit), quote=True)
