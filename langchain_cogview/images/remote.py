"""Where pictures stay on another machine: a folder behind any URL that fsspec knows, such as `s3://bucket/pictures`.

A picture goes there whole in one request, under a name that nothing has yet. The file systems are fsspec's. Sync and async
callers use them in the same way: by their blocking methods, in a daemon thread, for as long as the deadline allows.
Credentials come from `options` or from where the file system looks for them (environment, profile, role).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import inspect
import os
import re
import threading
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from langchain_cogview.concurrency import Deadline
from langchain_cogview.errors import CogViewConfigurationError, CogViewStorageError, printable
from langchain_cogview.images.formats import MAX_IMAGE_BYTES
from langchain_cogview.images.store import checked_image, local_path, read_regular_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

T = TypeVar("T")

READ_SECONDS: Final = 60.0
_REMOVE_SECONDS: Final = 10.0

_INSTALL: Final = 'Install it with: pip install "langchain-cogview[storage]"'
_S3: Final = frozenset({"s3", "s3a"})
_LOCAL: Final = frozenset({"file", "local"})
_NO_FOLDERS: Final = frozenset({"http", "https", "data"})
_OWN_OPTIONS: Final = frozenset({"asynchronous", "loop"})
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)  # one letter alone is a Windows drive
_NO_URL_NOR_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[/\\](?!/)|[^/\\]{2,}://")  # Path("s3://b") is "s3:/b"
_PASSWORD = re.compile(r"(?!arn:)[^/@]*:(?!\d+/)[^@]*@")  # a secret may hold slashes; a port holds digits alone
_SEGMENTS: Final = re.compile(r"[/\\]")
_CLAIMED: Final[dict[str, object]] = {}


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder that fsspec reaches; `remote_folder` makes one of a URL and checks it.

    Attributes:
        url: Such as `s3://bucket/pictures`; without credentials.
        options: fsspec's storage options for it. They may hold secrets: they are in no repr and in no error.
    """

    url: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)

    def __str__(self) -> str:
        return self.url

    def upload(self, names: Iterable[str], content: bytes, deadline: Deadline) -> str:
        """Put a file there under the first of the names that is free, whole or not at all, and tell its URI.

        Raises:
            OSError: When it could not be done in time; `strerror` says why in words of ours.
        """
        with _in_our_words("uploaded"):
            return _waited(self._uploading(names, content, deadline), deadline)

    async def aupload(self, names: Iterable[str], content: bytes, deadline: Deadline) -> str:
        """Async version of `upload`; what a cancelled one uploads is removed."""
        with _in_our_words("uploaded"):
            return await _awaited(self._uploading(names, content, deadline), deadline)

    def _uploading(self, names: Iterable[str], content: bytes, deadline: Deadline) -> _Answer[str]:
        root = self.url if self.url.endswith("/") else f"{self.url}/"
        uris = (f"{root}{name}" for name in names)
        return _started(lambda answer: _put(_Store(self, deadline), answer, uris, content), deadline)


def remote_folder(url: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> RemoteFolder | Path:
    """The folder that a URL names, checked without asking the network.

    Args:
        url: A URL of a protocol that fsspec knows. A path, or a `file://` URL, is a folder of this machine.
        options: fsspec's storage options.

    Raises:
        CogViewConfigurationError: When the URL cannot name a folder, holds credentials, or needs a package that is missing.
    """
    text = os.fspath(url)
    parts = _URL.fullmatch(text)
    if parts is None or parts[1].lower() in _LOCAL:
        if options:
            raise _wrong("storage_options were given for a folder of this machine", "Leave them out.")
        return _local_folder(text, is_url=parts is not None)
    protocol, rest = parts[1].lower(), parts[2].rstrip("/")
    _check_rest(protocol, rest)
    _check_protocol(protocol)
    if own := _OWN_OPTIONS.intersection(options or {}):
        raise _wrong(f"storage_options hold {min(own)!r}, which is set here", "Leave it out.")
    return RemoteFolder(f"{protocol}://{rest}", dict(options or {}))


def read_uri(uri: str, options: Mapping[str, Any] | None = None, *, seconds: float | None = READ_SECONDS) -> bytes:
    """The bytes of a picture that was saved elsewhere, at most 32 MiB.

    Args:
        uri: As the result or the artifact holds it.
        options: fsspec's storage options.
        seconds: For everything; None: no limit of ours.

    Raises:
        CogViewStorageError: When it could not be read.
    """
    deadline = Deadline(seconds)
    with _unreadable():
        return _waited(_reading(uri, options, deadline), deadline)


async def aread_uri(
    uri: str, options: Mapping[str, Any] | None = None, *, seconds: float | None = READ_SECONDS
) -> bytes:
    """Async version of `read_uri`."""
    deadline = Deadline(seconds)
    with _unreadable():
        return await _awaited(_reading(uri, options, deadline), deadline)


# --- what may be read


@dataclass(frozen=True, slots=True)
class ImageAccess:
    """What may be opened to read an image that is not in memory.

    Attributes:
        base_url: The service's base URL; decides which links are the service's own. None: not known.
        allowed_hosts: The only hosts that a link is fetched from; None: any public one.
        storage: The remote folders from which a URI is read, each with its options; none: no URI is read.
        within: The only folder from which files are read; None: any folder.
    """

    base_url: str | None = None
    allowed_hosts: tuple[str, ...] | None = None
    storage: tuple[RemoteFolder, ...] = ()
    within: Path | None = None

    @classmethod
    def of_generator(
        cls, base_url: str | None, allowed_hosts: tuple[str, ...] | None, folder: Path | RemoteFolder | None
    ) -> ImageAccess:
        """The access of a generator's images: URIs in the bucket of its own remote folder, with that folder's options."""
        storage = (_bucket(folder),) if isinstance(folder, RemoteFolder) else ()
        return cls(base_url, allowed_hosts, storage)

    def without_options(self) -> ImageAccess:
        """The same without storage options, which may hold secrets."""
        return replace(self, storage=tuple(RemoteFolder(folder.url) for folder in self.storage))

    def read_file(self, path: Path, *, size_bytes: int | None = None, sha256: str | None = None) -> bytes:
        """The bytes of a saved image.

        Args:
            path: A regular file; a symbolic link at its end is not followed.
            size_bytes: Their number, where it is recorded.
            sha256: Their hash, where it is recorded.

        Raises:
            CogViewStorageError: When it cannot be read, lies outside of `within`, or is not the image that is recorded.
        """
        try:
            content = read_regular_file(path, MAX_IMAGE_BYTES, within=self.within)
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise CogViewStorageError(
                f"The saved file {printable(path.name, 120)} cannot be read: {printable(reason, 80)}.",
                hint="If it was moved, open it where it is now; while the link lives, the URL still gives it.",
            ) from None
        return checked_image(
            content, f"The saved file {printable(path.name, 120)}", size_bytes=size_bytes, sha256=sha256
        )

    def read_uri(
        self,
        uri: str,
        *,
        size_bytes: int | None = None,
        sha256: str | None = None,
        seconds: float | None = READ_SECONDS,
    ) -> bytes:
        """The bytes of an image that was saved elsewhere.

        Args:
            uri: As the image holds it.
            size_bytes: Their number, where it is recorded.
            sha256: Their hash, where it is recorded.
            seconds: The time limit; None: no limit of ours.

        Raises:
            CogViewStorageError: When it lies outside of `storage`, cannot be read, or is not the image that is recorded.
        """
        content = read_uri(uri, self._options(uri), seconds=seconds)
        return checked_image(content, "The saved image", size_bytes=size_bytes, sha256=sha256)

    async def aread_uri(
        self,
        uri: str,
        *,
        size_bytes: int | None = None,
        sha256: str | None = None,
        seconds: float | None = READ_SECONDS,
    ) -> bytes:
        """Async version of `read_uri`."""
        content = await aread_uri(uri, self._options(uri), seconds=seconds)
        return checked_image(content, "The saved image", size_bytes=size_bytes, sha256=sha256)

    def covers(self, uri: str) -> bool:
        """Whether a URI lies in one of the remote folders."""
        return any(_holds(folder, uri) for folder in self.storage)

    def _options(self, uri: str) -> Mapping[str, Any]:
        for folder in self.storage:
            if _holds(folder, uri):
                return folder.options
        raise CogViewStorageError(
            f"The image at {printable(uri, 120)} is not read: its URI is in none of the allowed folders.",
            hint='Name the folder where the image is loaded, such as images_from_messages(..., storage="s3://bucket").',
        )


ANY_FILE: Final = ImageAccess()
"""Any file of this machine and any public link, but no URI."""


def image_access(
    *,
    within: str | os.PathLike[str] | None = None,
    storage: str | Iterable[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    allowed_image_hosts: str | Iterable[str] | None = None,
) -> ImageAccess:
    """What the reading side allows for images that come back from storage.

    Args:
        within: The only folder from which files are read.
        storage: URLs of the remote folders from which URIs are read, such as `s3://bucket/images`.
        storage_options: fsspec's options for these folders; they go nowhere else.
        allowed_image_hosts: The only hosts from which links are fetched, as on `CogViewImageGenerator`.

    Raises:
        CogViewConfigurationError: When a URL is not one of a remote folder, options are given without one, or `within` begins
            with `~` and there is no such home folder.
    """
    urls = [storage] if isinstance(storage, str) else list(storage or ())
    if storage_options and not urls:
        raise CogViewConfigurationError(
            "storage_options were given without storage.", hint='Pass storage="s3://bucket", which they are for.'
        )
    folders = [remote_folder(url, storage_options) for url in urls if _is_remote(url)]
    hosts = (allowed_image_hosts,) if isinstance(allowed_image_hosts, str) else allowed_image_hosts
    return ImageAccess(
        allowed_hosts=None if hosts is None else tuple(hosts),
        storage=tuple(folder for folder in folders if isinstance(folder, RemoteFolder)),
        within=None if within is None else local_path(within, "within"),
    )


def _is_remote(url: str) -> bool:
    if isinstance(remote_folder(url), Path):
        raise CogViewConfigurationError(
            "storage names a folder of this machine.", hint="Pass a folder of this machine as within=."
        )
    return True


def _bucket(folder: RemoteFolder) -> RemoteFolder:
    protocol, _, rest = folder.url.partition("://")
    return RemoteFolder(f"{protocol}://{rest.partition('/')[0]}", folder.options)


def _holds(folder: RemoteFolder, uri: str) -> bool:
    if "::" in uri or not uri.isprintable() or ".." in _SEGMENTS.split(unquote(uri)):
        return False
    return uri.startswith(f"{folder.url.rstrip('/')}/")


# --- what a URL may be


def _local_folder(text: str, *, is_url: bool) -> Path:
    if not is_url:
        if _NO_URL_NOR_PATH.match(text):
            raise _wrong("it is no URL of a folder", "Pass a URL such as 's3://bucket/pictures' as a string.")
        return Path(text)
    parts = urlsplit(text)
    if parts.netloc not in {"", "localhost"} or not parts.path or parts.query or parts.fragment:
        raise _wrong("it is no file URL of a folder of this machine", "Write it as 'file:///folder', or as a path.")
    return Path(url2pathname(parts.path))


def _check_rest(protocol: str, rest: str) -> None:
    host = rest.partition("/")[0]
    if _PASSWORD.match(rest) or (protocol in _S3 and "@" in host):
        raise _wrong("the URL holds credentials", "Leave them to the environment, or pass them in storage_options.")
    if "?" in rest or "#" in rest:
        raise _wrong("the URL has a query or a fragment", "Leave it out; storage_options take what the store needs.")
    if "::" in rest or not rest.isprintable():
        raise _wrong("the URL is chained or holds unprintable characters", "Pass the plain URL of one folder.")
    if protocol in _S3 and not host:
        raise _wrong("the URL names no bucket", "Write it as 's3://bucket/pictures'.")


def _check_protocol(protocol: str) -> None:
    if protocol in _NO_FOLDERS:
        raise _wrong(f"{protocol}:// addresses are not folders", "Take the store's own protocol, such as s3://.")
    try:
        from fsspec import get_filesystem_class  # noqa: PLC0415
    except ImportError:
        raise CogViewConfigurationError(
            "Storage elsewhere needs fsspec, which is not installed.", hint=_INSTALL
        ) from None
    try:
        get_filesystem_class(protocol)
    except ValueError:
        raise _wrong(f"fsspec knows no protocol {protocol[:40]!r}", "Check its spelling.") from None
    except ImportError as error:
        raise CogViewConfigurationError(
            f"Storage at {protocol}:// needs a package that is not installed.",
            hint=_INSTALL if protocol in _S3 else "Install fsspec's package for it.",
            detail=str(error),
        ) from None


def _wrong(why: str, what_to_do: str) -> CogViewConfigurationError:
    return CogViewConfigurationError(f"The folder cannot be used: {why}.", hint=what_to_do)


# --- what is done there


class _Store:
    """The file system of a folder: fsspec's blocking methods, on URIs."""

    def __init__(self, folder: RemoteFolder, deadline: Deadline) -> None:
        self.folder = folder
        self._deadline = deadline

    def call(self, method: str, uri: str, *args: Any, **options: Any) -> Any:
        """One method of the file system on a URI."""
        from fsspec.core import url_to_fs  # noqa: PLC0415  fsspec keeps one for the same options, anew after a fork

        files, path = url_to_fs(uri, **self.folder.options)
        left = self._deadline.remaining()
        if left == 0.0:  # which fsspec would take for no limit
            raise _TimePassedError
        if files.async_impl:  # it is cancelled after that time; the others know no limit
            options["timeout"] = left
        try:
            return getattr(files, method)(path, *args, **options)
        except TimeoutError:
            if self._deadline.passed:
                raise _TimePassedError from None
            raise

    def has_folders(self) -> bool:
        """Whether folders are real; the file systems that are coroutines inside are those of object stores, which have none."""
        return not self._files().async_impl

    def create(self, uri: str, content: bytes) -> None:
        """Write a new file in one request.

        Raises:
            FileExistsError: When the name is taken.
        """
        if "mode" in inspect.signature(self._files().pipe_file).parameters:
            try:
                self.call("pipe_file", uri, content, mode="create")
            except Exception as error:
                if _is_taken(error):
                    raise FileExistsError from None
                if not _knows_no_conditions(error):
                    raise
            else:
                return
        if self.call("exists", uri):
            raise FileExistsError
        self.call("pipe_file", uri, content)

    def create_below(self, uri: str, content: bytes) -> None:
        """Write a new file, making its folder where folders are real; a half one is removed."""
        if not self.has_folders():  # one PUT is whole or nothing
            self.create(uri, content)
            return
        try:
            with contextlib.suppress(FileNotFoundError):
                self.create(uri, content)
                return
            self.call("makedirs", uri.rpartition("/")[0], exist_ok=True)
            self.create(uri, content)
        except FileExistsError:
            raise
        except BaseException:
            self.remove(uri)
            raise

    def remove(self, uri: str) -> None:
        """Remove a file of ours, if that can be done."""
        self._deadline = Deadline(_REMOVE_SECONDS)
        with contextlib.suppress(Exception):
            self.call("rm_file", uri)

    def _files(self) -> Any:
        from fsspec.core import url_to_fs  # noqa: PLC0415

        return url_to_fs(self.folder.url, **self.folder.options)[0]


def _put(store: _Store, answer: _Answer[str], uris: Iterable[str], content: bytes) -> str:
    for uri in uris:
        mine = object()
        try:
            # Two of this process never try one name at once: not every store can tell them apart.
            if _CLAIMED.setdefault(uri, mine) is mine:
                store.create_below(uri, content)
                if answer.cancelled():
                    store.remove(uri)  # nobody will ever know of it
                return uri
        except FileExistsError:
            continue
        finally:
            if _CLAIMED.get(uri) is mine:
                del _CLAIMED[uri]
    raise _PlainError("every name is taken")


def _reading(uri: str, options: Mapping[str, Any] | None, deadline: Deadline) -> _Answer[bytes]:
    def get(_: _Answer[bytes]) -> bytes:
        folder = remote_folder(uri, options)
        if isinstance(folder, Path):
            raise _wrong("it is a file of this machine", "Open it as one.")
        store = _Store(folder, deadline)
        content: bytes = store.call("cat_file", folder.url, start=0, end=MAX_IMAGE_BYTES + 1)
        if len(content) > MAX_IMAGE_BYTES:
            raise _PlainError(f"it is larger than {MAX_IMAGE_BYTES // 2**20} MiB")
        return content

    return _started(get, deadline)


# --- waiting

_Answer = concurrent.futures.Future[T | BaseException]
"""What became of the work. An exception is a value here, so that none is complained of when nobody waits any more."""


class _TimePassedError(Exception):
    """When nobody waits any more."""


class _PlainError(Exception):
    """What went wrong, in words of ours."""


def _started(work: Callable[[_Answer[T]], T], deadline: Deadline) -> _Answer[T]:
    if deadline.passed:
        raise _TimePassedError
    answer: _Answer[T] = concurrent.futures.Future()

    def run() -> None:
        outcome: T | BaseException
        try:
            outcome = work(answer)
        except BaseException as error:  # noqa: BLE001  raised by who waits
            outcome = error
        if answer.set_running_or_notify_cancel():
            answer.set_result(outcome)

    # A daemon thread: a store that never answers holds up neither a pool nor the end of the process.
    threading.Thread(target=copy_context().run, args=(run,), daemon=True, name="cogview-storage").start()
    return answer


def _waited(answer: _Answer[T], deadline: Deadline) -> T:
    try:
        concurrent.futures.wait([answer], timeout=deadline.remaining())
    finally:
        answer.cancel()  # of no effect when it is there
    return _settled(answer)


async def _awaited(answer: _Answer[T], deadline: Deadline) -> T:
    try:
        await asyncio.wait([asyncio.wrap_future(answer)], timeout=deadline.remaining())
    finally:
        answer.cancel()
    return _settled(answer)


def _settled(answer: _Answer[T]) -> T:
    if answer.cancelled():
        raise _TimePassedError
    outcome = answer.result()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


# --- what went wrong, in words of ours: a store's own may hold keys


@contextlib.contextmanager
def _in_our_words(done: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001  foreign packages raise what they like
        raise OSError(getattr(error, "errno", None) or errno.EIO, _reason(error, done)) from None


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    try:
        yield
    except CogViewConfigurationError as error:
        raise CogViewStorageError(error.message, hint=error.hint, detail=error.detail) from None
    except Exception as error:  # noqa: BLE001  foreign packages raise what they like
        raise CogViewStorageError(
            f"The saved picture could not be read: {_reason(error, 'read')}.",
            hint="Check the access to its store (environment, storage_options); while the link lives, the URL still gives it.",
        ) from None


def _reason(error: Exception, done: str) -> str:
    if isinstance(error, _PlainError):
        return str(error)
    known = (
        (_TimePassedError, f"the time limit passed while it was {done}"),
        (FileNotFoundError, "the bucket, folder or file does not exist"),
        (PermissionError, "access was denied"),
        (TimeoutError, "the store did not answer in time"),
        (ImportError, f"a package for it is not installed. {_INSTALL}"),
        (ConnectionError, "the store could not be reached"),
        (TypeError, "its storage_options were not understood"),
    )
    for kind, words in known:
        if isinstance(error, kind):
            return words
    names = {each.__name__ for each in type(error).__mro__}
    if names & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}:
        return "no credentials were found"
    if names & {"ConnectionError", "HTTPClientError", "ClientConnectionError"}:  # of botocore and aiohttp
        return "the store could not be reached"
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__


def _refusal(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and code of an S3 refusal, which s3fs gives as the cause of a plain OSError."""
    response = getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return None, ""
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode"), str(response.get("Error", {}).get("Code"))


def _is_taken(error: Exception) -> bool:
    status, code = _refusal(error)
    return isinstance(error, FileExistsError) or status == 412 or code == "ConditionalRequestConflict"  # noqa: PLR2004


def _knows_no_conditions(error: Exception) -> bool:
    return _refusal(error)[0] == 501  # noqa: PLR2004  some S3-compatible stores refuse If-None-Match
