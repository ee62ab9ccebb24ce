"""One logical call of the endpoint: attempts, waits and deadline; sync and async around the same pure steps."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import httpx
import tenacity

from langchain_cogview.api.protocol import MAX_REPLY_BYTES, ImagesReply, decoded_body, read_reply
from langchain_cogview.api.retry import Fault, Phase, RetryPolicy, parse_retry_after, transport_error
from langchain_cogview.deadline import DEADLINE
from langchain_cogview.errors import CogViewError, CogViewMalformedReplyError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pydantic import SecretStr

    from langchain_cogview.deadline import Deadline

ROUTE: Final = "/images/generations"
SANDBOX_HEADER: Final = "x-cogview-sandbox"


class RateLimiter(Protocol):
    """What is asked for leave before each attempt: LangChain's `BaseRateLimiter` has this form."""

    def acquire(self, *, blocking: bool = True) -> bool:
        """Take a place; False where there is none and `blocking` is False."""
        ...

    async def aacquire(self, *, blocking: bool = True) -> bool:
        """The same, for async callers."""
        ...


_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)
_SETTINGS = (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL)
_RUBBISH = (httpx.RemoteProtocolError, httpx.DecodingError)


class _Progress:
    """How far one attempt has come, as httpcore's trace tells it."""

    def __init__(self) -> None:
        self.traced = False
        self.sent = False

    def __call__(self, event: str, info: dict[str, Any]) -> None:
        self.traced = True
        if event.endswith("send_request_headers.started"):
            request = info.get("request")
            self.sent = self.sent or getattr(request, "method", b"") != b"CONNECT"

    async def anote(self, event: str, info: dict[str, Any]) -> None:
        self(event, info)

    def phase(self, error: BaseException | None = None) -> Phase:
        """Without a trace (another transport than httpcore's) only the exception's class tells; in doubt it was sent."""
        if self.traced:
            return Phase.SENT if self.sent else Phase.CONNECTING
        return Phase.CONNECTING if isinstance(error, _NOT_SENT) else Phase.SENT


@dataclass(frozen=True, slots=True)
class ImagesClient:
    """The endpoint at one base URL with one key.

    Args:
        base_url: Normal form, without a trailing slash.
        api_key: Goes into the `Authorization` header and nowhere else.
        send: Sends one sync request and gives the response with its body unread.
        asend: The same, async.
        policy: What is sent again, and when.
        rate_limiter: Asked before every attempt.
    """

    base_url: str
    api_key: SecretStr = field(repr=False)
    send: Callable[[httpx.Request], httpx.Response]
    asend: Callable[[httpx.Request], Awaitable[httpx.Response]]
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    rate_limiter: RateLimiter | None = None

    def generate(self, body: dict[str, Any], deadline: Deadline) -> ImagesReply:
        """POST one request, again only where that is safe.

        Args:
            body: As `protocol.images_body` makes it; its `request_id` is the same on every attempt.
            deadline: For everything, waits included.

        Raises:
            CogViewError: Carries the request id and the number of attempts.
        """
        attempts = 0
        try:
            for attempt in tenacity.Retrying(sleep=time.sleep, **self._loop(deadline)):
                with attempt:
                    if attempts:
                        self._wait_for_leave(deadline)
                    attempts += 1
                    return self._once(body, deadline)
        except CogViewError as error:
            raise self._told(error, body, attempts) from None
        raise AssertionError  # tenacity ends with a result or an exception

    async def agenerate(self, body: dict[str, Any], deadline: Deadline) -> ImagesReply:
        """POST one request, again only where that is safe. The twin of `generate`."""
        attempts = 0
        try:
            async for attempt in tenacity.AsyncRetrying(sleep=asyncio.sleep, **self._loop(deadline)):
                with attempt:
                    if attempts:
                        await self._await_leave(deadline)
                    attempts += 1
                    return await self._aonce(body, deadline)
        except CogViewError as error:
            raise self._told(error, body, attempts) from None
        raise AssertionError  # tenacity ends with a result or an exception

    def leave(self) -> None:
        """Wait for the rate limiter's leave for the first attempt; that wait is a queue, not part of the call."""
        if self.rate_limiter:
            self.rate_limiter.acquire(blocking=True)

    async def aleave(self) -> None:
        """The twin of `leave`."""
        if self.rate_limiter:
            await self.rate_limiter.aacquire(blocking=True)

    # --- pure steps

    def _loop(self, deadline: Deadline) -> dict[str, Any]:
        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return self.policy.wait(error, state.attempt_number) if error else 0.0

        return {
            "retry": tenacity.retry_if_exception(self.policy.sends_again),
            "wait": wait,
            "stop": lambda state: state.attempt_number > self.policy.max_retries or deadline.stops(state),
            "reraise": True,
        }

    def _request(self, body: dict[str, Any], deadline: Deadline, trace: Any) -> httpx.Request:
        left = deadline.remaining()
        return httpx.Request(
            "POST",
            f"{self.base_url}{ROUTE}",
            headers=self._headers(),
            content=json.dumps(body, ensure_ascii=False).encode(),
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

    @staticmethod
    def _told(error: CogViewError, body: dict[str, Any], attempts: int) -> CogViewError:
        error.request_id = body.get("request_id")
        error.attempts = attempts
        return error

    # --- one attempt, twice: only "send", "wait" and "read" differ

    def _once(self, body: dict[str, Any], deadline: Deadline) -> ImagesReply:
        progress = _Progress()
        try:
            response = self.send(self._request(body, deadline, progress))
            with contextlib.closing(response):
                reply = _Reply(response)
                for chunk in reply.given() or response.iter_raw():
                    reply.add(chunk)
                    if deadline.passed:
                        raise httpx.ReadTimeout("The time limit passed.")
            return reply.read()
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            # httpx's errors hold the request, and so the key: the chain ends here, the text goes on in `detail`.
            raise _as_ours(error, progress) from None

    async def _aonce(self, body: dict[str, Any], deadline: Deadline) -> ImagesReply:
        progress = _Progress()
        try:
            async with asyncio.timeout(deadline.remaining()):
                response = await self.asend(self._request(body, deadline, progress.anote))
                async with contextlib.aclosing(response):
                    reply = _Reply(response)
                    for chunk in reply.given():
                        reply.add(chunk)
                    if not response.is_closed:
                        async for chunk in response.aiter_raw():
                            reply.add(chunk)
            return reply.read()
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            # httpx's errors hold the request, and so the key: the chain ends here, the text goes on in `detail`.
            raise _as_ours(error, progress) from None

    def _wait_for_leave(self, deadline: Deadline) -> None:
        while self.rate_limiter and not self.rate_limiter.acquire(blocking=False):
            if not deadline.allows(0.05):
                raise transport_error(Fault.TIMEOUT, Phase.CONNECTING)
            time.sleep(0.05)

    async def _await_leave(self, deadline: Deadline) -> None:
        while self.rate_limiter and not await self.rate_limiter.aacquire(blocking=False):
            if not deadline.allows(0.05):
                raise transport_error(Fault.TIMEOUT, Phase.CONNECTING)
            await asyncio.sleep(0.05)


class _Reply:
    """One reply as it comes in, never more than the bound."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._status = response.status_code
        self._headers = response.headers
        self._encoding = response.headers.get("content-encoding", "")
        self._chunks: list[bytes] = []
        self._size = 0

    def given(self) -> tuple[bytes, ...]:
        """The body of a reply that an injected client has read (and decompressed) already; else nothing."""
        if not self._response.is_stream_consumed:
            return ()
        self._encoding = ""
        return (self._response.content,)

    def add(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size > MAX_REPLY_BYTES:
            raise CogViewMalformedReplyError(
                "The service's reply is larger than 1 MB; a picture may have been made and charged.",
                status=self._status,
            )
        self._chunks.append(chunk)

    def read(self) -> ImagesReply:
        try:
            body = decoded_body(b"".join(self._chunks), self._encoding)
            return read_reply(self._status, body, sandbox=SANDBOX_HEADER in self._headers)
        except CogViewError as error:
            error.status = self._status
            error.retry_after = parse_retry_after(self._headers.get("retry-after"))
            raise


def _as_ours(error: Exception, progress: _Progress) -> CogViewError:
    detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        fault = Fault.TIMEOUT
    elif isinstance(error, _SETTINGS):
        fault = Fault.SETTINGS
    elif isinstance(error, _RUBBISH):
        fault = Fault.BROKEN if "disconnected" in str(error).lower() else Fault.RUBBISH
    elif "CERTIFICATE_VERIFY_FAILED" in str(error) or isinstance(error, ssl.SSLCertVerificationError):
        fault = Fault.UNTRUSTED
    else:
        fault = Fault.BROKEN
    return transport_error(fault, progress.phase(error), detail=detail)
