"""The image files of a job: in its folder, and after the first thousand in sub-folders of a thousand files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import tempfile
import threading
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from langchain_cogview.errors import CogViewConfigurationError, CogViewError, CogViewStorageError, printable
from langchain_cogview.images.formats import MAX_IMAGE_BYTES, ImageFormatError, ImageInfo, inspect
from langchain_cogview.images.store import IMAGE_NAME, image_names, write_whole
from langchain_cogview.jobs.folder import SUBFOLDER, write_error
from langchain_cogview.jobs.manifest import MAX_URL, image_record, undownloaded_record
from langchain_cogview.result import GeneratedImage
from langchain_cogview.text import visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_cogview.jobs.folder import JobFolder
    from langchain_cogview.jobs.history import Attempt, History

MAX_FILES: Final = 1_000
"""Most images in one folder: file managers and browsers get slow with more."""
_MAX_SUBFOLDER: Final = 1_000_000


class ImageFolders:
    """Chooses the folder of each image: the job's own for the first thousand, then `images-0002`, `images-0003` and so on.

    A folder is named by its path in the job's folder; an empty text is the job's folder itself. Safe for threads.
    """

    def __init__(self, folder: JobFolder) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._durable: set[str] = set()
        names = folder.names()
        self._number = max(_numbers(names), default=1)
        self._count = MAX_FILES
        if self._number == 1:
            images = filter(IMAGE_NAME.fullmatch, names)
            self._count = sum(1 for _ in islice(images, MAX_FILES))  # a folder of an earlier version has many more
            return
        with contextlib.suppress(CogViewConfigurationError), folder.subfolder(_name(self._number)) as last:
            self._count = len(last.names())

    def next(self, images: int) -> str:
        """Return the folder for the images of one call; no other call gets the same names."""
        with self._lock:
            if self._count + images > MAX_FILES:
                self._number, self._count = self._number + 1, 0
            self._count += images
            return _name(self._number)

    def ensure(self, subfolder: str) -> None:
        """Create a sub-folder durably if it is missing, and check that it is a folder of the job.

        Raises:
            CogViewStorageError: It cannot be created, or a file or a link has its name.
        """
        if not subfolder:
            return
        try:
            with self._folder.subfolder(subfolder, create=True):
                if subfolder not in self._durable:
                    self._folder.sync()
                    self._durable.add(subfolder)
        except OSError as error:
            failure = write_error(self._folder.path / subfolder, error)
            raise failure from None
        except CogViewConfigurationError as error:
            raise CogViewStorageError(error.message, hint=error.hint) from None


def _name(number: int) -> str:
    return "" if number == 1 else f"images-{number:04}"


def _numbers(names: set[str]) -> Iterator[int]:
    numbers = (int(match[1]) for match in map(SUBFOLDER.fullmatch, names) if match)
    return (number for number in numbers if 1 < number < _MAX_SUBFOLDER)


# --- saving


class SavedImage(NamedTuple):
    """What happened to the bytes of a generated image."""

    # For the manifest; None if the bytes are not in the folder, so that the request has no end yet.
    record: dict[str, Any] | None
    problem: Exception | None = None  # why the bytes are not in the folder; its notes say where they are


def save_image(folder: JobFolder, subfolder: str, image: GeneratedImage) -> SavedImage:
    """Keep an image that was paid for: in its folder, otherwise in the temporary directory, otherwise by its URL.

    Returns:
        The image's record, or the problem.
    """
    try:
        if image.path is not None and image.path.parent == folder.path / subfolder:
            file = f"{subfolder}/{image.path.name}" if subfolder else image.path.name
            if is_in_folder(folder, file):
                return SavedImage(image_record(image, file))
        content = _local_bytes(image)
        if content is None:
            return SavedImage(undownloaded_record(image))
    except Exception as error:  # noqa: BLE001  reported at the end; the other images are saved anyway
        return SavedImage(None, write_error(folder.path, error) if isinstance(error, OSError) else error)
    try:
        return SavedImage(write_image(folder, subfolder, image, content))
    except Exception as problem:  # noqa: BLE001  reported at the end
        elsewhere = _save_elsewhere(image, content)
        if elsewhere:
            problem.add_note(
                f"An image that was paid for is kept in {elsewhere}: move it into the folder before the next run."
            )
            return SavedImage(None, problem)
        link = f"; its link is {printable(image.url, MAX_URL)}" if image.url else ""
        problem.add_note(
            f"An image that was paid for could not be saved anywhere (request id {image.request_id}){link}"
        )
        return SavedImage(undownloaded_record(image) if image.url else None, problem)


def is_in_folder(folder: JobFolder, file: str) -> bool:
    """Return whether a file is durable in this folder, and not in another folder at the same path."""
    try:
        with folder.parent_of(file) as (parent, name):
            parent.sync(name)
    except (FileNotFoundError, CogViewConfigurationError):
        return False
    return True


def _local_bytes(image: GeneratedImage) -> bytes | None:
    try:
        # Without a type, the bytes are what a gateway sent in place of an image; the image's warnings say so.
        return image.local_bytes() if image.mime_type else None
    except CogViewError:
        return None


def write_image(folder: JobFolder, subfolder: str, image: GeneratedImage, content: bytes) -> dict[str, Any]:
    """Return the record of an image after writing it into the folder, under the name that it has in every folder.

    Raises:
        CogViewStorageError: The file cannot be written.
    """
    info = inspect(io.BytesIO(content))
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        with folder.subfolder(subfolder, create=True) if subfolder else contextlib.nullcontext(folder) as parent:
            name = parent.add(image_names(image.request_id[:8], sha256, info.extension), content)
    except OSError as error:
        failure = write_error(folder.path, error)
        raise failure from None
    file = f"{subfolder}/{name}" if subfolder else name
    facts = {"mime_type": info.mime_type, "width": info.width, "height": info.height}
    return image_record(image.model_copy(update={**facts, "sha256": sha256, "size_bytes": len(content)}), file)


def _save_elsewhere(image: GeneratedImage, content: bytes) -> Path | None:
    """Return the path in the temporary directory to which the bytes were written, or None if that fails too."""
    try:
        extension = inspect(io.BytesIO(content)).extension
        names = image_names(image.request_id[:8], hashlib.sha256(content).hexdigest(), extension)
        elsewhere = Path(tempfile.gettempdir(), next(names))
        write_whole(elsewhere, content)
    except (OSError, ImageFormatError):
        return None
    return elsewhere


# --- finding again


@dataclass(frozen=True, slots=True)
class RecoveredImage:
    """An image that was paid for and is complete in the folder, but missing in the manifest."""

    attempt: Attempt  # the request that generated it
    file: str  # path in the job's folder
    info: ImageInfo  # format and size of the image
    sha256: str  # SHA-256 of the file's bytes, in hexadecimal
    size_bytes: int  # size of the file, in bytes


def recovered_images(folder: JobFolder, history: History) -> dict[str, RecoveredImage]:
    """Return complete images in the folder whose requests have no end in the manifest, by request id."""
    wanted = {attempt.request_id[:8]: attempt for attempt in history.attempts()}
    found: dict[str, tuple[Attempt, str]] = {}
    for file, name in _files(folder) if wanted else ():
        match = IMAGE_NAME.fullmatch(name)
        attempt = wanted.get(match["label"]) if match else None
        if match and attempt:
            found[file] = attempt, match["start_of_hash"]
    recovered: dict[str, RecoveredImage] = {}
    for file in sorted(found.keys() - history.known(found)):
        attempt, start_of_hash = found[file]
        image = _whole(folder, file, start_of_hash)
        if image:
            recovered[attempt.request_id] = RecoveredImage(attempt, file, *image)
    return recovered


def _files(folder: JobFolder) -> Iterator[tuple[str, str]]:
    """Yield path and name of each file in the folder and its sub-folders."""
    names = folder.names()
    yield from ((name, name) for name in names)
    for subfolder in map(_name, _numbers(names)):
        # A file or a link of this name holds no image of the job.
        with contextlib.suppress(CogViewConfigurationError, FileNotFoundError), folder.subfolder(subfolder) as inner:
            yield from ((f"{subfolder}/{name}", name) for name in inner.names())


def _whole(folder: JobFolder, file: str, start_of_hash: str) -> tuple[ImageInfo, str, int] | None:
    try:
        with folder.parent_of(file) as (parent, name), os.fdopen(parent.open(name), "rb") as content:
            size = content.seek(0, os.SEEK_END)
            if size > MAX_IMAGE_BYTES:
                return None
            content.seek(0)
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
            return (inspect(content), sha256, size) if sha256.startswith(start_of_hash) else None
    except (OSError, ImageFormatError, CogViewConfigurationError):
        return None


def recovered_record(recovered: RecoveredImage, price: Decimal | None, *, sandbox: bool) -> dict[str, Any]:
    """Return the record of an image that was found in the folder; `price` is its list price."""
    image = GeneratedImage(
        id=recovered.attempt.request_id[:8],
        mime_type=recovered.info.mime_type,
        width=recovered.info.width,
        height=recovered.info.height,
        size_bytes=recovered.size_bytes,
        sha256=recovered.sha256,
        request_id=recovered.attempt.request_id,
        model=recovered.attempt.model,
        # Another program may have written unpaired surrogates, which no image has.
        prompt=visible(recovered.attempt.prompt),
        cost=Decimal(0) if sandbox else price,
        sandbox=sandbox,
    )
    return image_record(image, recovered.file)


def spare_descriptors() -> int | None:
    """Return how many more files this process may open; None if there is no limit or it is unknown."""
    try:
        import resource  # noqa: PLC0415  not on Windows

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        open_files = len(list(Path("/dev/fd").iterdir()))
    except (ImportError, OSError) as error:
        return 0 if getattr(error, "errno", None) in {errno.EMFILE, errno.ENFILE} else None
    return None if limit == resource.RLIM_INFINITY else max(0, limit - open_files)
