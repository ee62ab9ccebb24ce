"""The limiter in flight: how many requests of one account and model are under way at once, over threads and event loops.

A call takes a slot, sends, and ends the slot by what came back: `done`, `dropped` (1302) or `release` (anything else). First
come, first served. The limiter learns from refusals how many the service accepts, and from successes when to try more.

Of HTTP, and of what is sent, this module knows nothing.
"""
# ruff: noqa: SLF001  a limiter and its slots are one thing in two halves

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
"""Limiters that are remembered while nobody uses them; the one unused for longest is forgotten first."""
POLL: Final = 0.1
"""Seconds between two looks of a waiting thread at whether it was cancelled, by its caller or by an interrupt: one that comes
just before the wait for a lock, and on Windows any, would not end that."""
PROBE: Final = 10
"""How many times slower than elsewhere the limit rises to the level that was last refused."""
FEWEST_BEFORE_PROBE: Final = 30
"""Successes that such a step takes at least: where only one is accepted, one request in eleven would be refused."""
_COMPACT_AT: Final = 64
_LOOK_SECONDS: Final = 0.5
"""Seconds between two looks of a waiting task at whether somebody holds a slot for too long."""
_PICK_UP_SECONDS: Final = 5.0
"""Seconds that a slot is kept for a waiting task whose event loop does not get to it."""
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class Slot:
    """One request's slot in flight. The first of `done`, `dropped` and `release` ends it; the others then change nothing.

    A slot that is dropped without an end (an interrupted thread, a coroutine that is never resumed) leaves by itself.
    One that is held beyond its call's time limit (by an event loop that was abandoned in the middle) is free for others.

    Attributes:
        ticket: The slot in the queue. Given to `acquire` again after a refusal, the call does not lose its turn.
    """

    __slots__ = ("__weakref__", "_cap", "_ends_at", "_epoch", "_limiter", "_over", "ticket")

    def __init__(self, limiter: Limiter, cap: int, ticket: int, epoch: int) -> None:
        self._over = True  # until the limiter has counted it
        self._limiter = limiter
        self._cap = cap
        self._epoch = epoch
        self._ends_at = math.inf
        self.ticket: Final = ticket

    def end_after(self, seconds: float | None) -> None:
        """Say when its call is over at the latest: so many seconds from now, or never.

        Args:
            seconds: None for no limit.
        """
        self._limiter._limit_time(self, seconds)

    def done(self) -> None:
        """End it: the service took the request and answered it. Raises the limiter's limit, slowly."""
        self._limiter._post(self, success=True)

    def release(self) -> None:
        """End it in any other way (an error, a cancelled call, a busy model): nothing is learned."""
        self._limiter._post(self, success=False)

    def dropped(self) -> bool:
        """End it: too many requests were in flight. Halves the limiter's limit, once for a burst of refusals.

        Returns:
            Whether others are in flight: then the queue is the wait, and `acquire` may be called at once. Otherwise the caller
            has to wait by itself before.
        """
        return self._limiter._drop(self)

    def __del__(self) -> None:
        if not getattr(self, "_over", True):
            self.release()


class Limiter:
    """A queue before a number of slots that adapts to what the service accepts.

    The waiter with the lowest ticket goes first, as soon as fewer are in flight than `limit` and than its own cap; those
    behind it wait for it even where their cap is higher. After a refusal with others in flight nobody goes until one of those
    has ended: the same refusal would come at once.

    The limit is unknown at first, so that the caps alone count. The first refusal of a burst halves it, but to no more than what
    is left in flight; each further one of the same burst brings it down to what is left in flight then, never below 1. It
    rises by 1 after as many successes as it is high, each of a request sent since the last refusal and with all slots taken;
    only the step back to the level that was last refused takes ten times as many, and 30 at least.

    All methods may be called from any thread. `limiter_for` gives the one that callers share.
    """

    def __init__(self) -> None:
        self._arrivals = 0
        self._epoch = 0
        self._heap: list[tuple[int, int, Any]] = []  # ticket, arrival, waiter
        self._start_over()

    def _start_over(self) -> None:
        """Forget everything, also the slots that were granted: they are the parent process's."""
        for _, _, waiter in self._heap:
            waiter.gone = True
        self._lock = threading.Lock()
        # Ends and withdrawals, handled by whoever has the lock. The garbage collector can end a slot (a coroutine that is
        # never resumed) in a thread that holds the lock at that moment, so that nobody who ends one may wait for the lock.
        self._mail: deque[tuple[Slot | _Waiter, bool]] = deque()
        self._heap = []
        self._in_flight = 0
        self._waiting = 0
        self._held = False
        self._limit: float = math.inf
        self._refused_at: float = math.inf
        self._successes = 0
        self._epoch += 1
        self._first_epoch = self._epoch
        # Slots with a time limit; with the event loop of one that was granted to a waiting task and not picked up yet.
        self._timed: weakref.WeakKeyDictionary[Slot, asyncio.AbstractEventLoop | None] = weakref.WeakKeyDictionary()
        self._abandoned: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._look_at: float = math.inf

    @property
    def in_flight(self) -> int:
        """Slots that are taken."""
        return self._in_flight

    @property
    def limit(self) -> float:
        """Slots that it allows now, besides each caller's cap: a whole number, or infinity while none was refused."""
        return self._limit

    @property
    def waiting(self) -> int:
        """Calls in the queue."""
        return self._waiting

    def __repr__(self) -> str:
        return f"<Limiter: {self._in_flight} in flight, limit {self._limit}, {self._waiting} waiting>"

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
            cap: What may be in flight at most when the slot is granted, 1 or more.
            deadline: When to wait no longer; one that has not started never passes.
            cancelled: Set when to wait no longer; looked at each 0.1 s.
            ticket: That of a refused slot, to keep its turn.

        Returns:
            The slot; None when the deadline passed or `cancelled` was set before there was one. Where there is one at
            once, neither is looked at.

        Raises:
            ValueError: When `cap` is below 1.
        """
        slot = self._slot_at_once(cap, ticket)
        if slot is not None:
            return slot
        waiter, granted = _ThreadWaiter(cap), False
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
        """Async version of `acquire`; a call that is cancelled leaves the queue."""
        slot = self._slot_at_once(cap, ticket)
        if slot is not None:
            return slot
        waiter, granted = _TaskWaiter(cap), False
        try:
            self._queue(waiter, ticket)
            granted = await waiter.wait(deadline, partial(self._look, waiter, ticket), cancelled)
        finally:
            if not granted:
                self._post(waiter)
        if granted and waiter.slot is not None:
            waiter.slot.end_after(None)  # it was picked up
        return waiter.slot if granted else None

    def _look(self, waiter: _Waiter, ticket: int | None) -> None:
        self.reclaim()
        if waiter.passed_over:
            self._queue_again(waiter, ticket)

    def reclaim(self) -> None:
        """Free the slots that are held beyond their call's time limit, and let those who wait have them."""
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

    # --- what takes the lock

    def _limit_time(self, slot: Slot, seconds: float | None) -> None:
        with self._lock:
            self._set_limit(slot, seconds)
        if self._mail:
            self._settle()

    def _queue_again(self, waiter: _Waiter, ticket: int | None) -> None:
        """Put a waiter that was passed over back into the queue."""
        with self._lock:
            again = waiter.passed_over and waiter.slot is None
            waiter.passed_over = False
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
        """Put a waiter into the queue; it may be granted before this returns."""
        try:
            with self._lock:
                arrival = self._next_ticket()
                heapq.heappush(self._heap, (ticket or arrival, arrival, waiter))
                # Only now: what an interrupt leaves behind before is as good as withdrawn.
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
                    self._learn_refusal(slot, left)
                    self._held = left > 0
                    self._grant()
                return left > 0
        finally:
            if self._mail:
                self._settle()

    def _post(self, ended: Slot | _Waiter, *, success: bool = False) -> None:
        self._mail.append((ended, success))
        self._settle()

    def _settle(self) -> None:
        # Whoever does not get the lock may go: its holder looks at the mail after giving it back.
        while self._mail and self._lock.acquire(blocking=False):
            try:
                self._read_mail()
            finally:
                self._lock.release()

    # --- what is called with the lock held

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
            elif ended.slot is not None:  # granted at the same moment: for the next
                self._end(ended.slot)
            else:
                self._withdraw(ended)
            self._grant()

    def _end(self, slot: Slot, *, success: bool = False) -> None:
        if self._closed(slot):
            if success:
                self._learn_success(slot)
            self._held = False

    def _closed(self, slot: Slot) -> bool:
        """Take a slot out of the count; False when it is over already, or the parent process's."""
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
        return self._in_flight < cap and self._in_flight < self._limit and not self._held

    def _new_slot(self, cap: int, ticket: int) -> Slot:
        slot = Slot(self, cap, ticket, self._epoch)
        # No interrupt comes between these two.
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
                    waiter.passed_over = True
                    continue
                waiter.slot = self._new_slot(waiter.cap, ticket)
                if waiter.wake():
                    if waiter.loop:
                        self._set_limit(waiter.slot, _PICK_UP_SECONDS, waiter.loop)
                else:
                    self._closed(waiter.slot)

    def _learn_success(self, slot: Slot) -> None:
        """Called after the slot was taken out of the count."""
        # What was sent before the last refusal, or with slots left over, does not show that there is room for more.
        if slot._epoch < self._epoch or not self._in_flight + 1 >= self._limit < slot._cap:
            return
        self._successes += 1
        probes = self._limit + 1 == self._refused_at
        if self._successes >= (max(PROBE * self._limit, FEWEST_BEFORE_PROBE) if probes else self._limit):
            self._limit += 1
            self._successes = 0

    def _learn_refusal(self, slot: Slot, left: int) -> None:
        if slot._epoch == self._epoch:
            self._epoch += 1
            self._limit = min(self._limit, slot._cap) // 2
            self._refused_at = math.inf
        self._limit = max(1, min(self._limit, left))
        self._refused_at = min(self._refused_at, left + 1)
        self._successes = 0


class _Waiter(ABC):
    """Somebody who waits. `gone` says that it is not in the queue: not yet, granted, or withdrawn."""

    loop: asyncio.AbstractEventLoop | None = None
    """Of a task that waits."""

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.gone = True
        self.passed_over = False
        self.slot: Slot | None = None

    @abstractmethod
    def wake(self) -> bool:
        """Let it go on; False when it never will."""


class _ThreadWaiter(_Waiter):
    def __init__(self, cap: int) -> None:
        super().__init__(cap)
        self._granted = threading.Lock()
        self._granted.acquire()

    def wake(self) -> bool:
        self._granted.release()
        return True

    def wait(self, deadline: Deadline | None, cancelled: threading.Event | None, look: Callable[[], None]) -> bool:
        """Whether the slot came before the deadline passed or `cancelled` was set; calls `look` now and then."""
        while not (cancelled and cancelled.is_set()) and not (deadline and deadline.passed):
            left = deadline.remaining() if deadline else None
            if self._granted.acquire(timeout=POLL if left is None else min(left, POLL)):
                return True
            look()
        return False


class _TaskWaiter(_Waiter):
    def __init__(self, cap: int) -> None:
        super().__init__(cap)
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
        """Whether the slot came before the deadline passed or `cancelled` was set; calls `look` now and then."""
        timer = self._loop.call_later(_LOOK_SECONDS, self._look, look)
        try:
            if deadline is None and cancelled is None:  # as almost always: a wait with a limit takes four times as long
                await self._granted
                return True
            while not (cancelled and cancelled.is_set()) and not (deadline and deadline.passed):
                left = [] if deadline is None or (rest := deadline.remaining()) is None else [rest]
                # Not `wait_for`: it would cancel the future, on which a grant may be on its way.
                await asyncio.wait([self._granted], timeout=min([*left, POLL] if cancelled else left, default=None))
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
    """The limiter that all calls of one account share in this process.

    A limiter that somebody waits at or has a slot of is never forgotten; what an unused one has learned is, once a
    thousand others were asked for after it. After a fork the child's limiters start afresh.

    Args:
        base_url: Only the host and port count, or all of it for a sandbox.
        model: In any case of letters.
        key: The API key; only a hash of it is kept.
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
