"""What a user relies on: killed at any moment and started again, a job pays for nothing twice."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from langchain_cogview.jobs import plan_job
from langchain_cogview.sandbox import Sandbox, SandboxServer
from tests.unit_tests.cli.test_command import KEY, MODULE
from tests.unit_tests.test_batches import PARTI

pytestmark = pytest.mark.skipif(not PARTI.exists(), reason="needs the Parti prompts")
IDLE = 0.005


class KilledJob:
    """`cogview batch` over real prompts, as a process, at an account that allows five requests at once."""

    def __init__(self, prompts: Path, folder: Path, sandbox: Sandbox, base_url: str) -> None:
        self.prompts, self.folder, self.sandbox, self.base_url = prompts, folder, sandbox, base_url
        self.command = [
            *MODULE, *("batch", str(prompts), "-o", str(folder), "--base-url", base_url, "--size", "512x512"),
            *("--no-progress", "--json"),
        ]  # fmt: skip
        self.environment = dict(os.environ) | {"ZHIPUAI_API_KEY": KEY}
        self.listed: dict[str, str] = {}

    def started(self, *options: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*self.command, *options], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def killed_at(self, images: int, jitter: float) -> None:
        """Kill it shortly after the account was charged for so many images."""
        with self.started() as process:
            while self.sandbox.images_made < images and process.poll() is None:
                time.sleep(IDLE)
            # A process that is done before this one runs again has ended well.
            assert process.poll() in (None, 0), process.stderr.read()
            time.sleep(jitter)
            process.kill()
        self.list_unknown()

    def list_unknown(self) -> None:
        """What the next run would list."""
        plan = plan_job(self.prompts, self.folder, base_url=self.base_url, api_key="any", size="512x512")
        self.listed |= {item.request_id: item.prompt for item in plan.unknown}

    def finished(self, *options: str) -> dict:
        with self.started(*options) as process:
            out, err = process.communicate()
        assert process.returncode == 0, err
        return json.loads(out)


def killed_three_times(prompts: Path, count: int, folder: Path) -> KilledJob:
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    with Sandbox(in_flight_limit=5, latency=0.02) as sandbox, SandboxServer(sandbox) as server:
        job = KilledJob(prompts, folder, sandbox, server.base_url)
        for part in range(3):
            third = count // 4
            job.killed_at(part * third + chance.randint(third // 3, third), chance.uniform(0, 0.05))
        report = job.finished("--retry-unknown")
        check(job, count, report)
        again = job.finished()
        assert (again["made"], again["skipped"]) == (0, count)
        check(job, count, report)
        return job


def check(job: KilledJob, count: int, report: dict) -> None:
    lines = [json.loads(line) for line in (job.folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    # The thousand and first image starts a sub-folder.
    files = {path.relative_to(job.folder).as_posix() for path in job.folder.rglob("*.png")}
    assert len(lines) == len(files) == count == report["made"] + report["skipped"]
    assert {image["file"] for line in lines for image in line["images"]} == files
    assert len({line["key"] for line in lines}) == count
    assert {line["status"] for line in lines} == {"made"}
    ledger = job.sandbox.ledger
    times = Counter(entry.prompt for entry in ledger)
    assert len(times) == count
    for prompt in (prompt for prompt, number in times.items() if number > 1):
        ids = [entry.request_id for entry in ledger if entry.prompt == prompt]
        assert sum(item not in job.listed for item in ids) == 1, (prompt, ids, job.listed)
    # What is given up is listed in the manifest, too.
    assert {item["request_id"] for line in lines for item in line["given_up"]} == set(job.listed)
    pages = [page.read_text(encoding="utf-8") for page in job.folder.glob("index*.html")]
    assert sum(text.count("<img ") for text in pages) == count


def test_a_job_killed_three_times_makes_each_of_sixty_images_once(tmp_path):
    rows = PARTI.read_text(encoding="utf-8").splitlines(keepends=True)[:61]
    (tmp_path / "prompts.tsv").write_text("".join(rows), encoding="utf-8")
    killed_three_times(tmp_path / "prompts.tsv", 60, tmp_path / "out")


@pytest.mark.heavy
def test_a_job_over_all_parti_prompts_killed_three_times_makes_each_image_once(tmp_path):
    killed_three_times(PARTI, 1632, tmp_path / "out")
