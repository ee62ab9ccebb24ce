"""Save images in remote storage, and read saved images again: a folder behind any URL that fsspec knows.

An image goes there whole, in one request, under a name that no file has. Sync and async callers use the blocking methods of
fsspec's file systems in a daemon thread, until the deadline. Credentials come from `options` or from where the file system
looks for them (environment, profile, role).

Paths, URIs and links come back from storage: an artifact in a checkpoint, an entry of a cache. Anybody can have written them,
so `ImageAccess` decides what may be opened, and bytes count as the image only when they are an image.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from langchain_cogview.concurrency import Deadline, raised_by_signal
from langchain_cogview.errors import CogViewConfigurationError, CogViewStorageError, printable
from langchain_cogview.images.backend import SCHEME, backend_folder
from langchain_cogview.images.folders import TimePassedError, awaited, started, waited
from langchain_cogview.images.formats import MAX_IMAGE_BYTES
from langchain_cogview.images.store import checked_image, local_path, read_regular_file, reason

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from langchain_cogview.images.folders import Answer, Backend, Folder

    Storage = str | Backend | Folder | Iterable[str | Backend | Folder]
    """What `storage=` takes: URLs of folders, and backends of deepagents or folders in them."""

READ_SECONDS: Final = 60.0
_REMOVE_SECONDS: Final = 10.0

_INSTALL: Final = 'Install it with: pip install "langchain-cogview[storage]"'
_S3: Final = frozenset({"s3", "s3a"})
_LOCAL: Final = frozenset({"file", "local"})
_NO_FOLDERS: Final = frozenset({"http", "https", "data"})
_OWN_OPTIONS: Final = frozenset({"asynchronous", "loop"})
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)  # a single letter is a Windows drive
_NO_URL_NOR_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[/\\](?!/)|[^/\\]{2,}://")  # Path("s3://b") is "s3:/b"
_PASSWORD = re.compile(r"(?!arn:)[^/@]*:(?!\d+/)[^@]*@")  # a secret may hold slashes, a port only digits
_SEGMENTS: Final = re.compile(r"[/\\]")
_CLAIMED: Final[dict[str, object]] = {}


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder in remote storage, made from a URL by `remote_folder`."""

    url: str
    """The URL, such as `s3://bucket/images`; without credentials."""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    """fsspec's storage options. They may hold secrets, and appear in no repr and in no error."""

    def __str__(self) -> str:
        return self.url

    def upload(self, names: Iterable[str], content: bytes, deadline: Deadline) -> str:
        """Save a file whole or not at all, under the first name that no file has.

        Args:
            names: The names to try, in order.
            content: The bytes.
            deadline: For everything.

        Returns:
            The URI of the file.

        Raises:
            OSError: The file could not be saved in time; `strerror` says why, without the store's own words.
        """
        with storage_errors("uploaded"):
            return waited(self._uploading(names, content, deadline), deadline)

    async def aupload(self, names: Iterable[str], content: bytes, deadline: Deadline) -> str:
        """Async version of `upload`. A file of a cancelled upload is removed.

        Returns:
            The URI of the file.
        """
        with storage_errors("uploaded"):
            return await awaited(self._uploading(names, content, deadline), deadline)

    def _uploading(self, names: Iterable[str], content: bytes, deadline: Deadline) -> Answer[str]:
        root = self.url if self.url.endswith("/") else f"{self.url}/"
        uris = (f"{root}{name}" for name in names)
        return started(lambda answer: _put(Store(self, deadline), answer, uris, content), deadline)

    def holds(self, uri: str) -> bool:
        """Return whether a URI, which anybody may have written, names a file in this folder, without any way out of it."""
        if "::" in uri or not uri.isprintable() or ".." in _SEGMENTS.split(unquote(uri)):
            return False
        return uri.startswith(f"{self.url.rstrip('/')}/")

    def read(self, uri: str, seconds: float | None = READ_SECONDS) -> bytes:
        """Read a file of at most 32 MiB, with the options of this folder.

        Args:
            uri: The URI of the file; whether the folder holds it is not checked.
            seconds: The time limit in seconds; None: no limit.

        Returns:
            The bytes of the file.

        Raises:
            CogViewStorageError: The file could not be read in time.
        """
        with _unreadable():
            return waited(*self._reading(uri, Deadline(seconds)))

    async def aread(self, uri: str, seconds: float | None = READ_SECONDS) -> bytes:
        """Async version of `read`.

        Returns:
            The bytes of the file.
        """
        with _unreadable():
            return await awaited(*self._reading(uri, Deadline(seconds)))

    def _reading(self, uri: str, deadline: Deadline) -> tuple[Answer[bytes], Deadline]:
        return started(lambda _: _get(uri, self.options, deadline), deadline), deadline

    def bucket(self) -> RemoteFolder:
        """Return the bucket of the folder, in which its options are valid."""
        protocol, _, rest = self.url.partition("://")
        return replace(self, url=f"{protocol}://{rest.partition('/')[0]}")

    def without_options(self) -> RemoteFolder:
        """Return a copy without storage options, which may hold secrets."""
        return RemoteFolder(self.url)


def remote_folder(url: str | os.PathLike[str] | Folder, options: Mapping[str, Any] | None = None) -> Folder | Path:
    """Check the URL of a folder, without using the network.

    Args:
        url: A URL with a protocol that fsspec knows. A path, or a `file://` URL, is a folder on this machine. A folder that is
            made already, such as one of a backend, is returned as it is.
        options: fsspec's storage options.

    Returns:
        The folder elsewhere, or the path of a folder on this machine.

    Raises:
        CogViewConfigurationError: The URL cannot name a folder, holds credentials, or needs a package that is missing.
    """
    if not isinstance(url, str | os.PathLike):
        return url
    text = os.fspath(url)
    if text.startswith(SCHEME):
        raise _wrong("it is in a backend of deepagents, which its URI does not bring", "Pass the backend itself.")
    parts = _URL.fullmatch(text)
    if parts is None or parts[1].lower() in _LOCAL:
        if options:
            raise _wrong("storage_options were passed for a folder on this machine", "Leave them out.")
        return _local_folder(text, is_url=parts is not None)
    protocol, rest = parts[1].lower(), parts[2].rstrip("/")
    _check_rest(protocol, rest)
    _check_protocol(protocol)
    if refused := _OWN_OPTIONS.intersection(options or {}):
        raise _wrong(f"storage_options hold {min(refused)!r}, which is set here", "Leave it out.")
    return RemoteFolder(f"{protocol}://{rest}", dict(options or {}))


# --- what may be read


@dataclass(frozen=True, slots=True)
class ImageAccess:
    """What may be opened to read an image that is not in memory."""

    base_url: str | None = None
    """The base URL of the service; links to the same host and port belong to the service. None: not known."""
    allowed_hosts: tuple[str, ...] | None = None
    """The only hosts whose links are opened; None: any public host."""
    storage: tuple[Folder, ...] = ()
    """The folders elsewhere in which URIs are read, with their options. Empty: no URI is read."""
    within: Path | None = None
    """The only folder from which files are read; None: any folder."""

    @classmethod
    def of_generator(
        cls, base_url: str | None, allowed_hosts: tuple[str, ...] | None, folder: Path | Folder | None
    ) -> ImageAccess:
        """Make the access for the images of a generator: URIs are read in the bucket of its own remote folder.

        Args:
            base_url: The generator's base URL.
            allowed_hosts: The generator's `allowed_image_hosts`.
            folder: The generator's `output_dir`; its storage options are used for its bucket only.

        Returns:
            The access.
        """
        storage = () if folder is None or isinstance(folder, Path) else (folder.bucket(),)
        return cls(base_url, allowed_hosts, storage)

    def without_options(self) -> ImageAccess:
        """Return a copy without storage options, which may hold secrets."""
        kept = (folder.without_options() for folder in self.storage)
        return replace(self, storage=tuple(folder for folder in kept if folder is not None))

    def read_file(self, path: Path, *, size_bytes: int | None = None, sha256: str | None = None) -> bytes:
        """Read a saved image.

        Args:
            path: A regular file; a symbolic link in its last part is not followed.
            size_bytes: The recorded number of bytes; None: not recorded.
            sha256: The recorded SHA-256, in hexadecimal; None: not recorded.

        Returns:
            The image bytes.

        Raises:
            CogViewStorageError: The file cannot be read, lies outside of `within`, or is not the recorded image.
        """
        try:
            content = read_regular_file(path, MAX_IMAGE_BYTES, within=self.within)
        except (OSError, ValueError, RuntimeError) as error:
            if raised_by_signal(error):
                raise
            raise CogViewStorageError(
                f"The saved file {printable(path.name, 120)} cannot be read: {printable(reason(error), 80)}.",
                hint="If the file was moved, open it where it is now, or open the URL while the link is valid.",
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
        """Read an image in remote storage.

        Args:
            uri: The URI of the image.
            size_bytes: The recorded number of bytes; None: not recorded.
            sha256: The recorded SHA-256, in hexadecimal; None: not recorded.
            seconds: The time limit; None: no limit.

        Returns:
            The image bytes.

        Raises:
            CogViewStorageError: The file is in none of the folders, could not be read in time, or is not the recorded image.
        """
        content = self._folder(uri).read(uri, seconds)
        return checked_image(content, "The saved image", size_bytes=size_bytes, sha256=sha256)

    async def aread_uri(
        self,
        uri: str,
        *,
        size_bytes: int | None = None,
        sha256: str | None = None,
        seconds: float | None = READ_SECONDS,
    ) -> bytes:
        """Async version of `read_uri`.

        Returns:
            The image bytes.
        """
        content = await self._folder(uri).aread(uri, seconds)
        return checked_image(content, "The saved image", size_bytes=size_bytes, sha256=sha256)

    def _folder(self, uri: str) -> Folder:
        for folder in self.storage:
            if folder.holds(uri):
                return folder
        raise CogViewStorageError(
            f"The image at {printable(uri, 120)} was not read: its URI is in none of the allowed folders.",
            hint='Pass the folder where the image is loaded, such as images_from_messages(..., storage="s3://bucket").',
        )


ANY_FILE: Final = ImageAccess()
"""Any file of this machine and any public link, but no URI."""


def image_access(
    *,
    within: str | os.PathLike[str] | None = None,
    storage: Storage | None = None,
    storage_options: Mapping[str, Any] | None = None,
    allowed_image_hosts: str | Iterable[str] | None = None,
) -> ImageAccess:
    """Make the access that the reading side allows for images that come back from storage.

    Args:
        within: The only folder from which files are read; None: any folder.
        storage: URLs of the remote folders in which URIs are read, such as `s3://bucket/images`, and backends of deepagents or
            folders in them (`BackendFolder`); None: no URI is read.
        storage_options: fsspec's storage options for these folders; they are used for nothing else.
        allowed_image_hosts: The only hosts whose links are opened, as for `CogViewImageGenerator`; None: any public host.

    Returns:
        The access.

    Raises:
        CogViewConfigurationError: An argument cannot be used.
    """
    items: list[Any] = [] if storage is None else [storage]
    if isinstance(storage, Iterable) and not isinstance(storage, str) and not hasattr(storage, "upload_files"):
        items = list(storage)
    urls = [item for item in items if isinstance(item, str)]
    if storage_options and not urls:
        raise CogViewConfigurationError(
            "storage_options were passed without storage.",
            hint='Pass the folder that they are for, such as storage="s3://bucket".',
        )
    # Without options at first: a folder on this machine takes none, and its own error would be the wrong one.
    if any(isinstance(remote_folder(url), Path) for url in urls):
        raise CogViewConfigurationError(
            "storage names a folder on this machine.", hint="Pass a folder on this machine as within=."
        )
    folders = [remote_folder(item, storage_options) if isinstance(item, str) else _made(item) for item in items]
    hosts = (allowed_image_hosts,) if isinstance(allowed_image_hosts, str) else allowed_image_hosts
    return ImageAccess(
        allowed_hosts=None if hosts is None else tuple(hosts),
        storage=tuple(folder for folder in folders if not isinstance(folder, Path)),
        within=None if within is None else local_path(within, "within"),
    )


def _made(item: Any) -> Folder:
    return item if isinstance(item, RemoteFolder) else backend_folder(item)


# --- what a URL may be


def _local_folder(text: str, *, is_url: bool) -> Path:
    if not is_url:
        if _NO_URL_NOR_PATH.match(text):
            raise _wrong("it is not the URL of a folder", "Pass a URL such as 's3://bucket/images' as a string.")
        return Path(text)
    parts = urlsplit(text)
    if parts.netloc not in {"", "localhost"} or not parts.path or parts.query or parts.fragment:
        raise _wrong(
            "it is not the file URL of a folder on this machine", "Write it as 'file:///folder', or as a path."
        )
    return Path(url2pathname(parts.path))


def _check_rest(protocol: str, rest: str) -> None:
    host = rest.partition("/")[0]
    if _PASSWORD.match(rest) or (protocol in _S3 and "@" in host):
        raise _wrong("the URL holds credentials", "Leave them to the environment, or pass them in storage_options.")
    if "?" in rest or "#" in rest:
        raise _wrong("the URL has a query or a fragment", "Leave it out; storage_options take what the store needs.")
    if "::" in rest or not rest.isprintable():
        raise _wrong("the URL is chained or holds unprintable characters", "Pass the URL of one folder.")
    if protocol in _S3 and not host:
        raise _wrong("the URL names no bucket", "Write it as 's3://bucket/images'.")


def _check_protocol(protocol: str) -> None:
    if protocol in _NO_FOLDERS:
        raise _wrong(f"{protocol}:// URLs are not folders", "Use the protocol of the store, such as s3://.")
    try:
        from fsspec import get_filesystem_class  # noqa: PLC0415
    except ImportError:
        raise CogViewConfigurationError("Remote storage needs fsspec, which is not installed.", hint=_INSTALL) from None
    try:
        get_filesystem_class(protocol)
    except ValueError:
        raise _wrong(f"fsspec knows no protocol {protocol[:40]!r}", "Check its spelling.") from None
    except ImportError as error:
        raise CogViewConfigurationError(
            f"Storage at {protocol}:// needs a package that is not installed.",
            hint=_INSTALL if protocol in _S3 else "Install the package that fsspec needs for it.",
            detail=str(error),
        ) from None


def _wrong(why: str, what_to_do: str) -> CogViewConfigurationError:
    return CogViewConfigurationError(f"The folder cannot be used: {why}.", hint=what_to_do)


# --- what is done there


class Store:
    """The file system of a folder: the blocking methods of fsspec, called with URIs."""

    def __init__(self, folder: RemoteFolder, deadline: Deadline) -> None:
        self._folder = folder
        self._deadline = deadline

    def call(self, method: str, uri: str, *args: Any, **options: Any) -> Any:
        """Call a method of the file system with the path of a URI, until the deadline.

        Returns:
            What the method returns.
        """
        files, path = self.files(uri)
        left = self._deadline.remaining()
        if left == 0.0:  # fsspec reads zero as no limit
            raise TimePassedError
        if files.async_impl:  # the others have no time limit
            options["timeout"] = left
        try:
            return getattr(files, method)(path, *args, **options)
        except TimeoutError:
            if self._deadline.passed:
                raise TimePassedError from None
            raise

    def create(self, uri: str, content: bytes) -> None:
        """Write a file in one request; a `FileExistsError` says that a file has that name."""
        if "mode" in inspect.signature(self.files(uri)[0].pipe_file).parameters:
            try:
                self.call("pipe_file", uri, content, mode="create")
            except Exception as error:
                if is_in_use(error):
                    raise FileExistsError from None
                if _refusal(error)[0] != 501:  # noqa: PLR2004  some S3-compatible stores refuse If-None-Match
                    raise
            else:
                return
        if self.call("exists", uri):
            raise FileExistsError
        self.call("pipe_file", uri, content)

    def create_below(self, uri: str, content: bytes) -> None:
        """Write a file as `create`, in a folder that is made where folders are real; one that is not whole is removed."""
        files, _ = self.files(uri)
        if files.async_impl:  # an object store: it has no folders, and a PUT writes the whole file or nothing
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
        """Remove a file that this package wrote; errors are ignored."""
        self._deadline = Deadline(_REMOVE_SECONDS)
        with contextlib.suppress(Exception):
            self.call("rm_file", uri)

    def files(self, uri: str) -> tuple[Any, str]:
        """Return the file system, and the path of a URI in it."""
        from fsspec.core import url_to_fs  # noqa: PLC0415  fsspec caches file systems by options and process

        return url_to_fs(uri, **self._folder.options)  # type: ignore[no-any-return]


def _put(store: Store, answer: Answer[str], uris: Iterable[str], content: bytes) -> str:
    for uri in uris:
        claim = object()
        try:
            # Two uploads of this process never try one name at the same time: not every store can refuse the second.
            if _CLAIMED.setdefault(uri, claim) is claim:
                store.create_below(uri, content)
                if answer.cancelled():
                    store.remove(uri)  # the caller has gone, and nobody knows the name
                return uri
        except FileExistsError:
            continue
        finally:
            if _CLAIMED.get(uri) is claim:
                del _CLAIMED[uri]
    raise _PlainError("every name is in use")


def _get(uri: str, options: Mapping[str, Any], deadline: Deadline) -> bytes:
    folder = remote_folder(uri, options)
    if not isinstance(folder, RemoteFolder):
        raise _wrong("it is a file on this machine", "Open it as a file.")
    content: bytes = Store(folder, deadline).call("cat_file", folder.url, start=0, end=MAX_IMAGE_BYTES + 1)
    if len(content) > MAX_IMAGE_BYTES:
        raise _PlainError(f"it is larger than {MAX_IMAGE_BYTES // 2**20} MiB")
    return content


# --- errors without the words of the store, which may hold keys


class _PlainError(Exception):
    """An error whose text may be shown."""


@contextlib.contextmanager
def storage_errors(done: str) -> Iterator[None]:
    """Within this block, every error of a store becomes an `OSError` whose `strerror` has none of the store's own words."""
    try:
        yield
    except Exception as error:  # foreign packages raise what they like
        if raised_by_signal(error):
            raise
        raise OSError(getattr(error, "errno", None) or errno.EIO, _reason(error, done)) from None


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    try:
        yield
    except CogViewConfigurationError as error:
        raise CogViewStorageError(error.message, hint=error.hint, detail=error.detail) from None
    except Exception as error:  # foreign packages raise what they like
        if raised_by_signal(error):
            raise
        raise CogViewStorageError(
            f"The saved image could not be read: {_reason(error, 'read')}.",
            hint="Check the access to the store (environment, storage_options), or open the URL while the link is valid.",
        ) from None


def _reason(error: Exception, done: str) -> str:
    if isinstance(error, _PlainError):
        return str(error)
    known = (
        (TimePassedError, f"the time limit passed while it was {done}"),
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
    names = {base.__name__ for base in type(error).__mro__}
    if names & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}:
        return "no credentials were found"
    if names & {"ConnectionError", "HTTPClientError", "ClientConnectionError"}:  # of botocore and aiohttp
        return "the store could not be reached"
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__


def _refusal(error: BaseException) -> tuple[int | None, str]:
    """Return HTTP status and code of an S3 error, which s3fs puts into the cause of an OSError."""
    response = getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return None, ""
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode"), str(response.get("Error", {}).get("Code"))


def is_in_use(error: Exception) -> bool:
    """Return whether a store refused to create a file because one has the name."""
    status, code = _refusal(error)
    return isinstance(error, FileExistsError) or status == 412 or code == "ConditionalRequestConflict"  # noqa: PLR2004
