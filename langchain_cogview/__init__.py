"""Image generation with Zhipu's CogView endpoint for LangChain: a tool for agents and a Runnable, native sync and async."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_cogview.artifact import ImageArtifact
    from langchain_cogview.budget import Budget
    from langchain_cogview.callbacks import (
        AsyncContentFilterCallbackHandler,
        ContentFilterCallbackHandler,
        CostCallbackHandler,
        ImageCallbackHandler,
        ProgressCallbackHandler,
        collect_content_filter_events,
        collect_image_costs,
        collect_images,
    )
    from langchain_cogview.cost import ImageCosts
    from langchain_cogview.errors import (
        RETRYABLE_ERRORS,
        CogViewAuthenticationError,
        CogViewBalanceError,
        CogViewBatchError,
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
        CogViewStoppedError,
        CogViewStorageError,
        CogViewTaskFailedError,
        CogViewTaskUnfinishedError,
        CogViewTimeoutError,
        ContentFilter,
        Outcome,
        Scope,
        is_retryable,
    )
    from langchain_cogview.estimate import Estimate, spending_approval
    from langchain_cogview.events import ContentFilterEvent, GeneratedEvent, ProgressEvent, RetryEvent
    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.images.backend import BackendFolder
    from langchain_cogview.jobs import JobPlan, JobReport, arun_job, plan_job, run_job
    from langchain_cogview.messages import images_from_messages, to_message
    from langchain_cogview.middleware import CogViewMiddleware as CogViewMiddleware
    from langchain_cogview.notebook.display import status_line
    from langchain_cogview.notebook.gallery import Gallery, acompare, compare, gallery
    from langchain_cogview.request import ImageRequest
    from langchain_cogview.result import GeneratedImage, ImageFailure, ImageResult
    from langchain_cogview.sandbox import Sandbox
    from langchain_cogview.tasks import ImageTask
    from langchain_cogview.tool import CogViewImageTool
    from langchain_cogview.toolkit import CogViewToolkit

_NAMES = {
    "artifact": ("ImageArtifact",),
    "tasks": ("ImageTask",),
    "callbacks": (
        "AsyncContentFilterCallbackHandler",
        "ContentFilterCallbackHandler",
        "CostCallbackHandler",
        "ImageCallbackHandler",
        "ProgressCallbackHandler",
        "collect_content_filter_events",
        "collect_image_costs",
        "collect_images",
    ),
    "budget": ("Budget",),
    "cost": ("ImageCosts",),
    "estimate": ("Estimate", "spending_approval"),
    "errors": (
        "CogViewAuthenticationError",
        "CogViewBalanceError",
        "CogViewBatchError",
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
        "CogViewStoppedError",
        "CogViewStorageError",
        "CogViewTaskFailedError",
        "CogViewTaskUnfinishedError",
        "CogViewTimeoutError",
        "ContentFilter",
        "Outcome",
        "RETRYABLE_ERRORS",
        "Scope",
        "is_retryable",
    ),
    "events": ("ContentFilterEvent", "GeneratedEvent", "ProgressEvent", "RetryEvent"),
    "notebook.gallery": ("Gallery", "acompare", "compare", "gallery"),
    "generator": ("CogViewImageGenerator",),
    "images.backend": ("BackendFolder",),
    "jobs": ("JobPlan", "JobReport", "arun_job", "plan_job", "run_job"),
    "notebook.display": ("status_line",),
    "messages": ("images_from_messages", "to_message"),
    "middleware": ("CogViewMiddleware",),
    "request": ("ImageRequest",),
    "result": ("GeneratedImage", "ImageFailure", "ImageResult"),
    "sandbox": ("Sandbox",),
    "tool": ("CogViewImageTool",),
    "toolkit": ("CogViewToolkit",),
}
_NEEDING_EXTRAS = ("CogViewMiddleware",)
"""Public names that `import *` leaves out, because it would fail without the extra."""
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "RETRYABLE_ERRORS",
    "AsyncContentFilterCallbackHandler",
    "BackendFolder",
    "Budget",
    "CogViewAuthenticationError",
    "CogViewBalanceError",
    "CogViewBatchError",
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
    "CogViewStoppedError",
    "CogViewStorageError",
    "CogViewTaskFailedError",
    "CogViewTaskUnfinishedError",
    "CogViewTimeoutError",
    "CogViewToolkit",
    "ContentFilter",
    "ContentFilterCallbackHandler",
    "ContentFilterEvent",
    "CostCallbackHandler",
    "Estimate",
    "Gallery",
    "GeneratedEvent",
    "GeneratedImage",
    "ImageArtifact",
    "ImageCallbackHandler",
    "ImageCosts",
    "ImageFailure",
    "ImageRequest",
    "ImageResult",
    "ImageTask",
    "JobPlan",
    "JobReport",
    "Outcome",
    "ProgressCallbackHandler",
    "ProgressEvent",
    "RetryEvent",
    "Sandbox",
    "Scope",
    "acompare",
    "arun_job",
    "collect_content_filter_events",
    "collect_image_costs",
    "collect_images",
    "compare",
    "gallery",
    "images_from_messages",
    "is_retryable",
    "plan_job",
    "run_job",
    "spending_approval",
    "status_line",
    "to_message",
]


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, *_NEEDING_EXTRAS]
