"""A shared limit for all processes of one user on one machine: a file for each account, under a lock of the operating system."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from langchain_cogview.errors import CogViewConfigurationError
from langchain_cogview.limits.allocation import LimitShare, LimitUsage, allocate

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BYTES: Final = 1 << 20
_LOCK_SECONDS: Final = 1.0
_NEVER: Final = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""What a folder that cannot be written or locked answers, such as one on a network file system."""
_PAUSE_SECONDS: Final = 0.0005


class MachineLimit:
    """A shared limit in files.

    Args:
        folder: Where the files are; None for a folder of this user that is emptied when the machine starts.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._checked: Path | None = None

    def __repr__(self) -> str:
        return "The shared limit of this machine"

    def exchange(self, account: str, usage: LimitUsage) -> LimitShare:
        """Enter one report; see `SharedLimit.exchange`.

        Returns:
            The share of the process.

        Raises:
            CogViewConfigurationError: The folder cannot be written or locked, or belongs to another user.
            FileNotFoundError: The folder was deleted. The next report makes it again.
            OSError: The file cannot be read or written now.
        """
        if self._checked is None:
            self._checked = _private_folder(self._folder or _default_folder())
        path = self._checked / f"{account}.json"
        try:
            with _locked_file(path) as file:
                # The file outlives the processes, so that an empty one is a new account.
                page, share = allocate(_read(file), usage, time.time(), settle=0)
                data = json.dumps(page, separators=(",", ":")).encode()
                os.lseek(file, 0, os.SEEK_SET)
                os.write(file, data)
                os.ftruncate(file, len(data))
        except FileNotFoundError:
            self._checked = None
            raise
        except OSError as error:
            if error.errno in _NEVER:
                raise _unusable(self._checked, error.strerror) from None
            raise
        return share


def _default_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or tempfile.gettempdir()) / "langchain-cogview"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime) / "langchain-cogview"
    return Path(tempfile.gettempdir()) / f"langchain-cogview-{os.getuid()}"


def _private_folder(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise _unusable(folder, error.strerror or str(error)) from None
    if not stat.S_ISDIR(found.st_mode):
        raise _unusable(folder, "it is not a folder")
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise _unusable(folder, "it belongs to another user, or others can write to it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unusable(folder, "it cannot be written")
    return folder


def _unusable(folder: Path, why: str | None) -> CogViewConfigurationError:
    return CogViewConfigurationError(
        f"shared_limit='machine' needs the folder {folder}: {why}. Nothing was sent.",
        hint="Set XDG_RUNTIME_DIR (on Windows LOCALAPPDATA) to a folder of this user, or share the limit by Redis.",
    )


@contextlib.contextmanager
def _locked_file(path: Path) -> Iterator[int]:
    # Opened anew each time: a lock belongs to the open file, which a child process would share.
    flags = (
        os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    )
    file = os.open(path, flags, 0o600)
    try:
        until = time.monotonic() + _LOCK_SECONDS
        while not _lock(file):
            if time.monotonic() > until:
                raise TimeoutError(f"another process has held the lock for {_LOCK_SECONDS:g} s")
            time.sleep(_PAUSE_SECONDS)
        yield file
    finally:
        os.close(file)  # which releases the lock


def _lock(file: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt  # noqa: PLC0415

            os.lseek(file, MAX_BYTES, os.SEEK_SET)  # beyond what is read, which Windows would refuse
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl  # noqa: PLC0415

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _read(file: int) -> object:
    os.lseek(file, 0, os.SEEK_SET)
    data = os.read(file, MAX_BYTES)
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
