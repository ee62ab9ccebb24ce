"""Fetch an image from a URL that somebody else chose, and save it.

The request carries no key and no cookie, and goes to public addresses only: the connection itself asks `LinkRules.check` for
every address. Three redirects are followed at most, each under the rules of a first link. Just after the paid reply a link can
answer 404, or for a moment with something that is not an image; fetching is free, so it is tried again after about 1, 2, 4 and
8 seconds, inside the deadline.
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

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from langchain_cogview.images.remote import RemoteFolder


MAX_REDIRECTS: Final = 3
WAITS: Final = (1.0, 2.0, 4.0, 8.0)
"""Seconds before the second, third, ... GET."""

_MAX_URL_CHARACTERS: Final = 8192
_PIECE_BYTES: Final = 2**20
"""What is written at once: on an event loop each write costs a turn of a thread."""
_SNIFF_BYTES: Final = 16
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_NOT_YET: Final = frozenset({404, 408, 425, 429})


@dataclass(frozen=True, slots=True)
class DownloadedImage:
    """An image that came whole.

    Attributes:
        info: Type and dimensions, read from the bytes.
        size_bytes: Number of bytes.
        sha256: SHA-256 of the bytes, in hexadecimal.
        path: The file of this machine that holds them.
        uri: The file elsewhere that holds them, such as `s3://bucket/name.png`.
        content: The bytes, when they are in no file.
        problem: Why they could not be written into the folder asked for.
    """

    info: ImageInfo
    size_bytes: int
    sha256: str
    path: Path | None = None
    uri: str | None = None
    content: bytes | None = None
    problem: str | None = None


def expires_at(url: str) -> datetime | None:
    """When a signed link ends, as its `Expires` (Unix seconds) tells; None where it does not."""
    try:
        query = dict(parse_qsl(urlsplit(url).query, max_num_fields=100))
        seconds = next((value for name, value in query.items() if name.lower() == "expires"), "")
        return datetime.fromtimestamp(int(seconds), UTC) if seconds.isascii() and seconds.isdigit() else None
    except (ValueError, OverflowError, OSError):
        return None


# --- which faults may pass by themselves


@dataclass(frozen=True, slots=True)
class _Fault:
    """One kind of transport failure.

    Attributes:
        kinds: Exception classes; one of them is the error or stands in its chain of causes.
        text: What happened.
        is_transient: Whether fetching again may do better.
        without: Exception classes of which none may be in the chain.
    """

    kinds: tuple[type[BaseException], ...]
    text: str
    is_transient: bool = False
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
    _Fault((AddressRefusedError,), "{link} was not fetched: its host has no address that may be connected to."),
    _Fault((ssl.SSLCertVerificationError,), "The certificate of the image's host is not trusted."),
    _Fault(
        (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL, UnicodeError),
        "{link} was not fetched: it is not a plain link.",
    ),
    _Fault(_TIMEOUTS, "The time limit passed while the image was fetched.", is_transient=True),
    # What follows is of the network; a host that refuses connections may be starting, a name server may be asleep.
    _Fault(_BROKEN_TLS, "The connection to the image's host broke ({error}).", is_transient=True),
    _Fault((ssl.SSLError,), "The image's host does not speak TLS as it must.", without=_IN_TRANSIT),
    _Fault(
        (httpx.ProxyError, httpcore.ProxyError), "The proxy did not pass the image on ({error}).", is_transient=True
    ),
    _Fault(_CONNECTING, "The image's host could not be reached ({error}).", is_transient=True),
    _Fault((Exception,), "The image's host could not be read ({error}).", is_transient=True),
)
"""Transient or final, per kind of failure: the first that fits decides."""

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


# --- one download without its I/O


class _Download:
    """What is asked, what an answer means, and when to ask again.

    Args:
        url: The link.
        deadline: For everything.
        rules: Which links may be fetched.
    """

    def __init__(self, url: str, deadline: Deadline, rules: LinkRules) -> None:
        self.deadline = deadline
        self._url, self._rules = url, rules
        self._waits = iter(WAITS)
        self._first_check = rules.check(url)
        self.start()

    def start(self) -> None:
        """Begin at the link, once or once more."""
        self._at, self._check, self._subject = self._url, self._first_check, "The image's link"
        self._visited = [self._url]
        self._buffer, self._head, self._size = bytearray(), bytearray(), 0
        self.has_written = False

    def wait_after(self, error: CogViewDownloadError) -> float | None:
        """Seconds until the link is asked again after an error; None when that would not help or would be too late."""
        wait = next(self._waits, None) if error.transient else None
        return wait if wait is not None and self.deadline.allows(wait) else None

    def request(self) -> httpx.Request:
        """The next GET."""
        left = self.deadline.remaining()
        if left is not None and left <= 0:
            raise CogViewDownloadError("The time limit passed before the image was fetched.")
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
            raise link_refused("it is not a plain link", self._subject) from None

    def is_image(self, response: httpx.Response) -> bool:
        """Whether the body of a reply is to be read; False after a redirect, which the next request follows."""
        status = response.status_code
        if status in _REDIRECTS:
            self._redirect(response.headers.get("location", ""), status)
            return False
        if status in {401, 403}:
            ended = expires_at(self._at)
            when = f" It ended at {ended:%Y-%m-%d %H:%M} UTC." if ended and ended <= datetime.now(UTC) else ""
            raise CogViewExpiredURLError(
                f"The picture's link has expired or is refused (HTTP {status}).{when}", status=status
            )
        if status in _NOT_YET or status >= 500:  # noqa: PLR2004
            raise _not_yet(f"The image is not there yet (HTTP {status}).", status=status)
        if status != 200:  # noqa: PLR2004
            raise CogViewDownloadError(f"The image's link answered with HTTP {status}.", status=status)
        if response.headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
            raise CogViewDownloadError("The image came compressed, which was not asked for.")
        length = response.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > MAX_IMAGE_BYTES:
            raise _too_large()
        return True

    def _redirect(self, location: str, status: int) -> None:
        text = location.strip().replace(" ", "%20")
        self._subject = "The target of the image's redirect"
        if not text or len(text) > _MAX_URL_CHARACTERS or not text.isprintable():
            raise CogViewDownloadError("The image's link redirects, but not to an address.", status=status)
        if len(self._visited) > MAX_REDIRECTS:
            raise CogViewDownloadError(f"The image's link redirects more than {MAX_REDIRECTS} times.", status=status)
        try:
            target = urljoin(self._at, text)
        except ValueError:
            raise link_refused("it is not a plain link", self._subject) from None
        if target in self._visited:
            raise CogViewDownloadError("The image's link redirects in a circle.", status=status)
        if self._at.lower().startswith("https:") and not target.lower().startswith("https:"):
            raise link_refused("it is not https", self._subject)
        self._check = self._rules.check(target, self._subject)
        self._visited.append(target)
        self._at = target

    def take(self, chunk: bytes) -> bytes | None:
        """Check one chunk; gives what is to be written, when enough has come."""
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
        """What has come and is not written yet."""
        rest, self._buffer = bytes(self._buffer), bytearray()
        self.has_written = True
        return rest

    def error(self, error: Exception) -> CogViewDownloadError:
        """Our error for a failure of the transport."""
        chain = _chain(error)
        fault = next(fault for fault in _FAULTS if fault.is_in(chain))
        # A proxy that wants a password, or forbids the host, says the same a second later.
        is_refusal = isinstance(error, httpx.ProxyError | httpcore.ProxyError) and str(error).startswith("4")
        text = fault.text.format(link=self._subject, error=type(error).__name__)
        ours = CogViewDownloadError(text, detail=str(error))
        ours.transient = fault.is_transient and not is_refusal
        return ours


# --- saving: blocks, so that async callers have a thread for each of these


def _write(file: ImageFile, piece: bytes | memoryview) -> None:
    try:
        file.write(piece)
    except OSError as error:
        if raised_by_signal(error):
            raise
        raise CogViewStorageError(f"The image's bytes could not be written: {reason(error)}.") from None


def _inspected(file: ImageFile, rest: bytes) -> ImageInfo:
    """Write the last bytes, and look at the whole image."""
    _write(file, rest)
    try:
        return file.inspect()
    except ImageRefusedError as error:
        raise CogViewDownloadError(f"The image is not accepted: {error}.", hint="Its URL is on the result.") from None
    except ImageFormatError as error:
        raise _not_yet(f"The link did not give a whole image: {error}.") from None
    except OSError as error:
        raise CogViewStorageError(f"The image's bytes could not be read back: {reason(error)}.") from None


def _saved(info: ImageInfo, file: ImageFile, kept: Path | str | None) -> DownloadedImage:
    """The image, wherever its bytes are now."""
    try:
        content = None if kept else file.read()
    except OSError as error:
        raise CogViewStorageError(f"The image's bytes could not be read back: {reason(error)}.") from None
    path, uri = (None, kept) if isinstance(kept, str) else (kept, None)
    return DownloadedImage(info, file.size, file.sha256, path, uri, content, file.problem)


def _save(file: ImageFile, rest: bytes, deadline: Deadline) -> DownloadedImage:
    """Write the last bytes, check the image and give its file a name; closes the file."""
    with contextlib.closing(file):
        info = _inspected(file, rest)
        return _saved(info, file, file.keep(info, deadline))


async def _asave(file: ImageFile, rest: bytes, deadline: Deadline) -> DownloadedImage:
    """Async version of `_save`; a local file is saved to its end by a thread also when the caller is cancelled."""
    if file.remote is None:
        return await in_thread(_save, file, rest, deadline)
    info = await in_thread(_inspected, file, rest)
    return _saved(info, file, await file.aupload(info, deadline))


def save_content(
    content: bytes, *, deadline: Deadline, folder: Path | RemoteFolder | None = None, label: str = ""
) -> DownloadedImage:
    """Check and save an image whose bytes came in the reply itself. Blocks.

    Args:
        content: The bytes.
        deadline: For an upload.
        folder: Where the file goes; None keeps the bytes in memory.
        label: Part of the file's name.

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
    file = ImageFile(folder, label=label)
    with contextlib.closing(file):
        whole = memoryview(content)
        for start in range(0, len(content), _PIECE_BYTES):
            _write(file, whole[start : start + _PIECE_BYTES])
        kept = file.keep(info, deadline)
    path, uri = (None, kept) if isinstance(kept, str) else (kept, None)
    return DownloadedImage(info, file.size, file.sha256, path, uri, None if kept else content, file.problem)


# --- the download, twice


def fetch(
    send: Callable[[httpx.Request], httpx.Response],
    url: str,
    *,
    deadline: Deadline,
    folder: Path | RemoteFolder | None = None,
    label: str = "",
    rules: LinkRules = ANY_PUBLIC_HOST,
) -> DownloadedImage:
    """Fetch, check and save one image.

    Args:
        send: Sends one request and gives the response with its body unread.
        url: Where the image is.
        deadline: For everything, waits, writing and uploading included.
        folder: Where the file goes; None keeps the bytes in memory.
        label: Part of the file's name.
        rules: Which links may be fetched.

    Returns:
        The image, and where its bytes are.

    Raises:
        CogViewDownloadError: When no whole image came.
        CogViewStorageError: When the bytes could be held nowhere.
    """
    download = _Download(url, deadline, rules)
    while True:
        file = ImageFile(folder, label=label)
        try:
            with contextlib.closing(file):
                with _as_ours(download):
                    _receive(send, download, file)
                return _save(file, download.rest(), deadline)
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
    folder: Path | RemoteFolder | None = None,
    label: str = "",
    rules: LinkRules = ANY_PUBLIC_HOST,
) -> DownloadedImage:
    """Async version of `fetch`; files are written by threads."""
    download = _Download(url, deadline, rules)
    while True:
        file = ImageFile(folder, label=label)
        try:
            try:
                with _as_ours(download):
                    async with asyncio.timeout(deadline.remaining()):
                        await _areceive(asend, download, file)
            except BaseException:
                if download.has_written:  # perhaps in a thread that writes still
                    await in_thread(file.close)
                raise
            return await _asave(file, download.rest(), deadline)
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
                piece = download.take(chunk)
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
                piece = download.take(chunk)
                if piece:
                    await in_thread(_write, file, piece)
            return


@contextlib.contextmanager
def _as_ours(download: _Download) -> Iterator[None]:
    """Turn failures of the transport into our errors; anything else passes through."""
    try:
        yield
    except _TRANSPORT_ERRORS as error:
        raise raised_by_signal(error) or download.error(error) from None
