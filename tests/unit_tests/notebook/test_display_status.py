"""What a user relies on: one line under a notebook's cell while its calls run, which becomes their summary."""

import asyncio
import os
import re
import sys
import threading
from decimal import Decimal

import nbformat
import pytest
from nbclient import NotebookClient

from langchain_cogview import CogViewBalanceError, CogViewContentFilterError, CogViewOutcomeUnknownError, ImageFailure
from langchain_cogview.errors import Outcome
from langchain_cogview.notebook import display
from langchain_cogview.notebook.display import StatusLine
from tests.unit_tests.notebook.displayed import be_a_kernel, image, result

PAID = {"cost": Decimal("0.06"), "currency": "CNY"}
BLOCKED = CogViewContentFilterError()


class Output:
    """Records the texts of one output, instead of a notebook's."""

    def __init__(self):
        self.texts = []
        self.opened = 0
        self.threads = set()

    def open(self, text):
        self.opened += 1
        self.change(text)
        return self.change

    def change(self, text):
        self.texts.append(text)
        self.threads.add(threading.current_thread().name)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def output():
    return Output()


@pytest.fixture
def line(output, clock):
    return StatusLine(output.open, clock)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.delenv(display.STATUS_LINE_VARIABLE, raising=False)
    yield
    display.status_line(None)
    display._LINES.clear()


# --- the line


def test_the_time_becomes_the_summary(line, clock, output):
    line.started()
    clock.now += 12.34
    line.ended(result(image(**PAID)))
    assert output.texts == ["0 s · 1 in flight", "12.3 s · 1 image · 0.06 CNY"]
    assert output.opened == 1


def test_all_calls_in_flight_share_it(line, clock, output):
    for _ in range(3):
        line.started()
    clock.now += 5
    line.ended(result(image(**PAID), image(**PAID)))
    assert output.texts[-1] == "5 s · 2 images · 2 in flight · 0.12 CNY"
    clock.now += 2
    line.ended(BLOCKED)
    line.ended(CogViewBalanceError())
    assert output.texts[-1] == "7.0 s · 2 images · 1 blocked · 1 failed · 0.12 CNY"
    assert output.opened == 1


def test_calls_one_after_the_other_are_one_line_and_the_time_between_them_does_not_count(line, clock, output):
    for _ in range(2):
        line.started()
        clock.now += 3
        line.ended(result(image(**PAID)))
        clock.now += 100
    assert output.texts[-1] == "6.0 s · 2 images · 0.12 CNY"
    assert output.opened == 1


@pytest.mark.parametrize(
    ("ended", "summary"),
    [
        (result(image(sandbox=True, cost=Decimal(0), currency="CNY")), "1 image · sandbox, no cost"),
        (result(image(cached=True, cost=Decimal(0), currency="CNY")), "1 image · no cost"),
        (result(image()), "1 image · 1 of unknown price"),
        (result(image(**PAID), image()), "2 images · 0.06 CNY and 1 of unknown price"),
        (BLOCKED, "1 blocked"),
        (CogViewOutcomeUnknownError(), "1 of unknown outcome"),
        (ValueError(), "1 failed"),
        (KeyboardInterrupt(), "1 stopped"),
        (asyncio.CancelledError(), "1 stopped"),
        (None, ""),
        (
            result(
                image(**PAID),
                failures=(
                    ImageFailure(index=1, error="CogViewContentFilterError", message=""),
                    ImageFailure(index=2, error="X", message="", outcome=Outcome.UNKNOWN),
                    ImageFailure(index=3, error="X", message=""),
                ),
            ),
            "1 image · 1 blocked · 1 failed · 1 of unknown outcome · 0.06 CNY",
        ),
    ],
)
def test_the_summary_says_what_became_of_it(line, output, ended, summary):
    line.started()
    line.ended(ended)
    assert output.texts[-1] == "0.0 s" + (" · " + summary if summary else "")


def test_the_time_goes_on_while_the_call_blocks(output, monkeypatch):
    monkeypatch.setattr(display, "TICK", 0.01)
    ticked = threading.Event()

    def change(text):
        Output.change(output, text)
        if threading.current_thread().name == "cogview-status-line":
            ticked.set()

    output.change = change
    line = StatusLine(output.open)
    line.started()
    assert ticked.wait(60)
    line.ended()
    ticking = [item for item in threading.enumerate() if item.name == "cogview-status-line"]
    for item in ticking:
        item.join(60)
        assert not item.is_alive()


def test_an_output_that_cannot_be_written_costs_no_call(line, output, monkeypatch):
    def broken(text):
        raise OSError

    line._open_output = broken
    line.started()
    line.ended(result(image()))
    assert line._in_flight == 0


def test_many_threads_count_right(line, output):
    def work():
        for _ in range(50):
            line.started()
            line.ended(result(image(**PAID)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for item in threads:
        item.start()
    for item in threads:
        item.join()
    assert " · 400 images · 24.00 CNY" in output.texts[-1]
    assert "in flight" not in output.texts[-1]
    assert output.opened == 1


# --- when it is shown


def shown_at_all(monkeypatch, config=None):
    opened = []
    monkeypatch.setattr(display, "open_output", lambda text: opened.append(text) or opened.append)
    with display.show_status(config) as report:
        assert report(shown := result(image())) is shown
    display._LINES.clear()
    return bool(opened)


def test_it_is_shown_in_a_kernel_only(monkeypatch):
    assert not shown_at_all(monkeypatch)
    be_a_kernel(monkeypatch)
    assert shown_at_all(monkeypatch)


@pytest.mark.parametrize(
    ("value", "on"), [("off", False), (" OFF ", False), ("0", False), ("no", False), ("", True), ("on", True)]
)
def test_the_environment_turns_it_off(monkeypatch, value, on):
    be_a_kernel(monkeypatch)
    monkeypatch.setenv(display.STATUS_LINE_VARIABLE, value)
    assert shown_at_all(monkeypatch) is on


def test_the_function_goes_before_the_environment(monkeypatch):
    be_a_kernel(monkeypatch)
    display.status_line(False)
    assert not shown_at_all(monkeypatch)
    monkeypatch.setenv(display.STATUS_LINE_VARIABLE, "off")
    display.status_line(True)
    assert shown_at_all(monkeypatch)
    display.status_line()
    assert not shown_at_all(monkeypatch)


def test_it_stays_away_where_a_bar_is_shown(monkeypatch):
    class Bar:
        shown = True

    class Manager:
        handlers = [Bar()]

    be_a_kernel(monkeypatch)
    assert not shown_at_all(monkeypatch, {"callbacks": [Bar()]})
    assert not shown_at_all(monkeypatch, {"callbacks": Manager()})
    assert shown_at_all(monkeypatch, {"callbacks": [object()]})
    assert shown_at_all(monkeypatch, {"callbacks": None})


def test_what_a_call_raises_passes_and_is_counted(monkeypatch, output):
    be_a_kernel(monkeypatch)
    monkeypatch.setattr(display, "open_output", output.open)
    with pytest.raises(CogViewContentFilterError), display.show_status():
        raise BLOCKED
    assert output.texts[-1] == "0.0 s · 1 blocked"


def test_the_lines_of_cells_long_gone_are_forgotten(monkeypatch, output):
    shell = be_a_kernel(monkeypatch)
    monkeypatch.setattr(display, "open_output", output.open)
    for shell.execution_count in range(100):
        with display.show_status():
            pass
    assert len(display._LINES) <= 16
    assert output.opened == 100


# --- in a real kernel

FIRST = """
import asyncio, threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from decimal import Decimal
from langchain_cogview import CogViewContentFilterError
from langchain_cogview.notebook import display
from tests.unit_tests.notebook.displayed import image, result
display.TICK = 0.05
def generate(wait=0.12):
    with display.show_status() as report:
        threading.Event().wait(wait)
        return report(result(image(cost=Decimal("0.06"), currency="CNY")))
async def agenerate(wait=0.12):
    with display.show_status() as report:
        await asyncio.sleep(wait)
        return report(result(image(cost=Decimal("0.06"), currency="CNY")))
"""
CELLS = {
    "one call": ("generate()\nNone", 1),
    "one after the other": ("for _ in range(3): generate(0.02)", 3),
    "threads of their own": (
        (
            "threads = [threading.Thread(target=generate) for _ in range(4)]\n"
            "[each.start() for each in threads]\n[each.join() for each in threads]\nNone"
        ),
        4,
    ),
    "threads in a context of the caller": (
        "with ThreadPoolExecutor(3) as pool:\n    [pool.submit(copy_context().run, generate) for _ in range(3)]\nNone",
        3,
    ),
    "await": ("await agenerate()\nNone", 1),
    "tasks": ("await asyncio.gather(*(agenerate() for _ in range(5)))\nNone", 5),
    "threads of an async cell": ("await asyncio.gather(*(asyncio.to_thread(generate) for _ in range(2)))\nNone", 2),
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    cells = [FIRST, *(code for code, _ in CELLS.values())]
    cells.append(
        "try:\n    with display.show_status(): raise CogViewContentFilterError\nexcept CogViewContentFilterError: pass"
    )
    cells.append(
        "done = threading.Event()\n"
        "def late():\n"
        "    with display.show_status() as report:\n"
        "        started.set()\n"
        "        done.wait(300)\n"
        "        report(result(image(sandbox=True)))\n"
        "started = threading.Event()\n"
        "thread = threading.Thread(target=copy_context().run, args=(late,))\n"
        "thread.start()\n"
        "started.wait(300)\nNone"
    )
    cells.append("done.set()\nthread.join(300)")
    cells.append(
        "from langchain_cogview import CogViewImageGenerator, gallery\n"
        "gallery(CogViewImageGenerator(base_url='sandbox:').stream_many(['a fox', '[[content-filter]] x']))"
    )
    cells.append("display.status_line(False)\ngenerate()\nNone")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        monkeypatch.setenv("IPYTHONDIR", str(folder))
        monkeypatch.delenv(display.STATUS_LINE_VARIABLE, raising=False)
        NotebookClient(
            notebook, timeout=400, startup_timeout=400, resources={"metadata": {"path": str(folder)}}
        ).execute()
    first, *others, blocked, late, later, gallery, off = notebook.cells
    assert first.outputs == []
    return dict(zip(CELLS, others, strict=True)) | {
        "blocked": blocked, "late": late, "later": later, "gallery": gallery, "off": off, "all": notebook,
    }  # fmt: skip


notebook = [pytest.mark.notebook, pytest.mark.filterwarnings("ignore")]  # the kernel client's own warnings


class TestInANotebook:
    pytestmark = notebook

    @pytest.mark.parametrize("cell", CELLS)
    def test_each_cell_gets_one_small_output_of_its_own(self, executed, cell):
        (output,) = executed[cell].outputs
        assert output.output_type == "display_data"
        assert list(output.data) == ["text/plain"]
        count = CELLS[cell][1]
        text = output.data["text/plain"]
        assert re.fullmatch(rf"\d+\.\d s · {count} images? · {Decimal('0.06') * count} CNY", text), text

    def test_a_blocked_call_is_reported(self, executed):
        (output,) = executed["blocked"].outputs
        assert output.data["text/plain"] == "0.0 s · 1 blocked"

    def test_a_call_that_outlives_its_cell_ends_in_the_line_of_that_cell(self, executed):
        (output,) = executed["late"].outputs
        assert output.data["text/plain"].endswith(" · 1 image · sandbox, no cost")
        assert executed["later"].outputs == []

    def test_a_gallery_of_what_the_cell_made_has_the_only_summary(self, executed):
        line, shown = executed["gallery"].outputs
        assert line.data == {"text/plain": ""}
        assert "1 image · 1 blocked" in shown.data["text/html"]

    def test_it_can_be_turned_off(self, executed):
        assert executed["off"].outputs == []

    def test_no_widget_is_left(self, executed):
        assert "widgets" not in executed["all"].metadata


def test_a_result_that_shows_all_images_replaces_the_summary(line, output):
    line.started()
    line.ended(result(image(**PAID)))
    line.replaced_by(2)
    assert output.texts[-1] == "0.0 s · 1 image · 0.06 CNY"
    line.replaced_by(1)
    assert output.texts[-1] == ""


def test_the_summary_of_calls_that_are_in_flight_stays(line, output):
    line.started()
    line.started()
    line.ended(result(image(**PAID)))
    line.replaced_by(1)
    assert output.texts[-1].endswith("1 in flight · 0.06 CNY")
