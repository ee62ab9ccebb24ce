"""Workers of a divided job: each takes the next shard that nobody holds, until none is left.

`run_shards` keeps in the job's folder what a further worker needs: the division, a copy of the prompts, and the
settings that have no secrets. The key and the base URL are those of each worker: a folder that others can write to must not
decide where a key is sent.
"""

from __future__ import annotations

import contextlib
import json
import os
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from langchain_cogview.api.settings import is_sandbox
from langchain_cogview.errors import CogViewConfigurationError, printable
from langchain_cogview.jobs.folder import FolderInUseError, JobFolder, read_error, write_error
from langchain_cogview.jobs.ledger import locked_parent
from langchain_cogview.jobs.plan import job_settings
from langchain_cogview.jobs.prompts import read_prompts
from langchain_cogview.jobs.shards import MAX_SHARDS, Shard, begun_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.jobs.plan import JobPlan, JobReport
    from langchain_cogview.jobs.prompts import PromptSource

DIVISION: Final = "shards.json"
_PROMPTS: Final = "shards-prompts"
"""The folder of the copy, which has the name of the file, as the manifest has it."""
_MAX_BYTES: Final = 1 << 20
_BLOCK: Final = 1 << 20
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


class _Division(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["cogview.shards"] = "cogview.shards"
    version: Literal[1] = 1
    count: int = Field(ge=1, le=MAX_SHARDS)
    prompts: Annotated[str, Field(pattern=r"\A[^/\\\x00]{1,255}\z")]
    format: Literal["txt", "csv", "tsv", "jsonl"]
    service: str
    options: dict[str, str | bool | None]
    settings: dict[str, Any]


def job_generator(given: CogViewImageGenerator | None, settings: dict[str, Any], folder: Path) -> CogViewImageGenerator:
    """Return the generator of a job, which saves in its folder.

    Args:
        given: The generator of the caller; None to make one.
        settings: Its settings; none with a generator of the caller.
        folder: The job's folder.

    Raises:
        CogViewConfigurationError: A setting is wrong.
    """
    from langchain_cogview.generator import CogViewImageGenerator  # noqa: PLC0415

    if given is None:
        return CogViewImageGenerator(**settings, output_dir=folder)
    if settings:
        raise CogViewConfigurationError(
            f"The setting {next(iter(settings))!r} cannot be combined with a generator, which has its own settings.",
            hint="Set it on the generator.",
        )
    return given.model_copy(update={"output_dir": folder, "download": True, "storage_options": None})


class Workers:
    """What this process does for a job in shards.

    Args:
        folder: The folder of the job.
        count: The number of shards.
        generator: Generates the images.
    """

    def __init__(self, folder: Path, count: int, generator: CogViewImageGenerator) -> None:
        self._folder = folder
        self._count = count
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
            CogViewConfigurationError: The prompts can be read only once.
        """
        if str(prompts) == "-":
            raise CogViewConfigurationError(
                "A job in shards reads its prompts several times, and the standard input can be read once; nothing was sent.",
                hint="Write the prompts to a file.",
            )
        if not isinstance(prompts, str | Path):
            read_prompts(prompts)  # refuses what is no collection
            prompts = list(prompts)
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
        left = [Shard.of(f"{number}/{self._count}") for number in range(1, max(self._count, 1) + 1)]
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


# --- what the folder keeps


def _keep(
    folder: Path, prompts: PromptSource, count: int, options: dict[str, Any], generator: CogViewImageGenerator
) -> None:
    name, form, content = _copied(prompts, options.get("format"))
    settings = generator.model_dump(include=set(_SETTINGS), exclude_none=True, mode="json")
    settings["region"] = generator.resolved_region
    if is_sandbox(generator.resolved_base_url):
        settings["base_url"] = generator.resolved_base_url
    kept = {key: options[key] for key in _KEPT if options.get(key)}
    division = _Division(
        count=count,
        prompts=name,
        format=form,  # type: ignore[arg-type]
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


def _copied(prompts: PromptSource, form: str | None) -> tuple[str, str, Any]:
    if isinstance(prompts, str | Path):
        path = Path(prompts).expanduser()
        return path.name, form or path.suffix.lower().lstrip("."), _blocks(path)
    lines = ({"prompt": each} if isinstance(each, str) else dict(each) for each in prompts)
    return "prompts.jsonl", "jsonl", (json.dumps(line, default=str).encode() + b"\n" for line in lines)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


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
