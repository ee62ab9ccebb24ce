"""Deadlines, cancel tokens, single-flight, and work in threads for callers on an event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import threading
import time
import traceback
import weakref
from collections import deque
from contextvars import ContextVar, copy_context
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable, Iterator
    from contextlib import AbstractContextManager
    from types import FrameType

T = TypeVar("T")

DEADLINE: Final = "cogview.deadline"
"""The request extension that holds a `Deadline`, for transports that know it."""
_MOST_LEFT: Final = 30.0


class Deadline:
    """A point in time on the monotonic clock at which a call has to end.

    Args:
        seconds: Seconds after its start; None for no limit.
        started: Whether the time runs from now on. If not, it runs from `start` on, so that queueing before a call does not
            count.
    """

    __slots__ = ("_end", "_started", "seconds")

    def __init__(self, seconds: float | None, *, started: bool = True) -> None:
        self.seconds: Final = seconds
        self._end: float | None = None
        self._started: float | None = None
        if started:
            self.start()

    def start(self) -> None:
        """Start the time. A second start has no effect."""
        if self._started is None:
            self._started = time.monotonic()
            self._end = None if self.seconds is None else self._started + self.seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    @property
    def started(self) -> bool:
        """Whether the time has been started."""
        return self._started is not None

    def remaining(self) -> float | None:
        """Calculate the time that is left.

        Returns:
            Seconds; 0.0 if the deadline has passed, None if there is no limit.
        """
        return self.seconds if self._end is None else max(0.0, self._end - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether no time is left."""
        return self.remaining() == 0.0

    def allows(self, seconds: float) -> bool:
        """Return whether a wait of `seconds` ends before the deadline."""
        left = self.remaining()
        return left is None or seconds < left

    def is_worth_sending(self, wait: float = 0.0) -> bool:
        """Decide whether a request that is sent in `wait` seconds has time for its reply: a tenth of the limit, at most 30 s.

        An image whose reply comes too late is paid for and lost.

        Returns:
            Whether that time is left.
        """
        return self.seconds is None or self.allows(wait + min(self.seconds / 10, _MOST_LEFT))

    def clamp(self, seconds: float | None) -> float | None:
        """Limit a wait to the time that is left.

        Returns:
            The shorter of `seconds` and the time that is left; None if neither has a limit.
        """
        left = self.remaining()
        if left is None or seconds is None:
            return seconds if left is None else left
        return min(left, seconds)


# --- cancel tokens and signals

_POLL_SECONDS: Final = 0.1
_MARK: Final = "cogview_raised_by_signal"


class CancelToken(threading.Event):
    """Cancels work. Once it is set, no further request is sent; requests in flight may finish.

    It is set by `set`, when the caller is gone (after Ctrl-C, or an iterator that was closed), and while one of its conditions is
    true (a job that was asked to stop). A child is set with its parent, but not a parent with its child.

    Args:
        conditions: Functions that return whether to cancel.
    """

    def __init__(self, *conditions: Callable[[], bool]) -> None:
        super().__init__()
        self._conditions = conditions
        self._children: weakref.WeakSet[CancelToken] = weakref.WeakSet()
        self._changing = threading.Lock()

    @property
    def has_conditions(self) -> bool:
        """Whether it has conditions, which have to be polled."""
        return bool(self._conditions)

    def set(self) -> None:
        """Cancel this work and its children, because the caller is gone."""
        with self._changing:
            super().set()
            children = list(self._children)
        for child in children:
            child.set()

    def is_set(self) -> bool:
        """Return whether the work is cancelled."""
        return super().is_set() or any(holds() for holds in self._conditions)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the work is cancelled, at most `timeout` seconds.

        Returns:
            Whether it is cancelled.
        """
        if not self._conditions:
            return super().wait(timeout)
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_set():
            left = _POLL_SECONDS if end is None else min(_POLL_SECONDS, end - time.monotonic())
            if left <= 0:
                return False
            super().wait(left)
        return True

    async def await_seconds(self, seconds: float) -> None:
        """Async version of `wait`. Only the conditions end it early, because an async caller that is gone cancels its tasks."""
        end = time.monotonic() + seconds
        while self._conditions and not self.is_set() and end - time.monotonic() > _POLL_SECONDS:  # noqa: ASYNC110  a condition has no event
            await asyncio.sleep(_POLL_SECONDS)
        if not (self._conditions and self.is_set()):
            await asyncio.sleep(max(0.0, end - time.monotonic()))

    def wait_until_abandoned(self, timeout: float) -> bool:
        """Return whether the caller is gone, after waiting for that at most `timeout` seconds. Conditions are ignored."""
        return super().wait(timeout)

    def child(self, *conditions: Callable[[], bool]) -> CancelToken:
        """Create a child with further conditions.

        Returns:
            A token that is cancelled with this one, or separately.
        """
        token = CancelToken(*self._conditions, *conditions)
        if self is not NEVER:
            with self._changing:
                self._children.add(token)
                abandoned = super().is_set()
            if abandoned:
                token.set()
        return token


NEVER: Final = CancelToken()
Priority = Literal["interactive", "batch"]
"""Which of the waiting calls of a process are sent first: the interactive ones, then those of batches and jobs."""

PRIORITY: Final[ContextVar[Priority]] = ContextVar("cogview_priority", default="interactive")
"""The priority of the calls that the current context makes."""


@contextlib.contextmanager
def batch_work() -> Iterator[None]:
    """Within this block, calls are those of a batch."""
    token = PRIORITY.set("batch")
    try:
        yield
    finally:
        PRIORITY.reset(token)


CANCEL_TOKEN: Final[ContextVar[CancelToken]] = ContextVar("cogview_cancel_token", default=NEVER)


def as_outcome(error: BaseException) -> Exception:
    """Return the error of one item as its outcome, but raise what ends the whole call, such as a cancellation.

    Args:
        error: The exception that was caught.

    Returns:
        The same exception.

    Raises:
        BaseException: The exception, if it is not an `Exception`.
    """
    if not isinstance(error, Exception):
        raise error
    return error


def raised_by_signal(error: BaseException) -> BaseException | None:
    """Find the exception of a signal handler that an error is, or that caused it.

    Such a handler runs in the middle of anything, such as a socket operation. What it raises (Celery's `SoftTimeLimitExceeded`, a
    `TimeoutError` of an alarm) is not a failure of that operation, whatever its class, and is passed on to the caller.

    Returns:
        The handler's exception, or None.
    """
    handlers = {signal.getsignal(number) for number in signal.valid_signals()}
    # Python's own handler of Ctrl-C is not written in Python; its KeyboardInterrupt is never treated as a failure here.
    functions = [getattr(handler, "__func__", handler) for handler in handlers if callable(handler)]
    codes = {getattr(function, "__code__", None) for function in functions} - {None}
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        frames = [frame for frame, _ in traceback.walk_tb(link.__traceback__)]
        if hasattr(link, _MARK) or any(frame.f_code in codes for frame in frames) or _holds_handler(frames):
            # Marked, because its frames are removed later: they hold the request, and so the key.
            setattr(link, _MARK, True)
            return link
        seen.append(link)
        link = link.__cause__ or link.__context__
    return None


def _holds_handler(frames: list[FrameType]) -> bool:
    """Return whether one of these frames belongs to a signal handler, whose argument is the frame that it interrupted.

    That also finds a handler that is a partial or an object, or that is not installed any more.
    """
    return any(
        handler.f_locals.get(name) is interrupted
        for interrupted, handler in pairwise(frames)
        for name in handler.f_code.co_varnames[: handler.f_code.co_argcount]
    )


# --- threads for callers on an event loop. The event loop's default executor is not used: an application may fill it with threads
# of its own, and then a paid image would wait for those before it can be saved.

MAX_THREADS: Final = 128
"""More than images are in flight as a rule: a folder that hangs, such as a dead network mount, holds up no other."""


def _new_pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="cogview-io")


_pool = _new_pool()


async def in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Return what a function that blocks returns: it runs in a thread, in a copy of the caller's context.

    A cancelled caller stops waiting; the function itself runs to its end, and its result is dropped.

    Returns:
        What the function returns.

    Raises:
        Exception: What the function raises.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    context = copy_context()
    claim = threading.Lock()  # whoever has it runs the function

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():  # the caller was cancelled
            return
        if error is None:
            done.set_result(result)  # type: ignore[arg-type]
        elif isinstance(error, StopIteration):  # a future refuses it
            done.set_exception(RuntimeError(f"{type(error).__name__} was raised in a thread."))
        else:
            done.set_exception(error)

    def work() -> None:
        if not claim.acquire(blocking=False):
            return
        outcome: tuple[T | None, BaseException | None]
        try:
            outcome = context.run(function, *args, **kwargs), None
        except BaseException as error:  # noqa: BLE001  raised by the caller
            outcome = None, error
        with contextlib.suppress(RuntimeError):  # the event loop was closed in the meantime
            loop.call_soon_threadsafe(settle, *outcome)

    try:
        _pool.submit(work)
    except RuntimeError:
        # The interpreter shuts down, or the system has no thread left. What was paid for is worth a blocked event loop.
        if claim.acquire(blocking=False):
            return function(*args, **kwargs)
    return await done


@contextlib.asynccontextmanager
async def entered_in_thread(context: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enter and leave a context manager that blocks, in threads. It is also left when the caller is cancelled while entering it.

    Yields:
        What the context manager returns on entering.

    Raises:
        CancelledError: The caller was cancelled.
    """
    entering = asyncio.create_task(in_thread(context.__enter__))
    try:
        entered = await asyncio.shield(entering)
    except asyncio.CancelledError:
        await asyncio.wait([entering])
        if entering.exception() is None:
            await in_thread(context.__exit__, None, None, None)
        raise
    try:
        yield entered
    except BaseException as error:
        if not await in_thread(context.__exit__, type(error), error, error.__traceback__):
            raise
    else:
        await in_thread(context.__exit__, None, None, None)


# --- single-flight

_Entry = concurrent.futures.Future[None]
"""A caller in the queue of a key; done once it is first."""


class SingleFlight:
    """Runs equal work once at a time in this process, in threads and tasks: callers with the same key queue first in, first out.

    A caller waits no longer than it says and then goes on, so that it does not hang on another one that never ends, such as a
    task of an abandoned event loop.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[Hashable, deque[_Entry]] = {}

    @contextlib.contextmanager
    def flight(self, key: Hashable, seconds: float | None) -> Iterator[None]:
        """Wait until no earlier caller has the same key; later ones wait until the block ends.

        A thread that runs an event loop does not wait, because the earlier caller may be a task of that loop.

        Args:
            key: Identifies the work.
            seconds: The longest wait; None for no limit.
        """
        entry = self._enter(key)
        try:
            if not runs_event_loop():
                concurrent.futures.wait([entry], seconds)
            yield
        finally:
            self._leave(key, entry)

    @contextlib.asynccontextmanager
    async def aflight(self, key: Hashable, seconds: float | None) -> AsyncIterator[None]:
        """Async version of `flight`."""
        entry = self._enter(key)
        try:
            if not entry.done():
                await asyncio.wait([asyncio.wrap_future(entry)], timeout=seconds)
            yield
        finally:
            self._leave(key, entry)

    def forget(self) -> None:
        """Reset, in a forked process: the callers in the queues are those of the parent."""
        self._lock = threading.Lock()
        self._queues = {}

    def _enter(self, key: Hashable) -> _Entry:
        entry = _Entry()
        with self._lock:
            queue = self._queues.setdefault(key, deque())
            queue.append(entry)
            if len(queue) == 1:
                entry.set_result(None)
        return entry

    def _leave(self, key: Hashable, entry: _Entry) -> None:
        with self._lock:
            queue = self._queues.get(key)
            if queue is None or entry not in queue:
                return  # entered before a fork
            queue.remove(entry)
            if not queue:
                del self._queues[key]
            elif not queue[0].done():
                queue[0].set_result(None)


def runs_event_loop() -> bool:
    """Return whether this thread runs an event loop."""
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        return True
    return False


SINGLE_FLIGHT: Final = SingleFlight()
"""The flights of this process."""


def _after_fork() -> None:
    global _pool  # noqa: PLW0603  the threads are the parent's
    _pool = _new_pool()
    SINGLE_FLIGHT.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def runs_in(task: weakref.ref[asyncio.Task[Any]] | None) -> bool:
    """Return whether a task is the running one: a coroutine of an abandoned event loop is closed outside of its task."""
    running = running_task()
    return running is not None and task is not None and running is task()


def running_task() -> asyncio.Task[Any] | None:
    """Return the task that runs this code; None outside of an event loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop is running
        return None
