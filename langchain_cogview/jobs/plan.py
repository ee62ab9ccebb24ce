"""What a job would do and what it did: the plan, the report, and the backlog of its prompts compared with its folder."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from langchain_cogview.api.settings import is_sandbox
from langchain_cogview.budget import Budget
from langchain_cogview.catalog import currency_of
from langchain_cogview.cost import Charges, Money
from langchain_cogview.errors import CogViewBudgetError, CogViewConfigurationError, Outcome, error_class, printable
from langchain_cogview.jobs.files import recovered_images
from langchain_cogview.jobs.folder import JobFolder, write_error
from langchain_cogview.jobs.manifest import ATTEMPTS, MANIFEST, kind_of, manifest_of
from langchain_cogview.jobs.prompts import MAX_LISTED, bullet_list, cost_text, count_text
from langchain_cogview.notebook.display import replace_status
from langchain_cogview.notebook.html import report
from langchain_cogview.text import visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from decimal import Decimal
    from pathlib import Path

    from langchain_cogview.budget import Reservation
    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.jobs.files import RecoveredImage
    from langchain_cogview.jobs.history import Attempt, Finished, History
    from langchain_cogview.jobs.items import Problem, PromptItem, PromptList

SETTINGS_TYPE: Final = "cogview.job"
SETTINGS_VERSION: Final = 1
SETTINGS: Final = "job.json"
INTERRUPTED: Final = "Interrupted; run the job again to continue."
UNDER_WAY: Final = (
    "A request that was in flight may have been charged: the next run finds its image or lists the request."
)
_MAX_SETTINGS: Final = 1 << 20
_SAME: Final = ("model", "size", "quality", "n", "user_id", "watermark_enabled")


@dataclass(frozen=True, slots=True)
class UnknownAttempt:
    """A paid request whose outcome is unknown: it may have been charged.

    Attributes:
        line: Line number of the prompt.
        prompt: Beginning of the prompt, in one line.
        request_id: The request id that this client generated; quote it to the provider.
    """

    line: int
    prompt: str
    request_id: str

    def __str__(self) -> str:
        return f"Line {self.line}: request id {self.request_id}: {printable(self.prompt)}"


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What a job would do. Nothing is sent or written to make a plan.

    Attributes:
        lines: Number of lines with a prompt, valid or not.
        blank: Number of blank lines.
        comments: Number of comments, which begin with `#` in a text file.
        problems: The lines that are not valid.
        duplicates: Numbers of the lines that equal an earlier one.
        unique: Whether duplicates are left out.
        notes: Remarks for the user.
        done: Prompts whose images are all in the folder.
        blocked: Prompts that the content filter blocked, and that are not repeated.
        failed: Prompts that failed for another reason, and that are not repeated.
        unknown: Requests that may have been charged; they are repeated only with `retry_unknown`.
        recovered: Images found in the folder or in progress at the service that the manifest does not have; they cost nothing.
        prompts: Number of prompts to generate.
        images: Number of images to generate.
        cost: List price of these images, by currency.
        unpriced: How many of these images have no known price.
        sandbox: Whether the sandbox generates them, so that nothing is charged.
    """

    lines: int
    blank: int
    comments: int
    problems: tuple[Problem, ...]
    duplicates: tuple[int, ...]
    unique: bool
    notes: tuple[str, ...]
    done: int
    blocked: int
    failed: int
    unknown: tuple[UnknownAttempt, ...]
    recovered: int
    prompts: int
    images: int
    cost: Mapping[str, Decimal]
    unpriced: int
    sandbox: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Convert the plan to plain JSON.

        Returns:
            All attributes; amounts of money are strings.
        """
        plain = {name: getattr(self, name) for name in self.__slots__}
        return plain | {
            "problems": [asdict(item) for item in self.problems],
            "unknown": [asdict(item) for item in self.unknown],
            "cost": _amounts(self.cost),
        }

    def __str__(self) -> str:
        summary = f"{count_text(self.lines, 'line')} with a prompt"
        skipped = [(self.blank, "blank line"), (self.comments, "comment")]
        names = " and ".join(count_text(count, what) for count, what in skipped if count)
        summary += f", {names} skipped" if names else ""
        old = [
            f"{count} {word}"
            for count, word in ((self.done, "done"), (self.blocked, "blocked"), (self.failed, "failed"))
            if count
        ]
        summary += f"; {', '.join(old)} before" if old else ""
        cost = cost_text(self.cost, self.unpriced, sandbox=self.sandbox)
        return visible(
            "\n".join(
                (
                    f"{summary}.",
                    *bullet_list("Not valid", self.problems),
                    *self.warnings(),
                    f"To generate: {count_text(self.prompts, 'prompt')}, {count_text(self.images, 'image')}, {cost}.",
                )
            )
        )

    def warnings(self) -> list[str]:
        """List what the user should know before anything is sent.

        Returns:
            One line for each remark.
        """
        lines = list(self.notes)
        if self.duplicates:
            numbers = ", ".join(map(str, self.duplicates[:MAX_LISTED]))
            where = f"line{'s' if len(self.duplicates) > 1 else ''} {numbers}"
            where += ", ..." if len(self.duplicates) > MAX_LISTED else ""
            so = "left out" if self.unique else "generated and paid for, unless unique=True"
            lines.append(f"{count_text(len(self.duplicates), 'duplicate prompt')} ({where}). Duplicates are {so}.")
        if self.recovered:
            lines.append(
                f"{count_text(self.recovered, 'image')} paid for before will be recovered without paying again."
            )
        if self.unknown:
            lines += bullet_list("May have been charged, and repeated only with retry_unknown=True", self.unknown)
        return lines


def _amounts(cost: Mapping[str, Decimal]) -> dict[str, str]:
    return {currency: str(amount) for currency, amount in cost.items()}


@dataclass(frozen=True, slots=True)
class JobReport:
    """What a run of a job did. `str(report)` summarizes it in a few lines.

    Attributes:
        made: Prompts whose images were all generated or recovered in this run.
        skipped: Prompts whose images were all in the folder before this run.
        blocked: Prompts that the content filter blocked, in this run or before.
        failed: Prompts that failed for another reason, in this run or before.
        unknown: Requests that may have been charged; they are repeated only with `retry_unknown`.
        left: Prompts that remain to be generated, because of the limit, the budget or an early stop, or because their requests
            did not run.
        bad: Lines that are not valid and were skipped.
        images: Number of images generated or recovered in this run.
        cost: Cost of these images, by currency; an image of the sandbox costs nothing.
        unpriced: How many of these images have no known price.
        list_price: List price of these images, by currency, which the budget counts; in the sandbox too.
        sandbox: Whether the sandbox generated them, so that nothing is charged.
        total_cost: Cost of all images in the manifest, by currency.
        seconds: Duration of the run.
        over_budget: Whether something was left out because of the budget.
        stopped: The error that stopped the job; None if nothing did.
        interrupted: Whether the job was asked to stop, by its `stop` or by a signal.
        errors: Number of errors by class name, for all prompts that are not made.
        folder: The folder with the images: a path, or the URL of a job in remote storage; so with the next two.
        manifest: The manifest, with one line of JSON for each finished prompt.
        contact_sheet: The first page with the images, for a browser; it links to the others. Its name is `index.html` unless
            another file has that name.
        notes: Remarks for the user.
    """

    made: int
    skipped: int
    blocked: int
    failed: int
    unknown: tuple[UnknownAttempt, ...]
    left: int
    bad: int
    images: int
    cost: Mapping[str, Decimal]
    unpriced: int
    list_price: Mapping[str, Decimal]
    sandbox: bool
    total_cost: Mapping[str, Decimal]
    seconds: float
    over_budget: bool
    stopped: Exception | None
    interrupted: bool
    errors: Mapping[str, int]
    folder: Path | str
    manifest: Path | str
    contact_sheet: Path | str | None
    notes: tuple[str, ...] = ()

    def items(self, storage_options: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Read the manifest.

        Args:
            storage_options: As for the job, if its folder is a URL; the report does not keep them.

        Yields:
            One record for each finished prompt; `langchain_cogview.jobs.manifest` describes its keys.
        """
        if isinstance(self.folder, str):
            from langchain_cogview.jobs.remote import manifest_at  # noqa: PLC0415  on use

            yield from manifest_at(self.folder, storage_options)
            return
        with JobFolder(self.folder) as folder, manifest_of(folder) as manifest:
            for record in manifest.records():
                yield record.values

    def to_dict(self) -> dict[str, Any]:
        """Convert the report to plain JSON.

        Returns:
            All attributes; amounts of money and paths are strings.
        """
        plain = {name: getattr(self, name) for name in self.__slots__}
        stopped = self.stopped and {
            "error": type(self.stopped).__name__,
            "message": str(self.stopped),
            "notes": [*getattr(self.stopped, "__notes__", ())],
        }
        return plain | {
            "unknown": [asdict(item) for item in self.unknown],
            **{name: _amounts(getattr(self, name)) for name in ("cost", "list_price", "total_cost")},
            "errors": dict(self.errors),
            "stopped": stopped,
            "notes": [*self.notes],
            "folder": str(self.folder),
            "manifest": str(self.manifest),
            "contact_sheet": self.contact_sheet and str(self.contact_sheet),
        }

    def __str__(self) -> str:
        others = {"made before": self.skipped, "blocked": self.blocked, "failed": self.failed}
        others |= {"of unknown outcome": len(self.unknown), "not generated yet": self.left, "not valid": self.bad}
        counts = [f"{count_text(self.made, 'prompt')} made", *(f"{n:,} {word}" for word, n in others.items() if n)]
        shown = self.list_price if self.sandbox else self.cost
        cost = cost_text(shown, self.unpriced, sandbox=self.sandbox)
        lines = [f"{', '.join(counts)}; {cost}; {self.seconds:,.1f} s."]
        if self.total_cost != self.cost and any(self.total_cost.values()):
            lines.append(f"All images in the folder: {cost_text(self.total_cost)}.")
        if self.over_budget:
            lines.append("The budget does not cover the next prompt.")
        not_run = [f"{name} ({count:,})" for name, count in self.errors.items() if _not_run(name)]
        if not_run:
            lines.append(f"Did not run; the next run sends these again: {', '.join(not_run)}.")
        if self.stopped:
            lines += [f"Stopped: {self.stopped}", *getattr(self.stopped, "__notes__", ())]
        lines += bullet_list("May have been charged, and repeated only with retry_unknown=True", self.unknown)
        lines += self.notes
        if self.interrupted:
            lines.append(INTERRUPTED)
        return visible("\n".join(lines))

    def _repr_html_(self) -> str:
        replace_status(self.images)
        # A browser opens no s3:// link.
        sheet = None if isinstance(self.contact_sheet, str) else self.contact_sheet
        return report(str(self), "Open the contact sheet", sheet)


def _not_run(name: str) -> bool:
    kind = error_class(name)
    return kind is not None and kind.outcome is Outcome.NOT_RUN


# --- the backlog


@dataclass(slots=True)
class WorkItem:
    """What is left to do for one prompt."""

    prompt: PromptItem
    finished: Finished | None  # summary of its manifest record; None if there is none
    recovered: list[RecoveredImage]  # images in the folder that are missing in the manifest
    running: list[Attempt]  # requests that are tasks of the service, and can be polled
    unknown: list[Attempt]  # requests whose outcome is unknown, and tasks that were polled in this run without an end
    missing: int = 0  # number of images to generate
    repeats_unknown: bool = False  # whether the requests in `unknown` are given up and sent again
    repeats_failed: bool = False  # whether earlier failures are sent again
    reservation: Reservation | None = None  # the part of the budget that is reserved for the missing images

    def decide(self, *, retry_failed: bool, retry_unknown: bool) -> None:
        """Determine how many images to generate, and what of the earlier requests is sent again."""
        made = (self.finished.outcome.made if self.finished else 0) + len(self.recovered) + len(self.running)
        absent = max(0, self.prompt.n - made)
        failed = min(absent, len(self.finished.outcome.errors) if self.finished else 0)
        unknown = min(absent - failed, len(self.unknown))
        self.repeats_failed, self.repeats_unknown = retry_failed and failed > 0, retry_unknown and unknown > 0
        self.missing = absent - (0 if retry_failed else failed) - (0 if retry_unknown else unknown)

    @property
    def made(self) -> bool:
        """Whether all its images are in the manifest."""
        return self.finished is not None and self.finished.outcome.made >= self.prompt.n

    @property
    def is_free(self) -> bool:
        """Whether there is work left that costs nothing."""
        return bool(self.recovered or self.running or (self.finished and self.finished.outcome.links and not self.made))


def _reaches(budget: Budget, price: Money, count: int) -> bool:
    try:
        budget.reserve(price, count)
    except CogViewBudgetError:
        return False
    return True


class Backlog:
    """The prompts of a job, compared with its folder.

    Attributes:
        unfinished: Request ids of tasks that were polled in this run without an end; they are not polled again.
        pending: Positions of the prompts that were not complete, or had an attempt without an end, at the time of `plan`.
        skipped: How many prompts were complete at that time.
        ready: How many images the manifest had for these prompts.
        running: How many images are in progress at the service.
    """

    def __init__(
        self, prompts: PromptList, history: History, folder: JobFolder, *, retry_failed: bool, retry_unknown: bool
    ) -> None:
        self.prompts = prompts
        self.history = history
        self.unfinished: set[str] = set()
        self.pending = array("Q")
        self.skipped = self.ready = self.running = 0
        self._retry = {"retry_failed": retry_failed, "retry_unknown": retry_unknown}
        self._recovered = recovered_images(folder, history)

    def work_item(self, item: PromptItem) -> WorkItem:
        """Return what is left to do for a prompt, as a new work item."""
        attempts = tuple(self.history.open[item.key].values()) if item.key in self.history.open else ()
        recovered = [
            self._recovered[attempt.request_id] for attempt in attempts if attempt.request_id in self._recovered
        ]
        left = [attempt for attempt in attempts if attempt.request_id not in self._recovered]
        running = [attempt for attempt in left if attempt.task_id and attempt.request_id not in self.unfinished]
        unknown = [attempt for attempt in left if attempt not in running]
        work_item = WorkItem(item, self.history.finished.get(item.key), recovered, running, unknown)
        work_item.decide(**self._retry)
        return work_item

    def total_cost(self) -> Mapping[str, Decimal]:
        """Return the cost of all images in the manifest, by currency."""
        total = Charges()
        for outcome, count in self.history.finished.outcomes().items():
            total.add(Money.of({"cost": outcome.cost, "currency": outcome.currency}), count)
        return total.amounts

    def work_items(self) -> Iterator[WorkItem]:
        """Return the state of the prompts in `pending`."""
        return (self.work_item(self.prompts.items[position]) for position in self.pending)

    def unknown(self) -> tuple[UnknownAttempt, ...]:
        """Return the requests of these prompts whose outcome is unknown, those of tasks too."""
        return tuple(item for work_item in self.work_items() for item in _unknown(work_item, with_running=True))

    def plan(
        self,
        generator: CogViewImageGenerator,
        budget: Budget,
        *,
        limit: int | None = None,
        items: Iterable[PromptItem] | None = None,
    ) -> JobPlan:
        """Return what is left and its price; `budget` is used up as the job would. `items`: prompts that are not held."""
        counts: Counter[str] = Counter()
        cost = Charges()
        unknown: list[UnknownAttempt] = []
        with_attempts: set[str] = set()
        for item in self._incomplete(items, counts):
            work_item = self.work_item(item)
            counts["recorded"] += work_item.finished is not None
            self.ready += work_item.finished.outcome.made if work_item.finished else 0
            self.skipped += work_item.made
            if item.key in self.history.open:
                with_attempts.add(item.key)
                unknown += _unknown(work_item)
                counts["recovered"] += len(work_item.recovered) + len(work_item.running)
                self.running += len(work_item.running)
            if work_item.missing:
                if limit is not None and counts["prompts"] >= limit:
                    continue
                price = price_of(generator, item.model)
                if counts["over"] or not _reaches(budget, price, work_item.missing):
                    counts["over"] += 1
                    continue
                counts["prompts"] += 1
                counts["images"] += work_item.missing
                cost.add(price, work_item.missing)
            elif work_item.finished and not (
                work_item.made or work_item.recovered or work_item.running or work_item.unknown
            ):
                counts[kind_of(work_item.finished.outcome.errors)] += 1
        others = len(self.history.finished) - counts["recorded"]
        gone = sum(attempt.key not in with_attempts for attempt in self.history.attempts())
        return JobPlan(
            lines=self.prompts.lines,
            blank=self.prompts.blank,
            comments=self.prompts.comments,
            problems=tuple(self.prompts.problems),
            duplicates=tuple(self.prompts.duplicates),
            unique=self.prompts.unique,
            notes=(*self.prompts.notes, *self._notes(counts["over"], gone, others)),
            unknown=tuple(unknown),
            cost=cost.amounts,
            unpriced=cost.unpriced,
            sandbox=self.uses_sandbox(generator),
            done=self.skipped,
            **{name: counts[name] for name in ("blocked", "failed", "recovered", "prompts", "images")},
        )

    def _incomplete(self, items: Iterable[PromptItem] | None, counts: Counter[str]) -> Iterator[PromptItem]:
        # What is complete is counted only.
        for item in items or ():
            if self._is_complete(item.key, item.n):
                counts["recorded"] += 1
            else:
                yield item
        for position, (key, n) in enumerate(self.prompts.items.keys() if items is None else ()):
            if self._is_complete(key, n):
                counts["recorded"] += 1
            else:
                self.pending.append(position)
                yield self.prompts.items[position]

    def _is_complete(self, key: str, n: int) -> bool:
        outcome = self.history.finished.outcome(key)
        if outcome is None or outcome.made < n or key in self.history.open:
            return False
        self.skipped += 1
        self.ready += outcome.made
        return True

    def uses_sandbox(self, generator: CogViewImageGenerator) -> bool:
        """Return whether the sandbox answers, or answered before in this folder."""
        return self.history.sandbox or is_sandbox(generator.resolved_base_url)

    def _notes(self, over: int, gone: int, others: int) -> Iterator[str]:
        """Yield further remarks of a plan."""
        if others:
            yield (
                f"The folder also has {count_text(others, 'prompt')} that {'is' if others == 1 else 'are'} not among these: "
                f"what was made of {'it' if others == 1 else 'them'} stays, and the contact sheet shows it too."
            )
        if over:
            yield f"The budget does not cover {count_text(over, 'further prompt')}."
        if self.running and self._retry["retry_unknown"]:
            yield (
                f"{count_text(self.running, 'image')} in progress at the service will be polled; what does not end "
                "within the time limit of a call is generated and paid for again."
            )
        if gone:
            yield (
                f"{count_text(gone, 'request')} of prompts that are no longer among these may have been charged too: "
                "attempts.jsonl names them."
            )


def _unknown(work_item: WorkItem, *, with_running: bool = False) -> Iterator[UnknownAttempt]:
    for attempt in (*work_item.unknown, *(work_item.running if with_running else ())):
        yield UnknownAttempt(work_item.prompt.number, attempt.prompt, attempt.request_id)


def price_of(generator: CogViewImageGenerator, model: str) -> Money:
    """Return the list price of one image of a model."""
    return Money(*(generator.price(model) or (None, None)))


def job_budget(generator: CogViewImageGenerator, amount: Any, models: Iterable[str] = ()) -> Budget:
    """Return the unused budget of a job, which counts list prices, and images of the sandbox like all others.

    The budget is in the currency of the generator's region and needs the price of each of the models.

    Raises:
        CogViewConfigurationError: `amount` is not an amount of money, or a price is unknown.
    """
    budget = Budget(amount, currency_of(generator.resolved_region), owner="this job")
    asked = dict.fromkeys((*models, *generator.fallback_models)) if budget.amount is not None else ()
    unpriced = [model for model in asked if price_of(generator, model).amount is None]
    if unpriced:
        raise CogViewConfigurationError(
            f"A budget needs the price of {printable(unpriced[0], 60)!r}, which is not known; nothing was sent.",
            hint="Pass prices={model: price}, or leave the budget out.",
        )
    return budget


# --- the job's settings


class _Settings(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    version: int
    settings: dict[str, str | int | bool | None]


def read_settings(folder: JobFolder, shown: str) -> dict[str, Any] | None:
    """Return the arguments that apply to every prompt of the folder's job; None if it has no job yet. `shown` is its path or URL.

    Raises:
        CogViewConfigurationError: The file is damaged, of a later version, or not a regular file.
        CogViewStorageError: The file cannot be read.
    """
    raw = folder.read(SETTINGS, _MAX_SETTINGS)
    if raw is None:
        return None
    try:
        content = _Settings.model_validate(json.loads(raw))
    except (ValueError, RecursionError):  # pydantic's errors are ValueErrors
        content = None
    if content is None or content.type != SETTINGS_TYPE:
        raise CogViewConfigurationError(
            f"The file {printable(f'{shown}/{SETTINGS}', 120)} does not belong to a job, or is damaged.",
            hint="Choose another folder.",
        )
    if content.version != SETTINGS_VERSION:
        raise CogViewConfigurationError(
            f"The job in {printable(shown, 120)} was begun with another version of this package.",
            hint="Continue with that version, or choose another folder.",
        )
    return dict(content.settings)


def write_settings(folder: JobFolder, settings: Mapping[str, Any]) -> None:
    """Mark a folder as a job's, and record the arguments that apply to every prompt."""
    content = {"type": SETTINGS_TYPE, "version": SETTINGS_VERSION, "settings": dict(settings)}
    try:
        folder.add([SETTINGS], json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n")
    except OSError as error:
        raise write_error(folder.path / SETTINGS, error) from None


def refuse_foreign_folder(folder: JobFolder, names: set[str], *, into_existing: bool) -> None:
    """Refuse a folder that has no job but files of these names, unless the caller agreed to add files to it."""
    if not names:
        return
    where = printable(str(folder.path), 120)
    if not into_existing:
        raise CogViewConfigurationError(
            f"The folder {where} is not empty and holds no job; nothing was sent.",
            hint="Choose another folder, or pass into_existing=True to add the job's files to it; no file is overwritten.",
        )
    for name in (MANIFEST, ATTEMPTS):
        if name in names and not folder.read(name, 1):
            raise CogViewConfigurationError(
                f"The file {name} in {where} is empty and existed before the job; nothing was sent.",
                hint="Move it away, or choose another folder.",
            )


def job_settings(generator: CogViewImageGenerator) -> dict[str, Any]:
    """Return the arguments that apply to every prompt of a job; other values make another job."""
    base_url = generator.resolved_base_url
    parts = urlsplit(base_url)
    service = "sandbox" if is_sandbox(base_url) else f"{parts.scheme}://{parts.netloc}"
    return {**{name: getattr(generator, name) for name in _SAME}, "service": service}
