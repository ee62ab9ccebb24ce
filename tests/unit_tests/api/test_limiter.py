"""The limiter in flight: never above the limit, never stuck, never unfair, and soon at what the service accepts."""

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
import tracemalloc
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from langchain_cogview.api import limiter as limiter_module
from langchain_cogview.api import waiters as waiters_module
from langchain_cogview.api.limiter import MAX_LIMITERS, Limiter, Slot, limiter_for
from langchain_cogview.concurrency import Deadline

PATIENCE = 60
"""Seconds after which a wait in a test has failed."""
URL = "https://open.bigmodel.cn/api/paas/v4"


@pytest.fixture
def limiter() -> Limiter:
    return Limiter()


def acquire(limiter: Limiter, cap: int = 5, ticket: int | None = None) -> Slot:
    """A slot that is there at once."""
    slot = limiter.acquire(cap, deadline=Deadline(0.0), ticket=ticket)
    assert slot is not None
    return slot


def acquire_all(limiter: Limiter, count: int, cap: int | None = None) -> list[Slot]:
    return [acquire(limiter, cap or count) for _ in range(count)]


def full(limiter: Limiter, cap: int) -> bool:
    """Whether nobody gets a slot at once."""
    slot = limiter.acquire(cap, deadline=Deadline(0.0))
    if slot is not None:
        slot.release()
    return slot is None


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "It never came."
        time.sleep(0)


async def loop_iterations() -> None:
    """Let everything go on that can."""
    for _ in range(10):
        await asyncio.sleep(0)


class Waiting:
    """A thread that waits at a limiter."""

    def __init__(self, limiter: Limiter, cap: int = 1, **options: Any) -> None:
        self.slot: Slot | None = None
        before = limiter.waiting
        self.thread = threading.Thread(target=self._wait, args=(limiter, cap), kwargs=options, daemon=True)
        self.thread.start()
        until(lambda: limiter.waiting > before or not self.thread.is_alive())

    def _wait(self, limiter: Limiter, cap: int, **options: Any) -> None:
        self.slot = limiter.acquire(cap, **options)

    def end(self) -> Slot | None:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        return self.slot


# The queue.


def test_slots_up_to_the_cap_are_there_at_once(limiter):
    slots = acquire_all(limiter, 5)
    assert (limiter.in_flight, limiter.waiting, limiter.limit) == (5, 0, math.inf)
    assert full(limiter, 5)
    assert not full(limiter, 6)
    slots[0].done()
    assert not full(limiter, 5)


@pytest.mark.parametrize("cap", [0, -1])
async def test_a_cap_that_would_wait_for_ever_is_an_error(limiter, cap):
    with pytest.raises(ValueError, match="1 or more"):
        limiter.acquire(cap)
    with pytest.raises(ValueError, match="1 or more"):
        await limiter.aacquire(cap)


async def test_first_come_first_served_over_threads_and_loops(limiter):
    first, order = acquire(limiter, 1), SimpleQueue()

    async def in_a_task(number: int) -> None:
        slot = await limiter.aacquire(1)
        order.put(number)
        slot.done()

    def in_a_thread(number: int) -> None:
        slot = limiter.acquire(1)
        order.put(number)
        slot.done()

    tasks = []
    for number in range(12):
        if number % 3 == 0:
            tasks.append(asyncio.create_task(in_a_task(number)))
        else:
            target = in_a_thread if number % 3 == 1 else lambda number: asyncio.run(in_a_task(number))
            threading.Thread(target=target, args=(number,), daemon=True).start()
        while limiter.waiting == number:
            await asyncio.sleep(0)
    first.done()
    await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
    assert [order.get(timeout=PATIENCE) for _ in range(12)] == list(range(12))
    until(lambda: limiter.in_flight == 0)
    assert limiter.waiting == 0


async def test_the_head_of_the_queue_is_not_overtaken_by_a_higher_cap(limiter):
    slots = acquire_all(limiter, 3)
    low, high = asyncio.create_task(limiter.aacquire(1)), asyncio.create_task(limiter.aacquire(5))
    await loop_iterations()
    assert limiter.waiting == 2
    slots.pop().done()
    await loop_iterations()
    assert limiter.waiting == 2
    low.cancel()
    await loop_iterations()
    assert high.done()
    assert limiter.in_flight == 3


async def test_a_refused_call_keeps_its_position_in_the_queue(limiter):
    first, second = acquire_all(limiter, 2)
    others = [asyncio.create_task(limiter.aacquire(2)) for _ in range(3)]
    await loop_iterations()
    assert second.dropped()
    again = asyncio.create_task(limiter.aacquire(2, ticket=second.ticket))
    await loop_iterations()
    assert not again.done()
    first.done()
    await loop_iterations()
    assert again.done()
    assert again.result().ticket == second.ticket
    assert not any(task.done() for task in others)
    for task in others:
        task.cancel()


async def test_a_refused_call_does_not_overtake_an_earlier_one_with_a_lower_cap(limiter):
    early, late, *others = acquire_all(limiter, 20, cap=40)
    early.dropped()
    late.dropped()
    others.pop().done()
    head = asyncio.create_task(limiter.aacquire(1, ticket=early.ticket))
    await loop_iterations()
    assert limiter.in_flight < limiter.limit
    assert limiter.acquire(40, ticket=late.ticket, deadline=Deadline(0.0)) is None
    while others:
        others.pop().done()
    await loop_iterations()
    assert head.done()


# What it learns.


def test_a_burst_of_refusals_halves_once_and_comes_down_to_what_is_left(limiter):
    slots = acquire_all(limiter, 8)
    slots[7].dropped()
    assert limiter.limit == 4
    slots[6].dropped()
    slots[5].dropped()
    assert limiter.limit == 4  # five are left
    slots[4].dropped()
    slots[3].dropped()
    assert limiter.limit == 3
    for slot in slots[:3]:
        slot.dropped()
    assert limiter.limit == 1
    assert limiter.in_flight == 0


def test_a_refusal_after_the_burst_halves_again(limiter):
    slots = acquire_all(limiter, 16)
    slots.pop().dropped()
    assert limiter.limit == 8
    while len(slots) > 7:
        slots.pop().release()
    later = acquire(limiter, 16)
    later.dropped()
    assert limiter.limit == 4


def test_a_refusal_lowers_the_limit_to_what_was_accepted_at_the_least(limiter):
    slots = acquire_all(limiter, 4, cap=40)
    slots.pop().dropped()
    assert limiter.limit == 3  # not half of 40


def test_one_is_always_allowed(limiter):
    for _ in range(5):
        assert not acquire(limiter, 5).dropped()
        assert limiter.limit == 1
    assert not full(limiter, 5)


def test_a_caller_of_its_own_waits_by_itself_and_others_have_the_queue(limiter):
    first, second = acquire_all(limiter, 2)
    assert second.dropped()
    assert not first.dropped()


def refused_with_two_left(limiter: Limiter) -> list[Slot]:
    *slots, last = acquire_all(limiter, 3, cap=8)
    last.dropped()
    assert full(limiter, 8)
    return slots


@pytest.mark.parametrize("end", [Slot.done, Slot.release])
def test_nobody_goes_after_a_refusal_before_another_has_ended(limiter, end):
    slots = refused_with_two_left(limiter)
    end(slots.pop())
    assert not full(limiter, 8)


def test_the_hold_is_over_when_all_others_are_refused_too(limiter):
    one, other = refused_with_two_left(limiter)
    assert one.dropped()
    assert full(limiter, 8)
    assert not other.dropped()
    assert not full(limiter, 8)


async def test_the_hold_is_over_when_the_others_are_cancelled(limiter):
    never = asyncio.Event()

    async def call() -> None:
        slot = await limiter.aacquire(2)
        try:
            await never.wait()
        finally:
            slot.release()

    other = asyncio.create_task(call())
    await loop_iterations()
    acquire(limiter, 2).dropped()
    waiting = asyncio.create_task(limiter.aacquire(2))
    await loop_iterations()
    assert not waiting.done()
    other.cancel()
    await loop_iterations()
    assert waiting.done()


def succeed(limiter: Limiter, count: int, cap: int) -> None:
    """Successes with all slots in use."""
    busy: list[Slot] = []
    while count:
        while not full(limiter, cap):
            busy.append(acquire(limiter, cap))
        busy.pop(0).done()
        count -= 1
    for slot in busy:
        slot.release()


def taught(limiter: Limiter, accepts: int, sent: int) -> None:
    """A limiter that has sent a burst."""
    slots = acquire_all(limiter, sent)
    for slot in slots[accepts:]:
        slot.dropped()
    for slot in slots[:accepts]:
        slot.release()


def test_successes_raise_it_faster_and_faster_up_to_the_refused_level(limiter):
    taught(limiter, 7, 8)
    assert limiter.limit == 4
    succeed(limiter, 3, 8)
    assert limiter.limit == 4
    succeed(limiter, 1, 8)
    assert limiter.limit == 5
    succeed(limiter, 5, 8)
    assert limiter.limit == 7


def test_the_climb_after_a_refusal_doubles_while_refusals_stay_away(limiter):
    taught(limiter, 1, 40)
    levels = [limiter.limit]
    for _ in range(300):
        succeed(limiter, 1, 40)
        if limiter.limit != levels[-1]:
            levels.append(limiter.limit)
    assert levels == [1, 2, 3, 5, 9, 17, 33, 40]


def test_rising_to_the_refused_level_takes_ten_times_as_many_successes_and_rising_further_does_not(limiter):
    taught(limiter, 5, 20)
    assert limiter.limit == 5
    succeed(limiter, 49, 20)
    assert limiter.limit == 5
    succeed(limiter, 1, 20)
    assert limiter.limit == 6
    succeed(limiter, 6, 20)
    assert limiter.limit == 7


def test_where_one_is_accepted_a_second_is_tried_after_thirty(limiter):
    taught(limiter, 1, 5)
    assert limiter.limit == 1
    succeed(limiter, 29, 5)
    assert limiter.limit == 1
    succeed(limiter, 1, 5)
    assert limiter.limit == 2


def test_a_refusal_starts_the_count_of_successes_again(limiter):
    taught(limiter, 7, 8)
    succeed(limiter, 3, 8)
    slots = acquire_all(limiter, 4)
    slots.pop().dropped()
    for slot in slots:
        slot.release()
    assert limiter.limit == 2
    succeed(limiter, 1, 8)
    assert limiter.limit == 2
    succeed(limiter, 1, 8)
    assert limiter.limit == 3


def test_it_rises_to_the_cap_and_no_further(limiter):
    taught(limiter, 5, 6)
    succeed(limiter, 1000, 6)
    assert limiter.limit == 6


def test_other_ends_neither_raise_nor_halve(limiter):
    taught(limiter, 5, 20)
    for _ in range(1000):
        for slot in acquire_all(limiter, 5):
            slot.release()
    assert limiter.limit == 5


def test_what_was_sent_before_the_refusal_does_not_raise(limiter):
    slots = acquire_all(limiter, 8)
    for slot in slots[5:]:
        slot.dropped()
    for slot in slots[:5]:
        slot.done()
    assert limiter.limit == 4
    succeed(limiter, 3, 8)
    assert limiter.limit == 4


def test_successes_with_slots_left_over_do_not_raise(limiter):
    taught(limiter, 5, 20)
    for _ in range(1000):
        for slot in acquire_all(limiter, 4, cap=20):
            slot.done()
    assert limiter.limit == 5


@pytest.mark.parametrize("first", [Slot.done, Slot.release, Slot.dropped])
@pytest.mark.parametrize("second", [Slot.done, Slot.release, Slot.dropped])
def test_the_first_end_of_a_slot_counts(first, second):
    def seen_after(*ends: Callable[[Slot], object]) -> list[object]:
        limiter = Limiter()
        slots = acquire_all(limiter, 8)
        slots[7].dropped()
        for slot in slots[:5]:
            slot.release()
        slot = acquire(limiter, 8)
        for end in ends:
            end(slot)
        seen = [limiter.in_flight, limiter.limit]
        for other in slots:
            other.release()
        return [*seen, *(successes_to_rise(limiter) for _ in range(3))]

    assert seen_after(first, second, second) == seen_after(first) != seen_after()


def successes_to_rise(limiter: Limiter) -> int:
    """How many successes raise the limit by one."""
    before = limiter.limit
    for count in range(1, 200):
        succeed(limiter, 1, 8)
        if limiter.limit > before:
            return count
    return 0


# Nobody leaves a hole.


async def test_a_cancelled_waiter_leaves_the_queue(limiter):
    slot = acquire(limiter, 1)
    first, second = asyncio.create_task(limiter.aacquire(1)), asyncio.create_task(limiter.aacquire(1))
    await loop_iterations()
    first.cancel()
    await loop_iterations()
    assert limiter.waiting == 1
    slot.done()
    assert (await second).ticket == 3
    assert (limiter.in_flight, limiter.waiting) == (1, 0)


async def test_a_slot_granted_to_a_waiter_that_is_cancelled_at_the_same_moment_goes_to_the_next(limiter):
    for iterations in range(5):
        slot = acquire(limiter, 1)
        first, second = asyncio.create_task(limiter.aacquire(1)), asyncio.create_task(limiter.aacquire(1))
        await loop_iterations()
        slot.done()
        assert limiter.in_flight == 1
        for _ in range(iterations):
            await asyncio.sleep(0)
        first.cancel()
        with suppress(asyncio.CancelledError):
            (await first).release()
        (await asyncio.wait_for(second, PATIENCE)).release()
        assert (limiter.in_flight, limiter.waiting) == (0, 0)


@pytest.mark.parametrize("how", ["thread", "task"])
async def test_a_waiter_whose_deadline_passes_leaves_the_queue(limiter, how):
    acquire_one = limiter.aacquire if how == "task" else lambda *a, **k: asyncio.to_thread(limiter.acquire, *a, **k)
    slot = acquire(limiter, 1)
    waiting = asyncio.create_task(limiter.aacquire(1))
    await loop_iterations()
    assert await acquire_one(1, deadline=Deadline(0.01)) is None
    assert limiter.waiting == 1
    slot.done()
    assert await waiting
    assert limiter.waiting == 0


@pytest.mark.parametrize("how", ["thread", "task"])
async def test_a_deadline_that_has_not_started_does_not_pass_in_the_queue(limiter, how):
    class Unstarted(Deadline):
        """Asked for the third time, the slot is free."""

        asked = 0

        def remaining(self) -> float | None:
            self.asked += 1
            if self.asked == 3:
                slot.done()
            return 0.001

        @property
        def passed(self) -> bool:
            return False

    acquire_one = limiter.aacquire if how == "task" else lambda *a, **k: asyncio.to_thread(limiter.acquire, *a, **k)
    slot = acquire(limiter, 1)
    assert await asyncio.wait_for(acquire_one(1, deadline=Unstarted(0.001)), PATIENCE)


async def test_a_slot_granted_as_the_deadline_passes_goes_to_the_next_or_is_had(limiter):
    for _ in range(200):
        slot = acquire(limiter, 1)
        first = asyncio.create_task(limiter.aacquire(1, deadline=Deadline(0.0005)))
        second = asyncio.create_task(limiter.aacquire(1))
        await asyncio.sleep(0.0005)
        slot.done()
        had = await first
        if had:
            assert not second.done()
            had.done()
        (await asyncio.wait_for(second, PATIENCE)).done()
        assert (limiter.in_flight, limiter.waiting) == (0, 0)


def test_a_stopped_thread_leaves_the_queue(limiter):
    slot, cancelled = acquire(limiter, 1), threading.Event()
    first = Waiting(limiter, cancelled=cancelled)
    second = Waiting(limiter, cancelled=threading.Event())
    cancelled.set()
    assert first.end() is None
    assert limiter.waiting == 1
    slot.done()
    assert second.end()


def test_what_is_granted_to_a_thread_that_is_stopped_at_the_same_moment_goes_to_the_next(limiter):
    class Stopping(threading.Event):
        """Set from the second look on; at that moment the slot is granted."""

        looks = 0

        def is_set(self) -> bool:
            self.looks += 1
            if self.looks == 2:
                slot.done()
            return self.looks > 1

    slot = acquire(limiter, 1)
    first = Waiting(limiter, cancelled=Stopping())
    second = Waiting(limiter) if first.thread.is_alive() else None
    assert first.end() is None
    if second:
        assert second.end()
        assert (limiter.in_flight, limiter.waiting) == (1, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to a thread")
def test_an_interrupt_of_a_waiting_thread_leaves_no_hole(limiter):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    main, slot = threading.get_ident(), acquire(limiter, 1)

    def send() -> None:
        until(lambda: limiter.waiting)
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    sender = threading.Thread(target=send)
    try:
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            limiter.acquire(1)
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)
    assert limiter.waiting == 0
    slot.done()
    assert not full(limiter, 1)


def test_a_waiter_of_a_closed_loop_is_skipped(limiter):
    slot, loop = acquire(limiter, 1), asyncio.new_event_loop()
    lost = loop.create_task(limiter.aacquire(1))
    lost._log_destroy_pending = False
    loop.run_until_complete(loop_iterations())
    loop.close()
    waiting = Waiting(limiter)
    assert limiter.waiting == 2
    slot.done()
    assert waiting.end()
    assert (limiter.in_flight, limiter.waiting) == (1, 0)


def test_a_slot_granted_in_a_loop_that_never_runs_again_goes_to_the_next(limiter):
    slot, loop = acquire(limiter, 1), asyncio.new_event_loop()
    lost = loop.create_task(limiter.aacquire(1))
    lost._log_destroy_pending = False
    loop.run_until_complete(loop_iterations())
    waiting = Waiting(limiter)
    slot.done()  # granted to the loop, which does not run
    loop.close()
    del lost, loop
    gc.collect()
    assert waiting.end()
    assert limiter.in_flight == 1


def test_a_slot_that_is_dropped_leaves(limiter):
    slot = acquire(limiter, 1)
    waiting = Waiting(limiter)
    del slot
    assert waiting.end()


@pytest.fixture
def _collected_often():
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()  # what is here already need not be looked at again and again
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def forget(*slots: Slot) -> None:
    """Leave slots to the garbage collector."""
    cycle: list[Any] = [*slots]
    cycle.append(cycle)


@pytest.mark.usefixtures("_collected_often")
@pytest.mark.parametrize("cap", [1, 2])
def test_a_slot_that_the_garbage_collector_ends_at_any_moment_of_a_call_is_free_for_it(cap):
    for objects in range(1, 16):
        limiter = Limiter()
        gc.collect()
        forget(acquire(limiter, cap))
        at_last = threading.Timer(0.05, gc.collect)
        at_last.start()
        gc.set_threshold(objects)  # the collector runs earlier or later within the call
        slot = limiter.acquire(cap, deadline=Deadline(PATIENCE))
        at_last.cancel()
        at_last.join()
        gc.set_threshold(1000)
        gc.collect()
        assert slot is not None
        assert limiter.in_flight == 1


@pytest.mark.usefixtures("_collected_often")
def test_a_slot_that_the_garbage_collector_ends_while_another_is_refused_is_free_after_it():
    for objects in range(1, 16):
        limiter = Limiter()
        gc.collect()
        refused = acquire(limiter, 2)
        forget(acquire(limiter, 2))
        gc.set_threshold(objects)
        refused.dropped()
        gc.set_threshold(1000)
        gc.collect()
        assert limiter.in_flight == 0
        assert not full(limiter, 2)


def test_a_slot_that_ends_while_a_call_joins_the_queue_is_not_lost(limiter):
    for _ in range(300):
        slot = acquire(limiter, 1)
        thread = threading.Thread(target=slot.done)
        thread.start()
        after = limiter.acquire(1, deadline=Deadline(PATIENCE))
        thread.join()
        assert after is not None
        after.done()


# Threads, loops, processes, and many of them.


def test_threads_and_loops_at_once_never_exceed_the_cap_and_all_get_through(limiter):
    lock, running, most, through = threading.Lock(), 0, 0, []

    def enter() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)

    def leave(slot: Slot) -> None:
        nonlocal running
        with lock:
            running -= 1
            through.append(slot)
        slot.done()

    def in_threads() -> None:
        for _ in range(200):
            slot = limiter.acquire(3)
            enter()
            time.sleep(0)
            leave(slot)

    async def call(number: int) -> None:
        slot = await limiter.aacquire(3)
        enter()
        await asyncio.sleep(0)
        leave(slot)

    async def in_tasks() -> None:
        await asyncio.gather(*(call(number) for number in range(200)))

    def in_a_loop() -> None:
        asyncio.run(in_tasks())

    with ThreadPoolExecutor(7) as pool:
        for item in [pool.submit(work) for work in [in_threads] * 4 + [in_a_loop] * 3]:
            item.result(PATIENCE)
    assert most == 3
    assert len(through) == 1400
    assert (limiter.in_flight, limiter.waiting) == (0, 0)


FORK = f"""
import asyncio, json, os, threading
from langchain_cogview.api.limiter import limiter_for
account = ({URL!r}, "cogview-4", "key")
limiter = limiter_for(*account)
slots = [limiter.acquire(8) for _ in range(8)]
slots[7].dropped()
threading.Thread(target=limiter.acquire, args=(8,), daemon=True).start()
loop = asyncio.new_event_loop()
waiting = loop.create_task(limiter.aacquire(8))
loop.run_until_complete(asyncio.sleep(0))
while limiter.waiting < 2:
    pass
stop = threading.Event()
def use():
    while not stop.is_set():
        limiter.reclaim()
        limiter_for(*account)
        slots[6].end_after(None)
threads = [threading.Thread(target=use) for _ in range(2)]
for thread in threads:
    thread.start()
children = []
for number in range(10):  # at whatever moment of the other threads' work
    end, begin = os.pipe()
    child = os.fork()
    if child == 0:
        fresh = limiter_for(*account)
        slots[0].done(), slots[1].release(), slots[2].dropped()
        waiting.cancel()
        loop.run_until_complete(asyncio.wait([waiting]))
        state = [fresh.in_flight, fresh.waiting, fresh.limit == float("inf")]
        slots = [fresh.acquire(8, ticket=slots[0].ticket) for _ in range(8)]
        os.write(begin, json.dumps([*state, fresh.in_flight]).encode())
        os._exit(0)
    os.close(begin)
    children.append(json.loads(os.read(end, 1000)))
    os.waitpid(child, 0)
stop.set()
for thread in threads:
    thread.join()
parent = [limiter.in_flight, limiter.waiting, limiter.limit]
waiting.cancel()
loop.run_until_complete(asyncio.wait([waiting]))
print(json.dumps({{"children": children, "parent": parent}}))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_a_forked_child_starts_afresh_even_if_the_limiter_was_locked():
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"children": [[0, 0, True, 8]] * 10, "parent": [7, 2, 4]}


def test_ten_thousand_waiters_cost_each_as_much_as_a_thousand(monkeypatch):
    """Counted in executed lines of the two modules, which do not depend on the machine."""
    monkeypatch.setattr(waiters_module, "_LOOK_SECONDS", 3600.0)  # on a slow machine they would look meanwhile

    def lines(run: Coroutine[Any, Any, None]) -> int:
        executed = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal executed
            if frame.f_code.co_filename not in {limiter_module.__file__, waiters_module.__file__}:
                return None
            executed += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            asyncio.run(run)
        finally:
            sys.settrace(before)
        return executed

    async def queue(count: int) -> None:
        limiter = Limiter()

        async def call() -> None:
            (await limiter.aacquire(5)).done()

        slots = acquire_all(limiter, 5)
        tasks = [asyncio.create_task(call()) for _ in range(count)]
        await loop_iterations()
        assert limiter.waiting == count
        for task in tasks[::2]:
            task.cancel()
        for slot in slots:
            slot.done()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (limiter.in_flight, limiter.waiting) == (0, 0)

    few, many = lines(queue(1_000)) / 1_000, lines(queue(10_000)) / 10_000
    assert many < 1.5 * few  # ten times as much, if each looked at all


async def test_waiters_that_come_and_go_behind_another_do_not_pile_up(limiter):
    async def come_and_go(count: int) -> int:
        for _ in range(count):
            assert await limiter.aacquire(1, deadline=Deadline(0.0)) is None
            await asyncio.sleep(0)  # asyncio forgets its cancelled timers
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    first = acquire(limiter, 1)
    head = asyncio.create_task(limiter.aacquire(1))
    await loop_iterations()
    tracemalloc.start()
    try:
        before = await come_and_go(300)
        assert await come_and_go(1500) - before < 100_000  # some sixty waiters
    finally:
        tracemalloc.stop()
    assert limiter.waiting == 1
    first.done()
    assert await head


# One for each account, model and host.


def test_one_account_model_and_host_have_one_limiter():
    limiter = limiter_for(URL, "cogview-4", "key")
    for same in (URL + "/", "https://OPEN.bigmodel.cn", "https://open.bigmodel.cn:443/other/path"):
        assert limiter_for(same, "CogView-4", "key") is limiter
    assert limiter_for("sandbox:a", "cogview-4", "key") is limiter_for("sandbox:a", "cogview-4", "key")


def test_another_account_model_host_or_port_has_another_limiter():
    limiters = {
        limiter_for(URL, "cogview-4", "key"),
        limiter_for(URL, "cogview-4", "another"),
        limiter_for(URL, "glm-image", "key"),
        limiter_for("https://api.z.ai/api/paas/v4", "cogview-4", "key"),
        limiter_for("http://127.0.0.1:8001", "cogview-4", "key"),
        limiter_for("http://127.0.0.1:8002", "cogview-4", "key"),
        limiter_for("sandbox:a", "cogview-4", "key"),
        limiter_for("sandbox:b", "cogview-4", "key"),
    }
    assert len(limiters) == 8


def test_a_key_is_not_kept():
    key = f"a key {len(URL)}"
    before = sys.getrefcount(key)
    limiter = limiter_for(URL, "cogview-4", key)
    assert sys.getrefcount(key) == before
    assert key not in repr(limiter)


def test_many_accounts_are_forgotten_but_not_those_in_use():
    held = limiter_for(URL, "cogview-4", "held")
    busy = limiter_for(URL, "cogview-4", "busy").acquire(5)
    unused = weakref.ref(limiter_for(URL, "cogview-4", "unused"))
    last = [weakref.ref(limiter_for(URL, "cogview-4", str(number))) for number in range(2 * MAX_LIMITERS)]
    assert unused() is None
    assert [item() is not None for item in last] == [False] * MAX_LIMITERS + [True] * MAX_LIMITERS
    assert limiter_for(URL, "cogview-4", "held") is held
    assert limiter_for(URL, "cogview-4", "busy").in_flight == 1
    busy.release()


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
        self.limiter = Limiter()

    def run(self, cap: int, calls: int = 200) -> Account:
        self.refusals = [0] * calls
        simulated(self._all(cap, calls))
        assert (self.limiter.in_flight, self.limiter.waiting) == (0, 0)
        return self

    async def _all(self, cap: int, calls: int) -> None:
        await asyncio.gather(*(self._call(number, cap) for number in range(calls)))
        self.seconds = asyncio.get_running_loop().time()

    async def _call(self, number: int, cap: int) -> None:
        ticket = None
        while True:
            slot = await self.limiter.aacquire(cap, ticket=ticket)
            ticket = slot.ticket
            accepted = self.busy < self.accepts
            self.answers.append(accepted)
            if accepted:
                self.busy += 1
                seconds = self.took()
                self.work += seconds
                await asyncio.sleep(seconds)
                self.busy -= 1
                slot.done()
                return
            if self.refusal:
                await asyncio.sleep(self.refusal)
            self.refusals[number] += 1
            if not slot.dropped():
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
def test_it_holds_where_images_take_differently_long(cap, seed):
    chance = random.Random(seed)
    account = Account(refusal=0.05, took=lambda: chance.uniform(0.5, 1.5)).run(cap)
    assert max(account.refusals) <= 2
    # At the end there are not enough calls left to fill all slots.
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


class Limiters(RuleBasedStateMachine):
    """A limiter with threads and tasks, against a plain table of who waits and who is in flight.

    A call has one number, by its first arrival; refused and back again, it has the same.
    """

    @initialize()
    def begin(self) -> None:
        self.limiter = Limiter(check_seconds=0.005)
        self.loop = asyncio.new_event_loop()
        self.granted: SimpleQueue[tuple[int, Slot]] = SimpleQueue()
        self.flying: dict[int, Slot] = {}
        self.queue: dict[int, tuple[int, asyncio.Task[None] | tuple[threading.Thread, threading.Event]]] = {}
        self.calls = 0
        self.caps: dict[int, int] = {}

    def teardown(self) -> None:
        while self.flying:
            self.flying.popitem()[1].release()
            self._look_who_was_granted()
        assert not self.queue
        assert (self.limiter.in_flight, self.limiter.waiting) == (0, 0)
        self.loop.close()

    # Who comes.

    def _arrive(self, number: int, cap: int, threaded: bool, ticket: int | None = None) -> None:
        self.caps[number] = cap
        if threaded:
            cancelled = threading.Event()
            known = self.limiter.in_flight + self.limiter.waiting

            def wait() -> None:
                slot = self.limiter.acquire(cap, cancelled=cancelled, ticket=ticket)
                if slot is not None:
                    self.granted.put((number, slot))

            thread = threading.Thread(target=wait, daemon=True)
            thread.start()
            until(lambda: self.limiter.in_flight + self.limiter.waiting > known)
            self.queue[number] = cap, (thread, cancelled)
        else:

            async def wait_here() -> None:
                self.granted.put((number, await self.limiter.aacquire(cap, ticket=ticket)))

            self.queue[number] = cap, self.loop.create_task(wait_here())
            self._run_loop()

    @rule(caps=st.lists(st.integers(1, 8), min_size=1, max_size=5), threaded=st.booleans())
    def arrive(self, caps: list[int], threaded: bool) -> None:
        for cap in caps:
            self.calls += 1
            self._arrive(self.calls, cap, threaded)
        self._look_who_was_granted()

    # Who ends.

    def _landed(self, data: st.DataObject) -> tuple[int, Slot]:
        number = data.draw(st.sampled_from(sorted(self.flying)))
        return number, self.flying.pop(number)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), end=st.sampled_from([Slot.done, Slot.release]), count=st.integers(1, 8))
    def end(self, data: st.DataObject, end: Callable[[Slot], None], count: int) -> None:
        for _ in range(min(count, len(self.flying))):
            end(self._landed(data)[1])
            self._look_who_was_granted()

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def be_dropped(self, data: st.DataObject) -> None:
        self._landed(data)  # nobody refers to it any more
        self._look_who_was_granted()

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), again=st.booleans(), threaded=st.booleans())
    def be_refused(self, data: st.DataObject, again: bool, threaded: bool) -> None:
        number, slot = self._landed(data)
        limit = self.limiter.limit
        assert slot.dropped() == bool(self.flying)
        assert 1 <= self.limiter.limit <= min(limit, max(1, len(self.flying)))
        self._look_who_was_granted()
        if again:
            self._arrive(number, self.caps[number], threaded, slot.ticket)
            self._look_who_was_granted()

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def end_again_and_again(self, data: st.DataObject) -> None:
        _, slot = self._landed(data)
        slot.release()
        self._look_who_was_granted()
        limit = self.limiter.limit
        slot.done()
        slot.dropped()
        slot.release()
        assert self.limiter.limit == limit

    # Who gives up.

    def _give_up(self, number: int) -> None:
        _, waiting = self.queue.pop(number)
        if isinstance(waiting, asyncio.Task):
            waiting.cancel()
            self._run_loop()
        else:
            thread, cancelled = waiting
            cancelled.set()
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
            self._landed(data)[1].release()
            self._give_up(first)
            self._look_who_was_granted()

    # What follows.

    def _run_loop(self) -> None:
        self.loop.run_until_complete(loop_iterations())

    def _look_who_was_granted(self) -> None:
        self._run_loop()
        count = self.limiter.in_flight - len(self.flying)
        assert count >= 0
        fresh = sorted(self.granted.get(timeout=PATIENCE) for _ in range(count))
        assert self.granted.empty()
        for number, slot in fresh:
            cap, _ = self.queue.pop(number)
            # At that moment below the limit and its own cap.
            assert len(self.flying) < min(self.limiter.limit, cap)
            self.flying[number] = slot
        assert not fresh or not self.queue or fresh[-1][0] < min(self.queue)

    @invariant()
    def the_counts_are_right(self) -> None:
        assert (self.limiter.in_flight, self.limiter.waiting) == (len(self.flying), len(self.queue))

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        if self.queue:
            assert self.flying
            cap, _ = self.queue[min(self.queue)]
            assert len(self.flying) >= min(cap, self.limiter.limit)


_common = settings(deadline=None, database=None, stateful_step_count=40, suppress_health_check=list(HealthCheck))


class TestAnythingInAnyOrder(Limiters.TestCase):
    settings = settings(_common, max_examples=50)


@pytest.mark.heavy
class TestAnythingInAnyOrderForLong(Limiters.TestCase):
    settings = settings(_common, max_examples=1000)


# Priorities.


async def test_interactive_calls_go_before_those_of_batches(limiter):
    busy = acquire(limiter, 1)
    order: list[str] = []

    async def call(name: str, priority: str) -> None:
        slot = await limiter.aacquire(1, priority=priority)
        order.append(name)
        slot.done()

    tasks = []
    for name in ("batch 1", "batch 2", "interactive 1", "batch 3", "interactive 2"):
        tasks.append(asyncio.create_task(call(name, name.split()[0])))
        await loop_iterations()
    busy.done()
    await asyncio.gather(*tasks)
    assert order == ["interactive 1", "interactive 2", "batch 1", "batch 2", "batch 3"]


def test_an_interactive_call_does_not_wait_behind_a_batch_call_whose_own_cap_is_reached(limiter):
    busy = acquire(limiter, 5)
    stop = threading.Event()
    waiting = threading.Thread(target=limiter.acquire, args=(1,), kwargs={"priority": "batch", "cancelled": stop})
    waiting.start()
    until(lambda: limiter.waiting)
    acquire(limiter, 5).done()
    stop.set()
    waiting.join(PATIENCE)
    busy.done()
