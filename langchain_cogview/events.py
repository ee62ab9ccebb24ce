"""Custom events: their names, their payloads, how a paid call makes and dispatches them, and the base class of handlers.

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NotRequired, TypedDict

from langchain_core.callbacks import BaseCallbackHandler, adispatch_custom_event, dispatch_custom_event

from langchain_cogview.artifact import (
    CONTENT_FILTER_EVENT,
    GENERATED_EVENT,
    PROGRESS_EVENT,
    RETRY_EVENT,
    ContentFilterArtifact,
    GeneratedImageArtifact,
)
from langchain_cogview.budget import JOURNAL
from langchain_cogview.concurrency import raised_by_signal
from langchain_cogview.errors import (
    CogViewContentFilterError,
    CogViewError,
    CogViewStoppedError,
    ContentFilter,
    Outcome,
    Stage,
    most_severe,
    printable,
)
from langchain_cogview.text import log_unasked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from uuid import UUID

    from langchain_core.runnables import RunnableConfig

    from langchain_cogview.budget import Charge, Journal, Reservation
    from langchain_cogview.concurrency import Deadline
    from langchain_cogview.cost import Money
    from langchain_cogview.result import GeneratedImage

EVENT_VERSION: Final = 1
"""Version of the payloads. A change that existing handlers would misread increments it."""

_EVENTS: Final = frozenset({CONTENT_FILTER_EVENT, GENERATED_EVENT, PROGRESS_EVENT, RETRY_EVENT})
_MAX_DELIVERIES: Final = 1024

logger = logging.getLogger(__name__)

Event = tuple[str, Any]
"""Name and payload of an event; the `EventDispatcher` adds the fields that all payloads share."""


# --- payloads


class _EventFields(TypedDict):
    """The fields that the `EventDispatcher` adds to each payload."""

    version: int
    """1."""
    tool_call_id: str | None
    """Id of the tool call that asked for the image; None outside an agent."""
    sandbox: bool
    """Whether the service is the offline sandbox."""


class ContentFilterEvent(_EventFields):
    """Payload of `cogview.content_filter`, sent once for a call that was blocked or whose image has entries. Plain JSON."""

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
    cost: NotRequired[str]
    """What was charged, as a decimal number: `0` for a blocked call. A made image has its cost in `cogview.generated`."""
    entries: list[ContentFilterArtifact]
    """All entries, in the order of the service."""
    model: str
    """Model that was asked."""
    request_id: str | None
    """Request id that this client generated, as on the result or the exception."""
    prompt: NotRequired[str]
    """The prompt; only with `include_prompt_in_events=True`."""


class GeneratedEvent(GeneratedImageArtifact, _EventFields):
    """Payload of `cogview.generated`, which is sent once for each image when it is safe. Plain JSON: the image's artifact."""


class GeneratedPayload(dict[str, Any]):
    """Payload of `cogview.generated` with a weak reference to the image, for handlers in this process.

    A copy or a pickle of the payload is plain JSON.
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


class ProgressEvent(_EventFields):
    """Payload of `cogview.progress`: the stage that the generation of one image has reached. Plain JSON.

    Each requested image sends `sent` once, `processing` at each poll of a task, and ends with `failed`, `cancelled` or the event
    `cogview.generated`. A cached image sends only `cogview.generated`, and a task that is resumed does not send `sent`.

    Attributes:
        stage: Stage that was reached.
        request_id: Request id that this client generated; every attempt has the same.
        model: Model that was asked.
        elapsed: Seconds since the call acquired its slot.
        task_id: Id of the task; None unless the task endpoint is used.
        error: At `failed` and `cancelled`: name of the exception's class.
        blocked: At `failed`: whether the content filter blocked the image.
        outcome: At `failed` and `cancelled`: `not_run`, `final`, or `unknown` (an image may have been charged).
        scope: At `failed`: what the error concerns, such as `prompt`; None for an exception of another library.
        is_retryable: At `failed`: whether the same request may be sent again and may succeed then.
        uncertain: Number of requests that may have been charged, at `failed` and `cancelled`.
        cost: What the image costs if it is made, as a decimal number; `0` if it was blocked, None if unknown.
        currency: ISO code of the cost's currency.
    """

    stage: Literal["sent", "processing", "failed", "cancelled"]
    request_id: str
    model: str
    elapsed: float
    task_id: str | None
    error: str | None
    blocked: bool
    outcome: str | None
    scope: str | None
    is_retryable: bool | None
    uncertain: int
    cost: str | None
    currency: str | None


class RetryEvent(_EventFields):
    """Payload of `cogview.retry`: a request did not run and will be sent again. Plain JSON."""

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
        """Send events to the handlers and the streams. Their exceptions are logged.

        Args:
            *events: Names and payloads.

        Raises:
            Exception: A signal handler raised it while an event was dispatched.
        """
        for name, payload in events if self.is_active else ():
            try:
                self._complete(name, payload)
                if self.has_handlers:
                    dispatch_custom_event(name, payload, config=self.config)
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
                self._complete(name, payload)
                if self.has_handlers:
                    await adispatch_custom_event(name, payload, config=self.config)
            except Exception as error:  # must not cost an image that was paid for
                if raised_by_signal(error):
                    raise
                logger.warning(_HANDLER_FAILED, name, exc_info=True)

    def answered(self, request_id: str) -> None:
        """Notify the handlers of this package that a request was answered: its slot is free, and its image is downloaded.

        Args:
            request_id: Id of the request.
        """
        callbacks: Any = self.config.get("callbacks") if self.has_handlers else None
        for handler in getattr(callbacks, "handlers", callbacks) or ():
            if isinstance(handler, EventHandler):
                handler.on_answered(request_id)

    def _complete(self, name: str, payload: dict[str, Any]) -> None:
        """Add the fields that all payloads share, in place so that a `GeneratedPayload` stays one, and write to the streams."""
        for key, value in (("version", EVENT_VERSION), ("tool_call_id", self.tool_call_id), ("sandbox", self.sandbox)):
            payload.setdefault(key, value)
        for write in self.streams:
            try:
                write({"type": name, **payload})
            except Exception as error:  # a graph that has ended must not cost an image, nor the events of the handlers
                if raised_by_signal(error):
                    raise
                logger.warning("The event %s could not be written to a stream of the graph", name, exc_info=True)


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


# --- one paid call


@dataclass(slots=True)
class ImageEvents:
    """Follows one paid call: counts it in the budget, writes the journal, makes and sends the events."""

    dispatcher: EventDispatcher
    """Sends the events."""
    price: Callable[[str], Money]
    """Returns the price of one image of a model."""
    prompt: str | None
    """The prompt for content filter events; None: they do not contain it."""
    deadline: Deadline
    """The deadline of the call."""
    request_id: str
    """The request id that this client generated, the same for every attempt."""
    model: str
    """The model that is asked."""
    reservation: Reservation | None = None
    """Where every POST that may be charged is counted; None: nowhere."""
    sent: bool = False
    """Whether a POST was sent."""
    uncertain: int = 0
    """Number of POSTs that may have been charged without an image."""
    charge: Charge | None = None
    """What the last POST was counted as; None without a budget."""
    _pending: bool = False
    _recorded: tuple[str, int] | None = None
    _begun: bool = False

    @property
    def label(self) -> str:
        """The id of the image, and a part of its file name: the beginning of the request id."""
        return self.request_id[:8]

    def sending(self) -> None:
        """Handle an attempt that is about to be sent. An exception ends the call, and nothing is sent."""
        journal = self._commit()
        if journal:
            journal.sending(self.request_id, self.model)
        first, self.sent = not self.sent, True
        if first and self.dispatcher.is_active:
            self.dispatcher.dispatch(self._progress("sent"))

    async def asending(self) -> None:
        """Async version of `sending`."""
        journal = self._commit()
        if journal:
            await journal.asending(self.request_id, self.model)
        first, self.sent = not self.sent, True
        if first and self.dispatcher.is_active:
            await self.dispatcher.adispatch(self._progress("sent"))

    def answered(self, unasked_urls: tuple[str, ...]) -> None:
        """Handle the answer: the slot is free, and the image is downloaded. Links that were not asked for are logged."""
        log_unasked(self.request_id, unasked_urls)
        self.dispatcher.answered(self.request_id)

    def _commit(self) -> Journal | None:
        """Return the journal, unless it holds this POST already, after counting the attempt as spent."""
        if self.reservation is not None:
            self.charge = self.reservation.commit(self.price(self.model))
        self._pending = True
        before, self._recorded = self._recorded, (self.model, self.uncertain)
        return None if before == self._recorded else JOURNAL.get()

    def failed(self, error: BaseException, *, was_sent: bool = True) -> None:
        """Handle an attempt, or a task, that ended without an image.

        Args:
            error: Why there is no image.
            was_sent: Whether a part of the request may have been sent; if not, nothing is charged, whatever the error is.
        """
        journal = self._ended(error, was_sent=was_sent)
        if journal:
            with _recording(f"request {self.request_id}"):
                journal.not_sent(self.request_id, self.model)

    async def afailed(self, error: BaseException, *, was_sent: bool = True) -> None:
        """Async version of `failed`."""
        journal = self._ended(error, was_sent=was_sent)
        if journal:
            with _recording(f"request {self.request_id}"):
                await journal.anot_sent(self.request_id, self.model)

    def _ended(self, error: BaseException, *, was_sent: bool) -> Journal | None:
        """Return the journal if it has to record that the POST was not sent, after counting the end of the attempt."""
        pending, self._pending = self._pending, False
        is_free = not was_sent or (isinstance(error, CogViewError) and error.outcome is not Outcome.UNKNOWN)
        if pending and is_free:
            if self.charge is not None:
                self.charge.release()
        elif pending:
            self.uncertain += 1
        # An error of this package reaches the journal's owner; a coroutine that is closed cannot wait for a record.
        if was_sent or self.uncertain or isinstance(error, CogViewError | GeneratorExit):
            return None
        return JOURNAL.get()

    def retrying(self, error: CogViewError, wait: float, attempts: int) -> None:
        """Handle a wait of `wait` seconds after an attempt that failed with `error`, the last of `attempts` so far."""
        self.dispatcher.dispatch(self._retry(error, wait, attempts))

    async def aretrying(self, error: CogViewError, wait: float, attempts: int) -> None:
        """Async version of `retrying`."""
        await self.dispatcher.adispatch(self._retry(error, wait, attempts))

    def submitted(self, task_id: str) -> None:
        """Record a task that was accepted; nothing may stop it now, because it may be charged."""
        journal = JOURNAL.get()
        if journal:
            with _recording(f"task {printable(task_id)}"):
                journal.submitted(self.request_id, task_id, self.model)

    async def asubmitted(self, task_id: str) -> None:
        """Async version of `submitted`."""
        journal = JOURNAL.get()
        if journal:
            with _recording(f"task {printable(task_id)}"):
                await journal.asubmitted(self.request_id, task_id, self.model)

    def processing(self, task_id: str) -> None:
        """Handle a poll of a task that has not ended."""
        self.dispatcher.dispatch(self._progress("processing", task_id=task_id))

    async def aprocessing(self, task_id: str) -> None:
        """Async version of `processing`."""
        await self.dispatcher.adispatch(self._progress("processing", task_id=task_id))

    def lost(self, error: BaseException, task_id: str | None) -> list[Event]:
        """Return the events of an image that was paid and not received, because its caller left during the download."""
        self.uncertain += 1
        return self.ended_with(error, task_id=task_id, outcome=str(Outcome.UNKNOWN))

    def ended_with(self, error: BaseException, **known: str | None) -> list[Event]:
        """Return the events of an image that was not made, or whose caller left; `known` replaces fields of the payload."""
        cancelled = (
            isinstance(error, CogViewStoppedError) or raised_by_signal(error) or not isinstance(error, Exception)
        )
        # A coroutine that is closed cannot wait for handlers, and a call that had not begun has sent no event.
        if not self.dispatcher.is_active or isinstance(error, GeneratorExit) or (cancelled and not self._begun):
            return []
        outcome = getattr(error, "outcome", Outcome.FINAL)
        if cancelled:  # a task that is resumed may still make an image
            outcome = Outcome.UNKNOWN if self.uncertain or not self.sent else Outcome.NOT_RUN
        facts = {
            "error": type(error).__name__,
            "blocked": isinstance(error, CogViewContentFilterError),
            **({"cost": "0"} if isinstance(error, CogViewContentFilterError) and not self.uncertain else {}),
            "outcome": str(outcome),
            "scope": str(error.scope) if isinstance(error, CogViewError) else None,
            "is_retryable": isinstance(error, CogViewError) and error.is_retryable,
            "task_id": getattr(error, "task_id", None),
            "uncertain": self.uncertain,
            **known,
        }
        events = [self._progress("cancelled" if cancelled else "failed", **facts)]
        if isinstance(error, CogViewContentFilterError):
            events.append(self._filtered(error.content_filter, blocked=True))
        return events

    def made(self, images: list[GeneratedImage]) -> list[Event]:
        """Make the events of images that are saved, or in memory.

        Args:
            images: The images of the call.

        Returns:
            The events.
        """
        if not self.dispatcher.is_active:
            return []
        events: list[Event] = [(GENERATED_EVENT, GeneratedPayload(image)) for image in images]
        if images and images[0].content_filter:
            events.append(self._filtered(images[0].content_filter, blocked=False))
        return events

    def _progress(self, stage: str, **facts: Any) -> Event:
        self._begun, price = True, self.price(self.model)
        return PROGRESS_EVENT, {
            "stage": stage,
            "request_id": self.request_id,
            "model": self.model,
            "elapsed": round(self.deadline.elapsed, 3),
            "task_id": None,
            "error": None,
            "blocked": False,
            "uncertain": 0,
            "outcome": None,
            "scope": None,
            "is_retryable": None,
            "cost": None if price.amount is None else str(price.amount),
            "currency": price.currency,
            **facts,
        }

    def _retry(self, error: CogViewError, wait: float, attempts: int) -> Event:
        return RETRY_EVENT, {
            "request_id": self.request_id,
            "model": self.model,
            "attempt": attempts,
            "wait": round(wait, 3),
            "error": type(error).__name__,
            "outcome": str(error.outcome),
            "scope": str(error.scope),
            "is_retryable": error.is_retryable,
            "code": error.code,
            "status": error.status,
        }

    def _filtered(self, entries: tuple[ContentFilter, ...], *, blocked: bool) -> Event:
        worst = most_severe(entries)
        event: dict[str, Any] = {
            "role": worst.role if worst else None,
            "level": worst.level if worst else None,
            "stage": worst.stage if worst else None,
            "severity": worst.severity if worst else "unknown",
            "blocked": blocked,
            **({"cost": "0"} if blocked else {}),
            "entries": [{"role": entry.role, "level": entry.level} for entry in entries],
            "model": self.model,
            "request_id": self.request_id,
        }
        if self.prompt is not None:
            event["prompt"] = self.prompt
        return CONTENT_FILTER_EVENT, event


@contextmanager
def _recording(subject: str) -> Iterator[None]:
    """Log an exception of the journal: the caller needs that of the call, and a task that was accepted may be charged."""
    try:
        yield
    except Exception as error:
        if raised_by_signal(error):
            raise
        logger.warning("The %s could not be recorded in the journal.", subject, exc_info=True)


# --- handlers


class Deliveries:
    """Recognises an event that is delivered again, as LangChain does if a run lists a handler twice. Thread-safe.

    An event is identified by its run and the identity of its payload. Duplicates follow closely: the last 1024 are remembered.
    """

    def __init__(self) -> None:
        self._recent: dict[tuple[int, UUID], Any] = {}
        self._lock = threading.Lock()

    def is_first(self, data: Any, run_id: UUID) -> bool:
        """Return whether this is the first delivery of the payload by the run; the delivery is recorded."""
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
        """Receive a custom event from LangChain; see its `BaseCallbackHandler.on_custom_event`."""
        if name in _EVENTS and self._deliveries.is_first(data, run_id):
            self.on_event(name, data)

    def on_answered(self, request_id: str) -> None:
        """Process that a request was answered and its image is downloaded now; by default nothing.

        Args:
            request_id: Id of the request.
        """

    @abstractmethod
    def on_event(self, name: str, event: Any) -> None:
        """Process an event of this package.

        Args:
            name: Name of the event, such as `cogview.generated`.
            event: Its payload.
        """
