"""Workers of a pool: results in order, bounded, with errors as values, on event loops of every kind."""

import asyncio
import sys
import threading

import pytest

from langchain_cogview import CogViewImageGenerator, arun_job
from langchain_cogview.pools import astream_tasks, in_threads


def test_results_come_in_the_order_of_the_tasks_and_no_more_run_than_there_are_places():
    running, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(3, timeout=60)

    def task(number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait()
        with lock:
            running -= 1
        return number

    assert in_threads([lambda n=n: task(n) for n in range(9)], 3) == list(range(9))
    assert most == 3


def test_an_error_is_a_result_and_the_others_go_on():
    results = in_threads([lambda: 1 / 0, lambda: 2], 2)
    assert isinstance(results[0], ZeroDivisionError)
    assert results[1] == 2


def test_what_ends_a_thread_ends_the_wait_too():
    def leave():
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        in_threads([leave, lambda: 2], 2)


# --- an event loop whose tasks start at once (`asyncio.eager_task_factory`)

LONG = 60

eager = pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")


def run_eagerly(work):
    async def bounded():
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        return await asyncio.wait_for(work, LONG)

    return asyncio.run(bounded())


@eager
@pytest.mark.parametrize("download", [False, True])
def test_a_batch_ends_with_every_result(sandbox, download):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, download=download, max_concurrency=3)
    prompts = [f"prompt {number}" for number in range(12)]
    assert [result.prompt for result in run_eagerly(generator.abatch(prompts))] == prompts
    assert sandbox.images_made == 12


@eager
def test_a_stream_over_hundreds_of_slots_ends_with_every_result(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, download=False, max_concurrency=800)

    async def numbers():
        return sorted([number async for number, _ in generator.astream_many(f"{n}" for n in range(1000))])

    assert run_eagerly(numbers()) == [*range(1000)]
    assert sandbox.images_made == 1000


@eager
def test_a_job_ends_with_every_image(sandbox, tmp_path):
    report = run_eagerly(
        arun_job([f"prompt {n}" for n in range(6)], tmp_path, base_url=sandbox.base_url, max_concurrency=2)
    )
    assert report.images == 6


@eager
@pytest.mark.parametrize("slots", [1, 3, 2000])
def test_work_that_never_waits_neither_hangs_nor_recurses(slots):
    async def at_once(number):
        return number

    async def all_of():
        tasks = ((lambda number=number: at_once(number)) for number in range(5000))
        return [result async for _, result in astream_tasks(tasks, slots)]

    assert sorted(run_eagerly(all_of())) == [*range(5000)]


@eager
def test_what_an_input_raises_is_raised_after_the_inputs_before_it():
    async def at_once(number):
        return number

    def tasks():
        for number in range(3):
            yield lambda number=number: at_once(number)
        raise KeyError("the inputs")

    async def all_of(found):
        async for _, result in astream_tasks(tasks(), 2):
            found.append(result)

    found = []
    with pytest.raises(KeyError, match="the inputs"):
        run_eagerly(all_of(found))
    assert sorted(found) == [0, 1, 2]


def test_an_interrupt_says_that_requests_in_flight_may_have_been_charged():
    leave = threading.Event()

    def interrupted():
        raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            in_threads([leave.wait, interrupted], 2)
    finally:
        leave.set()
    assert "may have been charged" in raised.value.__notes__[0]
