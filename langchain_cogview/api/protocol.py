"""What is sent to the endpoint, what its replies mean, and what may be sent again: pure functions, no I/O.

The codes are those of the provider's error table (docs.bigmodel.cn, "Error codes"); decisions are taken on the code, never on
the text, which is Chinese in one region and English in the other, and changes.
"""

from __future__ import annotations

import binascii
import io
import json
import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

from langchain_cogview.errors import (
    CogViewAuthenticationError,
    CogViewBalanceError,
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
    CogViewTimeoutError,
    ContentFilter,
    Outcome,
    read_entries,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_cogview.request import ImageRequest

MAX_URL_CHARACTERS: Final = 8192
_CODE = re.compile(r"[0-9]{1,6}|[a-z]+(?:_[a-z]+)*")
_MAX_NAMED_CHARACTERS: Final = 600
_RELATIVE: Final = re.compile(r"\.{0,2}/|[\w.~%-]+(/[\w.~%-]+)*\.(png|jpe?g|webp)(\?.*)?\Z", re.IGNORECASE | re.ASCII)
"""An address without scheme and host, and no sentence."""
DATA_FIELDS: Final = ("b64_json", "base64", "b64")
"""Where gateways put an image's bytes; `url` may hold a `data:` URL too."""
_MARK: Final = re.compile(r"\x00image (\d{1,3})\Z")
_DATA_URL: Final = re.compile(
    rb"\s*data:(?:[^,]{0,200}(;\s*base64\s*)|(?!\s*(?:text/|[;,]))[^,]{0,200}),", re.IGNORECASE
)
"""A `data:` URL. Without base64 it may not be of a text, which is also what one without a media type is."""
_OPEN_PERCENT: Final = re.compile(rb"%[0-9a-fA-F]?\Z")
_BLANKS: Final = b" \t\r\n\f\v"
_STANDARD: Final = bytes.maketrans(b"-_", b"+/")
_ALPHABET: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
_MESSAGES: Final = ("message", "msg", "detail", "error_msg", "error_message")
"""Where services and gateways put the text of an error."""

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
    408: CogViewOutcomeUnknownError,
    **dict.fromkeys((404, 405, 410), CogViewNotFoundError),
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


NO_CONTEXT: Final = ReplyContext()


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


def read_reply(status: int, body: bytes, context: ReplyContext = NO_CONTEXT) -> ImagesReply:
    """Read one reply, whatever it is.

    Returns:
        The reply with its images.

    Raises:
        CogViewError: The class says what became of the request.
        CogViewError: The reply is an error, or holds no image.
    """
    fields, entries, failure = parse_reply(status, body)
    if 200 <= status < 300:  # noqa: PLR2004
        images = images_reply(fields, "data", entries, failure, context)
        if images:
            return images
    raise reply_error(status, failure, entries, body)


def parse_reply(status: int, body: bytes) -> tuple[dict[str, Any], tuple[ContentFilter, ...], Failure | None]:
    """Parse the body of a reply, whatever it is.

    Returns:
        The fields of its JSON object, the entries of the content filter, and the error that it reports, if any.
    """
    reply = _parsed(body)
    fields = reply if isinstance(reply, dict) else {}
    entries = read_entries(fields.get("content_filter")) + read_entries(fields.get("contentFilter"))
    return fields, entries, _failure(fields, enveloped=status < 300)  # noqa: PLR2004


def images_reply(
    fields: dict[str, Any],
    name: str,
    entries: tuple[ContentFilter, ...],
    failure: Failure | None,
    context: ReplyContext,
) -> ImagesReply | None:
    """Read the images under one name of a parsed reply.

    Args:
        fields: The first part of what `parse_reply` returned.
        name: Of the field that holds the images.
        entries: The second part.
        failure: The third part; what is reported beside an image becomes a warning.
        context: What came with the JSON.

    Returns:
        The reply; None if it holds no image.
    """
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
    """Name the images that nobody asked for in one bounded line; the log holds all of their addresses.

    Returns:
        One line, without the addresses.
    """
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
class Failure:
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


def _failure(fields: dict[str, Any], *, enveloped: bool) -> Failure | None:
    error = fields.get("error") or fields.get("errors")
    if isinstance(error, dict):
        return Failure(_short(error.get("code")), _message(error) or _message(fields))
    if error:
        return Failure(None, _message(fields) if error is True else _text(error))
    if fields.get("task_status"):
        return None
    message = _message(fields)
    code = _short(fields.get("code"))
    has_succeeded = fields.get("success") is True or code in {"0", "200"}
    has_failed = fields.get("success") is False or (code is not None and not has_succeeded)
    if enveloped and has_failed and not fields.get("data"):
        # The gateway's own envelope, around a route that it does not serve; its message starts with the true status.
        named = re.match(r"\s*([45]\d\d)\b", message or "") or re.fullmatch(r"([45]\d\d)", code or "")
        return Failure(None if named else code, message, int(named[1]) if named else None)
    # Other gateways: {"message": ...}, {"detail": ...}, without anything that a program could read.
    return Failure(None, message, is_text_alone=True) if message and not has_succeeded else None


def _message(fields: dict[str, Any]) -> str | None:
    return next((text for name in _MESSAGES if (text := _text(fields.get(name)))), None)


def reply_error(status: int, failure: Failure | None, entries: tuple[ContentFilter, ...], body: bytes) -> CogViewError:
    """Return the error for a reply without an image; its class says what became of the request."""
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


class _Image(NamedTuple):
    url: str | None
    content: bytes | None


def _images(data: Any, context: ReplyContext) -> tuple[list[_Image], int]:
    """Return the images of a reply, each once, and how many entries hold none."""
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


# --- images inside of a reply


class ImageData:
    """Decodes base64, in either alphabet, with blanks and without its padding, or a `data:` URL, percent-encoded or not.

    Attributes:
        is_valid: Whether the text was valid so far.
        size: The number of bytes that were decoded so far.
    """

    def __init__(self) -> None:
        self.is_valid = True
        self.size = 0
        self._decoded = io.BytesIO()
        self._rest = b""
        self._is_at_start = True
        self._is_url = False
        self._is_base64 = True
        self._cut = b""  # the beginning of a percent escape

    def feed(self, text: bytes) -> None:
        """Decode more text. The first call needs the whole beginning of a `data:` URL."""
        if self._is_at_start:
            self._is_at_start = False
            url = _DATA_URL.match(text)
            if url:
                self._is_url, self._is_base64, text = True, bool(url[1]), text[url.end() :]
        if self._is_url:
            text = self._unquoted(self._cut + text)
        if not self._is_base64:
            self.size += self._decoded.write(text)
            return
        text = self._rest + text.translate(_STANDARD, _BLANKS)
        if text.translate(None, _ALPHABET):
            self.is_valid = False
        whole = len(text) // 4 * 4
        self._rest = text[whole:]
        self._decode(text[:whole])

    def result(self) -> bytes | None:
        """Return the decoded bytes; None if the text was not valid or empty."""
        rest = self._rest.rstrip(b"=")
        if len(rest) > 1:  # one character alone says nothing
            self._decode(rest + b"=" * (-len(rest) % 4))
        self._rest = b""
        return self._decoded.getvalue() if self.is_valid and self.size and not self._cut else None

    def _unquoted(self, text: bytes) -> bytes:
        cut = _OPEN_PERCENT.search(text)
        self._cut = cut[0] if cut else b""
        return unquote_to_bytes(text[: len(text) - len(self._cut)]) if b"%" in text else text

    def _decode(self, text: bytes) -> None:
        try:
            if self.is_valid:
                self.size += self._decoded.write(binascii.a2b_base64(text))
        except binascii.Error:
            self.is_valid = False


def image_data(value: object, images: Sequence[bytes | None]) -> bytes | None:
    """The image data that a string of a reply holds.

    Args:
        value: A value of the JSON: base64, a `data:` URL, or the placeholder of either.
        images: What `ReplyBody.images` gave for this reply.

    Returns:
        The bytes, or None.
    """
    if not isinstance(value, str):
        return None
    mark = _MARK.search(value)
    if mark:
        number = int(mark[1])
        return images[number] if number < len(images) else None
    if not value.isascii():
        return None
    decoder = ImageData()
    decoder.feed(value.encode())
    return decoder.result()


# --- failures of the transport


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


_UNSENT: Final = {
    Fault.PROXY: (
        "The proxy did not pass the request on; nothing was sent.",
        (
            "Ask its operator to allow the API's host, put name and password into the proxy's URL if it wants them, or "
            "go around it with NO_PROXY."
        ),
    ),
    Fault.UNTRUSTED: (
        "The host's certificate is not trusted; nothing was sent.",
        (
            "If a company proxy inspects TLS, point SSL_CERT_FILE to a PEM file with its root certificate. "
            "Otherwise check base_url and the machine's clock."
        ),
    ),
}
"""What happened before the request was sent, and what to do."""


def transport_error(
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
    message, hint = _UNSENT.get(fault, (None, None))
    error = CogViewConnectionError(message, hint=hint, detail=detail)
    if fault is Fault.UNTRUSTED:
        error.outcome, error.is_retryable = Outcome.FINAL, False
    return error


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
