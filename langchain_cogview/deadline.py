"""One total time limit for a call, however many steps it has."""

from __future__ import annotations

import time
from typing import Final

DEADLINE: Final = "cogview.deadline"
"""The request extension that holds a `Deadline`, for transports that know it."""
_MOST_LEFT: Final = 30.0


class Deadline:
    """A moment on the monotonic clock that every step of a call looks at.

    Args:
        seconds: From its start on; None never ends.
        started: False: it starts with `start`, so that a queue before the call does not count.
    """

    __slots__ = ("_end", "_started", "seconds")

    def __init__(self, seconds: float | None, *, started: bool = True) -> None:
        self.seconds: Final = seconds
        self._end: float | None = None
        self._started: float | None = None
        if started:
            self.start()

    def start(self) -> None:
        """Let the time run; a second start changes nothing."""
        if self._started is None:
            self._started = time.monotonic()
            self._end = None if self.seconds is None else self._started + self.seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    @property
    def started(self) -> bool:
        """Whether the time runs."""
        return self._started is not None

    def remaining(self) -> float | None:
        """Seconds left, 0.0 when it has passed, None when it never ends."""
        return self.seconds if self._end is None else max(0.0, self._end - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether no time is left."""
        return self.remaining() == 0.0

    def allows(self, seconds: float) -> bool:
        """Whether a wait of `seconds` ends before it."""
        left = self.remaining()
        return left is None or seconds < left

    def is_worth_sending(self, wait: float = 0.0) -> bool:
        """Whether a request that is sent `wait` seconds from now has time for its answer: a tenth of the limit, at most 30 s.

        A picture whose answer comes too late is paid for and lost.
        """
        return self.seconds is None or self.allows(wait + min(self.seconds / 10, _MOST_LEFT))

    def clamp(self, seconds: float | None) -> float | None:
        """The shorter of `seconds` and the time that is left."""
        left = self.remaining()
        if left is None or seconds is None:
            return seconds if left is None else left
        return min(left, seconds)
