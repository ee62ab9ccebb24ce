"""What speed rests on, counted and not timed: `python -m benchmarks` has the figures."""

import asyncio
import importlib.util
import os
import ssl
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from typing import Annotated

import httpx
import pytest
from langchain_core.tools import InjectedToolCallId

from benchmarks import clients, stub
from langchain_cogview import CogViewImageGenerator, CogViewImageTool

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def service():
    with stub.running() as running:
        yield running


def loaded_by(code: str) -> set[str]:
    """Modules that some code loads, above what `BaseTool` has loaded."""
    script = f"""
import sys
from langchain_core.tools import BaseTool
before = set(sys.modules)
{textwrap.dedent(code)}
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_package_alone_loads_nothing():
    assert loaded_by("import langchain_cogview") == {"langchain_cogview"}


def test_a_tool_is_made_without_http_extras_server_or_notebook():
    loaded = loaded_by(f"from langchain_cogview import CogViewImageTool; CogViewImageTool(api_key={clients.KEY!r})")
    tops = {name.partition(".")[0] for name in loaded}
    assert not tops & {"PIL", "fsspec", "s3fs", "typer", "IPython", "ipykernel", "tqdm", "http", "socketserver"}
    assert not tops & {"httpx", "httpcore", "h11", "tenacity", "anyio"}, "the wire comes with the first call"
    assert not {name for name in loaded if name.startswith("langchain_cogview.sandbox")}


def test_a_call_loads_no_extra_either(service):
    loaded = loaded_by(f"""
        from langchain_cogview import CogViewImageGenerator
        CogViewImageGenerator(base_url={service.base_url()!r}, api_key={clients.KEY!r}, download=False).invoke("a kitten")
    """)
    assert not {name.partition(".")[0] for name in loaded} & {"PIL", "fsspec", "typer", "IPython", "tqdm"}


def test_many_generators_make_no_ssl_context_and_open_nothing(monkeypatch):
    made = []
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *a, **k: made.append(a))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    kept = [CogViewImageGenerator(api_key=clients.KEY) for _ in range(200)]
    tools = [CogViewImageTool(api_key=clients.KEY) for _ in range(20)]
    after = len(os.listdir("/proc/self/fd")) if before else 0
    assert (len(kept), len(tools), made, after - before) == (200, 20, [], 0)


def test_one_ssl_context_serves_all_connections_of_a_setting():
    from langchain_cogview.api.settings import tls_context

    assert tls_context() is tls_context()


@pytest.mark.parametrize("how", ["batch", "abatch", "astream_many", "stream_many"])
def test_a_connection_is_opened_for_each_slot_and_none_for_each_call(how):
    with stub.running() as service:  # of its own, to count
        generator = clients.our_generator(service.base_url(0.01), 8)
        prompts = [f"a kitten {number}" for number in range(80)]

        async def astream_many():
            return [result async for _, result in generator.astream_many(prompts)]

        async def twice(run):
            return [*await run(), *await run()]

        if how == "batch":
            results = [*generator.batch(prompts), *generator.batch(prompts)]
        elif how == "stream_many":
            results = [result for _ in range(2) for _, result in generator.stream_many(prompts)]
        else:
            run = astream_many if how == "astream_many" else lambda: generator.abatch(prompts)
            results = asyncio.run(twice(run))
        assert {len(result.images) for result in results} == {1}
        counts = service.counts()
        assert (counts["posts"], counts["connections"] <= 8) == (160, True)


async def test_a_stream_holds_what_is_under_way_and_not_what_went_through(service):
    generator = clients.our_generator(service.base_url(), 16)
    started = 0

    def prompts(count):
        nonlocal started
        for started in range(count):
            yield f"a kitten {started}"

    async def drained(count):
        async for _ in generator.astream_many(prompts(count)):
            pass

    await drained(100)
    tracemalloc.start()
    try:
        await drained(50)
        few = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        await drained(500)
        many = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert many < few + 250_000


def test_images_are_not_held_while_they_are_saved(service, tmp_path):
    generator = clients.our_generator(service.base_url(), 4, download=True, output_dir=str(tmp_path))
    list(generator.stream_many(["a kitten"] * 4))
    tracemalloc.start()
    try:
        results = [result for _, result in generator.stream_many(["a kitten"] * 24)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(result.images[0].size_bytes > stub.IMAGE_BYTES_AT_LEAST for result in results)
    assert peak < 12 * 2**20, "24 images of 3 MB"


@pytest.mark.parametrize(
    "figure",
    [
        "one_call",
        *(pytest.param(item, marks=pytest.mark.heavy) for item in ("machinery", "in_bulk", "at_once", "images", "start")),
    ],
)  # fmt: skip
def test_the_benchmark_runs_and_prints_its_table(figure):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--only", figure],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|---|" in done.stdout
    assert "langchain-cogview" in done.stdout or "CogViewImageGenerator" in done.stdout


def test_the_stub_serves_an_image_that_decodes():
    if importlib.util.find_spec("PIL") is None:
        pytest.skip("needs Pillow")
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(stub.image()))
    image.load()
    assert image.size == (stub.SIDE, stub.SIDE)


@pytest.mark.parametrize(
    ("name", "value"),
    [("http_client", httpx.AsyncClient()), ("http_async_client", httpx.Client()), ("http_client", object())],
)
def test_a_client_that_is_none_of_its_kind_is_refused_though_httpx_was_not_loaded_for_it(name, value):
    with pytest.raises(ValueError, match=rf"httpx2\.\w+; this is of type \w+\.{type(value).__name__}"):
        CogViewImageGenerator(base_url="http://127.0.0.1:9", api_key=clients.KEY, **{name: value})


def test_what_a_generator_takes_and_gives_is_known_to_langchain():
    generator = CogViewImageGenerator(base_url="sandbox:")
    assert generator.OutputType.__name__ == "ImageResult"
    assert "prompt" in str(generator.get_input_schema().model_json_schema())


class ToolWithItsOwnRun(CogViewImageTool):
    def _run(self, prompt, size=None, quality=None, tool_call_id: Annotated[str, InjectedToolCallId] = ""):
        return f"{prompt} of call {tool_call_id}", None


def test_a_tool_with_another_run_gets_what_langchain_injects():
    tool = ToolWithItsOwnRun(base_url="sandbox:")
    call = {"type": "tool_call", "id": "7", "name": tool.name, "args": {"prompt": "a kitten"}}
    assert tool.invoke(call).content == "a kitten of call 7"
