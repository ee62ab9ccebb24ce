"""One logical call of the endpoint: attempts, waits and deadline; sync and async around the same pure steps."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import httpx
import tenacity

from langchain_cogview.api.protocol import MAX_REPLY_BYTES, ImagesReply, decoded_body, read_reply
from langchain_cogview.api.retry import MAX_RETRY_AFTER, Fault, Phase, RetryPolicy, parse_retry_after, transport_error
from langchain_cogview.deadline import DEADLINE
from langchain_cogview.errors import CogViewError, CogViewMalformedReplyError, CogViewTimeoutError, Outcome

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pydantic import SecretStr

    from langchain_cogview.deadline import Deadline

ROUTE: Final = "/images/generations"
SANDBOX_HEADER: Final = "x-cogview-sandbox"
_KEY_PART_CHARACTERS = 12

NEVER: Final = threading.Event()
STOPPED: Final[ContextVar[threading.Event]] = ContextVar("cogview_stopped", default=NEVER)
"""Set when the caller is gone (Ctrl-C) while threads work for it: those send nothing more."""


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
        build: Makes a request; an injected client adds its own headers and parameters.
        abuild: The same, async.
        policy: What is sent again, and when.
        rate_limiter: Asked before every attempt.
    """

    base_url: str
    api_key: SecretStr = field(repr=False)
    send: Callable[[httpx.Request], httpx.Response]
    asend: Callable[[httpx.Request], Awaitable[httpx.Response]]
    build: Callable[..., httpx.Request] = httpx.Request
    abuild: Callable[..., httpx.Request] = httpx.Request
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
        stopped = STOPPED.get()
        waited_for: list[CogViewError] = []
        try:
            for attempt in tenacity.Retrying(
                sleep=tenacity.sleep_using_event(stopped), **self._loop(deadline, waited_for)
            ):
                with attempt:
                    if attempts:
                        self._wait_for_leave(deadline)
                    if stopped.is_set():
                        raise CogViewTimeoutError("The call was interrupted before the request was sent.")
                    attempts += 1
                    return _warned(self._once(body, deadline), waited_for)
        except CogViewError as error:
            raise self._told(error, waited_for, body, attempts) from None
        raise AssertionError  # tenacity ends with a result or an exception

    async def agenerate(self, body: dict[str, Any], deadline: Deadline) -> ImagesReply:
        """POST one request, again only where that is safe. The twin of `generate`."""
        attempts = 0
        waited_for: list[CogViewError] = []
        try:
            async for attempt in tenacity.AsyncRetrying(sleep=asyncio.sleep, **self._loop(deadline, waited_for)):
                with attempt:
                    if attempts:
                        await self._await_leave(deadline)
                    attempts += 1
                    return _warned(await self._aonce(body, deadline), waited_for)
        except CogViewError as error:
            raise self._told(error, waited_for, body, attempts) from None
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

    def _loop(self, deadline: Deadline, waited_for: list[CogViewError]) -> dict[str, Any]:
        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return self.policy.wait(error, state.attempt_number) if error else 0.0

        def note(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, CogViewError):
                waited_for.append(error)

        return {
            "before_sleep": note,
            "retry": tenacity.retry_if_exception(self.policy.sends_again),
            "wait": wait,
            "stop": lambda state: (
                state.attempt_number > self.policy.max_retries
                or state.upcoming_sleep > MAX_RETRY_AFTER
                or deadline.stops(state)
            ),
            "reraise": True,
        }

    def _request(
        self, build: Callable[..., httpx.Request], body: dict[str, Any], deadline: Deadline, trace: Any
    ) -> httpx.Request:
        left = deadline.remaining()
        return build(
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

    def _told(
        self, error: CogViewError, waited_for: list[CogViewError], body: dict[str, Any], attempts: int
    ) -> CogViewError:
        """The error to raise after all attempts, with what is known of the call."""
        unknown = [each for each in waited_for if each.outcome is Outcome.UNKNOWN]
        if unknown and error.outcome is not Outcome.UNKNOWN:
            # A later refusal does not undo that an earlier attempt may have been charged.
            unknown[-1].add_note(f"A later attempt ended with: {error}")
            error = unknown[-1]
        elif waited_for and isinstance(error, CogViewTimeoutError):
            # That time ran out before another attempt tells less than why there was to be one.
            error = waited_for[-1]
        error.request_id = body.get("request_id")
        error.attempts = attempts
        return error

    def _redacted(self, text: str) -> str:
        """A foreign text without the key: services and gateways repeat what they were sent."""
        key = self.api_key.get_secret_value()
        parts = (key, *key.split("."))
        # The first half is an id, which may stand in the path of a picture's link by right.
        for part in (key, parts[-1]) if text.startswith(("http:", "https:")) else parts:
            if len(part) >= _KEY_PART_CHARACTERS:
                text = text.replace(part, "[key]")
        return text

    def _without_key(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._redacted(value)
        if isinstance(value, list):
            return [self._without_key(each) for each in value]
        if isinstance(value, dict):
            return {self._redacted(name): self._without_key(each) for name, each in value.items()}
        return value

    def _body_without_key(self, body: bytes) -> bytes:
        try:
            # Through JSON, where there is some: an escaped key is a key too.
            return json.dumps(self._without_key(json.loads(body))).encode()
        except (ValueError, RecursionError):
            # Latin-1 gives every byte back as it was.
            return self._redacted(body.decode("latin-1")).encode("latin-1")

    def _judged(self, received: _Received | CogViewError) -> ImagesReply:
        if isinstance(received, CogViewError):
            raise received
        try:
            return read_reply(received.status, received.body, sandbox=received.sandbox)
        except CogViewError as error:
            error.retry_after = received.retry_after
            raise

    def _received(self, response: httpx.Response, content: bytes, encoding: str) -> _Received | CogViewError:
        if len(content) <= MAX_REPLY_BYTES:
            body = decoded_body(content, encoding)
            if body is not None:
                retry_after = parse_retry_after(response.headers.get("retry-after"))
                sandbox = SANDBOX_HEADER in response.headers
                return _Received(response.status_code, self._body_without_key(body), sandbox, retry_after)
        return CogViewMalformedReplyError(
            "The service's reply is larger than 1 MB or compressed in a way that was not asked for; "
            "a picture may have been made and charged.",
            status=response.status_code,
        )

    def _salvaged(self, response: httpx.Response | None, content: bytes, encoding: str) -> _Received | None:
        """A reply whose end was lost, when the picture's link is in what came: it is paid for."""
        received = self._received(response, content, encoding) if response is not None and content else None
        if not isinstance(received, _Received):
            return None
        try:
            read_reply(received.status, received.body)
        except CogViewError:
            return None
        return received

    def _as_ours(self, error: Exception, progress: _Progress, limit: float | None) -> CogViewError:
        if isinstance(error, CogViewError):
            return error
        said = self._redacted(str(error))
        if isinstance(error, httpx.TimeoutException | TimeoutError):
            fault = Fault.TIMEOUT
        elif isinstance(error, _SETTINGS):
            fault = Fault.SETTINGS
        elif isinstance(error, _RUBBISH):
            fault = Fault.BROKEN if "disconnected" in said.lower() else Fault.RUBBISH
        elif "CERTIFICATE_VERIFY_FAILED" in said:
            fault = Fault.UNTRUSTED
        else:
            fault = Fault.BROKEN
        detail = f"{type(error).__name__}: {said}".rstrip(": ")
        return transport_error(fault, progress.phase(error), detail=detail, limit=limit)

    # --- one attempt, twice: only "send", "wait" and "read" differ. Errors are given back rather than raised: httpx's hold
    # the request, and these frames what the service said, and so perhaps the key; no traceback and no chain shows them.

    def _once(self, body: dict[str, Any], deadline: Deadline) -> ImagesReply:
        return self._judged(self._exchanged(body, deadline))

    def _exchanged(self, body: dict[str, Any], deadline: Deadline) -> _Received | CogViewError:
        if deadline.passed:
            return transport_error(Fault.TIMEOUT, Phase.CONNECTING, limit=deadline.seconds)
        progress, response, content, encoding = _Progress(), None, b"", ""
        try:
            response = self.send(self._request(self.build, body, deadline, progress))
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
            return self._salvaged(response, content, encoding) or self._as_ours(error, progress, deadline.seconds)

    async def _aonce(self, body: dict[str, Any], deadline: Deadline) -> ImagesReply:
        return self._judged(await self._aexchanged(body, deadline))

    async def _aexchanged(self, body: dict[str, Any], deadline: Deadline) -> _Received | CogViewError:
        if deadline.passed:
            return transport_error(Fault.TIMEOUT, Phase.CONNECTING, limit=deadline.seconds)
        progress, response, content, encoding = _Progress(), None, b"", ""
        try:
            async with asyncio.timeout(deadline.remaining()):
                response = await self.asend(self._request(self.abuild, body, deadline, progress.anote))
                async with contextlib.aclosing(response):
                    content, encoding = _read_already(response)
                    if not response.is_closed:
                        async for chunk in response.aiter_raw():
                            content += chunk
                            if len(content) > MAX_REPLY_BYTES:
                                break
                    return self._received(response, content, encoding)
        except Exception as error:  # noqa: BLE001
            return self._salvaged(response, content, encoding) or self._as_ours(error, progress, deadline.seconds)

    def _wait_for_leave(self, deadline: Deadline) -> None:
        while self.rate_limiter and not self.rate_limiter.acquire(blocking=False):
            if not deadline.allows(0.05):
                raise transport_error(Fault.TIMEOUT, Phase.CONNECTING, limit=deadline.seconds)
            time.sleep(0.05)

    async def _await_leave(self, deadline: Deadline) -> None:
        while self.rate_limiter and not await self.rate_limiter.aacquire(blocking=False):
            if not deadline.allows(0.05):
                raise transport_error(Fault.TIMEOUT, Phase.CONNECTING, limit=deadline.seconds)
            await asyncio.sleep(0.05)


def _warned(reply: ImagesReply, waited_for: list[CogViewError]) -> ImagesReply:
    count = sum(error.outcome is Outcome.UNKNOWN for error in waited_for)
    if not count:
        return reply
    warning = (
        f"{count} earlier attempts may have been charged too."
        if count > 1
        else "An earlier attempt may have been charged too."
    )
    return replace(reply, warnings=(*reply.warnings, warning))


class _Received(NamedTuple):
    """A whole reply, without the key."""

    status: int
    body: bytes
    sandbox: bool
    retry_after: float | None


def _read_already(response: httpx.Response) -> tuple[bytes, str]:
    """What an injected client has read (and decompressed) by itself, and the encoding of what is still to come."""
    if response.is_stream_consumed:
        return response.content, ""
    return b"", response.headers.get("content-encoding", "")
