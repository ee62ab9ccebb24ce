"""The same request gives the same picture without paying: what a generator's `cache=` does.

A cached picture is a hit when it can be had as it was made: from a file whose bytes are those recorded, or through its link
while that lives. A cache that fails costs no picture and no call: the request goes to the service, and a note tells of it.

Equal requests under way at once in one process can take turns, so that a batch with duplicates pays once. Processes share what
is stored, and do not wait for each other.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import quote

from langchain_core.caches import BaseCache

from langchain_cogview.cache_entries import (
    KEY_PREFIX,
    CacheKey,
    DirectoryEntries,
    Entries,
    LangChainEntries,
    from_entry,
    is_picture,
    whole,
)
from langchain_cogview.concurrency import SINGLE_FLIGHT, Deadline, in_thread, raised_by_signal, runs_event_loop
from langchain_cogview.errors import CogViewConfigurationError, CogViewError, CogViewStorageError, printable
from langchain_cogview.images.download import DownloadedImage, expires_at
from langchain_cogview.images.formats import EXTENSIONS, MAX_IMAGE_BYTES
from langchain_cogview.images.remote import ImageAccess
from langchain_cogview.images.store import image_names, local_path, read_regular_file, replace_file

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Iterator
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    from langchain_cogview.images.remote import RemoteFolder
    from langchain_cogview.request import ImageRequest
    from langchain_cogview.result import GeneratedImage

UNDATED_LINK_LIFETIME: Final = timedelta(hours=24)
"""How long a link that does not tell its end is taken to live: the shortest life that was seen."""

_MAX_NAMES: Final = 99
_MAX_TOLD: Final = 160
_TELLING: Final = 8
"""So many characters of a prompt in a row tell something of it."""
_MAX_COMPARED: Final = 10_000
_CREDENTIALS: Final = re.compile(r"//[^/\s]*@")
_MAX_FAILING: Final = 1000
_FAILING: Final[set[tuple[Hashable, str]]] = set()
"""The caches of this process that could not be read or written the last time."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one letter alone is a Windows drive; Path("s3://b") is "s3:/b"

logger = logging.getLogger(__name__)


def image_cache(given: BaseCache | str | Path) -> ImageCache:
    """The cache that was asked for with `cache=`.

    Args:
        given: A LangChain cache, or a directory of this machine, which is made when it is needed.

    Raises:
        CogViewConfigurationError: When it is neither.
    """
    if isinstance(given, BaseCache):
        return ImageCache(LangChainEntries(given))
    if isinstance(given, str | Path):
        return ImageCache(DirectoryEntries(_directory(str(given))))
    shown = f"={given}" if given is None or isinstance(given, bool) else f" of type {type(given).__name__}"
    raise CogViewConfigurationError(
        f"cache{shown} is neither a LangChain cache nor a directory.",
        hint="Give one, such as InMemoryCache() from langchain_core.caches, or the path of a directory; None: no cache.",
    )


def _directory(text: str) -> Path:
    if not text.strip() or "\0" in text or _URL.match(text):
        raise CogViewConfigurationError(
            "cache= is a text that names no directory of this machine.",
            hint="Give a path; for a server such as Redis, give LangChain's cache object for it.",
        )
    path = local_path(text, "cache")
    try:
        # Found from wherever the program goes later.
        path = path.absolute()
    except FileNotFoundError:
        raise CogViewConfigurationError(
            f"cache={printable(text, 120)!r} is in the current folder, which does not exist any more.",
            hint="Pass an absolute path.",
        ) from None
    except Exception:  # a server's protection of its event loop, where a generator is made or configured there
        logger.debug("The current folder could not be asked for", exc_info=True)
    if not runs_event_loop() and _is_file(path):
        raise CogViewConfigurationError(
            f"cache={printable(text, 120)!r} is a file, not a directory.", hint="Give another path."
        )
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()
    except OSError:  # it cannot be looked at now: each call tells
        return False


@dataclass(frozen=True, slots=True)
class ImageCache:
    """The cache of a generator. Settings alone: threads, event loops and generators can share it.

    Attributes:
        entries: In a LangChain cache, or in a directory.
    """

    entries: Entries

    def request(
        self,
        request: ImageRequest,
        *,
        base_url: str,
        download: bool = True,
        folder: Path | RemoteFolder | None = None,
        allowed_hosts: tuple[str, ...] | None = None,
        timeout: float | None = 60.0,
    ) -> CachedRequest:
        """The cache as one request sees it.

        Args:
            request: What is asked for.
            base_url: Where the service is, normalised; a part of the key.
            download: Whether the caller wants the bytes. False: it wants the link, and one that lives is what makes a hit.
            folder: Where the caller wants the file; None: in memory.
            allowed_hosts: The only hosts that the picture's own `read` fetches from; None: any public one.
            timeout: Seconds for a look-up's reads from and uploads to elsewhere; None: no limit.
        """
        return CachedRequest(self.entries, request, base_url, download, folder, allowed_hosts, timeout)


@dataclass(frozen=True, slots=True)
class CachedRequest:
    """The cache as one request sees it: looks its pictures up and stores them, and never raises.

    Attributes:
        notes: What went wrong with the cache itself, for the result's warnings.
    """

    entries: Entries
    request: ImageRequest
    base_url: str
    download: bool
    folder: Path | RemoteFolder | None
    allowed_hosts: tuple[str, ...] | None
    timeout: float | None
    notes: list[str] = field(default_factory=list)

    def flight(self, index: int, seconds: float | None) -> AbstractContextManager[None]:
        """Wait until no other call in this process is at the same picture, then keep others waiting until the block ends.

        Looking up, drawing and storing inside it makes equal requests pay once. Nobody may wait in it for a place in flight
        that another waiter of the same turn holds.

        Args:
            index: Which of the `n`.
            seconds: How long to wait at most; after that the block begins all the same. None: as long as it takes.
        """
        return SINGLE_FLIGHT.flight((self.entries.place, self._key(index).digest), seconds)

    def aflight(self, index: int, seconds: float | None) -> AbstractAsyncContextManager[None]:
        """The twin of `flight`."""
        return SINGLE_FLIGHT.aflight((self.entries.place, self._key(index).digest), seconds)

    def lookup(
        self, index: int, refetch: Callable[[str], DownloadedImage | CogViewError | None]
    ) -> GeneratedImage | None:
        """The image number `index` (from 0) of the request, if it was made before and its bytes can still be read.

        Args:
            index: Which of the `n`.
            refetch: Fetches a link again (free) into the caller's folder or memory, by the caller's rules. A `CogViewError`,
                returned or raised, means that there is no hit.

        Returns:
            The image as it was made, with `cached=True` and a cost of 0; None: not a hit.
        """
        with self._guarded("read"):
            key = self._key(index)
            recorded = self._recorded(key, self.entries.read(key))
            if recorded is None or not self.download:
                return recorded and self._hit_by_link(recorded)
            hit = self._hit_by_file(recorded)
            url = None if hit else _living_url(recorded)
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
        """Async version of `lookup`; files and stores are read in threads."""
        with self._guarded("read"):
            key = self._key(index)
            recorded = self._recorded(key, await self.entries.aread(key))
            if recorded is None or not self.download:
                return recorded and self._hit_by_link(recorded)
            hit = await in_thread(self._hit_by_file, recorded)
            url = None if hit else _living_url(recorded)
            if url is None:
                return hit
            image = await in_thread(self._refetched, recorded, await refetch(url))
            if image:
                await self._awrite(key, image)
                return self._hit(image)
        return None

    def store(self, index: int, image: GeneratedImage) -> None:
        """Remember an image that was made just now.

        Args:
            index: Which of the `n`.
            image: As the caller gets it. What came from a cache, what another model made than the request names, and what has
                neither bytes nor a living link is not stored.
        """
        if self._is_storable(image):
            self._write(self._key(index), image)

    async def astore(self, index: int, image: GeneratedImage) -> None:
        """Async version of `store`."""
        if self._is_storable(image):
            await self._awrite(self._key(index), image)

    def _write(self, key: CacheKey, image: GeneratedImage) -> None:
        with self._guarded("written"):
            self.entries.write(key, image, self._content_to_keep(image))

    async def _awrite(self, key: CacheKey, image: GeneratedImage) -> None:
        with self._guarded("written"):
            keeps = self.entries.bytes_path(image) is not None
            content = await in_thread(self._content_to_keep, image) if keeps else None
            await self.entries.awrite(key, image, content)

    # --- these read and write files and stores

    def _hit_by_file(self, recorded: GeneratedImage) -> GeneratedImage | None:
        """The hit where the bytes are in a file or a store, as they were recorded."""
        if recorded.sha256 is None:
            return None
        deadline = Deadline(self.timeout)
        own = self._own_places(recorded)
        others = [self.entries.bytes_path(recorded), recorded.path, recorded.uri]
        for place in dict.fromkeys([*own, *(other for other in others if other is not None)]):
            content = self._read(place, recorded, deadline)
            if content is None:
                continue
            if place in own:
                return self._hit(recorded, **_where(place))
            if self.folder is None:
                return self._hit(recorded, content=content, **_where(place))
            return self._saved(recorded, content, self.folder, deadline)
        return None

    def _own_places(self, recorded: GeneratedImage) -> list[Path | str]:
        """Where in the caller's folder the image is, if it is there."""
        if self.folder is None:
            return []
        if isinstance(self.folder, Path):
            folder = self.folder.resolve()
            first = [recorded.path] if recorded.path and recorded.path.parent == folder else []
            return [*first, folder / _names(recorded)[0]]
        root = f"{self.folder.url.rstrip('/')}/"
        return [*([recorded.uri] if recorded.uri and recorded.uri.startswith(root) else []), root + _names(recorded)[0]]

    def _read(self, place: Path | str, recorded: GeneratedImage, deadline: Deadline) -> bytes | None:
        """The bytes of a file here or elsewhere, if they are as recorded."""
        if isinstance(place, Path):
            return whole(place, recorded)
        try:
            content = self._access().read_uri(place, seconds=deadline.remaining())
        except CogViewStorageError:
            return None
        return content if is_picture(content, recorded) else None

    def _saved(
        self, recorded: GeneratedImage, content: bytes, folder: Path | RemoteFolder, deadline: Deadline
    ) -> GeneratedImage:
        """The image with a file in the caller's folder, as the caller would have got it when it was made."""
        names = _names(recorded)
        try:
            if isinstance(folder, Path):
                return self._hit(recorded, path=_save(folder, names, content), uri=None)
            return self._hit(recorded, path=None, uri=folder.upload(names, content, deadline))
        except OSError as error:
            if raised_by_signal(error):
                raise
            note = _unsaved(folder, error.strerror or type(error).__name__)
            return self._hit(recorded, path=None, uri=None, content=content, warnings=(note,))

    def _refetched(
        self, recorded: GeneratedImage, fetched: DownloadedImage | CogViewError | None
    ) -> GeneratedImage | None:
        """The recorded image with the bytes that its link gave; None where it gave none, or those of another image."""
        if not isinstance(fetched, DownloadedImage):
            return None
        if recorded.sha256 not in {None, fetched.sha256}:
            logger.warning("The link of a cached picture gives another one now, which is not used.")
            if fetched.path:
                with contextlib.suppress(OSError):
                    fetched.path.unlink()
            return None
        facts = {
            "path": fetched.path,
            "uri": fetched.uri,
            "mime_type": fetched.info.mime_type,
            "width": fetched.info.width,
            "height": fetched.info.height,
            "size_bytes": fetched.size_bytes,
            "sha256": fetched.sha256,
            "warnings": (_unsaved(self.folder, fetched.problem),) if fetched.problem else (),
        }
        image = recorded.model_copy(update=facts)
        return image.with_content(fetched.content, self._access())

    def _content_to_keep(self, image: GeneratedImage) -> bytes | None:
        """The bytes of an image for a cache that keeps them; None for one that does not, or where they cannot be read."""
        if self.entries.bytes_path(image) is None:
            return None
        content = _local_bytes(image)
        return self._read(image.uri, image, Deadline(self.timeout)) if content is None and image.uri else content

    # --- pure decisions

    def _recorded(self, key: CacheKey, text: str | None) -> GeneratedImage | None:
        """The image of an entry; None where there is none, or where it is damaged."""
        recorded = None if text is None else from_entry(key, text)
        if recorded is None:
            return None
        # What was told of its files then is told anew by this call.
        recorded = recorded.model_copy(update={"warnings": ()})
        return recorded.with_content(None, self._access())

    def _hit_by_link(self, recorded: GeneratedImage) -> GeneratedImage | None:
        # No path or URI that nobody has looked at.
        return self._hit(recorded, path=None, uri=None) if _lives(recorded) else None

    def _is_storable(self, image: GeneratedImage) -> bool:
        return not image.cached and image.model == self.request.model and bool(image.sha256 or _lives(image))

    def _key(self, index: int) -> CacheKey:
        return CacheKey.of(self.request, index, self.base_url)

    def _hit(self, recorded: GeneratedImage, *, content: bytes | None = None, **changes: Any) -> GeneratedImage:
        hit = recorded.model_copy(update={"cached": True, "cost": Decimal(0), **changes})
        return hit if content is None else hit.with_content(content, self._access())

    def _access(self) -> ImageAccess:
        # An entry names a URI that somebody else can have written: the folder's options go to the folder's own bucket alone.
        return ImageAccess.of_generator(self.base_url, self.allowed_hosts, self.folder)

    @contextlib.contextmanager
    def _guarded(self, what: Literal["read", "written"]) -> Iterator[None]:
        """What the cache raises costs neither an image nor the call.

        It is logged in one line when it begins; not again for the same cache until that has worked again.
        """
        failing = (self.entries.place, what)
        try:
            yield
        except CogViewError:  # of a link that was fetched again: there is no hit
            return
        except Exception as error:  # foreign caches raise what they like
            if raised_by_signal(error):
                raise
            reason = getattr(error, "strerror", None) or type(error).__name__
            note = f"The cache could not be {what}: {printable(str(reason), 80)}."
            if not self.notes and failing not in _FAILING:
                self._log_failure(failing, error)
            if note not in self.notes:
                self.notes.append(note)
        else:
            _FAILING.discard(failing)

    def _log_failure(self, failing: tuple[Hashable, str], error: Exception) -> None:
        if len(_FAILING) >= _MAX_FAILING:
            _FAILING.clear()
        _FAILING.add(failing)
        logger.warning(
            "The cache could not be %s (%s). Calls go on without it; this is not logged again until it works.",
            failing[1],
            _told(error, self.request.prompt),
        )


def _told(error: Exception, prompt: str) -> str:
    """The class of an error and what it says, in one short line without the prompt, the cache's key or credentials."""
    name = type(error).__name__
    try:
        lines = str(error).splitlines()
    except Exception:  # noqa: BLE001  foreign
        return name
    text = printable(_CREDENTIALS.sub("//", lines[0]), _MAX_TOLD) if lines else ""
    return f"{name}: {text}" if text and not _tells(text, prompt) else name


def _tells(text: str, prompt: str) -> bool:
    """Whether a text holds a cache's key, or some of a prompt, in a form in which programs write it."""
    if KEY_PREFIX in text:
        return True
    forms = {prompt, ascii(prompt)[1:-1], json.dumps(prompt)[1:-1], quote(prompt)}
    return any(
        form[start : start + _TELLING] in text
        for form in forms
        for start in range(max(1, min(len(form), _MAX_COMPARED) - _TELLING + 1))
    )


def _living_url(image: GeneratedImage) -> str | None:
    """The link of an image; None where it has none, or where it says that it has ended."""
    ends = expires_at(image.url or "")
    return None if ends and ends <= datetime.now(UTC) else image.url


def _lives(image: GeneratedImage) -> bool:
    """Whether a picture's link is good, as far as can be told without asking."""
    if image.url is None:
        return False
    now, ends = datetime.now(UTC), expires_at(image.url)
    if ends is not None:
        return ends > now
    return image.created is not None and now.timestamp() < image.created + UNDATED_LINK_LIFETIME.total_seconds()


def _names(image: GeneratedImage) -> list[str]:
    """Under which names a file is saved again; always the same ones, so that more hits make no more files."""
    facts = (
        re.sub(r"[^0-9A-Za-z]", "_", image.request_id[:8]),
        str(image.sha256),
        EXTENSIONS.get(image.mime_type or "", ""),
    )
    try:
        names = image_names(*facts, moment=image.created or 0)
    except (ValueError, OverflowError, OSError):
        names = image_names(*facts, moment=0)
    return [*islice(names, _MAX_NAMES)]


def _save(folder: Path, names: list[str], content: bytes) -> Path:
    """Write the file under the first name that no other file has."""
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    for path in (folder / name for name in names):
        if not path.exists():
            replace_file(path, content)
            return path
        with contextlib.suppress(OSError):
            if read_regular_file(path, MAX_IMAGE_BYTES) == content:  # another thread or process was faster
                return path
    raise FileExistsError(errno.EEXIST, "every name is taken")


def _where(place: Path | str) -> dict[str, Any]:
    return {"path": place, "uri": None} if isinstance(place, Path) else {"path": None, "uri": place}


def _unsaved(folder: object, why: str) -> str:
    return (
        f"The image could not be saved in output_dir ({printable(str(folder), 120)}): {why}. "
        "Its bytes are in memory: call save(path)."
    )


def _local_bytes(image: GeneratedImage) -> bytes | None:
    try:
        content = image.local_bytes()
    except CogViewStorageError:
        return None
    return content if content is not None and is_picture(content, image) else None
