"""The MCP server over streamable HTTP: who may call it, approval by the user, progress, and many calls at once."""

from __future__ import annotations

import asyncio
import socket
import threading

import httpx
import pytest

pytest.importorskip("mcp")
import httpx2
import uvicorn
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import ElicitResult

from langchain_cogview.errors import CogViewConfigurationError
from langchain_cogview.mcp.http import http_app, is_loopback, run_http
from langchain_cogview.mcp.server import Approval, CogViewServer, ServerSettings

MODES = ["legacy", "2026-07-28"]
TOKEN = "a-token-that-is-long-enough"
PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
HEADERS = {"Accept": "application/json, text/event-stream"}


class Served:
    """A server on a port of this machine, in a thread with an event loop of its own."""

    def __init__(self, server, **options):
        self.server = server
        config = uvicorn.Config(http_app(server, **options), port=0, log_level="error", timeout_graceful_shutdown=1)
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run)
        self._thread.start()
        while not self._uvicorn.started:
            threading.Event().wait(0.02)
        port = self._uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/mcp"

    def close(self):
        self._uvicorn.should_exit = True
        self._thread.join()
        self.server.finish()
        if self.server._images:
            self.server._images.records.close()


@pytest.fixture
def serve(sandbox, tmp_path):
    served = []

    def start(approve="never", token=None, **settings):
        settings = {"base_url": sandbox.base_url, "output_dir": tmp_path / "images", **settings}
        server = CogViewServer(ServerSettings(settings, Approval.parse(approve), "none"))
        served.append(Served(server, token=token))
        return served[-1]

    yield start
    for item in served:
        item.close()


@pytest.mark.parametrize("mode", MODES)
async def test_the_sdks_client_makes_an_image_over_http(serve, mode, sandbox):
    served = await asyncio.to_thread(serve)
    async with Client(served.url, mode=mode) as client:
        result = await client.call_tool("generate_image", {"prompt": "a kitten"})
    assert result.structured_content["status"] == "made" and sandbox.images_made == 1


async def test_only_requests_with_the_token_are_answered(serve, sandbox):
    served = await asyncio.to_thread(lambda: serve(token=TOKEN))
    async with httpx.AsyncClient() as http:
        for sent in (None, "Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer", f"Bearer {TOKEN}x", "Bearer \xfc"):
            headers = HEADERS if sent is None else {**HEADERS, "Authorization": sent.encode("latin-1")}
            refused = await http.post(served.url, json=PING, headers=headers)
            assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer", sent
    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        async with Client(streamable_http_client(served.url, http_client=http)) as client:
            assert len((await client.list_tools()).tools) == 4


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "localhost.evil.example:80"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Type": "text/plain"}, 400),
    ],
)
async def test_a_page_of_another_site_cannot_spend_money(serve, sandbox, headers, status):
    served = await asyncio.to_thread(serve)
    call = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "generate_image", "arguments": {"prompt": "x"}},
    }
    async with httpx.AsyncClient() as http:
        refused = await http.post(served.url, json=call, headers={**HEADERS, **headers})
    assert refused.status_code == status
    assert not sandbox.requests


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "images.example.com", "::"])
def test_an_address_that_others_reach_needs_a_token(tmp_path, host):
    server = CogViewServer(ServerSettings({"base_url": "sandbox:", "output_dir": tmp_path}))
    with pytest.raises(CogViewConfigurationError, match="COGVIEW_MCP_TOKEN"):
        http_app(server, host=host)
    with pytest.raises(CogViewConfigurationError, match="16"):
        http_app(server, host=host, token="short")
    assert not is_loopback(host)


def test_an_address_in_use_ends_the_command_with_a_sentence(sandbox, tmp_path):
    settings = {"base_url": sandbox.base_url, "output_dir": tmp_path / "images"}
    server = CogViewServer(ServerSettings(settings, Approval.parse("never"), "none"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CogViewConfigurationError, match=f"could not start at 127.0.0.1, port {port}"):
            run_http(server, host="127.0.0.1", port=port, token=None)


async def test_garbage_over_http_gets_an_error_and_the_server_goes_on(serve):
    served = await asyncio.to_thread(serve)
    async with httpx.AsyncClient() as http:
        for body in (b"", b"{", b"[]", b"null", b"\xff", b"x" * 2_000_000):
            refused = await http.post(served.url, content=body, headers={**HEADERS, "Content-Type": "application/json"})
            assert 400 <= refused.status_code < 500, body[:10]
    async with Client(served.url) as client:
        assert len((await client.list_tools()).tools) == 4


# --- approval


@pytest.mark.parametrize("mode", MODES)
async def test_the_user_is_asked_with_the_price_before_an_image_is_paid_for(serve, sandbox, mode):
    served, questions = await asyncio.to_thread(lambda: serve(approve="always")), []

    async def approve(context, params):
        questions.append(params.message)
        assert not sandbox.requests
        return ElicitResult(action="accept", content={"approve": True})

    async with Client(served.url, mode=mode, elicitation_callback=approve) as client:
        result = await client.call_tool("generate_image", {"prompt": "a kitten"})
    assert result.structured_content["status"] == "made" and sandbox.images_made == 1
    assert len(questions) == 1 and "0.06 CNY" in questions[0] and "a kitten" in questions[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "answer",
    [
        ElicitResult(action="decline"),
        ElicitResult(action="cancel"),
        ElicitResult(action="accept"),
        ElicitResult(action="accept", content={}),
        ElicitResult(action="accept", content={"approve": False}),
        ElicitResult(action="accept", content={"approve": "true"}),
    ],
    ids=lambda answer: f"{answer.action}-{answer.content}",
)
async def test_without_a_clear_yes_nothing_is_sent(serve, sandbox, mode, answer):
    served = await asyncio.to_thread(lambda: serve(approve="always"))

    async def respond(context, params):
        return answer

    async with Client(served.url, mode=mode, elicitation_callback=respond) as client:
        result = await client.call_tool("generate_image", {"prompt": "a kitten"})
    assert result.is_error and "approve" in result.content[0].text
    assert not sandbox.requests


@pytest.mark.parametrize("mode", MODES)
async def test_a_client_that_cannot_ask_is_refused_with_the_reason(serve, sandbox, mode):
    served = await asyncio.to_thread(lambda: serve(approve="above=0.05"))
    async with Client(served.url, mode=mode) as client:
        result = await client.call_tool("generate_image", {"prompt": "a kitten"})
    assert result.is_error and "--approve" in result.content[0].text and not sandbox.requests


async def test_a_cheap_image_needs_no_approval(serve, sandbox):
    served = await asyncio.to_thread(lambda: serve(approve="above=0.06"))
    async with Client(served.url) as client:
        result = await client.call_tool("generate_image", {"prompt": "a kitten"})
    assert not result.is_error and sandbox.images_made == 1


async def test_a_user_who_does_not_answer_holds_the_call_no_longer_than_its_wait(serve, sandbox):
    served, released = await asyncio.to_thread(lambda: serve(approve="always")), asyncio.Event()

    async def never(context, params):
        await released.wait()
        return ElicitResult(action="decline")

    async with Client(served.url, mode="legacy", elicitation_callback=never) as client:
        result = await client.call_tool("generate_image", {"prompt": "a kitten", "wait_seconds": 0.5})
        released.set()
    assert result.is_error and "not answered" in result.content[0].text and not sandbox.requests


@pytest.mark.parametrize("text", ["", "yes", "above", "above=", "above=-1", "above=much", "ALWAYS"])
def test_an_unknown_approval_is_refused_at_the_start(text):
    with pytest.raises(CogViewConfigurationError, match="--approve"):
        Approval.parse(text)


# --- progress, and many calls


@pytest.mark.parametrize("mode", MODES)
async def test_progress_is_reported_while_a_call_waits(serve, mode, monkeypatch):
    monkeypatch.setattr("langchain_cogview.mcp.server.PROGRESS_SECONDS", 0.1)
    served, reports = await asyncio.to_thread(serve), []

    async def report(progress, total, message):
        reports.append((progress, message))

    async with Client(served.url, mode=mode) as client:
        await client.call_tool("generate_image", {"prompt": "a kitten [[slow:2]]"}, progress_callback=report)
    assert len(reports) >= 2 and [progress for progress, _ in reports] == sorted(progress for progress, _ in reports)
    assert "Making the image" in reports[0][1]


async def test_a_client_that_disconnects_loses_nothing(serve, sandbox):
    served = await asyncio.to_thread(serve)
    async with Client(served.url) as client:
        call = asyncio.ensure_future(client.call_tool("generate_image", {"prompt": "a kitten [[slow:2]]"}))
        while not sandbox.requests:
            await asyncio.sleep(0.05)
        call.cancel()
        await asyncio.wait([call])
    async with Client(served.url) as client:
        again = await client.call_tool("generate_image", {"prompt": "a kitten [[slow:2]]"})
        assert again.structured_content["status"] == "made"
    assert sandbox.images_made == 1


@pytest.mark.heavy
async def test_a_hundred_parallel_calls_each_answer_and_the_count_is_kept(serve, sandbox):
    served = await asyncio.to_thread(lambda: serve(max_images=60))

    async def make(client, number):
        prompt = f"kitten {number} [[slow:0.1]]"
        return await client.call_tool("generate_image", {"prompt": prompt, "wait_seconds": 50})

    async with Client(served.url) as client:
        answers = await asyncio.gather(*(make(client, number) for number in range(100)))
        for answer in answers:
            while answer.structured_content["status"] == "running":
                answer = await client.call_tool("get_image", {"id": answer.structured_content["id"]})
            assert answer.structured_content["status"] in {"made", "error"}
    assert sandbox.images_made == 60
