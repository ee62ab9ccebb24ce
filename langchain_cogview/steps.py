"""One body for a sync and an async twin: a generator that yields what is to be done outside, and is sent what came of it."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

T = TypeVar("T")


class Step(NamedTuple):
    """Something to be done outside.

    Attributes:
        do: Does it, and blocks.
        ado: Its twin; gives an awaitable.
    """

    do: Callable[[], Any]
    ado: Callable[[], Any]


def file_step(do: Callable[..., Any], *args: Any) -> Step:
    """A step at files of this machine; the twin has a thread for it."""
    return Step(partial(do, *args), partial(asyncio.to_thread, do, *args))


def run(steps: Generator[Step, Any, T]) -> T:
    """What the steps come to; what one raises, the generator raises where it yielded it."""
    with contextlib.closing(steps):
        try:
            step = next(steps)
            while True:
                try:
                    made = step.do()
                except Exception as error:  # noqa: BLE001
                    step = steps.throw(error)
                else:
                    step = steps.send(made)
        except StopIteration as end:
            result: T = end.value
            return result


async def arun(steps: Generator[Step, Any, T]) -> T:
    """The twin of `run`; a cancelled one leaves the generator where it is, and closes it."""
    with contextlib.closing(steps):
        try:
            step = next(steps)
            while True:
                try:
                    made = await step.ado()
                except Exception as error:  # noqa: BLE001
                    step = steps.throw(error)
                else:
                    step = steps.send(made)
        except StopIteration as end:
            result: T = end.value
            return result
