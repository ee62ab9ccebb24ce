"""How far many pictures are: counts over the events, and one bar by tqdm where somebody watches."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Self

from langchain_cogview import errors
from langchain_cogview.callbacks import EventHandler
from langchain_cogview.cost import ImageCosts
from langchain_cogview.events import PROGRESS_EVENT, RETRY_EVENT
from langchain_cogview.text import printable

if TYPE_CHECKING:
    from types import TracebackType

TQDM_MISSING: Final = 'The bar needs tqdm. Install it with: pip install "langchain-cogview[progress]"'
MIN_INTERVAL: Final = 0.2
"""Seconds between two drawings of the bar."""

_BAR: Final = "{desc}{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}"
_BAR_WITHOUT_TOTAL: Final = "{desc}{n_fmt} [{elapsed}, {rate_fmt}{postfix}]"
_NOTEBOOK_WIDTH: Final = 100
_MAX_REMEMBERED: Final = 10_000


def interactive() -> bool:
    """Whether somebody watches: standard error is a terminal that can redraw a line, or this is a notebook's kernel."""
    try:
        terminal = sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        terminal = False
    return (terminal and os.environ.get("TERM") != "dumb") or _in_kernel()


def _in_kernel() -> bool:
    # Where IPython is not loaded there is no kernel; it is not loaded to find out.
    ask = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return ask is not None and getattr(ask(), "kernel", None) is not None


class ProgressCallbackHandler(EventHandler):
    """Counts pictures on their way, and draws one bar of them; for sync and async runs, and from many threads.

    The bar goes to standard error, or in a notebook into one output that is updated in place: plain text, without widgets.

    Args:
        total: How many pictures there will be; None: unknown.
        show: Whether the bar is drawn. None: where somebody watches (`interactive`) and tqdm is installed.
        label: Stands before the bar.

    Attributes:
        costs: What the pictures cost so far.
        retries: How often a request was sent again.
        skipped: Pictures that were there before.

    Raises:
        ImportError: `show=True`, and tqdm is missing.

    Example:
        >>> with ProgressCallbackHandler(total=3) as progress:    # doctest: +SKIP
        ...     generator.batch(["a kitten", "a puppy", "a foal"], {"callbacks": [progress]})
        CogView 3/3 |██████████████████| 00:21<00:00,  7.02s/img, 0.18 CNY
    """

    def __init__(self, total: int | None = None, *, show: bool | None = None, label: str = "CogView") -> None:
        super().__init__()
        self.costs = ImageCosts()
        self.retries = 0
        self.skipped = 0
        self._total = total
        self._label = label
        self._failed_before = 0
        self._blocked_before = 0
        # Request ids whose failure an event told; in order, so that the oldest can be forgotten.
        self._told: dict[str, None] = {}
        # How many failures an event told of errors that are not ours, by the class's name: they carry no request id.
        self._told_of_others: Counter[str] = Counter()
        self._tqdm = _tqdm(show)
        self._bar: Any = None
        self._late: threading.Timer | None = None
        # Held while an event is counted and drawn; the late drawing takes it too.
        self._lock = threading.RLock()

    @property
    def shown(self) -> bool:
        """Whether a bar is drawn."""
        return self._tqdm is not None

    # --- the counts

    @property
    def total(self) -> int | None:
        """How many pictures there will be; None: unknown. May be set at any time."""
        return self._total

    @total.setter
    def total(self, total: int | None) -> None:
        with self._lock:
            self._total = total
            if self._bar is not None:
                self._bar.bar_format = _bar_format(total)
            self._draw()

    @property
    def done(self) -> int:
        """Pictures that were made, or came from the cache."""
        return self.costs.images

    @property
    def failed(self) -> int:
        """Pictures that failed, those aside that the content filter blocked."""
        return self.costs.failed + self._failed_before

    @property
    def blocked(self) -> int:
        """Pictures that the content filter blocked."""
        return self.costs.blocked + self._blocked_before

    @property
    def in_flight(self) -> int:
        """Pictures that were sent and have not ended."""
        return self.costs.in_flight

    @property
    def ended(self) -> int:
        """Pictures done, failed, blocked or skipped: where the bar stands."""
        return self.skipped + self.done + self.failed + self.blocked

    def skip(self, count: int = 1) -> None:
        """Count pictures that were there before: the bar moves on, but its speed and its time left do not."""
        with self._lock:
            self.skipped += count
            if self._bar is not None:
                self._bar.initial = self.skipped
            self._draw()

    def count_failure(self, error: BaseException, *, pictures: int = 1) -> None:
        """Count pictures that failed before an event could tell it, such as for an illegal argument.

        An error whose failure an event told already is not counted again: every failure of a stream can be given.

        Args:
            error: What was raised.
            pictures: How many pictures it stands for.
        """
        with self._lock:
            if self._was_told(error):
                return
            if isinstance(error, errors.CogViewContentFilterError):
                self._blocked_before += pictures
            else:
                self._failed_before += pictures
            self._draw()

    def on_event(self, name: str, event: Any) -> None:
        """Count an event and draw it."""
        with self._lock:
            self.costs.on_event(name, event)
            if name == RETRY_EVENT:
                self.retries += 1
            elif name == PROGRESS_EVENT and event["stage"] == "failed":
                self._remember(event)
            self._draw()

    def _remember(self, event: Any) -> None:
        if event["scope"] is None:  # an exception of another library carries no request id
            self._told_of_others[event["error"]] += 1
            return
        self._told[event["request_id"]] = None
        if len(self._told) > _MAX_REMEMBERED:
            del self._told[next(iter(self._told))]

    def _was_told(self, error: BaseException) -> bool:
        kind = type(error).__name__
        if self._told_of_others[kind]:
            self._told_of_others[kind] -= 1
            return True
        return getattr(error, "request_id", None) in self._told

    # --- the bar

    def close(self) -> None:
        """Draw the bar for the last time. Events are still counted."""
        with self._lock:
            bar, self._bar, self._tqdm = self._bar, None, None
            if self._late is not None:
                self._late.cancel()
            if bar is not None:
                with contextlib.suppress(OSError, ValueError):
                    bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _draw(self) -> None:
        if self._tqdm is None:
            return
        try:
            if self._bar is None:
                self._bar = self._opened()
            # A total that turns out too low grows: tqdm would drop it.
            self._bar.total = None if self._total is None else max(self._total, self.ended)
            self._bar.set_postfix_str(printable(self._facts()), refresh=False)
            drawn = self._bar.update(self.ended - self._bar.n)
        except (OSError, ValueError):  # the terminal is gone
            self._bar = self._tqdm = None
            return
        if not drawn and not self._bar.disable:
            self._draw_late()

    def _opened(self) -> Any:
        kernel = _in_kernel()
        return self._tqdm(
            desc=f"{printable(self._label, 60)} " if self._label else "",
            total=self._total,
            initial=self.skipped,
            file=_CellOutput() if kernel else sys.stderr,
            ncols=_NOTEBOOK_WIDTH if kernel else None,
            dynamic_ncols=not kernel,
            unit="img",
            bar_format=_bar_format(self._total),
            mininterval=MIN_INTERVAL,
            miniters=0,  # an event that ends no picture is drawn as well
            smoothing=0,  # pictures come in bursts: the mean tells the time left best
        )

    def _draw_late(self) -> None:
        # tqdm passes over what comes too soon after the last drawing; with pictures of 20 seconds the bar would show the
        # first of five in flight for all that time. No daemon: one that writes while the interpreter ends can crash it.
        if self._late is None:
            late = threading.Timer(MIN_INTERVAL, self._redraw)
            with contextlib.suppress(RuntimeError):  # the interpreter is ending
                late.start()
                self._late = late

    def _redraw(self) -> None:
        with self._lock:
            self._late = None
            if self._bar is not None:
                with contextlib.suppress(OSError, ValueError):
                    self._bar.refresh()

    def _facts(self) -> str:
        counts = ((self.blocked, "blocked"), (self.failed, "failed"), (self.in_flight, "under way"))
        facts = [f"{count} {what}" for count, what in counts if count]
        charges = str(self.costs.charges)
        return ", ".join(facts if charges == "nothing" else [*facts, charges])


def _tqdm(show: bool | None) -> Any:  # noqa: FBT001
    if show is False or (show is None and not interactive()):
        return None
    if sys.stderr is None and not _in_kernel():  # a program without a console
        return None
    try:
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415
    except ImportError:
        if show:
            raise ImportError(TQDM_MISSING) from None
        return None
    return tqdm


def _bar_format(total: int | None) -> str:
    return _BAR_WITHOUT_TOTAL if total is None else _BAR


class _CellOutput:
    """A file whose last line stands in one output of a notebook's cell, however often it is written."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._output: Any = None

    def write(self, text: str) -> None:
        from IPython.display import display  # noqa: PLC0415

        line = text.strip()
        if not line:
            return
        if self._output is None:
            self._output = display({"text/plain": line}, raw=True, display_id=True)  # type: ignore[no-untyped-call,unused-ignore]
        else:
            self._output.update({"text/plain": line}, raw=True)

    def flush(self) -> None:
        """Nothing is held back."""
