"""One HTTP exchange with the endpoint, bounded in size and time, with errors classified and the key removed."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx

from langchain_cogview.addresses import SANDBOX_SERVERS, is_loopback
from langchain_cogview.api.body import ReplyBody
from langchain_cogview.api.network import UnexpectedDataError
from langchain_cogview.api.protocol import Fault, Phase, ReplyContext, parse_retry_after, transport_error
from langchain_cogview.api.redaction import redactor
from langchain_cogview.api.settings import SANDBOX_KEY, is_sandbox
from langchain_cogview.concurrency import DEADLINE, raised_by_signal
from langchain_cogview.errors import CogViewError, CogViewMalformedReplyError, CogViewOutcomeUnknownError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pydantic import SecretStr

    from langchain_cogview.concurrency import Deadline

SANDBOX_HEADER: Final = "x-cogview-sandbox"
_ID_CHARACTERS = 200

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


class _Reading:
    """The part of a reply that was received."""

    def __init__(self) -> None:
        self.response: httpx.Response | None = None
        self._body: ReplyBody | None = None

    @property
    def body(self) -> ReplyBody:
        if self._body is None:
            self._body = ReplyBody(self.response.headers.get("content-encoding", "") if self.response else "")
        return self._body

    def add(self, chunk: bytes) -> bool:
        """Add a part of the body. Returns False if the body is larger than allowed."""
        return self.body.add(chunk)


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


def is_free(base_url: str, key: SecretStr) -> bool:
    """Whether images can be placeholders of the sandbox, which cost nothing. A header of the reply is not enough for that.

    Args:
        base_url: The base URL as the user wrote it.
        key: The API key.

    Returns:
        True for the sandbox in this process, for a sandbox that this process serves, and for a service of this machine that the
        user marks as a sandbox by the key "sandbox".
    """
    if is_sandbox(base_url):
        return True
    parts = urlsplit(base_url)
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname or ""
    try:
        if not is_loopback(ipaddress.ip_address(host)):
            return False
    except ValueError:
        return False
    return (host, parts.port) in SANDBOX_SERVERS or key.get_secret_value() == SANDBOX_KEY.get_secret_value()


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
        """Async version of `exchange`."""
        return _read_or_raise(await self._aexchanged(call, deadline, read, progress or Progress()), read)

    def _exchanged(
        self, call: Call, deadline: Deadline, read: Reader[Any], progress: Progress
    ) -> _Received | BaseException:
        if deadline.passed:
            return transport_error(Fault.TIMEOUT, Phase.CONNECTING, limit=deadline.seconds)
        reading = _Reading()
        progress.begun = True
        try:
            response = reading.response = self.send(self._request(call, deadline, progress.trace))
            with contextlib.closing(response):
                for chunk in response.iter_raw():
                    if not reading.add(chunk):
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
        reading = _Reading()
        progress.begun = True
        try:
            async with asyncio.timeout(deadline.remaining()):
                response = reading.response = await self.asend(self._request(call, deadline, progress.atrace))
                chunks: Any = response.aiter_raw()
                async with contextlib.aclosing(response), contextlib.aclosing(chunks):
                    async for chunk in chunks:
                        if not reading.add(chunk):
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
        return httpx.Request(
            call.method,
            _url(f"{self.base_url}{call.route}"),
            headers=self._headers(),
            content=None if call.body is None else json.dumps(call.body, ensure_ascii=False).encode(),
            extensions={
                "timeout": {"connect": left, "read": left, "write": left, "pool": left},
                "trace": trace,
                DEADLINE: deadline,
            },
        )

    def _headers(self) -> dict[str, str]:
        return {
            "Authorization": f"Bearer {self.api_key.get_secret_value()}",
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "langchain-cogview",
        }

    def _received(self, reading: _Reading, call: Call) -> _Received | CogViewError:
        response = reading.response
        if response is None:
            return transport_error(Fault.BROKEN, Phase.SENT)
        body = reading.body.json()
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
        reading: _Reading,
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
        return self._salvaged(reading, call, read) or self._as_ours(error, progress, deadline.seconds)

    def _salvaged(self, reading: _Reading, call: Call, read: Reader[Any]) -> _Received | None:
        """Return an incomplete reply if it holds the link of the image, which is paid for."""
        received = self._received(reading, call) if reading.body.has_content else None
        if not isinstance(received, _Received):
            return None
        try:
            read(received.status, received.body, received.context)
        except CogViewError:
            return None
        return received

    def _as_ours(self, error: Exception, progress: Progress, limit: float | None) -> CogViewError:
        if isinstance(error, CogViewError):
            return error
        said = redactor(self.api_key).text(str(error))
        if isinstance(error, httpx.TimeoutException | TimeoutError):
            fault = Fault.TIMEOUT
        elif isinstance(error, _SETTINGS):
            fault = Fault.SETTINGS
        elif isinstance(error, httpx.ProxyError):
            fault = Fault.PROXY
        elif isinstance(error, _NOT_HTTP):
            fault = Fault.BROKEN if "disconnected" in said.lower() else Fault.NOT_HTTP
        elif "CERTIFICATE_VERIFY_FAILED" in said:
            fault = Fault.UNTRUSTED
        else:
            fault = Fault.BROKEN
        detail = f"{type(error).__name__}: {said}".rstrip(": ")
        return transport_error(fault, progress.phase(error), detail=detail, limit=limit)


class _Received(NamedTuple):
    """A complete reply, with the key removed."""

    status: int
    body: bytes
    context: ReplyContext
    retry_after: float | None


@lru_cache(maxsize=256)
def _url(url: str) -> httpx.URL:
    """Parse a URL; cached, because all calls of a service use the same one."""
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
    """Whether a reply has another request id than the one that was sent, so that it answers another request."""
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
    """A UUID in the one form, however a gateway writes it."""
    return request_id.strip().lower().replace("-", "")
