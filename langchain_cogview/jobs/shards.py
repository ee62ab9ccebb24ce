"""A job in shards: each is a job of its own in a sub-folder, so that several processes or machines can work on one file.

A prompt's shard follows from its arguments alone, so the file may grow or be sorted differently. Every shard has its own
manifest, attempts and lock; `merge_folders` makes one manifest and one contact sheet of them.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from langchain_cogview.cost import Charges, Money
from langchain_cogview.errors import CogViewConfigurationError, printable
from langchain_cogview.jobs.folder import SHARD_FOLDER, JobFolder, record_bytes, write_error
from langchain_cogview.jobs.history import read_history
from langchain_cogview.jobs.manifest import MANIFEST, attempts_of, manifest_of
from langchain_cogview.jobs.prompts import cost_text, count_text
from langchain_cogview.jobs.sheet import ContactSheet
from langchain_cogview.text import visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_cogview.jobs.history import Attempt

MAX_SHARDS: Final = 10_000
_TEXT: Final = re.compile(r"([0-9]{1,5})/([0-9]{1,5})")


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

    def begin(self, parent: Path) -> None:
        """Create the folder of the shard, unless the job is divided in another way.

        Args:
            parent: The folder of the job.

        Raises:
            CogViewConfigurationError: As `refuse_others`. Of two processes that begin different divisions at the same moment, at
                most one goes on.
        """
        self.refuse_others(parent)
        folder = parent / self.name
        if folder.is_dir():
            return
        JobFolder(folder, create=True).close()
        try:
            self.refuse_others(parent)
        except CogViewConfigurationError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise

    def refuse_others(self, parent: Path) -> None:
        """Check that the folder of the job has no shards of another division, whose prompts would be paid for again.

        Args:
            parent: The folder of the job.

        Raises:
            CogViewConfigurationError: It has, or it holds a job that is not divided.
        """
        with JobFolder(parent) as folder:
            names = folder.names()
        counts = {int(found[2]) for name in names if (found := SHARD_FOLDER.fullmatch(name))} - {self.count}
        if counts:
            raise CogViewConfigurationError(
                f"The job in {printable(str(parent), 120)} is divided into {counts.pop()} shards, not {self.count}; nothing was "
                "sent.",
                hint="Use the same count in all processes, or choose another folder.",
            )
        if "job.json" in names:
            raise CogViewConfigurationError(
                f"The job in {printable(str(parent), 120)} is not divided into shards; nothing was sent.",
                hint="Continue it without shard, or choose another folder.",
            )


def local_folder(output_dir: str | Path) -> Path:
    """Resolve the folder of a job.

    Returns:
        The absolute path.

    Raises:
        CogViewConfigurationError: It is a URL, or it cannot be found.
    """
    text = str(output_dir)
    if "://" in text or "\0" in text or not text.strip():
        raise CogViewConfigurationError(
            f"A job's folder must be a local folder here, not {printable(text, 120)!r}.",
            hint="Pass a path. A job at a URL of a store, such as s3://bucket/job, is for run_job, and has no shards.",
        )
    try:
        return Path(output_dir).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise CogViewConfigurationError(
            f"The folder cannot be found: {error}.", hint="Choose another folder."
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


def merge_folders(folder: str | Path) -> MergedJob:
    """Make one manifest and one contact sheet of a job in shards, which may still run. Sends nothing.

    Args:
        folder: The folder of the job, with a sub-folder for each shard.

    Returns:
        What the shards have made so far.

    Raises:
        CogViewConfigurationError: The folder has no shards, shards of several divisions, or a damaged manifest.
        CogViewStorageError: The folder cannot be read or written.
    """
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


def _shards(parent: JobFolder) -> list[Shard]:
    # The shards of a job's folder that have begun, in order.
    found = filter(None, map(SHARD_FOLDER.fullmatch, parent.names()))
    shards = sorted((Shard(int(each[1]), int(each[2])) for each in found), key=lambda shard: shard.number)
    where = printable(str(parent.path), 120)
    if not shards:
        raise CogViewConfigurationError(f"There are no shards in {where}.", hint="Run a job with shard='1/20' first.")
    if len({shard.count for shard in shards}) > 1:
        raise CogViewConfigurationError(
            f"The shards in {where} are of several divisions.", hint="Merge them in folders of their own."
        )
    return shards
