"""Events as the generator sends them, and a Runnable that sends them: for listeners alone."""

import uuid

from langchain_core.callbacks import adispatch_custom_event, dispatch_custom_event
from langchain_core.runnables import RunnableLambda

from langchain_cogview.artifact import GENERATED_EVENT, PROGRESS_EVENT, RETRY_EVENT
from langchain_cogview.errors import error_class

MODEL = "cogview-4-250304"


def new_id():
    return str(uuid.uuid4())


def generated(request_id=None, **facts):
    request_id = request_id or new_id()
    return GENERATED_EVENT, {
        "version": 1, "id": request_id[:8], "request_id": request_id, "model": MODEL, "size": "1024x1024", "path": None,
        "uri": None, "cost": "0.06", "currency": "CNY", "cached": False, "sandbox": False, "seconds": 7.2,
        "tool_call_id": None, **facts,
    }  # fmt: skip


def progress(stage, request_id=None, **facts):
    return PROGRESS_EVENT, {
        "version": 1, "stage": stage, "request_id": request_id or new_id(), "model": MODEL, "elapsed": 0.1, "task_id": None,
        "error": None, "blocked": False, "outcome": None, "scope": None, "is_retryable": None, "cost": "0.06", "currency": "CNY", "sandbox": False,
        "tool_call_id": None, **facts,
    }  # fmt: skip


def facts_of(error):
    kind = error_class(error)
    return {
        "error": error,
        "outcome": str(kind.outcome) if kind else "final",
        "scope": str(kind.scope) if kind else None,
        "is_retryable": bool(kind and kind.is_retryable),
    }


def failed(request_id=None, *, error="CogViewError", **facts):
    return progress("failed", request_id, **{**facts_of(error), **facts})


def unknown(request_id=None, **facts):
    return failed(request_id, error="CogViewOutcomeUnknownError", **facts)


def blocked(request_id=None, **facts):
    return failed(request_id, blocked=True, error="CogViewContentFilterError", **facts)


def retry(request_id=None, *, error="CogViewRateLimitError", attempt=1, **facts):
    return RETRY_EVENT, {
        "version": 1, "request_id": request_id or new_id(), "model": MODEL, "attempt": attempt, "wait": 1.0, **facts_of(error),
        "code": "1302", "status": 429, "sandbox": False, "tool_call_id": None, **facts,
    }  # fmt: skip


def _send(events):
    for name, payload in events:
        dispatch_custom_event(name, payload)
    return len(events)


async def _asend(events):
    for name, payload in events:
        await adispatch_custom_event(name, payload)
    return len(events)


SENDER = RunnableLambda(_send, _asend)
"""Sends the events of its input, and gives how many they were."""
