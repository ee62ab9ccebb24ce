"""What every folder has that is not one of this machine, and waiting for stores that block.

The package saves an image either in a `Path` on this machine or through a `Folder`, and knows nothing else of a store.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from langchain_cogview.concurrency import Deadline

T = TypeVar("T")


class Folder(Protocol):
    """A folder in which images are saved and read; `RemoteFolder` describes the methods."""

    @property
    def url(self) -> str:
        """The URI of the folder."""
        ...

    def upload(self, names: Iterable[str], content: bytes, deadline: Deadline) -> str:
        """Save a file and return its URI; an OSError says why it could not be saved."""
        ...

    async def aupload(self, names: Iterable[str], content: bytes, deadline: Deadline) -> str:
        """Async version of `upload`."""
        ...

    def holds(self, uri: str) -> bool:
        """Return whether a URI, which anybody may have written, names a file in this folder."""
        ...

    def read(self, uri: str, seconds: float | None = ...) -> bytes:
        """Read a file that the folder holds; a `CogViewStorageError` says why it could not be read."""
        ...

    async def aread(self, uri: str, seconds: float | None = ...) -> bytes:
        """Async version of `read`."""
        ...

    def bucket(self) -> Folder:
        """Return the folder in which the URIs of the generator's own images are read."""
        ...

    def without_options(self) -> Folder | None:
        """Return a copy that can be pickled; None if there is none."""
        ...


class Backend(Protocol):
    """A backend of deepagents, as far as it is used here. `aupload_files` and `adownload_files` are used where it has them."""

    def upload_files(self, files: list[tuple[str, bytes]]) -> list[Any]:
        """Write files under absolute virtual paths; each response has an `error`, which is None on success."""
        ...

    def download_files(self, paths: list[str]) -> list[Any]:
        """Read files; each response has `content`, or an `error`."""
        ...


# --- waiting for stores that block

Answer = concurrent.futures.Future[T | BaseException]
"""The outcome of the work. An exception is a value here, so that it is not logged when nobody waits for it any more."""


class TimePassedError(Exception):
    """The time limit has passed."""


def started(work: Callable[[Answer[T]], T], deadline: Deadline) -> Answer[T]:
    """Start work that blocks in a daemon thread, in a copy of the caller's context.

    Args:
        work: The work; it is passed the answer, which is cancelled when the caller has gone.
        deadline: The time limit of the caller.

    Returns:
        The answer, for `waited` or `awaited`.

    Raises:
        TimePassedError: The time limit has passed already.
    """
    if deadline.passed:
        raise TimePassedError
    answer: Answer[T] = concurrent.futures.Future()

    def run() -> None:
        outcome: T | BaseException
        try:
            outcome = work(answer)
        except BaseException as error:  # noqa: BLE001  raised by the waiting caller
            outcome = error
        if answer.set_running_or_notify_cancel():
            answer.set_result(outcome)

    # A daemon thread: a store that never answers holds up neither a pool nor the end of the process.
    threading.Thread(target=copy_context().run, args=(run,), daemon=True, name="cogview-storage").start()
    return answer


def waited(answer: Answer[T], deadline: Deadline) -> T:
    """Wait for work until the deadline.

    Returns:
        What the work returned; its exceptions are raised, and `TimePassedError` if it has not ended.
    """
    try:
        concurrent.futures.wait([answer], timeout=deadline.remaining())
    finally:
        answer.cancel()  # has no effect on a finished one
    return _settled(answer)


async def awaited(answer: Answer[T], deadline: Deadline) -> T:
    """Async version of `waited`.

    Returns:
        As `waited`.
    """
    try:
        await asyncio.wait([asyncio.wrap_future(answer)], timeout=deadline.remaining())
    finally:
        answer.cancel()
    return _settled(answer)


def _settled(answer: Answer[T]) -> T:
    if answer.cancelled():
        raise TimePassedError
    outcome = answer.result()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
