"""Save images in the files of an agent: a folder in a backend of deepagents, which the agent's own tools read.

Any object with the backend's methods will do; deepagents is not imported. A `StateBackend` finds the state of its agent in the
context of the running graph, which is why its methods are called in a copy of the caller's context.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import core_schema

from langchain_cogview.concurrency import Deadline, raised_by_signal
from langchain_cogview.errors import CogViewConfigurationError, CogViewStorageError, printable
from langchain_cogview.images.folders import TimePassedError, awaited, started, waited
from langchain_cogview.images.formats import MAX_IMAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from langchain_cogview.images.folders import Backend

SCHEME: Final = "backend://"
"""Beginning of the URI of an image in a backend; a virtual path follows."""
DEFAULT_PATH: Final = "/images"
READ_SECONDS: Final = 60.0
_SEGMENT: Final = re.compile(r"(?!\.\.?$)[0-9A-Za-z._ -]{1,128}")
_NAME: Final = re.compile(r"(?!\.)[0-9A-Za-z._-]{1,255}")
_KNOWN_ERRORS: Final = {
    "file_not_found": "the file does not exist",
    "permission_denied": "access was denied",
    "is_directory": "a folder has this name",
    "invalid_path": "the backend does not accept the path",
}


class BackendFolder:
    """A folder in a backend of deepagents, for `output_dir=` and `storage=`.

    Example:
        >>> from deepagents.backends import FilesystemBackend    # doctest: +SKIP
        >>> tool = CogViewImageTool(output_dir=BackendFolder(FilesystemBackend("work"), "/pictures"))    # doctest: +SKIP

    Args:
        backend: The backend, the same that the agent has.
        path: The virtual path of the folder. A `CompositeBackend` decides by it which of its backends gets the image.

    Raises:
        CogViewConfigurationError: The backend has no `upload_files`, or the path is not an absolute virtual path.
    """

    def __init__(self, backend: Backend, path: str = DEFAULT_PATH) -> None:
        if isinstance(backend, type) or not callable(getattr(backend, "upload_files", None)):
            raise CogViewConfigurationError(
                f"This is no backend of deepagents: a {type(backend).__name__} without upload_files.",
                hint="Pass the backend itself, such as StateBackend(); deepagents 0.7 has no backend factories any more.",
            )
        segments = path.rstrip("/").split("/") if isinstance(path, str) else ["-"]
        if segments[0] or not all(_SEGMENT.fullmatch(segment) for segment in segments[1:]):
            raise CogViewConfigurationError(
                f"The folder of a backend cannot be {printable(str(path), 80)!r}.",
                hint="Pass an absolute virtual path of letters, digits, '_', '-', '.' and blanks, such as '/images'.",
            )
        self.backend = backend
        """The backend."""
        self.path = "/".join(segments)
        """The virtual path of the folder, without a slash at its end."""

    @property
    def url(self) -> str:
        """The URI of the folder, such as `backend:///images`."""
        return f"{SCHEME}{self.path}"

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        # The backend's own repr may hold secrets.
        return f"BackendFolder({type(self.backend).__name__}, {self.path!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BackendFolder):
            return NotImplemented
        return self.backend is other.backend and self.path == other.path

    def __hash__(self) -> int:
        return hash((id(self.backend), self.path))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> BackendFolder:
        return self  # the backend is used as it is, in a copy too

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Validate and dump a field of this type: an instance is accepted, and dumped as its URI.

        Returns:
            The schema.
        """
        text = core_schema.to_string_ser_schema(when_used="always")
        return core_schema.is_instance_schema(cls, serialization=text)

    def upload(self, names: Iterable[str], content: bytes, deadline: Deadline) -> str:
        """Save a file. A backend cannot refuse a name that is in use: the hash in the name makes it the same image.

        Args:
            names: The names that may be tried; the first is used.
            content: The bytes.
            deadline: For everything.

        Returns:
            The URI of the file.

        Raises:
            OSError: The file could not be saved in time; `strerror` says why, without the backend's own words.
        """
        path = self._path_of(names)
        with _upload_errors():
            call = partial(self.backend.upload_files, [(path, content)])
            _check_response(waited(started(lambda _: call(), deadline), deadline))
        return f"{SCHEME}{path}"

    async def aupload(self, names: Iterable[str], content: bytes, deadline: Deadline) -> str:
        """Async version of `upload`.

        Returns:
            The URI of the file.
        """
        path = self._path_of(names)
        with _upload_errors():
            _check_response(await self._called("upload_files", [(path, content)], deadline))
        return f"{SCHEME}{path}"

    def holds(self, uri: str) -> bool:
        """Return whether a URI, which anybody may have written, names a file directly in this folder."""
        root = f"{self.url}/"
        return uri.startswith(root) and _NAME.fullmatch(uri[len(root) :]) is not None

    def read(self, uri: str, seconds: float | None = READ_SECONDS) -> bytes:
        """Read a file of at most 32 MiB.

        Args:
            uri: The URI of the file; whether the folder holds it is not checked.
            seconds: The time limit in seconds; None: no limit.

        Returns:
            The bytes of the file.

        Raises:
            CogViewStorageError: The file could not be read in time.
        """
        deadline = Deadline(seconds)
        with _read_errors():
            call = partial(self.backend.download_files, [uri.removeprefix(SCHEME)])
            return _content(waited(started(lambda _: call(), deadline), deadline))

    async def aread(self, uri: str, seconds: float | None = READ_SECONDS) -> bytes:
        """Async version of `read`.

        Returns:
            The bytes of the file.
        """
        with _read_errors():
            return _content(await self._called("download_files", [uri.removeprefix(SCHEME)], Deadline(seconds)))

    def bucket(self) -> BackendFolder:
        """Return the folder itself: files elsewhere in the backend are the agent's own."""
        return self

    def without_options(self) -> None:
        """Return None: a backend stays in its process."""

    def _path_of(self, names: Iterable[str]) -> str:
        return f"{self.path}/{next(iter(names))}"

    async def _called(self, method: str, argument: list[Any], deadline: Deadline) -> Any:
        native = getattr(self.backend, f"a{method}", None)
        if native is None:
            blocking = getattr(self.backend, method)
            return await awaited(started(lambda _: blocking(argument), deadline), deadline)
        if deadline.passed:
            raise TimePassedError
        try:
            return await asyncio.wait_for(native(argument), deadline.remaining())
        except TimeoutError:
            if deadline.passed:
                raise TimePassedError from None
            raise


def backend_folder(value: Any) -> BackendFolder:
    """Take what the user passed as a backend.

    Args:
        value: A backend, or a folder in one.

    Returns:
        The folder.

    Raises:
        CogViewConfigurationError: It is neither.
    """
    return value if isinstance(value, BackendFolder) else BackendFolder(value)


def virtual_path(uri: str) -> str:
    """Return the path of a URI for a chat model: that in the backend, if the URI is of one."""
    return uri.removeprefix(SCHEME)


# --- responses and errors, without the words of the backend, which may hold keys


class _RefusedError(Exception):
    """The backend said that it failed; the text may be shown."""


def _check_response(responses: Any) -> Any:
    if not isinstance(responses, list | tuple) or len(responses) != 1:
        raise _RefusedError("the backend did not say what became of the file")
    error = getattr(responses[0], "error", None)
    if error is not None:
        raise _RefusedError(_KNOWN_ERRORS.get(str(error), "the backend reported an error"))
    return responses[0]


def _content(responses: Any) -> bytes:
    content = getattr(_check_response(responses), "content", None)
    if not isinstance(content, bytes):
        raise _RefusedError("the backend gave no bytes")
    if len(content) > MAX_IMAGE_BYTES:
        raise _RefusedError(f"it is larger than {MAX_IMAGE_BYTES // 2**20} MiB")
    return content


@contextlib.contextmanager
def _upload_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # backends raise what they like
        if raised_by_signal(error):
            raise
        raise OSError(getattr(error, "errno", None) or errno.EIO, _reason(error)) from None


@contextlib.contextmanager
def _read_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # backends raise what they like
        if raised_by_signal(error):
            raise
        raise CogViewStorageError(
            f"The image could not be read from the backend: {_reason(error)}.",
            hint="Read it where the agent's graph runs, or open the URL while the link is valid.",
        ) from None


def _reason(error: Exception) -> str:
    if isinstance(error, _RefusedError):
        return str(error)
    known = (
        (TimePassedError, "the time limit passed"),
        (NotImplementedError, "the backend cannot do this"),
        (PermissionError, "access was denied"),
        (TimeoutError, "the backend did not answer in time"),
        (ConnectionError, "the backend could not be reached"),
        (RuntimeError, "the backend cannot be used here (StateBackend needs a running graph, StoreBackend a store)"),
    )
    for kind, words in known:
        if isinstance(error, kind):
            return words
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
