"""The records of a job in its folder: what is finished, and what was sent.

    job.json        the arguments that hold for every prompt; a folder of others is refused
    manifest.jsonl  one line for each finished prompt
    attempts.jsonl  one line before each paid request: a request without an end in the manifest is not forgotten

A line is on the disk before the next step is taken, and a file cut in the middle of its last line is read up to there.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from langchain_cogview.errors import CogViewConfigurationError, CogViewStorageError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

MANIFEST: Final = "manifest.jsonl"
ATTEMPTS: Final = "attempts.jsonl"
SETTINGS: Final = "job.json"
SETTINGS_TYPE: Final = "cogview.job"
SETTINGS_VERSION: Final = 1
MAX_RECORD: Final = 16 << 20
"""Bytes of one line; a longer one was not written by a job."""


class Record(NamedTuple):
    """One line of a file of JSON lines: where it begins and ends, in bytes, and what it says."""

    start: int
    end: int
    values: dict[str, Any]


def read_records(path: Path) -> Iterator[Record]:
    """The lines of a file; of a last one that is cut nothing. No file is an empty one.

    Raises:
        CogViewConfigurationError: A line before the last is damaged; with its number.
        CogViewStorageError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = number = 0
            while raw := file.readline(MAX_RECORD):
                number += 1
                values = _values(raw)
                if values is None and (raw.endswith(b"\n") or file.read(1)):
                    raise _damaged(path, number)
                if values is None:
                    return
                yield Record(start, start + len(raw), values)
                start += len(raw)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unreadable(path, error) from None


def read_record(path: Path, start: int) -> dict[str, Any]:
    """The line that begins at a byte, as `read_records` told it."""
    with path.open("rb") as file:
        file.seek(start)
        return _values(file.readline(MAX_RECORD)) or {}


def _values(raw: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def record_bytes(values: Mapping[str, Any]) -> bytes:
    """One line. Half a character, which UTF-8 does not have, becomes JSON's escape for it."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"


class RecordFile:
    """A file of JSON lines to which whole lines are appended, each durable before `append` returns. Safe for threads.

    A torn end, as a process leaves that was killed, is cut off when it is opened.

    Raises:
        CogViewConfigurationError: As `read_records`.
        CogViewStorageError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._end = 0
        for record in read_records(path):
            self._end = record.end
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            os.ftruncate(self._descriptor, self._end)
            if self._end:
                os.lseek(self._descriptor, self._end - 1, os.SEEK_SET)
                if os.read(self._descriptor, 1) != b"\n":
                    self._write(b"\n")  # an editor took the last line's end away
        except OSError as error:
            raise unwritable(path, error) from None
        synced_folder(path.parent)

    def append(self, values: Mapping[str, Any]) -> int:
        """Write a line, and tell at which byte it begins.

        Raises:
            CogViewStorageError: When it cannot be written; the file is then as it was before.
        """
        line = record_bytes(values)
        with self._lock:
            start = self._end
            try:
                self._write(line)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, start)
                raise unwritable(self.path, error) from None
            return start

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        os.lseek(self._descriptor, self._end, os.SEEK_SET)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)
        self._end += len(content)


def rewrite(path: Path, lines: Iterable[bytes]) -> None:
    """Put other content in place of a file's, whole or not at all, and durable.

    Raises:
        CogViewStorageError: It cannot be written; the file is as it was.
    """
    part = path.with_name(f".{path.name}.part")  # always the same: the folder is locked, and a torn one is written over
    try:
        with part.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise unwritable(path, error) from None
    synced_folder(path.parent)


def synced(path: Path) -> None:
    """See that a file's bytes and its name survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    synced_folder(path.parent)


def synced_folder(folder: Path) -> None:
    """See that the names in a folder survive a power cut, where the system knows how."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The arguments that every prompt of the folder's job has; None where there is no job yet.

    Raises:
        CogViewConfigurationError: The file is damaged or of a later version.
        CogViewStorageError: It cannot be read.
    """
    path = folder / SETTINGS
    try:
        values = _values(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from None
    if values is None or values.get("type") != SETTINGS_TYPE or not isinstance(values.get("settings"), dict):
        raise CogViewConfigurationError(
            f"The file {printable(str(path), 120)} is not one of a job, or is damaged.", hint="Choose another folder."
        )
    if values.get("version") != SETTINGS_VERSION:
        raise CogViewConfigurationError(
            f"The job in {printable(str(folder), 120)} was begun by another version of this package.",
            hint="Go on with that version, or choose another folder.",
        )
    return dict(values["settings"])


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Begin a folder's job."""
    content = {"type": SETTINGS_TYPE, "version": SETTINGS_VERSION, "settings": dict(settings)}
    rewrite(folder / SETTINGS, [json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n"])


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
    """

    request_id: str
    key: str
    line: int
    model: str
    prompt: str
    task_id: str | None = None


@dataclass(slots=True)
class Finished:
    """What the manifest says of one prompt, in short.

    Attributes:
        start: At which byte of the manifest its line begins.
        made: How many pictures.
        spent: The models of the pictures that were paid, or may have been.
        errors: Names of the errors' classes, of the pictures that were not made.
        links: How many of those have a link from which they may still be fetched.
    """

    start: int
    made: int
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

    def take(self, start: int, values: Mapping[str, Any]) -> None:
        """Note a line of the manifest.

        Raises:
            KeyError, TypeError, AttributeError: It is none.
        """
        key, images, failures = values["key"], values["images"], values["failures"]
        paid = [image["model"] for image in images if not image["cached"]]
        paid += [each["model"] for each in failures if each.get("url")]
        paid += [each["model"] for each in values["given_up"]]
        self.superseded += key in self.finished
        self.finished[key] = Finished(
            start,
            len(images),
            tuple(map(sys.intern, paid)),
            tuple(sys.intern(each["error"]) for each in failures),
            sum(bool(each.get("url")) for each in failures),
        )
        self.sandbox = self.sandbox or bool(values["sandbox"])
        self.files.update(image["file"] for image in images)
        for request_id in values["request_ids"]:
            self.settle(key, request_id)

    def note(self, values: Mapping[str, Any]) -> None:
        """Note a line of the attempts.

        Raises:
            KeyError, TypeError: It is none.
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
            self.open.setdefault(key, {})[request_id] = attempt

    def settle(self, key: str, request_id: str) -> None:
        """A request has its end."""
        attempts = self.open.get(key, {})
        attempts.pop(request_id, None)
        if not attempts:
            self.open.pop(key, None)

    def attempts(self) -> Iterator[Attempt]:
        """The requests without an end."""
        return (attempt for attempts in self.open.values() for attempt in attempts.values())


def read_history(folder: Path) -> History:
    """What a folder tells of the work so far; changes nothing.

    Raises:
        CogViewConfigurationError: A line is damaged; with its number.
        CogViewStorageError: A file cannot be read.
    """
    history = History()
    for name, take in ((ATTEMPTS, lambda _, values: history.note(values)), (MANIFEST, history.take)):
        for number, record in enumerate(read_records(folder / name), 1):
            try:
                take(record.start, record.values)
            except (KeyError, TypeError, AttributeError):
                raise _damaged(folder / name, number) from None
    return history


def compact(folder: Path) -> None:
    """Leave one line for each prompt in the manifest, its last."""
    path = folder / MANIFEST
    last = {record.values["key"]: record.start for record in read_records(path)}
    kept = (record.values for record in read_records(path) if last[record.values["key"]] == record.start)
    rewrite(path, map(record_bytes, kept))


def _damaged(path: Path, number: int) -> CogViewConfigurationError:
    return CogViewConfigurationError(
        f"Line {number} of {printable(str(path), 120)} is damaged; nothing was sent.",
        hint="Take it out, or put the file back as it was; a picture that it told of is found again by its name.",
    )


def _unreadable(path: Path, error: OSError) -> CogViewStorageError:
    return CogViewStorageError(
        f"The file {printable(str(path), 120)} cannot be read: {error.strerror}.", hint="Nothing was sent."
    )


def unwritable(path: Path, error: OSError) -> CogViewStorageError:
    """That a file of the job's folder cannot be written."""
    return CogViewStorageError(
        f"{printable(str(path), 120)} cannot be written: {error.strerror or type(error).__name__}.",
        hint="See that the folder is writable and its disk has space left, then run the job again.",
    )
