"""What a user relies on: many images in one small output, numbered, with the reason where there is none."""

import asyncio
import json
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from langchain_cogview import (
    CogViewBalanceError,
    CogViewContentFilterError,
    CogViewImageGenerator,
    CogViewInvalidRequestError,
    CogViewStorageError,
    ContentFilter,
    ImageFailure,
    ImageResult,
)
from langchain_cogview.notebook.display import BatchResults
from langchain_cogview.notebook.gallery import Gallery, acompare, compare, gallery
from langchain_cogview.notebook.html import Tile, contact_sheet
from langchain_cogview.notebook.previews import HELD
from langchain_cogview.result import with_content
from tests.unit_tests.notebook.displayed import EVIL, OF_A_PAGE, PHOTO, Seen, assert_harmless, image, photo, result


@pytest.fixture(autouse=True)
def _nothing_held():
    HELD.clear()
    yield
    HELD.clear()


BLOCKED = CogViewContentFilterError(
    "The content filter blocked the prompt.", content_filter=(ContentFilter("user", 1),)
)


def shown(something):
    bundle = something._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    return Seen(bundle["text/html"])


def size(something):
    return len(json.dumps(something._repr_mimebundle_()))


def photos(folder, count, **facts):
    """Results whose images are saved and do not get small by themselves."""
    found = []
    for seed in range(count):
        content = photo(seed, 256)
        path = folder / f"{seed}.png"
        path.write_bytes(content)
        found.append(result(image(content, path=path, **facts)))
    return found


# --- gallery


def test_a_batch_with_failures_is_shown_whole_and_numbered(generator):
    results = generator.batch(["a fox", "[[content-filter:1]] x", "[[balance]] y", "a cat"], return_exceptions=True)
    made = gallery(results)
    seen = shown(made)
    assert len(seen.images()) == 2
    assert [bold for bold in seen.texts if bold in {"[0]", "[1]", "[2]", "[3]", "Blocked", "Failed"}] == [
        "[0]", "Blocked", "[1]", "Failed", "[2]", "[3]",
    ]  # fmt: skip
    assert "The content filter blocked the prompt at level 1 (severe)." in seen.text
    assert repr(made) == "Gallery(2 images, 1 blocked, 1 failed, sandbox; list price 0.12 CNY)"
    assert made.results == tuple(results)


def test_what_stream_many_gives_is_put_in_order(generator):
    made = gallery([(2, result(image(id="c"))), (0, BLOCKED), (1, result(image(id="b")))])
    assert [getattr(item, "image", None) and item.image.id for item in made.results] == [None, "b", "c"]
    seen = shown(gallery(generator.stream_many(["x", "y", "z"])))
    assert [text for text in seen.texts if text.startswith("[")] == ["[0]", "[1]", "[2]"]


def test_an_index_that_stream_many_gave_stays():
    assert "[7]" in shown(gallery([(7, BLOCKED)])).texts


@pytest.mark.parametrize(
    "as_input",
    [
        lambda generated: generated,
        lambda generated: [generated],
        lambda generated: generated.images,
        lambda generated: generated.images[0],
        lambda generated: generated.to_artifact(),
        lambda generated: json.loads(json.dumps([generated.to_artifact()])),
        lambda generated: iter([generated]),
    ],
)
def test_it_takes_results_images_and_artifacts(as_input, sandbox, tmp_path):
    generated = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path).invoke("a kitten")
    assert len(shown(gallery(as_input(generated))).images()) == 1


def test_it_takes_an_agents_output(generator):
    from langchain_core.messages import AIMessage, ToolMessage

    artifact = generator.invoke("x").to_artifact()
    output = {"messages": [AIMessage("hi"), ToolMessage("made", tool_call_id="1", artifact=artifact)]}
    assert repr(gallery(output)) == "Gallery(1 image, sandbox; list price 0.06 CNY)"


def test_errors_and_records_of_failures_are_tiles():
    failure = ImageFailure(index=0, error="CogViewContentFilterError", message="It was blocked.")
    seen = shown(gallery([BLOCKED, CogViewBalanceError(), ValueError("odd"), failure, {"type": "other"}]))
    assert seen.texts.count("Blocked") == 2
    assert seen.texts.count("Failed") == 3
    assert "ValueError: odd" in seen.text
    assert "This is not an artifact of a CogView result." in seen.text
    assert shown(gallery(BLOCKED)).texts.count("Blocked") == 1


@pytest.mark.parametrize("of", [gallery, BatchResults])
def test_a_label_is_the_code_that_finds_the_image(of):
    failure = ImageFailure(index=1, error="X", message="Nope.")
    prompts = {"one": "[0]", "two": "[1].images[0]", "three": "[1].images[1]"}
    results = [result(image(prompt="one")), result(image(prompt="two"), image(prompt="three"), failures=(failure,))]
    seen = shown(of(results))
    labels = [text for text in seen.texts if text.startswith("[")]
    assert labels == [*prompts.values(), "[1].failures[0]"]
    for prompt, label in prompts.items():
        found = eval(f"results{label}")
        assert getattr(found, "image", found).prompt == prompt


@pytest.mark.parametrize("items", [[1], ["a.png"], [None], [(1, 2, 3)], 5])
def test_what_it_cannot_show_is_an_error(items):
    with pytest.raises(CogViewInvalidRequestError, match="A gallery takes"):
        gallery(items)


def test_an_empty_one_is_one():
    assert repr(gallery([])) == "Gallery(0 images)"
    assert shown(gallery([])).text == "0 images"


def test_the_cost_is_shown_and_what_is_unknown_is_not_zero():
    paid = {"cost": Decimal("0.06"), "currency": "CNY"}
    assert repr(gallery([image(**paid), image(**paid)])) == "Gallery(2 images, 0.12 CNY)"
    assert repr(gallery([image(**paid), image()])) == "Gallery(2 images, 0.06 CNY and 1 of unknown price)"
    assert repr(gallery([image(sandbox=True, **paid), image(cached=True, **paid)])) == "Gallery(2 images)"
    assert gallery([image(**paid)]).charges.amounts == {"CNY": Decimal("0.06")}


@pytest.mark.parametrize(
    "count", [1, pytest.param(12, marks=pytest.mark.heavy), pytest.param(100, marks=pytest.mark.heavy), 300]
)
def test_it_is_at_most_150_kilobytes(count, tmp_path):
    made = gallery(photos(tmp_path, min(count, 12), prompt="😀" * 500) * (count // 12 or 1))
    assert size(made) <= 150_000
    seen = shown(made)
    assert len(seen.images()) == min(12 * (count // 12) or 1, 100)
    if count == 300:
        assert "the last 200 are not shown here: save('gallery.html') writes all" in seen.text


@pytest.mark.parametrize("text", [EVIL, "猫" * 3000, '"&' * 1000])
def test_it_stays_so_whatever_the_texts_are(text, tmp_path):
    facts = {"prompt": text, "model": text, "warnings": (text,), "content_filter": (ContentFilter(text, 0),)}
    items = [*photos(tmp_path, 3, **facts), *[image(**facts), ValueError(text)] * 60]
    made = gallery(items)
    assert size(made) <= 150_000
    assert_harmless(made._repr_mimebundle_()["text/html"])


def test_files_are_read_when_it_is_made_and_not_when_it_is_shown(tmp_path):
    made = gallery(photos(tmp_path, 3))
    for path in tmp_path.iterdir():
        path.unlink()
    assert len(shown(made).images()) == 3
    made.save(tmp_path / "page")
    assert len(Seen((tmp_path / "page.html").read_text()).images()) == 3


def test_a_file_that_is_gone_is_reported_in_its_tile(tmp_path):
    seen = shown(gallery([image(PHOTO, path=tmp_path / "gone.png")]))
    assert "The saved file gone.png cannot be read" in seen.text


def test_an_image_that_was_not_fetched_is_not_fetched(sandbox):
    generated = CogViewImageGenerator(base_url=sandbox.base_url, download=False).invoke("x")
    before = len(sandbox.requests)
    seen = shown(gallery([generated]))
    assert len(sandbox.requests) == before
    assert seen.all("a")[0]["href"] == generated.url


def test_without_pillow_small_originals_are_shown_and_others_named(generator, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    generated = generator.invoke("x")
    made = gallery([generated, with_content(image(PHOTO), PHOTO, None)])
    html = made._repr_mimebundle_()["text/html"]
    assert html.count("<img") == 1
    assert "needs Pillow" in html


# --- the page


def test_the_saved_page_stands_alone(tmp_path):
    made = gallery([*photos(tmp_path, 2, prompt=EVIL), BLOCKED])
    path = made.save(str(tmp_path / "page.html"), title=EVIL)
    assert path == tmp_path / "page.html"
    text = path.read_text(encoding="utf-8")
    seen = assert_harmless(text, *OF_A_PAGE)
    assert len(seen.images()) == 2
    assert min(decoded.width for decoded in seen.images()) > 200
    assert "http" not in text.replace("http-equiv", "")
    assert str(tmp_path) not in text


def test_a_page_of_many_holds_them_all(tmp_path):
    made = gallery(photos(tmp_path, 1) * 200)
    assert len(Seen(made.save(tmp_path / "all.html").read_text()).all("img")) == 200


def test_a_page_that_cannot_be_written_is_our_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CogViewStorageError, match="gallery could not be written"):
        gallery([BLOCKED]).save(tmp_path / "file" / "page.html")


def test_the_contact_sheet_of_a_job_is_harmless_too(tmp_path):
    tiles = [Tile(EVIL, EVIL, "javascript:alert(1)"), Tile(EVIL, EVIL, reason=EVIL)]
    (tmp_path / "index.html").write_bytes(b"".join(contact_sheet(tiles, title=EVIL, facts=[EVIL])))
    seen = Seen((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert not {tag for tag, _ in seen.tags} & {"script", "svg", "iframe"}
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]


# --- compare


async def compared(how, *args, **kwargs):
    return await acompare(*args, **kwargs) if how == "async" else await asyncio.to_thread(compare, *args, **kwargs)


both = pytest.mark.parametrize("how", ["sync", "async"])


@both
async def test_every_combination_is_generated_into_a_labelled_table(how, sandbox):
    made = await compared(
        how, "a fox", sizes=["square", "16:9"], qualities=["standard", "hd"], models=["cogview-4-250304", "glm-image"],
        base_url=sandbox.base_url,
    )  # fmt: skip
    seen = shown(made)
    assert [item for item in seen.texts if item in {"square", "16:9"}] == ["square", "16:9"]
    labels = ["cogview-4-250304 · standard", "cogview-4-250304 · hd", "glm-image · standard", "glm-image · hd"]
    assert [item for item in seen.texts if item in labels] == labels
    assert len(seen.all("tr")) == 5
    assert [(item.model, item.size, item.quality) for item in made.results if isinstance(item, ImageResult)] == [
        ("cogview-4-250304", "1024x1024", "standard"), ("cogview-4-250304", "1344x768", "standard"),
        ("cogview-4-250304", "1024x1024", "hd"), ("cogview-4-250304", "1344x768", "hd"),
        ("glm-image", "1280x1280", "hd"), ("glm-image", "1728x960", "hd"),
    ]  # fmt: skip
    assert "glm-image accepts only quality 'hd'" in seen.text
    assert repr(made) == "Gallery(6 images, 2 failed, sandbox; list price 0.44 CNY)"
    assert "a fox" in seen.text


@both
async def test_an_illegal_combination_sends_nothing(how, sandbox):
    made = await compared(how, "a fox", sizes=["100x100", "nonsense"], base_url=sandbox.base_url)
    assert sandbox.requests == []
    assert repr(made) == "Gallery(0 images, 2 failed)"
    assert "nearest legal size is 512x512" in shown(made).text


@both
async def test_one_kind_of_setting_is_one_row(how, generator):
    made = await compared(how, "x", qualities=("standard", "hd"), generator=generator, size="512x512")
    assert len(shown(made).all("tr")) == 2
    assert [(item.size, item.quality) for item in made.results] == [("512x512", "standard"), ("512x512", "hd")]


@both
async def test_a_blocked_one_does_not_cost_the_others(how, generator, sandbox):
    sandbox.fail_next("content-filter")
    made = await compared(how, "x", sizes=["square", "16:9"], generator=generator)
    assert repr(made) == "Gallery(1 image, 1 blocked, sandbox; list price 0.06 CNY)"


@both
@pytest.mark.parametrize("settings", [{}, {"sizes": []}, {"sizes": ["square"], "models": ()}])
async def test_nothing_to_compare_is_an_error(how, settings, generator):
    with pytest.raises(CogViewInvalidRequestError, match="nothing to compare"):
        await compared(how, "x", generator=generator, **settings)


def test_one_name_is_a_list_of_one(generator):
    assert len(compare("x", sizes="square", generator=generator).results) == 1


def test_several_images_for_each_combination_stand_in_its_cell(generator):
    made = compare("x", sizes=["square", "16:9"], generator=generator, n=2)
    assert len(shown(made).images()) == 4
    assert len(shown(made).all("td")) == 2
    assert isinstance(made, Gallery)


def test_a_table_is_small_and_harmless(generator, tmp_path):
    made = compare(EVIL, sizes=[EVIL, "square", "16:9"], qualities=["standard", "hd", EVIL], generator=generator)
    assert size(made) <= 150_000
    assert_harmless(made._repr_mimebundle_()["text/html"])
    assert_harmless(Path(made.save(tmp_path / "table.html")).read_text(encoding="utf-8"), *OF_A_PAGE)


def test_the_tile_of_a_blocked_prompt_says_which_it_was(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url)
    shown = gallery(generator.batch(["a fox", "[[content-filter]] <b>x</b>"], return_exceptions=True))
    assert "[[content-filter]] &lt;b&gt;x&lt;/b&gt;" in shown._repr_mimebundle_()["text/html"]
