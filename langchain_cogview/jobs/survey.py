"""What is left of a job: its prompts beside what the folder tells, and the money beside the prices."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_cogview.catalog import currency_of
from langchain_cogview.cost import Budget, Charges, Money
from langchain_cogview.errors import CogViewBudgetError, CogViewConfigurationError, Scope, error_class, printable
from langchain_cogview.images.formats import MAX_IMAGE_BYTES, ImageFormatError, ImageInfo, inspect
from langchain_cogview.images.store import IMAGE_NAME
from langchain_cogview.jobs.plan import JobPlan, PromptItem, PromptList, UnknownAttempt, counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from langchain_cogview.cost import Reservation
    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.jobs.folder import JobFolder
    from langchain_cogview.jobs.manifest import Attempt, Finished, History


@dataclass(frozen=True, slots=True)
class Found:
    """A picture that was paid for, is whole in the folder, and is not in the manifest."""

    attempt: Attempt
    path: Path
    info: ImageInfo
    sha256: str
    size_bytes: int


@dataclass(slots=True)
class Work:
    """What is left to do for one prompt.

    Attributes:
        item: The prompt.
        finished: What the manifest says of it.
        found: Pictures to enter into the manifest.
        running: Requests that the service took as tasks, to be asked for.
        unknown: Requests of which nothing is known, and those of tasks that were asked for and go on.
        draw: How many pictures to draw.
        repeats_unknown: Whether `unknown` is given up and drawn anew.
        repeats_failed: Whether the failures so far are drawn anew.
        reservation: What the budget holds for `draw`.
    """

    item: PromptItem
    finished: Finished | None
    found: list[Found]
    running: list[Attempt]
    unknown: list[Attempt]
    draw: int = 0
    repeats_unknown: bool = False
    repeats_failed: bool = False
    reservation: Reservation | None = None

    def decide(self, *, retry_failed: bool, retry_unknown: bool) -> None:
        """Find out how many pictures to draw."""
        made = (self.finished.made if self.finished else 0) + len(self.found) + len(self.running)
        missing = max(0, self.item.n - made)
        failed = min(missing, len(self.finished.errors) if self.finished else 0)
        unknown = min(missing - failed, len(self.unknown))
        self.repeats_failed, self.repeats_unknown = retry_failed and failed > 0, retry_unknown and unknown > 0
        self.draw = missing - (0 if retry_failed else failed) - (0 if retry_unknown else unknown)

    @property
    def made(self) -> bool:
        """Whether all its pictures are in the manifest."""
        return self.finished is not None and self.finished.made >= self.item.n

    @property
    def free(self) -> bool:
        """Whether something is left that costs nothing."""
        return bool(self.found or self.running or (self.finished and self.finished.links and not self.made))


def _reaches(budget: Budget, price: Money, count: int) -> bool:
    try:
        budget.reserve(price, count)
    except CogViewBudgetError:
        return False
    return True


class Survey:
    """The prompts of a job beside what its folder tells.

    Args:
        prompts: Checked.
        history: What the folder tells.
        folder: Where the pictures are.
        retry_failed: Draw again what failed or was blocked.
        retry_unknown: Draw again what may have been charged.

    Attributes:
        unfinished: Requests of tasks that were asked for in this run and have not ended: they are waited for no more.
    """

    def __init__(
        self, prompts: PromptList, history: History, folder: JobFolder, *, retry_failed: bool, retry_unknown: bool
    ) -> None:
        self.prompts = prompts
        self.history = history
        self.unfinished: set[str] = set()
        self._retry = {"retry_failed": retry_failed, "retry_unknown": retry_unknown}
        self._found = found_pictures(folder, history)

    def work(self, item: PromptItem) -> Work:
        """What is left to do for a prompt."""
        attempts = tuple(self.history.open.get(item.key, {}).values())
        found = [self._found[each.request_id] for each in attempts if each.request_id in self._found]
        left = [each for each in attempts if each.request_id not in self._found]
        running = [each for each in left if each.task_id and each.request_id not in self.unfinished]
        unknown = [each for each in left if each not in running]
        work = Work(item, self.history.finished.get(item.key), found, running, unknown)
        work.decide(**self._retry)
        return work

    def spent_models(self) -> Iterator[str]:
        """The model of each picture that was paid, or may have been."""
        for finished in self.history.finished.values():
            yield from finished.spent
        for attempt in self.history.attempts():
            yield from [attempt.model] * attempt.posts

    def unknown(self, *, with_running: bool = False) -> tuple[UnknownAttempt, ...]:
        """The requests of this job's prompts of which nothing is known; `with_running`: those of tasks too."""
        works = (self.work(item) for item in self.prompts.items if item.key in self.history.open)
        return tuple(
            UnknownAttempt(work.item.number, each.prompt, each.request_id)
            for work in works
            for each in (*work.unknown, *(work.running if with_running else ()))
        )

    def plan(self, generator: CogViewImageGenerator, budget: Budget, *, limit: int | None = None) -> JobPlan:
        """Count everything; `budget` is used up as the job would use it."""
        counts: Counter[str] = Counter()
        cost = Charges()
        for item in self.prompts.items:
            work = self.work(item)
            counts["recovered"] += len(work.found) + len(work.running)
            counts["running"] += len(work.running)
            if work.draw:
                if limit is not None and counts["prompts"] >= limit:
                    continue
                price = price_of(generator, item.model)
                if counts["over"] or not _reaches(budget, price, work.draw):
                    counts["over"] += 1
                    continue
                counts["prompts"] += 1
                counts["pictures"] += work.draw
                cost.add(price, work.draw)
            elif work.made or work.found or work.running:
                counts["done"] += work.made
            elif not work.unknown:
                counts[kind_of(work.finished.errors) if work.finished else "done"] += 1
        return JobPlan(
            lines=self.prompts.lines,
            blank=self.prompts.blank,
            problems=tuple(self.prompts.problems),
            duplicates=tuple(self.prompts.duplicates),
            unique=self.prompts.unique,
            notes=(*self.prompts.notes, *self._notes(counts)),
            unknown=self.unknown(),
            cost=cost.amounts,
            unpriced=cost.unpriced,
            **{name: counts[name] for name in ("done", "blocked", "failed", "recovered")},
            **{name: counts[name] for name in ("prompts", "pictures")},
        )

    def _notes(self, counts: Counter[str]) -> Iterator[str]:
        """What a plan tells besides."""
        if counts["over"]:
            yield f"The budget does not reach for {counted(counts['over'], 'further prompt')}."
        if counts["running"] and self._retry["retry_unknown"]:
            yield (
                f"{counted(counts['running'], 'picture')} under way at the service will be asked for; what has not ended "
                "by the time limit of a call is generated and paid for again."
            )
        keys = {item.key for item in self.prompts.items}
        gone = sum(attempt.key not in keys for attempt in self.history.attempts())
        if gone:
            yield (
                f"{counted(gone, 'request')} of prompts that are no longer among these may have been charged too: "
                "attempts.jsonl names them."
            )


def kind_of(errors: Iterable[str]) -> str:
    """What became of a prompt that was not made: `blocked` by the content filter alone, `failed`, `unknown` without errors.

    Args:
        errors: Names of the classes of its errors.
    """
    kinds = [error_class(name) for name in errors]
    if not kinds:
        return "unknown"
    return "blocked" if all(kind and kind.scope is Scope.PROMPT for kind in kinds) else "failed"


def price_of(generator: CogViewImageGenerator, model: str) -> Money:
    """The list price of one image of a model."""
    return Money(*(generator.price(model) or (None, None)))


def job_budget(generator: CogViewImageGenerator, amount: Any, models: Iterable[str] = ()) -> Budget:
    """How much a job may spend, counted in list prices; images of the sandbox count alike.

    Args:
        generator: Knows the prices.
        amount: In the platform's currency; None: no limit.
        models: All that may be asked, for which a budget needs the price.

    Returns:
        A budget of which nothing is spent.

    Raises:
        CogViewConfigurationError: `amount` is no amount of money, or a price is unknown.
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


def found_pictures(folder: JobFolder, history: History) -> dict[str, Found]:
    """By request id: whole pictures in the folder of requests without an end in the manifest."""
    wanted = {attempt.request_id[:8]: attempt for attempt in history.attempts()}
    found: dict[str, Found] = {}
    for name in sorted(folder.names()) if wanted else ():
        match = IMAGE_NAME.fullmatch(name)
        attempt = wanted.get(match["label"]) if match else None
        picture = (
            _whole(folder, name, match["start_of_hash"]) if match and attempt and name not in history.files else None
        )
        if attempt and picture:
            found[attempt.request_id] = Found(attempt, folder.path / name, *picture)
    return found


def _whole(folder: JobFolder, name: str, start_of_hash: str) -> tuple[ImageInfo, str, int] | None:
    try:
        with os.fdopen(folder.open(name), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size > MAX_IMAGE_BYTES:
                return None
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return (inspect(file), sha256, size) if sha256.startswith(start_of_hash) else None
    except (OSError, ImageFormatError, CogViewConfigurationError):
        return None
