"""Custom events: their names, their payloads, how they are dispatched, and the base class of handlers.

LangChain delivers them to the `on_custom_event` of every handler and to `astream_events`. Inside a graph of LangGraph they also
go to `stream_mode="custom"` and, from a tool, to `stream_mode="tools"`. They are dispatched after the image is safe, and the
exception of a handler is logged: it never costs an image.
"""

from __future__ import annotations

import contextvars
import logging
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NotRequired, TypedDict

from langchain_core.callbacks import BaseCallbackHandler, adispatch_custom_event, dispatch_custom_event

from langchain_cogview.artifact import ContentFilterArtifact, GeneratedImageArtifact
from langchain_cogview.concurrency import raised_by_signal
from langchain_cogview.errors import ContentFilter, Stage, most_severe

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from langchain_core.runnables import RunnableConfig

    from langchain_cogview.result import GeneratedImage

CONTENT_FILTER_EVENT: Final = "cogview.content_filter"
GENERATED_EVENT: Final = "cogview.generated"
PROGRESS_EVENT: Final = "cogview.progress"
RETRY_EVENT: Final = "cogview.retry"
EVENT_VERSION: Final = 1
"""Version of the payloads. A change that existing handlers would misread increments it."""

_EVENTS: Final = frozenset({CONTENT_FILTER_EVENT, GENERATED_EVENT, PROGRESS_EVENT, RETRY_EVENT})
_MAX_DELIVERIES: Final = 1024

logger = logging.getLogger(__name__)

Event = tuple[str, Any]
"""Name and payload of an event; the `EventDispatcher` adds the fields that all payloads share."""


# --- payloads


class ContentFilterEvent(TypedDict):
    """Payload of `cogview.content_filter`, sent once for a call that was blocked or whose image has entries. Plain JSON."""

    version: int
    """1."""
    role: str | None
    """Role of the most severe entry: `user`, `assistant`, `history`, ...; None if the service sent none."""
    level: int | None
    """Level of the most severe entry, from 0 (most severe) to 3 (mildest)."""
    stage: Stage | None
    """What the most severe entry is about: `prompt`, `image`, `history` or `other`."""
    severity: str
    """The level in words."""
    blocked: bool
    """True: there is no image, and nothing was charged. False: the image was made in spite of the entries."""
    entries: list[ContentFilterArtifact]
    """All entries, in the order of the service."""
    model: str
    """Model that was asked."""
    request_id: str | None
    """Request id that this client generated, as on the result or the exception."""
    tool_call_id: str | None
    """Id of the tool call that asked for the image; None outside an agent."""
    sandbox: bool
    """Whether the offline sandbox sent the reply."""
    prompt: NotRequired[str]
    """The prompt; only with `include_prompt_in_events=True`."""


class GeneratedEvent(GeneratedImageArtifact):
    """Payload of `cogview.generated`, which is sent once for each image when it is safe. Plain JSON: the image's artifact."""

    version: int
    """1."""
    tool_call_id: str | None
    """Id of the tool call that asked for the image; None outside an agent."""


class GeneratedPayload(dict[str, Any]):
    """Payload of `cogview.generated` with a reference to the image, for handlers in this process.

    The reference is weak, and a copy or a pickle of the payload is plain JSON.

    Args:
        image: The image.
    """

    def __init__(self, image: GeneratedImage) -> None:
        super().__init__(image.model_dump(mode="json"))
        self._image = weakref.ref(image)

    @property
    def image(self) -> GeneratedImage | None:
        """The image; None once its call has ended and nothing else refers to it."""
        return self._image()

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class ProgressEvent(TypedDict):
    """Payload of `cogview.progress`: the stage that the generation of one image has reached. Plain JSON.

    Each image that is requested from the service sends `sent` once, `processing` at each poll of a task, and ends with either
    `failed` or the event `cogview.generated`; a call that is cancelled or interrupted ends without either. A cached image sends
    `cogview.generated` only, and a task that is resumed does not send `sent`.
    """

    version: int
    """1."""
    stage: Literal["sent", "processing", "failed"]
    """Stage that was reached."""
    request_id: str
    """Request id that this client generated; every attempt has the same."""
    model: str
    """Model that was asked."""
    elapsed: float
    """Seconds since the call acquired its slot."""
    task_id: str | None
    """Id of the task; None unless the task endpoint is used."""
    error: str | None
    """At `failed`: name of the error's class."""
    blocked: bool
    """At `failed`: whether the content filter blocked the image."""
    outcome: str | None
    """At `failed`: `not_run`, `final`, or `unknown` (an image may have been charged)."""
    scope: str | None
    """At `failed`: what the error concerns, such as `prompt` or `account`; None for an exception of another library."""
    is_retryable: bool | None
    """At `failed`: whether the same request may be sent again and may succeed then."""
    uncertain: int
    """At `failed`: number of requests that may have been charged, including those that were sent again."""
    cost: str | None
    """What the image costs if it is made, as a decimal number; None if the price is unknown."""
    currency: str | None
    """ISO code of the cost's currency."""
    sandbox: bool
    """Whether the request goes to the offline sandbox."""
    tool_call_id: str | None
    """Id of the tool call that asked for the image; None outside an agent."""


class RetryEvent(TypedDict):
    """Payload of `cogview.retry`: a request did not run and will be sent again. Plain JSON."""

    version: int
    """1."""
    request_id: str
    """Request id that this client generated; every attempt has the same."""
    model: str
    """Model that was asked."""
    attempt: int
    """Number of attempts so far."""
    wait: float
    """Seconds until the next attempt, without the time that it then waits for a slot."""
    error: str
    """Name of the error's class."""
    outcome: str
    """`not_run`, or `unknown` (an image may have been charged; only with `retry_unknown=True`)."""
    scope: str
    """What the error concerns, such as `service`."""
    is_retryable: bool
    """Whether the same request may be sent again and may succeed then."""
    code: str | None
    """Error code of the service; None if it sent none."""
    status: int | None
    """HTTP status; None without a response."""
    sandbox: bool
    """Whether the request went to the offline sandbox."""
    tool_call_id: str | None
    """Id of the tool call that asked for the image; None outside an agent."""


def content_filter_event(
    entries: tuple[ContentFilter, ...],
    *,
    blocked: bool,
    model: str,
    request_id: str | None,
    prompt: str | None,
) -> Event:
    """Make an event `cogview.content_filter`.

    Args:
        entries: The entries of the service.
        blocked: Whether the content filter blocked the image.
        model: Model that was asked.
        request_id: Request id that this client generated.
        prompt: The prompt; None leaves it out.

    Returns:
        Name and payload.
    """
    worst = most_severe(entries)
    event: dict[str, Any] = {
        "role": worst.role if worst else None,
        "level": worst.level if worst else None,
        "stage": worst.stage if worst else None,
        "severity": worst.severity if worst else "unknown",
        "blocked": blocked,
        "entries": [{"role": entry.role, "level": entry.level} for entry in entries],
        "model": model,
        "request_id": request_id,
    }
    if prompt is not None:
        event["prompt"] = prompt
    return CONTENT_FILTER_EVENT, event


# --- dispatch


@dataclass(frozen=True, slots=True)
class EventDispatcher:
    """Dispatches the events of one run to its handlers, and to the streams of the graph that it runs in."""

    config: RunnableConfig
    """The `RunnableConfig` of the run."""
    tool_call_id: str | None
    """Id of the tool call that the run belongs to; None outside an agent."""
    sandbox: bool
    """Whether the service is the offline sandbox."""
    has_handlers: bool
    """Whether the run has callback handlers."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Metadata of the run, which traces show."""
    streams: tuple[Callable[[dict[str, Any]], None], ...] = ()
    """Writers to the streams of the graph, from `graph_streams`."""

    @property
    def is_active(self) -> bool:
        """Whether anything receives the events; if not, none needs to be made."""
        return self.has_handlers or bool(self.streams)

    def dispatch(self, *events: Event) -> None:
        """Send events to the handlers of the run. An exception of a handler is logged.

        Args:
            *events: Names and payloads.

        Raises:
            Exception: A signal handler raised it while an event was dispatched.
        """
        for name, payload in events if self.is_active else ():
            try:
                completed = self._completed(payload)
                self._stream(name, completed)
                if self.has_handlers:
                    dispatch_custom_event(name, completed, config=self.config)
            except Exception as error:  # must not cost an image that was paid for
                if raised_by_signal(error):
                    raise
                logger.warning(_HANDLER_FAILED, name, exc_info=True)

    async def adispatch(self, *events: Event) -> None:
        """Async version of `dispatch`.

        Args:
            *events: Names and payloads.

        Raises:
            Exception: A signal handler raised it while an event was dispatched.
        """
        for name, payload in events if self.is_active else ():
            try:
                completed = self._completed(payload)
                self._stream(name, completed)
                if self.has_handlers:
                    await adispatch_custom_event(name, completed, config=self.config)
            except Exception as error:  # must not cost an image that was paid for
                if raised_by_signal(error):
                    raise
                logger.warning(_HANDLER_FAILED, name, exc_info=True)

    def _stream(self, name: str, payload: dict[str, Any]) -> None:
        for write in self.streams:
            try:
                write({"type": name, **payload})
            except Exception as error:  # a graph that has ended must not cost an image, nor the events of the handlers
                if raised_by_signal(error):
                    raise
                logger.warning("The event %s could not be written to a stream of the graph", name, exc_info=True)

    def _completed(self, payload: dict[str, Any]) -> dict[str, Any]:
        # The payload was made for this event only, and GeneratedPayload must keep its class: it is changed in place.
        for name, value in (("version", EVENT_VERSION), ("tool_call_id", self.tool_call_id), ("sandbox", self.sandbox)):
            payload.setdefault(name, value)
        return payload


def graph_streams() -> tuple[Callable[[dict[str, Any]], None], ...]:
    """Find the streams of the LangGraph graph in which this code runs: `custom`, and `tools` inside a tool call.

    LangGraph is not imported: where it is not loaded, no graph runs. A stream that nobody asked for ignores what is written.

    Returns:
        A writer for each stream; none outside a graph.
    """
    graph, nodes = sys.modules.get("langgraph.config"), sys.modules.get("langgraph.prebuilt.tool_node")
    if graph is None:
        return ()
    try:
        custom = graph.get_stream_writer()
    except (RuntimeError, KeyError, AttributeError):  # outside a graph
        return ()
    runtime = getattr(nodes, "ToolRuntime", None)
    if runtime is None or not hasattr(runtime, "emit_output_delta"):
        return (custom,)
    tools = runtime(state={}, context=None, config={}, stream_writer=custom, tool_call_id=None, store=None)
    # The stream of a tool call is found by the context, which worker threads do not have.
    context = contextvars.copy_context()
    return custom, lambda payload: context.copy().run(tools.emit_output_delta, payload)


_HANDLER_FAILED: Final = "A callback handler raised an exception for the event %s"
NO_DISPATCHER: Final = EventDispatcher(config={}, tool_call_id=None, sandbox=False, has_handlers=False)
"""Dispatches nothing, for work outside a run."""


# --- handlers


class Deliveries:
    """Recognises an event that is delivered again, as LangChain does if a run lists a handler twice.

    An event is identified by the identity of its payload and by its run. The last 1024 events are remembered, which is enough
    because duplicates follow each other closely. Thread-safe.
    """

    def __init__(self) -> None:
        self._recent: dict[tuple[int, UUID], Any] = {}
        self._lock = threading.Lock()

    def is_first(self, data: Any, run_id: UUID) -> bool:
        """Record a delivery.

        Args:
            data: Payload of the event.
            run_id: Id of the run that sent it.

        Returns:
            Whether this is the first delivery of the event.
        """
        key = id(data), run_id
        with self._lock:
            if key in self._recent:
                return False
            self._recent[key] = data  # a reference, so that no other payload gets the same identity
            if len(self._recent) > _MAX_DELIVERIES:
                del self._recent[next(iter(self._recent))]
        return True


class EventHandler(BaseCallbackHandler, ABC):
    """Base class of handlers that receive each event of this package once, in sync and async runs."""

    # Runs in the task of the run, instead of a thread of the event loop's executor, whose threads may all be in use.
    run_inline = True

    def __init__(self) -> None:
        self._deliveries = Deliveries()

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Receive a custom event from LangChain.

        Args:
            name: Name of the event.
            data: Its payload.
            run_id: Id of the run that sent it.
            **kwargs: Further facts about the run, which are not used.
        """
        if name in _EVENTS and self._deliveries.is_first(data, run_id):
            self.on_event(name, data)

    @abstractmethod
    def on_event(self, name: str, event: Any) -> None:
        """Process an event of this package.

        Args:
            name: Name of the event, such as `cogview.generated`.
            event: Its payload.
        """
