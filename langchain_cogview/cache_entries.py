"""Where cached pictures are recorded: a LangChain cache, or a directory, which keeps their bytes too.

    directory/entries/ab/abcd….json     what is known of a picture, by the hash of its request
    directory/pictures/12/1234….png     its bytes, by their own hash: equal pictures are stored once

An entry is the JSON of a picture, never its bytes. Everything here raises as file systems and caches do.
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
"""Part of every key: a change that old readers would misread raises it, and old entries are met no more."""

KEY_PREFIX: Final = "langchain-cogview:"
"""Each key begins with it."""

_MAX_ENTRY_BYTES: Final = 4 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What decides a picture, as a `BaseCache` takes it.

    Attributes:
        prompt: Verbatim.
        llm_string: Everything else, as canonical JSON behind a prefix with the version.
        digest: SHA-256 of both, in hexadecimal.
    """

    prompt: str
    llm_string: str
    digest: str

    @classmethod
    def of(cls, request: ImageRequest, index: int, base_url: str) -> CacheKey:
        """The key of one picture: the number `index` (from 0) of a request to the service at `base_url`.

        Who asked (`user_id`) and under which id is no part of it.
        """
        decides = {
            "base_url": base_url,
            "index": index,
            "model": request.model,
            "quality": request.resolved_quality,
            "size": request.resolved_size,
            "watermark_enabled": request.watermark_enabled,
        }
        told = json.dumps(decides, sort_keys=True, separators=(",", ":"))
        llm_string = f"{KEY_PREFIX}{ENTRY_VERSION}:{told}"
        return cls(request.prompt, llm_string, hashlib.sha256(f"{llm_string}\n{request.prompt}".encode()).hexdigest())


class Entries(Protocol):
    """Where entries are. A read or write may raise anything."""

    @property
    def place(self) -> Hashable:
        """The same for two that share their entries."""

    def read(self, key: CacheKey) -> str | None:
        """The text of an entry; None where there is none."""

    async def aread(self, key: CacheKey) -> str | None:
        """Async version of `read`."""

    def write(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        """Record a picture; its bytes are kept where `bytes_path` says."""

    async def awrite(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        """Async version of `write`."""

    def bytes_path(self, image: GeneratedImage) -> Path | None:
        """Where the bytes of a picture are kept; None where they are not."""


class _Identity:
    """Equal for the same object alone, and for none once that is gone."""

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
    """Entries in a LangChain cache: the text of one `Generation`, which every such cache can serialize."""

    cache: BaseCache

    @property
    def place(self) -> Hashable:
        """The cache itself; it need not be hashable."""
        return _Identity(self.cache)

    def read(self, key: CacheKey) -> str | None:
        """The text of an entry; of something foreign an empty one."""
        return self._text(self.cache.lookup(key.prompt, key.llm_string))

    async def aread(self, key: CacheKey) -> str | None:
        """Async version of `read`."""
        if (
            type(self.cache).alookup is BaseCache.alookup
        ):  # it has none: LangChain's would wait for the application's threads
            return await in_thread(self.read, key)
        return self._text(await self.cache.alookup(key.prompt, key.llm_string))

    def write(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        """Record a picture without its bytes."""
        self.cache.update(key.prompt, key.llm_string, [Generation(text=to_entry(key, image))])

    async def awrite(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        """Async version of `write`."""
        if type(self.cache).aupdate is BaseCache.aupdate:
            await in_thread(self.write, key, image, content)
            return
        await self.cache.aupdate(key.prompt, key.llm_string, [Generation(text=to_entry(key, image))])

    def bytes_path(self, image: GeneratedImage) -> Path | None:
        """None: a LangChain cache holds text."""
        return None

    @staticmethod
    def _text(found: Any) -> str | None:
        if not found:
            return None
        first = found[0] if isinstance(found, list | tuple) else None
        return first.text if isinstance(first, Generation) else ""


@dataclass(frozen=True, slots=True)
class DirectoryEntries:
    """Entries and the bytes of their pictures in a directory of this machine, which is made when it is needed.

    Each file is written whole or not at all, the bytes before the entry that tells of them: several processes may write at
    once, and be killed. Nothing is ever listed, and nothing is deleted by itself.
    """

    directory: Path

    @property
    def place(self) -> Hashable:
        """The directory."""
        return self.directory

    def read(self, key: CacheKey) -> str | None:
        """The text of an entry; None where there is none."""
        try:
            return read_regular_file(self._path(key), _MAX_ENTRY_BYTES).decode("utf-8", "replace")
        except FileNotFoundError:
            return None

    async def aread(self, key: CacheKey) -> str | None:
        """Async version of `read`."""
        return await in_thread(self.read, key)

    def write(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        """Keep a picture's bytes, where they are given, and record it."""
        path = self.bytes_path(image)
        if path and content is not None and whole(path, image) is None:
            replace_file(path, content)
        replace_file(self._path(key), to_entry(key, image).encode())

    async def awrite(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        """Async version of `write`."""
        await in_thread(self.write, key, image, content)

    def bytes_path(self, image: GeneratedImage) -> Path | None:
        """Where the bytes of a picture are kept; None where they were never fetched."""
        if image.sha256 is None:
            return None
        name = image.sha256 + EXTENSIONS.get(image.mime_type or "", "")
        return self.directory / "pictures" / image.sha256[:2] / name

    def _path(self, key: CacheKey) -> Path:
        return self.directory / "entries" / key.digest[:2] / f"{key.digest}.json"


def to_entry(key: CacheKey, image: GeneratedImage) -> str:
    """The JSON text of an entry."""
    entry = {"type": ENTRY_TYPE, "version": ENTRY_VERSION, "key": key.digest, "image": image.model_dump(mode="json")}
    return json.dumps(entry, ensure_ascii=False)


def from_entry(key: CacheKey, text: str) -> GeneratedImage | None:
    """The picture of an entry; None where the text is damaged, or of something else than this very request."""
    try:
        return _parsed(key, text)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        logger.warning("An entry of the cache is passed over: it is damaged or foreign (%s).", type(error).__name__)
        return None


def _parsed(key: CacheKey, text: str) -> GeneratedImage:
    entry = json.loads(text)
    if (entry["type"], entry["version"], entry["key"]) != (ENTRY_TYPE, ENTRY_VERSION, key.digest):
        raise ValueError("It is of another request.")
    image = GeneratedImage.model_validate(entry["image"])
    if image.sha256 is not None and not _SHA256.fullmatch(image.sha256):
        raise ValueError("It has something else for a hash.")
    return image


def whole(path: Path, image: GeneratedImage) -> bytes | None:
    """The bytes of a file, if they are the picture's as recorded; None where they are not, or it cannot be read."""
    try:
        content = read_regular_file(path, MAX_IMAGE_BYTES)
    except (OSError, ValueError) as error:
        if raised_by_signal(error):
            raise
        return None
    return content if is_picture(content, image) else None


def is_picture(content: bytes, image: GeneratedImage) -> bool:
    """Whether these are the bytes of a picture as recorded."""
    alike = len(content) == image.size_bytes and sniff(content[:32]) == (image.mime_type or "")
    return alike and hashlib.sha256(content).hexdigest() == image.sha256
