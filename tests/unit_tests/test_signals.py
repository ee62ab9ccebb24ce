"""What a signal handler raises in the middle of a call belongs to the caller, with a note that says what may have been paid."""

import os
import signal
import time
import traceback

import pytest
from langchain_core.rate_limiters import BaseRateLimiter

from langchain_cogview import CogViewImageGenerator, CogViewImageTool
from tests.conftest import FAKE_KEY
from tests.faults.server import FaultServer


class SoftTimeLimitError(Exception):
    """As Celery's, which is no BaseException."""


class AlarmError(TimeoutError):
    """Of a class that sockets raise too."""


class BrokenError(ConnectionResetError):
    pass


@pytest.fixture(params=[SoftTimeLimitError, AlarmError, BrokenError, TimeoutError, KeyboardInterrupt, SystemExit])
def raised(request):
    def handler(number, frame):
        raise request.param("time is up")

    before = signal.signal(signal.SIGUSR1, handler)
    yield request.param
    signal.signal(signal.SIGUSR1, before)


def signals(connection, request):
    """Once the request is here, signal this process, and never answer."""
    os.kill(os.getpid(), signal.SIGUSR1)
    connection.hang()


def answers_half(connection, request):
    connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
    time.sleep(0.05)  # so that it is being read
    signals(connection, request)


def generator_for(server, **settings):
    return CogViewImageGenerator(base_url=server.base_url, api_key=FAKE_KEY, timeout=30, **settings)


ways = pytest.mark.parametrize(
    "call",
    [
        lambda generator: generator.invoke("a kitten"),
        lambda generator: generator.batch(["a kitten"]),
        lambda generator: CogViewImageTool(generator=generator).invoke({"prompt": "a kitten"}),
    ],
    ids=["invoke", "batch", "tool"],
)


@ways
@pytest.mark.parametrize("fault", [signals, answers_half], ids=["no answer", "half an answer"])
def test_a_signals_exception_passes_through_and_says_what_may_have_been_paid(raised, call, fault):
    with FaultServer(fault) as server:
        with pytest.raises(raised) as caught:
            call(generator_for(server))
        assert type(caught.value) is raised
        assert server.posts == 1
        notes = " ".join(caught.value.__notes__)
    assert "may have been made and charged" in notes
    assert server.requests[0].json()["request_id"] in notes


@ways
def test_during_the_download_it_passes_through_and_says_where_the_image_is(raised, call):
    with FaultServer(None, signals) as server:
        with pytest.raises(raised) as caught:
            call(generator_for(server))
        assert (server.posts, server.gets) == (1, 1)
        notes = " ".join(caught.value.__notes__)
    assert server.picture_url in notes
    assert server.requests[0].json()["request_id"] in notes


class Signalling(BaseRateLimiter):
    def acquire(self, *, blocking=True):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1)
        return True

    async def aacquire(self, *, blocking=True):
        return self.acquire()


def test_before_the_request_is_sent_nothing_is_said_to_be_paid(raised):
    with FaultServer() as server:
        generator = generator_for(server, max_concurrency=1)
        limiter = Signalling()
        with pytest.raises(raised) as caught:
            generator.model_copy(update={"rate_limiter": limiter}).invoke("a kitten")
        assert server.posts == 0
        assert "charged" not in " ".join(getattr(caught.value, "__notes__", []))
        assert generator.invoke("the slot is free again").images


def test_what_a_traceback_shows_of_it_holds_no_key(raised):
    with FaultServer(signals) as server:
        with pytest.raises(raised) as caught:
            generator_for(server).invoke("a kitten")
    frames = [
        frame for frame, _ in traceback.walk_tb(caught.value.__traceback__) if frame.f_code.co_filename != __file__
    ]
    assert FAKE_KEY not in repr([frame.f_locals for frame in frames])
    assert caught.value.__cause__ is caught.value.__context__ is None
