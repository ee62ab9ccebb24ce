"""Work in threads for callers on an event loop.

The event loop's default executor is not used: an application may fill it with threads of its own, and then a paid image would
wait for those before it can be saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractContextManager

T = TypeVar("T")

MAX_THREADS: Final = 128
"""More than images are in flight as a rule: a folder that hangs, such as a dead network mount, holds up no other."""


def _new_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="cogview-io")


_pool = _new_pool()


async def in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run a function that blocks without blocking the event loop, in a copy of the caller's context.

    A cancelled caller stops waiting; the function itself runs to its end, and its result is dropped.

    Args:
        function: Called in a thread of this package.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Returns:
        What the function returns.

    Raises:
        Exception: What the function raises.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    context = copy_context()
    claim = threading.Lock()  # whoever has it runs the function

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():  # the caller was cancelled
            return
        if error is None:
            done.set_result(result)  # type: ignore[arg-type]
        elif isinstance(error, StopIteration):  # a future refuses it
            done.set_exception(RuntimeError(f"{type(error).__name__} was raised in a thread."))
        else:
            done.set_exception(error)

    def work() -> None:
        if not claim.acquire(blocking=False):
            return
        outcome: tuple[T | None, BaseException | None]
        try:
            outcome = context.run(function, *args, **kwargs), None
        except BaseException as error:  # noqa: BLE001  raised by the caller
            outcome = None, error
        with contextlib.suppress(RuntimeError):  # the event loop was closed in the meantime
            loop.call_soon_threadsafe(settle, *outcome)

    try:
        _pool.submit(work)
    except RuntimeError:
        # The interpreter shuts down, or the system has no thread left. What was paid for is worth a blocked event loop.
        if claim.acquire(blocking=False):
            return function(*args, **kwargs)
    return await done


async def loaded(base_url: str) -> None:
    """Have a thread load what the first call to a service needs: the HTTP stack, and the certificates for https.

    Both take tens of milliseconds, in which the event loop would stand still.
    """
    scheme = base_url.partition(":")[0]
    if scheme not in _LOADED:
        await in_thread(_load, scheme)
        _LOADED.add(scheme)


def _load(scheme: str) -> None:
    for name in ("langchain_cogview.generation", *_MODULES.get(scheme, _HTTP_MODULES)):
        importlib.import_module(name)
    if scheme == "https":
        environment = importlib.import_module("langchain_cogview.api.environment")
        with contextlib.suppress(Exception):  # told by the call that needs them
            environment.tls_context()


_HTTP_MODULES: Final = ("anyio.streams.tls",)
_MODULES: Final = {"sandbox": ("langchain_cogview.sandbox.service",)}
_LOADED: Final[set[str]] = set()


@contextlib.asynccontextmanager
async def entered_in_thread(context: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enter and leave a context manager that blocks, in threads; what was entered is left, whenever the caller is cancelled."""
    entering = asyncio.create_task(in_thread(context.__enter__))
    try:
        entered = await asyncio.shield(entering)
    except asyncio.CancelledError:
        await asyncio.wait([entering])
        if entering.exception() is None:
            await in_thread(context.__exit__, None, None, None)
        raise
    try:
        yield entered
    except BaseException as error:
        if not await in_thread(context.__exit__, type(error), error, error.__traceback__):
            raise
    else:
        await in_thread(context.__exit__, None, None, None)


def _after_fork() -> None:
    global _pool  # noqa: PLW0603  the threads are the parent's
    _pool = _new_pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
