"""An adaptive concurrency limiter (AIMD) for the requests of one account and model, shared by threads and event loops.

A call acquires a slot, sends its request, and ends the slot by the outcome: `done` after an answer, `dropped` when the service
refused it because too many requests were in flight (code 1302), `release` after anything else. Calls queue first in, first out.
Refusals lower the limit multiplicatively, successes raise it by one.

This module knows nothing of HTTP or of what is sent.
"""
# ruff: noqa: SLF001  a limiter and its slots share their state

from __future__ import annotations

import copy
import hashlib
import heapq
import math
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from langchain_cogview.api.waiters import TaskWaiter, ThreadWaiter, Waiter
from langchain_cogview.concurrency import PRIORITY
from langchain_cogview.limits.allocation import AdaptiveLimit

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from langchain_cogview.concurrency import Deadline, Priority
    from langchain_cogview.errors import CogViewConfigurationError
    from langchain_cogview.limits import SharedLimit

MAX_LIMITERS: Final = 1000
"""How many unused limiters are kept; the least recently used one is forgotten first."""
_WARN_SECONDS: Final = 60.0
_COMPACT_AT: Final = 64
_PICK_UP_SECONDS: Final = 5.0
"""Seconds that a granted slot is reserved for a task whose event loop does not run it."""
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class Slot:
    """Permission for one request in flight. The first of `done`, `dropped` and `release` ends it; later ones have no effect.

    The slot of a user (`outer`), if there is one, ends with it.

    A slot that is garbage collected before it has ended (after an interrupted thread, or a coroutine that is never resumed) is
    released. A slot that is held beyond its call's time limit (by an abandoned event loop) is given to others.

    Attributes:
        ticket: The position in the queue. A call that passes it to `acquire` after a refusal keeps that position.
        outer: The slot in the limiter of the request's user; None if users are not limited.
    """

    __slots__ = ("__weakref__", "_cap", "_ends_at", "_epoch", "_generation", "_limiter", "_over", "outer", "ticket")

    def __init__(self, limiter: Limiter, cap: int, ticket: int) -> None:
        self._over = True  # until the limiter counts it
        self._limiter = limiter
        self._cap = cap
        self._generation = limiter._generation
        self._epoch = limiter._adaptive.epoch
        self._ends_at = math.inf
        self.ticket: Final = ticket
        self.outer: Slot | None = None

    def end_after(self, seconds: float | None) -> None:
        """Set a time limit, after which the slot is given to others.

        Args:
            seconds: Seconds from now; None for no limit.
        """
        self._limiter._limit_time(self, seconds)
        if self.outer is not None:
            self.outer.end_after(seconds)

    def done(self) -> None:
        """End the slot after an answer of the service. Enough of these raise the limit."""
        self._limiter._post(self, success=True)
        self._end_outer()

    def release(self) -> None:
        """End the slot after anything else (an error, a cancelled call, a busy model). The limit stays as it is."""
        self._limiter._post(self, success=False)
        self._end_outer()

    def dropped(self) -> bool:
        """End the slot after a refusal for too many requests in flight. Halves the limit, once for a burst of refusals.

        Returns:
            Whether other requests are in flight. If so, the queue is the wait, and the caller can call `acquire` at once. If not,
            the caller has to wait before its next attempt.
        """
        self._end_outer()
        return self._limiter._drop(self)

    def _end_outer(self) -> None:
        if self.outer is not None:
            self.outer.release()

    def __del__(self) -> None:
        if not getattr(self, "_over", True):
            self.release()


class Limiter:
    """A queue for slots, whose number adapts to what the service accepts.

    Interactive calls are served before those of batches. Among equal ones the waiter with the lowest ticket is served first, as
    soon as fewer requests are in flight than `limit` and than its own cap.
    Waiters behind it wait even if their caps are higher. After a refusal with other requests in flight, no slot is granted until
    one of those has ended, because the next request would be refused as well. `AdaptiveLimit` decides how many those are, or
    `SharedAllowance` with a shared limit.

    All methods are thread-safe. `limiter_for` returns the limiter that callers share.

    Args:
        check_seconds: Seconds after which a waiter checks whether it was cancelled or interrupted. A signal that arrives just
            before the wait for a lock does not end that wait; on Windows none does.
        adaptive: Makes the limit of a limiter. None: `AdaptiveLimit`.
    """

    def __init__(
        self, *, check_seconds: float = 0.1, adaptive: Callable[[Limiter], AdaptiveLimit] | None = None
    ) -> None:
        self._check_seconds = check_seconds
        self._arrivals = 0
        self._generation = 0
        self._adaptive = adaptive(self) if adaptive else AdaptiveLimit(0)
        self._heap: list[tuple[bool, int, int, Any]] = []  # of a batch, ticket, arrival, waiter
        self._empty()

    def _start_over(self) -> None:
        """Reset everything in a child process. Slots that were granted before belong to the parent process."""
        for *_, waiter in self._heap:
            waiter.gone = True
        self._generation += 1
        self._adaptive = self._adaptive.renewed()
        self._empty()

    def _empty(self) -> None:
        self._lock = threading.Lock()
        # Ended slots and withdrawn waiters, handled by the holder of the lock. The garbage collector can end a slot in a thread
        # that holds the lock at that moment, so that ending a slot must not wait for the lock.
        self._mail: deque[tuple[Slot | Waiter, bool]] = deque()
        self._heap = []
        self._in_flight = 0
        self._waiting = 0
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
        """The number of slots allowed, besides each caller's cap: a whole number, or infinity before the first refusal.

        With a shared limit it is what this process is allowed.
        """
        return self._adaptive.value

    @property
    def waiting(self) -> int:
        """The number of calls in the queue."""
        return self._waiting

    def __repr__(self) -> str:
        return f"<Limiter: {self._in_flight} in flight, limit {self.limit}, {self._waiting} waiting>"

    def is_time_to_warn(self) -> bool:
        """Return whether the last warning about this account and model is more than a minute old.

        If so, the caller logs the next.
        """
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
        priority: Priority | None = None,
    ) -> Slot | None:
        """Wait for a slot.

        Args:
            cap: The most requests that may be in flight when the slot is granted, this one included; 1 or more.
            deadline: Ends the wait; a deadline that has not started never passes.
            cancelled: Ends the wait when it is set; checked every `check_seconds`.
            ticket: The ticket of a dropped slot, to keep its position in the queue.
            priority: Interactive calls go before those of batches. None: what the context says.

        Returns:
            The slot, or None if the deadline passed or `cancelled` was set first. Neither is checked if a slot is free.

        Raises:
            ValueError: When `cap` is below 1.
            CogViewConfigurationError: The store of a shared limit cannot be used.
        """
        is_batch = (priority or PRIORITY.get()) == "batch"
        slot = self._slot_at_once(cap, ticket, is_batch=is_batch)
        if slot is not None:
            return slot
        waiter, granted = ThreadWaiter(cap, self._check_seconds, is_batch=is_batch), False
        try:
            self._queue(waiter, ticket)
            granted = waiter.wait(deadline, cancelled, self.reclaim)
        finally:
            if not granted:
                self._post(waiter)
        if waiter.error is not None:
            raise waiter.error
        return waiter.slot if granted else None

    async def aacquire(
        self,
        cap: int,
        *,
        deadline: Deadline | None = None,
        cancelled: threading.Event | None = None,
        ticket: int | None = None,
        priority: Priority | None = None,
    ) -> Slot | None:
        """Async version of `acquire`. A task that is cancelled leaves the queue.

        Returns:
            As `acquire`.
        """
        is_batch = (priority or PRIORITY.get()) == "batch"
        slot = self._slot_at_once(cap, ticket, is_batch=is_batch)
        if slot is not None:
            return slot
        waiter, granted = TaskWaiter(cap, self._check_seconds, is_batch=is_batch), False
        try:
            self._queue(waiter, ticket)
            granted = await waiter.wait(deadline, partial(self._look, waiter, ticket), cancelled)
        finally:
            if not granted:
                self._post(waiter)
        if waiter.error is not None:
            raise waiter.error
        if granted and waiter.slot is not None:
            waiter.slot.end_after(None)  # the task has received it
        return waiter.slot if granted else None

    def _look(self, waiter: Waiter, ticket: int | None) -> None:
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

    # --- called by a shared limit

    def adjust(self, change: Callable[[], None]) -> None:
        """Call a function with the lock held, then grant the slots that the limit allows."""
        try:
            with self._lock:
                self._read_mail()
                change()
                self._grant()
        finally:
            if self._mail:
                self._settle()

    def refuse(self, error: CogViewConfigurationError) -> None:
        """End the waits of all calls in the queue with an error."""
        try:
            with self._lock:
                self._read_mail()
                for *_, waiter in self._heap:
                    if not waiter.gone:
                        waiter.gone = True
                        self._waiting -= 1
                        waiter.error = copy.copy(error)
                        waiter.wake()
                self._heap = []
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

    def _queue_again(self, waiter: Waiter, ticket: int | None) -> None:
        """Put a waiter back into the queue that was skipped because its event loop seemed abandoned."""
        with self._lock:
            again = waiter.was_skipped and waiter.slot is None
            waiter.was_skipped = False
        if again:
            self._queue(waiter, ticket)

    def _slot_at_once(self, cap: int, ticket: int | None, *, is_batch: bool) -> Slot | None:
        if cap < 1:
            raise ValueError(f"cap is 1 or more, not {cap}: with no slot at all the call would wait for ever.")
        try:
            with self._lock:
                if self._mail:
                    self._read_mail()
                if self._waiting and (is_batch, ticket or math.inf) > self._heap[0][:2]:
                    return None
                if not self._admits(cap):
                    return None
                slot = self._new_slot(cap, ticket or self._next_ticket())
                self._adaptive.changed(self._in_flight, self._waiting, cap)
                return slot
        finally:
            if self._mail:
                self._settle()

    def _queue(self, waiter: Waiter, ticket: int | None) -> None:
        """Put a waiter into the queue. It can be granted a slot before this returns."""
        try:
            with self._lock:
                arrival = self._next_ticket()
                heapq.heappush(self._heap, (waiter.is_batch, ticket or arrival, arrival, waiter))
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

    def _post(self, ended: Slot | Waiter, *, success: bool = False) -> None:
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
        """Stop counting a slot.

        Returns:
            False if it has ended already or belongs to the parent process.
        """
        fresh = not slot._over and slot._generation == self._generation
        slot._over = True
        self._in_flight -= fresh
        self._timed.pop(slot, None)
        return fresh

    def _withdraw(self, waiter: Waiter) -> None:
        if waiter.gone:
            return
        waiter.gone = True
        self._waiting -= 1
        if len(self._heap) > max(_COMPACT_AT, 2 * self._waiting):
            self._heap = [entry for entry in self._heap if not entry[-1].gone]
            heapq.heapify(self._heap)

    def _next_ticket(self) -> int:
        self._arrivals += 1
        return self._arrivals

    def _admits(self, cap: int) -> bool:
        return self._adaptive.admits(self._in_flight, cap)

    def _new_slot(self, cap: int, ticket: int) -> Slot:
        slot = Slot(self, cap, ticket)
        # An interrupt cannot come between these two.
        self._in_flight += 1
        slot._over = False
        return slot

    def _grant(self) -> None:
        self._grant_slots()
        self._adaptive.changed(self._in_flight, self._waiting, self._heap[0][-1].cap if self._heap else math.inf)

    def _grant_slots(self) -> None:
        while self._heap:
            _, ticket, _, waiter = self._heap[0]
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


_LimiterName = tuple[str, str, bytes, int, str | None]
_registry_lock = threading.Lock()
_alive: weakref.WeakValueDictionary[_LimiterName, Limiter] = weakref.WeakValueDictionary()
_recent: OrderedDict[_LimiterName, Limiter] = OrderedDict()


def limiter_for(
    base_url: str, model: str, key: str, shared: SharedLimit | None = None, *, user: str | None = None
) -> Limiter:
    """Return the limiter that all calls of one account and model share in this process.

    A limiter with waiters or slots in use is never forgotten. An unused one is forgotten once a thousand others were asked for
    after it. After a fork, the limiters of the child process start afresh.

    Args:
        base_url: Only its host and port count; for a sandbox, all of it.
        model: The model's name; upper and lower case are the same.
        key: The API key, of which only a hash is kept.
        shared: Where the limit is shared with other processes; None: it is not.
        user: The end user; None for all users together.

    Returns:
        The shared limiter.
    """
    name = (_host(base_url), model.lower(), hashlib.sha256(key.encode()).digest(), id(shared), user)
    with _registry_lock:
        limiter = _alive.get(name)
        if limiter is None:
            limiter = _alive[name] = _new_limiter(name, shared)
        _recent[name] = limiter
        _recent.move_to_end(name)
        if len(_recent) > MAX_LIMITERS:
            _recent.popitem(last=False)
    return limiter


def _new_limiter(name: _LimiterName, shared: SharedLimit | None) -> Limiter:
    if shared is None:
        return Limiter()
    from langchain_cogview.limits.reporter import SharedAllowance  # noqa: PLC0415  on use

    # Other processes and machines make the same name of the same account.
    account = hashlib.sha256("\n".join((name[0], name[1], name[2].hex())).encode()).hexdigest()[:32]
    return Limiter(adaptive=partial(SharedAllowance, shared, account))


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
