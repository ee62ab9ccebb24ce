"""The custom events: names, payloads, best-effort dispatch.

LangChain hands them to every handler's `on_custom_event` and to `astream_events`. They are sent after the result is safe; a
handler that raises is logged and never costs a picture.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, NotRequired, TypedDict

from langchain_core.callbacks import adispatch_custom_event, dispatch_custom_event

from langchain_cogview.content_filter import ContentFilter, Stage, most_severe

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig

CONTENT_FILTER_EVENT: Final = "cogview.content_filter"
EVENT_VERSION: Final = 1

logger = logging.getLogger(__name__)


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


def content_filter_event(
    entries: tuple[ContentFilter, ...],
    *,
    blocked: bool,
    model: str,
    request_id: str | None,
    tool_call_id: str | None,
    sandbox: bool,
    prompt: str | None,
) -> ContentFilterEvent:
    """Make the payload. `prompt` is left out when None."""
    worst = most_severe(entries)
    event: ContentFilterEvent = {
        "version": EVENT_VERSION,
        "role": worst.role if worst else None,
        "level": worst.level if worst else None,
        "stage": worst.stage if worst else None,
        "severity": worst.severity if worst else "unknown",
        "blocked": blocked,
        "entries": [{"role": entry.role, "level": entry.level} for entry in entries],
        "model": model,
        "request_id": request_id,
        "tool_call_id": tool_call_id,
        "sandbox": sandbox,
    }
    if prompt is not None:
        event["prompt"] = prompt
    return event


def dispatch(name: str, payload: Any, config: RunnableConfig) -> None:
    """Send an event to the handlers of a run; whatever goes wrong is logged."""
    try:
        dispatch_custom_event(name, payload, config=config)
    except Exception:  # a handler's fault must not cost a picture that was paid for
        logger.warning("A callback handler failed on the event %s", name, exc_info=True)


async def adispatch(name: str, payload: Any, config: RunnableConfig) -> None:
    """The twin of `dispatch`."""
    try:
        await adispatch_custom_event(name, payload, config=config)
    except Exception:  # a handler's fault must not cost a picture that was paid for
        logger.warning("A callback handler failed on the event %s", name, exc_info=True)
