"""Zhipu's CogView pictures for LangChain: a tool for agents, a Runnable for chains, native sync and async."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_cogview.artifact import ImageArtifact
    from langchain_cogview.callbacks import (
        AsyncContentFilterCallbackHandler,
        ContentFilterCallbackHandler,
        collect_content_filter_events,
    )
    from langchain_cogview.content_filter import ContentFilter
    from langchain_cogview.errors import (
        CogViewAuthenticationError,
        CogViewBalanceError,
        CogViewBudgetError,
        CogViewBusyError,
        CogViewConfigurationError,
        CogViewConnectionError,
        CogViewContentFilterError,
        CogViewDownloadError,
        CogViewError,
        CogViewExpiredURLError,
        CogViewInvalidRequestError,
        CogViewMalformedReplyError,
        CogViewNotFoundError,
        CogViewOutcomeUnknownError,
        CogViewPermissionError,
        CogViewPromptTooLongError,
        CogViewRateLimitError,
        CogViewServerError,
        CogViewStorageError,
        CogViewTimeoutError,
    )
    from langchain_cogview.events import ContentFilterEvent
    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.request import ImageRequest
    from langchain_cogview.result import GeneratedImage, ImageFailure, ImageResult, images_from_messages
    from langchain_cogview.sandbox import Sandbox
    from langchain_cogview.tool import CogViewImageTool

_ROOMS = {
    "artifact": ("ImageArtifact",),
    "callbacks": (
        "AsyncContentFilterCallbackHandler",
        "ContentFilterCallbackHandler",
        "collect_content_filter_events",
    ),
    "content_filter": ("ContentFilter",),
    "errors": (
        "CogViewAuthenticationError",
        "CogViewBalanceError",
        "CogViewBudgetError",
        "CogViewBusyError",
        "CogViewConfigurationError",
        "CogViewConnectionError",
        "CogViewContentFilterError",
        "CogViewDownloadError",
        "CogViewError",
        "CogViewExpiredURLError",
        "CogViewInvalidRequestError",
        "CogViewMalformedReplyError",
        "CogViewNotFoundError",
        "CogViewOutcomeUnknownError",
        "CogViewPermissionError",
        "CogViewPromptTooLongError",
        "CogViewRateLimitError",
        "CogViewServerError",
        "CogViewStorageError",
        "CogViewTimeoutError",
    ),
    "events": ("ContentFilterEvent",),
    "generator": ("CogViewImageGenerator",),
    "request": ("ImageRequest",),
    "result": ("GeneratedImage", "ImageFailure", "ImageResult", "images_from_messages"),
    "sandbox": ("Sandbox",),
    "tool": ("CogViewImageTool",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "AsyncContentFilterCallbackHandler",
    "CogViewAuthenticationError",
    "CogViewBalanceError",
    "CogViewBudgetError",
    "CogViewBusyError",
    "CogViewConfigurationError",
    "CogViewConnectionError",
    "CogViewContentFilterError",
    "CogViewDownloadError",
    "CogViewError",
    "CogViewExpiredURLError",
    "CogViewImageGenerator",
    "CogViewImageTool",
    "CogViewInvalidRequestError",
    "CogViewMalformedReplyError",
    "CogViewNotFoundError",
    "CogViewOutcomeUnknownError",
    "CogViewPermissionError",
    "CogViewPromptTooLongError",
    "CogViewRateLimitError",
    "CogViewServerError",
    "CogViewStorageError",
    "CogViewTimeoutError",
    "ContentFilter",
    "ContentFilterCallbackHandler",
    "ContentFilterEvent",
    "GeneratedImage",
    "ImageArtifact",
    "ImageFailure",
    "ImageRequest",
    "ImageResult",
    "Sandbox",
    "collect_content_filter_events",
    "images_from_messages",
]


def __getattr__(name: str) -> Any:
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{room}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
