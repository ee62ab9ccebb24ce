"""One call for one prompt of a job: what it sends is written down, and what became of it is judged."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview import errors
from langchain_cogview.errors import CogViewError, CogViewNotFoundError, Outcome
from langchain_cogview.result import ImageFailure, ImageResult
from langchain_cogview.watch import JOURNAL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_cogview.jobs.plan import PromptItem
    from langchain_cogview.jobs.run import JobRun
    from langchain_cogview.jobs.survey import Work


class JobStoppedError(CogViewError):
    """When the job stops before a request was sent."""

    outcome = Outcome.NOT_RUN
    default_message = "The job stopped before the request was sent."


NOT_THE_PROMPTS: Final = frozenset(
    {
        "CogViewAuthenticationError",
        "CogViewPermissionError",
        "CogViewBalanceError",
        "CogViewConfigurationError",
        "CogViewStorageError",
        JobStoppedError.__name__,
    }
)
"""What would befall every other prompt too."""


class Call:
    """One call for one prompt, and the journal of what it sends.

    Attributes:
        work: What it is for.
        draws: Whether it pays; else it only asks for what was paid before.
        reserved: How many pictures the purse has counted for it.
        sent: The requests that were written down, by id, with the model asked.
    """

    def __init__(self, run: JobRun, work: Work, *, draws: bool = False, sent: dict[str, str] | None = None) -> None:
        self.work = work
        self.draws = draws
        self.sent = sent or {}
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
        self.sent[request_id] = model

    def submitted(self, request_id: str, task_id: str) -> None:
        """The generator's word once the service took a task."""
        self._run.note({"key": self.work.item.key, "request_id": request_id, "task_id": task_id})

    @contextmanager
    def journaled(self) -> Iterator[None]:
        """Hear what is sent in this block."""
        token = JOURNAL.set(self)
        try:
            yield
        finally:
            JOURNAL.reset(token)


def failures_of(call: Call, outcome: Any) -> tuple[list[ImageFailure], set[str]]:
    """What failed in a call, and which of its requests may have been charged without a picture."""
    if isinstance(outcome, ImageResult):
        # A failure that is none of ours does not tell its request.
        told = {each.request_id for each in outcome.images} | {each.request_id for each in outcome.failures}
        unknown = {each.request_id for each in outcome.failures if each.outcome is Outcome.UNKNOWN}
        return list(outcome.failures), {each for each in call.sent if each in unknown or each not in told}
    first = ImageFailure.of(outcome, 0)
    if not isinstance(outcome, CogViewError) or outcome.outcome is Outcome.UNKNOWN:
        return [first], {*call.sent}
    # One whose outcome is unknown would have been raised first: none of them is.
    others: list[str | None] = [each for each in call.sent if each != outcome.request_id]
    others += [None] * (call.reserved - 1 - len(others))
    return [first, *(first.model_copy(update={"request_id": each}) for each in others[: call.reserved - 1])], set()


def befalls_all(failure: ImageFailure, item: PromptItem) -> bool:
    """Whether every other prompt would fail alike."""
    wrong_model = failure.error == CogViewNotFoundError.__name__ and "model" not in item.said
    return wrong_model or failure.error in NOT_THE_PROMPTS


def error_of(failure: ImageFailure) -> CogViewError:
    """The error that a failure is the record of."""
    kind = getattr(errors, failure.error, CogViewError)
    facts = {name: getattr(failure, name) for name in ("hint", "code", "status", "request_id")}
    return kind(failure.message, **facts)
