"""Download an image from a URL that somebody else chose, check it and save it.

The request carries no key and no cookie. It goes to public addresses only: the connection checks every address with the
result of `LinkRules.check`. At most three redirects are followed, each under the rules for a first link. Just after the paid
reply a link can answer 404, or with something that is not an image. Downloads are free, so they are repeated after 1, 2, 4
and 8 seconds, until the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urljoin, urlsplit

import httpcore
import httpx

from langchain_cogview.addresses import ADDRESSES, ANY_PUBLIC_HOST, AddressRefusedError, LinkRules, link_refused
from langchain_cogview.concurrency import DEADLINE, Deadline, in_thread, raised_by_signal
from langchain_cogview.errors import CogViewDownloadError, CogViewExpiredURLError, CogViewStorageError
from langchain_cogview.images.formats import (
    MAX_IMAGE_BYTES,
    ImageFormatError,
    ImageInfo,
    ImageRefusedError,
    inspect,
    sniff,
)
from langchain_cogview.images.store import ImageFile, reason
from langchain_cogview.text import moment_text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from langchain_cogview.images.folders import Folder


MAX_REDIRECTS: Final = 3
WAITS: Final = (1.0, 2.0, 4.0, 8.0)
"""Seconds before the second, third, fourth and fifth GET."""

_MAX_URL_CHARACTERS: Final = 8192
_PIECE_BYTES: Final = 2**19
"""Bytes that are written in one piece: on an event loop, every write runs in a thread."""
_SNIFF_BYTES: Final = 16
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_NOT_YET: Final = frozenset({404, 408, 425, 429})


@dataclass(frozen=True, slots=True)
class DownloadedImage:
    """An image that was received whole."""

    info: ImageInfo
    """Format and dimensions, read from the bytes."""
    size_bytes: int
    """Number of bytes."""
    sha256: str
    """SHA-256 of the image bytes, in hexadecimal."""
    path: Path | None = None
    """The file on this machine that holds the bytes."""
    uri: str | None = None
    """The file in remote storage that holds the bytes, such as `s3://bucket/name.png`."""
    content: bytes | None = None
    """The bytes, when no file holds them."""
    problem: str | None = None
    """Why the bytes could not be saved in the folder that was asked for."""

    @property
    def fields(self) -> dict[str, Any]:
        """What a `GeneratedImage` records about the bytes, by the names of its fields."""
        names = ("path", "uri", "size_bytes", "sha256")
        info = {"mime_type": self.info.mime_type, "width": self.info.width, "height": self.info.height}
        return {**info, **{name: getattr(self, name) for name in names}}


def expires_at(url: str) -> datetime | None:
    """Read when a signed link expires, from `Expires` (Unix seconds) in its query.

    Args:
        url: The link.

    Returns:
        The time, or None when the link does not say.
    """
    try:
        query = dict(parse_qsl(urlsplit(url).query, max_num_fields=100))
        seconds = next((value for name, value in query.items() if name.lower() == "expires"), "")
        return datetime.fromtimestamp(int(seconds), UTC) if seconds.isascii() and seconds.isdigit() else None
    except (ValueError, OverflowError, OSError):
        return None


# --- which failures are worth another attempt


@dataclass(frozen=True, slots=True)
class _Fault:
    """One kind of transport failure: one of `kinds`, and none of `without`, is in the error's chain of causes."""

    kinds: tuple[type[BaseException], ...]
    text: str
    is_transient: bool = False  # another attempt may succeed
    without: tuple[type[BaseException], ...] = ()

    def is_in(self, chain: list[BaseException]) -> bool:
        return any(isinstance(error, self.kinds) for error in chain) and not any(
            isinstance(error, self.without) for error in chain
        )


_TIMEOUTS = (httpx.TimeoutException, httpcore.TimeoutException, TimeoutError)
_CONNECTING = (httpx.ConnectError, httpcore.ConnectError)
_BROKEN_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
_IN_TRANSIT = (httpx.ReadError, httpcore.ReadError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_FAULTS: Final = (
    _Fault((AddressRefusedError,), "{link} was not opened: its host has no address that may be connected to."),
    _Fault((ssl.SSLCertVerificationError,), "The certificate of the image's host is not trusted."),
    _Fault(
        (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL, UnicodeError),
        "{link} was not opened: it is not a valid link.",
    ),
    _Fault(_TIMEOUTS, "The time limit passed while the image was downloaded.", is_transient=True),
    # The network is at fault from here on; a host that refuses connections may be starting.
    _Fault(_BROKEN_TLS, "The connection to the image's host broke ({error}).", is_transient=True),
    _Fault((ssl.SSLError,), "The TLS handshake with the image's host failed.", without=_IN_TRANSIT),
    _Fault(
        (httpx.ProxyError, httpcore.ProxyError), "The proxy did not forward the download ({error}).", is_transient=True
    ),
    _Fault(_CONNECTING, "The image's host could not be reached ({error}).", is_transient=True),
    _Fault((Exception,), "The image's host could not be read ({error}).", is_transient=True),
)
"""Whether a failure is transient or final: the first entry that matches decides."""

_TRANSPORT_ERRORS: Final = (
    httpx.HTTPError,
    httpx.StreamError,
    httpx.InvalidURL,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.TimeoutException,
    OSError,
    UnicodeError,
)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _not_yet(message: str, **facts: Any) -> CogViewDownloadError:
    error = CogViewDownloadError(message, **facts)
    error.transient = True
    return error


def _too_large() -> CogViewDownloadError:
    return CogViewDownloadError(f"The image is larger than {MAX_IMAGE_BYTES // 2**20} MiB.")


class _Download:
    """Decides what is requested, what a response means, and when to try again, without I/O."""

    def __init__(self, url: str, deadline: Deadline, rules: LinkRules, retries: int | None) -> None:
        self.deadline = deadline
        self._url, self._rules = url, rules
        self._waits = islice(WAITS, retries)
        self._first_check = rules.check(url)
        self.start()

    def start(self) -> None:
        self._at, self._check, self._subject = self._url, self._first_check, "The image's link"
        self._visited = [self._url]
        self._buffer, self._head, self._size = bytearray(), bytearray(), 0
        self.has_written = False

    def wait_after(self, error: CogViewDownloadError) -> float | None:
        """Return the seconds to wait before another attempt; None when it would not help, or would be too late."""
        wait = next(self._waits, None) if error.transient else None
        return wait if wait is not None and self.deadline.allows(wait) else None

    def request(self) -> httpx.Request:
        # For the link, or for the target of a redirect.
        left = self.deadline.remaining()
        if left is not None and left <= 0:
            raise CogViewDownloadError("The time limit passed before the image was downloaded.")
        try:
            return httpx.Request(
                "GET",
                self._at,
                headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "langchain-cogview"},
                extensions={
                    "timeout": {"connect": left, "read": left, "write": left, "pool": left},
                    DEADLINE: self.deadline,
                    ADDRESSES: self._check,
                },
            )
        except (httpx.InvalidURL, ValueError):
            raise link_refused("it is not a valid link", self._subject) from None

    def is_image(self, response: httpx.Response) -> bool:
        # True when the body is to be read; False after a redirect, which the next request follows.
        status = response.status_code
        if status in _REDIRECTS:
            self._redirect(response.headers.get("location", ""), status)
            return False
        if status in {401, 403}:
            ended = expires_at(self._at)
            when = f" It expired at {moment_text(ended)}." if ended and ended <= datetime.now(UTC) else ""
            raise CogViewExpiredURLError(
                f"The image's link has expired or is refused (HTTP {status}).{when}", status=status
            )
        if status in _NOT_YET or status >= 500:  # noqa: PLR2004
            raise _not_yet(f"The image is not there yet (HTTP {status}).", status=status)
        if status != 200:  # noqa: PLR2004
            raise CogViewDownloadError(f"The image's link answered with HTTP {status}.", status=status)
        if response.headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
            raise CogViewDownloadError("The image was sent in a content encoding that the request did not accept.")
        length = response.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > MAX_IMAGE_BYTES:
            raise _too_large()
        return True

    def _redirect(self, location: str, status: int) -> None:
        text = location.strip().replace(" ", "%20")
        self._subject = "The target of the image's redirect"
        if not text or len(text) > _MAX_URL_CHARACTERS or not text.isprintable():
            raise CogViewDownloadError("The image's link redirects, but not to a valid link.", status=status)
        if len(self._visited) > MAX_REDIRECTS:
            raise CogViewDownloadError(f"The image's link redirects more than {MAX_REDIRECTS} times.", status=status)
        try:
            target = urljoin(self._at, text)
        except ValueError:
            raise link_refused("it is not a valid link", self._subject) from None
        if target in self._visited:
            raise CogViewDownloadError("The image's link redirects in a loop.", status=status)
        if self._at.lower().startswith("https:") and not target.lower().startswith("https:"):
            raise link_refused("it is not https", self._subject)
        self._check = self._rules.check(target, self._subject)
        self._visited.append(target)
        self._at = target

    def add(self, chunk: bytes) -> bytes | None:
        # The result is what to write, once enough bytes have been received.
        if len(self._head) < _SNIFF_BYTES:
            self._head += chunk[:_SNIFF_BYTES]
            if len(self._head) >= _SNIFF_BYTES and sniff(bytes(self._head)) is None:
                raise _not_yet("The link gave something that is not a PNG, JPEG or WebP image.")
        self._size += len(chunk)
        if self._size > MAX_IMAGE_BYTES:
            raise _too_large()
        self._buffer += chunk
        return self.rest() if len(self._buffer) >= _PIECE_BYTES else None

    def rest(self) -> bytes:
        """Return the bytes that were received and not written yet, and empty the buffer."""
        rest, self._buffer = bytes(self._buffer), bytearray()
        self.has_written = True
        return rest

    def error(self, error: Exception) -> CogViewDownloadError:
        """Return the error of this package, transient or final, for a failure of the transport."""
        chain = _chain(error)
        fault = next(fault for fault in _FAULTS if fault.is_in(chain))
        # A proxy that asks for a password, or forbids the host, answers the same a second later.
        is_refusal = isinstance(error, httpx.ProxyError | httpcore.ProxyError) and str(error).startswith("4")
        text = fault.text.format(link=self._subject, error=type(error).__name__)
        found = CogViewDownloadError(text, detail=str(error))
        found.transient = fault.is_transient and not is_refusal
        return found


# --- saving; these functions block, and async callers run them in threads


def _write(file: ImageFile, piece: bytes | memoryview) -> None:
    try:
        file.write(piece)
    except OSError as error:
        if raised_by_signal(error):
            raise
        raise CogViewStorageError(f"The image's bytes could not be written: {reason(error)}.") from None


def _inspected(file: ImageFile, rest: bytes) -> ImageInfo:
    _write(file, rest)
    try:
        return file.inspect()
    except ImageRefusedError as error:
        raise CogViewDownloadError(f"The image is not accepted: {error}.", hint="Its URL is on the result.") from None
    except ImageFormatError as error:
        raise _not_yet(f"The link did not give a whole image: {error}.") from None
    except OSError as error:
        raise CogViewStorageError(f"The image's bytes could not be read back: {reason(error)}.") from None


def _image(info: ImageInfo, file: ImageFile, saved: Path | str | None) -> DownloadedImage:
    try:
        content = None if saved else file.read()
    except OSError as error:
        raise CogViewStorageError(f"The image's bytes could not be read back: {reason(error)}.") from None
    path, uri = (None, saved) if isinstance(saved, str) else (saved, None)
    return DownloadedImage(info, file.size, file.sha256, path, uri, content, file.problem)


def _new_file(folder: Path | Folder | None, label: str) -> ImageFile:
    """Return the file for a download; for a remote folder the bytes are in memory until they are uploaded."""
    return ImageFile(folder if isinstance(folder, Path) else None, label=label)


def _save(file: ImageFile, rest: bytes, folder: Path | Folder | None, deadline: Deadline) -> DownloadedImage:
    # Closes the file.
    with contextlib.closing(file):
        info = _inspected(file, rest)
        saved: Path | str | None = None
        if folder is None or isinstance(folder, Path):
            saved = file.save(info)
        else:
            with file.noting_problems():
                saved = folder.upload(file.names(info), file.read(), deadline)
        return _image(info, file, saved)


async def _asave(file: ImageFile, rest: bytes, folder: Path | Folder | None, deadline: Deadline) -> DownloadedImage:
    if folder is None or isinstance(folder, Path):
        # A thread saves a local file to its end even when the caller is cancelled.
        return await in_thread(_save, file, rest, folder, deadline)
    info = await in_thread(_inspected, file, rest)
    uri = None
    with file.noting_problems():
        uri = await folder.aupload(file.names(info), file.read(), deadline)  # noqa: ASYNC240  in memory
    return _image(info, file, uri)


def save_content(
    content: bytes, *, deadline: Deadline, folder: Path | Folder | None = None, label: str = ""
) -> DownloadedImage:
    """Check and save an image whose bytes were part of the reply. Blocks.

    Args:
        content: The image bytes.
        deadline: For an upload.
        folder: Where the file is saved; None: the bytes stay in memory.
        label: Part of the file name.

    Returns:
        The image, and where its bytes are.

    Raises:
        CogViewDownloadError: The bytes are not one whole image.
    """
    try:
        info = inspect(io.BytesIO(content))
    except ImageFormatError as error:
        raise CogViewDownloadError(f"The reply did not hold a whole image: {error}.", hint="") from None
    if folder is None:
        return DownloadedImage(info, len(content), hashlib.sha256(content).hexdigest(), content=content)
    file = _new_file(folder, label)
    with contextlib.closing(file):
        whole = memoryview(content)
        for start in range(0, len(content), _PIECE_BYTES):
            _write(file, whole[start : start + _PIECE_BYTES])
        return _save(file, b"", folder, deadline)


# --- the download


def fetch(
    send: Callable[[httpx.Request], httpx.Response],
    url: str,
    *,
    deadline: Deadline,
    folder: Path | Folder | None = None,
    label: str = "",
    rules: LinkRules = ANY_PUBLIC_HOST,
    retries: int | None = None,
) -> DownloadedImage:
    """Download, check and save one image.

    Args:
        send: Sends a request and returns the response with its body unread.
        url: The link of the image.
        deadline: For the whole download, waits and upload included.
        folder: Where the file is saved; None: the bytes stay in memory.
        label: Part of the file name.
        rules: Which links may be opened.
        retries: How often to try again at most; None: after each of `WAITS`.

    Returns:
        The image, and where its bytes are.

    Raises:
        CogViewDownloadError: No whole image was received.
        CogViewStorageError: The bytes could be written nowhere.
    """
    download = _Download(url, deadline, rules, retries)
    while True:
        file = _new_file(folder, label)
        try:
            with contextlib.closing(file):
                with _own_errors(download):
                    _receive(send, download, file)
                return _save(file, download.rest(), folder, deadline)
        except CogViewDownloadError as error:
            wait = download.wait_after(error)
            if wait is None:
                raise
        time.sleep(wait)
        download.start()


async def afetch(
    asend: Callable[[httpx.Request], Awaitable[httpx.Response]],
    url: str,
    *,
    deadline: Deadline,
    folder: Path | Folder | None = None,
    label: str = "",
    rules: LinkRules = ANY_PUBLIC_HOST,
    retries: int | None = None,
) -> DownloadedImage:
    """Async version of `fetch`. Files are written in threads.

    Returns:
        The image, and where its bytes are.

    Raises:
        CogViewDownloadError: No whole image was received.
    """
    download = _Download(url, deadline, rules, retries)
    while True:
        file = _new_file(folder, label)
        try:
            try:
                with _own_errors(download):
                    async with asyncio.timeout(deadline.remaining()):
                        await _areceive(asend, download, file)
            except BaseException:
                if download.has_written:  # a thread may still be writing
                    await in_thread(file.close)
                raise
            return await _asave(file, download.rest(), folder, deadline)
        except CogViewDownloadError as error:
            wait = download.wait_after(error)
            if wait is None:
                raise
        await asyncio.sleep(wait)
        download.start()


def _receive(send: Callable[[httpx.Request], httpx.Response], download: _Download, file: ImageFile) -> None:
    while True:
        response = send(download.request())
        with contextlib.closing(response):
            if not download.is_image(response):
                continue
            for chunk in response.iter_raw():
                piece = download.add(chunk)
                if piece:
                    _write(file, piece)
                if download.deadline.passed:
                    raise httpx.ReadTimeout("The time limit passed.")
            return


async def _areceive(
    asend: Callable[[httpx.Request], Awaitable[httpx.Response]], download: _Download, file: ImageFile
) -> None:
    while True:
        response = await asend(download.request())
        async with contextlib.aclosing(response):
            if not download.is_image(response):
                continue
            async for chunk in response.aiter_raw():
                piece = download.add(chunk)
                if piece:
                    await in_thread(_write, file, piece)
            return


@contextlib.contextmanager
def _own_errors(download: _Download) -> Iterator[None]:
    try:
        yield
    except _TRANSPORT_ERRORS as error:
        raise raised_by_signal(error) or download.error(error) from None
