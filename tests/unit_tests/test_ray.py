"""What a user relies on: a job on a Ray cluster pays once for each prompt, whatever dies, and its tasks share one limit."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import Counter

import pytest

from langchain_cogview import CogViewConfigurationError
from langchain_cogview.sandbox import Sandbox, SandboxServer
from tests.unit_tests.cli.test_command import KEY

ray = pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("default")]

PROMPTS = [f"a kitten, number {number}" for number in range(48)]
PATIENCE = 300


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("ZHIPUAI_API_KEY", KEY)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # On loopback alone, as all tests.
    ray.init(
        num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False, _node_ip_address="127.0.0.1"
    )
    yield
    ray.shutdown()


@pytest.fixture
def server():
    with SandboxServer(Sandbox(latency=0.2, in_flight_limit=5)) as server:
        yield server


def job(server, folder, **arguments):
    from langchain_cogview.ray import run_job_on_ray

    return run_job_on_ray(PROMPTS, folder, shard_size=12, base_url=server.base_url, **arguments)


def workers() -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "ray::_make_shard" in line]


def test_the_tasks_share_one_limit_and_pay_once(cluster, server, tmp_path):
    merged = job(server, tmp_path)
    assert merged.prompts == {"made": len(PROMPTS)}
    assert len(server.sandbox.requests) == len(PROMPTS)  # none was refused
    assert job(server, tmp_path).images == len(PROMPTS)
    assert len(server.sandbox.requests) == len(PROMPTS)


@pytest.mark.parametrize("victim", ["worker", "actor"])
def test_what_dies_costs_nothing_twice(cluster, server, tmp_path, victim):
    from langchain_cogview.ray import ACTOR, NAMESPACE

    def kill() -> None:
        end = time.monotonic() + PATIENCE
        while server.sandbox.images_made < 10 and time.monotonic() < end:
            time.sleep(0.05)
        if victim == "actor":
            ray.kill(ray.get_actor(ACTOR, namespace=NAMESPACE))
        else:
            os.kill(workers()[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    merged = job(server, tmp_path)
    killer.join()
    paid = Counter(entry.prompt for entry in server.sandbox.ledger)
    assert merged.prompts["made"] + merged.unknown == len(PROMPTS)
    assert max(paid.values()) == 1
    # What is listed as unknown may have been cut off before the service made it.
    assert merged.prompts["made"] <= len(paid) <= len(PROMPTS)


def test_the_key_is_not_sent_as_an_argument(tmp_path):
    from langchain_cogview.ray import run_job_on_ray

    with pytest.raises(CogViewConfigurationError, match="api_key cannot be sent"):
        run_job_on_ray(PROMPTS, tmp_path, api_key=KEY)
