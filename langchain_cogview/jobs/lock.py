"""Who writes to a job's folder: one job at a time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Self

from langchain_cogview.errors import CogViewConfigurationError, printable
from langchain_cogview.jobs.manifest import unwritable

if TYPE_CHECKING:
    from pathlib import Path

LOCK: Final = ".lock"


class FolderLock:
    """A folder, made when missing, that one job writes to; the system lets go when the process ends, however it ends.

    Raises:
        CogViewConfigurationError: Another job holds it.
        CogViewStorageError: It cannot be made or locked.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise unwritable(folder, error) from None
        try:
            _lock(self._descriptor)
        except OSError as error:
            self.close()
            if isinstance(error, BlockingIOError | PermissionError):
                raise CogViewConfigurationError(
                    f"Another job is writing to {printable(str(folder), 120)}; nothing was sent.",
                    hint="Wait until it has ended, or choose another folder.",
                ) from None
            raise unwritable(folder / LOCK, error) from None

    def close(self) -> None:
        """Let the next job in."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _lock(descriptor: int) -> None:
    try:
        import fcntl  # noqa: PLC0415
    except ImportError:  # Windows
        import msvcrt  # noqa: PLC0415

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
