"""How an account's limit is divided among processes: the function, and the same in Redis."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_cogview.limits import LimitUsage, allocate
from langchain_cogview.limits.allocation import LEASE_SECONDS, SETTLE_SECONDS
from langchain_cogview.limits.redis import PREFIX, SCRIPT, RedisLimit
from tests.unit_tests.limits.servers import RedisServer


class Account:
    """Processes that report to a page, and use the slots that they are allowed."""

    def __init__(self, cap: int, *, settle: float = 0) -> None:
        self.cap = cap
        self.settle = settle
        self.page: object = None
        self.now = 1e6
        self.usages: dict[str, LimitUsage] = {}
        self.allowances: dict[str, int] = {}

    def report(self, name: str, **changes: int) -> int:
        usage = self.usages.get(name) or LimitUsage(name, 0, 0, self.cap)
        self.usages[name] = usage = replace(usage, **changes)
        page, share = allocate(self.page, usage, self.now, settle=self.settle)
        self.page = json.loads(json.dumps(page))
        self.usages[name] = replace(
            usage, epoch=share.epoch, successes=usage.successes if share.epoch == usage.epoch else 0
        )
        self.allowances[name] = share.allowance
        self.share = share
        return share.allowance

    def settled(self, name: str, **changes: int) -> int:
        """Report until the answer stays the same."""
        allowance = self.report(name, **changes)
        while (last := allowance) != (allowance := self.report(name)):
            pass
        return last

    def fill(self, name: str) -> None:
        """Send as many as are allowed."""
        usage = self.usages[name]
        total = usage.in_flight + usage.waiting
        in_flight = max(usage.in_flight, min(self.allowances[name], total))
        self.usages[name] = replace(usage, in_flight=in_flight, waiting=total - in_flight)

    @property
    def in_flight(self) -> int:
        return sum(usage.in_flight for usage in self.usages.values())


def test_one_process_has_the_whole_limit():
    account = Account(5)
    assert account.settled("a", waiting=3) == 3
    assert account.settled("a", waiting=30) == 5


def test_an_allowance_at_most_doubles_so_that_processes_that_begin_together_find_each_other():
    account = Account(40)
    assert [account.report("a", waiting=50) for _ in range(7)] == [1, 2, 4, 8, 16, 32, 40]


def test_what_one_leaves_goes_to_the_others():
    account = Account(10)
    for _ in range(6):
        for name, waiting in {"a": 1, "b": 100, "c": 100}.items():
            account.report(name, waiting=waiting)
    assert account.allowances == {"a": 1, "b": 5, "c": 4}


def test_slots_that_are_held_are_not_promised_to_another():
    account = Account(5)
    account.settled("a", waiting=5)
    account.fill("a")
    account.report("a")
    assert account.report("b", waiting=5) == 0
    account.report("a", in_flight=2, waiting=0)
    assert account.settled("b") == 3


@settings(deadline=None, max_examples=200)
@given(
    cap=st.integers(1, 12),
    reports=st.lists(
        st.tuples(st.sampled_from("abcdef"), st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=60
    ),
)
def test_together_they_never_have_more_than_the_limit(cap, reports):
    account = Account(cap)
    for name, ended, waiting in reports:
        usage = account.usages.get(name)
        in_flight = max(0, (usage.in_flight if usage else 0) - ended)
        account.report(name, in_flight=in_flight, waiting=waiting)
        account.fill(name)
        assert sum(account.allowances.values()) <= cap
        assert account.in_flight <= cap


@pytest.mark.parametrize(("cap", "count"), [(5, 8), (1, 3), (40, 7), (3, 20)])
def test_nobody_starves(cap, count):
    account, served = Account(cap), dict.fromkeys((f"p{number}" for number in range(count)), 0)
    for name in served:
        account.report(name, waiting=10**6)
    order = random.Random(cap)
    for _ in range(60 * count):
        name = order.choice(list(served))
        account.fill(name)
        ended = account.usages[name].in_flight
        served[name] += ended
        account.report(name, in_flight=0, waiting=10**6, served=served[name])
    assert min(served.values()) >= 0.6 * max(served.values())


def test_who_comes_late_is_not_owed_the_past():
    account = Account(1)
    account.report("old", waiting=9, served=1000)
    account.report("new", waiting=9)
    account.fill("old")
    for _ in range(10):
        for name in ("old", "new"):
            account.fill(name)
            usage = account.usages[name]
            account.report(name, in_flight=0, waiting=9, served=usage.served + usage.in_flight)
    assert 3 <= account.usages["new"].served <= 6


def test_the_slots_of_a_dead_process_are_reserved_for_a_while_and_then_shared():
    account = Account(5)
    account.settled("dead", waiting=5)
    account.fill("dead")
    account.report("dead")
    account.now += LEASE_SECONDS
    assert account.report("living", waiting=5) == 0
    account.now += 0.1
    assert account.settled("living") == 5


def test_a_clock_that_was_set_back_or_forward_an_hour_gives_nothing_away_twice():
    account = Account(5)
    for jump in (3600, -7200):
        account.settled("a", waiting=5)
        account.fill("a")
        account.now += jump
        account.report("a")
        assert account.report("b", waiting=5) == 0
        account.report("a", in_flight=0, waiting=0)
        account.report("b", in_flight=0, waiting=0)


def test_the_lower_limit_of_two_apps_holds():
    account = Account(10)
    account.report("a", waiting=20)
    account.report("b", waiting=20, cap=4)
    account.report("a")
    assert account.share.limit == account.share.cap == 4


def test_a_process_that_has_nothing_to_do_limits_nobody():
    account = Account(10)
    account.report("idle", cap=1)
    assert account.settled("a", waiting=20) == 10


def test_an_emptied_page_is_filled_again_by_reports_before_anybody_gets_more():
    account = Account(5, settle=SETTLE_SECONDS)
    account.now += 100
    account.report("a", in_flight=4, waiting=9)
    account.page = None
    assert account.report("newcomer", waiting=9) == 1
    assert account.report("a") <= 4
    account.now += SETTLE_SECONDS
    assert account.in_flight + account.report("newcomer") <= 5


def test_what_one_learns_from_a_refusal_holds_for_all_and_so_does_the_recovery():
    account = Account(10)
    for _ in range(6):
        for name in "ab":
            account.report(name, in_flight=0, waiting=50)
    for name in "ab":
        account.fill(name)
        account.report(name)
    account.report("a", in_flight=5, refusals=1, refused_epoch=0)
    assert account.share.epoch == 1
    account.report("b")
    limit = account.share.limit
    assert limit <= 5
    for _ in range(200):
        account.report("b", successes=account.usages["b"].successes + 1, served=account.usages["b"].served + 1)
    account.report("a")
    assert account.share.limit == 10


def test_a_burst_of_refusals_halves_once_however_often_it_is_reported():
    account = Account(16)
    account.report("a", in_flight=16)
    account.report("b", waiting=5)
    for refusals in (1, 2, 2, 3):
        account.report("a", in_flight=16 - refusals, refusals=refusals, refused_epoch=0)
    assert account.share.limit == 8


@pytest.mark.parametrize(
    "page",
    [
        None, [], {}, "x", 7, {"limit": [], "members": {}}, {"limit": [1, 2, 3, 4, 5, 6], "members": {"a": [1]}},
        {"limit": [0, -1, 0, 0, 0, 1], "members": {}}, {"limit": [0, 0, 0, 0, 0, "1"], "members": {}},
        {"limit": [0, 0, 0, 0, 0, 1], "members": {"a": [1e300] * 9}}, {"limit": [0, 0, 0, 0, 0, True], "members": {}},
        {"limit": [float("nan")] * 6, "members": {}}, {"limit": [0, 0, 0, 0, 0, 1], "members": []},
    ],
)  # fmt: skip
def test_a_page_that_is_none_counts_as_empty(page):
    _, share = allocate(page, LimitUsage("me", 0, 3, 5), 100.0, settle=0)
    assert (share.allowance, share.limit) == (1, 5)


# The same in Redis.


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("redis")
    with RedisServer(tmp_path) as server:
        yield server


def test_redis_gives_the_same_answers(server):
    store = RedisLimit(server.url)
    source = SCRIPT.replace("local time = redis.call('TIME')", "local time = {ARGV[13], 0}")
    assert source != SCRIPT
    script = store._client.register_script(source)
    order = random.Random(1)
    for round_number in range(12):
        store._client.flushall()
        page, now, epochs = None, 1000.0, {}
        counts: dict[str, list[int]] = {}
        cap = order.choice([1, 3, 5, 20])
        for _ in range(150):
            now += order.choice([0, 0.25, 1, 3, 6, -4]) if round_number % 2 else 0.25
            name = f"m{order.randrange(6)}"
            count = counts.setdefault(name, [0, 0, 0])
            count[0] += order.randrange(3)
            count[1] += order.randrange(9)
            count[2] += order.random() < 0.1
            usage = LimitUsage(
                name, order.randrange(8), order.choice([0, 1, 50]), order.choice([cap, cap, cap + 3]), count[0],
                epochs.get(name, 0), count[1], count[2], order.randrange(4),
            )  # fmt: skip
            page, expected = allocate(page, usage, now)
            numbers = (
                usage.in_flight, usage.waiting, usage.cap, usage.served, usage.epoch, usage.successes, usage.refusals,
                usage.refused_epoch, LEASE_SECONDS, SETTLE_SECONDS, 60, now,
            )  # fmt: skip
            answer = script(keys=[PREFIX + "x"], args=[usage.member, *numbers])
            allowance, limit, lowest, epoch, seconds = map(float, answer)
            assert (allowance, limit, lowest, epoch) == (
                expected.allowance,
                expected.limit,
                expected.cap,
                expected.epoch,
            )
            assert seconds == pytest.approx(expected.seconds)
            if epochs.get(name) != expected.epoch:
                epochs[name], count[1] = expected.epoch, 0


def test_no_key_of_the_api_is_in_redis(server):
    store = RedisLimit(server.url)
    store.exchange("0" * 32, LimitUsage("me", 0, 1, 5))
    assert store._client.keys() == [PREFIX + "0" * 32]
