"""The end of a run: its report, a manifest without lines that later ones replace, and the contact sheet."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.cost import Charges, Money
from langchain_cogview.errors import CogViewConfigurationError, CogViewError, CogViewStorageError
from langchain_cogview.jobs.folder import JobFolder
from langchain_cogview.jobs.history import read_history
from langchain_cogview.jobs.manifest import MANIFEST, kind_of
from langchain_cogview.jobs.plan import JobReport
from langchain_cogview.jobs.prompts import cost_text
from langchain_cogview.jobs.remote import SETTINGS_NAME, remote_job
from langchain_cogview.jobs.shards import MergedJob, merge_folders
from langchain_cogview.jobs.sheet import NAMES, ContactSheet
from langchain_cogview.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from decimal import Decimal

    from langchain_cogview.jobs.folder import RecordFile
    from langchain_cogview.jobs.history import History
    from langchain_cogview.jobs.remote import RemoteJob
    from langchain_cogview.jobs.run import JobRun

_PUBLICATIONS: Final = 3


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


def merge_shards(folder: str | Path, *, storage_options: Mapping[str, Any] | None = None) -> MergedJob:
    """Make one manifest and one contact sheet of a job in shards, or of a job at a URL, which may still run. Sends nothing.

    Args:
        folder: The folder of the job, with a sub-folder for each shard; or the URL of a job on which several workers work.
        storage_options: fsspec's options for the URL.

    Returns:
        What the shards, or the workers, have made so far.

    Raises:
        CogViewConfigurationError: The folder has no shards, or shards of several divisions; the URL has no job; or a record is
            damaged.
        CogViewStorageError: The folder cannot be read or written.
    """
    job = remote_job(folder, None, {"storage_options": storage_options})
    if job is None:
        return merge_folders(folder)
    with job.opened(into_existing=False), ExitStack() as stack:
        local = stack.enter_context(JobFolder(job.local))
        if local.read(SETTINGS_NAME, 1) is None:
            raise CogViewConfigurationError(f"There is no job at {printable(job.url, 120)}.", hint="Check the URL.")
        attempts, manifest = map(stack.enter_context, job.files(local, writable=True))
        history = read_history(attempts, manifest)
        finished = history.finished
        compact(manifest, history)
        statuses = Counter(manifest.read(item.start, item.size)["status"] for item in finished.by_line())
        total = Charges()
        for outcome, count in finished.outcomes().items():
            total.add(Money.of({"cost": outcome.cost, "currency": outcome.currency}), count)
        cost = cost_text({} if history.sandbox else total.amounts, sandbox=history.sandbox)
        sheet = ContactSheet(local, manifest).finish(finished, cost, list(history.attempts()))
        job.publish()
    return MergedJob(
        folder=job.url,
        manifest=f"{job.url}/{MANIFEST}",
        contact_sheet=f"{job.url}/{sheet}",
        shards=0,
        count=0,
        prompts=dict(statuses),
        images=sum(item.outcome.made for item in finished.by_line()),
        unknown=sum(1 for _ in history.attempts()),
        cost=cost,
    )
