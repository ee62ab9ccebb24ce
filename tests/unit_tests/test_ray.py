"""What a user relies on: a job on a Ray cluster pays once for each prompt, whatever dies, and its tasks share one limit."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
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


def workers(title: str = "ray::_make_shard") -> list[int]:
    """The workers of this machine; only those below this process are ours."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    parents = {int(pid): int(parent) for pid, parent, *_ in rows}

    def is_ours(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [int(row[0]) for row in rows if len(row) > 2 and title in row[2] and is_ours(int(row[0]))]


def wait_for_images(server, count: int) -> None:
    end = time.monotonic() + PATIENCE
    while server.sandbox.images_made < count:
        assert time.monotonic() < end
        time.sleep(0.05)


def paid(server) -> Counter[str]:
    return Counter(entry.prompt for entry in server.sandbox.ledger)


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


ROWS = PROMPTS[:24]


def dataset(server, folder, prompts=ROWS, **arguments):
    from langchain_cogview.ray import generate_images

    rows = ray.data.from_items([{"caption": prompt, "id": number} for number, prompt in enumerate(prompts)])
    return generate_images(
        rows, folder, columns={"prompt": "caption"}, shards=12, base_url=server.base_url, **arguments
    )


def test_a_dataset_that_is_looked_at_three_times_is_paid_for_once(cluster, server, tmp_path):
    images = dataset(server, tmp_path, batch_size=8)
    assert not server.sandbox.requests
    rows = images.take_all()
    assert {row["image_status"] for row in rows} == {"made"}
    assert sorted(row["id"] for row in rows) == list(range(len(ROWS)))
    assert all(os.path.exists(path) for row in rows for path in row["image_paths"])
    assert images.materialize().count() == len(ROWS)
    again = dataset(server, tmp_path, batch_size=5, actors=1).random_shuffle()
    assert {row["id"]: row["image_paths"] for row in again.iter_rows()} == {
        row["id"]: row["image_paths"] for row in rows
    }
    assert set(paid(server).values()) == {1}
    assert len(server.sandbox.requests) <= len(ROWS) + 2  # the limit is shared: hardly one was refused


def test_who_looks_at_a_few_rows_loses_none_of_the_others(cluster, server, tmp_path):
    assert len(dataset(server, tmp_path, batch_size=6).take(3)) == 3
    rows = dataset(server, tmp_path, batch_size=6).take_all()
    assert {row["image_status"] for row in rows} == {"made"}
    assert set(paid(server).values()) == {1}


def test_no_error_ends_a_dataset(cluster, server, tmp_path):
    prompts = [*ROWS[:5], "[[content-filter]]", None, "[[malformed]]", "[[server-error]]"]
    rows = {row["id"]: row for row in dataset(server, tmp_path, prompts).take_all()}
    statuses = [rows[number]["image_status"] for number in range(len(prompts))]
    assert statuses[:5] == ["made"] * 5
    assert statuses[5:8] == ["blocked", "invalid", "unknown"]
    assert statuses[8] != "made"
    assert all(rows[number]["image_error"] for number in range(5, len(prompts)))


def test_a_worker_of_a_dataset_that_is_killed_costs_nothing_twice(cluster, server, tmp_path):
    def kill() -> None:
        wait_for_images(server, 6)
        os.kill(workers("MapWorker")[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    rows = dataset(server, tmp_path, batch_size=6).take_all()
    killer.join()
    statuses = Counter(row["image_status"] for row in rows)
    assert statuses["made"] + statuses["unknown"] == len(ROWS)
    assert max(paid(server).values()) == 1
    assert statuses["made"] <= len(paid(server)) <= len(ROWS)
    again = Counter(row["image_status"] for row in dataset(server, tmp_path).take_all())
    assert again == statuses
    assert max(paid(server).values()) == 1


def test_a_dataset_has_no_key(cluster, server, tmp_path):
    images = dataset(server, tmp_path, env_vars={"ZHIPUAI_API_KEY": KEY})
    assert KEY.encode() not in ray.cloudpickle.dumps(images)
    assert KEY not in repr(images)
    from langchain_cogview.ray import _Environment

    environment = _Environment({"ZHIPUAI_API_KEY": KEY, "OTHER": "1"})
    assert environment["env_vars"]["ZHIPUAI_API_KEY"] == KEY
    assert KEY.encode() not in pickle.dumps(environment)


def test_a_wrong_setting_of_a_dataset_raises_at_once(cluster, server, tmp_path):
    with pytest.raises(CogViewConfigurationError, match="api_key cannot be sent"):
        dataset(server, tmp_path, api_key=KEY)
    with pytest.raises(CogViewConfigurationError, match="no_such_setting"):
        dataset(server, tmp_path, no_such_setting=1)


DRIVER = """
import sys, ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1", _temp_dir=sys.argv[3])
from langchain_cogview.ray import generate_images, run_job_on_ray
prompts = [f"a kitten, number {number}" for number in range(48)]
if sys.argv[4] == "job":
    print(run_job_on_ray(prompts, sys.argv[1], shard_size=12, base_url=sys.argv[2]))
else:
    rows = ray.data.from_items([{"prompt": prompt} for prompt in prompts])
    rows = generate_images(rows, sys.argv[1], base_url=sys.argv[2], batch_size=12).take_all()
    print(*(row["image_status"] for row in rows))
"""


@pytest.mark.parametrize("kind", ["job", "dataset"])
def test_a_driver_that_is_killed_and_started_again_pays_once(server, tmp_path, monkeypatch, kind):
    from langchain_cogview.jobs import merge_shards

    monkeypatch.setenv("ZHIPUAI_API_KEY", KEY)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="ray") as short:  # a socket's path is short
        arguments = [sys.executable, "-c", DRIVER, str(tmp_path), server.base_url, short, kind]
        driver = subprocess.Popen(arguments, start_new_session=True)
        try:
            wait_for_images(server, 10)
        finally:
            driver.kill()
            driver.wait()
        again = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=PATIENCE)
    merged = merge_shards(tmp_path)
    assert merged.prompts["made"] + merged.unknown == len(PROMPTS), again.stdout
    assert max(paid(server).values()) == 1
    assert merged.prompts["made"] <= len(paid(server)) <= len(PROMPTS)
