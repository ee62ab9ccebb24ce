"""Sync work side by side, in threads that nobody has to wait for."""

from __future__ import annotations

import queue
import threading
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from langchain_cogview.api.client import NEVER, STOPPED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def in_threads(tasks: Sequence[Callable[[], Any]], places: int) -> list[Any]:
    """What each task gives, `places` at a time, in daemon threads: Ctrl-C waits for nobody, and nothing more is sent."""
    if len(tasks) == 1:
        return [tasks[0]()]
    stopped = threading.Event() if STOPPED.get() is NEVER else STOPPED.get()
    token = STOPPED.set(stopped)
    contexts = [copy_context() for _ in tasks]
    STOPPED.reset(token)
    todo = iter(range(len(tasks)))
    results: list[Any] = [None] * len(tasks)
    done: queue.SimpleQueue[None] = queue.SimpleQueue()

    def work() -> None:
        for number in todo:  # a range gives each number to one thread only
            try:
                if not stopped.is_set():
                    results[number] = contexts[number].run(or_error, tasks[number])
            except BaseException as error:  # noqa: BLE001  raised by the caller's thread, which must not wait for ever
                results[number] = error
            done.put(None)

    for _ in range(min(places, len(tasks))):
        threading.Thread(target=work, daemon=True, name="cogview").start()
    try:
        for _ in tasks:
            done.get()
    except BaseException:
        stopped.set()
        raise
    return _without_exits(results)


def _without_exits(results: list[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Exception):
            raise result
    return results


def or_error(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call gives, or the exception that it raises."""
    try:
        return call(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  recorded, so that the others go on
        return error
