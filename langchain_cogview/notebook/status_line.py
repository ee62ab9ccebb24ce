"""One line under a notebook's cell while its calls run: the time that passes, then what it came to.

All calls of a cell share the line, whichever threads and tasks they run in: "12 s · 2 under way", and at the end
"12.3 s · 2 pictures · 0.12 CNY". Outside Jupyter nothing is shown and nothing is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import OrderedDict
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final, TypeVar

from langchain_cogview.cost import Charges, Money
from langchain_cogview.errors import CogViewContentFilterError, CogViewError, CogViewOutcomeUnknownError, Outcome, Scope
from langchain_cogview.notebook.previews import in_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from langchain_core.runnables import RunnableConfig

    from langchain_cogview.result import ImageFailure, ImageResult

T = TypeVar("T")

VARIABLE: Final = "COGVIEW_STATUS_LINE"
"""Environment variable; `off`, `0`, `no` or `false` turns the line off."""
TICK: Final = 1.0
"""Seconds between two drawings."""

_OFF: Final = frozenset({"off", "0", "no", "false"})
_MOST_CELLS: Final = 16

logger = logging.getLogger(__name__)


class _Switch:
    on: bool | None = None


def status_line(on: bool | None = None) -> None:  # noqa: FBT001
    """Turn the line under a notebook's cells on or off, for this process.

    Args:
        on: None: as the environment variable `COGVIEW_STATUS_LINE` says, else on.
    """
    _Switch.on = on


def call(config: RunnableConfig | None = None) -> AbstractContextManager[Callable[[ImageResult], ImageResult]]:
    """Show one call of a generator in the cell's line while it runs; in a Jupyter kernel only.

    Nothing that goes wrong with the line reaches the call.

    Args:
        config: The call's. Where a handler of it draws a bar, the line stays away.

    Returns:
        A context manager. It gives a function to tell the result to, which gives it back; an exception is seen by itself.
    """
    if not in_kernel() or not _wanted() or _has_bar(config):
        return _NOTHING
    return _shown(_line_of_cell())


def _wanted() -> bool:
    if _Switch.on is not None:
        return _Switch.on
    return os.environ.get(VARIABLE, "").strip().lower() not in _OFF


def _has_bar(config: RunnableConfig | None) -> bool:
    callbacks: Any = (config or {}).get("callbacks") or ()
    return any(getattr(handler, "shown", False) for handler in getattr(callbacks, "handlers", callbacks))


def _told(result: T) -> T:
    return result


_NOTHING: Final = contextlib.nullcontext(_told)


@contextlib.contextmanager
def _shown(line: Line) -> Iterator[Callable[[ImageResult], ImageResult]]:
    made: list[ImageResult] = []

    def told(result: ImageResult) -> ImageResult:
        made.append(result)
        return result

    try:
        line.started()
        yield told
    except BaseException as error:
        line.ended(error)
        raise
    else:
        line.ended(*made)


class Line:
    """The line of one cell. Thread-safe.

    Args:
        open_output: Makes the output with its first text, and gives the function that changes it.
        clock: Seconds.
    """

    def __init__(
        self, open_output: Callable[[str], Callable[[str], Any]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._open_output = open_output
        self._clock = clock
        self._change: Callable[[str], Any] | None = None
        self._lock = threading.Lock()
        self._idle = threading.Event()
        self._since = 0.0
        self._seconds = 0.0
        self._in_flight = 0
        self._counts = dict.fromkeys(("blocked", "failed", "of unknown outcome", "stopped"), 0)
        self._charges = Charges()
        self._sandbox = False

    def started(self) -> None:
        """A call begins."""
        with self._lock:
            self._in_flight += 1
            if self._in_flight == 1:
                self._since = self._clock()
                self._idle = threading.Event()
                self._tick(self._idle)
            self._draw()

    def ended(self, result: ImageResult | BaseException | None = None) -> None:
        """A call has ended."""
        with self._lock:
            self._in_flight = max(0, self._in_flight - 1)
            if not self._in_flight:
                self._seconds += self._clock() - self._since
                self._idle.set()
            self._count(result)
            self._draw()

    def __str__(self) -> str:
        seconds = self._seconds + (self._clock() - self._since if self._in_flight else 0.0)
        parts = [f"{seconds:.0f} s" if self._in_flight else f"{seconds:.1f} s"]
        count = self._charges.count
        if count:
            parts.append(f"{count} picture{'' if count == 1 else 's'}")
        parts += [f"{count} {what}" for what, count in self._counts.items() if count]
        if self._in_flight:
            parts.append(f"{self._in_flight} under way")
        if count:
            cost = str(self._charges)
            parts.append(f"{'sandbox, ' if self._sandbox else ''}no cost" if cost == "nothing" else cost)
        return " · ".join(parts)

    def _count(self, result: ImageResult | BaseException | None) -> None:
        if isinstance(result, BaseException):
            self._counts[_word(result)] += 1
        elif result is not None:
            for image in result.images:
                self._sandbox = self._sandbox or image.sandbox
                self._charges.add(Money.of_image(image))
            for failure in result.failures:
                self._counts[_word_of_record(failure)] += 1

    def _tick(self, idle: threading.Event) -> None:
        with contextlib.suppress(RuntimeError):  # no thread can be started: the line tells the time at the end only
            threading.Thread(target=self._ticking, args=(idle,), daemon=True, name="cogview-line").start()

    def _ticking(self, idle: threading.Event) -> None:
        while not idle.wait(TICK):
            with self._lock:
                if not idle.is_set():
                    self._draw()

    def _draw(self) -> None:
        try:
            if self._change is None:
                self._change = self._open_output(str(self))
            else:
                # The output is found by its id. A message in the name of a cell that has ended is not heard by everybody, one
                # without a context comes in the name of the cell that runs.
                Context().run(self._change, str(self))
        except Exception:
            logger.debug("The line under the cell could not be drawn", exc_info=True)


def _word(error: BaseException) -> str:
    if isinstance(error, CogViewContentFilterError):
        return "blocked"
    if isinstance(error, CogViewOutcomeUnknownError):
        return "of unknown outcome"
    stopped = not isinstance(error, Exception) or (isinstance(error, CogViewError) and error.scope is Scope.CANCELLED)
    return "stopped" if stopped else "failed"


def _word_of_record(failure: ImageFailure) -> str:
    if failure.scope is Scope.PROMPT:
        return "blocked"
    return "of unknown outcome" if failure.outcome is Outcome.UNKNOWN else "failed"


# --- the cell

_LINES: Final[OrderedDict[object, Line]] = OrderedDict()
_LINES_LOCK: Final = threading.Lock()


def _line_of_cell() -> Line:
    cell = _cell()
    with _LINES_LOCK:
        line = _LINES.get(cell)
        if line is None:
            line = _LINES[cell] = Line(_open_output)
            while len(_LINES) > _MOST_CELLS:
                _LINES.popitem(last=False)
        return line


def _cell() -> object:
    """What tells the executions of cells apart: the message that asked for this one, in this thread or task."""
    shell = sys.modules["IPython"].get_ipython()
    header = getattr(getattr(shell, "display_pub", None), "parent_header", None)
    return header.get("msg_id") if isinstance(header, dict) else getattr(shell, "execution_count", None)


def _open_output(text: str) -> Callable[[str], Any]:
    from IPython.display import display  # noqa: PLC0415

    output = display({"text/plain": text}, raw=True, display_id=True)  # type: ignore[no-untyped-call,unused-ignore]

    def change(text: str) -> None:
        output.update({"text/plain": text}, raw=True)

    return change
