"""The sandbox records its requests, charges images in a ledger, and limits what is in flight."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from langchain_cogview.sandbox import Sandbox, SandboxImage, service, state
from langchain_cogview.sandbox.service import SandboxTransport
from tests.unit_tests.sandbox.calls import AUTHORIZED, BODY, KEY, ROUTE, TASKS, admit, error_of, get, post, status

# Records


def test_requests_are_recorded_without_the_key(sandbox):
    reply = post(
        sandbox, "a kitten", size="512x512", request_id="abc", headers={**AUTHORIZED, "X-Trace": "1", "Cookie": KEY}
    )
    get(sandbox, reply)
    (request,) = sandbox.requests
    assert (request.method, request.path) == ("POST", ROUTE)
    assert (request.prompt, request.model, request.size, request.request_id) == (
        "a kitten",
        "cogview-4-250304",
        "512x512",
        "abc",
    )
    assert request.headers == {
        "authorization": "[removed]",
        "cookie": "[removed]",
        "content-type": "application/json",
        "x-trace": "1",
    }
    (download,) = sandbox.downloads
    assert download.path.startswith("/files/") and download.prompt is None
    assert KEY not in repr((sandbox, sandbox.requests, vars(sandbox)))


def test_the_number_of_records_is_bounded(monkeypatch):
    monkeypatch.setattr(service, "MAX_REQUESTS", 5)
    monkeypatch.setattr(state, "MAX_IMAGES", 3)
    sandbox = Sandbox()
    replies = [post(sandbox, f"kitten {i} [[rate-limit:0]]") for i in range(8)]
    assert [get(sandbox, reply).status for reply in replies] == [404] * 5 + [200] * 3
    assert [request.prompt[:8] for request in sandbox.requests] == [f"kitten {i}" for i in range(3, 8)]
    assert len(sandbox.downloads) == 5
    assert [image.prompt[:8] for image in sandbox.ledger] == [f"kitten {i}" for i in range(5, 8)]
    assert sandbox.images_made == 8


def test_the_number_of_counted_prompts_is_bounded(monkeypatch):
    monkeypatch.setattr(service, "MAX_REQUESTS", 3)
    sandbox = Sandbox()
    assert [post(sandbox, "one [[rate-limit:2]]").status for _ in range(2)] == [429, 429]
    for i in range(3):
        post(sandbox, f"{i} [[rate-limit:2]]")
    assert post(sandbox, "one [[rate-limit:2]]").status == 429, "the prompt's attempts were dropped and count from zero"
    assert post(sandbox, "2 [[rate-limit:2]]").status == 429


def test_accounts_without_anything_in_flight_and_dropped_tasks_take_no_memory(monkeypatch):
    for module, name in ((service, "MAX_REQUESTS"), (state, "MAX_IMAGES"), (state, "MAX_TASKS")):
        monkeypatch.setattr(module, name, 3)
    sandbox = Sandbox(latency=3600)
    tracemalloc.start()
    try:
        for n in range(1000):
            assert status(sandbox, key=f"key {n}") == 200
            assert status(sandbox, key=f"key {n}", route=TASKS, model="glm-image") == 200
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 60_000
    finally:
        tracemalloc.stop()
    assert sandbox.in_flight == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "x" * 90_000},
        {"prompt": "🐈" * 25_000},
        pytest.param({"other": [[]] * 2_000}, marks=pytest.mark.heavy),
        {"other": [{}] * 2_000},
        pytest.param({"other": list(range(10_000, 13_000))}, marks=pytest.mark.heavy),
        {"other": {f"{n}": n for n in range(2_000)}},
    ],
    ids=["prompt", "wide prompt", "lists", "dicts", "numbers", "names"],
)
def test_the_memory_of_large_requests_is_bounded(monkeypatch, fields):
    monkeypatch.setattr(service, "MAX_REQUESTS_BYTES", 1 << 20)
    monkeypatch.setattr(state, "MAX_LEDGER_BYTES", 1 << 18)
    sandbox = Sandbox()
    tracemalloc.start()
    try:
        for n in range(40):
            body = json.dumps({**BODY, "request_id": f"{n}", **fields}, ensure_ascii=False).encode()
            assert sandbox.reply("POST", ROUTE, AUTHORIZED, body).status == 200
        del body
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 1.4 * 2**20
    finally:
        tracemalloc.stop()
    assert sandbox.images_made == 40
    assert sandbox.ledger[-1].request_id == sandbox.requests[-1].request_id == "39"


def test_the_memory_of_large_headers_is_bounded(monkeypatch, sandbox):
    monkeypatch.setattr(service, "MAX_REQUESTS_BYTES", 1 << 20)
    sandbox.reset()
    for n in range(30):
        for path in (f"/api/paas/v4/async-result/{n}", f"/files/{n}.png"):
            sandbox.reply("GET", path, {**AUTHORIZED, "x-large": f"{n}" * 50_000})
            sandbox.reply("GET", f"{path}?{'x' * 50_000}", AUTHORIZED)
    for kept in (sandbox.polls, sandbox.downloads):
        assert 10 < len(kept) < 25
        assert "29" in kept[-1].path


def test_a_request_that_is_too_long_is_refused_and_not_kept(sandbox):
    reply = post(sandbox, "x" * 1_000_001)
    assert error_of(reply) == (413, "1210")
    assert error_of(post(sandbox, request_id="x" * 129)) == (400, "1210")
    assert (sandbox.images_made, len(sandbox.requests)) == (0, 1)


def test_reset_forgets_everything(sandbox):
    reply = post(sandbox, "[[rate-limit:1]]") and post(sandbox)
    sandbox.fail_next("busy")
    sandbox.reset()
    assert (sandbox.requests, sandbox.downloads, sandbox.ledger, sandbox.images_made) == ([], [], [], 0)
    assert get(sandbox, reply).status == 404
    assert post(sandbox).status == 200
    assert post(sandbox, "[[rate-limit:1]]").status == 429


def test_many_threads_keep_the_ledger_right(sandbox):
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda i: post(sandbox, f"kitten {i}", size="512x512"), range(400)))
        assert {reply.status for reply in pool.map(lambda reply: get(sandbox, reply), replies[:50])} == {200}
    assert sandbox.images_made == len(sandbox.requests) == 400
    assert len({json.loads(reply.body)["id"] for reply in replies}) == 400


# The ledger


def test_the_ledger_lists_what_was_charged(sandbox):
    before = time.time()
    status(sandbox, "one", request_id="mine", size="864x1152")
    status(sandbox, "two", model="GLM-Image")
    status(sandbox, "three", model="glm-image", route="/api/paas/v4/async/images/generations")
    one, two, three = sandbox.ledger
    assert one == SandboxImage("one", "cogview-4-250304", "864x1152", "mine", None, one.charged_at)
    assert (two.prompt, two.model, two.size, two.task_id) == ("two", "glm-image", "1280x1280", None)
    assert three.prompt == "three" and three.task_id == three.request_id
    assert before <= one.charged_at <= two.charged_at <= three.charged_at <= time.time()
    assert len({image.request_id for image in sandbox.ledger}) == sandbox.images_made == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.prompt = "other"


def test_refused_requests_are_not_in_the_ledger(sandbox):
    for trigger in ("content-filter", "busy", "balance", "auth", "unavailable", "server-error"):
        assert status(sandbox, f"[[{trigger}]]") >= 400
    assert status(sandbox, size="1x1") == status(sandbox, model="x") == 400
    assert sandbox.ledger == []
    assert status(sandbox, "[[malformed]]") == 200
    assert [image.prompt for image in sandbox.ledger] == ["[[malformed]]"]


def test_a_prompt_paid_twice_is_in_the_ledger_twice(sandbox):
    status(sandbox, request_id="first")
    status(sandbox, request_id="second")
    assert [(image.prompt, image.request_id) for image in sandbox.ledger] == [
        ("a kitten", "first"),
        ("a kitten", "second"),
    ]


def test_changing_the_list_does_not_change_the_ledger(sandbox):
    status(sandbox)
    sandbox.ledger.clear()
    assert len(sandbox.ledger) == 1


def test_an_entry_of_the_ledger_takes_little_memory(monkeypatch):
    monkeypatch.setattr(service, "MAX_REQUESTS", 1)  # requests have a bound of their own
    sandbox = Sandbox()
    body = [json.dumps({**BODY, "prompt": f"a kitten {i}".ljust(100, ".")}).encode() for i in range(3000)]
    headers = {"Authorization": f"Bearer {KEY}"}
    reply = sandbox.reply("POST", ROUTE, headers, body[0])
    tracemalloc.start()
    try:
        for one in body:
            reply = sandbox.reply("POST", ROUTE, headers, one)
        assert reply.status == 200
        assert tracemalloc.get_traced_memory()[0] / len(body) < 1200
    finally:
        tracemalloc.stop()


def test_a_link_expires(sandbox, monkeypatch):
    reply = post(sandbox)
    monkeypatch.setattr(state, "LINK_LIFETIME", -2)
    assert (get(sandbox, reply).status, get(sandbox, post(sandbox)).status) == (200, 403)


# In flight


def test_one_more_than_the_limit_in_flight_is_refused():
    sandbox = Sandbox(in_flight_limit=2)
    body = json.dumps(BODY).encode()
    with (
        sandbox.admit("POST", ROUTE, AUTHORIZED, body) as first,
        sandbox.admit("POST", ROUTE, AUTHORIZED, body) as second,
    ):
        with sandbox.admit("POST", ROUTE, AUTHORIZED, body) as third:
            assert sandbox.in_flight == 2
            assert error_of(third) == (429, "1302")
        with sandbox.admit("GET", "/files/x.png", {}) as download:
            assert download.status == 404, "a download uses no slot"
    assert first.status == second.status == 200
    with sandbox.admit("POST", ROUTE, AUTHORIZED, body) as later:
        assert later.status == 200
    assert sandbox.in_flight == 0
    assert sandbox.images_made == 3


def test_a_slot_is_released_after_an_error():
    sandbox = Sandbox(in_flight_limit=1)
    with pytest.raises(KeyError), sandbox.admit("POST", ROUTE, AUTHORIZED, b"{}"):
        raise KeyError
    assert sandbox.in_flight == 0


async def test_concurrent_posts_meet_the_limit():
    sandbox = Sandbox(in_flight_limit=3, latency=0.05)
    async with httpx.AsyncClient(transport=SandboxTransport(sandbox), headers=AUTHORIZED) as client:
        replies = await asyncio.gather(*(client.post("https://any.example" + ROUTE, json=BODY) for _ in range(8)))
    assert sorted(reply.status_code for reply in replies) == [200] * 3 + [429] * 5


def test_each_model_has_its_own_slots():
    sandbox = Sandbox(in_flight_limit=1)
    with admit(sandbox) as one, admit(sandbox, model="cogview-4") as other, admit(sandbox) as again:
        assert (one.status, other.status, again.status) == (200, 200, 429)
        assert sandbox.in_flight == 2


def test_a_models_name_counts_without_regard_to_case():
    sandbox = Sandbox(in_flight_limit=1)
    with admit(sandbox), admit(sandbox, model="CogView-4-250304") as again:
        assert again.status == 429


def test_each_key_has_its_own_slots():
    sandbox = Sandbox(in_flight_limit=1)
    with admit(sandbox, key="a") as mine, admit(sandbox, key="b") as yours, admit(sandbox, key="a") as again:
        assert (mine.status, yours.status, again.status) == (200, 200, 429)


def test_a_limit_can_be_set_for_each_model():
    sandbox = Sandbox(in_flight_limit={"CogView-3-Flash": 1, "cogview-4": 2})
    with admit(sandbox, model="cogview-3-flash"), admit(sandbox, model="cogview-4"):
        assert status(sandbox, model="cogview-3-flash") == 429
        assert status(sandbox, model="cogview-4") == 200
        with admit(sandbox, model="cogview-4"):
            assert status(sandbox, model="cogview-4") == 429
        with admit(sandbox), admit(sandbox), admit(sandbox) as third:
            assert third.status == 200, "a model that is not named has no limit"


def test_a_limit_can_be_changed_while_it_works():
    sandbox = Sandbox()
    with admit(sandbox), admit(sandbox):
        sandbox.in_flight_limit = 2
        assert status(sandbox) == 429
        sandbox.in_flight_limit = {"cogview-4-250304": 3}
        assert dict(sandbox.in_flight_limit) == {"cogview-4-250304": 3}
        assert status(sandbox) == 200
        with pytest.raises(ValueError, match="at least 1"):
            sandbox.in_flight_limit = 0
        sandbox.in_flight_limit = None
        assert status(sandbox) == 200


@pytest.mark.parametrize(
    ("limit", "match"),
    [
        (0, "at least 1"),
        (-1, "at least 1"),
        (1.5, "an integer"),
        (True, "an integer"),
        ("5", "an integer"),
        ({"glm-image": 0}, "at least 1"),
        ({"glm-image": None}, "at least 1"),
        ({"dall-e-3": 1}, "unknown model 'dall-e-3'"),
        ({5: 1}, "unknown model 5"),
    ],
)
def test_an_invalid_limit_is_refused(limit, match):
    with pytest.raises(ValueError, match=match):
        Sandbox(in_flight_limit=limit)


@pytest.mark.parametrize("latency", [-1, float("nan"), float("inf")])
def test_an_invalid_latency_is_refused(latency):
    with pytest.raises(ValueError, match="latency"):
        Sandbox(latency=latency)


@pytest.fixture
def restless_threads():
    """Threads that switch after nearly every bytecode."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless_threads")
def test_of_concurrent_posts_exactly_as_many_are_served_as_allowed():
    callers, limit = 16, 5
    for _ in range(30):
        sandbox = Sandbox(in_flight_limit=limit)
        start, asked = threading.Barrier(callers), threading.Barrier(callers)

        def call(_, sandbox=sandbox, start=start, asked=asked):
            start.wait()
            with admit(sandbox) as reply:
                asked.wait()  # no slot is released before all have asked
                return reply.status

        with ThreadPoolExecutor(callers) as pool:
            statuses = list(pool.map(call, range(callers)))
        assert sorted(statuses) == [200] * limit + [429] * (callers - limit)
        assert (sandbox.in_flight, sandbox.images_made) == (0, limit)


def test_a_refused_post_uses_no_slot():
    sandbox = Sandbox(in_flight_limit=1)
    sandbox.fail_next("busy")
    with (
        admit(sandbox) as forced,
        admit(sandbox, "[[content-filter]]") as blocked,
        admit(sandbox, size="1x1") as wrong,
        admit(sandbox, key=" ") as keyless,
    ):
        assert [reply.status for reply in (forced, blocked, wrong, keyless)] == [429, 400, 400, 401]
        assert sandbox.in_flight == 0
        with admit(sandbox) as served, admit(sandbox) as refused:
            assert (served.status, refused.status, refused.delay) == (200, 429, 0)
            assert sandbox.in_flight == 1


def test_a_refusal_for_the_limit_is_no_attempt():
    sandbox = Sandbox(in_flight_limit=1)
    with admit(sandbox):
        assert status(sandbox, "[[busy:1]]", request_id="mine") == 429
    assert [status(sandbox, "[[busy:1]]", request_id="mine") for _ in range(2)] == [429, 200]


def test_reply_has_no_limit():
    sandbox = Sandbox(in_flight_limit=1)
    with admit(sandbox):
        body = json.dumps(BODY).encode()
        assert sandbox.reply("POST", ROUTE, {"Authorization": "Bearer any"}, body).status == 200
        assert sandbox.in_flight == 1
    assert sandbox.in_flight == 0


def test_reset_leaves_posts_in_flight():
    sandbox = Sandbox(in_flight_limit=1)
    with admit(sandbox):
        sandbox.reset()
        assert (sandbox.in_flight, status(sandbox)) == (1, 429)
    assert sandbox.in_flight == 0
