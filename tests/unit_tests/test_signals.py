"""What a signal handler raises in the middle of a call belongs to the caller, with a note that says what may have been paid."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from langchain_core.rate_limiters import BaseRateLimiter

from langchain_cogview import CogViewImageGenerator, CogViewImageTool
from tests.conftest import FAKE_KEY
from tests.faults.server import FaultServer

REPOSITORY = Path(__file__).parents[2]


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
    return CogViewImageGenerator(base_url=server.base_url, api_key=FAKE_KEY, timeout=200, **settings)


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
    assert server.image_url in notes
    assert server.requests[0].json()["request_id"] in notes


@pytest.mark.parametrize("kind", ["partial", "object", "not installed any more", "takes anything"])
@pytest.mark.parametrize("get", [None, signals], ids=["reply", "download"])
def test_it_passes_through_whatever_the_handler_is(kind, get):
    def handle(number, frame):
        raise AlarmError("time is up")

    class Handler:
        def __call__(self, number, frame):
            raise AlarmError("time is up")

    def handle_once(number, frame):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        raise AlarmError("time is up")

    def handle_anything(*anything):
        raise AlarmError("time is up")

    handlers = {
        "partial": functools.partial(handle),
        "object": Handler(),
        "not installed any more": handle_once,
        "takes anything": handle_anything,
    }
    before = signal.signal(signal.SIGUSR1, handlers[kind])
    try:
        with FaultServer(None if get else signals, get) as server, pytest.raises(AlarmError):
            CogViewImageTool(generator=generator_for(server)).invoke({"prompt": "a kitten"})
        assert server.posts == 1
    finally:
        signal.signal(signal.SIGUSR1, before)


class SlowStore(MemoryFileSystem):
    """A store that never answers; somebody signals meanwhile."""

    protocol = "slow"
    cachable = False

    def pipe_file(self, path, value, **options):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        threading.Event().wait(5)
        raise ConnectionError

    cat_file = pipe_file


def test_while_an_image_is_uploaded_it_passes_through_and_says_where_the_image_is(raised, sandbox):
    fsspec.register_implementation("slow", SlowStore, clobber=True)
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir="slow://bucket/images")
    with pytest.raises(raised) as caught:
        tool.invoke({"prompt": "a kitten"})
    assert type(caught.value) is raised
    assert "was made and paid for" in " ".join(caught.value.__notes__)


def test_while_an_image_is_saved_it_passes_through(raised, sandbox, tmp_path, monkeypatch):
    # A network mount that hangs: the call of the system is interrupted by the signal.
    def hangs(*arguments, **options):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1)

    monkeypatch.setattr(os, "link", hangs)
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path)
    with pytest.raises(raised) as caught:
        tool.invoke({"prompt": "a kitten"})
    assert "was made and paid for" in " ".join(caught.value.__notes__)


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


@pytest.mark.heavy
@pytest.mark.parametrize("stage", ["reply", "download"])
def test_celerys_soft_time_limit_ends_a_task_and_the_note_says_what_may_have_been_paid(stage, tmp_path):
    pytest.importorskip("celery")
    script = tmp_path / "work.py"
    script.write_text(CELERY_WORKER)
    fault = (signals_nobody, None) if stage == "reply" else (None, signals_nobody)
    with FaultServer(*fault) as server:
        done = subprocess.run(
            [sys.executable, str(script), server.base_url, str(tmp_path)],
            cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
            check=False, timeout=400, start_new_session=True,
        )  # fmt: skip
        report = (
            json.loads((tmp_path / "report.json").read_text()) if (tmp_path / "report.json").exists() else done.stderr
        )
        assert report["error"] == "SoftTimeLimitExceeded"
        assert server.posts == 1
        assert server.requests[0].json()["request_id"] in report["notes"]
        assert ("may have been made and charged" if stage == "reply" else server.image_url) in report["notes"]


def signals_nobody(connection, request):
    connection.hang()


CELERY_WORKER = """
import json, os, signal, sys, threading
from pathlib import Path
from celery import Celery
from langchain_cogview import CogViewImageGenerator

base_url, folder = sys.argv[1], Path(sys.argv[2])
for name in ("in", "kept"):
    (folder / name).mkdir(exist_ok=True)
app = Celery("work", broker="filesystem://", broker_transport_options={
    "data_folder_in": str(folder / "in"), "data_folder_out": str(folder / "in"), "processed_folder": str(folder / "kept"),
    "control_folder": str(folder / "kept"),
})

@app.task(name="generate", soft_time_limit=10, time_limit=300)
def generate():
    report = {}
    try:
        CogViewImageGenerator(base_url=base_url, api_key="any", timeout=300).invoke("a kitten")
    except BaseException as error:
        report = {"error": type(error).__name__, "notes": " ".join(getattr(error, "__notes__", []))}
    (folder / "report.part").write_text(json.dumps(report))
    (folder / "report.part").rename(folder / "report.json")

def stop():
    while not (folder / "report.json").exists():
        threading.Event().wait(0.1)
    os.killpg(0, signal.SIGKILL)  # the session is the worker's own

generate.apply_async()
threading.Thread(target=stop, daemon=True).start()
app.worker_main(["worker", "--pool=prefork", "--concurrency=1", "--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "ERROR"])
"""
