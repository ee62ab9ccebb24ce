"""A job whose folder is a URL, on which several workers may work at once.

An object store appends to no file. Each record is an object of its own, `records/KEY.NUMBER.json`, and the records of a prompt
are numbered. The record of a paid request is put before the POST, under the condition that no object has its name
(`If-None-Match`): of all workers that are about to generate a prompt, one gets the next number, and the others send nothing.

A run works in a temporary folder, which begins with the records of the URL. Images are uploaded before the record of their
prompt, and removed from the temporary folder then. Where a store does not check the condition, a marker in `workers/` keeps all
other workers out; so it does where a worker has a budget, which knows only what that worker spends.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.errors import CogViewConfigurationError, CogViewError, CogViewStoppedError, CogViewStorageError
from langchain_cogview.images.objects import ObjectFolder
from langchain_cogview.images.remote import RemoteFolder, remote_folder
from langchain_cogview.images.store import IMAGE_NAME
from langchain_cogview.jobs.folder import (
    SUBFOLDER,
    DamagedRecordError,
    FolderInUseError,
    RecordFile,
    damaged_record,
    record_bytes,
)
from langchain_cogview.jobs.manifest import ATTEMPTS, MANIFEST, attempts_line, attempts_of, manifest_line, manifest_of
from langchain_cogview.jobs.prompts import count_text
from langchain_cogview.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.jobs.folder import JobFolder
    from langchain_cogview.jobs.history import History

SETTINGS_NAME: Final = "job.json"
_RECORDS: Final = "records"
_WORKERS: Final = "workers"
_MARKERS: Final = (f"{_WORKERS}/", "checks/")
_RECORD_NAME: Final = re.compile(r"records/([0-9a-f]{32}(?:-[0-9]{1,9})?)\.([0-9]{6})\.json", re.ASCII)
_MAX_NUMBER: Final = 999_999
_STRIPES: Final = 256
_TRIES: Final = 100
_TOKEN: Final = "put"  # noqa: S105  a key of JSON
"""Key of a random text in each object, by which a worker knows its own."""


class RemoteJob:
    """A job's folder at a URL, and the temporary folder in which this process works.

    Args:
        folder: The URL with its options.
    """

    def __init__(self, folder: RemoteFolder) -> None:
        self.url = folder.url.rstrip("/")
        self.objects = ObjectFolder(folder)
        self.lost = 0
        """How many prompts were left to other workers, which recorded a request for them first."""
        self._parent = Path(tempfile.gettempdir()).resolve() / f"cogview-job-{secrets.token_hex(8)}"
        name = self.url.rpartition("/")[2]
        self.local = self._parent / (name if re.fullmatch(r"[0-9A-Za-z_-][0-9A-Za-z_.-]{0,99}", name) else "job")
        self._has_conditions = False
        self._keeps_local = False
        self._next: dict[str, int] = {}  # the number of the next record of each prompt that has one
        # Records of other workers that were skipped while one was put: their attempts, and the last end of each prompt.
        self._passed: list[str] = []
        self._passed_ends: dict[str, dict[str, Any]] = {}
        self._locks = [threading.Lock() for _ in range(_STRIPES)]
        self._lock = threading.Lock()

    # --- begin and end

    @contextmanager
    def opened(self, *, into_existing: bool) -> Iterator[None]:
        """Within this block, the temporary folder has the settings and the records of the URL. Writes nothing to the URL.

        Args:
            into_existing: Whether the caller wants to begin a job among other files, which is refused.

        Yields:
            Nothing.

        Raises:
            CogViewConfigurationError: The URL has other objects than a job's, or a damaged record.
            CogViewStorageError: It cannot be read.
        """
        if into_existing:
            raise CogViewConfigurationError(
                "into_existing is for local folders; nothing was sent.", hint="Begin the job at a URL of its own."
            )
        try:
            self.local.mkdir(parents=True, mode=0o700)
            self._parent.chmod(0o700)
            settings = self._settings()
            if settings is not None:
                (self.local / SETTINGS_NAME).write_bytes(settings)
                self._fetch()
            yield
        finally:
            if not self._keeps_local:
                shutil.rmtree(self._parent, ignore_errors=True)

    @contextmanager
    def working(self, *, has_budget: bool) -> Iterator[None]:
        """Within this block, this process is a worker of the job.

        Args:
            has_budget: Whether it has a budget, and so must be the only worker.

        Yields:
            Nothing.

        Raises:
            FolderInUseError: Another worker has the job, and one of the two must be the only one.
            CogViewStorageError: The URL cannot be written.
        """
        self._has_conditions = self.objects.has_conditions()
        reason = "" if self._has_conditions else "store"
        reason = reason or ("budget" if has_budget else "")
        host = re.sub(r"[^0-9A-Za-z-]", "-", socket.gethostname())[:60]
        marker = f"{_WORKERS}/{host}-{os.getpid()}-{secrets.token_hex(8)}.json"
        self.objects.write(marker, json.dumps({"only": reason}).encode())
        try:
            # Each worker writes first and lists then: of two that begin at the same time, at least one sees the other.
            for other in self.objects.names(_WORKERS):
                if other != marker:
                    self._refuse_two(reason, other)
            yield
        finally:
            self.objects.remove(marker)

    def _refuse_two(self, reason: str, other: str) -> None:
        content = self.objects.read(other)
        if content is None:  # it has ended
            return
        theirs = "store"
        with suppress(ValueError, AttributeError):
            theirs = json.loads(content).get("only", "store")
        reason = reason or theirs
        if not reason:
            return
        why = (
            "this store does not check the condition on which several workers rely (If-None-Match)"
            if reason == "store"
            else "a budget holds for one worker only"
        )
        raise FolderInUseError(
            f"Another worker has the job at {printable(self.url, 120)}, and {why}; nothing was sent.",
            hint=f"Wait until it ends. If it was killed, delete {printable(f'{self.url}/{other}', 200)}.",
        )

    def begin(self) -> bool:
        """Record the settings of a new job, which are in the temporary folder.

        Returns:
            Whether another worker was first; its settings are in the temporary folder then.

        Raises:
            CogViewStorageError: The URL cannot be written.
        """
        path = self.local / SETTINGS_NAME
        if self._create(SETTINGS_NAME, path.read_bytes()):
            return False
        path.write_bytes(self.objects.read(SETTINGS_NAME) or b"")
        return True

    def _create(self, name: str, content: bytes) -> bool:
        if self._has_conditions:
            return self.objects.create(name, content)
        if self.objects.read(name) is not None:
            return False
        self.objects.write(name, content)
        return True

    # --- the records of the URL

    def files(self, folder: JobFolder, *, writable: bool = False) -> tuple[RecordFile, RecordFile]:
        """Open the files of records in the temporary folder.

        Args:
            folder: The temporary folder.
            writable: Whether records may be appended. Each is put to the URL first.

        Returns:
            The attempts and the manifest.
        """
        kind = partial(_PutRecords, self) if writable else RecordFile
        return attempts_of(folder, writable=writable, kind=kind), manifest_of(folder, writable=writable, kind=kind)

    def _settings(self) -> bytes | None:
        # The settings of the job. None where it has not begun and the URL has nothing but markers.
        settings = self.objects.read(SETTINGS_NAME)
        if settings is not None:
            return settings
        names = [name for name in self.objects.names() if not name.startswith(_MARKERS)]
        if not names:
            return None
        # Another worker puts the settings before everything else, and may have begun the job after the first look.
        settings = self.objects.read(SETTINGS_NAME)
        if settings is not None:
            return settings
        if all(name.startswith(f"{_RECORDS}/") for name in names):
            raise CogViewConfigurationError(
                f"The job at {printable(self.url, 120)} has records but no {SETTINGS_NAME}; nothing was sent.",
                hint="Restore that object, or choose another URL.",
            )
        raise CogViewConfigurationError(
            f"{printable(self.url, 120)} is not empty and holds no job; nothing was sent.", hint="Choose another URL."
        )

    def _fetch(self) -> None:
        # Copy the records into the temporary folder, and images that have none yet.
        sent: dict[str, str] = {}  # requests without an end
        with (self.local / ATTEMPTS).open("wb") as attempts, (self.local / MANIFEST).open("wb") as manifest:
            for values in self._news():
                if _is_end(values):
                    for request_id in values["request_ids"]:
                        sent.pop(request_id, None)
                    manifest.write(record_bytes(values))
                    continue
                if "settled" in values:
                    sent.pop(values["request_id"], None)
                else:
                    sent[values["request_id"]] = values["key"]
                attempts.write(record_bytes(values))
        if sent:
            self._fetch_images({request_id[:8] for request_id in sent})

    def _fetch_images(self, labels: set[str]) -> None:
        # Images that were uploaded by a worker which was killed before it wrote their record.
        for name in self.objects.names():
            subfolder, _, file = name.rpartition("/")
            found = IMAGE_NAME.fullmatch(file)
            if not found or found["label"] not in labels or (subfolder and not SUBFOLDER.fullmatch(subfolder)):
                continue
            content = self.objects.read(name)
            if content is not None:
                (self.local / subfolder).mkdir(exist_ok=True)
                (self.local / name).write_bytes(content)

    def _news(self) -> Iterator[dict[str, Any]]:
        """Yield the records that this process has not seen, those of one prompt in their order."""
        unseen, self._passed = self._passed, []
        ends, self._passed_ends = self._passed_ends, {}
        yield from ends.values()
        for name in self.objects.names(_RECORDS):
            key, number = _parts(self.url, name)
            if number >= self._next.get(key, 0):
                unseen.append(name)
        for name, content in self.objects.read_all(sorted(unseen)):
            key, number = _parts(self.url, name)
            yield self._parsed(name, key, content)
            self._next[key] = max(number + 1, self._next.get(key, 0))

    def _parsed(self, name: str, key: str, content: bytes) -> dict[str, Any]:
        try:
            try:
                manifest_line(content)
            except DamagedRecordError:
                if _is_end(attempts_line(content)):
                    raise DamagedRecordError("it is of no kind") from None
            values: dict[str, Any] = json.loads(content)  # in the order in which it was written
            values.pop(_TOKEN, None)
            if values["key"] != key:
                raise DamagedRecordError("it names another prompt")  # noqa: TRY301
        except DamagedRecordError as problem:
            raise CogViewConfigurationError(
                f"The record {printable(f'{self.url}/{name}', 200)} is damaged ({problem}); nothing was sent.",
                hint="Restore it. If it is deleted instead, the request that it names may be paid for again.",
            ) from None
        return values

    def refresh(self, history: History, attempts: RecordFile, manifest: RecordFile) -> bool:
        """Add what other workers recorded meanwhile. The caller is the only thread that still works.

        Args:
            history: What the records say.
            attempts: The file of attempts.
            manifest: The file of finished prompts.

        Returns:
            Whether there was anything.

        Raises:
            CogViewConfigurationError: A record is damaged.
            CogViewStorageError: The URL cannot be read.
        """
        found = False
        for values in self._news():
            found = True
            if _is_end(values):
                position = RecordFile.append(manifest, values)
                history.add_line(*position, values)
            else:
                RecordFile.append(attempts, values)
                with suppress(KeyError):  # the request has ended already
                    history.note(values)
        return found

    # --- recording

    def claim(self, values: Mapping[str, Any]) -> None:
        """Put the record of a request that is about to be sent.

        Args:
            values: The record.

        Raises:
            CogViewStoppedError: Another worker recorded something for the prompt meanwhile; the request must not be sent.
            CogViewStorageError: It cannot be put; the request must not be sent.
        """
        key = values["key"]
        with self._locks[hash(key) % _STRIPES]:
            number = self._next.get(key, 0)
            if not self._put(key, number, values):
                with self._lock:
                    self.lost += 1
                raise CogViewStoppedError(
                    "Another worker is generating this prompt; the request was not sent.",
                    hint="Run the job again to see what became of it.",
                )
            self._next[key] = number + 1

    def record(self, values: dict[str, Any]) -> None:
        """Put the record of how something ended. It is completed by what other workers recorded for the prompt meanwhile.

        Args:
            values: The record.

        Raises:
            CogViewStorageError: It cannot be put.
        """
        key = values["key"]
        with self._locks[hash(key) % _STRIPES]:
            number = self._next.get(key, 0)
            earlier = self._passed_ends.get(key)
            if earlier and _is_end(values):
                values.update(merged(earlier, values))
            for _ in range(_TRIES):
                if self._put(key, number, values):
                    self._next[key] = number + 1
                    if _is_end(values):
                        self._passed_ends.pop(key, None)
                    return
                name = _name(key, number)
                content = self.objects.read(name)
                if content is None:  # the store refused for a moment
                    continue
                theirs = self._parsed(name, key, content)
                if _is_end(theirs):
                    self._passed_ends[key] = theirs
                    if _is_end(values):
                        values.update(merged(theirs, values))
                else:
                    with self._lock:
                        self._passed.append(name)
                number += 1
        raise CogViewStorageError(f"The record of a request could not be put to {printable(self.url, 120)}.")

    def _put(self, key: str, number: int, values: Mapping[str, Any]) -> bool:
        if number > _MAX_NUMBER:
            raise CogViewStorageError(
                f"A prompt has too many records at {printable(self.url, 120)}.", hint="Choose another URL."
            )
        content = record_bytes({**values, _TOKEN: secrets.token_hex(8)})
        name = _name(key, number)
        # The answer to a request that created the object may be lost, and the request sent again by the store's client.
        return self._create(name, content) or self.objects.read(name) == content

    def upload(self, files: Iterable[str]) -> None:
        """Upload images that are in the temporary folder.

        Args:
            files: Their paths in it.

        Raises:
            CogViewStorageError: One cannot be uploaded. Its notes say where the image is.
        """
        for file in files:
            path = self.local / file
            if not path.is_file():  # uploaded with an earlier record
                continue
            try:
                self.objects.write(file, path.read_bytes())  # the name has request and hash: nothing else has it
            except (OSError, CogViewError) as error:
                self._keeps_local = True
                problem = error if isinstance(error, CogViewError) else CogViewStorageError(str(error))
                problem.add_note(
                    f"An image that was paid for is kept in {path}: upload it to {self.url}/{file} before the next run."
                )
                raise problem from None

    def forget(self, files: Iterable[str]) -> None:
        """Remove images from the temporary folder that are at the URL, with their record.

        Args:
            files: Their paths.
        """
        for file in files:
            (self.local / file).unlink(missing_ok=True)

    def publish(self) -> None:
        """Upload the manifest and the contact sheet.

        Raises:
            CogViewStorageError: They cannot be uploaded.
        """
        for path in sorted(self.local.iterdir()):
            if path.name == MANIFEST or path.suffix == ".html":
                self.objects.write(path.name, path.read_bytes())

    def notes(self) -> Iterator[str]:
        """Describe what other workers did.

        Yields:
            Remarks for the report.
        """
        if self.lost:
            yield f"Other workers came first for {count_text(self.lost, 'request')}."
        others = 0
        with suppress(CogViewStorageError):
            others = len(self.objects.names(_WORKERS)) - 1
        if others > 0:
            yield (
                f"{count_text(others, 'other worker')} still had the job when this one ended, or was killed: requests of it "
                "without an end are among those that may have been charged, and its prompts among those made."
            )


class _PutRecords(RecordFile):
    """A file of records in the temporary folder, each of which is put to the URL before it is appended."""

    def __init__(
        self,
        job: RemoteJob,
        folder: JobFolder,
        name: str,
        parse: Callable[[bytes], dict[str, Any]],
        *,
        writable: bool = False,
    ) -> None:
        self._job = job
        super().__init__(folder, name, parse, writable=writable)

    def append(self, values: dict[str, Any]) -> tuple[int, int]:  # type: ignore[override]
        if not _is_end(values):
            is_claim = "settled" not in values and "task_id" not in values
            (self._job.claim if is_claim else self._job.record)(values)
            return super().append(values)
        files = [image["file"] for image in values["images"]]
        self._job.upload(files)
        self._job.record(values)
        position = super().append(values)
        self._job.forget(files)
        return position


def remote_job(output_dir: Any, generator: CogViewImageGenerator | None, settings: dict[str, Any]) -> RemoteJob | None:
    """Return the job at a URL; None if its folder is a local one.

    Args:
        output_dir: The folder of the job.
        generator: Its storage options are used if `settings` have none.
        settings: fsspec's options for the URL are removed from it.

    Returns:
        The job.

    Raises:
        CogViewConfigurationError: The URL cannot be used.
    """
    if not isinstance(output_dir, str) or "://" not in output_dir:
        return None
    options = settings.get("storage_options") or (generator.storage_options if generator else None)
    folder = remote_folder(output_dir, options)
    if not isinstance(folder, RemoteFolder):
        return None
    settings.pop("storage_options", None)
    return RemoteJob(folder)


def manifest_at(url: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Read the manifest that the last worker uploaded.

    Args:
        url: The URL of the job.
        storage_options: fsspec's options for it.

    Yields:
        Its records.

    Raises:
        CogViewConfigurationError: It is damaged, or the URL cannot be used.
        CogViewStorageError: It cannot be read.
    """
    job = remote_job(url, None, {"storage_options": storage_options})
    content = (job and job.objects.read(MANIFEST)) or b""
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            yield manifest_line(line)
        except DamagedRecordError as problem:
            error = damaged_record(Path(MANIFEST), number, str(problem))
            raise error from None


def merged(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Unite two manifest records of a prompt, of workers that did not know of each other. No image is left out.

    Args:
        theirs: The record that is at the URL.
        ours: The record that is about to be put.

    Returns:
        The record of both.
    """
    images = _united(theirs["images"], ours["images"], lambda item: item.get("request_id") or item["file"])
    failures = _united(
        theirs["failures"], ours["failures"], lambda item: item.get("request_id") or json.dumps(item, sort_keys=True)
    )
    done = {item.get("request_id") for item in images} - {None}
    failures = [item for item in failures if item.get("request_id") not in done]
    counted = done | {item.get("request_id") for item in failures if item.get("url")}
    # A request that was sent three times is in the list twice.
    given_up = Counter(map(_request, theirs["given_up"])) | Counter(map(_request, ours["given_up"]))
    costs = [item["cost"] for item in images]
    status = ours["status"]
    if len(images) >= ours["arguments"].get("n", 1) or theirs["status"] == "made":
        status = "made"
    return {
        **ours,
        "status": status,
        "images": images,
        "failures": failures,
        "given_up": [
            {"request_id": request_id, "model": model}
            for request_id, model in given_up.elements()
            if request_id not in counted
        ],
        "cost": None if None in costs else str(sum(map(Decimal, costs), Decimal(0))),
        "currency": ours["currency"] or theirs["currency"],
        "sandbox": ours["sandbox"] or theirs["sandbox"],
        "request_ids": [*dict.fromkeys([*theirs["request_ids"], *ours["request_ids"]])],
    }


def _request(item: Mapping[str, Any]) -> tuple[str, str]:
    return item["request_id"], item["model"]


def _united(first: list[Any], second: list[Any], identity: Callable[[Any], Any]) -> list[Any]:
    united: dict[Any, Any] = {}
    for item in (*first, *second):
        united.setdefault(identity(item), item)
    return [*united.values()]


def _is_end(values: Mapping[str, Any]) -> bool:
    return "images" in values


def _name(key: str, number: int) -> str:
    return f"{_RECORDS}/{key}.{number:06}.json"


def _parts(url: str, name: str) -> tuple[str, int]:
    found = _RECORD_NAME.fullmatch(name)
    if found is None:
        raise CogViewConfigurationError(
            f"{printable(f'{url}/{name}', 200)} is not a record of a job; nothing was sent.", hint="Move it away."
        )
    return found[1], int(found[2])
