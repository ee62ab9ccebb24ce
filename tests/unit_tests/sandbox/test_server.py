"""The served sandbox answers programs of this machine alone, and no client can exhaust it."""

from __future__ import annotations

import gc
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from langchain_cogview import CogViewError, CogViewImageGenerator
from langchain_cogview.sandbox import SandboxServer
from langchain_cogview.sandbox import server as served
from tests.conftest import FAKE_KEY
from tests.unit_tests.sandbox.calls import AUTHORIZED, BODY, KEY, ROUTE, download, recorded

PATIENCE = 60
"""Seconds after which a test gives up."""


@pytest.fixture
def server(sandbox):
    with SandboxServer(sandbox) as server:
        yield server


@pytest.fixture
def client(server):
    headers = {"Authorization": f"Bearer {FAKE_KEY}"}
    with httpx.Client(trust_env=False, base_url=server.origin, headers=headers, timeout=PATIENCE) as client:
        yield client


def port(server):
    return httpx.URL(server.origin).port


def connect(server):
    return socket.create_connection(("127.0.0.1", port(server)), PATIENCE)


def head(server, *lines, method="POST", path=ROUTE):
    lines = (
        f"{method} {path} HTTP/1.1",
        f"Host: 127.0.0.1:{port(server)}",
        f"Authorization: Bearer {FAKE_KEY}",
        *lines,
    )
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def answer(server, *parts):
    """Status and body of the reply to these bytes, and whether the server closed the connection afterwards."""
    with connect(server) as connection:
        for part in parts:
            connection.sendall(part)
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        body = reply.read()
        connection.settimeout(0.05 if not reply.will_close else PATIENCE)
        return reply.status, body, reply.will_close and connection.recv(1) == b""


def until(is_true):
    ends = time.monotonic() + PATIENCE
    while not is_true():
        assert time.monotonic() < ends
        time.sleep(0.002)


# Host and Origin


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1", "127.1.2.3", "[::1]"])
@pytest.mark.parametrize("origin", [None, "http://localhost:3000", "https://127.0.0.1", "http://[::1]:5173"])
def test_programs_and_pages_of_this_machine_are_served(server, client, host, origin):
    headers = {"host": f"{host}:{port(server)}"} | ({"origin": origin} if origin else {})
    assert client.post(ROUTE, json=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize("path", [ROUTE, "/api/paas/v4/async/images/generations", "/sandbox/reset", "/", "/files/x"])
@pytest.mark.parametrize(
    "host",
    [
        "attacker.example:{port}",
        "attacker.example",
        "127.0.0.1.attacker.example:{port}",
        "localhost.attacker.example:{port}",
        "x.localhost:{port}",
        "127.0.0.1",
        "127.0.0.1:1{port}",
        "127.0.0.1:",
        "192.0.2.1:{port}",
        "0.0.0.0:{port}",
        "[::]:{port}",
        "2130706433:{port}",
        "127.0.0.1:{port}@attacker.example",
        "attacker.example@127.0.0.1:{port}",
        "127.0.0.1:{port}/x",
        "",
    ],
)
def test_a_page_whose_host_was_made_to_resolve_here_is_refused(server, client, sandbox, host, path):
    sandbox.reply("POST", ROUTE, {"authorization": "Bearer x"}, json.dumps(BODY).encode())
    reply = client.post(path, json=BODY, headers={"host": host.format(port=port(server))})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "1220")
    assert server.origin in reply.json()["error"]["message"]
    assert sandbox.images_made == 1, "no image was made, and nothing was reset"


@pytest.mark.parametrize(
    "origin",
    [
        "https://attacker.example",
        "http://localhost.attacker.example",
        "http://127.0.0.1.attacker.example",
        "http://localhost@attacker.example",
        "null",
        "file://",
        "http://[",
        "chrome-extension://abc",
    ],
)
@pytest.mark.parametrize("path", [ROUTE, "/sandbox/reset"])
def test_a_page_of_another_host_is_refused(client, sandbox, origin, path):
    sandbox.reply("POST", ROUTE, {"authorization": "Bearer x"}, json.dumps(BODY).encode())
    assert client.post(path, json=BODY, headers={"origin": origin}).status_code == 403
    assert sandbox.images_made == 1


@pytest.mark.parametrize("twice", ["Host", "Origin"])
def test_two_hosts_or_origins_are_refused(server, sandbox, twice):
    mine = {"Host": f"127.0.0.1:{port(server)}", "Origin": "http://localhost"}[twice]
    more = [f"{twice}: {mine}"] * (1 if twice == "Host" else 2)
    assert answer(server, head(server, *more, "Content-Length: 2"), b"{}")[0] == 403
    assert answer(server, f"POST {ROUTE} HTTP/1.1\r\nContent-Length: 2\r\n\r\n{{}}".encode())[0] == 403, (
        "without a host"
    )
    assert not sandbox.requests


@pytest.mark.parametrize(
    "path", ["//api/paas/v4/images/generations", "http://127.0.0.1/api/paas/v4/images/generations"]
)
def test_another_spelling_of_the_path_is_another_path(server, sandbox, path):
    body = json.dumps(BODY).encode()
    status, reply, _ = answer(server, head(server, f"Content-Length: {len(body)}", path=path), body)
    assert (status, json.loads(reply)) == (200, {"code": 500, "msg": "404 NOT_FOUND", "success": False})
    assert sandbox.images_made == 0


# Reset


def test_a_post_resets_the_sandbox(client, sandbox):
    prompt = {**BODY, "prompt": "[[rate-limit]]"}
    task = {**BODY, "model": "glm-image", "prompt": "[[slow:60]]"}
    sandbox.fail_next("busy", times=9, after=3)
    assert client.post(ROUTE, json=prompt).status_code == 429
    assert client.post(ROUTE, json=prompt).status_code == 200
    identity = client.post("/api/paas/v4/async/images/generations", json=task).json()["id"]
    assert (sandbox.in_flight, len(sandbox.ledger)) == (1, 2)
    for other in ("GET", "HEAD", "PUT"):
        client.request(other, "/sandbox/reset")
    assert len(sandbox.ledger) == 2
    reply = client.post("/sandbox/reset")
    assert (reply.status_code, reply.json()) == (200, {"success": True})
    assert (sandbox.in_flight, sandbox.ledger, sandbox.requests, sandbox.images_made) == (0, [], [], 0)
    assert client.get(f"/api/paas/v4/async-result/{identity}").status_code == 404
    assert client.post(ROUTE, json=prompt).status_code == 429


# Bodies


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_body_in_chunks_is_read(client, sandbox, size):
    body = json.dumps({**BODY, "prompt": "kitten " * 50}).encode()
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    for _ in range(2):
        assert client.post(ROUTE, content=iter(pieces)).status_code == 200
    assert [request.prompt for request in sandbox.requests] == ["kitten " * 50] * 2


def test_chunks_may_have_extensions_and_trailers(server, sandbox):
    body = json.dumps(BODY).encode()
    chunks = b"%X ;a=b\r\n%b\r\n0\r\nX-Trailer: 1\r\n\r\n" % (len(body), body)
    first = head(server, "Transfer-Encoding: Chunked") + chunks
    with connect(server) as connection:
        connection.sendall(first + head(server, "Connection: close", method="GET", path="/"))
        replies = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert replies.count(b"HTTP/1.1 200") == 2 and b"404 NOT_FOUND" in replies
    assert sandbox.requests[0].prompt == "a kitten"


@pytest.mark.parametrize(
    ("lines", "sent", "status"),
    [
        (["Content-Length: 1000001"], b"{", 413),
        (["Content-Length: 99999999999999999999999999"], b"", 413),
        (["Content-Length: -1"], b"", 400),
        (["Content-Length: 2", "Content-Length: 3"], b"{}", 400),
        (["Content-Length: 2", "Transfer-Encoding: chunked"], b"2\r\n{}\r\n0\r\n\r\n", 400),
        (["Transfer-Encoding: gzip, chunked"], b"", 400),
        (["Transfer-Encoding: identity"], b"", 400),
        (["Transfer-Encoding: chunked"], b"x\r\n", 400),
        (["Transfer-Encoding: chunked"], b"-1\r\n", 400),
        (["Transfer-Encoding: chunked"], b"0x1\r\n{\r\n", 400),
        (["Transfer-Encoding: chunked"], b"1_0\r\n{\r\n", 400),
        (["Transfer-Encoding: chunked"], b"\r\n", 400),
        (["Transfer-Encoding: chunked"], b"1" * 100 + b"\r\n", 400),
        (["Transfer-Encoding: chunked"], b"1\r\n{}\r\n", 400),
        (["Transfer-Encoding: chunked"], b"FFFFFFFF\r\n", 413),
        (["Transfer-Encoding: chunked"], b"F000\r\n" % () + b"x" * 0xF000 + b"\r\nF0000\r\n", 413),
    ],
)
def test_a_body_that_is_too_long_or_not_whole_is_refused(server, sandbox, lines, sent, status):
    code, body, closed = answer(server, head(server, *lines), sent)
    assert (code, json.loads(body)["error"]["code"], closed) == (status, "1210", True)
    assert not sandbox.requests


def test_a_client_that_sends_a_long_body_gets_to_read_why_it_is_refused(client):
    assert client.post(ROUTE, content=b"x" * 3_000_000).status_code == 413
    assert client.post(ROUTE, content=iter([b"x" * 100_000] * 30)).status_code == 413


def test_a_client_that_expects_100_continue_gets_it(server):
    body = json.dumps(BODY).encode()
    with connect(server) as connection:
        connection.sendall(head(server, f"Content-Length: {len(body)}", "Expect: 100-continue"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "lines", [["X: " + "x" * 1000] * 70, ["X: x"] * 200, ["X: " + "x" * 70_000], [f"Cookie: {'x' * 66_000}"]]
)
def test_a_head_that_is_too_large_is_refused(server, sandbox, lines):
    status, _, closed = answer(server, head(server, *lines, "Content-Length: 2") + b"{}")
    assert (status, closed) == (431, True)
    assert not sandbox.requests


# Clients that hold on to connections


def dripped(server, first, rest):
    """Send bytes one by one until the server ends the connection."""
    with connect(server) as connection:
        connection.sendall(first)
        connection.settimeout(0.01)
        ends = time.monotonic() + PATIENCE
        for byte in rest:
            assert time.monotonic() < ends
            try:
                connection.send(byte)
                if connection.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except OSError:
                return
    pytest.fail("the connection was kept")


def test_a_head_that_does_not_end_closes_the_connection(server, monkeypatch):
    monkeypatch.setattr(served, "HEAD_SECONDS", 0.2)
    dripped(server, b"POST / HTTP/1.1\r\nX: ", iter(lambda: b"x", None))


@pytest.mark.parametrize(
    ("line", "piece"), [("Content-Length: 100000", b"x"), ("Transfer-Encoding: chunked", b"1\r\nx\r\n")]
)
def test_a_body_that_does_not_end_closes_the_connection(server, sandbox, monkeypatch, line, piece):
    monkeypatch.setattr(served, "BODY_SECONDS", 0.2)
    dripped(server, head(server, line), iter(lambda: piece, None))
    assert not sandbox.requests


def test_an_idle_connection_is_closed(server, monkeypatch):
    monkeypatch.setattr(served, "IDLE_SECONDS", 0.1)
    with connect(server) as silent, connect(server) as used:
        used.sendall(head(server, method="GET", path="/"))
        assert b"".join(iter(lambda: used.recv(65_536), b"")).startswith(b"HTTP/1.1 200")
        assert silent.recv(1) == b""


def test_a_client_that_does_not_read_its_reply_is_disconnected(server, client, sandbox, monkeypatch):
    monkeypatch.setattr(served, "WRITE_SECONDS", 0.2)
    monkeypatch.setattr(served, "MAX_CONNECTIONS", 1)
    sandbox.fail_next("status", body=b"x" * 20_000_000)
    with connect(server) as connection:
        connection.sendall(head(server, "Content-Length: 2") + b"{}")
        until(lambda: sandbox.requests)
        until(lambda: client.get("/").status_code == 200)


def test_a_slow_image_ends_with_its_client(server, sandbox):
    before = threading.active_count()
    body = json.dumps({**BODY, "prompt": "[[slow:9999]]"}).encode()
    request = head(server, f"Content-Length: {len(body)}") + body
    clients = [connect(server) for _ in range(20)]
    for client in clients:
        client.sendall(request)
    until(lambda: sandbox.in_flight == 20)
    for client in clients:
        client.close()
    until(lambda: sandbox.in_flight == 0 and threading.active_count() <= before)
    assert sandbox.images_made == 20, "the service charges for images whose client has gone"


def test_a_pipelined_request_waits_for_the_slow_one_before_it(server, sandbox):
    body = json.dumps({**BODY, "prompt": "[[slow:0.1]]"}).encode()
    request = head(server, f"Content-Length: {len(body)}") + body
    with connect(server) as connection:
        connection.sendall(request)
        until(lambda: sandbox.in_flight)
        connection.sendall(head(server, "Connection: close", method="GET", path="/"))
        replies = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert replies.count(b"HTTP/1.1 200") == 2


def test_more_connections_than_it_serves_get_503(server, client, sandbox, monkeypatch):
    monkeypatch.setattr(served, "MAX_CONNECTIONS", 3)
    before = threading.active_count()
    idle = [connect(server) for _ in range(3)]
    until(lambda: threading.active_count() >= before + 3)
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: httpx.post(server.origin + ROUTE, json=BODY, trust_env=False), range(20)))
    assert {(reply.status_code, reply.headers["x-cogview-sandbox"]) for reply in replies} == {(503, "1")}
    assert threading.active_count() <= before + 3
    assert not sandbox.requests
    for connection in idle:
        connection.close()
    until(lambda: client.post(ROUTE, json=BODY).status_code == 200)


def test_a_call_that_finds_no_connection_is_known_not_to_have_run(server, monkeypatch):
    monkeypatch.setattr(served, "MAX_CONNECTIONS", 0)
    generator = CogViewImageGenerator(base_url=server.base_url, api_key=FAKE_KEY, max_retries=0)
    with pytest.raises(CogViewError) as caught:
        generator.invoke("a kitten")
    assert caught.value.outcome == "not_run"


# Clients


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["ZhipuAiClient", "ZaiClient"])
def test_zai_sdk_gets_its_image(server, sandbox, name):
    zai = pytest.importorskip("zai")
    with getattr(zai, name)(api_key=KEY, base_url=server.base_url, http_client=httpx.Client(trust_env=False)) as client:
        reply = client.images.generations(model="cogview-4-250304", prompt="a kitten", size="1344x768")
    assert reply.data[0].url.startswith(server.origin + "/files/")
    assert download(reply.data[0].url).size == (1344, 768)
    assert KEY not in repr(sandbox.requests)


def test_openai_gets_its_image(server, sandbox):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=server.base_url, api_key=KEY, max_retries=0) as client:
        reply = client.images.generate(model="cogview-4-250304", prompt="a kitten", size="1024x1024")
        assert download(reply.data[0].url).size == (1024, 1024)
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


def test_closing_does_not_wait_for_a_slow_image_or_an_idle_client(sandbox):
    before = threading.active_count()
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
    server.close()
    assert failed.wait(PATIENCE)
    caller.join()
    until(lambda: threading.active_count() <= before and not sandbox.in_flight)
    assert idle.recv(1) == b""
    idle.close()
    server.close()
    with pytest.raises(RuntimeError, match="not running"):
        server.base_url  # noqa: B018
    gc.collect()


def test_a_server_can_be_started_again_but_not_twice():
    server = SandboxServer()
    with server:
        with pytest.raises(RuntimeError, match="already running"):
            server.start()
    with server:
        assert httpx.get(server.origin, trust_env=False).json() == recorded("seen-200-wrong-route")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
def test_only_this_machine_is_served(host):
    with pytest.raises(ValueError, match="only this machine"):
        SandboxServer(host=host)


@pytest.mark.parametrize(("host", "start"), [("localhost", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_other_loopback_addresses_are_served(host, start):
    try:
        server = SandboxServer(host=host).start()
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with httpx.Client(trust_env=False, headers=AUTHORIZED) as client:
        url = client.post(server.base_url + "/images/generations", json=BODY).json()["data"][0]["url"]
        assert url.startswith(start)
        assert client.get(url).headers["content-type"] == "image/png"
    server.close()
