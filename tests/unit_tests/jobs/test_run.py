"""What a user relies on: every prompt is generated once, over as many runs as it takes, and nothing is paid twice."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.rate_limiters import BaseRateLimiter
from PIL import Image

from langchain_cogview import CogViewImageGenerator, Sandbox
from langchain_cogview.callbacks import ProgressCallbackHandler
from langchain_cogview.errors import (
    CogViewAuthenticationError,
    CogViewConfigurationError,
    CogViewConnectionError,
    CogViewInvalidRequestError,
    CogViewServerError,
    CogViewStorageError,
)
from langchain_cogview.images import download, store
from langchain_cogview.jobs import arun_job, plan_job, run_job
from langchain_cogview.request import ImageRequest
from langchain_cogview.sandbox import SandboxServer

SMALL = {"size": "640x512"}
IMAGES = "*.png"


@pytest.fixture(params=["sync", "async"])
def run(request, sandbox, tmp_path):
    """Run a job in the sandbox, by the sync or the async version."""

    def work(prompts, output_dir=tmp_path / "out", **options):
        if "generator" not in options:
            options = {"base_url": sandbox.base_url, **SMALL, **options}
        if request.param == "sync":
            return run_job(prompts, output_dir, progress=False, **options)
        return asyncio.run(arun_job(prompts, output_dir, progress=False, **options))

    return work


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def attempts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "attempts.jsonl").read_text(encoding="utf-8").splitlines()]


def sent(sandbox: Sandbox) -> list[str]:
    return [request.prompt for request in sandbox.requests]


def paid(sandbox: Sandbox) -> list[str]:
    return [entry.prompt for entry in sandbox.ledger]


def forget(folder: Path, *prompts: str) -> None:
    """Remove lines of the manifest, as a process leaves it that is killed before it writes them."""
    kept = [line for line in lines(folder) if line["arguments"]["prompt"] not in prompts]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def lose(folder: Path, *prompts: str) -> None:
    """Leave the folder as a process does that is killed before it has the images."""
    for line in lines(folder):
        if line["arguments"]["prompt"] in prompts:
            for image in line["images"]:
                (folder / image["file"]).unlink()
    forget(folder, *prompts)


# --- the ordinary way


def test_each_prompt_gets_an_image_and_a_line(run, out, sandbox):
    report = run(["a cat", "", {"prompt": "a dog", "size": "512x512", "mood": "calm"}, "a fox"])
    assert (report.made, report.skipped, report.left, report.images) == (3, 0, 0, 3)
    assert (report.cost, report.stopped, report.unknown, report.errors) == ({"CNY": Decimal(0)}, None, (), {})
    found = sorted(lines(out), key=lambda line: line["line"])
    assert [(line["line"], line["status"]) for line in found] == [(1, "made"), (3, "made"), (4, "made")]
    assert found[1]["arguments"] == {
        "prompt": "a dog", "model": "cogview-4-250304", "size": "512x512", "quality": "standard", "n": 1,
    }  # fmt: skip
    assert found[1]["extra"] == {"mood": "calm"}
    assert "extra" not in found[0]
    for line in found:
        (image,) = line["images"]
        path = out / image["file"]
        with Image.open(path) as decoded:
            assert (decoded.width, decoded.height) == (image["width"], image["height"])
        assert image["size_bytes"] == path.stat().st_size
        assert image["mime_type"] == "image/png"
        assert len(image["sha256"]) == 64
        assert (line["cost"], line["currency"], line["sandbox"], image["cached"]) == ("0", "CNY", True, False)
        assert line["request_ids"] == [image["request_id"]]
        assert line["finished"].endswith("Z")
        assert 0 < line["seconds"] < 60
        assert line["failures"] == line["given_up"] == []
    assert {path.name for path in out.glob(IMAGES)} == {line["images"][0]["file"] for line in found}
    assert [*report.items()] == lines(out)
    assert report.manifest == out / "manifest.jsonl"
    assert "a dog" in report.contact_sheet.read_text()
    json.dumps(report.to_dict())


def test_what_is_in_the_manifest_is_not_sent_again_though_the_file_has_grown_and_is_sorted_anew(run, sandbox):
    run(["a cat", "a dog"])
    again = run(["a hare", "a dog", "a cat"])
    assert sorted(sent(sandbox)) == ["a cat", "a dog", "a hare"]
    assert (again.made, again.skipped) == (1, 2)
    assert run(["a cat"]).skipped == 1
    assert sandbox.images_made == 3


def test_duplicate_lines_are_all_generated_and_reported_by_number(run, out, sandbox):
    prompts = ["a cat", "a dog", "a cat", {"prompt": "a cat", "size": "640x512"}]
    plan = plan_job(prompts, out, base_url=sandbox.base_url, **SMALL)
    assert plan.duplicates == (3, 4)
    assert "2 duplicate prompts (lines 3, 4)." in str(plan)
    assert run(prompts).made == 4
    assert len(lines(out)) == len([*out.glob(IMAGES)]) == 4
    assert run(prompts).skipped == 4
    assert sandbox.images_made == 4


def test_unique_generates_them_once(run, out, sandbox):
    assert run(["a cat", "a dog", "a cat"], unique=True).made == 2
    assert sorted(sent(sandbox)) == ["a cat", "a dog"]
    assert run(["a cat", "a dog", "a cat"]).made == 1


def test_a_generator_can_be_passed_and_keeps_its_settings(run, out, sandbox, tmp_path):
    generator = CogViewImageGenerator(
        base_url=sandbox.base_url, size="512x512", download=False, user_id="user-123", model="cogview-4"
    )
    assert run(["a cat"], generator=generator).made == 1
    (line,) = lines(out)
    assert {"size": "512x512", "user_id": "user-123", "model": "cogview-4"}.items() <= line["arguments"].items()
    with pytest.raises(CogViewConfigurationError, match="cannot be combined with a generator"):
        run(["a cat"], generator=generator, model="glm-image")


def test_a_cached_image_is_copied_into_the_folder_and_costs_nothing(run, out, sandbox, tmp_path):
    run(["a cat"], tmp_path / "before", cache=tmp_path / "cache")
    assert run(["a cat"], cache=tmp_path / "cache", budget=0).made == 0  # a budget does not know what is cached
    assert run(["a cat"], cache=tmp_path / "cache").made == 1
    (line,) = lines(out)
    (image,) = line["images"]
    assert (image["cached"], line["cost"], line["request_ids"]) == (True, "0", [])
    assert (out / image["file"]).stat().st_size == image["size_bytes"]
    assert sandbox.images_made == 1


def test_handlers_receive_the_events_of_every_image(run, sandbox):
    from langchain_core.callbacks import BaseCallbackHandler

    class Recorder(BaseCallbackHandler):
        names = []

        def on_custom_event(self, name, data, **kwargs):
            self.names.append(name)

    run(["a cat", "a dog [[content-filter]]"], config={"callbacks": [Recorder()]})
    assert Recorder.names.count("cogview.generated") == 1
    assert Recorder.names.count("cogview.content_filter") == 1


def test_the_bar_of_a_job_that_goes_on_starts_where_it_stood(sandbox, out, capsys):
    def bar(prompts) -> str:
        run_job(prompts, out, base_url=sandbox.base_url, progress=True, **SMALL)
        return capsys.readouterr().err

    assert "2/2" in bar(["a cat", "a dog"])
    bar_text = bar(["a cat", "a dog", "a hare"])
    assert "CogView 2/3" in bar_text
    assert "CogView 3/3" in bar_text


def test_every_file_has_the_name_by_which_it_is_found_again(run, out):
    run(["a cat", "a dog"])
    for line in lines(out):
        (image,) = line["images"]
        name = store.IMAGE_NAME.fullmatch(image["file"])
        assert (name["label"], name["start_of_hash"]) == (image["request_id"][:8], image["sha256"][:16])
    for label in ("0a1b2c3d", ""):
        names = [*store.image_names(label, "f" * 64, ".webp", moment=0)]
        assert len({*names}) == len(names) == store.MAX_NAMES
        assert {store.IMAGE_NAME.fullmatch(name)["label"] or "" for name in names} == {label}


# --- before anything is sent

BAD = ["a cat", {"prompt": "x", "size": "1000x1000"}, " ", {"prompt": "x", "n": "many"}, {"text": "x"}, 7]


def test_a_line_that_is_not_valid_refuses_the_job_with_every_line_number(run, out, sandbox):
    with pytest.raises(CogViewInvalidRequestError) as caught:
        run(BAD)
    assert caught.value.message == "4 lines of 5 are not valid; nothing was sent."
    notes = "\n".join(caught.value.__notes__)
    for start in (
        "Line 2: size: The size '1000x1000'",
        "Line 4: n must be ",
        "Line 5: The key 'prompt'",
        "Line 6: A prompt",
    ):
        assert start in notes
    assert sandbox.requests == []
    assert not out.exists()


def test_skip_bad_leaves_them_out(run, out, sandbox):
    report = run(BAD, skip_bad=True)
    assert (report.made, report.bad) == (1, 4)
    assert sent(sandbox) == ["a cat"]


def test_arguments_illegal_for_the_model_of_the_line_are_found(sandbox, out):
    rows = [
        {"prompt": "x" * 1001, "model": "glm-image", "size": "1280x1280"},
        {"prompt": "x", "model": "glm-image", "size": "1280x1280", "quality": "standard"},
        {"prompt": "x", "user_id": "short"},
        {"prompt": "\ud800"},
        {"prompt": "x", "watermark_enabled": "perhaps"},
        {"prompt": "fine", "watermark_enabled": "no", "n": "2"},
    ]
    plan = plan_job(rows, out, base_url=sandbox.base_url)
    assert [problem.line for problem in plan.problems] == [1, 2, 3, 4, 5]
    assert "glm-image takes at most 1,000" in plan.problems[0].text
    assert (plan.lines, plan.prompts, plan.images) == (6, 1, 2)


def test_a_plan_counts_and_prices_and_changes_nothing(out, sandbox):
    prompts = [
        "a cat",
        {"prompt": "a dog", "n": 3},
        {"prompt": "x", "model": "glm-image"},
        {"prompt": "y", "model": "new"},
    ]
    plan = plan_job(prompts, out, base_url=sandbox.base_url)
    assert (plan.prompts, plan.images, plan.unpriced) == (4, 6, 1)
    assert plan.cost == {"CNY": Decimal("0.34")}
    assert str(plan).endswith(
        "To generate: 4 prompts, 6 images, list price 0.34 CNY and 1 image of unknown price, nothing is charged."
    )
    assert any("does not know the model 'new'" in note for note in plan.notes)
    json.dumps(plan.to_dict())
    assert not out.exists()
    assert sandbox.requests == []


def test_a_plan_of_a_folder_shows_what_was_done(run, out, sandbox):
    run(["a cat", "x [[content-filter]]", "y [[malformed]]", "z [[balance]]"])
    before = {path: path.read_bytes() for path in out.iterdir()}
    plan = plan_job(["a cat", "x [[content-filter]]", "y [[malformed]]", "n"], out, base_url=sandbox.base_url, **SMALL)
    assert (plan.done, plan.blocked, plan.failed, len(plan.unknown), plan.prompts) == (1, 1, 0, 1, 1)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"size": "512x512"}, "size was '640x512' and is now '512x512'"),
        ({"quality": "hd"}, "quality was not set and is now 'hd'"),
        ({"model": "cogview-4"}, "model was 'cogview-4-250304' and is now 'cogview-4'"),
        ({"n": 2, "user_id": "user-123"}, "n was 1 and is now 2; user_id was not set and is now 'user-123'"),
        ({"base_url": "http://127.0.0.1:9", "api_key": "any"}, "service was 'sandbox' and is now 'http://127.0.0.1:9'"),
    ],
)
def test_a_folder_of_other_arguments_is_refused_with_what_differs(run, out, sandbox, other, words):
    run(["a cat"])
    for attempt in (run, lambda prompts, **o: plan_job(prompts, out, **{"base_url": sandbox.base_url, **SMALL, **o})):
        with pytest.raises(CogViewConfigurationError) as caught:
            attempt(["a cat"], **other)
        assert words in caught.value.message
    assert sandbox.images_made == 1


def test_no_key_and_no_path_of_the_service_is_in_the_folder(tmp_path, out):
    key = "0123456789abcdef0123456789abcdef.0123456789abcdef"
    with SandboxServer() as server:
        run_job(["a cat [[auth]]", "a dog"], out, base_url=server.base_url, api_key=key, progress=False, **SMALL)
    for path in out.iterdir():
        assert b"0123456789abcdef" not in path.read_bytes()
    assert json.loads((out / "job.json").read_text())["settings"]["service"].startswith("http://127.0.0.1:")
    assert "/api/" not in (out / "job.json").read_text()


@pytest.mark.parametrize(
    ("prompts", "what"),
    [
        ({"prompt": "a cat", "size": "512x512"}, "an object"),
        (b"a cat", "bytes"),
        (7, "a number"),
        (None, "null"),
        (ImageRequest(prompt="a cat"), "ImageRequest"),
    ],
)
def test_one_prompt_or_none_in_place_of_a_list_is_refused(run, out, sandbox, prompts, what):
    with pytest.raises(CogViewConfigurationError, match=f"The prompts must be a list .*, not {what}"):
        run(prompts)
    assert not out.exists()
    assert sandbox.requests == []


@pytest.mark.parametrize("text", ["a cat", "a" * 400, "~nobody-here/a cat"])
def test_a_text_on_its_own_is_the_name_of_a_file(run, text):
    with pytest.raises(CogViewConfigurationError, match=r"There is no file '.*a list, \[prompt\]"):
        run(text)


@pytest.mark.parametrize("folder", ["", "a\0b", "file:///tmp/x"])
def test_the_folder_is_a_local_one_or_the_url_of_a_store(folder, sandbox):
    with pytest.raises(CogViewConfigurationError, match="A job's folder must be a local folder"):
        run_job(["a cat"], folder, base_url=sandbox.base_url)
    for url in ("https://example.com/x", "s3://", "s3://key:secret@bucket/x", "nonsense://x"):
        with pytest.raises(CogViewConfigurationError, match="The folder cannot be used"):
            run_job(["a cat"], url, base_url=sandbox.base_url)
    for path, problem in {
        "\ud800": "a character that no file name can have",
        "~no-such-user/x": "home folder is not known",
    }.items():
        with pytest.raises(CogViewConfigurationError, match=problem):
            run_job(["a cat"], path, base_url=sandbox.base_url)


@pytest.mark.parametrize("folder", [None, 5, b"job"])
def test_a_folder_that_is_no_path_is_refused(sandbox, folder):
    with pytest.raises(CogViewConfigurationError, match=r"The folder cannot be found: .*[^.]\. Choose another folder"):
        run_job(["a cat"], folder, base_url=sandbox.base_url, progress=False)
    assert not sandbox.requests


def test_a_folder_that_cannot_be_made_is_reported_before_anything_is_sent(run, tmp_path, sandbox):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CogViewStorageError, match="cannot be written"):
        run(["a cat"], tmp_path / "file" / "out")
    assert sandbox.requests == []


# --- the folder belongs to one job


def test_a_folder_that_another_job_is_writing_to_is_refused(run, out, sandbox):
    refused = []

    def second(plan):
        with pytest.raises(CogViewConfigurationError, match="Another job is writing to") as caught:
            run_job(["a dog"], out, base_url=sandbox.base_url, **SMALL)
        refused.append(caught.value)

    assert run(["a cat"], on_plan=second).made == 1
    assert len(refused) == 1
    assert run(["a dog"]).made == 1  # it was let go


def test_a_folder_that_another_process_is_writing_to_is_refused(out, sandbox):
    code = (
        "import sys; from pathlib import Path; from langchain_cogview.jobs.folder import JobFolder\n"
        "folder = JobFolder(Path(sys.argv[1]), create=True); folder.lock(); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(CogViewConfigurationError, match="Another job"):
            run_job(["a cat"], out, base_url=sandbox.base_url, **SMALL)
        process.kill()
        process.wait()
    assert run_job(["a cat"], out, base_url=sandbox.base_url, progress=False, **SMALL).made == 1


# --- going on


def test_an_image_is_entered_whatever_text_its_request_was_recorded_with(run, out, sandbox):
    run(["a cat"])
    forget(out, "a cat")
    (attempt,) = map(json.loads, (out / "attempts.jsonl").read_text().splitlines())
    (out / "attempts.jsonl").write_text(json.dumps({**attempt, "prompt": "\ud800\x1b[2J"}) + "\n")
    report = run(["a cat"])
    assert (report.made, report.stopped, sandbox.images_made) == (1, None, 1)


def test_an_image_whose_line_was_not_written_is_entered_without_paying(run, out, sandbox):
    run(["a cat", "a dog", "a hare"])
    files = {path.name for path in out.glob(IMAGES)}
    forget(out, "a cat", "a hare")
    plan = plan_job(["a cat", "a dog", "a hare"], out, base_url=sandbox.base_url, **SMALL)
    assert (plan.recovered, plan.images, plan.done) == (2, 0, 1)
    report = run(["a cat", "a dog", "a hare"])
    assert (report.made, report.skipped, report.images) == (2, 1, 2)
    assert sandbox.images_made == 3
    assert len(lines(out)) == 3
    assert {path.name for path in out.glob(IMAGES)} == files
    for line in lines(out):
        assert (line["status"], line["cost"], line["images"][0]["width"]) == ("made", "0", 640)


def test_a_manifest_cut_in_the_middle_of_a_line_is_read_up_to_there(run, out, sandbox):
    run(["a cat", "a dog"])
    path = out / "manifest.jsonl"
    whole = path.read_bytes()
    for cut in (1, 2, 40, len(whole.splitlines(keepends=True)[1]) - 1):
        path.write_bytes(whole[:-cut])
        report = run(["a cat", "a dog"])
        assert report.made + report.skipped == 2
        assert len(lines(out)) == 2
    assert sandbox.images_made == 2


def test_attempts_cut_in_the_middle_of_a_line_were_not_sent(run, out, sandbox):
    run(["a cat"])
    with (out / "attempts.jsonl").open("ab") as file:
        file.write(b'{"key":"abc","line":2,"requ' + b"x" * 5000)  # more than the next line covers
    assert run(["a cat", "a dog"]).made == 1
    assert len(attempts(out)) == 2


@pytest.mark.parametrize("damage", [b"\x00" * 50 + b"\n", b"{}\n", b"[1]\n", b'{"key": "x"}\n', b"caf\xe9\n"])
@pytest.mark.parametrize("name", ["manifest.jsonl", "attempts.jsonl"])
def test_a_damaged_line_in_the_middle_refuses_the_job_by_its_number(out, sandbox, name, damage):
    def again():
        return run_job(["a cat", "a dog", "a hare"], out, base_url=sandbox.base_url, progress=False, **SMALL)

    again()
    first, *rest = (out / name).read_bytes().splitlines(keepends=True)
    (out / name).write_bytes(b"".join([first, damage, *rest]))
    with pytest.raises(CogViewConfigurationError, match=f"Line 2 of .*{name} is damaged"):
        again()
    assert sandbox.images_made == 3


def test_a_request_without_an_end_is_listed_and_repeated_only_when_asked_for(run, out, sandbox):
    prompts = ["a cat", "a dog"]
    run(prompts)
    (lost,) = [line["request_ids"][0] for line in lines(out) if line["arguments"]["prompt"] == "a cat"]
    lose(out, "a cat")
    report = run(prompts)
    assert [(item.line, item.prompt, item.request_id) for item in report.unknown] == [(1, "a cat", lost)]
    assert (report.made, report.skipped, report.left, report.failed) == (0, 1, 0, 0)
    assert lost in str(report)
    assert sandbox.images_made == 2
    repeated = run(prompts, retry_unknown=True)
    assert (repeated.made, repeated.unknown) == (1, ())
    (line,) = [line for line in lines(out) if line["arguments"]["prompt"] == "a cat"]
    assert line["given_up"] == [{"request_id": lost, "model": "cogview-4-250304"}]
    assert len(line["images"]) == 1
    last = run(prompts, retry_unknown=True)
    assert (last.made, last.skipped, last.unknown) == (0, 2, ())
    assert sorted(paid(sandbox)) == ["a cat", "a cat", "a dog"]


def test_a_file_that_is_not_the_image_of_its_name_is_none(run, out, sandbox):
    prompts = ["a cat", "a dog", "a hare", "an owl"]
    run(prompts)
    paths = [out / line["images"][0]["file"] for line in sorted(lines(out), key=lambda line: line["line"])]
    cat, dog, _, owl = (path.read_bytes() for path in paths)
    paths[0].write_bytes(cat[:-20])
    paths[1].write_bytes(dog[:-200] + bytes(10) + dog[-190:])
    paths[2].write_bytes(owl)  # whole, but another's: the hash is in the name
    forget(out, *prompts)
    report = run(prompts)
    assert [item.line for item in report.unknown] == [1, 2, 3]
    assert [line["line"] for line in lines(out)] == [4]


def test_an_outcome_that_is_unknown_is_not_in_the_manifest_and_not_sent_again(run, out, sandbox):
    prompts = ["a cat [[server-error]]", "b [[malformed]]", "c"]
    report = run(prompts)
    assert (report.made, len(report.unknown), report.failed) == (1, 2, 0)
    assert {*report.errors} == {"CogViewOutcomeUnknownError", "CogViewMalformedReplyError"}
    assert len(lines(out)) == 1
    assert len(run(prompts).unknown) == 2
    assert len(sandbox.requests) == 3
    repeated = run(["a cat [[server-error]]", "b [[malformed]]", "c"], retry_unknown=True)
    assert len(repeated.unknown) == 4  # the requests before, and those again without an answer
    assert len(sandbox.requests) == 5


def test_a_task_that_the_service_is_making_is_had_without_paying(run, out, sandbox):
    big = {"model": "glm-image", "size": "1056x1568", "poll_interval": 0.01}
    report = run(["a cat", "a dog", "a hare"], **big)
    assert report.made == 3
    assert sum("task_id" in item for item in attempts(out)) == 3
    lose(out, "a cat", "a dog")
    path = out / "attempts.jsonl"
    path.write_text(
        "".join(
            json.dumps(item | ({"task_id": "gone"} if "task_id" in item and item["key"] == _key(out, "a dog") else {}))
            + "\n"
            for item in attempts(out)
        )
    )
    report = run(["a cat", "a dog", "a hare"], **big)
    assert (report.made, report.skipped, [item.line for item in report.unknown]) == (1, 2 - 1, [2])
    assert sandbox.images_made == 3
    assert (len(lines(out)), len([*out.glob(IMAGES)])) == (2, 2)
    assert run(["a cat", "a dog", "a hare"], retry_unknown=True, **big).made == 1
    assert sandbox.images_made == 4


def _key(folder, prompt):
    return next(item["key"] for item in attempts(folder) if item.get("prompt") == prompt)


def test_a_task_of_a_fallback_model_is_had_without_paying(run, out, sandbox):
    settings = {"fallback_models": ["glm-image"], "max_retries": 0, "poll_interval": 0.01}
    sandbox.fail_next("busy")
    assert run(["a cat"], **settings).made == 1
    lose(out, "a cat")
    assert [item["model"] for item in attempts(out)] == ["cogview-4-250304", "glm-image", "glm-image"]
    assert run(["a cat"], **settings).made == 1
    assert sandbox.images_made == 1
    ((image,),) = [line["images"] for line in lines(out)]
    assert image["model"] == "glm-image"


def test_a_task_that_does_not_end_is_given_up_when_asked_for(run, out, sandbox):
    big = {"model": "glm-image", "size": "1056x1568", "poll_interval": 0.01}
    sandbox.fail_next("task-polls", polls=10**6)
    for _ in range(2):
        report = run(["a cat"], **big, timeout=1)
        assert (report.made, report.left, len(report.unknown)) == (0, 0, 1)
        assert report.errors == {"CogViewTaskUnfinishedError": 1}
    assert len(sandbox.ledger) == 1
    plan = plan_job(["a cat"], out, base_url=sandbox.base_url, retry_unknown=True, **big)
    assert "1 image in progress at the service will be polled; what does not end" in str(plan)
    again = run(["a cat"], **big, timeout=5, retry_unknown=True)
    assert (again.made, again.unknown) == (1, ())
    assert len(sandbox.ledger) == 2
    (line,) = lines(out)
    assert line["given_up"] == [{"request_id": report.unknown[0].request_id, "model": "glm-image"}]


# --- what was not made


def test_blocked_and_failed_prompts_are_recorded_and_not_repeated(run, out, sandbox):
    prompts = ["a cat", "b [[content-filter:1]]", "c"]
    sandbox.fail_next("status", status=400, body={"error": {"code": "1214", "message": "wrong"}})
    report = run(prompts[2:])
    assert (report.made, report.failed) == (0, 1)
    report = run(prompts)
    assert (report.made, report.blocked, report.failed) == (1, 1, 1)
    assert report.errors == {"CogViewContentFilterError": 1, "CogViewInvalidRequestError": 1}
    by_prompt = {line["arguments"]["prompt"]: line for line in lines(out)}
    assert [by_prompt[prompt]["status"] for prompt in prompts] == ["made", "blocked", "failed"]
    (failure,) = by_prompt[prompts[1]]["failures"]
    assert (failure["error"], failure["code"], failure["content_filter"]) == (
        "CogViewContentFilterError", "1301", [{"role": "user", "level": 1}],
    )  # fmt: skip
    assert by_prompt[prompts[1]]["cost"] == "0"
    assert "at level 1 (severe)" in report.contact_sheet.read_text()
    again = run(prompts)
    assert (again.made, again.skipped, again.blocked, again.failed) == (0, 1, 1, 1)
    assert len(sandbox.requests) == 3


def test_retry_failed_generates_them_again_and_one_line_stays(run, out, sandbox):
    wrong = {"status": 400, "body": {"error": {"code": "1214", "message": "wrong"}}}
    sandbox.fail_next("content-filter")
    sandbox.fail_next("status", **wrong)
    assert run(["a cat", "a dog"]).made == 0
    sandbox.fail_next("status", **wrong)
    first = run(["a cat", "a dog"], retry_failed=True)
    assert (first.made, first.failed + first.blocked) == (1, 1)
    assert len(lines(out)) == 2
    assert run(["a cat", "a dog"], retry_failed=True).made == 1
    assert sorted(line["status"] for line in lines(out)) == ["made", "made"]
    assert len(sandbox.requests) == 5


@pytest.mark.parametrize("fault", ["busy", "unavailable"])
def test_what_did_not_run_is_left_for_the_next_run(run, out, sandbox, fault):
    sandbox.fail_next(fault)
    report = run(["a cat", "a dog"], max_retries=0)
    assert (report.made, report.left, report.failed, report.unknown, report.stopped) == (1, 1, 0, (), None)
    (name,) = report.errors
    assert f"Did not run; the next run sends these again: {name} (1)." in str(report)
    assert len(lines(out)) == 1
    assert run(["a cat", "a dog"]).made == 1
    assert (sandbox.images_made, len(lines(out))) == (2, 2)


def test_of_several_images_the_one_that_did_not_run_is_generated_by_the_next_run(run, out, sandbox):
    sandbox.fail_next("busy")
    report = run([{"prompt": "a cat", "n": 2}], max_retries=0)
    assert (report.images, report.left, report.unknown) == (1, 1, ())
    assert [line["status"] for line in lines(out)] == ["left"]
    assert run([{"prompt": "a cat", "n": 2}]).made == 1
    assert [line["status"] for line in lines(out)] == ["made"]
    assert sandbox.images_made == 2


def test_several_prompts_in_a_row_that_did_not_run_stop_the_job(run, out, sandbox):
    prompts = [f"prompt {number}" for number in range(12)]
    sandbox.fail_next("unavailable", times=100)
    report = run(prompts, max_retries=0, max_concurrency=1)
    assert isinstance(report.stopped, CogViewServerError)
    assert (report.left, report.failed) == (12, 0)
    assert 5 <= len(sandbox.requests) == report.errors["CogViewServerError"] < 10
    assert lines(out) == []


def test_errors_of_a_full_account_do_not_count_as_errors_in_a_row(run, out, sandbox):
    prompts = [f"prompt {number}" for number in range(8)]
    sandbox.fail_next("rate-limit", times=8, retry_after=600)  # longer than the time limit
    report = run(prompts, max_retries=0, max_concurrency=1)
    assert (report.stopped, report.left, report.errors) == (None, 8, {"CogViewRateLimitError": 8})
    assert run(prompts).made == sandbox.images_made == 8


def test_of_several_images_none_of_which_was_made_each_has_its_own_end(run, out, sandbox):
    prompts = [{"prompt": "a cat", "n": 2}]
    sandbox.fail_next("content-filter")
    sandbox.fail_next("busy")
    report = run(prompts, max_retries=0)
    assert (report.blocked, report.unknown) == (1, ())
    assert report.errors == {"CogViewContentFilterError": 1, "CogViewBusyError": 1}
    (line,) = lines(out)
    assert (line["status"], [item["error"] for item in line["failures"]]) == ("blocked", ["CogViewContentFilterError"])
    assert run(prompts).images == 1  # the one that did not run
    assert sandbox.images_made == 1
    assert run(prompts, retry_failed=True).made == 1


def test_of_two_images_the_blocked_one_is_not_unknown_for_the_other_is(run, out, sandbox):
    prompts = [{"prompt": "a cat", "n": 2}]
    sandbox.fail_next("content-filter")
    sandbox.fail_next("malformed")
    report = run(prompts)
    assert (report.blocked, len(report.unknown)) == (1, 1)
    (line,) = lines(out)
    (failure,) = line["failures"]
    assert failure["error"] == "CogViewContentFilterError"
    assert line["request_ids"] == [failure["request_id"]] != [report.unknown[0].request_id]
    assert run(prompts, retry_unknown=True).images == 1
    (line,) = lines(out)
    assert [item["request_id"] for item in line["given_up"]] == [report.unknown[0].request_id]


def test_what_stops_the_job_is_reported_though_another_image_of_the_prompt_failed_otherwise(run, sandbox):
    sandbox.fail_next("malformed")
    sandbox.fail_next("auth")
    report = run([{"prompt": "a cat", "n": 2}])
    assert isinstance(report.stopped, CogViewAuthenticationError)
    assert len(report.unknown) == 1


def test_lines_that_a_later_one_replaces_go_when_the_next_run_begins(run, out, sandbox):
    sandbox.fail_next("content-filter")
    run(["a cat"])
    before = (out / "manifest.jsonl").read_bytes()
    run(["a cat"], retry_failed=True)
    after = (out / "manifest.jsonl").read_bytes()
    (out / "manifest.jsonl").write_bytes(before + after)  # as left by a run that did not come to its end
    seen = []
    assert run(["a cat"], on_plan=lambda plan: seen.extend(lines(out))).skipped == 1
    assert [line["status"] for line in seen] == ["made"]
    assert (out / "manifest.jsonl").read_bytes() == after


def test_of_several_images_those_that_are_missing_are_generated(run, out, sandbox):
    sandbox.fail_next("content-filter")
    report = run([{"prompt": "a cat", "n": 3}])
    (line,) = lines(out)
    assert (report.blocked, len(line["images"]), len(line["failures"]), line["status"]) == (1, 2, 1, "blocked")
    assert len(line["request_ids"]) == 3
    assert run([{"prompt": "a cat", "n": 3}]).made == 0
    assert run([{"prompt": "a cat", "n": 3}], retry_failed=True).made == 1
    (line,) = lines(out)
    assert (len(line["images"]), line["failures"], line["status"]) == (3, [], "made")
    assert sandbox.images_made == 3
    assert len([*out.glob(IMAGES)]) == 3


def test_of_several_images_the_one_of_unknown_outcome_is_listed(run, out, sandbox):
    sandbox.fail_next("malformed")
    report = run([{"prompt": "a cat", "n": 3}])
    (line,) = lines(out)
    assert (len(report.unknown), line["status"], len(line["images"])) == (1, "unknown", 2)
    assert run([{"prompt": "a cat", "n": 3}]).made == 0
    assert sandbox.images_made == 3
    assert run([{"prompt": "a cat", "n": 3}], retry_unknown=True).made == 1
    (line,) = lines(out)
    assert (len(line["images"]), len(line["given_up"]), line["status"]) == (3, 1, "made")


def test_all_of_several_blocked_is_blocked(run, out, sandbox):
    assert run([{"prompt": "a cat [[content-filter]]", "n": 3}]).blocked == 1
    (line,) = lines(out)
    assert (len(line["failures"]), len(line["request_ids"])) == (3, 3)
    assert run([{"prompt": "a cat [[content-filter]]", "n": 3}]).blocked == 1
    assert len(sandbox.requests) == 3


def test_a_killed_call_for_several_keeps_what_is_there(run, out, sandbox):
    run([{"prompt": "a cat", "n": 3}])
    (line,) = lines(out)
    (out / line["images"][0]["file"]).unlink()
    forget(out, "a cat")
    report = run([{"prompt": "a cat", "n": 3}])
    assert (report.images, len(report.unknown)) == (2, 1)
    assert run([{"prompt": "a cat", "n": 3}], retry_unknown=True).made == 1
    assert sandbox.images_made == 4


@pytest.mark.parametrize(
    ("fault", "kind"), [("auth", "CogViewAuthenticationError"), ("balance", "CogViewBalanceError")]
)
def test_what_befalls_every_prompt_stops_the_job_at_once_and_the_next_run_goes_on(run, out, sandbox, fault, kind):
    prompts = [f"prompt {number}" for number in range(40)]
    sandbox.fail_next(fault, times=1000)
    report = run(prompts)
    assert type(report.stopped).__name__ == kind
    assert (report.made, report.failed, report.unknown, report.left) == (0, 0, (), 40)
    assert len(sandbox.requests) <= 10
    assert lines(out) == []
    assert "Stopped: " in str(report)
    sandbox.reset()
    assert run(prompts).made == 40


class Limiter(BaseRateLimiter):
    """Lets the first request through at once, and the others when the job has judged it."""

    def __init__(self, judged: threading.Event) -> None:
        self.judged, self.first = judged, threading.Lock()

    def acquire(self, *, blocking: bool = True) -> bool:
        return self.first.acquire(blocking=False) or self.judged.wait(60)

    async def aacquire(self, *, blocking: bool = True) -> bool:
        return await asyncio.to_thread(self.acquire)


def test_what_waits_for_its_slot_when_the_job_stops_is_not_sent(run, out, sandbox, monkeypatch):
    judged, write = threading.Event(), os.write

    def written(descriptor, content):
        count = write(descriptor, content)
        if is_open_as(out / "attempts.jsonl", descriptor) and b"settled" in bytes(content):
            judged.set()
        return count

    monkeypatch.setattr(os, "write", written)
    sandbox.fail_next("auth", times=9)
    report = run([f"prompt {number}" for number in range(9)], rate_limiter=Limiter(judged))
    assert judged.is_set()
    assert isinstance(report.stopped, CogViewAuthenticationError)
    assert len(sandbox.requests) == 1
    assert (report.left, report.unknown) == (9, ())
    assert report.errors == {"CogViewAuthenticationError": 1}


def test_an_unknown_model_stops_the_job_unless_it_is_the_lines_own(run, out, sandbox):
    wrong = {"prompt": "x", "model": "cogview-4"}
    body = {"error": {"code": "1211", "message": "no such model"}}
    sandbox.fail_next("status", status=400, body=body)
    alone = run([wrong])
    assert (alone.failed, alone.stopped) == (1, None)
    assert run([wrong, "b"]).made == 1
    sandbox.fail_next("status", status=400, body=body, times=9)
    assert type(run([wrong, "c"]).stopped).__name__ == "CogViewNotFoundError"
    sandbox.reset()
    assert run([wrong, "c"]).made == 1


def test_no_network_stops_the_job_and_holds_nothing_against_the_prompts(out):
    def job():
        return run_job(
            [f"prompt {number}" for number in range(30)], out, base_url="http://127.0.0.1:9", api_key="any", max_retries=0,
            progress=False, max_concurrency=1,
        )  # fmt: skip

    report = job()
    assert isinstance(report.stopped, CogViewConnectionError)
    assert (report.left, report.failed, report.unknown) == (30, 0, ())
    assert 5 <= report.errors["CogViewConnectionError"] < 10
    assert lines(out) == []
    assert job().left == 30


# --- bytes


def test_an_image_whose_bytes_could_not_be_had_is_fetched_later_for_nothing(run, out, sandbox, monkeypatch):
    prompts = ["a cat [[not-yet:2]]"]
    with monkeypatch.context() as patched:
        patched.setattr(download, "WAITS", (3600.0,))  # more than the time limit
        report = run(prompts)
    assert (report.made, report.failed) == (0, 1)
    (line,) = lines(out)
    (failure,) = line["failures"]
    assert (line["status"], failure["error"]) == ("failed", "CogViewDownloadError")
    assert failure["url"].startswith("https://sandbox.invalid/files/")
    assert run(prompts).made == 1
    (line,) = lines(out)
    assert (line["status"], line["failures"], len(line["images"])) == ("made", [], 1)
    assert (out / line["images"][0]["file"]).stat().st_size == line["images"][0]["size_bytes"]
    assert sandbox.images_made == 1


def test_one_whose_link_has_ended_is_paid_again_only_when_asked_for(run, out, sandbox):
    assert run(["a cat [[expired-url]]"]).failed == 1
    assert run(["a cat [[expired-url]]"]).failed == 1
    assert sandbox.images_made == 1
    assert run(["a cat [[expired-url]]"], retry_failed=True).failed == 1
    assert sandbox.images_made == 2
    (line,) = lines(out)
    assert (len(line["failures"]), len(line["given_up"])) == (1, 1)


# --- limit and budget


def test_limit_generates_at_most_so_many(run, sandbox):
    prompts = [f"prompt {number}" for number in range(6)]
    assert (run(prompts, limit=0).left, sandbox.images_made) == (6, 0)
    first = run(prompts, limit=4)
    assert (first.made, first.left, first.over_budget) == (4, 2, False)
    assert sent(sandbox) == prompts[:4] or sorted(sent(sandbox)) == prompts[:4]
    assert run(prompts, limit=4).made == 2


@pytest.mark.parametrize("limit", [-1, 1.5, "3"])
def test_a_limit_is_a_number(run, sandbox, out, limit):
    with pytest.raises(CogViewConfigurationError, match="limit must be a number of prompts"):
        run(["a cat"], limit=limit)
    with pytest.raises(CogViewConfigurationError, match="limit must be a number of prompts"):
        plan_job(["a cat"], out, limit=limit, base_url=sandbox.base_url)


@pytest.mark.parametrize("budget", ["0.18", 0.18, Decimal("0.239")])
def test_a_budget_stops_before_it_is_passed_over_all_runs(run, sandbox, out, budget):
    prompts = [f"prompt {number}" for number in range(6)]
    report = run(prompts, budget=budget)
    assert (report.made, report.left, report.over_budget) == (3, 3, True)
    assert "The budget does not cover" in str(report)
    assert run(prompts, budget=budget).made == 0
    assert run(prompts, budget="0.30").made == 2
    assert plan_job(prompts, out, base_url=sandbox.base_url, budget="1", **SMALL).images == 1


def test_what_was_blocked_leaves_its_money_for_others(run, sandbox):
    prompts = ["a [[content-filter]]", "b [[content-filter]]", "c", "d", "e"]
    report = run(prompts, budget="0.12")
    assert (report.made, report.blocked, report.left) == (2, 2, 1)
    assert sandbox.images_made == 2


def test_what_may_have_been_charged_counts(run, sandbox):
    prompts = ["a [[malformed]]", "b", "c"]
    report = run(prompts, budget="0.12")
    assert (report.made, len(report.unknown), report.left) == (1, 1, 1)
    assert run(prompts, budget="0.12").made == 0


def test_a_budget_needs_every_price(run, sandbox, out):
    with pytest.raises(CogViewConfigurationError, match="needs the price of 'cogview-3'"):
        run(["a", {"prompt": "b", "model": "cogview-3"}], budget=1)
    assert not out.exists()
    assert run(["a", {"prompt": "b", "model": "cogview-3"}], budget="0.26", prices={"cogview-3": "0.2"}).made == 2


@pytest.mark.parametrize("budget", [-1, "many", float("nan"), float("inf")])
def test_a_budget_is_an_amount(run, budget):
    with pytest.raises(CogViewConfigurationError, match="A budget is an amount of money"):
        run(["a"], budget=budget)


# --- a disk that is full


class FullDisk:
    """Writes half a line into one of the job's files, and then has no space left."""

    def __init__(self, monkeypatch, file: Path) -> None:
        self.file, self.full = file, True
        write = os.write

        def full(descriptor, content):
            if not self.full or not is_open_as(self.file, descriptor):
                return write(descriptor, content)
            write(descriptor, content[: len(content) // 2])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)


def is_open_as(file: Path, descriptor: int) -> bool:
    return file.exists() and os.path.samestat(file.stat(), os.fstat(descriptor))


def test_nothing_is_sent_that_cannot_be_written_down_before(run, out, sandbox, monkeypatch):
    disk = FullDisk(monkeypatch, out / "attempts.jsonl")
    report = run(["a cat", "a dog"])
    assert isinstance(report.stopped, CogViewStorageError)
    assert sandbox.requests == []
    assert (out / "attempts.jsonl").read_bytes() == b""
    disk.full = False
    assert run(["a cat", "a dog"]).made == 2


def test_an_image_whose_line_cannot_be_written_is_recovered_when_there_is_space(run, out, sandbox, monkeypatch):
    run(["before"])
    disk = FullDisk(monkeypatch, out / "manifest.jsonl")
    report = run(["before", *(f"prompt {number}" for number in range(40))])
    assert isinstance(report.stopped, CogViewStorageError)
    assert len(lines(out)) == 1  # and nothing half
    made = sandbox.images_made
    assert made < 30
    disk.full = False
    assert run(["before", *(f"prompt {number}" for number in range(40))]).made == 40
    assert sandbox.images_made == 41


class NoSpace:
    """A folder without space for new files, and a directory for temporary files with or without space."""

    def __init__(self, monkeypatch, out: Path, aside: Path) -> None:
        self.out, self.aside, self.anywhere = out, aside, True
        self.before: Callable[[], object] = bool
        self._open = os.open
        aside.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(aside))
        monkeypatch.setattr(os, "open", self.open)

    def open(self, path, flags, *mode, **descriptors) -> int:
        unnamed = getattr(os, "O_TMPFILE", None)
        is_new = str(path).endswith(".part") or (unnamed is not None and flags & unnamed == unnamed)
        is_aside = self.aside in Path(path).parents
        if is_new and (self.out / "job.json").exists() and not (is_aside and self.anywhere):
            if descriptors.get("dir_fd") is not None:  # the second attempt, after the download
                self.before()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._open(path, flags, *mode, **descriptors)


@pytest.fixture
def no_space(monkeypatch, out, tmp_path) -> NoSpace:
    return NoSpace(monkeypatch, out, tmp_path / "aside")


@pytest.mark.parametrize("n", [1, 3])
def test_images_that_have_no_space_in_the_folder_are_kept_elsewhere_and_reported(  # noqa: PLR0917  fixtures
    run, out, sandbox, no_space, monkeypatch, caplog, n
):
    report = run(["a cat"], n=n)
    assert isinstance(report.stopped, CogViewStorageError)
    kept = [*no_space.aside.iterdir()]
    assert len(kept) == len(report.unknown) == n
    for path in kept:
        assert str(path) in str(report)
        assert str(path) in caplog.text
        assert str(path) in json.dumps(report.to_dict())
    monkeypatch.undo()
    for path in kept:
        path.rename(out / path.name)
    assert run(["a cat"], n=n).made == 1
    assert sandbox.images_made == n


def test_images_of_several_prompts_that_have_no_space_are_all_reported(run, out, sandbox, no_space):
    together, left = threading.Barrier(3, timeout=60), iter(range(3))  # the contact sheet finds no space either
    no_space.before = lambda: next(left, None) is None or together.wait()
    report = run(["a cat", "a dog", "a hare"])
    kept = [*no_space.aside.iterdir()]
    assert len(kept) == 3
    assert [path for path in kept if str(path) not in str(report)] == []


def test_an_image_that_cannot_be_saved_anywhere_is_reported_by_its_link_and_fetched_by_the_next_run(
    run, sandbox, no_space, monkeypatch, caplog
):
    no_space.anywhere = False
    report = run(["a cat"])
    assert isinstance(report.stopped, CogViewStorageError)
    for text in (str(report), caplog.text):
        assert "could not be saved anywhere" in text
        assert "https://sandbox.invalid/files/" in text
    monkeypatch.undo()
    assert run(["a cat"]).made == 1
    assert sandbox.images_made == 1


# --- leaving


def test_a_job_that_is_cancelled_can_be_gone_on_with(sandbox, out):
    prompts = ["a", "b", "c [[slow:60]]", "d [[slow:60]]"]

    async def cancelled():
        task = asyncio.create_task(arun_job(prompts, out, base_url=sandbox.base_url, progress=False, **SMALL))
        while sandbox.in_flight < 2 or not out.exists() or len(lines(out)) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    report = run_job(prompts, out, base_url=sandbox.base_url, progress=False, **SMALL)
    assert (report.skipped, [item.line for item in report.unknown]) == (2, [3, 4])


def test_the_job_does_not_hold_up_the_event_loop(sandbox, out):
    async def work():
        job = asyncio.create_task(
            arun_job([f"prompt {n}" for n in range(20)], out, base_url=sandbox.base_url, progress=False, **SMALL)
        )
        iterations = 0
        while not job.done():
            await asyncio.sleep(0)
            iterations += 1
        return await job, iterations

    report, iterations = asyncio.run(work())
    assert report.made == 20
    assert iterations > 100


class StopsAtTheFirst(ProgressCallbackHandler):
    """Asks a job to stop when a request waits to be sent again."""

    def __init__(self) -> None:
        super().__init__(show=False)
        self.stop = threading.Event()

    def on_event(self, name, event):
        super().on_event(name, event)
        if name == "cogview.retry":
            self.stop.set()


def test_a_job_that_is_asked_to_stop_ends_at_once_and_counts_nothing_as_failed(run, out, sandbox):
    sandbox.fail_next("rate-limit", times=100, retry_after=600)
    watcher = StopsAtTheFirst()
    prompts = ["a cat", "a dog", "a hare"]
    report = run(prompts, stop=watcher.stop, config={"callbacks": [watcher]}, timeout=20_000)
    assert report.interrupted
    assert (report.left, report.failed, report.unknown, report.stopped, report.errors) == (3, 0, (), None, {})
    assert (watcher.failed, watcher.blocked) == (0, 0)
    assert str(report).splitlines()[-1] == "Interrupted; run the job again to continue."
    assert "request id" not in str(report)
    sandbox.reset()
    again = run(prompts)
    assert (again.made, again.interrupted, sorted(paid(sandbox))) == (3, False, prompts)


def test_a_job_that_waits_for_a_slot_of_another_ends_at_once_when_it_is_asked_to_stop(run, sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, max_concurrency=1, **SMALL)
    stop, over = threading.Event(), threading.Event()

    async def hold() -> None:
        task = asyncio.create_task(generator.ainvoke("x [[slow:60]]"))
        await asyncio.to_thread(over.wait)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    holder = threading.Thread(target=asyncio.run, args=(hold(),))
    holder.start()
    while sandbox.in_flight < 1:
        time.sleep(0.005)
    try:
        report = run(
            ["a cat"], max_concurrency=1, stop=stop, on_plan=lambda plan: threading.Timer(0.2, stop.set).start()
        )
        assert (sandbox.in_flight, sent(sandbox)) == (1, ["x [[slow:60]]"])
    finally:
        over.set()
        holder.join()
    assert (report.interrupted, report.left, report.failed, report.unknown) == (True, 1, 0, ())


def test_ctrl_c_in_a_script_leaves_a_job_that_goes_on_and_says_how(out, sandbox):
    prompts = ["a cat", "a dog [[slow:60]]"]

    def interrupted(plan):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run_job(prompts, out, base_url=sandbox.base_url, progress=False, on_plan=interrupted, **SMALL)
    assert caught.value.__notes__[0].startswith("Interrupted; run the job again to continue.")
    assert sandbox.requests == []


def test_leaving_a_stream_sends_nothing_more_and_counts_nothing_as_failed(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, max_concurrency=1, timeout=20_000, **SMALL)
    waiting = threading.Event()

    class Watcher(ProgressCallbackHandler):
        def on_event(self, name, event):
            super().on_event(name, event)
            if name == "cogview.retry":
                waiting.set()

    watcher = Watcher(show=False)
    sandbox.fail_next("rate-limit", times=100, after=1, retry_after=600)
    stream = generator.stream_many(["a cat", "a dog"], {"callbacks": [watcher]})
    next(stream)
    assert waiting.wait(60)
    before = set(threading.enumerate())
    stream.close()
    for thread in before:
        if thread.name == "cogview":
            thread.join(60)
    assert (len(sandbox.requests), watcher.failed) == (2, 0)


class SecondWhile(BaseRateLimiter):
    """Lets the first request through at once, and the next when something is under way."""

    def __init__(self, under_way: threading.Event) -> None:
        self.under_way, self.first = under_way, threading.Lock()

    def acquire(self, *, blocking: bool = True) -> bool:
        return self.first.acquire(blocking=False) or self.under_way.wait(60)

    async def aacquire(self, *, blocking: bool = True) -> bool:
        return await asyncio.to_thread(self.acquire)


class SecondEnd(BaseCallbackHandler):
    """Sets an event when the second call has its result."""

    def __init__(self) -> None:
        self.event, self.first = threading.Event(), threading.Lock()

    def on_chain_end(self, outputs, **kwargs):
        if not self.first.acquire(blocking=False):
            self.event.set()


def test_another_prompt_is_sent_while_a_line_of_the_manifest_is_written(run, out, sandbox, monkeypatch):
    writing, second = threading.Event(), SecondEnd()
    seen = []
    write = os.write

    def slow(descriptor, content):
        if is_open_as(out / "manifest.jsonl", descriptor) and not writing.is_set():
            writing.set()
            seen.append((second.event.wait(60), sandbox.images_made))
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", slow)
    report = run(["a cat", "a dog"], rate_limiter=SecondWhile(writing), config={"callbacks": [second]})
    assert (report.made, seen) == (2, [(True, 2)])


async def test_the_event_loop_goes_on_while_an_attempt_is_written_down(sandbox, out, monkeypatch):
    writing, went_on = threading.Event(), threading.Event()
    seen = []
    write = os.write

    def slow(descriptor, content):
        if is_open_as(out / "attempts.jsonl", descriptor):
            writing.set()
            seen.append(went_on.wait(60))
        return write(descriptor, content)

    async def other():
        while not writing.is_set():
            await asyncio.sleep(0)
        went_on.set()

    monkeypatch.setattr(os, "write", slow)
    job = arun_job(["a cat"], out, base_url=sandbox.base_url, progress=False, **SMALL)
    report, _ = await asyncio.gather(job, other())
    assert (report.made, seen) == (1, [True])


def test_an_error_of_the_callers_own_ends_the_job_before_it_begins(run, out, sandbox):
    def no(plan):
        raise KeyError("not today")

    with pytest.raises(KeyError):
        run(["a cat"], on_plan=no)
    assert sandbox.requests == []
    assert run(["a cat"]).made == 1


def test_a_wrong_key_is_an_error_of_the_report(sandbox, out):
    report = run_job(["a [[auth]]"], out, base_url=sandbox.base_url, progress=False)
    assert isinstance(report.stopped, CogViewAuthenticationError)


@pytest.mark.heavy
def test_the_plan_of_a_hundred_thousand_prompts_is_small(sandbox, out):
    import tracemalloc

    tracemalloc.start()
    plan = plan_job((f"prompt number {n}" for n in range(100_000)), out, base_url=sandbox.base_url)
    assert plan.images == 100_000
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
