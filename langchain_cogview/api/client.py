"""One logical call of the endpoint: its slot in the limiter, its attempts, waits and deadline."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from langchain_cogview.api.endpoint import Call, Endpoint, Progress, Reader, ReplyT
from langchain_cogview.api.limiter import Limiter, Slot, limiter_for
from langchain_cogview.api.protocol import Fault, ImagesReply, Phase, read_reply, transport_error
from langchain_cogview.api.sending import asender, sender
from langchain_cogview.api.settings import SANDBOX_ENDPOINT, is_sandbox
from langchain_cogview.catalog import model_info
from langchain_cogview.concurrency import CANCEL_TOKEN, Deadline
from langchain_cogview.errors import (
    ACCOUNT_LIMIT,
    CogViewBudgetError,
    CogViewBusyError,
    CogViewConfigurationError,
    CogViewError,
    CogViewRateLimitError,
    CogViewStoppedError,
    CogViewTimeoutError,
    Outcome,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx
    from pydantic import SecretStr

    from langchain_cogview.concurrency import CancelToken, Priority
    from langchain_cogview.limits import SharedLimit

logger = logging.getLogger(__name__)

ROUTE: Final = "/images/generations"
MAX_RETRY_AFTER: Final = 3600.0
"""Seconds; a service that asks for a longer wait is not waited for."""
MAX_REFUSED_SECONDS: Final = 600.0
"""Seconds that a call without a time limit waits while the service refuses it as one request too many in flight."""
_MAX_REFUSED_WAIT: Final = 8.0
"""The longest wait in seconds before such a call is sent again, unless the service asks for a longer one."""
_WARN_AFTER: Final = 3
"""After this many such refusals of one call, a warning names other processes as the likely cause."""
_NEVER_AGAIN: Final = (CogViewBudgetError, CogViewConfigurationError, CogViewStoppedError, CogViewTimeoutError)
_BLOCKED_LOOP_SECONDS = 120.0
_LIMITER_POLL_SECONDS = 0.05


class RateLimiter(Protocol):
    """A rate limiter that is acquired before each attempt, such as a `BaseRateLimiter` of LangChain."""

    def acquire(self, *, blocking: bool = True) -> bool:
        """Acquire the limiter. Returns False if that would block and `blocking` is False."""
        ...

    async def aacquire(self, *, blocking: bool = True) -> bool:
        """Async version of `acquire`."""
        ...


class CallEvents(Protocol):
    """Is called on every event of one call."""

    def sending(self) -> None:
        """Handle an attempt that is about to be sent. An exception ends the call, and nothing is sent."""

    async def asending(self) -> None:
        """Async version of `sending`."""

    def failed(self, error: BaseException, *, was_sent: bool = True) -> None:
        """Handle an attempt that ended without an image or a task; `was_sent`: whether a part of the request may be sent."""

    async def afailed(self, error: BaseException, *, was_sent: bool = True) -> None:
        """Async version of `failed`."""

    def retrying(self, error: CogViewError, wait: float, attempts: int) -> None:
        """Handle a wait of some seconds before the next attempt."""

    async def aretrying(self, error: CogViewError, wait: float, attempts: int) -> None:
        """Async version of `retrying`."""

    def submitted(self, task_id: str) -> None:
        """Handle a task that was accepted."""

    async def asubmitted(self, task_id: str) -> None:
        """Async version of `submitted`."""

    def processing(self, task_id: str) -> None:
        """Handle a poll of a task that has not ended."""

    async def aprocessing(self, task_id: str) -> None:
        """Async version of `processing`."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a request is sent again, and after which wait.

    Attributes:
        max_retries: Further attempts after the first.
        retry_unknown: Whether to send requests again that may have been charged. This can pay twice.
        waits_for_account: Whether a request that was refused because the account has too many in flight (code 1302) is sent
            again until the deadline, without counting as a retry. Other processes with the same key may hold the account's slots.
    """

    max_retries: int = 2
    retry_unknown: bool = False
    waits_for_account: bool = True

    def sends_again(self, error: BaseException) -> bool:
        """Return whether an error allows another attempt, regardless of their number."""
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

    def wait_for_account(self, error: CogViewError, refusals: int) -> float:
        """Seconds to wait after refusal number `refusals` of a call because too many requests of the account are in flight.

        The wait is what the service asked for, else full jitter up to 2 s, then 4 s and 8 s. A service that asks for no wait at
        all is taken at its word for the first `max_retries` refusals.

        Returns:
            The wait in seconds.
        """
        asked = self.wait(error, 1) if error.retry_after is not None else 0.0
        if error.retry_after is not None and refusals <= self.max_retries:
            return asked
        return max(asked, random.uniform(0.0, min(2.0 ** min(refusals, 10), _MAX_REFUSED_WAIT)))


@dataclass(slots=True)
class _Attempts:
    """The attempts of one logical call.

    Attributes:
        model: The model of the request.
        begun: The number of attempts, including those that got no slot.
        made: The number of requests that were sent.
        waited_for: The errors after which the request was sent again.
        ticket: The call's position in the queue of the limiter.
        queue_is_wait: Whether queueing for a slot replaces the wait before the next attempt.
        refusals: How often the request was refused because the account has too many in flight; these are no retries.
        first_refusal: When the first of them came, on the monotonic clock.
        hold: Seconds to wait with the next slot before sending, so that no other call of this process is sent meanwhile.
    """

    model: str
    begun: int = 0
    made: int = 0
    waited_for: list[CogViewError] = field(default_factory=list)
    ticket: int | None = None
    queue_is_wait: bool = False
    refusals: int = 0
    first_refusal: float = 0.0
    hold: float = 0.0


@dataclass(frozen=True, slots=True)
class ImagesClient:
    """Calls of the images endpoint, each with a slot in the limiter.

    Args:
        endpoint: Sends the requests.
        account: The base URL as the user wrote it. Calls of the same account, key and model share a limiter.
        max_concurrency: The most requests in flight; None for the catalog's number for the model.
        policy: Which requests are sent again, and when.
        rate_limiter: Acquired before every attempt.
        shared_limit: Where the limit of requests in flight is shared with other processes; None: it holds in this process.
        max_concurrency_per_user: The most requests in flight of one `user_id` in this process; None: no limit but the others.
        priority: The priority of all calls; None: what the context says.
    """

    endpoint: Endpoint
    account: str
    max_concurrency: int | None = None
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    rate_limiter: RateLimiter | None = None
    shared_limit: SharedLimit | None = None
    max_concurrency_per_user: int | None = None
    priority: Priority | None = None

    def generate(self, body: dict[str, Any], deadline: Deadline, events: CallEvents) -> ImagesReply:
        """Send one request, and send it again only if it did not run.

        Args:
            body: As `protocol.images_body` makes it; its `request_id` is the same on every attempt.
            deadline: For everything from the first slot in flight on, waits included; started here.
            events: Called on every event of the call.

        Returns:
            The reply with its image.

        Raises:
            CogViewError: With the request id and the number of attempts.
        """
        reply, slot = self.paid(ROUTE, body, read_reply, deadline, events)
        slot.done()
        return reply

    async def agenerate(self, body: dict[str, Any], deadline: Deadline, events: CallEvents) -> ImagesReply:
        """Async version of `generate`.

        Returns:
            As `generate`.
        """
        reply, slot = await self.apaid(ROUTE, body, read_reply, deadline, events)
        slot.done()
        return reply

    def paid(
        self, route: str, body: dict[str, Any], read: Reader[ReplyT], deadline: Deadline, events: CallEvents
    ) -> tuple[ReplyT, Slot]:
        """Send a request that costs money.

        Returns:
            The reply and its slot, which the caller has to end.

        Raises:
            CogViewError: The request was refused, or its outcome is unknown.
        """
        attempts = _Attempts(body["model"])
        call = Call("POST", route, body)
        while True:
            attempts.begun += 1
            try:
                slot = self._acquire_slot(body, deadline, attempts)
                progress = Progress()
                try:
                    events.sending()
                    attempts.made += 1
                    return _warned(self.endpoint.exchange(call, deadline, read, progress), attempts), slot
                except BaseException as error:
                    _end_slot(slot, error, attempts)
                    events.failed(error, was_sent=progress.phase(error) is Phase.SENT)
                    raise
            except CogViewError as error:
                wait = self._wait_before_next(error, deadline, attempts)
                if wait is None:
                    raise _with_facts(error, body, attempts) from None
                events.retrying(error, wait, attempts.made)
            if not attempts.hold:
                CANCEL_TOKEN.get().wait(wait)

    async def apaid(
        self, route: str, body: dict[str, Any], read: Reader[ReplyT], deadline: Deadline, events: CallEvents
    ) -> tuple[ReplyT, Slot]:
        """Async version of `paid`.

        Returns:
            As `paid`.

        Raises:
            CogViewError: As `paid`.
        """
        attempts = _Attempts(body["model"])
        call = Call("POST", route, body)
        while True:
            attempts.begun += 1
            try:
                slot = await self._aacquire_slot(body, deadline, attempts)
                progress = Progress()
                try:
                    await events.asending()
                    attempts.made += 1
                    return _warned(await self.endpoint.aexchange(call, deadline, read, progress), attempts), slot
                except BaseException as error:
                    _end_slot(slot, error, attempts)
                    await events.afailed(error, was_sent=progress.phase(error) is Phase.SENT)
                    raise
            except CogViewError as error:
                wait = self._wait_before_next(error, deadline, attempts)
                if wait is None:
                    raise _with_facts(error, body, attempts) from None
                await events.aretrying(error, wait, attempts.made)
            if not attempts.hold:
                await CANCEL_TOKEN.get().await_seconds(wait)

    # --- acquire a slot, then the rate limiter. The time limit of the call starts after both.

    def _acquire_slot(self, body: dict[str, Any], deadline: Deadline, attempts: _Attempts) -> Slot:
        cancelled = CANCEL_TOKEN.get()
        again = deadline if deadline.started else _queue_limit(deadline)
        held: Slot | None = None
        try:
            for limiter, cap, ticket in self._queues(body, attempts):
                slot = limiter.acquire(cap, deadline=again, cancelled=cancelled, ticket=ticket, priority=self.priority)
                held = _inside(slot, held, deadline, cancelled)
            if attempts.hold:
                cancelled.wait(attempts.hold)
            self._acquire_rate_limiter(deadline)
            return _started(held, deadline, attempts, cancelled)
        except BaseException:
            if held is not None:
                held.release()
            raise

    async def _aacquire_slot(self, body: dict[str, Any], deadline: Deadline, attempts: _Attempts) -> Slot:
        cancelled = CANCEL_TOKEN.get()
        again = deadline if deadline.started else None
        token = cancelled if cancelled.has_conditions else None
        held: Slot | None = None
        try:
            for limiter, cap, ticket in self._queues(body, attempts):
                slot = await limiter.aacquire(
                    cap, deadline=again, cancelled=token, ticket=ticket, priority=self.priority
                )
                held = _inside(slot, held, deadline, cancelled)
            if attempts.hold:
                await cancelled.await_seconds(attempts.hold)
            await self._aacquire_rate_limiter(deadline)
            return _started(held, deadline, attempts, cancelled)
        except BaseException:
            if held is not None:
                held.release()
            raise

    def _acquire_rate_limiter(self, deadline: Deadline) -> None:
        if self.rate_limiter and not deadline.started:
            self.rate_limiter.acquire(blocking=True)
            return
        while self.rate_limiter:
            _check_time(deadline)
            if self.rate_limiter.acquire(blocking=False) or CANCEL_TOKEN.get().wait(_LIMITER_POLL_SECONDS):
                return

    async def _aacquire_rate_limiter(self, deadline: Deadline) -> None:
        if self.rate_limiter and not deadline.started:
            await self.rate_limiter.aacquire(blocking=True)
            return
        while self.rate_limiter:
            _check_time(deadline)
            if CANCEL_TOKEN.get().is_set() or await self.rate_limiter.aacquire(blocking=False):
                return
            await asyncio.sleep(_LIMITER_POLL_SECONDS)

    # --- decisions without I/O

    def _limiter(self, model: str, user: str | None = None) -> Limiter:
        key = self.endpoint.api_key.get_secret_value()
        return limiter_for(self.account, model, key, None if user else self.shared_limit, user=user)

    def _queues(self, body: dict[str, Any], attempts: _Attempts) -> Iterator[tuple[Limiter, int, int | None]]:
        """Yield the limiters that a request needs a slot of, in order.

        Yields:
            Each limiter with its cap and the position to keep.
        """
        model, user = body["model"], body.get("user_id")
        if user and self.max_concurrency_per_user:
            yield self._limiter(model, user), self.max_concurrency_per_user, None
        yield self._limiter(model), self.max_concurrency or model_info(model).in_flight, attempts.ticket

    def _wait_before_next(self, error: CogViewError, deadline: Deadline, attempts: _Attempts) -> float | None:
        """Return the seconds to wait before the next attempt; None if the error is final."""
        attempts.hold = 0.0
        if not self.policy.sends_again(error):
            return None
        waits_for_account = self.policy.waits_for_account and is_account_limit(error)
        if waits_for_account:
            attempts.refusals += 1
            attempts.first_refusal = attempts.first_refusal or time.monotonic()
            if deadline.seconds is None and time.monotonic() - attempts.first_refusal > MAX_REFUSED_SECONDS:
                return None
            wait = 0.0 if attempts.queue_is_wait else self.policy.wait_for_account(error, attempts.refusals)
        elif attempts.begun - attempts.refusals > self.policy.max_retries:
            return None
        else:
            wait = 0.0 if attempts.queue_is_wait else self.policy.wait(error, attempts.begun - attempts.refusals)
        if wait > MAX_RETRY_AFTER or not deadline.is_worth_sending(wait):
            return None
        if waits_for_account:
            attempts.hold = wait if error.retry_after is None else 0.0
            self._warn_of_others(error, attempts)
            if attempts.waited_for and is_account_limit(attempts.waited_for[-1]):
                attempts.waited_for.pop()  # there may be many, and one says the same as all
        attempts.waited_for.append(error)
        return wait

    def _warn_of_others(self, error: CogViewError, attempts: _Attempts) -> None:
        """Log, once a minute for each account and model, that a call is refused again and again."""
        model = attempts.model
        if attempts.refusals >= _WARN_AFTER and self._limiter(model).is_time_to_warn():
            logger.warning(
                "A request for %s was refused %s times as one too many in flight (code %s); it waits and is sent again. "
                "Other processes may use the same key: set shared_limit in each, and they divide the limit.",
                model,
                attempts.refusals,
                error.code,
            )


def client_of(
    base_url: str,
    key: SecretStr,
    *,
    max_concurrency: int | None,
    max_concurrency_per_user: int | None,
    priority: Priority | None,
    max_retries: int,
    retry_unknown: bool,
    rate_limiter: RateLimiter | None,
    shared_limit: SharedLimit | None,
    http_client: httpx.Client | None,
    http_async_client: httpx.AsyncClient | None,
) -> ImagesClient:
    """Create a client that uses this package's connections, a sandbox of this process, or injected HTTP clients.

    Returns:
        The client.
    """
    endpoint = Endpoint(
        base_url=SANDBOX_ENDPOINT if is_sandbox(base_url) else base_url,
        api_key=key,
        account=base_url,
        send=sender(base_url, http_client),
        asend=asender(base_url, http_async_client),
    )
    policy = RetryPolicy(max_retries=max_retries, retry_unknown=retry_unknown)
    # Each process has a sandbox of its own, and shares nothing with others.
    shared = None if is_sandbox(base_url) else shared_limit
    return ImagesClient(
        endpoint, base_url, max_concurrency, policy, rate_limiter, shared, max_concurrency_per_user, priority
    )


def is_account_limit(error: BaseException) -> bool:
    """Return whether the service refused a request because too many of the account are in flight (code 1302)."""
    return isinstance(error, CogViewRateLimitError) and error.code == ACCOUNT_LIMIT


def _end_slot(slot: Slot, error: BaseException, attempts: _Attempts) -> None:
    if isinstance(error, CogViewRateLimitError) and not isinstance(error, CogViewBusyError):
        attempts.queue_is_wait = slot.dropped() and error.retry_after is None
    else:
        attempts.queue_is_wait = False
        slot.release()


def _queue_limit(deadline: Deadline) -> Deadline | None:
    """Return the time limit of a sync call in the queue.

    It has one only if it blocks an event loop whose tasks may hold the slots.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return None
    return Deadline(deadline.seconds or _BLOCKED_LOOP_SECONDS)


def _inside(slot: Slot | None, outer: Slot | None, deadline: Deadline, cancelled: CancelToken) -> Slot:
    """Bind a slot to the one that was acquired before it.

    Returns:
        The slot.

    Raises:
        CogViewError: There is no slot: the wait for it has ended.
    """
    if slot is None:
        raise _no_slot(deadline, cancelled=cancelled.is_set())
    slot.outer = outer
    return slot


def _started(slot: Slot | None, deadline: Deadline, attempts: _Attempts, cancelled: CancelToken) -> Slot:
    """Start the time limit of the call, if there is still reason to send the request.

    Returns:
        The slot.

    Raises:
        CogViewStoppedError: The call was cancelled in the queue. Nothing was sent.
    """
    if cancelled.is_set():
        raise CogViewStoppedError
    _check_time(deadline)
    assert slot is not None  # noqa: S101  there is always a limiter
    deadline.start()
    slot.end_after(deadline.remaining())
    attempts.ticket = slot.ticket
    return slot


def _check_time(deadline: Deadline) -> None:
    if not deadline.is_worth_sending():
        raise CogViewTimeoutError(
            f"Too little of the time limit of {deadline.seconds:g} s was left for an answer; the request was not sent."
        )


def _no_slot(deadline: Deadline, *, cancelled: bool = False) -> CogViewError:
    if cancelled:
        return CogViewStoppedError()
    if not deadline.started:
        return CogViewTimeoutError(
            "No other call finished while this one blocked its event loop; nothing was sent.",
            hint="Inside a running event loop, await ainvoke or abatch.",
        )
    return transport_error(Fault.TIMEOUT, Phase.CONNECTING, limit=deadline.seconds)


def _with_facts(error: CogViewError, body: dict[str, Any], attempts: _Attempts) -> CogViewError:
    """Return the error to raise after all attempts, with the facts about the call."""
    unknown = [item for item in attempts.waited_for if item.outcome is Outcome.UNKNOWN]
    if unknown and error.outcome is not Outcome.UNKNOWN:
        # An earlier attempt may have been charged, whatever a later refusal says.
        unknown[-1].add_note(f"A later attempt ended with: {error}")
        error = unknown[-1]
    elif attempts.waited_for and isinstance(error, CogViewTimeoutError):
        # Why another attempt was needed says more than that there was no time for it.
        error = attempts.waited_for[-1]
    if attempts.made or not isinstance(error, CogViewStoppedError):  # nobody can look up a request that was never sent
        error.request_id = body.get("request_id")
    error.attempts = attempts.made
    return error


def _warned(reply: ReplyT, attempts: _Attempts) -> ReplyT:
    count = sum(error.outcome is Outcome.UNKNOWN for error in attempts.waited_for)
    if not count:
        return reply
    earlier = f"{count} earlier attempts" if count > 1 else "An earlier attempt"
    return replace(reply, warnings=(*reply.warnings, f"{earlier} may have been charged too."))  # type: ignore[type-var,attr-defined]
