"""A saved image is whole or not there, and is never written over another file."""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from pathlib import Path

import pytest
from pydantic import ValidationError

from langchain_cogview import CogViewImageGenerator
from langchain_cogview.errors import CogViewConfigurationError, CogViewStorageError
from tests.faults.processes import child, reported
from tests.faults.referee import How, Verdict, call
from tests.faults.reply_table import KEY, says
from tests.faults.sample_images import png
from tests.faults.server import IMAGE, Connection, FaultServer, Request

HOWS = pytest.mark.parametrize("how", ["sync", "async"])
LARGE = png(320, 320, noise="large")


def _large(connection: Connection, request: Request) -> None:
    connection.reply(200, LARGE, "Content-Type: image/png")


def _another_each_time(connection: Connection, request: Request) -> None:
    connection.reply(200, png(16, 16, noise=str(request.number)), "Content-Type: image/png")


def unnamed_files(folder: Path) -> bool:
    """Whether this file system has files without a name; elsewhere a killed process may leave a temporary one."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
    except (AttributeError, OSError):
        return False
    return True


@pytest.mark.parametrize("times", [4, pytest.param(200, marks=[pytest.mark.heavy])])
def test_a_kill_while_saving_leaves_whole_files_only(times: int, tmp_path: Path) -> None:
    with FaultServer(None, _large, keep_requests=False) as server:
        saved = reported(child("killed", server.base_url, tmp_path, times, python=("-W", "ignore")), 500)["files"]
    files = list(tmp_path.iterdir())
    print(f"{saved} files after {times} kills")
    assert saved == len(files) >= times
    broken = [path.name for path in files if path.suffix == ".png" and path.read_bytes() != LARGE]
    assert not broken
    if unnamed_files(tmp_path):
        assert [path.name for path in files if path.suffix != ".png"] == []


@HOWS
def test_a_full_disk_costs_no_image(how: How, tmp_path: Path) -> None:
    with FaultServer(None, _large) as server:
        answer = reported(child("disk_full", server.base_url, tmp_path, how))
        assert server.posts == 1
    assert answer["path"] is None
    assert answer["warnings"]
    assert answer["bytes"] == len(LARGE)
    assert answer["files"] == []
    assert answer["save"] == "left alone"


@HOWS
def test_equal_names_do_not_overwrite_each_other(how: How, tmp_path: Path) -> None:
    with FaultServer(None, _another_each_time) as server:
        # The same address, the same ids, the same second: other bytes.
        server.api = says({"created": 1, "id": "same", "data": [{"url": server.image_url}]})
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=KEY, output_dir=tmp_path)
        images = [call(generator, how, Verdict()).images[0] for _ in range(10)]
    assert len({image.path for image in images}) == 10
    assert all(hashlib.sha256(Path(image.path).read_bytes()).hexdigest() == image.sha256 for image in images)


@HOWS
def test_the_file_of_somebody_else_is_not_touched(how: How, tmp_path: Path) -> None:
    with FaultServer() as server:
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=KEY, output_dir=tmp_path)
        server.api = says({"created": 1, "id": "same", "data": [{"url": server.image_url}]})
        name = Path(call(generator, how, Verdict()).images[0].path)
        name.write_text("a letter")
        image = call(generator, how, Verdict()).images[0]
    assert name.read_text() == "a letter"
    assert image.read() == IMAGE


def test_save_puts_a_whole_image_where_it_was_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "kitten.png"
    target.write_text("an older kitten, far longer than the new one " * 1000)
    with FaultServer() as server:
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=KEY)
        call(generator, "sync", Verdict()).images[0].save(target)
    assert target.read_bytes() == IMAGE
    assert os.listdir(tmp_path) == ["kitten.png"]


def test_save_says_what_is_wrong_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with FaultServer() as server:
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=KEY)
        image = call(generator, "sync", Verdict()).images[0]
        for path in (
            tmp_path / "file" / "x.png",
            Path("/proc/nowhere/x.png"),
            tmp_path / ("x" * 300 + ".png"),
            tmp_path / "\0.png",
        ):
            with pytest.raises(CogViewStorageError):
                image.save(path)
        assert image.read() == IMAGE


def _forbidden(folder: Path) -> Path:
    folder.chmod(0o500)
    return folder


FOLDERS = {
    "that is a file": lambda folder: folder / "letter",
    "beneath a file": lambda folder: folder / "letter" / "below",
    "where none can be made": lambda folder: Path("/proc/nowhere"),
    "with a name too long": lambda folder: folder / ("x" * 300),
    "with a null byte": lambda folder: folder / "a\0b",
    "with half a character": lambda folder: folder / "\ud800",
    "that is a dangling link": lambda folder: folder / "dangling",
    "that may not be written": lambda folder: _forbidden(folder / "forbidden"),
}


@HOWS
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_bad_folder_costs_no_image(folder: str, how: How, tmp_path: Path) -> None:
    if folder == "that may not be written" and os.geteuid() == 0:
        pytest.skip("The superuser may write everywhere.")
    (tmp_path / "letter").write_text("a letter")
    (tmp_path / "forbidden").mkdir()
    (tmp_path / "dangling").symlink_to("/proc/nowhere/at-all")
    with FaultServer() as server:
        try:
            generator = CogViewImageGenerator(
                base_url=server.base_url, api_key=KEY, output_dir=FOLDERS[folder](tmp_path)
            )
        except (CogViewConfigurationError, ValidationError):
            return  # refused before anything was paid
        outcome = call(generator, how, Verdict())
        if isinstance(outcome, CogViewConfigurationError):
            assert server.posts == 0
            return
        assert server.posts == 1
    image = outcome.images[0]
    assert image.path is None
    assert image.warnings
    assert image.read() == IMAGE
    assert (tmp_path / "letter").read_text() == "a letter"


@HOWS
def test_a_missing_folder_is_made_with_its_parents(how: How, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "c"
    with FaultServer() as server:
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=KEY, output_dir=folder)
        image = call(generator, how, Verdict()).images[0]
    assert Path(image.path).parent == folder
    assert Path(image.path).read_bytes() == IMAGE


def test_a_folder_that_vanishes_between_calls_costs_no_image(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as name, FaultServer() as server:
        folder = Path(name) / "images"
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=KEY, output_dir=folder)
        first = generator.invoke("one").images[0]
        assert first.path is not None
        Path(first.path).unlink()
        folder.rmdir()
        second = asyncio.run(generator.ainvoke("two")).images[0]
        assert second.read() == IMAGE
        generator.close()
