"""Handlers and context managers over the events: the images, what the content filter said, and what the images cost."""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from abc import ABC, abstractmethod
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.tracers.context import register_configure_hook

from langchain_cogview.artifact import validated
from langchain_cogview.cost import ImageCosts
from langchain_cogview.errors import CogViewInvalidRequestError
from langchain_cogview.events import (
    CONTENT_FILTER_EVENT,
    GENERATED_EVENT,
    PROGRESS_EVENT,
    RETRY_EVENT,
    ContentFilterEvent,
    GeneratedPayload,
)
from langchain_cogview.result import GeneratedImage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from uuid import UUID

_EVENTS: Final = frozenset({CONTENT_FILTER_EVENT, GENERATED_EVENT, PROGRESS_EVENT, RETRY_EVENT})
_REMEMBERED: Final = 1024

logger = logging.getLogger(__name__)


class Deliveries:
    """Which events came already: LangChain hands an event to a handler as often as the handler is in the run's list.

    An event is known by its payload's identity, and is remembered until a thousand others came: doubles come close together.
    """

    def __init__(self) -> None:
        self._recent: dict[tuple[int, UUID], Any] = {}
        self._lock = threading.Lock()

    def is_first(self, data: Any, run_id: UUID) -> bool:
        """Whether this payload comes for the first time."""
        key = id(data), run_id
        with self._lock:
            if key in self._recent:
                return False
            self._recent[key] = data  # kept, so that no other payload gets its identity
            if len(self._recent) > _REMEMBERED:
                del self._recent[next(iter(self._recent))]
        return True


class EventHandler(BaseCallbackHandler, ABC):
    """Hears each event of this package once, in sync and async runs alike; a subclass says what it does in `on_event`."""

    # Inline: heard in the run's own task, and not in a thread of the event loop's executor, which others may fill.
    run_inline = True

    def __init__(self) -> None:
        self._deliveries = Deliveries()

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """LangChain's hook."""
        if name in _EVENTS and self._deliveries.is_first(data, run_id):
            self.on_event(name, data)

    @abstractmethod
    def on_event(self, name: str, event: Any) -> None:
        """Take an event."""


def _selected(name: str, event: ContentFilterEvent, max_level: int | None) -> bool:
    """Whether an event is one of ours and severe enough; one without a level counts where it blocked."""
    if name != CONTENT_FILTER_EVENT:
        return False
    if max_level is None:
        return True
    level = event["level"]
    return event["blocked"] if level is None else level <= max_level


def _check(on_content_filter: Any, max_level: Any) -> None:
    if on_content_filter is not None and not callable(on_content_filter):
        raise TypeError(f"on_content_filter is called with each event; {on_content_filter!r:.60} cannot be called.")
    if max_level is not None and max_level not in range(4):
        raise ValueError(f"max_level is 0 (the most severe alone) to 3 (all), or None, not {max_level!r:.20}.")


class ContentFilterCallbackHandler(BaseCallbackHandler):
    """Collects content filter events and hands them on; for sync and async runs alike.

    Args:
        on_content_filter: Called with each event. What it raises is logged by LangChain and costs no picture.
        max_level: Only events of this level or more severe ones: 0 selects the most severe alone, 3 all with a level.
            A block whose level is unknown is always selected. None selects all.

    Attributes:
        events: The selected events so far, in order.

    Example:
        >>> handler = ContentFilterCallbackHandler(on_content_filter=print, max_level=1)
        >>> generator.invoke("a kitten", config={"callbacks": [handler]})    # doctest: +SKIP
    """

    def __init__(
        self, on_content_filter: Callable[[ContentFilterEvent], Any] | None = None, *, max_level: int | None = None
    ) -> None:
        _check(on_content_filter, max_level)
        if inspect.iscoroutinefunction(on_content_filter):
            raise TypeError(
                "on_content_filter is a coroutine function: use AsyncContentFilterCallbackHandler, which awaits it."
            )
        self.events: list[ContentFilterEvent] = []
        self.on_content_filter = on_content_filter
        self.max_level = max_level
        self._deliveries = Deliveries()

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """LangChain's hook."""
        if _selected(name, data, self.max_level) and self._deliveries.is_first(data, run_id):
            self.events.append(data)
            if self.on_content_filter:
                self.on_content_filter(data)


class AsyncContentFilterCallbackHandler(AsyncCallbackHandler):
    """The async twin of `ContentFilterCallbackHandler`: `on_content_filter` may be a coroutine function.

    Args:
        on_content_filter: Called, and awaited where it is async, with each event.
        max_level: As in `ContentFilterCallbackHandler`.

    Attributes:
        events: The selected events so far, in order.
    """

    def __init__(
        self,
        on_content_filter: Callable[[ContentFilterEvent], Awaitable[Any] | Any] | None = None,
        *,
        max_level: int | None = None,
    ) -> None:
        _check(on_content_filter, max_level)
        self.events: list[ContentFilterEvent] = []
        self.on_content_filter = on_content_filter
        self.max_level = max_level
        self._deliveries = Deliveries()

    async def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """LangChain's hook."""
        if _selected(name, data, self.max_level) and self._deliveries.is_first(data, run_id):
            self.events.append(data)
            if self.on_content_filter:
                answer = self.on_content_filter(data)
                if inspect.isawaitable(answer):
                    await answer


class CostCallbackHandler(EventHandler):
    """Counts what pictures cost, for sync and async runs alike.

    Attributes:
        costs: What they cost so far.

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
        """Count an event."""
        self.costs.on_event(name, event)


class ImageCallbackHandler(EventHandler):
    """Collects the images of the runs that it is passed to, sync and async alike, those of sub-agents included.

    Attributes:
        images: The images so far, in the order in which they were made.

    Example:
        >>> handler = ImageCallbackHandler()
        >>> supervisor.invoke({"messages": "draw a kitten"}, {"callbacks": [handler]})    # doctest: +SKIP
        >>> handler.images[0].show()    # doctest: +SKIP
    """

    def __init__(self) -> None:
        super().__init__()
        self.images: list[GeneratedImage] = []

    def on_event(self, name: str, event: Any) -> None:
        """Collect the image of an event."""
        self.images.extend(_images(name, event))


def _images(name: str, event: Any) -> Iterator[GeneratedImage]:
    if name != GENERATED_EVENT:
        return
    image = event.image if isinstance(event, GeneratedPayload) else None
    try:
        yield image or validated(GeneratedImage, event)
    except CogViewInvalidRequestError as error:  # the event was sent by somebody else
        logger.warning("An image was not collected. %s", error)


class _Collector(EventHandler):
    """What an open block hears, and the block around it."""

    def __init__(self, on_event: Callable[[str, Any], None], outer: _Collector | None) -> None:
        super().__init__()
        self._on_event = on_event
        self._outer = outer

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        super().on_custom_event(name, data, run_id=run_id, **kwargs)
        if self._outer:
            self._outer.on_custom_event(name, data, run_id=run_id, **kwargs)

    def on_event(self, name: str, event: Any) -> None:
        self._on_event(name, event)


_collector: ContextVar[_Collector | None] = ContextVar("cogview_collector", default=None)
register_configure_hook(_collector, inheritable=True)


@contextlib.contextmanager
def _collecting(on_event: Callable[[str, Any], None]) -> Iterator[None]:
    token = _collector.set(_Collector(on_event, _collector.get()))
    try:
        yield
    finally:
        _collector.reset(token)


@contextlib.contextmanager
def collect_content_filter_events(*, max_level: int | None = None) -> Iterator[list[ContentFilterEvent]]:
    """Collect the content filter events of everything that runs inside the block, in LangChain's threads and in tasks too.

    Blocks can be nested: an event goes to all that are open.

    Args:
        max_level: As in `ContentFilterCallbackHandler`.

    Yields:
        The list that fills.

    Example:
        >>> with collect_content_filter_events() as events:    # doctest: +SKIP
        ...     agent.invoke({"messages": "draw a kitten"})
    """
    _check(None, max_level)
    events: list[ContentFilterEvent] = []

    def on_event(name: str, event: Any) -> None:
        if _selected(name, event, max_level):
            events.append(event)

    with _collecting(on_event):
        yield events


@contextlib.contextmanager
def collect_image_costs() -> Iterator[ImageCosts]:
    """Count what the pictures cost of everything that runs inside the block, in LangChain's threads and in tasks too.

    Blocks can be nested: a picture counts in all that are open.

    Yields:
        The costs, which grow.

    Example:
        >>> with collect_image_costs() as costs:    # doctest: +SKIP
        ...     agent.invoke({"messages": "draw a kitten"})
        >>> costs.total("CNY")    # doctest: +SKIP
        Decimal('0.06')
    """
    costs = ImageCosts()
    with _collecting(costs.on_event):
        yield costs


@contextlib.contextmanager
def collect_images() -> Iterator[list[GeneratedImage]]:
    """Collect the images of everything that runs inside the block, in LangChain's threads and in tasks too.

    It finds images that are in no message of an agent's output: those of sub-agents, and those whose messages were summarised.
    Blocks can be nested: an image goes to all that are open.

    Yields:
        The list that fills, in the order in which the images are made.

    Example:
        >>> with collect_images() as images:    # doctest: +SKIP
        ...     supervisor.invoke({"messages": "draw a kitten"})
        >>> images[0].show()    # doctest: +SKIP
    """
    images: list[GeneratedImage] = []
    with _collecting(lambda name, event: images.extend(_images(name, event))):
        yield images
