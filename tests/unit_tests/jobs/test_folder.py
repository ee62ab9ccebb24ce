"""What a user relies on: a job writes only its own files, believes nothing that it reads, and pays for nothing twice."""

from __future__ import annotations

import copy
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langchain_cogview import CogViewError, Sandbox, plan_job, run_job
from langchain_cogview.errors import CogViewConfigurationError, CogViewStorageError
from langchain_cogview.jobs.folder import JobFolder
from langchain_cogview.sandbox import SandboxServer
from tests.unit_tests.cli.test_batch import with_a_key
from tests.unit_tests.cli.test_command import MODULE

SMALL = {"size": "640x512"}
NAMES = (
    "job.json",
    "manifest.jsonl",
    "attempts.jsonl",
    "index.html",
    ".job.json.part",
    ".manifest.jsonl.part",
    ".lock",
)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(sandbox, out):
    def work(prompts=("a cat",), folder=out, **options):
        return run_job(list(prompts), folder, base_url=sandbox.base_url, progress=False, **{**SMALL, **options})

    return work


# --- files of others


def test_a_folder_with_other_files_is_refused_and_used_when_the_caller_agrees(run, out, sandbox):
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for job in (run, lambda: plan_job(["a cat"], out, base_url=sandbox.base_url, **SMALL)):
        with pytest.raises(CogViewConfigurationError, match="is not empty and holds no job") as caught:
            job()
        assert "into_existing=True" in caught.value.hint
    assert sandbox.requests == []
    assert [item.name for item in out.iterdir()] == ["notes.txt"]
    assert run(into_existing=True).made == 1
    assert run().skipped == 1  # from now on it is the job's
    assert (out / "notes.txt").read_text() == "mine"


def test_a_job_folder_that_is_a_file_is_called_a_file_and_nothing_is_sent(tmp_path, sandbox):
    (tmp_path / "job").write_text("a letter")
    with pytest.raises(CogViewConfigurationError, match="is a file, not a folder; nothing was sent"):
        run_job(["a cat"], tmp_path / "job", base_url=sandbox.base_url)
    assert sandbox.requests == []


@pytest.mark.parametrize("other", ["<h1>Mine</h1>", "", "<!DOCTYPE html>\n<html>"])
def test_a_page_of_the_users_stays_and_the_contact_sheet_gets_another_name(run, out, other):
    out.mkdir()
    (out / "index.html").write_text(other)
    report = run(into_existing=True)
    assert (out / "index.html").read_text() == other
    assert report.contact_sheet == out / "contact-sheet.html"
    assert "the contact sheet is contact-sheet.html" in str(report)
    again = run(["a cat", "a dog"])
    assert again.contact_sheet == out / "contact-sheet.html"
    assert "a dog" in again.contact_sheet.read_text()
    assert (out / "index.html").read_text() == other


def test_a_page_that_a_job_wrote_is_written_anew_also_one_of_the_first_version(run, out):
    page = run().contact_sheet
    page.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        "<title>CogView: out</title>\n<style></style>\n</head>\n<body>\n</body>\n</html>\n"
    )
    assert run(["a cat", "a dog"]).contact_sheet == page == out / "index.html"
    assert "a dog" in page.read_text()


@pytest.mark.parametrize("kind", ["link", "hard link", "dangling", "pipe", "folder"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("begun", [True, False])
def test_nothing_is_written_through_links_and_no_pipe_is_waited_for(  # noqa: PLR0917  fixtures
    run, out, sandbox, tmp_path, kind, name, begun
):
    if begun:
        run()
        (out / name).unlink(missing_ok=True)
    out.mkdir(exist_ok=True)
    victim = tmp_path / "victim.sh"
    if kind == "link":
        victim.write_text("#!/bin/sh\n")
    if kind in {"link", "dangling"}:
        (out / name).symlink_to(victim)
    elif kind == "hard link":
        victim.touch()
        (out / name).hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(out / name)
    else:
        (out / name).mkdir()
    before = len(sandbox.requests)
    try:
        run(["a cat", "a dog"], into_existing=True)
    except CogViewConfigurationError as error:
        assert name in error.message
        assert len(sandbox.requests) == before
        assert name in NAMES[:3]
    expected = {"link": "#!/bin/sh\n", "hard link": ""}.get(kind)
    assert (victim.read_text() if victim.exists() else None) == expected
    assert sorted(entry.prompt for entry in sandbox.ledger) in ([], ["a cat"], ["a cat", "a dog"])


@pytest.mark.parametrize("content", ['{"other": "program"}', '{"key": 1}', "text", "", '{"key":"x"}'])
@pytest.mark.parametrize("name", ["manifest.jsonl", "attempts.jsonl"])
@pytest.mark.parametrize("begun", [True, False])
def test_a_file_of_another_program_stays_as_it_is(  # noqa: PLR0917  fixtures
    run, out, sandbox, name, content, begun
):
    if begun:
        run()
    out.mkdir(exist_ok=True)
    (out / name).write_text(content)
    if begun and not content:
        return  # a job that was killed at its start leaves an empty file
    before = len(sandbox.requests)
    for agrees in (False, True):
        with pytest.raises(CogViewConfigurationError):
            run(into_existing=agrees)
    assert (out / name).read_text() == content
    assert len(sandbox.requests) == before


def test_records_that_share_their_bytes_with_a_backup_are_not_written_to(run, out, sandbox, tmp_path):
    run(["a cat"])
    backup = tmp_path / "backup"
    backup.mkdir()
    for name in ("job.json", "manifest.jsonl", "attempts.jsonl"):
        (backup / name).hardlink_to(out / name)
    before = (backup / "manifest.jsonl").read_bytes()
    with pytest.raises(CogViewConfigurationError, match="hard links"):
        run(["a cat", "a dog"])
    assert (backup / "manifest.jsonl").read_bytes() == before
    assert [entry.prompt for entry in sandbox.ledger] == ["a cat"]
    for path in backup.iterdir():
        path.unlink()
    assert run(["a cat", "a dog"]).made == 1


def test_without_hard_links_a_file_gets_its_name_once_it_is_whole(tmp_path, monkeypatch):
    created, real = [], os.open

    def opened(path, flags, *mode, **descriptors):
        created.extend([os.path.basename(path)] if flags & os.O_CREAT else [])
        return real(path, flags, *mode, **descriptors)

    def no_links(*paths, **descriptors):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "open", opened)
    with JobFolder(tmp_path) as folder:
        names = [folder.add(["a.png", "b.png"], content) for content in (b"first", b"second")]
    assert names == ["a.png", "b.png"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.png": b"first", "b.png": b"second"}
    assert not {"a.png", "b.png"}.intersection(
        created
    )  # a second copy could be cut short, under the name of a whole file


def test_a_link_to_a_folder_is_followed_once(run, out, tmp_path):
    (tmp_path / "real").mkdir()
    out.symlink_to(tmp_path / "real")
    assert run().folder == tmp_path / "real"
    assert run().skipped == 1


# --- one job in a folder


def test_a_second_job_is_refused_though_the_lock_file_is_gone_and_the_folder_renamed(run, out, sandbox, tmp_path):
    seen = []

    def second(plan):
        for name in (".lock", "job.json"):
            (out / name).unlink(missing_ok=True)
        with pytest.raises(CogViewConfigurationError, match="Another job is writing to"):
            run(["a dog"])
        out.rename(tmp_path / "moved")
        with pytest.raises(CogViewConfigurationError, match="Another job is writing to"):
            run(["a dog"], tmp_path / "moved")
        seen.append(plan)

    report = run(on_plan=second)
    assert isinstance(report.stopped, CogViewStorageError)
    assert "was moved, replaced or deleted" in str(report)
    assert (len(seen), sandbox.requests) == (1, [])


@pytest.mark.parametrize("name", ["manifest.jsonl", "attempts.jsonl"])
@pytest.mark.parametrize("change", ["deleted", "replaced", "appended"])
def test_a_record_that_another_program_changes_stops_the_job_and_keeps_what_is_paid(run, out, sandbox, name, change):
    prompts = [f"prompt {n}" for n in range(8)]

    def changed(plan):
        if change == "appended":
            with (out / name).open("a") as file:
                file.write("x")
            return
        content = (out / name).read_bytes()
        (out / name).unlink()
        if change == "replaced":
            (out / name).write_bytes(content)

    report = run(prompts, on_plan=changed, max_concurrency=2)
    assert isinstance(report.stopped, CogViewStorageError)
    assert "by another program" in str(report.stopped)
    paid = len(sandbox.ledger)
    assert paid <= (4 if (name, change) == ("manifest.jsonl", "appended") else 0)
    if change == "appended":
        (out / name).write_bytes((out / name).read_bytes().removesuffix(b"x"))
    assert run(prompts).made == 8
    assert max(Counter(entry.prompt for entry in sandbox.ledger).values()) == 1


class Command:
    """`cogview batch` as a process, at a served sandbox."""

    def __init__(self, folder: Path, sandbox: Sandbox, server: SandboxServer, prompts: list[str]) -> None:
        self.folder, self.sandbox, self.prompts = folder, sandbox, prompts
        self.base_url = server.base_url
        (folder / "p.txt").write_text("\n".join(prompts))

    def started(self, *options: str, output: str = "out", limits: Callable[[], object] | None = None):
        arguments = ("batch", "p.txt", "-o", output, "--size", "640x512", "--base-url", self.base_url, "--no-progress")
        return subprocess.Popen(
            [*MODULE, *arguments, *options],
            cwd=self.folder,
            env=with_a_key(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limits,
        )

    def finished(self, *options: str, **how) -> tuple[int, str]:
        _, stderr = (process := self.started(*options, **how)).communicate(timeout=400)
        assert "Traceback" not in stderr
        return process.returncode, stderr

    def paid(self) -> Counter[str]:
        return Counter(entry.prompt for entry in self.sandbox.ledger)


@pytest.fixture
def command(tmp_path) -> Iterator[Callable[[list[str]], Command]]:
    with Sandbox() as sandbox, SandboxServer(sandbox) as server:
        yield lambda prompts: Command(tmp_path, sandbox, server, prompts)


@pytest.mark.heavy
def test_two_processes_never_write_to_one_folder_though_its_lock_file_is_deleted(command, tmp_path):
    job = command([f"prompt {n} [[slow:6]]" for n in range(12)])
    first = job.started("--max-concurrency", "2")
    while first.poll() is None and len(job.sandbox.requests) < 2:
        time.sleep(0.01)
    (tmp_path / "out" / ".lock").unlink(missing_ok=True)
    code, stderr = job.finished()
    assert (code, "Another job is writing to" in stderr) == (2, True)
    (tmp_path / "out").rename(tmp_path / "moved")
    _, stderr = first.communicate(timeout=400)
    assert "was moved, replaced or deleted while the job ran" in stderr
    assert first.returncode == 6
    assert job.finished("--max-concurrency", "12", output="moved")[0] == 0
    assert job.paid() == Counter(job.prompts)
    lines = [json.loads(line) for line in (tmp_path / "moved" / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert all((tmp_path / "moved" / line["images"][0]["file"]).is_file() for line in lines)


# --- what runs out


def open_files(count: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def file_size(size: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_job_has_no_more_in_flight_than_the_process_may_open_files_for(command):
    job = command([f"prompt {n}" for n in range(20)])
    code, stderr = job.finished("--max-concurrency", "20", limits=open_files(32))
    assert code == 0, stderr
    assert "at a time: this process can open only" in stderr
    assert job.paid() == Counter(job.prompts)


@pytest.mark.parametrize("few", [0, 1, 3])
def test_a_job_that_finds_no_files_left_stops_before_it_pays_and_goes_on_later(run, sandbox, out, few):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    prompts = [f"prompt {n}" for n in range(6)]

    def used_up(plan):
        already_open = len(os.listdir("/dev/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (already_open + few - 1, limits[1]))

    try:
        report = run(prompts, on_plan=used_up)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert isinstance(report.stopped, CogViewStorageError)
    assert "open" in str(report.stopped)
    assert sandbox.requests == []
    assert run(prompts).made == 6


def test_a_job_that_runs_out_of_room_stops_cleanly_and_goes_on_later(command):
    job = command([f"prompt {n}" for n in range(20)])
    code, stderr = job.finished(limits=file_size(3000))
    assert code in {6, 7}, stderr
    assert "Stopped: " in stderr
    assert "File too large" in stderr
    assert job.finished()[0] in {0, 7}
    assert job.paid() == Counter(job.prompts)
    plan = plan_job(job.folder / "p.txt", job.folder / "out", base_url=job.base_url, api_key="any", **SMALL)
    assert plan.done + len(plan.unknown) == 20
    assert [item.request_id for item in plan.unknown if item.request_id not in stderr] == []


def test_a_folder_that_is_deleted_meanwhile_stops_the_job_and_says_where_what_was_paid_is(run, out, sandbox, caplog):
    prompts = [f"prompt {n}" for n in range(8)]
    report = run(prompts, on_plan=lambda plan: shutil.rmtree(out))
    assert isinstance(report.stopped, CogViewStorageError)
    assert sandbox.requests == []
    assert report.contact_sheet is None


# --- what is read is not believed


class Begun:
    """The three files of a job with everything in them that a job knows."""

    prompts = ("a cat", "b [[content-filter]]", "c [[malformed]]", "d [[expired]]", "e [[server-error]]")

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        first = folder / "first"
        with Sandbox() as sandbox:
            run_job(list(self.prompts), first, base_url=sandbox.base_url, progress=False, **SMALL)
        self.settings = json.loads((first / "job.json").read_text())
        self.lines = {
            name: [json.loads(line) for line in (first / name).read_text().splitlines()]
            for name in ("manifest.jsonl", "attempts.jsonl")
        }
        self.files = {"job.json": [self.settings], **self.lines}

    def written(self, texts: dict[str, str | bytes]) -> Path:
        self.number += 1
        folder = self.folder / f"job-{self.number}"
        folder.mkdir()
        for name, values in self.files.items():
            text = texts.get(name, "".join(f"{json.dumps(value)}\n" for value in values))
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder

    def check(self, texts: dict[str, str | bytes]) -> None:
        """Run the job with one prompt more: it is refused before anything is sent, or it goes on."""
        folder = self.written(texts)
        with Sandbox() as sandbox:
            try:
                report = run_job(
                    [*self.prompts, "one more"], folder, base_url=sandbox.base_url, progress=False, timeout=5, **SMALL
                )
            except CogViewError as error:
                assert sandbox.requests == [], error
                assert any(name in str(error) for name in (*texts, "begun with other arguments", "another version"))
            else:
                assert report.stopped is None or isinstance(report.stopped, CogViewError)
                assert report.contact_sheet is not None
                list(report.items())
                json.dumps(report.to_dict())
                str(report)
                assert {entry.prompt for entry in sandbox.ledger} <= {*self.prompts, "one more"}
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Begun:
    return Begun(tmp_path_factory.mktemp("begun"))


def paths_in(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The way to each value within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from paths_in(item, (*path, name))


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**400),
    st.just(-1),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "../../x", "/etc/passwd", "1E+1000000", "NaN", "Infinity", "\ud800", "\x1b[31m", "a" * 5000]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)


def changed(begun: Begun, data: st.DataObject) -> dict[str, str | bytes]:
    """One file with one thing changed."""
    name = data.draw(st.sampled_from(sorted(begun.files)))
    values = copy.deepcopy(begun.files[name])
    number = data.draw(st.integers(0, len(values) - 1))
    way = data.draw(st.sampled_from(["value", "gone", "line", "cut", "double", "bytes"]))
    *path, last = data.draw(st.sampled_from([item for item in paths_in(values[number]) if item]))
    within = values[number]
    for name in path:
        within = within[name]
    if way == "value":
        within[last] = data.draw(ODD)
    elif way == "gone":
        del within[last]
    elif way == "line":
        values[number] = data.draw(ODD)
    elif way == "double":
        values.insert(data.draw(st.integers(0, len(values))), values[number])
    text = "".join(f"{json.dumps(value)}\n" for value in values).encode()
    if way == "cut":
        text = text[: data.draw(st.integers(0, len(text)))]
    elif way == "bytes":
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.binary(max_size=4)) + text[at + data.draw(st.integers(0, 4)) :]
    return {name: text}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_record_is_refused_before_anything_is_sent_or_does_no_harm(begun, data):
    begun.check(changed(begun, data))


@pytest.mark.heavy
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_two_thousand_changed_records_are_refused_before_anything_is_sent_or_do_no_harm(begun, data):
    begun.check(changed(begun, data))


@pytest.mark.parametrize("name", ["job.json", "manifest.jsonl", "attempts.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"key":' * 50_000,
        '{"key":"x","line":' + "9" * 5000 + "}\n",
        '{"key":"x"' + " " * (17 << 20) + "}\n",
        b"\xff\xfe\n",
        "NaN\n",
    ],
    ids=["deep list", "deep object", "long number", "long line", "not UTF-8", "NaN"],
)
def test_a_hostile_line_is_refused_with_its_file_and_number(begun, name, text):
    folder = begun.written({name: text + (b"\n" if isinstance(text, bytes) else "\n")})
    with Sandbox() as sandbox:
        with pytest.raises(
            CogViewConfigurationError, match=name if name == "job.json" else f"Line 1 of .*{name} is damaged"
        ):
            run_job(["a cat"], folder, base_url=sandbox.base_url, progress=False, **SMALL)
        assert sandbox.requests == []
    shutil.rmtree(folder)


@pytest.mark.heavy
def test_a_job_of_a_hundred_thousand_lines_goes_on_in_little_memory(tmp_path):
    import tracemalloc

    prompts = [f"prompt number {n}" for n in range(100_000)]
    out = tmp_path / "out"
    with Sandbox() as sandbox:
        run_job(prompts[:1], out, base_url=sandbox.base_url, progress=False, **SMALL)
        line = json.loads((out / "manifest.jsonl").read_text())
        from langchain_cogview import CogViewImageGenerator
        from langchain_cogview.jobs.items import check_prompts
        from langchain_cogview.jobs.plan import job_settings

        defaults = job_settings(CogViewImageGenerator(base_url=sandbox.base_url, **SMALL))
        defaults.pop("service")
        with (out / "manifest.jsonl").open("w") as file:
            for item in check_prompts(prompts, defaults, format=None, unique=False).items:
                file.write(json.dumps({**line, "key": item.key, "line": item.number}, separators=(",", ":")) + "\n")
        tracemalloc.start()
        report = run_job(prompts, out, base_url=sandbox.base_url, progress=False, **SMALL)
        assert (report.skipped, len(sandbox.requests)) == (100_000, 1)
        assert tracemalloc.get_traced_memory()[1] < 70 << 20
        tracemalloc.stop()
