"""Bounded worker pools, in threads or on an event loop: they run tasks from an iterable and yield results as they finish.

Workers are started one by one as tasks are found. At most twice as many results as there are workers wait for the caller.
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


def in_threads(tasks: Sequence[Callable[[], Any]], workers: int) -> list[Any]:
    """Run tasks in threads, `workers` at a time.

    Returns:
        The result of each task, or the exception that it raised, in the order of the tasks.
    """
    if len(tasks) <= 1:
        return [or_error(task) for task in tasks]
    results: list[Any] = [None] * len(tasks)
    with (
        _logging_lost_results(results),
        contextlib.closing(stream_in_threads(tasks, min(workers, len(tasks)))) as finished,
    ):
        for number, result in finished:
            results[number] = result
    return results


async def in_tasks(tasks: Sequence[Callable[[], Awaitable[Any]]], workers: int) -> list[Any]:
    """Async version of `in_threads`.

    Returns:
        The result of each task, or the exception that it raised, in the order of the tasks.
    """
    if len(tasks) <= 1:
        return [await aor_error(task) for task in tasks]
    results: list[Any] = [None] * len(tasks)
    with _logging_lost_results(results):
        async with contextlib.aclosing(astream_tasks(tasks, min(workers, len(tasks)))) as finished:
            async for number, result in finished:
                results[number] = result
    return results


def stream_in_threads(tasks: Iterable[Callable[[], Any]], workers: int) -> Generator[tuple[int, Any], None, None]:
    """Run tasks in daemon threads, and yield results as they finish.

    A caller that closes the iterator cancels the work: no further task is started and no further request is sent. The results of
    tasks that were running are logged when they end.

    Args:
        tasks: Read one at a time, by one thread at a time; it can be endless. An exception that it raises is raised here after
            the results of all earlier tasks.
        workers: The most tasks that run at once.

    Returns:
        A generator of the number of each task, from 0, with its result or the exception that it raised.
    """
    return _Threads(tasks, workers).results()


class _Threads:
    def __init__(self, tasks: Iterable[Callable[[], Any]], workers: int) -> None:
        self._tasks = enumerate(tasks)
        self._max_workers = workers
        self._pulling = threading.Lock()
        self._unread = threading.Semaphore(2 * workers)
        self._finished: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._is_abandoned = False
        self._cancel_token = CANCEL_TOKEN.get().child()
        token = CANCEL_TOKEN.set(self._cancel_token)
        self._context = copy_context()
        CANCEL_TOKEN.reset(token)
        self._workers = 0

    def results(self) -> Generator[tuple[int, Any], None, None]:
        self._start_worker()
        failed: BaseException | None = None
        ended = 0
        try:
            while ended < self._workers:
                number, result = self._finished.get()
                if number is _END:
                    ended += 1
                    failed = failed or result
                    continue
                self._unread.release()
                yield number, _without_exit(result)
        except BaseException as error:
            if not isinstance(error, GeneratorExit):
                error.add_note(
                    "Requests that were in flight may have been charged; their results are logged if they end."
                )
            self._abandon()
            raise
        if failed is not None:
            raise failed

    def _abandon(self) -> None:
        self._is_abandoned = True
        self._cancel_token.set()
        self._unread.release(self._max_workers)
        while not self._finished.empty():
            number, result = self._finished.get()
            if number is not _END:
                _log_lost(result)

    def _start_worker(self) -> None:
        worker = threading.Thread(target=self._work, daemon=True, name="cogview")
        self._workers += 1
        try:
            worker.start()
        except RuntimeError:  # the system has no thread left: the workers that run do all tasks
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
        self._unread.acquire()
        with self._pulling:
            if self._cancel_token.is_set():
                return None
            try:
                # In the caller's context, because the code that produces the inputs may be traced.
                task = self._context.run(next, self._tasks, None)
            except BaseException:
                self._tasks = enumerate(())
                raise
            if task is not None and self._workers < self._max_workers:
                self._start_worker()
            return task

    def _run(self, number: int, task: Callable[[], Any]) -> None:
        try:
            result = self._context.copy().run(or_error, task)
        except BaseException as error:  # noqa: BLE001  the same
            result = error
        if self._is_abandoned:
            _log_lost(result)
        self._finished.put((number, result))


def astream_tasks(
    tasks: Iterable[Callable[[], Awaitable[Any]]] | AsyncIterable[Callable[[], Awaitable[Any]]], workers: int
) -> AsyncGenerator[tuple[int, Any], None]:
    """Async version of `stream_in_threads`, for iterables and async iterables. Closing the generator cancels running tasks.

    Returns:
        An async generator of the number of each task, from 0, with its result or the exception that it raised.
    """
    return _Tasks(tasks, workers).results()


class _Tasks:
    def __init__(
        self,
        tasks: Iterable[Callable[[], Awaitable[Any]]] | AsyncIterable[Callable[[], Awaitable[Any]]],
        workers: int,
    ) -> None:
        # An ordinary iterable is read without switching to other tasks of the event loop.
        self._tasks = numbered(tasks) if isinstance(tasks, AsyncIterable) else _counted(tasks)
        self._max_workers = workers
        self._pulling = asyncio.Lock()
        self._unread = asyncio.Semaphore(2 * workers)
        self._finished: asyncio.Queue[tuple[Any, Any]] = asyncio.Queue()
        self._started = 0
        self._workers: list[asyncio.Task[None]] = []
        self._is_abandoned = False

    async def results(self) -> AsyncGenerator[tuple[int, Any], None]:
        self._start_worker()
        failed: BaseException | None = None
        ended = 0
        try:
            while ended < self._started:
                number, result = await self._finished.get()
                if number is _END:
                    ended += 1
                    failed = failed or result
                    continue
                self._unread.release()
                yield number, result
            if failed is not None:
                raise failed
        finally:
            await self._abandon()

    async def _abandon(self) -> None:
        self._is_abandoned = True
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        while not self._finished.empty():
            number, result = self._finished.get_nowait()
            if number is not _END:
                _log_lost(result)
        if isinstance(self._tasks, AsyncGenerator):
            await self._tasks.aclose()

    def _start_worker(self) -> None:
        # With an eager task factory a worker runs inside `create_task`, perhaps to its end: it is counted before, and started by
        # the event loop, so that workers do not run inside the worker that starts them.
        self._started += 1
        asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        if not self._is_abandoned:
            self._workers.append(asyncio.create_task(self._work()))

    async def _work(self) -> None:
        failed: BaseException | None = None
        try:
            while (task := await self._next()) is not None:
                self._finished.put_nowait((task[0], await aor_error(task[1])))
        except (Exception, asyncio.CancelledError) as error:  # raised by the caller's task
            failed = error
            if self._is_abandoned:
                raise
        finally:
            self._finished.put_nowait((_END, failed))

    async def _next(self) -> tuple[int, Callable[[], Awaitable[Any]]] | None:
        await self._unread.acquire()
        if isinstance(self._tasks, AsyncGenerator):
            async with self._pulling:
                task = await anext(self._tasks, None)
        else:
            task = next(self._tasks, None)
        if task is not None and self._started < self._max_workers:
            self._start_worker()
        return task


def _counted(items: Iterable[Any]) -> Generator[tuple[int, Any], None, None]:
    # A generator, and not `enumerate` itself: it is over once the iterable has raised.
    yield from enumerate(items)


async def numbered(items: AsyncIterable[Any]) -> AsyncGenerator[tuple[int, Any], None]:
    """Yield the items of an async iterable with their numbers from 0."""
    number = -1
    async for item in items:
        yield (number := number + 1), item


def _without_exit(result: Any) -> Any:
    """Return a task's result. An exception that would have ended its thread is raised in the caller's."""
    if isinstance(result, BaseException) and not isinstance(result, Exception):
        raise result
    return result


@contextlib.contextmanager
def _logging_lost_results(results: list[Any]) -> Iterator[None]:
    """Log the results that a caller does not receive because it leaves early."""
    try:
        yield
    except BaseException:
        for result in results:
            _log_lost(result)
        raise


def _log_lost(result: Any) -> None:
    if result is not None and not isinstance(result, BaseException):
        images = result if isinstance(result, list) else getattr(result, "images", ())
        locations = [f"request id {image.request_id}: {image.path or image.uri or image.url}" for image in images]
        logger.warning("The caller left; a result was not taken: %r %s", result, visible("; ".join(locations)))


def or_error(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the result of a call, or the exception that it raises."""
    try:
        return call(*args, **kwargs)
    except Exception as error:  # recorded, so that the others go on
        if raised_by_signal(error):
            raise
        return error


async def aor_error(call: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    """Return the result of an awaited call, or the exception that it raises."""
    try:
        return await call(*args, **kwargs)
    except Exception as error:  # recorded, so that the others go on
        if raised_by_signal(error):
            raise
        return error
