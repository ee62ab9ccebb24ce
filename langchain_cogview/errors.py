"""The errors of this package.

    CogViewError(ModelError)                     base of all below; says what happened, then what to do
    ├── CogViewConfigurationError                key, base URL, proxy or certificate settings, before any request
    ├── CogViewInvalidRequestError               400: an argument is wrong            [the model can act on it]
    │   └── CogViewPromptTooLongError            1261: over the model's limit         [the model can act on it]
    ├── CogViewContentFilterError                1300, 1301: the filter blocked it    [the model can act on it]
    ├── CogViewBudgetError                       max_images or budget is used up      [the model can pass it on]
    ├── CogViewAuthenticationError               401, 1000-1005: the key was refused
    ├── CogViewPermissionError                   403, 111x, 112x: the account may not do this
    │   └── CogViewBalanceError                  1113 and similar: balance, plan or cap; HTTP 429, but never sent again
    ├── CogViewNotFoundError                     404, 1211, 1221, 1222: no such model or route
    ├── CogViewRateLimitError                    429, 1302, 1303: too many requests in flight; retryable
    │   └── CogViewBusyError                     1305, 1312: the model is overloaded; retryable
    ├── CogViewServerError                       503: the service says that it did not run; retryable
    ├── CogViewConnectionError                   the request was never sent; retryable
    ├── CogViewTimeoutError                      the deadline passed before the request was sent; retryable
    ├── CogViewStoppedError                      the caller cancelled the work before the request was sent
    ├── CogViewOutcomeUnknownError               an image may have been made and charged; never sent again
    │   ├── CogViewMalformedReplyError           the reply could not be understood
    │   └── CogViewTaskUnfinishedError           a task was accepted but has not ended; it can be resumed
    ├── CogViewBatchError                        some inputs of a batch were made, and others failed
    ├── CogViewTaskFailedError                   a task ended without an image
    ├── CogViewDownloadError                     the image's bytes could not be fetched; its URL may still work
    │   └── CogViewExpiredURLError               the link has expired
    └── CogViewStorageError                      the bytes could not be written, or are no longer there

Each class is also the LangChain class with the same meaning (`ModelRateLimitError`, ...), so that LangChain's retry middleware
decides correctly. Each class that must not be retried is also a `RuntimeError` or a `ValueError`, which LangGraph's
`RetryPolicy()` does not retry; `RETRYABLE_ERRORS` and `is_retryable` serve other retry mechanisms. The marked classes are also a
`ToolException`: the tool gives the model a text, and the agent continues. `CogViewOutcomeUnknownError` is one as well, so that
the model is told not to call the tool again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal, Self

from langchain_core.exceptions import (
    ModelAPIError,
    ModelAuthenticationError,
    ModelConnectionError,
    ModelError,
    ModelInvalidRequestError,
    ModelNotFoundError,
    ModelPermissionDeniedError,
    ModelRateLimitError,
    ModelTimeoutError,
)
from langchain_core.tools import ToolException

from langchain_cogview.text import printable as printable  # noqa: PLC0414  it is imported from here

try:
    from langchain_core.exceptions import ModelRefusalError  # type: ignore[attr-defined,unused-ignore]
except ImportError:  # since langchain-core 1.8
    ModelRefusalError = ModelInvalidRequestError  # type: ignore[assignment,misc,unused-ignore]

MAX_MODEL_TEXT: Final = 500
"""The largest number of characters of a text for an agent's model."""


class Outcome(StrEnum):
    """What happened to a paid request that returned no image."""

    NOT_RUN = "not_run"
    """It certainly did not run, and may be sent again."""
    UNKNOWN = "unknown"
    """An image may have been made and charged, so the request must not be sent again."""
    FINAL = "final"
    """It was refused, and would be refused again."""


class Scope(StrEnum):
    """What an error is about, and therefore what has to change before a request can succeed."""

    PROMPT = "prompt"
    """The prompt: the content filter blocked it, and another wording may pass."""
    REQUEST = "request"
    """This request alone, such as an argument of it."""
    MODEL = "model"
    """Every request for this model: the service does not know it."""
    ACCOUNT = "account"
    """Every request with this key: the key, its permissions or its balance."""
    SERVICE = "service"
    """The service or the network, at the moment: a later request may succeed."""
    LOCAL = "local"
    """Every request from this process: a setting, a limit of the application, or the disk."""
    CANCELLED = "cancelled"
    """Nothing is wrong: the caller cancelled the work."""


Stage = Literal["prompt", "image", "history", "other"]
"""What an entry of the content filter is about."""

_STAGES: Final[dict[str, Stage]] = {"user": "prompt", "assistant": "image", "history": "history"}
_SEVERITIES: Final = {0: "most severe", 1: "severe", 2: "moderate", 3: "mildest"}
_MAX_LEVEL: Final = 99
_MAX_ROLE: Final = 32
_MAX_ENTRIES: Final = 32


@dataclass(frozen=True, slots=True)
class ContentFilter:
    """One entry of the service's content filter."""

    role: str | None = None
    """`user` for the prompt, `assistant` for the image, `history` for earlier messages; other values are possible. None if the
    service sent none."""
    level: int | None = None
    """From 0 (most severe) to 3 (mildest). None if the service sent none."""

    @property
    def stage(self) -> Stage:
        """What the entry is about: the prompt, the image, earlier messages, or something else."""
        return _STAGES.get(self.role or "", "other")

    @property
    def severity(self) -> str:
        """The level in words."""
        return _SEVERITIES.get(-1 if self.level is None else self.level, "unknown")

    def __str__(self) -> str:
        level = "level unknown" if self.level is None else f"level {self.level}, {self.severity}"
        return f"{self.stage} ({level})"


def most_severe(entries: tuple[ContentFilter, ...]) -> ContentFilter | None:
    """Find the most severe entry.

    Args:
        entries: Entries of one reply.

    Returns:
        The entry with the lowest level, where an entry without a level counts as the mildest; None if there are no entries.
    """
    return min(entries, key=lambda entry: _MAX_LEVEL if entry.level is None else entry.level, default=None)


def read_entries(value: Any) -> tuple[ContentFilter, ...]:
    """Read the `content_filter` of a reply.

    Args:
        value: Any JSON.

    Returns:
        At most 32 entries, without those that have neither a role nor a level.
    """
    found = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict):
            continue
        role, level = item.get("role"), item.get("level")
        if isinstance(level, str) and level.strip().isdecimal() and len(level) <= len(str(_MAX_LEVEL)) + 1:
            level = int(level)
        if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= _MAX_LEVEL:
            level = None
        role = "".join(c for c in role if c.isprintable())[:_MAX_ROLE] if isinstance(role, str) else None
        if role or level is not None:
            found.append(ContentFilter(role=role or None, level=level))
    return tuple(found[:_MAX_ENTRIES])


ACCOUNT_LIMIT: Final = "1302"
"""The code of a request that was refused because the account has too many in flight."""
_MAX_MODEL_HINT: Final = 300
_FINAL_ADVICE: Final = "This is final: do not call this tool again."
_ADVICE: Final = {
    Scope.MODEL: _FINAL_ADVICE,
    Scope.ACCOUNT: _FINAL_ADVICE,
    Scope.LOCAL: _FINAL_ADVICE,
    Scope.SERVICE: "It was tried several times: do not call this tool again unless the user asks.",
}

_CLASSES: Final[dict[str, type[CogViewError]]] = {}


def error_class(name: object) -> type[CogViewError] | None:
    """Find an error class by its name.

    Args:
        name: The class name, as in `ImageFailure.error` or a job's manifest.

    Returns:
        The class, or None if this package has no class of that name.
    """
    return _CLASSES.get(name) if isinstance(name, str) else None


class CogViewError(ModelError):
    """Base class of all errors of this package.

    Args:
        message: What happened, in one sentence. None: the `default_message` of the class.
        hint: What to do, in one sentence. None: the `default_hint` of the class.
        code: Business code of the service, such as `"1113"`.
        status: HTTP status of the reply.
        request_id: Request id that this client generated and sent.
        detail: Text of the service or the network, which is cut to 200 printable characters.

    Attributes:
        is_retryable: Whether the same request may succeed later and is safe to send again. It is the same for all errors of a
            class.
    """

    outcome: Outcome = Outcome.FINAL
    """What happened to the request. It is the same for all errors of a class."""
    scope: Scope = Scope.REQUEST
    """What the error is about. It is the same for all errors of a class."""
    default_message = "The image could not be made."
    """The message of an error that is created without one."""
    default_hint = ""
    """The hint of an error that is created without one."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the class, so that `error_class` finds it by its name."""
        super().__init_subclass__(**kwargs)
        _CLASSES.setdefault(cls.__name__, cls)

    def __init__(
        self,
        message: str | None = None,
        *,
        hint: str | None = None,
        code: str | None = None,
        status: int | None = None,
        request_id: str | None = None,
        detail: str | None = None,
    ) -> None:
        self.message = message or self.default_message
        """What happened, in one sentence."""
        self.hint = self.default_hint if hint is None else hint
        """What to do, in one sentence; empty where nothing can be done."""
        self.code = code
        """Business code of the service, such as `"1113"`; None if it sent none."""
        self.status = status
        """HTTP status of the reply; None if there was no reply."""
        self.request_id = request_id
        """Request id that this client generated; quote it to the provider."""
        self.detail = printable(detail) if detail else None
        """Text of the service or the network, at most 200 printable characters; None if there was none."""
        self.prompt: str | None = None
        """Prompt of the request, on errors of a call. It is in no text of the error."""
        self.attempts = 0
        """How many times the request was sent."""
        self.task_id: str | None = None
        """Id of the task, if the task endpoint accepted the request; else None."""
        self.retry_after: float | None = None
        """Seconds that the service asked to wait; None if it did not say."""
        self.failures: tuple[Any, ...] = ()
        """An `ImageFailure` for each image, in order, if the call asked for several images and none was made."""
        self.batch_results: list[Any] | None = None
        """One result or exception for each input, in order, if `batch` or `abatch` raised the error; else None."""
        super().__init__(self.message)

    @property
    def may_have_been_charged(self) -> bool:
        """Whether an image may have been charged."""
        return self.outcome is Outcome.UNKNOWN

    @property
    def text_for_model(self) -> str:
        """The text that an agent's model reads: at most 500 characters, none of them written by the service.

        If no other arguments can avoid the error, the text says not to call the tool again.
        """
        advice = _ADVICE.get(self.scope, "") if self.is_retryable or self.scope is not Scope.SERVICE else ""
        # A hint beside such advice is for people: a model can neither recharge an account nor change a setting.
        hint = f"Tell the user: {self.hint}" if advice and self.hint else "Tell the user." if advice else self.hint
        end = f"{printable(hint, _MAX_MODEL_HINT)} {advice}".strip()
        return f"{printable(f'No image was made. {self.message}', MAX_MODEL_TEXT - len(end) - 1)} {end}".strip()

    def __str__(self) -> str:
        facts = [
            f"code {self.code}" if self.code else "",
            f"HTTP {self.status}" if self.status else "",
            f"request id {self.request_id}" if self.request_id else "",
            f"task id {self.task_id}" if self.task_id else "",
            f"tried {self.attempts} times" if self.attempts > 1 else "",
            f"detail: {self.detail!r}" if self.detail else "",
        ]
        known = ", ".join(fact for fact in facts if fact)
        text = " ".join(part for part in (self.message, self.hint) if part)
        return f"{text} ({known})" if known else text

    def _render_traceback_(self) -> list[str]:
        # IPython and Jupyter call this in place of their own rendering.
        from langchain_cogview.tracebacks import short_traceback  # noqa: PLC0415

        return short_traceback(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # The state is passed separately from the constructor's arguments, because `batch_results` may hold this same error.
        return _rebuild, (type(self), self.message), self.__dict__

    @classmethod
    def _blank(cls, message: str) -> Self:
        error = cls.__new__(cls, message)
        error.args = (message,)
        return error


_CLASSES[CogViewError.__name__] = CogViewError


def _rebuild(cls: type[CogViewError], message: str) -> CogViewError:
    return cls._blank(message)


class CogViewConfigurationError(CogViewError, RuntimeError):
    """A setting is missing or wrong. Nothing was sent."""

    scope = Scope.LOCAL
    outcome = Outcome.NOT_RUN


class CogViewInvalidRequestError(CogViewError, ModelInvalidRequestError, ToolException, ValueError):
    """An argument is wrong, according to the check before the request or to the service."""

    default_message = "The request was refused as invalid."
    default_hint = "Check the prompt, size, quality and user_id."


class CogViewPromptTooLongError(CogViewInvalidRequestError):
    """The prompt is longer than the model allows."""

    default_message = "The prompt is longer than the model allows."
    default_hint = "Shorten the prompt."


class CogViewContentFilterError(CogViewError, ModelRefusalError, ToolException, RuntimeError):  # type: ignore[misc,unused-ignore]
    """The content filter blocked the prompt or the image. The same prompt is blocked again, and nothing is charged.

    Args:
        message: What happened. None: it is made of the most severe entry.
        content_filter: Entries of the content filter that the service sent; may be empty.
        **facts: Further arguments of `CogViewError`.
    """

    scope = Scope.PROMPT
    default_message = "The content filter blocked this request."
    default_hint = "The same prompt will be blocked again: reword it. False positives are common."

    def __init__(
        self, message: str | None = None, *, content_filter: tuple[ContentFilter, ...] = (), **facts: Any
    ) -> None:
        self.content_filter = tuple(content_filter)
        """Entries of the content filter that the service sent; may be empty."""
        worst = most_severe(self.content_filter)
        if message is None and worst is not None:
            message = f"The content filter blocked the {worst.stage if worst.stage != 'other' else 'request'}"
            message += "." if worst.level is None else f" at level {worst.level} ({worst.severity})."
        super().__init__(message, **facts)


class CogViewBudgetError(CogViewError, ToolException, RuntimeError):
    """The budget, or the `max_images` of a tool, does not cover the request. Nothing was sent."""

    scope = Scope.LOCAL
    outcome = Outcome.NOT_RUN
    default_message = "The limit of this tool is reached; nothing was sent."


class CogViewAuthenticationError(CogViewError, ModelAuthenticationError, RuntimeError):
    """The service refused the API key."""

    scope = Scope.ACCOUNT
    default_message = "The API key was refused."
    default_hint = (
        "Check the key and the region: a key of open.bigmodel.cn (ZHIPUAI_API_KEY, region='china') is not valid on z.ai "
        "(ZAI_API_KEY, region='international'), nor the other way round."
    )


class CogViewPermissionError(CogViewError, ModelPermissionDeniedError, RuntimeError):
    """The account does not have the permission."""

    scope = Scope.ACCOUNT
    default_message = "The account is not allowed to do this."
    default_hint = "Check the account's state and its access to the model in the provider's console."


class CogViewBalanceError(CogViewPermissionError):
    """The balance or the plan is used up, or a spending cap is reached."""

    default_message = "The account has no balance or no resource package for this model, or a cap is reached."
    default_hint = (
        "Recharge in the provider's console, or use a key that is not a coding-plan key: those do not cover images."
    )


class CogViewNotFoundError(CogViewError, ModelNotFoundError, RuntimeError):
    """The model or the URL path does not exist at the service."""

    scope = Scope.MODEL
    default_message = "The service does not know this model or URL path."
    default_hint = "Check the model's name, the region and the base URL."


class CogViewRateLimitError(CogViewError, ModelRateLimitError):
    """More requests are in flight than the account is allowed, after all attempts."""

    scope = Scope.SERVICE
    outcome = Outcome.NOT_RUN
    default_message = "More requests are in flight than the account is allowed for this model."
    default_hint = (
        "Other processes may use the same key: set shared_limit='machine' in each (on several machines: a Redis URL), raise "
        "timeout, or try again later; the console shows the limit."
    )


class CogViewBusyError(CogViewRateLimitError):
    """The model is overloaded, after all attempts."""

    default_message = "The model is overloaded at the moment."
    default_hint = "Try again in a few minutes, or raise max_retries and timeout."


class CogViewServerError(CogViewError, ModelAPIError):
    """The service says that it is unavailable and did not run the request, after all attempts."""

    scope = Scope.SERVICE
    outcome = Outcome.NOT_RUN
    default_message = "The service is unavailable; the request did not run."
    default_hint = "Try again later."


class CogViewConnectionError(CogViewError, ModelConnectionError):
    """The service could not be reached. The request was never sent."""

    scope = Scope.SERVICE
    outcome = Outcome.NOT_RUN
    default_message = "The service could not be reached; nothing was sent."
    default_hint = "Check the network, the proxy settings and the base URL."


class CogViewTimeoutError(CogViewError, ModelTimeoutError):
    """The deadline passed before the request was sent."""

    scope = Scope.SERVICE
    outcome = Outcome.NOT_RUN
    default_message = "The time limit passed before the request was sent; nothing was made or charged."
    default_hint = "Raise timeout (seconds), or try again later."


class CogViewStoppedError(CogViewError, RuntimeError):
    """The caller cancelled the work, by an interrupt or a job's `stop`, before the request was sent."""

    scope = Scope.CANCELLED
    outcome = Outcome.NOT_RUN
    default_message = "The work was cancelled before the request was sent."
    default_hint = "Run it again to continue."


class CogViewOutcomeUnknownError(CogViewError, ToolException, RuntimeError):
    """The request was sent, but no answer says what happened to it. It is not sent again automatically."""

    outcome = Outcome.UNKNOWN
    default_message = "The request was sent, but no answer says whether an image was made; it may have been charged."
    default_hint = (
        "Check the provider's console: sending the request again can be charged twice, so it is not done automatically "
        "(unless retry_unknown=True)."
    )

    @property
    def text_for_model(self) -> str:
        """The text that an agent's model reads, at most 500 characters."""
        return printable(
            f"No image was received. {self.message} Do NOT call this tool again for this image on your own: "
            "it can be charged twice. Tell the user what happened and let them decide."
            + (f" Request id: {self.request_id}." if self.request_id else ""),
            MAX_MODEL_TEXT,
        )


class CogViewMalformedReplyError(CogViewOutcomeUnknownError):
    """The reply could not be understood. An image may have been made and charged."""

    default_message = "The service's reply could not be understood; an image may have been made and charged."


class CogViewTaskUnfinishedError(CogViewOutcomeUnknownError):
    """The service accepted a task, which did not end in time. `task_id` holds its id."""

    default_message = (
        "The service accepted the request as a task, which did not end in time; it may still make an image."
    )
    default_hint = "Polling again is free: ImageTask.resume(error.task_id).result()."


class CogViewTaskFailedError(CogViewError, ToolException, RuntimeError):
    """A task ended without an image. The service bills images, so nothing should be charged."""

    scope = Scope.SERVICE
    default_message = "The service accepted the request as a task, which failed without an image."
    default_hint = "Try again later, or reword the prompt."


class CogViewBatchError(CogViewError, RuntimeError):
    """Some inputs of a batch were made, and others failed with retryable errors or with exceptions of other libraries.

    The batch must not be repeated as a whole, because that pays again for the inputs that were made. `batch_results` holds one
    result or exception for each input; the first exception is the cause of this error.
    """

    outcome = Outcome.UNKNOWN
    default_message = "Some inputs of the batch failed."
    default_hint = "Repeat only the inputs whose entry in batch_results is an exception."


class CogViewDownloadError(CogViewError, RuntimeError):
    """The image was made, but its bytes could not be fetched. Fetching is free and may be repeated."""

    transient = False
    """Whether a later attempt may succeed."""
    default_message = "The image was made, but its bytes could not be fetched."
    default_hint = "Call image.read() to fetch it again, which is free; its URL is on the result."


class CogViewExpiredURLError(CogViewDownloadError):
    """The link has expired, or the host refuses it."""

    default_message = "The image's link has expired or is refused."
    default_hint = (
        "Set output_dir, or call save() in time: links expire after a day to a week. "
        "An image whose link has expired has to be made again."
    )


class CogViewStorageError(CogViewError, RuntimeError):
    """The bytes could not be written, or a saved file no longer exists."""

    scope = Scope.LOCAL
    default_message = "The image could not be written."
    default_hint = "Check that the folder exists, is writable and has space left."


RETRYABLE_ERRORS: Final[tuple[type[CogViewError], ...]] = (
    CogViewRateLimitError,
    CogViewServerError,
    CogViewConnectionError,
    CogViewTimeoutError,
)
"""The errors after which the same request may be sent again: it did not run, and may succeed later. They are for options that
take exception types, such as `retry_if_exception_type` of `with_retry` and `exceptions_to_handle` of `with_fallbacks`."""


def is_retryable(error: BaseException) -> bool:
    """Whether the work that raised an error may be repeated unchanged, without the risk of paying twice.

    It is a predicate for `RetryPolicy(retry_on=...)` of LangGraph, `retry_on` of LangChain's middleware and
    `tenacity.retry_if_exception`.

    Args:
        error: An exception of this package, or of another LangChain integration.

    Returns:
        `error.is_retryable` of a LangChain `ModelError`, and False for every other exception.
    """
    return isinstance(error, ModelError) and error.is_retryable
