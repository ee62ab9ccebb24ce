"""Cancel tokens: a caller who has gone, or who asks for an end, sends nothing more."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_POLL_SECONDS: Final = 0.1


class Stop(threading.Event):
    """A cancel token. Once it is set, no further request is sent; requests in flight may end.

    It is set by `set` when the caller has gone (Ctrl-C, an iterator that was left), and while one of its questions answers yes
    (a job that was asked to stop). A child is set with its parent, and not the other way round.

    Args:
        questions: Each returns whether an end was asked for.
    """

    def __init__(self, *questions: Callable[[], bool]) -> None:
        super().__init__()
        self._questions = questions
        self._children: weakref.WeakSet[Stop] = weakref.WeakSet()
        self._changing = threading.Lock()

    def set(self) -> None:
        """The caller has gone: cancel this work and its children."""
        with self._changing:
            super().set()
            children = list(self._children)
        for each in children:
            each.set()

    def is_set(self) -> bool:
        """Whether no further request is sent."""
        return super().is_set() or any(asks() for asks in self._questions)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no further request is sent, at most `timeout` seconds; returns whether that is so."""
        if not self._questions:
            return super().wait(timeout)
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_set():
            left = _POLL_SECONDS if end is None else min(_POLL_SECONDS, end - time.monotonic())
            if left <= 0:
                return False
            super().wait(left)
        return True

    async def await_seconds(self, seconds: float) -> None:
        """Async version of `wait`. An async caller that has gone cancels its tasks, so only the questions end it."""
        end = time.monotonic() + seconds
        while self._questions and not self.is_set() and end - time.monotonic() > _POLL_SECONDS:  # noqa: ASYNC110  a question has no event
            await asyncio.sleep(_POLL_SECONDS)
        if not (self._questions and self.is_set()):
            await asyncio.sleep(max(0.0, end - time.monotonic()))

    def wait_until_abandoned(self, timeout: float) -> bool:
        """Wait until the caller has gone, at most `timeout` seconds; returns whether it has. Questions do not count."""
        return super().wait(timeout)

    def inner(self, *questions: Callable[[], bool]) -> Stop:
        """A child, with further questions."""
        stop = Stop(*self._questions, *questions)
        if self is not NEVER:
            with self._changing:
                self._children.add(stop)
                abandoned = super().is_set()
            if abandoned:
                stop.set()
        return stop


NEVER: Final = Stop()
STOPPED: Final[ContextVar[Stop]] = ContextVar("cogview_stopped", default=NEVER)
