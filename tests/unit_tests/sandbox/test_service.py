"""What a user relies on: the sandbox answers like the service, on the wire and in process, and its ledger is right."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from langchain_cogview.catalog import MODELS
from langchain_cogview.images.formats import inspect
from langchain_cogview.sandbox import Sandbox, SandboxServer, faults, service, state
from langchain_cogview.sandbox.__main__ import main
from langchain_cogview.sandbox.picture import draw
from langchain_cogview.sandbox.service import SandboxTransport, sandbox_at
from tests.conftest import FIXTURES

KEY = "0123456789abcdef0123456789abcdef.0123456789abcdef"
AUTHORIZED = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
ROUTE = "/api/paas/v4/images/generations"
BODY = {"model": "cogview-4-250304", "prompt": "a kitten"}


@pytest.fixture
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


def recorded(name: str):
    return json.loads((FIXTURES / f"{name}.json").read_bytes())


def post(sandbox, prompt="a kitten", *, headers=AUTHORIZED, route=ROUTE, **fields):
    reply = sandbox.reply("POST", route, headers, json.dumps({**BODY, "prompt": prompt, **fields}).encode())
    assert reply.headers["x-cogview-sandbox"] == "1"
    return reply


def get(sandbox, reply):
    url = httpx.URL(json.loads(reply.body)["data"][0]["url"])
    return sandbox.reply("GET", url.raw_path.decode(), {})


def error_of(reply):
    """Status and code, and proof that the body has the recorded shape."""
    body = json.loads(reply.body)
    assert set(body) - {"contentFilter"} == {"error"}
    assert set(body["error"]) == {"code", "message"}
    assert isinstance(body["error"]["code"], str)
    assert body["error"]["message"].isascii() and body["error"]["message"]
    assert reply.headers["content-type"].startswith("application/json")
    return reply.status, body["error"]["code"]


# Pictures


@pytest.mark.parametrize("size", ["1024x1024", "512x512", "1440x720", "720x1440", "2048x512", "528x1328", "1728x960"])
def test_a_picture_decodes_at_the_asked_size(size):
    width, height = map(int, size.split("x"))
    data = draw("a kitten", width, height)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.size == (width, height)
        assert image.mode == "P"
        assert image.text["Source"] == "langchain-cogview sandbox"
        assert image.text["Prompt-SHA256"] == hashlib.sha256(b"a kitten").hexdigest()
    assert inspect(io.BytesIO(data)).mime_type == "image/png"


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=30), st.integers(64, 700), st.integers(64, 700))
def test_any_prompt_and_size_gives_a_whole_picture(prompt, width, height):
    data = draw(prompt, width, height)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.size == (width, height)


def test_the_landscape_does_not_run_into_the_caption():
    for i in range(100):
        with Image.open(io.BytesIO(draw(f"valley {i}", 512, 512))) as image:
            above_and_below_the_word = image.crop((0, 512 - 65, 512, 512 - 50)), image.crop((0, 512 - 15, 512, 512))
            assert [len(strip.getcolors()) for strip in above_and_below_the_word] == [1, 1]


@pytest.mark.parametrize("size", [(63, 64), (64, 4097), (0, 0)])
def test_a_picture_of_an_unreasonable_size_is_refused(size):
    with pytest.raises(ValueError, match="64 to 4096"):
        draw("a kitten", *size)


def test_a_prompt_always_gives_the_same_picture_and_no_two_prompts_do():
    pictures = {draw(f"kitten {i}", 512, 512) for i in range(30)}
    assert len(pictures) == 30
    assert pictures == {draw(f"kitten {i}", 512, 512) for i in range(30)}


def test_prompts_can_be_told_apart_by_eye():
    seen = set()
    for i in range(12):
        with Image.open(io.BytesIO(draw(f"kitten {i}", 512, 512))) as image:
            seen.add(image.convert("RGB").resize((16, 16)).tobytes())
    assert len(seen) == 12


def test_a_picture_says_sandbox():
    with Image.open(io.BytesIO(draw("a kitten", 1024, 1024))) as image:
        dots = image.crop((277, 924, 747, 994)).resize((47, 7), Image.Resampling.NEAREST)
        ground = image.getpixel((0, 1023))
    assert ["".join(".#"[dots.getpixel((x, y)) != ground] for x in range(47)) for y in range(7)] == [
        ".####...###...#...#..####...####....###...#...#",
        "#......#...#..##..#..#...#..#...#..#...#...#.#.",
        "#......#...#..##..#..#...#..#...#..#...#...#.#.",
        ".###...#####..#.#.#..#...#..####...#...#....#..",
        "....#..#...#..#..##..#...#..#...#..#...#...#.#.",
        "....#..#...#..#..##..#...#..#...#..#...#...#.#.",
        "####...#...#..#...#..####...####....###...#...#",
    ]


def test_a_picture_is_small_and_quick():
    def spent(i):
        start = time.process_time()
        assert len(draw(f"kitten {i}", 1024, 1024)) < 60_000
        return time.process_time() - start

    # The bound is for a busy machine; an idle one needs about 7 ms.
    assert min(map(spent, range(10))) < 0.05


# The reply


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
def test_every_model_draws_its_default_size(sandbox, model):
    picture = get(sandbox, post(sandbox, model=model.upper()))
    assert picture.headers["content-type"] == "image/png"
    info = inspect(io.BytesIO(picture.body))
    assert f"{info.width}x{info.height}" == MODELS[model].default_size


def test_a_legal_size_is_drawn(sandbox):
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


def test_the_longest_prompt_is_taken(sandbox):
    assert post(sandbox, "x" * 1000, model="glm-image").status == 200
    assert post(sandbox, "x" * 5000).status == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}"]
)
def test_a_body_that_is_no_json_object_is_refused(sandbox, body):
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
def test_any_prompt_can_be_drawn(prompt, request_id):
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


def test_an_unknown_picture_is_the_recorded_404(sandbox):
    reply = sandbox.reply("GET", f"/files/{'0' * 32}.png?Expires=99999999999", {})
    assert (reply.status, json.loads(reply.body)) == (404, recorded("seen-404-cdn-not-yet"))


def test_a_link_with_a_changed_query_is_no_good(sandbox):
    url = httpx.URL(json.loads(post(sandbox).body)["data"][0]["url"])
    assert sandbox.reply("GET", url.path, {}).status == 403
    assert sandbox.reply("GET", url.path + "?Expires=99999999999", {}).status == 403


def test_a_link_ends(sandbox, monkeypatch):
    reply = post(sandbox)
    now = time.time()
    monkeypatch.setattr(state.time, "time", lambda: now + state.LINK_LIFETIME + 2)
    assert get(sandbox, reply).status == 403


# Triggers and faults


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
def test_the_attempts_of_a_prompt_are_counted_anew_after_ten_minutes(trigger):
    now = 0.0
    with Sandbox(clock=lambda: now) as sandbox:
        refused = post(sandbox, f"[[{trigger}]]").status
        for waited, expected in [(599, refused), (599, 200), (599, 200), (601, refused), (1, refused), (1, 200)]:
            now += waited
            assert post(sandbox, f"[[{trigger}]]").status == expected


def test_a_caller_who_retries_the_whole_call_comes_through(generator, sandbox):
    impatient = generator.model_copy(update={"max_retries": 0})
    patient = impatient.with_retry(stop_after_attempt=3, wait_exponential_jitter=False)
    assert patient.invoke("[[rate-limit:2]] a kitten").images
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
def test_a_flagged_picture_is_made(sandbox, trigger, level):
    reply = post(sandbox, trigger)
    body = json.loads(reply.body)
    assert body["content_filter"] == [{"role": "assistant", "level": level}]
    assert set(recorded("doc-success-with-content-filter")) <= set(body)
    assert get(sandbox, reply).status == 200
    assert sandbox.images_made == 1


def test_a_prompt_asks_for_two_minutes_at_most(sandbox):
    assert [post(sandbox, f"[[slow:{seconds}]]").delay for seconds in (119.5, 120, 121, 9999)] == [119.5, 120, 120, 120]


def test_a_slow_picture_tells_its_delay():
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
def test_a_picture_that_is_not_there_yet_comes(sandbox, trigger, expected):
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
        assert [fault.name for fault in faults.faults_of(word)] == [word.strip("[]").partition(":")[0]]


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


def test_fail_next_refuses_what_it_does_not_know(sandbox):
    with pytest.raises(ValueError, match=r"Known are content-filter, .*status"):
        sandbox.fail_next("earthquake")
    with pytest.raises(ValueError, match="no option 'retry_after'"):
        sandbox.fail_next("balance", retry_after=1)
    with pytest.raises(ValueError, match="1 or more"):
        sandbox.fail_next("busy", times=0)
    sandbox.fail_next("busy", times=10**12)
    assert post(sandbox).status == 429


# The ledger


def test_it_remembers_what_it_was_sent_but_not_the_key(sandbox):
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


def test_its_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(service, "MAX_REQUESTS", 5)
    monkeypatch.setattr(state, "MAX_PICTURES", 3)
    sandbox = Sandbox()
    replies = [post(sandbox, f"kitten {i} [[rate-limit:0]]") for i in range(8)]
    assert [get(sandbox, reply).status for reply in replies] == [404] * 5 + [200] * 3
    assert [request.prompt[:8] for request in sandbox.requests] == [f"kitten {i}" for i in range(3, 8)]
    assert len(sandbox.downloads) == len(sandbox._attempts) == 5
    assert [picture.prompt[:8] for picture in sandbox.ledger] == [f"kitten {i}" for i in range(5, 8)]
    assert sandbox.images_made == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "x" * 90_000},
        {"prompt": "🐈" * 25_000},
        {"other": [[]] * 2_000},
        {"other": [{}] * 2_000},
        {"other": list(range(10_000, 13_000))},
        {"other": {f"{n}": n for n in range(2_000)}},
    ],
    ids=["prompt", "wide prompt", "lists", "dicts", "numbers", "names"],
)
def test_large_requests_are_forgotten_before_they_fill_the_memory(monkeypatch, fields):
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


def test_heads_are_forgotten_before_they_fill_the_memory(monkeypatch, sandbox):
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


# Names


def test_a_sandbox_is_found_again_by_its_base_url():
    sandbox, other = Sandbox(name="mine"), Sandbox()
    assert sandbox.base_url == "sandbox:mine"
    assert sandbox_at("sandbox:mine") is sandbox
    assert sandbox_at(other.base_url) is other
    with pytest.raises(ValueError, match="already is a sandbox"):
        Sandbox(name="mine")


def test_a_sandbox_that_nobody_holds_is_gone():
    Sandbox(name="short-lived")
    gc.collect()
    with pytest.raises(LookupError, match=r"no sandbox 'sandbox:short-lived'.*keep it"):
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
def test_another_address_is_no_sandbox(base_url):
    with pytest.raises(LookupError, match="looks like 'sandbox:'"):
        sandbox_at(base_url)


@pytest.mark.parametrize("options", [{"name": "a/b"}, {"name": "x" * 101}, {"latency": -1}, {"in_flight_limit": 0}])
def test_a_wrong_option_is_refused(options):
    with pytest.raises(ValueError):
        Sandbox(**options)


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
            assert download.status == 404, "a download takes no place"
    assert first.status == second.status == 200
    with sandbox.admit("POST", ROUTE, AUTHORIZED, body) as later:
        assert later.status == 200
    assert sandbox.in_flight == 0
    assert sandbox.images_made == 3


def test_a_place_in_flight_is_given_back_after_an_error():
    sandbox = Sandbox(in_flight_limit=1)
    with pytest.raises(KeyError), sandbox.admit("POST", ROUTE, AUTHORIZED, b"{}"):
        raise KeyError
    assert sandbox.in_flight == 0


async def test_concurrent_posts_meet_the_limit():
    sandbox = Sandbox(in_flight_limit=3, latency=0.05)
    async with httpx.AsyncClient(transport=SandboxTransport(sandbox), headers=AUTHORIZED) as client:
        replies = await asyncio.gather(*(client.post("https://any.example" + ROUTE, json=BODY) for _ in range(8)))
    assert sorted(reply.status_code for reply in replies) == [200] * 3 + [429] * 5


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
def test_an_httpx_client_gets_its_picture(sandbox, calls):
    (reply,) = calls(sandbox, ("POST", "https://any.example" + ROUTE, {"json": BODY}))
    assert reply.headers["x-cogview-sandbox"] == "1"
    (picture,) = calls(sandbox, ("GET", reply.json()["data"][0]["url"], {}))
    assert int(picture.headers["content-length"]) == len(picture.content)
    assert picture.content == draw("a kitten", 1024, 1024)
    assert sandbox.requests[0].headers["authorization"] == "[removed]"


@both
def test_a_reply_later_than_the_read_timeout_is_a_read_timeout(sandbox, calls):
    timeout = httpx.Timeout(30, read=0.02)
    start = time.monotonic()
    with pytest.raises(httpx.ReadTimeout):
        calls(
            sandbox,
            ("POST", "https://any.example" + ROUTE, {"json": {**BODY, "prompt": "[[slow:20]]"}}),
            timeout=timeout,
        )
    assert time.monotonic() - start < 10
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


async def test_a_cancelled_call_gives_its_place_back(sandbox):
    async with httpx.AsyncClient(transport=SandboxTransport(sandbox), headers=AUTHORIZED, timeout=None) as client:
        slow = {**BODY, "prompt": "[[slow:60]]"}
        call = asyncio.create_task(client.post("https://any.example" + ROUTE, json=slow))
        while not sandbox.in_flight:
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert sandbox.in_flight == 0


# On a port


@pytest.fixture
def server(sandbox):
    with SandboxServer(sandbox) as server:
        yield server


def loaded(url: str) -> Image.Image:
    image = Image.open(io.BytesIO(httpx.get(url, trust_env=False).raise_for_status().content))
    image.load()
    return image


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["ZhipuAiClient", "ZaiClient"])
def test_zai_sdk_gets_its_picture(server, sandbox, name):
    zai = pytest.importorskip("zai")
    with getattr(zai, name)(api_key=KEY, base_url=server.base_url, http_client=httpx.Client(trust_env=False)) as client:
        reply = client.images.generations(model="cogview-4-250304", prompt="a kitten", size="1344x768")
    assert reply.data[0].url.startswith(server.origin + "/files/")
    assert loaded(reply.data[0].url).size == (1344, 768)
    assert KEY not in repr(sandbox.requests)


def test_openai_gets_its_picture(server, sandbox):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=server.base_url, api_key=KEY, max_retries=0) as client:
        reply = client.images.generate(model="cogview-4-250304", prompt="a kitten", size="1024x1024")
        assert loaded(reply.data[0].url).size == (1024, 1024)
        with pytest.raises(openai.BadRequestError) as raised:
            client.images.generate(model="cogview-4-250304", prompt="[[content-filter]]")
    assert raised.value.code == "1301"
    assert sandbox.images_made == 1


def test_one_connection_serves_many_requests(server):
    connection = http.client.HTTPConnection("127.0.0.1", httpx.URL(server.base_url).port)
    used = set()
    for method, path, body in [
        ("POST", ROUTE, json.dumps(BODY)),
        ("HEAD", "/files/x.png", None),
        ("GET", "/", None),
        ("POST", ROUTE, "["),
    ] * 3:
        connection.request(method, path, body, AUTHORIZED)
        reply = connection.getresponse()
        assert reply.headers["x-cogview-sandbox"] == "1"
        reply.read()
        used.add(connection.sock.getsockname())
    assert len(used) == 1
    connection.close()


def test_a_client_that_goes_away_leaves_no_trace(server, sandbox, capfd):
    port = httpx.URL(server.base_url).port
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"POST {ROUTE} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 100\r\n\r\n{{".encode())
    assert (
        httpx.post(f"{server.base_url}/images/generations", json=BODY, headers=AUTHORIZED, trust_env=False).status_code
        == 200
    )
    server.close()
    assert capfd.readouterr() == ("", "")
    assert len(sandbox.requests) == 1


def test_closing_does_not_wait_for_a_slow_picture_or_an_idle_client(sandbox):
    server = SandboxServer(sandbox).start()
    idle = socket.create_connection(("127.0.0.1", httpx.URL(server.base_url).port))
    url = f"{server.base_url}/images/generations"
    failed = threading.Event()

    def call():
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.post(url, json={**BODY, "prompt": "[[slow:60]]"}, headers=AUTHORIZED, timeout=None, trust_env=False)
        failed.set()

    caller = threading.Thread(target=call)
    caller.start()
    while not sandbox.in_flight:
        time.sleep(0.001)
    start = time.monotonic()
    server.close()
    assert time.monotonic() - start < 4
    caller.join()
    assert failed.is_set()
    assert idle.recv(1) == b""
    idle.close()
    server.close()
    with pytest.raises(RuntimeError, match="not running"):
        server.base_url  # noqa: B018
    gc.collect()


def test_a_server_can_be_started_again_but_not_twice():
    server = SandboxServer()
    with server:
        with pytest.raises(RuntimeError, match="running already"):
            server.start()
    with server:
        assert httpx.get(server.origin, trust_env=False).json() == recorded("seen-200-wrong-route")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
def test_only_this_machine_is_served(host):
    with pytest.raises(ValueError, match="only this machine"):
        SandboxServer(host=host)


@pytest.mark.parametrize(("host", "start"), [("localhost", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_other_names_of_this_machine_do(host, start):
    try:
        server = SandboxServer(host=host).start()
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with httpx.Client(trust_env=False, headers=AUTHORIZED) as client:
        url = client.post(server.base_url + "/images/generations", json=BODY).json()["data"][0]["url"]
        assert url.startswith(start)
        assert client.get(url).headers["content-type"] == "image/png"
    server.close()


def test_the_command_serves_until_ctrl_c():
    command = [sys.executable, "-W", "error", "-m", "langchain_cogview.sandbox", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        base_url = next(word for word in line.split() if word.startswith("http://127.0.0.1:"))
        for name in ("langchain-cogview", "zai-sdk", "openai"):
            assert name in line
        reply = httpx.post(f"{base_url}/images/generations", json=BODY, headers=AUTHORIZED, trust_env=False)
        assert loaded(reply.json()["data"][0]["url"]).size == (1024, 1024)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=20)
    assert (process.returncode, rest, errors) == (0, "", "")


def test_the_command_says_in_one_line_that_the_port_is_in_use(server, capsys):
    assert main(["--port", str(httpx.URL(server.base_url).port)]) == 1
    assert main(["--port", "99999"]) == 1
    out, errors = capsys.readouterr()
    assert out == ""
    assert [line.startswith("The port") for line in errors.splitlines()] == [True, True]


def test_a_fault_takes_a_dict_as_json_and_refuses_values_of_no_use():
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
