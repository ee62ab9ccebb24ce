"""The errors of this package.

    CogViewError(ModelError)                     everything below; says what happened, then what to do
    ├── CogViewConfigurationError                key, base URL, proxy or certificate settings, before any request
    ├── CogViewInvalidRequestError               400: an argument is wrong            [the model can act on it]
    │   └── CogViewPromptTooLongError            1261: over the model's limit         [the model can act on it]
    ├── CogViewContentFilterError                1300, 1301: the filter blocked it    [the model can act on it]
    ├── CogViewBudgetError                       max_images or budget is used up      [the model can pass it on]
    ├── CogViewAuthenticationError               401, 1000-1005: the key was refused
    ├── CogViewPermissionError                   403, 111x, 112x: the account may not do this
    │   └── CogViewBalanceError                  1113 and kin: balance, plan or cap; answered 429 but never sent again
    ├── CogViewNotFoundError                     404, 1211, 1221, 1222: no such model or route
    ├── CogViewRateLimitError                    429, 1302, 1303: too many requests in flight; retryable
    │   └── CogViewBusyError                     1305, 1312: the model is overloaded; retryable
    ├── CogViewServerError                       503: the service says that it did not run; retryable
    ├── CogViewConnectionError                   the request was never sent; retryable
    ├── CogViewTimeoutError                      the deadline passed before the request was sent; retryable
    ├── CogViewStoppedError                      the caller stopped before the request was sent
    ├── CogViewOutcomeUnknownError               a picture may have been made and charged; never sent again
    │   ├── CogViewMalformedReplyError           the reply could not be understood
    │   └── CogViewTaskUnfinishedError           a task was accepted but has not ended; it can be resumed
    ├── CogViewTaskFailedError                   a task ended without a picture
    ├── CogViewDownloadError                     the image's bytes could not be fetched; its URL may still work
    │   └── CogViewExpiredURLError               the link has ended
    └── CogViewStorageError                      the bytes could not be written, or are no longer there

Each is also the LangChain class that says the same (`ModelRateLimitError`, ...), so that LangChain's retry middleware decides
right. Each that must not be retried is also a `RuntimeError` or a `ValueError`, which LangGraph's `RetryPolicy()` does not retry;
`RETRYABLE_ERRORS` and `is_retryable` are for other retry mechanisms. Those marked are also a `ToolException`: the tool gives the
model a text, and the agent goes on. `CogViewOutcomeUnknownError` is one so that the model is told not to call again by itself.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Self

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

if TYPE_CHECKING:
    from langchain_cogview.content_filter import ContentFilter

try:
    from langchain_core.exceptions import ModelRefusalError  # type: ignore[attr-defined,unused-ignore]
except ImportError:  # since langchain-core 1.8
    ModelRefusalError = ModelInvalidRequestError  # type: ignore[assignment,misc,unused-ignore]

MAX_MODEL_TEXT: Final = 500


class Outcome(StrEnum):
    """What became of a paid request that did not give a picture."""

    NOT_RUN = "not_run"
    """It provably did not run: it may be sent again."""
    UNKNOWN = "unknown"
    """A picture may have been made and charged: it must not be sent again."""
    FINAL = "final"
    """It was refused, and would be refused again."""


class Scope(StrEnum):
    """What an error concerns, and so what has to change before a request can succeed."""

    PROMPT = "prompt"
    """What the prompt says: the content filter blocks it, and another wording may pass."""
    REQUEST = "request"
    """This request alone, such as an argument of it."""
    MODEL = "model"
    """Every request for this model: the service does not know it."""
    ACCOUNT = "account"
    """Every request with this key: the key, its permissions or its balance."""
    SERVICE = "service"
    """The service or the network at the moment: a later request may succeed."""
    LOCAL = "local"
    """Every request from here: a setting, a limit that the application set, or the disk."""
    CANCELLED = "cancelled"
    """Nothing is wrong: the caller stopped the work."""


_FINAL_ADVICE: Final = "This is final: do not call this tool again. Tell the user."
_ADVICE: Final = {
    Scope.MODEL: _FINAL_ADVICE,
    Scope.ACCOUNT: _FINAL_ADVICE,
    Scope.LOCAL: _FINAL_ADVICE,
    Scope.SERVICE: "It was tried several times: do not call this tool again unless the user asks. Tell the user.",
}

_CLASSES: Final[dict[str, type[CogViewError]]] = {}


def error_class(name: object) -> type[CogViewError] | None:
    """The class that a record of an error names.

    Args:
        name: Name of a class, as in `ImageFailure.error` or a job's manifest.

    Returns:
        None where no class of this package has that name.
    """
    return _CLASSES.get(name) if isinstance(name, str) else None


class CogViewError(ModelError):
    """Base of all errors of this package.

    Args:
        message: What happened, in our words.
        hint: What to do.
        code: The service's business code, such as `"1113"`.
        status: The HTTP status.
        request_id: The id under which the request was sent; quote it to the provider.
        detail: What the service, or the network, said; cut to 200 printable characters.

    Attributes:
        outcome: What became of the request. A fact of the class.
        scope: What the error concerns. A fact of the class.
        is_retryable: Whether the same request may succeed later and may be sent again safely. A fact of the class.
        prompt: What was asked for, on errors of a call; in no text of the error.
        attempts: How often the request was sent.
        task_id: Of the task endpoint, where the request was taken as a task; None elsewhere.
        retry_after: Seconds that the service asked to wait; None where it said nothing.
        failures: Of a call with several pictures of which none was made: an `ImageFailure` for each, in order.
        batch_results: On an error raised by `batch` or `abatch`: one result or exception for each input, in order.
    """

    outcome: Outcome = Outcome.FINAL
    scope: Scope = Scope.REQUEST
    default_message = "The picture could not be made."
    default_hint = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the class under its name, by which records of errors name it."""
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
        self.hint = self.default_hint if hint is None else hint
        self.code = code
        self.status = status
        self.request_id = request_id
        self.detail = printable(detail) if detail else None
        self.prompt: str | None = None
        self.attempts = 0
        self.task_id: str | None = None
        self.retry_after: float | None = None
        self.failures: tuple[Any, ...] = ()
        self.batch_results: list[Any] | None = None
        super().__init__(self.message)

    @property
    def may_have_been_charged(self) -> bool:
        """Whether a picture may have been paid for."""
        return self.outcome is Outcome.UNKNOWN

    @property
    def text_for_model(self) -> str:
        """What an agent's model reads: our own words, at most 500 characters, never the service's.

        After an error that no other arguments can avoid, it says not to call the tool again.
        """
        advice = _ADVICE.get(self.scope, "") if self.is_retryable or self.scope is not Scope.SERVICE else ""
        text = printable(f"No image was made. {self.message} {self.hint}", MAX_MODEL_TEXT - len(advice) - 1)
        return f"{text} {advice}".strip()

    def __str__(self) -> str:
        facts = [
            f"code {self.code}" if self.code else "",
            f"HTTP {self.status}" if self.status else "",
            f"request id {self.request_id}" if self.request_id else "",
            f"task id {self.task_id}" if self.task_id else "",
            f"sent {self.attempts} times" if self.attempts > 1 else "",
            f"detail: {self.detail!r}" if self.detail else "",
        ]
        known = ", ".join(fact for fact in facts if fact)
        text = " ".join(part for part in (self.message, self.hint) if part)
        return f"{text} ({known})" if known else text

    def __reduce__(self) -> tuple[Any, ...]:
        # State goes apart from the constructor, so that `batch_results` may hold this very error.
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
    """When a setting is missing or wrong; nothing was sent."""

    scope = Scope.LOCAL
    outcome = Outcome.NOT_RUN


class CogViewInvalidRequestError(CogViewError, ModelInvalidRequestError, ToolException, ValueError):
    """When an argument is wrong, by our check before the request or by the service's."""

    default_message = "The request was refused as invalid."
    default_hint = "Check the prompt, size, quality and user_id."


class CogViewPromptTooLongError(CogViewInvalidRequestError):
    """When the prompt is over the model's limit."""

    default_message = "The prompt is longer than the model allows."
    default_hint = "Shorten the prompt."


class CogViewContentFilterError(CogViewError, ModelRefusalError, ToolException, RuntimeError):  # type: ignore[misc,unused-ignore]
    """When the content filter blocked the prompt or the picture. The same prompt is blocked again; nothing is charged.

    Attributes:
        content_filter: The entries that the service sent; may be empty.
    """

    scope = Scope.PROMPT
    default_message = "The content filter blocked this request."
    default_hint = "The same prompt will be blocked again: reword it. False positives are common."

    def __init__(
        self, message: str | None = None, *, content_filter: tuple[ContentFilter, ...] = (), **facts: Any
    ) -> None:
        from langchain_cogview.content_filter import most_severe  # noqa: PLC0415

        self.content_filter = tuple(content_filter)
        worst = most_severe(self.content_filter)
        if message is None and worst is not None:
            message = f"The content filter blocked the {worst.stage if worst.stage != 'other' else 'request'}"
            message += "." if worst.level is None else f" at level {worst.level} ({worst.severity})."
        super().__init__(message, **facts)


class CogViewBudgetError(CogViewError, ToolException, RuntimeError):
    """When a tool's `max_images` or `budget` does not cover the request; refused before it was sent."""

    scope = Scope.LOCAL
    outcome = Outcome.NOT_RUN
    default_message = "The limit of this tool is reached; nothing was sent."


class CogViewAuthenticationError(CogViewError, ModelAuthenticationError, RuntimeError):
    """When the key was refused."""

    scope = Scope.ACCOUNT
    default_message = "The API key was refused."
    default_hint = (
        "Keys are per platform: one from open.bigmodel.cn (ZHIPUAI_API_KEY, region='china') is not good on z.ai "
        "(ZAI_API_KEY, region='international'), nor the other way round. Check the key and the region."
    )


class CogViewPermissionError(CogViewError, ModelPermissionDeniedError, RuntimeError):
    """When the account may not do this."""

    scope = Scope.ACCOUNT
    default_message = "The account is not allowed to do this."
    default_hint = "Look at the account's state and its access to the model in the provider's console."


class CogViewBalanceError(CogViewPermissionError):
    """When balance, plan or a cap is used up."""

    default_message = "The account has no balance or no resource package for this model, or a cap is reached."
    default_hint = (
        "Recharge in the provider's console, or use a key that is not a coding-plan key: those do not cover images."
    )


class CogViewNotFoundError(CogViewError, ModelNotFoundError, RuntimeError):
    """When the model or the route does not exist there."""

    scope = Scope.MODEL
    default_message = "The service does not know this model or route."
    default_hint = "Check the model's name, the region and the base URL."


class CogViewRateLimitError(CogViewError, ModelRateLimitError):
    """When more requests are in flight than the account is allowed, after all attempts."""

    scope = Scope.SERVICE
    outcome = Outcome.NOT_RUN
    default_message = "More requests are in flight than the account is allowed for this model."
    default_hint = "Lower max_concurrency, raise max_retries, or try again later; the console shows the limit."


class CogViewBusyError(CogViewRateLimitError):
    """When the model is overloaded, after all attempts."""

    default_message = "The model is overloaded at the moment."
    default_hint = "Try again in a few minutes, or raise max_retries and timeout."


class CogViewServerError(CogViewError, ModelAPIError):
    """When the service says that it is unavailable and did not run the request, after all attempts."""

    scope = Scope.SERVICE
    outcome = Outcome.NOT_RUN
    default_message = "The service is unavailable; the request did not run."
    default_hint = "Try again later."


class CogViewConnectionError(CogViewError, ModelConnectionError):
    """When the service could not be reached; the request was never sent."""

    scope = Scope.SERVICE
    outcome = Outcome.NOT_RUN
    default_message = "The service could not be reached; nothing was sent."
    default_hint = "Check the network, the proxy settings and the base URL."


class CogViewTimeoutError(CogViewError, ModelTimeoutError):
    """When the deadline passed before the request was sent."""

    scope = Scope.SERVICE
    outcome = Outcome.NOT_RUN
    default_message = "The time limit passed before the request was sent; nothing was made or charged."
    default_hint = "Raise timeout (seconds), or try again later."


class CogViewStoppedError(CogViewError, RuntimeError):
    """When the caller stopped the work, by an interrupt or a job's `stop`, before the request was sent."""

    scope = Scope.CANCELLED
    outcome = Outcome.NOT_RUN
    default_message = "The work was stopped before the request was sent."
    default_hint = "Run it again to continue."


class CogViewOutcomeUnknownError(CogViewError, ToolException, RuntimeError):
    """When the request was sent but no answer tells what became of it. It is not sent again by itself."""

    outcome = Outcome.UNKNOWN
    default_message = "The request was sent, but no answer tells whether a picture was made; it may have been charged."
    default_hint = (
        "It is not sent again by itself, for that can pay twice: look in the provider's console first. "
        "retry_unknown=True sends it again all the same."
    )

    @property
    def text_for_model(self) -> str:
        """What an agent's model reads."""
        return printable(
            f"No image was received. {self.message} Do NOT call this tool again for this picture by yourself: "
            "it can be charged twice. Tell the user what happened and let them decide."
            + (f" Request id: {self.request_id}." if self.request_id else ""),
            MAX_MODEL_TEXT,
        )


class CogViewMalformedReplyError(CogViewOutcomeUnknownError):
    """When the reply could not be understood; a picture may have been made and charged."""

    default_message = "The service's reply could not be understood; a picture may have been made and charged."


class CogViewTaskUnfinishedError(CogViewOutcomeUnknownError):
    """When a task was accepted by the service, and its end was not seen. `task_id` holds its id."""

    default_message = (
        "The service took the request as a task, but its end was not seen in time; it may become a picture."
    )
    default_hint = "Polling again is free: ImageTask.resume(error.task_id).result()."


class CogViewTaskFailedError(CogViewError, ToolException, RuntimeError):
    """When a task ended without a picture. Billing is per picture, so nothing should be charged."""

    scope = Scope.SERVICE
    default_message = "The service took the request as a task, which failed without a picture."
    default_hint = "Try again later, or reword the prompt."


class CogViewDownloadError(CogViewError, RuntimeError):
    """When the bytes of an image that was made could not be fetched. Fetching is free and may be repeated.

    Attributes:
        transient: Whether a later try may do better.
    """

    transient = False

    default_message = "The picture was made, but its bytes could not be fetched."
    default_hint = "Its URL is on the result; fetching again costs nothing: image.read() tries again."


class CogViewExpiredURLError(CogViewDownloadError):
    """When the link has ended, or the host refuses it."""

    default_message = "The picture's link has expired or is refused."
    default_hint = (
        "Links live from a day to a week: set output_dir, or call save() in time. "
        "Where the link has ended, the picture has to be made again."
    )


class CogViewStorageError(CogViewError, RuntimeError):
    """When bytes could not be written, or a saved file is gone."""

    scope = Scope.LOCAL
    default_message = "The picture could not be written."
    default_hint = "Check that the folder exists, is writable and has space left; image.save(path) writes it elsewhere."


RETRYABLE_ERRORS: Final[tuple[type[CogViewError], ...]] = (
    CogViewRateLimitError,
    CogViewServerError,
    CogViewConnectionError,
    CogViewTimeoutError,
)
"""The errors after which the same request may be sent again: it did not run, and may succeed later. For options that take
exception types, such as `retry_if_exception_type` of `with_retry` and `exceptions_to_handle` of `with_fallbacks`."""


def is_retryable(error: BaseException) -> bool:
    """Whether the work that raised an error may be repeated as it is, without the risk of paying twice.

    A predicate for `RetryPolicy(retry_on=...)` of LangGraph, `retry_on` of LangChain's middleware and
    `tenacity.retry_if_exception`.

    Args:
        error: What was raised; of this package, or of another integration of LangChain.

    Returns:
        `error.is_retryable` of a LangChain `ModelError`; False for every other exception, of which nothing is known.
    """
    return isinstance(error, ModelError) and error.is_retryable
