"""What a job shows for its work: the contact sheet, which is written while it runs, and the report at its end.

The contact sheet has pages of at most 500 tiles in the order of the prompts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from heapq import merge
from itertools import chain
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.errors import (
    CogViewConfigurationError,
    CogViewError,
    CogViewStorageError,
    ContentFilter,
    Scope,
    error_class,
    most_severe,
    printable,
)
from langchain_cogview.jobs.history import Attempt
from langchain_cogview.jobs.manifest import MANIFEST, kind_of
from langchain_cogview.jobs.plan import JobReport
from langchain_cogview.jobs.prompts import count_text
from langchain_cogview.notebook.display import cost_text as image_cost_text
from langchain_cogview.notebook.html import Tile, contact_sheet, is_contact_sheet
from langchain_cogview.text import moment_text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from langchain_cogview.jobs.folder import JobFolder, RecordFile
    from langchain_cogview.jobs.history import Finished, FinishedPrompts, History
    from langchain_cogview.jobs.remote import RemoteJob
    from langchain_cogview.jobs.run import JobRun
    from langchain_cogview.notebook.html import Kind

PAGE_TILES: Final = 500
"""Most tiles on one page: browsers get slow with more."""
NAMES: Final = ("index.html", "contact-sheet.html", *(f"contact-sheet-{n}.html" for n in range(2, 100)))
"""Names for the first page; the first one that is free, or that a job wrote, is used."""
_PUBLICATIONS: Final = 3


# --- the report


def report_of(run: JobRun, started: float) -> JobReport:
    """Finish the folder of a run that has ended.

    Args:
        run: The run.
        started: When it began, by `time.monotonic`.

    Returns:
        What it did.
    """
    backlog = run.backlog
    counts = dict.fromkeys(("made", "blocked", "failed", "left"), 0)
    names = Counter(run.errors)
    for item in backlog.prompts.items:
        finished = backlog.history.finished.get(item.key)
        if finished and finished.outcome.made >= item.n:
            counts["made"] += 1
            continue
        errors = finished.outcome.errors if finished else ()
        names.update(errors)
        if errors:
            counts[kind_of(errors)] += 1
        elif item.key not in backlog.history.open:
            counts["left"] += 1
    counts["made"] -= backlog.skipped
    total, sheet, notes = _finish_folder(run)
    return JobReport(
        **counts,
        skipped=backlog.skipped,
        unknown=backlog.unknown(),
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


def _finish_folder(run: JobRun) -> tuple[Mapping[str, Decimal], Path | None, tuple[str, ...]]:
    history, folder = run.backlog.history, run.folder
    total = run.backlog.total_cost()
    try:
        folder.check()
        if history.superseded:
            compact(run.manifest, history)
        name = run.finish_sheet()
    except (OSError, CogViewError) as error:
        reason = error.message if isinstance(error, CogViewError) else f"{error.strerror or type(error).__name__}."
        run.stop(
            CogViewStorageError(
                f"The contact sheet could not be written. {reason}",
                hint="The manifest is complete; run the job again to write the page.",
            )
        )
        return total, None, ()
    first = NAMES[0]
    other = f"The folder has another {first}, which is not overwritten; the contact sheet is {name}."
    return total, folder.path / name, (other,) if name != first else ()


def compact(manifest: RecordFile, history: History) -> None:
    """Remove the lines of a manifest that later ones replace.

    Args:
        manifest: The file.
        history: What it says; the positions of the lines are renewed.
    """
    manifest.compact(history.finished.by_start())
    history.finished.moved()
    history.superseded = 0


# --- a job at a URL


def published(job: RemoteJob, run: JobRun, report: Callable[[], JobReport]) -> JobReport:
    """Upload manifest and contact sheet, with what other workers recorded meanwhile, until nothing is new.

    Args:
        job: The job.
        run: The run, which has ended.
        report: Makes the report from the records, and the contact sheet in the temporary folder.

    Returns:
        The report, in which the paths are URLs. It is made without what cannot be read or written at the URL.
    """
    try:
        for _ in range(_PUBLICATIONS):
            job.refresh(run.backlog.history, run.attempts, run.manifest)
            made = report()
            job.publish()
            if not job.refresh(run.backlog.history, run.attempts, run.manifest):
                break  # otherwise the pages of another worker may have been replaced by older ones
        sheet = f"{job.url}/{Path(made.contact_sheet).name}" if made.contact_sheet else None
    except CogViewError as error:
        run.stop(error)
        made, sheet = report(), None
    notes = (*made.notes, *job.notes())
    manifest = f"{job.url}/{MANIFEST}"
    return replace(made, folder=job.url, manifest=manifest, contact_sheet=sheet, notes=notes)


# --- the contact sheet


class ContactSheet:
    """The pages of a job. They show what the manifest says; a page is written through the descriptor of the folder."""

    def __init__(self, folder: JobFolder, manifest: RecordFile) -> None:
        self._folder = folder
        self._manifest = manifest
        self._lock = threading.Lock()
        self._sources: tuple[str, ...] = ()
        self._tiles_left = 0  # how many new tiles do not fill a page
        self._is_updating = False
        self._end = manifest.end  # the records before this byte are on pages of an earlier run or update

    def count(self, tiles: int) -> bool:
        """Count new tiles; the caller lets in one thread at a time.

        Returns:
            Whether there are enough for a page. If so, the caller calls `update`; until that has ended, this returns False.
        """
        self._tiles_left += tiles
        if self._tiles_left < PAGE_TILES or self._is_updating:
            return False
        self._tiles_left %= PAGE_TILES
        self._is_updating = True
        return True

    def update(self, finished: FinishedPrompts, cost: str) -> None:
        """Write the pages with new records while the job runs; what cannot be written is written when the job ends.

        Args:
            finished: A snapshot of all records. What is in flight is on no page.
            cost: What all images cost, as text.
        """
        try:
            with self._lock, contextlib.suppress(OSError, CogViewError):
                facts = _facts(finished, 0, cost)
                self._sources = finished.sources
                self._write(_first_name(self._folder), finished.in_order(), facts, since=self._end)
        finally:
            self._is_updating = False

    def finish(self, finished: FinishedPrompts, cost: str, unknown: Collection[Attempt] = ()) -> str:
        """Write all pages, and remove those of an earlier run that are not needed any more.

        Args:
            finished: All records.
            cost: What all images cost, as text.
            unknown: The requests without an end in the manifest.

        Returns:
            The name of the first page.

        Raises:
            CogViewError: A page or the manifest was changed by another program.
            OSError: A page cannot be written.
        """
        with self._lock:
            name = _first_name(self._folder)
            self._sources = finished.sources
            entries = _in_order(finished, unknown)
            number = self._write(name, entries, _facts(finished, len(unknown), cost), since=0) + 1
            while self._is_ours(page_name(name, number)):
                self._folder.remove(page_name(name, number))
                number += 1
            return name

    def _write(self, name: str, entries: Iterable[Finished | Attempt], facts: list[str], *, since: int) -> int:
        # Write the pages that have a record from `since` on, and the first one; return how many pages there are.
        end = since
        number, pages = 1, _pages(entries)
        first = page = next(pages, [])
        while page:
            following = next(pages, [])
            end = max(end, end, *(item.start + item.size for item in page if not isinstance(item, Attempt)))
            # The page before a new one gets a link to it.
            if number > 1 and any(_is_new(item, since) for item in (*page, *following)):
                self._write_page(name, number, page, is_last=not following)
            page, number = following, number + bool(following)
        links = [(str(n), page_name(name, n)) for n in range(1, number + 1)] if number > 1 else []
        title = f"CogView: {self._folder.path.name}"
        facts = [*facts, _page_text(1, number)] if number > 1 else facts
        content = contact_sheet(self._tiles(first), title=title, facts=facts, links=links, counts=_counts(first))
        self._folder.replace(name, content)
        self._end = end
        return number

    def _write_page(self, first: str, number: int, page: list[Finished | Attempt], *, is_last: bool) -> None:
        name = page_name(first, number)
        if self._folder.read(name, 1) is not None and not self._is_ours(name):
            raise CogViewConfigurationError(
                f"{printable(str(self._folder.path / name), 120)} is not a page of the contact sheet and is not overwritten.",
                hint="Move it away, then run the job again.",
            )
        links = [("First page", first), ("Previous page", page_name(first, number - 1))]
        links += [] if is_last else [("Next page", page_name(first, number + 1))]
        title = f"CogView: {self._folder.path.name}, page {number}"
        self._folder.replace(name, contact_sheet(self._tiles(page), title=title, links=links, counts=_counts(page)))

    def _tiles(self, page: list[Finished | Attempt]) -> Iterator[Tile]:
        for item in page:
            if isinstance(item, Attempt):
                yield _unknown_tile(item)
            else:
                source = f" {self._sources[item.source]}" if len(self._sources) > 1 else ""
                yield from _tiles(self._manifest.read(item.start, item.size), source)

    def _is_ours(self, name: str) -> bool:
        try:
            head = self._folder.read(name, 1000)
        except CogViewConfigurationError:  # a symbolic link, a folder, a pipe
            return False
        return head is not None and is_contact_sheet(head)


def page_name(first: str, number: int) -> str:
    """Return the name of a page, from the name of the first one."""
    stem, _, ending = first.rpartition(".")
    return first if number == 1 else f"{stem}-page-{number}.{ending}"


def _first_name(folder: JobFolder) -> str:
    # The first name that is free, or that a job used before.
    for name in NAMES:
        try:
            head = folder.read(name, 1000)
        except CogViewConfigurationError:  # a symbolic link, a folder, a pipe
            continue
        if head is None or is_contact_sheet(head):
            return name
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def _in_order(finished: FinishedPrompts, unknown: Collection[Attempt]) -> Iterator[Finished | Attempt]:
    """Return records and requests in the order of the prompts; with several files of prompts, the requests come last."""
    records, attempts = finished.by_line(), sorted(unknown, key=attrgetter("line"))
    if len(finished.sources) > 1:
        return chain(records, attempts)
    return merge(records, attempts, key=attrgetter("line"))


def _is_new(item: Finished | Attempt, since: int) -> bool:
    return isinstance(item, Attempt) or item.start >= since


def _pages(entries: Iterable[Finished | Attempt]) -> Iterator[list[Finished | Attempt]]:
    page: list[Finished | Attempt] = []
    tiles = 0
    for item in entries:
        count = 1 if isinstance(item, Attempt) else item.outcome.made + len(item.outcome.errors)
        if page and tiles + count > PAGE_TILES:
            yield page
            page, tiles = [], 0
        page.append(item)
        tiles += count
    if page:
        yield page


# --- counts of a contact sheet


def _kind_of(error: str) -> Kind:
    kind = error_class(error)
    return "blocked" if kind is not None and kind.scope is Scope.PROMPT else "failed"


def _counts(page: Iterable[Finished | Attempt]) -> Counter[Kind]:
    """Return how many tiles of each kind a page has."""
    counts: Counter[Kind] = Counter()
    for item in page:
        if isinstance(item, Attempt):
            counts["unknown"] += 1
        else:
            counts["image"] += item.outcome.made
            counts.update(map(_kind_of, item.outcome.errors))
    return counts


def _facts(finished: FinishedPrompts, unknown: int, cost: str) -> list[str]:
    """Return the lines below the title: counts as a gallery has them, and the date."""
    counts: Counter[Kind] = Counter({"unknown": unknown})
    for outcome, number in finished.outcomes().items():
        counts["image"] += outcome.made * number
        for error in outcome.errors:
            counts[_kind_of(error)] += number
    words: tuple[tuple[Kind, str], ...] = (
        ("blocked", "blocked"),
        ("failed", "failed"),
        ("unknown", "of unknown outcome"),
    )
    parts = [count_text(counts["image"], "image")]
    parts += [f"{counts[kind]:,} {word}" for kind, word in words if counts[kind]]
    files = f" of {count_text(len(finished.sources), 'file')}" if len(finished.sources) > 1 else ""
    prompts = f"{count_text(len(finished), 'prompt')}{files}"
    return [" · ".join([*parts, cost]), f"{prompts} · written {moment_text(datetime.now(UTC))}"]


def _page_text(number: int, pages: int) -> str:
    return f"Page {number:,} of {pages:,}: the counts beside the buttons are those of this page."


# --- tiles of a contact sheet


def _tiles(record: dict[str, Any], source: str) -> Iterator[Tile]:
    """Yield the tiles of one prompt."""
    prompt = record["arguments"]["prompt"]
    several = len(record["images"]) + len(record["failures"]) > 1
    labels = (f"{record['line']}{f'.{number}' if several else ''}{source}" for number in range(1, 1 << 30))
    for image in record["images"]:
        shape = (image["width"], image["height"]) if image["width"] and image["height"] else None
        size = [f"{shape[0]}×{shape[1]}"] if shape else []
        facts = (*size, _cost(image, record["currency"]), *image.get("warnings", ()))
        label, worst = next(labels), _worst(image)
        badge = f"content filter: {worst}" if worst else ""
        yield Tile(prompt, label, facts, badge=badge, file=image["file"], shape=shape)
    for failure in record["failures"]:
        kind, link = _kind_of(failure["error"]), failure.get("url")
        yield Tile(prompt, next(labels), kind=kind, reason=failure["message"], link=link)


def _unknown_tile(attempt: Attempt) -> Tile:
    what = f"It may have been charged. Request id: {attempt.request_id}."
    if attempt.task_id:
        what = f"It is paid for, and the next run asks for its image again. Task id: {attempt.task_id}."
    return Tile(attempt.prompt, f"{attempt.line}", kind="unknown", reason=what)


def _cost(image: dict[str, Any], currency: str | None) -> str:
    cost = None if image["cost"] is None else Decimal(image["cost"])
    facts: Any = SimpleNamespace(cost=cost, currency=currency, cached=image["cached"], sandbox=image["sandbox"])
    return image_cost_text(facts)


def _worst(image: dict[str, Any]) -> ContentFilter | None:
    entries = (ContentFilter(item.get("role"), item.get("level")) for item in image.get("content_filter", ()))
    return most_severe(tuple(entries))
