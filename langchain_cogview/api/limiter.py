"""An adaptive concurrency limiter (AIMD) for the requests of one account and model, shared by threads and event loops.

A call acquires a slot, sends its request, and ends the slot by the outcome: `done` after an answer, `dropped` when the service
refused it because too many requests were in flight (code 1302), `release` after anything else. Calls queue first in, first out.
Refusals lower the limit multiplicatively, successes raise it by one.

This module knows nothing of HTTP or of what is sent.
"""
# ruff: noqa: SLF001  a limiter and its slots share their state

from __future__ import annotations

import asyncio
import hashlib
import heapq
import math
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_cogview.concurrency import Deadline

MAX_LIMITERS: Final = 1000
"""How many unused limiters are kept; the least recently used one is forgotten first."""
PROBE: Final = 10
"""The limit rises this many times slower to the level that was last refused than to any other level."""
MIN_PROBE_SUCCESSES: Final = 30
"""The fewest successes before the limit rises to that level. Without this minimum, an account that accepts one request at a time
would have one request in eleven refused."""
_WARN_SECONDS: Final = 60.0
_COMPACT_AT: Final = 64
_LOOK_SECONDS: Final = 0.5
"""Seconds after which a waiting task checks for slots that are held beyond their time limit."""
_PICK_UP_SECONDS: Final = 5.0
"""Seconds that a granted slot is reserved for a task whose event loop does not run it."""
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class Slot:
    """Permission for one request in flight. The first of `done`, `dropped` and `release` ends it; later ones have no effect.

    A slot that is garbage collected before it has ended (after an interrupted thread, or a coroutine that is never resumed) is
    released. A slot that is held beyond its call's time limit (by an abandoned event loop) is given to others.

    Attributes:
        ticket: The position in the queue. A call that passes it to `acquire` after a refusal keeps that position.
    """

    __slots__ = ("__weakref__", "_cap", "_ends_at", "_epoch", "_limiter", "_over", "ticket")

    def __init__(self, limiter: Limiter, cap: int, ticket: int, epoch: int) -> None:
        self._over = True  # until the limiter counts it
        self._limiter = limiter
        self._cap = cap
        self._epoch = epoch
        self._ends_at = math.inf
        self.ticket: Final = ticket

    def end_after(self, seconds: float | None) -> None:
        """Set a time limit, after which the slot is given to others.

        Args:
            seconds: Seconds from now; None for no limit.
        """
        self._limiter._limit_time(self, seconds)

    def done(self) -> None:
        """End the slot after an answer of the service. Enough of these raise the limit."""
        self._limiter._post(self, success=True)

    def release(self) -> None:
        """End the slot after anything else (an error, a cancelled call, a busy model). The limit stays as it is."""
        self._limiter._post(self, success=False)

    def dropped(self) -> bool:
        """End the slot after a refusal for too many requests in flight. Halves the limit, once for a burst of refusals.

        Returns:
            Whether other requests are in flight. If so, the queue is the wait, and the caller can call `acquire` at once. If not,
            the caller has to wait before its next attempt.
        """
        return self._limiter._drop(self)

    def __del__(self) -> None:
        if not getattr(self, "_over", True):
            self.release()


class AdaptiveLimit:
    """How many requests may be in flight, as successes and refusals show it. It knows no queue and takes no lock.

    The number is infinite at first, so that only the caps count. The first refusal of a burst halves it, at most to the number of
    requests that are still in flight. Each further refusal of the same burst lowers it to the number that is in flight then, but
    never below 1. It rises by 1 after as many successes as its value, counting only requests that were sent after the last
    refusal while all slots were in use. The step to the level that was last refused needs ten times as many, and at least 30.

    Args:
        epoch: The number of the first epoch. Each burst of refusals starts the next one.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.value: float = math.inf
        self._refused_at: float = math.inf
        self._successes = 0

    def admits(self, in_flight: int, cap: int) -> bool:
        """Whether a caller with this cap may send one more request."""
        return in_flight < cap and in_flight < self.value

    def record_success(self, epoch: int, cap: int, in_flight: int) -> None:
        """Record an answer.

        Args:
            epoch: When the request was sent.
            cap: The cap of its caller.
            in_flight: The number of other requests in flight.
        """
        # A request from before the last refusal, or one sent while slots were free, does not show that more are accepted.
        if epoch < self.epoch or not in_flight + 1 >= self.value < cap:
            return
        self._successes += 1
        probes = self.value + 1 == self._refused_at
        if self._successes >= (max(PROBE * self.value, MIN_PROBE_SUCCESSES) if probes else self.value):
            self.value += 1
            self._successes = 0

    def record_refusal(self, epoch: int, cap: int, in_flight: int) -> None:
        """Record a refusal for too many requests in flight; the arguments are those of `record_success`."""
        if epoch == self.epoch:
            self.epoch += 1
            self.value = min(self.value, cap) // 2
            self._refused_at = math.inf
        self.value = max(1, min(self.value, in_flight))
        self._refused_at = min(self._refused_at, in_flight + 1)
        self._successes = 0


class Limiter:
    """A queue for slots, whose number adapts to what the service accepts.

    The waiter with the lowest ticket is served first, as soon as fewer requests are in flight than `limit` and than its own cap.
    Waiters behind it wait even if their caps are higher. After a refusal with other requests in flight, no slot is granted until
    one of those has ended, because the next request would be refused as well. `AdaptiveLimit` decides how many those are.

    All methods are thread-safe. `limiter_for` returns the limiter that callers share.

    Args:
        check_seconds: Seconds after which a waiter checks whether it was cancelled or interrupted. A signal that arrives just
            before the wait for a lock does not end that wait; on Windows none does.
    """

    def __init__(self, *, check_seconds: float = 0.1) -> None:
        self._check_seconds = check_seconds
        self._arrivals = 0
        self._adaptive = AdaptiveLimit(0)
        self._heap: list[tuple[int, int, Any]] = []  # ticket, arrival, waiter
        self._start_over()

    def _start_over(self) -> None:
        """Reset everything. Slots that were granted before belong to the parent process."""
        for _, _, waiter in self._heap:
            waiter.gone = True
        self._lock = threading.Lock()
        # Ended slots and withdrawn waiters, handled by the holder of the lock. The garbage collector can end a slot in a thread
        # that holds the lock at that moment, so that ending a slot must not wait for the lock.
        self._mail: deque[tuple[Slot | _Waiter, bool]] = deque()
        self._heap = []
        self._in_flight = 0
        self._waiting = 0
        self._first_epoch = self._adaptive.epoch + 1
        self._adaptive = AdaptiveLimit(self._first_epoch)
        # Slots with a time limit, each with the event loop of its task while that task has not received it yet.
        self._timed: weakref.WeakKeyDictionary[Slot, asyncio.AbstractEventLoop | None] = weakref.WeakKeyDictionary()
        self._abandoned: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._look_at: float = math.inf
        self._warned_at: float = -math.inf

    @property
    def in_flight(self) -> int:
        """The number of slots in use."""
        return self._in_flight

    @property
    def limit(self) -> float:
        """The number of slots allowed, besides each caller's cap: a whole number, or infinity before the first refusal."""
        return self._adaptive.value

    @property
    def waiting(self) -> int:
        """The number of calls in the queue."""
        return self._waiting

    def __repr__(self) -> str:
        return f"<Limiter: {self._in_flight} in flight, limit {self.limit}, {self._waiting} waiting>"

    def is_time_to_warn(self) -> bool:
        """Whether the last warning about this account and model is more than a minute old. If so, the caller logs the next."""
        with self._lock:
            now = time.monotonic()
            is_time = now - self._warned_at > _WARN_SECONDS
            if is_time:
                self._warned_at = now
        if self._mail:
            self._settle()
        return is_time

    def acquire(
        self,
        cap: int,
        *,
        deadline: Deadline | None = None,
        cancelled: threading.Event | None = None,
        ticket: int | None = None,
    ) -> Slot | None:
        """Wait for a slot.

        Args:
            cap: The most requests that may be in flight when the slot is granted, this one included; 1 or more.
            deadline: Ends the wait; a deadline that has not started never passes.
            cancelled: Ends the wait when it is set; checked every `check_seconds`.
            ticket: The ticket of a dropped slot, to keep its position in the queue.

        Returns:
            The slot, or None if the deadline passed or `cancelled` was set first. Neither is checked if a slot is free.

        Raises:
            ValueError: When `cap` is below 1.
        """
        slot = self._slot_at_once(cap, ticket)
        if slot is not None:
            return slot
        waiter, granted = _ThreadWaiter(cap, self._check_seconds), False
        try:
            self._queue(waiter, ticket)
            granted = waiter.wait(deadline, cancelled, self.reclaim)
        finally:
            if not granted:
                self._post(waiter)
        return waiter.slot if granted else None

    async def aacquire(
        self,
        cap: int,
        *,
        deadline: Deadline | None = None,
        cancelled: threading.Event | None = None,
        ticket: int | None = None,
    ) -> Slot | None:
        """Async version of `acquire`. A task that is cancelled leaves the queue."""
        slot = self._slot_at_once(cap, ticket)
        if slot is not None:
            return slot
        waiter, granted = _TaskWaiter(cap, self._check_seconds), False
        try:
            self._queue(waiter, ticket)
            granted = await waiter.wait(deadline, partial(self._look, waiter, ticket), cancelled)
        finally:
            if not granted:
                self._post(waiter)
        if granted and waiter.slot is not None:
            waiter.slot.end_after(None)  # the task has received it
        return waiter.slot if granted else None

    def _look(self, waiter: _Waiter, ticket: int | None) -> None:
        self.reclaim()
        if waiter.was_skipped:
            self._queue_again(waiter, ticket)

    def reclaim(self) -> None:
        """Release the slots that are held beyond their time limit, and grant them to waiters."""
        now = time.monotonic()
        if now < self._look_at:
            return
        try:
            with self._lock:
                self._look_at = math.inf
                for slot, loop in list(self._timed.items()):
                    if slot._ends_at <= now:
                        if loop is not None:
                            self._abandoned.add(loop)
                        self._end(slot)
                    else:
                        self._look_at = min(self._look_at, slot._ends_at)
                self._read_mail()
                self._grant()
        finally:
            if self._mail:
                self._settle()

    # --- acquire the lock

    def _limit_time(self, slot: Slot, seconds: float | None) -> None:
        with self._lock:
            self._set_limit(slot, seconds)
        if self._mail:
            self._settle()

    def _queue_again(self, waiter: _Waiter, ticket: int | None) -> None:
        """Put a waiter back into the queue that was skipped because its event loop seemed abandoned."""
        with self._lock:
            again = waiter.was_skipped and waiter.slot is None
            waiter.was_skipped = False
        if again:
            self._queue(waiter, ticket)

    def _slot_at_once(self, cap: int, ticket: int | None) -> Slot | None:
        if cap < 1:
            raise ValueError(f"cap is 1 or more, not {cap}: with no slot at all the call would wait for ever.")
        try:
            with self._lock:
                if self._mail:
                    self._read_mail()
                if self._waiting and (ticket is None or ticket > self._heap[0][0]):
                    return None
                return self._new_slot(cap, ticket or self._next_ticket()) if self._admits(cap) else None
        finally:
            if self._mail:
                self._settle()

    def _queue(self, waiter: _Waiter, ticket: int | None) -> None:
        """Put a waiter into the queue. It can be granted a slot before this returns."""
        try:
            with self._lock:
                arrival = self._next_ticket()
                heapq.heappush(self._heap, (ticket or arrival, arrival, waiter))
                # Only now, so that a waiter that an interrupt leaves behind counts as withdrawn.
                waiter.gone = False
                self._waiting += 1
                self._read_mail()
                self._grant()
        finally:
            if self._mail:
                self._settle()

    def _drop(self, slot: Slot) -> bool:
        try:
            with self._lock:
                self._read_mail()
                fresh = self._closed(slot)
                left = self._in_flight
                if fresh:
                    self._adaptive.record_refusal(slot._epoch, slot._cap, left)
                    self._grant()
                return left > 0
        finally:
            if self._mail:
                self._settle()

    def _post(self, ended: Slot | _Waiter, *, success: bool = False) -> None:
        self._mail.append((ended, success))
        self._settle()

    def _settle(self) -> None:
        # Without the lock there is nothing to do: its holder reads the mail after releasing it.
        while self._mail and self._lock.acquire(blocking=False):
            try:
                self._read_mail()
            finally:
                self._lock.release()

    # --- called with the lock held

    def _set_limit(self, slot: Slot, seconds: float | None, loop: asyncio.AbstractEventLoop | None = None) -> None:
        slot._ends_at = math.inf if seconds is None else time.monotonic() + seconds
        if seconds is None:
            self._timed.pop(slot, None)
        elif not slot._over:
            self._timed[slot] = loop
            self._look_at = min(self._look_at, slot._ends_at)

    def _read_mail(self) -> None:
        while self._mail:
            ended, success = self._mail.popleft()
            if isinstance(ended, Slot):
                self._end(ended, success=success)
            elif ended.slot is not None:  # granted at the same moment: for the next waiter
                self._end(ended.slot)
            else:
                self._withdraw(ended)
            self._grant()

    def _end(self, slot: Slot, *, success: bool = False) -> None:
        if self._closed(slot) and success:
            self._adaptive.record_success(slot._epoch, slot._cap, self._in_flight)

    def _closed(self, slot: Slot) -> bool:
        """Stop counting a slot. Returns False if it has ended already or belongs to the parent process."""
        fresh = not slot._over and slot._epoch >= self._first_epoch
        slot._over = True
        self._in_flight -= fresh
        self._timed.pop(slot, None)
        return fresh

    def _withdraw(self, waiter: _Waiter) -> None:
        if waiter.gone:
            return
        waiter.gone = True
        self._waiting -= 1
        if len(self._heap) > max(_COMPACT_AT, 2 * self._waiting):
            self._heap = [entry for entry in self._heap if not entry[2].gone]
            heapq.heapify(self._heap)

    def _next_ticket(self) -> int:
        self._arrivals += 1
        return self._arrivals

    def _admits(self, cap: int) -> bool:
        return self._adaptive.admits(self._in_flight, cap)

    def _new_slot(self, cap: int, ticket: int) -> Slot:
        slot = Slot(self, cap, ticket, self._adaptive.epoch)
        # An interrupt cannot come between these two.
        self._in_flight += 1
        slot._over = False
        return slot

    def _grant(self) -> None:
        while self._heap:
            ticket, _, waiter = self._heap[0]
            if not waiter.gone and not self._admits(waiter.cap):
                return
            heapq.heappop(self._heap)
            if not waiter.gone:
                waiter.gone = True
                self._waiting -= 1
                if waiter.loop is not None and waiter.loop in self._abandoned and not waiter.loop.is_running():
                    waiter.was_skipped = True
                    continue
                waiter.slot = self._new_slot(waiter.cap, ticket)
                if waiter.wake():
                    if waiter.loop:
                        self._set_limit(waiter.slot, _PICK_UP_SECONDS, waiter.loop)
                else:
                    self._closed(waiter.slot)


class _Waiter(ABC):
    """A thread or task that waits. `gone` means that it is not in the queue: not yet, granted, or withdrawn."""

    loop: asyncio.AbstractEventLoop | None = None
    """The event loop of a waiting task; None for a thread."""

    def __init__(self, cap: int, check_seconds: float) -> None:
        self.cap = cap
        self.check_seconds = check_seconds
        self.gone = True
        self.was_skipped = False
        self.slot: Slot | None = None

    @abstractmethod
    def wake(self) -> bool:
        """Resume the waiter. Returns False if it can never resume."""


class _ThreadWaiter(_Waiter):
    def __init__(self, cap: int, check_seconds: float) -> None:
        super().__init__(cap, check_seconds)
        self._granted = threading.Lock()
        self._granted.acquire()

    def wake(self) -> bool:
        self._granted.release()
        return True

    def wait(self, deadline: Deadline | None, cancelled: threading.Event | None, look: Callable[[], None]) -> bool:
        """Whether a slot was granted before the deadline passed or `cancelled` was set. Calls `look` regularly."""
        while not (cancelled and cancelled.is_set()) and not (deadline and deadline.passed):
            left = deadline.remaining() if deadline else None
            if self._granted.acquire(timeout=self.check_seconds if left is None else min(left, self.check_seconds)):
                return True
            look()
        return False


class _TaskWaiter(_Waiter):
    def __init__(self, cap: int, check_seconds: float) -> None:
        super().__init__(cap, check_seconds)
        self.loop = self._loop = asyncio.get_running_loop()
        self._granted: asyncio.Future[None] = self._loop.create_future()

    def wake(self) -> bool:
        try:
            if _running_loop() is self._loop:
                self._go()
            else:
                self._loop.call_soon_threadsafe(self._go)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def _go(self) -> None:
        if not self._granted.done():
            self._granted.set_result(None)

    async def wait(
        self, deadline: Deadline | None, look: Callable[[], None], cancelled: threading.Event | None
    ) -> bool:
        """Async version of `_ThreadWaiter.wait`."""
        timer = self._loop.call_later(_LOOK_SECONDS, self._look, look)
        try:
            if (
                deadline is None and cancelled is None
            ):  # the usual case: a wait with a time limit costs four times as much
                await self._granted
                return True
            while not (cancelled and cancelled.is_set()) and not (deadline and deadline.passed):
                left = [] if deadline is None or (rest := deadline.remaining()) is None else [rest]
                # Not `wait_for`, which would cancel the future while another thread is about to grant the slot.
                await asyncio.wait(
                    [self._granted], timeout=min([*left, self.check_seconds] if cancelled else left, default=None)
                )
                if self._granted.done():
                    return True
            return False
        finally:
            (self._timer or timer).cancel()

    _timer: asyncio.TimerHandle | None = None

    def _look(self, look: Callable[[], None]) -> None:
        look()
        if not self._granted.done():
            self._timer = self._loop.call_later(_LOOK_SECONDS, self._look, look)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


_LimiterName = tuple[str, str, bytes]
_registry_lock = threading.Lock()
_alive: weakref.WeakValueDictionary[_LimiterName, Limiter] = weakref.WeakValueDictionary()
_recent: OrderedDict[_LimiterName, Limiter] = OrderedDict()


def limiter_for(base_url: str, model: str, key: str) -> Limiter:
    """Return the limiter that all calls of one account and model share in this process.

    A limiter with waiters or slots in use is never forgotten. An unused one is forgotten once a thousand others were asked for
    after it. After a fork, the limiters of the child process start afresh.

    Args:
        base_url: Only its host and port count; for a sandbox, all of it.
        model: The model's name; upper and lower case are the same.
        key: The API key, of which only a hash is kept.

    Returns:
        The shared limiter.
    """
    name = (_host(base_url), model.lower(), hashlib.sha256(key.encode()).digest())
    with _registry_lock:
        limiter = _alive.get(name)
        if limiter is None:
            limiter = _alive[name] = Limiter()
        _recent[name] = limiter
        _recent.move_to_end(name)
        if len(_recent) > MAX_LIMITERS:
            _recent.popitem(last=False)
    return limiter


@lru_cache(maxsize=256)
def _host(base_url: str) -> str:
    parts = urlsplit(base_url)
    if parts.scheme not in _DEFAULT_PORTS:
        return base_url
    return f"{parts.hostname}:{parts.port or _DEFAULT_PORTS[parts.scheme]}"


def _after_fork() -> None:
    global _registry_lock  # noqa: PLW0603  another thread of the parent may have held it
    _registry_lock = threading.Lock()
    for limiter in list(_alive.values()):
        limiter._start_over()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
