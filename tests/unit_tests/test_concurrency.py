"""Work in threads: it never stops the event loop, waits for nobody else's threads, and leaves no warning behind."""

import asyncio
import contextlib
import gc
import os
import threading
from contextvars import ContextVar

import pytest

from langchain_cogview import concurrency
from langchain_cogview.concurrency import entered_in_thread, in_thread

LONG = 30
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
        raise KeyError  # nobody is told

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
    """A context manager that tells what happens to it, and can be held while it is entered."""

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
