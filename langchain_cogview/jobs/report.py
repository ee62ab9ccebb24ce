"""Report what a run of a job did; bring the manifest into its final form and write the contact sheet."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.cost import Charges, Money
from langchain_cogview.errors import (
    CogViewConfigurationError,
    CogViewError,
    CogViewStorageError,
    Outcome,
    Scope,
    error_class,
)
from langchain_cogview.jobs.folder import JobFolder
from langchain_cogview.jobs.manifest import kind_of, manifest_of
from langchain_cogview.jobs.plan import UnknownAttempt, cost_text, unknown_dict
from langchain_cogview.jobs.prompts import bullet_list, count_text
from langchain_cogview.notebook.html import Tile, contact_sheet, is_contact_sheet
from langchain_cogview.text import visible

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from decimal import Decimal
    from pathlib import Path

    from langchain_cogview.jobs.run import JobRun

CONTACT_SHEETS: Final = ("index.html", "contact-sheet.html", *(f"contact-sheet-{n}.html" for n in range(2, 100)))
"""Names for the page with all images; the first one that is free, or that a job wrote, is used."""
INTERRUPTED: Final = "Interrupted; run the job again to continue."
UNDER_WAY: Final = (
    "A request that was in flight may have been charged: the next run finds its image or lists the request."
)


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
        folder: The folder with the images.
        manifest: The manifest, with one line of JSON for each finished prompt.
        contact_sheet: A page with all images, for a browser. Its name is `index.html` unless another file has that name.
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
    folder: Path
    manifest: Path
    contact_sheet: Path | None
    notes: tuple[str, ...] = ()

    def items(self) -> Iterator[dict[str, Any]]:
        """Read the manifest.

        Yields:
            One record for each finished prompt; `langchain_cogview.jobs.manifest` describes its keys.
        """
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
            "unknown": [unknown_dict(item) for item in self.unknown],
            "cost": {currency: str(amount) for currency, amount in self.cost.items()},
            "list_price": {currency: str(amount) for currency, amount in self.list_price.items()},
            "total_cost": {currency: str(amount) for currency, amount in self.total_cost.items()},
            "errors": dict(self.errors),
            "stopped": stopped,
            "notes": [*self.notes],
            "folder": str(self.folder),
            "manifest": str(self.manifest),
            "contact_sheet": self.contact_sheet and str(self.contact_sheet),
        }

    def __str__(self) -> str:
        counts = [
            f"{count_text(self.made, 'prompt')} made",
            *(
                f"{count:,} {word}"
                for count, word in (
                    (self.skipped, "made before"),
                    (self.blocked, "blocked"),
                    (self.failed, "failed"),
                    (len(self.unknown), "unknown"),
                    (self.left, "left"),
                    (self.bad, "left out"),
                )
                if count
            ),
        ]
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


def _not_run(name: str) -> bool:
    kind = error_class(name)
    return kind is not None and kind.outcome is Outcome.NOT_RUN


def make_report(run: JobRun, started: float, skipped: int) -> JobReport:
    """Finish the folder and report the run.

    Args:
        run: A run that has ended.
        started: When it started, on the monotonic clock, in seconds.
        skipped: Number of prompts whose images were all in the folder before.

    Returns:
        The report.
    """
    backlog = run.backlog
    counts = dict.fromkeys(("made", "blocked", "failed", "left"), 0)
    names = Counter(run.errors)
    for item in backlog.prompts.items:
        finished = backlog.history.finished.get(item.key)
        if finished and finished.made >= item.n:
            counts["made"] += 1
            continue
        names.update(finished.errors if finished else ())
        if finished and finished.errors:
            counts[kind_of(finished.errors)] += 1
        elif item.key not in backlog.history.open:
            counts["left"] += 1
    counts["made"] -= skipped
    total, sheet, notes = _finish_folder(run)
    return JobReport(
        **counts,
        skipped=skipped,
        unknown=backlog.unknown(with_running=True),
        bad=len(backlog.prompts.problems),
        images=run.made,
        cost=run.charges.amounts,
        unpriced=run.charges.unpriced,
        list_price=run.list_prices.amounts,
        sandbox=backlog.uses_sandbox(run.generator),
        total_cost=total,
        seconds=round(time.monotonic() - started, 3),
        over_budget=run.over_budget,
        stopped=run.stopped,
        interrupted=run.stop_event is not None and run.stop_event.is_set(),
        errors=dict(names),
        folder=run.folder.path,
        manifest=run.manifest.path,
        contact_sheet=sheet,
        notes=notes,
    )


def _finish_folder(run: JobRun) -> tuple[dict[str, Decimal], Path | None, tuple[str, ...]]:
    history, folder = run.backlog.history, run.folder
    total = Charges()
    for finished in history.finished.values():
        total.add(Money.of({"cost": finished.cost, "currency": finished.currency}))
    try:
        folder.check()
        if history.superseded:
            run.manifest.compact(history.finished)
        name = _sheet_name(folder)
        order = sorted(history.finished.values(), key=lambda item: (item.line, item.start))
        tiles = (tile for item in order for tile in _tiles(run.manifest.read(item.start, item.size)))
        sandbox = run.backlog.uses_sandbox(run.generator)
        cost = cost_text({} if sandbox else total.amounts, sandbox=sandbox)
        facts = (f"{count_text(len(order), 'prompt')}, {cost}.",)
        folder.replace(name, contact_sheet(tiles, title=f"CogView: {folder.path.name}", facts=facts))
    except (OSError, CogViewError) as error:
        reason = error.message if isinstance(error, CogViewError) else f"{error.strerror or type(error).__name__}."
        run.stop(
            CogViewStorageError(
                f"The contact sheet could not be written. {reason}",
                hint="The manifest is complete; run the job again to write the page.",
            )
        )
        return total.amounts, None, ()
    first = CONTACT_SHEETS[0]
    other = f"The folder has another {first}, which is not overwritten; the contact sheet is {name}."
    return total.amounts, folder.path / name, (other,) if name != first else ()


def _sheet_name(folder: JobFolder) -> str:
    """Choose the first name for the page that is free, or that a job used before.

    Returns:
        The name.

    Raises:
        FileExistsError: All names belong to other files.
    """
    for name in CONTACT_SHEETS:
        try:
            head = folder.read(name, 1000)
        except CogViewConfigurationError:  # a symbolic link, a folder, a pipe
            continue
        if head is None or is_contact_sheet(head):
            return name
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def _tiles(record: dict[str, Any]) -> Iterator[Tile]:
    """Yield the tiles of one prompt on the contact sheet."""
    prompt, label = record["arguments"]["prompt"], f"{record['line']}"
    for image in record["images"]:
        shape = (image["width"], image["height"]) if image["width"] and image["height"] else None
        yield Tile(prompt, label, file=image["file"], shape=shape)
    for failure in record["failures"]:
        kind = error_class(failure["error"])
        blocked = kind is not None and kind.scope is Scope.PROMPT
        yield Tile(prompt, label, kind="blocked" if blocked else "failed", reason=failure["message"])
