"""Standard content blocks: what a chat model is shown of an image, from a chain and from an agent's tool."""

import asyncio
import base64
import hashlib
import io
import os
import sys
import warnings
from datetime import UTC, datetime, timedelta

import pytest
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from PIL import Image
from pydantic import PrivateAttr

from langchain_cogview import (
    CogViewDownloadError,
    CogViewExpiredURLError,
    CogViewImageGenerator,
    CogViewImageTool,
    CogViewInvalidRequestError,
    CogViewStorageError,
    GeneratedImage,
    ImageResult,
    images_from_messages,
    to_message,
)

both = pytest.mark.parametrize("how", ["sync", "async"])


@pytest.fixture
def result(sandbox, tmp_path):
    return CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path).invoke("a kitten")


def block(image, how, *source):
    return image.content_block(*source) if how == "sync" else asyncio.run(image.acontent_block(*source))


def run(runnable, how, value):
    return runnable.invoke(value) if how == "sync" else asyncio.run(runnable.ainvoke(value))


def tool_call(tool, prompt="a kitten"):
    return {"type": "tool_call", "id": "1", "name": tool.name, "args": {"prompt": prompt}}


def recorded(path, content, **fields):
    """An image as its record says, which may have been written by anybody."""
    if path is not None:
        path.write_bytes(content)
    return GeneratedImage(id="1f", request_id="r", model="m", prompt="p", path=path, **fields)


def noise(side):
    out = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(side * side * 3)).save(out, "PNG", compress_level=0)
    return out.getvalue()


# --- blocks of an image


@both
def test_a_block_has_all_bytes_of_the_saved_file_and_its_type(result, how):
    made = block(result.image, how)
    assert {name: made[name] for name in ("type", "mime_type", "id")} == {
        "type": "image", "mime_type": "image/png", "id": result.image.id
    }  # fmt: skip
    assert base64.b64decode(made["base64"]) == result.path.read_bytes()


@both
def test_a_thumbnail_is_a_small_jpeg(result, how):
    made = block(result.image, how, "thumbnail")
    content = base64.b64decode(made["base64"])
    image = Image.open(io.BytesIO(content))
    assert (image.format, made["mime_type"]) == ("JPEG", "image/jpeg")
    assert max(image.size) <= 512
    assert len(content) <= 60_000


@both
def test_a_url_block_has_the_link_and_reads_no_file(sandbox, how):
    image = CogViewImageGenerator(base_url=sandbox.base_url, download=False).invoke("a kitten").image
    assert block(image, how, "url")["url"] == image.url


@both
def test_an_image_that_is_too_large_for_chat_models_becomes_a_thumbnail_with_a_warning(tmp_path, how):
    image = recorded(tmp_path / "large.png", noise(1900))
    with pytest.warns(UserWarning, match=r"10\.\d MB, more than the 10 MB"):
        made = block(image, how)
    assert made["mime_type"] == "image/jpeg"
    assert len(made["base64"]) < 100_000


@both
def test_without_pillow_a_thumbnail_names_the_extra_and_the_bytes_still_make_a_block(result, how, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"langchain-cogview\[images\]"):
        block(result.image, how, "thumbnail")
    assert block(result.image, how)["base64"]


@both
def test_a_record_without_bytes_or_link_says_what_to_do(how):
    image = GeneratedImage(id="1f", request_id="r", model="m", prompt="p")
    with pytest.raises(CogViewDownloadError, match="no URL") as caught:
        block(image, how, "url")
    assert "base64" in caught.value.hint
    with pytest.raises(CogViewDownloadError, match="neither a file nor a URL"):
        block(image, how)


@both
def test_a_link_whose_time_is_over_makes_no_block(how):
    ended = datetime.now(UTC) - timedelta(minutes=1)
    with pytest.raises(CogViewExpiredURLError, match="ended at"):
        block(recorded(None, b"", url="https://example.com/a.png", expires_at=ended), how, "url")


@pytest.mark.parametrize("url", ["http://169.254.169.254/a", "https://127.0.0.1/a", "file:///etc/passwd", "data:,x"])
def test_a_foreign_link_that_may_not_be_opened_makes_no_block(url):
    with pytest.raises(CogViewDownloadError):
        recorded(None, b"", url=url).content_block("url")


@both
def test_a_block_reads_files_by_the_same_rules_as_everything_else(tmp_path, how):
    content = noise(8)
    other = recorded(tmp_path / "a.png", content, sha256=hashlib.sha256(b"other").hexdigest())
    with pytest.raises(CogViewStorageError, match="not the image that is recorded"):
        block(other, how)
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(CogViewStorageError):
        block(other.model_copy(update={"path": tmp_path / "link.png", "sha256": None}), how)
    outside = ImageResult(images=(other,), prompt="p", model="m").to_artifact()
    (inside,) = ImageResult.from_artifact(outside, within=tmp_path / "images").images
    with pytest.raises(CogViewStorageError, match="cannot be read"):
        block(inside, how)


def test_bytes_that_are_no_whole_image_make_no_block(sandbox, tmp_path):
    with pytest.raises(CogViewStorageError, match="not an image"):
        recorded(tmp_path / "a.png", b"\x89PNG").content_block()


def test_another_source_is_refused_by_name(result):
    with pytest.raises(CogViewInvalidRequestError, match="'jpeg'"):
        result.image.content_block("jpeg")


# --- chains


class Seeing(FakeMessagesListChatModel):
    """Answers, and keeps what it was sent."""

    _requests: list = PrivateAttr(default_factory=list)

    def _generate(self, messages, *args, **kwargs):
        self._requests.append(messages)
        return super()._generate(messages, *args, **kwargs)


@both
def test_a_chain_puts_every_image_before_a_chat_model(sandbox, how):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, n=2)
    model = Seeing(responses=[AIMessage("A heron.")])
    chain = ChatPromptTemplate.from_template("A watercolour of {animal}") | generator | to_message | model
    assert run(chain, how, {"animal": "a heron"}).content == "A heron."
    (message,) = model._requests[0]
    assert isinstance(message, HumanMessage)
    assert [item["type"] for item in message.content] == ["image", "image"]


@both
def test_a_chain_chooses_the_text_and_the_kind_of_block(sandbox, how):
    model = Seeing(responses=[AIMessage("Yes.")])
    seen = to_message.bind(text="Is it a heron?", source="thumbnail")
    run(CogViewImageGenerator(base_url=sandbox.base_url) | seen | model, how, "a heron")
    (message,) = model._requests[0]
    assert message.content[0] == {"type": "text", "text": "Is it a heron?"}
    assert message.content[1]["mime_type"] == "image/jpeg"
    assert [item["type"] for item in message.content_blocks] == ["text", "image"]


@both
def test_an_error_in_a_chain_says_where_the_paid_image_is(sandbox, tmp_path, how, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    chain = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path) | to_message.bind(source="thumbnail")
    with pytest.raises(ImportError) as caught:
        run(chain, how, "a heron")
    (path,) = tmp_path.iterdir()
    assert str(path) in caught.value.__notes__[0]


@both
def test_a_chain_refuses_what_is_no_result(how):
    with pytest.raises(CogViewInvalidRequestError, match="of type str"):
        run(to_message, how, "a heron")


# --- tools


@both
@pytest.mark.parametrize(("content_format", "mime_type"), [("image", "image/png"), ("thumbnail", "image/jpeg")])
def test_a_tool_puts_images_before_the_model_and_none_into_the_artifact(
    sandbox, tmp_path, content_format, mime_type, how
):
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path, content_format=content_format, n=2)
    message = run(tool, how, tool_call(tool))
    assert [item["type"] for item in message.content] == ["text", "image", "image"]
    assert {item["mime_type"] for item in message.content[1:]} == {mime_type}
    assert [item["id"] for item in message.content[1:]] == [item["id"] for item in message.artifact["images"]]
    assert "cannot see" not in message.content[0]["text"]
    assert not message.artifact["warnings"]
    assert len(str(message.artifact)) < 4000


@both
def test_an_image_that_is_only_in_memory_is_shown_too(sandbox, how):
    tool = CogViewImageTool(generator=CogViewImageGenerator(base_url=sandbox.base_url), content_format="image")
    message = run(tool, how, tool_call(tool))
    assert message.content[1]["mime_type"] == "image/png"
    assert images_from_messages([message])[0].read() == base64.b64decode(message.content[1]["base64"])


@both
def test_a_block_that_cannot_be_made_costs_no_image(sandbox, tmp_path, how, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path, content_format="thumbnail")
    message = run(tool, how, tool_call(tool))
    (text,) = message.content
    assert "You cannot see it" in text["text"]
    assert len(text["text"]) <= 500
    (warning,) = message.artifact["warnings"]
    assert "langchain-cogview[images]" in warning
    assert message.artifact["images"][0]["warnings"] == [warning]
    assert images_from_messages([message])[0].read()


@both
def test_a_large_image_becomes_a_thumbnail_with_a_warning_on_the_artifact(sandbox, tmp_path, how, monkeypatch):
    monkeypatch.setattr("langchain_cogview.blocks.MAX_BASE64_BYTES", 1000)
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path, content_format="image")
    with warnings.catch_warnings(record=True) as caught:
        message = run(tool, how, tool_call(tool))
    assert not caught
    assert message.content[1]["mime_type"] == "image/jpeg"
    assert "the block has a thumbnail" in message.artifact["warnings"][0]


@both
def test_an_image_that_is_not_fetched_is_shown_by_its_link(sandbox, how):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, download=False)
    tool = CogViewImageTool(generator=generator, content_format="image")
    message = run(tool, how, tool_call(tool))
    assert message.content[1]["url"] == message.artifact["images"][0]["url"]
    tool = CogViewImageTool(generator=generator, content_format="thumbnail")
    message = run(tool, how, tool_call(tool))
    assert "cannot see it" in message.content[0]["text"]
    assert "not fetched" in message.artifact["warnings"][0]


def test_the_description_says_whether_the_model_sees_the_image(sandbox):
    def description(**settings):
        return CogViewImageTool(base_url=sandbox.base_url, **settings).description

    assert "not the image" in description()
    assert "not the image" in description(content_format="image_url")
    assert "the image to look at" in description(content_format="thumbnail")
    assert description(content_format="thumbnail", shown_to_user=True).endswith("shows the image to the user.")
    assert description(content_format="image", description="Draws.") == "Draws."
