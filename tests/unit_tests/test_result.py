"""What a result gives, and what survives of it."""

import asyncio
import io
import json
import os
import pickle
import sys
import warnings
from datetime import UTC, datetime

import pytest
from langchain_core.messages import AIMessage, ToolMessage
from PIL import Image

from langchain_cogview import (
    CogViewDownloadError,
    CogViewImageGenerator,
    CogViewInvalidRequestError,
    CogViewStorageError,
    GeneratedImage,
    ImageResult,
    images_from_messages,
)
from langchain_cogview.images.download import expires_at
from langchain_cogview.result import with_content


@pytest.fixture
def result(generator):
    return generator.invoke({"prompt": "a kitten", "size": "512x512"})


@pytest.fixture
def saved(sandbox, tmp_path):
    return CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path, size="512x512").invoke("a kitten")


def test_the_repr_is_short_and_shows_no_url(result):
    assert repr(result) == (
        f"ImageResult(images=[GeneratedImage(id='{result.images[0].id}', prompt='a kitten', size='512x512', "
        "cost='sandbox, no cost')], model='cogview-4-250304')"
    )
    assert "http" not in str(result)


def test_the_first_image_can_be_read_from_the_result(result):
    for name in (
        "url",
        "expires_at",
        "path",
        "mime_type",
        "width",
        "height",
        "size_bytes",
        "sha256",
        "request_id",
        "created",
    ):
        assert getattr(result, name) == getattr(result.images[0], name)
    assert result.read() == asyncio.run(result.aread()) == result.images[0].read()
    assert result.to_pil().size == (512, 512)


def test_save_writes_the_bytes_as_they_came_and_returns_the_path(result, tmp_path):
    assert result.save(tmp_path / "kitten.png") == tmp_path / "kitten.png"
    assert (tmp_path / "kitten.png").read_bytes() == result.read()
    assert result.save(tmp_path / "new" / "kitten") == tmp_path / "new" / "kitten.png"
    assert result.save(tmp_path) == tmp_path / f"{result.images[0].id}.png"
    assert sorted(path.name for path in tmp_path.rglob(".cogview*")) == []


def test_save_numbers_several_images(generator, tmp_path):
    many = generator.invoke({"prompt": "x", "n": 3, "size": "512x512"})
    many.save(str(tmp_path / "k.png"))
    assert {path.name for path in tmp_path.iterdir()} == {"k.png", "k-2.png", "k-3.png"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="This system has no named pipes")
def test_save_into_a_folder_waits_for_no_pipe_and_writes_through_no_link(result, tmp_path):
    name = f"{result.image.id}.png"
    os.mkfifo(tmp_path / name)
    assert result.save(tmp_path).read_bytes() == result.read()
    (tmp_path / "victim").write_text("untouched")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "victim")
    assert result.save(tmp_path).read_bytes() == result.read()
    assert (tmp_path / "victim").read_text() == "untouched"


def test_save_into_a_folder_that_cannot_be_written_is_our_error(result, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CogViewStorageError, match="could not be written"):
        result.save(tmp_path / "file" / "kitten.png")


def test_the_artifact_is_plain_json_without_bytes_and_comes_back_equal(result, saved):
    for item in (result, saved):
        artifact = item.to_artifact()
        text = json.dumps(artifact)
        assert json.loads(text) == artifact
        assert len(text) < 3000
        assert (artifact["type"], artifact["version"]) == ("cogview.image_result", 1)
        back = ImageResult.from_artifact(json.loads(text))
        assert back == item
        assert hash(back.images[0]) == hash(item.images[0])
    assert ImageResult.from_artifact(saved.to_artifact()).read() == saved.read()


def test_the_artifact_has_the_documented_keys(result):
    from langchain_cogview import artifact as documented

    artifact = result.to_artifact()
    assert set(artifact) == set(documented.ImageArtifact.__annotations__)
    assert set(artifact["images"][0]) == set(documented.GeneratedImageArtifact.__annotations__)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"type": "other"},
        {"type": "cogview.image_result", "version": 2},
        {"type": "cogview.image_result", "version": 1},
        [],
        "x",
    ],
)
def test_what_is_not_an_artifact_is_an_error(value):
    with pytest.raises(CogViewInvalidRequestError):
        ImageResult.from_artifact(value)


def test_a_pickled_result_keeps_its_bytes(result):
    assert pickle.loads(pickle.dumps(result)).read() == result.read()


def test_a_saved_file_that_is_gone_is_reported(saved):
    saved.path.unlink()
    with pytest.raises(CogViewStorageError, match="cannot be read"):
        saved.read()


def test_an_image_without_file_and_url_is_reported():
    image = GeneratedImage(id="1", request_id="1", model="m", prompt="p")
    for read in (image.read, lambda: asyncio.run(image.aread())):
        with pytest.raises(CogViewDownloadError, match="neither a file nor a URL"):
            read()


def test_images_are_found_in_an_agents_messages(result):
    messages = [
        AIMessage("x"),
        ToolMessage("x", tool_call_id="1", artifact=result.to_artifact()),
        ToolMessage("y", tool_call_id="2"),
        ToolMessage("y", tool_call_id="3", artifact={"other": 1}),
    ]
    assert images_from_messages(messages) == list(result.images)
    assert images_from_messages({"messages": messages}) == list(result.images)
    assert images_from_messages([]) == []


def test_without_pillow_a_text_names_the_extra(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        ImportError, match=r'to_pil needs Pillow. Install it with: pip install "langchain-cogview\[images\]"'
    ):
        result.to_pil()
    with pytest.raises(ImportError, match=r"^show needs Pillow\."):
        result.show()


@pytest.mark.parametrize(("name", "form"), [("x.jpg", "JPEG"), ("x.JPG", "JPEG"), ("x.webp", "WEBP"), ("x.png", "PNG")])
def test_save_writes_the_format_that_the_ending_names(result, tmp_path, name, form):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = [result.save(tmp_path / name), result.image.save(tmp_path / f"image-{name}")]
    for path in paths:
        with Image.open(path) as saved:
            saved.load()
            assert (saved.format, saved.size) == (form, (result.width, result.height))


def test_a_transparent_image_becomes_a_jpeg_on_white(tmp_path):
    out = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(out, "PNG")
    image = with_content(GeneratedImage(id="a", request_id="a", model="m", prompt="p"), out.getvalue())
    with Image.open(image.save(tmp_path / "x.jpg")) as saved:
        assert saved.convert("RGB").getpixel((5, 5)) == (255, 255, 255)


def test_without_pillow_the_bytes_are_saved_as_they_are_and_a_warning_says_so(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.warns(UserWarning, match=r"x\.jpg holds a PNG image.* needs Pillow\. Install it") as caught:
        path = result.save(tmp_path / "x.jpg")
    assert path.read_bytes() == result.image.read()
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"x\.gif holds a PNG image"):
        result.save(tmp_path / "x.gif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert result.save(tmp_path / "x").name == "x.png"
        (tmp_path / "folder.jpg").mkdir()
        assert result.save(tmp_path / "folder.jpg").suffix == ".png"


def test_a_link_says_when_it_expires():
    assert expires_at("https://x/y.png?UCloudPublicKey=R&Signature=R&Expires=1762327333") == datetime.fromtimestamp(
        1762327333, UTC
    )
    for url in (
        "https://x/y.png",
        "https://x/?Expires=soon",
        "https://x/?Expires=" + "9" * 40,
        "https://[",
        "https://x/?" + "a=b&" * 200,
    ):
        assert expires_at(url) is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_result_in_a_folder_whose_name_is_not_utf8_can_be_written_as_json(tmp_path):
    folder = tmp_path / os.fsdecode(b"folder-\xff")
    result = CogViewImageGenerator(base_url="sandbox:", output_dir=folder).invoke("a fox")
    assert result.images[0].path.parent == folder
    for text in (result.model_dump_json(), json.dumps(result.to_artifact(), ensure_ascii=False)):
        assert "folder-?" in text.encode().decode()


def test_the_repr_of_a_saved_image_has_the_path_as_it_can_be_used(saved):
    assert f"path='{saved.path}'" in repr(saved)
    assert saved.path.is_file()
