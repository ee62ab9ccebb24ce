"""Work side by side: in order, bounded, and never waited for in vain."""

import threading

import pytest

from langchain_cogview.worker_pool import in_threads


def test_results_come_in_the_order_of_the_tasks_and_no_more_run_than_there_are_places():
    running, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(3, timeout=10)

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
