"""The gate in flight: never above the limit, never stuck, never unfair, and soon at what the service accepts."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import random
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from langchain_cogview.api import limiter as gate_module
from langchain_cogview.api.limiter import MAX_GATES, Gate, Place, gate_for
from langchain_cogview.concurrency import Deadline

PATIENCE = 20
"""Seconds after which a wait in a test has failed."""
URL = "https://open.bigmodel.cn/api/paas/v4"


@pytest.fixture
def gate() -> Gate:
    return Gate()


def take(gate: Gate, cap: int = 5, ticket: int | None = None) -> Place:
    """A place that is there at once."""
    place = gate.take(cap, deadline=Deadline(0.0), ticket=ticket)
    assert place is not None
    return place


def takes(gate: Gate, count: int, cap: int | None = None) -> list[Place]:
    return [take(gate, cap or count) for _ in range(count)]


def full(gate: Gate, cap: int) -> bool:
    """Whether nobody gets a place at once."""
    place = gate.take(cap, deadline=Deadline(0.0))
    if place is not None:
        place.leave()
    return place is None


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "It never came."
        time.sleep(0)


async def turns() -> None:
    """Let everything go on that can."""
    for _ in range(10):
        await asyncio.sleep(0)


class Waiting:
    """A thread that waits at a gate."""

    def __init__(self, gate: Gate, cap: int = 1, **options: Any) -> None:
        self.place: Place | None = None
        before = gate.waiting
        self.thread = threading.Thread(target=self._wait, args=(gate, cap), kwargs=options, daemon=True)
        self.thread.start()
        until(lambda: gate.waiting > before)

    def _wait(self, gate: Gate, cap: int, **options: Any) -> None:
        self.place = gate.take(cap, **options)

    def end(self) -> Place | None:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        return self.place


# The queue.


def test_places_up_to_the_cap_are_there_at_once(gate):
    places = takes(gate, 5)
    assert (gate.in_flight, gate.waiting, gate.limit) == (5, 0, math.inf)
    assert full(gate, 5)
    assert not full(gate, 6)
    places[0].done()
    assert not full(gate, 5)


@pytest.mark.parametrize("cap", [0, -1])
async def test_a_cap_that_would_wait_for_ever_is_an_error(gate, cap):
    with pytest.raises(ValueError, match="1 or more"):
        gate.take(cap)
    with pytest.raises(ValueError, match="1 or more"):
        await gate.atake(cap)


async def test_first_come_first_served_over_threads_and_loops(gate):
    first, order = take(gate, 1), SimpleQueue()

    async def in_a_task(number: int) -> None:
        place = await gate.atake(1)
        order.put(number)
        place.done()

    def in_a_thread(number: int) -> None:
        place = gate.take(1)
        order.put(number)
        place.done()

    tasks = []
    for number in range(12):
        if number % 3 == 0:
            tasks.append(asyncio.create_task(in_a_task(number)))
        else:
            target = in_a_thread if number % 3 == 1 else lambda number: asyncio.run(in_a_task(number))
            threading.Thread(target=target, args=(number,), daemon=True).start()
        while gate.waiting == number:
            await asyncio.sleep(0)
    first.done()
    await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
    assert [order.get(timeout=PATIENCE) for _ in range(12)] == list(range(12))
    until(lambda: gate.in_flight == 0)
    assert gate.waiting == 0


async def test_the_head_of_the_queue_is_not_overtaken_by_a_higher_cap(gate):
    places = takes(gate, 3)
    low, high = asyncio.create_task(gate.atake(1)), asyncio.create_task(gate.atake(5))
    await turns()
    assert gate.waiting == 2
    places.pop().done()
    await turns()
    assert gate.waiting == 2
    low.cancel()
    await turns()
    assert high.done()
    assert gate.in_flight == 3


async def test_a_refused_call_keeps_its_turn(gate):
    first, second = takes(gate, 2)
    others = [asyncio.create_task(gate.atake(2)) for _ in range(3)]
    await turns()
    assert second.refused()
    again = asyncio.create_task(gate.atake(2, ticket=second.ticket))
    await turns()
    assert not again.done()
    first.done()
    await turns()
    assert again.done()
    assert again.result().ticket == second.ticket
    assert not any(task.done() for task in others)
    for task in others:
        task.cancel()


async def test_a_refused_call_does_not_overtake_an_earlier_one_with_a_lower_cap(gate):
    early, late, other = takes(gate, 3)
    early.refused()
    late.refused()
    head = asyncio.create_task(gate.atake(1, ticket=early.ticket))
    await turns()
    gate._held = False
    gate._limit = 5
    assert gate.take(5, ticket=late.ticket, deadline=Deadline(0.0)) is None
    other.done()
    await turns()
    assert head.done()


# What it learns.


def test_a_burst_of_refusals_halves_once_and_comes_down_to_what_is_left(gate):
    places = takes(gate, 8)
    places[7].refused()
    assert gate.limit == 4
    places[6].refused()
    places[5].refused()
    assert gate.limit == 4  # five are left
    places[4].refused()
    places[3].refused()
    assert gate.limit == 3
    for place in places[:3]:
        place.refused()
    assert gate.limit == 1
    assert gate.in_flight == 0


def test_a_refusal_after_the_burst_halves_again(gate):
    places = takes(gate, 16)
    places.pop().refused()
    assert gate.limit == 8
    while len(places) > 7:
        places.pop().leave()
    later = take(gate, 16)
    later.refused()
    assert gate.limit == 4


def test_a_refusal_lowers_the_limit_to_what_was_accepted_at_the_least(gate):
    places = takes(gate, 4, cap=40)
    places.pop().refused()
    assert gate.limit == 3  # not half of 40


def test_one_is_always_allowed(gate):
    for _ in range(5):
        assert not take(gate, 5).refused()
        assert gate.limit == 1
    assert not full(gate, 5)


def test_a_caller_of_its_own_waits_by_itself_and_others_have_the_queue(gate):
    first, second = takes(gate, 2)
    assert second.refused()
    assert not first.refused()


def refused_with_two_left(gate: Gate) -> list[Place]:
    *places, last = takes(gate, 3, cap=8)
    last.refused()
    # The limit would allow one more.
    gate._limit = 8
    assert full(gate, 8)
    return places


@pytest.mark.parametrize("end", [Place.done, Place.leave])
def test_nobody_goes_after_a_refusal_before_another_has_ended(gate, end):
    places = refused_with_two_left(gate)
    end(places.pop())
    assert not full(gate, 8)


def test_the_hold_is_over_when_all_others_are_refused_too(gate):
    one, other = refused_with_two_left(gate)
    assert one.refused()
    assert full(gate, 8)
    assert not other.refused()
    assert not full(gate, 8)


async def test_the_hold_is_over_when_the_others_are_cancelled(gate):
    never = asyncio.Event()

    async def call() -> None:
        place = await gate.atake(2)
        try:
            await never.wait()
        finally:
            place.leave()

    other = asyncio.create_task(call())
    await turns()
    take(gate, 2).refused()
    waiting = asyncio.create_task(gate.atake(2))
    await turns()
    assert not waiting.done()
    other.cancel()
    await turns()
    assert waiting.done()


def succeed(gate: Gate, count: int, cap: int) -> None:
    """Successes with all places taken."""
    busy: list[Place] = []
    while count:
        while not full(gate, cap):
            busy.append(take(gate, cap))
        busy.pop(0).done()
        count -= 1
    for place in busy:
        place.leave()


def taught(gate: Gate, accepts: int, sent: int) -> None:
    """A gate that has sent a burst."""
    places = takes(gate, sent)
    for place in places[accepts:]:
        place.refused()
    for place in places[:accepts]:
        place.leave()


def test_successes_raise_it_by_one_for_each_limit_of_them(gate):
    taught(gate, 7, 8)
    assert gate.limit == 4
    succeed(gate, 3, 8)
    assert gate.limit == 4
    succeed(gate, 1, 8)
    assert gate.limit == 5
    succeed(gate, 5, 8)
    assert gate.limit == 6
    succeed(gate, 6, 8)
    assert gate.limit == 7


def test_the_step_to_the_refused_level_takes_ten_times_as_many_and_those_above_do_not(gate):
    taught(gate, 5, 20)
    assert gate.limit == 5
    succeed(gate, 49, 20)
    assert gate.limit == 5
    succeed(gate, 1, 20)
    assert gate.limit == 6
    succeed(gate, 6, 20)
    assert gate.limit == 7


def test_where_one_is_accepted_a_second_is_tried_after_thirty(gate):
    taught(gate, 1, 5)
    assert gate.limit == 1
    succeed(gate, 29, 5)
    assert gate.limit == 1
    succeed(gate, 1, 5)
    assert gate.limit == 2


def test_a_refusal_starts_the_count_of_successes_again(gate):
    taught(gate, 7, 8)
    succeed(gate, 3, 8)
    places = takes(gate, 4)
    places.pop().refused()
    for place in places:
        place.leave()
    assert gate.limit == 2
    succeed(gate, 1, 8)
    assert gate.limit == 2
    succeed(gate, 1, 8)
    assert gate.limit == 3


def test_it_rises_to_the_cap_and_no_further(gate):
    taught(gate, 5, 6)
    succeed(gate, 1000, 6)
    assert gate.limit == 6


def test_other_ends_neither_raise_nor_halve(gate):
    taught(gate, 5, 20)
    for _ in range(1000):
        for place in takes(gate, 5):
            place.leave()
    assert gate.limit == 5


def test_what_was_sent_before_the_refusal_does_not_raise(gate):
    places = takes(gate, 8)
    for place in places[5:]:
        place.refused()
    for place in places[:5]:
        place.done()
    assert gate.limit == 4
    succeed(gate, 3, 8)
    assert gate.limit == 4


def test_successes_with_places_left_over_do_not_raise(gate):
    taught(gate, 5, 20)
    for _ in range(1000):
        for place in takes(gate, 4, cap=20):
            place.done()
    assert gate.limit == 5


@pytest.mark.parametrize("first", [Place.done, Place.leave, Place.refused])
@pytest.mark.parametrize("second", [Place.done, Place.leave, Place.refused])
def test_the_first_end_of_a_place_counts(first, second):
    def state_after(*ends: Callable[[Place], object]) -> list[object]:
        gate = Gate()
        places = takes(gate, 8)
        places[7].refused()
        for place in places[:5]:
            place.leave()
        place = take(gate, 8)
        for end in ends:
            end(place)
        return [gate.in_flight, gate.limit, gate._held, gate._successes, gate._epoch, gate._refused_at]

    assert state_after(first, second, second) == state_after(first) != state_after()


# Nobody leaves a hole.


async def test_a_cancelled_waiter_leaves_the_queue(gate):
    place = take(gate, 1)
    first, second = asyncio.create_task(gate.atake(1)), asyncio.create_task(gate.atake(1))
    await turns()
    first.cancel()
    await turns()
    assert gate.waiting == 1
    place.done()
    assert (await second).ticket == 3
    assert (gate.in_flight, gate.waiting) == (1, 0)


async def test_a_place_granted_to_a_waiter_that_is_cancelled_at_the_same_moment_goes_to_the_next(gate):
    for steps in range(5):
        place = take(gate, 1)
        first, second = asyncio.create_task(gate.atake(1)), asyncio.create_task(gate.atake(1))
        await turns()
        place.done()
        assert gate.in_flight == 1
        for _ in range(steps):
            await asyncio.sleep(0)
        first.cancel()
        with suppress(asyncio.CancelledError):
            (await first).leave()
        (await asyncio.wait_for(second, PATIENCE)).leave()
        assert (gate.in_flight, gate.waiting) == (0, 0)


@pytest.mark.parametrize("how", ["thread", "task"])
async def test_a_waiter_whose_deadline_passes_leaves_the_queue(gate, how):
    take_one = gate.atake if how == "task" else lambda *a, **k: asyncio.to_thread(gate.take, *a, **k)
    place = take(gate, 1)
    waiting = asyncio.create_task(gate.atake(1))
    await turns()
    assert await take_one(1, deadline=Deadline(0.01)) is None
    assert gate.waiting == 1
    place.done()
    assert await waiting
    assert gate.waiting == 0


@pytest.mark.parametrize("how", ["thread", "task"])
async def test_a_deadline_that_has_not_started_does_not_pass_in_the_queue(gate, how):
    class Unstarted(Deadline):
        """Asked for the third time, the place is free."""

        asked = 0

        def remaining(self) -> float | None:
            self.asked += 1
            if self.asked == 3:
                place.done()
            return 0.001

        @property
        def passed(self) -> bool:
            return False

    take_one = gate.atake if how == "task" else lambda *a, **k: asyncio.to_thread(gate.take, *a, **k)
    place = take(gate, 1)
    assert await asyncio.wait_for(take_one(1, deadline=Unstarted(0.001)), PATIENCE)


async def test_a_place_granted_as_the_deadline_passes_goes_to_the_next_or_is_had(gate):
    for _ in range(200):
        place = take(gate, 1)
        first = asyncio.create_task(gate.atake(1, deadline=Deadline(0.0005)))
        second = asyncio.create_task(gate.atake(1))
        await asyncio.sleep(0.0005)
        place.done()
        had = await first
        if had:
            assert not second.done()
            had.done()
        (await asyncio.wait_for(second, PATIENCE)).done()
        assert (gate.in_flight, gate.waiting) == (0, 0)


def test_a_stopped_thread_leaves_the_queue(gate):
    place, stopped = take(gate, 1), threading.Event()
    first = Waiting(gate, stopped=stopped)
    second = Waiting(gate, stopped=threading.Event())
    stopped.set()
    assert first.end() is None
    assert gate.waiting == 1
    place.done()
    assert second.end()


def test_what_is_granted_to_a_thread_that_is_stopped_at_the_same_moment_goes_to_the_next(gate):
    class Stopping(threading.Event):
        """Set from the second look on; at that moment the place is granted."""

        looks = 0

        def is_set(self) -> bool:
            self.looks += 1
            if self.looks == 2:
                place.done()
            return self.looks > 1

    place = take(gate, 1)
    first = Waiting(gate, stopped=Stopping())
    second = Waiting(gate) if first.thread.is_alive() else None
    assert first.end() is None
    if second:
        assert second.end()
        assert (gate.in_flight, gate.waiting) == (1, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to a thread")
def test_an_interrupt_of_a_waiting_thread_leaves_no_hole(gate):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    main, place = threading.get_ident(), take(gate, 1)

    def send() -> None:
        # Not before it waits.
        until(lambda: gate.waiting and sys._current_frames()[main].f_code.co_name == "wait")
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    sender = threading.Thread(target=send)
    try:
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            gate.take(1)
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)
    assert gate.waiting == 0
    place.done()
    assert not full(gate, 1)


def test_a_waiter_of_a_closed_loop_is_skipped(gate):
    place, loop = take(gate, 1), asyncio.new_event_loop()
    lost = loop.create_task(gate.atake(1))
    lost._log_destroy_pending = False
    loop.run_until_complete(turns())
    loop.close()
    waiting = Waiting(gate)
    assert gate.waiting == 2
    place.done()
    assert waiting.end()
    assert (gate.in_flight, gate.waiting) == (1, 0)


def test_a_place_granted_in_a_loop_that_never_runs_again_goes_to_the_next(gate):
    place, loop = take(gate, 1), asyncio.new_event_loop()
    lost = loop.create_task(gate.atake(1))
    lost._log_destroy_pending = False
    loop.run_until_complete(turns())
    waiting = Waiting(gate)
    place.done()  # granted to the loop, which does not run
    loop.close()
    del lost, loop
    gc.collect()
    assert waiting.end()
    assert gate.in_flight == 1


def test_a_place_that_is_dropped_leaves(gate):
    place = take(gate, 1)
    waiting = Waiting(gate)
    del place
    assert waiting.end()


def test_a_place_that_ends_inside_the_gate_does_not_lock_it_up(gate):
    """As when the garbage collector runs there."""
    first, second = takes(gate, 2)
    with gate._lock:
        first.leave()
        del second
    assert not full(gate, 1)
    assert gate.in_flight == 0


@pytest.mark.parametrize(("cap", "look"), [(2, 1), (1, 1), (1, 2)])
def test_a_place_that_ends_while_another_call_is_inside_the_gate_is_free_for_it_or_after_it(cap, look):
    class Colliding(Gate):
        """At one of the looks at whether a place is free, another one ends just after it."""

        looks = 0

        def _admits(self, cap: int) -> bool:
            admits = super()._admits(cap)
            self.looks += 1
            if self.looks == look + 1:  # the first was for the other itself
                other.leave()
            return admits

    gate = Colliding()
    other = take(gate, 1)
    place = gate.take(cap, deadline=Deadline(PATIENCE))
    assert place is not None
    assert gate.looks > look
    assert gate.in_flight == 1


def test_a_place_that_ends_while_another_is_refused_is_free_after_it():
    class Colliding(Gate):
        def _learn_refusal(self, *arguments: Any) -> None:
            other.leave()
            super()._learn_refusal(*arguments)

    gate = Colliding()
    other, place = takes(gate, 2)
    place.refused()
    assert gate.in_flight == 0


def test_a_place_that_ends_just_before_a_call_joins_the_queue_is_had(gate):
    class Late(Gate):
        def _queue(self, *arguments: Any) -> None:
            place.done()
            super()._queue(*arguments)

    gate = Late()
    place = take(gate, 1)
    assert gate.take(1, deadline=Deadline(PATIENCE))


# Threads, loops, processes, and many of them.


def test_threads_and_loops_at_once_never_exceed_the_cap_and_all_get_through(gate):
    lock, running, most, through = threading.Lock(), 0, 0, []

    def enter() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)

    def leave(place: Place) -> None:
        nonlocal running
        with lock:
            running -= 1
            through.append(place)
        place.done()

    def in_threads() -> None:
        for _ in range(200):
            place = gate.take(3)
            enter()
            time.sleep(0)
            leave(place)

    async def call(number: int) -> None:
        place = await gate.atake(3)
        enter()
        await asyncio.sleep(0)
        leave(place)

    async def in_tasks() -> None:
        await asyncio.gather(*(call(number) for number in range(200)))

    def in_a_loop() -> None:
        asyncio.run(in_tasks())

    with ThreadPoolExecutor(7) as pool:
        for each in [pool.submit(work) for work in [in_threads] * 4 + [in_a_loop] * 3]:
            each.result(PATIENCE)
    assert most == 3
    assert len(through) == 1400
    assert (gate.in_flight, gate.waiting) == (0, 0)


FORK = f"""
import asyncio, json, os, threading, time
from langchain_cogview.api import limiter as gate_module
from langchain_cogview.api.limiter import gate_for
account = ({URL!r}, "cogview-4", "key")
gate = gate_for(*account)
places = [gate.take(8) for _ in range(8)]
places[7].refused()
threading.Thread(target=gate.take, args=(8,), daemon=True).start()
loop = asyncio.new_event_loop()
waiting = loop.create_task(gate.atake(8))
loop.run_until_complete(asyncio.sleep(0))
holding, let_go = threading.Event(), threading.Event()
def hold():
    with gate._lock, gate_module._registry_lock:
        holding.set()
        let_go.wait()
while gate.waiting < 2:
    time.sleep(0)
thread = threading.Thread(target=hold)
thread.start()
holding.wait()
end, begin = os.pipe()
child = os.fork()
if child == 0:
    fresh = gate_for(*account)
    places[0].done(), places[1].leave(), places[2].refused()
    waiting.cancel()
    loop.run_until_complete(asyncio.wait([waiting]))
    state = [fresh.in_flight, fresh.waiting, fresh.limit == float("inf")]
    places = [fresh.take(8, ticket=places[0].ticket) for _ in range(8)]
    os.write(begin, json.dumps([*state, fresh.in_flight]).encode())
    os._exit(0)
let_go.set()
thread.join()
os.waitpid(child, 0)
parent = [gate.in_flight, gate.waiting, gate.limit]
waiting.cancel()
loop.run_until_complete(asyncio.wait([waiting]))
print(json.dumps({{"child": json.loads(os.read(end, 1000)), "parent": parent}}))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_a_forked_child_starts_afresh_even_if_the_gate_was_locked():
    run = subprocess.run(
        [sys.executable, "-c", FORK],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"child": [0, 0, True, 8], "parent": [7, 2, 4]}


@pytest.mark.heavy  # compares times: on its own, not beside others
def test_ten_thousand_waiters_cost_each_as_much_as_a_thousand():
    async def queue(count: int) -> float:
        gate = Gate()

        async def call() -> None:
            (await gate.atake(5)).done()

        places = takes(gate, 5)
        begin = time.process_time()
        tasks = [asyncio.create_task(call()) for _ in range(count)]
        await turns()
        assert gate.waiting == count
        for task in tasks[::2]:
            task.cancel()
        for place in places:
            place.done()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (gate.in_flight, gate.waiting, gate._heap) == (0, 0, [])
        return (time.process_time() - begin) / count

    few = min(asyncio.run(queue(1_000)) for _ in range(3))
    assert asyncio.run(queue(10_000)) < 5 * few  # ten times as much, if each looked at all


async def test_waiters_that_come_and_go_behind_another_do_not_pile_up(gate):
    first = take(gate, 1)
    head = asyncio.create_task(gate.atake(1))
    await turns()
    for _ in range(1000):
        assert await gate.atake(1, deadline=Deadline(0.0)) is None
    assert gate.waiting == 1
    assert len(gate._heap) < 200
    first.done()
    assert await head


# One for each account, model and host.


@pytest.fixture
def _own_registry(monkeypatch):
    monkeypatch.setattr(gate_module, "_alive", type(gate_module._alive)())
    monkeypatch.setattr(gate_module, "_recent", type(gate_module._recent)())


@pytest.mark.usefixtures("_own_registry")
def test_one_account_model_and_host_have_one_gate():
    gate = gate_for(URL, "cogview-4", "key")
    for same in (URL + "/", "https://OPEN.bigmodel.cn", "https://open.bigmodel.cn:443/other/path"):
        assert gate_for(same, "CogView-4", "key") is gate
    assert gate_for("sandbox:a", "cogview-4", "key") is gate_for("sandbox:a", "cogview-4", "key")


@pytest.mark.usefixtures("_own_registry")
def test_another_account_model_host_or_port_has_another_gate():
    gates = {
        gate_for(URL, "cogview-4", "key"),
        gate_for(URL, "cogview-4", "another"),
        gate_for(URL, "glm-image", "key"),
        gate_for("https://api.z.ai/api/paas/v4", "cogview-4", "key"),
        gate_for("http://127.0.0.1:8001", "cogview-4", "key"),
        gate_for("http://127.0.0.1:8002", "cogview-4", "key"),
        gate_for("sandbox:a", "cogview-4", "key"),
        gate_for("sandbox:b", "cogview-4", "key"),
    }
    assert len(gates) == 8
    assert "another" not in repr(list(gate_module._recent))


@pytest.mark.usefixtures("_own_registry")
def test_many_accounts_are_forgotten_but_not_those_in_use():
    held = gate_for(URL, "cogview-4", "held")
    busy = gate_for(URL, "cogview-4", "busy").take(5)
    gate_for(URL, "cogview-4", "unused")
    for number in range(2 * MAX_GATES):
        gate_for(URL, "cogview-4", str(number))
    assert len(gate_module._recent) == MAX_GATES
    assert len(gate_module._alive) == MAX_GATES + 2
    assert gate_for(URL, "cogview-4", "held") is held
    assert gate_for(URL, "cogview-4", "busy").in_flight == 1
    busy.leave()


# How soon it is at what the service accepts: simulated, in a time that jumps.


class _Jumping(selectors.SelectSelector):
    """Where nothing is ready, it is later at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "Everybody waits, and nobody would ever wake them."
            self.now += timeout
        return ready


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def simulated(main: Coroutine[Any, Any, Any]) -> None:
    loop = _VirtualLoop()
    try:
        loop.run_until_complete(main)
    finally:
        loop.close()


class Account:
    """A service that accepts a number of requests at once, and 200 calls of it, with what became of them.

    Attributes:
        answers: Of each request, in the order of sending: whether it was accepted.
        refusals: Of each call.
        work: Seconds that the accepted ones took together.
    """

    def __init__(self, accepts: int = 5, *, refusal: float = 0.0, took: Callable[[], float] = lambda: 1.0) -> None:
        self.accepts = accepts
        self.refusal = refusal
        self.took = took
        self.busy = 0
        self.answers: list[bool] = []
        self.work = 0.0
        self.seconds = 0.0
        self.gate = Gate()

    def run(self, cap: int, calls: int = 200) -> Account:
        self.refusals = [0] * calls
        simulated(self._all(cap, calls))
        assert (self.gate.in_flight, self.gate.waiting) == (0, 0)
        return self

    async def _all(self, cap: int, calls: int) -> None:
        await asyncio.gather(*(self._call(number, cap) for number in range(calls)))
        self.seconds = asyncio.get_running_loop().time()

    async def _call(self, number: int, cap: int) -> None:
        ticket = None
        while True:
            place = await self.gate.atake(cap, ticket=ticket)
            ticket = place.ticket
            accepted = self.busy < self.accepts
            self.answers.append(accepted)
            if accepted:
                self.busy += 1
                seconds = self.took()
                self.work += seconds
                await asyncio.sleep(seconds)
                self.busy -= 1
                place.done()
                return
            if self.refusal:
                await asyncio.sleep(self.refusal)
            self.refusals[number] += 1
            if not place.refused():
                await asyncio.sleep(1.0)

    @property
    def ideal(self) -> float:
        return self.work / self.accepts

    def refused_after(self, requests: int) -> float:
        return self.answers[requests:].count(False) / len(self.answers[requests:])


@pytest.mark.parametrize("refusal", [0.0, 0.01], ids=["refused at once", "refused after 10 ms"])
@pytest.mark.parametrize("cap", [5, 8, 20, 40])
def test_200_calls_of_an_account_that_accepts_5_are_near_the_ideal(cap, refusal):
    account = Account(refusal=refusal).run(cap)
    assert max(account.refusals) <= 2  # the client gives up after two more attempts
    assert account.seconds <= account.ideal / 0.9
    # Of a cap above 10 the burst itself, sent before anything is known, is as long as the cap.
    assert account.refused_after(max(cap, 10)) < 0.05


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cap", [5, 8, 20, 40])
def test_it_holds_where_pictures_take_differently_long(cap, seed):
    chance = random.Random(seed)
    account = Account(refusal=0.05, took=lambda: chance.uniform(0.5, 1.5)).run(cap)
    assert max(account.refusals) <= 2
    # At the end there are not enough calls left to fill all places.
    assert account.seconds <= account.ideal / 0.9 + 1.5
    assert account.refused_after(max(cap, 10)) < 0.05


@pytest.mark.parametrize("accepts", [1, 2, 3, 10])
@pytest.mark.parametrize("cap", [5, 40])
def test_it_holds_for_other_accounts(cap, accepts):
    account = Account(accepts, refusal=0.01).run(cap)
    assert max(account.refusals) <= 2
    assert account.seconds <= 200 / min(accepts, cap) / 0.9
    assert account.refused_after(max(cap, 10)) < 0.05


def test_it_follows_an_account_that_changes():
    class Throttled(Account):
        """Accepts 15, but 2 between the 30th and the 60th second."""

        async def _call(self, number: int, cap: int) -> None:
            await super()._call(number, cap)
            now = asyncio.get_running_loop().time()
            self.accepts = 2 if 30 < now < 60 else 15
            self.finished = [*getattr(self, "finished", []), now]

    account = Throttled(15, refusal=0.01).run(20, calls=1500)
    assert max(account.refusals) <= 2
    assert sum(30 < moment < 60 for moment in account.finished) >= 0.8 * 60
    assert sum(100 < moment < 120 for moment in account.finished) >= 0.8 * 20 * 15


# Anything, in any order.


class Gates(RuleBasedStateMachine):
    """A gate with threads and tasks, against a plain table of who waits and who is in flight.

    A call has one number, by its first arrival; refused and back again, it has the same.
    """

    @initialize()
    def begin(self) -> None:
        self.gate = Gate()
        self.loop = asyncio.new_event_loop()
        self.granted: SimpleQueue[tuple[int, Place]] = SimpleQueue()
        self.flying: dict[int, Place] = {}
        self.queue: dict[int, tuple[int, asyncio.Task[None] | tuple[threading.Thread, threading.Event]]] = {}
        self.calls = 0
        self.held = False
        self.poll, gate_module.POLL = gate_module.POLL, 0.005

    def teardown(self) -> None:
        while self.flying:
            self.flying.popitem()[1].leave()
            self.held = False
            self._look_who_was_granted()
        assert not self.queue
        assert (self.gate.in_flight, self.gate.waiting) == (0, 0)
        self.loop.close()
        gate_module.POLL = self.poll

    # Who comes.

    def _arrive(self, number: int, cap: int, threaded: bool, ticket: int | None = None) -> None:
        if threaded:
            stopped = threading.Event()
            known = self.gate.in_flight + self.gate.waiting

            def wait() -> None:
                place = self.gate.take(cap, stopped=stopped, ticket=ticket)
                if place is not None:
                    self.granted.put((number, place))

            thread = threading.Thread(target=wait, daemon=True)
            thread.start()
            until(lambda: self.gate.in_flight + self.gate.waiting > known)
            self.queue[number] = cap, (thread, stopped)
        else:

            async def wait_here() -> None:
                self.granted.put((number, await self.gate.atake(cap, ticket=ticket)))

            self.queue[number] = cap, self.loop.create_task(wait_here())
            self._step()

    @rule(caps=st.lists(st.integers(1, 8), min_size=1, max_size=5), threaded=st.booleans())
    def arrive(self, caps: list[int], threaded: bool) -> None:
        for cap in caps:
            self.calls += 1
            self._arrive(self.calls, cap, threaded)
        self._look_who_was_granted()

    # Who ends.

    def _landed(self, data: st.DataObject) -> tuple[int, Place]:
        number = data.draw(st.sampled_from(sorted(self.flying)))
        return number, self.flying.pop(number)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), end=st.sampled_from([Place.done, Place.leave]), count=st.integers(1, 8))
    def end(self, data: st.DataObject, end: Callable[[Place], None], count: int) -> None:
        for _ in range(min(count, len(self.flying))):
            end(self._landed(data)[1])
            self.held = False
            self._look_who_was_granted()

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def be_dropped(self, data: st.DataObject) -> None:
        self._landed(data)  # nobody refers to it any more
        self.held = False
        self._look_who_was_granted()

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), again=st.booleans(), threaded=st.booleans())
    def be_refused(self, data: st.DataObject, again: bool, threaded: bool) -> None:
        number, place = self._landed(data)
        limit = self.gate.limit
        assert place.refused() == bool(self.flying)
        self.held = bool(self.flying)
        assert 1 <= self.gate.limit <= min(limit, max(1, len(self.flying)))
        self._look_who_was_granted()
        if again:
            self._arrive(number, place._cap, threaded, place.ticket)
            self._look_who_was_granted()

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def end_again_and_again(self, data: st.DataObject) -> None:
        _, place = self._landed(data)
        place.leave()
        self.held = False
        self._look_who_was_granted()
        limit = self.gate.limit
        place.done()
        place.refused()
        place.leave()
        assert self.gate.limit == limit

    # Who gives up.

    def _give_up(self, number: int) -> None:
        _, waiting = self.queue.pop(number)
        if isinstance(waiting, asyncio.Task):
            waiting.cancel()
            self._step()
        else:
            thread, stopped = waiting
            stopped.set()
            thread.join(PATIENCE)
            assert not thread.is_alive()

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        self._give_up(data.draw(st.sampled_from(sorted(self.queue))))
        self._look_who_was_granted()

    @precondition(lambda self: self.flying and self.queue)
    @rule(data=st.data())
    def be_cancelled_at_the_moment_of_the_grant(self, data: st.DataObject) -> None:
        first = min(self.queue)
        if isinstance(self.queue[first][1], asyncio.Task):
            self._landed(data)[1].leave()
            self.held = False
            self._give_up(first)
            self._look_who_was_granted()

    # What follows.

    def _step(self) -> None:
        self.loop.run_until_complete(turns())

    def _look_who_was_granted(self) -> None:
        self._step()
        count = self.gate.in_flight - len(self.flying)
        assert count >= 0
        fresh = sorted(self.granted.get(timeout=PATIENCE) for _ in range(count))
        assert self.granted.empty()
        for number, place in fresh:
            cap, _ = self.queue.pop(number)
            # At that moment below the limit and its own cap.
            assert len(self.flying) < min(self.gate.limit, cap)
            self.flying[number] = place
        assert not fresh or not self.queue or fresh[-1][0] < min(self.queue)

    @invariant()
    def the_counts_are_right(self) -> None:
        assert (self.gate.in_flight, self.gate.waiting) == (len(self.flying), len(self.queue))

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        if self.queue:
            assert self.flying
            cap, _ = self.queue[min(self.queue)]
            assert self.held or len(self.flying) >= min(cap, self.gate.limit)


_common = settings(deadline=None, database=None, stateful_step_count=40, suppress_health_check=list(HealthCheck))


class TestAnythingInAnyOrder(Gates.TestCase):
    settings = settings(_common, max_examples=50)


@pytest.mark.heavy
@pytest.mark.timeout(600)
class TestAnythingInAnyOrderForLong(Gates.TestCase):
    settings = settings(_common, max_examples=1000)
