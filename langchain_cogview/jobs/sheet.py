"""The contact sheet of a job: pages of at most a thousand tiles in the order of the prompts, written while the job runs."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.errors import CogViewConfigurationError, CogViewError, Scope, error_class, printable
from langchain_cogview.notebook.html import Tile, contact_sheet, is_contact_sheet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from langchain_cogview.jobs.folder import JobFolder, RecordFile
    from langchain_cogview.jobs.history import Finished

PAGE_TILES: Final = 1_000
"""Most tiles on one page: browsers get slow with more."""
NAMES: Final = ("index.html", "contact-sheet.html", *(f"contact-sheet-{n}.html" for n in range(2, 100)))
"""Names for the first page; the first one that is free, or that a job wrote, is used."""


class ContactSheet:
    """The pages of a job. They show what the manifest says; a page is written through the descriptor of the folder."""

    def __init__(self, folder: JobFolder, manifest: RecordFile) -> None:
        self._folder = folder
        self._manifest = manifest
        self._lock = threading.Lock()
        self._tiles_left = 0  # how many new tiles do not fill a page
        self._end = manifest.end  # the records before this byte are on pages of an earlier run or update

    def count(self, tiles: int) -> bool:
        """Count new tiles; the caller lets in one thread at a time.

        Returns:
            Whether there are enough for a page.
        """
        full, self._tiles_left = divmod(self._tiles_left + tiles, PAGE_TILES)
        return full > 0

    def update(self, records: Iterable[Finished], facts: str) -> None:
        """Write the pages with new records while the job runs; what cannot be written is written when the job ends.

        Args:
            records: All records in the order of the prompts.
            facts: A sentence about the job, for the first page.
        """
        with self._lock, contextlib.suppress(OSError, CogViewError):
            self._write(_first_name(self._folder), records, facts, since=self._end)

    def finish(self, records: Iterable[Finished], facts: str) -> str:
        """Write all pages, and remove those of an earlier run that are not needed any more.

        Args:
            records: All records in the order of the prompts.
            facts: A sentence about the job, for the first page.

        Returns:
            The name of the first page.

        Raises:
            CogViewError: A page or the manifest was changed by another program.
            OSError: A page cannot be written.
        """
        with self._lock:
            name = _first_name(self._folder)
            number = self._write(name, records, facts, since=0) + 1
            while self._is_ours(page_name(name, number)):
                self._folder.remove(page_name(name, number))
                number += 1
            return name

    def _write(self, name: str, records: Iterable[Finished], facts: str, *, since: int) -> int:
        # Write the pages that have a record from `since` on, and the first one; return how many pages there are.
        end = since
        number, pages = 1, _pages(records)
        first = page = next(pages, [])
        while page:
            following = next(pages, [])
            end = max(end, *(item.start + item.size for item in page))
            # The page before a new one gets a link to it.
            if number > 1 and any(item.start >= since for item in (*page, *following)):
                self._write_page(name, number, page, is_last=not following)
            page, number = following, number + bool(following)
        links = [(str(n), page_name(name, n)) for n in range(1, number + 1)] if number > 1 else []
        title = f"CogView: {self._folder.path.name}"
        self._folder.replace(name, contact_sheet(self._tiles(first), title=title, facts=[facts], links=links))
        self._end = end
        return number

    def _write_page(self, first: str, number: int, page: list[Finished], *, is_last: bool) -> None:
        name = page_name(first, number)
        if self._folder.read(name, 1) is not None and not self._is_ours(name):
            raise CogViewConfigurationError(
                f"{printable(str(self._folder.path / name), 120)} is not a page of the contact sheet and is not overwritten.",
                hint="Move it away, then run the job again.",
            )
        links = [("First page", first), ("Previous page", page_name(first, number - 1))]
        links += [] if is_last else [("Next page", page_name(first, number + 1))]
        title = f"CogView: {self._folder.path.name}, page {number}"
        self._folder.replace(name, contact_sheet(self._tiles(page), title=title, links=links))

    def _tiles(self, page: list[Finished]) -> Iterator[Tile]:
        return (tile for item in page for tile in _tiles(self._manifest.read(item.start, item.size)))

    def _is_ours(self, name: str) -> bool:
        try:
            head = self._folder.read(name, 1000)
        except CogViewConfigurationError:  # a symbolic link, a folder, a pipe
            return False
        return head is not None and is_contact_sheet(head)


def page_name(first: str, number: int) -> str:
    """Return the name of a page, from the name of the first one."""
    stem, _, ending = first.rpartition(".")
    return first if number == 1 else f"{stem}-page-{number}.{ending}"


def _first_name(folder: JobFolder) -> str:
    # The first name that is free, or that a job used before.
    for name in NAMES:
        try:
            head = folder.read(name, 1000)
        except CogViewConfigurationError:  # a symbolic link, a folder, a pipe
            continue
        if head is None or is_contact_sheet(head):
            return name
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def _pages(records: Iterable[Finished]) -> Iterator[list[Finished]]:
    page: list[Finished] = []
    tiles = 0
    for item in records:
        count = item.outcome.made + len(item.outcome.errors)
        if page and tiles + count > PAGE_TILES:
            yield page
            page, tiles = [], 0
        page.append(item)
        tiles += count
    if page:
        yield page


def _tiles(record: dict[str, Any]) -> Iterator[Tile]:
    """Yield the tiles of one prompt."""
    prompt, label = record["arguments"]["prompt"], f"{record['line']}"
    for image in record["images"]:
        shape = (image["width"], image["height"]) if image["width"] and image["height"] else None
        yield Tile(prompt, label, file=image["file"], shape=shape)
    for failure in record["failures"]:
        kind = error_class(failure["error"])
        blocked = kind is not None and kind.scope is Scope.PROMPT
        yield Tile(prompt, label, kind="blocked" if blocked else "failed", reason=failure["message"])
