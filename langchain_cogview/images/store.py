"""Where the bytes of a picture stay: whole or absent, under a name of ours, never over another file.

On Linux the bytes go into a file without a name, which gets one only when it is whole: a process that is killed leaves
nothing behind. On other systems a temporary file takes its place. To a remote folder they go in one request when all are there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, cast

from langchain_cogview.deadline import Deadline
from langchain_cogview.errors import CogViewConfigurationError
from langchain_cogview.images.formats import EXTENSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_cogview.images.formats import ImageInfo
    from langchain_cogview.images.remote import RemoteFolder

MAX_NAMES: Final = 999
"""Under how many names a picture may be saved: the number at the end tells those apart that would have the same."""
PICTURE_NAME: Final = re.compile(
    r"\d{8}T\d{6}Z-(?:(?P<label>[0-9A-Za-z_]+)-)?(?P<start_of_hash>[0-9a-f]{16})(?:-\d{1,3})?"
    rf"(?:{'|'.join(map(re.escape, EXTENSIONS.values()))})"
)
"""The names that `picture_names` gives, with the parts by which a picture is found again."""
_UNSAFE: Final = re.compile(r"[^0-9A-Za-z_-]")
_DEVICE: Final = re.compile(r"(?i)con|prn|aux|nul|com\d|lpt\d")
_MAX_NAME: Final = 64
_NO_LIMIT: Final = Deadline(None)
_IN_MEMORY_BYTES: Final = 1 << 20
_NO_UNNAMED_FILES: Final = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS}


def safe_name(text: str) -> str:
    """A text from outside, such as an id, as a part of a file's name: letters, digits, `_` and `-`, at most 64 characters."""
    name = _UNSAFE.sub("_", text[:_MAX_NAME]).lstrip("-") or "image"
    return f"_{name}"[:_MAX_NAME] if _DEVICE.fullmatch(name) else name  # Windows keeps these names for devices


def picture_names(label: str, sha256: str, extension: str, *, moment: float | None = None) -> Iterator[str]:
    """The names of a picture's file, in the order in which they are tried.

    Args:
        label: By which the file is found: the beginning of its request id; may be empty.
        sha256: Of the bytes, in hexadecimal; its beginning stands in the name.
        extension: With its dot.
        moment: When it was made, in Unix seconds; None: now.

    Raises:
        ValueError, OverflowError, OSError: The moment is none of a calendar.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(moment))
    # The label's own hyphens would end it too early for PICTURE_NAME.
    stem = "-".join(filter(None, (stamp, label and safe_name(label).replace("-", "_"), safe_name(sha256[:16]))))
    return (f"{stem}{'' if number == 1 else f'-{number}'}{extension}" for number in range(1, MAX_NAMES + 1))


class PictureFile:
    """The bytes of one download: written into the folder at once, or kept aside where there is none on this machine.

    Args:
        folder: Where the file will be; made when missing. A remote one gets it in `keep`. None: the bytes are read back by
            the caller.
        label: Stands in the name between time and hash, so that the file is found by it.

    Attributes:
        problem: Why the folder could not be used; the bytes are kept aside all the same.
    """

    def __init__(self, folder: Path | RemoteFolder | None, *, label: str = "") -> None:
        self.problem: str | None = None
        self.size = 0
        self._label = label
        self._folder = folder if isinstance(folder, Path) else None
        self._remote = None if isinstance(folder, Path) else folder
        self._hash = hashlib.sha256()
        self._temporary: Path | None = None
        self.file: BinaryIO = self._opened()

    def write(self, chunk: bytes) -> None:
        """Append bytes; a full disk moves all of them aside."""
        self.size += len(chunk)
        self._hash.update(chunk)
        rest = memoryview(chunk)
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            self._move_aside(error, rest)

    @property
    def sha256(self) -> str:
        """Of the bytes, in hexadecimal."""
        return self._hash.hexdigest()

    def keep(self, info: ImageInfo, deadline: Deadline = _NO_LIMIT) -> Path | str | None:
        """Let the file stay under a name made of time, label and hash.

        Args:
            info: Type of the picture; gives the ending.
            deadline: For an upload; a local file has its name at once.

        Returns:
            The path of a local file, or the URI of a remote one; None where the bytes are aside only.
        """
        with self._noting_problems():
            if self._remote:
                return self._remote.upload(self._names(info), self.read(), deadline)
            return self._linked(info)
        return None

    async def akeep(self, info: ImageInfo, deadline: Deadline = _NO_LIMIT) -> Path | str | None:
        """The twin of `keep`, without blocking the event loop while it uploads."""
        with self._noting_problems():
            if self._remote:
                return await self._remote.aupload(self._names(info), self.read(), deadline)
            return self._linked(info)
        return None

    def read(self) -> bytes:
        """All bytes."""
        self.file.seek(0)
        return self.file.read()

    def close(self) -> None:
        """Let go of the file; what has no name by now is gone."""
        with contextlib.suppress(OSError):
            self.file.close()
        if self._temporary:
            with contextlib.suppress(OSError):
                self._temporary.unlink()
            self._temporary = None

    @contextlib.contextmanager
    def _noting_problems(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problem = _reason(error)

    def _names(self, info: ImageInfo) -> Iterator[str]:
        return picture_names(self._label, self.sha256, info.extension)

    def _linked(self, info: ImageInfo) -> Path | None:
        if self._folder is None or self.problem:
            return None
        for name in self._names(info):
            path = self._folder / name
            with contextlib.suppress(FileExistsError):
                self._link(path)
                return path
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def _opened(self) -> BinaryIO:
        if self._folder is None:
            return _aside()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._folder = self._folder.resolve(strict=True)
            return self._unnamed() or self._named()
        except (OSError, ValueError) as error:
            self.problem = _reason(error)
            return _aside()

    def _unnamed(self) -> BinaryIO | None:
        flag = getattr(os, "O_TMPFILE", None)
        if flag is None or not Path("/proc/self/fd").is_dir():
            return None
        try:
            return os.fdopen(os.open(self._folder or ".", flag | os.O_RDWR | os.O_CLOEXEC, 0o666), "w+b", buffering=0)
        except OSError as error:
            if error.errno in _NO_UNNAMED_FILES:
                return None
            raise

    def _named(self) -> BinaryIO:
        self._temporary, descriptor = _temporary_file(self._folder or Path())
        return os.fdopen(descriptor, "w+b", buffering=0)

    def _link(self, path: Path) -> None:
        if self._temporary:
            os.link(self._temporary, path)
            return
        # With a folder descriptor linkat follows the link in /proc; without one Python calls link, which does not.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(f"/proc/self/fd/{self.file.fileno()}", path.name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            os.close(folder)

    def _move_aside(self, error: OSError, rest: memoryview) -> None:
        if self.problem or self._folder is None:
            raise error  # aside, too, there is no room
        self.problem = _reason(error)
        written, aside = self.file, _aside()
        missing = self.size - len(rest)
        written.seek(0)
        while missing > 0 and (piece := written.read(min(missing, 1 << 16))):
            aside.write(piece)
            missing -= len(piece)
        aside.write(rest)
        self.close()
        self.file = aside


def _aside() -> BinaryIO:
    return cast("BinaryIO", tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES))


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


def _temporary_file(folder: Path) -> tuple[Path, int]:
    path = folder / f".cogview-{secrets.token_hex(8)}.part"
    return path, os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o666)


def local_path(path: str | os.PathLike[str], argument: str) -> Path:
    """A path of this machine, with `~` as the user's home folder.

    Args:
        path: As it was given.
        argument: Which argument holds it, for the error.

    Returns:
        The path; a relative one stays so.

    Raises:
        CogViewConfigurationError: It begins with `~`, and there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise CogViewConfigurationError(
            f"{argument} begins with '~', but that home folder is not known here.",
            hint="Set the environment variable HOME, or pass an absolute path.",
        ) from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file of the caller's naming, whole or not at all; an existing one is replaced.

    Raises:
        OSError: As the system says.
    """
    if path.exists() and not path.is_file():  # a device or a pipe: nothing to replace
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, descriptor = _temporary_file(path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
