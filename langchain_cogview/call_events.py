"""One picture on its way: what is written down before it is paid, and the events that tell of it."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from langchain_cogview.concurrency import raised_by_signal
from langchain_cogview.cost import Charge, Money, Reservation
from langchain_cogview.errors import CogViewContentFilterError, CogViewError, CogViewStoppedError, Outcome
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
    from langchain_cogview.content_filter import ContentFilter
    from langchain_cogview.result import GeneratedImage

logger = logging.getLogger(__name__)


class Journal(Protocol):
    """Writes down what is about to be paid, so that a process that dies leaves a trace of it."""

    def sending(self, request_id: str, model: str) -> None:
        """Right before a POST that may be charged: the first to a model, and each after one that may have been charged.

        What it raises stops the call, and nothing is sent.
        """

    async def asending(self, request_id: str, model: str) -> None:
        """The twin of `sending`, without blocking the event loop."""

    def submitted(self, request_id: str, task_id: str, model: str) -> None:
        """A task was accepted by a model, perhaps another than was asked first; its id finds the picture again."""

    async def asubmitted(self, request_id: str, task_id: str, model: str) -> None:
        """Async version of `submitted`."""


JOURNAL: Final[ContextVar[Journal | None]] = ContextVar("cogview_journal", default=None)
"""The journal of the calls made in this context."""


@dataclass(slots=True)
class ImageEvents:
    """Follows one picture on its way: writes the journal, makes and sends the events.

    Attributes:
        dispatcher: Sends the events.
        price: Of a model's picture: amount (None where unknown) and currency.
        prompt: What content filter events hold of it; None: nothing.
        deadline: Of the picture.
        request_id: Of the picture, on every attempt.
        model: Which is asked at the moment.
        reservation: Where each POST that may be charged is counted; None: nowhere.
        sent: Whether a paid POST was about to be sent.
        uncertain: How many POSTs may have been charged without an image, so far.
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
        """What the picture and its file are called: a journal, or the model that asked for it, finds them by it."""
        return self.request_id[:8]

    def sending(self) -> None:
        """The client's word right before each attempt; what it raises stops the call, and nothing is sent."""
        self._commit()
        journal = self._journal()
        if journal:
            journal.sending(self.request_id, self.model)
        first, self.sent = not self.sent, True
        if first and self.dispatcher.has_handlers:
            self.dispatcher.dispatch(self._progress("sent"))

    async def asending(self) -> None:
        """Async version of `sending`."""
        self._commit()
        journal = self._journal()
        if journal:
            await journal.asending(self.request_id, self.model)
        first, self.sent = not self.sent, True
        if first and self.dispatcher.has_handlers:
            await self.dispatcher.adispatch(self._progress("sent"))

    def failed(self, error: BaseException) -> None:
        """The client's word after an attempt that gave no image, and the end of a task that gave none."""
        pending, self._pending = self._pending, False
        if pending and isinstance(error, CogViewError) and error.outcome is not Outcome.UNKNOWN:
            if self._charge is not None:
                self._charge.release()
        elif pending:
            self.uncertain += 1

    def _commit(self) -> None:
        if self.reservation is not None:
            self._charge = self.reservation.commit(Money(*self.price(self.model)))
        self._pending = True

    def _journal(self) -> Journal | None:
        """The journal, where this POST may be charged besides those that it knows of."""
        noted, self._noted = self._noted, (self.model, self.uncertain)
        return None if noted == self._noted else JOURNAL.get()

    def retrying(self, error: CogViewError, wait: float, attempts: int) -> None:
        """The client's word before waiting to send again."""
        if self.dispatcher.has_handlers:
            self.dispatcher.dispatch(self._retry(error, wait, attempts))

    async def aretrying(self, error: CogViewError, wait: float, attempts: int) -> None:
        """The twin of `retrying`."""
        if self.dispatcher.has_handlers:
            await self.dispatcher.adispatch(self._retry(error, wait, attempts))

    def submitted(self, task_id: str) -> None:
        """The client's word once a task was accepted."""
        journal = JOURNAL.get()
        if journal:
            try:
                journal.submitted(self.request_id, task_id, self.model)
            except Exception as error:  # it is paid for: nothing may stop it now
                if raised_by_signal(error):
                    raise
                logger.warning("The task %s could not be written down", task_id, exc_info=error)

    async def asubmitted(self, task_id: str) -> None:
        """Async version of `submitted`."""
        journal = JOURNAL.get()
        if journal:
            try:
                await journal.asubmitted(self.request_id, task_id, self.model)
            except Exception as error:  # it is paid for: nothing may stop it now
                if raised_by_signal(error):
                    raise
                logger.warning("The task %s could not be written down", task_id, exc_info=error)

    def processing(self, task_id: str) -> None:
        """The client's word at each poll of a task that has not ended."""
        if self.dispatcher.has_handlers:
            self.dispatcher.dispatch(self._progress("processing", task_id=task_id))

    async def aprocessing(self, task_id: str) -> None:
        """The twin of `processing`."""
        if self.dispatcher.has_handlers:
            await self.dispatcher.adispatch(self._progress("processing", task_id=task_id))

    def ended_with(self, error: Exception) -> list[Event]:
        """The events of a picture that was not made."""
        if not self.dispatcher.has_handlers or isinstance(error, CogViewStoppedError):  # an interrupt is no failure
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
        """The events of pictures that are safe."""
        if not self.dispatcher.has_handlers:
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
