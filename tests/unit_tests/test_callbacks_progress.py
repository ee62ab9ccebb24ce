"""Progress is counted whether or not it is shown, one bar is shown on a terminal, and nothing is written elsewhere."""

import asyncio
import contextlib
import fcntl
import gc
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
import weakref

import nbformat
import pytest
from langchain_core.rate_limiters import InMemoryRateLimiter
from nbclient import NotebookClient

from langchain_cogview import CogViewImageGenerator, Sandbox
from langchain_cogview.callbacks import MIN_INTERVAL, ProgressCallbackHandler, collect_image_costs, interactive
from langchain_cogview.errors import CogViewContentFilterError, CogViewInvalidRequestError, CogViewOutcomeUnknownError
from tests.unit_tests.simulated_events import SENDER, blocked, failed, generated, new_id, progress, retry, unknown

DEADLINE = 60.0


class Terminal(contextlib.AbstractContextManager):
    """A terminal that is standard error inside the block; what is written to it can be waited for."""

    def __init__(self, columns=120):
        self._ours, theirs = pty.openpty()
        self.file = open(theirs, "w", encoding="utf-8", buffering=1)
        self.resize(columns)
        self._bytes = b""
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._redirected = contextlib.redirect_stderr(self.file)

    def __enter__(self):
        self._redirected.__enter__()
        return self

    def __exit__(self, *error):
        self._redirected.__exit__(*error)
        self.close()

    def resize(self, columns):
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def _read(self):
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(self._ours, 65536):
                with self._more:
                    self._bytes += chunk
                    self._more.notify_all()

    @property
    def text(self):
        return self._bytes.decode(errors="replace")

    @property
    def updates(self):
        return [line.strip() for line in re.split(r"[\r\n]", self.text) if line.strip()]

    def wait_for(self, text):
        with self._more:
            assert self._more.wait_for(lambda: text in self.text, DEADLINE), self.text

    def close(self):
        """Nothing more is written; all that was is here."""
        self.file.close()
        self._reader.join(DEADLINE)
        with contextlib.suppress(OSError):
            os.close(self._ours)


def join_timers():
    """Wait until a late update of the bar is written."""
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(DEADLINE)


@pytest.fixture(autouse=True)
def _ordinary_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")


# --- what is counted

RUNS = {
    "invoke": lambda inputs, config: [SENDER.invoke(item, config) for item in inputs],
    "ainvoke": lambda inputs, config: [asyncio.run(SENDER.ainvoke(item, config)) for item in inputs],
    "batch": lambda inputs, config: SENDER.batch(inputs, config),
    "abatch": lambda inputs, config: asyncio.run(SENDER.abatch(inputs, config)),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_counts_are_there_when_nothing_is_shown(capsys, run):
    ids = [new_id() for _ in range(5)]
    inputs = [
        [progress("sent", ids[0]), generated(ids[0])],
        [progress("sent", ids[1]), retry(ids[1]), retry(ids[1], attempt=2), generated(ids[1])],
        [progress("sent", ids[2]), blocked(ids[2])],
        [progress("sent", ids[3]), unknown(ids[3])],
        [progress("sent", ids[4])],
        [generated(cached=True, cost="0")],
    ]
    with ProgressCallbackHandler(total=6) as handler:
        run(inputs, {"callbacks": [handler, handler]})
        assert (handler.done, handler.failed, handler.blocked, handler.in_flight) == (3, 1, 1, 1)
        assert (handler.ended, handler.total, handler.retries, handler.skipped) == (5, 6, 2, 0)
        assert str(handler.costs) == (
            "Made 3 images (1 cached) for 0.12 CNY (list prices of 2026-10-01); 1 blocked; 1 failed; 1 in flight; "
            "1 not received but possibly charged (0.06 CNY)"
        )
    assert capsys.readouterr() == ("", "")


def test_what_failed_before_it_was_sent_is_counted_when_it_is_passed():
    handler = ProgressCallbackHandler(total=6)
    handler.count_failure(CogViewInvalidRequestError("The size is illegal."), images=3)
    handler.count_failure(ValueError("no prompt"))
    handler.count_failure(CogViewContentFilterError())
    assert (handler.failed, handler.blocked, handler.ended, handler.costs.failed) == (4, 1, 5, 0)


def test_a_failure_that_an_event_reported_is_not_counted_again():
    ids = [new_id() for _ in range(3)]
    handler = ProgressCallbackHandler()
    SENDER.invoke([unknown(ids[0]), blocked(ids[1])], {"callbacks": [handler]})
    handler.count_failure(CogViewOutcomeUnknownError(request_id=ids[0]))
    handler.count_failure(CogViewContentFilterError(request_id=ids[1]))
    assert (handler.failed, handler.blocked) == (1, 1)
    handler.count_failure(CogViewOutcomeUnknownError(request_id=ids[2]))
    assert handler.failed == 2


@pytest.mark.parametrize("how", ["stream_many", "astream_many"])
def test_a_failure_of_somebody_elses_making_is_counted_once(sandbox, how):
    class Full(InMemoryRateLimiter):
        def acquire(self, *, blocking=True):
            raise OSError("The limiter's disk is full")

        async def aacquire(self, *, blocking=True):
            self.acquire()

    generator = CogViewImageGenerator(base_url=sandbox.base_url, rate_limiter=Full(requests_per_second=1))
    handler = ProgressCallbackHandler()
    results = list(WORK[how](generator, {"callbacks": [handler]}))
    failed = handler.failed
    for _, result in results:
        handler.count_failure(result)
    assert failed == 6
    assert handler.failed == 8
    assert sandbox.images_made == 0


def test_what_is_remembered_of_failures_is_bounded():
    handler = ProgressCallbackHandler()
    ids = [new_id() for _ in range(10_010)]
    for item in ids:
        handler.on_event(*failed(item))
    handler.count_failure(CogViewOutcomeUnknownError(request_id=ids[-1]))
    assert handler.failed == 10_010
    handler.count_failure(CogViewOutcomeUnknownError(request_id=ids[0]))
    assert handler.failed == 10_011


def test_it_receives_what_a_collecting_block_receives():
    with collect_image_costs() as costs, ProgressCallbackHandler() as handler:
        SENDER.invoke([generated(), generated()], {"callbacks": [handler]})
    assert handler.done == costs.images == 2


# --- real work

INPUTS = [
    "a kitten", {"prompt": "two foals", "n": 2}, "[[content-filter]] x", "[[malformed]] x", "[[unavailable:1]] x",
    {"prompt": "too small", "size": "1x1"}, {"prompt": "none", "n": 0},
]  # fmt: skip


async def streamed(generator, config):
    return [item async for item in generator.astream_many(INPUTS, config)]


WORK = {
    "batch": lambda generator, config: enumerate(generator.batch(INPUTS, config, return_exceptions=True)),
    "abatch": lambda generator, config: enumerate(
        asyncio.run(generator.abatch(INPUTS, config, return_exceptions=True))
    ),
    "stream_many": lambda generator, config: generator.stream_many(INPUTS, config),
    "astream_many": lambda generator, config: asyncio.run(streamed(generator, config)),
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_every_image_of_real_work_ends_in_one_count(generator, work):
    with Terminal() as terminal, ProgressCallbackHandler(total=8) as handler:
        for _, result in work(generator, {"callbacks": [handler]}):
            if isinstance(result, Exception):
                handler.count_failure(result)
        assert (handler.done, handler.failed, handler.blocked, handler.in_flight) == (4, 3, 1, 0)
        assert (handler.retries, handler.ended) == (1, 8)
        assert (handler.costs.sandbox, handler.costs.uncertain.count) == (4, 1)
    assert re.match(r"CogView 8/8 \|█+\| .* 1 blocked, 3 failed, sandbox; list price 0.24 CNY$", terminal.updates[-1])


def test_a_task_is_in_flight_once_however_often_it_is_asked_for():
    with Sandbox() as sandbox:
        generator = CogViewImageGenerator(base_url=sandbox.base_url, model="glm-image", poll_interval=0.01)
        stages = []

        class Stages(ProgressCallbackHandler):
            def on_event(self, name, event):
                super().on_event(name, event)
                stages.append((event.get("stage", name), self.in_flight))

        generator.invoke("[[task-polls:2]] a kitten", {"callbacks": [Stages()]})
    assert stages == [("sent", 1), ("processing", 1), ("processing", 1), ("cogview.generated", 0)]


# --- the bar


def test_a_bar_is_shown_on_a_terminal(capsys):
    with Terminal() as terminal, ProgressCallbackHandler(total=12) as handler:
        ids = [new_id() for _ in range(9)]
        SENDER.invoke([progress("sent", item) for item in ids], {"callbacks": [handler]})
        SENDER.invoke([blocked(ids[0]), blocked(ids[1]), unknown(ids[2])], {"callbacks": [handler]})
        SENDER.invoke([generated(item) for item in ids[3:]], {"callbacks": [handler]})
        SENDER.invoke([progress("sent") for _ in range(3)], {"callbacks": [handler]})
    last = terminal.updates[-1]
    assert re.fullmatch(
        r"CogView 9/12 \|\S+ *\| \d\d:\d\d<\d\d:\d\d, +[\d.]+(it/s|s/it), 2 blocked, 1 failed, 3 in flight, 0\.36 CNY",
        last,
    )
    assert terminal.text.endswith("\n")
    assert capsys.readouterr().out == ""


def test_the_bar_is_one_line_that_fits_the_terminal():
    for columns in (40, 80, 200):
        with Terminal(columns) as terminal, ProgressCallbackHandler(total=10) as handler:
            for event in (progress("sent"), blocked(), unknown(), generated(cost="1234.56"), generated(cost=None)):
                handler.on_event(*event)
        assert terminal.text.count("\n") == 1
        assert {len(line) <= columns for line in terminal.updates} == {True}
        assert terminal.updates[-1].startswith("CogView 4/10 |")


def test_the_bar_follows_the_terminals_width():
    with Terminal(100) as terminal, ProgressCallbackHandler(total=10) as handler:
        handler.on_event(*generated())
        terminal.resize(50)
        handler.on_event(*generated())
    assert len(terminal.updates[0]) > 50 >= len(terminal.updates[-1])


class Clock:
    """The time that tqdm reads."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def test_the_time_left_follows_the_mean_and_every_event_may_be_shown(clock):
    with Terminal() as terminal, ProgressCallbackHandler(total=12) as handler:
        handler.on_event(*progress("sent"))
        terminal.wait_for("1 in flight")
        for clock.now, event, update in (
            (10.0, generated(), "CogView 1/12"),
            (19.5, progress("sent"), "2 in flight"),
            (20.0, generated(), "CogView 2/12"),
        ):
            handler.on_event(*event)
            terminal.wait_for(update)
        terminal.wait_for("00:20<01:40, 10.00s/it")


def test_the_bar_shows_the_last_event_though_nothing_follows():
    with Terminal() as terminal, ProgressCallbackHandler(total=5) as handler:
        for _ in range(5):
            handler.on_event(*progress("sent"))
        terminal.wait_for("5 in flight")


def test_updates_are_limited_however_many_events_come():
    with Terminal() as terminal, ProgressCallbackHandler(total=20_000) as handler:
        start = time.monotonic()
        for _ in range(20_000):
            handler.on_event(*generated())
        took = time.monotonic() - start
    assert terminal.updates[-1].startswith("CogView 20000/20000 |")
    assert len(terminal.updates) <= 2 * took / MIN_INTERVAL + 4


def test_events_from_many_threads_move_the_bar_to_the_end():
    def work():
        for _ in range(200):
            request_id = new_id()
            handler.on_event(*progress("sent", request_id))
            handler.on_event(*generated(request_id))

    with Terminal() as terminal, ProgressCallbackHandler(total=1600) as handler:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert handler.ended == 1600
    assert "CogView 1600/1600 |" in terminal.updates[-1]
    assert terminal.updates[-1].endswith("96.00 CNY")


def test_without_a_total_there_are_counts_and_speed():
    with Terminal() as terminal, ProgressCallbackHandler(label="Kittens") as handler:
        SENDER.invoke([generated(), generated()], {"callbacks": [handler]})
    assert re.fullmatch(r"Kittens 2 \[\d\d:\d\d, +[\d.]+(it/s|s/it), 0\.12 CNY\]", terminal.updates[-1])


def test_a_total_that_is_found_later_turns_it_into_a_bar():
    with Terminal() as terminal, ProgressCallbackHandler() as handler:
        handler.on_event(*generated())
        handler.total = 4
    assert terminal.updates[0].startswith("CogView 0 [")
    assert terminal.updates[-1].startswith("CogView 1/4 |")


def test_a_total_that_was_too_low_grows():
    with Terminal() as terminal, ProgressCallbackHandler(total=2) as handler:
        for _ in range(3):
            handler.on_event(*generated())
    assert terminal.updates[-1].startswith("CogView 3/3 |")
    assert handler.total == 2


def test_skipped_images_move_the_bar_but_do_not_make_it_faster():
    with Terminal() as terminal, ProgressCallbackHandler(total=1000) as handler:
        handler.skip(900)
        handler.on_event(*progress("sent"))
        handler.skip(50)
        assert handler.skipped == 950
    assert terminal.updates[0].startswith("CogView 900/1000 |")
    assert re.match(r"CogView 950/1000 \|\S+ *\| \d\d:\d\d<\?, +\?it/s, 1 in flight", terminal.updates[-1])


def test_images_that_cost_nothing_do_not_speak_of_cost():
    with Terminal() as terminal, ProgressCallbackHandler(total=1) as handler:
        handler.on_event(*generated(sandbox=True))
    assert terminal.updates[-1].endswith(("it/s", "s/it"))


def test_closing_twice_writes_once_and_later_events_are_still_counted():
    with Terminal() as terminal:
        handler = ProgressCallbackHandler(total=2)
        handler.on_event(*generated())
        handler.close()
        handler.close()
        handler.on_event(*generated())
        handler.skip()
        handler.total = 3
    assert terminal.text.count("\n") == 1
    assert terminal.text.endswith("\n")
    assert (handler.done, handler.ended) == (2, 3)


def test_a_handler_that_was_forgotten_ends_its_line():
    def forget():
        handler = ProgressCallbackHandler(total=1)
        handler.on_event(*generated())
        return weakref.ref(handler)

    with Terminal() as terminal:
        gone = forget()
        join_timers()
        gc.collect()
        assert gone() is None
    assert terminal.text.endswith("\n")


def test_a_terminal_that_goes_away_costs_nothing_but_the_bar(caplog):
    with Terminal() as terminal, ProgressCallbackHandler(total=3) as handler:
        SENDER.invoke([generated()], {"callbacks": [handler]})
        terminal.close()
        SENDER.invoke([generated(), generated()], {"callbacks": [handler]})
    assert handler.done == 3
    assert caplog.text == ""


def test_a_pipe_that_breaks_costs_nothing_but_the_bar(caplog, clock):
    ours, theirs = os.pipe()
    with open(theirs, "wb", buffering=0) as raw, contextlib.redirect_stderr(io.TextIOWrapper(raw, write_through=True)):
        with ProgressCallbackHandler(total=3, show=True) as handler:
            SENDER.invoke([generated()], {"callbacks": [handler]})
            os.close(ours)
            handler.on_event(*progress("sent"))  # too soon after the last update: written late
            join_timers()
            clock.now += 10  # the next event is written at once
            SENDER.invoke([generated(), generated()], {"callbacks": [handler]})
    assert handler.done == 3
    assert caplog.text == ""


def test_a_pipe_that_breaks_before_the_end_does_not_fail_the_end():
    ours, theirs = os.pipe()
    with open(theirs, "wb", buffering=0) as raw, contextlib.redirect_stderr(io.TextIOWrapper(raw, write_through=True)):
        with ProgressCallbackHandler(total=3, show=True) as handler:
            handler.on_event(*generated())
            os.close(ours)
    assert handler.done == 1


# --- when it is shown


def test_somebody_watches_at_a_terminal_alone(monkeypatch):
    with Terminal():
        assert interactive()
        monkeypatch.setenv("TERM", "dumb")
        assert not interactive()
    closed = io.StringIO()
    closed.close()
    for stream in (io.StringIO(), closed, None):
        with contextlib.redirect_stderr(stream):
            assert not interactive()


def test_it_can_be_silenced_on_a_terminal():
    with Terminal() as terminal, ProgressCallbackHandler(total=1, show=False) as handler:
        handler.on_event(*generated())
    assert terminal.text == ""
    assert handler.done == 1


def test_it_can_be_written_into_a_pipe(capsys):
    with ProgressCallbackHandler(total=1, show=True) as handler:
        handler.on_event(*generated())
    written = capsys.readouterr()
    assert "CogView 1/1 |" in written.err
    assert written.out == ""


def test_tqdms_own_switch_turns_it_off():
    code = "for _ in range(3): handler.on_event(*generated())\nprint(handler.done, sum(isinstance(t, threading.Timer) for t in threading.enumerate()))"
    with Terminal() as terminal:  # tqdm reads its variables when it is imported
        assert in_a_process(code, stderr=terminal.file, TQDM_DISABLE="1") == "3 0\n"
    assert terminal.text == ""


def test_no_console_at_all_is_no_failure():
    with contextlib.redirect_stderr(None), ProgressCallbackHandler(total=1, show=True) as handler:
        handler.on_event(*generated())
    assert handler.done == 1


class TestWithoutTqdm:
    @pytest.fixture(autouse=True)
    def _no_tqdm(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tqdm", None)

    def test_nothing_is_shown_and_nothing_is_missed(self):
        with Terminal() as terminal, ProgressCallbackHandler(total=1) as handler:
            handler.on_event(*generated())
        assert terminal.text == ""
        assert handler.done == 1

    def test_without_tqdm_the_bar_names_what_to_install(self):
        with pytest.raises(ImportError, match=r'pip install "langchain-cogview\[progress\]"'):
            ProgressCallbackHandler(show=True)


SCRIPT = """
import sys, threading
from langchain_cogview.callbacks import ProgressCallbackHandler
from tests.unit_tests.simulated_events import generated, progress
handler = ProgressCallbackHandler(total=3)
{}
"""


def in_a_process(code, *, stderr, **variables):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(code)],
        env={**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path), **variables},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        check=True,
        timeout=200,
    ).stdout


def test_a_program_that_ends_without_closing_ends_well_and_prints_its_own_alone():
    code = "for _ in range(3): handler.on_event(*generated())\nprint('mine')"
    with Terminal() as terminal:
        assert in_a_process(code, stderr=terminal.file) == "mine\n"
    assert terminal.updates[-1].startswith("CogView 3/3 |")
    assert "Error" not in terminal.text


def test_a_program_without_a_terminal_does_not_even_load_tqdm():
    code = "for _ in range(3): handler.on_event(*generated())\nprint(handler.done, 'tqdm' in sys.modules, 'IPython' in sys.modules)"
    done = in_a_process(code, stderr=subprocess.STDOUT)
    assert done == "3 False False\n"


@pytest.mark.notebook
@pytest.mark.filterwarnings("ignore")  # the kernel client's own
def test_an_executed_notebook_gets_one_small_output_without_widgets(tmp_path, monkeypatch):
    code = (
        "import threading, time\n"
        "from langchain_cogview.callbacks import ProgressCallbackHandler, interactive\n"
        "from tests.unit_tests.simulated_events import generated, progress\n"
        "assert interactive()\n"
        "handler = ProgressCallbackHandler(total=60)\n"
        "def work():\n"
        "    for _ in range(20):\n"
        "        handler.on_event(*generated())\n"
        "        threading.Event().wait(0.05)\n"
        "threads = [threading.Thread(target=work) for _ in range(3)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "handler.close()"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(
        notebook, timeout=400, startup_timeout=400, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data"
    assert list(output.data) == ["text/plain"]
    assert re.fullmatch(
        r"CogView 60/60 \|█+\| \d\d:\d\d<00:00, +[\d.]+(it/s|s/it), 3\.60 CNY", output.data["text/plain"]
    )
    assert "widgets" not in notebook.metadata


def test_in_flight_never_exceeds_the_limit_and_downloads_are_shown_apart(monkeypatch):
    """A slow download holds no slot: the next request is sent, and both are counted for what they are."""
    from langchain_cogview import generation

    fetch, started = generation.fetch, threading.Event()
    counts = []

    class Counts(ProgressCallbackHandler):
        def on_event(self, name, event):
            super().on_event(name, event)
            counts.append((self.in_flight, self.downloading))
            if self.downloading and event.get("stage") == "sent":
                started.set()  # a request was sent while an image is downloaded

    def slow(*arguments, **options):
        assert started.wait(DEADLINE)
        return fetch(*arguments, **options)

    monkeypatch.setattr(generation, "fetch", slow)
    with Sandbox() as sandbox:
        generator = CogViewImageGenerator(base_url=sandbox.base_url, max_concurrency=1, timeout=None)
        handler = Counts()
        generator.batch(["a cat", "a dog"], {"callbacks": [handler]})
    assert max(in_flight for in_flight, _ in counts) == 1
    assert (1, 1) in counts
    assert (handler.in_flight, handler.downloading, handler.done) == (0, 0, 2)


def test_a_request_that_is_refused_is_retried_and_not_in_flight():
    handler = ProgressCallbackHandler()
    one = new_id()
    for event, expected in (
        (progress("sent", one), (1, 0)),
        (retry(one), (0, 1)),
        (retry(one, attempt=2), (0, 1)),
        (generated(one), (0, 0)),
    ):
        handler.on_event(*event)
        assert (handler.in_flight, handler.retrying) == expected
