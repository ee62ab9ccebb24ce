"""Many pictures as a job: a file of prompts, a folder with a manifest, and no picture paid twice however often it is killed.

>>> report = run_job("prompts.txt", "pictures", base_url="sandbox:")    # doctest: +SKIP
>>> print(report)                                                       # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.runnables import ensure_config
from langchain_core.runnables.config import merge_configs

from langchain_cogview.concurrency import entered_in_thread, in_thread
from langchain_cogview.errors import CogViewConfigurationError, printable
from langchain_cogview.jobs.folder import JobFolder, spare_descriptors
from langchain_cogview.jobs.manifest import attempts_of, manifest_of, read_history
from langchain_cogview.jobs.plan import (
    Backlog,
    JobPlan,
    UnknownAttempt,
    job_budget,
    job_settings,
    price_of,
    read_settings,
    refuse_foreign_folder,
    refuse_other_settings,
    write_settings,
)
from langchain_cogview.jobs.prompts import Problem, check_prompts, count_text
from langchain_cogview.jobs.report import INTERRUPTED, UNDER_WAY, JobReport, make_report
from langchain_cogview.jobs.run import FILES_PER_IMAGE, JobRun
from langchain_cogview.worker_pool import astream_tasks, stream_in_threads

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from decimal import Decimal

    from langchain_core.runnables import RunnableConfig

    from langchain_cogview.cost import Budget
    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.jobs.prompts import PromptFormat, PromptSource

__all__ = ["JobPlan", "JobReport", "Problem", "UnknownAttempt", "arun_job", "plan_job", "run_job"]


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
    **settings: Any,
) -> JobReport:
    """Draw every prompt of a file into a folder, each once, over as many runs as it takes.

    The folder's manifest has a line for each finished prompt, and a line was written before each paid request. Run again
    after whatever ended it, the job goes on: what is in the manifest is skipped, a picture that was saved or is being made
    at the service is entered without paying, and a request of which nothing tells what became of it is listed. Lines are
    known by their arguments, so that the file may grow or be sorted anew.

    Args:
        prompts: A file (`.txt`, `.csv`, `.tsv`, `.jsonl`; `-` is the standard input), or texts and dicts of arguments.
        output_dir: A local folder, made when missing; one job at a time writes to it. A symbolic link is resolved once, at the
            start. A folder that holds something else than a job is refused.
        generator: Makes the pictures; its `output_dir` is replaced. None: one is made of `settings`.
        limit: Draw at most so many prompts; None: all.
        budget: Stop before a picture whose list price would pass it, in the platform's currency; counts all runs in this
            folder, what may have been charged, and sandbox pictures alike. None: no limit.
        retry_failed: Draw again what failed or was blocked.
        retry_unknown: Draw again what may have been charged, and tasks that do not end within the generator's `timeout`: that
            can pay twice.
        unique: Draw lines that say the same once, not each.
        skip_bad: Skip lines that are not valid, in place of refusing all.
        format: Of the file: `txt`, `csv`, `tsv` or `jsonl`. None: as its ending says.
        progress: Show a bar. None: where somebody sees it.
        config: LangChain's, for every call.
        on_plan: Called with what will be done, before anything is sent; what it raises ends the job.
        stop: Once it is set, nothing more is sent; what is under way ends, and the report tells what is left.
        into_existing: Begin a job in a folder that holds other files. The job adds its files, and writes over none.
        **settings: Arguments of `CogViewImageGenerator`.

    Returns:
        What it came to. An error that would befall every prompt (key, balance) stops the job and is `report.stopped`, and so
        do five prompts in a row that did not run (no network, service overloaded); a blocked or failed prompt is counted,
        and the others go on. What did not run is left for the next run.

    Raises:
        CogViewInvalidRequestError: A line is not valid, and `skip_bad` is not set; its notes say which.
        CogViewConfigurationError: A setting or the file is wrong, the folder's job was begun with other arguments, its manifest
            is damaged, another job is writing to it, or it holds something else than a job. Nothing was sent.
        CogViewStorageError: The folder cannot be written. Nothing was sent.
    """
    try:
        job = _Job(prompts, output_dir, generator, settings, format=format, unique=unique)
    finally:
        settings.clear()  # the key may be among them: the frame of an error holds none
    with job.locked_run(
        limit=limit,
        budget=budget,
        retry_failed=retry_failed,
        retry_unknown=retry_unknown,
        skip_bad=skip_bad,
        into_existing=into_existing,
    ) as run:
        run.stop_event = stop
        if on_plan:
            on_plan(job.plan)
        with run.cancel_token(), job.with_progress(progress, config) as run_config:
            _run_all(
                stream_in_threads(
                    (partial(run.collect, work_item, run_config) for work_item in run.free_work_items()),
                    job.max_workers,
                )
            )
            again = True
            while again:
                _run_all(
                    stream_in_threads(
                        (partial(run.generate, work_item, run_config) for work_item in run.work_items()),
                        job.max_workers,
                    )
                )
                again = run.should_continue()
        return make_report(run, job.started, job.skipped)


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
    **settings: Any,
) -> JobReport:
    """Draw every prompt of a file into a folder. The twin of `run_job`.

    Files are read and written in threads. The line before a paid request, and that of a task's id, are on the disk before the
    next step is taken.
    """
    try:
        job = await in_thread(_Job, prompts, output_dir, generator, settings, format=format, unique=unique)
    finally:
        settings.clear()
    context = job.locked_run(
        limit=limit,
        budget=budget,
        retry_failed=retry_failed,
        retry_unknown=retry_unknown,
        skip_bad=skip_bad,
        into_existing=into_existing,
    )
    async with entered_in_thread(context) as run:
        run.stop_event = stop
        if on_plan:
            on_plan(job.plan)
        with run.cancel_token(), job.with_progress(progress, config) as run_config:
            await _arun_all(
                astream_tasks(
                    (partial(run.acollect, work_item, run_config) for work_item in run.free_work_items()),
                    job.max_workers,
                )
            )
            again = True
            while again:
                await _arun_all(
                    astream_tasks(
                        (partial(run.agenerate, work_item, run_config) for work_item in run.work_items()),
                        job.max_workers,
                    )
                )
                again = run.should_continue()
        return await in_thread(make_report, run, job.started, job.skipped)


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
    **settings: Any,
) -> JobPlan:
    """What `run_job` would do with the same arguments: sends nothing, and changes no file.

    Lines that are not valid are reported in the plan, not raised.

    Raises:
        CogViewConfigurationError: As `run_job`.
    """
    try:
        job = _Job(prompts, output_dir, generator, settings, format=format, unique=unique)
    finally:
        settings.clear()  # the key may be among them: the frame of an error holds none
    with JobFolder(job.folder) as folder, contextlib.ExitStack() as files:
        job.was_begun(folder, into_existing=into_existing)
        attempts, manifest = (files.enter_context(opened(folder)) for opened in (attempts_of, manifest_of))
        backlog = Backlog(
            job.prompts,
            read_history(attempts, manifest),
            folder,
            retry_failed=retry_failed,
            retry_unknown=retry_unknown,
        )
        return backlog.plan(job.generator, job.budget(backlog, budget), limit=limit)


class _Job:
    """A job's prompts, folder and generator; the steps that both twins share."""

    plan: JobPlan
    ready_and_running: tuple[int, int]
    """Pictures that need not be drawn: those in the folder, and those under way at the service."""

    def __init__(
        self,
        prompts: PromptSource,
        output_dir: str | Path,
        generator: CogViewImageGenerator | None,
        settings: dict[str, Any],
        *,
        format: PromptFormat | None,  # noqa: A002
        unique: bool,
    ) -> None:
        self.started = time.monotonic()
        self.folder = _local(output_dir)
        self.generator = _generator(generator, settings, self.folder)
        self.settings = job_settings(self.generator)
        defaults = {name: value for name, value in self.settings.items() if name != "service"}
        self.prompts = check_prompts(prompts, defaults, format=format, unique=unique)
        models = {item.model for item in self.prompts.items} or {self.generator.model}
        self.max_workers = max(self.generator.max_workers(model) for model in models)

    def was_begun(self, folder: JobFolder, *, into_existing: bool) -> bool:
        """Whether the folder's job was begun before.

        Raises:
            CogViewConfigurationError: It is another job's, or none's.
        """
        settings = read_settings(folder)
        if settings is None:
            refuse_foreign_folder(folder, into_existing=into_existing)
        else:
            refuse_other_settings(self.folder, settings, self.settings)
        return settings is not None

    def budget(self, backlog: Backlog, amount: Any) -> Budget:
        """What may be spent, and what is spent of it."""
        budget = job_budget(self.generator, amount, (item.model for item in self.prompts.items))
        for model in backlog.spent_models():
            budget.commit(price_of(self.generator, model))
        return budget

    @contextmanager
    def locked_run(
        self,
        *,
        limit: int | None,
        budget: Any,
        retry_failed: bool,
        retry_unknown: bool,
        skip_bad: bool,
        into_existing: bool,
    ) -> Iterator[JobRun]:
        """The job with its folder locked and what is free in it entered."""
        if limit is not None and (not isinstance(limit, int) or limit < 0):
            raise CogViewConfigurationError(f"limit is a number of prompts, 0 or more, not {limit!r:.40}.", hint="")
        if not skip_bad:
            self.prompts.refuse_problems()
        job_budget(self.generator, budget, (item.model for item in self.prompts.items))  # before the folder is made
        with JobFolder(self.folder, create=True) as folder, contextlib.ExitStack() as stack:
            folder.lock()
            begun = self.was_begun(folder, into_existing=into_existing)
            attempts, manifest = (
                stack.enter_context(opened(folder, writable=True)) for opened in (attempts_of, manifest_of)
            )
            history = read_history(attempts, manifest)
            backlog = Backlog(self.prompts, history, folder, retry_failed=retry_failed, retry_unknown=retry_unknown)
            left = self.budget(backlog, budget)
            if not begun:
                write_settings(folder, self.settings)
            attempts.ready()
            manifest.ready()
            if history.superseded:
                manifest.compact(history.finished)
                history.superseded = 0
            self.skipped = sum(backlog.work_item(item).made for item in self.prompts.items)
            self.plan = backlog.plan(self.generator, left.copy(), limit=limit)
            self._fit_open_files()
            run = JobRun(folder, self.generator, backlog, left, attempts=attempts, manifest=manifest, limit=limit)
            stack.callback(run.close)
            run.record_recovered()
            work_items = [backlog.work_item(item) for item in self.prompts.items]
            ready = sum(work_item.finished.made for work_item in work_items if work_item.finished)
            self.ready_and_running = ready, sum(len(work_item.running) for work_item in work_items)
            try:
                yield run
            except KeyboardInterrupt as interrupt:
                interrupt.add_note(f"{INTERRUPTED} {UNDER_WAY}")
                raise

    def _fit_open_files(self) -> None:
        """Have no more in flight than the process may open files for.

        Raises:
            CogViewConfigurationError: That is none.
        """
        spare = spare_descriptors()
        if spare is None or spare >= self.max_workers * FILES_PER_IMAGE:
            return
        self.max_workers = spare // FILES_PER_IMAGE
        if not self.max_workers:
            raise CogViewConfigurationError(
                f"This process may open only {spare} further files, and an image takes {FILES_PER_IMAGE}; nothing was sent.",
                hint="Raise the limit (ulimit -n), or close files.",
            )
        note = f"At most {count_text(self.max_workers, 'prompt')} at a time: this process may open only {spare} further files."
        self.plan = replace(self.plan, notes=(*self.plan.notes, note))

    @contextmanager
    def with_progress(self, progress: bool | None, config: RunnableConfig | None) -> Iterator[RunnableConfig]:  # noqa: FBT001
        """The config of every call: with a bar over all of them."""
        # A run id names one run, and these are many.
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


def _run_all(results: Any) -> None:
    with contextlib.closing(results):
        for _, result in results:
            if isinstance(result, Exception):  # the tasks raise nothing of their own accord
                raise result


async def _arun_all(results: Any) -> None:
    async with contextlib.aclosing(results):
        async for _, result in results:
            if isinstance(result, Exception):
                raise result


def _local(output_dir: str | Path) -> Path:
    text = str(output_dir)
    if "://" in text or "\0" in text or not text.strip():
        raise CogViewConfigurationError(
            f"A job's folder is a local one, not {printable(text, 120)!r}.",
            hint="Its manifest is appended to, which no other storage does; copy the folder when the job has ended.",
        )
    try:
        return Path(output_dir).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise CogViewConfigurationError(f"The folder cannot be found: {error}.", hint="Name another.") from None


def _generator(given: CogViewImageGenerator | None, settings: dict[str, Any], folder: Path) -> CogViewImageGenerator:
    from langchain_cogview.generator import CogViewImageGenerator  # noqa: PLC0415

    if given is None:
        return CogViewImageGenerator(**settings, output_dir=folder)
    if settings:
        raise CogViewConfigurationError(
            f"The setting {next(iter(settings))!r} does not go with a generator, which has its own.",
            hint="Set it on the generator.",
        )
    return given.model_copy(update={"output_dir": folder, "download": True, "storage_options": None})
