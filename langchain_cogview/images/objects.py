"""Objects in remote storage by name: read, written, and created only where no object has the name."""

from __future__ import annotations

import contextlib
import mimetypes
import secrets
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.concurrency import Deadline, raised_by_signal
from langchain_cogview.errors import CogViewStorageError, printable
from langchain_cogview.images.remote import Store, is_in_use, storage_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from langchain_cogview.images.remote import RemoteFolder

_SECONDS: Final = 60.0
_LISTING_SECONDS: Final = 600.0
_BATCH: Final = 500
_CONDITIONAL: Final = frozenset({"s3", "s3a"})
"""Protocols whose "create" is a condition that the store itself checks. Others look first and write then."""


class ObjectFolder:
    """The objects below a URL. Safe for threads.

    Args:
        folder: The URL with its options.
    """

    def __init__(self, folder: RemoteFolder) -> None:
        self._folder = folder
        self.url = folder.url.rstrip("/")
        self._is_s3 = self.url.partition("://")[0] in _CONDITIONAL

    def names(self, below: str = "") -> list[str]:
        """List the objects.

        Args:
            below: Only those in this folder.

        Returns:
            Their names, relative to the URL, sorted.

        Raises:
            CogViewStorageError: They cannot be listed.
        """
        with self._errors("read"):
            files, root = self._store().files(self.url)
            path = f"{root.rstrip('/')}/{below}".rstrip("/")
            files.invalidate_cache(path)
            found = self._store(_LISTING_SECONDS).call("find", f"{self.url}/{below}".rstrip("/"))
            start = len(root.rstrip("/")) + 1
            return sorted(name for item in found if (name := item[start:]) and not name.endswith("/"))

    def read(self, name: str) -> bytes | None:
        """Read an object.

        Args:
            name: Its name.

        Returns:
            Its bytes; None if there is no such object.

        Raises:
            CogViewStorageError: It cannot be read.
        """
        with self._errors("read"):
            try:
                content: bytes = self._store().call("cat_file", self._uri(name))
            except FileNotFoundError:
                return None
            return content

    def read_all(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Read many objects, several at the same time.

        Args:
            names: Their names.

        Yields:
            Each name with its bytes, in the same order.

        Raises:
            CogViewStorageError: One cannot be read.
        """
        for start in range(0, len(names), _BATCH):
            batch = names[start : start + _BATCH]
            with self._errors("read"):
                store = self._store(_LISTING_SECONDS)
                files, _ = store.files(self.url)
                if not files.async_impl:
                    contents = [store.call("cat_file", self._uri(name)) for name in batch]
                else:
                    paths = [files._strip_protocol(self._uri(name)) for name in batch]  # noqa: SLF001
                    found = files.cat(paths, timeout=_LISTING_SECONDS)
                    contents = [found[path] for path in paths]
            yield from zip(batch, contents, strict=True)

    def create(self, name: str, content: bytes) -> bool:
        """Write an object unless one has the name.

        Args:
            name: Its name.
            content: Its bytes.

        Returns:
            Whether it was written. Where `has_conditions` says no, another writer may have written at the same moment.

        Raises:
            CogViewStorageError: It cannot be written; whether it was is not known.
        """
        with self._errors("written"):
            try:
                self._prepared(name).call("pipe_file", self._uri(name), content, mode="create", **self._facts(name))
            except Exception as error:
                if is_in_use(error):
                    return False
                raise
            return True

    def write(self, name: str, content: bytes) -> None:
        """Write an object, in place of one that has the name.

        Args:
            name: Its name.
            content: Its bytes.

        Raises:
            CogViewStorageError: It cannot be written.
        """
        with self._errors("written"):
            self._prepared(name).call("pipe_file", self._uri(name), content, **self._facts(name))

    def remove(self, name: str) -> None:
        """Remove an object; errors are ignored.

        Args:
            name: Its name.
        """
        self._store().remove(self._uri(name))

    def has_conditions(self) -> bool:
        """Find out whether the store refuses to create an object whose name is in use, also for two writers at once.

        Returns:
            Whether it does. It is tried with an object that is removed again.

        Raises:
            CogViewStorageError: Nothing can be written.
        """
        name = f"checks/{secrets.token_hex(8)}"
        self.write(name, b"1")
        try:
            return self._is_s3 and not self.create(name, b"2")
        except CogViewStorageError:  # some S3-compatible stores refuse the condition
            return False
        finally:
            self.remove(name)

    def _prepared(self, name: str) -> Store:
        store = self._store()
        files, _ = store.files(self.url)
        if not files.async_impl:  # object stores have no folders
            with contextlib.suppress(NotImplementedError):
                store.call("makedirs", self._uri(name).rpartition("/")[0], exist_ok=True)
        return store

    def _facts(self, name: str) -> dict[str, Any]:
        kind = mimetypes.guess_type(name)[0]
        return {"ContentType": kind} if kind and self._is_s3 else {}  # so that browsers show pages and images

    def _uri(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _store(self, seconds: float = _SECONDS) -> Store:
        return Store(self._folder, Deadline(seconds))

    @contextlib.contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        try:
            with storage_errors(done):
                yield
        except OSError as error:
            if raised_by_signal(error):
                raise
            raise CogViewStorageError(
                f"{printable(self.url, 120)} could not be {done}: {error.strerror or type(error).__name__}.",
                hint="Check the access to the store (environment, storage_options), then run the job again.",
            ) from None
