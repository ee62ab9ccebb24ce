"""What a user relies on: the last line of a cell shows the image and its caption, small, from memory alone."""

import asyncio
import builtins
import contextlib
import io
import json
import os
import pathlib
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from langchain_cogview import CogViewImageGenerator, ContentFilter, ImageFailure, ImageResult
from langchain_cogview.notebook.previews import HELD, HeldPreviews, Preview, aremember, make_preview, remember
from langchain_cogview.result import with_content
from tests.unit_tests.notebook.displayed import EVIL, PHOTO, Seen, assert_harmless, be_a_kernel, image, photo, result


@pytest.fixture(autouse=True)
def _nothing_held():
    HELD.clear()
    yield
    HELD.clear()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "kitten.png"
    path.write_bytes(PHOTO)
    return image(PHOTO, path=path)


def shown(something):
    bundle = something._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    return Seen(bundle["text/html"])


def size(something):
    return len(json.dumps(something._repr_mimebundle_()))


# --- one image


def test_the_last_line_of_a_cell_shows_the_image_and_its_caption(generator):
    generated = generator.invoke({"prompt": "a red fox", "size": "16:9"})
    seen = shown(generated)
    assert [decoded.size for decoded in seen.images()] == [(1344, 768)]
    assert "a red fox" in seen.text
    for fact in (
        "cogview-4-250304",
        "1344×768",
        "standard",
        "sandbox, no cost",
        f"link expires {generated.expires_at:%Y-%m-%d}",
    ):
        assert fact in seen.text
    plain = generated._repr_mimebundle_()["text/plain"]
    assert plain.startswith(repr(generated))
    assert "link expires" in plain
    assert generated.url not in json.dumps(generated._repr_mimebundle_())


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"cost": Decimal("0.06"), "currency": "CNY"}, "0.06 CNY"),
        ({"cost": Decimal(0), "currency": "CNY"}, "no cost"),
        ({}, "price unknown"),
        ({"cost": Decimal(0), "cached": True}, "cached, no cost"),
        ({"size": "1024x1024"}, "1024×1024"),
        ({"quality": "hd"}, "hd"),
        ({"expires_at": datetime(2020, 1, 2, 3, 4, tzinfo=UTC)}, "link expired 2020-01-02 03:04 UTC"),
        ({"expires_at": datetime(2999, 1, 2, 3, 4, tzinfo=UTC)}, "link expires 2999-01-02 03:04 UTC"),
        ({"content_filter": (ContentFilter("assistant", 2),)}, "content filter: image (level 2, moderate)"),
    ],
)
def test_the_caption_has_the_facts(facts, expected):
    assert expected in shown(image(**facts)).text


def test_a_flagged_image_has_a_badge(generator):
    seen = shown(generator.invoke("[[flagged:2]] a kitten"))
    assert len(seen.images()) == 1
    assert "content filter: image (level 2, moderate)" in seen.text


def test_a_large_image_is_shown_small():
    large = with_content(image(PHOTO), PHOTO, None)
    assert len(PHOTO) > 1_000_000
    assert size(large) <= 60_000
    (decoded,) = shown(large).images()
    assert decoded.width > 250


@pytest.mark.parametrize("prompt", ["猫" * 2000, "😀" * 2000, "<&\"'" * 800, "\x00" * 500 + "x", EVIL * 5])
def test_one_image_is_at_most_60_kilobytes_whatever_the_texts_are(prompt):
    facts = {"prompt": prompt, "model": prompt, "quality": prompt, "size": prompt, "warnings": (prompt,) * 3}
    one = with_content(image(PHOTO, **facts), PHOTO, None)
    assert len(shown(one).images()) == 1
    assert size(one) <= 60_000
    assert size(result(one)) <= 60_000
    assert size(image(url="https://x/" + "y" * 1500, **facts)) <= 60_000
    assert_harmless(one._repr_mimebundle_()["text/html"])


# --- nothing is read, nothing is fetched


@contextlib.contextmanager
def no_input():
    """Every way to a file or the network fails; where a test fails, its report is written after that."""

    def refused(*args, **kwargs):
        raise AssertionError("a file or a connection was opened")

    with pytest.MonkeyPatch.context() as monkeypatch:
        for owner, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "stat"), (pathlib.Path, "read_bytes")):
            monkeypatch.setattr(owner, name, refused)
        monkeypatch.setattr(socket, "socket", refused)
        yield


def shown_from_memory(something):
    with no_input():
        something._repr_mimebundle_()
    return shown(something)


def test_what_was_made_in_a_notebook_is_shown_though_its_file_is_gone(saved, monkeypatch):
    be_a_kernel(monkeypatch)
    remember([saved])
    saved.path.unlink()
    assert len(shown_from_memory(saved).images()) == 1
    assert len(shown_from_memory(result(saved, saved)).images()) == 2


def test_an_image_read_from_an_artifact_finds_its_preview(tmp_path, sandbox, monkeypatch):
    be_a_kernel(monkeypatch)
    generated = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path).invoke("a kitten")
    asyncio.run(aremember(generated.images))
    back = ImageResult.from_artifact(json.loads(json.dumps(generated.to_artifact())))
    assert len(shown_from_memory(back).images()) == 1


def test_an_artifact_from_elsewhere_is_a_text_with_the_path(saved):
    seen = shown_from_memory(saved)
    assert seen.all("img") == []
    assert f"Saved as {saved.path}: image.show() shows it." in seen.text
    assert str(saved.path) in saved._repr_mimebundle_()["text/plain"]
    signed = saved.model_copy(update={"url": "https://x/a.png?Signature=s"})
    assert "Signature" not in json.dumps(signed._repr_mimebundle_())


def test_an_image_saved_elsewhere_is_not_fetched():
    seen = shown_from_memory(image(uri="s3://bucket/kitten.png"))
    assert "Saved as s3://bucket/kitten.png: image.show() fetches and shows it." in seen.text


def test_an_image_that_was_not_fetched_has_its_link():
    one = image(url="https://example.com/a.png?x=1&y=\"'>", expires_at=datetime.now(UTC) + timedelta(hours=1))
    (link,) = shown_from_memory(one).all("a")
    assert link["href"] == one.url
    assert link["rel"] == "noopener noreferrer"
    assert one.url in one._repr_mimebundle_()["text/plain"]


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "JaVaScRiPt:alert(1)", "data:text/html,x", "file:///etc/passwd", " x"]
)
def test_a_link_that_is_none_is_not_one(url):
    assert shown(image(url=url)).all("a") == []


def test_a_warning_stands_below_the_image_that_it_is_about(sandbox, tmp_path):
    (tmp_path / "file").touch()
    one = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path / "file" / "below").invoke("x")
    assert "could not be saved in output_dir" in shown(one).text
    assert "could not be saved in output_dir" in one._repr_mimebundle_()["text/plain"]


def test_an_image_without_bytes_shows_its_warning_and_link(generator):
    one = generator.invoke("[[expired-url]]")
    assert "expired" in one._repr_mimebundle_()["text/plain"]
    assert one.url in one._repr_mimebundle_()["text/plain"]
    assert "expired" in shown(one).text
    assert shown(generator.invoke({"prompt": "[[expired-url]] <b>", "n": 2})).text.count("link has expired or") == 2


def test_outside_a_notebook_nothing_is_made_or_loaded(saved):
    remember([saved])
    asyncio.run(aremember([saved]))
    assert HELD.get(saved.sha256) is None
    code = (
        "import sys\n"
        "from langchain_cogview import CogViewImageGenerator\n"
        "from langchain_cogview.notebook.previews import remember\n"
        "from langchain_cogview.notebook.display import show_status\n"
        "with show_status() as report:\n"
        "    result = report(CogViewImageGenerator(base_url='sandbox:').invoke('x'))\n"
        "remember(result.images)\n"
        "print(sorted({'PIL', 'IPython', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_an_image_that_cannot_be_previewed_costs_nobody_anything(saved, monkeypatch):
    be_a_kernel(monkeypatch)
    saved.path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 100_000)
    gone = image(b"gone", path=saved.path.with_name("gone.png"))
    remember([gone, saved, image()])
    assert shown(saved).all("img") == shown(gone).all("img") == []


# --- several


def test_several_images_stand_side_by_side_with_the_code_that_finds_them(generator):
    seen = shown(generator.invoke({"prompt": EVIL, "n": 3}))
    assert len(seen.images()) == 3
    assert [text for text in seen.texts if text in {".images[0]", ".images[1]", ".images[2]"}] == [
        ".images[0]", ".images[1]", ".images[2]",
    ]  # fmt: skip


def test_failures_stand_beside_the_images(generator, sandbox):
    sandbox.fail_next("content-filter")
    seen = shown(generator.invoke({"prompt": "x", "n": 2}))
    assert len(seen.images()) == 1
    assert "The content filter blocked the prompt" in seen.text


@pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.heavy), 100])
def test_the_images_of_a_result_are_at_most_150_kilobytes(count, monkeypatch):
    images = [with_content(image(item), item, None) for item in (photo(seed, 256) for seed in range(count))]
    failures = [ImageFailure(index=1, error="X", message=EVIL, hint="猫" * 500)] * 3
    many = result(*images, failures=failures)
    assert size(many) <= 150_000
    assert len(shown(many).images()) == count


# --- without Pillow


@pytest.fixture
def no_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)


def test_without_pillow_a_small_original_is_embedded(generator, no_pillow, monkeypatch):
    html = generator.invoke("a kitten")._repr_mimebundle_()["text/html"]
    assert html.count("data:image/png;base64,") == 1


def test_without_pillow_a_large_one_is_a_text_that_names_the_extra(no_pillow):
    seen = shown(with_content(image(PHOTO), PHOTO, None))
    assert seen.all("img") == []
    assert 'pip install "langchain-cogview[notebook]"' in seen.text


# --- previews


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK", "I;16"])
def test_images_of_every_mode_are_made_small(mode):
    from PIL import Image

    form = "JPEG" if mode == "CMYK" else "PNG"
    out = io.BytesIO()
    grey = Image.effect_noise((900, 300), 90)
    (Image.new("I;16", (900, 300)) if mode == "I;16" else grey.convert("RGB").convert(mode)).save(out, form)
    made = make_preview(out.getvalue(), min(20_000, len(out.getvalue()) - 1))
    decoded = Image.open(io.BytesIO(made.content))
    assert decoded.mode in {"RGB", "L"}
    assert decoded.width == pytest.approx(3 * decoded.height, abs=3)


def test_what_is_transparent_is_seen_on_white():
    from PIL import Image

    out = io.BytesIO()
    Image.effect_noise((600, 600), 90).convert("RGBA").save(out, "PNG")
    clear = Image.open(io.BytesIO(out.getvalue()))
    clear.putalpha(0)
    out = io.BytesIO()
    clear.save(out, "PNG")
    decoded = Image.open(io.BytesIO(make_preview(out.getvalue(), 20_000).content))
    assert min(decoded.convert("L").getextrema()) > 250


@pytest.mark.parametrize(
    "content", [b"", b"<svg onload=alert(1)>", b"GIF89a" + b"x" * 100, b"\x89PNG\r\n\x1a\n" + b"x" * 90_000]
)
def test_what_is_no_image_has_no_preview(content):
    assert make_preview(content, 1_000) is None


@pytest.mark.parametrize("limit", [40_000, 9_000, 800, 400])
def test_a_preview_keeps_to_its_limit(limit):
    assert len(make_preview(PHOTO, limit).content) <= limit


def test_what_is_held_is_bounded_and_the_oldest_goes_first():
    held = HeldPreviews(limit=30)
    for name in "abc":
        held.keep(name, Preview(b"x" * 10, "image/png"))
    held.keep("c", Preview(b"y" * 10, "image/png"))
    assert held.get("a")
    held.keep("d", Preview(b"x" * 10, "image/png"))
    assert [name for name in "abcd" if held.get(name)] == ["a", "c", "d"]
    assert held.get("c").content == b"y" * 10
    held.keep("e", Preview(b"x" * 31, "image/png"))
    assert not [name for name in "abcde" if held.get(name)]


def test_an_image_stays_equal_and_pickles_whatever_was_shown(generator):
    import pickle

    generated = generator.invoke("a kitten")
    before = pickle.dumps(generated)
    generated._repr_mimebundle_()
    assert pickle.dumps(generated) == before


def test_without_a_notebook_show_opens_the_systems_viewer(saved, monkeypatch):
    from PIL import ImageShow

    opened = []

    class Viewer(ImageShow.Viewer):
        def show_image(self, decoded, **options):
            opened.append(decoded.size)
            return 1

    monkeypatch.setattr(ImageShow, "_viewers", [Viewer()])
    saved.show()
    assert opened == [(1024, 1024)]


@pytest.mark.notebook
@pytest.mark.filterwarnings("ignore")  # the kernel client's own
def test_in_a_real_kernel_saved_images_are_seen_and_show_reads_the_file(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    cells = [
        (
            "from pathlib import Path\n"
            "from langchain_cogview import CogViewImageGenerator, ImageResult\n"
            "from langchain_cogview.notebook.previews import HELD, aremember, in_kernel, remember\n"
            "assert in_kernel()\n"
            "generator = CogViewImageGenerator(base_url='sandbox:', output_dir='images')\n"
            "result = generator.invoke('a kitten')\n"
            "remember(result.images)\n"
            "other = await generator.ainvoke('a fox')\n"
            "await aremember(other.images)\n"
            "None"
        ),
        "ImageResult.from_artifact(result.to_artifact())",
        "other.images[0]",
        "HELD.clear()\nHELD.get(result.sha256)",
        "ImageResult.from_artifact(result.to_artifact()).show()",
        "result.path.unlink()\nresult",
    ]
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("COGVIEW_STATUS_LINE", "off")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
    NotebookClient(
        notebook, timeout=400, startup_timeout=400, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert outputs[0] == outputs[3] == []
    for number in (1, 2, 4, 5):
        (output,) = outputs[number]
        assert "data:image/png" in output.data["text/html"], number
