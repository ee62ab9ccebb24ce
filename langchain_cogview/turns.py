"""The same thing once at a time in this process: threads and tasks take turns by a key, first come, first served."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Hashable, Iterator

_Place = concurrent.futures.Future[None]
"""A place in a queue; done once it is its turn."""


class Turns:
    """Who is at what.

    A wait lasts no longer than its caller says; then the caller goes on without the turn. So nobody hangs on another who
    never comes back, such as a task of an event loop that was left behind.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[Hashable, deque[_Place]] = {}

    @contextlib.contextmanager
    def turn(self, key: Hashable, seconds: float | None) -> Iterator[None]:
        """Wait for the turn, and have it until the block ends.

        In a thread that runs an event loop there is no wait: whose turn it is may be a task of that very loop.

        Args:
            key: What is done once at a time.
            seconds: How long to wait at most; None: as long as it takes.
        """
        place = self._enter(key)
        try:
            if not runs_event_loop():
                concurrent.futures.wait([place], seconds)
            yield
        finally:
            self._leave(key, place)

    @contextlib.asynccontextmanager
    async def aturn(self, key: Hashable, seconds: float | None) -> AsyncIterator[None]:
        """The twin of `turn`."""
        place = self._enter(key)
        try:
            if not place.done():
                await asyncio.wait([asyncio.wrap_future(place)], timeout=seconds)
            yield
        finally:
            self._leave(key, place)

    def forget(self) -> None:
        """Start anew, in a forked process: whose turn it was is not there."""
        self._lock = threading.Lock()
        self._queues = {}

    def _enter(self, key: Hashable) -> _Place:
        place = _Place()
        with self._lock:
            queue = self._queues.setdefault(key, deque())
            queue.append(place)
            if len(queue) == 1:
                place.set_result(None)
        return place

    def _leave(self, key: Hashable, place: _Place) -> None:
        with self._lock:
            queue = self._queues.get(key)
            if queue is None or place not in queue:
                return  # entered before a fork
            queue.remove(place)
            if not queue:
                del self._queues[key]
            elif not queue[0].done():
                queue[0].set_result(None)


def runs_event_loop() -> bool:
    """Whether this thread runs an event loop."""
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        return True
    return False


TURNS: Final = Turns()
"""Those of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=TURNS.forget)
