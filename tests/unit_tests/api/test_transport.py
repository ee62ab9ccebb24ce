"""Connections: kept for the next request only while they are clean, bounded in what a reply can do, and never in a loop's way."""

import asyncio
import logging
import ssl
import threading
import time

import httpcore
import httpx
import pytest
import trustme
from pydantic import SecretStr

from langchain_cogview import CogViewImageGenerator, CogViewOutcomeUnknownError
from langchain_cogview.api.endpoint import Call, Endpoint
from langchain_cogview.api.network import ReplyGuard
from langchain_cogview.api.protocol import read_reply
from langchain_cogview.api.sending import asender, sender
from langchain_cogview.api.transport import AsyncTransport, SyncTransport
from langchain_cogview.concurrency import Deadline
from tests.conftest import FAKE_KEY
from tests.faults.server import FaultServer, at
from tests.faults.tokens import token

both = pytest.mark.parametrize("how", ["sync", "async"])


def ask(url, how, times=1, *, pause=None, timeout=60.0, content=b"{}", keepalive_seconds=30.0, **extensions):
    """Status, body, and whether an error came, of several requests over one transport."""

    def request():
        limits = dict.fromkeys(("connect", "read", "write", "pool"), timeout)
        return httpx.Request("POST", url, content=content, extensions={"timeout": limits, **extensions})

    def sync():
        transport = SyncTransport(keepalive_seconds=keepalive_seconds)
        try:
            for _ in range(times):
                response = transport.handle_request(request())
                response.read()
                response.close()
                if pause:
                    pause.wait(60)
                yield response
        finally:
            transport.close()

    async def asynchronous():
        transport, responses = AsyncTransport(keepalive_seconds=keepalive_seconds), []
        for _ in range(times):
            async with asyncio.timeout(timeout):
                response = await transport.handle_async_request(request())
                await response.aread()
                await response.aclose()
            if pause:
                await asyncio.to_thread(pause.wait, 60)
            responses.append(response)
        await transport.aclose()
        return responses

    return list(sync()) if how == "sync" else asyncio.run(asynchronous())


def saying(*parts, keep=True):
    def fault(connection, request):
        connection.send(*parts)
        connection.keep = keep

    return fault


SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
TRAILED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\nX-T: 1\r\n\r\n"
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + SIZED


@both
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("reply", [SIZED, CHUNKED, TRAILED, EARLY], ids=["sized", "chunked", "trailer", "hints"])
def test_a_connection_serves_the_next_request_whatever_framing_the_reply_has(reply, scheme, how, tls):
    with FaultServer(saying(reply), tls=tls if scheme == "https" else None) as server:
        responses = ask(server.base_url, how, 3)
        assert [response.content for response in responses] == [b"abc"] * 3
        assert (server.posts, server.connections) == (3, 1)


@both
def test_a_connection_that_was_idle_for_too_long_is_not_used_again(how):
    with FaultServer(saying(SIZED)) as server:
        ask(server.base_url, how, 3, keepalive_seconds=-1.0)
        assert (server.posts, server.connections) == (3, 3)


@both
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("behind", [b"X", SIZED], ids=["a byte", "a reply"])
@pytest.mark.parametrize("reply", [SIZED, CHUNKED], ids=["sized", "chunked"])
def test_a_connection_with_something_behind_its_reply_is_not_used_again(reply, behind, scheme, how, tls):
    with FaultServer(saying(reply + behind), tls=tls if scheme == "https" else None) as server:
        assert [response.content for response in ask(server.base_url, how, 3)] == [b"abc"] * 3
        assert (server.posts, server.connections) == (3, 3)


@both
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_unasked_reply_on_an_idle_connection_is_nobodys(scheme, how, tls):
    sent = threading.Event()

    def fault(connection, request):
        sent.clear()
        connection.send(SIZED)
        connection.send(SIZED.replace(b"abc", b"NOT"))  # of its own: another TLS record
        connection.keep = True
        sent.set()

    with FaultServer(fault, tls=tls if scheme == "https" else None) as server:
        assert [response.content for response in ask(server.base_url, how, 3, pause=sent)] == [b"abc"] * 3
        assert server.connections == 3


@both
@pytest.mark.parametrize("way", ["http", "https", "proxy"])
def test_a_reply_that_comes_before_the_request_is_refused_and_nothing_is_sent(way, how, tls, monkeypatch):
    sent = threading.Event()

    @at("connect")
    def speaks_first(connection, request):
        connection.send(SIZED)
        sent.set()
        connection.sock.settimeout(5)
        assert connection.sock.recv(100) == b""

    with FaultServer(speaks_first, tls=tls if way == "https" else None) as server:
        url = server.base_url
        if way == "proxy":
            monkeypatch.setenv("HTTP_PROXY", server.origin)
            url = "http://api.invalid/v4"

        def wait_a_moment(event, info):
            if event.endswith("send_request_headers.started"):
                sent.wait(2)
                time.sleep(0.02)  # through the loopback interface

        async def await_a_moment(event, info):
            wait_a_moment(event, info)

        with pytest.raises(httpx.ConnectError, match="before the request"):
            ask(url, how, trace=wait_a_moment if how == "sync" else await_a_moment)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def tls(authority, tmp_path, monkeypatch):
    """A server's context, and the trust in it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return context


# What a reply can do to its reader.


SLOW = {
    "blanks": b"X-A:" + b" " * 60_000 + b"\0\r\nContent-Length: 3\r\n\r\nabc",
    "endless blanks": b"X-A:" + b" " * 60_000,
    "tabs": b"X-A:" + b"\t" * 60_000 + b"\r\r\n\r\n",
    "a long head": b"X: a\r\n" * 40_000 + b"\r\n",
    "blanks before a chunk": b"Transfer-Encoding: chunked\r\n\r\n5;" + b" " * 60_000 + b"\n\r\n",
    "blanks in a trailer": b"Transfer-Encoding: chunked\r\n\r\n0\r\nX:" + b" " * 60_000 + b"\0\r\n\r\n",
}


@both
@pytest.mark.parametrize("way", ["direct", "proxied"])
@pytest.mark.parametrize("name", SLOW)
def test_what_is_made_to_be_read_slowly_is_refused(name, way, how, monkeypatch):
    # Without a bound h11 takes half a minute for most of these, in which neither deadline nor event loop has a say.
    with FaultServer(saying(b"HTTP/1.1 200 OK\r\n" + SLOW[name], keep=False)) as server:
        url = server.base_url
        if way == "proxied":
            monkeypatch.setenv("HTTP_PROXY", server.origin)
            url = "http://api.invalid/v4"
        # The text is that of the bound, not of h11, which refuses most of these as well, but late.
        with pytest.raises(httpx.RemoteProtocolError, match=r"larger than 100 kB|too many blanks|too much between"):
            ask(url, how)


@both
def test_blanks_in_a_body_are_a_body(how):
    body = b" " * 0x2000
    for reply in (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2000\r\n" + body + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 8192\r\n\r\n" + body,
    ):
        with FaultServer(saying(reply)) as server:
            assert [item.content for item in ask(server.base_url, how, 2)] == [body] * 2
            assert server.connections == 1


def test_the_head_comes_alone_and_the_last_byte_too():
    guard = ReplyGuard()
    guard.put(SIZED)
    assert guard.read(2**16) == SIZED[:-3]
    guard.head_was_read(404, [(b"Content-Length", b"3")])
    assert [guard.read(2**16), guard.read(2**16), guard.is_empty] == [b"ab", b"c", True]


def test_a_head_that_is_cut_anywhere_ends_at_its_blank_line():
    head = SIZED[:-3]
    for cut in range(1, len(head)):
        guard = ReplyGuard()
        guard.put(SIZED[:cut])
        first = guard.read(2**16)
        guard.put(SIZED[cut:])
        assert first + guard.read(2**16) == head


@both
def test_a_megabyte_in_chunks_of_one_byte_ends_soon_and_holds_no_loop(how):
    beats = []

    async def beside(task):
        while not task.done():
            beats.append(task)
            await asyncio.sleep(0)

    async def asynchronous(generator):
        task = asyncio.create_task(generator.ainvoke("x"))
        await beside(task)
        await task

    parts = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 1_000_000
    with FaultServer(saying(parts, keep=False)) as server:
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=FAKE_KEY, timeout=200, max_retries=0)
        with pytest.raises(CogViewOutcomeUnknownError) as caught:
            generator.invoke("x") if how == "sync" else asyncio.run(asynchronous(generator))
    assert "too many tiny chunks" in str(caught.value.detail)
    if how == "async":
        assert len(beats) > 3


# Logs.


@both
def test_the_library_logs_no_head_of_a_reply(how, caplog):
    caplog.set_level(logging.DEBUG)
    with FaultServer(
        saying(SIZED.replace(b"\r\n\r\n", b"\r\nX-Echo: Bearer %s\r\n\r\n" % FAKE_KEY.encode()))
    ) as server:
        assert ask(server.base_url, how)[0].headers["x-echo"].endswith(FAKE_KEY)
        httpcore.request("POST", server.base_url)
    ours = [record for record in caplog.records if record.name.startswith("httpcore")]
    shown = [record for record in ours if FAKE_KEY in record.getMessage()]
    assert len(shown) == 1, "a caller's own request is logged as ever, and ours is not"
    assert "receive_response_headers.complete" in {record.getMessage() for record in ours}


# Replies of other requests.


@both
def test_a_reply_with_another_request_id_is_an_unknown_outcome_and_ends_its_connection(how):
    def fault(connection, request):
        sent = request.json()
        named = f"{connection.server.origin}/{token(sent['prompt'])}.png"
        ours = sent["request_id"] if request.number != 2 else "of-somebody-else"
        connection.json({"data": [{"url": named}], "request_id": ours})

    async def asynchronous(generator):
        return [*(await asyncio.gather(generator.ainvoke("a"), return_exceptions=True)),
                *(await asyncio.gather(generator.ainvoke("b"), return_exceptions=True)),
                *(await asyncio.gather(generator.ainvoke("c"), return_exceptions=True))]  # fmt: skip

    with FaultServer(fault) as server:
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=FAKE_KEY, timeout=60, download=False)
        if how == "sync":
            outcomes = generator.batch(["a", "b", "c"], {"max_concurrency": 1}, return_exceptions=True)
        else:
            outcomes = asyncio.run(asynchronous(generator))
        assert [type(outcome).__name__ for outcome in outcomes] == [
            "ImageResult",
            "CogViewOutcomeUnknownError",
            "ImageResult",
        ]
        assert "another request" in outcomes[1].message
        assert (server.posts, server.connections) == (3, 2)


# Replies that come before the request was sent.


LARGE = b"x" * 2**25 + b"end"
"""More than the system's buffers hold, so that the server decides when the request goes on."""


def before_the_body(reply, then=None):
    """Replies to the head of a request, and then reads its body, waits, or closes."""

    @at("head")
    def fault(connection, request):
        connection.send(reply)
        if then == "hang":
            connection.hang()
        elif then:
            read = b""
            while not read.endswith(b"end"):
                read = read[-3:] + connection.sock.recv(2**16)
            connection.send(then)

    return fault


def large_request(how, way, server, monkeypatch):
    url = server.base_url
    if way == "proxied":
        monkeypatch.setenv("HTTP_PROXY", server.origin)
        url = "http://api.invalid/v4"
    return ask(url, how, content=LARGE)[0]


ways = pytest.mark.parametrize("way", ["http", "https", "proxied"])


@both
@ways
@pytest.mark.parametrize("status", [b"200 OK", b"201 Created"])
def test_a_success_that_comes_before_the_whole_request_is_not_taken_for_its_reply(status, way, how, tls, monkeypatch):
    reply = SIZED.replace(b"200 OK", status)
    with (
        FaultServer(before_the_body(reply, "hang"), tls=tls if way == "https" else None) as server,
        pytest.raises(httpx.ReadError, match="before it had the whole request"),
    ):
        large_request(how, way, server, monkeypatch)


@both
@ways
def test_an_error_that_comes_before_the_whole_request_is_read_and_ends_the_connection(way, how, tls, monkeypatch):
    reply = SIZED.replace(b"200 OK", b"413 Too Large")
    with FaultServer(before_the_body(reply, "hang"), tls=tls if way == "https" else None) as server:
        response = large_request(how, way, server, monkeypatch)
        assert (response.status_code, response.content) == (413, b"abc")
        end = time.monotonic() + 60
        while not server.seen_closing:
            assert time.monotonic() < end, "the connection stays open"
            time.sleep(0.01)


@both
@ways
def test_an_interim_reply_before_the_whole_request_changes_nothing(way, how, tls, monkeypatch):
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    with FaultServer(before_the_body(hints, SIZED), tls=tls if way == "https" else None) as server:
        response = large_request(how, way, server, monkeypatch)
        assert (response.status_code, response.content) == (200, b"abc")


@both
def test_a_paid_request_with_an_early_success_has_an_unknown_outcome(how):
    body = {"prompt": "x" * 2**25, "request_id": "r-1"}
    found = b'{"data":[{"url":"https://images.example/a.png"}]}'
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(found), found)
    with FaultServer(before_the_body(reply, "hang")) as server:
        endpoint = Endpoint(server.base_url, SecretStr(FAKE_KEY), server.base_url, sender(None), asender(None))
        call = Call("POST", "/images/generations", body)
        with pytest.raises(CogViewOutcomeUnknownError, match="may have been made and charged"):
            if how == "sync":
                endpoint.exchange(call, Deadline(5), read_reply)
            else:
                asyncio.run(endpoint.aexchange(call, Deadline(5), read_reply))


@both
@pytest.mark.parametrize(
    "form",
    [str.upper, lambda sent: sent.replace("-", ""), lambda sent: f" {sent}\n", lambda sent: 5, lambda sent: None],
    ids=["capitals", "without dashes", "with blanks", "a number", "null"],
)
def test_a_request_id_in_another_form_is_the_same_and_what_is_no_id_says_nothing(how, form):
    def fault(connection, request):
        url = f"{connection.server.origin}/a.png"
        connection.json({"data": [{"url": url}], "request_id": form(request.json()["request_id"])})

    with FaultServer(fault) as server:
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=FAKE_KEY, timeout=60, download=False)
        result = generator.invoke("a") if how == "sync" else asyncio.run(generator.ainvoke("a"))
        assert result.url.endswith("/a.png")
        assert server.posts == 1
