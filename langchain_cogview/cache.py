"""The same request gives the same image without paying: what a generator's `cache=` does.

A cached image is a hit when its bytes can be read as they were recorded, from a file, from remote storage, or through its URL
before that expires. A cache that fails costs neither an image nor a call: the request goes to the service, and the result has a
warning.

Equal requests in one process are single-flight, so a batch with duplicates pays once. Processes share what is stored, and do not
wait for each other.

An entry is the JSON of an image, never its bytes. It is in a LangChain cache, or in a directory, which stores the bytes too:

    directory/entries/ab/abcd….json   the metadata of an image, named after the hash of its request
    directory/images/12/1234….png     the bytes of an image, named after their own hash, so equal images are stored once
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import weakref
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import quote

from langchain_core.caches import BaseCache
from langchain_core.outputs import Generation

from langchain_cogview.concurrency import Deadline, in_thread, raised_by_signal, runs_event_loop
from langchain_cogview.errors import CogViewConfigurationError, CogViewError, CogViewStorageError, printable
from langchain_cogview.images.download import DownloadedImage, expires_at
from langchain_cogview.images.formats import EXTENSIONS, MAX_IMAGE_BYTES, sniff
from langchain_cogview.images.remote import ImageAccess
from langchain_cogview.images.store import image_names, local_path, read_regular_file, reason, replace_file, save_once
from langchain_cogview.result import GeneratedImage, with_content
from langchain_cogview.text import unsaved_note

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Iterator

    from langchain_cogview.images.folders import Folder
    from langchain_cogview.request import ImageRequest

UNDATED_URL_LIFETIME: Final = timedelta(hours=24)
"""How long a URL without an expiry time is taken to be valid: the shortest lifetime that was seen."""

_ENTRY_TYPE: Final = "cogview.cached_image"
_ENTRY_VERSION: Final = 1
"""Part of every key. A format that old versions would misread gets a higher number, and old entries are not found any more."""
_KEY_PREFIX: Final = "langchain-cogview:"
_MAX_ENTRY_BYTES: Final = 4 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_NAMES: Final = 99
_MAX_REASON_CHARACTERS: Final = 160
_REVEALING_CHARACTERS: Final = 8
"""A text that holds this many consecutive characters of a prompt reveals some of it."""
_MAX_COMPARED_CHARACTERS: Final = 10_000
_CREDENTIALS: Final = re.compile(r"//[^/\s]*@")
_MAX_FAILING: Final = 1000
_FAILING: Final[set[tuple[Hashable, str]]] = set()
"""The caches of this process whose last read or write failed, with which of the two it was."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one letter alone is a Windows drive; Path("s3://b") is "s3:/b"

logger = logging.getLogger(__name__)


def image_cache(cache: BaseCache | str | Path) -> Entries:
    """Check what `cache=` names.

    Args:
        cache: A LangChain cache, or a directory on this machine, which is created when it is needed.

    Returns:
        Where the entries are stored. It holds settings only, so threads, event loops and generators can share it.

    Raises:
        CogViewConfigurationError: `cache` is neither.
    """
    if isinstance(cache, BaseCache):
        return _LangChainEntries(cache)
    if isinstance(cache, str | Path):
        return _DirectoryEntries(_directory(str(cache)))
    shown = f"={cache}" if cache is None or isinstance(cache, bool) else f" of type {type(cache).__name__}"
    raise CogViewConfigurationError(
        f"cache{shown} is neither a LangChain cache nor a directory.",
        hint="Pass one, such as InMemoryCache() from langchain_core.caches, or the path of a directory; None means no cache.",
    )


def _directory(text: str) -> Path:
    if not text.strip() or "\0" in text or _URL.match(text):
        raise CogViewConfigurationError(
            "cache= does not name a directory on this machine.",
            hint="Pass a path; for a server such as Redis, pass LangChain's cache object for it.",
        )
    path = local_path(text, "cache")
    try:
        # Absolute, because the program may change its current folder later.
        path = path.absolute()
    except FileNotFoundError:
        raise CogViewConfigurationError(
            f"cache={printable(text, 120)!r} is relative to the current folder, which does not exist any more.",
            hint="Pass an absolute path.",
        ) from None
    except Exception:  # a server may refuse blocking calls on its event loop, where the generator is created
        logger.debug("The current folder could not be determined.", exc_info=True)
    with contextlib.suppress(OSError):  # each call reports that the directory cannot be used
        if not runs_event_loop() and path.exists() and not path.is_dir():
            raise CogViewConfigurationError(
                f"cache={printable(text, 120)!r} is a file, not a directory.", hint="Pass another path."
            )
    return path


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Everything that determines an image, in the two strings that a `BaseCache` takes."""

    prompt: str
    """The prompt, verbatim."""
    llm_string: str
    """Everything else, as canonical JSON behind a prefix with the version."""
    digest: str
    """SHA-256 of both, in hexadecimal."""

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
        llm_string = f"{_KEY_PREFIX}{_ENTRY_VERSION}:{canonical}"
        return cls(request.prompt, llm_string, hashlib.sha256(f"{llm_string}\n{request.prompt}".encode()).hexdigest())


class _Identity:
    """Equal for the same object only, and for nothing once that object is gone."""

    def __init__(self, of: Any) -> None:
        self._hash = id(of)
        self._object = weakref.ref(of)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._object() is other._object() is not None

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, slots=True)
class _LangChainEntries:
    """Entries in a LangChain cache: the text of one `Generation`, which every such cache can serialize."""

    cache: BaseCache

    @property
    def identity(self) -> Hashable:
        """Equal for two objects that share their entries; the cache itself need not be hashable."""
        return _Identity(self.cache)

    def read(self, key: CacheKey) -> str | None:
        """Return the text of an entry, empty where the cache returns something foreign; None where there is none."""
        return self._text(self.cache.lookup(key.prompt, key.llm_string))

    async def aread(self, key: CacheKey) -> str | None:
        # LangChain's default would use the event loop's executor, which the application may have filled with its own threads.
        if type(self.cache).alookup is BaseCache.alookup:
            return await in_thread(self.read, key)
        return self._text(await self.cache.alookup(key.prompt, key.llm_string))

    def write(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        """Write an entry; the bytes of the image are not stored."""
        self.cache.update(key.prompt, key.llm_string, [Generation(text=_to_entry(key, image))])

    async def awrite(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        if type(self.cache).aupdate is BaseCache.aupdate:
            await in_thread(self.write, key, image, content)
        else:
            await self.cache.aupdate(key.prompt, key.llm_string, [Generation(text=_to_entry(key, image))])

    def bytes_path(self, image: GeneratedImage) -> Path | None:
        """Return None: a LangChain cache stores text only."""
        return None

    @staticmethod
    def _text(value: Any) -> str | None:
        if not value:
            return None
        first = value[0] if isinstance(value, list | tuple) else None
        return first.text if isinstance(first, Generation) else ""


@dataclass(frozen=True, slots=True)
class _DirectoryEntries:
    """Entries and the bytes of their images in a directory on this machine, which is created when it is needed.

    Each file is written completely or not at all, and the bytes of an image before its entry, so several processes may write at
    the same time, and may be killed. The directory is never listed, and nothing in it is ever deleted.
    """

    directory: Path

    @property
    def identity(self) -> Hashable:
        """Equal for two objects that share their entries: the directory."""
        return self.directory

    def read(self, key: CacheKey) -> str | None:
        """Return the text of an entry; None where there is none."""
        try:
            return read_regular_file(self._path(key), _MAX_ENTRY_BYTES).decode("utf-8", "replace")
        except FileNotFoundError:
            return None

    async def aread(self, key: CacheKey) -> str | None:
        return await in_thread(self.read, key)

    def write(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        """Write an entry after the bytes of its image, where there are any."""
        path = self.bytes_path(image)
        if path and content is not None and _read_intact(path, image) is None:
            replace_file(path, content)
        replace_file(self._path(key), _to_entry(key, image).encode())

    async def awrite(self, key: CacheKey, image: GeneratedImage, content: bytes | None) -> None:
        await in_thread(self.write, key, image, content)

    def bytes_path(self, image: GeneratedImage) -> Path | None:
        """Return the file for the bytes of an image; None where they were never downloaded."""
        if image.sha256 is None:
            return None
        name = image.sha256 + EXTENSIONS.get(image.mime_type or "", "")
        return self.directory / "images" / image.sha256[:2] / name

    def _path(self, key: CacheKey) -> Path:
        return self.directory / "entries" / key.digest[:2] / f"{key.digest}.json"


Entries = _LangChainEntries | _DirectoryEntries
"""Where entries are stored. Errors of file systems and caches are raised as they are."""


@dataclass(frozen=True, slots=True)
class CachedRequest:
    """The cache for one request: looks its images up and stores them. An error of the cache becomes a note, not an exception."""

    entries: Entries
    """Where the entries are stored."""
    request: ImageRequest
    """The request that is looked up."""
    base_url: str
    """Normalised base URL of the service; a part of the key."""
    download: bool = True
    """Whether the caller wants the bytes. False: it wants the URL, and a valid URL makes a hit."""
    folder: Path | Folder | None = None
    """The folder where the caller wants the file; None keeps the image in memory."""
    allowed_hosts: tuple[str, ...] | None = None
    """The only hosts that the image's own `read` may download from; None allows any public host."""
    timeout: float | None = 60.0
    """Limit in seconds for reads from and uploads to remote storage during a lookup; None: no limit."""
    notes: list[str] = field(default_factory=list)
    """Failures of the cache itself, for the warnings of the result."""

    def flight_key(self, index: int) -> Hashable:
        """Identify the work on one image for `SINGLE_FLIGHT`, so that equal requests in one process pay once.

        Args:
            index: Number of the image in the request, from 0.

        Returns:
            The key: equal for the same image in the same cache.
        """
        return self.entries.identity, self._key(index).digest

    def lookup(
        self, index: int, refetch: Callable[[str], DownloadedImage | CogViewError | None]
    ) -> GeneratedImage | None:
        """Find an image that was generated before and whose bytes can still be read.

        Args:
            index: Number of the image in the request, from 0.
            refetch: Downloads a URL again, which is free, into the caller's folder or memory, by the caller's rules. A
                `CogViewError`, returned or raised, means that there is no hit.

        Returns:
            The image as it was generated, with `cached=True` and a cost of 0; None where there is no hit.
        """
        with self._guarded("read"):
            key = self._key(index)
            recorded = self._recorded(key, self.entries.read(key))
            if recorded is None or not self.download:
                return recorded and self._hit_by_url(recorded)
            hit = self._hit_by_file(recorded)
            url = None if hit else _valid_url(recorded)
            if url is None:
                return hit
            image = self._refetched(recorded, refetch(url))
            if image:
                self._write(key, image)
                return self._hit(image)
        return None

    async def alookup(
        self, index: int, refetch: Callable[[str], Awaitable[DownloadedImage | CogViewError | None]]
    ) -> GeneratedImage | None:
        """Async version of `lookup`. Files and remote storage are read in threads.

        Returns:
            The image; None where there is no hit.
        """
        with self._guarded("read"):
            key = self._key(index)
            recorded = self._recorded(key, await self.entries.aread(key))
            if recorded is None or not self.download:
                return recorded and self._hit_by_url(recorded)
            hit = await in_thread(self._hit_by_file, recorded)
            url = None if hit else _valid_url(recorded)
            if url is None:
                return hit
            image = await in_thread(self._refetched, recorded, await refetch(url))
            if image:
                await self._awrite(key, image)
                return self._hit(image)
        return None

    def store(self, index: int, image: GeneratedImage) -> None:
        """Store an image that was just generated.

        Args:
            index: Number of the image in the request, from 0.
            image: The image as the caller gets it. It is not stored if it came from a cache, if another model generated it than
                the request names, or if it has neither bytes nor a valid URL.
        """
        if self._is_storable(image):
            self._write(self._key(index), image)

    async def astore(self, index: int, image: GeneratedImage) -> None:
        """Async version of `store`."""
        if self._is_storable(image):
            await self._awrite(self._key(index), image)

    def _write(self, key: CacheKey, image: GeneratedImage) -> None:
        with self._guarded("written"):
            content = self._readable(image) if self.entries.bytes_path(image) else None
            self.entries.write(key, image, content)

    async def _awrite(self, key: CacheKey, image: GeneratedImage) -> None:
        with self._guarded("written"):
            content = await in_thread(self._readable, image) if self.entries.bytes_path(image) else None
            await self.entries.awrite(key, image, content)

    # --- reading and writing files and remote storage

    def _hit_by_file(self, recorded: GeneratedImage) -> GeneratedImage | None:
        """Return a hit if a file or an object of remote storage has the bytes as they were recorded."""
        if recorded.sha256 is None:
            return None
        deadline = Deadline(self.timeout)
        in_folder = self._locations_in_folder(recorded)
        others = [self.entries.bytes_path(recorded), recorded.path, recorded.uri]
        for location in dict.fromkeys([*in_folder, *(other for other in others if other is not None)]):
            content = self._read(location, recorded, deadline)
            if content is None:
                continue
            fields = {"path": location, "uri": None} if isinstance(location, Path) else {"path": None, "uri": location}
            if location in in_folder:
                return self._hit(recorded, **fields)
            if self.folder is None:
                return self._hit(recorded, content=content, **fields)
            return self._saved(recorded, content, self.folder, deadline)
        return None

    def _locations_in_folder(self, recorded: GeneratedImage) -> list[Path | str]:
        """Return where in the caller's folder the image can be."""
        if self.folder is None:
            return []
        name = _names(recorded)[0]
        if isinstance(self.folder, Path):
            folder = self.folder.resolve()
            return [*([recorded.path] if recorded.path and recorded.path.parent == folder else []), folder / name]
        root = f"{self.folder.url.rstrip('/')}/"
        return [*([recorded.uri] if recorded.uri and recorded.uri.startswith(root) else []), root + name]

    def _read(self, location: Path | str, recorded: GeneratedImage, deadline: Deadline) -> bytes | None:
        """Return the bytes of a local file or of an object of remote storage, if they are as recorded."""
        if isinstance(location, Path):
            return _read_intact(location, recorded)
        try:
            content = self._access().read_uri(location, seconds=deadline.remaining())
        except CogViewStorageError:
            return None
        return content if _is_intact(content, recorded) else None

    def _saved(
        self, recorded: GeneratedImage, content: bytes, folder: Path | Folder, deadline: Deadline
    ) -> GeneratedImage:
        names = _names(recorded)
        try:
            if isinstance(folder, Path):
                return self._hit(recorded, path=save_once(folder, names, content), uri=None)
            return self._hit(recorded, path=None, uri=folder.upload(names, content, deadline))
        except OSError as error:
            if raised_by_signal(error):
                raise
            note = unsaved_note(folder, reason(error))
            return self._hit(recorded, path=None, uri=None, content=content, warnings=(note,))

    def _refetched(
        self, recorded: GeneratedImage, fetched: DownloadedImage | CogViewError | None
    ) -> GeneratedImage | None:
        """Return the recorded image with the bytes of its URL; None where there are none, or those of another image."""
        if not isinstance(fetched, DownloadedImage):
            return None
        if recorded.sha256 not in {None, fetched.sha256}:
            logger.warning("The URL of a cached image returns another image now, which is not used.")
            if fetched.path:
                with contextlib.suppress(OSError):
                    fetched.path.unlink()
            return None
        warnings = (unsaved_note(self.folder, fetched.problem),) if fetched.problem else ()
        image = recorded.model_copy(update={**fetched.fields, "warnings": warnings})
        return with_content(image, fetched.content, self._access())

    def _readable(self, image: GeneratedImage) -> bytes | None:
        """Return the bytes of an image, wherever they are; None where they cannot be read."""
        content = None
        with contextlib.suppress(CogViewStorageError):
            content = image.local_bytes()
        if content is not None and _is_intact(content, image):
            return content
        return self._read(image.uri, image, Deadline(self.timeout)) if image.uri else None

    # --- pure decisions

    def _recorded(self, key: CacheKey, text: str | None) -> GeneratedImage | None:
        """Return the image of an entry; None where there is no entry, or where it is damaged."""
        recorded = None if text is None else from_entry(key, text)
        # The old warnings are about old files; this call adds its own.
        return recorded and with_content(recorded.model_copy(update={"warnings": ()}), None, self._access())

    def _hit_by_url(self, recorded: GeneratedImage) -> GeneratedImage | None:
        # Path and URI were not read, so the hit does not name them.
        return self._hit(recorded, path=None, uri=None) if _valid_url(recorded, undated=UNDATED_URL_LIFETIME) else None

    def _is_storable(self, image: GeneratedImage) -> bool:
        return (
            not image.cached
            and image.model == self.request.model
            and bool(image.sha256 or _valid_url(image, undated=UNDATED_URL_LIFETIME))
        )

    def _key(self, index: int) -> CacheKey:
        return CacheKey.of(self.request, index, self.base_url)

    def _hit(self, recorded: GeneratedImage, *, content: bytes | None = None, **changes: Any) -> GeneratedImage:
        hit = recorded.model_copy(update={"cached": True, "cost": Decimal(0), **changes})
        return hit if content is None else with_content(hit, content, self._access())

    def _access(self) -> ImageAccess:
        # Somebody else may have written the URI of an entry, so the folder's credentials are used for its own bucket only.
        return ImageAccess.of_generator(self.base_url, self.allowed_hosts, self.folder)

    @contextlib.contextmanager
    def _guarded(self, what: Literal["read", "written"]) -> Iterator[None]:
        """Turn an error of the cache into a note, so that it costs neither an image nor the call.

        The first error is logged in one line; the same cache is not logged again until it has worked in between.
        """
        failing = (self.entries.identity, what)
        try:
            yield
        except CogViewError:  # raised by `refetch`: there is no hit
            return
        except Exception as error:  # a LangChain cache can raise any class
            if raised_by_signal(error):
                raise
            note = f"The cache could not be {what}: {printable(str(reason(error)), 80)}."
            if not self.notes and failing not in _FAILING:
                if len(_FAILING) >= _MAX_FAILING:
                    _FAILING.clear()
                _FAILING.add(failing)
                logger.warning(
                    "The cache could not be %s (%s). Calls go on without it; this is not logged again until it works.",
                    what,
                    _describe(error, self.request.prompt),
                )
            if note not in self.notes:
                self.notes.append(note)
        else:
            _FAILING.discard(failing)


def _describe(error: Exception, prompt: str) -> str:
    """Return class and message of an error, in one short line without the prompt, the cache key or credentials."""
    name = type(error).__name__
    try:
        lines = str(error).splitlines()
    except Exception:  # noqa: BLE001  the error's own __str__ can fail
        return name
    text = printable(_CREDENTIALS.sub("//", lines[0]), _MAX_REASON_CHARACTERS) if lines else ""
    return f"{name}: {text}" if text and not _reveals(text, prompt) else name


def _reveals(text: str, prompt: str) -> bool:
    """Return whether a text holds a cache key or a part of the prompt, in a form in which programs write it."""
    if _KEY_PREFIX in text:
        return True
    forms = {prompt, ascii(prompt)[1:-1], json.dumps(prompt)[1:-1], quote(prompt)}
    return any(
        form[start : start + _REVEALING_CHARACTERS] in text
        for form in forms
        for start in range(max(1, min(len(form), _MAX_COMPARED_CHARACTERS) - _REVEALING_CHARACTERS + 1))
    )


def _valid_url(image: GeneratedImage, *, undated: timedelta | None = None) -> str | None:
    """Return the URL of an image if it has not expired; one without an expiry time lasts `undated`, or (None) for ever."""
    now, expiry = datetime.now(UTC), expires_at(image.url or "")
    if expiry is None and undated is not None:
        is_valid = image.created is not None and now.timestamp() < image.created + undated.total_seconds()
    else:
        is_valid = expiry is None or expiry > now
    return image.url if is_valid else None


def _names(image: GeneratedImage) -> list[str]:
    """Return file names for saving an image again. They are always the same, so that further hits add no files."""
    label = re.sub(r"[^0-9A-Za-z]", "_", image.request_id[:8])
    parts = label, str(image.sha256), EXTENSIONS.get(image.mime_type or "", "")
    try:
        names = image_names(*parts, moment=image.created or 0)
    except (ValueError, OverflowError, OSError):  # outside of the calendar
        names = image_names(*parts, moment=0)
    return [*islice(names, _MAX_NAMES)]


def _to_entry(key: CacheKey, image: GeneratedImage) -> str:
    entry = {"type": _ENTRY_TYPE, "version": _ENTRY_VERSION, "key": key.digest, "image": image.model_dump(mode="json")}
    return json.dumps(entry, ensure_ascii=False)


def from_entry(key: CacheKey, text: str) -> GeneratedImage | None:
    """Parse an entry, which anybody may have written.

    Returns:
        The image of the entry; None where the text is damaged, or belongs to another request.
    """
    try:
        entry = json.loads(text)
        image = GeneratedImage.model_validate(entry["image"])
        is_own = (entry["type"], entry["version"], entry["key"]) == (_ENTRY_TYPE, _ENTRY_VERSION, key.digest)
        if is_own and (image.sha256 is None or _SHA256.fullmatch(image.sha256)):
            return image
        why = "ValueError"
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        why = type(error).__name__
    logger.warning("An entry of the cache is ignored: it is damaged or foreign (%s).", why)
    return None


def _read_intact(path: Path, image: GeneratedImage) -> bytes | None:
    # None where the bytes are not those of the image, or cannot be read.
    try:
        content = read_regular_file(path, MAX_IMAGE_BYTES)
    except (OSError, ValueError) as error:
        if raised_by_signal(error):
            raise
        return None
    return content if _is_intact(content, image) else None


def _is_intact(content: bytes, image: GeneratedImage) -> bool:
    """Return whether bytes have the recorded size, format and hash of an image."""
    matches = len(content) == image.size_bytes and sniff(content[:32]) == (image.mime_type or "")
    return matches and hashlib.sha256(content).hexdigest() == image.sha256
