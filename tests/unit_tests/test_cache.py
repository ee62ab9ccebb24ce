"""The same request gives the same image without paying, and a cache never costs one."""

import asyncio
import inspect
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from langchain_core.caches import BaseCache, InMemoryCache
from langchain_core.outputs import Generation

from langchain_cogview import CogViewConfigurationError, CogViewImageGenerator, ImageRequest
from langchain_cogview.api.sending import sender
from langchain_cogview.cache import UNDATED_URL_LIFETIME, CachedRequest, CacheKey, image_cache
from langchain_cogview.concurrency import Deadline
from langchain_cogview.errors import CogViewError
from langchain_cogview.images.download import fetch

HOWS = pytest.mark.parametrize("how", ["sync", "async"])


class SQLite(BaseCache):
    """A LangChain cache in a file, which serializes its values."""

    def __init__(self, path):
        self.path = str(path)
        with closing(sqlite3.connect(self.path)) as base, base:
            base.execute("CREATE TABLE IF NOT EXISTS entry (prompt, llm, value, PRIMARY KEY (prompt, llm))")

    def lookup(self, prompt, llm_string):
        with closing(sqlite3.connect(self.path)) as base:
            row = base.execute("SELECT value FROM entry WHERE prompt = ? AND llm = ?", (prompt, llm_string)).fetchone()
        return [Generation.model_validate(item) for item in json.loads(row[0])] if row else None

    def update(self, prompt, llm_string, return_val):
        value = json.dumps([item.model_dump() for item in return_val])
        with closing(sqlite3.connect(self.path)) as base, base:
            base.execute("REPLACE INTO entry VALUES (?, ?, ?)", (prompt, llm_string, value))

    def clear(self, **kwargs):
        with closing(sqlite3.connect(self.path)) as base, base:
            base.execute("DELETE FROM entry")


class Down(BaseCache):
    """A cache whose server does not answer."""

    def __init__(self):
        self.calls = 0

    def lookup(self, prompt, llm_string):
        self.calls += 1
        raise ConnectionError("redis://:password@cache:6379 refused")

    def update(self, prompt, llm_string, return_val):
        self.calls += 1
        raise ConnectionError("redis://:password@cache:6379 refused")

    def clear(self, **kwargs):
        raise ConnectionError


class Caller:
    """Calls a generator that has a cache, in the sync or in the async way."""

    def __init__(self, sandbox, cache, how="sync", **settings):
        self.how = how
        self.generator = CogViewImageGenerator(base_url=sandbox.base_url, cache=cache, **settings)
        self.warnings = ()

    def image(self, prompt, **arguments):
        call = self.generator.invoke if self.how == "sync" else self._ainvoke
        result = call(prompt, **arguments)
        self.warnings = result.warnings
        return result.images[0]

    def _ainvoke(self, prompt, **arguments):
        return asyncio.run(self.generator.ainvoke(prompt, **arguments))


def cached(sandbox, cache, prompt, **arguments):
    """The cache for one request."""
    return CachedRequest(image_cache(cache), ImageRequest(prompt=prompt, **arguments), sandbox.base_url)


@pytest.fixture(params=["memory", "sqlite", "directory"])
def cache(request, tmp_path):
    return {
        "memory": InMemoryCache,
        "sqlite": lambda: SQLite(tmp_path / "cache.db"),
        "directory": lambda: str(tmp_path / "cache"),
    }[request.param]()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def facts(image) -> dict:
    return image.model_dump(exclude={"cached", "cost", "path"})


# What is a hit.


@HOWS
def test_the_same_request_gives_the_same_image_and_is_paid_once(sandbox, cache, how, tmp_path):
    caller = Caller(sandbox, cache, how, output_dir=tmp_path / "out")
    made, again = caller.image("a kitten"), caller.image("a kitten")
    assert sandbox.images_made == 1
    assert (again.cached, again.cost) == (True, Decimal(0))
    assert facts(again) == facts(made)
    assert (again.path, again.read()) == (made.path, made.read())
    assert not made.cached
    assert len(sandbox.downloads) == 1
    assert caller.warnings == ()


@HOWS
def test_without_a_folder_the_image_is_in_memory_again(sandbox, cache, how):
    caller = Caller(sandbox, cache, how)
    made, again = caller.image("a kitten"), caller.image("a kitten")
    assert (sandbox.images_made, again.cached, again.url) == (1, True, made.url)
    if again.path:
        again.path.unlink()
    sandbox.reset()
    assert again.read() == made.read()


OTHERS = [
    {"prompt": "a kitten "},
    {"prompt": "A kitten"},
    {"model": "cogview-4"},
    {"size": "1344x768"},
    {"quality": "hd"},
    {"watermark_enabled": True},
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
def test_what_determines_the_image_is_another_request(other):
    one, another = ImageRequest(prompt="a kitten"), ImageRequest(**{"prompt": "a kitten", **other})
    assert CacheKey.of(one, 0, "sandbox:").digest != CacheKey.of(another, 0, "sandbox:").digest


def test_the_service_and_the_number_of_the_image_make_another_key():
    request = ImageRequest(prompt="a kitten", n=2)
    keys = [
        CacheKey.of(request, index, url) for index in (0, 1) for url in ("sandbox:", "https://api.z.ai/api/paas/v4")
    ]
    assert len({key.digest for key in keys}) == len({key.llm_string for key in keys}) == 4


def test_user_count_and_spelled_out_defaults_make_the_same_key():
    one = ImageRequest(prompt="a kitten")
    another = ImageRequest(
        prompt="a kitten", model="CogView-4-250304", size="1024x1024", quality="standard", user_id="somebody", n=3
    )
    assert CacheKey.of(one, 0, "sandbox:") == CacheKey.of(another, 0, "sandbox:")


def test_the_key_is_the_same_in_every_version_that_reads_these_entries():
    key = CacheKey.of(ImageRequest(prompt="猫 🐈"), 1, "https://open.bigmodel.cn/api/paas/v4")
    assert key.prompt == "猫 🐈"
    assert key.llm_string == (
        'langchain-cogview:1:{"base_url":"https://open.bigmodel.cn/api/paas/v4","index":1,"model":"cogview-4-250304",'
        '"quality":"standard","size":"1024x1024","watermark_enabled":null}'
    )
    assert key.digest == "f52fb80fc62b694c66cbbdca5f666dea898cc4af8c6d1a6146eb4a31e82838fb"


def test_an_image_of_another_model_is_not_stored_for_the_model_that_was_asked_for(sandbox, tmp_path):
    caller = Caller(sandbox, tmp_path / "cache", fallback_models=["cogview-3-flash"], max_retries=0)
    sandbox.fail_next("busy")
    assert caller.image("a kitten").model == "cogview-3-flash"
    second = caller.image("a kitten")
    assert (second.model, second.cached) == ("cogview-4-250304", False)
    assert caller.image("a kitten").cached


def test_a_hit_costs_nothing_and_repeats_no_old_warning(sandbox, tmp_path):
    made = CogViewImageGenerator(base_url=sandbox.base_url).invoke("a kitten").images[0]
    paid = {"cost": Decimal("0.06"), "currency": "CNY", "warnings": ("It could not be saved.",)}
    cached(sandbox, tmp_path, "a kitten").store(0, made.model_copy(update=paid))
    hit = cached(sandbox, tmp_path, "a kitten").lookup(0, None)
    assert (hit.cost, hit.currency, hit.warnings) == (Decimal(0), "CNY", ())
    assert hit.to_pil().size == (1024, 1024)


def test_a_hit_is_not_stored_again(sandbox):
    class Counting(InMemoryCache):
        updates = 0

        def update(self, prompt, llm_string, return_val):
            self.updates += 1
            super().update(prompt, llm_string, return_val)

    cache = Counting()
    caller = Caller(sandbox, cache, download=False)
    assert [caller.image("a kitten").cached for _ in range(3)] == [False, True, True]
    assert cache.updates == 1


def test_a_url_that_expired_after_it_was_stored_is_not_requested(sandbox):
    cache = InMemoryCache()
    made = CogViewImageGenerator(base_url=sandbox.base_url).invoke("a kitten").images[0]
    expired = made.model_copy(update={"url": "https://sandbox.invalid/files/a.png?Expires=1"})
    cached(sandbox, cache, "a kitten").store(0, expired)
    requested = []
    assert cached(sandbox, cache, "a kitten").lookup(0, requested.append) is None
    assert requested == []


def test_neither_bytes_nor_key_are_in_a_langchain_cache(sandbox):
    class Seen(InMemoryCache):
        def update(self, prompt, llm_string, return_val):
            super().update(prompt, llm_string, return_val)
            self.texts = [prompt, llm_string, *(item.text for item in return_val)]

    cache = Seen()
    Caller(sandbox, cache, api_key="0123456789abcdef.secret").image("a kitten")
    assert len(cache.texts) == 3
    assert max(map(len, cache.texts)) < 2000
    assert "secret" not in "".join(cache.texts)


# Where the file is gone.


@HOWS
@pytest.mark.parametrize("harm", ["deleted", "changed", "cut", "replaced by a folder"])
def test_a_file_that_is_not_as_it_was_is_downloaded_again_while_the_url_is_valid(sandbox, how, harm, tmp_path):
    caller = Caller(sandbox, SQLite(tmp_path / "cache.db"), how, output_dir=tmp_path / "out")
    made = caller.image("a kitten")
    content = made.read()
    spoil(made.path, harm)
    again, third = caller.image("a kitten"), caller.image("a kitten")
    assert (sandbox.images_made, len(sandbox.downloads)) == (1, 2)
    assert again.cached
    assert again.read() == content
    assert again.path != made.path or harm == "deleted"
    assert third.path == again.path  # and that is recorded


@HOWS
@pytest.mark.parametrize("harm", ["deleted", "changed", "cut", "replaced by a folder"])
def test_without_file_and_url_it_is_no_hit(sandbox, how, harm, tmp_path, monkeypatch):
    monkeypatch.setattr("langchain_cogview.images.download.WAITS", (0.0,) * 4)
    caller = Caller(sandbox, SQLite(tmp_path / "cache.db"), how, output_dir=tmp_path / "out")
    made = caller.image("a kitten")
    spoil(made.path, harm)
    sandbox.reset()  # the host has forgotten the URL
    again = caller.image("a kitten")
    assert (sandbox.images_made, again.cached) == (1, False)
    assert len(sandbox.downloads) == 3  # the URL that is gone is tried twice at most
    assert again.request_id != made.request_id
    assert caller.image("a kitten").path == again.path


def spoil(path: Path, harm: str) -> None:
    content = path.read_bytes()
    if harm == "deleted":
        path.unlink()
    elif harm == "changed":
        path.write_bytes(content[:-20] + bytes(20))
    elif harm == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
        path.mkdir()


@HOWS
@pytest.mark.parametrize("download", [True, False])
def test_an_expired_url_is_no_hit(sandbox, cache, how, download):
    caller = Caller(sandbox, cache, how, download=download)
    images = [caller.image("a kitten [[expired-url]]") for _ in range(2)]
    assert [image.cached for image in images] == [False, False]
    assert sandbox.images_made == 2
    assert len(sandbox.downloads) == (
        2 if download else 0
    )  # of the new images: the URL itself says that it has expired


def test_a_url_where_nothing_is_yet_is_no_hit_and_is_requested_again_next_time(sandbox):
    cache, prompt = InMemoryCache(), "a kitten [[not-yet]]"
    linked = CogViewImageGenerator(base_url=sandbox.base_url, download=False).invoke(prompt).images[0]
    request = cached(sandbox, cache, prompt)
    request.store(0, linked)
    answers = []

    def refetch(url):
        try:
            answers.append(fetch(sender(sandbox.base_url), url, deadline=Deadline(60 if answers else 0.5)))
        except CogViewError as error:
            answers.append(error)
        return answers[-1]

    assert request.lookup(0, refetch) is None
    assert request.lookup(0, refetch).url == linked.url
    assert isinstance(answers[0], CogViewError)
    assert request.notes == []


def test_a_url_that_returns_another_image_is_no_hit(sandbox, tmp_path):
    cache, out = SQLite(tmp_path / "cache.db"), tmp_path / "out"
    made = Caller(sandbox, cache, output_dir=out).image("a kitten")
    made.path.unlink()
    other = CogViewImageGenerator(base_url=sandbox.base_url).invoke("a dog").images[0]

    def refetch(url):
        return fetch(sender(sandbox.base_url), other.url, deadline=Deadline(60), folder=out)

    assert cached(sandbox, cache, "a kitten").lookup(0, refetch) is None
    assert files(out) == []


@HOWS
def test_a_caller_that_wants_the_url_alone_gets_a_valid_one(sandbox, cache, how, tmp_path):
    saved = Caller(sandbox, cache, how, output_dir=tmp_path / "out").image("a kitten")
    caller = Caller(sandbox, cache, how, download=False)
    again = caller.image("a kitten")
    assert (sandbox.images_made, again.cached, again.url, again.path) == (1, True, saved.url, None)
    assert (again.width, again.sha256) == (saved.width, saved.sha256)
    assert len(sandbox.downloads) == 1
    assert again.read() == saved.read()


def test_a_caller_that_wants_the_bytes_gets_them_of_an_image_that_was_a_url_alone(sandbox, cache, tmp_path):
    linked = Caller(sandbox, cache, download=False).image("a kitten")
    caller = Caller(sandbox, cache, output_dir=tmp_path / "out")
    again, third = caller.image("a kitten"), caller.image("a kitten")
    assert (sandbox.images_made, len(sandbox.downloads)) == (1, 1)
    assert (again.url, again.request_id, again.size_bytes) == (linked.url, linked.request_id, len(again.read()))
    assert third.path == again.path


@pytest.mark.parametrize(("age", "hit"), [(-60.0, True), (60.0, False)])
def test_a_url_without_an_expiry_time_is_trusted_for_a_day(sandbox, age, hit):
    made = CogViewImageGenerator(base_url=sandbox.base_url, download=False).invoke("a kitten").images[0]
    asked = datetime.now(UTC) - UNDATED_URL_LIFETIME
    undated = {
        "url": "https://mfile.z.ai/a.png",
        "expires_at": None,
        "created": int(asked.timestamp() - age),
        "sha256": "0" * 64,
    }
    cache = InMemoryCache()
    cached(sandbox, cache, "a kitten").store(0, made.model_copy(update=undated))
    result = CogViewImageGenerator(base_url=sandbox.base_url, download=False, cache=cache).invoke("a kitten")
    assert result.cached is hit


# Where the caller wants it.


@HOWS
def test_another_folder_gets_a_file_of_its_own_and_only_one(sandbox, cache, how, tmp_path):
    first = Caller(sandbox, cache, how, output_dir=tmp_path / "a").image("a kitten")
    caller = Caller(sandbox, cache, how, output_dir=tmp_path / "b")
    found = [caller.image("a kitten") for _ in range(3)]
    assert (sandbox.images_made, len(sandbox.downloads)) == (1, 1)
    assert files(tmp_path / "b") == [found[0].path] == list({image.path for image in found})
    assert found[0].read() == first.read()
    assert f"-{first.request_id[:8]}-" in found[0].path.name
    assert Caller(sandbox, cache, how, output_dir=tmp_path / "a").image("a kitten").path == first.path


def test_a_file_is_never_saved_over_another(sandbox, tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "out"
    Caller(sandbox, cache).image("a kitten")
    caller = Caller(sandbox, cache, output_dir=out)
    first = caller.image("a kitten").path
    first.write_text("mine")
    second = caller.image("a kitten").path
    assert first.read_text() == "mine"
    assert files(out) == sorted([first, second])
    assert caller.image("a kitten").path == second
    assert sandbox.images_made == 1


def test_a_folder_that_cannot_be_written_leaves_the_bytes_in_memory(sandbox, tmp_path):
    made = Caller(sandbox, tmp_path / "cache").image("a kitten")
    (tmp_path / "out").write_text("a file")
    caller = Caller(sandbox, tmp_path / "cache", output_dir=tmp_path / "out" / "below")
    again = caller.image("a kitten")
    assert (again.cached, again.path, again.read()) == (True, None, made.read())
    assert "could not be saved in output_dir" in again.warnings[0]


# Remote storage.


@pytest.fixture
def bucket(tmp_path):
    pytest.importorskip("fsspec")
    return f"memory://{tmp_path.name}/images"


def remove(uri):
    import fsspec

    fsspec.filesystem("memory").rm(uri)


@HOWS
def test_an_image_in_remote_storage_is_a_hit_as_long_as_it_can_be_read(sandbox, bucket, how, tmp_path):
    cache = SQLite(tmp_path / "cache.db")
    Caller(sandbox, cache, download=False).image("a kitten")
    caller = Caller(sandbox, cache, how, output_dir=bucket)
    first, second = caller.image("a kitten"), caller.image("a kitten")
    assert len(sandbox.downloads) == 1
    assert first.uri.startswith("memory://")
    assert (second.uri, second.path, second.cached) == (first.uri, None, True)
    sandbox.reset()
    assert caller.image("a kitten").cached
    remove(first.uri)
    assert not caller.image("a kitten").cached  # the URL was requested once more, and is gone as well
    assert caller.warnings == ()


@HOWS
def test_a_caller_without_remote_storage_reads_none(sandbox, bucket, how, tmp_path):
    cache = SQLite(tmp_path / "cache.db")
    Caller(sandbox, cache, output_dir=bucket).image("a kitten")
    sandbox.reset()
    assert not Caller(sandbox, cache, how).image("a kitten").cached


@HOWS
def test_a_directory_keeps_the_bytes_of_an_image_that_was_saved_in_remote_storage(sandbox, bucket, how, tmp_path):
    saved = Caller(sandbox, tmp_path / "cache", how, output_dir=bucket).image("a kitten")
    remove(saved.uri)
    sandbox.reset()
    kept = Caller(sandbox, tmp_path / "cache", how).image("a kitten")
    assert (kept.cached, kept.request_id, len(kept.read())) == (True, saved.request_id, saved.size_bytes)


@HOWS
def test_a_directory_uploads_again_what_is_gone_from_remote_storage(sandbox, bucket, how, tmp_path):
    made = Caller(sandbox, tmp_path / "cache").image("a kitten")
    caller = Caller(sandbox, tmp_path / "cache", how, output_dir=bucket)
    first = caller.image("a kitten")
    assert first.uri.startswith(f"{bucket}/")
    assert caller.image("a kitten").uri == first.uri
    remove(first.uri)
    again = caller.image("a kitten")
    assert (again.uri, again.sha256) == (first.uri, made.sha256)
    assert (sandbox.images_made, len(sandbox.downloads)) == (1, 1)


@HOWS
def test_remote_storage_that_cannot_be_reached_leaves_the_bytes_in_memory(sandbox, how, tmp_path):
    fsspec = pytest.importorskip("fsspec")

    class Unreachable(fsspec.AbstractFileSystem):
        protocol = "unreachable"

        def pipe_file(self, path, value, **kwargs):
            raise ConnectionError("no route to host")

    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    made = Caller(sandbox, tmp_path / "cache").image("a kitten")
    again = Caller(sandbox, tmp_path / "cache", how, output_dir="unreachable://bucket").image("a kitten")
    assert (again.cached, again.uri, again.read()) == (True, None, made.read())
    assert "could not be saved in output_dir (unreachable://bucket)" in again.warnings[0]


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9/a.png", "file:///etc/passwd", "simplecache::memory://a", "nosuch://a"]
)
def test_an_entry_cannot_make_other_addresses_be_read(sandbox, tmp_path, uri):
    cache = SQLite(tmp_path / "cache.db")
    made = CogViewImageGenerator(base_url=sandbox.base_url).invoke("a kitten").images[0]
    cached(sandbox, cache, "a kitten").store(0, made.model_copy(update={"uri": uri, "url": None}))
    assert cached(sandbox, cache, "a kitten").lookup(0, None) is None


# A directory.


def test_a_directory_outlives_url_and_file(sandbox, tmp_path):
    out = tmp_path / "out"
    caller = Caller(sandbox, tmp_path / "cache", output_dir=out)
    made = caller.image("a kitten")
    content = made.read()
    made.path.unlink()
    sandbox.reset()
    again = caller.image("a kitten")
    assert (again.path.parent, again.read()) == (out, content)
    assert files(out) == [again.path]
    in_memory = Caller(sandbox, tmp_path / "cache").image("a kitten")
    assert in_memory.path.is_relative_to(tmp_path / "cache" / "images")
    assert in_memory.path.read_bytes() == in_memory.read() == content
    assert sandbox.images_made == 0


def test_equal_images_are_stored_once(sandbox, tmp_path):
    caller = Caller(sandbox, tmp_path / "cache")
    made = caller.image("a kitten")
    cached(sandbox, tmp_path / "cache", "another prompt").store(0, made)
    assert len(files(tmp_path / "cache" / "images")) == 1
    assert len(files(tmp_path / "cache" / "entries")) == 2


@pytest.mark.parametrize("harm", ["deleted", "changed", "cut", "replaced by a folder"])
def test_damaged_bytes_in_a_directory_are_no_hit_and_are_replaced(sandbox, harm, tmp_path):
    caller = Caller(sandbox, tmp_path / "cache")
    caller.image("a kitten")
    spoil(files(tmp_path / "cache" / "images")[0], harm)
    sandbox.reset()
    assert not caller.image("a kitten").cached
    if harm != "replaced by a folder":
        assert caller.image("a kitten").cached
        assert sandbox.images_made == 1
    else:
        assert caller.warnings == ("The cache could not be written: Is a directory.",)


SPOILED = {
    "empty": "",
    "cut": lambda text: text[: len(text) // 2],
    "no JSON": "\x00\xff",
    "other JSON": "[1]",
    "deep": "[" * 100_000,
    "of another kind": '{"type": "llm"}',
    "of another request": lambda text: text.replace('"key": "', '"key": "0'),
    "without an image": lambda text: json.dumps({**json.loads(text), "image": {}}),
    "with a path for a hash": lambda text: text.replace('"sha256": "', '"sha256": "../../'),
}


@HOWS
@pytest.mark.parametrize("spoiled", SPOILED.values(), ids=SPOILED)
def test_a_damaged_or_foreign_entry_is_no_hit_and_is_replaced(sandbox, how, spoiled, tmp_path, caplog):
    caller = Caller(sandbox, tmp_path / "cache", how)
    caller.image("a kitten")
    (entry,) = files(tmp_path / "cache" / "entries")
    text = entry.read_text()
    entry.write_text(spoiled(text) if callable(spoiled) else spoiled)
    assert not caller.image("a kitten").cached
    assert "damaged or foreign" in caplog.text
    assert caller.warnings == ()
    assert caller.image("a kitten").cached
    assert sandbox.images_made == 2


@pytest.mark.parametrize(
    "foreign", [[], [Generation(text="a poem")], [Generation(text="")], "text", [None], 7, {"a": 1}], ids=repr
)
def test_what_others_left_in_a_langchain_cache_is_no_hit(sandbox, foreign):
    class Foreign(InMemoryCache):
        def lookup(self, prompt, llm_string):
            return foreign

    caller = Caller(sandbox, Foreign())
    assert not caller.image("a kitten").cached
    assert caller.warnings == ()


def test_a_cache_that_answers_for_similar_prompts_gives_only_the_same(sandbox):
    class Similar(InMemoryCache):
        def lookup(self, prompt, llm_string):
            return next(iter(self._cache.values()), None)

    caller = Caller(sandbox, Similar())
    caller.image("a kitten")
    assert not caller.image("a small cat").cached


# A cache that fails.


@HOWS
def test_a_cache_that_is_down_costs_nothing_but_a_warning(sandbox, how, caplog):
    down = Down()
    caller = Caller(sandbox, down, how)
    image = caller.image("a kitten")
    assert (image.cached, image.read()[:4], sandbox.images_made) == (False, b"\x89PNG", 1)
    assert down.calls == 2
    assert caller.warnings == (
        "The cache could not be read: ConnectionError.",
        "The cache could not be written: ConnectionError.",
    )
    assert [record.name for record in caplog.records].count("langchain_cogview.cache") == 1


@HOWS
def test_a_cache_that_is_down_is_logged_in_one_line_until_it_works_again(sandbox, how, caplog):
    class Sometimes(InMemoryCache):
        works = False

        def lookup(self, prompt, llm_string):
            if not self.works:
                raise ConnectionError("redis://user:password@cache:6379 refused\nin detail")
            return super().lookup(prompt, llm_string)

        def update(self, prompt, llm_string, return_val):
            self.lookup(prompt, llm_string)
            super().update(prompt, llm_string, return_val)

    cache = Sometimes()

    def lines_of(*prompts):
        caplog.clear()
        for prompt in prompts:
            generator = CogViewImageGenerator(base_url=sandbox.base_url, cache=cache)  # another each time
            result = generator.invoke(prompt) if how == "sync" else asyncio.run(generator.ainvoke(prompt))
            assert result.images
        assert not any(record.exc_info for record in caplog.records)
        return caplog.messages

    warning = (
        "The cache could not be read (ConnectionError: redis://cache:6379 refused). "
        "Calls go on without it; this is not logged again until it works."
    )
    assert lines_of("a fox", "a hare", "an owl") == [warning]
    cache.works = True
    assert lines_of("a fox", "a fox") == []
    cache.works = False
    assert lines_of("a fox", "a hare") == [warning]


@pytest.mark.parametrize(
    "prompt", ["a blue fox in the snow", "fox", "一只在雪地里的蓝色狐狸", 'a "blue"\tfox', "fox " * 3000]
)
@pytest.mark.parametrize(
    "say",
    [
        lambda prompt, key: f"INSERT ({prompt})",
        lambda prompt, key: f"[parameters: {(prompt, key)!r}]",
        lambda prompt, key: f"[parameters: {ascii(prompt)[:100]}",
        lambda prompt, key: json.dumps([prompt, key]),
        lambda prompt, key: f"no row for {key}",
    ],
)
def test_the_log_shows_neither_prompt_nor_key_of_a_cache_that_is_down(sandbox, caplog, say, prompt):
    class Talks(InMemoryCache):
        def lookup(self, prompt, llm_string):
            raise RuntimeError(say(prompt, llm_string))

    CogViewImageGenerator(base_url=sandbox.base_url, cache=Talks(), download=False).invoke(prompt)
    assert caplog.messages == [
        "The cache could not be read (RuntimeError). Calls go on without it; this is not logged again until it works."
    ]


@pytest.mark.parametrize("text", ["x" * 10_000, "\x1b[31mred\x00", "", None])
def test_the_log_stays_short_and_printable_whatever_a_cache_raises(sandbox, caplog, text):
    class OddError(Exception):
        def __str__(self):
            return text  # None: it raises

    class Raises(InMemoryCache):
        def lookup(self, prompt, llm_string):
            raise OddError

    assert CogViewImageGenerator(base_url=sandbox.base_url, cache=Raises(), download=False).invoke("a kitten").images
    (line,) = caplog.messages
    assert "(OddError" in line
    assert len(line) < 300
    assert line.isprintable()


@HOWS
def test_a_directory_that_cannot_be_used_costs_nothing_but_a_warning(sandbox, how, tmp_path):
    caller = Caller(sandbox, tmp_path / "cache", how)
    (tmp_path / "cache").write_text("a file by now")
    assert not caller.image("a kitten").cached
    assert len(caller.warnings) == 2
    assert caller.warnings[0] == "The cache could not be read: Not a directory."


@HOWS
def test_a_fetch_that_raises_is_no_hit(sandbox, how):
    cache = InMemoryCache()
    Caller(sandbox, cache).image("a kitten")
    request = cached(sandbox, cache, "a kitten")

    def refetch(url):
        raise OSError(28, "No space left on device")

    found = request.lookup(0, refetch) if how == "sync" else asyncio.run(request.alookup(0, refetch))
    assert found is None
    assert request.notes == ["The cache could not be read: No space left on device."]


async def test_a_cancelled_lookup_ends_at_once():
    class Slow(InMemoryCache):
        async def alookup(self, prompt, llm_string):
            entered.set()
            await asyncio.Event().wait()

    entered = asyncio.Event()
    generator = CogViewImageGenerator(base_url="sandbox:", cache=Slow())
    task = asyncio.create_task(generator.ainvoke("a kitten"))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# What may be passed as a cache.


@pytest.mark.parametrize(
    "wrong", [True, False, None, 7, {}, InMemoryCache, "", "  ", "redis://:password@host", Path("s3://b")]
)
def test_what_is_neither_cache_nor_directory_is_refused(wrong):
    with pytest.raises(CogViewConfigurationError) as caught:
        image_cache(wrong)
    assert "cache" in str(caught.value)
    assert "password" not in str(caught.value)


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "cache").write_text("x")
    with pytest.raises(CogViewConfigurationError, match="is a file"):
        image_cache(tmp_path / "cache")


def test_a_directory_is_found_from_wherever_the_program_goes_and_made_when_needed(sandbox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here, home = Caller(sandbox, "cache"), Caller(sandbox, "~/cache")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    here.image("a kitten")
    home.image("a dog")
    assert (tmp_path / "cache" / "entries").is_dir()
    assert (tmp_path / "home" / "cache" / "entries").is_dir()


# Many at once.


CHILD = """
import sys
from langchain_cogview import CogViewImageGenerator
generator = CogViewImageGenerator(base_url="sandbox:", cache=sys.argv[1], size="512x512")
for number in range(int(sys.argv[2])):
    result = generator.invoke(f"kitten {number % 7}")
    image = result.images[0]
    assert len(image.read()) == image.size_bytes
    assert not result.warnings, result.warnings
    print(image.cached, flush=True)
"""


def child(*arguments):
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


class Offline:
    """A sandbox of each process, under one base URL."""

    base_url = "sandbox:"


def test_another_process_finds_what_this_one_stored(tmp_path):
    caller = Caller(Offline, tmp_path / "cache")
    for number in range(3):
        caller.image(f"kitten {number}", size="512x512")
    out, _ = child(tmp_path / "cache", 4).communicate(timeout=200)
    assert out.split() == ["True", "True", "True", "False"]
    assert caller.image("kitten 3", size="512x512").cached


@pytest.mark.heavy
def test_processes_write_at_once_and_are_killed_and_every_entry_stays_whole(tmp_path):
    cache = tmp_path / "cache"
    writers = [child(cache, 100_000) for _ in range(2)]
    for writer in writers:  # each in the midst of its work
        for _ in range(10):
            assert writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate(timeout=200)
    caller = Caller(Offline, cache)
    assert [caller.image(f"kitten {number}", size="512x512").cached for number in range(7)] == [True] * 7
    assert len([path for path in files(cache) if path.suffix == ".json"]) == 7


def test_threads_that_hit_at_once_share_one_file(sandbox, tmp_path):
    Caller(sandbox, tmp_path / "cache").image("a kitten")
    found, start = [], threading.Barrier(8)

    def hit():
        caller = Caller(sandbox, tmp_path / "cache", output_dir=tmp_path / "out")
        start.wait()
        found.append(caller.image("a kitten"))

    threads = [threading.Thread(target=hit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(tmp_path / "out") == list({image.path for image in found})
    assert len(found) == 8
    assert sandbox.images_made == 1


@HOWS
def test_equal_requests_from_many_threads_or_tasks_are_paid_once(sandbox, cache, how):
    sandbox.latency = 0.05
    caller = Caller(sandbox, cache)

    async def all_of_them():
        return await asyncio.gather(*(caller.generator.ainvoke("a kitten") for _ in range(5)))

    if how == "async":
        found = asyncio.run(all_of_them())
    else:
        found = []
        threads = [threading.Thread(target=lambda: found.append(caller.image("a kitten"))) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(image.cached for image in found) == [False, True, True, True, True]
    assert sandbox.images_made == 1


def test_many_entries_are_found_without_listing_any(sandbox, tmp_path, monkeypatch):
    made = Caller(sandbox, tmp_path).image("kitten 0", size="512x512")
    prompts = [f"kitten {number}" for number in range(200)]
    for prompt in prompts[1:]:
        cached(sandbox, tmp_path, prompt, size="512x512").store(0, made.model_copy(update={"prompt": prompt}))

    def listed(*arguments):
        raise AssertionError("a folder was listed")

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, listed)
    requests = [cached(sandbox, tmp_path, prompt, size="512x512") for prompt in [*prompts, "kitten 200"]]
    found = [request.lookup(0, lambda url: None) for request in requests]
    assert [image.prompt for image in found[:-1]] == prompts
    assert all(image.cached for image in found[:-1])
    assert found[-1] is None


def test_sync_and_async_have_the_same_arguments():
    request = CachedRequest(image_cache(InMemoryCache()), ImageRequest(prompt="a kitten"), "sandbox:")
    for name in ("lookup", "store"):
        pair = [list(inspect.signature(getattr(request, item)).parameters) for item in (name, f"a{name}")]
        assert pair[0] == pair[1]


# --- as a generator uses it


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("where", ["memory", "directory"])
def test_the_same_request_is_paid_once(sandbox, tmp_path, how, where):
    cache = InMemoryCache() if where == "memory" else tmp_path / "cache"
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path / "out", cache=cache)

    def invoke(value):
        return generator.invoke(value) if how == "sync" else asyncio.run(generator.ainvoke(value))

    first, second, third = invoke("a fox"), invoke("a fox"), invoke({"prompt": "a fox", "n": 2})
    assert (first.cached, second.cached, third.cached) == (False, True, False)
    assert [image.cached for image in third.images] == [True, False]
    assert (second.cost, second.sha256, second.path) == (0, first.sha256, first.path)
    assert sandbox.images_made == 2


@pytest.mark.parametrize("how", ["batch", "abatch"])
def test_equal_requests_under_way_at_once_are_paid_once(sandbox, tmp_path, how):
    sandbox.latency = 0.05
    generator = CogViewImageGenerator(base_url=sandbox.base_url, cache=tmp_path)
    prompts = ["a fox", "a hare"] * 5
    results = generator.batch(prompts) if how == "batch" else asyncio.run(generator.abatch(prompts))
    assert [result.prompt for result in results] == prompts
    assert sandbox.images_made == 2


def test_a_cached_image_counts_for_no_budget_and_its_event_says_so(sandbox, tmp_path):
    from langchain_core.callbacks import BaseCallbackHandler

    from langchain_cogview import CogViewImageTool

    class Recorder(BaseCallbackHandler):
        names = ()

        def on_custom_event(self, name, data, **kwargs):
            self.names = (*self.names, (name, data.get("cached")))

    recorder = Recorder()
    tool = CogViewImageTool(
        base_url=sandbox.base_url, output_dir=tmp_path / "out", cache=tmp_path / "cache", max_images=2
    )
    for _ in range(4):
        assert "Made 1 image" in tool.invoke({"prompt": "a fox"})
    tool.invoke({"prompt": "a fox"}, {"callbacks": [recorder]})
    assert recorder.names == (("cogview.generated", True),)
    assert "Made 1 image" in tool.invoke({"prompt": "a hare"})


def test_a_cache_that_fails_costs_no_image_and_the_result_says_so(sandbox):
    class Down(InMemoryCache):
        def lookup(self, prompt, llm_string):
            raise ConnectionError("down")

        update = lookup

    result = CogViewImageGenerator(base_url=sandbox.base_url, cache=Down()).invoke("a fox")
    assert result.images
    assert any("cache" in warning.lower() for warning in result.warnings)


@pytest.mark.parametrize("cache", [True, "", "redis://host", object()])
def test_what_is_no_cache_is_refused_at_once(cache):
    with pytest.raises((ValueError, CogViewError)):
        CogViewImageGenerator(base_url="sandbox:", cache=cache)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="This system has no named pipes")
@HOWS
def test_pipes_in_a_cache_directory_keep_no_paid_image_waiting(sandbox, tmp_path, how):
    def ask(directory):
        generator = CogViewImageGenerator(base_url=sandbox.base_url, cache=directory)
        return generator.invoke("kitten") if how == "sync" else asyncio.run(generator.ainvoke("kitten"))

    first = ask(tmp_path / "one")
    for path in [path for path in (tmp_path / "one").rglob("*") if path.is_file()]:
        pipe = tmp_path / "two" / path.relative_to(tmp_path / "one")
        pipe.parent.mkdir(parents=True)
        os.mkfifo(pipe)
    assert ask(tmp_path / "two").read() == first.read()
    assert ask(tmp_path / "two").cached, "what was in the way is replaced"
