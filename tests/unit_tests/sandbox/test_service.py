"""The sandbox answers like the service, to any request, and under httpx in process."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_cogview.catalog import MODELS
from langchain_cogview.images.formats import inspect
from langchain_cogview.sandbox import Sandbox
from langchain_cogview.sandbox.picture import draw
from langchain_cogview.sandbox.service import SandboxTransport, sandbox_at
from tests.unit_tests.sandbox.calls import AUTHORIZED, BODY, KEY, ROUTE, error_of, get, post, recorded

# Replies


def test_a_success_has_the_recorded_shape(sandbox):
    before = int(time.time())
    reply = post(sandbox, request_id="my-request")
    body = json.loads(reply.body)
    assert reply.status == 200
    assert set(recorded("seen-success-bigmodel-cogview-4")) <= set(body)
    assert set(body) <= set(recorded("seen-success-zai-glm-image"))
    assert before <= body["created"] <= time.time()
    assert (body["request_id"], body["model"]) == ("my-request", "cogview-4-250304")
    url = httpx.URL(body["data"][0]["url"])
    assert (url.scheme, url.host) == ("https", "sandbox.invalid")
    assert 86_399 <= int(url.params["Expires"]) - body["created"] <= 86_400


@pytest.mark.parametrize("model", [name for name in MODELS if MODELS[name].sizes])
def test_every_model_makes_its_default_size(sandbox, model):
    image = get(sandbox, post(sandbox, model=model.upper()))
    assert image.headers["content-type"] == "image/png"
    info = inspect(io.BytesIO(image.body))
    assert f"{info.width}x{info.height}" == MODELS[model].default_size


def test_a_legal_size_is_made(sandbox):
    info = inspect(io.BytesIO(get(sandbox, post(sandbox, size="864x1152", quality="hd", user_id="somebody")).body))
    assert (info.width, info.height) == (864, 1152)


def test_unknown_fields_and_nulls_are_ignored(sandbox):
    assert post(sandbox, seed=1, n=4, size=None, quality=None, user_id=None, request_id=None, steps="x").status == 200


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model": None}, "1211"),
        ({"model": "dall-e-3"}, "1211"),
        ({"model": 4}, "1211"),
        ({"prompt": None}, "1213"),
        ({"prompt": "  \n"}, "1213"),
        ({"prompt": ["a"]}, "1213"),
        ({"model": "glm-image", "prompt": "x" * 1001}, "1261"),
        ({"size": "1024×1024"}, "1214"),
        ({"size": "1024 x 1024"}, "1214"),
        ({"size": "1000x1000"}, "1214"),
        ({"size": "2048x2048"}, "1214"),
        ({"size": "0x0"}, "1214"),
        ({"size": "٥١٢x٥١٢"}, "1214"),
        ({"size": 1024}, "1214"),
        ({"model": "glm-image", "size": "1040x1040"}, "1214"),
        ({"quality": "ultra"}, "1214"),
        ({"quality": ["hd"]}, "1214"),
        ({"model": "glm-image", "quality": "standard"}, "1214"),
        ({"user_id": "short"}, "1210"),
        ({"user_id": "x" * 129}, "1210"),
        ({"user_id": 123456}, "1210"),
    ],
)
def test_a_wrong_argument_gets_the_services_code(sandbox, fields, code):
    assert error_of(post(sandbox, **fields)) == (400, code)
    assert sandbox.images_made == 0


def test_the_longest_prompt_is_accepted(sandbox):
    assert post(sandbox, "x" * 1000, model="glm-image").status == 200
    assert post(sandbox, "x" * 5000).status == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}"]
)
def test_a_body_that_is_not_a_json_object_is_refused(sandbox, body):
    assert error_of(sandbox.reply("POST", ROUTE, AUTHORIZED, body)) == (400, "1210")
    assert sandbox.requests[0].body is None


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(["GET", "POST", "post", "PUT", ""]),
    st.sampled_from(["", ROUTE, "/files/", "//["]),
    st.text(max_size=20),
    st.binary(max_size=50),
)
def test_any_request_gets_a_reply(method, start, rest, body):
    reply = Sandbox().reply(method, start + rest, AUTHORIZED, body)
    assert reply.status in (200, 400, 404)


@given(st.text(max_size=50), st.text(max_size=10))
@settings(deadline=None)
def test_any_prompt_gets_a_reply(prompt, request_id):
    reply = post(Sandbox(), prompt, request_id=request_id)
    assert reply.status == (200 if prompt.strip() else 400)


def test_half_a_surrogate_pair_does_no_harm(sandbox):
    assert post(sandbox, "a \ud83d kitten", request_id="\ud83d").status == 200


@pytest.mark.parametrize("headers", [{}, {"authorization": ""}, {"authorization": "Bearer "}, {"Authorization": KEY}])
def test_without_a_bearer_key_it_answers_401(sandbox, headers):
    assert error_of(post(sandbox, headers=headers)) == (401, recorded("seen-401-1001")["error"]["code"])


def test_a_refused_argument_has_the_recorded_code():
    assert recorded("seen-400-1211")["error"]["code"] == "1211"
    assert recorded("seen-400-1261")["error"] == {"code": "1261", "message": "Prompt exceeds max length"}


@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("POST", "/api/paas/v4/chat/completions"),
        ("POST", "/api/paas/v4/async/chat/completions"),
        ("GET", ROUTE),
        ("GET", "/"),
        ("PUT", "/files/x.png"),
        *(
            ("POST", f"{prefix}{route}")
            for prefix in (
                "",
                "/v4",
                "/api/paas/v5",
                "/api/coding/paas/v4",
                "/x/api/paas/v4",
                "/api/paas/v4/v4",
                "//api/paas/v4",
            )
            for route in ("/images/generations", "/async/images/generations")
        ),
        ("POST", f"{ROUTE}/"),
        ("POST", f"{ROUTE}s"),
        ("POST", f"http://127.0.0.1{ROUTE}"),
        ("GET", "/async-result/x"),
        ("GET", "/x/api/paas/v4/async-result/x"),
    ],
)
def test_a_wrong_route_answers_200_with_the_recorded_body(sandbox, method, route):
    reply = sandbox.reply(method, route, AUTHORIZED, json.dumps(BODY).encode())
    assert (reply.status, json.loads(reply.body)) == (200, recorded("seen-200-wrong-route"))
    assert sandbox.images_made == 0


def test_an_unknown_image_is_the_recorded_404(sandbox):
    reply = sandbox.reply("GET", f"/files/{'0' * 32}.png?Expires=99999999999", {})
    assert (reply.status, json.loads(reply.body)) == (404, recorded("seen-404-cdn-not-yet"))


def test_a_link_with_a_changed_query_is_refused(sandbox):
    url = httpx.URL(json.loads(post(sandbox).body)["data"][0]["url"])
    assert sandbox.reply("GET", url.path, {}).status == 403
    assert sandbox.reply("GET", url.path + "?Expires=99999999999", {}).status == 403


# Names


def test_a_sandbox_is_found_again_by_its_base_url():
    sandbox, other = Sandbox(name="mine"), Sandbox()
    assert sandbox.base_url == "sandbox:mine"
    assert sandbox_at("sandbox:mine") is sandbox
    assert sandbox_at(other.base_url) is other
    with pytest.raises(ValueError, match="exists already"):
        Sandbox(name="mine")


def test_a_sandbox_without_references_is_gone():
    Sandbox(name="short-lived")
    gc.collect()
    with pytest.raises(LookupError, match=r"no sandbox 'sandbox:short-lived'.*keep a reference"):
        sandbox_at("sandbox:short-lived")


def test_the_with_block_ends_a_sandbox():
    with Sandbox(name="block") as sandbox:
        post(sandbox)
        assert sandbox_at("sandbox:block") is sandbox
    with pytest.raises(LookupError):
        sandbox_at("sandbox:block")
    assert sandbox.images_made == 0
    assert Sandbox(name="block") is not sandbox


def test_there_is_one_default_sandbox():
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: sandbox_at("sandbox:"), range(50)))
    assert len(found) == 1
    assert found.pop().base_url == "sandbox:"


@pytest.mark.parametrize("base_url", ["", "sandbox", "https://open.bigmodel.cn", "mine"])
def test_other_base_urls_are_refused(base_url):
    with pytest.raises(LookupError, match="Use 'sandbox:'"):
        sandbox_at(base_url)


@pytest.mark.parametrize("options", [{"name": "a/b"}, {"name": "x" * 101}, {"latency": -1}, {"in_flight_limit": 0}])
def test_an_invalid_option_is_refused(options):
    with pytest.raises(ValueError):
        Sandbox(**options)


# In process, under httpx


def sync_calls(sandbox, *requests, **options):
    with httpx.Client(transport=SandboxTransport(sandbox), headers=AUTHORIZED, **options) as client:
        return [client.request(*request[:2], **request[2]) for request in requests]


def async_calls(sandbox, *requests, **options):
    async def run():
        async with httpx.AsyncClient(transport=SandboxTransport(sandbox), headers=AUTHORIZED, **options) as client:
            return [await client.request(*request[:2], **request[2]) for request in requests]

    return asyncio.run(run())


both = pytest.mark.parametrize("calls", [sync_calls, async_calls])


@both
def test_an_httpx_client_gets_its_image(sandbox, calls):
    (reply,) = calls(sandbox, ("POST", "https://any.example" + ROUTE, {"json": BODY}))
    assert reply.headers["x-cogview-sandbox"] == "1"
    (image,) = calls(sandbox, ("GET", reply.json()["data"][0]["url"], {}))
    assert int(image.headers["content-length"]) == len(image.content)
    assert image.content == draw("a kitten", 1024, 1024)
    assert sandbox.requests[0].headers["authorization"] == "[removed]"


@both
def test_a_reply_later_than_the_read_timeout_is_a_read_timeout(sandbox, calls):
    timeout = httpx.Timeout(30, read=0.02)
    start = time.monotonic()
    with pytest.raises(httpx.ReadTimeout):
        calls(
            sandbox,
            ("POST", "https://any.example" + ROUTE, {"json": {**BODY, "prompt": "[[slow:100]]"}}),
            timeout=timeout,
        )
    assert time.monotonic() - start < 60
    assert (sandbox.images_made, sandbox.in_flight) == (1, 0)


@both
def test_a_delay_is_waited_for(sandbox, calls):
    start = time.monotonic()
    slow = {"json": {**BODY, "prompt": "[[slow:0.05]]"}}
    (reply,) = calls(sandbox, ("POST", "https://any.example" + ROUTE, slow), timeout=None)
    assert reply.status_code == 200
    assert time.monotonic() - start >= 0.05


async def test_a_reply_can_be_read_in_raw_pieces(sandbox):
    async with (
        httpx.AsyncClient(transport=SandboxTransport(sandbox)) as client,
        client.stream("POST", "https://any.example" + ROUTE, json=BODY) as reply,
    ):
        raw = b"".join([piece async for piece in reply.aiter_raw()])
    assert json.loads(raw)["error"]["code"] == "1001"


async def test_a_cancelled_call_releases_its_slot(sandbox):
    async with httpx.AsyncClient(transport=SandboxTransport(sandbox), headers=AUTHORIZED, timeout=None) as client:
        slow = {**BODY, "prompt": "[[slow:60]]"}
        call = asyncio.create_task(client.post("https://any.example" + ROUTE, json=slow))
        while not sandbox.in_flight:
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert sandbox.in_flight == 0
