"""What an artifact may open: files, stores and links, when somebody else can have written it."""

import asyncio
import hashlib
import json
import os
import pickle
from pathlib import Path

import fsspec
import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.messages import ToolMessage
from langchain_core.outputs import Generation

from langchain_cogview import (
    CogViewConfigurationError,
    CogViewDownloadError,
    CogViewError,
    CogViewImageGenerator,
    CogViewStorageError,
    GeneratedImage,
    ImageResult,
    gallery,
    images_from_messages,
)
from langchain_cogview.result import with_content
from tests.unit_tests.notebook.displayed import Seen, photo

PNG = photo(1, 32)
OTHER = photo(2, 32)
RECORD = {"id": "a1", "request_id": "r1", "model": "cogview-4", "prompt": "a kitten"}


def facts(content=PNG, **others):
    return {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **others}


def artifact(*images, **record):
    found = [{**RECORD, **image} for image in images or [record]]
    return {"type": "cogview.image_result", "version": 1, "prompt": "p", "model": "m", "images": found}


def loaded(made, **reading):
    [image] = images_from_messages([ToolMessage("x", tool_call_id="1", artifact=made)], **reading)
    return image


def shown(something):
    return Seen(something._repr_mimebundle_()["text/html"])


def read(how, image):
    return image.read() if how == "sync" else asyncio.run(image.aread())


HOWS = pytest.mark.parametrize("how", ["sync", "async"])


# --- files


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("ZHIPUAI_API_KEY=not-to-be-read")
    return path


@HOWS
def test_a_file_that_is_not_an_image_is_never_returned(how, secret):
    for path in (
        secret,
        Path("/proc/self/environ"),
        Path("/etc/passwd"),
        secret.parent,
        Path("/dev/zero"),
        secret / "x",
    ):
        image = loaded(artifact(path=str(path)))
        with pytest.raises(CogViewStorageError, match="saved file"):
            read(how, image)


@HOWS
def test_a_pipe_is_not_waited_for(how, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    image = loaded(artifact(path=str(tmp_path / "pipe.png")))
    for use in (lambda: read(how, image), image.to_pil, lambda: image.save(tmp_path / "copy.png"), image.show):
        with pytest.raises(CogViewStorageError, match="not a regular file"):
            use()
    assert "not a regular file" in shown(gallery([image])).text


@HOWS
def test_a_link_at_the_end_of_a_path_is_not_followed(how, tmp_path):
    (tmp_path / "real.png").write_bytes(PNG)
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    assert read(how, loaded(artifact(path=str(tmp_path / "real.png")))) == PNG
    with pytest.raises(CogViewStorageError, match="cannot be read"):
        read(how, loaded(artifact(path=str(tmp_path / "link.png"))))


def test_a_file_of_more_than_32_mib_is_not_read(tmp_path):
    with (tmp_path / "large.png").open("wb") as file:
        file.write(PNG)
        file.truncate(40 * 2**20)
    with pytest.raises(CogViewStorageError, match="larger than 32 MiB"):
        loaded(artifact(path=str(tmp_path / "large.png"))).read()


@HOWS
@pytest.mark.parametrize("recorded", [{"sha256": "0" * 64}, {"size_bytes": 5}, facts(OTHER)])
def test_another_image_than_the_recorded_one_is_not_returned(how, tmp_path, recorded):
    (tmp_path / "a.png").write_bytes(PNG)
    assert read(how, loaded(artifact(path=str(tmp_path / "a.png"), **facts()))) == PNG
    with pytest.raises(CogViewStorageError, match="not the image that is recorded"):
        read(how, loaded(artifact(path=str(tmp_path / "a.png"), **recorded)))


@HOWS
def test_within_reads_from_one_folder_alone(how, tmp_path):
    folder, outside = tmp_path / "images", tmp_path / "images-of-others"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    for path in (folder / "a.png", folder / "sub" / "b.png", outside / "c.png"):
        path.write_bytes(PNG)
    (folder / "way-out").symlink_to(outside)
    (tmp_path / "alias").symlink_to(folder)
    for inside in (
        folder / "a.png",
        folder / "sub" / "b.png",
        folder / "sub" / ".." / "a.png",
        tmp_path / "alias" / "a.png",
    ):
        assert read(how, loaded(artifact(path=str(inside)), within=folder)) == PNG
        assert read(how, loaded(artifact(path=str(inside)), within=str(tmp_path / "alias"))) == PNG
    for out in (outside / "c.png", folder / ".." / "images-of-others" / "c.png", folder / "way-out" / "c.png", folder):
        with pytest.raises(CogViewStorageError, match="outside the folder"):
            read(how, loaded(artifact(path=str(out)), within=folder))
    assert "outside the folder" in shown(gallery([artifact(path=str(outside / "c.png"))], within=folder)).text
    with pytest.raises(CogViewStorageError, match="outside the folder"):
        ImageResult.from_artifact(artifact(path=str(outside / "c.png")), within=folder).read()


async def test_reading_a_file_leaves_the_event_loop_free(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PNG)
    image = loaded(artifact(path=str(tmp_path / "a.png")))
    on_loop = asyncio.get_running_loop()
    opened = []

    def recording_open(*args, original=os.open, **kwargs):
        try:
            opened.append(asyncio.get_running_loop() is on_loop)
        except RuntimeError:
            opened.append(False)
        return original(*args, **kwargs)

    monkeypatch.setattr(os, "open", recording_open)
    assert await image.aread() == PNG
    assert opened == [False]


# --- stores


@pytest.fixture
def stores(monkeypatch):
    """Two buckets in memory, and which URIs fsspec was asked for."""
    memory = fsspec.filesystem("memory")
    for name in ("ours/a.png", "ours/sub/b.png", "theirs/a.png"):
        memory.pipe_file(f"/{name}", PNG)
    asked = []

    def url_to_fs(url, *args, original=fsspec.core.url_to_fs, **kwargs):
        asked.append(url)
        return original(url, *args, **kwargs)

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    yield asked
    for name in ("ours", "theirs"):
        memory.rm(f"/{name}", recursive=True)


@HOWS
def test_a_uri_is_read_only_from_the_folders_that_the_reader_names(how, stores):
    for uri in ("memory://ours/a.png", "memory://theirs/a.png"):
        with pytest.raises(CogViewStorageError, match="none of the allowed folders"):
            read(how, loaded(artifact(uri=uri)))
    assert stores == []
    assert read(how, loaded(artifact(uri="memory://ours/a.png", **facts()), storage="memory://ours")) == PNG
    both = ["memory://theirs", "memory://ours/sub/"]
    assert read(how, loaded(artifact(uri="memory://ours/sub/b.png"), storage=both)) == PNG
    with pytest.raises(CogViewStorageError, match="none of the allowed folders"):
        read(how, loaded(artifact(uri="memory://ours/a.png"), storage=both))
    with pytest.raises(CogViewStorageError, match="not the image that is recorded"):
        read(how, loaded(artifact(uri="memory://ours/a.png", **facts(OTHER)), storage="memory://ours"))


@pytest.mark.parametrize(
    "uri",
    [
        "memory://ours/../theirs/a.png",
        "memory://ours/%2e%2e/theirs/a.png",
        "memory://ours/..%2Ftheirs/a.png",
        "memory://ours\\..\\theirs/a.png",
        "memory://oursandmore/a.png",
        "memory://ours",
        "simplecache::memory://ours/a.png",
        "memory://ours/a.png::memory://theirs/a.png",
        "zip://a.png::memory://ours/x.zip",
        "reference://ours/a.png",
        "webhdfs://ours/a.png",
        "http://ours/a.png",
        "file:///etc/passwd",
        "local:///etc/passwd",
        "/etc/passwd",
        "memory://user:password@ours/a.png",
        "memory://ours/a.png?x=1",
        "memory://ours/a\n.png",
        "",
    ],
)
@HOWS
def test_a_uri_that_leads_elsewhere_is_not_asked_for(how, stores, uri):
    image = loaded(artifact(uri=uri), storage="memory://ours", storage_options={"skip_instance_cache": True})
    with pytest.raises(CogViewError):
        read(how, image)
    assert stores == []


def test_the_reader_names_folders_elsewhere_and_no_others():
    for reading in (
        {"storage": "/tmp"},
        {"storage": "file:///tmp"},
        {"storage": "http://host/x"},
        {"storage": "a::s3://b"},
    ):
        with pytest.raises(CogViewConfigurationError):
            images_from_messages([], **reading)
    with pytest.raises(CogViewConfigurationError, match="storage_options were passed without storage"):
        images_from_messages([], storage_options={"key": "x"})


@HOWS
def test_a_generators_image_is_read_from_its_own_bucket_with_its_own_options(how, sandbox, stores):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir="memory://ours/images", size="512x512")
    result = generator.invoke("a kitten")
    moved = result.image.model_copy(update={"uri": "memory://theirs/a.png", "size_bytes": None, "sha256": None})
    assert read(how, result.image) == pickle.loads(pickle.dumps(result)).read()
    with pytest.raises(CogViewStorageError, match="none of the allowed folders"):
        read(how, moved)


@pytest.mark.parametrize("folder", ["memory://ours/images", None])
@HOWS
def test_a_poisoned_cache_entry_opens_no_other_store(how, sandbox, stores, folder):
    class Poisoned(InMemoryCache):
        def lookup(self, prompt, llm_string):
            [found] = super().lookup(prompt, llm_string) or [None]
            if found is None:
                return None
            entry = json.loads(found.text)
            entry["image"] |= {"uri": "memory://theirs/a.png", "path": None, **facts(), "mime_type": "image/png"}
            return [Generation(text=json.dumps(entry))]

    generator = CogViewImageGenerator(
        base_url=sandbox.base_url,
        output_dir=folder,
        cache=Poisoned(),
        size="512x512",
        storage_options=folder and {"x": 1},
    )
    stores.clear()
    for _ in range(2):
        image = generator.invoke("a fox").image if how == "sync" else asyncio.run(generator.ainvoke("a fox")).image
        assert image.uri != "memory://theirs/a.png"
    assert all(url.startswith("memory://ours") for url in stores)


# --- links


@HOWS
def test_the_reader_says_from_which_hosts_links_are_fetched(how):
    made = artifact(url="https://elsewhere.example/a.png")
    for image in (
        loaded(made, allowed_image_hosts=["files.example", "*.files.example"]),
        loaded(made, allowed_image_hosts="files.example"),
        ImageResult.from_artifact(made, allowed_image_hosts=["files.example"]).image,
        gallery([made], allowed_image_hosts=[]).results[0].image,
    ):
        with pytest.raises(CogViewDownloadError, match="not in allowed_image_hosts"):
            read(how, image)


@HOWS
def test_a_link_that_gives_another_image_now_does_not_pass_for_the_recorded_one(how, sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, download=False, size="512x512")
    image = generator.invoke("a kitten").image
    with pytest.raises(CogViewDownloadError, match="another image"):
        read(how, image.model_copy(update={"sha256": "0" * 64}))
    assert read(how, image)


# --- names of files


EVIL = [
    "../evil",
    "/tmp/evil",
    "..",
    ".",
    "a/b",
    "a\\b",
    "C:evil",
    "a\0b",
    "x" * 300,
    "",
    "-rf",
    "con",
    "é\u202e",
    "NUL",
]


@pytest.mark.parametrize("evil", EVIL)
def test_an_id_never_leads_out_of_the_folder(evil, tmp_path):
    folder = tmp_path / "a" / "folder"
    folder.mkdir(parents=True)
    images = [with_content(GeneratedImage(**{**RECORD, "id": evil}), PNG)]
    result = ImageResult(images=images, prompt="p", model="m")
    assert images[0].save(folder).parent == result.save(folder).parent == folder
    [path] = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert path.parent == folder
    assert path.read_bytes() == PNG
    assert path.stem.replace("_", "").replace("-", "").isalnum() or set(path.stem) == {"_"}


def test_images_with_the_same_id_do_not_replace_each_other(tmp_path):
    images = [
        with_content(GeneratedImage(**{**RECORD, "id": name}), content)
        for name, content in (("a", PNG), ("a", OTHER), ("a-2", PNG), ("A", OTHER), ("b", PNG))
    ]
    ImageResult(images=images, prompt="p", model="m").save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


# --- previews


def test_a_preview_is_found_by_what_was_read_and_not_by_what_an_artifact_claims(tmp_path):
    honest = with_content(GeneratedImage(**RECORD, **facts(OTHER)), OTHER)
    claims = with_content(GeneratedImage(**{**RECORD, "id": "b2"}, **facts(OTHER)), PNG)
    sources = [[item["src"] for item in shown(one).all("img")] for one in (claims, honest, claims)]
    assert sources[0] == sources[2] != sources[1]


@pytest.mark.timeout(300)  # only a read that hangs takes so long
def test_no_path_makes_a_reader_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", "/dev/stdin", str(tmp_path / "pipe"), "\0", "~", "", "\ud800", "a" * 5000):
        with pytest.raises(CogViewError):
            loaded(artifact(path=path)).read()
