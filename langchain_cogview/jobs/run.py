"""A job under way: what is taken next, what is written down before and after, and when to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.api.settings import is_sandbox
from langchain_cogview.call_events import JOURNAL
from langchain_cogview.concurrency import CANCEL_TOKEN, in_thread
from langchain_cogview.cost import Charges, Money
from langchain_cogview.errors import (
    CogViewBudgetError,
    CogViewContentFilterError,
    CogViewError,
    CogViewNotFoundError,
    CogViewStoppedError,
    CogViewStorageError,
    CogViewTaskFailedError,
    CogViewTaskUnfinishedError,
    Outcome,
    Scope,
    error_class,
)
from langchain_cogview.images.remote import ImageAccess
from langchain_cogview.jobs.folder import spare_descriptors, unwritable
from langchain_cogview.jobs.manifest import (
    failure_entry,
    found_entry,
    keep,
    linked_image,
    now,
    prompt_line,
    saved_entry,
)
from langchain_cogview.jobs.plan import price_of
from langchain_cogview.request import ImageRequest
from langchain_cogview.result import ImageFailure, ImageResult
from langchain_cogview.tasks import ImageTask
from langchain_cogview.text import visible
from langchain_cogview.worker_pool import aor_error, or_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langchain_core.runnables import RunnableConfig

    from langchain_cogview.cost import Budget
    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.jobs.folder import JobFolder, RecordFile
    from langchain_cogview.jobs.plan import Survey, Work
    from langchain_cogview.jobs.prompts import PromptItem
    from langchain_cogview.result import GeneratedImage

MAX_NOT_RUN: Final = 5
"""Prompts in a row of which nothing ran (no network, service overloaded or unavailable), after which the job stops."""
FILES_PER_IMAGE: Final = 4
"""Open files that one image in flight takes: two connections, its file, and the folder while it gets its name."""
STOPPING: Final = frozenset({Scope.ACCOUNT, Scope.LOCAL, Scope.CANCELLED})
"""Scopes of errors that every other prompt would meet too."""
_PROMPT_CHARACTERS: Final = 200
_NO_LINE: Final[dict[str, Any]] = {"images": [], "failures": [], "given_up": [], "request_ids": [], "seconds": 0.0}
logger = logging.getLogger(__name__)


class JobRun:
    """A folder's job, while its lock is held.

    Args:
        folder: Locked.
        attempts: Its file of what was sent, open for writing.
        manifest: Its file of what is finished, open for writing.
        generator: Saves into the folder.
        survey: What is left.
        budget: What may be spent.
        limit: How many prompts to draw; None: all.

    Attributes:
        stopped: Why nothing more is sent.
        over_budget: Whether a prompt was left because of the budget.
        errors: Names of the classes of errors that are not in the manifest, counted.
        made: Pictures that were made or recovered.
        charges: What those cost.
    """

    def __init__(
        self,
        folder: JobFolder,
        generator: CogViewImageGenerator,
        survey: Survey,
        budget: Budget,
        *,
        attempts: RecordFile,
        manifest: RecordFile,
        limit: int | None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.generator = generator
        self.survey = survey
        self.stopped: Exception | None = None
        self.asked_to_stop: threading.Event | None = None
        self.over_budget = False
        self.errors: Counter[str] = Counter()
        self.made = 0
        self.charges = Charges()
        self._budget = budget
        self._limit = limit
        self._next = self._started = self._not_run = 0
        self._given_back = False
        self._lock = threading.RLock()
        self._defaults = {name: getattr(generator, name) for name in ImageRequest.model_fields if name != "prompt"}
        self._base_url = generator.resolved_base_url
        self._attempts = attempts

    def close(self) -> None:
        """End: what is still under way sends and writes nothing more."""
        self.stop(CogViewStoppedError())

    def stop(self, error: Exception) -> None:
        """Send nothing more; what is in flight may end."""
        with self._lock:
            self.stopped = self.stopped or error

    @property
    def halts(self) -> bool:
        """Whether nothing more is sent: an error stopped the job, or its caller asked for it."""
        return self.stopped is not None or (self.asked_to_stop is not None and self.asked_to_stop.is_set())

    @contextmanager
    def cancel_token(self) -> Iterator[None]:
        """In this block no request is sent once the job halts."""
        token = CANCEL_TOKEN.set(CANCEL_TOKEN.get().child(lambda: self.halts))
        try:
            yield
        finally:
            CANCEL_TOKEN.reset(token)

    # --- what is next

    def free(self) -> Iterator[Work]:
        """Work that costs nothing: tasks of the service, and links that may still be valid."""
        for item in self.survey.prompts.items:
            work = self._work(item)
            if work.free and not self.halts:
                yield work

    def draws(self) -> Iterator[Work]:
        """What is to be drawn, as far as limit and budget reach, from where the last pass ended."""
        items = self.survey.prompts.items
        while self._next < len(items) and not self.halts:
            work = self._work(items[self._next])
            if work.draw:
                if self._limit is not None and self._started >= self._limit:
                    return
                try:
                    work.reservation = self._budget.reserve(price_of(self.generator, work.item.model), work.draw)
                except CogViewBudgetError:
                    self.over_budget = True
                    return
                self.over_budget = False
                self._started += 1
            self._next += 1
            if work.draw:
                yield work

    def reaches_further(self) -> bool:
        """Whether what the budget did not reach for should be tried again: something that it counted was not made."""
        again = self._given_back and self.over_budget and not self.halts
        self._given_back = False
        return again

    def _work(self, item: PromptItem) -> Work:
        with self._lock:
            return self.survey.work(item)

    # --- one prompt, twice: only "invoke" and "wait" differ

    def draw(self, work: Work, config: RunnableConfig) -> None:
        """Draw the pictures of a prompt that are missing, and write down what became of them."""
        call = Call(self, work, draws=True)
        if self.halts:
            self._give_back(call, 0)
            return
        with call.journaled():
            outcome = or_error(
                self.generator.invoke, {**work.item.said, "n": work.draw}, config, budget=work.reservation
            )
        self._finish(call, outcome)

    async def adraw(self, work: Work, config: RunnableConfig) -> None:
        """The twin of `draw`."""
        call = Call(self, work, draws=True)
        if self.halts:
            self._give_back(call, 0)
            return
        with call.journaled():
            outcome = await aor_error(
                self.generator.ainvoke, {**work.item.said, "n": work.draw}, config, budget=work.reservation
            )
        await in_thread(self._finish, call, outcome)

    def collect(self, work: Work, config: RunnableConfig) -> None:
        """Have what is free for a prompt."""
        for call, task in self._tasks(work):
            self._collected(call, or_error(task.result, config, timeout=self.generator.timeout))
        for call, number, image in self._links(work):
            self._fetched(call, number, image, or_error(image.read))

    async def acollect(self, work: Work, config: RunnableConfig) -> None:
        """The twin of `collect`."""
        for call, task in self._tasks(work):
            outcome = await aor_error(task.aresult, config, timeout=self.generator.timeout)
            await in_thread(self._collected, call, outcome)
        links: list[tuple[Call, int, GeneratedImage]] = await in_thread(lambda: list(self._links(work)))
        for call, number, image in links:
            await in_thread(self._fetched, call, number, image, await aor_error(image.aread))

    # --- before

    def note_sending(self, item: PromptItem, request_id: str, model: str) -> None:
        """Write down that a request is about to be paid.

        Raises:
            CogViewError: The job stops, or it cannot be written down: it must not be sent.
        """
        if CANCEL_TOKEN.get().is_set():
            raise CogViewStoppedError
        prompt = " ".join(str(item.said["prompt"]).split())[:_PROMPT_CHARACTERS]
        values = {"key": item.key, "line": item.number, "request_id": request_id, "model": model, "prompt": prompt}
        try:
            self.folder.check()
            self.manifest.check()
            if spare_descriptors() in range(FILES_PER_IMAGE):
                raise CogViewStorageError(  # noqa: TRY301
                    "This process may open no further files; nothing more was sent.",
                    hint="Close files, or raise the limit (ulimit -n), then run the job again.",
                )
            self.note({**values, "at": now()})
        except CogViewStorageError as error:
            self.stop(error)
            raise

    def note(self, values: dict[str, Any]) -> None:
        """Append to the attempts."""
        self._attempts.append(values)
        with self._lock:
            self.survey.history.note(values)

    def _tasks(self, work: Work) -> Iterator[tuple[Call, ImageTask]]:
        for attempt in work.running:
            request = self._request(work.item).model_copy(update={"n": 1, "model": attempt.model})
            task = ImageTask(
                attempt.task_id or "", generator=self.generator, request=request, request_id=attempt.request_id
            )
            yield Call(self, work, sent={attempt.request_id: attempt.model}), task

    def _links(self, work: Work) -> Iterator[tuple[Call, int, GeneratedImage]]:
        finished = self._work(work.item).finished
        failures = self.manifest.read(finished.start, finished.size)["failures"] if finished and finished.links else []
        # From the last on: an entry that is taken out leaves the places of those before it as they are.
        for number, failure in reversed([*enumerate(failures)]):
            image = linked_image(failure, work.item.said["prompt"])
            if image:
                image.with_content(None, ImageAccess(self._base_url, self.generator.allowed_image_hosts))
                yield Call(self, work), number, image

    def _request(self, item: PromptItem) -> ImageRequest:
        return ImageRequest.model_validate({**self._defaults, **item.said})

    # --- after

    def enter_found(self) -> None:
        """Enter the pictures that are in the folder already."""
        for item in self.survey.prompts.items:
            work = self.survey.work(item)
            if work.found:
                call = Call(self, work, sent={each.attempt.request_id: each.attempt.model for each in work.found})
                self._guarded(call, self._enter_found, call)

    def _enter_found(self, call: Call) -> None:
        sandbox = self.survey.history.sandbox or is_sandbox(self._base_url)
        entries = []
        for found in call.work.found:
            self.folder.sync(found.path.name)
            price = self.generator.price(found.attempt.model)
            entries.append(found_entry(found, price[0] if price else None, sandbox=sandbox))
        self._enter(call, entries, [], {*call.sent})

    def _finish(self, call: Call, outcome: Any) -> None:
        self._guarded(call, self._judge, call, outcome)

    def _guarded(self, call: Call, write: Callable[..., None], *arguments: Any) -> None:
        """Stop the job where something cannot be written down; the attempts say that it was sent."""
        try:
            write(*arguments)
        except Exception as error:  # noqa: BLE001  told at the end
            self._stop_unwritten(call, unwritable(self.folder.path, error) if isinstance(error, OSError) else error)

    def _stop_unwritten(self, call: Call, error: Exception) -> None:
        """Stop, and tell where the pictures are, here and at the end: of the first error and of all that follow."""
        notes = getattr(error, "__notes__", ())
        with self._lock:
            closed = isinstance(self.stopped, CogViewStoppedError)
            self.stop(error)
            if self.stopped is not None and self.stopped is not error:
                for note in notes:
                    self.stopped.add_note(note)
        if notes or not closed:
            told = " ".join((str(error), *notes))
            logger.warning(
                "Line %s: what became of it could not be written down. %s", call.work.item.number, visible(told)
            )

    def _judge(self, call: Call, outcome: Any) -> None:
        """Write down what became of a call that paid."""
        failures, unknown = failures_of(call, outcome)
        images = list(outcome.images) if isinstance(outcome, ImageResult) else []
        ends = {each.request_id: str(each.outcome) for each in failures}
        failures = [each for each in failures if each.scope is not Scope.CANCELLED]
        self._look_for_stops(call, outcome, failures)
        own = [failure for failure in failures if is_the_prompts(failure, call.work.item)]
        others = [failure for failure in failures if failure not in own]
        with self._lock:
            self.errors.update(failure.error for failure in others)
        told = [failure_entry(each, call.sent.get(each.request_id or "", call.work.item.model)) for each in own]
        self._give_back(call, sum(not image.cached for image in images) + len(unknown))
        entries, elsewhere = self._keep(call, images)
        settled = call.sent.keys() - unknown - elsewhere
        if entries or told:
            made = [each for each in entries if "file" in each]
            self._enter(call, made, told + [each for each in entries if "file" not in each], settled)
            return
        for each in settled:
            self.note({"key": call.work.item.key, "request_id": each, "settled": ends.get(each, Outcome.FINAL)})

    def _collected(self, call: Call, outcome: Any) -> None:
        """Write down what became of a task that was paid before. Where its end was not seen, it can be asked again."""
        if isinstance(outcome, ImageResult | CogViewTaskFailedError | CogViewContentFilterError):
            self._finish(call, outcome)
        elif isinstance(outcome, CogViewNotFoundError):  # then it is like any request without an answer
            for request_id in call.sent:
                end = {"key": call.work.item.key, "request_id": request_id, "task_id": None}
                self._guarded(call, self.note, end)
        elif isinstance(outcome, Exception):
            with self._lock:
                self.errors[type(outcome).__name__] += 1
                if isinstance(outcome, CogViewTaskUnfinishedError):
                    self.survey.unfinished.update(call.sent)
            if isinstance(outcome, CogViewError) and outcome.scope in STOPPING:
                self.stop(outcome)

    def _fetched(self, call: Call, number: int, image: GeneratedImage, content: Any) -> None:
        """Enter a picture that was had from its link after all."""
        if isinstance(content, bytes):
            entry = partial(saved_entry, self.folder, image, content)
            self._guarded(call, lambda: self._enter(call, [entry()], [], set(), without=number))

    def _keep(self, call: Call, images: list[GeneratedImage]) -> tuple[list[dict[str, Any]], set[str]]:
        """The entries of pictures that are safe, and the requests of those whose bytes are elsewhere than in the folder."""
        entries, elsewhere = [], set()
        for image in images:  # one that cannot be written keeps none of the others
            kept = keep(self.folder, image)
            if kept.problem:
                self._stop_unwritten(call, kept.problem)
            if kept.entry:
                entries.append(kept.entry)
            else:
                elsewhere.add(image.request_id)
        return entries, elsewhere

    def _look_for_stops(self, call: Call, outcome: Any, failures: list[ImageFailure]) -> None:
        if not failures and isinstance(outcome, CogViewStoppedError):
            return
        none_ran = isinstance(outcome, Exception) and all(each.outcome is Outcome.NOT_RUN for each in failures)
        with self._lock:
            self._not_run = self._not_run + 1 if none_ran else 0
            stops = self._not_run >= MAX_NOT_RUN
        fatal = [each for each in failures if befalls_all(each, call.work.item)]
        if isinstance(outcome, OSError):  # no further file can be opened, not even for a connection
            self.stop(unwritable(self.folder.path, outcome))
        elif isinstance(outcome, Exception) and not isinstance(outcome, CogViewError):
            self.stop(outcome)
        elif fatal or stops:
            first = [*fatal, *failures][0]
            # The raised error is that of one of the pictures, and says more than its record.
            self.stop(outcome if type(outcome) is error_class(first.error) else error_of(first))

    def _give_back(self, call: Call, paid: int) -> None:
        held = call.work.reservation
        if held is not None:
            held.release()
        with self._lock:
            if call.draws:
                self._given_back = self._given_back or (held is not None and held.released > 0)
            elif paid < call.reserved:  # a task that was counted as paid made no image
                self._budget.release(price_of(self.generator, call.work.item.model), call.reserved - paid)
                self._given_back = True

    def _enter(
        self,
        call: Call,
        images: list[dict[str, Any]],
        failures: list[dict[str, Any]],
        settled: set[str],
        *,
        without: int | None = None,
    ) -> None:
        """Write the prompt's line into the manifest, with what it had before."""
        work = call.work
        with self._lock:
            finished = self.survey.history.finished.get(work.item.key)
            requests = [*self.survey.history.open.get(work.item.key, ())]
        # No lock from here on: while the disk is waited for, others go on. Nobody else writes this prompt's line.
        old = self.manifest.read(finished.start, finished.size) if finished else _NO_LINE
        kept = [each for number, each in enumerate(old["failures"]) if number != without]
        given_up = list(old["given_up"])
        if call.draws and work.repeats_failed:
            given_up += [{name: each[name] for name in ("request_id", "model")} for each in kept if each.get("url")]
            kept = []
        if call.draws and work.repeats_unknown:
            given_up += [{"request_id": each.request_id, "model": each.model} for each in work.unknown]
        given_up += call.repeated
        ids = dict.fromkeys([*old["request_ids"], *sorted(settled), *(each["request_id"] for each in given_up)])
        values = {
            **prompt_line(
                work.item,
                self._request(work.item),
                [*old["images"], *images],
                [*kept, *failures],
                price_of(self.generator, work.item.model).currency,
                unknown=any(each not in ids for each in requests),
            ),
            "given_up": given_up,
            "request_ids": [*ids],
            "seconds": round(old["seconds"] + call.seconds, 3),
            "finished": now(),
        }
        place = self.manifest.append(values)
        with self._lock:
            self.survey.history.take(*place, values)
            self.made += len(images)
            for image in images:
                self.charges.add(Money.of({"cost": image["cost"], "currency": values["currency"]}))


# --- one call


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
