"""Images that come in the reply itself are decoded as they come, bounded, and saved like those that are fetched."""

import asyncio
import base64
import errno
import gzip
import json
import threading
import tracemalloc
import zlib
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_cogview import CogViewImageGenerator, CogViewImageTool, collect_image_costs, run_job
from langchain_cogview.api.endpoint import MAX_IMAGE_BYTES, MAX_REPLY_BYTES, ReplyBody
from langchain_cogview.api.protocol import ReplyContext, read_reply
from langchain_cogview.api.tasks import read_submitted, read_task
from langchain_cogview.errors import CogViewMalformedReplyError
from langchain_cogview.images import store
from tests.conftest import FAKE_KEY
from tests.faults.reply_table import says, sends
from tests.faults.sample_images import png
from tests.faults.server import IMAGE, FaultServer

HOWS = pytest.mark.parametrize("how", ["sync", "async"])
LARGE = png(600, 600, noise="body")
"""A megabyte: its base64 is longer than a reply without images may be."""


def read(raw, encoding="", size=65_536):
    """The reply of a body that comes in chunks."""
    body = ReplyBody(encoding)
    for start in range(0, len(raw), size):
        if not body.add(raw[start : start + size]):
            break
    content = body.json()
    return None if content is None else read_reply(200, content, ReplyContext("https://api.example/v1", body.images))


def b64(content):
    return base64.b64encode(content).decode()


def lines(text, end):
    return end.join(text[start : start + 76] for start in range(0, len(text), 76))


FORMS = {
    "plain": lambda content: json.dumps({"data": [{"b64_json": b64(content)}]}),
    "behind other fields": lambda content: json.dumps(
        {
            "created": 1,
            "data": [{"revised_prompt": 'a "quoted" \\ cat 猫', "b64_json": b64(content)}],
            "usage": {"n": 1},
        }
    ),
    "a data URL": lambda content: json.dumps({"data": [{"url": f"data:image/png;base64,{b64(content)}"}]}),
    "a data URL with parameters": lambda content: json.dumps(
        {"data": [{"url": f" DATA:image/png;charset=utf-8;BASE64,{b64(content)}"}]}
    ),
    "a data URL as b64_json": lambda content: json.dumps({"data": [{"b64_json": f"data:;base64,{b64(content)}"}]}),
    "a percent-encoded data URL": lambda content: json.dumps(
        {"data": [{"url": f"data:image/png;base64,{quote(b64(content), safe='')}"}]}
    ),
    "a data URL without base64": lambda content: json.dumps(
        {"data": [{"url": f"data:image/png,{quote(content, safe='')}"}]}
    ),
    "urlsafe": lambda content: json.dumps({"data": [{"b64_json": base64.urlsafe_b64encode(content).decode()}]}),
    "without padding": lambda content: json.dumps({"data": [{"b64_json": b64(content).rstrip("=")}]}),
    "in lines": lambda content: json.dumps({"data": [{"b64_json": lines(b64(content), "\n")}]}),
    "in lines of DOS": lambda content: json.dumps({"data": [{"b64_json": "  " + lines(b64(content), "\r\n") + " "}]}),
    "with escaped slashes": lambda content: json.dumps({"data": [{"b64_json": b64(content)}]}).replace("/", "\\/"),
    "with escaped plus signs": lambda content: (
        json.dumps({"data": [{"b64_json": b64(content)}]}).replace("+", "\\u002B").replace("=", "\\u003d")
    ),
    "beside a null address": lambda content: json.dumps({"data": [{"url": None, "b64_json": b64(content)}]}),
    "as an object": lambda content: json.dumps({"data": {"b64_json": b64(content)}}),
}


@pytest.mark.parametrize(
    "content", [IMAGE, IMAGE[:-1], IMAGE[:-2], LARGE], ids=["small", "one less", "two less", "large"]
)
@pytest.mark.parametrize("form", FORMS)
def test_image_data_is_found_in_every_form_that_gateways_send(form, content):
    raw = FORMS[form](content).encode()
    members = gzip.compress(raw[:700], 1) + gzip.compress(raw[700:], 1)
    packings = [
        ("", raw),
        ("gzip", members + b"\0\0 behind"),
        ("gzip", gzip.compress(raw, 1)),
        ("deflate", zlib.compress(raw, 1)),
        ("gzip", members),
    ]
    for encoding, packed in packings[
        : 2 if content is LARGE else None
    ]:  # a large one passes through the same, in more chunks
        reply = read(packed, encoding)
        assert reply.content == content
        assert reply.urls == ()
        assert len(repr(reply)) < 300


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=1, max_size=60_000), st.integers(1, 30_000), st.sampled_from(sorted(FORMS)))
def test_it_does_not_matter_how_a_reply_is_cut_into_chunks(content, size, form):
    assert read(FORMS[form](content).encode(), size=size).content == content


@settings(deadline=None, max_examples=60)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=30)
    | st.builds(lambda text, times: text * times, st.text(max_size=8), st.integers(1, 6000)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
), st.integers(1, 70_000), st.booleans())  # fmt: skip
def test_json_without_image_data_stays_as_it_was(value, size, ascii_only):
    raw = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    body = ReplyBody()
    assert all(body.add(raw[start : start + size]) for start in range(0, len(raw), size))
    assert body.json() == raw
    assert body.images == ()


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=400), st.sampled_from(["", "gzip", "deflate", "br"]))
def test_any_bytes_are_a_body_or_none(raw, encoding):
    body = ReplyBody(encoding)
    body.add(raw)
    body.json()


def test_a_reply_is_bounded_with_and_without_image_data():
    assert read(b'{"data":[{"url":"https://a/b.png"}],"x":"' + b"x.y" * (MAX_REPLY_BYTES // 3) + b'"}') is None
    assert read(b'{"data":[{"url":"https://a/b.png"}],"x":"' + b"A" * MAX_REPLY_BYTES + b'"}') is None
    assert read(b" " * (MAX_REPLY_BYTES + 1)) is None
    assert read(gzip.compress(bytes(5_000_000)), "gzip") is None
    assert read(gzip.compress(b"xyz")[:-9], "gzip") is None
    assert read(b"x", "br") is None
    whole = bytes(MAX_IMAGE_BYTES - 3)
    assert len(read(FORMS["plain"](whole).encode()).content) == len(whole)
    assert read(FORMS["plain"](whole + b"1234").encode()) is None
    assert read(gzip.compress(FORMS["plain"](whole + b"1234").encode(), 1), "gzip") is None
    assert read(b'{"data":[{"b64_json":"' + b"A" * 20_000 + b"\\n" * MAX_IMAGE_BYTES * 2 + b'"}]}') is None


@pytest.mark.parametrize(
    "form", ["plain", *(pytest.param(form, marks=pytest.mark.heavy) for form in ("with escaped slashes", "in lines"))]
)
def test_a_reply_of_20_mb_takes_no_more_memory_than_itself(form):
    content = png(200, 200, noise="memory") * 170  # 20 MB of what does not compress
    raw = FORMS[form](content).encode()
    tracemalloc.start()
    try:
        body = ReplyBody()
        for start in range(0, len(raw), 65_536):
            body.add(raw[start : start + 65_536])
        reply = read_reply(200, body.json(), ReplyContext("", body.images))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reply.content == content
    assert peak < len(raw) * 1.2


@pytest.mark.parametrize("text", ["!!!!", "=", "A", "", "not base64!", "ÿÿÿÿ", "!" + b64(IMAGE), b64(LARGE) + "!"])
def test_what_is_not_base64_is_not_an_image(text):
    for item in ({"b64_json": text}, {"url": f"data:image/png;base64,{text}"}):
        with pytest.raises(CogViewMalformedReplyError):
            read(json.dumps({"data": [item]}).encode())
        item["url"] = "https://images.example/a.png"
        reply = read(json.dumps({"data": [item]}).encode())
        assert reply.urls == ("https://images.example/a.png",)


def test_of_several_images_in_a_reply_the_first_is_used_and_the_others_are_named_in_a_warning():
    raw = json.dumps({"data": [{"b64_json": b64(IMAGE)}, {"b64_json": b64(LARGE)}, {"url": "https://a.example/b.png"}]})
    reply = read(raw.encode())
    assert reply.content == IMAGE
    assert reply.unasked_urls == ("https://a.example/b.png",)
    assert any("2 more images" in warning for warning in reply.warnings)


@pytest.mark.parametrize("read_one", [read_task, read_submitted])
def test_a_task_may_end_with_image_data(read_one):
    raw = json.dumps({"id": "7", "task_status": "SUCCESS", "image_result": [{"b64_json": b64(LARGE)}]}).encode()
    body = ReplyBody()
    assert body.add(raw)
    assert read_one(200, body.json(), ReplyContext("", body.images)).reply.content == LARGE


# --- through a generator


def generated(how, server, **settings):
    generator = CogViewImageGenerator(base_url=server.base_url, api_key=FAKE_KEY, **settings)
    return generator.invoke("x") if how == "sync" else asyncio.run(generator.ainvoke("x"))


@HOWS
@pytest.mark.parametrize("content", [IMAGE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("form", ["plain", "a data URL"])
def test_an_image_in_the_reply_is_saved_and_nothing_is_fetched(how, content, form, tmp_path):
    with FaultServer() as server:
        server.api = sends(FORMS[form](content).encode(), 200, "Content-Type: application/json")
        for settings in ({"output_dir": tmp_path}, {}, {"download": False}):
            result = generated(how, server, **settings)
            image = result.images[0]
            assert image.read() == content
            assert (image.url, image.expires_at, image.warnings) == (None, None, ())
            assert image.mime_type == "image/png"
            assert image.size_bytes == len(content)
            text = json.dumps(result.to_artifact()) + repr(result) + result.model_dump_json()
            assert b64(content)[:40] not in text
            assert "data:" not in text
            if settings.get("output_dir"):
                assert image.path.read_bytes() == content
                assert image.path.parent == tmp_path
        assert (server.posts, server.gets) == (3, 0)


@HOWS
def test_a_broken_image_in_the_reply_is_fetched_where_there_is_an_address(how, tmp_path):
    with FaultServer() as server:
        server.api = says({"data": [{"b64_json": b64(LARGE[:-9]), "url": "IMAGE_URL"}]})
        image = generated(how, server, output_dir=tmp_path).images[0]
        assert image.path.read_bytes() == IMAGE
        assert image.url == server.image_url


@HOWS
@pytest.mark.parametrize(
    "content", [LARGE[:-9], b"<html>no image</html>", b"GIF89a" + bytes(50)], ids=["cut", "HTML", "GIF"]
)
def test_bytes_that_are_no_whole_image_are_not_saved_and_not_lost(how, content, tmp_path):
    with FaultServer() as server:
        server.api = says({"data": [{"b64_json": b64(content)}]})
        result = generated(how, server, output_dir=tmp_path)
    image = result.images[0]
    assert (image.path, image.url, image.mime_type) == (None, None, None)
    assert "whole image" in image.warnings[0]
    assert image.read() == content
    assert list(tmp_path.iterdir()) == []
    assert image.save(tmp_path / "as-it-is").read_bytes() == content
    result._repr_mimebundle_()


@HOWS
def test_a_relative_address_is_fetched_from_the_base_urls_host(how, tmp_path):
    with FaultServer() as server:
        server.api = says({"data": [{"url": "/files/a b.png"}]})
        image = generated(how, server, output_dir=tmp_path).images[0]
        assert image.url == f"{server.origin}/files/a%20b.png"
        assert image.path.read_bytes() == IMAGE


@HOWS
def test_a_folder_that_cannot_be_used_costs_no_image_of_a_reply(how, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with FaultServer() as server:
        server.api = says({"data": [{"b64_json": b64(LARGE)}]})
        image = generated(how, server, output_dir=tmp_path / "file" / "x").images[0]
    assert image.read() == LARGE
    assert "Not a directory" in image.warnings[0]


async def test_a_caller_that_leaves_while_the_bytes_of_a_reply_are_saved_finds_them(tmp_path, monkeypatch):
    reached, go = threading.Event(), threading.Event()
    real = store.ImageFile.save

    def held(*args, **more):
        reached.set()
        assert go.wait(30)
        return real(*args, **more)

    monkeypatch.setattr(store.ImageFile, "save", held)
    with FaultServer() as server:
        server.api = says({"data": [{"b64_json": b64(LARGE)}]})
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=FAKE_KEY, output_dir=tmp_path)
        task = asyncio.create_task(generator.ainvoke("x"))
        await asyncio.to_thread(reached.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()
        for _ in range(3000):
            if list(tmp_path.glob("*.png")):
                break
            await asyncio.sleep(0.01)
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == LARGE


def test_a_tool_says_of_an_image_in_a_reply_what_is_true(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with FaultServer() as server:
        for content, words in (
            (LARGE, "saved as"),
            (LARGE[:-9], "did not arrive as a whole image"),
        ):
            server.api = says({"data": [{"b64_json": b64(content)}]})
            tool = CogViewImageTool(base_url=server.base_url, api_key=FAKE_KEY, output_dir=tmp_path / "file" / "x")
            text = tool.invoke({"prompt": "x"})
            assert words in str(text)
            assert "a link" not in str(text).replace("make up a link", "")


def test_a_job_works_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def link(*_, **__):
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(store.os, "link", link)
    with FaultServer() as server:
        report = run_job(["one", "two"], tmp_path / "job", base_url=server.base_url, api_key=FAKE_KEY)
    assert report.made == 2
    assert [path.read_bytes() for path in (tmp_path / "job").glob("*.png")] == [IMAGE] * 2


def test_a_batch_a_tool_and_a_job_take_images_from_replies(tmp_path):
    with FaultServer() as server:
        server.api = says({"data": [{"b64_json": b64(LARGE)}]})
        settings = {"base_url": server.base_url, "api_key": FAKE_KEY}
        with collect_image_costs() as costs:
            results = CogViewImageGenerator(**settings).batch(["a", {"prompt": "b", "n": 2}])
        assert [image.read() for result in results for image in result.images] == [LARGE] * 3
        assert costs.images == 3
        tool = CogViewImageTool(**settings, output_dir=tmp_path / "tool")
        message = tool.invoke({"type": "tool_call", "id": "1", "name": tool.name, "args": {"prompt": "x"}})
        assert b64(LARGE)[:40] not in message.model_dump_json()
        assert Path(message.artifact["images"][0]["path"]).read_bytes() == LARGE
        report = run_job(["one", "two"], tmp_path / "job", **settings)
        assert report.made == 2
        assert {path.read_bytes() for path in (tmp_path / "job").rglob("*.png")} == {LARGE}
