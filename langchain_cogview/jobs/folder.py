"""A job's folder: locked by its descriptor, and written only through files that a job made.

Every file is opened relative to the folder's descriptor where the system can do that, and never through a symbolic link. The
folder stays the same one when somebody renames it, and a job notices before it pays.
"""

# ruff: noqa: PTH105, PTH116, PTH208  pathlib knows no descriptors
from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, Self

from langchain_cogview.errors import CogViewConfigurationError, CogViewError, CogViewStorageError, printable
from langchain_cogview.images.store import rename_new

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

LOCK: Final = ".lock"
MAX_RECORD: Final = 16 << 20
"""Bytes of one line; a longer one was not written by a job."""
_LEFTOVER: Final = re.compile(r"\.lock|\.(?:job\.json|manifest\.jsonl)\.part|\.cogview-[0-9a-f]+\.part|\.DS_Store")
_HAS_DESCRIPTORS: Final = os.open in os.supports_dir_fd and hasattr(os, "O_DIRECTORY")
_FLAGS: Final = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
_BUSY: Final = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_START: Final = b'{"key":"'


class JobFolder:
    """A folder that is read, and after `lock` also written, by one job. It is a context manager.

    Args:
        path: Absolute. A symbolic link was resolved before: the job belongs to the folder that it leads to.
        create: Make the folder where it is missing. Without it, a missing folder is one without files.

    Raises:
        CogViewStorageError: It cannot be made or opened.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._lock: int | None = None
        self._identity: tuple[int, int] | None = None
        try:
            if create:
                path.mkdir(parents=True, exist_ok=True)
            if _HAS_DESCRIPTORS:
                self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                self._identity = _identity(os.fstat(self._descriptor))
            else:
                self._identity = _identity(os.stat(path))
        except (FileNotFoundError, NotADirectoryError) as error:
            if create:
                raise write_error(path, error) from None
        except OSError as error:
            raise write_error(path, error) from None

    # --- one job at a time

    def lock(self) -> None:
        """Keep other jobs out until `close`, or until the process ends, however it ends.

        Raises:
            CogViewConfigurationError: Another job is writing to the folder.
            CogViewStorageError: It cannot be locked.
        """
        try:
            if self._descriptor is None or not _locked(self._descriptor):
                # Windows, and file systems over a network that lock only files that are open for writing.
                self._lock = self.open(LOCK, os.O_RDWR | os.O_CREAT)
                if not _locked(self._lock):
                    raise write_error(self.path, OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))
        except OSError as error:
            if isinstance(error, PermissionError) or error.errno in _BUSY:
                raise CogViewConfigurationError(
                    f"Another job is writing to {printable(str(self.path), 120)}; nothing was sent.",
                    hint="Wait until it has ended, or choose another folder.",
                ) from None
            raise write_error(self.path, error) from None

    def check(self) -> None:
        """See that the path still leads to this folder: images are saved by their path.

        Raises:
            CogViewStorageError: The folder was moved, replaced or deleted.
        """
        try:
            same = _identity(os.stat(self.path)) == self._identity
            if same and self._lock is not None:
                same = _identity(self._stat(LOCK)) == _identity(os.fstat(self._lock))
        except OSError:
            same = False
        if not same:
            raise CogViewStorageError(
                f"The folder {printable(str(self.path), 120)} was moved, replaced or deleted while the job ran.",
                hint="Put it back where it was, then run the job again.",
            )

    def close(self) -> None:
        """Let the next job in."""
        for descriptor in (self._lock, self._descriptor):
            if descriptor is not None:
                os.close(descriptor)
        self._lock = self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- files

    def names(self) -> set[str]:
        """Names of all files and folders in it, without those that a job may leave behind when it is killed early."""
        if self._identity is None:
            return set()
        try:
            names = os.listdir(self.path if self._descriptor is None else self._descriptor)
        except OSError as error:
            raise read_error(self.path, error) from None
        return {name for name in names if not _LEFTOVER.fullmatch(name)}

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Open a regular file; a symbolic link is not followed, and a pipe is not waited for.

        A file that has a second name (a hard link) is not opened for writing.

        Args:
            name: In the folder.
            flags: As for `os.open`.

        Raises:
            CogViewConfigurationError: It is no regular file.
            OSError: As the system says, such as `FileNotFoundError`.
        """
        if self._identity is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            if not hasattr(os, "O_NOFOLLOW") and stat.S_ISLNK(os.lstat(self.path / name).st_mode):
                raise self._foreign(name)
            descriptor = os.open(*self._at(name), flags | _FLAGS, 0o666, **self._relative())
        except OSError as error:
            # ELOOP: a symbolic link. ENXIO: a pipe that nobody reads, or a socket. EISDIR: a folder.
            if error.errno in {errno.ELOOP, errno.ENXIO, errno.EISDIR}:
                raise self._foreign(name) from None
            raise
        facts = os.fstat(descriptor)
        # A second name of a file that is written to may be one of somebody else, or of a backup made of hard links.
        if not stat.S_ISREG(facts.st_mode) or (flags & (os.O_WRONLY | os.O_RDWR) and facts.st_nlink > 1):
            os.close(descriptor)
            raise self._foreign(name)
        return descriptor

    def read(self, name: str, limit: int) -> bytes | None:
        """The first `limit` bytes of a regular file; None where there is no such file.

        Raises:
            CogViewConfigurationError: It is no regular file.
            CogViewStorageError: It cannot be read.
        """
        try:
            with os.fdopen(self.open(name), "rb") as file:
                return file.read(limit)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise read_error(self.path / name, error) from None

    def is_file(self, name: str, descriptor: int) -> bool:
        """Whether a name still belongs to an open file."""
        try:
            return _identity(self._stat(name)) == _identity(os.fstat(descriptor))
        except OSError:
            return False

    def replace(self, name: str, content: Iterable[bytes]) -> None:
        """Put a file in place of the one of that name, whole or not at all, and durable.

        Raises:
            OSError: As the system says; the file is as it was.
        """
        part = self._new_file(content)
        try:
            os.replace(*self._at(part), *self._at(name), **self._relative("src_dir_fd", "dst_dir_fd"))
        except OSError:
            self._unlink(part)
            raise
        self.sync()

    def add(self, names: Iterable[str], content: bytes) -> str:
        """Write a file that was not there, whole or not at all, and durable.

        Args:
            names: Tried in this order; one that is taken is left as it is.
            content: Of the file.

        Returns:
            The name that it got.

        Raises:
            OSError: As the system says, and `FileExistsError` where all names are taken.
        """
        part = self._new_file([content])
        try:
            for name in names:
                with contextlib.suppress(FileExistsError):
                    self._name_file(part, name)
                    self.sync()
                    return name
        finally:
            self._unlink(part)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def sync(self, name: str | None = None) -> None:
        """See that the names in the folder, and the bytes of a file, survive a power cut, where the system knows how."""
        if name is not None:
            descriptor = self.open(name)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._descriptor)

    def _new_file(self, content: Iterable[bytes]) -> str:
        name = f".cogview-{secrets.token_hex(8)}.part"
        descriptor = self.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            self._unlink(name)
            raise
        return name

    def _name_file(self, part: str, name: str) -> None:
        try:
            os.link(*self._at(part), *self._at(name), **self._relative("src_dir_fd", "dst_dir_fd"))
        except FileExistsError:
            raise
        except OSError:  # the file system has no hard links; which error says so differs between file systems
            rename_new(*self._at(part), *self._at(name), folder=self._descriptor)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(*self._at(name), **self._relative())

    def _stat(self, name: str) -> os.stat_result:
        return os.stat(*self._at(name), follow_symlinks=False, **self._relative())

    def _at(self, name: str) -> tuple[Any]:
        return (self.path / name if self._descriptor is None else name,)

    def _relative(self, *names: str) -> dict[str, Any]:
        return {} if self._descriptor is None else dict.fromkeys(names or ("dir_fd",), self._descriptor)

    def _foreign(self, name: str) -> CogViewConfigurationError:
        return CogViewConfigurationError(
            f"{printable(str(self.path / name), 120)} is not a regular file, or has hard links; nothing was written to it.",
            hint="Replace it with a copy of its own or move it away, or choose another folder.",
        )


# --- files of lines


class DamagedRecordError(ValueError):
    """A line is not one of its file; the message says why. `incomplete`: its JSON may go on behind it."""

    def __init__(self, message: str, *, incomplete: bool = False) -> None:
        super().__init__(message)
        self.incomplete = incomplete


class RecordPosition(Protocol):
    """What knows where its line is: at which byte it begins, and how many bytes it has."""

    start: int
    size: int


class StoredRecord(NamedTuple):
    """One line: where it begins, how many bytes it has, and what it says."""

    start: int
    size: int
    values: dict[str, Any]


class RecordFile:
    """A file of JSON lines to which whole lines are appended, each durable before `append` returns. Safe for threads.

    Args:
        folder: Of the job.
        name: `manifest.jsonl` or `attempts.jsonl`.
        parse: Checks a line and returns what it says; raises `DamagedError` for one that is not of this file.
        writable: Make the file where it is missing, and append to it. Without it, a missing file is one without lines.

    Raises:
        CogViewConfigurationError: It is no regular file.
        CogViewStorageError: It cannot be opened.
    """

    def __init__(
        self, folder: JobFolder, name: str, parse: Callable[[bytes], dict[str, Any]], *, writable: bool = False
    ) -> None:
        self.path = folder.path / name
        self._parse = parse
        self._folder = folder
        self._writable = writable
        self._lock = threading.Lock()
        self._end = 0
        self._descriptor = -1
        try:
            self._descriptor = folder.open(name, os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY)
        except FileNotFoundError as error:
            if writable:
                raise write_error(self.path, error) from None
        except OSError as error:
            raise (write_error if writable else read_error)(self.path, error) from None

    def records(self) -> Iterator[StoredRecord]:
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
                        raise damaged_record(self.path, number, f"longer than {MAX_RECORD:,} bytes")
                    try:
                        values = self._parse(raw)
                    except DamagedRecordError as problem:
                        # Only what a job begins to write is cut off: a line of its own, or the zeros of a power cut.
                        began = raw[: len(_START)] == _START[: len(raw)] or not raw.strip(b"\0")
                        if torn and problem.incomplete and began:
                            break
                        raise damaged_record(self.path, number, str(problem)) from None
                    yield StoredRecord(start, len(raw), values)
                    start += len(raw)
                self._end = start
        except OSError as error:
            raise read_error(self.path, error) from None

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
            raise write_error(self.path, error) from None
        self._folder.sync()

    def read(self, start: int, size: int) -> dict[str, Any]:
        """The line that `records` or `append` told the place of.

        Raises:
            CogViewConfigurationError: Another program changed the file.
            CogViewStorageError: It cannot be read.
        """
        try:
            return self._parse(self._bytes(start, size))
        except OSError as error:
            raise read_error(self.path, error) from None
        except DamagedRecordError as problem:
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
                raise write_error(self.path, error) from None
            return start, len(line)

    def compact(self, finished: Mapping[str, RecordPosition]) -> None:
        """Leave only the lines of these prompts, each at its new place.

        Raises:
            CogViewStorageError: It cannot be written; the file is as it was.
        """
        kept = sorted(finished.values(), key=lambda item: item.start)
        try:
            self._check_end()
            self._folder.replace(self.path.name, (self._bytes(item.start, item.size) for item in kept))
            descriptor = self._folder.open(self.path.name, os.O_RDWR)
        except OSError as error:
            raise write_error(self.path, error) from None
        with self._lock:
            os.close(self._descriptor)
            self._descriptor, self._end = descriptor, 0
            for item in kept:
                item.start = self._end
                self._end += item.size

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


def record_bytes(values: Mapping[str, Any]) -> bytes:
    """One line. Half a character, which UTF-8 does not have, becomes JSON's escape for it."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"


def damaged_record(path: Path, number: int, why: str) -> CogViewConfigurationError:
    """That a line of one of the job's files is damaged."""
    return CogViewConfigurationError(
        f"Line {number} of {printable(str(path), 120)} is damaged ({why}); nothing was sent.",
        hint="Take it out, or put the file back as it was; a picture that it told of is found again by its name.",
    )


# --- what the system says


def spare_descriptors() -> int | None:
    """How many further files this process may open now; None where that is not known, or there is no limit."""
    try:
        import resource  # noqa: PLC0415  not on Windows

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        taken = len(os.listdir("/dev/fd"))
    except (ImportError, OSError) as error:
        return 0 if getattr(error, "errno", None) in {errno.EMFILE, errno.ENFILE} else None
    return None if limit == resource.RLIM_INFINITY else max(0, limit - taken)


def read_error(path: Path, error: OSError) -> CogViewStorageError:
    """That a file of the job's folder cannot be read."""
    return CogViewStorageError(
        f"{printable(str(path), 120)} cannot be read: {error.strerror or type(error).__name__}.",
        hint="Nothing was sent.",
    )


def write_error(path: Path, error: OSError) -> CogViewError:
    """That a file of the job's folder cannot be written."""
    return CogViewStorageError(
        f"{printable(str(path), 120)} cannot be written: {error.strerror or type(error).__name__}.",
        hint="See that the folder is writable and its disk has space left, then run the job again.",
    )


def _identity(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _locked(descriptor: int) -> bool:
    """Lock an open file or folder; False where this kind of file cannot be locked here.

    Raises:
        OSError: Another process or job holds it.
    """
    try:
        import fcntl  # noqa: PLC0415
    except ImportError:  # Windows
        import msvcrt  # noqa: PLC0415

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EISDIR}:
            return False
        raise
    return True
