"""What a user relies on: a job in shards makes each prompt once, by any number of processes, and is merged into one page."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections import Counter

import pytest

from langchain_cogview import CogViewConfigurationError, JobPlan, plan_job, run_job
from langchain_cogview.jobs import JobReport, arun_job, merge_shards, run_shards
from langchain_cogview.jobs.folder import JobFolder
from langchain_cogview.jobs.manifest import manifest_of
from langchain_cogview.sandbox import Sandbox, SandboxServer
from tests.unit_tests.cli.test_command import KEY, cogview

PROMPTS = [f"a kitten, number {number}" for number in range(40)]


def run(sandbox, folder, shard, prompts=PROMPTS, **arguments) -> JobReport:
    return run_job(prompts, folder, shard=shard, base_url=sandbox.base_url, progress=False, **arguments)


def test_the_shards_together_make_each_prompt_once(sandbox, tmp_path):
    reports = [run(sandbox, tmp_path / "job", f"{number}/3") for number in (2, 1, 3)]
    assert sum(report.made for report in reports) == len(PROMPTS)
    assert all(report.made for report in reports)
    assert Counter(request.prompt for request in sandbox.requests) == Counter(PROMPTS)


async def test_async_makes_the_same_shards(sandbox, tmp_path):
    report = await arun_job(PROMPTS, tmp_path / "a", shard="2/3", base_url=sandbox.base_url, progress=False)
    assert report.made == run(sandbox, tmp_path / "b", "2/3").made


def test_a_file_may_grow_and_be_sorted_differently(sandbox, tmp_path):
    for number in (1, 2):
        run(sandbox, tmp_path, f"{number}/2")
    more = [*reversed(PROMPTS), "one more"]
    assert sum(run(sandbox, tmp_path, f"{number}/2", more).made for number in (1, 2)) == 1
    assert len(sandbox.requests) == len(PROMPTS) + 1


def test_equal_prompts_are_in_one_shard_and_all_made(sandbox, tmp_path):
    reports = [run(sandbox, tmp_path, f"{number}/4", ["the same"] * 3) for number in (1, 2, 3, 4)]
    assert sorted(report.made for report in reports) == [0, 0, 0, 3]


def test_a_plan_of_a_shard_says_what_is_in_others(sandbox, tmp_path):
    plan = plan_job(PROMPTS, tmp_path, shard="1/2", base_url=sandbox.base_url)
    assert isinstance(plan, JobPlan)
    assert f"Shard 1 of 2; in other shards: {len(PROMPTS) - plan.prompts} lines." in str(plan)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "shard", ["", "3", "0/3", "4/3", "1/0", "-1/3", "1/3/5", "1/100000", "½", "٣/٥", 3, ("1", "2")]
)
def test_what_names_no_shard_is_refused(sandbox, tmp_path, shard):
    with pytest.raises(CogViewConfigurationError, match="shard is a number and a count"):
        run(sandbox, tmp_path, shard)
    assert sandbox.requests == []


def test_another_division_of_the_same_folder_is_refused_and_leaves_nothing(sandbox, tmp_path):
    made = run(sandbox, tmp_path, "1/3").made
    for shard in ("1/2", None):
        with pytest.raises(CogViewConfigurationError, match=r"divided into 3 shards(, not 2)?; nothing was sent"):
            run(sandbox, tmp_path, shard)
    assert [item.name for item in tmp_path.iterdir()] == ["shard-1-of-3"]
    assert len(sandbox.requests) == made
    assert run(sandbox, tmp_path, "2/3").made


def test_a_job_without_shards_is_not_divided_later(sandbox, tmp_path):
    run(sandbox, tmp_path, None)
    with pytest.raises(CogViewConfigurationError, match="is not divided into shards"):
        run(sandbox, tmp_path, "1/2")
    assert len(sandbox.requests) == len(PROMPTS)


def test_all_shards_have_the_same_settings(sandbox, tmp_path):
    run(sandbox, tmp_path, "1/3", size="16:9")
    sent = len(sandbox.requests)
    # By its size a prompt would belong to another shard than before.
    for attempt, options in ((run_job, {"progress": False}), (plan_job, {})):
        with pytest.raises(CogViewConfigurationError, match="begun with other arguments; nothing was sent. size was"):
            attempt(PROMPTS, tmp_path, shard="2/3", base_url=sandbox.base_url, size="square", **options)
    assert len(sandbox.requests) == sent
    assert run(sandbox, tmp_path, "2/3", size="16:9").made


@pytest.mark.parametrize("agreed", [False, True])
def test_a_job_in_shards_is_not_begun_again_without_them(sandbox, tmp_path, agreed):
    run(sandbox, tmp_path, "1/3")
    sent = len(sandbox.requests)
    for attempt, options in ((run_job, {"progress": False}), (plan_job, {})):
        with pytest.raises(CogViewConfigurationError, match="is divided into 3 shards.*--shards 3"):
            attempt(PROMPTS, tmp_path, base_url=sandbox.base_url, into_existing=agreed, **options)
    assert len(sandbox.requests) == sent


@pytest.mark.parametrize("plan", [False, True], ids=["run", "plan"])
def test_a_folder_with_other_files_is_refused_and_used_when_the_caller_agrees(sandbox, tmp_path, plan):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "index.html").write_text("mine")
    attempt = plan_job if plan else run_job
    options = {"shard": "1/2", "base_url": sandbox.base_url, **({} if plan else {"progress": False})}
    with pytest.raises(CogViewConfigurationError, match="is not empty and holds no job"):
        attempt(PROMPTS, tmp_path, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "notes.txt"]
    attempt(PROMPTS, tmp_path, into_existing=True, **options)
    if not plan:
        run_job(PROMPTS, tmp_path, **options)  # which goes on
        assert merge_shards(tmp_path).contact_sheet.name != "index.html"
    assert {(tmp_path / name).read_text() for name in ("index.html", "notes.txt")} == {"mine"}


@pytest.mark.parametrize("text", ["mine", "{}", ""])
@pytest.mark.parametrize("name", ["manifest.jsonl", "attempts.jsonl", "shards.json", "budget.json", "shards-prompts"])
def test_no_file_is_replaced_that_was_there_before_the_job(sandbox, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    for agreed in (False, True):
        with pytest.raises(CogViewConfigurationError, match="existed before the job" if agreed else "holds no job"):
            run_shards(PROMPTS, tmp_path, 2, base_url=sandbox.base_url, progress=False, into_existing=agreed, budget=1)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: text}
    assert not sandbox.requests


def test_a_job_whose_shards_were_removed_begins_anew(sandbox, tmp_path):
    for _ in range(2):
        run_shards(PROMPTS, tmp_path, 2, base_url=sandbox.base_url, progress=False, budget=9)
        merge_shards(tmp_path)
        for shard in tmp_path.glob("shard-*-of-2"):
            shutil.rmtree(shard)
    assert len(sandbox.requests) == 2 * len(PROMPTS)


def test_a_worker_that_begins_while_another_looks_is_joined(sandbox, tmp_path, monkeypatch):
    names = JobFolder.names

    def and_another_begins(folder):
        found = names(folder)
        monkeypatch.undo()
        run(sandbox, tmp_path, "2/2")
        return found

    monkeypatch.setattr(JobFolder, "names", and_another_begins)
    run(sandbox, tmp_path, "1/2")
    assert merge_shards(tmp_path).prompts == {"made": len(PROMPTS)}
    assert len(sandbox.requests) == len(PROMPTS)


def test_two_workers_on_one_shard_do_not_pay_twice(sandbox, tmp_path):
    with JobFolder(tmp_path / "shard-1-of-2", create=True) as folder:
        folder.lock()
        with pytest.raises(CogViewConfigurationError, match="Another job is writing"):
            run(sandbox, tmp_path, "1/2")
        reports = run_shards(PROMPTS, tmp_path, 2, base_url=sandbox.base_url, progress=False)
        assert [report.folder.name for report in reports] == ["shard-2-of-2"]
    assert len(run_shards(PROMPTS, tmp_path, 2, base_url=sandbox.base_url, progress=False)) == 2
    assert len(sandbox.requests) == len(PROMPTS)


def test_several_workers_share_the_shards(tmp_path, monkeypatch):
    """Real processes, with the command."""
    monkeypatch.setenv("ZHIPUAI_API_KEY", KEY)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    with SandboxServer(Sandbox(latency=0.01, in_flight_limit=100)) as server:
        command = [
            sys.executable, "-m", "langchain_cogview.cli", "batch", str(prompts), "-o", str(tmp_path / "job"),
            "--shards", "8", "--base-url", server.base_url, "--no-progress",
        ]  # fmt: skip
        workers = [
            subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in range(3)
        ]
        texts = [worker.communicate()[1] for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0, 0], texts
        assert Counter(request.prompt for request in server.sandbox.requests) == Counter(PROMPTS)
    assert merge_shards(tmp_path / "job").prompts == {"made": len(PROMPTS)}


def test_a_stopped_job_takes_no_further_shard(sandbox, tmp_path):
    stop = threading.Event()
    stop.set()
    reports = run_shards(PROMPTS, tmp_path, 4, base_url=sandbox.base_url, progress=False, stop=stop)
    assert [report.interrupted for report in reports] == [True]
    assert sandbox.requests == []


def test_the_merged_manifest_and_page_have_all_images_in_the_order_of_the_prompts(sandbox, tmp_path):
    prompts = [*PROMPTS, "x [[content-filter]]"]
    for number in (1, 2, 3):
        run(sandbox, tmp_path, f"{number}/3", prompts)
    for _ in range(2):  # and again
        merged = merge_shards(tmp_path)
        assert merged.prompts == {"made": len(PROMPTS), "blocked": 1}
        assert (merged.images, merged.unknown, merged.shards) == (len(PROMPTS), 0, 3)
        assert str(merged).startswith("3 of 3 shards: 1 blocked, 40 made;")
    records = [json.loads(line) for line in merged.manifest.read_text().splitlines()]
    files = [image["file"] for record in records for image in record["images"]]
    assert len(files) == len(PROMPTS)
    assert all((tmp_path / file).is_file() for file in files)
    page = merged.contact_sheet.read_text()
    assert all(file in page for file in files)
    in_order = [
        image["file"] for record in sorted(records, key=lambda record: record["line"]) for image in record["images"]
    ]
    assert [page.index(file) for file in in_order] == sorted(page.index(file) for file in files)
    with JobFolder(tmp_path) as folder, manifest_of(folder) as manifest:
        assert len(list(manifest.records())) == len(prompts)


def test_what_is_not_finished_is_left_out_of_the_merged_job(sandbox, tmp_path):
    run(sandbox, tmp_path, "1/3", limit=2)
    merged = merge_shards(tmp_path)
    assert merged.prompts == {"made": 2}
    assert (merged.shards, merged.count) == (1, 3)


@pytest.mark.parametrize("names", [[], ["shard-1-of-2", "shard-1-of-3"]])
def test_a_folder_that_holds_no_single_job_in_shards_is_not_merged(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(CogViewConfigurationError, match=r"There are no shards|several divisions"):
        merge_shards(tmp_path)


def test_a_shard_that_is_a_link_is_not_followed(sandbox, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run(sandbox, tmp_path / "elsewhere", "1/1")
    job = tmp_path / "job"
    job.mkdir()
    (job / "shard-1-of-1").symlink_to(tmp_path / "elsewhere" / "shard-1-of-1")
    with pytest.raises(CogViewConfigurationError):
        merge_shards(job)


def test_the_command_says_what_came_of_each_shard_as_json_too(sandbox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("\n".join([*PROMPTS, "x [[content-filter]]"]))
    done = cogview("batch", "p.txt", "-o", "out", "--base-url", sandbox.base_url, "--shards", "2", "--json")
    assert done.exit_code == 3  # one was blocked
    assert sum(report["made"] for report in json.loads(done.stdout)) == len(PROMPTS)
    assert "Line 41 was not generated: 'x [[content-filter]]'" in done.stderr


def test_the_command_makes_one_shard_and_merges_all(sandbox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    for number in (1, 2):
        done = cogview("batch", "p.txt", "-o", "out", "--base-url", sandbox.base_url, "--shard", f"{number}/2")
        assert done.exit_code == 0
    merged = cogview("merge", "out")
    assert merged.exit_code == 0
    assert merged.stdout.strip() == str(tmp_path / "out" / "index.html")
    assert "2 of 2 shards: 40 made" in merged.stderr
