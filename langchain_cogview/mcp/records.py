"""What the MCP server has paid for, in the records that jobs use: durable before each paid request, and read at the next start.

Beside the images there is a hidden folder with one folder for each server that runs at the same time. A server locks its own
as long as it runs, so that a folder without a lock belongs to a server that has ended, however it ended: the next one to
start takes it, finds the images in it, and collects its tasks. Budgets count what all folders have.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from langchain_cogview.errors import CogViewConfigurationError
from langchain_cogview.jobs.files import recovered_images, recovered_record
from langchain_cogview.jobs.folder import DamagedRecordError, FolderInUseError, JobFolder, RecordFile
from langchain_cogview.jobs.history import read_history
from langchain_cogview.jobs.manifest import ATTEMPTS, MANIFEST, attempts_line, manifest_line, now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from decimal import Decimal
    from pathlib import Path

    from langchain_cogview.jobs.files import RecoveredImage
    from langchain_cogview.jobs.history import History

SERVICE_FOLDER: Final = ".cogview-mcp"
SANDBOX_FOLDER: Final = ".cogview-mcp-sandbox"
MAX_SERVERS: Final = 100
"""The largest number of servers that use one folder at the same time."""
_ARGUMENTS: Final = ("model", "size", "quality")
_LOCK_SECONDS: Final = 30.0
_LOCK_POLL_SECONDS: Final = 0.02


class Request(NamedTuple):
    """A paid request: the id by which clients know the image, and what was asked for."""

    image_id: str
    """Id of the image, which is the key of its records."""
    arguments: dict[str, Any]
    """Prompt, model, size and quality."""


class ServerFolder:
    """The records of one server. Thread-safe.

    Args:
        folder: The folder, which is closed with this object.
        is_own: Whether this process has locked it, and writes to it.
    """

    def __init__(self, folder: JobFolder, *, is_own: bool) -> None:
        self.folder = folder
        self.is_own = is_own
        self.sent: dict[str, dict[str, Any]] = {}
        """What was asked for, by image id, of requests that have no end yet."""
        self._ended: dict[str, tuple[int, int]] = {}
        self._files = contextlib.ExitStack()
        self._lock = threading.RLock()
        self._sizes = (-1, -1)
        self._attempts: RecordFile
        self._manifest: RecordFile
        self.history: History
        self.refresh()

    def refresh(self) -> None:
        """Read the records again if another server has written some.

        Raises:
            CogViewConfigurationError: A line is damaged.
            CogViewStorageError: A file cannot be read.
        """
        with self._lock:
            sizes = tuple(_size(self.folder.path / name) for name in (ATTEMPTS, MANIFEST))
            if self._sizes == sizes or (self.is_own and self._sizes != (-1, -1)):
                return
            self._files.close()
            opened = ((ATTEMPTS, _attempts_line), (MANIFEST, _manifest_line))
            self._attempts, self._manifest = (
                self._files.enter_context(RecordFile(self.folder, name, parse, writable=self.is_own))
                for name, parse in opened
            )
            self.history = read_history(self._attempts, self._manifest)
            if self.is_own:
                self._attempts.ready()
                self._manifest.ready()
            self._ended.clear()
            for record in self._manifest.records():
                self._remember(record.values, (record.start, record.size))
            open_keys = self.history.open
            self.sent = {}
            for record in self._attempts.records():
                values = record.values
                if values["key"] in open_keys and "prompt" in values:
                    self.sent[values["key"]] = values
            self._sizes = sizes  # type: ignore[assignment]

    def _remember(self, values: Mapping[str, Any], position: tuple[int, int]) -> None:
        self._ended[values["key"]] = position
        for image in values["images"]:
            if image.get("request_id"):
                self._ended[image["request_id"][:8]] = position

    def ended(self, image_id: str) -> dict[str, Any] | None:
        """Find the record of an image that was made, or was not.

        Args:
            image_id: Its id.

        Returns:
            The record of the manifest; None if there is none.
        """
        with self._lock:
            position = self._ended.get(image_id)
            return None if position is None else self._manifest.read(*position)

    def open_request(self, image_id: str) -> dict[str, Any] | None:
        """Find a request without an end.

        Args:
            image_id: Id of the image, or the beginning of the request id.

        Returns:
            Its record, with the `task_id` if it became a task; None if there is none.
        """
        with self._lock:
            for key, values in self.sent.items():
                if image_id in {key, values["request_id"][:8]}:
                    attempt = self.history.open.get(key, {}).get(values["request_id"])
                    return None if attempt is None else {**values, "model": attempt.model, "task_id": attempt.task_id}
        return None

    def latest(self, limit: int) -> list[dict[str, Any]]:
        """Read the newest records.

        Args:
            limit: The largest number.

        Returns:
            Records of the manifest and of requests without an end.
        """
        with self._lock:
            positions = sorted(set(self._ended.values()))[-limit:]
            return [self._manifest.read(*position) for position in positions] + list(self.sent.values())[-limit:]

    def spent(self) -> Counter[str]:
        """Return how many images were paid for, or may have been, by model."""
        with self._lock:
            spent: Counter[str] = Counter()
            for outcome, times in self.history.finished.outcomes().items():
                for model in outcome.spent:
                    spent[model] += times
            for attempt in self.history.attempts():
                spent[attempt.model] += attempt.posts
            return spent

    # --- writing

    def note_sent(self, request: Request, request_id: str, model: str) -> None:
        """Record that a paid request is about to be sent.

        Args:
            request: The request.
            request_id: Id that this client generated.
            model: The model that is asked.
        """
        facts = {name: request.arguments.get(name) for name in ("size", "quality")}
        values = {"key": request.image_id, "line": len(self._ended) + len(self.sent) + 1, "request_id": request_id}
        values |= {"model": model, "prompt": request.arguments["prompt"], **facts, "at": now()}
        with self._lock:
            self._attempts.append(values)
            self.history.note(values)
            self.sent[request.image_id] = values

    def note(self, values: dict[str, Any]) -> None:
        """Record what became of a request: a task, or that it was not sent.

        Args:
            values: A line of the attempts.
        """
        with self._lock:
            self._attempts.append(values)
            self.history.note(values)
            if values["key"] not in self.history.open:
                self.sent.pop(values["key"], None)

    def note_ended(self, values: dict[str, Any]) -> None:
        """Record the end of an image.

        Args:
            values: A record of the manifest.
        """
        with self._lock:
            position = self._manifest.append(values)
            self.history.add_line(*position, values)
            self._remember(values, position)
            self.sent.pop(values["key"], None)

    def close(self) -> None:
        """Release the lock, and close the files."""
        with self._lock:
            self._files.close()
            self.folder.close()


# A job does not read what the server adds to its records, so these are checked here. Another program may have written them.


def _attempts_line(raw: bytes) -> dict[str, Any]:
    values = attempts_line(raw)
    _check_types(values, dict.fromkeys((*_ARGUMENTS, "at"), str))
    return values


def _manifest_line(raw: bytes) -> dict[str, Any]:
    values = manifest_line(raw)
    _check_types(values["arguments"], dict.fromkeys(_ARGUMENTS, str))
    _check_types(values, {"artifact": dict, "is_answered": bool})
    images = (values.get("artifact") or {}).get("images", [])
    if not isinstance(images, list):
        raise DamagedRecordError("images: not a list")
    for image in images:
        if not isinstance(image, dict) or not image.get("id"):
            raise DamagedRecordError("images: not an image with an id")
        _check_types(image, {"id": str, "path": str, "mime_type": str, "size_bytes": int})
    return values


def _check_types(values: Mapping[str, Any], types: Mapping[str, type]) -> None:
    for name, kind in types.items():
        if values.get(name) is not None and not isinstance(values[name], kind):
            raise DamagedRecordError(f"{name}: of another type than {kind.__name__}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class ServerRecords:
    """The records of all servers that use one folder of images. Thread-safe. Every method blocks.

    Args:
        images: The folder of the images, which is made when missing.
        sandbox: Whether the sandbox makes the images, which have records of their own.

    Raises:
        CogViewConfigurationError: Too many servers use the folder, or its records are damaged.
        CogViewStorageError: The folder cannot be written.
    """

    def __init__(self, images: Path, *, sandbox: bool) -> None:
        self.images = images
        self.path = images / (SANDBOX_FOLDER if sandbox else SERVICE_FOLDER)
        self.locked: list[ServerFolder] = []
        """The folders that this process has locked. New requests are recorded in the first."""
        self._others: dict[str, ServerFolder] = {}
        self._lock = threading.Lock()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        with JobFolder(self.path, create=True):
            self.adopt()
        number = 0
        while not self.locked:
            number += 1
            if number > MAX_SERVERS:
                raise CogViewConfigurationError(
                    f"{MAX_SERVERS} servers use this folder already; nothing was sent.",
                    hint="Choose another --output-dir.",
                )
            self._adopt(self.path / f"server-{number:03}")

    def adopt(self) -> list[ServerFolder]:
        """Lock the folders of servers that have ended.

        Returns:
            Those that were not locked before.
        """
        known = {item.folder.path for item in self.locked}
        paths = sorted(path for path in self.path.glob("server-[0-9][0-9][0-9]") if path not in known)
        return [adopted for path in paths if (adopted := self._adopt(path)) is not None]

    def _adopt(self, path: Path) -> ServerFolder | None:
        folder = JobFolder(path, create=True)
        try:
            folder.lock()
            adopted = ServerFolder(folder, is_own=True)
        except FolderInUseError:
            folder.close()
            return None
        except BaseException:
            folder.close()
            raise
        self.locked.append(adopted)
        self._others.pop(path.name, None)
        return adopted

    def others(self) -> list[ServerFolder]:
        """Read the records of the other servers that run.

        Returns:
            Their folders, which this process only reads.
        """
        locked = {item.folder.path.name for item in self.locked}
        for path in sorted(self.path.glob("server-[0-9][0-9][0-9]")):
            if path.name not in locked and path.name not in self._others:
                self._others[path.name] = ServerFolder(JobFolder(path), is_own=False)
        for item in self._others.values():
            item.refresh()
        return list(self._others.values())

    def all(self) -> list[ServerFolder]:
        """Return the folders of this server and of the others, as they are now."""
        with self._lock:
            return [*self.locked, *self.others()]

    def spent(self) -> Counter[str]:
        """Return how many images all servers have paid for, or may have, by model."""
        return sum((item.spent() for item in self.all()), Counter())

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other servers from recording a paid request.

        Yields:
            Nothing.

        Raises:
            FolderInUseError: Another server holds the lock for more than half a minute.
        """
        deadline = time.monotonic() + _LOCK_SECONDS
        with self._lock, JobFolder(self.path) as folder:
            while True:
                try:
                    folder.lock()
                    break
                except FolderInUseError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(_LOCK_POLL_SECONDS)
            yield

    def claim(self, request: Request, request_id: str, model: str, check: Callable[[Counter[str]], None]) -> None:
        """Record a paid request, unless the limits do not cover it. No two servers do this at the same time.

        Args:
            request: The request.
            request_id: Id that this client generated.
            model: The model that is asked.
            check: Called with what all servers have spent; an exception keeps the request from being sent.
        """
        with self.exclusive():
            folders = [*self.locked, *self.others()]
            check(sum((item.spent() for item in folders), Counter()))
            folders[0].note_sent(request, request_id, model)

    def recover(
        self, folder: ServerFolder, price: Callable[[str], Decimal | None], *, sandbox: bool
    ) -> Iterator[tuple[dict[str, Any], RecoveredImage, dict[str, Any]]]:
        """Find complete images of requests that a killed server did not record.

        Args:
            folder: A folder of a server that has ended.
            price: Returns the list price of an image of a model.
            sandbox: Whether the sandbox made the images.

        Yields:
            The record of the request, the image, and the record of the image.
        """
        with JobFolder(self.images) as images:
            for found in recovered_images(images, folder.history).values():
                sent = folder.sent.get(found.attempt.key)
                if sent is not None:
                    yield sent, found, recovered_record(found, price(found.attempt.model), sandbox=sandbox)

    def close(self) -> None:
        """Release all locks."""
        for item in [*self.locked, *self._others.values()]:
            item.close()
