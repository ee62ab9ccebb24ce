"""Run a job: choose the next work item, record each request before and after it is sent, and stop where needed."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.budget import JOURNAL
from langchain_cogview.concurrency import CANCEL_TOKEN, batch_work, in_thread
from langchain_cogview.cost import Charges, Money
from langchain_cogview.errors import (
    ACCOUNT_LIMIT,
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
from langchain_cogview.jobs.files import ImageFolders, recovered_record, save_image, spare_descriptors, write_image
from langchain_cogview.jobs.folder import write_error
from langchain_cogview.jobs.manifest import failure_record, image_with_link, manifest_record, now
from langchain_cogview.jobs.plan import price_of
from langchain_cogview.jobs.prompts import cost_text
from langchain_cogview.jobs.report import ContactSheet
from langchain_cogview.pools import aor_error, or_error
from langchain_cogview.request import ImageRequest
from langchain_cogview.result import ImageFailure, ImageResult, with_content
from langchain_cogview.tasks import ImageTask
from langchain_cogview.text import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langchain_core.runnables import RunnableConfig

    from langchain_cogview.budget import Budget
    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.jobs.folder import JobFolder, RecordFile
    from langchain_cogview.jobs.items import PromptItem
    from langchain_cogview.jobs.plan import Backlog, WorkItem
    from langchain_cogview.result import GeneratedImage

MAX_NOT_RUN: Final = 5
"""The job stops after this many prompts in a row whose requests did not run (no network, service overloaded)."""
FILES_PER_IMAGE: Final = 4
"""Open files that one image in flight needs: two connections, its file, and the folder while the file is named."""
STOPPING_SCOPES: Final = frozenset({Scope.ACCOUNT, Scope.LOCAL, Scope.CANCELLED})
"""Scopes of errors that every other prompt would have too."""
_PROMPT_CHARACTERS: Final = 200
_NO_LINE: Final[dict[str, Any]] = {"images": [], "failures": [], "given_up": [], "request_ids": [], "seconds": 0.0}
logger = logging.getLogger(__name__)


class JobRun:
    """A job in its locked folder.

    `claim` records a paid request before it is sent; `settle` and `finish` record how requests and prompts end.
    """

    def __init__(
        self,
        folder: JobFolder,
        generator: CogViewImageGenerator,
        backlog: Backlog,
        budget: Budget,
        *,
        attempts: RecordFile,
        manifest: RecordFile,
        limit: int | None,
    ) -> None:
        self.folder = folder
        self.folders = ImageFolders(folder)
        self.manifest = manifest
        self.generator = generator
        self.backlog = backlog
        self.stopped: Exception | None = None  # why nothing more is sent; None while the job runs
        self.stop_event: threading.Event | None = None  # set by the caller to stop the job
        self.over_budget = False  # whether a prompt was left out because of the budget
        self.errors: Counter[str] = Counter()  # by class name, without those in the manifest
        self.made = 0  # number of images that were generated or recovered
        self.charges, self.list_prices = Charges(), Charges()  # of these images
        self._budget = budget
        self._limit = limit
        self._next = self._started = self._not_run = 0
        self._has_released = False
        self._lock = threading.RLock()
        self._defaults = {name: getattr(generator, name) for name in ImageRequest.model_fields if name != "prompt"}
        self._base_url = generator.resolved_base_url
        self.attempts = attempts
        self.sheet = ContactSheet(folder, manifest)
        self._current = "", generator  # the folder of the last call, and its generator

    def close(self) -> None:
        """End the run: requests still in flight send and write nothing more."""
        self.stop(CogViewStoppedError())

    def stop(self, error: Exception) -> None:
        """Send nothing more; requests in flight may finish. The first error is kept."""
        with self._lock:
            self.stopped = self.stopped or error

    @property
    def halts(self) -> bool:
        """Whether nothing more is sent, because of an error or because the caller asked to stop."""
        return self.stopped is not None or (self.stop_event is not None and self.stop_event.is_set())

    @contextmanager
    def cancel_token(self) -> Iterator[None]:
        """Within this block, no request is sent once the job halts, and interactive calls of the process go first."""
        token = CANCEL_TOKEN.set(CANCEL_TOKEN.get().child(lambda: self.halts))
        try:
            with batch_work():
                yield
        finally:
            CANCEL_TOKEN.reset(token)

    # --- choosing work

    def free_work_items(self) -> Iterator[WorkItem]:
        """Yield what costs nothing: tasks of the service, and URLs that may still work."""
        for position in self.backlog.pending:
            work_item = self._work_item(self.backlog.prompts.items[position])
            if work_item.is_free and not self.halts:
                yield work_item

    def work_items(self) -> Iterator[WorkItem]:
        """Yield what to generate, within limit and budget, from where the last pass ended."""
        items, pending = self.backlog.prompts.items, self.backlog.pending
        while self._next < len(pending) and not self.halts:
            work_item = self._work_item(items[pending[self._next]])
            if work_item.missing:
                if self._limit is not None and self._started >= self._limit:
                    return
                try:
                    work_item.reservation = self._budget.reserve(
                        price_of(self.generator, work_item.prompt.model), work_item.missing
                    )
                except CogViewBudgetError:
                    self.over_budget = True
                    return
                except CogViewError as error:  # the budget of all shards cannot be read
                    self.stop(error)
                    return
                self.over_budget = False
                self._started += 1
            self._next += 1
            if work_item.missing:
                yield work_item

    def passes(self, collect: Any, generate: Any, config: RunnableConfig) -> Iterator[Iterator[Callable[[], Any]]]:
        """Yield the calls of each pass over the prompts: first what is free, then what the limit and the budget allow."""
        yield (partial(collect, work_item, config) for work_item in self.free_work_items())
        again = True
        while again:
            yield (partial(generate, work_item, config) for work_item in self.work_items())
            # Part of the budget was released, so that the next prompt may be within it.
            again = self._has_released and self.over_budget and not self.halts
            self._has_released = False

    def _work_item(self, item: PromptItem) -> WorkItem:
        with self._lock:
            return self.backlog.work_item(item)

    # --- one prompt, sync and async

    def generate(self, work_item: WorkItem, config: RunnableConfig) -> None:
        """Generate the missing images of a prompt, and record the outcome."""
        call = PromptCall(self, work_item, is_paid=True)
        if self.halts:
            self._release(call, 0)
            return
        with call.journal():
            outcome = or_error(self._generator(call).invoke, call.arguments, config, budget=work_item.reservation)
        self._finish(call, outcome)

    async def agenerate(self, work_item: WorkItem, config: RunnableConfig) -> None:
        """Async version of `generate`."""
        call = PromptCall(self, work_item, is_paid=True)
        if self.halts:
            self._release(call, 0)
            return
        with call.journal():
            outcome = await aor_error(
                self._generator(call).ainvoke, call.arguments, config, budget=work_item.reservation
            )
        await in_thread(self._finish, call, outcome)

    def collect(self, work_item: WorkItem, config: RunnableConfig) -> None:
        """Poll the tasks of a prompt and download from its URLs, which costs nothing."""
        for call, task in self._tasks(work_item):
            self._finish_task(call, or_error(task.result, config, timeout=self.generator.timeout))
        for call, number, image in self._links(work_item):
            self._record_download(call, number, image, or_error(image.read))

    async def acollect(self, work_item: WorkItem, config: RunnableConfig) -> None:
        """Async version of `collect`."""
        for call, task in self._tasks(work_item):
            outcome = await aor_error(task.aresult, config, timeout=self.generator.timeout)
            await in_thread(self._finish_task, call, outcome)
        links: list[tuple[PromptCall, int, GeneratedImage]] = await in_thread(lambda: list(self._links(work_item)))
        for call, number, image in links:
            await in_thread(self._record_download, call, number, image, await aor_error(image.aread))

    # --- before a request

    def claim(self, item: PromptItem, request_id: str, model: str, subfolder: str) -> None:
        """Record that a paid request is about to be sent.

        Raises:
            CogViewStoppedError: The job stops; the request must not be sent.
            CogViewStorageError: The record cannot be written; the request must not be sent.
        """
        if CANCEL_TOKEN.get().is_set():
            raise CogViewStoppedError
        prompt = " ".join(str(item.arguments["prompt"]).split())[:_PROMPT_CHARACTERS]
        values = {"key": item.key, "line": item.number, "request_id": request_id, "model": model, "prompt": prompt}
        try:
            self.folder.check()
            self.folders.ensure(subfolder)
            self.manifest.check()
            if spare_descriptors() in range(FILES_PER_IMAGE):
                raise CogViewStorageError(  # noqa: TRY301
                    "This process cannot open more files; nothing more was sent.",
                    hint="Close files, or raise the limit (ulimit -n), then run the job again.",
                )
            self._note({**values, "at": now()})
        except CogViewStorageError as error:
            self.stop(error)
            raise

    def submitted(self, item: PromptItem, request_id: str, task_id: str | None, **model: str) -> None:
        """Record the task that a request became; None: the service does not know it any more."""
        self._note({"key": item.key, "request_id": request_id, "task_id": task_id, **model})

    def settle(self, item: PromptItem, request_id: str, outcome: str) -> None:
        """Record that a request ended without an image."""
        self._note({"key": item.key, "request_id": request_id, "settled": outcome})

    def _note(self, values: dict[str, Any]) -> None:
        self.attempts.append(values)
        with self._lock:
            self.backlog.history.note(values)

    def _tasks(self, work_item: WorkItem) -> Iterator[tuple[PromptCall, ImageTask]]:
        for attempt in work_item.running:
            call = PromptCall(self, work_item, sent={attempt.request_id: attempt.model})
            request = self._request(work_item.prompt).model_copy(update={"n": 1, "model": attempt.model})
            task = ImageTask(
                attempt.task_id or "", generator=self._generator(call), request=request, request_id=attempt.request_id
            )
            yield call, task

    def _links(self, work_item: WorkItem) -> Iterator[tuple[PromptCall, int, GeneratedImage]]:
        finished = self._work_item(work_item.prompt).finished
        failures = (
            self.manifest.read(finished.start, finished.size)["failures"] if finished and finished.outcome.links else []
        )
        # From the last to the first, so that removing a record does not shift the ones before it.
        for number, failure in reversed([*enumerate(failures)]):
            image = image_with_link(failure, work_item.prompt.arguments["prompt"])
            if image:
                with_content(image, None, ImageAccess(self._base_url, self.generator.allowed_image_hosts))
                yield PromptCall(self, work_item), number, image

    def _generator(self, call: PromptCall) -> CogViewImageGenerator:
        """Return the generator that saves in the folder of a call; most calls in a row share one."""
        with self._lock:
            if call.subfolder != self._current[0]:
                path = self.folder.path / call.subfolder
                self._current = call.subfolder, self.generator._saving_in(path)  # noqa: SLF001  of this package
            return self._current[1]

    def _request(self, item: PromptItem) -> ImageRequest:
        return ImageRequest.model_validate({**self._defaults, **item.arguments})

    # --- after a request

    def record_recovered(self) -> None:
        """Add images to the manifest that are already in the folder."""
        for work_item in self.backlog.work_items():
            if work_item.recovered:
                requests = [image.attempt for image in work_item.recovered]
                call = PromptCall(self, work_item, sent={item.request_id: item.model for item in requests})
                self._guarded(call, self._record_recovered, call)

    def _record_recovered(self, call: PromptCall) -> None:
        sandbox = self.backlog.uses_sandbox(self.generator)
        records = []
        for recovered in call.work_item.recovered:
            with self.folder.parent_of(recovered.file) as (parent, name):
                parent.sync(name)
            price = self.generator.price(recovered.attempt.model)
            records.append(recovered_record(recovered, price[0] if price else None, sandbox=sandbox))
        self.finish(call, records, [], {*call.sent})

    def _finish(self, call: PromptCall, outcome: Any) -> None:
        self._guarded(call, self._judge, call, outcome)

    def _guarded(self, call: PromptCall, write: Callable[..., None], *arguments: Any) -> None:
        """Stop the job if a record cannot be written; the attempts still show that the request was sent."""
        try:
            write(*arguments)
        except Exception as error:  # noqa: BLE001  reported at the end
            self._stop_unwritten(call, write_error(self.folder.path, error) if isinstance(error, OSError) else error)

    def _stop_unwritten(self, call: PromptCall, error: Exception) -> None:
        """Stop the job, and log where the images are; the notes of later errors are added to the first error."""
        notes = getattr(error, "__notes__", ())
        with self._lock:
            closed = isinstance(self.stopped, CogViewStoppedError)
            self.stop(error)
            if self.stopped is not None and self.stopped is not error:
                for note in notes:
                    self.stopped.add_note(note)
        if notes or not closed:
            reported = " ".join((str(error), *notes))
            number = call.work_item.prompt.number
            logger.warning("Line %s: the outcome could not be recorded. %s", number, visible(reported))

    def _judge(self, call: PromptCall, outcome: Any) -> None:
        """Record the outcome of a paid call."""
        failures, unknown = failures_in(call, outcome)
        images = list(outcome.images) if isinstance(outcome, ImageResult) else []
        ends = {item.request_id: str(item.outcome) for item in failures}
        failures = [item for item in failures if item.scope is not Scope.CANCELLED]
        self._stop_if_needed(call, outcome, failures)
        prompt_failures = [failure for failure in failures if is_final_for_prompt(failure, call.work_item.prompt)]
        others = [failure for failure in failures if failure not in prompt_failures]
        with self._lock:
            self.errors.update(failure.error for failure in others)
        model = call.work_item.prompt.model
        reported = [failure_record(item, call.sent.get(item.request_id or "", model)) for item in prompt_failures]
        self._release(call, sum(not image.cached for image in images) + len(unknown))
        records, elsewhere = self._save_images(call, images)
        settled = call.sent.keys() - unknown - elsewhere
        if records or reported:
            made = [item for item in records if "file" in item]
            self.finish(call, made, reported + [item for item in records if "file" not in item], settled)
            return
        for item in settled:
            self.settle(call.work_item.prompt, item, ends.get(item, Outcome.FINAL))

    def _finish_task(self, call: PromptCall, outcome: Any) -> None:
        """Record the outcome of a task that was paid for earlier. A task without an end can be polled again."""
        if isinstance(outcome, ImageResult | CogViewTaskFailedError | CogViewContentFilterError):
            self._finish(call, outcome)
        elif isinstance(outcome, CogViewNotFoundError):  # treated like any request without an answer
            for request_id in call.sent:
                self._guarded(call, self.submitted, call.work_item.prompt, request_id, None)
        elif isinstance(outcome, Exception):
            with self._lock:
                self.errors[type(outcome).__name__] += 1
                if isinstance(outcome, CogViewTaskUnfinishedError):
                    self.backlog.unfinished.update(call.sent)
            if isinstance(outcome, CogViewError) and outcome.scope in STOPPING_SCOPES:
                self.stop(outcome)

    def _record_download(self, call: PromptCall, number: int, image: GeneratedImage, content: Any) -> None:
        """Add an image to the manifest that could be downloaded from its URL after all."""
        if isinstance(content, bytes):
            record = partial(write_image, self.folder, call.subfolder, image, content)
            self._guarded(call, lambda: self.finish(call, [record()], [], set(), without=number))

    def _save_images(self, call: PromptCall, images: list[GeneratedImage]) -> tuple[list[dict[str, Any]], set[str]]:
        """Return the records of saved images, and the request ids of images whose bytes are not in the folder."""
        records, elsewhere = [], set()
        for image in images:  # one that cannot be written does not affect the others
            saved = save_image(self.folder, call.subfolder, image)
            if saved.problem:
                self._stop_unwritten(call, saved.problem)
            if saved.record:
                records.append(saved.record)
            else:
                elsewhere.add(image.request_id)
        return records, elsewhere

    def _stop_if_needed(self, call: PromptCall, outcome: Any, failures: list[ImageFailure]) -> None:
        if not failures and isinstance(outcome, CogViewStoppedError):
            return
        none_ran = isinstance(outcome, Exception) and all(item.outcome is Outcome.NOT_RUN for item in failures)
        # A full account answers, and accepts requests again once other processes with the same key have finished.
        is_full = none_ran and bool(failures) and all(item.code == ACCOUNT_LIMIT for item in failures)
        with self._lock:
            self._not_run = self._not_run + (not is_full) if none_ran else 0
            stops = self._not_run >= MAX_NOT_RUN
        fatal = [item for item in failures if affects_every_prompt(item, call.work_item.prompt)]
        if isinstance(outcome, OSError):  # no file can be opened, not even for a connection
            self.stop(write_error(self.folder.path, outcome))
        elif isinstance(outcome, Exception) and not isinstance(outcome, CogViewError):
            self.stop(outcome)
        elif fatal or stops:
            first = [*fatal, *failures][0]
            # The raised error belongs to one of the images, and has more details than its record.
            self.stop(outcome if type(outcome) is error_class(first.error) else error_from(first))

    def _release(self, call: PromptCall, paid: int) -> None:
        held = call.work_item.reservation
        if held is not None:
            held.release()
        with self._lock:
            if call.is_paid:
                self._has_released = self._has_released or (held is not None and held.released > 0)
            elif paid < call.reserved:  # a task that was counted as paid gave no image
                self._budget.release(price_of(self.generator, call.work_item.prompt.model), call.reserved - paid)
                self._has_released = True

    def finish(
        self,
        call: PromptCall,
        images: list[dict[str, Any]],
        failures: list[dict[str, Any]],
        settled: set[str],
        *,
        without: int | None = None,
    ) -> None:
        """Write the manifest record of a prompt, together with what an earlier record has."""
        work_item = call.work_item
        with self._lock:
            finished = self.backlog.history.finished.get(work_item.prompt.key)
            requests = [*self.backlog.history.open.get(work_item.prompt.key, ())]
        # Without the lock, other prompts continue while the disk is slow. No other thread writes this prompt's record.
        old = self.manifest.read(finished.start, finished.size) if finished else _NO_LINE
        kept = [item for number, item in enumerate(old["failures"]) if number != without]
        given_up = list(old["given_up"])
        if call.is_paid and work_item.repeats_failed:
            given_up += [{name: item[name] for name in ("request_id", "model")} for item in kept if item.get("url")]
            kept = []
        if call.is_paid and work_item.repeats_unknown:
            given_up += [{"request_id": item.request_id, "model": item.model} for item in work_item.unknown]
        given_up += call.repeated
        ids = dict.fromkeys([*old["request_ids"], *sorted(settled), *(item["request_id"] for item in given_up)])
        values = {
            **manifest_record(
                work_item.prompt,
                self._request(work_item.prompt),
                [*old["images"], *images],
                [*kept, *failures],
                price_of(self.generator, work_item.prompt.model).currency,
                unknown=any(item not in ids for item in requests),
                sandbox=self.backlog.uses_sandbox(self.generator),
                source=self.backlog.prompts.source,
            ),
            "given_up": given_up,
            "request_ids": [*ids],
            "seconds": round(old["seconds"] + time.monotonic() - call.started, 3),
            "finished": now(),
        }
        position = self.manifest.append(values)
        with self._lock:
            self.backlog.history.add_line(*position, values)
            is_page_full = self.sheet.count(len(images) + len(failures))
            self.made += len(images)
            for image in images:
                self.charges.add(Money.of({"cost": image["cost"], "currency": values["currency"]}))
                self.list_prices.add(price_of(self.generator, image["model"]))
            for_sheet = (self.backlog.history.finished.snapshot(), self.total_cost()) if is_page_full else None
        if for_sheet:
            self.sheet.update(*for_sheet)

    def total_cost(self) -> str:
        """Return what all images in the folder cost, as text."""
        sandbox = self.backlog.uses_sandbox(self.generator)
        return cost_text({} if sandbox else self.backlog.total_cost(), sandbox=sandbox)

    def finish_sheet(self) -> str:
        """Return the name of the first page of the contact sheet, after writing all pages at the end of the job."""
        history = self.backlog.history
        return self.sheet.finish(history.finished, self.total_cost(), list(history.attempts()))


# --- one call


class PromptCall:
    """One call for one prompt, and the journal of what it sends."""

    def __init__(
        self, run: JobRun, work_item: WorkItem, *, is_paid: bool = False, sent: dict[str, str] | None = None
    ) -> None:
        self.work_item = work_item
        self.is_paid = is_paid  # otherwise it only asks for images that were paid for earlier
        self.sent = sent or {}  # the model of each recorded request, by request id
        # The requests that were sent again though they may have been charged, once for each repetition.
        self.repeated: list[dict[str, str]] = []
        self.reserved = work_item.missing if is_paid else len(self.sent)  # how many images the budget counts for it
        self.arguments = {**work_item.prompt.arguments, "n": work_item.missing}
        self._run = run
        self.started = time.monotonic()  # when the call began, and then when its first request was sent
        self._abandoned: set[str] = set()
        self._lock = threading.Lock()

    def sending(self, request_id: str, model: str) -> None:
        """Record a request; the generator calls this right before it sends a paid request.

        Raises:
            CogViewStoppedError: The caller has left; the request must not be sent.
        """
        with self._lock:
            if request_id in self._abandoned:  # a thread comes to it only after the caller left
                raise CogViewStoppedError
            if not self.sent:
                self.started = time.monotonic()
            self._run.claim(self.work_item.prompt, request_id, model, self.subfolder)
            if self.sent.get(request_id) == model:
                self.repeated.append({"request_id": request_id, "model": model})
            self.sent[request_id] = model

    @cached_property
    def subfolder(self) -> str:
        """Where its images are saved: a sub-folder of the job's folder, or the folder itself if the text is empty."""
        return self._run.folders.next(max(1, self.reserved))

    async def asending(self, request_id: str, model: str) -> None:
        """Async version of `sending`: a thread writes the record."""
        await in_thread(self.sending, request_id, model)

    def not_sent(self, request_id: str, model: str) -> None:
        """Record that a request was not sent: the caller left while it connected."""
        with self._lock:
            self._abandoned.add(request_id)
            if self.sent.pop(request_id, None):
                self._run.settle(self.work_item.prompt, request_id, Outcome.NOT_RUN)

    async def anot_sent(self, request_id: str, model: str) -> None:
        """Async version of `not_sent`: a thread writes the record."""
        await in_thread(self.not_sent, request_id, model)

    def submitted(self, request_id: str, task_id: str, model: str) -> None:
        """Record a task that the service has accepted; its model may be a fallback model."""
        self.sent[request_id] = model
        self._run.submitted(self.work_item.prompt, request_id, task_id, model=model)

    async def asubmitted(self, request_id: str, task_id: str, model: str) -> None:
        """Async version of `submitted`: a thread writes the record."""
        await in_thread(self.submitted, request_id, task_id, model)

    @contextmanager
    def journal(self) -> Iterator[None]:
        """Within this block, this call records what is sent."""
        token = JOURNAL.set(self)
        try:
            yield
        finally:
            JOURNAL.reset(token)


def failures_in(call: PromptCall, outcome: Any) -> tuple[list[ImageFailure], set[str]]:
    """Return one failure for each missing image, and the ids of requests that may have been charged without an image."""
    images = outcome.images if isinstance(outcome, ImageResult) else ()
    failures: list[ImageFailure] = list(getattr(outcome, "failures", ()))
    if not failures and isinstance(outcome, Exception):  # it applies to all images
        failures = [ImageFailure.of(outcome, index) for index in range(max(1, call.reserved))]
    if not call.is_paid:  # the end of a task does not name the request that submitted it
        failures = [item.model_copy(update={"request_id": next(iter(call.sent), None)}) for item in failures]
    reported = {item.request_id for item in images} | {item.request_id for item in failures}
    # Each other request belongs to a failure without an id: it may have been charged if one of those may.
    nameless = [item for item in failures if item.request_id is None]
    ended = len(nameless) >= len(call.sent.keys() - reported) and not any(may_be_charged(item) for item in nameless)
    unknown = {item.request_id for item in failures if may_be_charged(item)} | (
        set() if ended else call.sent.keys() - reported
    )
    return failures, {item for item in call.sent if item in unknown}


def is_final_for_prompt(failure: ImageFailure, item: PromptItem) -> bool:
    """Return whether a failure is caused by the prompt itself, so that it is repeated only on demand."""
    final = failure.outcome is Outcome.FINAL and not may_be_charged(failure)
    return final and not affects_every_prompt(failure, item)


def may_be_charged(failure: ImageFailure) -> bool:
    """Return whether the image may be paid for; an exception of another package leaves that open."""
    return failure.outcome is Outcome.UNKNOWN or failure.scope is None


def affects_every_prompt(failure: ImageFailure, item: PromptItem) -> bool:
    """Return whether every other prompt would fail for the same reason."""
    wrong_model = failure.scope is Scope.MODEL and "model" not in item.arguments
    return wrong_model or failure.scope in STOPPING_SCOPES


def error_from(failure: ImageFailure) -> CogViewError:
    """Return the exception that a failure describes."""
    kind = error_class(failure.error) or CogViewError
    facts = {name: getattr(failure, name) for name in ("hint", "code", "status", "request_id")}
    return kind(failure.message, **facts)
