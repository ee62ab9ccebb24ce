"""What is sent to the endpoint, what its replies mean, and what may be sent again: pure functions, no I/O.

The codes are those of the provider's error table (docs.bigmodel.cn, "Error codes"); decisions are taken on the code, never on
the text, which is Chinese in one region and English in the other, and changes.
"""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urljoin, urlsplit

from langchain_cogview.api.body import DATA_FIELDS, image_data
from langchain_cogview.errors import (
    CogViewAuthenticationError,
    CogViewBalanceError,
    CogViewBudgetError,
    CogViewBusyError,
    CogViewConfigurationError,
    CogViewConnectionError,
    CogViewContentFilterError,
    CogViewError,
    CogViewInvalidRequestError,
    CogViewMalformedReplyError,
    CogViewNotFoundError,
    CogViewOutcomeUnknownError,
    CogViewPermissionError,
    CogViewPromptTooLongError,
    CogViewRateLimitError,
    CogViewServerError,
    CogViewStoppedError,
    CogViewTaskFailedError,
    CogViewTimeoutError,
    ContentFilter,
    Outcome,
    read_entries,
)

if TYPE_CHECKING:
    from langchain_cogview.request import ImageRequest

MAX_URL_CHARACTERS: Final = 8192
MAX_ID_CHARACTERS: Final = 512
_TASK_ID: Final = re.compile(r"(?!\.+$)[0-9A-Za-z._~:=+@|-]+")
_CODE = re.compile(r"[0-9]{1,6}|[a-z]+(?:_[a-z]+)*")
_MAX_NAMED_CHARACTERS: Final = 600
_RELATIVE: Final = re.compile(r"\.{0,2}/|[\w.~%-]+(/[\w.~%-]+)*\.(png|jpe?g|webp)(\?.*)?\Z", re.IGNORECASE | re.ASCII)
"""An address without scheme and host, and no sentence."""
_MESSAGES: Final = ("message", "msg", "detail", "error_msg", "error_message")
"""Where services and gateways put the text of an error."""

MAX_RETRY_AFTER: Final = 3600.0
"""Seconds; a service that asks for a longer wait is not waited for."""
_NEVER_AGAIN: Final = (CogViewBudgetError, CogViewConfigurationError, CogViewStoppedError, CogViewTimeoutError)

CODES: Final[dict[str, type[CogViewError]]] = {
    **dict.fromkeys(("401", "1000", "1001", "1002", "1003", "1004", "1005"), CogViewAuthenticationError),
    **dict.fromkeys(("1110", "1111", "1112", "1120", "1121", "1220"), CogViewPermissionError),
    **dict.fromkeys(("1113", "1304", *map(str, range(1308, 1312)), *map(str, range(1313, 1322))), CogViewBalanceError),
    **dict.fromkeys(("1210", "1212", "1213", "1214", "1215", "1231"), CogViewInvalidRequestError),
    **dict.fromkeys(("1211", "1221", "1222"), CogViewNotFoundError),
    **dict.fromkeys(("1200", "1230", "1234"), CogViewOutcomeUnknownError),
    **dict.fromkeys(("1300", "1301"), CogViewContentFilterError),
    **dict.fromkeys(("1302", "1303"), CogViewRateLimitError),
    **dict.fromkeys(("1305", "1312"), CogViewBusyError),
    "1261": CogViewPromptTooLongError,
}

_STATUSES: Final[dict[int, type[CogViewError]]] = {
    401: CogViewAuthenticationError,
    402: CogViewBalanceError,
    403: CogViewPermissionError,
    404: CogViewNotFoundError,
    405: CogViewNotFoundError,
    408: CogViewOutcomeUnknownError,
    410: CogViewNotFoundError,
    429: CogViewRateLimitError,
    503: CogViewServerError,
}


@dataclass(frozen=True, slots=True)
class ImagesReply:
    """A success.

    Attributes:
        urls: Where the image is; empty where the reply held only its bytes. The addresses of images that were not asked for are
            in `unasked_urls`.
        content_filter: The content filter's entries about an image that was made.
        created: Unix seconds of the request.
        response_id: The service's own id of the reply.
        task_id: Of the task endpoint, where that was used.
        sandbox: Whether the sandbox made it.
        warnings: What was odd in the reply.
        unasked_urls: Addresses of further images, at most 63: a request asks for one image.
        content: The image's bytes, where a gateway put them into the reply.
    """

    urls: tuple[str, ...]
    content_filter: tuple[ContentFilter, ...] = ()
    created: int | None = None
    response_id: str | None = None
    task_id: str | None = None
    sandbox: bool = False
    warnings: tuple[str, ...] = ()
    unasked_urls: tuple[str, ...] = ()
    content: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ReplyContext:
    """What came with the JSON of a reply.

    Attributes:
        base_url: What was asked; relative addresses are under it.
        images: The image data that `ReplyBody` took out of the JSON.
        sandbox: Whether the sandbox answered.
    """

    base_url: str = ""
    images: tuple[bytes | None, ...] = field(default=(), repr=False)
    sandbox: bool = False


_NO_CONTEXT: Final = ReplyContext()


@dataclass(frozen=True, slots=True)
class TaskReply:
    """What the task endpoint says of a task that has not failed.

    Attributes:
        task_id: The service's id; None where a poll's reply leaves it out.
        reply: The images; None while it is processing.
        warnings: What was odd on the way.
    """

    task_id: str | None
    reply: ImagesReply | None = None
    warnings: tuple[str, ...] = ()


def images_body(request: ImageRequest, request_id: str) -> dict[str, Any]:
    """Return the body of a request for one image, without unset fields."""
    fields = {
        "model": request.model,
        "prompt": request.prompt,
        "quality": request.quality,
        "size": request.size,
        "user_id": request.user_id,
        "watermark_enabled": request.watermark_enabled,
        "request_id": request_id,
    }
    return {name: value for name, value in fields.items() if value is not None}


def read_reply(status: int, body: bytes, context: ReplyContext = _NO_CONTEXT) -> ImagesReply:
    """Read one reply, whatever it is.

    Returns:
        The reply with its images.

    Raises:
        CogViewError: The class says what became of the request.
    """
    fields, entries, failure = _fields(status, body)
    if 200 <= status < 300:  # noqa: PLR2004
        images = _images_reply(fields, "data", entries, failure, context)
        if images:
            return images
    raise _error(status, failure, entries, body)


def read_task(status: int, body: bytes, context: ReplyContext = _NO_CONTEXT) -> TaskReply:
    """Read one reply of the task endpoint, to the POST or to a poll.

    Returns:
        The state of the task.

    Raises:
        CogViewError: The class says what became of the request; `CogViewTaskFailedError` where the task itself failed.
    """
    fields, entries, failure = _fields(status, body)
    if 200 <= status < 300:  # noqa: PLR2004
        task_id = _task_id(fields.get("id"))
        images = _images_reply(fields, "image_result", entries, failure, context)
        if images:
            return TaskReply(task_id, images)
        status_text = fields.get("task_status")
        state = status_text.strip().upper() if isinstance(status_text, str) else ""
        if state == "FAIL" and failure is None:
            if entries:
                raise CogViewContentFilterError(content_filter=entries, status=status)
            raise CogViewTaskFailedError(status=status)
        if failure is None and state not in {"", "SUCCESS", "FAIL"}:
            return TaskReply(task_id)
        if state == "FAIL" and failure is not None and failure.code not in CODES:
            raise CogViewTaskFailedError(code=failure.code, status=status, detail=failure.message)
    raise _error(status, failure, entries, body)


def read_submitted(status: int, body: bytes, context: ReplyContext = _NO_CONTEXT) -> TaskReply:
    """Read the reply to the POST of a task. With an id and no error, the task is accepted, whatever else is missing.

    Returns:
        The state of the task.

    Raises:
        CogViewError: As `read_task`; with the task's id where the reply has one, for it may be running.
    """
    fields, _, failure = _fields(status, body)
    task_id = _task_id(fields.get("id"))
    try:
        return read_task(status, body, context)
    except CogViewError as error:
        error.task_id = task_id
        unsure = type(error) in {CogViewMalformedReplyError, CogViewOutcomeUnknownError}
        if task_id and unsure and 200 <= status < 300 and (failure is None or failure.is_text_alone):  # noqa: PLR2004
            return TaskReply(task_id)
        raise


def _fields(status: int, body: bytes) -> tuple[dict[str, Any], tuple[ContentFilter, ...], _Failure | None]:
    reply = _parsed(body)
    fields = reply if isinstance(reply, dict) else {}
    entries = read_entries(fields.get("content_filter")) + read_entries(fields.get("contentFilter"))
    return fields, entries, _failure(fields, enveloped=status < 300)  # noqa: PLR2004


def _images_reply(
    fields: dict[str, Any],
    name: str,
    entries: tuple[ContentFilter, ...],
    failure: _Failure | None,
    context: ReplyContext,
) -> ImagesReply | None:
    images, unusable = _images(fields.get(name), context)
    if not images:
        return None
    warnings = ["The reply held an unusable entry beside the image."] if unusable else []
    if failure and not failure.is_text_alone:
        warnings.append(f"The reply held an error beside the image (code {failure.code or 'none'}).")
    asked, *others = images
    unasked = tuple(image.url for image in others if image.url)
    if others:
        warnings.append(_about_unasked(len(others), unasked))
    return ImagesReply(
        (asked.url,) if asked.url else (),
        entries,
        _seconds(fields.get("created")),
        _short(fields.get("id")),
        sandbox=context.sandbox,
        warnings=tuple(warnings),
        unasked_urls=unasked,
        content=asked.content,
    )


def _about_unasked(count: int, urls: tuple[str, ...]) -> str:
    """Name the images that nobody asked for in one bounded line; the log holds all of their addresses."""
    named: list[str] = []
    for url in urls:
        if len(url) + sum(map(len, named)) > _MAX_NAMED_CHARACTERS:
            break
        named.append(url)
    rest = len(urls) - len(named)
    where = ", ".join([*named, *([f"{rest} in the log"] if rest else [])])
    plural = "s that were" if count > 1 else " that was"
    return f"The reply held {count} more image{plural} not asked for and not fetched{f': {where}' if where else ''}."


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error that a reply reports.

    Attributes:
        code: The service's business code.
        message: Its text.
        status: The HTTP status that the text names.
        is_text_alone: Whether it is only a text: an error where there is no image, a remark beside one.
    """

    code: str | None
    message: str | None
    status: int | None = None
    is_text_alone: bool = False


def _parsed(body: bytes) -> Any:
    try:
        try:
            return json.loads(body)
        except UnicodeDecodeError:  # in another encoding, the codes can be read all the same
            return json.loads(body.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _failure(fields: dict[str, Any], *, enveloped: bool) -> _Failure | None:
    error = fields.get("error") or fields.get("errors")
    if isinstance(error, dict):
        return _Failure(_short(error.get("code")), _message(error) or _message(fields))
    if error:
        return _Failure(None, _message(fields) if error is True else _text(error))
    if fields.get("task_status"):
        return None
    message = _message(fields)
    code = _short(fields.get("code"))
    has_succeeded = fields.get("success") is True or code in {"0", "200"}
    has_failed = fields.get("success") is False or (code is not None and not has_succeeded)
    if enveloped and has_failed and not fields.get("data"):
        # The gateway's own envelope, around a route that it does not serve; its message starts with the true status.
        named = re.match(r"\s*([45]\d\d)\b", message or "") or re.fullmatch(r"([45]\d\d)", code or "")
        return _Failure(None if named else code, message, int(named[1]) if named else None)
    # Other gateways: {"message": ...}, {"detail": ...}, without anything that a program could read.
    return _Failure(None, message, is_text_alone=True) if message and not has_succeeded else None


def _message(fields: dict[str, Any]) -> str | None:
    return next((text for name in _MESSAGES if (text := _text(fields.get(name)))), None)


def _error(status: int, failure: _Failure | None, entries: tuple[ContentFilter, ...], body: bytes) -> CogViewError:
    code = failure.code if failure else None
    judged = failure.status if failure and failure.status else status
    kind = CODES.get(code or "")
    if kind is None and entries and (judged < 300 or judged == 400):  # noqa: PLR2004
        kind = CogViewContentFilterError
    message = None
    if kind is None:
        kind, message = _judged_by_status(judged, reports_error=failure is not None)
    facts: dict[str, Any] = {
        "code": code,
        "status": status,
        "detail": failure.message if failure else body[:400].decode("utf-8", "replace"),
    }
    if kind is CogViewConfigurationError:
        facts["hint"] = "Check base_url: give the address that the redirect leads to."
    elif kind is CogViewMalformedReplyError and body.lstrip()[:1] == b"<":
        message = "The base URL answered with a web page and not as the API does; an image may have been charged."
        facts["hint"] = f"Check base_url. If it is right: {kind.default_hint[0].lower()}{kind.default_hint[1:]}"
    if kind is CogViewContentFilterError:
        return CogViewContentFilterError(content_filter=entries, **facts)
    if 401 in (status, judged) or issubclass(kind, CogViewAuthenticationError):  # noqa: PLR2004
        # Its text often repeats the key, in whatever form.
        facts |= {"detail": None, "code": code if code and _CODE.fullmatch(code) else None}
    return kind(message, **facts)


def _judged_by_status(status: int, *, reports_error: bool) -> tuple[type[CogViewError], str | None]:
    if status in _STATUSES:
        return _STATUSES[status], None
    if 300 <= status < 400:  # noqa: PLR2004
        return CogViewConfigurationError, "The base URL answered with a redirect, which is not followed."
    if 400 <= status < 500:  # noqa: PLR2004
        return CogViewInvalidRequestError, None
    if reports_error:
        return (
            CogViewOutcomeUnknownError,
            "The service reported an error that does not say whether an image was made; it may have been charged.",
        )
    return (CogViewOutcomeUnknownError if status >= 500 else CogViewMalformedReplyError), None  # noqa: PLR2004


@dataclass(frozen=True, slots=True)
class _Image:
    url: str | None
    content: bytes | None


def _images(data: Any, context: ReplyContext) -> tuple[list[_Image], int]:
    """The images of a reply, each once, and how many entries hold none."""
    items = data if isinstance(data, list) else [data]
    read = [_image(item, context) if isinstance(item, dict) else None for item in items[:64]]
    found = dict.fromkeys(image for image in read if image)
    return list(found), sum(image is None for image in read)


def _image(item: dict[str, Any], context: ReplyContext) -> _Image | None:
    url = _url(item.get("url"), context.base_url)
    content = next((data for name in DATA_FIELDS if (data := image_data(item.get(name), context.images))), None)
    link = item.get("url")
    if url is None and content is None and isinstance(link, str) and link[:64].lstrip()[:5].lower() == "data:":
        content = image_data(link, context.images)
    return _Image(url, content) if url or content else None


def _url(value: Any, base_url: str) -> str | None:
    if not isinstance(value, str) or len(value) > MAX_URL_CHARACTERS:
        return None
    url = value.strip().replace(" ", "%20")
    if not url.isprintable():
        return None
    try:
        if base_url.startswith("http") and _RELATIVE.match(url):
            url = urljoin(f"{base_url}/", url)
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        url.encode()
    except ValueError:
        return None
    return url if usable else None


def _seconds(value: Any) -> int | None:
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 16:  # noqa: PLR2004
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40 else None


def _task_id(value: Any) -> str | None:
    """An id in full: cut, it would be another one."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    text = value.strip() if isinstance(value, str) else str(value) if abs(value) < 10**MAX_ID_CHARACTERS else ""
    return text if is_task_id(text) else None


def is_task_id(text: str) -> bool:
    """Whether a text can be a task's id: a part of a URL's path that leads to no other route, however often it is decoded."""
    return len(text) <= MAX_ID_CHARACTERS and _TASK_ID.fullmatch(text) is not None


def _short(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    if isinstance(value, int) and abs(value) > 10**12:
        return None
    text = str(value).strip()[:64]
    return text if text and text.isascii() and text.isprintable() else None


def _text(value: Any) -> str | None:
    if isinstance(value, dict | list) and value:
        if isinstance(value, dict) and (text := next((t for n in _MESSAGES if isinstance(t := value.get(n), str)), "")):
            return _text(text)
        try:  # a list of what was wrong, as FastAPI sends it
            value = json.dumps(value, ensure_ascii=False)
        except RecursionError:
            return None
    return value[:4000] if isinstance(value, str) and value.strip() else None


# --- failures of the transport, and what may be sent again


class Phase(StrEnum):
    """How far a request had come when its transport failed."""

    CONNECTING = "connecting"
    """Look-up, connect, TLS, proxy: nothing of the request was sent."""
    SENT = "sent"
    """Some or all of the request was sent."""


class Fault(StrEnum):
    """How a transport failed."""

    TIMEOUT = "timeout"
    BROKEN = "broken"
    NOT_HTTP = "not http"
    """What came back is not HTTP."""
    PROXY = "proxy"
    """A proxy answered instead of the host."""
    UNTRUSTED = "untrusted"
    """The host's certificate did not verify."""
    SETTINGS = "settings"
    """The client's own settings make the request impossible."""


def transport_error(  # noqa: PLR0911
    fault: Fault, phase: Phase, *, detail: str | None = None, limit: float | None = None
) -> CogViewError:
    """Return the error for any failure of the transport. `limit` is the time limit in seconds, to name it."""
    time_limit = "the time limit" if limit is None else f"the time limit of {limit:g} s"
    if fault is Fault.SETTINGS:
        return CogViewConfigurationError(
            "The request could not be sent with these settings.",
            hint="Check base_url and the injected client.",
            detail=detail,
        )
    if phase is Phase.SENT:
        if fault is Fault.TIMEOUT:
            return CogViewOutcomeUnknownError(
                f"The request was sent, but {time_limit} passed before an answer came; "
                "an image may have been made and charged.",
                hint=f"{CogViewOutcomeUnknownError.default_hint} A longer timeout gives the service more time.",
            )
        if fault is Fault.NOT_HTTP:
            return CogViewMalformedReplyError(detail=detail)
        return CogViewOutcomeUnknownError(
            "The connection broke after the request was sent; an image may have been made and charged.", detail=detail
        )
    if fault is Fault.TIMEOUT:
        return CogViewTimeoutError(
            f"{time_limit[0].upper()}{time_limit[1:]} passed before the request was sent; nothing was made or charged."
        )
    if fault is Fault.PROXY:
        return CogViewConnectionError(
            "The proxy did not pass the request on; nothing was sent.",
            hint=(
                "Ask its operator to allow the API's host, put name and password into the proxy's URL if it wants them, or "
                "go around it with NO_PROXY."
            ),
            detail=detail,
        )
    if fault is Fault.UNTRUSTED:
        error = CogViewConnectionError(
            "The host's certificate is not trusted; nothing was sent.",
            hint=(
                "If a company proxy inspects TLS, point SSL_CERT_FILE to a PEM file with its root certificate. "
                "Otherwise check base_url and the machine's clock."
            ),
            detail=detail,
        )
        error.outcome = Outcome.FINAL
        error.is_retryable = False
        return error
    return CogViewConnectionError(detail=detail)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a request is sent again, and after which wait.

    Attributes:
        max_retries: Further attempts after the first.
        retry_unknown: Whether to send requests again that may have been charged. This can pay twice.
    """

    max_retries: int = 2
    retry_unknown: bool = False

    def sends_again(self, error: BaseException) -> bool:
        """Whether an error allows another attempt, regardless of their number."""
        if not isinstance(error, CogViewError) or isinstance(error, _NEVER_AGAIN):
            return False
        return error.outcome is Outcome.NOT_RUN or (self.retry_unknown and error.outcome is Outcome.UNKNOWN)

    def wait(self, error: BaseException, attempt: int) -> float:
        """Seconds to wait before attempt number `attempt` + 1: what the service asked for, else full jitter.

        The bound of the jitter doubles with each attempt, up to 60 s. It starts at 1 s, at 2 s after a refusal for too many
        requests in flight, and at 5 s when the model is overloaded.

        Returns:
            The wait in seconds; infinity if the service asks for too long a wait.
        """
        asked = error.retry_after if isinstance(error, CogViewError) else None
        if asked is not None:
            return asked if asked <= MAX_RETRY_AFTER else math.inf
        first = 5.0 if isinstance(error, CogViewBusyError) else 2.0 if isinstance(error, CogViewRateLimitError) else 1.0
        return random.uniform(0.0, min(first * 2 ** (attempt - 1), 60.0))


def parse_retry_after(value: str | None, *, now: datetime | None = None) -> float | None:
    """Parse a `Retry-After` header, which holds a number of seconds or an HTTP date.

    Returns:
        The seconds to wait, 0.0 or more; infinity for an absurd number; None if the header is missing or unusable.
    """
    text = (value or "").strip()
    if not text or len(text) > 4096:  # noqa: PLR2004
        return None
    if text.replace(".", "", 1).isascii() and text.replace(".", "", 1).isdigit():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    try:
        return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())
    except OverflowError:
        return math.inf
