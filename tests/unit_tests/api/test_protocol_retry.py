"""What is sent again, and when."""

import math
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_cogview import errors as e
from langchain_cogview.api.client import RetryPolicy
from langchain_cogview.api.protocol import Fault, Phase, parse_retry_after, transport_error
from langchain_cogview.errors import Outcome


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("phase", Phase)
def test_nothing_that_may_have_been_received_is_sent_again(fault, phase):
    error = transport_error(fault, phase, detail="x")
    assert isinstance(error, e.CogViewError)
    if phase is Phase.SENT and fault is not Fault.SETTINGS:
        assert error.outcome is Outcome.UNKNOWN
        assert not RetryPolicy().sends_again(error)
        assert RetryPolicy(retry_unknown=True).sends_again(error)


def test_what_provably_did_not_run_is_sent_again():
    policy = RetryPolicy()
    for error in (e.CogViewRateLimitError(), e.CogViewBusyError(), e.CogViewServerError(), e.CogViewConnectionError()):
        assert policy.sends_again(error)
    for error in (
        e.CogViewBalanceError(),
        e.CogViewAuthenticationError(),
        e.CogViewContentFilterError(),
        e.CogViewTimeoutError(),
        ValueError(),
    ):
        assert not policy.sends_again(error)
    assert not policy.sends_again(transport_error(Fault.UNTRUSTED, Phase.CONNECTING))


def test_waits_are_jittered_grow_and_are_bounded():
    policy = RetryPolicy()
    for error, first in ((e.CogViewConnectionError(), 1), (e.CogViewRateLimitError(), 2), (e.CogViewBusyError(), 5)):
        for attempt in range(1, 12):
            waits = [policy.wait(error, attempt) for _ in range(200)]
            bound = min(first * 2 ** (attempt - 1), 60)
            assert 0 <= min(waits) < bound / 4 < bound * 3 / 4 < max(waits) <= bound


def test_the_services_wish_goes_before_the_jitter():
    error = e.CogViewRateLimitError()
    error.retry_after = 7.0
    assert RetryPolicy().wait(error, 1) == 7.0
    error.retry_after = 1e9
    assert RetryPolicy().wait(error, 1) == math.inf


def test_retry_after_is_seconds_or_a_date():
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert parse_retry_after("3") == 3.0
    assert parse_retry_after(" 1.5 ") == 1.5
    assert parse_retry_after(format_datetime(now + timedelta(seconds=90), usegmt=True), now=now) == 90.0
    assert parse_retry_after(format_datetime(now - timedelta(days=9), usegmt=True), now=now) == 0.0
    assert parse_retry_after("9" * 400) == math.inf
    for nothing in (None, "", "-1", "soon", "nan", "inf", "1e3", "0x10", "٣", "9" * 5000):
        assert parse_retry_after(nothing) is None


@given(
    st.text(max_size=60)
    | st.from_regex(r"[A-Z][a-z]{2}, \d{1,4} [A-Z][a-z]{2} \d{1,9} \d\d:\d\d:\d\d [A-Z]{1,4}[+-]?\d{0,9}")
)
def test_any_retry_after_is_a_wait_or_nothing(text):
    wait = parse_retry_after(text)
    assert wait is None or wait >= 0
