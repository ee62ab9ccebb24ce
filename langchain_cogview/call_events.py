"""Follow one paid call: the budget, the journal of what may be charged, and the events."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from langchain_cogview.concurrency import raised_by_signal
from langchain_cogview.cost import Charge, Money, Reservation
from langchain_cogview.errors import CogViewContentFilterError, CogViewError, CogViewStoppedError, Outcome, printable
from langchain_cogview.events import (
    GENERATED_EVENT,
    PROGRESS_EVENT,
    RETRY_EVENT,
    Event,
    EventDispatcher,
    GeneratedPayload,
    content_filter_event,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from decimal import Decimal

    from langchain_cogview.concurrency import Deadline
    from langchain_cogview.errors import ContentFilter
    from langchain_cogview.result import GeneratedImage

logger = logging.getLogger(__name__)


class Journal(Protocol):
    """Records what is about to be charged, so that a process that dies leaves a trace."""

    def sending(self, request_id: str, model: str) -> None:
        """Record a POST that may be charged, right before it is sent.

        It is called for the first POST to a model, and for every POST after one that may have been charged. An exception
        ends the call, and nothing is sent.

        Args:
            request_id: The request id that this client generated.
            model: The model that is asked.
        """

    async def asending(self, request_id: str, model: str) -> None:
        """Async version of `sending`."""

    def not_sent(self, request_id: str, model: str) -> None:
        """Record that the caller left, by a cancelled task or an interrupt, before anything of the POST was sent.

        Args:
            request_id: The request id that this client generated.
            model: The model that was to be asked.
        """

    async def anot_sent(self, request_id: str, model: str) -> None:
        """Async version of `not_sent`."""

    def submitted(self, request_id: str, task_id: str, model: str) -> None:
        """Record a task that was accepted, by whose id its image is found again.

        Args:
            request_id: The request id that this client generated.
            task_id: The id of the task.
            model: The model that accepted the task; it may be a fallback model.
        """

    async def asubmitted(self, request_id: str, task_id: str, model: str) -> None:
        """Async version of `submitted`."""


JOURNAL: Final[ContextVar[Journal | None]] = ContextVar("cogview_journal", default=None)
"""The journal of the calls made in this context."""


@dataclass(slots=True)
class ImageEvents:
    """Follows one paid call: counts it in the budget, writes the journal, makes and sends the events.

    Attributes:
        dispatcher: Sends the events.
        price: Returns the price of an image of a model: amount (None: unknown) and currency.
        prompt: The prompt for content filter events; None: they hold no prompt.
        deadline: The deadline of the call.
        request_id: The request id that this client generated, the same for every attempt.
        model: The model that is asked.
        reservation: Where every POST that may be charged is counted; None: nowhere.
        sent: Whether a POST was sent.
        uncertain: Number of POSTs that may have been charged without an image.
    """

    dispatcher: EventDispatcher
    price: Callable[[str], tuple[Decimal | None, str]]
    prompt: str | None
    deadline: Deadline
    request_id: str
    model: str
    reservation: Reservation | None = None
    sent: bool = False
    uncertain: int = 0
    _charge: Charge | None = None
    _pending: bool = False
    _noted: tuple[str, int] | None = None

    @property
    def label(self) -> str:
        """The id of the image, and a part of its file name: the beginning of the request id."""
        return self.request_id[:8]

    def sending(self) -> None:
        """Handle an attempt that is about to be sent. An exception ends the call, and nothing is sent."""
        self._commit()
        journal = self._journal()
        if journal:
            journal.sending(self.request_id, self.model)
        first, self.sent = not self.sent, True
        if first and self.dispatcher.is_active:
            self.dispatcher.dispatch(self._progress("sent"))

    async def asending(self) -> None:
        """Async version of `sending`."""
        self._commit()
        journal = self._journal()
        if journal:
            await journal.asending(self.request_id, self.model)
        first, self.sent = not self.sent, True
        if first and self.dispatcher.is_active:
            await self.dispatcher.adispatch(self._progress("sent"))

    def failed(self, error: BaseException, *, was_sent: bool = True) -> None:
        """Handle an attempt, or a task, that ended without an image.

        Args:
            error: Why there is no image.
            was_sent: Whether a part of the request may have been sent; if not, nothing is charged, whatever the error is.
        """
        journal = self._ended(error, was_sent=was_sent)
        if journal:
            try:
                journal.not_sent(self.request_id, self.model)
            except Exception as failure:  # noqa: BLE001  the caller needs the first exception
                self._not_recorded(f"request {self.request_id}", failure)

    async def afailed(self, error: BaseException, *, was_sent: bool = True) -> None:
        """Async version of `failed`."""
        journal = self._ended(error, was_sent=was_sent)
        if journal:
            try:
                await journal.anot_sent(self.request_id, self.model)
            except Exception as failure:  # noqa: BLE001  the caller needs the first exception
                self._not_recorded(f"request {self.request_id}", failure)

    def _ended(self, error: BaseException, *, was_sent: bool) -> Journal | None:
        """Count the end of an attempt. Returns the journal if it has to record that the POST was not sent."""
        pending, self._pending = self._pending, False
        is_free = not was_sent or (isinstance(error, CogViewError) and error.outcome is not Outcome.UNKNOWN)
        if pending and is_free:
            if self._charge is not None:
                self._charge.release()
        elif pending:
            self.uncertain += 1
        # An error of this package reaches the journal's owner; a coroutine that is closed cannot wait for a record.
        if was_sent or self.uncertain or isinstance(error, CogViewError | GeneratorExit):
            return None
        return JOURNAL.get()

    def _commit(self) -> None:
        if self.reservation is not None:
            self._charge = self.reservation.commit(Money(*self.price(self.model)))
        self._pending = True

    def _journal(self) -> Journal | None:
        """The journal, unless it holds this POST already."""
        noted, self._noted = self._noted, (self.model, self.uncertain)
        return None if noted == self._noted else JOURNAL.get()

    def retrying(self, error: CogViewError, wait: float, attempts: int) -> None:
        """Handle a wait before the next attempt.

        Args:
            error: Why the attempt before failed.
            wait: Seconds until the next attempt.
            attempts: Number of attempts so far.
        """
        if self.dispatcher.is_active:
            self.dispatcher.dispatch(self._retry(error, wait, attempts))

    async def aretrying(self, error: CogViewError, wait: float, attempts: int) -> None:
        """Async version of `retrying`."""
        if self.dispatcher.is_active:
            await self.dispatcher.adispatch(self._retry(error, wait, attempts))

    def submitted(self, task_id: str) -> None:
        """Handle a task that was accepted.

        Args:
            task_id: The id of the task.
        """
        journal = JOURNAL.get()
        if journal:
            try:
                journal.submitted(self.request_id, task_id, self.model)
            except Exception as error:  # noqa: BLE001  the task may be charged, and nothing may stop it now
                self._not_recorded(f"task {printable(task_id)}", error)

    async def asubmitted(self, task_id: str) -> None:
        """Async version of `submitted`."""
        journal = JOURNAL.get()
        if journal:
            try:
                await journal.asubmitted(self.request_id, task_id, self.model)
            except Exception as error:  # noqa: BLE001  the task may be charged, and nothing may stop it now
                self._not_recorded(f"task {printable(task_id)}", error)

    def _not_recorded(self, subject: str, error: Exception) -> None:
        if raised_by_signal(error):
            raise error
        logger.warning("The %s could not be recorded in the journal.", subject, exc_info=error)

    def processing(self, task_id: str) -> None:
        """Handle a poll of a task that has not ended.

        Args:
            task_id: The id of the task.
        """
        if self.dispatcher.is_active:
            self.dispatcher.dispatch(self._progress("processing", task_id=task_id))

    async def aprocessing(self, task_id: str) -> None:
        """Async version of `processing`."""
        if self.dispatcher.is_active:
            await self.dispatcher.adispatch(self._progress("processing", task_id=task_id))

    def ended_with(self, error: Exception) -> list[Event]:
        """Make the events of an image that was not made.

        Args:
            error: Why it was not made.

        Returns:
            The events.
        """
        if not self.dispatcher.is_active or isinstance(error, CogViewStoppedError):  # an interrupt is not a failure
            return []
        blocked = isinstance(error, CogViewContentFilterError)
        facts = {
            "error": type(error).__name__,
            "blocked": blocked,
            "outcome": str(getattr(error, "outcome", Outcome.FINAL)),
            "scope": str(error.scope) if isinstance(error, CogViewError) else None,
            "is_retryable": isinstance(error, CogViewError) and error.is_retryable,
            "task_id": getattr(error, "task_id", None),
            "uncertain": self.uncertain,
        }
        events = [self._progress("failed", **facts)]
        if isinstance(error, CogViewContentFilterError):
            events.append(self._filtered(error.content_filter, blocked=True))
        return events

    def made(self, images: list[GeneratedImage]) -> list[Event]:
        """Make the events of images that are saved, or in memory.

        Args:
            images: The images of the call.

        Returns:
            The events.
        """
        if not self.dispatcher.is_active:
            return []
        events: list[Event] = [(GENERATED_EVENT, GeneratedPayload(image)) for image in images]
        if images and images[0].content_filter:
            events.append(self._filtered(images[0].content_filter, blocked=False))
        return events

    def _progress(self, stage: str, **facts: Any) -> Event:
        amount, currency = self.price(self.model)
        return PROGRESS_EVENT, {
            "stage": stage,
            "request_id": self.request_id,
            "model": self.model,
            "elapsed": round(self.deadline.elapsed, 3),
            "task_id": None,
            "error": None,
            "blocked": False,
            "uncertain": 0,
            "outcome": None,
            "scope": None,
            "is_retryable": None,
            "cost": None if amount is None else str(amount),
            "currency": currency,
            **facts,
        }

    def _retry(self, error: CogViewError, wait: float, attempts: int) -> Event:
        return RETRY_EVENT, {
            "request_id": self.request_id,
            "model": self.model,
            "attempt": attempts,
            "wait": round(wait, 3),
            "error": type(error).__name__,
            "outcome": str(error.outcome),
            "scope": str(error.scope),
            "is_retryable": error.is_retryable,
            "code": error.code,
            "status": error.status,
        }

    def _filtered(self, entries: tuple[ContentFilter, ...], *, blocked: bool) -> Event:
        return content_filter_event(
            entries,
            blocked=blocked,
            model=self.model,
            request_id=self.request_id,
            prompt=self.prompt,
        )
