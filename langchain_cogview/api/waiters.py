"""How a thread or a task waits for a slot of the limiter, and is woken when it is granted one."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_cogview.api.limiter import Slot
    from langchain_cogview.concurrency import Deadline
    from langchain_cogview.errors import CogViewConfigurationError

_LOOK_SECONDS: Final = 0.5
"""Seconds after which a waiting task checks for slots that are held beyond their time limit."""


class Waiter(ABC):
    """A thread or task that waits. `gone` means that it is not in the queue: not yet, granted, or withdrawn."""

    loop: asyncio.AbstractEventLoop | None = None
    """The event loop of a waiting task; None for a thread."""

    def __init__(self, cap: int, check_seconds: float, *, is_batch: bool) -> None:
        self.cap = cap
        self.check_seconds = check_seconds
        self.is_batch = is_batch
        self.gone = True
        self.was_skipped = False
        self.slot: Slot | None = None
        self.error: CogViewConfigurationError | None = None

    @abstractmethod
    def wake(self) -> bool:
        """Resume the waiter. Returns False if it can never resume."""


class ThreadWaiter(Waiter):
    """A thread that waits."""

    def __init__(self, cap: int, check_seconds: float, *, is_batch: bool) -> None:
        super().__init__(cap, check_seconds, is_batch=is_batch)
        self._granted = threading.Lock()
        self._granted.acquire()

    def wake(self) -> bool:
        """Resume the thread.

        Returns:
            True.
        """
        self._granted.release()
        return True

    def wait(self, deadline: Deadline | None, cancelled: threading.Event | None, look: Callable[[], None]) -> bool:
        """Wait until a slot is granted, the deadline passes or `cancelled` is set. Calls `look` regularly.

        Returns:
            Whether a slot was granted.
        """
        while not (cancelled and cancelled.is_set()) and not (deadline and deadline.passed):
            left = deadline.remaining() if deadline else None
            if self._granted.acquire(timeout=self.check_seconds if left is None else min(left, self.check_seconds)):
                return True
            look()
        return False


class TaskWaiter(Waiter):
    """A task that waits, in its event loop."""

    def __init__(self, cap: int, check_seconds: float, *, is_batch: bool) -> None:
        super().__init__(cap, check_seconds, is_batch=is_batch)
        self.loop = self._loop = asyncio.get_running_loop()
        self._granted: asyncio.Future[None] = self._loop.create_future()

    def wake(self) -> bool:
        """Resume the task.

        Returns:
            False if its event loop is closed.
        """
        try:
            if _running_loop() is self._loop:
                self._go()
            else:
                self._loop.call_soon_threadsafe(self._go)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def _go(self) -> None:
        if not self._granted.done():
            self._granted.set_result(None)

    async def wait(
        self, deadline: Deadline | None, look: Callable[[], None], cancelled: threading.Event | None
    ) -> bool:
        """Async version of `ThreadWaiter.wait`.

        Returns:
            As `ThreadWaiter.wait`.
        """
        timer = self._loop.call_later(_LOOK_SECONDS, self._look, look)
        try:
            if (
                deadline is None and cancelled is None
            ):  # the usual case: a wait with a time limit costs four times as much
                await self._granted
                return True
            while not (cancelled and cancelled.is_set()) and not (deadline and deadline.passed):
                left = [] if deadline is None or (rest := deadline.remaining()) is None else [rest]
                # Not `wait_for`, which would cancel the future while another thread is about to grant the slot.
                await asyncio.wait(
                    [self._granted], timeout=min([*left, self.check_seconds] if cancelled else left, default=None)
                )
                if self._granted.done():
                    return True
            return False
        finally:
            (self._timer or timer).cancel()

    _timer: asyncio.TimerHandle | None = None

    def _look(self, look: Callable[[], None]) -> None:
        look()
        if not self._granted.done():
            self._timer = self._loop.call_later(_LOOK_SECONDS, self._look, look)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
