"""A job in shards: its division, the workers that take one shard after the other, and what they have made together.

Each shard is a job of its own in a sub-folder, with its own manifest, attempts and lock, so that several processes or machines
can work on one file. A prompt's shard follows from its arguments alone, so the file may grow or be sorted differently.

`run_shards` keeps in the job's folder what a further worker needs: the division, a copy of the prompts, and the settings that
have no secrets. The key and the base URL are those of each worker: a folder that others can write to must not decide where a
key is sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from langchain_cogview.api.settings import is_sandbox
from langchain_cogview.cost import Charges, Money
from langchain_cogview.errors import CogViewConfigurationError, printable
from langchain_cogview.images.store import local_path
from langchain_cogview.jobs.folder import (
    SHARD_FOLDER,
    FolderInUseError,
    JobFolder,
    read_error,
    record_bytes,
    write_error,
)
from langchain_cogview.jobs.history import read_history
from langchain_cogview.jobs.ledger import LEDGER, locked_parent
from langchain_cogview.jobs.manifest import ATTEMPTS, MANIFEST, attempts_of, manifest_of
from langchain_cogview.jobs.plan import job_settings, refuse_foreign_folder
from langchain_cogview.jobs.prompts import can_be_read_once, copied_prompts, cost_text, count_text, refuse_one
from langchain_cogview.jobs.remote import SETTINGS_NAME, remote_job
from langchain_cogview.jobs.report import ContactSheet, compact
from langchain_cogview.text import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.jobs.history import Attempt
    from langchain_cogview.jobs.plan import JobPlan, JobReport
    from langchain_cogview.jobs.prompts import PromptSource

MAX_SHARDS: Final = 10_000
_TEXT: Final = re.compile(r"([0-9]{1,5})/([0-9]{1,5})")
DIVISION: Final = "shards.json"
_PROMPTS: Final = "shards-prompts"
"""The folder of the copy, which has the name of the file, as the manifest has it."""
_NAME: Final = r"\A[^/\x00]{1,255}\z" if os.sep == "/" else r"\A[^/\\:\x00]{1,255}\z"
_MAX_BYTES: Final = 1 << 20
OPTIONS: Final = frozenset(
    {
        *("limit", "budget", "retry_failed", "retry_unknown", "unique", "skip_bad", "format", "progress", "config"),
        *("on_plan", "stop", "into_existing"),
    }
)
"""The arguments of `run_job` that are not settings of the generator."""
_KEPT: Final = ("budget", "unique", "skip_bad")
_SETTINGS: Final = (
    *("model", "size", "quality", "n", "user_id", "watermark_enabled", "timeout", "max_retries", "max_concurrency"),
    *("max_concurrency_per_user", "fallback_models", "use_tasks", "prices"),
)


# --- the division


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of the prompts of a job.

    Attributes:
        number: Which part, from 1 to `count`.
        count: The number of parts.
    """

    number: int
    count: int

    @classmethod
    def of(cls, text: str) -> Shard:
        """Read `"3/20"`, the third of twenty shards.

        Returns:
            The shard.

        Raises:
            CogViewConfigurationError: It names no shard.
        """
        found = _TEXT.fullmatch(text.strip()) if isinstance(text, str) else None
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count <= MAX_SHARDS:
            raise CogViewConfigurationError(
                f"shard is a number and a count such as '3/20', not {printable(str(text), 40)!r}; nothing was sent.",
                hint=f"The number is from 1 to the count, and the count at most {MAX_SHARDS:,}.",
            )
        return cls(number, count)

    @property
    def name(self) -> str:
        """Name of its folder in the folder of the job."""
        width = len(str(self.count))
        return f"shard-{self.number:0{width}}-of-{self.count}"

    def has(self, key: str) -> bool:
        """Decide whether a prompt belongs to the shard.

        Args:
            key: The key of the prompt, which begins with the hash of its arguments in hexadecimal digits.

        Returns:
            Whether it does. Equal prompts belong to the same shard.
        """
        return int(key[:16], 16) % self.count == self.number - 1

    def begin(self, parent: Path, *, into_existing: bool) -> None:
        """Create the folder of the shard, unless the job is divided in another way.

        Args:
            parent: The folder of the job.
            into_existing: As for `refuse_others`.

        Raises:
            CogViewConfigurationError: As `refuse_others`. Of two processes that begin different divisions at the same moment, at
                most one goes on.
        """
        self.refuse_others(parent, into_existing=into_existing)
        folder = parent / self.name
        if folder.is_dir():
            return
        JobFolder(folder, create=True).close()
        try:
            self.refuse_others(parent, into_existing=into_existing)
        except CogViewConfigurationError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise

    def refuse_others(self, parent: Path, *, into_existing: bool) -> None:
        """Check that the folder of the job has no shards of another division, whose prompts would be paid for again.

        Args:
            parent: The folder of the job.
            into_existing: Whether the job may begin beside other files than its own, as for `run_job`.

        Raises:
            CogViewConfigurationError: It has, it holds a job that is not divided, or it has other files before the first shard.
        """
        with JobFolder(parent) as folder:
            names = folder.names()  # one look: a worker that begins at the same moment creates its shard first
            divisions = {int(found[2]) for name in names if (found := SHARD_FOLDER.fullmatch(name))}
            if not divisions and SETTINGS_NAME not in names and not _is_divided(folder):
                refuse_foreign_folder(folder, names, into_existing=into_existing)
                self._refuse_taken(folder, names)
        counts = divisions - {self.count}
        if counts:
            raise CogViewConfigurationError(
                f"The job in {printable(str(parent), 120)} is divided into {counts.pop()} shards, not {self.count}; nothing was "
                "sent.",
                hint="Use the same count in all processes, or choose another folder.",
            )
        if SETTINGS_NAME in names:
            raise CogViewConfigurationError(
                f"The job in {printable(str(parent), 120)} is not divided into shards; nothing was sent.",
                hint="Continue it without shard, or choose another folder.",
            )

    def _refuse_taken(self, folder: JobFolder, names: set[str]) -> None:
        # The job replaces its own files, so these names must not be in use before it begins.
        taken = sorted(names & {MANIFEST, ATTEMPTS, DIVISION, LEDGER, _PROMPTS})
        if taken:
            raise CogViewConfigurationError(
                f"{taken[0]} in {printable(str(folder.path), 120)} existed before the job; nothing was sent.",
                hint="Move it away, or choose another folder.",
            )


def local_folder(output_dir: str | Path) -> Path:
    """Resolve the folder of a job.

    Returns:
        The absolute path.

    Raises:
        CogViewConfigurationError: It is a URL, or no folder, or it cannot be found.
    """
    text = str(output_dir)
    if "://" in text or "\0" in text or not text.strip():
        raise CogViewConfigurationError(
            f"A job's folder must be a local folder here, not {printable(text, 120)!r}.",
            hint="Pass a path. A job at a URL of a store, such as s3://bucket/job, is for run_job, and has no shards.",
        )
    try:
        return local_path(output_dir, "output_dir").resolve()
    except CogViewConfigurationError:
        raise
    except (OSError, RuntimeError, TypeError) as error:
        raise CogViewConfigurationError(
            f"The folder cannot be found: {printable(str(error)).rstrip('.')}.", hint="Choose another folder."
        ) from None


def begun_count(folder: Path) -> int | None:
    """Find out into how many shards a job is divided.

    Args:
        folder: The folder of the job.

    Returns:
        The number of shards; None if none has begun.

    Raises:
        CogViewConfigurationError: There are shards of several divisions.
    """
    with JobFolder(folder) as parent:
        return _shards(parent)[0].count if any(map(SHARD_FOLDER.fullmatch, parent.names())) else None


def _shards(parent: JobFolder) -> list[Shard]:
    # The shards of a job's folder that have begun, in order.
    found = filter(None, map(SHARD_FOLDER.fullmatch, parent.names()))
    shards = sorted((Shard(int(item[1]), int(item[2])) for item in found), key=lambda shard: shard.number)
    where = printable(str(parent.path), 120)
    if not shards:
        raise CogViewConfigurationError(f"There are no shards in {where}.", hint="Run a job with shard='1/20' first.")
    if len({shard.count for shard in shards}) > 1:
        raise CogViewConfigurationError(
            f"The shards in {where} are of several divisions.", hint="Merge them in folders of their own."
        )
    return shards


# --- workers


def job_generator(
    generator: CogViewImageGenerator | None, settings: dict[str, Any], folder: Path
) -> CogViewImageGenerator:
    """Return the generator of a job, which saves in its folder.

    Args:
        generator: The generator of the caller; None to make one.
        settings: Its settings; none with a generator of the caller.
        folder: The job's folder.

    Raises:
        CogViewConfigurationError: A setting is wrong.
    """
    from langchain_cogview.generator import CogViewImageGenerator  # noqa: PLC0415

    if generator is None:
        return CogViewImageGenerator(**settings, output_dir=folder)
    if settings:
        raise CogViewConfigurationError(
            f"The setting {next(iter(settings))!r} cannot be combined with a generator, which has its own settings.",
            hint="Set it on the generator.",
        )
    return generator.model_copy(update={"output_dir": folder, "download": True, "storage_options": None})


class Workers:
    """What this process does for a job in shards.

    Args:
        folder: The folder of the job.
        count: The number of shards.
        generator: Generates the images.

    Raises:
        CogViewConfigurationError: The count is not one.
    """

    def __init__(self, folder: Path, count: int, generator: CogViewImageGenerator) -> None:
        self._folder = folder
        self._count = Shard.of(f"1/{count}").count
        self._generator = generator

    @classmethod
    def begun(
        cls, folder: Path, generator: CogViewImageGenerator | None, settings: dict[str, Any]
    ) -> tuple[Self, Path, dict[str, Any]]:
        """Return a job that was begun before, with the copy of its prompts and its options.

        Args:
            folder: The folder of the job.
            generator: The generator of the caller. None: one is made of `settings`, and of those that the folder keeps.
            settings: Settings of this process, to which those of the folder are added.

        Raises:
            CogViewConfigurationError: The folder has no job in shards, or another service answers here.
        """
        division, prompts = _read(folder)
        for name, value in ({} if generator else division.settings).items():
            settings.setdefault(name, value)
        generator = job_generator(generator, settings, folder)
        service = job_settings(generator)["service"]
        if service != division.service:
            raise CogViewConfigurationError(
                f"The job in {printable(str(folder), 120)} was begun with the service {printable(division.service, 200)}, "
                f"and this process uses {service}; nothing was sent.",
                hint="Set COGVIEW_BASE_URL, or pass base_url (--base-url), if you trust that service with your key.",
            )
        return cls(folder, division.count, generator), prompts, {**division.options, "format": division.format}

    def keeping(self, prompts: PromptSource, options: dict[str, Any]) -> tuple[PromptSource, dict[str, Any]]:
        """Return prompts and options with which the folder keeps what further workers need, once a shard was accepted.

        Raises:
            CogViewConfigurationError: The prompts can be read only once, or are no list.
        """
        if not isinstance(prompts, str | Path):
            refuse_one(prompts)
            prompts = list(prompts)
        elif can_be_read_once(prompts):
            source = "the standard input" if str(prompts) == "-" else printable(str(prompts), 120)
            raise CogViewConfigurationError(
                f"A job in shards reads its prompts several times, and {source} can be read once; nothing was sent.",
                hint="Write the prompts to a file.",
            )
        keep = [partial(_keep, self._folder, prompts, self._count, options, self._generator)]
        on_plan = options.get("on_plan")

        def keep_and_plan(plan: JobPlan) -> None:
            while keep:  # once
                keep.pop()()
            if on_plan:
                on_plan(plan)

        return prompts, {**options, "on_plan": keep_and_plan}

    def run(self, run_job: Callable[..., JobReport], prompts: PromptSource, options: dict[str, Any]) -> list[JobReport]:
        """Take the next shard that nobody holds until none is left, or until one was stopped or reached the budget.

        Returns:
            The report of each shard that was worked on.
        """
        reports: list[JobReport] = []
        left = [Shard.of(f"{number}/{self._count}") for number in range(1, self._count + 1)]
        held: list[Shard] = []
        while left:
            shard = left.pop(0)
            name = f"{shard.number}/{shard.count}"
            try:
                report = run_job(prompts, self._folder, generator=self._generator, shard=name, **options)
            except FolderInUseError:
                held.append(shard)
            else:
                reports.append(report)
                if report.stopped or report.interrupted or report.over_budget:
                    break
                if not left:  # another process may have ended meanwhile
                    left, held = held, []
        return reports


# --- what the folder keeps for further workers


class _Division(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["cogview.shards"] = "cogview.shards"
    version: Literal[1] = 1
    count: int = Field(ge=1, le=MAX_SHARDS)
    prompts: Annotated[str, Field(pattern=_NAME)]
    format: Literal["txt", "csv", "tsv", "jsonl"]
    service: str
    options: dict[str, str | bool | None]
    settings: dict[str, Any]


def _keep(
    folder: Path, prompts: PromptSource, count: int, options: dict[str, Any], generator: CogViewImageGenerator
) -> None:
    name, form, content = copied_prompts(prompts, options.get("format"))
    settings = generator.model_dump(include=set(_SETTINGS), exclude_none=True, mode="json")
    settings["region"] = generator.resolved_region
    if is_sandbox(generator.resolved_base_url):
        settings["base_url"] = generator.resolved_base_url
    kept = {key: options[key] for key in _KEPT if options.get(key)}
    division = _Division(
        count=count,
        prompts=name,
        format=form,
        service=job_settings(generator)["service"],
        options={key: str(value) if isinstance(value, int | float | Decimal) and value is not True else value
                 for key, value in kept.items()},
        settings=settings,
    )  # fmt: skip
    with locked_parent(folder) as parent:
        names = parent.names()
        if _PROMPTS in names and DIVISION not in names:
            raise CogViewConfigurationError(
                f"{printable(str(folder / _PROMPTS), 120)} is not of this job; nothing was sent.",
                hint="Move it away, or choose another folder.",
            )
        try:
            with parent.subfolder(_PROMPTS, create=True) as copies, contextlib.closing(content):
                copies.replace(name, content)
            parent.replace(DIVISION, [json.dumps(division.model_dump(), indent=1).encode() + b"\n"])
        except OSError as error:
            raise write_error(folder / DIVISION, error) from None


def _is_divided(folder: JobFolder) -> bool:
    # Also where the shards themselves were removed.
    try:
        return bool(_Division.model_validate_json(folder.read(DIVISION, _MAX_BYTES) or b""))
    except ValidationError:
        return False


def _read(path: Path) -> tuple[_Division, Path]:
    where = printable(str(path), 120)
    with JobFolder(path) as folder:
        raw = folder.read(DIVISION, _MAX_BYTES)
        if raw is None:
            count = begun_count(path)
            why = "has no job in shards" if count is None else "has shards, but no copy of the prompts"
            raise CogViewConfigurationError(
                f"The folder {where} {why}; nothing was sent.",
                hint=f"Begin it with cogview batch FILE -o FOLDER --shards {count or 'NUMBER'}, or with run_shards.",
            )
        try:
            division = _Division.model_validate_json(raw)
            unknown = division.options.keys() - {*_KEPT} or division.settings.keys() - {
                *_SETTINGS,
                "region",
                "base_url",
            }
        except ValidationError:
            division, unknown = None, set()
        service = division.settings.get("base_url") if division else None
        # A base URL from a folder must not decide where the key is sent.
        if (
            division is None
            or unknown
            or (service is not None and not (isinstance(service, str) and is_sandbox(service)))
        ):
            raise CogViewConfigurationError(
                f"The file {printable(str(path / DIVISION), 120)} is damaged, or of another version of this package.",
                hint="Begin the job again with the same prompts and number of shards; nothing is paid twice.",
            )
        try:
            with folder.subfolder(_PROMPTS) as copies:
                os.close(copies.open(division.prompts))  # which refuses a link to another file
        except OSError as error:
            failure = read_error(path / _PROMPTS / division.prompts, error)
            raise failure from None
    return division, path / _PROMPTS / division.prompts


# --- what all shards have made


@dataclass(frozen=True, slots=True)
class MergedJob:
    """What the shards of a job have made together. `str(merged)` summarizes it.

    Attributes:
        folder: The folder of the job: a path, or the URL of a job in remote storage; so with the next two.
        manifest: The manifest of all shards; the files are paths in `folder`.
        contact_sheet: The first page with the images of all shards.
        shards: How many shards have begun; 0 for a URL, where a job has none.
        count: Into how many shards the job is divided; 0 for a URL.
        prompts: Number of finished prompts by status: `made`, `blocked`, `failed` and so on.
        images: Number of images.
        unknown: Number of requests that may have been charged.
        cost: Cost of the images, as text.
    """

    folder: Path | str
    manifest: Path | str
    contact_sheet: Path | str
    shards: int
    count: int
    prompts: dict[str, int]
    images: int
    unknown: int
    cost: str

    def __str__(self) -> str:
        states = ", ".join(f"{count:,} {status}" for status, count in sorted(self.prompts.items()))
        whose = f"{self.shards} of {self.count} shards: " if self.count else ""
        lines = [f"{whose}{states or 'nothing yet'}; {self.cost}."]
        if self.unknown:
            lines.append(f"{count_text(self.unknown, 'request')} may have been charged; the reports name them.")
        return visible("\n".join(lines))


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
        return _merge_folders(folder)
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


def _merge_folders(folder: str | Path) -> MergedJob:
    path = local_folder(folder)
    statuses: Counter[str] = Counter()
    images = 0
    unfinished: list[Attempt] = []

    def lines() -> Iterator[bytes]:
        nonlocal images
        for shard in shards:
            with parent.subfolder(shard.name) as part, attempts_of(part) as attempts, manifest_of(part) as manifest:
                history = read_history(attempts, manifest)
                unfinished.extend(history.attempts())
                for finished in history.finished.by_line():
                    record = manifest.read(finished.start, finished.size)
                    statuses[record["status"]] += 1
                    images += len(record["images"])
                    for image in record["images"]:
                        image["file"] = f"{shard.name}/{image['file']}"
                    yield record_bytes(record)

    with JobFolder(path) as parent:
        shards = _shards(parent)
        try:
            parent.replace(MANIFEST, lines())
            with attempts_of(parent) as attempts, manifest_of(parent) as manifest:
                history = read_history(attempts, manifest)
                total = Charges()
                for outcome, count in history.finished.outcomes().items():
                    total.add(Money.of({"cost": outcome.cost, "currency": outcome.currency}), count)
                cost = cost_text({} if history.sandbox else total.amounts, sandbox=history.sandbox)
                sheet = ContactSheet(parent, manifest).finish(history.finished, cost, unfinished)
        except OSError as error:
            raise write_error(path / MANIFEST, error) from None
    return MergedJob(
        folder=path,
        manifest=path / MANIFEST,
        contact_sheet=path / sheet,
        shards=len(shards),
        count=shards[0].count,
        prompts=dict(statuses),
        images=images,
        unknown=len(unfinished),
        cost=cost,
    )
