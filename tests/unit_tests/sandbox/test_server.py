"""What a user relies on: the served sandbox answers programs of this machine alone, and no client can exhaust it."""

from __future__ import annotations

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

ROUTE = "/api/paas/v4/images/generations"
BODY = {"model": "cogview-4-250304", "prompt": "a kitten"}
PATIENCE = 20
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


# Whom it serves


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
def test_a_page_whose_name_was_made_to_resolve_here_is_refused(server, client, sandbox, host, path):
    sandbox.reply("POST", ROUTE, {"authorization": "Bearer x"}, json.dumps(BODY).encode())
    reply = client.post(path, json=BODY, headers={"host": host.format(port=port(server))})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "1220")
    assert server.origin in reply.json()["error"]["message"]
    assert sandbox.images_made == 1, "nothing was made, nothing was forgotten"


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


def test_a_client_that_waits_for_leave_to_send_its_body_gets_it(server):
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


# What one client can take from the others


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


def test_a_head_that_does_not_end_is_given_up(server, monkeypatch):
    monkeypatch.setattr(served, "HEAD_SECONDS", 0.2)
    dripped(server, b"POST / HTTP/1.1\r\nX: ", iter(lambda: b"x", None))


@pytest.mark.parametrize(
    ("line", "piece"), [("Content-Length: 100000", b"x"), ("Transfer-Encoding: chunked", b"1\r\nx\r\n")]
)
def test_a_body_that_does_not_end_is_given_up(server, sandbox, monkeypatch, line, piece):
    monkeypatch.setattr(served, "BODY_SECONDS", 0.2)
    dripped(server, head(server, line), iter(lambda: piece, None))
    assert not sandbox.requests


def test_an_idle_connection_is_closed(server, monkeypatch):
    monkeypatch.setattr(served, "IDLE_SECONDS", 0.1)
    with connect(server) as silent, connect(server) as used:
        used.sendall(head(server, method="GET", path="/"))
        assert b"".join(iter(lambda: used.recv(65_536), b"")).startswith(b"HTTP/1.1 200")
        assert silent.recv(1) == b""


def test_a_client_that_does_not_read_its_reply_is_given_up(server, client, sandbox, monkeypatch):
    monkeypatch.setattr(served, "WRITE_SECONDS", 0.2)
    monkeypatch.setattr(served, "MAX_CONNECTIONS", 1)
    sandbox.fail_next("status", body=b"x" * 20_000_000)
    with connect(server) as connection:
        connection.sendall(head(server, "Content-Length: 2") + b"{}")
        until(lambda: sandbox.requests)
        until(lambda: client.get("/").status_code == 200)


def test_a_slow_picture_ends_with_its_client(server, sandbox):
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
    assert sandbox.images_made == 20, "the service charges for what nobody waits for"


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
    for each in idle:
        each.close()
    until(lambda: client.post(ROUTE, json=BODY).status_code == 200)


def test_a_call_that_finds_no_connection_is_known_not_to_have_run(server, monkeypatch):
    monkeypatch.setattr(served, "MAX_CONNECTIONS", 0)
    generator = CogViewImageGenerator(base_url=server.base_url, api_key=FAKE_KEY, max_retries=0)
    with pytest.raises(CogViewError) as caught:
        generator.invoke("a kitten")
    assert caught.value.outcome == "not_run"
