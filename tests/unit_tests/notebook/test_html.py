"""What a user relies on: the page opens from the file system, and no prompt can do anything on it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from langchain_cogview.notebook.html import Tile, contact_sheet

VOID = {"meta", "img"}


class Page(HTMLParser):
    """The page as a browser takes it apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page(tmp_path: Path, *tiles: Tile, title="A job", facts=()) -> Page:
    path = tmp_path / "index.html"
    path.write_bytes(b"".join(contact_sheet(tiles, title=title, facts=facts)))
    return Page(path.read_text(encoding="utf-8"))


def test_an_image_is_a_relative_link_loaded_when_it_comes_into_view(tmp_path):
    seen = page(tmp_path, Tile("a cat", "7", file="cat.png", shape=(640, 512)), facts=["1 prompt"])
    (image,), (link,) = seen.all("img"), seen.all("a")
    assert (image["src"], image["loading"], image["alt"], image["title"]) == ("cat.png", "lazy", "a cat", "a cat")
    assert (int(image["width"]), int(image["height"])) == (240, 192)
    assert link == {"href": "cat.png"}
    assert {"1 prompt", "7", "a cat"} <= {*seen.texts}


EVIL = "\"><script>alert(1)</script><img src=x onerror='alert(2)'> & &lt; </figcaption></main>"


def test_foreign_text_stays_text(tmp_path):
    seen = page(tmp_path, Tile(EVIL, EVIL, file="a.png"), Tile(EVIL, EVIL, reason=EVIL), title=EVIL, facts=[EVIL])
    assert not seen.all("script")
    (image,) = seen.all("img")
    assert (image["alt"], image["title"]) == (EVIL, EVIL)
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert "".join(seen.texts).count("alert(1)") >= 6


@pytest.mark.parametrize("name", ["a b#c?d%e.png", "猫.png", 'quote".png', "javascript:alert(1)", "//host/x.png"])
def test_a_file_name_is_percent_encoded_and_stays_in_the_folder(tmp_path, name):
    (image,) = page(tmp_path, Tile("x", file=name)).all("img")
    assert image["src"].isascii()
    assert unquote(image["src"]).removeprefix("./") == name
    assert not image["src"].startswith(("/", "javascript:"))


def test_what_was_not_made_has_its_reason_instead_of_the_image(tmp_path):
    seen = page(tmp_path, Tile("a cat", reason="The content filter blocked the prompt."))
    assert seen.all("img") == []
    assert "The content filter blocked the prompt." in seen.texts


def test_a_text_that_utf_8_does_not_have_does_not_break_the_page(tmp_path):
    assert page(tmp_path, Tile("half \ud800 a character")).texts[-1].startswith("half ")


def test_many_thousand_images_make_a_page(tmp_path):
    assert (
        len(page(tmp_path, *(Tile(f"p {n}", str(n), file=f"{n}.png", shape=(1, 1)) for n in range(5000))).all("img"))
        == 5000
    )


def test_nothing_is_fetched_from_elsewhere():
    assert b"//" not in b"".join(contact_sheet([Tile("a", file="a.png")], title="t"))
