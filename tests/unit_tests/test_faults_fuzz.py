"""Any bytes, any JSON, any status: a result or one of our errors, the same sync and async."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from langchain_cogview import CogViewImageGenerator, ImageResult
from langchain_cogview.api import client as client_module
from langchain_cogview.errors import CogViewError
from tests.faults.referee import error_problems, result_problems
from tests.faults.reply_table import KEY

URL = "https://images.invalid/x.png"

atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(
        [
            URL,
            "1301",
            "1302",
            1305,
            "1113",
            "401",
            "",
            " ",
            10**400,
            -1,
            "user",
            "assistant",
            "\ud800",
            "\x1b[2J",
            "file:///x",
        ]
    )
)
anything = st.recursive(
    atoms,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
entry = anything | st.fixed_dictionaries({}, optional={"role": atoms, "level": atoms})
image = anything | st.fixed_dictionaries({}, optional={"url": atoms, "b64_json": atoms})
failure = anything | st.fixed_dictionaries({}, optional={"code": atoms, "message": atoms})
near_miss = st.fixed_dictionaries(
    {},
    optional={
        "data": anything | image | st.lists(image, max_size=3),
        "error": failure,
        "content_filter": anything | st.lists(entry, max_size=3),
        "contentFilter": anything | st.lists(entry, max_size=3),
        "code": atoms,
        "msg": atoms,
        "message": atoms,
        "success": atoms,
        "created": atoms,
        "id": atoms,
        "request_id": atoms,
        "model": atoms,
        "usage": anything,
        "timestamp": atoms,
    },
)
json_bodies = (near_miss | near_miss | anything).map(lambda value: json.dumps(value).encode())
bodies = json_bodies | json_bodies | st.binary(max_size=200)
statuses = st.sampled_from([200, 200, 400, 401, 403, 404, 429, 500, 503]) | st.integers(200, 599)
headers = st.fixed_dictionaries(
    {},
    optional={
        "Content-Type": st.sampled_from(["application/json", "text/html", "application/json; charset=x", "\xff"]),
        "Content-Encoding": st.sampled_from(["identity", "gzip", "deflate", "br", "zstd", "gzip, gzip", "nonsense"]),
        "Retry-After": st.sampled_from(
            ["0", "5", "-1", "soon", "1e400", "nan", "Fri, 31 Dec 9999 23:59:59 GMT", "\xb2"]
        ),
        "Location": st.sampled_from(["https://elsewhere.invalid/", "", "file:///etc/passwd", "\xff"]),
        "Content-Length": st.sampled_from(["0", "5", "many", "-1"]),
    },
)


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body in three parts, as it would come from a socket: not yet read and not yet decoded."""

    def __init__(self, content: bytes) -> None:
        self.parts = [content[:7], content[7:50], content[50:]]

    def __iter__(self) -> Iterator[bytes]:
        yield from self.parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            yield part


class Fuzzed:
    """A service that sends a chosen reply, to both kinds of client."""

    def __init__(self) -> None:
        self.status, self.headers, self.body = 200, {}, b""
        self.asked = 0
        transport = httpx.MockTransport(self.answer)
        self.generator = CogViewImageGenerator(
            base_url="http://127.0.0.1:9/api/paas/v4",
            api_key=KEY,
            download=False,
            max_retries=0,
            timeout=None,
            http_client=httpx.Client(transport=transport),
            http_async_client=httpx.AsyncClient(transport=transport),
        )

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        lines = [(name.encode(), value.encode("latin-1")) for name, value in self.headers.items()]
        return httpx.Response(self.status, headers=lines, stream=Body(self.body))

    def outcomes(self) -> tuple[Any, Any]:
        try:
            sync = self.generator.invoke("a kitten")
        except Exception as exc:
            sync = exc
        try:
            native = asyncio.run(self.generator.ainvoke("a kitten"))
        except Exception as exc:
            native = exc
        return sync, native


fuzzed: list[Fuzzed] = []


@pytest.fixture(autouse=True, scope="module")
def no_patience():
    """A full account (code 1302) is final at once: a call would wait for it until its time limit, and be sent again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module, "MAX_REFUSED_SECONDS", -1.0)
        yield


def check(status: int, head: dict[str, str], body: bytes) -> None:
    """Whatever the reply, both ways give the same kind of thing, and nothing is wrong with it."""
    if not fuzzed:
        fuzzed.append(Fuzzed())
    service = fuzzed[0]
    service.status, service.headers, service.body, service.asked = status, head, body, 0
    sync, native = service.outcomes()
    assert isinstance(sync, ImageResult | CogViewError), repr(sync)
    assert type(native) is type(sync), f"{sync!r} and {native!r}"
    for outcome in (sync, native):
        assert not (result_problems(outcome) if isinstance(outcome, ImageResult) else error_problems(outcome))
    assert service.asked == 2
    if isinstance(sync, CogViewError):
        assert str(sync).replace(sync.request_id or "-", "") == str(native).replace(native.request_id or "-", "")


common = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@example(status=429, head={}, body=b'{"error": {"code": "1302", "message": ""}}')
@example(status=200, head={"Retry-After": "nan"}, body=b'{"code": "1302"}')
@settings(common, max_examples=200)
@given(status=statuses, head=headers, body=bodies)
def test_any_reply_gives_a_result_or_an_error_of_ours(status: int, head: dict[str, str], body: bytes) -> None:
    check(status, head, body)


@settings(common, max_examples=100)
@given(body=json_bodies)
def test_any_json_in_a_200_gives_a_result_or_an_error_of_ours(body: bytes) -> None:
    check(200, {}, body)


@pytest.mark.heavy
@settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), max_examples=3000)
@given(status=statuses, head=headers, body=bodies)
def test_three_thousand_replies(status: int, head: dict[str, str], body: bytes) -> None:
    check(status, head, body)
