"""Images in the files of an agent: saved through the backend's own methods, read back through that backend alone, never lost."""

import asyncio
import copy
import pickle
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from langchain_core.load import dumpd, load

from langchain_cogview import (
    BackendFolder,
    CogViewConfigurationError,
    CogViewImageGenerator,
    CogViewImageTool,
    CogViewStorageError,
    ImageResult,
    images_from_messages,
)

both = pytest.mark.parametrize("how", ["sync", "async"])
SECRET = "hunter2-0123456789"


@dataclass
class Response:
    path: str
    content: bytes | None = None
    error: str | None = None


class Files:
    """The methods of a backend that are used, with its files in memory."""

    def __init__(self):
        self.files = {}
        self.threads = set()

    def upload_files(self, files):
        self.threads.add(threading.current_thread())
        self.files.update(files)
        return [Response(path) for path, _ in files]

    def download_files(self, paths):
        self.threads.add(threading.current_thread())
        return [
            Response(path, self.files.get(path), None if path in self.files else "file_not_found") for path in paths
        ]


class AsyncFiles(Files):
    """A backend with native async methods."""

    def __init__(self):
        super().__init__()
        self.awaited = []

    async def aupload_files(self, files):
        self.awaited.append("upload")
        return Files.upload_files(self, files)

    async def adownload_files(self, paths):
        self.awaited.append("download")
        return Files.download_files(self, paths)


def generate(how, value="a kitten", **settings):
    generator = CogViewImageGenerator(base_url="sandbox:", **settings)
    return generator.invoke(value) if how == "sync" else asyncio.run(generator.ainvoke(value))


def read(how, image):
    return image.read() if how == "sync" else asyncio.run(image.aread())


def tool_message(how, tool):
    call = {"type": "tool_call", "id": "1", "name": tool.name, "args": {"prompt": "a kitten"}}
    return tool.invoke(call) if how == "sync" else asyncio.run(tool.ainvoke(call))


# --- saving and reading


@both
@pytest.mark.parametrize("kind", [Files, AsyncFiles])
def test_each_image_is_a_file_of_the_backend_under_a_name_of_its_own(how, kind):
    backend = kind()
    result = generate(how, {"prompt": "a kitten", "n": 3}, output_dir=backend)
    assert {image.uri for image in result.images} == {f"backend://{path}" for path in backend.files}
    assert len(backend.files) == 3
    for path in backend.files:
        assert path.startswith("/images/2")
        assert path.isascii()
    assert not result.warnings
    assert [read(how, image) for image in result.images] == [
        backend.files[image.uri.removeprefix("backend://")] for image in result.images
    ]


def test_async_callers_use_the_native_async_methods_and_other_methods_never_run_on_the_loop():
    native, blocking = AsyncFiles(), Files()
    read("async", generate("async", output_dir=native).image)
    assert native.awaited == ["upload", "download"]
    read("async", generate("async", output_dir=blocking).image)
    assert threading.main_thread() not in blocking.threads


@both
def test_the_model_reads_the_virtual_path_and_the_artifact_a_uri(how):
    backend = Files()
    message = tool_message(
        how, CogViewImageTool(base_url="sandbox:", output_dir=BackendFolder(backend, "/studio/art/"))
    )
    (path,) = backend.files
    assert path.startswith("/studio/art/")
    assert f"saved as {path})" in message.content
    assert "backend:" not in message.content
    (image,) = message.artifact["images"]
    assert (image["path"], image["uri"]) == (None, f"backend://{path}")


@both
def test_an_artifact_is_read_only_through_a_backend_that_the_reader_passes(how):
    backend = Files()
    message = tool_message(how, CogViewImageTool(base_url="sandbox:", output_dir=backend))
    (content,) = backend.files.values()
    for storage in (backend, BackendFolder(backend), ["s3://bucket", backend]):
        (image,) = images_from_messages([message], storage=storage)
        assert read(how, image) == content
    for storage in (None, "s3://bucket", BackendFolder(backend, "/other")):
        (image,) = images_from_messages([message], storage=storage)
        with pytest.raises(CogViewStorageError, match="in none of the allowed folders"):
            read(how, image)


@pytest.mark.parametrize("path", ["/secrets/a.png", "/images/../secrets/a.png", "/images/deep/a.png", "/imagesX/a.png", "/images/.a", "/images/a\n.png"])  # fmt: skip
def test_a_forged_uri_reaches_no_other_file_of_the_backend(path):
    backend = Files()
    artifact = generate("sync", output_dir=backend).to_artifact()
    (content,) = backend.files.values()
    backend.files[path] = content
    artifact["images"][0]["uri"] = f"backend://{path}"
    with pytest.raises(CogViewStorageError, match="in none of the allowed folders"):
        ImageResult.from_artifact(artifact, storage=backend).read()


def test_a_file_that_was_replaced_is_not_mistaken_for_the_image():
    backend = Files()
    first, second = (generate("sync", prompt, output_dir=backend) for prompt in ("a kitten", "a puppy"))
    paths = [result.uri.removeprefix("backend://") for result in (first, second)]
    backend.files[paths[0]] = backend.files[paths[1]]
    with pytest.raises(CogViewStorageError, match="not the image that is recorded"):
        first.read()
    backend.files[paths[0]] = b"text"
    with pytest.raises(CogViewStorageError, match="not an image"):
        first.read()
    del backend.files[paths[0]]
    with pytest.raises(CogViewStorageError, match="does not exist"):
        first.read()


# --- failures


class Failing(Files):
    def __init__(self, failure):
        super().__init__()
        self.failure = failure

    def upload_files(self, files):
        if isinstance(self.failure, Exception):
            raise self.failure
        return self.failure


@both
@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (RuntimeError(SECRET), "StateBackend needs a running graph"),
        (NotImplementedError(), "the backend cannot do this"),
        (PermissionError(13, SECRET), "access was denied"),
        (KeyError(SECRET), "KeyError"),
        ([Response("/a", error="permission_denied")], "access was denied"),
        ([Response("/a", error=SECRET)], "the backend reported an error"),
        ([], "did not say what became of the file"),
        (None, "did not say what became of the file"),
    ],
)
def test_an_upload_that_fails_keeps_the_image_in_memory_and_names_the_cause(how, failure, why):
    result = generate(how, output_dir=Failing(failure))
    (warning,) = result.warnings
    assert why in warning
    assert "backend:///images" in warning
    assert SECRET not in warning
    assert result.uri is None
    assert result.read().startswith(b"\x89PNG")


@both
def test_a_tool_keeps_such_an_image_in_a_temporary_folder(how):
    message = tool_message(how, CogViewImageTool(base_url="sandbox:", output_dir=Failing(RuntimeError())))
    (image,) = images_from_messages([message])
    assert image.read()
    assert "StateBackend needs a running graph" in image.warnings[0]


@both
def test_a_backend_that_never_answers_costs_no_image(how, sandbox):
    ended = threading.Event()

    class Silent(Files):
        def upload_files(self, files):
            ended.wait()
            return super().upload_files(files)

    try:
        generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=Silent(), timeout=2)
        result = generator.invoke("a kitten") if how == "sync" else asyncio.run(generator.ainvoke("a kitten"))
    finally:
        ended.set()
    assert "the time limit passed" in result.warnings[0]
    assert result.read()


# --- settings


@pytest.mark.parametrize(
    "value", [5, object(), Files, lambda runtime: Files()], ids=["int", "object", "class", "factory"]
)
def test_what_is_no_backend_is_refused_with_what_to_pass(value):
    with pytest.raises(CogViewConfigurationError, match="no backend of deepagents") as caught:
        CogViewImageGenerator(base_url="sandbox:", output_dir=value)
    assert "Pass the backend itself" in str(caught.value)


@pytest.mark.parametrize("folder", [Files(), None, "images"], ids=["backend", "none", "folder"])
def test_options_of_a_store_are_refused_where_nothing_takes_them(folder):
    folder = Path(folder) if isinstance(folder, str) else folder
    with pytest.raises(ValueError, match="storage_options are for"):
        CogViewImageGenerator(base_url="sandbox:", output_dir=folder, storage_options={"key": "x"})


@pytest.mark.parametrize("path", ["images", "/a/../b", "/a//b", "/~\n", "C:/a", 5, "/a\\b"])
def test_a_path_that_is_not_virtual_is_refused(path):
    with pytest.raises(CogViewConfigurationError, match="absolute virtual path"):
        BackendFolder(Files(), path)


@pytest.mark.filterwarnings("ignore:The function `load` is in beta")
def test_a_backend_is_in_no_repr_and_no_serialized_form():
    class Secretive(Files):
        def __repr__(self):
            return SECRET

    generator = CogViewImageGenerator(base_url="sandbox:", output_dir=Secretive())
    dumped = dumpd(generator)
    for text in (repr(generator), str(dumped), generator.model_dump_json()):
        assert SECRET not in text
        assert "Files object" not in text
    assert dumped["kwargs"]["output_dir"] == "backend:///images"
    with pytest.raises(CogViewConfigurationError, match="Pass the backend itself"):
        load(dumped, allowed_objects=[CogViewImageGenerator], valid_namespaces=["langchain_cogview"])
    with pytest.raises(TypeError, match="output_dir cannot be pickled"):
        pickle.dumps(generator)


def test_a_copy_keeps_the_backend_and_an_unpickled_result_reads_nothing_through_it():
    backend = Files()
    generator = CogViewImageGenerator(base_url="sandbox:", output_dir=backend)
    for copied in (copy.deepcopy(generator), generator.model_copy(update={"size": "square"})):
        copied.invoke("a kitten")
    assert len(backend.files) == 2
    assert copy.deepcopy(generator.invoke("a puppy")).read()
    with pytest.raises(CogViewStorageError, match="in none of the allowed folders"):
        pickle.loads(pickle.dumps(generator.invoke("a foal"))).read()


def test_a_cached_image_is_found_in_the_backend_or_saved_there_again(tmp_path):
    backend = Files()
    generator = CogViewImageGenerator(base_url="sandbox:", output_dir=backend, cache=tmp_path)
    first, second = generator.invoke("a kitten"), generator.invoke("a kitten")
    assert second.cached
    assert second.uri == first.uri
    backend.files.clear()
    third = generator.invoke("a kitten")
    assert third.cached
    assert third.uri.removeprefix("backend://") in backend.files
