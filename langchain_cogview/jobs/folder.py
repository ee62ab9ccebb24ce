"""A job's folder: locked by its descriptor, and written only through files that a job made.

Every file is opened relative to the folder's descriptor where the system can do that, and never through a symbolic link. The
folder stays the same one when somebody renames it, and a job notices before it pays.
"""

# ruff: noqa: PTH105, PTH116, PTH208  pathlib knows no descriptors
from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from typing import TYPE_CHECKING, Any, Final, Self

from langchain_cogview.errors import CogViewConfigurationError, CogViewError, CogViewStorageError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

LOCK: Final = ".lock"
_LEFTOVER: Final = re.compile(r"\.lock|\.(?:job\.json|manifest\.jsonl)\.part|\.cogview-[0-9a-f]+\.part|\.DS_Store")
_HAS_DESCRIPTORS: Final = os.open in os.supports_dir_fd and hasattr(os, "O_DIRECTORY")
_FLAGS: Final = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
_BUSY: Final = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


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
                raise unwritable(path, error) from None
        except OSError as error:
            raise unwritable(path, error) from None

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
                    raise unwritable(self.path, OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))
        except OSError as error:
            if isinstance(error, PermissionError) or error.errno in _BUSY:
                raise CogViewConfigurationError(
                    f"Another job is writing to {printable(str(self.path), 120)}; nothing was sent.",
                    hint="Wait until it has ended, or choose another folder.",
                ) from None
            raise unwritable(self.path, error) from None

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
            raise unreadable(self.path, error) from None
        return {name for name in names if not _LEFTOVER.fullmatch(name)}

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Open a regular file; a symbolic link is not followed, and a pipe is not waited for.

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
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
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
            raise unreadable(self.path / name, error) from None

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
                    self._name_file(part, name, content)
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

    def _name_file(self, part: str, name: str, content: bytes) -> None:
        try:
            os.link(*self._at(part), *self._at(name), **self._relative("src_dir_fd", "dst_dir_fd"))
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with os.fdopen(self.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                file.write(content)

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
            f"{printable(str(self.path / name), 120)} is no regular file, so no job made it; nothing was written to it.",
            hint="Move it away, or choose another folder.",
        )


def spare_descriptors() -> int | None:
    """How many further files this process may open now; None where that is not known, or there is no limit."""
    try:
        import resource  # noqa: PLC0415  not on Windows

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        taken = len(os.listdir("/dev/fd"))
    except (ImportError, OSError) as error:
        return 0 if getattr(error, "errno", None) in {errno.EMFILE, errno.ENFILE} else None
    return None if limit == resource.RLIM_INFINITY else max(0, limit - taken)


def unreadable(path: Path, error: OSError) -> CogViewStorageError:
    """That a file of the job's folder cannot be read."""
    return CogViewStorageError(
        f"{printable(str(path), 120)} cannot be read: {error.strerror or type(error).__name__}.",
        hint="Nothing was sent.",
    )


def unwritable(path: Path, error: OSError) -> CogViewError:
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
