"""Many calls side by side: pulled from an iterable as places get free, given back in the order of finishing.

Nothing is opened at once: a worker takes the next task when it is done with the last, and no more than twice as many results
as there are places wait for the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.concurrency import CANCEL_TOKEN, raised_by_signal
from langchain_cogview.text import visible

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence

logger = logging.getLogger(__name__)

_END: Final = object()


def in_threads(tasks: Sequence[Callable[[], Any]], places: int) -> list[Any]:
    """What each task gives, or the exception that it raises, in the order of the tasks, `places` at a time."""
    if len(tasks) <= 1:
        return [or_error(task) for task in tasks]
    results: list[Any] = [None] * len(tasks)
    with _told_when_left(results), contextlib.closing(stream_in_threads(tasks, min(places, len(tasks)))) as finished:
        for number, result in finished:
            results[number] = result
    return results


async def in_tasks(tasks: Sequence[Callable[[], Awaitable[Any]]], places: int) -> list[Any]:
    """The twin of `in_threads`."""
    if len(tasks) <= 1:
        return [await aor_error(task) for task in tasks]
    results: list[Any] = [None] * len(tasks)
    with _told_when_left(results):
        async with contextlib.aclosing(astream_tasks(tasks, min(places, len(tasks)))) as finished:
            async for number, result in finished:
                results[number] = result
    return results


def stream_in_threads(tasks: Iterable[Callable[[], Any]], places: int) -> Generator[tuple[int, Any], None, None]:
    """The number of each task, from 0, and what it gives or raises, as they finish; `places` at a time.

    They run in daemon threads that nobody has to wait for. A caller that leaves the iterator stops the work: nothing more is
    taken or sent; what was under way is logged when it ends.

    Args:
        tasks: Pulled one by one, by one thread at a time; may be endless. What it raises is raised here, after all
            that was taken before has been given back.
        places: How many run at once.
    """
    return _Threads(tasks, places).results()


class _Threads:
    def __init__(self, tasks: Iterable[Callable[[], Any]], places: int) -> None:
        self._tasks = enumerate(tasks)
        self._places = places
        self._pulling = threading.Lock()
        self._room = threading.Semaphore(2 * places)
        self._finished: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._left = False
        self._stopped = CANCEL_TOKEN.get().child()
        token = CANCEL_TOKEN.set(self._stopped)
        self._context = copy_context()
        CANCEL_TOKEN.reset(token)
        self._workers = 0

    def results(self) -> Generator[tuple[int, Any], None, None]:
        self._hire()
        failed: BaseException | None = None
        ended = 0
        try:
            while ended < self._workers:
                number, result = self._finished.get()
                if number is _END:
                    ended += 1
                    failed = failed or result
                    continue
                self._room.release()
                yield number, _without_exit(result)
        except BaseException:
            self._leave()
            raise
        if failed is not None:
            raise failed

    def _leave(self) -> None:
        self._left = True
        self._stopped.set()
        self._room.release(self._places)
        while not self._finished.empty():
            number, result = self._finished.get()
            if number is not _END:
                _told_untaken(result)

    def _hire(self) -> None:
        worker = threading.Thread(target=self._work, daemon=True, name="cogview")
        self._workers += 1
        try:
            worker.start()
        except RuntimeError:  # the system has no thread left: those that work do it all
            self._workers -= 1
            if not self._workers:
                raise

    def _work(self) -> None:
        failed: BaseException | None = None
        try:
            while (task := self._next()) is not None:
                self._run(*task)
        except BaseException as error:  # noqa: BLE001  raised by the caller's thread, which must not wait for ever
            failed = error
        self._finished.put((_END, failed))

    def _next(self) -> tuple[int, Callable[[], Any]] | None:
        self._room.acquire()
        with self._pulling:
            if self._stopped.is_set():
                return None
            try:
                # In the caller's context: what makes the inputs may be traced and counted, too.
                task = self._context.run(next, self._tasks, None)
            except BaseException:
                self._tasks = enumerate(())
                raise
            if task is not None and self._workers < self._places:
                self._hire()
            return task

    def _run(self, number: int, task: Callable[[], Any]) -> None:
        try:
            result = self._context.copy().run(or_error, task)
        except BaseException as error:  # noqa: BLE001  the same
            result = error
        if self._left:
            _told_untaken(result)
        self._finished.put((number, result))


def astream_tasks(
    tasks: Iterable[Callable[[], Awaitable[Any]]] | AsyncIterable[Callable[[], Awaitable[Any]]], places: int
) -> AsyncGenerator[tuple[int, Any], None]:
    """The twin of `stream_in_threads`, for an iterable or an async one. A caller that leaves cancels what is under way."""
    return _Tasks(tasks, places).results()


class _Tasks:
    def __init__(
        self,
        tasks: Iterable[Callable[[], Awaitable[Any]]] | AsyncIterable[Callable[[], Awaitable[Any]]],
        places: int,
    ) -> None:
        # An ordinary iterable is pulled without the turns of the event loop that an asynchronous one takes.
        self._tasks = numbered(tasks) if isinstance(tasks, AsyncIterable) else _counted(tasks)
        self._places = places
        self._pulling = asyncio.Lock()
        self._room = asyncio.Semaphore(2 * places)
        self._finished: asyncio.Queue[tuple[Any, Any]] = asyncio.Queue()
        self._hired = 0
        self._workers: list[asyncio.Task[None]] = []
        self._left = False

    async def results(self) -> AsyncGenerator[tuple[int, Any], None]:
        self._hire()
        failed: BaseException | None = None
        ended = 0
        try:
            while ended < self._hired:
                number, result = await self._finished.get()
                if number is _END:
                    ended += 1
                    failed = failed or result
                    continue
                self._room.release()
                yield number, result
            if failed is not None:
                raise failed
        finally:
            await self._leave()

    async def _leave(self) -> None:
        self._left = True
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        while not self._finished.empty():
            number, result = self._finished.get_nowait()
            if number is not _END:
                _told_untaken(result)
        if isinstance(self._tasks, AsyncGenerator):
            await self._tasks.aclose()

    def _hire(self) -> None:
        # With an eager task factory a worker runs inside `create_task`, perhaps to its end: it is counted before, and started by
        # the event loop, so that workers which hire each other do not run inside each other.
        self._hired += 1
        asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        if not self._left:
            self._workers.append(asyncio.create_task(self._work()))

    async def _work(self) -> None:
        failed: BaseException | None = None
        try:
            while (task := await self._next()) is not None:
                self._finished.put_nowait((task[0], await aor_error(task[1])))
        except (Exception, asyncio.CancelledError) as error:  # raised by the caller's task
            failed = error
            if self._left:
                raise
        finally:
            self._finished.put_nowait((_END, failed))

    async def _next(self) -> tuple[int, Callable[[], Awaitable[Any]]] | None:
        await self._room.acquire()
        if isinstance(self._tasks, AsyncGenerator):
            async with self._pulling:
                task = await anext(self._tasks, None)
        else:
            task = next(self._tasks, None)
        if task is not None and self._hired < self._places:
            self._hire()
        return task


def _counted(items: Iterable[Any]) -> Generator[tuple[int, Any], None, None]:
    # A generator, and not `enumerate` itself: it is over once the iterable has raised.
    yield from enumerate(items)


async def numbered(items: AsyncIterable[Any]) -> AsyncGenerator[tuple[int, Any], None]:
    """The items of an async iterable, with their numbers from 0."""
    number = -1
    async for item in items:
        yield (number := number + 1), item


def _without_exit(result: Any) -> Any:
    """A task's result; what would have ended its thread ends the caller's."""
    if isinstance(result, BaseException) and not isinstance(result, Exception):
        raise result
    return result


@contextlib.contextmanager
def _told_when_left(results: list[Any]) -> Iterator[None]:
    """A caller that leaves before all is done is told what it leaves behind."""
    try:
        yield
    except BaseException:
        for result in results:
            _told_untaken(result)
        raise


def _told_untaken(result: Any) -> None:
    if result is not None and not isinstance(result, BaseException):
        images = result if isinstance(result, list) else getattr(result, "images", ())
        places = [f"request id {image.request_id}: {image.path or image.uri or image.url}" for image in images]
        logger.warning("The caller left; a result was not taken: %r %s", result, visible("; ".join(places)))


def or_error(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call gives, or the exception that it raises."""
    try:
        return call(*args, **kwargs)
    except Exception as error:  # recorded, so that the others go on
        if raised_by_signal(error):
            raise
        return error


async def aor_error(call: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    """The twin of `or_error`."""
    try:
        return await call(*args, **kwargs)
    except Exception as error:  # recorded, so that the others go on
        if raised_by_signal(error):
            raise
        return error
