"""Triggers and `fail_next` bring the service's faults, with its codes and shapes."""

from __future__ import annotations

import json
import time

import httpx
import pytest

from langchain_cogview.sandbox import Sandbox, faults
from langchain_cogview.sandbox.faults import parse_triggers
from tests.unit_tests.sandbox.calls import ROUTE, error_of, get, post, recorded


def statuses(sandbox, prompt, times=4, **fields):
    return [post(sandbox, prompt, **fields).status for _ in range(times)]


@pytest.mark.parametrize(
    ("trigger", "status", "fixture"),
    [
        ("[[rate-limit]]", 429, "seen-429-1302-zai"),
        ("[[busy]]", 429, "seen-429-1305"),
        ("[[balance]]", 429, "seen-429-1113-zai"),
        ("[[auth]]", 401, "seen-401-1000"),
        ("[[content-filter]]", 400, "seen-400-1301-content-filter"),
    ],
)
def test_a_refusal_has_the_recorded_shape(sandbox, trigger, status, fixture):
    expected = recorded(fixture)
    reply = post(sandbox, f"a kitten {trigger} on a sofa")
    assert error_of(reply) == (status, expected["error"]["code"])
    body = json.loads(reply.body)
    assert {**body, "error": None} == {**expected, "error": None}
    assert sandbox.images_made == 0


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        ("[[rate-limit]]", [429, 200, 200, 200]),
        ("[[rate-limit:2]]", [429, 429, 200, 200]),
        ("[[busy]]", [429] * 4),
        ("[[busy:1]]", [429, 200, 200, 200]),
        ("[[balance]]", [429] * 4),
        ("[[auth]]", [401] * 4),
        ("[[unavailable]]", [503] * 4),
        ("[[unavailable:1]]", [503, 200, 200, 200]),
        ("[[server-error]]", [500] * 4),
        ("[[server-error:3]]", [500, 500, 500, 200]),
        ("[[content-filter]]", [400] * 4),
        ("[[rate-limit:1]] [[unavailable:2]]", [429, 503, 503, 200]),
        ("[[rate-limit]] [[balance]]", [429, 429, 429, 429]),
        ("[[slow:0]] [[rate-limit:0]]", [200] * 4),
    ],
)
def test_a_trigger_counts_the_attempts_of_one_prompt(sandbox, trigger, expected):
    assert statuses(sandbox, trigger) == expected
    assert statuses(sandbox, f"{trigger} one", request_id="one") == expected
    two = f"{trigger} two"
    assert [post(sandbox, two, request_id=f"attempt {n}").status for n in range(4)] == expected, "whatever its id"
    assert sandbox.images_made == 3 * expected.count(200)


@pytest.mark.parametrize("trigger", ["rate-limit:2", "busy:2", "unavailable:2", "server-error:2"])
def test_the_attempts_of_a_prompt_count_from_zero_after_ten_minutes(trigger):
    now = 0.0
    with Sandbox(clock=lambda: now) as sandbox:
        refused = post(sandbox, f"[[{trigger}]]").status
        for waited, expected in [(599, refused), (599, 200), (599, 200), (601, refused), (1, refused), (1, 200)]:
            now += waited
            assert post(sandbox, f"[[{trigger}]]").status == expected


def test_a_caller_who_retries_the_whole_call_succeeds(generator, sandbox):
    impatient = generator.model_copy(update={"max_retries": 0})
    patient = impatient.with_retry(stop_after_attempt=3, wait_exponential_jitter=False)
    assert patient.invoke("[[busy:2]] a kitten").images
    assert len({request.request_id for request in sandbox.requests}) == 3


def test_other_faults_have_their_codes(sandbox):
    assert error_of(post(sandbox, "[[server-error]]")) == (500, "1234")
    assert post(sandbox, "[[unavailable]]").headers["content-type"] == "text/html"


@pytest.mark.parametrize(
    ("trigger", "entry"),
    [
        ("[[content-filter]]", {"level": 2, "role": "user"}),
        ("[[content-filter:1]]", {"level": 1, "role": "user"}),
        ("[[content-filter:0:assistant]]", {"level": 0, "role": "assistant"}),
    ],
)
def test_the_content_filter_blocks_with_level_and_role(sandbox, trigger, entry):
    assert json.loads(post(sandbox, trigger).body)["contentFilter"] == [entry]


@pytest.mark.parametrize(("trigger", "level"), [("[[flagged]]", 3), ("[[flagged:2]]", 2)])
def test_a_flagged_image_is_made(sandbox, trigger, level):
    reply = post(sandbox, trigger)
    body = json.loads(reply.body)
    assert body["content_filter"] == [{"role": "assistant", "level": level}]
    assert set(recorded("doc-success-with-content-filter")) <= set(body)
    assert get(sandbox, reply).status == 200
    assert sandbox.images_made == 1


def test_a_prompt_asks_for_two_minutes_at_most(sandbox):
    assert [post(sandbox, f"[[slow:{seconds}]]").delay for seconds in (119.5, 120, 121, 9999)] == [119.5, 120, 120, 120]


def test_a_slow_image_has_its_delay_on_the_reply():
    sandbox = Sandbox(latency=0.25)
    assert post(sandbox, "[[slow:3]]").delay == 3.25
    assert post(sandbox, "[[slow]]").delay == 3.25
    assert post(sandbox, "[[slow:0.5]]").delay == 0.75
    assert post(sandbox).delay == 0.25
    assert post(sandbox, "[[busy]]").delay == 0, "a refusal is immediate"


def test_an_expired_link_gives_403(sandbox):
    reply = post(sandbox, "[[expired-url]]")
    assert reply.status == 200
    assert int(httpx.URL(json.loads(reply.body)["data"][0]["url"]).params["Expires"]) < time.time()
    assert get(sandbox, reply).status == 403


@pytest.mark.parametrize(
    ("trigger", "expected"), [("[[not-yet]]", [404, 200, 200]), ("[[not-yet:2]]", [404, 404, 200])]
)
def test_an_image_that_is_not_there_yet_comes_later(sandbox, trigger, expected):
    reply = post(sandbox, trigger)
    gets = [get(sandbox, reply) for _ in range(3)]
    assert [got.status for got in gets] == expected
    assert json.loads(gets[0].body) == recorded("seen-404-cdn-not-yet")


def test_a_malformed_reply_is_charged(sandbox):
    reply = post(sandbox, "[[malformed]]")
    assert reply.status == 200
    with pytest.raises(ValueError):
        json.loads(reply.body)
    assert sandbox.images_made == 1


@pytest.mark.parametrize(
    "word",
    [
        "[[kitten]]",
        "[[status]]",
        "[[slow:fast]]",
        "[[flagged:4]]",
        "[[busy:1.5]]",
        "[[busy:1:user]]",
        "[[ busy ]]",
        "[busy]",
        "[[BALANCE]]",
        "[[balance:1]]",
    ],
)
def test_other_words_in_brackets_are_part_of_the_prompt(sandbox, word):
    reply = post(sandbox, word)
    assert (reply.status, reply.delay) == (200, 0)
    assert "content_filter" not in json.loads(reply.body)


def test_the_table_lists_every_trigger():
    table = {line.split()[0] for line in faults.__doc__.splitlines() if line.startswith("    [[")}
    assert {word.strip("[]").partition(":")[0] for word in table} == set(faults.OPTIONS) - {"status"}
    for word in table:
        assert [fault.name for fault in faults.parse_triggers(word)] == [word.strip("[]").partition(":")[0]]


def test_fail_next_hits_the_next_posts_in_order(sandbox):
    sandbox.fail_next("rate-limit", times=2, retry_after=0)
    sandbox.fail_next("content-filter", level=1, role="assistant")
    sandbox.fail_next("status", status=502, body=b"<html>", headers={"Content-Type": "text/html"})
    first, second, third, fourth, fifth = (post(sandbox) for _ in range(5))
    assert first == second
    assert (first.status, first.headers["retry-after"]) == (429, "0")
    assert json.loads(third.body)["contentFilter"] == [{"level": 1, "role": "assistant"}]
    assert (fourth.status, fourth.body) == (502, b"<html>")
    assert fifth.status == 200
    assert (len(sandbox.requests), sandbox.images_made) == (5, 1)


def test_fail_next_can_spoil_a_success(sandbox):
    for fault, options in [
        ("flagged", {"level": 1}),
        ("slow", {"seconds": 9}),
        ("not-yet", {"gets": 1}),
        ("expired-url", {}),
        ("malformed", {}),
    ]:
        sandbox.fail_next(fault, **options)
    flagged, slow, late, expired, malformed = (post(sandbox) for _ in range(5))
    assert json.loads(flagged.body)["content_filter"] == [{"role": "assistant", "level": 1}]
    assert slow.delay == 9
    assert [get(sandbox, late).status for _ in range(2)] == [404, 200]
    assert get(sandbox, expired).status == 403
    assert not malformed.body.endswith(b"}")
    assert sandbox.images_made == 5


def test_fail_next_hits_a_post_without_key_too_but_no_wrong_route(sandbox):
    sandbox.fail_next("status", status=418)
    post(sandbox, route="/elsewhere")
    assert post(sandbox, headers={}).status == 418


def test_fail_next_refuses_unknown_faults_and_options(sandbox):
    with pytest.raises(ValueError, match=r"Use one of content-filter, .*status"):
        sandbox.fail_next("earthquake")
    with pytest.raises(ValueError, match="no option 'retry_after'"):
        sandbox.fail_next("balance", retry_after=1)
    with pytest.raises(ValueError, match="at least 1"):
        sandbox.fail_next("busy", times=0)
    sandbox.fail_next("busy", times=10**12)
    assert post(sandbox).status == 429


def test_a_fault_takes_a_dict_as_json_and_refuses_invalid_values():
    with Sandbox() as sandbox:
        sandbox.fail_next("status", status=418, body={"error": {"code": "1214"}})
        reply = sandbox.reply("POST", ROUTE, {}, b"{}")
        assert (reply.status, json.loads(reply.body)) == (418, {"error": {"code": "1214"}})
        for fault, options in (
            ("status", {"status": 99}),
            ("status", {"status": "abc"}),
            ("status", {"body": 5}),
            ("status", {"headers": "x"}),
            ("slow", {"seconds": "a"}),
            ("flagged", {"level": 9}),
            ("not-yet", {"gets": -1}),
            ("task-polls", {"polls": 1.5}),
            ("rate-limit", {"retry_after": []}),
        ):
            with pytest.raises(ValueError, match="option"):
                sandbox.fail_next(fault, **options)


def test_a_fault_can_let_posts_pass_first(sandbox, generator):
    with pytest.raises(ValueError, match="after"):
        sandbox.fail_next("busy", after=-1)
    sandbox.fail_next("status", after=1, status=400)
    generator.invoke("one")
    with pytest.raises(ValueError):
        generator.invoke("two")


@pytest.mark.parametrize(
    ("text", "meant"),
    [("[[rate-limt]]", "rate-limit"), ("[[Busy]]", "busy"), ("[[server_error:1]]", "server-error"), ("[[slow:long]]", "slow")],
)  # fmt: skip
def test_a_mistyped_trigger_is_logged_with_the_trigger_that_was_probably_meant(text, meant, caplog):
    assert parse_triggers(f"a fox {text}") == []
    assert f"Did you mean [[{meant}]]?" in caplog.text


@pytest.mark.parametrize("prompt", ["a fox [[busy:1]]", "[[rate-limit]] [[slow]]", "a [[wiki link]] and [[x]]", "[[]]"])
def test_triggers_and_other_texts_in_brackets_are_not_warned_about(prompt, caplog):
    parse_triggers(prompt)
    assert caplog.messages == []
