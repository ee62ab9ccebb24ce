"""How the requests that an account may have in flight are divided among processes: a pure function.

Every process reports what it uses (`LimitUsage`), and the answer is how many it may use (`LimitShare`). Reports are states, so
that a lost or repeated one does no harm, and a store that was emptied is filled again by the next reports. What a store keeps for
an account is one JSON value, a *page*, which `allocate` takes and returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Final

from langchain_cogview.limits.adaptive import AdaptiveLimit

LEASE_SECONDS: Final = 5.0
"""A process that has not reported for this long is taken for dead. Its slots are not given away earlier, because the service may
still be working for it."""
SETTLE_SECONDS: Final = 2.0
"""In the first seconds of an empty page nobody gets more than it uses, or 1: others may not have reported yet."""
_MAX_SUCCESSES: Final = 1000
_LARGEST: Final = 2**53


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
    for name, each in list(members.items()):
        each.seen = min(each.seen, now)  # a clock that was set back
        if now - each.seen > LEASE_SECONDS:
            del members[name]
    me = _entered(members, usage, now)
    cap = min((each.cap for each in members.values() if each.demand), default=me.cap)
    _learn(limit, members, me, usage, cap)
    total = int(min(limit.value, cap))
    fair = _fair_share(members, usage.member, total)
    free = total - sum(each.held for name, each in members.items() if name != usage.member)
    target = max(0, min(fair, free))
    # At most twice as many as before, so that processes that begin together find each other.
    me.allowance = min(target, max(1, me.in_flight if now - born < settle else 2 * me.held))
    wanting = sum(each.demand > each.allowance for each in members.values())
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
        me.served = max(me.served, min((each.served for each in members.values() if each.demand), default=0))
    me.served += max(0, usage.served - me.reported)
    me.reported, me.seen, me.cap = usage.served, now, max(1, usage.cap)
    me.in_flight, me.demand = usage.in_flight, usage.demand
    members[usage.member] = me
    return me


def _learn(limit: AdaptiveLimit, members: dict[str, _Member], me: _Member, usage: LimitUsage, cap: int) -> None:
    """Take the reporter's refusals and successes into account."""
    if usage.refusals > me.refusals:
        epoch = limit.epoch
        in_flight = sum(each.in_flight for each in members.values())
        limit.record_refusal(min(usage.refused_epoch, epoch), cap, in_flight)
        if limit.epoch != epoch:
            for each in members.values():
                each.successes = 0
    me.refusals = usage.refusals
    if usage.epoch != limit.epoch:
        return
    demand = sum(each.demand for each in members.values())
    for _ in range(min(usage.successes - me.successes, _MAX_SUCCESSES)):
        limit.record_success(limit.epoch, cap, demand - 1)
    me.successes = max(me.successes, usage.successes)


def _fair_share(members: dict[str, _Member], member: str, total: int) -> int:
    # The slots that a process would have if nobody held more than its share.
    demands = [each.demand for each in members.values()]
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
    ahead = sum(each.demand > level and (each.served, name) < (me.served, member) for name, each in members.items())
    return level + (ahead < left)


def _read(page: Any, now: float) -> tuple[float | None, AdaptiveLimit, dict[str, _Member]]:
    try:
        born, epoch, value, refused_at, successes, step = (_number(each) for each in page["limit"])
        rows = page["members"]
        members = {str(name): _Member(*(_number(each) for each in row)) for name, row in rows.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return None, AdaptiveLimit(0), {}
    limit = AdaptiveLimit(epoch, value or math.inf, refused_at or math.inf, successes, max(1, step))
    return min(born, now), limit, members


def _number(value: Any) -> Any:
    if type(value) not in {int, float} or not 0 <= value < _LARGEST:
        raise ValueError
    return value


def _written(born: float, limit: AdaptiveLimit, members: dict[str, _Member]) -> dict[str, Any]:
    value, refused_at = (0 if math.isinf(each) else int(each) for each in (limit.value, limit.refused_at))
    return {
        "limit": [born, limit.epoch, value, refused_at, limit.successes, min(limit.step, 2**20)],
        "members": {name: [getattr(each, column) for column in _COLUMNS] for name, each in members.items()},
    }
