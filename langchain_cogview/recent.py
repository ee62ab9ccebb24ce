"""The images that calls of a generator made shortly before one of them failed, so that nothing paid is lost from sight.

A pool of threads or `asyncio.gather` raises the error of one call, and drops the results of the others.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.concurrency import PRIORITY
from langchain_cogview.errors import CogViewError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langchain_cogview.result import ImageResult

MAX_NAMED: Final = 10
"""The most images that a note names; it counts all of them."""
_GAP_SECONDS: Final = 1.0
"""Calls that follow each other within this time belong together."""
_MAX_ERRORS: Final = 20
_MAX_LOCATION: Final = 2_000


class _Noted:
    def __init__(self, error: CogViewError) -> None:
        self.error = weakref.ref(error)
        self.text: str | None = None  # the note that it has


class RecentImages:
    """The images of calls that run at the same time or follow each other at once. Thread-safe, and bounded.

    Errors of these calls get a note, which is renewed when a later call succeeds. It names paths or links, and never prompts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._ended = 0.0
        self._forget()

    def _forget(self) -> None:
        self._count = 0
        self._named: deque[str] = deque(maxlen=MAX_NAMED)
        # Errors of these calls; each gets a note once there is an image.
        self._errors: deque[_Noted] = deque(maxlen=_MAX_ERRORS)

    def __reduce__(self) -> tuple[Any, ...]:
        return RecentImages, ()  # another process makes images of its own

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecentImages)  # generators with the same settings are equal

    def __hash__(self) -> int:
        return hash(RecentImages)

    @contextmanager
    def call(self) -> Iterator[Callable[[ImageResult], ImageResult]]:
        """Count a call, and tell its error about the images of others.

        Yields:
            A function to which the result of the call is passed.

        Raises:
            CogViewError: That of the call.
        """
        if PRIORITY.get() == "batch":  # batches and jobs report all results themselves
            yield lambda result: result
            return
        with self._lock:
            if not self._running and time.monotonic() - self._ended > _GAP_SECONDS:
                self._forget()
            self._running += 1
        try:
            yield self._add
        except CogViewError as error:
            self._note(error)
            raise
        finally:
            with self._lock:
                self._running -= 1
                self._ended = time.monotonic()

    def _add(self, result: ImageResult) -> ImageResult:
        with self._lock:
            for image in result.images:
                if image.cached:
                    continue
                self._count += 1
                location = image.path or image.uri or image.url or f"request id {image.request_id}"
                self._named.append(printable(str(location), _MAX_LOCATION))
            self._renew()
        return result

    def _note(self, error: CogViewError) -> None:
        with self._lock:
            if all(noted.error() is not error for noted in self._errors):
                self._errors.append(_Noted(error))
            self._renew()

    def _renew(self) -> None:
        text = self._text() if self._count else None
        for noted in self._errors:
            error = noted.error()
            if error is None or text is None:
                continue
            if noted.text is None:
                error.add_note(text)
            elif noted.text in error.__notes__:
                error.__notes__[error.__notes__.index(noted.text)] = text
            noted.text = text

    def _text(self) -> str:
        made = "1 image was" if self._count == 1 else f"{self._count:,} images were"
        more = f" and {self._count - len(self._named):,} before" if self._count > len(self._named) else ""
        return (
            f"{made} made by other calls of this generator at about the same time, and may have been lost by what ran them: "
            f"{'; '.join(self._named)}{more}. To keep every result, call generator.batch(prompts, return_exceptions=True)."
        )
