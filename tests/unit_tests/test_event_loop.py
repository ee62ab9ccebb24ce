"""Nothing of this package blocks an event loop, and a loop that refuses blocking calls costs no paid image.

The whole test run is guarded (see `conftest.py`); these tests are about what the guard does not see, and about what happens when
such a guard raises all the same.
"""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from langchain_core.caches import InMemoryCache

from langchain_cogview import CogViewImageGenerator, CogViewImageTool, ImageTask, images_from_messages

ROOT = Path(__file__).parents[2]


def python(program, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=100, check=False, env=environment
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_guard_is_at_work_in_these_tests():
    from blockbuster import BlockingError

    from langchain_cogview.images.store import write_whole

    async def blocks():
        write_whole(Path("never-written"), b"")

    with pytest.raises(BlockingError):
        asyncio.run(blocks())


def test_the_first_call_loads_its_modules_and_certificates_in_a_thread():
    program = """
import asyncio, ssl, sys, threading
from langchain_cogview import CogViewImageGenerator, Sandbox

seen = []

def hook(event, arguments):
    if event in ("import", "cogview.context") and threading.current_thread() is threading.main_thread() and looping:
        seen.append(arguments[0])

looping = False
sys.addaudithook(hook)
read_certificates = []

read = ssl.SSLContext.load_verify_locations

def noting_the_thread(*arguments, **options):
    read_certificates.append(threading.current_thread() is not threading.main_thread())
    return read(*arguments, **options)

ssl.SSLContext.load_verify_locations = noting_the_thread

async def main():
    global looping
    generator = CogViewImageGenerator(base_url="sandbox:", output_dir=sys.argv[1], cache=sys.argv[1] + "/cache")
    live = CogViewImageGenerator(base_url="https://127.0.0.1:9", api_key="any", max_retries=0)
    looping = True
    await generator.ainvoke("a fox")
    try:
        await live.ainvoke("a fox")
    except Exception as error:
        print(type(error).__name__)
    looping = False
    print(read_certificates)

asyncio.run(main())
heavy = {"httpx", "httpcore", "ssl", "h11", "langchain_cogview", "certifi", "PIL", "fsspec"}
print(sorted(name for name in seen if name.partition(".")[0] in heavy))
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        assert python(program, folder).split("\n")[:3] == ["CogViewConnectionError", "[True]", "[]"]


@pytest.mark.parametrize(
    "call",
    [
        "[found async for found in CogViewImageGenerator(base_url='sandbox:').astream_many(['a fox'], progress=True)]",
        "await arun_job(['a fox'], sys.argv[1], base_url='sandbox:', progress=True)",
    ],
    ids=["astream_many", "arun_job"],
)
def test_a_progress_bar_is_loaded_in_a_thread(call, tmp_path):
    program = f"""
import asyncio, sys
from blockbuster import blockbuster_ctx
from langchain_cogview import CogViewImageGenerator
from langchain_cogview.jobs import arun_job

async def main():
    with blockbuster_ctx():
        {call}

assert "tqdm" not in sys.modules
asyncio.run(main())
print("tqdm" in sys.modules)
"""
    assert python(program, tmp_path / "job") == "True\n"


WAYS = {
    "a folder": lambda path: {"output_dir": path / "out"},
    "memory": lambda path: {},
    "a cache": lambda path: {"cache": path / "cache"},
    "a folder and a cache": lambda path: {"output_dir": path / "out", "cache": path / "cache"},
    "LangChain's cache": lambda path: {"cache": InMemoryCache()},
    "the task endpoint": lambda path: {"output_dir": path / "out", "model": "glm-image"},
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_a_tool_saves_its_image_without_a_blocking_call(sandbox, tmp_path, settings, caplog):
    tool = CogViewImageTool(
        generator=CogViewImageGenerator(base_url=sandbox.base_url, **settings(tmp_path))
    )  # a tool's own output_dir has a default

    async def twice():
        call = {"type": "tool_call", "id": "1", "name": tool.name, "args": {"prompt": "a fox"}}
        return [await tool.ainvoke(call), await tool.ainvoke(call)]

    messages = asyncio.run(twice())
    for image in images_from_messages(messages):
        assert image.path.read_bytes().startswith(b"\x89PNG")
        assert not any("could not" in warning for warning in image.warnings)
    assert caplog.messages == []
    assert sandbox.images_made == (1 if tool.generator.cache else 2)


def test_a_task_is_submitted_asked_for_and_had_without_a_blocking_call(sandbox, tmp_path, caplog):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, model="glm-image", output_dir=tmp_path)

    async def result():
        task = await generator.asubmit("a fox")
        again = ImageTask.resume(task.id, generator=generator)
        assert await again.astatus() in {"processing", "succeeded"}
        return await again.aresult()

    assert asyncio.run(result()).path.parent == tmp_path
    assert caplog.messages == []


class ForbiddenError(Exception):
    """What a server's guard raises."""


@pytest.mark.parametrize("thread_fails", [False, True])
def test_an_image_is_kept_where_the_event_loop_refuses_to_fetch_it(
    sandbox, tmp_path, monkeypatch, caplog, thread_fails
):
    from langchain_cogview import generation
    from langchain_cogview.errors import CogViewStorageError

    async def refused(*arguments, **options):
        raise ForbiddenError("Blocking call to os.mkdir")

    def fails(*arguments, **options):
        raise CogViewStorageError("The disk is full.")

    monkeypatch.setattr(generation, "afetch", refused)
    if thread_fails:
        monkeypatch.setattr(generation, "fetch", fails)
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path)
    result = asyncio.run(generator.ainvoke("a fox"))
    assert sandbox.images_made == 1
    assert "ForbiddenError: Blocking call to os.mkdir" in caplog.text
    if thread_fails:
        assert result.url
        assert any("The disk is full." in warning for warning in result.warnings)
    else:
        assert result.path.read_bytes().startswith(b"\x89PNG")


def test_a_temporary_folder_that_cannot_be_used_is_named_in_the_warning(sandbox, monkeypatch):
    from langchain_cogview import answers as module

    def refused():
        raise ForbiddenError("Blocking call to os.mkdir")

    monkeypatch.setattr(module, "temporary_folder", refused)
    tool = CogViewImageTool(generator=CogViewImageGenerator(base_url=sandbox.base_url))
    message = asyncio.run(
        tool.ainvoke({"type": "tool_call", "id": "1", "name": tool.name, "args": {"prompt": "a fox"}})
    )
    (image,) = images_from_messages([message])
    assert image.url
    assert any("ForbiddenError: Blocking call to os.mkdir" in warning for warning in image.warnings)


def test_hundreds_of_calls_at_once_save_every_image(tmp_path):
    from langchain_cogview import Sandbox

    async def all_of_them(generator):
        return await generator.abatch([f"fox {number}" for number in range(150)])

    with Sandbox() as service:
        generator = CogViewImageGenerator(
            base_url=service.base_url, output_dir=tmp_path, max_concurrency=100, size="512x512"
        )
        results = asyncio.run(all_of_them(generator))
        assert len({result.path for result in results}) == len(list(tmp_path.iterdir())) == 150


@pytest.mark.skipif(sys.platform == "win32", reason="uvloop has no Windows version")
def test_a_uvloop_works_as_any_other(sandbox, tmp_path):
    uvloop = pytest.importorskip("uvloop")
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path, cache=tmp_path / "cache")

    async def asks():
        return await tool.ainvoke({"prompt": "a fox"})

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert "saved as" in runner.run(asks())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # another loop
        assert "saved as" in runner.run(asks())
    assert sandbox.images_made == 1
