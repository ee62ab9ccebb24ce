"""One at a time for each key, first come first served, whoever leaves in whatever way."""

import asyncio
import os
import threading
import time
from contextlib import ExitStack

import pytest

from langchain_cogview.concurrency import SingleFlight

LONG = 30


class Waiter(threading.Thread):
    """A thread that takes a turn and keeps it until it is let go."""

    def __init__(self, flights, key="key", seconds=LONG):
        super().__init__(daemon=True)
        self.flights, self.key, self.seconds = flights, key, seconds
        self.has, self.let_go = threading.Event(), threading.Event()

    def run(self):
        with self.flights.flight(self.key, self.seconds):
            self.has.set()
            self.let_go.wait(LONG)

    def in_line(self, number):
        """Start, and wait until `number` are in the queue."""
        self.start()
        while len(self.flights._queues.get(self.key, ())) < number:
            os.sched_yield()
        return self

    def leave(self):
        self.let_go.set()
        self.join(LONG)


def test_threads_take_turns_in_the_order_of_coming():
    flights = SingleFlight()
    waiters = [Waiter(flights).in_line(number) for number in (1, 2, 3)]
    for number, waiter in enumerate(waiters):
        assert waiter.has.wait(LONG)
        assert [each.has.is_set() for each in waiters[number + 1 :]] == [False] * (2 - number)
        waiter.leave()
    assert flights._queues == {}


def test_another_key_does_not_wait():
    flights = SingleFlight()
    with flights.flight("one", LONG), flights.flight("another", LONG):
        assert len(flights._queues) == 2
    assert flights._queues == {}


async def test_tasks_wait_for_threads_without_stopping_the_loop_and_threads_for_tasks():
    flights = SingleFlight()
    thread = Waiter(flights).in_line(1)
    has = asyncio.Event()

    async def task():
        async with flights.aflight("key", LONG):
            has.set()
            await let_go.wait()

    let_go = asyncio.Event()
    waiting = asyncio.create_task(task())
    await asyncio.sleep(0)
    after = Waiter(flights).in_line(3)
    assert not has.is_set()
    await asyncio.to_thread(thread.leave)
    await has.wait()
    assert not after.has.is_set()
    let_go.set()
    await waiting
    assert await asyncio.to_thread(after.has.wait, LONG)
    await asyncio.to_thread(after.leave)
    assert flights._queues == {}


async def test_a_cancelled_waiter_leaves_no_hole():
    flights = SingleFlight()

    async def task():
        async with flights.aflight("key", LONG):
            return "had it"

    async with flights.aflight("key", LONG):
        first, second = asyncio.create_task(task()), asyncio.create_task(task())
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
    assert await second == "had it"
    assert flights._queues == {}


async def test_a_task_cancelled_at_the_very_moment_of_its_turn_hands_it_on():
    flights = SingleFlight()

    async def task():
        async with flights.aflight("key", LONG):
            return "had it"

    async with flights.aflight("key", LONG):
        first, second = asyncio.create_task(task()), asyncio.create_task(task())
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second == "had it"


def test_what_is_raised_in_a_turn_ends_it():
    flights = SingleFlight()
    with pytest.raises(KeyError), flights.flight("key", LONG):
        raise KeyError
    with flights.flight("key", LONG):
        pass
    assert flights._queues == {}


@pytest.mark.parametrize("how", ["sync", "async"])
def test_after_its_time_a_waiter_goes_on_without_the_turn(how):
    flights = SingleFlight()
    first = Waiter(flights).in_line(1)
    assert first.has.wait(LONG)

    async def atimed_out():
        async with flights.aflight("key", 0.01):
            return True

    if how == "sync":
        with flights.flight("key", 0.01):
            pass
    else:
        assert asyncio.run(atimed_out())
    first.leave()
    assert flights._queues == {}


async def test_a_sync_call_inside_an_event_loop_does_not_wait_for_a_task_of_that_loop():
    flights, start = SingleFlight(), time.monotonic()
    async with flights.aflight("key", LONG):
        with flights.flight("key", LONG):  # would stop the loop, and with it the task that has the turn
            assert time.monotonic() - start < LONG
    assert flights._queues == {}


def test_a_loop_that_was_left_behind_gives_its_turn_back():
    flights = SingleFlight()
    stay = []

    async def task():
        async with flights.aflight("key", LONG):
            stay.append(True)
            await asyncio.Event().wait()

    loop = asyncio.new_event_loop()
    running = loop.create_task(task())
    loop.run_until_complete(asyncio.sleep(0))
    assert stay
    running.cancel()
    loop.run_until_complete(asyncio.gather(running, return_exceptions=True))
    loop.close()
    with flights.flight("key", None):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_turns_of_its_parent():
    from langchain_cogview.concurrency import SINGLE_FLIGHT

    with ExitStack() as had:
        had.enter_context(SINGLE_FLIGHT.flight("forked", LONG))
        process = os.fork()
        if process == 0:
            code = 1
            try:
                with SINGLE_FLIGHT.flight("forked", LONG):
                    code = 0 if len(SINGLE_FLIGHT._queues["forked"]) == 1 else 2
                had.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
