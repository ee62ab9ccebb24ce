"""One call for one prompt of a job: what it sends is written down, and what became of it is judged."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.call_events import JOURNAL
from langchain_cogview.concurrency import in_thread
from langchain_cogview.errors import CogViewError, Outcome, Scope, error_class
from langchain_cogview.result import ImageFailure, ImageResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_cogview.jobs.plan import PromptItem
    from langchain_cogview.jobs.run import JobRun
    from langchain_cogview.jobs.survey import Work


STOPPING: Final = frozenset({Scope.ACCOUNT, Scope.LOCAL, Scope.CANCELLED})
"""Scopes of errors that every other prompt would meet too."""


class Call:
    """One call for one prompt, and the journal of what it sends.

    Attributes:
        work: What it is for.
        draws: Whether it pays; else it only asks for what was paid before.
        reserved: How many pictures the budget has counted for it.
        sent: The requests that were written down, by id, with the model asked.
        repeated: The requests that were sent again though they may have been charged, one entry for each time.
    """

    def __init__(self, run: JobRun, work: Work, *, draws: bool = False, sent: dict[str, str] | None = None) -> None:
        self.work = work
        self.draws = draws
        self.sent = sent or {}
        self.repeated: list[dict[str, str]] = []
        self.reserved = work.draw if draws else len(self.sent)
        self._run = run
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the first request was sent, else since the beginning."""
        return round(time.monotonic() - self._started, 3)

    def sending(self, request_id: str, model: str) -> None:
        """The generator's word right before it pays."""
        if not self.sent:
            self._started = time.monotonic()
        self._run.note_sending(self.work.item, request_id, model)
        if self.sent.get(request_id) == model:
            self.repeated.append({"request_id": request_id, "model": model})
        self.sent[request_id] = model

    async def asending(self, request_id: str, model: str) -> None:
        """Async version of `sending`: a thread waits for the disk."""
        await in_thread(self.sending, request_id, model)

    def submitted(self, request_id: str, task_id: str, model: str) -> None:
        """The generator's word once the service took a task, for a model that may be another than was asked first."""
        self.sent[request_id] = model
        self._run.note({"key": self.work.item.key, "request_id": request_id, "task_id": task_id, "model": model})

    async def asubmitted(self, request_id: str, task_id: str, model: str) -> None:
        """Async version of `submitted`."""
        await in_thread(self.submitted, request_id, task_id, model)

    @contextmanager
    def journaled(self) -> Iterator[None]:
        """Hear what is sent in this block."""
        token = JOURNAL.set(self)
        try:
            yield
        finally:
            JOURNAL.reset(token)


def failures_of(call: Call, outcome: Any) -> tuple[list[ImageFailure], set[str]]:
    """What failed in a call, one for each picture, and which of its requests may have been charged without a picture."""
    images = outcome.images if isinstance(outcome, ImageResult) else ()
    failures: list[ImageFailure] = list(getattr(outcome, "failures", ()))
    if not failures and isinstance(outcome, Exception):  # it befell all of them
        failures = [ImageFailure.of(outcome, index) for index in range(max(1, call.reserved))]
    if not call.draws:  # the end of a task does not tell under which request it was submitted
        failures = [each.model_copy(update={"request_id": next(iter(call.sent), None)}) for each in failures]
    told = {each.request_id for each in images} | {each.request_id for each in failures}
    # Each request that is not told is of a failure without an id: it may have been charged if one of those may.
    nameless = [each for each in failures if each.request_id is None]
    ended = len(nameless) >= len(call.sent.keys() - told) and not any(may_be_charged(each) for each in nameless)
    unknown = {each.request_id for each in failures if may_be_charged(each)} | (
        set() if ended else call.sent.keys() - told
    )
    return failures, {each for each in call.sent if each in unknown}


def is_the_prompts(failure: ImageFailure, item: PromptItem) -> bool:
    """Whether a failure is the prompt's own, so that it is not drawn again by itself; what did not run is nobody's."""
    final = failure.outcome is Outcome.FINAL and not may_be_charged(failure)
    return final and not befalls_all(failure, item)


def may_be_charged(failure: ImageFailure) -> bool:
    """Whether its picture may be paid for; an error that is none of ours does not tell."""
    return failure.outcome is Outcome.UNKNOWN or failure.scope is None


def befalls_all(failure: ImageFailure, item: PromptItem) -> bool:
    """Whether every other prompt would fail alike."""
    wrong_model = failure.scope is Scope.MODEL and "model" not in item.said
    return wrong_model or failure.scope in STOPPING


def error_of(failure: ImageFailure) -> CogViewError:
    """The error that a failure is the record of."""
    kind = error_class(failure.error) or CogViewError
    facts = {name: getattr(failure, name) for name in ("hint", "code", "status", "request_id")}
    return kind(failure.message, **facts)
