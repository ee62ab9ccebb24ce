"""Threads that work for a caller who has gone send nothing more."""

from __future__ import annotations

import threading
import weakref
from contextvars import ContextVar
from typing import Final


class Stop(threading.Event):
    """Set when the caller is gone (Ctrl-C, an iterator that was left) while threads work for it.

    A stop within another's work is set with it, and not the other way round.
    """

    def __init__(self) -> None:
        super().__init__()
        self._within: weakref.WeakSet[Stop] = weakref.WeakSet()
        self._changing = threading.Lock()

    def set(self) -> None:
        """Stop this work and all work within it."""
        with self._changing:
            super().set()
            within = list(self._within)
        for each in within:
            each.set()

    def inner(self) -> Stop:
        """A stop for work within this one's."""
        stop = Stop()
        if self is not NEVER:
            with self._changing:
                self._within.add(stop)
                stopped = self.is_set()
            if stopped:
                stop.set()
        return stop


NEVER: Final = Stop()
STOPPED: Final[ContextVar[Stop]] = ContextVar("cogview_stopped", default=NEVER)
