"""What a user relies on: the sandbox is an account with limits of its own, and its ledger shows what was paid."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from langchain_cogview.sandbox import Sandbox, SandboxImage, service
from langchain_cogview.sandbox.__main__ import main

KEY = "0123456789abcdef0123456789abcdef.0123456789abcdef"
ROUTE = "/api/paas/v4/images/generations"
BODY = {"model": "cogview-4-250304", "prompt": "a kitten"}


@pytest.fixture
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


def admit(sandbox, prompt="a kitten", *, key=KEY, route=ROUTE, **fields):
    body = json.dumps({**BODY, "prompt": prompt, **fields}).encode()
    return sandbox.admit("POST", route, {"Authorization": f"Bearer {key}"}, body)


def status(sandbox, *args, **fields):
    with admit(sandbox, *args, **fields) as reply:
        return reply.status


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
    assert len({picture.request_id for picture in sandbox.ledger}) == sandbox.images_made == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.prompt = "other"


def test_what_was_refused_is_not_in_the_ledger(sandbox):
    for trigger in ("content-filter", "busy", "balance", "auth", "unavailable", "server-error"):
        assert status(sandbox, f"[[{trigger}]]") >= 400
    assert status(sandbox, size="1x1") == status(sandbox, model="x") == 400
    assert sandbox.ledger == []
    assert status(sandbox, "[[malformed]]") == 200
    assert [picture.prompt for picture in sandbox.ledger] == ["[[malformed]]"]


def test_a_prompt_paid_twice_is_in_the_ledger_twice(sandbox):
    status(sandbox, request_id="first")
    status(sandbox, request_id="second")
    assert [(picture.prompt, picture.request_id) for picture in sandbox.ledger] == [
        ("a kitten", "first"),
        ("a kitten", "second"),
    ]


def test_the_ledger_that_was_handed_out_stays_as_it_was(sandbox):
    status(sandbox)
    handed_out = sandbox.ledger
    handed_out.clear()
    assert len(sandbox.ledger) == 1


def test_a_picture_takes_little_memory(monkeypatch):
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


# The limit


def test_each_model_counts_by_itself():
    sandbox = Sandbox(in_flight_limit=1)
    with admit(sandbox) as one, admit(sandbox, model="cogview-4") as other, admit(sandbox) as again:
        assert (one.status, other.status, again.status) == (200, 200, 429)
        assert sandbox.in_flight == 2


def test_a_models_name_counts_without_regard_to_case():
    sandbox = Sandbox(in_flight_limit=1)
    with admit(sandbox), admit(sandbox, model="CogView-4-250304") as again:
        assert again.status == 429


def test_each_key_is_an_account_of_its_own():
    sandbox = Sandbox(in_flight_limit=1)
    with admit(sandbox, key="a") as mine, admit(sandbox, key="b") as yours, admit(sandbox, key="a") as again:
        assert (mine.status, yours.status, again.status) == (200, 200, 429)


def test_a_limit_can_be_given_by_model():
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
        with pytest.raises(ValueError, match="1 or more"):
            sandbox.in_flight_limit = 0
        sandbox.in_flight_limit = None
        assert status(sandbox) == 200


@pytest.mark.parametrize(
    ("limit", "match"),
    [
        (0, "1 or more"),
        (-1, "1 or more"),
        (1.5, "whole number"),
        (True, "whole number"),
        ("5", "whole number"),
        ({"glm-image": 0}, "1 or more"),
        ({"glm-image": None}, "1 or more"),
        ({"dall-e-3": 1}, "does not know: 'dall-e-3'"),
        ({5: 1}, "does not know: 5"),
    ],
)
def test_a_limit_that_cannot_be_is_refused(limit, match):
    with pytest.raises(ValueError, match=match):
        Sandbox(in_flight_limit=limit)


@pytest.mark.parametrize("latency", [-1, float("nan"), float("inf")])
def test_a_latency_that_cannot_be_is_refused(latency):
    with pytest.raises(ValueError, match="latency"):
        Sandbox(latency=latency)


@pytest.fixture
def restless_threads():
    """Threads that give way to each other at nearly every step."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless_threads")
def test_of_those_at_the_same_moment_as_many_are_served_as_are_allowed():
    callers, limit = 16, 5
    for _ in range(30):
        sandbox = Sandbox(in_flight_limit=limit)
        start, asked = threading.Barrier(callers), threading.Barrier(callers)

        def call(_, sandbox=sandbox, start=start, asked=asked):
            start.wait()
            with admit(sandbox) as reply:
                asked.wait()  # nobody leaves before everybody has come
                return reply.status

        with ThreadPoolExecutor(callers) as pool:
            statuses = list(pool.map(call, range(callers)))
        assert sorted(statuses) == [200] * limit + [429] * (callers - limit)
        assert (sandbox.in_flight, sandbox.images_made) == (0, limit)


def test_what_is_refused_takes_nobodys_place():
    sandbox = Sandbox(in_flight_limit=1)
    sandbox.fail_next("busy")
    with (
        admit(sandbox) as forced,
        admit(sandbox, "[[content-filter]]") as blocked,
        admit(sandbox, size="1x1") as wrong,
        admit(sandbox, key=" ") as nobody,
    ):
        assert [reply.status for reply in (forced, blocked, wrong, nobody)] == [429, 400, 400, 401]
        assert sandbox.in_flight == 0
        with admit(sandbox) as served, admit(sandbox) as refused:
            assert (served.status, refused.status, refused.delay) == (200, 429, 0)
            assert sandbox.in_flight == 1


def test_a_refusal_for_the_limit_uses_up_no_attempt():
    sandbox = Sandbox(in_flight_limit=1)
    with admit(sandbox):
        assert status(sandbox, "[[busy:1]]", request_id="mine") == 429
    assert [status(sandbox, "[[busy:1]]", request_id="mine") for _ in range(2)] == [429, 200]


def test_reply_answers_whatever_is_in_flight():
    sandbox = Sandbox(in_flight_limit=1)
    with admit(sandbox):
        body = json.dumps(BODY).encode()
        assert sandbox.reply("POST", ROUTE, {"Authorization": "Bearer any"}, body).status == 200
        assert sandbox.in_flight == 1
    assert sandbox.in_flight == 0


def test_reset_leaves_posts_under_way_in_flight():
    sandbox = Sandbox(in_flight_limit=1)
    with admit(sandbox):
        sandbox.reset()
        assert (sandbox.in_flight, status(sandbox)) == (1, 429)
    assert sandbox.in_flight == 0
    assert not sandbox._posts._taken, "an account that has nothing under way is forgotten"


# The command


def test_the_command_can_be_slow_and_limited():
    command = [sys.executable, "-W", "error", "-m", "langchain_cogview.sandbox", "--port", "0"]
    command += ["--latency", "3600", "--in-flight-limit", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        base_url = next(word for word in process.stdout.readline().split() if word.startswith("http://127.0.0.1:"))
        with httpx.Client(trust_env=False, headers={"Authorization": "Bearer any"}) as client:
            # Tasks, since they are answered at once and are under way all the same.
            url, body = f"{base_url}/async/images/generations", {**BODY, "model": "glm-image"}
            first, second = client.post(url, json=body), client.post(url, json=body)
            told = client.get(f"{base_url}/async-result/{first.json()['id']}").json()
        process.terminate()
        process.communicate(timeout=20)
    assert (first.status_code, second.status_code, told["task_status"]) == (200, 429, "PROCESSING")


@pytest.mark.parametrize("options", [["--latency", "-1"], ["--in-flight-limit", "0"], ["--latency", "soon"]])
def test_the_command_says_in_one_line_that_an_option_is_wrong(options, capsys):
    with pytest.raises(SystemExit) as raised:
        main(options)
    assert raised.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]
