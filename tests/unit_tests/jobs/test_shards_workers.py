"""What a user relies on: further workers of a job in shards need its folder alone, and bring a key of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from decimal import Decimal

import pytest

from langchain_cogview import CogViewConfigurationError
from langchain_cogview.jobs import merge_shards, run_job, run_shards, work_on_shards
from langchain_cogview.jobs.shards import DIVISION
from langchain_cogview.sandbox import Sandbox, SandboxServer
from tests.unit_tests.cli.test_command import KEY, cogview

PROMPTS = [f"a kitten, number {number}" for number in range(24)]


def begun(sandbox, folder, prompts=PROMPTS, count=4, **arguments):
    """A job of which nothing was made yet but its folder."""
    arguments = {"limit": 0, "base_url": sandbox.base_url, "progress": False, **arguments}
    return run_shards(prompts, folder, count, **arguments)


def test_a_worker_needs_the_folder_alone_and_finishes_the_job(sandbox, tmp_path):
    begun(sandbox, tmp_path, size="16:9", unique=True)
    reports = work_on_shards(tmp_path, progress=False)
    assert sum(report.made for report in reports) == len(PROMPTS)
    assert {request.body["size"] for request in sandbox.requests} == {"1344x768"}
    assert sum(report.made for report in work_on_shards(tmp_path, progress=False)) == 0
    assert len(sandbox.requests) == len(PROMPTS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "# a comment\na kitten\n\na foal\n"),
        ("ein Fuchs.csv", "prompt,size\na kitten,square\na foal,16:9\n"),
        ("p.jsonl", '{"prompt": "a kitten", "n": 2}\n"a foal"\n'),
        ("p.list", "a kitten\na foal\n"),
        ("p.NDJSON", '"a kitten"\n"a foal"\n'),
        pytest.param("a\\b.txt", "a kitten\na foal\n", marks=pytest.mark.skipif(os.sep != "/", reason="a folder here")),
    ],
)
def test_the_copy_of_the_prompts_gives_the_same_job(sandbox, tmp_path, name, text):
    prompts = tmp_path / name
    prompts.write_text(text)
    form = {"format": "txt"} if name == "p.list" else {}
    run_shards(prompts, tmp_path / "job", 2, base_url=sandbox.base_url, progress=False, **form)
    sent = len(sandbox.requests)
    prompts.unlink()
    work_on_shards(tmp_path / "job", progress=False)
    assert len(sandbox.requests) == sent
    merged = merge_shards(tmp_path / "job")
    assert {json.loads(line)["source"] for line in merged.manifest.read_text().splitlines()} == {name}


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_a_file_whose_name_is_not_text_has_a_copy_too(sandbox, tmp_path):
    prompts = tmp_path / os.fsdecode(b"\xff kittens.txt")
    prompts.write_text("a kitten\na foal\n")
    begun(sandbox, tmp_path / "job", prompts, 2)
    assert sum(report.made for report in work_on_shards(tmp_path / "job", progress=False)) == 2


def test_the_copy_of_a_list_gives_the_same_job(sandbox, tmp_path):
    # Blank, not valid in several ways, of other types than JSON has, and not UTF-8.
    values = ["a kitten", "", 7, {"prompt": b"a foal"}, {"prompt": "a hare", "o": {1}}, b"a fox", {"prompt": b"\xff"}]
    values += [{"prompt": "a cat", "n": Decimal(2), "note": "\ud800"}, {"prompt": "a dog", 1: (2, None)}]
    run_shards(values, tmp_path, 2, base_url=sandbox.base_url, progress=False, skip_bad=True)
    sent = sorted(request.body["prompt"] for request in sandbox.requests)
    assert sent == ["a cat", "a cat", "a dog", "a foal", "a kitten"]
    reports = work_on_shards(tmp_path, progress=False)
    assert sum(report.skipped for report in reports) == 4
    assert {report.bad for report in reports} == {4}
    assert len(sandbox.requests) == len(sent)


@pytest.mark.parametrize("prompts", [{"prompt": "a kitten", "size": "square"}, b"p.txt", None, 5])
def test_what_is_no_list_of_prompts_is_refused(sandbox, tmp_path, prompts):
    with pytest.raises(CogViewConfigurationError, match="must be a list of strings and dicts"):
        begun(sandbox, tmp_path / "job", prompts)
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("count", [0, -1, 2.0, "two", None])
def test_what_is_no_number_of_shards_is_refused(sandbox, tmp_path, count):
    with pytest.raises(CogViewConfigurationError, match="shard is a number and a count"):
        begun(sandbox, tmp_path / "job", count=count)
    assert not (tmp_path / "job").exists()


def test_the_copy_follows_the_file(sandbox, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a kitten\n")
    begun(sandbox, tmp_path / "job", prompts, 2)
    prompts.write_text("a kitten\na foal\n")
    begun(sandbox, tmp_path / "job", prompts, 2)
    assert sum(report.made for report in work_on_shards(tmp_path / "job", progress=False)) == 2


def test_the_budget_of_the_job_holds_for_workers(sandbox, tmp_path):
    begun(sandbox, tmp_path, budget=Decimal("0.30"))
    assert work_on_shards(tmp_path, progress=False)[-1].over_budget
    assert len(sandbox.requests) == 5
    work_on_shards(tmp_path, progress=False, budget="0.60")
    assert len(sandbox.requests) == 10


def test_no_file_of_the_folder_has_a_secret(tmp_path):
    with SandboxServer(Sandbox()) as server:
        secrets = {"api_key": KEY, "shared_limit": "redis://:secret-word@127.0.0.1:1/0"}
        begun(server, tmp_path, **secrets)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert KEY not in text
            assert "secret-word" not in text


@pytest.mark.parametrize("settings", [{}, {"base_url": "https://evil.example/v4"}])
def test_the_folder_does_not_decide_where_the_key_is_sent(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("ZHIPUAI_API_KEY", KEY)
    with SandboxServer(Sandbox()) as server:
        begun(server, tmp_path)
        division = json.loads((tmp_path / DIVISION).read_text())
        division["settings"] |= settings
        (tmp_path / DIVISION).write_text(json.dumps(division))
        with pytest.raises(CogViewConfigurationError, match="is damaged" if settings else "if you trust that service"):
            work_on_shards(tmp_path, progress=False)
        assert server.sandbox.requests == []


def test_a_folder_that_was_never_begun_says_how(sandbox, tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CogViewConfigurationError, match=r"has no job in shards.*--shards NUMBER"):
            work_on_shards(folder)
    assert not (tmp_path / "none").exists()
    run_job(PROMPTS, tmp_path / "job", shard="2/5", base_url=sandbox.base_url, progress=False)
    with pytest.raises(CogViewConfigurationError, match=r"no copy of the prompts.*--shards 5"):
        work_on_shards(tmp_path / "job")


@pytest.mark.parametrize(
    "change",
    [
        {"type": "other"},
        {"count": 0},
        {"prompts": "../../etc/passwd"},
        {"prompts": ""},
        {"options": {"retry_unknown": True}},
        {"settings": {"api_key": "x"}},
        {"format": "exe"},
    ],
)
def test_a_damaged_division_is_refused(sandbox, tmp_path, change):
    begun(sandbox, tmp_path)
    division = json.loads((tmp_path / DIVISION).read_text())
    (tmp_path / DIVISION).write_text(json.dumps(division | change))
    with pytest.raises(CogViewConfigurationError, match="is damaged"):
        work_on_shards(tmp_path, progress=False)
    begun(sandbox, tmp_path)
    assert work_on_shards(tmp_path, progress=False)


def test_a_link_in_place_of_the_copy_is_not_read(sandbox, tmp_path):
    begun(sandbox, tmp_path)
    (copy,) = (tmp_path / "shards-prompts").iterdir()
    copy.unlink()
    copy.symlink_to("/etc/hostname")
    with pytest.raises(CogViewConfigurationError, match="is not a regular file"):
        work_on_shards(tmp_path, progress=False)


def test_the_standard_input_is_refused(sandbox, tmp_path):
    with pytest.raises(CogViewConfigurationError, match="standard input can be read once"):
        begun(sandbox, tmp_path / "job", "-")
    assert not (tmp_path / "job").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_is_refused_and_not_waited_for(sandbox, tmp_path):
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(CogViewConfigurationError, match=r"p\.txt can be read once"):
        begun(sandbox, tmp_path / "job", tmp_path / "p.txt")
    assert not (tmp_path / "job").exists()


def test_what_is_refused_leaves_no_copy(sandbox, tmp_path):
    with pytest.raises(CogViewConfigurationError):
        begun(sandbox, tmp_path / "job", ["a kitten"], 20_000)
    begun(sandbox, tmp_path / "job")
    with pytest.raises(CogViewConfigurationError, match="divided into 4 shards"):
        begun(sandbox, tmp_path / "job", ["another"], 3)
    assert json.loads((tmp_path / "job" / DIVISION).read_text())["count"] == 4


def test_the_command_works_in_several_processes_and_says_when_all_is_finished(tmp_path, monkeypatch):
    monkeypatch.setenv("ZHIPUAI_API_KEY", KEY)
    with SandboxServer(Sandbox(latency=0.01, in_flight_limit=100)) as server:
        begun(server, tmp_path, count=6, api_key=KEY)
        command = [sys.executable, "-m", "langchain_cogview.cli", "work", str(tmp_path)]
        command += ["--base-url", server.base_url, "--no-progress"]
        workers = [
            subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ})
            for _ in range(2)
        ]
        texts = [worker.communicate()[1] for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0], texts
        assert Counter(request.prompt for request in server.sandbox.requests) == Counter(PROMPTS)
        result = cogview("work", str(tmp_path), "--base-url", server.base_url, "--no-progress")
        assert result.exit_code == 0
        assert "All 6 shards are finished" in result.stderr
        assert len(server.sandbox.requests) == len(PROMPTS)


def test_the_command_says_what_is_wrong_with_a_folder(tmp_path):
    result = cogview("work", str(tmp_path))
    assert result.exit_code == 2
    assert "has no job in shards" in result.stderr
