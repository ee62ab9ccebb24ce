"""Save and read image files on this machine: whole or absent, under a new name, never over another file.

On Linux the bytes are written into a file without a name, which gets its name once it is whole: a process that is killed
leaves nothing behind. On other systems, and on file systems without such files, a temporary file takes its place. On file
systems without hard links, the temporary file is renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import stat
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from langchain_cogview.concurrency import raised_by_signal
from langchain_cogview.errors import CogViewConfigurationError, CogViewStorageError, printable
from langchain_cogview.images.formats import EXTENSIONS, MAX_IMAGE_BYTES, ImageFormatError, inspect, sniff

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from langchain_cogview.images.formats import ImageInfo

MAX_NAMES: Final = 999
"""How many names are tried for one image; a number at the end tells images with the same name apart."""
IMAGE_NAME: Final = re.compile(
    r"\d{8}T\d{6}Z-(?:(?P<label>[0-9A-Za-z_]+)-)?(?P<start_of_hash>[0-9a-f]{16})(?:-\d{1,3})?"
    rf"(?:{'|'.join(map(re.escape, EXTENSIONS.values()))})"
)
"""The names that `image_names` gives, with the parts by which an image is found again."""
_UNSAFE: Final = re.compile(r"[^0-9A-Za-z_-]")
_DEVICE: Final = re.compile(r"(?i)con|prn|aux|nul|com\d|lpt\d")
_MAX_NAME: Final = 64
_NO_UNNAMED_FILES: Final = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS}
_COPY_BYTES: Final = 1 << 16
_NO_FOLLOW: Final = getattr(os, "O_NOFOLLOW", 0)
_OPEN: Final = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY")
)
_FOLDER: Final = os.O_RDONLY | _NO_FOLLOW | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_RENAME_NOREPLACE: Final = 1
_AT_FDCWD: Final = -100


def safe_name(text: str) -> str:
    """Make a part of a file name of text from outside, such as an id.

    Args:
        text: May be foreign.

    Returns:
        Letters, digits, `_` and `-`; 1 to 64 characters, and never the name of a Windows device.
    """
    name = _UNSAFE.sub("_", text[:_MAX_NAME]).lstrip("-") or "image"
    return f"_{name}"[:_MAX_NAME] if _DEVICE.fullmatch(name) else name  # Windows keeps these names for devices


def image_names(label: str, sha256: str, extension: str, *, moment: float | None = None) -> Iterator[str]:
    """Make the names that an image file may have.

    Args:
        label: The beginning of the request id, by which the file is found again; may be empty.
        sha256: SHA-256 of the image bytes, in hexadecimal; the name holds its beginning.
        extension: The file's extension, with its dot.
        moment: When the image was made, in Unix seconds; None: now.

    Returns:
        The names, in the order in which they are tried.

    Raises:
        ValueError: The moment is outside of the calendar.
        OverflowError: The moment is outside of the system's clock.
        OSError: The moment is outside of the system's clock.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(moment))
    # The label's own hyphens would end it too early for IMAGE_NAME.
    stem = "-".join(filter(None, (stamp, label and safe_name(label).replace("-", "_"), safe_name(sha256[:16]))))
    return (f"{stem}{'' if number == 1 else f'-{number}'}{extension}" for number in range(1, MAX_NAMES + 1))


class ImageFile:
    """The bytes of one image while they arrive: written into a folder, or held in memory where that is not possible.

    Every method blocks; async callers run them in threads. A lock lets one thread in at a time, so that a caller that was
    cancelled can close a file that a thread still writes.

    Args:
        folder: The folder on this machine where the file will be; it is made when missing. None: the bytes stay in memory.
        label: Part of the file name, between time and hash, by which the file is found again.
    """

    def __init__(self, folder: Path | None, *, label: str = "") -> None:
        self.problem: str | None = None
        """Why the bytes could not be saved where they should be; they are in memory then. None: no problem."""
        self.size = 0
        """Number of bytes written so far."""
        self._folder = folder
        self._label = label
        self._hash = hashlib.sha256()
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None  # opened with the first bytes
        self._temporary: Path | None = None
        self._is_closed = False

    def write(self, chunk: bytes | memoryview) -> None:
        """Append bytes. On a full disk all bytes move into memory; after `close` nothing is written.

        Args:
            chunk: The bytes to append.

        Raises:
            OSError: The bytes that were written cannot be read back.
        """
        with self._lock:
            if self._is_closed:
                return
            file = self._opened()
            self.size += len(chunk)
            self._hash.update(chunk)
            rest = memoryview(chunk)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError as error:
                if raised_by_signal(error):
                    raise
                self._move_to_memory(error, rest)

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes, in hexadecimal."""
        return self._hash.hexdigest()

    def inspect(self) -> ImageInfo:
        """Read format and dimensions from the bytes.

        Returns:
            What the bytes say about the image.

        Raises:
            ImageFormatError: The bytes are not one whole image.
            OSError: The bytes cannot be read back.
        """
        with self._lock:
            file = self._opened()
            file.seek(0)
            return inspect(file)

    def save(self, info: ImageInfo) -> Path | None:
        """Give the file a name made of time, label and hash.

        Args:
            info: Decides the extension.

        Returns:
            The path of the file; None when the bytes are in memory only, and `problem` says why.
        """
        with self._lock, self.noting_problems():
            if self._folder is not None and not self.problem:
                for path in (self._folder / name for name in self.names(info)):
                    with contextlib.suppress(FileExistsError):
                        self._give_name(path)
                        return path
                self.problem = os.strerror(errno.EEXIST)
        return None

    def names(self, info: ImageInfo) -> Iterator[str]:
        """Return the names that the file may have, in the order in which they are tried, once all bytes are written."""
        return image_names(self._label, self.sha256, info.extension)

    @contextlib.contextmanager
    def noting_problems(self) -> Iterator[None]:
        """Put the reason into `problem` when the block raises an OSError, and go on after the block.

        Yields:
            Nothing.

        Raises:
            OSError: A signal handler of the program raised it.
        """
        try:
            yield
        except OSError as error:
            if raised_by_signal(error):
                raise
            self.problem = reason(error)

    def read(self) -> bytes:
        """Return all bytes."""
        with self._lock:
            file = self._opened()
            if isinstance(file, io.BytesIO):
                return file.getvalue()
            file.seek(0)
            return file.read()

    def close(self) -> None:
        """Close the file. A file that was not saved is removed."""
        with self._lock:
            self._is_closed = True
            self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        if self._temporary:
            with contextlib.suppress(OSError):
                self._temporary.unlink()
            self._temporary = None

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = self._new_file()
        return self._file

    def _new_file(self) -> BinaryIO:
        if self._folder is None:
            return io.BytesIO()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._folder = self._folder.resolve(strict=True)
            return self._unnamed() or self._named()
        except (OSError, ValueError) as error:
            if raised_by_signal(error):
                raise
            self.problem = "it is a file, not a folder" if isinstance(error, FileExistsError) else reason(error)
            return io.BytesIO()

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

    def _give_name(self, path: Path) -> None:
        try:
            self._link(path)
        except FileExistsError:
            raise
        except OSError as error:  # the file system has no hard links; which error says so differs between file systems
            if raised_by_signal(error):
                raise
            self._rename(path)

    def _link(self, path: Path) -> None:
        if self._temporary:
            os.link(self._temporary, path)
            return
        # With a folder descriptor linkat follows the link in /proc; without one Python calls link, which does not.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(f"/proc/self/fd/{self._opened().fileno()}", path.name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            os.close(folder)

    def _rename(self, path: Path) -> None:
        if self._temporary is None:
            self._copy_to_temporary()
        temporary = self._temporary or path
        self._opened().close()  # Windows renames no open file
        try:
            rename_new(temporary, path)
        except BaseException:
            self._file = temporary.open("r+b", buffering=0)
            raise
        self._temporary = None

    def _copy_to_temporary(self) -> None:
        unnamed = self._opened()
        unnamed.seek(0)
        named = self._named()
        try:
            _copy(unnamed, named, self.size)
        except BaseException:
            named.close()
            if self._temporary:
                self._temporary.unlink()
                self._temporary = None
            raise
        unnamed.close()
        self._file = named

    def _move_to_memory(self, error: OSError, rest: memoryview) -> None:
        written = self._opened()
        if isinstance(written, io.BytesIO):
            raise error
        self.problem = reason(error)
        memory = io.BytesIO()
        written.seek(0)
        _copy(written, memory, self.size - len(rest))
        memory.write(rest)
        self._close_file()
        self._file = memory


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size > 0 and (piece := source.read(min(size, _COPY_BYTES))):
        size -= len(piece)
        rest = memoryview(piece)
        while rest:
            rest = rest[target.write(rest) :]


def reason(error: Exception) -> str:
    """Describe why a file could not be read or written.

    Args:
        error: The exception.

    Returns:
        The system's words, or the name of the exception's class.
    """
    return getattr(error, "strerror", None) or type(error).__name__


def rename_new(source: str | Path, target: str | Path, *, folder: int | None = None) -> None:
    """Rename a file to a name that no file has, on any file system.

    Linux does that in one step on most file systems. Elsewhere an empty file claims the name first, and the whole file
    replaces it: a process that is killed in between leaves the empty file.

    Args:
        source: The file.
        target: Its new path, in the same file system.
        folder: The descriptor of the folder that relative paths start at; None: the current folder.

    Raises:
        FileExistsError: A file has that name.
        OSError: The file system refused.
    """
    if _rename_at_once(source, target, _AT_FDCWD if folder is None else folder):
        return
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666, dir_fd=folder))
    try:
        os.replace(source, target, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(target, dir_fd=folder)
        raise


def _rename_at_once(source: str | Path, target: str | Path, folder: int) -> bool:
    if sys.platform != "linux":
        return False
    try:
        import ctypes  # noqa: PLC0415  for file systems without hard links alone

        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (ImportError, OSError, AttributeError):
        return False
    if rename(folder, os.fsencode(source), folder, os.fsencode(target), _RENAME_NOREPLACE) == 0:
        return True
    if ctypes.get_errno() == errno.EEXIST:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    return False


def _temporary_file(folder: Path) -> tuple[Path, int]:
    path = folder / f".cogview-{secrets.token_hex(8)}.part"
    return path, os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o666)


def local_path(path: str | os.PathLike[str], argument: str) -> Path:
    """Replace `~` at the beginning of a path by the home folder.

    Args:
        path: The path as the user passed it.
        argument: The name of the argument, for the error.

    Returns:
        The path; a relative path stays relative.

    Raises:
        CogViewConfigurationError: No file can have this name, or it begins with `~` and the home folder is not known.
    """
    try:
        os.fsencode(path)
        return Path(path).expanduser()
    except UnicodeEncodeError:
        problem, hint = "holds a character that no file name can have", "Pass another path."
    except RuntimeError:
        problem = "begins with '~', but that home folder is not known here"
        hint = "Set the environment variable HOME, or pass an absolute path."
    raise CogViewConfigurationError(f"{argument} {problem}.", hint=hint)


def checked_folder(value: Any) -> Any:
    """Check what the user passed as `output_dir`.

    Args:
        value: A folder, a URL, a backend of deepagents, or a folder in one.

    Returns:
        The path, with `~` replaced by the home folder; a URL as it is; the folder in a backend.

    Raises:
        ValueError: The value is blank or holds a null character.
    """
    if not isinstance(value, str | os.PathLike):
        from langchain_cogview.images.backend import backend_folder  # noqa: PLC0415  on use

        return backend_folder(value)
    if isinstance(value, str) and not value.strip():
        raise ValueError("output_dir takes a folder, such as 'images', or a URL, such as 's3://bucket/images'.")
    if "\0" in str(value):
        raise ValueError("output_dir holds a null character.")
    if isinstance(value, os.PathLike) or (isinstance(value, str) and "://" not in value):
        return local_path(value, "output_dir")
    return value


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. An existing file is replaced.

    Args:
        path: The file; its folder is made when missing. A device or a pipe is written to as it is.
        content: The bytes.

    Raises:
        OSError: The file could not be written.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    replace_file(path, content)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under a name of ours, whole or not at all; whatever has that name is replaced, and no pipe is waited for.

    Raises:
        OSError: As the system says.
    """
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


def save_as(target: Path, content: bytes, *, name: str, suffix: str = "") -> Path:
    """Save an image in a file, which is replaced, or under a name in an existing folder; the suffix precedes the ending.

    Returns:
        Path of the file. A name without an ending gets that of the image's format.

    Raises:
        CogViewStorageError: The file could not be written.
    """  # noqa: DOC501  what a signal handler raises passes
    ending = EXTENSIONS.get(sniff(content[:32]) or "", "")
    try:
        target = target.expanduser()
        if target.is_dir():
            target /= f"{safe_name(name)}{suffix}{ending}"
            replace_file(target, content)
        else:
            target = target.with_stem(f"{target.stem}{suffix}") if suffix else target
            target = target if target.suffix else target.with_name(target.name + ending)
            write_whole(target, content)
    except (OSError, ValueError, RuntimeError) as error:
        if raised_by_signal(error):
            raise
        why = getattr(error, "strerror", None) or error
        raise CogViewStorageError(
            f"The image could not be written to {printable(str(target), 120)}: {printable(str(why), 80)}."
        ) from None
    return target


def save_once(folder: Path, names: Iterable[str], content: bytes) -> Path:
    """Write a file under the first name that is free, or whose file has the same bytes already.

    Args:
        folder: The folder, which is made when missing.
        names: The names to try, in order.
        content: The bytes.

    Returns:
        The path of the file.

    Raises:
        OSError: The file could not be written.
        FileExistsError: Every name is in use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    for path in (folder / name for name in names):
        if not path.exists():
            replace_file(path, content)
            return path
        with contextlib.suppress(OSError):
            if read_regular_file(path, MAX_IMAGE_BYTES) == content:  # another thread or process has just saved it
                return path
    raise FileExistsError(errno.EEXIST, "every name is in use")


# --- reading


def checked_image(content: bytes, name: str, *, size_bytes: int | None, sha256: str | None) -> bytes:
    """Check that bytes are an image, and the recorded image where size and hash are recorded.

    Args:
        content: The bytes that were read.
        name: What an error calls them.
        size_bytes: The recorded number of bytes; None: not recorded.
        sha256: The recorded SHA-256, in hexadecimal; None: not recorded.

    Returns:
        The same bytes.

    Raises:
        CogViewStorageError: The bytes are not an image, or not the recorded one.
    """
    hint = "Something else was written there, or the record is wrong. Open the URL while the link is valid."
    try:
        inspect(io.BytesIO(content))
    except ImageFormatError as error:
        raise CogViewStorageError(f"{name} is not an image: {error}.", hint=hint) from None
    same_size = size_bytes is None or size_bytes == len(content)
    if not same_size or (sha256 is not None and hashlib.sha256(content).hexdigest() != sha256.lower()):
        raise CogViewStorageError(f"{name} is not the image that is recorded.", hint=hint)
    return content


def read_regular_file(path: Path, limit: int, *, within: Path | None = None) -> bytes:
    """Read a regular file. A symbolic link in its last part is not followed; pipes and devices are refused without waiting.

    Args:
        path: The file.
        limit: The largest number of bytes that is read.
        within: The only folder that the file may lie in, after symbolic links of folders are resolved; None: any folder.

    Returns:
        The bytes of the file.

    Raises:
        OSError: The file cannot be read, is no regular file, is too large or lies elsewhere; `strerror` says why.
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
    resolved = path.parent.resolve() / path.name
    if not resolved.is_relative_to(root) or resolved == root:
        raise PermissionError(errno.EACCES, "it is outside the folder that images are read from")
    if os.open not in os.supports_dir_fd:
        return os.open(resolved, _OPEN)
    # Each folder is opened from the one above, so that none of them can become a link in the meantime.
    folder = os.open(root, _FOLDER)
    try:
        for name in resolved.relative_to(root).parts[:-1]:
            below = os.open(name, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = below
        return os.open(resolved.name, _OPEN, dir_fd=folder)
    finally:
        os.close(folder)
