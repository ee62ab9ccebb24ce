"""Threads for event loops, and single-flight: nobody waits in vain, and nothing is left behind."""

import asyncio
import contextlib
import gc
import os
import threading
from contextlib import ExitStack
from contextvars import ContextVar

import pytest

from langchain_cogview import concurrency
from langchain_cogview.concurrency import SingleFlight, entered_in_thread, in_thread

LONG = 100
NAME: ContextVar[str] = ContextVar("name", default="nobody")


async def test_a_function_runs_in_a_thread_with_the_context_of_its_caller():
    NAME.set("caller")
    assert await in_thread(lambda: (NAME.get(), threading.current_thread() is threading.main_thread())) == (
        "caller",
        False,
    )


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3), StopIteration()])
async def test_what_the_function_raises_is_raised_to_the_caller(error):
    def raises():
        raise error

    with pytest.raises(RuntimeError if isinstance(error, StopIteration) else type(error)):
        await in_thread(raises)


async def test_threads_of_the_application_are_not_waited_for():
    let_go = threading.Event()
    loop = asyncio.get_running_loop()
    blocked = [loop.run_in_executor(None, let_go.wait, LONG) for _ in range(100)]  # more than the default executor has
    try:
        assert await asyncio.wait_for(in_thread(lambda: "done"), LONG) == "done"
    finally:
        let_go.set()
        await asyncio.gather(*blocked)


async def test_a_cancelled_caller_stops_waiting_and_the_function_ends():
    started, let_go, ended = threading.Event(), threading.Event(), threading.Event()

    def blocks():
        started.set()
        let_go.wait(LONG)
        ended.set()
        raise KeyError  # nobody is notified

    task = asyncio.create_task(in_thread(blocks))
    while not started.is_set():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    let_go.set()
    assert await in_thread(ended.wait, LONG)


def test_a_loop_that_is_closed_meanwhile_leaves_no_error_in_the_log(caplog):
    let_go, ended = threading.Event(), threading.Event()

    def blocks():
        let_go.wait(LONG)
        ended.set()

    loop = asyncio.new_event_loop()
    work = in_thread(blocks)
    task = loop.create_task(work)
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    let_go.set()
    assert ended.wait(LONG)
    assert asyncio.run(in_thread(lambda: 1)) == 1
    task._log_destroy_pending = False  # it is abandoned on purpose
    work.close()
    del task, work
    gc.collect()
    assert caplog.records == []


def test_where_no_thread_can_be_started_the_function_runs_once_all_the_same(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    calls = []
    monkeypatch.setattr(concurrency, "_pool", concurrency._new_pool())
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        asyncio.run(in_thread(calls.append, 1))
    asyncio.run(in_thread(calls.append, 2))
    assert calls == [1, 2]


class Blocking:
    """A context manager that records what happens to it, and can be held while it is entered."""

    def __init__(self):
        self.enters, self.go, self.seen = threading.Event(), threading.Event(), []

    def __enter__(self):
        self.enters.set()
        self.go.wait(LONG)
        self.seen.append(threading.current_thread() is threading.main_thread())
        return "entered"

    def __exit__(self, kind, *rest):
        self.seen.append(kind)


@pytest.mark.parametrize("error", [None, KeyError, asyncio.CancelledError])
async def test_a_context_manager_is_entered_and_left_in_threads(error):
    context = Blocking()
    context.go.set()
    with contextlib.suppress(KeyError, asyncio.CancelledError):
        async with entered_in_thread(context) as entered:
            assert entered == "entered"
            if error:
                raise error
    assert context.seen == [False, error]


async def test_a_context_manager_is_left_when_its_caller_is_cancelled_on_entering():
    context = Blocking()

    async def enters():
        async with entered_in_thread(context):
            raise AssertionError("it was cancelled")

    task = asyncio.create_task(enters())
    await in_thread(context.enters.wait, LONG)
    task.cancel()
    context.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert context.seen == [False, None]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    assert asyncio.run(in_thread(lambda: 1)) == 1
    process = os.fork()
    if process == 0:
        code = 1
        try:
            code = 0 if asyncio.run(asyncio.wait_for(in_thread(lambda: 2), LONG)) == 2 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


# --- single-flight


class Waiter(threading.Thread):
    """A thread that enters a flight and stays in it until it is let go."""

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


def test_threads_with_one_key_run_one_after_another_in_the_order_of_coming():
    flights = SingleFlight()
    waiters = [Waiter(flights).in_line(number) for number in (1, 2, 3)]
    for number, waiter in enumerate(waiters):
        assert waiter.has.wait(LONG)
        assert [item.has.is_set() for item in waiters[number + 1 :]] == [False] * (2 - number)
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


async def test_a_task_cancelled_at_the_moment_it_may_begin_lets_the_next_begin():
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


def test_what_is_raised_in_a_flight_ends_it():
    flights = SingleFlight()
    with pytest.raises(KeyError), flights.flight("key", LONG):
        raise KeyError
    with flights.flight("key", LONG):
        pass
    assert flights._queues == {}


@pytest.mark.parametrize("how", ["sync", "async"])
def test_after_its_time_limit_a_waiter_begins_anyway(how):
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
    flights = SingleFlight()
    async with flights.aflight("key", LONG):
        with flights.flight("key", None):  # waiting would block the event loop, and with it the task that is first
            pass
    assert flights._queues == {}


def test_a_loop_that_was_left_behind_does_not_keep_others_waiting():
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
def test_a_forked_process_does_not_wait_for_flights_of_its_parent():
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
