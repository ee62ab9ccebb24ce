"""How an image is fetched: which failures may pass by themselves, which redirects are followed, and what threads write."""

import asyncio
import socket
import ssl
import threading
from datetime import timedelta

import httpcore
import httpx
import pytest
import trustme

from langchain_cogview import CogViewDownloadError, CogViewImageGenerator
from langchain_cogview.addresses import AddressRefusedError, LinkRules
from langchain_cogview.concurrency import Deadline
from langchain_cogview.images import download, store
from langchain_cogview.images.download import afetch, fetch
from tests.conftest import FAKE_KEY
from tests.faults.reply_table import says
from tests.faults.sample_images import png
from tests.faults.server import IMAGE, FaultServer
from tests.host import Host, http

HOWS = pytest.mark.parametrize("how", ["sync", "async"])
LINK = "https://images.example/a.png"


def fetched(how, answer, url=LINK, *, seconds=5.0, rules=LinkRules(), **more):  # noqa: B008
    """Fetch from a function that answers each request with a response or an exception."""

    def send(request):
        reply = answer(request)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def asend(request):
        return send(request)

    if how == "sync":
        return fetch(send, url, deadline=Deadline(seconds), rules=rules, **more)
    return asyncio.run(afetch(asend, url, deadline=Deadline(seconds), rules=rules, **more))


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that is unread yet, in small chunks."""

    def __init__(self, content):
        self.chunks = [content[start : start + 10_000] for start in range(0, len(content), 10_000)]

    def __iter__(self):
        yield from self.chunks

    async def __aiter__(self):
        for chunk in self.chunks:
            yield chunk


def caused(error, cause):
    error.__cause__ = cause
    return error


FAULTS = {
    "an untrusted certificate": (
        caused(httpx.ConnectError("x"), ssl.SSLCertVerificationError(1, "self-signed")),
        False,
    ),
    "an untrusted certificate, deep": (
        caused(httpx.ConnectError("x"), caused(httpcore.ConnectError("y"), ssl.SSLCertVerificationError(1, "old"))),
        False,
    ),
    "no TLS": (caused(httpx.ConnectError("x"), ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER]")), False),
    "a refused address": (AddressRefusedError("x"), False),
    "an unsupported scheme": (httpx.UnsupportedProtocol("x"), False),
    "a request that cannot be sent": (httpx.LocalProtocolError("x"), False),
    "a link that is none": (httpx.InvalidURL("x"), False),
    "a name that is none": (UnicodeError("label too long"), False),
    "a proxy that wants a password": (httpx.ProxyError("407 Proxy Authentication Required"), False),
    "a proxy that forbids": (httpx.ProxyError("403 Forbidden"), False),
    "a proxy in trouble": (httpx.ProxyError("503 Service Unavailable"), True),
    "TLS that broke": (caused(httpx.ConnectError("x"), ssl.SSLEOFError(8, "EOF")), True),
    "TLS that broke later": (caused(httpx.ReadError("x"), ssl.SSLError(1, "[SSL: BAD_RECORD_MAC]")), True),
    "a refused connection": (caused(httpx.ConnectError("x"), ConnectionRefusedError(111, "refused")), True),
    "a name that is not known": (caused(httpx.ConnectError("x"), socket.gaierror(-2, "not known")), True),
    "a reset": (httpx.ReadError("reset"), True),
    "no HTTP": (httpx.RemoteProtocolError("x"), True),
    "a plain OSError": (OSError(113, "no route"), True),
}


@HOWS
@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_is_tried_again_only_where_it_may_pass(how, name, monkeypatch):
    error, is_transient = FAULTS[name]
    monkeypatch.setattr(download, "WAITS", (0.0, 0.0, 1000.0))  # the last wait goes beyond the deadline
    asked = []

    def answer(request):
        asked.append(request)
        return error

    with pytest.raises(CogViewDownloadError) as caught:
        fetched(how, answer, seconds=100)
    assert caught.value.transient is is_transient
    assert len(asked) == (3 if is_transient else 1)


@HOWS
def test_what_is_not_of_the_network_passes_through(how):
    class SoftTimeLimitExceeded(Exception):  # noqa: N818  as Celery calls it
        pass

    with pytest.raises(SoftTimeLimitExceeded):
        fetched(how, lambda _: SoftTimeLimitExceeded())
    with FaultServer() as server:
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=FAKE_KEY)

        def stop(*_, **__):
            raise SoftTimeLimitExceeded

        with pytest.MonkeyPatch.context() as patch, pytest.raises(SoftTimeLimitExceeded) as caught:
            patch.setattr(download.ImageFile, "write", stop)
            generator.invoke("x") if how == "sync" else asyncio.run(generator.ainvoke("x"))
        assert any(server.image_url in note for note in caught.value.__notes__)
        assert server.posts == 1


@HOWS
def test_an_untrusted_certificate_is_not_asked_again_and_is_reported(how):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    with Host(http(200, IMAGE), context) as host, FaultServer() as server:
        link = f"https://localhost:{host.port}/x.png"
        server.api = says({"data": [{"url": link}]})
        generator = CogViewImageGenerator(
            base_url=server.base_url, api_key=FAKE_KEY, timeout=timedelta(hours=1), allowed_image_hosts="localhost"
        )
        result = generator.invoke("x") if how == "sync" else asyncio.run(generator.ainvoke("x"))
    assert result.images[0].url == link
    assert "certificate" in result.images[0].warnings[0]


@HOWS
def test_a_redirect_leads_nowhere_that_a_first_link_may_not(how):
    rules = LinkRules("https://api.example", ("images.example", "cdn.example", "10.0.0.5:8080", "*.wild.example"))
    for target, why in (
        ("http://images.example/b.png", "not https"),  # never from https to http
        ("http://10.0.0.5:8080/b.png", "not https"),
        ("https://other.example/b.png", "allowed_image_hosts"),
        ("https://a.wild.example:8443/b.png", "allowed_image_hosts"),
        ("https://10.0.0.5:8081/b.png", "allowed_image_hosts"),
        ("https://user@cdn.example/b.png", "valid link"),
        ("file:///etc/passwd", "not https"),
        ("javascript:alert(1)", "not https"),
    ):
        asked = []

        def answer(request, target=target, asked=asked):
            asked.append(str(request.url))
            return httpx.Response(302, headers={"Location": target})

        with pytest.raises(CogViewDownloadError, match=why) as caught:
            fetched(how, answer, rules=rules)
        assert not caught.value.transient
        assert asked == [LINK]


@HOWS
def test_a_redirect_to_an_allowed_host_carries_its_own_address_check_and_no_header_of_the_first(how):
    asked = []

    def answer(request):
        asked.append(request)
        if len(asked) == 1:
            return httpx.Response(307, headers={"Location": "//10.0.0.5:8080/b.png", "Set-Cookie": "a=b"})
        return httpx.Response(200, stream=Body(IMAGE))

    rules = LinkRules(allowed_hosts=("images.example", "10.0.0.5:8080"))
    assert fetched(how, answer, rules=rules).content == IMAGE
    first, second = asked
    assert str(second.url) == "https://10.0.0.5:8080/b.png"
    assert first.extensions["cogview.addresses"] is not second.extensions["cogview.addresses"]
    assert {name.lower() for name in second.headers} <= {"host", "accept", "accept-encoding", "user-agent"}


async def test_files_are_opened_written_and_named_by_threads_alone(tmp_path, monkeypatch):
    large = png(1024, 1024, noise="threads")  # more than one piece
    loop_thread = threading.current_thread()
    seen = []
    for name in ("open", "link", "mkdir", "write"):
        real = getattr(store.os, name)

        def noted(*args, real=real, name=name, **more):
            seen.append((name, threading.current_thread()))
            return real(*args, **more)

        monkeypatch.setattr(store.os, name, noted)

    async def asend(request):
        return httpx.Response(200, stream=Body(large))

    image = await afetch(asend, LINK, deadline=Deadline(30), folder=tmp_path / "below", label="x")
    assert image.path.read_bytes() == large
    assert {name for name, _ in seen} >= {"open", "link", "mkdir"}
    assert all(thread is not loop_thread for _, thread in seen)


async def test_a_caller_that_leaves_while_its_image_is_saved_finds_it_in_the_folder(tmp_path, monkeypatch):
    reached, go = threading.Event(), threading.Event()
    real = store.ImageFile.save

    def held(*args, **more):
        reached.set()
        assert go.wait(30)
        return real(*args, **more)

    monkeypatch.setattr(store.ImageFile, "save", held)

    async def asend(request):
        return httpx.Response(200, stream=Body(IMAGE))

    task = asyncio.create_task(afetch(asend, LINK, deadline=Deadline(30), folder=tmp_path))
    await asyncio.to_thread(reached.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    for _ in range(3000):
        if list(tmp_path.glob("*.png")):
            break
        await asyncio.sleep(0.01)
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == IMAGE


async def test_a_caller_that_leaves_half_way_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.delattr(store.os, "O_TMPFILE", raising=False)
    here = asyncio.Event()

    class Half(httpx.AsyncByteStream):
        async def __aiter__(self):
            yield IMAGE[:20] + bytes(2**20)
            here.set()
            await asyncio.Event().wait()

    async def asend(request):
        return httpx.Response(200, stream=Half())

    task = asyncio.create_task(afetch(asend, LINK, deadline=Deadline(30), folder=tmp_path))
    await here.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(tmp_path.iterdir()) == []


@HOWS
def test_the_warning_names_what_went_wrong_and_the_folder(how, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with FaultServer() as server:
        generator = CogViewImageGenerator(
            base_url=server.base_url, api_key=FAKE_KEY, output_dir=tmp_path / "file" / "below"
        )
        image = (generator.invoke("x") if how == "sync" else asyncio.run(generator.ainvoke("x"))).images[0]
    assert "Not a directory" in image.warnings[0]
    assert str(tmp_path / "file" / "below") in image.warnings[0]
    assert image.read() == IMAGE
