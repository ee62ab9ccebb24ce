"""What ends work: cancel tokens, by which a caller who has gone, or asks for an end, sends nothing more; and signals."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
import traceback
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_POLL_SECONDS: Final = 0.1
_MARK: Final = "cogview_raised_by_signal"


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

    @property
    def has_questions(self) -> bool:
        """Whether it can be set without a call of `set`, so that it has to be asked again and again."""
        return bool(self._questions)

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


def raised_by_signal(error: BaseException) -> BaseException | None:
    """What a signal handler of this program raised, where an error is that, or was made from it.

    Such a handler runs in the middle of anything, such as a socket operation. What it raises (Celery's `SoftTimeLimitExceeded`, a
    `TimeoutError` of an alarm) is no fault of that operation, whatever its class, and belongs to the caller.

    Returns:
        The handler's exception; None where no handler raised one.
    """
    handlers = {signal.getsignal(each) for each in signal.valid_signals()}
    # Python's own handler of Ctrl-C is not written in Python; nothing of ours takes its KeyboardInterrupt for a fault.
    codes = {getattr(getattr(each, "__func__", each), "__code__", None) for each in handlers if callable(each)} - {None}
    seen: list[BaseException] = []
    link: BaseException | None = error
    while codes and link is not None and link not in seen:
        if hasattr(link, _MARK) or any(frame.f_code in codes for frame, _ in traceback.walk_tb(link.__traceback__)):
            # Marked, because the frames are taken away from what passes through: they hold the request, and so the key.
            setattr(link, _MARK, True)
            return link
        seen.append(link)
        link = link.__cause__ or link.__context__
    return None
