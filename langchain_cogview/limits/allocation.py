"""How many requests of an account and model may be in flight: learned by `AdaptiveLimit`, and divided by `allocate`.

`AdaptiveLimit` learns the number from successes and refusals (AIMD). `allocate` divides it among processes, as a pure function:
every process reports what it uses (`LimitUsage`), and the answer is how many it may use (`LimitShare`). Reports are states, so
that a lost or repeated one does no harm, and a store that was emptied is filled again by the next reports. What a store keeps
for an account is one JSON value, a *page*, which `allocate` takes and returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Final

PROBE: Final = 10
"""The limit rises this many times slower to the level that was last refused than to any other level."""
MIN_PROBE_SUCCESSES: Final = 30
"""The fewest successes before the limit rises to that level. Without this minimum, an account that accepts one request at a time
would have one request in eleven refused."""
LEASE_SECONDS: Final = 5.0
"""A process that has not reported for this long is considered dead. Its slots are not granted to others earlier, because the
service may still be working for it."""
SETTLE_SECONDS: Final = 2.0
"""In the first seconds of an empty page nobody gets more than it uses, or 1: others may not have reported yet."""
_MAX_SUCCESSES: Final = 1000
_LARGEST: Final = 2**53


class AdaptiveLimit:
    """How many requests may be in flight, as successes and refusals show it. It knows no queue and takes no lock.

    The number is infinite at first, so that only the caps count. The first refusal of a burst halves it, at most to the number of
    requests that are still in flight. Each further refusal of the same burst lowers it to the number that is in flight then, but
    never below 1. It rises after as many successes as its value, counting only requests that were sent after the last refusal
    while all slots were in use: by 1, then by 2, 4 and so on while nothing is refused, but not beyond the level that was last
    refused. The step to that level is 1 and needs ten times as many successes, and at least 30.

    Args:
        epoch: The number of the first epoch. Each burst of refusals starts the next one.
        value: The limit: a whole number of 1 or more, or infinity.
        refused_at: The level that was last refused, or infinity.
        successes: How many successes count towards the next rise.
        step: By how much the limit rises next.
    """

    def __init__(
        self, epoch: int, value: float = math.inf, refused_at: float = math.inf, successes: int = 0, step: int = 1
    ) -> None:
        self.epoch = epoch
        self.value = value
        self.refused_at = refused_at
        self.successes = successes
        self.step = step

    def admits(self, in_flight: int, cap: int) -> bool:
        """Decide about one more request.

        Args:
            in_flight: The number of requests in flight.
            cap: The cap of the caller.

        Returns:
            Whether it may be sent.
        """
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
        self.successes += 1
        probes = self.value + 1 == self.refused_at
        if self.successes < (max(PROBE * self.value, MIN_PROBE_SUCCESSES) if probes else self.value):
            return
        self.successes = 0
        if probes:
            self.value, self.step = self.refused_at, 1
        else:
            below = self.refused_at - 1 if self.value < self.refused_at else math.inf
            self.value = min(self.value + self.step, below, cap)
            self.step *= 2

    def record_refusal(self, epoch: int, cap: int, in_flight: int) -> None:
        """Record a refusal for too many requests in flight; the arguments are those of `record_success`."""
        if epoch == self.epoch:
            self.epoch += 1
            self.value = min(self.value, cap) // 2
            self.refused_at = math.inf
        self.value = max(1, min(self.value, in_flight))
        self.refused_at = min(self.refused_at, in_flight + 1)
        self.successes = 0
        self.step = 1

    def changed(self, in_flight: int, waiting: int, cap: float) -> None:
        """Take notice of a change in the queue. Only a shared limit has to.

        Args:
            in_flight: The number of requests in flight.
            waiting: The number of calls in the queue.
            cap: The cap of the caller that changed it; infinity if it is none.
        """

    def renewed(self) -> AdaptiveLimit:
        """Make the limit to start with in a child process.

        Returns:
            A limit without experience.
        """
        return AdaptiveLimit(self.epoch + 1)


# --- sharing the limit among processes


@dataclass(frozen=True, slots=True)
class LimitUsage:
    """What one process reports of its use of an account and model.

    Attributes:
        member: The process's id, a random text; a child process has its own.
        in_flight: Requests in flight.
        waiting: Calls that wait for a slot.
        cap: The lowest `max_concurrency` of the callers.
        served: Requests answered since the process began to report.
        epoch: The epoch of the last answer.
        successes: How many of the answers count towards a rise of the limit in that epoch.
        refusals: Requests that were refused because too many were in flight, since the process began to report.
        refused_epoch: The epoch in which the last of those was sent.
    """

    member: str
    in_flight: int
    waiting: int
    cap: int
    served: int = 0
    epoch: int = 0
    successes: int = 0
    refusals: int = 0
    refused_epoch: int = -1

    @property
    def demand(self) -> int:
        """How many requests the process would have in flight if it were alone."""
        return min(self.in_flight + self.waiting, max(self.cap, self.in_flight))


@dataclass(frozen=True, slots=True)
class LimitShare:
    """The answer to one report.

    Attributes:
        allowance: How many requests it may have in flight.
        limit: How many all processes together may have in flight.
        cap: The lowest `max_concurrency` of all processes.
        epoch: The number of bursts of refusals so far.
        seconds: When to report again, if more than the allowance is wanted.
    """

    allowance: int
    limit: int
    cap: int
    epoch: int
    seconds: float


@dataclass(slots=True)
class _Member:
    in_flight: int
    demand: int
    allowance: int
    cap: int
    seen: float
    reported: int
    served: int
    successes: int
    refusals: int

    @property
    def held(self) -> int:
        return max(self.in_flight, self.allowance)


_COLUMNS: Final = tuple(field.name for field in fields(_Member))


def allocate(
    page: Any, usage: LimitUsage, now: float, *, settle: float = SETTLE_SECONDS
) -> tuple[dict[str, Any], LimitShare]:
    """Enter one report into a page.

    The limit is the lowest cap, or what refusals and successes of all processes have shown (`AdaptiveLimit`). It is divided by
    max-min fairness in whole slots: nobody gets more than it asks for, what one leaves goes to the others, and slots that cannot
    be divided go to the processes that were served least. A process never gets slots that others still hold, nor more
    than twice as many as before.

    Args:
        page: The page as it was returned last, or read from JSON; anything else counts as an empty page.
        usage: The report.
        now: Seconds on the clock of the store, the same for all processes.
        settle: Seconds in which an empty page is filled; 0 where a page is never lost.

    Returns:
        The new page, and the answer.
    """
    born, limit, members = _read(page, now)
    if born is None:
        born = now
    for name, item in list(members.items()):
        item.seen = min(item.seen, now)  # a clock that was set back
        if now - item.seen > LEASE_SECONDS:
            del members[name]
    me = _entered(members, usage, now)
    cap = min((item.cap for item in members.values() if item.demand), default=me.cap)
    _learn(limit, members, me, usage, cap)
    total = int(min(limit.value, cap))
    fair = _fair_share(members, usage.member, total)
    free = total - sum(item.held for name, item in members.items() if name != usage.member)
    target = max(0, min(fair, free))
    # At most twice as many as before, so that processes that begin together find each other.
    me.allowance = min(target, max(1, me.in_flight if now - born < settle else 2 * me.held))
    wanting = sum(item.demand > item.allowance for item in members.values())
    # Who gets less than its share waits for a slot of another process, and asks more often.
    seconds = min(max(0.002 * wanting, 0.01), 0.5) if target < fair else min(max(0.0125 * wanting, 0.05), 2.0)
    share = LimitShare(me.allowance, total, cap, limit.epoch, seconds)
    return _written(born, limit, members), share


def _entered(members: dict[str, _Member], usage: LimitUsage, now: float) -> _Member:
    # The reporter's entry, made or brought up to date.
    me = members.get(usage.member)
    if me is None:
        me = _Member(0, 0, 0, usage.cap, now, usage.served, 0, 0, usage.refusals)
    if not me.demand and usage.demand:
        # Who comes, or comes back, is not owed the slots of the time when it wanted none.
        me.served = max(me.served, min((item.served for item in members.values() if item.demand), default=0))
    me.served += max(0, usage.served - me.reported)
    me.reported, me.seen, me.cap = usage.served, now, max(1, usage.cap)
    me.in_flight, me.demand = usage.in_flight, usage.demand
    members[usage.member] = me
    return me


def _learn(limit: AdaptiveLimit, members: dict[str, _Member], me: _Member, usage: LimitUsage, cap: int) -> None:
    """Take the reporter's refusals and successes into account."""
    if usage.refusals > me.refusals:
        epoch = limit.epoch
        in_flight = sum(item.in_flight for item in members.values())
        limit.record_refusal(min(usage.refused_epoch, epoch), cap, in_flight)
        if limit.epoch != epoch:
            for item in members.values():
                item.successes = 0
    me.refusals = usage.refusals
    if usage.epoch != limit.epoch:
        return
    demand = sum(item.demand for item in members.values())
    for _ in range(min(usage.successes - me.successes, _MAX_SUCCESSES)):
        limit.record_success(limit.epoch, cap, demand - 1)
    me.successes = max(me.successes, usage.successes)


def _fair_share(members: dict[str, _Member], member: str, total: int) -> int:
    # The slots that a process would have if nobody held more than its share.
    demands = [item.demand for item in members.values()]
    level, above = 0, total + 1  # the highest level at which all fit, found by halving
    while above - level > 1:
        middle = (level + above) // 2
        if sum(min(demand, middle) for demand in demands) <= total:
            level = middle
        else:
            above = middle
    me = members[member]
    if me.demand <= level:
        return me.demand
    left = total - sum(min(demand, level) for demand in demands)
    ahead = sum(item.demand > level and (item.served, name) < (me.served, member) for name, item in members.items())
    return level + (ahead < left)


def _read(page: Any, now: float) -> tuple[float | None, AdaptiveLimit, dict[str, _Member]]:
    try:
        born, epoch, value, refused_at, successes, step = (_number(item) for item in page["limit"])
        rows = page["members"]
        members = {str(name): _Member(*(_number(item) for item in row)) for name, row in rows.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return None, AdaptiveLimit(0), {}
    limit = AdaptiveLimit(epoch, value or math.inf, refused_at or math.inf, successes, max(1, step))
    return min(born, now), limit, members


def _number(value: Any) -> Any:
    if type(value) not in {int, float} or not 0 <= value < _LARGEST:
        raise ValueError
    return value


def _written(born: float, limit: AdaptiveLimit, members: dict[str, _Member]) -> dict[str, Any]:
    value, refused_at = (0 if math.isinf(item) else int(item) for item in (limit.value, limit.refused_at))
    return {
        "limit": [born, limit.epoch, value, refused_at, limit.successes, min(limit.step, 2**20)],
        "members": {name: [getattr(item, column) for column in _COLUMNS] for name, item in members.items()},
    }
