"""Whatever becomes of the image's bytes, the paid result is kept, and nobody is sent where nobody should go."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import anyio
import pytest

from langchain_cogview import CogViewImageGenerator
from langchain_cogview.errors import CogViewDownloadError
from langchain_cogview.images import download
from tests.faults.downloads import DOWNLOADS
from tests.faults.referee import TOO_LONG_TO_WAIT, Guard, How, Verdict, call, judge_download
from tests.faults.reply_table import AMPLE, KEY, in_turn, says, sends
from tests.faults.sample_images import HTML
from tests.faults.server import IMAGE, FaultServer, good_image

LONG = {
    # Each waits a second before it fetches again; the ordinary run shows that by "not there yet" and "HTML for a moment".
    "nothing for a moment, then good",
    "500 once, then good",
    "503 once, then good",
    "reset once, then good",
    "half of it once, then good",
    "never there, with time for a few tries",
    "a redirect to what is not there yet, then good",
    "chunks without end",
    "a name that leads elsewhere the second time, https://images.test:CANARY/x.png",
}
HOWS = pytest.mark.parametrize("how", ["sync", "async"])


@HOWS
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.heavy] * (name in LONG)) for name in DOWNLOADS])
def test_a_download_never_fails_the_call(name: str, how: How, tmp_path: Path) -> None:
    verdict = judge_download(DOWNLOADS[name], how, tmp_path)
    assert not verdict.problems


@HOWS
def test_bytes_stay_on_the_result_without_a_folder(how: How) -> None:
    with FaultServer() as server:
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=KEY, timeout=AMPLE)
        image = call(generator, how, Verdict()).images[0]
        assert image.path is None
        assert image.read() == IMAGE
        assert server.gets == 1


@HOWS
def test_read_fetches_again_what_could_not_be_fetched(how: How, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAITS", TOO_LONG_TO_WAIT)
    with FaultServer(None, in_turn(sends(HTML), good_image)) as server:
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=KEY, timeout=AMPLE)
        image = call(generator, how, Verdict()).images[0]
        assert image.warnings
        assert image.read() == IMAGE
        assert server.posts == 1


def test_read_says_why_there_are_no_bytes() -> None:
    with FaultServer(None, sends(b"", 403)) as server:
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=KEY, timeout=AMPLE)
        image = call(generator, "sync", Verdict()).images[0]
        with pytest.raises(CogViewDownloadError):
            image.read()


@HOWS
def test_another_port_of_the_same_loopback_host_is_asked_only_where_it_is_named(how: How) -> None:
    with FaultServer() as other, FaultServer() as server:
        server.api = says({"data": [{"url": other.image_url}]})
        for hosts, gets in (
            (None, 0),
            (f"127.0.0.1:{server.port}", 0),
            (f"127.0.0.1:{other.port}", 1),
            ("127.0.0.1", 2),
        ):
            generator = CogViewImageGenerator(
                base_url=server.base_url, api_key=KEY, timeout=AMPLE, allowed_image_hosts=hosts
            )
            image = call(generator, how, Verdict()).images[0]
            assert (server.gets, other.gets, other.posts) == (0, gets, 0)
            assert bool(image.warnings) is (gets == 0)


@HOWS
def test_a_reply_with_64_links_costs_one_fetch_and_names_the_others(how: How, caplog: pytest.LogCaptureFixture) -> None:
    with FaultServer() as server:
        server.api = says({"data": [{"url": f"IMAGE_URL?{number}"} for number in range(64)]})
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=KEY, timeout=AMPLE)
        result = call(generator, how, Verdict())
        assert (server.posts, server.gets) == (1, 1)
        assert len(result.images) == 1
        assert result.images[0].read() == IMAGE
        assert any("63 more images" in warning for warning in result.images[0].warnings)
        assert f"{server.image_url}?63" in caplog.text


@HOWS
def test_nothing_is_fetched_that_was_not_asked_for(how: How) -> None:
    with FaultServer() as server:
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=KEY, timeout=AMPLE, download=False)
        image = call(generator, how, Verdict()).images[0]
        assert image.url == server.image_url
        assert server.gets == 0


def test_the_guard_of_these_tests_sees_every_way_out() -> None:
    async def streams() -> None:
        await asyncio.open_connection("10.0.0.1", 80)

    async def named() -> None:
        await anyio.connect_tcp("name.test", 80)

    with Guard(lambda _: ["10.0.0.1"]) as guard:
        for attempt in (
            lambda: socket.create_connection(("name.test", 80)),
            lambda: asyncio.run(streams()),
            lambda: asyncio.run(named()),
        ):
            with pytest.raises(OSError):
                attempt()
    assert guard.connects == [("10.0.0.1", 80)] * 3
    assert guard.lookups == ["name.test"] * 2


def test_all_that_can_go_wrong_with_a_download_is_tried() -> None:
    assert len(DOWNLOADS) >= 37
    assert set(DOWNLOADS) > LONG
