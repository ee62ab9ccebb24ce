"""What a user relies on: all shards of a job spend one budget, whatever happens to the processes that work on them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from decimal import Decimal

import pytest

from langchain_cogview import CogViewConfigurationError, plan_job, run_job
from langchain_cogview.jobs import JobReport, arun_job, run_shards
from langchain_cogview.jobs.folder import JobFolder
from langchain_cogview.jobs.ledger import LEDGER
from langchain_cogview.sandbox import Sandbox, SandboxServer
from tests.unit_tests.cli.test_command import KEY

PROMPTS = [f"a kitten, number {number}" for number in range(40)]
PRICE = Decimal("0.06")
BUDGET = 10 * PRICE


def run(sandbox, folder, shard, prompts=PROMPTS, **arguments) -> JobReport:
    return run_job(prompts, folder, shard=shard, base_url=sandbox.base_url, progress=False, **arguments)


def entries(folder) -> dict[str, dict]:
    return json.loads((folder / LEDGER).read_text())["shards"]


def test_one_shard_after_the_other_spends_one_budget(sandbox, tmp_path):
    reports = [run(sandbox, tmp_path, f"{number}/3", budget=BUDGET) for number in (1, 2, 3)]
    assert len(sandbox.requests) == 10
    assert [report.over_budget for report in reports] == [True] * 3
    assert sum(report.left for report in reports) == 30
    assert {entry["open"] for entry in entries(tmp_path).values()} == {False}


def test_a_larger_budget_later_covers_the_rest(sandbox, tmp_path):
    run(sandbox, tmp_path, "1/2", budget=3 * PRICE)
    run(sandbox, tmp_path, "2/2", budget=8 * PRICE)
    assert len(sandbox.requests) == 8
    assert not run(sandbox, tmp_path, "1/2", budget=40 * PRICE).over_budget
    assert not run(sandbox, tmp_path, "2/2").over_budget
    assert Counter(request.prompt for request in sandbox.requests) == Counter(PROMPTS)


def test_what_was_made_without_a_budget_counts_once_there_is_one(sandbox, tmp_path):
    made = run(sandbox, tmp_path, "1/3").made
    run(sandbox, tmp_path, "2/3", budget=(made + 2) * PRICE)
    assert len(sandbox.requests) == made + 2


async def test_async_shards_at_once_spend_one_budget(sandbox, tmp_path):
    await asyncio.gather(
        *(
            arun_job(PROMPTS, tmp_path, shard=f"{number}/3", base_url=sandbox.base_url, progress=False, budget=BUDGET)
            for number in (1, 2, 3)
        )
    )
    assert len(sandbox.requests) <= 10
    for number in (1, 2, 3):  # what one had reserved while another asked
        await arun_job(PROMPTS, tmp_path, shard=f"{number}/3", base_url=sandbox.base_url, progress=False, budget=BUDGET)
    assert len(sandbox.requests) == 10


async def test_the_event_loop_never_opens_the_page(sandbox, tmp_path, monkeypatch):
    readers = []
    monkeypatch.setattr(
        JobFolder, "replace", lambda *args, real=JobFolder.replace: (readers.append(threading.get_ident()), real(*args))
    )
    await arun_job(PROMPTS, tmp_path, shard="1/2", base_url=sandbox.base_url, progress=False, budget=BUDGET)
    assert readers
    assert threading.get_ident() not in readers


def test_a_plan_counts_what_other_shards_spent_and_changes_nothing(sandbox, tmp_path):
    run(sandbox, tmp_path, "1/3", budget=6 * PRICE)
    before = (tmp_path / LEDGER).read_bytes()
    plan = plan_job(PROMPTS, tmp_path, shard="2/3", base_url=sandbox.base_url, budget=BUDGET)
    assert plan.images == 4
    assert (tmp_path / LEDGER).read_bytes() == before
    plans: list = []
    run(sandbox, tmp_path, "2/3", budget=BUDGET, on_plan=plans.append)
    assert plans == [plan]


def test_without_a_budget_there_is_no_page(sandbox, tmp_path):
    run(sandbox, tmp_path, "1/2")
    assert [item.name for item in tmp_path.iterdir()] == ["shard-1-of-2"]


@pytest.mark.parametrize("budget", [None, 20 * PRICE])
@pytest.mark.parametrize("first", [None, BUDGET])
def test_another_budget_is_refused_while_a_process_works_with_the_first(sandbox, tmp_path, budget, first):
    outcome: list = []

    def other(plan) -> None:
        try:
            outcome.append(run(sandbox, tmp_path, "2/2", budget=budget))
        except CogViewConfigurationError as error:
            outcome.append(error)

    run(sandbox, tmp_path, "1/2", budget=first, on_plan=other)
    if budget == first:
        assert outcome[0].made
        return
    assert "Another process works on shard-1-of-2" in str(outcome[0])
    assert ("no budget" if first is None else "a budget of 0.60 CNY") in str(outcome[0])
    assert run(sandbox, tmp_path, "2/2", budget=20 * PRICE)  # once it has ended


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"type":"cogview.budget"}', b"\xff\xfe", b'{"a":' * 5000, b"9" * 9999]
)
def test_a_damaged_page_is_computed_again(sandbox, tmp_path, content):
    run(sandbox, tmp_path, "1/2", budget=4 * PRICE)
    (tmp_path / LEDGER).write_bytes(content)
    run(sandbox, tmp_path, "2/2", budget=6 * PRICE)
    assert len(sandbox.requests) == 6


@pytest.mark.parametrize("amount", ["-5", "NaN", "1e999999999", "", 3, None])
def test_amounts_that_are_none_are_computed_again(sandbox, tmp_path, amount):
    run(sandbox, tmp_path, "1/2", budget=4 * PRICE)
    page = json.loads((tmp_path / LEDGER).read_text())
    page["shards"]["shard-1-of-2"]["amount"] = amount
    (tmp_path / LEDGER).write_text(json.dumps(page))
    run(sandbox, tmp_path, "2/2", budget=6 * PRICE)
    assert len(sandbox.requests) == 6


def test_a_page_that_is_deleted_while_the_job_runs_stops_it(sandbox, tmp_path):
    report = run(sandbox, tmp_path, "1/2", budget=BUDGET, on_plan=lambda plan: (tmp_path / LEDGER).unlink())
    assert "was deleted or damaged while the job ran" in str(report.stopped)
    assert sandbox.requests == []
    assert run(sandbox, tmp_path, "1/2", budget=BUDGET).made == 10


def test_a_link_in_place_of_the_page_is_not_followed(sandbox, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    folder = tmp_path / "job"
    run(sandbox, folder, "2/2", limit=0)
    (folder / LEDGER).symlink_to(mine)
    with pytest.raises(CogViewConfigurationError, match="is not a regular file"):
        run(sandbox, folder, "1/2", budget=BUDGET)
    assert mine.read_text() == "{}"


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(sandbox, tmp_path):
    run(sandbox, tmp_path, "1/2", budget=PRICE)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(Exception, match="cannot be written"):
            run(sandbox, tmp_path, "1/2", budget=BUDGET)
    finally:
        tmp_path.chmod(0o700)
    assert len(sandbox.requests) == 1


async def test_a_fallback_model_that_costs_more_stays_within_the_budget(tmp_path):
    prices = {"cogview-4-250304": "0.01", "cogview-4": "0.10"}
    arguments = {
        "max_retries": 0,
        "fallback_models": ["cogview-4"],
        "prices": prices,
        "budget": "0.35",
        "max_concurrency": 1,
    }
    with SandboxServer(Sandbox()) as server:
        arguments |= {"base_url": server.base_url, "api_key": KEY, "progress": False}
        # The model that is asked first is busy, and its fallback is not.
        prompts = [f"[[busy:1]] {prompt}" for prompt in PROMPTS]
        reports = [await arun_job(prompts, tmp_path, shard=f"{number}/2", **arguments) for number in (1, 2)]
        # Each image costs 0.10. Several requests at once can reserve more than they spend, which leaves some for a later run.
        assert 1 <= reports[0].images <= 3
        assert sum(report.total_cost.get("CNY", 0) for report in reports) <= Decimal("0.35")


WORKER = """
import sys
from langchain_cogview.jobs import run_job
print(run_job([f"a kitten, number {number}" for number in range(40)], sys.argv[1], shard=sys.argv[2], base_url=sys.argv[3],
      progress=False, budget=sys.argv[4]).made)
"""


def test_a_killed_process_neither_overspends_nor_keeps_the_budget(tmp_path, monkeypatch):
    monkeypatch.setenv("ZHIPUAI_API_KEY", KEY)
    sandbox = Sandbox(latency=30, in_flight_limit=100)
    with SandboxServer(sandbox) as server:
        arguments = [str(tmp_path), "1/2", server.base_url, str(BUDGET)]
        worker = subprocess.Popen([sys.executable, "-c", WORKER, *arguments], stdout=subprocess.PIPE)
        while not server.sandbox.requests:  # its first requests are under way
            assert worker.poll() is None
            threading.Event().wait(0.01)
        worker.kill()
        worker.communicate()
        assert entries(tmp_path)["shard-1-of-2"]["open"]
        sandbox.latency = 0
        sent = len((tmp_path / "shard-1-of-2" / "attempts.jsonl").read_text().splitlines())
        reserved = Decimal(entries(tmp_path)["shard-1-of-2"]["amount"])
        assert reserved >= sent * PRICE
        report = run_job(PROMPTS, tmp_path, shard="2/2", base_url=server.base_url, progress=False, budget=BUDGET)
        assert report.made == 10 - sent
        assert Decimal(entries(tmp_path)["shard-1-of-2"]["amount"]) == sent * PRICE


@pytest.mark.heavy
def test_many_processes_that_are_killed_and_begun_again_spend_the_budget_exactly(tmp_path, monkeypatch):
    monkeypatch.setenv("ZHIPUAI_API_KEY", KEY)
    with SandboxServer(Sandbox(latency=0.05, in_flight_limit=100)) as server:
        for number in range(4):
            arguments = [[str(tmp_path), f"{shard}/4", server.base_url, "1.50"] for shard in (1, 2, 3, 4)]
            workers = [subprocess.Popen([sys.executable, "-c", WORKER, *item]) for item in arguments]
            before = len(server.sandbox.requests)
            while len(server.sandbox.requests) == before and any(worker.poll() is None for worker in workers):
                threading.Event().wait(0.01)
            if number < 3:
                for worker in workers[number % 2 :: 2]:
                    worker.kill()
            for worker in workers:
                worker.wait()
        run_shards(PROMPTS, tmp_path, 4, base_url=server.base_url, progress=False, budget="1.50")
        lines = [
            json.loads(line) for path in tmp_path.glob("*/attempts.jsonl") for line in path.read_text().splitlines()
        ]
        settled = {line["request_id"] for line in lines if line.get("settled") == "not_run"}
        assert len({line["request_id"] for line in lines} - settled) == 25
        assert len(server.sandbox.requests) <= 25
