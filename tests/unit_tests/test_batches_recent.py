"""What a user relies on: an error of one call in a pool names the images that the other calls made, which the pool drops."""

from __future__ import annotations

import asyncio
import gc
import pickle
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest

from langchain_cogview import CogViewContentFilterError, CogViewError, CogViewImageGenerator
from langchain_cogview.batches import MAX_NAMED
from langchain_cogview.sandbox import Sandbox, SandboxServer
from tests.unit_tests.cli.test_command import KEY

PROMPTS = [*(f"a kitten, number {number}" for number in range(5)), "x [[content-filter]]", "a foal", "a heron"]


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


@pytest.mark.parametrize("workers", [1, 4])
def test_a_pool_of_threads_that_raises_names_all_images_that_were_made(sandbox, tmp_path, workers):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path)
    with pytest.raises(CogViewContentFilterError) as raised, ThreadPoolExecutor(workers) as pool:
        list(pool.map(generator.invoke, PROMPTS))
    files = [path for path in tmp_path.iterdir() if path.suffix == ".png"]
    assert files
    shown = "".join(traceback.format_exception(raised.value))
    assert all(str(path) in shown for path in files)
    assert f"{len(files)} images were made by other calls" in notes(raised.value)


async def test_gather_names_those_that_end_later_too(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url)
    results = await asyncio.gather(*map(generator.ainvoke, PROMPTS), return_exceptions=True)
    (error,) = [item for item in results if isinstance(item, Exception)]
    urls = [image.url for item in results if not isinstance(item, Exception) for image in item.images]
    assert len(urls) == len(PROMPTS) - 1
    assert all(url in notes(error) for url in urls)
    assert notes(error).count("made by other calls") == 1


def _invoke(base_url: str, folder: str, prompt: str) -> None:
    global generator
    if "generator" not in globals():
        generator = CogViewImageGenerator(base_url=base_url, api_key=KEY, output_dir=folder)
    generator.invoke(prompt)


def test_a_pool_of_processes_names_those_of_the_process_that_failed(tmp_path):
    with SandboxServer(Sandbox()) as server, get_context("spawn").Pool(1) as pool:
        tasks = [(server.base_url, str(tmp_path), prompt) for prompt in PROMPTS]
        with pytest.raises(CogViewContentFilterError) as raised:
            pool.starmap(_invoke, tasks, chunksize=1)
    assert "5 images were made by other calls" in notes(raised.value)
    assert str(tmp_path) in notes(raised.value)


def test_a_lone_failure_has_no_note(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url)
    with pytest.raises(CogViewError) as raised:
        generator.invoke("x [[content-filter]]")
    assert "other calls" not in notes(raised.value)


def test_a_batch_reports_its_results_itself(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url)
    with pytest.raises(CogViewError) as raised:
        generator.batch(PROMPTS)
    assert "other calls" not in notes(raised.value)


def test_many_images_are_counted_and_few_are_named(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url)
    for number in range(MAX_NAMED + 5):
        generator.invoke(f"a kitten, number {number}")
    with pytest.raises(CogViewError) as raised:
        generator.invoke("x [[content-filter]]")
    assert f"{MAX_NAMED + 5} images were made" in notes(raised.value)
    assert "and 5 before" in notes(raised.value)
    assert "a kitten" not in notes(raised.value)


def test_no_error_is_kept_alive(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url)
    errors = []
    for _ in range(3):
        with pytest.raises(CogViewError) as caught:
            generator.invoke("x [[content-filter]]")
        errors.append(weakref.ref(caught.value))
        del caught
    gc.collect()
    assert not [error for error in errors if error()]


def test_generators_with_the_same_settings_stay_equal_and_can_be_pickled(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url)
    generator.invoke("a kitten")
    assert pickle.loads(pickle.dumps(generator)).invoke("a foal").images
