"""Fetch a picture from a URL that somebody else chose.

The request carries no key and no cookie, follows no redirect, and goes to public addresses only; the connection itself asks
`LinkRules.check` for every address. Just after the paid reply a link can answer 404, or for a moment with something that is
no picture; fetching is free, so it is tried again after about 1, 2, 4 and 8 seconds, inside the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlsplit

import httpx
import tenacity

from langchain_cogview.addresses import ADDRESSES, AddressRefusedError
from langchain_cogview.deadline import DEADLINE, Deadline
from langchain_cogview.errors import CogViewDownloadError, CogViewExpiredURLError, CogViewStorageError
from langchain_cogview.images.formats import ImageFormatError, ImageInfo, inspect, sniff
from langchain_cogview.images.links import ANY_PUBLIC_HOST, LinkRules, link_refused
from langchain_cogview.images.store import PictureFile

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from langchain_cogview.images.remote import RemoteFolder

MAX_PICTURE_BYTES: Final = 32 * 2**20
WAITS: Final = (1.0, 2.0, 4.0, 8.0)
"""Seconds before the second, third, ... GET."""

_SNIFF_BYTES = 16


@dataclass(frozen=True, slots=True)
class Picture:
    """Bytes that were fetched and found whole.

    Attributes:
        info: Type and dimensions, read from the bytes.
        size_bytes: Their number.
        sha256: Their hash, in hexadecimal.
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


def _not_yet(message: str, **facts: Any) -> CogViewDownloadError:
    error = CogViewDownloadError(message, **facts)
    error.transient = True
    return error


class _Download:
    """The steps of one download without its I/O."""

    def __init__(self, url: str, deadline: Deadline, rules: LinkRules, label: str) -> None:
        self.url, self.deadline, self.label = url, deadline, label
        self._check = rules.check(url)

    def loop(self) -> dict[str, Any]:
        return {
            "retry": tenacity.retry_if_exception(lambda error: getattr(error, "transient", False)),
            "wait": tenacity.wait_chain(*(tenacity.wait_fixed(seconds) for seconds in WAITS)),
            "stop": lambda state: state.attempt_number > len(WAITS) or self.deadline.stops(state),
            "reraise": True,
        }

    def request(self) -> httpx.Request:
        left = self.deadline.remaining()
        if left is not None and left <= 0:
            raise CogViewDownloadError("The time limit passed before the picture was fetched.")
        try:
            return httpx.Request(
                "GET",
                self.url,
                headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "langchain-cogview"},
                extensions={
                    "timeout": {"connect": left, "read": left, "write": left, "pool": left},
                    DEADLINE: self.deadline,
                    ADDRESSES: self._check,
                },
            )
        except (httpx.InvalidURL, ValueError):
            raise link_refused("it is not a plain link") from None

    def accept(self, response: httpx.Response) -> None:
        """Judge the head of a reply."""
        status = response.status_code
        if status in {401, 403}:
            ended = expires_at(self.url)
            when = f" It ended at {ended:%Y-%m-%d %H:%M} UTC." if ended and ended <= datetime.now(UTC) else ""
            raise CogViewExpiredURLError(
                f"The picture's link has expired or is refused (HTTP {status}).{when}", status=status
            )
        if status in {404, 408, 425, 429} or status >= 500:  # noqa: PLR2004
            raise _not_yet(f"The picture is not there yet (HTTP {status}).", status=status)
        if 300 <= status < 400:  # noqa: PLR2004
            raise CogViewDownloadError("The picture's link redirects, which is not followed.", status=status)
        if status != 200:  # noqa: PLR2004
            raise CogViewDownloadError(f"The picture's link answered with HTTP {status}.", status=status)
        if response.headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
            raise CogViewDownloadError("The picture came compressed, which was not asked for.")
        length = response.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > MAX_PICTURE_BYTES:
            raise _too_large()

    def take(self, chunk: bytes, file: PictureFile, head: bytearray) -> None:
        """Check and write one chunk."""
        if len(head) < _SNIFF_BYTES:
            head += chunk[:_SNIFF_BYTES]
            if len(head) >= _SNIFF_BYTES and sniff(bytes(head)) is None:
                raise _not_yet("The link gave something that is no PNG, JPEG or WebP.")
        if file.size + len(chunk) > MAX_PICTURE_BYTES:
            raise _too_large()
        try:
            file.write(chunk)
        except OSError as error:
            raise CogViewStorageError(f"There is no room for the picture's bytes: {error.strerror}.") from None

    def inspected(self, file: PictureFile) -> ImageInfo:
        """Look at the whole picture."""
        file.file.seek(0)
        try:
            return inspect(file.file)
        except ImageFormatError as error:
            raise _not_yet(f"The link gave no whole picture: {error}.") from None

    def picture(self, info: ImageInfo, file: PictureFile, kept: Path | str | None) -> Picture:
        """What was fetched, wherever it stays."""
        try:
            content = None if kept else file.read()
        except OSError as error:
            raise CogViewStorageError(f"The picture's bytes could not be read back: {error.strerror}.") from None
        path, uri = (None, kept) if isinstance(kept, str) else (kept, None)
        return Picture(info, file.size, file.sha256, path, uri, content, file.problem)


def _too_large() -> CogViewDownloadError:
    return CogViewDownloadError(f"The picture is larger than {MAX_PICTURE_BYTES // 2**20} MiB.")


def _as_ours(error: Exception) -> CogViewDownloadError:
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return CogViewDownloadError("The time limit passed while the picture was fetched.")
    if isinstance(error, AddressRefusedError):
        return link_refused("its host has no public address")
    return _not_yet(f"The picture's host could not be read ({type(error).__name__}).", detail=str(error))


_FOREIGN = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, UnicodeError)


def fetch(
    send: Callable[[httpx.Request], httpx.Response],
    url: str,
    *,
    deadline: Deadline,
    folder: Path | RemoteFolder | None = None,
    label: str = "",
    rules: LinkRules = ANY_PUBLIC_HOST,
) -> Picture:
    """Fetch, check and keep one picture.

    Args:
        send: Sends one request and gives the response with its body unread.
        url: Where the picture is.
        deadline: For everything, waits, writing and uploading included.
        folder: Where the file goes; None keeps the bytes in memory.
        label: Stands in the file's name.
        rules: Which links may be fetched.

    Raises:
        CogViewDownloadError: When no whole picture came.
        CogViewStorageError: When there is no room even in memory.
    """
    download = _Download(url, deadline, rules, label)
    for attempt in tenacity.Retrying(sleep=time.sleep, **download.loop()):
        with attempt:
            return _once(send, download, folder)
    raise AssertionError  # tenacity ends with a result or an exception


async def afetch(
    asend: Callable[[httpx.Request], Awaitable[httpx.Response]],
    url: str,
    *,
    deadline: Deadline,
    folder: Path | RemoteFolder | None = None,
    label: str = "",
    rules: LinkRules = ANY_PUBLIC_HOST,
) -> Picture:
    """Fetch, check and keep one picture. The twin of `fetch`."""
    download = _Download(url, deadline, rules, label)
    async for attempt in tenacity.AsyncRetrying(sleep=asyncio.sleep, **download.loop()):
        with attempt:
            return await _aonce(asend, download, folder)
    raise AssertionError  # tenacity ends with a result or an exception


# A picture stays after its connection is let go and outside of what is tried again: the upload that fails is no reason to fetch.


def _once(
    send: Callable[[httpx.Request], httpx.Response], download: _Download, folder: Path | RemoteFolder | None
) -> Picture:
    request = download.request()
    with contextlib.ExitStack() as files:
        try:
            response = send(request)
            with contextlib.closing(response):
                download.accept(response)
                file = files.enter_context(contextlib.closing(PictureFile(folder, label=download.label)))
                head = bytearray()
                for chunk in response.iter_raw():
                    download.take(chunk, file, head)
                    if download.deadline.passed:
                        raise httpx.ReadTimeout("The time limit passed.")
                info = download.inspected(file)
        except _FOREIGN as error:
            raise _as_ours(error) from None
        return download.picture(info, file, file.keep(info, download.deadline))


async def _aonce(
    asend: Callable[[httpx.Request], Awaitable[httpx.Response]],
    download: _Download,
    folder: Path | RemoteFolder | None,
) -> Picture:
    request = download.request()
    with contextlib.ExitStack() as files:
        try:
            async with asyncio.timeout(download.deadline.remaining()):
                response = await asend(request)
                async with contextlib.aclosing(response):
                    download.accept(response)
                    file = files.enter_context(contextlib.closing(PictureFile(folder, label=download.label)))
                    head = bytearray()
                    async for chunk in response.aiter_raw():
                        download.take(chunk, file, head)
                    info = download.inspected(file)
        except _FOREIGN as error:
            raise _as_ours(error) from None
        return download.picture(info, file, await file.akeep(info, download.deadline))
