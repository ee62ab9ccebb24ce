"""The part of a shared limit that runs in each process: it reports what the process uses, and takes over how much it may use.

One thread for each store reports for all limiters of the process. Callers never wait for the store: they queue in the limiter of
their process, and a slot is granted when the allowance is raised.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import queue
import random
import threading
import time
import uuid
import weakref
from typing import TYPE_CHECKING, Final, Protocol

from langchain_cogview.errors import CogViewConfigurationError
from langchain_cogview.limits.allocation import LEASE_SECONDS, AdaptiveLimit, LimitShare, LimitUsage

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_cogview.limits import SharedLimit

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS: Final = 1.0
"""The longest time between two reports of a process that uses or wants slots."""
MIN_SECONDS: Final = 0.005
"""The shortest time between two reports of a process."""
ALLOWANCE_SECONDS: Final = LEASE_SECONDS - HEARTBEAT_SECONDS
"""How long an allowance is valid. A process that was stopped longer asks again before it sends another request."""
_FIRST_PAUSE: Final = 0.25
_LONGEST_PAUSE: Final = 2.0
_FIRST_TRY: Final = 1.0
_LONGEST_TRY: Final = 30.0
_WARN_SECONDS: Final = 60.0


class LimiterView(Protocol):
    """What a `SharedAllowance` needs of the limiter that it belongs to."""

    def adjust(self, change: Callable[[], None]) -> None:
        """Call a function with the lock of the limiter held, then grant the slots that its limit allows."""

    def refuse(self, error: CogViewConfigurationError) -> None:
        """End the waits of all calls in the queue with an error."""


class SharedAllowance(AdaptiveLimit):
    """The limit of one account and model in this process: as many requests as the store allows it.

    The limiter calls its methods with its lock held; the reporter takes that lock by `LimiterView.adjust`.

    While the store cannot be reached, the process keeps as many requests in flight as it has. If it has none, it tries one after
    a while, and later each time that one is refused.

    Args:
        store: The store.
        account: The account and model, as a hash.
        limiter: The limiter that it belongs to.
    """

    def __init__(self, store: SharedLimit, account: str, limiter: LimiterView) -> None:
        super().__init__(0, 0)
        self._store = store
        self._account = account
        self._limiter = weakref.ref(limiter)
        self._member = uuid.uuid4().hex
        self._reporter = _reporter_of(store)
        self.due: float = math.inf
        """When the next report is due, on the monotonic clock. Only the reporter writes it."""
        self._in_flight = self._waiting = self._served = self._refusals = 0
        self._cap: float = math.inf
        self._refused_epoch = -1
        self._reported = LimitUsage(self._member, 0, 0, 1)
        self._share: LimitShare | None = None
        self._is_dirty = False
        self._valid_until: float = -math.inf
        self._reported_at: float = -math.inf
        self._outage = 0  # failed reports in a row
        self._tries = 0
        self._try_at: float = math.inf
        self._warned_at: float = -math.inf

    # --- called by the limiter, with its lock held

    def admits(self, in_flight: int, cap: int) -> bool:
        """Decide about one more request.

        Returns:
            Whether it may be sent: within the allowance, which is valid for some seconds only.
        """
        return super().admits(in_flight, cap) and time.monotonic() < self._valid_until

    def record_success(self, epoch: int, cap: int, in_flight: int) -> None:
        """Count an answer, for the next report."""
        self._served += 1
        self._tries = 0
        self.successes += epoch == self.epoch

    def record_refusal(self, epoch: int, cap: int, in_flight: int) -> None:
        """Count a refusal for the next report, and send no more until the store has answered."""
        self.value = min(self.value, in_flight)
        if not self._outage:  # a refusal during an outage tells nothing of the account's limit
            self._refusals += 1
            self._refused_epoch = epoch

    def changed(self, in_flight: int, waiting: int, cap: float) -> None:
        """Wake the reporter if what has changed matters to the store."""
        self._in_flight, self._waiting = in_flight, waiting
        self._cap = min(self._cap, cap)
        reported, demand = self._reported, in_flight + waiting
        matters = (
            (demand > reported.in_flight + reported.waiting and demand > self.value)
            or (demand < self.value)
            or (in_flight < reported.in_flight and reported.in_flight > self.value)
            or self._refusals > reported.refusals
        )
        if matters and not self._is_dirty:
            self._is_dirty = True
            self._reporter.wake(self)

    def renewed(self) -> SharedAllowance:
        """Make the limit to start with in a child process, which reports for itself.

        Returns:
            A limit that reports under a new name.
        """
        limiter = self._limiter()
        assert limiter is not None  # noqa: S101  it is the caller
        return SharedAllowance(self._store, self._account, limiter)

    # --- called by the reporter

    def schedule(self, now: float) -> None:
        """Set the time of the next report after a change that matters."""
        if not self._outage:
            self.due = min(self.due, max(now, self._reported_at + MIN_SECONDS))

    def report(self) -> None:
        """Send one report, and take over what the store answers."""
        limiter = self._limiter()
        if limiter is None:
            self.due = math.inf
            return
        limiter.adjust(self._note_usage)
        usage, now = self._reported, time.monotonic()
        try:
            share = self._store.exchange(self._account, usage)
            limiter.adjust(lambda: self._apply(share, now))
        except CogViewConfigurationError as error:
            if self._share is None:
                self.due = math.inf
                limiter.adjust(self._forget)  # the next call asks again
                limiter.refuse(error)
                return
            self._begin_outage(limiter, error)
        except Exception as error:  # noqa: BLE001  whatever a store raises or returns: calls go on without it
            self._begin_outage(limiter, error)
        else:
            self._say_what_was_learned(usage)

    def leave(self) -> None:
        """Give everything back, at the end of the process."""
        if self._share is not None and self._reported.in_flight + self._reported.waiting + self._share.allowance:
            self._store.exchange(
                self._account, LimitUsage(self._member, 0, 0, self._reported.cap, self._served, self.epoch)
            )

    def _note_usage(self) -> None:
        self._is_dirty = False
        cap = self._reported.cap if math.isinf(self._cap) else int(self._cap)
        self._reported = LimitUsage(
            self._member,
            self._in_flight,
            self._waiting,
            cap,
            self._served,
            self.epoch,
            self.successes,
            self._refusals,
            self._refused_epoch,
        )
        if not self._in_flight + self._waiting:
            self._cap = math.inf

    def _forget(self) -> None:
        self._reported = LimitUsage(self._member, 0, 0, 1, refusals=self._refusals)

    def _apply(self, answer: LimitShare, asked_at: float) -> None:
        # Converted first: a store of somebody else's can answer anything.
        allowance, limit, cap, epoch = map(int, (answer.allowance, answer.limit, answer.cap, answer.epoch))
        share = LimitShare(allowance, limit, cap, epoch, max(float(answer.seconds), MIN_SECONDS))
        if share.epoch != self.epoch:
            self.epoch, self.successes = share.epoch, 0
        refused = self._refusals > self._reported.refusals
        self.value = min(share.allowance, self._in_flight) if refused else share.allowance
        self._share, self._valid_until = share, asked_at + ALLOWANCE_SECONDS
        self._reported_at = time.monotonic()
        self._outage, self._try_at = 0, math.inf
        if self._reported.demand > share.allowance or self._is_dirty:
            self.due = self._reported_at + (MIN_SECONDS if self._is_dirty else share.seconds)
        else:
            self.due = self._reported_at + HEARTBEAT_SECONDS if self._reported.demand or share.allowance else math.inf

    def _begin_outage(self, limiter: LimiterView, error: Exception) -> None:
        now = time.monotonic()
        limiter.adjust(lambda: self._go_on_alone(now))
        pause = min(_FIRST_PAUSE * 2 ** min(self._outage - 1, 10), _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
        self.due = min(now + pause, self._try_at) if self._reported.demand else math.inf
        if self._reported.demand and now - self._warned_at > _WARN_SECONDS:
            self._warned_at = now
            logger.warning(
                "%r is not available (%s). Until it is, this process keeps the %s requests in flight that it has, or 1.",
                self._store,
                error,
                self._in_flight,
            )

    def _go_on_alone(self, now: float) -> None:
        self._is_dirty = False
        if not self._outage:
            self.value = self._in_flight
        self._outage += 1
        self._valid_until = math.inf
        if self._in_flight or not self._waiting:
            self._try_at = math.inf
        elif math.isinf(self._try_at):
            self.value = 0
            longest = min(_FIRST_TRY * 2 ** min(self._tries, 10), _LONGEST_TRY)
            self._tries += 1
            self._try_at = now + random.uniform(longest, 2 * longest)
        elif now >= self._try_at:
            self._try_at = math.inf
            self.value = 1

    def _say_what_was_learned(self, usage: LimitUsage) -> None:
        share, now = self._share, time.monotonic()
        if share is not None and share.cap < usage.cap and now - self._warned_at > _WARN_SECONDS:
            self._warned_at = now
            logger.warning(
                "max_concurrency is %s here, and %s in another process that shares the limit of this account: "
                "the lower one holds for all.",
                usage.cap,
                share.cap,
            )


class _Reporter:
    """The thread of one store in this process. It is started by the first change that matters."""

    def __init__(self, store: SharedLimit) -> None:
        self._store = store
        self.process = os.getpid()
        self._allowances: weakref.WeakSet[SharedAllowance] = weakref.WeakSet()
        # This queue can be put into from anywhere, also from a finalizer that interrupts another `put`.
        self._changed: queue.SimpleQueue[SharedAllowance] = queue.SimpleQueue()
        self._is_started = False

    def wake(self, allowance: SharedAllowance) -> None:
        self._changed.put(allowance)
        if not self._is_started:
            self._is_started = True
            threading.Thread(target=self._run, name="cogview-shared-limit", daemon=True).start()
            atexit.register(self._leave)

    def _run(self) -> None:
        while True:
            due = min((item.due for item in list(self._allowances)), default=math.inf)
            try:
                timeout = None if math.isinf(due) else max(0.0, due - time.monotonic())
                allowance = self._changed.get(timeout=timeout) if timeout != 0.0 else self._changed.get_nowait()
            except queue.Empty:
                pass
            else:
                self._allowances.add(allowance)
                allowance.schedule(time.monotonic())
                del allowance
            now = time.monotonic()
            for item in list(self._allowances):
                if item.due <= now:
                    item.report()

    def _leave(self) -> None:
        if self.process != os.getpid():
            return
        for item in list(self._allowances):
            try:
                item.leave()
            except Exception:  # noqa: BLE001  the store forgets this process by itself
                return


_reporters: Final[dict[int, _Reporter]] = {}


def _reporter_of(store: SharedLimit) -> _Reporter:
    reporter = _reporters.get(id(store))
    if reporter is None or reporter.process != os.getpid():
        reporter = _reporters[id(store)] = _Reporter(store)
    return reporter
