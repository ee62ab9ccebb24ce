"""Real processes on one account, with a real server or a real folder, while something goes wrong.

The account is a served sandbox that counts what it refuses. Nothing is lost, no refusals storm, and all goes on by itself.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from langchain_cogview.sandbox import Sandbox, SandboxServer
from tests.unit_tests.limits.servers import RedisServer

pytestmark = pytest.mark.heavy

LIMIT = 5
WORKERS = 4
PATIENCE = 300.0


class Account:
    """Some worker processes on one account."""

    def __init__(self, sandbox: Sandbox, base_url: str, shared: str) -> None:
        self.sandbox = sandbox
        arguments = [sys.executable, "-m", "tests.unit_tests.limits.worker", base_url, shared, str(LIMIT)]
        root = Path(__file__).parents[3]
        pipe = subprocess.PIPE
        self.workers = [
            subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True, cwd=root) for _ in range(WORKERS)
        ]
        for worker in self.workers:
            assert worker.stdout.readline() == "ready\n"
        for worker in self.workers:
            worker.stdin.write("\n")
            worker.stdin.flush()

    @property
    def refused(self) -> int:
        return len(self.sandbox.requests) - self.sandbox.images_made

    def goes_on(self, images: int = 20) -> None:
        """Wait for some more images."""
        target, end = self.sandbox.images_made + images, time.monotonic() + PATIENCE
        while self.sandbox.images_made < target:
            assert time.monotonic() < end, f"{self.sandbox.images_made} of {target} images"
            time.sleep(0.05)

    def runs_for(self, seconds: float) -> None:
        """Let it run; what is asserted does not depend on how much is done meanwhile."""
        time.sleep(seconds)

    def end(self) -> list[dict[str, Any]]:
        """Stop all workers. Returns what the living ones report."""
        living = [worker for worker in self.workers if worker.poll() is None]
        for worker in living:
            worker.stdin.write("\n")
            worker.stdin.flush()
        return [json.loads(worker.stdout.readline()) for worker in living]

    def kill(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.communicate()


@pytest.fixture(params=["machine", "redis"])
def account(request, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    sandbox = Sandbox(latency=0.2, in_flight_limit=LIMIT)
    with SandboxServer(sandbox) as served:
        if request.param == "machine":
            account = Account(sandbox, served.base_url, "machine")
            account.store = None
            try:
                yield account
            finally:
                account.kill()
            return
        pytest.importorskip("redis")
        with RedisServer(tmp_path) as store:
            account = Account(sandbox, served.base_url, store.url)
            account.store = store
            try:
                yield account
            finally:
                account.kill()


@pytest.fixture
def redis_account(account):
    if account.store is None:
        pytest.skip("only of a server")
    return account


def lost(reports: list[dict[str, Any]]) -> list[str]:
    return [error for report in reports for error in report["lost"]]


def test_nothing_is_refused_while_nothing_is_wrong(account):
    account.goes_on(100)
    reports = account.end()
    assert lost(reports) == []
    assert account.refused <= 2
    assert min(report["made"] for report in reports) >= 0.4 * max(report["made"] for report in reports)


def test_the_others_get_the_slots_of_the_killed(account):
    account.goes_on()
    before = account.refused
    for worker in account.workers[:2]:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    account.goes_on(60)
    assert lost(account.end()) == []
    assert account.refused - before <= 10


def test_a_process_that_is_stopped_for_a_while_comes_back_calmly(account):
    account.goes_on()
    before = account.refused
    for worker in account.workers[:2]:
        worker.send_signal(signal.SIGSTOP)
    account.runs_for(8)
    account.goes_on()
    for worker in account.workers[:2]:
        worker.send_signal(signal.SIGCONT)
    account.goes_on(40)
    assert lost(account.end()) == []
    assert account.refused - before <= 20


def test_an_account_that_shrinks_and_grows_again_is_followed_by_all(account):
    account.goes_on()
    account.sandbox.in_flight_limit = 2
    account.goes_on(30)
    before = account.refused
    account.goes_on(30)
    assert account.refused - before <= 10
    account.sandbox.in_flight_limit = LIMIT
    account.goes_on(150)
    assert lost(account.end()) == []


def test_a_server_that_restarts_empty_costs_nothing(redis_account):
    account = redis_account
    account.goes_on()
    account.store.stop()
    account.goes_on()
    account.store.start()
    account.goes_on(60)
    assert lost(account.end()) == []
    assert account.refused <= 30


def test_a_server_that_is_emptied_costs_nothing(redis_account):
    import redis

    account = redis_account
    account.goes_on()
    for _ in range(3):
        redis.Redis.from_url(account.store.url).flushall()
        account.goes_on()
    assert lost(account.end()) == []
    assert account.refused <= 15


def test_a_server_that_hangs_costs_nothing(redis_account):
    account = redis_account
    account.goes_on()
    account.store.hang()
    account.runs_for(6)
    account.goes_on()
    account.store.go_on()
    account.goes_on(60)
    assert lost(account.end()) == []
    assert account.refused <= 30


def test_without_the_server_all_goes_on_slowly(tmp_path):
    pytest.importorskip("redis")
    absent = RedisServer(tmp_path)
    sandbox = Sandbox(latency=0.2, in_flight_limit=LIMIT)
    with SandboxServer(sandbox) as served:
        account = Account(sandbox, served.base_url, absent.url)
        try:
            account.goes_on(60)
            assert lost(account.end()) == []
            assert account.refused <= 30
        finally:
            account.kill()
