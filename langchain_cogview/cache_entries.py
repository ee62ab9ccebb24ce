"""Where cached images are recorded: a LangChain cache, or a directory, which stores their bytes too.

    directory/entries/ab/abcd….json   the metadata of an image, named after the hash of its request
    directory/images/12/1234….png     the bytes of an image, named after their own hash, so equal images are stored once

An entry is the JSON of an image, never its bytes. Errors of file systems and caches are raised as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from langchain_core.caches import BaseCache
from langchain_core.outputs import Generation

from langchain_cogview.concurrency import in_thread, raised_by_signal
from langchain_cogview.images.formats import EXTENSIONS, MAX_IMAGE_BYTES, sniff
from langchain_cogview.images.store import read_regular_file, replace_file
from langchain_cogview.result import GeneratedImage

if TYPE_CHECKING:
    from collections.abc import Hashable
    from pathlib import Path

    from langchain_cogview.request import ImageRequest

ENTRY_TYPE: Final = "cogview.cached_image"
ENTRY_VERSION: Final = 1
"""Part of every key. A format that old versions would misread gets a higher number, and old entries are not found any more."""

KEY_PREFIX: Final = "langchain-cogview:"
"""The beginning of the `llm_string` of every key."""

_MAX_ENTRY_BYTES: Final = 4 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Everything that determines an image, in the two strings that a `BaseCache` takes.

    Attributes:
        prompt: The prompt, verbatim.
        llm_string: Everything else, as canonical JSON behind a prefix with the version.
        digest: SHA-256 of both, in hexadecimal.
    """

    prompt: str
    llm_string: str
    digest: str

    @classmethod
    def of(cls, request: ImageRequest, index: int, base_url: str) -> CacheKey:
        """Build the key of one image. Neither `user_id` nor the request id is a part of it.

        Args:
            request: The request that generates the image.
            index: Number of the image in the request, from 0.
            base_url: Normalised base URL of the service.

        Returns:
            The key.
        """
        parts = {
            "base_url": base_url,
            "index": index,
            "model": request.model,
            "quality": request.resolved_quality,
            "size": request.resolved_size,
            "watermark_enabled": request.watermark_enabled,
        }
        canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        llm_string = f"{KEY_PREFIX}{ENTRY_VERSION}:{canonical}"
        return cls(request.prompt, llm_string, hashlib.sha256(f"{llm_string}\n{request.prompt}".encode()).hexdigest())


class Entries(Protocol):
    """Where entries are stored. Reads and writes may raise any exception."""

    @property
    def identity(self) -> Hashable:
        """Equal for two objects that share their entries."""

    def read(self, key: CacheKey) -> str | None:
        """Read an entry.

        Returns:
            The text of the entry; None where there is none.
        """

    async def aread(self, key: CacheKey) -> str | None:
        """Async version of `read`."""

    def write(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        """Write an entry, and the bytes of the image where `bytes_path` names a file for them."""

    async def awrite(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        """Async version of `write`."""

    def bytes_path(self, image: GeneratedImage) -> Path | None:
        """Where the bytes of an image are stored.

        Returns:
            The file; None where the bytes are not stored.
        """


class _Identity:
    """Equal for the same object only, and for nothing once that object is gone."""

    __slots__ = ("_hash", "_object")

    def __init__(self, of: Any) -> None:
        self._hash = id(of)
        self._object = weakref.ref(of)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._object() is other._object() is not None

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, slots=True)
class LangChainEntries:
    """Entries in a LangChain cache: the text of one `Generation`, which every such cache can serialize.

    Attributes:
        cache: The LangChain cache.
    """

    cache: BaseCache

    @property
    def identity(self) -> Hashable:
        """The identity of the cache object, which need not be hashable."""
        return _Identity(self.cache)

    def read(self, key: CacheKey) -> str | None:
        """Read an entry.

        Returns:
            The text of the entry, empty where the cache returns something foreign; None where there is none.
        """
        return self._text(self.cache.lookup(key.prompt, key.llm_string))

    async def aread(self, key: CacheKey) -> str | None:
        """Async version of `read`.

        Returns:
            The text of the entry; None where there is none.
        """
        # LangChain's default would use the event loop's executor, which the application may have filled with its own threads.
        if type(self.cache).alookup is BaseCache.alookup:
            return await in_thread(self.read, key)
        return self._text(await self.cache.alookup(key.prompt, key.llm_string))

    def write(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        """Write an entry; the bytes of the image are not stored."""
        self.cache.update(key.prompt, key.llm_string, [Generation(text=to_entry(key, image))])

    async def awrite(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        """Async version of `write`."""
        if type(self.cache).aupdate is BaseCache.aupdate:
            await in_thread(self.write, key, image, content)
            return
        await self.cache.aupdate(key.prompt, key.llm_string, [Generation(text=to_entry(key, image))])

    def bytes_path(self, image: GeneratedImage) -> Path | None:
        """Where the bytes of an image are stored.

        Returns:
            None: a LangChain cache stores text only.
        """
        return None

    @staticmethod
    def _text(value: Any) -> str | None:
        if not value:
            return None
        first = value[0] if isinstance(value, list | tuple) else None
        return first.text if isinstance(first, Generation) else ""


@dataclass(frozen=True, slots=True)
class DirectoryEntries:
    """Entries and the bytes of their images in a directory on this machine, which is created when it is needed.

    Each file is written completely or not at all, and the bytes of an image before its entry, so several processes may write at
    the same time, and may be killed. The directory is never listed, and nothing in it is ever deleted.

    Attributes:
        directory: The directory.
    """

    directory: Path

    @property
    def identity(self) -> Hashable:
        """The directory."""
        return self.directory

    def read(self, key: CacheKey) -> str | None:
        """Read an entry.

        Returns:
            The text of the entry; None where there is none.
        """
        try:
            return read_regular_file(self._path(key), _MAX_ENTRY_BYTES).decode("utf-8", "replace")
        except FileNotFoundError:
            return None

    async def aread(self, key: CacheKey) -> str | None:
        """Async version of `read`.

        Returns:
            The text of the entry; None where there is none.
        """
        return await in_thread(self.read, key)

    def write(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        """Write an entry after the bytes of its image, where there are any."""
        path = self.bytes_path(image)
        if path and content is not None and read_intact(path, image) is None:
            replace_file(path, content)
        replace_file(self._path(key), to_entry(key, image).encode())

    async def awrite(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        """Async version of `write`."""
        await in_thread(self.write, key, image, content)

    def bytes_path(self, image: GeneratedImage) -> Path | None:
        """Where the bytes of an image are stored.

        Returns:
            The file; None where the bytes were never downloaded.
        """
        if image.sha256 is None:
            return None
        name = image.sha256 + EXTENSIONS.get(image.mime_type or "", "")
        return self.directory / "images" / image.sha256[:2] / name

    def _path(self, key: CacheKey) -> Path:
        return self.directory / "entries" / key.digest[:2] / f"{key.digest}.json"


def to_entry(key: CacheKey, image: GeneratedImage) -> str:
    """Serialize an entry.

    Returns:
        The JSON text of the entry.
    """
    entry = {"type": ENTRY_TYPE, "version": ENTRY_VERSION, "key": key.digest, "image": image.model_dump(mode="json")}
    return json.dumps(entry, ensure_ascii=False)


def from_entry(key: CacheKey, text: str) -> GeneratedImage | None:
    """Parse an entry.

    Returns:
        The image of the entry; None where the text is damaged, or belongs to another request.
    """
    try:
        return _parsed(key, text)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        logger.warning("An entry of the cache is ignored: it is damaged or foreign (%s).", type(error).__name__)
        return None


def _parsed(key: CacheKey, text: str) -> GeneratedImage:
    entry = json.loads(text)
    if (entry["type"], entry["version"], entry["key"]) != (ENTRY_TYPE, ENTRY_VERSION, key.digest):
        raise ValueError("The entry belongs to another request.")
    image = GeneratedImage.model_validate(entry["image"])
    if image.sha256 is not None and not _SHA256.fullmatch(image.sha256):
        raise ValueError("The hash is not a SHA-256 digest.")
    return image


def read_intact(path: Path, image: GeneratedImage) -> bytes | None:
    """Read a file that should have the bytes of a recorded image.

    Returns:
        The bytes; None where they are not those of the image, or cannot be read.

    Raises:
        OSError: A signal handler of the program raised it.
        ValueError: The same.
    """
    try:
        content = read_regular_file(path, MAX_IMAGE_BYTES)
    except (OSError, ValueError) as error:
        if raised_by_signal(error):
            raise
        return None
    return content if is_intact(content, image) else None


def is_intact(content: bytes, image: GeneratedImage) -> bool:
    """Compare bytes with the recorded size, format and hash of an image.

    Returns:
        Whether they are the bytes of that image.
    """
    matches = len(content) == image.size_bytes and sniff(content[:32]) == (image.mime_type or "")
    return matches and hashlib.sha256(content).hexdigest() == image.sha256
