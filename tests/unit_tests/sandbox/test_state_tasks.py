"""What a user relies on: the sandbox speaks the task endpoint, from the POST that is answered at once to the image."""

from __future__ import annotations

import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_cogview.catalog import MODELS
from langchain_cogview.images.formats import inspect
from langchain_cogview.sandbox import Sandbox, SandboxServer
from langchain_cogview.sandbox import state as state_module
from langchain_cogview.sandbox.service import SandboxTransport
from langchain_cogview.sandbox.state import LINK_LIFETIME
from tests.unit_tests.sandbox import calls
from tests.unit_tests.sandbox.calls import API, AUTHORIZED, KEY, ROUTE, TASKS, error_of, fetch, recorded

BODY = {"model": "glm-image", "prompt": "a kitten"}


class Clock:
    """A clock that stands still until a test moves it on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sandbox(clock):
    with Sandbox(latency=10, clock=clock) as sandbox:
        yield sandbox


def post(sandbox, prompt="a kitten", **fields):
    return calls.post(sandbox, prompt, **{"route": TASKS, "model": "glm-image", **fields})


def submit(sandbox, prompt="a kitten", **fields):
    """The id of a new task."""
    reply = post(sandbox, prompt, **fields)
    assert (reply.status, reply.delay) == (200, 0), "a task's POST is answered at once"
    return json.loads(reply.body)["id"]


def poll(sandbox, identity, *, headers=AUTHORIZED, origin="https://any.example"):
    return sandbox.reply("GET", f"{API}/async-result/{identity}", headers, origin=origin)


def state(sandbox, identity):
    reply = poll(sandbox, identity)
    assert (reply.status, reply.delay) == (200, 0)
    return json.loads(reply.body)


def status(sandbox, identity):
    return state(sandbox, identity)["task_status"]


def image_of(sandbox, reply):
    """The download of the image of a task that succeeded."""
    return fetch(sandbox, reply["image_result"][0]["url"])


# From the POST to the image


def test_a_task_goes_from_its_post_to_its_image(sandbox, clock):
    submitted = json.loads(post(sandbox, "a heron", request_id="mine", size="1568x1056").body)
    assert set(submitted) == set(recorded("doc-task-submitted"))
    assert submitted == {**submitted, "model": "glm-image", "request_id": "mine", "task_status": "PROCESSING"}

    clock.now += 9.9
    processing = state(sandbox, submitted["id"])
    assert processing == {"model": "glm-image", "request_id": "mine", "task_status": "PROCESSING"}

    clock.now += 0.1
    done = json.loads(poll(sandbox, submitted["id"], origin="http://127.0.0.1:1").body)
    assert set(done) == set(recorded("doc-task-success"))
    assert (done["model"], done["request_id"], done["task_status"]) == ("glm-image", "mine", "SUCCESS")
    assert done["image_result"][0]["url"].startswith("http://127.0.0.1:1/files/")
    info = inspect(io.BytesIO(image_of(sandbox, done).body))
    assert (info.width, info.height) == (1568, 1056)
    assert state(sandbox, submitted["id"])["task_status"] == "SUCCESS", "a later poll gets the same"


def test_without_latency_the_first_poll_finds_the_image():
    sandbox = Sandbox()
    assert status(sandbox, submit(sandbox)) == "SUCCESS"


def test_a_task_that_fails_makes_and_charges_nothing(sandbox, clock):
    identity = submit(sandbox, "[[task-fail]]", request_id="mine")
    assert status(sandbox, identity) == "PROCESSING"
    clock.now += 10
    reply = state(sandbox, identity)
    assert set(reply) == set(recorded("doc-task-fail"))
    assert reply == {"model": "glm-image", "request_id": "mine", "task_status": "FAIL"}
    assert (sandbox.images_made, sandbox.ledger) == (0, [])


@pytest.mark.parametrize(
    ("trigger", "expected"), [("[[task-polls]]", 1), ("[[task-polls:2]]", 2), ("[[task-polls:0]]", 0)]
)
def test_a_task_is_processing_for_as_many_polls_as_requested(trigger, expected):
    sandbox = Sandbox()
    identity = submit(sandbox, trigger)
    assert [status(sandbox, identity) for _ in range(4)] == ["PROCESSING"] * expected + ["SUCCESS"] * (4 - expected)


def test_after_the_requested_polls_the_clock_decides(sandbox, clock):
    identity = submit(sandbox, "[[task-polls:2]]")
    assert [status(sandbox, identity) for _ in range(3)] == ["PROCESSING"] * 3
    clock.now += 10
    assert status(sandbox, identity) == "SUCCESS"
    late = submit(sandbox, "[[task-polls:2]]")
    clock.now += 1000
    assert [status(sandbox, late) for _ in range(3)] == ["PROCESSING", "PROCESSING", "SUCCESS"]


def test_a_slow_task_is_answered_at_once_and_ends_later(sandbox, clock):
    identity = submit(sandbox, "[[slow:5]]")
    clock.now += 14.9
    assert status(sandbox, identity) == "PROCESSING"
    clock.now += 0.1
    assert status(sandbox, identity) == "SUCCESS"


def test_tasks_end_in_the_order_in_which_they_are_due(sandbox, clock):
    slow, quick = submit(sandbox, "[[slow:20]]"), submit(sandbox)
    clock.now += 10
    assert (status(sandbox, slow), status(sandbox, quick)) == ("PROCESSING", "SUCCESS")


# Faults


@pytest.mark.parametrize(("trigger", "level"), [("[[flagged]]", 3), ("[[flagged:1]]", 1)])
def test_a_flagged_task_has_its_filter_entries_with_the_image(sandbox, clock, trigger, level):
    identity = submit(sandbox, trigger)
    assert "content_filter" not in state(sandbox, identity)
    clock.now += 10
    reply = state(sandbox, identity)
    assert reply["content_filter"] == [{"role": "assistant", "level": level}]
    assert image_of(sandbox, reply).status == 200


def test_links_of_tasks_can_be_late_or_expired():
    sandbox = Sandbox()
    late = state(sandbox, submit(sandbox, "[[not-yet]]"))
    assert [image_of(sandbox, late).status for _ in range(2)] == [404, 200]
    assert image_of(sandbox, state(sandbox, submit(sandbox, "[[expired-url]]"))).status == 403


def test_the_link_of_a_long_task_is_valid_from_its_end():
    sandbox = Sandbox(latency=3600, clock=(clock := Clock()))
    before = int(time.time())
    identity = submit(sandbox)
    clock.now += 3600
    expires = int(httpx.URL(state(sandbox, identity)["image_result"][0]["url"]).params["Expires"])
    assert expires >= before + 3600 + LINK_LIFETIME


def test_a_malformed_reply_leaves_a_charged_task_behind(sandbox):
    reply = post(sandbox, "[[malformed]]", request_id="mine")
    with pytest.raises(ValueError):
        json.loads(reply.body)
    (image,) = sandbox.ledger
    assert (image.request_id, sandbox.in_flight) == ("mine", 1)
    assert status(sandbox, image.task_id) == "PROCESSING"


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        ("[[content-filter]]", (400, "1301")),
        ("[[rate-limit]]", (429, "1302")),
        ("[[busy]]", (429, "1305")),
        ("[[balance]]", (429, "1113")),
        ("[[auth]]", (401, "1000")),
        ("[[server-error]]", (500, "1234")),
    ],
)
def test_refusals_come_at_the_post(sandbox, trigger, expected):
    assert error_of(post(sandbox, trigger)) == expected
    assert (sandbox.images_made, sandbox.in_flight) == (0, 0)


def test_attempts_are_counted_over_both_endpoints(sandbox):
    prompt = "[[rate-limit:2]]"
    sync = json.dumps({**BODY, "prompt": prompt, "request_id": "one"}).encode()
    assert sandbox.reply("POST", ROUTE, AUTHORIZED, sync).status == 429
    assert [post(sandbox, prompt, request_id="one").status for _ in range(2)] == [429, 200]


def test_fail_next_acts_on_tasks_too():
    sandbox = Sandbox()
    sandbox.fail_next("unavailable", retry_after=1)
    sandbox.fail_next("task-fail")
    sandbox.fail_next("task-polls", polls=1)
    sandbox.fail_next("flagged", level=0)
    assert post(sandbox).headers["retry-after"] == "1"
    assert status(sandbox, submit(sandbox)) == "FAIL"
    assert [status(sandbox, identity) for identity in [submit(sandbox)] * 2] == ["PROCESSING", "SUCCESS"]
    assert state(sandbox, submit(sandbox))["content_filter"] == [{"role": "assistant", "level": 0}]


def test_triggers_of_tasks_have_no_effect_on_the_image_endpoint():
    sandbox = Sandbox()
    body = json.dumps({**BODY, "prompt": "[[task-fail]] [[task-polls:9]]"}).encode()
    assert "data" in json.loads(sandbox.reply("POST", ROUTE, AUTHORIZED, body).body)
    assert sandbox.ledger[0].task_id is None


# Refusals


@pytest.mark.parametrize("model", [name for name in MODELS if MODELS[name].sizes])
def test_only_models_with_tasks_are_accepted(sandbox, model):
    reply = post(sandbox, model=model)
    if MODELS[model].tasks:
        assert reply.status == 200
    else:
        assert error_of(reply) == (400, "1222")
        assert (sandbox.images_made, sandbox.in_flight) == (0, 0)


@pytest.mark.parametrize(
    ("fields", "code"),
    [({"model": "x"}, "1211"), ({"prompt": " "}, "1213"), ({"size": "1x1"}, "1214"), ({"quality": "standard"}, "1214")],
)
def test_the_body_is_checked_like_the_other_endpoints(sandbox, fields, code):
    assert error_of(post(sandbox, **fields)) == (400, code)


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer "}, {"Authorization": KEY}])
def test_both_requests_need_a_bearer_key(sandbox, headers):
    identity = submit(sandbox)
    assert error_of(post(sandbox, headers=headers)) == (401, "1001")
    assert error_of(poll(sandbox, identity, headers=headers)) == (401, "1001")


@pytest.mark.parametrize("identity", ["0" * 32, "x", "%2e%2e", "x?id=1"])
def test_an_unknown_task_is_a_404(sandbox, identity):
    assert error_of(poll(sandbox, identity)) == (404, "1222")


@pytest.mark.parametrize("path", ["/async-result/", "/async-result", "/async-result/a/b"])
def test_other_paths_are_a_wrong_route(sandbox, path):
    reply = sandbox.reply("GET", API + path, AUTHORIZED)
    assert json.loads(reply.body) == recorded("seen-200-wrong-route")


# Slots


def admit(sandbox, prompt="a kitten", route=TASKS):
    return calls.admit(sandbox, prompt, route=route, model="glm-image")


def test_a_task_uses_one_slot_until_it_ends(clock):
    sandbox = Sandbox(latency=10, in_flight_limit=1, clock=clock)
    with admit(sandbox) as first:
        assert (first.status, sandbox.in_flight) == (200, 1), "one image uses one slot, its POST none"
    assert sandbox.in_flight == 1
    for route in (TASKS, ROUTE):
        with admit(sandbox, route=route) as refused:
            assert error_of(refused) == (429, "1302")
            assert sandbox.in_flight == 1
    clock.now += 10
    assert sandbox.in_flight == 0, "a task ends without polls"
    with admit(sandbox) as second:
        assert second.status == 200
    assert sandbox.images_made == 2


def test_an_image_in_flight_leaves_a_task_no_slot(clock):
    sandbox = Sandbox(in_flight_limit=1, clock=clock)
    with admit(sandbox, route=ROUTE) as image, admit(sandbox) as task:
        assert (image.status, task.status) == (200, 429)
    with admit(sandbox) as task:
        assert task.status == 200


def test_a_failed_task_releases_its_slot(clock):
    sandbox = Sandbox(latency=10, in_flight_limit=1, clock=clock)
    submit(sandbox, "[[task-fail]]")
    with admit(sandbox) as refused:
        assert refused.status == 429
    clock.now += 10
    with admit(sandbox) as served:
        assert served.status == 200


@pytest.mark.parametrize("latency", [0, 10])
def test_a_task_that_waits_for_polls_keeps_its_slot_until_the_last(clock, latency):
    sandbox = Sandbox(latency=latency, in_flight_limit=1, clock=clock)
    identity = submit(sandbox, "[[task-polls:2]]")
    clock.now += latency
    assert (status(sandbox, identity), sandbox.in_flight) == ("PROCESSING", 1)
    assert (status(sandbox, identity), sandbox.in_flight) == ("PROCESSING", 0)
    assert (status(sandbox, identity), sandbox.in_flight) == ("SUCCESS", 0)


def test_a_task_that_was_polled_early_keeps_its_slot_until_it_is_due(clock):
    sandbox = Sandbox(latency=10, clock=clock)
    identity = submit(sandbox, "[[task-polls:1]]")
    assert (status(sandbox, identity), sandbox.in_flight) == ("PROCESSING", 1)
    clock.now += 10
    assert sandbox.in_flight == 0


def test_reset_forgets_tasks_and_releases_their_slots(sandbox):
    identity = submit(sandbox)
    poll(sandbox, identity)
    assert (sandbox.in_flight, len(sandbox.polls)) == (1, 1)
    sandbox.reset()
    assert (sandbox.in_flight, sandbox.polls) == (0, [])
    assert poll(sandbox, identity).status == 404


def test_the_number_of_tasks_is_bounded(monkeypatch, clock):
    monkeypatch.setattr(state_module, "MAX_TASKS", 3)
    sandbox = Sandbox(latency=10, clock=clock)
    ids = [submit(sandbox) for _ in range(3)]
    poll(sandbox, ids[0])
    ids += [submit(sandbox) for _ in range(97)]
    assert sandbox.in_flight == 3
    assert [poll(sandbox, identity).status for identity in ids] == [404] * 97 + [200] * 3
    clock.now += 10
    assert sandbox.in_flight == 0
    kept = [submit(sandbox) for _ in range(3)]
    poll(sandbox, kept[0])
    submit(sandbox)
    assert [poll(sandbox, identity).status for identity in kept] == [200, 404, 200], "a polled task is kept"


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from(["submit", "poll", "wait"]), st.integers(0, 9), st.integers(0, 3)), max_size=40)
)
def test_a_task_uses_a_slot_exactly_while_it_is_processing(actions):
    clock = Clock()
    sandbox = Sandbox(clock=clock)
    expected: dict[str, list[float]] = {}  # id: due, polls left
    for action, number, polls in actions:
        if action == "submit":
            identity = submit(sandbox, f"[[slow:{number}]] [[task-polls:{polls}]]")
            expected[identity] = [clock.now + number, polls]
        elif action == "wait":
            clock.now += number
        elif expected:
            identity = list(expected)[number % len(expected)]
            due, left = expected[identity]
            is_processing = left > 0 or clock.now < due
            assert (status(sandbox, identity) == "PROCESSING") is is_processing
            expected[identity][1] = max(0, left - 1)
        assert sandbox.in_flight == sum(left > 0 or clock.now < due for due, left in expected.values())


def test_many_threads_never_hold_more_tasks_than_the_limit(clock):
    sandbox = Sandbox(latency=10, in_flight_limit=3, clock=clock)
    start = threading.Barrier(12)

    def call(_):
        start.wait()
        with admit(sandbox) as reply:
            return reply.status

    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(call, range(12)))
    assert sorted(statuses) == [200] * 3 + [429] * 9
    assert sandbox.in_flight == sandbox.images_made == 3


# Clients


def test_polls_are_recorded_without_the_key(sandbox):
    identity = submit(sandbox)
    poll(sandbox, identity)
    poll(sandbox, "unknown")
    assert [request.path.rsplit("/", 1)[1] for request in sandbox.polls] == [identity, "unknown"]
    assert [request.path for request in sandbox.requests] == [TASKS]
    assert sandbox.downloads == []
    assert KEY not in repr((sandbox.polls, vars(sandbox)))


def sync_get(sandbox, *requests):
    with httpx.Client(
        transport=SandboxTransport(sandbox), headers=AUTHORIZED, base_url="https://any.example"
    ) as client:
        return [client.request(*request[:2], **request[2]) for request in requests]


async def async_get(sandbox, *requests):
    async with httpx.AsyncClient(
        transport=SandboxTransport(sandbox), headers=AUTHORIZED, base_url="https://any.example"
    ) as client:
        return [await client.request(*request[:2], **request[2]) for request in requests]


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_httpx_gets_the_image_of_a_task_in_process(sandbox, clock, way):
    async def call(*request):
        (reply,) = sync_get(sandbox, request) if way == "sync" else await async_get(sandbox, request)
        return reply

    submitted = await call("POST", TASKS, {"json": BODY})
    result = ("GET", f"{API}/async-result/{submitted.json()['id']}", {})
    assert (await call(*result)).json()["task_status"] == "PROCESSING"
    clock.now += 10
    reply = (await call(*result)).json()
    assert (await call("GET", reply["image_result"][0]["url"], {})).headers["content-type"] == "image/png"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["ZhipuAiClient", "ZaiClient"])
def test_zai_sdk_gets_the_image_of_its_task(sandbox, clock, name):
    zai = pytest.importorskip("zai")
    with (
        SandboxServer(sandbox) as server,
        httpx.Client(trust_env=False) as plain,
        getattr(zai, name)(api_key=KEY, base_url=server.base_url, http_client=plain, max_retries=0) as client,
    ):
        submitted = client.images.async_generations(model="glm-image", prompt="a kitten", size="1056x1568")
        assert submitted.task_status == "PROCESSING"
        assert client.images.retrieve_images_result(submitted.id).task_status == "PROCESSING"
        clock.now += 10
        reply = client.images.retrieve_images_result(submitted.id)
        assert (reply.task_status, reply.request_id) == ("SUCCESS", submitted.request_id)
        assert reply.image_result[0].url.startswith(server.origin + "/files/")
        with httpx.Client(trust_env=False) as browser:
            info = inspect(io.BytesIO(browser.get(reply.image_result[0].url).content))
        assert (info.width, info.height) == (1056, 1568)
        with pytest.raises(zai.core.APIStatusError) as raised:
            client.images.retrieve_images_result("unknown")
        assert raised.value.response.status_code == 404
