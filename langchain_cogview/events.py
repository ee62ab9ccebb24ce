"""The custom events: names, payloads, best-effort dispatch.

LangChain hands them to every handler's `on_custom_event` and to `astream_events`. They are sent after the result is safe; a
handler that raises is logged and never costs a picture.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NotRequired, TypedDict

from langchain_core.callbacks import adispatch_custom_event, dispatch_custom_event

from langchain_cogview.artifact import GeneratedImageArtifact
from langchain_cogview.concurrency import raised_by_signal
from langchain_cogview.content_filter import ContentFilter, Stage, most_severe

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig

    from langchain_cogview.result import GeneratedImage

CONTENT_FILTER_EVENT: Final = "cogview.content_filter"
GENERATED_EVENT: Final = "cogview.generated"
PROGRESS_EVENT: Final = "cogview.progress"
RETRY_EVENT: Final = "cogview.retry"
EVENT_VERSION: Final = 1

logger = logging.getLogger(__name__)

Event = tuple[str, Any]
"""A name, and what its payload says beside what the `EventDispatcher` adds."""


class ContentFilterEntry(TypedDict):
    """One entry as the service sent it."""

    role: str | None
    level: int | None


class ContentFilterEvent(TypedDict):
    """Payload of `cogview.content_filter`: one for each call that was blocked, or made with entries. Plain JSON."""

    version: int
    """1."""
    role: str | None
    """Of the most severe entry: `user`, `assistant`, `history`, ...; None where the service told nothing."""
    level: int | None
    """Of the most severe entry: 0 is the most severe, 3 the mildest."""
    stage: Stage | None
    """What was judged: `prompt`, `picture`, `history` or `other`."""
    severity: str
    """The level in words."""
    blocked: bool
    """True: no picture, nothing charged. False: the picture was made all the same."""
    entries: list[ContentFilterEntry]
    """All entries, in the service's order."""
    model: str
    request_id: str | None
    """Ours, as on the result or the exception."""
    tool_call_id: str | None
    """Of the tool call that asked for the picture; None outside an agent."""
    sandbox: bool
    prompt: NotRequired[str]
    """Only with `include_prompt_in_events=True`."""


class GeneratedEvent(GeneratedImageArtifact):
    """Payload of `cogview.generated`: one for each image, once it is safe. Plain JSON: all that an artifact says of an image."""

    version: int
    """1."""
    tool_call_id: str | None
    """Of the tool call that asked for the image; None outside an agent."""


class GeneratedPayload(dict[str, Any]):
    """The payload of `cogview.generated` with the image itself, for handlers of this process.

    It does not keep the image alive, and a copy or pickle of it is plain JSON.

    Args:
        image: The image.
    """

    def __init__(self, image: GeneratedImage) -> None:
        super().__init__(image.model_dump(mode="json"))
        self._image = weakref.ref(image)

    @property
    def image(self) -> GeneratedImage | None:
        """The image, while its call is not over or somebody holds it."""
        return self._image()

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class ProgressEvent(TypedDict):
    """Payload of `cogview.progress`: where one picture is on its way. Plain JSON.

    Each picture that is asked of the service sends `sent` once, `processing` at each poll of a task, and ends with
    either `failed` or the event `cogview.generated`; a call that is cancelled or interrupted ends without either. A cached
    picture sends `cogview.generated` alone, and a task that is resumed no `sent`.
    """

    version: int
    """1."""
    stage: Literal["sent", "processing", "failed"]
    request_id: str
    model: str
    elapsed: float
    """Seconds since it had its place in flight."""
    task_id: str | None
    """Of the task endpoint."""
    error: str | None
    """Name of the error's class, at `failed`."""
    blocked: bool
    """At `failed`: by the content filter."""
    outcome: str | None
    """At `failed`: `not_run`, `final`, or `unknown` (a picture may have been charged)."""
    scope: str | None
    """At `failed`: what the error concerns, such as `prompt` or `account`; None for an exception of another library."""
    is_retryable: bool | None
    """At `failed`: whether the same request may be sent again, and may then succeed."""
    uncertain: int
    """At `failed`: how many requests may have been charged, those that were sent again included."""
    cost: str | None
    """What the picture costs if it is made; None where the price is unknown."""
    currency: str | None
    sandbox: bool
    tool_call_id: str | None


class RetryEvent(TypedDict):
    """Payload of `cogview.retry`: a request that did not run waits to be sent again. Plain JSON."""

    version: int
    """1."""
    request_id: str
    model: str
    attempt: int
    """How often it was sent so far."""
    wait: float
    """Seconds until it is sent again; the queue for a place in flight comes on top."""
    error: str
    """Name of the error's class."""
    outcome: str
    """`not_run`, or `unknown` (a picture may have been charged; only with `retry_unknown=True`)."""
    scope: str
    """What the error concerns, such as `service`."""
    is_retryable: bool
    code: str | None
    status: int | None
    sandbox: bool
    tool_call_id: str | None


def content_filter_event(
    entries: tuple[ContentFilter, ...],
    *,
    blocked: bool,
    model: str,
    request_id: str | None,
    prompt: str | None,
) -> Event:
    """Make the event `cogview.content_filter`. `prompt` is left out when None."""
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


@dataclass(frozen=True, slots=True)
class EventDispatcher:
    """Sends the events of one run.

    Attributes:
        config: The run's.
        tool_call_id: Of the tool call that the run belongs to.
        sandbox: Whether the service is a sandbox.
        has_handlers: Whether anybody hears them; else no event need be made.
        metadata: The run's, where traces hold what is put down there.
    """

    config: RunnableConfig
    tool_call_id: str | None
    sandbox: bool
    has_handlers: bool
    metadata: dict[str, Any] = field(default_factory=dict)

    def dispatch(self, *events: Event) -> None:
        """Send events to the handlers of the run; whatever goes wrong is logged."""
        for name, payload in events if self.has_handlers else ():
            _dispatch(name, self._whole(payload), self.config)

    async def adispatch(self, *events: Event) -> None:
        """Async version of `dispatch`."""
        for name, payload in events if self.has_handlers else ():
            await _adispatch(name, self._whole(payload), self.config)

    def _whole(self, payload: Any) -> dict[str, Any]:
        whole: dict[str, Any] = payload  # made for this event alone
        for name, value in (("version", EVENT_VERSION), ("tool_call_id", self.tool_call_id), ("sandbox", self.sandbox)):
            whole.setdefault(name, value)
        return whole


NO_DISPATCHER: Final = EventDispatcher(config={}, tool_call_id=None, sandbox=False, has_handlers=False)
"""For what is done outside a run."""


def _dispatch(name: str, payload: Any, config: RunnableConfig) -> None:
    """Send an event to the handlers of a run; whatever goes wrong is logged."""
    try:
        dispatch_custom_event(name, payload, config=config)
    except Exception as error:  # a handler's fault must not cost a picture that was paid for
        if raised_by_signal(error):
            raise
        logger.warning("A callback handler failed on the event %s", name, exc_info=True)


async def _adispatch(name: str, payload: Any, config: RunnableConfig) -> None:
    """Async version of `_dispatch`."""
    try:
        await adispatch_custom_event(name, payload, config=config)
    except Exception as error:  # a handler's fault must not cost a picture that was paid for
        if raised_by_signal(error):
            raise
        logger.warning("A callback handler failed on the event %s", name, exc_info=True)
