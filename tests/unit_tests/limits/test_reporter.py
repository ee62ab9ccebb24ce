"""What a process does with a shared limit: its queue, the store's answers, and no answers."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time

import pytest

from langchain_cogview import CogViewConfigurationError, CogViewImageGenerator
from langchain_cogview.api.limiter import Limiter
from langchain_cogview.concurrency import Deadline
from langchain_cogview.limits import LimitShare, LimitUsage, SharedLimit, allocate, reporter, shared_limit
from langchain_cogview.limits.machine import MachineLimit
from langchain_cogview.limits.reporter import SharedAllowance
from langchain_cogview.sandbox import Sandbox, SandboxServer

PATIENCE = 60.0


class Pages:
    """What several stores of this process share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pages: dict[str, object] = {}


class Store:
    """One process's view of the shared pages; its faults are set by a test."""

    def __init__(self, pages: Pages | None = None) -> None:
        self.shared = pages or Pages()
        self.fault: Exception | None = None
        self.open = threading.Event()
        self.open.set()
        self.asked = threading.Semaphore(0)
        self.reports: list[LimitUsage] = []

    def exchange(self, account, usage):
        self.asked.release()
        assert self.open.wait(PATIENCE)
        if self.fault is not None:
            raise self.fault
        with self.shared.lock:
            self.reports.append(usage)
            self.shared.pages[account], share = allocate(
                self.shared.pages.get(account), usage, time.monotonic(), settle=0
            )
        return share

    def __repr__(self) -> str:
        return "The store"


def limiter_of(store: SharedLimit) -> Limiter:
    return Limiter(check_seconds=0.01, adaptive=lambda limiter: SharedAllowance(store, "account", limiter))


def acquire(limiter: Limiter, cap: int = 5):
    slot = limiter.acquire(cap, deadline=Deadline(PATIENCE))
    assert slot is not None
    return slot


def until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def full(limiter: Limiter, cap: int = 5) -> bool:
    """Whether no slot is granted, once the store has answered to the wish."""
    thread_ended = threading.Event()
    found = []

    def wait() -> None:
        found.append(limiter.acquire(cap, cancelled=thread_ended))

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: limiter.waiting or found)
    allowance = limiter._adaptive
    until(lambda: found or allowance._reported.waiting)
    asked = len(allowance._store.reports)
    until(lambda: found or len(allowance._store.reports) > asked + 1)
    thread_ended.set()
    thread.join(PATIENCE)
    if found[0]:
        found[0].release()
    return found[0] is None


def test_two_processes_never_have_more_in_flight_than_one_may(caplog):
    pages = Pages()
    one, other = limiter_of(Store(pages)), limiter_of(Store(pages))
    slots = [acquire(one) for _ in range(5)]
    assert full(other)
    slots.pop().done()
    assert not full(other)


def test_a_slot_that_one_gives_back_goes_to_a_call_that_waits_in_another():
    pages = Pages()
    one, other = limiter_of(Store(pages)), limiter_of(Store(pages))
    slots = [acquire(one) for _ in range(5)]
    got = []
    thread = threading.Thread(target=lambda: got.append(acquire(other)))
    thread.start()
    until(lambda: other.waiting)
    slots.pop().release()
    thread.join(PATIENCE)
    assert got


async def test_tasks_wait_for_another_process_too():
    pages = Pages()
    one, other = limiter_of(Store(pages)), limiter_of(Store(pages))
    slots = [await one.aacquire(2) for _ in range(2)]
    waiting = asyncio.create_task(other.aacquire(2))
    while not other.waiting:
        await asyncio.sleep(0)
    slots.pop().done()
    slot = await asyncio.wait_for(waiting, PATIENCE)
    slot.done()


def test_a_call_that_is_allowed_does_not_wait_for_the_store():
    store = Store()
    limiter = limiter_of(store)
    first, second = acquire(limiter), acquire(limiter)
    until(lambda: limiter._adaptive._reported.in_flight == 2)
    store.open.clear()
    second.done()
    slot = limiter.acquire(5, deadline=Deadline(PATIENCE))  # the store hangs meanwhile
    assert slot
    store.open.set()
    for item in (first, slot):
        item.done()


def test_all_slots_are_released_when_nothing_is_left_to_do():
    store = Store()
    limiter = limiter_of(store)
    acquire(limiter).done()
    until(lambda: store.reports[-1].demand == 0)
    until(lambda: limiter.limit == 0 and math.isinf(limiter._adaptive.due))


def test_a_refusal_in_one_process_lowers_the_limit_of_all():
    pages = Pages()
    one, other = limiter_of(Store(pages)), limiter_of(Store(pages))
    slots = [acquire(one, 8) for _ in range(8)]
    slots.pop().dropped()
    until(lambda: pages.pages["account"]["limit"][1] == 1)
    for slot in slots:
        slot.release()
    held = [acquire(other, 8) for _ in range(4)]
    assert full(other, 8)
    for slot in held:
        slot.release()


# Without an answer.


@pytest.fixture
def hurried(monkeypatch):
    for name in ("_FIRST_PAUSE", "_LONGEST_PAUSE", "_FIRST_TRY"):
        monkeypatch.setattr(reporter, name, 0.02)


def test_a_process_keeps_what_it_has_while_the_store_is_away(hurried, caplog):
    store = Store()
    limiter = limiter_of(store)
    slots = [acquire(limiter, 3) for _ in range(3)]
    store.fault = OSError("gone")
    until(lambda: limiter._adaptive._outage)
    for slot in slots:
        slot.done()
        acquire(limiter, 3).done()
    assert limiter.limit <= 3
    until(lambda: "The store is not available (gone)" in caplog.text)


def test_a_process_that_has_nothing_tries_one_while_the_store_is_away(hurried):
    store = Store()
    store.fault = OSError("never there")
    limiter = limiter_of(store)
    slot = acquire(limiter)
    assert limiter.limit == 1
    slot.done()
    acquire(limiter).done()


@pytest.mark.parametrize("answer", [None, 5, "5", LimitShare("5", 5, 5, 0, 0.05)])
def test_a_store_that_answers_nonsense_hangs_no_call(hurried, answer):
    store = Store()
    store.exchange = lambda account, usage: answer
    limiter = limiter_of(store)
    acquire(limiter).done()


def test_what_is_refused_while_the_store_is_away_teaches_nobody(hurried):
    store = Store()
    limiter = limiter_of(store)
    slots = [acquire(limiter) for _ in range(3)]
    store.fault = OSError("gone")
    until(lambda: limiter._adaptive._outage)
    slots.pop().dropped()
    store.fault = None
    until(lambda: not limiter._adaptive._outage)
    assert store.reports[-1].refusals == 0
    assert store.shared.pages["account"]["limit"][1] == 0
    for slot in slots:
        slot.done()


def test_the_shared_limit_is_back_by_itself(hurried):
    store = Store()
    limiter = limiter_of(store)
    acquire(limiter).done()
    store.fault = OSError("gone")
    slots = [acquire(limiter)]
    store.fault = None
    slots += [acquire(limiter) for _ in range(4)]
    assert limiter.in_flight == 5
    for slot in slots:
        slot.done()


def test_a_process_that_was_stopped_asks_before_it_goes_on(monkeypatch):
    store = Store()
    limiter = limiter_of(store)
    slots = [acquire(limiter) for _ in range(2)]
    until(lambda: limiter._adaptive._reported.in_flight == 2)
    store.open.clear()
    monkeypatch.setattr(limiter._adaptive, "_valid_until", time.monotonic() - 1)
    slots.pop().done()
    assert not limiter._admits(5)
    store.open.set()
    acquire(limiter).done()
    slots.pop().done()


@pytest.mark.parametrize("calls", [1, 5])
def test_a_store_that_refuses_ends_all_calls_with_its_error_and_the_next_call_asks_again(calls):
    store = Store()
    store.fault = CogViewConfigurationError("The password is wrong.", hint="Check it.")
    limiter = limiter_of(store)

    async def call():
        return await limiter.aacquire(5)

    async def many():
        return await asyncio.gather(*(call() for _ in range(calls)), return_exceptions=True)

    errors = asyncio.run(many())
    assert [str(error) for error in errors] == ["The password is wrong. Check it."] * calls
    with pytest.raises(CogViewConfigurationError, match="password is wrong"):
        acquire(limiter)
    store.fault = None
    acquire(limiter).done()


def test_a_store_that_refuses_later_costs_no_call(hurried, caplog):
    store = Store()
    limiter = limiter_of(store)
    slot = acquire(limiter)
    store.fault = CogViewConfigurationError("The password was changed.")
    until(lambda: "The password was changed." in caplog.text)
    slot.done()
    acquire(limiter).done()


# By the generator.


@pytest.fixture
def server():
    with SandboxServer(Sandbox(in_flight_limit=5)) as server:
        yield server


def test_a_generator_reports_a_hash_of_its_key_and_nothing_else(server):
    store = Store()
    names = []
    exchange = store.exchange
    store.exchange = lambda account, usage: names.append(account) or exchange(account, usage)
    generator = CogViewImageGenerator(base_url=server.base_url, api_key="secret-key-of-mine", shared_limit=store)
    assert generator.invoke("a kitten").images
    assert names
    assert set(names[0]) <= set("0123456789abcdef")
    assert len(names[0]) == 32
    assert "secret-key-of-mine" not in f"{store.reports}{store.shared.pages}"


def test_a_refused_store_sends_nothing(server):
    store = Store()
    store.fault = CogViewConfigurationError("The password is wrong.")
    generator = CogViewImageGenerator(base_url=server.base_url, api_key="any", shared_limit=store)
    with pytest.raises(CogViewConfigurationError, match="The password is wrong"):
        generator.invoke("a kitten")
    assert server.sandbox.requests == []


async def test_the_variable_alone_shares_the_limit_of_a_machine(server, monkeypatch, tmp_path):
    monkeypatch.setenv("COGVIEW_SHARED_LIMIT", "machine")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    shared_limit.__globals__["_named"].cache_clear()
    generator = CogViewImageGenerator(base_url=server.base_url, api_key="any")
    results = await generator.abatch(["a kitten", "a foal"])
    assert len(results) == 2
    [page] = (tmp_path / "langchain-cogview").iterdir()
    assert page.stat().st_mode & 0o077 == 0
    shared_limit.__globals__["_named"].cache_clear()


def test_another_process_of_the_machine_is_seen(server, monkeypatch, tmp_path):
    """Eight at once in two processes, five of them in flight."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("COGVIEW_SHARED_LIMIT", "machine")
    server.sandbox.latency = 0.05
    code = (
        "import sys; from langchain_cogview import CogViewImageGenerator\n"
        "generator = CogViewImageGenerator(base_url=sys.argv[1], api_key='any', max_concurrency=5, download=False)\n"
        "print(len(generator.batch(['a kitten'] * 20)))"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code, server.base_url], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [worker.communicate()[0].strip() for worker in workers] == ["20"] * 3
    assert len(server.sandbox.requests) == 60  # none was refused


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_reports_for_itself(tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from langchain_cogview.api.limiter import limiter_for\n"
        "from langchain_cogview.limits.machine import MachineLimit\n"
        "limiter = limiter_for('http://127.0.0.1:1', 'cogview-4', 'key', MachineLimit(Path(sys.argv[1])))\n"
        "slots = [limiter.acquire(5) for _ in range(3)]\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    mine = [limiter.acquire(5) for _ in range(2)]\n"
        "    os._exit(0 if limiter.in_flight == 2 else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), limiter.in_flight)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.split() == ["0", "3"], done.stderr


def test_a_process_that_ends_gives_its_slots_back_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from langchain_cogview.api.limiter import limiter_for\n"
        "from langchain_cogview.limits.machine import MachineLimit\n"
        "limiter = limiter_for('http://127.0.0.1:1', 'cogview-4', 'key', MachineLimit(Path(sys.argv[1])))\n"
        "slots = [limiter.acquire(5) for _ in range(5)]\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300)
    [page] = tmp_path.iterdir()
    [member] = json.loads(page.read_text())["members"].values()
    assert member[:3] == [0, 0, 0]  # in flight, wanted, allowed


# What cannot be used.


@pytest.mark.parametrize("value", ["everywhere", "http://127.0.0.1", "redis://", "machine2", 7, object()])
def test_what_names_no_store_is_refused_at_once(value):
    with pytest.raises(CogViewConfigurationError, match="shared_limit is not usable"):
        CogViewImageGenerator(base_url="sandbox:", shared_limit=value)


def usable(folder) -> str:
    try:
        MachineLimit(folder).exchange("0" * 32, LimitUsage("me", 0, 1, 5))
    except CogViewConfigurationError as error:
        return str(error)
    return ""


def test_a_folder_that_others_can_write_to_is_refused(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    assert "others can write to it" in usable(folder)


def test_a_link_or_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("")
    assert "not a folder" in usable(tmp_path / "link")
    assert usable(tmp_path / "file")


def test_a_page_that_is_a_link_is_not_followed(tmp_path):
    tmp_path.chmod(0o700)
    (tmp_path / "secret").write_text("keep")
    (tmp_path / f"{'0' * 32}.json").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        MachineLimit(tmp_path).exchange("0" * 32, LimitUsage("me", 0, 1, 5))
    assert (tmp_path / "secret").read_text() == "keep"


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b'{"limit": 1}', b"[" * 100_000, b'{"limit":[0,0,0,0,0,1],"members":{"a":0}}']
)
def test_a_broken_page_is_written_anew(tmp_path, content):
    tmp_path.chmod(0o700)
    (tmp_path / f"{'0' * 32}.json").write_bytes(content)
    share = MachineLimit(tmp_path).exchange("0" * 32, LimitUsage("me", 0, 3, 5))
    assert share.allowance == 1


def test_a_folder_that_is_deleted_is_made_again(tmp_path):
    folder = tmp_path / "limits"
    store = MachineLimit(folder)
    store.exchange("0" * 32, LimitUsage("me", 0, 3, 5))
    (folder / f"{'0' * 32}.json").unlink()
    folder.rmdir()
    with pytest.raises(FileNotFoundError):
        store.exchange("0" * 32, LimitUsage("me", 0, 3, 5))
    assert store.exchange("0" * 32, LimitUsage("me", 0, 3, 5)).allowance == 1


def test_two_limits_on_one_account_are_reported(caplog):
    pages = Pages()
    one, other = limiter_of(Store(pages)), limiter_of(Store(pages))
    low = acquire(one, 2)
    with caplog.at_level(logging.WARNING):
        acquire(other, 5).done()
        until(lambda: "max_concurrency is 5 here, and 2 in another process" in caplog.text)
    low.done()


def test_the_password_of_a_server_is_in_no_text_and_no_pickle():
    pytest.importorskip("redis")
    import pickle

    url = "redis://user:hunter2@127.0.0.1:1/0"
    generator = CogViewImageGenerator(base_url="http://127.0.0.1:1", api_key="any", shared_limit=url)
    assert "hunter2" not in f"{generator!r}{shared_limit(url)!r}{generator.model_dump()}"
    with pytest.raises(TypeError, match="shared_limit"):
        pickle.dumps(generator)
    plain = CogViewImageGenerator(base_url="sandbox:", shared_limit="redis://127.0.0.1:1/0")
    assert pickle.loads(pickle.dumps(plain)).shared_limit == "redis://127.0.0.1:1/0"
