"""Where the bytes of an image may be read from: its file, its URI, its link.

A path, a URI and a link come back from storage: an artifact in a checkpoint, an entry of a cache. Somebody else can have written
them, so none of them is believed further than `ImageAccess` says, and bytes count as the image only when they are one.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from langchain_cogview.errors import CogViewConfigurationError, CogViewStorageError, printable
from langchain_cogview.images.download import MAX_PICTURE_BYTES
from langchain_cogview.images.formats import ImageFormatError, inspect
from langchain_cogview.images.remote import READ_SECONDS, RemoteFolder, aread_uri, read_uri, remote_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_NO_FOLLOW: Final = getattr(os, "O_NOFOLLOW", 0)
_OPEN: Final = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY")
)
_FOLDER: Final = os.O_RDONLY | _NO_FOLLOW | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_SEGMENTS: Final = re.compile(r"[/\\]")


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
            content = read_regular_file(path, MAX_PICTURE_BYTES, within=self.within)
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise CogViewStorageError(
                f"The saved file {printable(path.name, 120)} cannot be read: {printable(reason, 80)}.",
                hint="If it was moved, open it where it is now; while the link lives, the URL still gives it.",
            ) from None
        return checked(content, f"The saved file {printable(path.name, 120)}", size_bytes=size_bytes, sha256=sha256)

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
        return checked(content, "The saved image", size_bytes=size_bytes, sha256=sha256)

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
        return checked(content, "The saved image", size_bytes=size_bytes, sha256=sha256)

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
        CogViewConfigurationError: When a URL is not one of a remote folder, or options are given without one.
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
        within=None if within is None else Path(within).expanduser(),
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


def checked(content: bytes, name: str, *, size_bytes: int | None, sha256: str | None) -> bytes:
    """The bytes, once they are found to be an image, and the recorded one where size and hash are recorded.

    Args:
        content: What was read.
        name: What it is called in an error.
        size_bytes: The recorded number of bytes.
        sha256: The recorded hash, in hexadecimal.

    Raises:
        CogViewStorageError: When they are not.
    """
    hint = (
        "Something else was written there, or the record is wrong; while the link lives, the URL still gives the image."
    )
    try:
        inspect(io.BytesIO(content))
    except ImageFormatError as error:
        raise CogViewStorageError(f"{name} is not an image: {error}.", hint=hint) from None
    same_size = size_bytes is None or size_bytes == len(content)
    if not same_size or (sha256 is not None and hashlib.sha256(content).hexdigest() != sha256.lower()):
        raise CogViewStorageError(f"{name} is not the image that is recorded.", hint=hint)
    return content


def read_regular_file(path: Path, limit: int, *, within: Path | None = None) -> bytes:
    """The bytes of a regular file. A link at its end is not followed, and a pipe or device is not waited for.

    Args:
        path: The file.
        limit: The largest number of bytes.
        within: The only folder that it may lie in, with symbolic links of its folders resolved; None: any.

    Raises:
        OSError: When it cannot be opened or is none; `strerror` says why.
        ValueError: The path is not one.
    """
    descriptor = _opened(path, within)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        content = None
        if status.st_size <= limit:
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                content = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if content is None or len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit // 2**20} MiB")
    return content


def _opened(path: Path, within: Path | None) -> int:
    if not _NO_FOLLOW and path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if within is None:
        return os.open(path, _OPEN)
    root = within.resolve()
    place = path.parent.resolve() / path.name
    if not place.is_relative_to(root) or place == root:
        raise PermissionError(errno.EACCES, "it is outside the folder that images are read from")
    if os.open not in os.supports_dir_fd:
        return os.open(place, _OPEN)
    # From folder to folder, so that none of them can become a link meanwhile.
    folder = os.open(root, _FOLDER)
    try:
        for name in place.relative_to(root).parts[:-1]:
            below = os.open(name, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = below
        return os.open(place.name, _OPEN, dir_fd=folder)
    finally:
        os.close(folder)
