"""Generate the images of the rows of a batch, each row once, for engines that map a function over batches.

Ray Data, Spark, Daft and Dask call such a function again when a worker is lost, or when a result is looked at once more, and cut
the rows into other batches each time. Here the folder remembers what each row has cost, by its arguments.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from langchain_cogview.errors import CogViewConfigurationError, CogViewError, error_class, printable
from langchain_cogview.jobs import FolderInUseError, run_job
from langchain_cogview.jobs.folder import JobFolder
from langchain_cogview.jobs.history import read_history
from langchain_cogview.jobs.items import PromptList, checked_items
from langchain_cogview.jobs.manifest import attempts_of, manifest_of
from langchain_cogview.jobs.plan import job_settings
from langchain_cogview.jobs.shards import MAX_SHARDS, Shard, begun_count, local_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.jobs import JobReport

SHARDS: Final = 1_000
"""Into how many folders the rows are divided. Each is locked only while images of its rows are generated."""
MAX_ERROR: Final = 500
_MAX_NOT_RUN: Final = 5
_WAIT_SECONDS: Final = 600.0
_UNKNOWN: Final = (
    "The request may have been charged, and no image of it is known; it is not sent again without retry_unknown=True."
)


@dataclass(frozen=True, slots=True)
class RowResult:
    """What became of one row.

    Attributes:
        status: `made`; `blocked` by the content filter; `failed`; `unknown`: it may have been charged, and is not sent again;
            `not_run`: nothing was charged, and the next look at the row tries again; `invalid`: its arguments are not legal.
        error: Why not all images were made, in at most 500 characters; None if they were.
        paths: The files of the images.
        request_ids: The ids of its requests; quote them to the provider.
        cost: Cost of the images, as a decimal number; None if a price is unknown, or there is no image.
        currency: ISO 4217 code of the cost.
    """

    status: str
    error: str | None = None
    paths: tuple[str, ...] = ()
    request_ids: tuple[str, ...] = ()
    cost: str | None = None
    currency: str | None = None


def generate_rows(
    rows: Iterable[Mapping[str, Any]],
    output_dir: str | Path,
    *,
    shards: int = SHARDS,
    generator: CogViewImageGenerator | None = None,
    retry_failed: bool = False,
    retry_unknown: bool = False,
    **settings: Any,
) -> list[RowResult]:
    """Generate the images of some rows. A row whose images are in the folder is not paid for again.

    Any number of processes may do so for the same folder at the same time, with any rows; a row that another process is
    working on is waited for. Rows with equal arguments share their images. The folder is that of a job in shards:
    `merge_shards` makes one manifest and one contact sheet of it.

    Args:
        rows: The arguments of each row: `prompt`, and `size`, `quality`, `model` and others if the row sets them.
        output_dir: A folder that all workers share.
        shards: Into how many sub-folders the rows are divided by their hash: about one for each 1,000 rows, and not fewer than
            rows are worked on at a time. A folder that has begun keeps its division.
        generator: As for `run_job`.
        retry_failed: Generate again what failed or was blocked.
        retry_unknown: Generate again what may have been charged. This can pay twice.
        **settings: Arguments of `CogViewImageGenerator`.

    Returns:
        One result for each row, in their order. What goes wrong is in the results and not raised; after an error that every row
        would have, such as a wrong key, the other rows are not tried.

    Raises:
        CogViewConfigurationError: A setting is wrong. Nothing was sent.
    """
    from langchain_cogview.generator import CogViewImageGenerator  # noqa: PLC0415

    if generator is None:
        try:
            generator = CogViewImageGenerator(**settings)
        finally:
            settings.clear()  # the key may be among them: the frame of an error holds none
    elif settings:
        raise CogViewConfigurationError(
            f"The setting {next(iter(settings))!r} cannot be combined with a generator.",
            hint="Set it on the generator.",
        )
    arguments = list(rows)
    retry: dict[str, Any] = {"retry_failed": retry_failed, "retry_unknown": retry_unknown}
    return _Batch(local_folder(output_dir), generator, shards, retry).results(arguments)


class _Row(NamedTuple):
    arguments: Mapping[str, Any]
    n: int  # how many images it asks for


class _Batch:
    """Some rows, and what is done for them."""

    def __init__(self, folder: Path, generator: CogViewImageGenerator, shards: int, retry: dict[str, Any]) -> None:
        self._folder = folder
        self._generator = generator
        self._retry = retry
        self._shards = begun_count(folder) or min(max(shards, 1), MAX_SHARDS)
        self._stop = threading.Event()
        self._stopped = ""  # the error that every other row would have too
        self._lock = threading.Lock()
        self._not_run = 0  # groups in a row of which nothing ran

    def results(self, rows: list[Mapping[str, Any]]) -> list[RowResult]:
        found = PromptList()
        settings = job_settings(self._generator)
        defaults = {name: value for name, value in settings.items() if name != "service"}
        keys: dict[int, str] = {}
        groups: dict[int, dict[str, _Row]] = {}
        for item in checked_items(found, rows, defaults, format=None):
            key = item.key.partition("-")[0]  # equal rows share a key
            keys[item.number] = key
            groups.setdefault(int(key[:16], 16) % self._shards + 1, {}).setdefault(
                key, _Row(rows[item.number - 1], item.n)
            )
        done: dict[str, RowResult] = {}
        if groups:
            workers = max(self._generator.max_workers(model) for model in found.models)
            with ThreadPoolExecutor(min(len(groups), workers), "cogview-rows") as pool:
                try:
                    for results in pool.map(self._group, groups, groups.values()):
                        done |= results
                except BaseException:
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        invalid = {problem.line: RowResult("invalid", printable(problem.text, MAX_ERROR)) for problem in found.problems}
        return [done[keys[number]] if number in keys else invalid[number] for number in range(1, len(rows) + 1)]

    def _group(self, number: int, rows: dict[str, _Row]) -> dict[str, RowResult]:
        """Return the results of the rows of one shard."""
        shard = Shard(number, self._shards)
        error = ""
        results: dict[str, RowResult] = {}
        try:
            results, left = self._known(shard, rows)
            if left and not self._stop.is_set():
                error = self._run(shard, left)
                results |= self._known(shard, left)[0]
        except CogViewError as failure:
            error = str(failure)
        except Exception as failure:  # noqa: BLE001  no row ends the others
            error = f"{type(failure).__name__}: {failure}"
        error = error or self._stopped or "The request did not run."
        return {key: results.get(key) or RowResult("not_run", printable(error, MAX_ERROR)) for key in rows}

    def _known(self, shard: Shard, rows: dict[str, _Row]) -> tuple[dict[str, RowResult], dict[str, _Row]]:
        """Return what the folder of a shard knows of some rows, and the rows for which something is left to do.

        The folder is not locked: what looks unknown may be under way in another worker, and is left to `run_job`.
        """
        path = self._folder / shard.name
        if not path.is_dir():
            return {}, rows
        results: dict[str, RowResult] = {}
        left: dict[str, _Row] = {}
        with JobFolder(path) as folder, attempts_of(folder) as attempts, manifest_of(folder) as manifest:
            history = read_history(attempts, manifest)
            for key, row in rows.items():
                finished, requests = history.finished.get(key), list(history.open.get(key, ()))
                made = finished is not None and finished.outcome.made >= row.n
                if finished is not None:
                    result = _of_record(path, manifest.read(finished.start, finished.size), requests, made=made)
                    if result.status != "left":
                        results[key] = result
                elif requests:
                    results[key] = RowResult("unknown", _UNKNOWN, request_ids=tuple(requests))
                final = finished is not None and not (requests or finished.outcome.links or self._retry["retry_failed"])
                if not made and not (final and key in results):
                    left[key] = row
        return results, left

    def _run(self, shard: Shard, rows: dict[str, _Row]) -> str:
        # Runs the job of some rows of a shard, and returns why the rest did not run.
        end = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                report = run_job(
                    [row.arguments for row in rows.values()],
                    self._folder,
                    generator=self._generator,
                    shard=f"{shard.number}/{shard.count}",
                    unique=True,
                    progress=False,
                    stop=self._stop,
                    **self._retry,
                )
            except FolderInUseError:  # another worker generates images of this shard
                if time.monotonic() > end or self._stop.wait(0.2):
                    raise
            else:
                return self._note(report)

    def _note(self, report: JobReport) -> str:
        name = next((name for name in report.errors if error_class(name)), "")
        error = getattr(error_class(name), "default_message", "")
        with self._lock:
            self._not_run = self._not_run + 1 if report.left and not report.made else 0
            if report.stopped:
                error = str(report.stopped)
            if (report.stopped or self._not_run >= _MAX_NOT_RUN) and not self._stop.is_set():
                self._stopped = error
                self._stop.set()
        return error


def _of_record(path: Path, record: Mapping[str, Any], requests: list[str], *, made: bool) -> RowResult:
    status, error = record["status"], next((failure["message"] for failure in record["failures"]), None)
    if made:
        status = "made"
    elif requests or status == "unknown":
        status, error = "unknown", _UNKNOWN
    return RowResult(
        status=status,
        error=printable(error, MAX_ERROR) if error and not made else None,
        paths=tuple(str(path / image["file"]) for image in record["images"]),
        request_ids=tuple(dict.fromkeys([*record["request_ids"], *requests])),
        cost=record["cost"] if record["images"] else None,
        currency=record["currency"],
    )
