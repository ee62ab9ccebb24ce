"""Callback handlers and context managers: images, content filter events, costs and progress."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
import threading
from collections import Counter
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Self

from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.tracers.context import register_configure_hook

from langchain_cogview.artifact import CONTENT_FILTER_EVENT, GENERATED_EVENT, PROGRESS_EVENT, RETRY_EVENT, validated
from langchain_cogview.cost import NO_COST, ImageCosts
from langchain_cogview.errors import CogViewContentFilterError, CogViewInvalidRequestError, printable
from langchain_cogview.events import ContentFilterEvent, Deliveries, EventHandler, GeneratedPayload
from langchain_cogview.notebook.display import CellOutput
from langchain_cogview.notebook.previews import in_kernel
from langchain_cogview.result import GeneratedImage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from types import TracebackType
    from uuid import UUID

TQDM_MISSING: Final = 'The progress bar needs tqdm. Install it with: pip install "langchain-cogview[progress]"'
MIN_INTERVAL: Final = 0.2
"""Shortest time between two updates of the progress bar, in seconds."""

_MAX_REPORTED: Final = 10_000
_BAR: Final = "{desc}{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}"
_BAR_WITHOUT_TOTAL: Final = "{desc}{n_fmt} [{elapsed}, {rate_fmt}{postfix}]"
_NOTEBOOK_WIDTH: Final = 100

logger = logging.getLogger(__name__)


# --- content filter


class _ContentFilterEvents:
    """The state of both content filter handlers: which events they select, and those that they have selected."""

    def __init__(self, on_content_filter: Callable[[ContentFilterEvent], Any] | None, max_level: int | None) -> None:
        if on_content_filter is not None and not callable(on_content_filter):
            raise TypeError(f"on_content_filter must be a function of one event, not {on_content_filter!r:.60}.")
        if max_level is not None and max_level not in range(4):
            raise ValueError(
                f"max_level must be 0 (most severe only) to 3 (all levels), or None, not {max_level!r:.20}."
            )
        self.events: list[ContentFilterEvent] = []
        self.on_content_filter = on_content_filter
        self.max_level = max_level
        self._deliveries = Deliveries()

    def _select(self, name: str, event: ContentFilterEvent, run_id: UUID) -> bool:
        """Return whether an event is severe enough and new; if so, it is appended to `events`."""
        selected = self._is_severe(name, event) and self._deliveries.is_first(event, run_id)
        if selected:
            self.events.append(event)
        return selected

    def _is_severe(self, name: str, event: ContentFilterEvent) -> bool:
        if name != CONTENT_FILTER_EVENT:
            return False
        level = event["level"]
        if self.max_level is None or level is None:
            return self.max_level is None or event["blocked"]
        return level <= self.max_level


class ContentFilterCallbackHandler(_ContentFilterEvents, BaseCallbackHandler):
    """Collects content filter events and passes them to a function, in sync and async runs.

    Args:
        on_content_filter: Function that is called with each selected event. LangChain logs the exceptions that it raises; they
            do not affect the image.
        max_level: The mildest level that is selected: 0 selects the most severe level only, 3 every level. A block of unknown
            level is always selected. None selects all events.

    Attributes:
        events: The selected events so far, in order.

    Raises:
        TypeError: `on_content_filter` is not a function, or is a coroutine function.
        ValueError: `max_level` is out of range.

    Example:
        >>> handler = ContentFilterCallbackHandler(on_content_filter=print, max_level=1)
        >>> generator.invoke("a kitten", config={"callbacks": [handler]})    # doctest: +SKIP
    """

    def __init__(
        self, on_content_filter: Callable[[ContentFilterEvent], Any] | None = None, *, max_level: int | None = None
    ) -> None:
        super().__init__(on_content_filter, max_level)
        if inspect.iscoroutinefunction(on_content_filter):
            raise TypeError("on_content_filter is a coroutine function. Use AsyncContentFilterCallbackHandler.")

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Receive a custom event; see LangChain's `BaseCallbackHandler.on_custom_event`."""
        if self._select(name, data, run_id) and self.on_content_filter:
            self.on_content_filter(data)


class AsyncContentFilterCallbackHandler(_ContentFilterEvents, AsyncCallbackHandler):
    """Async version of `ContentFilterCallbackHandler`: `on_content_filter` may be a coroutine function.

    Args:
        on_content_filter: Function or coroutine function that is called with each selected event.
        max_level: See `ContentFilterCallbackHandler`.

    Attributes:
        events: The selected events so far, in order.

    Raises:
        TypeError: `on_content_filter` is not a function.
        ValueError: `max_level` is out of range.
    """

    def __init__(
        self,
        on_content_filter: Callable[[ContentFilterEvent], Awaitable[Any] | Any] | None = None,
        *,
        max_level: int | None = None,
    ) -> None:
        super().__init__(on_content_filter, max_level)

    async def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Receive a custom event; see LangChain's `BaseCallbackHandler.on_custom_event`."""
        if self._select(name, data, run_id) and self.on_content_filter:
            answer = self.on_content_filter(data)
            if inspect.isawaitable(answer):
                await answer


# --- costs and images


class CostCallbackHandler(EventHandler):
    """Counts what images cost, in sync and async runs.

    Attributes:
        costs: The costs so far.

    Example:
        >>> handler = CostCallbackHandler()
        >>> generator.batch(["a kitten", "a puppy"], {"callbacks": [handler]})    # doctest: +SKIP
        >>> handler.costs.total("CNY")    # doctest: +SKIP
        Decimal('0.12')
    """

    def __init__(self) -> None:
        super().__init__()
        self.costs = ImageCosts()

    def on_event(self, name: str, event: Any) -> None:
        """Count an event; see `EventHandler.on_event`."""
        self.costs.on_event(name, event)


class ImageCallbackHandler(EventHandler):
    """Collects the images of the runs that it is passed to, including those of sub-agents.

    Attributes:
        images: The images so far, in the order in which they were made.

    Example:
        >>> handler = ImageCallbackHandler()
        >>> supervisor.invoke({"messages": "make an image of a kitten"}, {"callbacks": [handler]})    # doctest: +SKIP
        >>> handler.images[0].show()    # doctest: +SKIP
    """

    def __init__(self) -> None:
        super().__init__()
        self.images: list[GeneratedImage] = []

    def on_event(self, name: str, event: Any) -> None:
        """Collect the image of an event; see `EventHandler.on_event`."""
        self.images.extend(_images(name, event))


def _images(name: str, event: Any) -> Iterator[GeneratedImage]:
    if name != GENERATED_EVENT:
        return
    image = event.image if isinstance(event, GeneratedPayload) else None
    try:
        yield image or validated(GeneratedImage, event)
    except CogViewInvalidRequestError as error:  # another program sent the event
        logger.warning("An image was not collected. %s", error)


# --- progress


class ProgressCallbackHandler(EventHandler):
    """Counts images and shows one progress bar for them, in sync and async runs and from many threads.

    The bar is written to standard error or, in a notebook, to one output that is updated in place: plain text, without widgets.

    Args:
        total: Expected number of images; None if it is unknown.
        show: Whether the bar is shown. None: if standard error is a terminal or this is a notebook, and tqdm is installed.
        label: Text before the bar.

    Attributes:
        costs: What the images cost so far.
        retries: Number of requests that were sent again.
        skipped: Number of images that existed before.

    Raises:
        ImportError: `show=True`, and tqdm is not installed.

    Example:
        >>> with ProgressCallbackHandler(total=3) as progress:    # doctest: +SKIP
        ...     generator.batch(["a kitten", "a puppy", "a foal"], {"callbacks": [progress]})
        CogView 3/3 |██████████████████| 00:21<00:00,  7.02s/it, 0.18 CNY
    """

    def __init__(self, total: int | None = None, *, show: bool | None = None, label: str = "CogView") -> None:
        super().__init__()
        self.costs = ImageCosts()
        self.retries = 0
        self.skipped = 0
        self._total = total
        self._label = label
        self._retrying: set[str] = set()
        self._downloading: set[str] = set()
        self._failed_before = 0
        self._blocked_before = 0
        # Request ids of the failures that events reported; in order, so that the oldest can be dropped.
        self._reported: dict[str, None] = {}
        # Reported failures of other libraries' exceptions, by class name: these carry no request id.
        self._reported_others: Counter[str] = Counter()
        self._tqdm = _tqdm(show)
        self._bar: Any = None
        self._late: threading.Timer | None = None
        # Held while an event is counted and shown; the late update acquires it too.
        self._lock = threading.RLock()

    @property
    def shown(self) -> bool:
        """Whether the bar is shown."""
        return self._tqdm is not None

    @property
    def total(self) -> int | None:
        """Expected number of images; None if it is unknown. It may be set at any time."""
        return self._total

    @total.setter
    def total(self, total: int | None) -> None:
        with self._lock:
            self._total = total
            if self._bar is not None:
                self._bar.bar_format = _bar_format(total)
            self._update()

    @property
    def done(self) -> int:
        """Number of images that were made or came from the cache."""
        return self.costs.images

    @property
    def failed(self) -> int:
        """Number of images that failed, without those that the content filter blocked."""
        return self.costs.failed + self._failed_before

    @property
    def blocked(self) -> int:
        """Number of images that the content filter blocked."""
        return self.costs.blocked + self._blocked_before

    @property
    def in_flight(self) -> int:
        """Number of images whose request was sent and is not answered, without those that are retried."""
        return max(0, self.costs.in_flight - len(self._retrying) - len(self._downloading))

    @property
    def retrying(self) -> int:
        """Number of images whose request was refused; it waits, or was sent again."""
        return len(self._retrying)

    @property
    def downloading(self) -> int:
        """Number of images that the service has made and that are downloaded now; they hold no slot."""
        return len(self._downloading)

    @property
    def ended(self) -> int:
        """Number of images done, failed, blocked or skipped: the position of the bar."""
        return self.skipped + self.done + self.failed + self.blocked

    def skip(self, count: int = 1) -> None:
        """Count images that existed before. They move the bar, but not its speed or the time left.

        Args:
            count: Number of images.
        """
        with self._lock:
            self.skipped += count
            if self._bar is not None:
                self._bar.initial = self.skipped
            self._update()

    def count_failure(self, error: BaseException, *, images: int = 1) -> None:
        """Count images that failed before a request was sent, for example because of an invalid argument.

        A failure that an event has reported is not counted again, so that every exception of a stream can be passed here.

        Args:
            error: The exception.
            images: Number of images that it concerns.
        """
        with self._lock:
            if self._was_reported(error):
                return
            if isinstance(error, CogViewContentFilterError):
                self._blocked_before += images
            else:
                self._failed_before += images
            self._update()

    def on_event(self, name: str, event: Any) -> None:
        """Count an event and update the bar; see `EventHandler.on_event`."""
        with self._lock:
            self.costs.on_event(name, event)
            if name == RETRY_EVENT:
                self.retries += 1
                self._retrying.add(event["request_id"])
            elif name == GENERATED_EVENT or event.get("stage") in {"failed", "cancelled"}:
                self._retrying.discard(event["request_id"])
                self._downloading.discard(event["request_id"])
            if name == PROGRESS_EVENT and event["stage"] == "failed":
                self._remember(event)
            self._update()

    def on_answered(self, request_id: str) -> None:
        """Count an image that is downloaded now.

        Args:
            request_id: Id of its request.
        """
        with self._lock:
            self._retrying.discard(request_id)
            self._downloading.add(request_id)
            self._update()

    def _remember(self, event: Any) -> None:
        if event["scope"] is None:  # an exception of another library has no request id
            self._reported_others[event["error"]] += 1
            return
        self._reported[event["request_id"]] = None
        if len(self._reported) > _MAX_REPORTED:
            del self._reported[next(iter(self._reported))]

    def _was_reported(self, error: BaseException) -> bool:
        kind = type(error).__name__
        if self._reported_others[kind]:
            self._reported_others[kind] -= 1
            return True
        return getattr(error, "request_id", None) in self._reported

    def close(self) -> None:
        """Update the bar for the last time and end its line. Later events are still counted."""
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

    def _update(self) -> None:
        if self._tqdm is None:
            return
        try:
            if self._bar is None:
                self._bar = self._opened()
            # A total that was too low is raised: tqdm would stop showing it.
            self._bar.total = None if self._total is None else max(self._total, self.ended)
            self._bar.set_postfix_str(printable(self._facts()), refresh=False)
            updated = self._bar.update(self.ended - self._bar.n)
        except (OSError, ValueError):  # the terminal was closed
            self._bar = self._tqdm = None
            return
        if not updated and not self._bar.disable:
            self._update_late()

    def _opened(self) -> Any:
        kernel = in_kernel()
        return self._tqdm(
            desc=f"{printable(self._label, 60)} " if self._label else "",
            total=self._total,
            initial=self.skipped,
            file=CellOutput() if kernel else _Stderr(sys.stderr),
            ncols=_NOTEBOOK_WIDTH if kernel else None,
            dynamic_ncols=not kernel,
            bar_format=_bar_format(self._total),
            mininterval=MIN_INTERVAL,
            miniters=0,  # events that end no image are shown as well
            smoothing=0,  # images end in bursts: the mean over the whole run estimates the time left best
        )

    def _update_late(self) -> None:
        # tqdm ignores an update that follows the last one too closely. Images take 20 seconds, and for all that time the bar
        # would show one of five in flight. Not a daemon thread, which can crash an interpreter that exits while it writes.
        if self._late is None:
            late = threading.Timer(MIN_INTERVAL, self._refresh)
            with contextlib.suppress(RuntimeError):  # the interpreter is exiting
                late.start()
                self._late = late

    def _refresh(self) -> None:
        with self._lock:
            self._late = None
            if self._bar is not None:
                with contextlib.suppress(OSError, ValueError):
                    self._bar.refresh()

    def _facts(self) -> str:
        counts = (
            *((self.blocked, "blocked"), (self.failed, "failed"), (self.in_flight, "in flight")),
            *((self.retrying, "retrying"), (self.downloading, "downloading")),
        )
        facts = [f"{count} {what}" for count, what in counts if count]
        charges = str(self.costs.charges)
        return ", ".join(facts if charges == NO_COST else [*facts, charges])


def interactive() -> bool:
    """Whether a progress bar is of use.

    Returns:
        True if standard error is a terminal that can redraw a line, or if this is a Jupyter kernel.
    """
    try:
        terminal = sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        terminal = False
    return (terminal and os.environ.get("TERM") != "dumb") or in_kernel()


def _tqdm(show: bool | None) -> Any:  # noqa: FBT001
    if show is False or (show is None and not interactive()):
        return None
    if sys.stderr is None and not in_kernel():  # a program without a console
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


class _Stderr:
    """A file for tqdm: standard error, where a pipe that breaks costs the bar only.

    tqdm holds a lock of the whole process while it writes, and does not release it when the file raises.
    """

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


# --- context managers


class _Collector(EventHandler):
    """Passes events to the function of an open block, and to the collector of the block around it."""

    def __init__(self, collect: Callable[[str, Any], None], outer: _Collector | None) -> None:
        super().__init__()
        self._collect = collect
        self._outer = outer

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        super().on_custom_event(name, data, run_id=run_id, **kwargs)
        if self._outer:
            self._outer.on_custom_event(name, data, run_id=run_id, **kwargs)

    def on_event(self, name: str, event: Any) -> None:
        self._collect(name, event)


_collector: ContextVar[_Collector | None] = ContextVar("cogview_collector", default=None)
register_configure_hook(_collector, inheritable=True)


@contextlib.contextmanager
def _collecting(collect: Callable[[str, Any], None]) -> Iterator[None]:
    token = _collector.set(_Collector(collect, _collector.get()))
    try:
        yield
    finally:
        _collector.reset(token)


@contextlib.contextmanager
def collect_content_filter_events(*, max_level: int | None = None) -> Iterator[list[ContentFilterEvent]]:
    """Collect the content filter events of every run inside the block, including runs in LangChain's threads and in tasks.

    Blocks can be nested: each open block receives every event.

    Args:
        max_level: See `ContentFilterCallbackHandler`.

    Yields:
        List of the events, to which new ones are appended.

    Example:
        >>> with collect_content_filter_events() as events:    # doctest: +SKIP
        ...     agent.invoke({"messages": "make an image of a kitten"})
    """
    selection = _ContentFilterEvents(None, max_level)

    def collect(name: str, event: Any) -> None:
        if selection._is_severe(name, event):  # noqa: SLF001
            selection.events.append(event)

    with _collecting(collect):
        yield selection.events


@contextlib.contextmanager
def collect_image_costs() -> Iterator[ImageCosts]:
    """Count what the images of every run inside the block cost, including runs in LangChain's threads and in tasks.

    Blocks can be nested: each open block counts every image.

    Yields:
        The costs, which are updated.

    Example:
        >>> with collect_image_costs() as costs:    # doctest: +SKIP
        ...     agent.invoke({"messages": "make an image of a kitten"})
        >>> costs.total("CNY")    # doctest: +SKIP
        Decimal('0.06')
    """
    costs = ImageCosts()
    with _collecting(costs.on_event):
        yield costs


@contextlib.contextmanager
def collect_images() -> Iterator[list[GeneratedImage]]:
    """Collect the images of every run inside the block, including runs in LangChain's threads and in tasks.

    This also finds images that no message of an agent's output contains: images of sub-agents, and images whose messages were
    summarised. Blocks can be nested: each open block receives every image.

    Yields:
        List of the images, in the order in which they are made.

    Example:
        >>> with collect_images() as images:    # doctest: +SKIP
        ...     supervisor.invoke({"messages": "make an image of a kitten"})
        >>> images[0].show()    # doctest: +SKIP
    """
    images: list[GeneratedImage] = []
    with _collecting(lambda name, event: images.extend(_images(name, event))):
        yield images
