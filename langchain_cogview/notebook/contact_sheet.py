"""A page with many pictures: static HTML beside them, which a browser opens from the file system."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_STYLE: Final = """
body{font:15px/1.4 system-ui,sans-serif;margin:1.5rem;background:#fff;color:#222}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:1rem}
figure{margin:0;content-visibility:auto;contain-intrinsic-size:auto 300px}
img{display:block;width:100%;height:auto;background:#eee}
.none{display:grid;place-items:center;aspect-ratio:1;padding:1rem;box-sizing:border-box;background:#f6e3e0;color:#7a1f12;
text-align:center;overflow:hidden;overflow-wrap:anywhere}
figcaption{margin-top:.3rem;overflow-wrap:anywhere;display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:4;
overflow:hidden}
small{color:#777}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}img{background:#333}.none{background:#3a2320;color:#f0b3a8}}
"""


_START: Final = (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
)
_HEAD: Final = f'{_START}<meta name="generator" content="langchain-cogview">\n'
_FIRST_HEAD: Final = f"{_START}<title>CogView: "
"""How pages began that have no generator's name."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One place on the page: a picture, or why there is none.

    Attributes:
        caption: What was asked for.
        note: A few words before it, such as its line.
        file: The picture's path from the page, with `/`; None where there is no picture.
        width: In pixels; None where unknown.
        height: In pixels; None where unknown.
        reason: Why there is no picture.
    """

    caption: str
    note: str = ""
    file: str | None = None
    width: int | None = None
    height: int | None = None
    reason: str = ""


def contact_sheet(tiles: Iterable[Tile], *, title: str, facts: Iterable[str] = ()) -> Iterator[bytes]:
    """The page, piece by piece. All texts may be foreign: they are escaped, and no script is on it.

    Args:
        tiles: In the order of the page, with files named from its folder. Browsers load a picture when it comes into view.
        title: Of the page.
        facts: Paragraphs above the pictures.

    Returns:
        HTML in UTF-8.
    """
    return (part.encode("utf-8", "replace") for part in _page(tiles, title, facts))


def is_contact_sheet(head: bytes) -> bool:
    """Whether a file that begins with these bytes (a few hundred are enough) is such a page, and may be replaced."""
    return head.startswith((_HEAD.encode(), _FIRST_HEAD.encode()))


def _page(tiles: Iterable[Tile], title: str, facts: Iterable[str]) -> Iterator[str]:
    heading = html.escape(title)
    yield (f"{_HEAD}<title>{heading}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{heading}</h1>\n")
    yield from (f"<p>{html.escape(fact)}</p>\n" for fact in facts)
    yield "<main>\n"
    yield from map(_figure, tiles)
    yield "</main>\n</body>\n</html>\n"


def _figure(tile: Tile) -> str:
    caption = html.escape(tile.caption, quote=True)
    if tile.file is None:
        shown = f'<div class="none">{html.escape(tile.reason)}</div>'
    else:
        # quote takes bytes: a name need not be text.
        link = html.escape(quote(tile.file.encode("utf-8", "surrogateescape")), quote=True)
        link = link if not link.startswith("/") and ":" not in link else f"./{link}"
        size = f' width="{tile.width:d}" height="{tile.height:d}"' if tile.width and tile.height else ""
        shown = f'<a href="{link}"><img src="{link}"{size} loading="lazy" alt="{caption}" title="{caption}"></a>'
    note = f"<small>{html.escape(tile.note)}</small> " if tile.note else ""
    return f"<figure>{shown}<figcaption>{note}{caption}</figcaption></figure>\n"
