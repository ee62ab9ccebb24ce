"""Generate many images as a job: from a file of prompts into a folder with a manifest.

No image is paid for twice, however often the job is killed and run again.

>>> report = run_job("prompts.txt", "images", base_url="sandbox:")    # doctest: +SKIP
>>> print(report)                                                     # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from langchain_core.runnables import ensure_config
from langchain_core.runnables.config import merge_configs

from langchain_cogview.batches import load_progress_bar
from langchain_cogview.catalog import currency_of
from langchain_cogview.concurrency import entered_in_thread, in_thread
from langchain_cogview.errors import CogViewConfigurationError, CogViewError, printable
from langchain_cogview.jobs.files import spare_descriptors
from langchain_cogview.jobs.folder import SHARD_FOLDER, FolderInUseError, JobFolder
from langchain_cogview.jobs.history import read_history
from langchain_cogview.jobs.items import Problem, PromptList, check_prompts, checked_items
from langchain_cogview.jobs.ledger import ShardLedger, locked_parent
from langchain_cogview.jobs.manifest import attempts_of, manifest_of
from langchain_cogview.jobs.plan import (
    INTERRUPTED,
    UNDER_WAY,
    Backlog,
    JobPlan,
    JobReport,
    UnknownAttempt,
    job_budget,
    job_settings,
    price_of,
    read_settings,
    refuse_foreign_folder,
    write_settings,
)
from langchain_cogview.jobs.prompts import count_text
from langchain_cogview.jobs.remote import remote_job
from langchain_cogview.jobs.report import compact, published, report_of
from langchain_cogview.jobs.run import FILES_PER_IMAGE, JobRun
from langchain_cogview.jobs.shards import (
    OPTIONS,
    MergedJob,
    Shard,
    Workers,
    begun_count,
    job_generator,
    local_folder,
    merge_shards,
)
from langchain_cogview.pools import astream_tasks, stream_in_threads

if TYPE_CHECKING:
    import threading
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from decimal import Decimal
    from pathlib import Path

    from langchain_core.runnables import RunnableConfig

    from langchain_cogview.budget import Budget
    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.jobs.folder import RecordFile
    from langchain_cogview.jobs.history import History
    from langchain_cogview.jobs.prompts import PromptFormat, PromptSource

__all__ = [
    "FolderInUseError",
    "JobPlan",
    "JobReport",
    "MergedJob",
    "Problem",
    "UnknownAttempt",
    "arun_job",
    "merge_shards",
    "plan_job",
    "run_job",
    "run_shards",
    "work_on_shards",
]


def run_job(
    prompts: PromptSource,
    output_dir: str | Path,
    *,
    generator: CogViewImageGenerator | None = None,
    limit: int | None = None,
    budget: Decimal | float | str | None = None,
    retry_failed: bool = False,
    retry_unknown: bool = False,
    unique: bool = False,
    skip_bad: bool = False,
    format: PromptFormat | None = None,  # noqa: A002
    progress: bool | None = None,
    config: RunnableConfig | None = None,
    on_plan: Callable[[JobPlan], None] | None = None,
    stop: threading.Event | None = None,
    into_existing: bool = False,
    shard: str | None = None,
    **settings: Any,
) -> JobReport:
    """Generate the images of every prompt in a file, each once, over as many runs as it takes.

    The folder's manifest has a line for each finished prompt, and a line is written before each paid request. When the job
    is run again, it continues: prompts in the manifest are skipped, images that were saved or are in progress at the service
    are added without paying, and requests whose outcome is unknown are listed. Lines are identified by their arguments, so the
    file may grow or be sorted differently.

    The first 1,000 images are saved in the folder, and all others in sub-folders of at most 1,000, `images-0002` and so on. The
    contact sheet, `index.html`, has pages of at most 500 tiles; each page is written as soon as it is full.

    Args:
        prompts: A file (`.txt`, `.csv`, `.tsv`, `.jsonl`; `-` is the standard input), or strings and dicts of arguments.
        output_dir: A local folder, created if it is missing; only one job at a time writes to it. A symbolic link is resolved
            once, at the start. A folder that has other files than a job's is refused. Or a URL such as `s3://bucket/job`, on
            which any number of workers can work at once, with `storage_options` as for the generator; where the store does not
            check a condition (`If-None-Match`), and with a `budget`, one worker at a time.
        generator: Generates the images; its `output_dir` is replaced. None: one is created from `settings`.
        limit: Maximum number of prompts to generate; None: no limit.
        budget: Stop before an image whose list price would exceed this amount, in the currency of the generator's region. It
            counts all runs in this folder, requests that may have been charged, and images of the sandbox. With `shard` it
            counts those of all shards, and all processes that work at the same time must have the same. None: no limit.
        retry_failed: Generate again what failed or was blocked.
        retry_unknown: Generate again what may have been charged, and tasks that do not end within the generator's `timeout`.
            This can pay twice.
        unique: Generate equal lines only once.
        skip_bad: Skip lines that are not valid instead of refusing all lines.
        format: Format of the file: `txt`, `csv`, `tsv` or `jsonl`. None: taken from the file's extension.
        progress: Show a progress bar. None: only in a terminal or a notebook.
        config: The `RunnableConfig` of every call.
        on_plan: Called with the plan before anything is sent; an exception that it raises ends the job.
        stop: Once it is set, nothing more is sent; requests in flight finish, and the report says what is left.
        into_existing: Begin a job in a folder that has other files. The job adds its files and overwrites none.
        shard: `"3/20"`: only the prompts of the third of twenty shards, as a job in a sub-folder of `output_dir`. Each
            prompt belongs to one shard by its hash. `merge_shards` makes one contact sheet of all shards. None: all prompts, in
            one job.
        **settings: Arguments of `CogViewImageGenerator`.

    Returns:
        What the run did. An error that every prompt would have (key, balance) stops the job and is `report.stopped`; so do five
        prompts in a row whose requests did not run (no network, service overloaded). Blocked and failed prompts are counted, and
        the job continues. Requests that did not run are left for the next run.

    Raises:
        CogViewInvalidRequestError: A line is not valid, and `skip_bad` is not set; the notes name the lines.
        CogViewConfigurationError: A setting or the file is wrong, the file has no prompts, the folder's job was begun with other
            arguments, its manifest is damaged, another job is writing to it, it has other files than a job's, or another
            process works on another shard with another budget. Nothing was sent.
        CogViewStorageError: The folder cannot be written. Nothing was sent.
    """
    try:
        job = _Job.of(prompts, output_dir, generator, settings, format=format, unique=unique, shard=shard)
    finally:
        settings.clear()  # the key may be among them: the frame of an error holds none
    retry = {"retry_failed": retry_failed, "retry_unknown": retry_unknown}
    with job.locked_run(retry, limit=limit, budget=budget, skip_bad=skip_bad, into_existing=into_existing) as run:
        run.stop_event = stop
        if on_plan:
            on_plan(job.plan)
        with run.cancel_token(), job.with_progress(progress, config) as run_config:
            for calls in run.passes(run.collect, run.generate, run_config):
                with contextlib.closing(stream_in_threads(calls, job.max_workers)) as results:
                    for _, result in results:
                        _raise_error(result)
        return job.report(run)


async def arun_job(
    prompts: PromptSource,
    output_dir: str | Path,
    *,
    generator: CogViewImageGenerator | None = None,
    limit: int | None = None,
    budget: Decimal | float | str | None = None,
    retry_failed: bool = False,
    retry_unknown: bool = False,
    unique: bool = False,
    skip_bad: bool = False,
    format: PromptFormat | None = None,  # noqa: A002
    progress: bool | None = None,
    config: RunnableConfig | None = None,
    on_plan: Callable[[JobPlan], None] | None = None,
    stop: threading.Event | None = None,
    into_existing: bool = False,
    shard: str | None = None,
    **settings: Any,
) -> JobReport:
    """Async version of `run_job`, with the same arguments.

    Files are read and written in threads. The records of a paid request and of a task's id are durable before the job continues.

    Returns:
        What the run did.

    Raises:
        CogViewError: As for `run_job`.
    """
    try:
        job = await in_thread(
            _Job.of, prompts, output_dir, generator, settings, format=format, unique=unique, shard=shard
        )
    finally:
        settings.clear()
    retry = {"retry_failed": retry_failed, "retry_unknown": retry_unknown}
    context = job.locked_run(retry, limit=limit, budget=budget, skip_bad=skip_bad, into_existing=into_existing)
    async with entered_in_thread(context) as run:
        run.stop_event = stop
        if on_plan:
            on_plan(job.plan)
        await load_progress_bar(progress)
        with run.cancel_token(), job.with_progress(progress, config) as run_config:
            for calls in run.passes(run.acollect, run.agenerate, run_config):
                chosen = _off_the_loop(calls) if job.ledger else calls
                async with contextlib.aclosing(astream_tasks(chosen, job.max_workers)) as results:
                    async for _, result in results:
                        _raise_error(result)
        return await in_thread(job.report, run)


def run_shards(
    prompts: PromptSource,
    output_dir: str | Path,
    count: int,
    *,
    generator: CogViewImageGenerator | None = None,
    **arguments: Any,
) -> list[JobReport]:
    """Work on the shards of a job that no other process holds, one after the other, until none is left.

    Any number of processes and machines with a common folder can do so at the same time. The same command again continues what
    was left. The folder keeps a copy of the prompts and the settings, so that `work_on_shards` needs the folder alone.

    Args:
        prompts: As for `run_job`, but not the standard input: they are read for every shard.
        output_dir: As for `run_job`.
        count: Number of shards, the same in all processes.
        generator: As for `run_job`.
        **arguments: All other arguments of `run_job`. A `budget` holds for all shards together, and a `limit` for each.

    Returns:
        The report of each shard that this process worked on. It ends early after one that was stopped or interrupted, or that the
        budget did not cover.

    Raises:
        CogViewConfigurationError: As for `run_job`.
        CogViewInvalidRequestError: As for `run_job`.
        CogViewStorageError: As for `run_job`.
    """
    options = {name: arguments.pop(name) for name in OPTIONS & set(arguments)}
    try:
        generator = job_generator(generator, arguments, local_folder(output_dir))
    finally:
        arguments.clear()  # as in `run_job`
    workers = Workers(local_folder(output_dir), count, generator)
    return workers.run(run_job, *workers.keeping(prompts, options))


def work_on_shards(
    folder: str | Path, *, generator: CogViewImageGenerator | None = None, **arguments: Any
) -> list[JobReport]:
    """Work on the shards of a job that `run_shards` or `cogview batch --shards` has begun, until none is left that nobody holds.

    Prompts, budget and the settings of the images are those that the job was begun with. The key, the base URL and `shared_limit`
    are those of this process, by its environment or by arguments.

    Args:
        folder: The folder of the job.
        generator: Generates the images. None: one is created from the kept settings and `arguments`.
        **arguments: Other arguments of `run_shards`, which replace the kept ones.

    Returns:
        As `run_shards`. A finished job gives a report for each shard, in which nothing was made.

    Raises:
        CogViewConfigurationError: The folder has no job in shards, or another service answers here. Nothing was sent.
        CogViewInvalidRequestError: As for `run_job`.
        CogViewStorageError: As for `run_job`.
    """
    options = {name: arguments.pop(name) for name in OPTIONS & set(arguments)}
    try:
        workers, prompts, kept = Workers.begun(local_folder(folder), generator, arguments)
    finally:
        arguments.clear()
    return workers.run(run_job, prompts, {**kept, **options})


def plan_job(
    prompts: PromptSource,
    output_dir: str | Path,
    *,
    generator: CogViewImageGenerator | None = None,
    limit: int | None = None,
    budget: Decimal | float | str | None = None,
    retry_failed: bool = False,
    retry_unknown: bool = False,
    unique: bool = False,
    format: PromptFormat | None = None,  # noqa: A002
    into_existing: bool = False,
    shard: str | None = None,
    **settings: Any,
) -> JobPlan:
    """Determine what `run_job` would do with the same arguments. Sends nothing, and changes no file.

    The arguments are those of `run_job`. Lines that are not valid are reported in the plan, not raised.

    Returns:
        The plan.

    Raises:
        CogViewConfigurationError: As for `run_job`.
    """
    try:
        _refuse_limit(limit)
        job = _Job(output_dir, generator, settings, shard)
    finally:
        settings.clear()  # the key may be among them: the frame of an error holds none
    if job.shard:
        job.shard.refuse_others(job.parent, into_existing=into_existing)
    with contextlib.ExitStack() as stack:
        if job.remote:
            stack.enter_context(job.remote.opened(into_existing=into_existing))
        folder = stack.enter_context(JobFolder(job.folder))
        job.was_begun(folder, into_existing=into_existing)
        attempts, manifest = map(stack.enter_context, job.files(folder))
        history = read_history(attempts, manifest)
        found = PromptList(unique=unique)
        backlog = Backlog(found, history, folder, retry_failed=retry_failed, retry_unknown=retry_unknown)
        # The prompts are checked and counted one at a time: a plan holds none of them.
        items = checked_items(found, prompts, job.defaults, format=format, shard=job.shard)
        if job.ledger:
            job.ledger.preview(job_budget(job.generator, budget).amount)
        plan = backlog.plan(job.generator, job.budget(history, budget).copy(), limit=limit, items=items)
        job_budget(job.generator, budget, found.models)  # refuses a model without a price
        return plan


class _Job:
    """A job's prompts, folder and generator, and what the sync and the async version share."""

    plan: JobPlan
    prompts: PromptList
    max_workers: int
    ready_and_running: tuple[int, int]
    """Images that are not paid for again: those in the folder, and those in progress at the service."""

    def __init__(
        self,
        output_dir: str | Path,
        generator: CogViewImageGenerator | None,
        settings: dict[str, Any],
        shard: str | None,
    ) -> None:
        self.started = time.monotonic()
        self.remote = remote_job(output_dir, generator, settings)
        self.folder = self.parent = self.remote.local if self.remote else local_folder(output_dir)
        self.shown_folder = self.remote.url if self.remote else str(self.folder)
        self.shard = None if shard is None else Shard.of(shard)
        if self.shard and self.remote:
            raise CogViewConfigurationError(
                "A job at a URL has no shards; nothing was sent.",
                hint="Leave shard out: any number of workers can work on one URL at the same time.",
            )
        if self.shard:
            self.folder = self.parent / self.shard.name
        self.generator = job_generator(generator, settings, self.folder)
        self.ledger = None
        if self.shard:
            currency = currency_of(self.generator.resolved_region)
            price = partial(price_of, self.generator)
            fallback_models = self.generator.fallback_models
            self.ledger = ShardLedger(
                self.parent, self.shard.name, currency, price=price, fallback_models=fallback_models
            )
        self.settings = job_settings(self.generator)
        self.defaults = {name: value for name, value in self.settings.items() if name != "service"}

    @classmethod
    def of(
        cls,
        prompts: PromptSource,
        output_dir: str | Path,
        generator: CogViewImageGenerator | None,
        settings: dict[str, Any],
        *,
        format: PromptFormat | None,  # noqa: A002
        unique: bool,
        shard: str | None,
    ) -> Self:
        """Return a job with checked prompts."""
        job = cls(output_dir, generator, settings, shard)
        job.prompts = check_prompts(prompts, job.defaults, format=format, unique=unique, shard=job.shard)
        models = job.prompts.models or {job.generator.model}
        job.max_workers = max(job.generator.max_workers(model) for model in models)
        return job

    def was_begun(self, folder: JobFolder, *, into_existing: bool) -> bool:
        """Return whether the folder has a job; refuse a job with other arguments or in shards, and a folder with other files."""
        settings = read_settings(folder, self.shown_folder if self.remote else str(folder.path))
        if settings is None:
            if self.shard:
                begun = _settings_of_shards(self.parent) or self.settings
                _refuse_other_settings(self.shown_folder, begun, self.settings)
            _refuse_shards(folder)
            refuse_foreign_folder(folder, folder.names(), into_existing=into_existing)
        else:
            _refuse_other_settings(self.shown_folder, settings, self.settings)
        return settings is not None

    def files(self, folder: JobFolder, *, writable: bool = False) -> tuple[RecordFile, RecordFile]:
        # The attempts and the manifest.
        if self.remote:
            return self.remote.files(folder, writable=writable)
        return attempts_of(folder, writable=writable), manifest_of(folder, writable=writable)

    def report(self, run: JobRun) -> JobReport:
        """Return what the run did, after finishing its folder."""
        if self.remote:
            return published(self.remote, run, lambda: report_of(run, self.started))
        return report_of(run, self.started)

    def budget(self, history: History, amount: Any) -> Budget:
        """Return the budget, after subtracting what is spent."""
        budget = job_budget(self.generator, amount)
        for model, count in history.spent().items():
            budget.commit(price_of(self.generator, model), count)
        return self.ledger.budget(budget) if self.ledger else budget

    @contextmanager
    def locked_folder(self, amount: Any, *, into_existing: bool) -> Iterator[JobFolder]:
        """Lock the folder, and enter a shard in the budget of all shards.

        Yields:
            The folder.
        """
        budget = job_budget(self.generator, amount, self.prompts.models)  # before the folder is created
        if not self.shard or not self.ledger:
            with contextlib.ExitStack() as stack:
                if self.remote:
                    stack.enter_context(self.remote.working(has_budget=amount is not None))
                    stack.enter_context(self.remote.opened(into_existing=into_existing))
                folder = stack.enter_context(JobFolder(self.folder, create=True))
                folder.lock()
                yield folder
            return
        self.shard.begin(self.parent, into_existing=into_existing)
        with JobFolder(self.folder, create=True) as folder:
            with locked_parent(self.parent) as parent:
                folder.lock()
                self.ledger.begin(parent, budget.amount)
            yield folder

    @contextmanager
    def locked_run(
        self, retry: dict[str, bool], *, limit: int | None, budget: Any, skip_bad: bool, into_existing: bool
    ) -> Iterator[JobRun]:
        # The folder is locked first; what is recovered in it is in the manifest before anything is sent.
        _refuse_limit(limit)
        if not skip_bad:
            self.prompts.refuse_problems()
        with self.locked_folder(budget, into_existing=into_existing) as folder, contextlib.ExitStack() as stack:
            begun = self.was_begun(folder, into_existing=into_existing)
            attempts, manifest = map(stack.enter_context, self.files(folder, writable=True))
            history = read_history(attempts, manifest)
            backlog = Backlog(self.prompts, history, folder, **retry)
            left = self.budget(history, budget)
            if self.ledger:
                stack.callback(self.ledger.end, history)
            if not begun:
                write_settings(folder, self.settings)
                if self.remote and self.remote.begin():
                    self.was_begun(folder, into_existing=False)  # another worker began it at the same time
            attempts.ready()
            manifest.ready()
            if history.superseded:
                compact(manifest, history)
            self.plan = backlog.plan(self.generator, left.copy(), limit=limit)
            self._fit_open_files()
            run = JobRun(folder, self.generator, backlog, left, attempts=attempts, manifest=manifest, limit=limit)
            stack.callback(run.close)
            run.record_recovered()
            self.ready_and_running = backlog.ready + run.made, backlog.running
            try:
                yield run
            except KeyboardInterrupt as interrupt:
                interrupt.add_note(f"{INTERRUPTED} {UNDER_WAY}")
                raise

    def _fit_open_files(self) -> None:
        # At most as many workers as the process may open files for.
        spare = spare_descriptors()
        if spare is None or spare >= self.max_workers * FILES_PER_IMAGE:
            return
        self.max_workers = spare // FILES_PER_IMAGE
        if not self.max_workers:
            raise CogViewConfigurationError(
                f"This process can open only {spare} more files, and an image needs {FILES_PER_IMAGE}; nothing was sent.",
                hint="Raise the limit (ulimit -n), or close files.",
            )
        note = f"At most {count_text(self.max_workers, 'prompt')} at a time: this process can open only {spare} more files."
        self.plan = replace(self.plan, notes=(*self.plan.notes, note))

    @contextmanager
    def with_progress(self, progress: bool | None, config: RunnableConfig | None) -> Iterator[RunnableConfig]:  # noqa: FBT001
        """Yield the config of every call, with one progress bar over all of them."""
        # A run id belongs to one run, and this is many runs.
        options = {name: value for name, value in ensure_config(config).items() if name != "run_id"}
        if progress is False:
            yield options  # type: ignore[misc]
            return
        from langchain_cogview.callbacks import ProgressCallbackHandler  # noqa: PLC0415

        ready, running = self.ready_and_running
        with ProgressCallbackHandler(ready + running + self.plan.images, show=progress) as bar:
            if ready:
                bar.skip(ready)
            yield merge_configs(options, {"callbacks": [bar]})  # type: ignore[arg-type]


async def _off_the_loop(calls: Iterator[Callable[[], Any]]) -> AsyncIterator[Callable[[], Any]]:
    # The next call of a shard may have to wait for the file with the budget of all shards.
    while (call := await in_thread(next, calls, None)) is not None:
        yield call


def _raise_error(result: Any) -> None:
    if isinstance(result, Exception):  # only an error of the job itself
        raise result


def _settings_of_shards(parent: Path) -> dict[str, Any] | None:
    # Of the first shard that has some. With others, a prompt would belong to another shard, and could be paid for twice.
    with JobFolder(parent) as folder:
        for name in sorted(filter(SHARD_FOLDER.fullmatch, folder.names())):
            with contextlib.suppress(CogViewError, OSError), folder.subfolder(name) as part:
                settings = read_settings(part, str(part.path))
                if settings is not None:
                    return settings
    return None


def _refuse_shards(folder: JobFolder) -> None:
    # A job that begins beside them would pay for their prompts again.
    count = begun_count(folder.path)
    if count:
        raise CogViewConfigurationError(
            f"The job in {printable(str(folder.path), 120)} is divided into {count:,} shards; nothing was sent.",
            hint=f"Continue it with --shards {count} or run_shards, or choose another folder.",
        )


def _refuse_limit(limit: int | None) -> None:
    if limit is not None and (not isinstance(limit, int) or limit < 0):
        raise CogViewConfigurationError(f"limit must be a number of prompts, 0 or more, not {limit!r:.40}.", hint="")


def _refuse_other_settings(folder: str, begun: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    names = [name for name in {**settings, **begun} if begun.get(name) != settings.get(name)]
    if names:
        changes = "; ".join(
            f"{name} was {_shown(begun.get(name))} and is now {_shown(settings.get(name))}" for name in names
        )
        raise CogViewConfigurationError(
            f"The job in {printable(folder, 120)} was begun with other arguments; nothing was sent. {changes}.",
            hint="Continue with those arguments, or choose another folder.",
        )


def _shown(value: Any) -> str:
    return "not set" if value is None else printable(repr(value), 100)
