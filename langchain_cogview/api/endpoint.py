"""One exchange with the endpoint: a request out, its reply in, bounded, judged and without the key."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeVar

import httpx

from langchain_cogview.api.protocol import MAX_REPLY_BYTES, decoded_body
from langchain_cogview.api.redaction import redactor
from langchain_cogview.api.retry import Fault, Phase, parse_retry_after, transport_error
from langchain_cogview.api.transport import STAGE
from langchain_cogview.deadline import DEADLINE
from langchain_cogview.errors import CogViewError, CogViewMalformedReplyError
from langchain_cogview.plain import AnyRequest, AnyResponse, PlainRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pydantic import SecretStr

    from langchain_cogview.deadline import Deadline

SANDBOX_HEADER: Final = "x-cogview-sandbox"

ReplyT = TypeVar("ReplyT")
_Reply_co = TypeVar("_Reply_co", covariant=True)


class Reader(Protocol[_Reply_co]):
    """Reads a reply, or raises the `CogViewError` that it is."""

    def __call__(self, status: int, body: bytes, *, sandbox: bool = False) -> _Reply_co:
        """Pure: no I/O."""
        ...


_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)
_SETTINGS = (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL)
_RUBBISH = (httpx.RemoteProtocolError, httpx.DecodingError)


class _Progress:
    """How far one attempt has come, as our transport, or httpcore's trace under an injected client, tells it."""

    def __init__(self) -> None:
        self.traced = False
        self.sent = False

    def __call__(self, event: str, info: dict[str, Any]) -> None:
        self.traced = True
        if event.endswith("send_request_headers.started"):
            request = info.get("request")
            self.sent = self.sent or getattr(request, "method", b"") != b"CONNECT"

    def stage(self, begins: str) -> None:
        self.traced = True
        self.sent = self.sent or begins == "send"

    async def anote(self, event: str, info: dict[str, Any]) -> None:
        self(event, info)

    def phase(self, error: BaseException | None = None) -> Phase:
        """Without a trace (another transport than httpcore's) only the exception's class tells; in doubt it was sent."""
        if self.traced:
            return Phase.SENT if self.sent else Phase.CONNECTING
        return Phase.CONNECTING if isinstance(error, _NOT_SENT) else Phase.SENT


@dataclass(frozen=True, slots=True)
class Call:
    """What is asked.

    Attributes:
        method: `POST` or `GET`.
        route: Behind the base URL.
        body: Sent as JSON; None sends none.
    """

    method: str
    route: str
    body: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The endpoint at one base URL with one key.

    Args:
        base_url: Normal form, without a trailing slash.
        api_key: Goes into the `Authorization` header and nowhere else.
        send: Sends one sync request and gives the response with its body unread.
        asend: The same, async.
        build: Makes a request; an injected client adds its own headers and parameters.
        abuild: The same, async.
    """

    base_url: str
    api_key: SecretStr = field(repr=False)
    send: Callable[[Any], AnyResponse]
    asend: Callable[[Any], Awaitable[AnyResponse]]
    build: Callable[..., AnyRequest] = PlainRequest
    abuild: Callable[..., AnyRequest] = PlainRequest

    # --- one exchange, twice: only "send" and "read" differ. Errors are given back rather than raised: httpx's hold the
    # request, and these frames what the service said, and so perhaps the key; no traceback and no chain shows them.

    def exchange(self, call: Call, deadline: Deadline, read: Reader[ReplyT]) -> ReplyT:
        """Send one request and read its reply.

        Raises:
            CogViewError: As `read` says, or what became of the connection.
        """
        return _judged(self._exchanged(call, deadline, read), read)

    async def aexchange(self, call: Call, deadline: Deadline, read: Reader[ReplyT]) -> ReplyT:
        """Send one request and read its reply. The twin of `exchange`."""
        return _judged(await self._aexchanged(call, deadline, read), read)

    def _exchanged(self, call: Call, deadline: Deadline, read: Reader[Any]) -> _Received | CogViewError:
        if deadline.passed:
            return transport_error(Fault.TIMEOUT, Phase.CONNECTING, limit=deadline.seconds)
        progress, response, content, encoding = _Progress(), None, b"", ""
        try:
            response = self.send(self._request(self.build, call, deadline, progress, progress))
            with contextlib.closing(response):
                content, encoding = _read_already(response)
                if not response.is_closed:
                    for chunk in response.iter_raw():
                        content += chunk
                        if len(content) > MAX_REPLY_BYTES:
                            break
                        if deadline.passed:
                            raise httpx.ReadTimeout("The time limit passed.")  # noqa: TRY301
                return self._received(response, content, encoding)
        except Exception as error:  # noqa: BLE001
            return self._salvaged(response, content, encoding, read) or self._as_ours(error, progress, deadline.seconds)

    async def _aexchanged(self, call: Call, deadline: Deadline, read: Reader[Any]) -> _Received | CogViewError:
        if deadline.passed:
            return transport_error(Fault.TIMEOUT, Phase.CONNECTING, limit=deadline.seconds)
        progress, response, content, encoding = _Progress(), None, b"", ""
        try:
            async with asyncio.timeout(deadline.remaining()):
                response = await self.asend(self._request(self.abuild, call, deadline, progress, progress.anote))
                async with contextlib.aclosing(response):
                    content, encoding = _read_already(response)
                    if not response.is_closed:
                        async for chunk in response.aiter_raw():
                            content += chunk
                            if len(content) > MAX_REPLY_BYTES:
                                break
                    return self._received(response, content, encoding)
        except Exception as error:  # noqa: BLE001
            return self._salvaged(response, content, encoding, read) or self._as_ours(error, progress, deadline.seconds)

    # --- pure steps

    def _request(
        self, build: Callable[..., AnyRequest], call: Call, deadline: Deadline, progress: _Progress, trace: Any
    ) -> AnyRequest:
        left = deadline.remaining()
        return build(
            call.method,
            _url(f"{self.base_url}{call.route}"),
            headers=self._headers(),
            content=None if call.body is None else json.dumps(call.body, ensure_ascii=False).encode(),
            extensions={
                "timeout": {"connect": left, "read": left, "write": left, "pool": left},
                "trace": trace,
                STAGE: progress.stage,
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

    def _received(self, response: AnyResponse, content: bytes, encoding: str) -> _Received | CogViewError:
        if len(content) <= MAX_REPLY_BYTES:
            body = decoded_body(content, encoding)
            if body is not None:
                retry_after = parse_retry_after(response.headers.get("retry-after"))
                sandbox = SANDBOX_HEADER in response.headers
                return _Received(response.status_code, redactor(self.api_key).body(body), sandbox, retry_after)
        return CogViewMalformedReplyError(
            "The service's reply is larger than 1 MB or compressed in a way that was not asked for; "
            "a picture may have been made and charged.",
            status=response.status_code,
        )

    def _salvaged(
        self, response: AnyResponse | None, content: bytes, encoding: str, read: Reader[Any]
    ) -> _Received | None:
        """A reply whose end was lost, when the picture's link is in what came: it is paid for."""
        received = self._received(response, content, encoding) if response is not None and content else None
        if not isinstance(received, _Received):
            return None
        try:
            read(received.status, received.body)
        except CogViewError:
            return None
        return received

    def _as_ours(self, error: Exception, progress: _Progress, limit: float | None) -> CogViewError:
        if isinstance(error, CogViewError):
            return error
        said = redactor(self.api_key).text(str(error))
        if isinstance(error, httpx.TimeoutException | TimeoutError):
            fault = Fault.TIMEOUT
        elif isinstance(error, _SETTINGS):
            fault = Fault.SETTINGS
        elif isinstance(error, httpx.ProxyError):
            fault = Fault.PROXY
        elif isinstance(error, _RUBBISH):
            fault = Fault.BROKEN if "disconnected" in said.lower() else Fault.RUBBISH
        elif "CERTIFICATE_VERIFY_FAILED" in said:
            fault = Fault.UNTRUSTED
        else:
            fault = Fault.BROKEN
        detail = f"{type(error).__name__}: {said}".rstrip(": ")
        return transport_error(fault, progress.phase(error), detail=detail, limit=limit)


class _Received(NamedTuple):
    """A whole reply, without the key."""

    status: int
    body: bytes
    sandbox: bool
    retry_after: float | None


@lru_cache(maxsize=256)
def _url(url: str) -> httpx.URL:
    """Parsed once: it is the same for every call of a service."""
    return httpx.URL(url)


def _judged(received: _Received | CogViewError, read: Reader[ReplyT]) -> ReplyT:
    if isinstance(received, CogViewError):
        raise received
    try:
        return read(received.status, received.body, sandbox=received.sandbox)
    except CogViewError as error:
        error.retry_after = received.retry_after
        raise


def _read_already(response: AnyResponse) -> tuple[bytes, str]:
    """What an injected client has read (and decompressed) by itself, and the encoding of what is still to come."""
    if response.is_stream_consumed:
        return response.content, ""
    return b"", response.headers.get("content-encoding", "")
