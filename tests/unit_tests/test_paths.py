"""Folders as people give them: a home that is not known, a current folder that is gone, characters that no path has."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from langchain_cogview import (
    CogViewConfigurationError,
    CogViewError,
    CogViewImageGenerator,
    CogViewImageTool,
    gallery,
    images_from_messages,
    run_job,
)
from langchain_cogview.errors import CogViewStorageError

NOBODY = "~nobody-has-this-name/x"
NO_HOME = pytest.mark.parametrize("path", [NOBODY, Path(NOBODY)], ids=["text", "path"])


@NO_HOME
@pytest.mark.parametrize("argument", ["output_dir", "cache"])
@pytest.mark.parametrize("kind", [CogViewImageGenerator, CogViewImageTool])
def test_a_home_that_is_not_known_is_named_before_anything_is_paid(kind, argument, path):
    with pytest.raises(CogViewConfigurationError, match=f"{argument} begins with '~'.*HOME"):
        kind(base_url="sandbox:", **{argument: path})


@NO_HOME
def test_a_home_that_is_not_known_is_an_error_of_ours_elsewhere_too(path, generator, tmp_path):
    with pytest.raises(CogViewConfigurationError):
        run_job(["a fox"], path, base_url="sandbox:")
    with pytest.raises(CogViewConfigurationError):
        run_job(path, tmp_path, base_url="sandbox:")
    result = generator.invoke("a fox")
    for saves in (result, result.images[0], gallery(result)):
        with pytest.raises(CogViewStorageError):
            saves.save(path)


@pytest.mark.parametrize("path_type", [str, Path])
def test_the_home_folder_is_found(sandbox, tmp_path, monkeypatch, path_type):
    monkeypatch.setenv("HOME", str(tmp_path))
    generator = CogViewImageGenerator(
        base_url=sandbox.base_url, output_dir=path_type("~/out"), cache=path_type("~/cache")
    )
    assert generator.invoke("a fox").path.parent == tmp_path / "out"
    assert (tmp_path / "cache" / "entries").is_dir()


def test_a_current_folder_that_is_gone_loses_no_image(tmp_path):
    """In a process of its own: the tests need their current folder."""
    program = """
import asyncio, os, sys
from langchain_cogview import CogViewConfigurationError, CogViewImageGenerator, CogViewImageTool, run_job
gone = os.path.join(sys.argv[1], "gone")
os.mkdir(gone)
os.chdir(gone)
os.rmdir(gone)
for make in (
    lambda: CogViewImageGenerator(base_url="sandbox:", cache="here"),
    lambda: run_job(["a fox"], "here", base_url="sandbox:"),
):
    try:
        make()
    except CogViewConfigurationError as error:
        print("ours", error)
for result in (
    CogViewImageGenerator(base_url="sandbox:", output_dir="here").invoke("a fox"),
    asyncio.run(CogViewImageGenerator(base_url="sandbox:", output_dir="here").ainvoke("a fox")),
):
    print(len(result.read()) > 1000, result.warnings[0])
tool = CogViewImageTool(base_url="sandbox:")
for text in (tool.invoke({"prompt": "a fox"}), asyncio.run(tool.ainvoke({"prompt": "a fox"}))):
    print(text)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ours", "ours", "True", "True", "Made", "Made"]
    assert all("No such file or directory" in line for line in lines[2:4])
    assert all("saved as" in line for line in lines[4:])


@pytest.mark.parametrize("argument", ["output_dir", "cache"])
@pytest.mark.parametrize("path", ["a\0b", "", "   "])
def test_what_names_no_folder_is_refused_before_anything_is_paid(argument, path):
    with pytest.raises((ValueError, CogViewError), match=argument):
        CogViewImageGenerator(base_url="sandbox:", **{argument: path})


def test_a_cache_may_be_configured_for_a_call_on_the_event_loop(sandbox, tmp_path, monkeypatch):
    from langchain_core.runnables import ConfigurableField

    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path / "out")
    configurable = generator.configurable_fields(cache=ConfigurableField(id="cache"))
    monkeypatch.chdir(tmp_path)

    async def ask(folder):
        return await configurable.ainvoke("a fox", {"configurable": {"cache": folder}})

    for folder in ("relative", str(tmp_path / "absolute")):
        assert not asyncio.run(ask(folder)).cached
        assert asyncio.run(ask(folder)).cached
        assert (tmp_path / folder / "entries").is_dir()


@NO_HOME
def test_a_folder_to_read_from_in_an_unknown_home_is_an_error_of_ours(path):
    with pytest.raises(CogViewConfigurationError, match="within begins with '~'.*HOME"):
        images_from_messages([], within=path)
