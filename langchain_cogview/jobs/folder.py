"""A job's folder: locked through its descriptor, and written only through files that a job created.

Where the system allows it, each file is opened relative to the folder's descriptor, and never through a symbolic link. The
descriptor still names the same folder after a rename, and a job checks the path again before each paid request.
"""

# ruff: noqa: PTH102, PTH105, PTH116, PTH208  pathlib cannot open relative to a descriptor
from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import secrets
import stat
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from langchain_cogview.errors import CogViewConfigurationError, CogViewError, CogViewStorageError, printable
from langchain_cogview.images.store import rename_new

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

LOCK: Final = ".lock"
SUBFOLDER: Final = re.compile(r"images-(\d{4,9})")
SHARD_FOLDER: Final = re.compile(r"shard-(\d{1,5})-of-(\d{1,5})", re.ASCII)
"""The names of the sub-folders in which a job saves images."""
MAX_RECORD: Final = 16 << 20
"""Maximum length of a line, in bytes; a job never writes a longer one."""
_LEFTOVER: Final = re.compile(r"\.lock|\.(?:job\.json|manifest\.jsonl)\.part|\.cogview-[0-9a-f]+\.part|\.DS_Store")
_HAS_DESCRIPTORS: Final = os.open in os.supports_dir_fd and hasattr(os, "O_DIRECTORY")
_FLAGS: Final = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
_BUSY: Final = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_START: Final = b'{"key":"'


class FolderInUseError(CogViewConfigurationError):
    """Another job is writing to the folder. Nothing was sent."""


class JobFolder:
    """A folder that one job reads and, after `lock`, also writes. It is a context manager.

    The caller resolves symbolic links in `path` before: the job belongs to the folder that they lead to. `create` creates a
    missing folder; otherwise it is treated as an empty one. `opened` is descriptor and identity of a folder that is open.
    """

    def __init__(
        self, path: Path, *, create: bool = False, opened: tuple[int | None, tuple[int, int]] | None = None
    ) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._lock: int | None = None
        self._identity: tuple[int, int] | None = None
        if opened:
            self._descriptor, self._identity = opened
            return
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
        except FileExistsError:
            raise CogViewConfigurationError(
                f"{printable(str(path), 120)} is a file, not a folder; nothing was sent.", hint="Choose another folder."
            ) from None
        except OSError as error:
            raise write_error(path, error) from None

    def subfolder(self, name: str, *, create: bool = False) -> JobFolder:
        """Open a folder in this folder; a symbolic link is not followed. `create` creates a missing one, not durably.

        Returns:
            The folder, to be closed.

        Raises:
            CogViewConfigurationError: The name does not belong to a folder.
            OSError: The system's error, such as `FileNotFoundError`.
        """
        if self._identity is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(*self._at(name), **self._relative())
        facts, descriptor = self._stat(name), None
        if not stat.S_ISDIR(facts.st_mode):
            raise self._foreign(name, "folder")
        if self._descriptor is not None:
            try:
                descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | _FLAGS, dir_fd=self._descriptor)
            except OSError as error:
                if error.errno in {errno.ELOOP, errno.ENOTDIR}:  # replaced in the meantime
                    raise self._foreign(name, "folder") from None
                raise
            facts = os.fstat(descriptor)
        return JobFolder(self.path / name, opened=(descriptor, _identity(facts)))

    @contextlib.contextmanager
    def parent_of(self, file: str) -> Iterator[tuple[JobFolder, str]]:
        """Yield the folder of an image file, which is this one or a sub-folder, and the file's name in it."""
        subfolder, _, name = file.rpartition("/")
        if not subfolder:
            yield self, name
            return
        with self.subfolder(subfolder) as inner:
            yield inner, name

    # --- one job at a time

    def lock(self) -> None:
        """Keep other jobs out until `close`, or until the process ends for any reason.

        Raises:
            CogViewConfigurationError: Another job is writing to the folder.
            CogViewStorageError: The folder cannot be locked.
        """
        try:
            if self._descriptor is None or not _locked(self._descriptor):
                # Windows, and network file systems that lock only files that are open for writing.
                self._lock = self.open(LOCK, os.O_RDWR | os.O_CREAT)
                if not _locked(self._lock):
                    raise write_error(self.path, OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))
        except OSError as error:
            if isinstance(error, PermissionError) or error.errno in _BUSY:
                raise FolderInUseError(
                    f"Another job is writing to {printable(str(self.path), 120)}; nothing was sent.",
                    hint="Wait until it ends, or choose another folder.",
                ) from None
            raise write_error(self.path, error) from None

    def check(self) -> None:
        """Check that the path still leads to this folder, because images are saved by path.

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
                hint="Move it back, then run the job again.",
            )

    def close(self) -> None:
        """Release the lock and close the folder."""
        for descriptor in (self._lock, self._descriptor):
            if descriptor is not None:
                os.close(descriptor)
        self._lock = self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- files

    def names(self) -> set[str]:
        """Return all names in the folder, except those that a killed job may leave behind.

        Raises:
            CogViewStorageError: The folder cannot be read.
        """
        if self._identity is None:
            return set()
        try:
            names = os.listdir(self.path if self._descriptor is None else self._descriptor)
        except OSError as error:
            raise read_error(self.path, error) from None
        return {name for name in names if not _LEFTOVER.fullmatch(name)}

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Open a regular file. A symbolic link is not followed, and opening a named pipe does not block.

        A file that has a second name (a hard link) is not opened for writing.

        Returns:
            The file descriptor.

        Raises:
            CogViewConfigurationError: The name does not belong to a regular file.
            OSError: The system's error, such as `FileNotFoundError`.
        """
        if self._identity is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            if not hasattr(os, "O_NOFOLLOW") and stat.S_ISLNK(os.lstat(self.path / name).st_mode):
                raise self._foreign(name)
            descriptor = os.open(*self._at(name), flags | _FLAGS, 0o666, **self._relative())
        except OSError as error:
            # ELOOP: a symbolic link. ENXIO: a pipe without a reader, or a socket. EISDIR: a folder.
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
        """Return the first `limit` bytes of a regular file; None if there is no such file.

        Raises:
            CogViewConfigurationError: The name does not belong to a regular file.
            CogViewStorageError: The file cannot be read.
        """
        try:
            with os.fdopen(self.open(name), "rb") as file:
                return file.read(limit)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise read_error(self.path / name, error) from None

    def is_file(self, name: str, descriptor: int) -> bool:
        """Return whether a name still belongs to an open file."""
        try:
            return _identity(self._stat(name)) == _identity(os.fstat(descriptor))
        except OSError:
            return False

    def replace(self, name: str, content: Iterable[bytes]) -> None:
        """Replace a file atomically and durably, or create it.

        Raises:
            OSError: The system's error; the old file is unchanged.
        """
        part = self._new_file(content)
        try:
            os.replace(*self._at(part), *self._at(name), **self._relative("src_dir_fd", "dst_dir_fd"))
        except OSError:
            self.remove(part)
            raise
        self.sync()

    def add(self, names: Iterable[str], content: bytes) -> str:
        """Write a new file durably; it appears whole or not at all.

        Returns:
            Its name: the first of `names` that is not in use.

        Raises:
            OSError: The system's error; `FileExistsError` if all names are in use.
        """
        part = self._new_file([content])
        try:
            for name in names:
                with contextlib.suppress(FileExistsError):
                    self._name_file(part, name)
                    self.sync()
                    return name
        finally:
            self.remove(part)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def sync(self, name: str | None = None) -> None:
        """Make the names in the folder durable, and the bytes of one file, as far as the system allows it."""
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
            self.remove(name)
            raise
        return name

    def _name_file(self, part: str, name: str) -> None:
        try:
            os.link(*self._at(part), *self._at(name), **self._relative("src_dir_fd", "dst_dir_fd"))
        except FileExistsError:
            raise
        except OSError:  # the file system has no hard links; which error says so differs between file systems
            rename_new(*self._at(part), *self._at(name), folder=self._descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, if the system allows it."""
        with contextlib.suppress(OSError):
            os.unlink(*self._at(name), **self._relative())

    def _stat(self, name: str) -> os.stat_result:
        return os.stat(*self._at(name), follow_symlinks=False, **self._relative())

    def _at(self, name: str) -> tuple[Any]:
        return (self.path / name if self._descriptor is None else name,)

    def _relative(self, *names: str) -> dict[str, Any]:
        return {} if self._descriptor is None else dict.fromkeys(names or ("dir_fd",), self._descriptor)

    def _foreign(self, name: str, kind: str = "regular file") -> CogViewConfigurationError:
        links = "" if kind == "folder" else ", or has hard links"
        return CogViewConfigurationError(
            f"{printable(str(self.path / name), 120)} is not a {kind}{links}; nothing was written to it.",
            hint="Replace it with a copy of its own or move it away, or choose another folder.",
        )


# --- files of lines


class DamagedRecordError(ValueError):
    """A line is not a valid record of its file; the message says why.

    Attributes:
        incomplete: Whether the line may be the beginning of a longer JSON text.
    """

    def __init__(self, message: str, *, incomplete: bool = False) -> None:
        super().__init__(message)
        self.incomplete = incomplete


class StoredRecord(NamedTuple):
    """One line of a file of records."""

    start: int  # the byte at which the line begins
    size: int  # length of the line, in bytes
    values: dict[str, Any]  # the checked content of the line


class RecordFile:
    """A file of JSON lines that is only appended to. Each line is durable before `append` returns. Safe for threads.

    `parse` checks a line and returns its content; it raises `DamagedRecordError` for a line that does not belong to this file.
    `writable` creates a missing file and allows appending; otherwise a missing file is treated as an empty one.
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

    @property
    def end(self) -> int:
        """Number of bytes of all lines, once `records` has read them."""
        return self._end

    def records(self) -> Iterator[StoredRecord]:
        """Read and check all lines. An incomplete last line is ignored, and the next line is appended in its place.

        Yields:
            The records, in the order of the file.

        Raises:
            CogViewConfigurationError: A line is damaged; the message has its number.
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
                        # Only what a job writes is cut off: the beginning of a record, or the zeros that a power cut leaves.
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
        """Cut off the incomplete last line that `records` ignored, which a killed process leaves behind.

        Raises:
            CogViewStorageError: The file cannot be written.
        """
        try:
            os.ftruncate(self._descriptor, self._end)
            if self._end:
                os.lseek(self._descriptor, self._end - 1, os.SEEK_SET)
                if os.read(self._descriptor, 1) != b"\n":
                    self._write(b"\n")  # an editor removed the last line break
        except OSError as error:
            raise write_error(self.path, error) from None
        self._folder.sync()

    def read(self, start: int, size: int) -> dict[str, Any]:
        """Return the checked content of a line, whose position is from `records` or `append`.

        Raises:
            CogViewConfigurationError: Another program changed the file.
            CogViewStorageError: The file cannot be read.
        """
        try:
            return self._parse(self._bytes(start, size))
        except OSError as error:
            raise read_error(self.path, error) from None
        except DamagedRecordError as problem:
            raise CogViewConfigurationError(
                f"{printable(str(self.path), 120)} was changed by another program while the job ran ({problem}).",
                hint="Restore it, then run the job again.",
            ) from None

    def append(self, values: Mapping[str, Any]) -> tuple[int, int]:
        """Append a line durably.

        Returns:
            The byte at which the line begins, and its length in bytes.

        Raises:
            CogViewStorageError: The line cannot be written, or this is not the file that the job opened. The file is unchanged.
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

    def compact(self, positions: Sequence[tuple[int, int]]) -> None:
        """Rewrite the file with these lines only: the byte at which each begins, and its length. They get new positions.

        Raises:
            CogViewStorageError: The file cannot be written; it is unchanged.
        """
        try:
            self._check_end()
            self._folder.replace(self.path.name, itertools.starmap(self._bytes, positions))
            descriptor = self._folder.open(self.path.name, os.O_RDWR)
        except OSError as error:
            raise write_error(self.path, error) from None
        with self._lock:
            os.close(self._descriptor)
            self._descriptor, self._end = descriptor, sum(size for _, size in positions)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def check(self) -> None:
        """Check that the file's name still belongs to the open file.

        Raises:
            CogViewStorageError: The file was moved, replaced or deleted.
        """
        if self._descriptor < 0:
            raise CogViewStorageError(f"The job has ended; {self.path.name} is closed.", hint="")
        if not self._folder.is_file(self.path.name, self._descriptor):
            raise self._changed("moved, replaced or deleted")

    def _check_end(self) -> None:
        """Check that no other program wrote to the file."""
        self.check()
        if os.fstat(self._descriptor).st_size != self._end:
            raise self._changed("changed")

    def _changed(self, how: str) -> CogViewStorageError:
        return CogViewStorageError(
            f"{printable(str(self.path), 120)} was {how} by another program while the job ran.",
            hint="Restore it, then run the job again.",
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
    """Return one line as bytes. Unpaired surrogates, which UTF-8 cannot encode, become JSON escapes."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"


def damaged_record(path: Path, number: int, why: str) -> CogViewConfigurationError:
    """Return the error for a damaged line in one of the job's files."""
    return CogViewConfigurationError(
        f"Line {number} of {printable(str(path), 120)} is damaged ({why}); nothing was sent.",
        hint="Delete the line, or restore the file; an image that the line names is found again by its file name.",
    )


# --- what the system says


def read_error(path: Path, error: OSError) -> CogViewStorageError:
    """Return the error for a file of the job's folder that cannot be read."""
    return CogViewStorageError(
        f"{printable(str(path), 120)} cannot be read: {error.strerror or type(error).__name__}.",
        hint="Nothing was sent.",
    )


def write_error(path: Path, error: OSError) -> CogViewError:
    """Return the error for a file of the job's folder that cannot be written."""
    return CogViewStorageError(
        f"{printable(str(path), 120)} cannot be written: {error.strerror or type(error).__name__}.",
        hint="Check that the folder is writable and the disk has space left, then run the job again.",
    )


def _identity(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _locked(descriptor: int) -> bool:
    # Lock an open file or folder; False if this kind of file cannot be locked on this system.
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
