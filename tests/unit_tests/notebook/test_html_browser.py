"""What a user relies on: in a real browser images are seen, and no prompt can do anything."""

import shutil
import subprocess

import nbformat
import pytest

from langchain_cogview import CogViewContentFilterError, CogViewError, ContentFilter
from langchain_cogview.notebook.gallery import compare, gallery
from langchain_cogview.notebook.html import Tile, contact_sheet
from langchain_cogview.notebook.previews import HELD
from langchain_cogview.result import with_content
from tests.unit_tests.notebook.displayed import EVIL, PHOTO, image, result

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.notebook,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
TITLE = "calm"
COUNTED = (  # by the browser, after the images were decoded or not
    "<script>addEventListener('load', () => { const all = [...document.querySelectorAll('img')];"
    "document.body.dataset.seen = all.filter(each => each.naturalWidth > 8).length + '/' + all.length })</script>"
)


def opened(path, profile):
    """The page as the browser has it once everything has loaded."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
            "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, encoding="utf-8", timeout=400, check=True,
    )  # fmt: skip
    return done.stdout


def in_a_page(path, html):
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8><title>{TITLE}</title><body>{COUNTED}{html}", encoding="utf-8")
    return path


@pytest.fixture
def evil():
    """Everything foreign says the same."""
    HELD.clear()
    entries = (ContentFilter(EVIL, 1),)
    facts = {
        "prompt": EVIL,
        "model": EVIL,
        "quality": EVIL,
        "size": EVIL,
        "warnings": (EVIL,),
        "content_filter": entries,
    }
    yield [
        result(with_content(image(PHOTO, **facts), PHOTO, None)),
        image(url="javascript:document.title='owned'", **facts),
        image(url=f"https://example.invalid/{EVIL}", **facts),
        image(path=f"/{EVIL.replace(chr(0), '')}", **facts),
        CogViewContentFilterError(EVIL, hint=EVIL, content_filter=entries),
        CogViewError(EVIL),
        ValueError(EVIL),
        {"type": EVIL},
    ]
    HELD.clear()


def test_a_script_would_be_seen(tmp_path):
    page = in_a_page(tmp_path / "page.html", "<script>document.title='owned'</script>")
    assert "<title>owned</title>" in opened(page, tmp_path / "profile")


def test_no_prompt_can_do_anything_in_a_notebooks_outputs(evil, generator, tmp_path):
    table = compare(EVIL, sizes=["square", EVIL], qualities=[EVIL, "hd"], generator=generator)
    shown = [evil[0], evil[0].images[0], *evil[1:4], gallery(evil), gallery(evil * 10), table]
    html = "".join(item._repr_mimebundle_()["text/html"] for item in shown)
    dom = opened(in_a_page(tmp_path / "page.html", html), tmp_path / "profile")
    assert f"<title>{TITLE}</title>" in dom
    assert 'data-seen="14/14"' in dom


def test_no_prompt_can_do_anything_in_a_saved_gallery(evil, tmp_path):
    dom = opened(gallery(evil).save(tmp_path / "gallery.html", title=TITLE), tmp_path / "profile")
    assert f"<title>{TITLE}</title>" in dom
    assert dom.count("<img") == 1


def test_no_prompt_can_do_anything_in_a_contact_sheet(tmp_path):
    (tmp_path / "a.png").write_bytes(PHOTO)
    path = tmp_path / "index.html"
    path.write_bytes(
        b"".join(
            contact_sheet([Tile(EVIL, EVIL, file="a.png"), Tile(EVIL, EVIL, reason=EVIL)], title=TITLE, facts=[EVIL])
        )
    )
    assert f"<title>{TITLE}</title>" in opened(path, tmp_path / "profile")


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")  # nbconvert's own
def test_an_exported_notebook_shows_image_and_caption(evil, tmp_path):
    nbconvert = pytest.importorskip("nbconvert")
    outputs = [
        nbformat.v4.new_output("display_data", data=item._repr_mimebundle_())
        for item in (result(with_content(image(PHOTO, prompt="a red fox"), PHOTO, None)), gallery(evil))
    ]
    cell = nbformat.v4.new_code_cell("generator.invoke('a red fox')", outputs=outputs)
    html, _ = nbconvert.HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    html = html.replace("<title>Notebook</title>", f"<title>{TITLE}</title>").replace("</body>", f"{COUNTED}</body>")
    path = tmp_path / "notebook.html"
    path.write_text(html, encoding="utf-8")
    dom = opened(path, tmp_path / "profile")
    assert f"<title>{TITLE}</title>" in dom
    assert 'data-seen="2/2"' in dom
    assert "a red fox</figcaption>" in dom or "a red fox<div" in dom
