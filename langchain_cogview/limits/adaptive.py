"""How many requests an account and model accept at once, learned from successes and refusals (AIMD)."""

from __future__ import annotations

import math
from typing import Final

PROBE: Final = 10
"""The limit rises this many times slower to the level that was last refused than to any other level."""
MIN_PROBE_SUCCESSES: Final = 30
"""The fewest successes before the limit rises to that level. Without this minimum, an account that accepts one request at a time
would have one request in eleven refused."""


class AdaptiveLimit:
    """How many requests may be in flight, as successes and refusals show it. It knows no queue and takes no lock.

    The number is infinite at first, so that only the caps count. The first refusal of a burst halves it, at most to the number of
    requests that are still in flight. Each further refusal of the same burst lowers it to the number that is in flight then, but
    never below 1. It rises after as many successes as its value, counting only requests that were sent after the last refusal
    while all slots were in use: by 1, then by 2, 4 and so on while nothing is refused, but not beyond the level that was last
    refused. The step to that level is 1 and needs ten times as many successes, and at least 30.

    Args:
        epoch: The number of the first epoch. Each burst of refusals starts the next one.
        value: The limit: a whole number of 1 or more, or infinity.
        refused_at: The level that was last refused, or infinity.
        successes: How many successes count towards the next rise.
        step: By how much the limit rises next.
    """

    def __init__(
        self, epoch: int, value: float = math.inf, refused_at: float = math.inf, successes: int = 0, step: int = 1
    ) -> None:
        self.epoch = epoch
        self.value = value
        self.refused_at = refused_at
        self.successes = successes
        self.step = step

    def admits(self, in_flight: int, cap: int) -> bool:
        """Decide about one more request.

        Args:
            in_flight: The number of requests in flight.
            cap: The cap of the caller.

        Returns:
            Whether it may be sent.
        """
        return in_flight < cap and in_flight < self.value

    def record_success(self, epoch: int, cap: int, in_flight: int) -> None:
        """Record an answer.

        Args:
            epoch: When the request was sent.
            cap: The cap of its caller.
            in_flight: The number of other requests in flight.
        """
        # A request from before the last refusal, or one sent while slots were free, does not show that more are accepted.
        if epoch < self.epoch or not in_flight + 1 >= self.value < cap:
            return
        self.successes += 1
        probes = self.value + 1 == self.refused_at
        if self.successes < (max(PROBE * self.value, MIN_PROBE_SUCCESSES) if probes else self.value):
            return
        self.successes = 0
        if probes:
            self.value, self.step = self.refused_at, 1
        else:
            below = self.refused_at - 1 if self.value < self.refused_at else math.inf
            self.value = min(self.value + self.step, below, cap)
            self.step *= 2

    def record_refusal(self, epoch: int, cap: int, in_flight: int) -> None:
        """Record a refusal for too many requests in flight; the arguments are those of `record_success`."""
        if epoch == self.epoch:
            self.epoch += 1
            self.value = min(self.value, cap) // 2
            self.refused_at = math.inf
        self.value = max(1, min(self.value, in_flight))
        self.refused_at = min(self.refused_at, in_flight + 1)
        self.successes = 0
        self.step = 1

    def changed(self, in_flight: int, waiting: int, cap: float) -> None:
        """Take notice of a change in the queue. Only a shared limit has to.

        Args:
            in_flight: The number of requests in flight.
            waiting: The number of calls in the queue.
            cap: The cap of the caller that changed it; infinity if it is none.
        """

    def renewed(self) -> AdaptiveLimit:
        """Make the limit to start with in a child process.

        Returns:
            A limit without experience.
        """
        return AdaptiveLimit(self.epoch + 1)
