"""One HTTP exchange with the endpoint, bounded in size and time, with errors classified and the key removed.

The service sends a link. Gateways and self-hosted servers send the image itself as base64 in a string of the JSON. Such a string
is decoded as it comes and leaves a short placeholder behind, so that a reply takes no more memory than its image.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeVar

import httpx

from langchain_cogview.api.network import UnexpectedDataError
from langchain_cogview.api.protocol import (
    DATA_FIELDS,
    Fault,
    ImageData,
    Phase,
    ReplyContext,
    parse_retry_after,
    transport_error,
)
from langchain_cogview.api.redaction import redactor
from langchain_cogview.api.settings import is_free
from langchain_cogview.concurrency import DEADLINE, raised_by_signal
from langchain_cogview.errors import CogViewError, CogViewMalformedReplyError, CogViewOutcomeUnknownError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from pydantic import SecretStr

    from langchain_cogview.concurrency import Deadline

SANDBOX_HEADER: Final = "x-cogview-sandbox"
_ID_CHARACTERS = 200

MAX_REPLY_BYTES: Final = 1_000_000
"""The most bytes of a reply, without its image data."""
MAX_IMAGE_BYTES: Final = 32 * 2**20
"""The most bytes of image data in a reply, as for a download."""

_LONG: Final = 16_384
"""Characters from which a string may be image data; a shorter one stays where it is."""
_SAMPLE: Final = 64
_PART: Final = 2**16
"""Bytes that are looked at together."""
_COMPLETE: Final = re.compile(rb'[^"]*(?:"[^"\\]*(?:\\.[^"\\]*)*"[^"]*)*', re.DOTALL)
"""Whole strings and what stands between them. (One that is long and wholly in a part stays in the JSON.)"""
_STRING: Final = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_KEY_BYTES: Final = 64
_DATA_KEY: Final = re.compile(rb'"(?:%s|url)"\s*:\s*"\Z' % b"|".join(name.encode() for name in DATA_FIELDS))
_OPEN_ESCAPE: Final = re.compile(rb"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_GZIP_MAGIC: Final = b"\x1f\x8b"
_NOT_PLAIN: Final = bytes({*range(32), *b'"\\', *range(127, 256)})
_ESCAPES: Final = (
    *((b"\\u%04x" % ord(sign), sign) for sign in (b"/", b"+", b"=", b"\n", b"\r", b"\t", b" ", b"-", b"_")),
    *((b"\\u%04X" % ord(sign), sign) for sign in (b"/", b"+", b"=", b"\n", b"\r", b"-", b"_")),
    *((b"\\/", b"/"), (b"\\n", b"\n"), (b"\\r", b"\r"), (b"\\t", b"\t")),
)
"""The JSON escapes that base64 can be behind: some writers escape the slash, others the plus sign."""

ReplyT = TypeVar("ReplyT")
_Reply_co = TypeVar("_Reply_co", covariant=True)


class Reader(Protocol[_Reply_co]):
    """Reads a reply, or raises the `CogViewError` that it stands for."""

    def __call__(self, status: int, body: bytes, context: ReplyContext = ...) -> _Reply_co:
        """Read a reply without I/O."""
        ...


_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)
_SETTINGS = (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL, UnicodeError)
_NOT_HTTP = (httpx.RemoteProtocolError, httpx.DecodingError)
_CONVERTED = (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError, CogViewError)
"""Exceptions that become a `CogViewError`. Others (of a signal handler, an interrupt, a cancelled task) reach the caller."""


class Progress:
    """How far one attempt has come, by the trace extension of httpcore, which injected clients support as well.

    Attributes:
        begun: Whether the transport received the request.
        traced: Whether the transport reports what it does.
        sent: Whether a part of the request was sent.
    """

    def __init__(self) -> None:
        self.begun = False
        self.traced = False
        self.sent = False

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Handle an event of the transport."""
        self.traced = True
        if event.endswith("send_request_headers.started"):
            request = info.get("request")
            self.sent = self.sent or getattr(request, "method", b"") != b"CONNECT"

    async def atrace(self, event: str, info: dict[str, Any]) -> None:
        """Async version of `trace`."""
        self.trace(event, info)

    def phase(self, error: BaseException | None = None) -> Phase:
        """Return the phase. Without a trace (a transport without httpcore) it depends on the error; in doubt, it is `SENT`."""
        if isinstance(error, UnexpectedDataError):
            return Phase.CONNECTING
        if self.traced or not self.begun:
            return Phase.SENT if self.sent else Phase.CONNECTING
        return Phase.CONNECTING if isinstance(error, _NOT_SENT) else Phase.SENT


@dataclass(frozen=True, slots=True)
class Call:
    """A request to the endpoint.

    Attributes:
        method: `POST` or `GET`.
        route: The path after the base URL.
        body: Sent as JSON; None for no body.
    """

    method: str
    route: str
    body: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The endpoint at one base URL with one key.

    Args:
        base_url: The normalised base URL, without a trailing slash.
        api_key: Sent in the `Authorization` header and nowhere else.
        account: The base URL as the user wrote it.
        send: Sends a request and returns the response with its body unread.
        asend: Async version of `send`.
    """

    base_url: str
    api_key: SecretStr = field(repr=False)
    account: str
    send: Callable[[httpx.Request], httpx.Response]
    asend: Callable[[httpx.Request], Awaitable[httpx.Response]]

    # --- one exchange, twice: only "send" and "read" differ. Errors are returned and raised further up: the frames that they come
    # from hold the request, and so the key, and what the service said; no traceback and no chain shows them.

    def exchange(
        self, call: Call, deadline: Deadline, read: Reader[ReplyT], progress: Progress | None = None
    ) -> ReplyT:
        """Send one request and read its reply.

        Args:
            call: The request.
            deadline: The time limit.
            read: Reads the reply.
            progress: Updated while the request is sent, so that the caller knows how far it came whatever is raised.

        Returns:
            What `read` makes of the reply.

        Raises:
            CogViewError: The error that the reply stands for, or a failure of the connection.
            BaseException: Any exception from elsewhere, such as a signal handler. A note says if the request was sent.
        """
        return _read_or_raise(self._exchanged(call, deadline, read, progress or Progress()), read)

    async def aexchange(
        self, call: Call, deadline: Deadline, read: Reader[ReplyT], progress: Progress | None = None
    ) -> ReplyT:
        """Async version of `exchange`.

        Returns:
            As `exchange`.
        """
        return _read_or_raise(await self._aexchanged(call, deadline, read, progress or Progress()), read)

    def _exchanged(
        self, call: Call, deadline: Deadline, read: Reader[Any], progress: Progress
    ) -> _Received | BaseException:
        if deadline.passed:
            return transport_error(Fault.TIMEOUT, Phase.CONNECTING, limit=deadline.seconds)
        reading = None
        progress.begun = True
        try:
            response = self.send(self._request(call, deadline, progress.trace))
            stream: Any = response.stream
            with contextlib.closing(stream):
                reading = _Reading.of(response)
                for chunk in stream:
                    if not reading.body.add(chunk):
                        break
                    if deadline.passed:
                        raise httpx.ReadTimeout("The time limit passed.")  # noqa: TRY301
                received = self._received(reading, call)
                if isinstance(received, CogViewError) and "network_stream" in response.extensions:
                    response.extensions["network_stream"].close()
                return received
        except BaseException as error:  # noqa: BLE001
            return self._failed(error, call, reading, progress, deadline, read)

    async def _aexchanged(
        self, call: Call, deadline: Deadline, read: Reader[Any], progress: Progress
    ) -> _Received | BaseException:
        if deadline.passed:
            return transport_error(Fault.TIMEOUT, Phase.CONNECTING, limit=deadline.seconds)
        reading = None
        progress.begun = True
        try:
            async with asyncio.timeout(deadline.remaining()):
                response = await self.asend(self._request(call, deadline, progress.atrace))
                reading = _Reading.of(response)
                stream: Any = response.stream
                chunks: Any = aiter(stream)
                async with contextlib.aclosing(stream), contextlib.aclosing(chunks):
                    async for chunk in chunks:
                        if not reading.body.add(chunk):
                            break
                    received = self._received(reading, call)
                    if isinstance(received, CogViewError) and "network_stream" in response.extensions:
                        await response.extensions["network_stream"].aclose()
                    return received
        except BaseException as error:  # noqa: BLE001
            return self._failed(error, call, reading, progress, deadline, read)

    # --- decisions without I/O

    def _request(self, call: Call, deadline: Deadline, trace: Callable[..., Any]) -> httpx.Request:
        left = deadline.remaining()
        url = _url(f"{self.base_url}{call.route}")
        content = b"" if call.body is None else json.dumps(call.body, ensure_ascii=False).encode()
        request = httpx.Request(
            call.method,
            url,
            headers=self._headers(url, content),
            stream=httpx.ByteStream(content),
            extensions={
                "timeout": {"connect": left, "read": left, "write": left, "pool": left},
                "trace": trace,
                DEADLINE: deadline,
            },
        )
        request.read()
        return request

    def _headers(self, url: httpx.URL, content: bytes) -> dict[str, str]:
        """Return all headers: httpx takes as long to add the missing ones as for the rest of a request."""
        headers = {
            "Host": url.netloc.decode("ascii"),
            "Authorization": f"Bearer {self.api_key.get_secret_value()}",
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "langchain-cogview",
        }
        return {**headers, "Content-Length": str(len(content))} if content else headers

    def _received(self, reading: _Reading, call: Call) -> _Received | CogViewError:
        response, body = reading.response, reading.body.json()
        if body is None:
            return CogViewMalformedReplyError(
                "The service's reply is larger than 1 MB (beside 32 MiB of image data) or compressed in a way that was not asked "
                "for; an image may have been made and charged.",
                status=response.status_code,
            )
        if _answers_another(call, body):
            return CogViewOutcomeUnknownError(
                "The reply belongs to another request; an image may have been made and charged for this one.",
                status=response.status_code,
            )
        retry_after = parse_retry_after(response.headers.get("retry-after"))
        sandbox = SANDBOX_HEADER in response.headers and is_free(self.account, self.api_key)
        context = ReplyContext(self.base_url, reading.body.images, sandbox)
        return _Received(response.status_code, redactor(self.api_key).body(body), context, retry_after)

    def _failed(  # noqa: PLR0917
        self,
        error: BaseException,
        call: Call,
        reading: _Reading | None,
        progress: Progress,
        deadline: Deadline,
        read: Reader[Any],
    ) -> _Received | BaseException:
        """Return the outcome of an exchange that was interrupted."""
        by_signal = raised_by_signal(error)
        if by_signal or not isinstance(error, _CONVERTED):
            error = by_signal or error
            if by_signal:
                error.__context__ = None  # the connection's view of it, with frames that hold the request
            if call.body is not None and progress.sent:
                sent = f"The request {call.body.get('request_id', '')} was sent before this"
                error.add_note(f"{sent}: an image may have been made and charged.")
            return error
        return self._salvaged(reading, call, read) or self._as_cogview_error(error, progress, deadline.seconds)

    def _salvaged(self, reading: _Reading | None, call: Call, read: Reader[Any]) -> _Received | None:
        """Return an incomplete reply if it holds the link of the image, which is paid for."""
        received = self._received(reading, call) if reading and reading.body.has_content else None
        if not isinstance(received, _Received):
            return None
        try:
            read(received.status, received.body, received.context)
        except CogViewError:
            return None
        return received

    def _as_cogview_error(self, error: Exception, progress: Progress, limit: float | None) -> CogViewError:
        if isinstance(error, CogViewError):
            return error
        reason = redactor(self.api_key).text(str(error))
        if isinstance(error, httpx.TimeoutException | TimeoutError):
            fault = Fault.TIMEOUT
        elif isinstance(error, _SETTINGS):
            fault = Fault.SETTINGS
        elif isinstance(error, httpx.ProxyError):
            fault = Fault.PROXY
        elif isinstance(error, _NOT_HTTP):
            fault = Fault.BROKEN if "disconnected" in reason.lower() else Fault.NOT_HTTP
        elif "CERTIFICATE_VERIFY_FAILED" in reason:
            fault = Fault.UNTRUSTED
        else:
            fault = Fault.BROKEN
        detail = f"{type(error).__name__}: {reason}".rstrip(": ")
        return transport_error(fault, progress.phase(error), detail=detail, limit=limit)


class _Reading(NamedTuple):
    """The part of a reply that was received."""

    response: httpx.Response
    body: ReplyBody

    @classmethod
    def of(cls, response: httpx.Response) -> _Reading:
        return cls(response, ReplyBody(response.headers.get("content-encoding", "")))


class _Received(NamedTuple):
    """A complete reply, with the key removed."""

    status: int
    body: bytes
    context: ReplyContext
    retry_after: float | None


@lru_cache(maxsize=256)
def _url(url: str) -> httpx.URL:
    # Cached, because all calls of a service use the same one.
    return httpx.URL(url)


def _read_or_raise(received: _Received | BaseException, read: Reader[ReplyT]) -> ReplyT:
    if isinstance(received, BaseException):
        raise received.with_traceback(None)
    try:
        return read(received.status, received.body, received.context)
    except CogViewError as error:
        error.retry_after = received.retry_after
        raise


def _answers_another(call: Call, body: bytes) -> bool:
    """Return whether a reply has another request id than the one that was sent, so that it answers another request."""
    sent = (call.body or {}).get("request_id")
    if not sent or b"request_id" not in body:
        return False
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        return False
    echoed = reply.get("request_id") if isinstance(reply, dict) else None
    if not isinstance(echoed, str) or not echoed.isprintable() or len(echoed) > _ID_CHARACTERS:
        return False  # what is no id at all says nothing
    return _bare_id(echoed) not in {"", _bare_id(sent)}


def _bare_id(request_id: str) -> str:
    """Return a UUID in the one form, however a gateway writes it."""
    return request_id.strip().lower().replace("-", "")


# --- the body of a reply


class ReplyBody:
    """The body of one reply.

    Args:
        encoding: Its `Content-Encoding`.

    Attributes:
        has_content: Whether anything has come.
    """

    def __init__(self, encoding: str = "") -> None:
        self.has_content = False
        name = encoding.strip().lower()
        self._inflater = _Inflater() if name in {"gzip", "x-gzip", "deflate"} else None
        self._json = bytearray()
        self._images: list[bytes | None] = []
        self._image_bytes = self._data_bytes = 0
        self._start: int | None = None  # of the string in `_json` that is being read
        self._is_text = False  # whether that string is not image data
        self._data: ImageData | None = None
        self._carry = b""
        self._is_broken = self._inflater is None and name not in {"", "identity"}

    def add(self, chunk: bytes) -> bool:
        """Add a part of the body.

        Returns:
            False if the body is larger than allowed or cannot be decompressed.
        """
        self.has_content = self.has_content or bool(chunk)
        try:
            for part in [chunk] if self._inflater is None else self._inflater.parts(chunk):
                self._read(part)
                if self._is_broken:
                    break
        except zlib.error:
            self._is_broken = True
        return not self._is_broken

    def json(self) -> bytes | None:
        """Return the JSON with placeholders for image data; None if it was too large or its compression is unknown."""
        if self._is_broken or (self._inflater and not self._inflater.is_at_end):
            return None
        return bytes(self._json) + self._carry

    @property
    def images(self) -> tuple[bytes | None, ...]:
        """The image data in the order of the reply; None for a string that was not valid image data."""
        return tuple(self._images)

    def _read(self, chunk: bytes) -> None:
        position = 0
        while position < len(chunk):
            part = self._carry + chunk[position : position + _PART]
            position += _PART
            self._carry = b""
            self._read_part(part)
            too_much_data = self._image_bytes > MAX_IMAGE_BYTES or self._data_bytes > 2 * MAX_IMAGE_BYTES
            if too_much_data or len(self._json) > MAX_REPLY_BYTES:
                self._is_broken = True
                return

    def _read_part(self, part: bytes) -> None:
        position = 0
        while position < len(part):
            if self._data is not None:
                position = self._read_data(self._data, part, position)
            elif self._start is not None:
                position = self._read_string(part, position)
            else:
                end = _end(_COMPLETE, part, position)
                self._json += part[position : end + 1]
                position = end + 1
                if end < len(part):  # a quote, behind which no other one comes
                    self._start = len(self._json)
                    self._is_text = not _DATA_KEY.search(self._json, max(0, self._start - _KEY_BYTES))

    def _read_string(self, part: bytes, position: int) -> int:
        end = _end(_STRING, part, position)
        self._json += part[position:end]
        if part[end : end + 1] == b"\\":  # the other half of the escape comes with the next part
            self._carry = part[end:]
            return len(part)
        is_at_quote = end < len(part)
        self._look_for_data(is_at_quote=is_at_quote)
        if is_at_quote and self._data is None:
            self._json += b'"'
            self._start = None
            end += 1
        return end

    def _look_for_data(self, *, is_at_quote: bool) -> None:
        """Take a long string out of the JSON, where it begins like base64."""
        start = self._start or 0
        if self._is_text or len(self._json) - start < _LONG:
            return
        string = bytes(self._json[start:])
        cut = None if is_at_quote else _OPEN_ESCAPE.search(string)
        carry = string[cut.start() :] if cut else b""
        text = _unescaped(string[: len(string) - len(carry)])
        data = ImageData()
        data.feed(text)
        if not data.is_valid:
            self._is_text = True
            return
        del self._json[start:]
        self._json += text[:_SAMPLE].translate(None, _NOT_PLAIN)
        self._data, self._carry = data, carry
        self._image_bytes += data.size

    def _read_data(self, data: ImageData, chunk: bytes, position: int) -> int:
        quote = chunk.find(b'"', position)
        end = len(chunk) if quote < 0 else quote
        text = chunk[position:end]
        if quote < 0 and (cut := _OPEN_ESCAPE.search(text)):
            self._carry, text = text[cut.start() :], text[: cut.start()]
        before = data.size
        data.feed(_unescaped(text))
        if quote >= 0:
            self._json += b'\\u0000image %d"' % len(self._images)
            self._images.append(data.result())
            self._data, self._start = None, None
            end += 1
        self._image_bytes += data.size - before
        self._data_bytes += len(text)
        return end


class _Inflater:
    """Undoes gzip or deflate as it comes, a little at a time."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(47)  # gzip or zlib, by their heads
        self._head: bytes | None = b""
        self._behind = b""

    @property
    def is_at_end(self) -> bool:
        return self._decoder.eof

    def parts(self, chunk: bytes) -> Iterator[bytes]:
        rest = chunk
        while rest:
            if self._decoder.eof:
                # A gzip file may have further members; anything else behind its end is left out.
                rest = self._behind + rest
                self._behind = rest[: len(_GZIP_MAGIC)]
                if self._behind != _GZIP_MAGIC:
                    return
                self._decoder, self._behind = zlib.decompressobj(47), b""
            part = self._inflated(rest)
            rest = self._decoder.unconsumed_tail or self._decoder.unused_data
            if part:
                self._head = None
                yield part

    def _inflated(self, chunk: bytes) -> bytes:
        try:
            part = self._decoder.decompress(chunk, _PART)
        except zlib.error:
            if self._head is None:
                raise
            self._decoder = zlib.decompressobj(-15)  # the headless deflate that some servers send
            head, self._head = self._head, None
            return self._decoder.decompress(head + chunk, _PART)
        if self._head is not None:
            self._head += chunk
        return part


def _end(pattern: re.Pattern[bytes], part: bytes, position: int) -> int:
    found = pattern.match(part, position)
    return found.end() if found else position


def _unescaped(text: bytes) -> bytes:
    if b"\\" in text:
        for escape, character in _ESCAPES:
            text = text.replace(escape, character)
    return text
