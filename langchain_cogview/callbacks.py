"""Handlers and a context manager over the events: what the content filter said."""

from __future__ import annotations

import contextlib
import inspect
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.tracers.context import register_configure_hook

from langchain_cogview.events import CONTENT_FILTER_EVENT, ContentFilterEvent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from uuid import UUID


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

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """LangChain's hook."""
        if _selected(name, data, self.max_level):
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

    async def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """LangChain's hook."""
        if _selected(name, data, self.max_level):
            self.events.append(data)
            if self.on_content_filter:
                answer = self.on_content_filter(data)
                if inspect.isawaitable(answer):
                    await answer


class _Collector(ContentFilterCallbackHandler):
    # Inline: an event that a call sends is there when the call returns, in async runs too.
    run_inline = True

    def __init__(self, outer: _Collector | None, max_level: int | None) -> None:
        super().__init__(max_level=max_level)
        self._outer = outer

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        super().on_custom_event(name, data, run_id=run_id, **kwargs)
        if self._outer:
            self._outer.on_custom_event(name, data, run_id=run_id, **kwargs)


_collector: ContextVar[_Collector | None] = ContextVar("cogview_content_filter_collector", default=None)
register_configure_hook(_collector, inheritable=True)


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
    collector = _Collector(_collector.get(), max_level)
    token = _collector.set(collector)
    try:
        yield collector.events
    finally:
        _collector.reset(token)
