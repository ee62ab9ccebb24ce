"""The records of a job in its folder: what is finished, and what was sent.

    job.json        the arguments that hold for every prompt; it marks a folder as a job's
    manifest.jsonl  one line for each finished prompt
    attempts.jsonl  one line before each paid request: a request without an end in the manifest is not forgotten

A line is on the disk before the next step is taken, and a file cut in the middle of its last line is read up to there. All that
is read here may have been written by somebody else: each line is checked against its schema before anything is sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from langchain_cogview.errors import CogViewConfigurationError, CogViewStorageError, printable
from langchain_cogview.jobs.folder import unreadable, unwritable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from langchain_cogview.jobs.folder import JobFolder

MANIFEST: Final = "manifest.jsonl"
ATTEMPTS: Final = "attempts.jsonl"
SETTINGS: Final = "job.json"
SETTINGS_TYPE: Final = "cogview.job"
SETTINGS_VERSION: Final = 1
MAX_RECORD: Final = 16 << 20
"""Bytes of one line; a longer one was not written by a job."""
_MAX_SETTINGS: Final = 1 << 20
_START: Final = b'{"key":"'
_MAX_AMOUNT: Final = Decimal(10) ** 12


# --- the schema of a line


def _amount(text: str) -> str:
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("NaN")
    exponent = amount.as_tuple().exponent
    if not (amount.is_finite() and 0 <= amount <= _MAX_AMOUNT and isinstance(exponent, int) and exponent >= -30):  # noqa: PLR2004
        raise ValueError("not an amount of money")
    return text


def _file_name(text: str) -> str:
    if text in {"", ".", ".."} or "/" in text or "\\" in text or not text.isprintable():
        raise ValueError("not the name of a file in the folder")
    return text


_Count = Annotated[int, Field(ge=0, le=1 << 53)]
_Name = Annotated[str, Field(max_length=1000)]
_RequestId = Annotated[str, Field(pattern=r"\A[0-9A-Za-z_.-]{1,200}\z")]
_TaskId = Annotated[str, Field(pattern=r"\A[0-9A-Za-z_:-][0-9A-Za-z_.:-]{0,255}\z")]
_Amount = Annotated[str, Field(max_length=60), AfterValidator(_amount)]


class _Checked(BaseModel):
    """Checks without converting; what is not named here is left as it is."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _FilterEntry(_Checked):
    role: str | None = None
    level: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None


class _Image(_Checked):
    file: Annotated[str, Field(max_length=255), AfterValidator(_file_name)]
    model: _Name
    cost: _Amount | None
    cached: bool
    sandbox: bool
    request_id: _RequestId | None = None
    sha256: _Name | None = None
    size_bytes: _Count | None = None
    width: _Count | None
    height: _Count | None
    mime_type: _Name | None = None
    content_filter: list[_FilterEntry] = []


class _Failure(_Checked):
    error: _Name
    message: str
    model: _Name
    code: str | None = None
    status: int | None = None
    outcome: _Name
    request_id: _RequestId | None = None
    content_filter: list[_FilterEntry] = []
    url: str | None = None
    expires_at: _Name | None = None
    cost: _Amount | None = None
    cached: bool = False
    sandbox: bool = False

    @model_validator(mode="after")
    def _has_what_a_link_needs(self) -> _Failure:
        if self.url and not (self.request_id and {"expires_at", "cost", "cached", "sandbox"} <= self.model_fields_set):
            raise ValueError("not complete")
        return self


class _GivenUp(_Checked):
    request_id: _RequestId
    model: _Name


class _Arguments(_Checked):
    prompt: str


class _ManifestLine(_Checked):
    key: _Name
    line: Annotated[int, Field(ge=0, le=1 << 53)]
    status: _Name
    arguments: _Arguments
    images: list[_Image]
    failures: list[_Failure]
    given_up: list[_GivenUp]
    cost: _Amount | None
    currency: Annotated[str, Field(max_length=16)] | None
    sandbox: bool
    request_ids: list[_RequestId]
    seconds: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
    finished: _Name


class _Sent(_Checked):
    key: _Name
    request_id: _RequestId
    line: Annotated[int, Field(ge=0, le=1 << 53)]
    model: _Name
    prompt: str


class _Task(_Checked):
    key: _Name
    request_id: _RequestId
    task_id: _TaskId | None
    model: _Name = ""


class _Settled(_Checked):
    key: _Name
    request_id: _RequestId
    settled: _Name


class _Settings(_Checked):
    type: str
    version: int
    settings: dict[str, str | int | bool | None]


class _DamagedError(ValueError):
    """A line is not one of its file; the message says why. `incomplete`: its JSON may go on behind it."""

    def __init__(self, message: str, *, incomplete: bool = False) -> None:
        super().__init__(message)
        self.incomplete = incomplete


def _parsed(name: str, raw: bytes) -> dict[str, Any]:
    """One line of a file of records, checked. The only parser of such a line."""
    try:
        values = json.loads(raw)
    except UnicodeDecodeError:
        raise _DamagedError("not UTF-8", incomplete=True) from None
    except RecursionError:
        raise _DamagedError("nested too deeply") from None
    except ValueError:
        raise _DamagedError("not valid JSON", incomplete=True) from None
    if not isinstance(values, dict):
        raise _DamagedError("not a JSON object")
    if name == MANIFEST:
        schema: type[_Checked] = _ManifestLine
    else:
        schema = _Settled if "settled" in values else _Task if "task_id" in values else _Sent
    try:
        schema.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the record"
        raise _DamagedError(printable(f"{where}: {first['msg']}", 120)) from None
    return values


def record_bytes(values: Mapping[str, Any]) -> bytes:
    """One line. Half a character, which UTF-8 does not have, becomes JSON's escape for it."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"


# --- files of lines


class Record(NamedTuple):
    """One line: where it begins, how many bytes it has, and what it says."""

    start: int
    size: int
    values: dict[str, Any]


class RecordFile:
    """A file of JSON lines to which whole lines are appended, each durable before `append` returns. Safe for threads.

    Args:
        folder: Of the job.
        name: `manifest.jsonl` or `attempts.jsonl`.
        writable: Make the file where it is missing, and append to it. Without it, a missing file is one without lines.

    Raises:
        CogViewConfigurationError: It is no regular file.
        CogViewStorageError: It cannot be opened.
    """

    def __init__(self, folder: JobFolder, name: str, *, writable: bool = False) -> None:
        self.path = folder.path / name
        self._folder = folder
        self._writable = writable
        self._lock = threading.Lock()
        self._end = 0
        self._descriptor = -1
        try:
            self._descriptor = folder.open(name, os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY)
        except FileNotFoundError as error:
            if writable:
                raise unwritable(self.path, error) from None
        except OSError as error:
            raise (unwritable if writable else unreadable)(self.path, error) from None

    def records(self) -> Iterator[Record]:
        """All lines, checked; of a last one that is cut nothing. Appending goes on behind the last whole line.

        Raises:
            CogViewConfigurationError: A line is damaged; with its number.
            CogViewStorageError: The file cannot be read.
        """
        if self._descriptor < 0:
            return
        try:
            with os.fdopen(self._descriptor, "rb", closefd=False) as file:
                file.seek(0)
                start = number = 0
                while raw := file.readline(MAX_RECORD):
                    number += 1
                    torn = not raw.endswith(b"\n")
                    if torn and len(raw) == MAX_RECORD:
                        raise _damaged(self.path, number, f"longer than {MAX_RECORD:,} bytes")
                    try:
                        values = _parsed(self.path.name, raw)
                    except _DamagedError as problem:
                        # Only what a job begins to write is cut off: a line of its own, or the zeros of a power cut.
                        began = raw[: len(_START)] == _START[: len(raw)] or not raw.strip(b"\0")
                        if torn and problem.incomplete and began:
                            break
                        raise _damaged(self.path, number, str(problem)) from None
                    yield Record(start, len(raw), values)
                    start += len(raw)
                self._end = start
        except OSError as error:
            raise unreadable(self.path, error) from None

    def ready(self) -> None:
        """Cut off the torn end that `records` left out, as a process leaves it that was killed.

        Raises:
            CogViewStorageError: The file cannot be written.
        """
        try:
            os.ftruncate(self._descriptor, self._end)
            if self._end:
                os.lseek(self._descriptor, self._end - 1, os.SEEK_SET)
                if os.read(self._descriptor, 1) != b"\n":
                    self._write(b"\n")  # an editor took the last line's end away
        except OSError as error:
            raise unwritable(self.path, error) from None
        self._folder.sync()

    def read(self, start: int, size: int) -> dict[str, Any]:
        """The line that `records` or `append` told the place of.

        Raises:
            CogViewConfigurationError: Another program changed the file.
            CogViewStorageError: It cannot be read.
        """
        try:
            return _parsed(self.path.name, self._bytes(start, size))
        except OSError as error:
            raise unreadable(self.path, error) from None
        except _DamagedError as problem:
            raise CogViewConfigurationError(
                f"{printable(str(self.path), 120)} was changed by another program while the job ran ({problem}).",
                hint="Put it back as it was, then run the job again.",
            ) from None

    def append(self, values: Mapping[str, Any]) -> tuple[int, int]:
        """Write a line, and return at which byte it begins and how many bytes it has.

        Raises:
            CogViewStorageError: It cannot be written, or the file is no longer the one that the job opened. It is as it was.
        """
        line = record_bytes(values)
        with self._lock:
            start = self._end
            try:
                self._check_end()
                self._write(line)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, start)
                raise unwritable(self.path, error) from None
            return start, len(line)

    def compact(self, finished: Mapping[str, Finished]) -> None:
        """Leave only the lines of these prompts, each at its new place.

        Raises:
            CogViewStorageError: It cannot be written; the file is as it was.
        """
        kept = sorted(finished.values(), key=lambda each: each.start)
        try:
            self._check_end()
            self._folder.replace(self.path.name, (self._bytes(each.start, each.size) for each in kept))
            descriptor = self._folder.open(self.path.name, os.O_RDWR)
        except OSError as error:
            raise unwritable(self.path, error) from None
        with self._lock:
            os.close(self._descriptor)
            self._descriptor, self._end = descriptor, 0
            for each in kept:
                each.start = self._end
                self._end += each.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def check(self) -> None:
        """See that the name of the file still leads to it.

        Raises:
            CogViewStorageError: It was moved, replaced or deleted.
        """
        if self._descriptor < 0:
            raise CogViewStorageError(f"The job has ended; {self.path.name} is closed.", hint="")
        if not self._folder.is_file(self.path.name, self._descriptor):
            raise self._changed("moved, replaced or deleted")

    def _check_end(self) -> None:
        """See that nobody else writes to the file."""
        self.check()
        if os.fstat(self._descriptor).st_size != self._end:
            raise self._changed("changed")

    def _changed(self, how: str) -> CogViewStorageError:
        return CogViewStorageError(
            f"{printable(str(self.path), 120)} was {how} by another program while the job ran.",
            hint="Put it back as it was, then run the job again.",
        )

    def _bytes(self, start: int, size: int) -> bytes:
        pieces = []
        with self._lock:
            os.lseek(self._descriptor, start, os.SEEK_SET)
            while size > 0 and (piece := os.read(self._descriptor, size)):
                pieces.append(piece)
                size -= len(piece)
        return b"".join(pieces)

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        os.lseek(self._descriptor, self._end, os.SEEK_SET)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)
        self._end += len(content)


def _damaged(path: Path, number: int, why: str) -> CogViewConfigurationError:
    return CogViewConfigurationError(
        f"Line {number} of {printable(str(path), 120)} is damaged ({why}); nothing was sent.",
        hint="Take it out, or put the file back as it was; a picture that it told of is found again by its name.",
    )


# --- the settings


def read_settings(folder: JobFolder) -> dict[str, Any] | None:
    """The arguments that every prompt of the folder's job has; None where there is no job yet.

    Raises:
        CogViewConfigurationError: The file is damaged, of a later version, or no regular file.
        CogViewStorageError: It cannot be read.
    """
    raw = folder.read(SETTINGS, _MAX_SETTINGS)
    if raw is None:
        return None
    try:
        found = _Settings.model_validate(json.loads(raw))
    except (ValueError, RecursionError):  # pydantic's errors are ValueErrors
        found = None
    if found is None or found.type != SETTINGS_TYPE:
        raise CogViewConfigurationError(
            f"The file {printable(str(folder.path / SETTINGS), 120)} is not one of a job, or is damaged.",
            hint="Choose another folder.",
        )
    if found.version != SETTINGS_VERSION:
        raise CogViewConfigurationError(
            f"The job in {printable(str(folder.path), 120)} was begun by another version of this package.",
            hint="Go on with that version, or choose another folder.",
        )
    return dict(found.settings)


def write_settings(folder: JobFolder, settings: Mapping[str, Any]) -> None:
    """Begin a folder's job.

    Raises:
        CogViewStorageError: It cannot be written.
    """
    content = {"type": SETTINGS_TYPE, "version": SETTINGS_VERSION, "settings": dict(settings)}
    try:
        folder.add([SETTINGS], json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n")
    except OSError as error:
        raise unwritable(folder.path / SETTINGS, error) from None


def refuse_foreign_folder(folder: JobFolder, *, into_existing: bool) -> None:
    """Refuse a folder without a job that holds something else, unless the caller agreed to add files there.

    Raises:
        CogViewConfigurationError: With what it holds.
    """
    names = folder.names()
    if not names:
        return
    where = printable(str(folder.path), 120)
    if not into_existing:
        raise CogViewConfigurationError(
            f"The folder {where} is not empty and holds no job; nothing was sent.",
            hint="Choose another folder, or pass into_existing=True to add the job's files to it; none is written over.",
        )
    for name in (MANIFEST, ATTEMPTS):
        if name in names and not folder.read(name, 1):
            raise CogViewConfigurationError(
                f"The file {name} in {where} is empty and was there before the job; nothing was sent.",
                hint="Move it away, or choose another folder.",
            )


# --- what the records say


@dataclass(slots=True)
class Attempt:
    """A paid request, noted before it was sent.

    Attributes:
        request_id: Ours.
        key: Of the prompt.
        line: Its line at that time.
        model: Which model was asked; of a task, which one took it.
        prompt: Its beginning, in one line.
        task_id: Of the task endpoint, once the task was accepted.
        posts: How often it was sent though it may have been charged.
    """

    request_id: str
    key: str
    line: int
    model: str
    prompt: str
    task_id: str | None = None
    posts: int = 1


@dataclass(slots=True)
class Finished:
    """What the manifest says of one prompt, in short.

    Attributes:
        start: At which byte of the manifest its line begins.
        size: How many bytes its line has.
        line: Of the prompt, when it was drawn.
        made: How many pictures.
        cost: Of all its pictures, as a decimal number; None where a price is unknown, or there is no picture.
        currency: ISO code.
        spent: The models of the pictures that were paid, or may have been.
        errors: Names of the errors' classes, of the pictures that were not made.
        links: How many of those have a link from which they may still be fetched.
    """

    start: int
    size: int
    line: int
    made: int
    cost: str | None
    currency: str | None
    spent: tuple[str, ...]
    errors: tuple[str, ...]
    links: int


@dataclass(slots=True)
class History:
    """What a folder tells of the work so far.

    Attributes:
        finished: By the prompt's key; of several lines the last.
        superseded: How many lines of the manifest a later one replaces.
        open: Requests without an end in the manifest: by the prompt's key, then by their id.
        files: Names of the pictures in the manifest.
        sandbox: Whether a placeholder is among them.
    """

    finished: dict[str, Finished] = field(default_factory=dict)
    superseded: int = 0
    open: dict[str, dict[str, Attempt]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    sandbox: bool = False

    def take(self, start: int, size: int, values: Mapping[str, Any]) -> None:
        """Note a checked line of the manifest."""
        key, images, failures = values["key"], values["images"], values["failures"]
        paid = [image["model"] for image in images if not image["cached"]]
        paid += [each["model"] for each in failures if each.get("url")]
        paid += [each["model"] for each in values["given_up"]]
        self.superseded += key in self.finished
        self.finished[key] = Finished(
            start,
            size,
            values["line"],
            len(images),
            values["cost"] if images else None,
            values["currency"] and sys.intern(values["currency"]),
            tuple(map(sys.intern, paid)),
            tuple(sys.intern(each["error"]) for each in failures),
            sum(bool(each.get("url")) for each in failures),
        )
        self.sandbox = self.sandbox or values["sandbox"]
        self.files.update(image["file"] for image in images)
        for request_id in values["request_ids"]:
            self.settle(key, request_id)

    def note(self, values: Mapping[str, Any]) -> None:
        """Note a checked line of the attempts.

        Raises:
            KeyError: It is about a request that none before it names.
        """
        key, request_id = values["key"], values["request_id"]
        if "settled" in values:
            self.settle(key, request_id)
        elif "task_id" in values:
            attempt = self.open[key][request_id]
            attempt.task_id = values["task_id"]
            attempt.model = values.get("model", attempt.model)  # a fallback model's task
        else:
            attempt = Attempt(request_id, key, values["line"], values["model"], values["prompt"])
            before = self.open.setdefault(key, {}).get(request_id)
            if before and before.model == attempt.model:
                attempt.posts = before.posts + 1
            self.open[key][request_id] = attempt

    def settle(self, key: str, request_id: str) -> None:
        """A request has its end."""
        attempts = self.open.get(key, {})
        attempts.pop(request_id, None)
        if not attempts:
            self.open.pop(key, None)

    def attempts(self) -> Iterator[Attempt]:
        """The requests without an end."""
        return (attempt for attempts in self.open.values() for attempt in attempts.values())


def read_history(attempts: RecordFile, manifest: RecordFile) -> History:
    """What a folder tells of the work so far; changes nothing.

    Raises:
        CogViewConfigurationError: A line is damaged; with its number.
        CogViewStorageError: A file cannot be read.
    """
    history = History()
    for number, record in enumerate(attempts.records(), 1):
        try:
            history.note(record.values)
        except KeyError:
            raise _damaged(attempts.path, number, "it names a request that was never sent") from None
    for record in manifest.records():
        history.take(*record)
    return history
