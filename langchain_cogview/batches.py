"""Many requests to a generator: batches, streams, and calls that a pool of others makes at the same time.

A pool of threads or `asyncio.gather` raises the error of one call, and drops the results of the others. `RecentImages` names
these images on the error, so that nothing paid is lost from sight.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AsyncExitStack, aclosing, closing, contextmanager, suppress
from functools import partial
from typing import Any, Final, cast

from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig, RunnableSerializable, ensure_config
from langchain_core.runnables.config import get_config_list, merge_configs

from langchain_cogview.catalog import DEFAULT_MODEL
from langchain_cogview.concurrency import PRIORITY, batch_work, in_thread, raised_by_signal
from langchain_cogview.errors import (
    CogViewBatchError,
    CogViewError,
    CogViewInvalidRequestError,
    is_retryable,
    printable,
)
from langchain_cogview.notebook.display import BatchResults
from langchain_cogview.pools import astream_tasks, in_tasks, in_threads, numbered, stream_in_threads
from langchain_cogview.request import ImageInput, ImageRequest
from langchain_cogview.result import ImageResult

MAX_NAMED: Final = 10
"""The most images that a note names; it counts all of them."""
_GAP_SECONDS: Final = 1.0
"""Calls that follow each other within this time belong together."""
_MAX_ERRORS: Final = 20
_MAX_LOCATION: Final = 2_000

logger = logging.getLogger(__name__)


def without_key(config: Any) -> Any:
    """Mask the key in a config, or in several, so that no frame of this package holds it.

    A key that is configured there was used when the generator was made.

    Args:
        config: The config, or a list of configs.

    Returns:
        The same with a masked key.
    """
    if isinstance(config, Mapping):
        if "api_key" not in config.get("configurable", {}):
            return config
        return {**config, "configurable": {**config["configurable"], "api_key": "**********"}}
    return config if config is None else [without_key(item) for item in config]


def traced_config(
    config: RunnableConfig | None, model: str, value: Any, overrides: Mapping[str, Any] | None = None
) -> RunnableConfig:
    """Make the config of one run, with LangSmith's metadata about the model and without the key.

    Args:
        config: The config of the caller.
        model: The generator's model.
        value: The input, which may name another model.
        overrides: The arguments of the call, which may also name one.

    Returns:
        A new config.
    """
    config = ensure_config(config)
    named = (overrides or {}).get("model")
    if isinstance(value, dict):
        named = value.get("model", named)
    elif isinstance(value, ImageRequest) and "model" in value.model_fields_set:
        named = value.model
    metadata = {"ls_provider": "zhipuai", "ls_model_name": str(named or model), "ls_model_type": "image"}
    traced: RunnableConfig = without_key({**config, "metadata": {**(config.get("metadata") or {}), **metadata}})
    return traced


@contextmanager
def logged_handler_errors(made: list[ImageResult]) -> Iterator[None]:
    """Log an error of a callback handler that was raised after the images were made, so that nothing paid is lost.

    Args:
        made: The result, once there is one.
    """
    try:
        yield
    except Exception as error:
        if not made or raised_by_signal(error):
            raise
        logger.warning("A callback handler failed after the images were made", exc_info=error)


@contextmanager
def progress_bar(
    images: int | None,
    config: RunnableConfig | None,
    progress: bool | None,  # noqa: FBT001
) -> Iterator[tuple[RunnableConfig, Callable[[Any], None]]]:
    """Show a progress bar for many runs.

    Args:
        images: The expected number of images; None where it is unknown.
        config: The config of the caller.
        progress: Whether to show the bar. None: only on a terminal or in a notebook.

    Yields:
        The config of the runs, and a function to call with each result.
    """
    if progress is False:
        yield ensure_config(config), _ignore
        return
    from langchain_cogview.callbacks import ProgressCallbackHandler  # noqa: PLC0415

    with ProgressCallbackHandler(images, show=progress) as handler:

        def count(result: Any) -> None:
            if isinstance(result, Exception):
                handler.count_failure(result)

        yield merge_configs(config, {"callbacks": [handler]}), count


async def load_progress_bar(progress: bool | None) -> None:  # noqa: FBT001
    """Load in a thread what `progress_bar` needs: the first import of its package reads files.

    Args:
        progress: As for `progress_bar`.
    """
    if progress is not False:
        await in_thread(_load_progress_bar, progress)


def _load_progress_bar(progress: bool | None) -> None:  # noqa: FBT001
    from langchain_cogview.callbacks import ProgressCallbackHandler  # noqa: PLC0415

    with suppress(ImportError):  # of the extra; showing the bar says so
        ProgressCallbackHandler(show=progress)


def _ignore(result: Any) -> None:
    pass


def _configs(config: RunnableConfig) -> Callable[[int], RunnableConfig]:
    # Only the first run has the run id of the config.
    later = {name: value for name, value in config.items() if name != "run_id"}
    return lambda number: cast("RunnableConfig", config if number == 0 else later)


def check_many(inputs: Any) -> None:
    """Refuse a single input in place of a list: its letters or keys would become prompts.

    Args:
        inputs: The inputs of a batch.

    Raises:
        CogViewInvalidRequestError: They are no list, nor anything else that has a length.
    """
    check_iterable(inputs)
    if not isinstance(inputs, Sized):
        raise CogViewInvalidRequestError(
            f"Nothing was sent: a batch takes a list of inputs, and this is of type {type(inputs).__name__}.",
            hint="Make a list of it with list(...); stream_many of the generator takes iterators too.",
        )


def check_iterable(inputs: Any, kind: Any = Iterable) -> None:
    """Refuse a single input in place of many.

    Args:
        inputs: The inputs.
        kind: What they may be.

    Raises:
        CogViewInvalidRequestError: They are something else, or a single input.
    """
    from langchain_core.prompt_values import PromptValue  # noqa: PLC0415

    is_single = isinstance(inputs, str | bytes | Mapping | ImageRequest | PromptValue | BaseMessage)
    if is_single or not isinstance(inputs, kind):
        raise CogViewInvalidRequestError(
            f"Nothing was sent: many inputs are expected, and this is {'a single one, ' if is_single else ''}of type "
            f"{type(inputs).__name__}.",
            hint="Pass a list of inputs; a single one goes to invoke or ainvoke.",
        )


def all_or_first_error(results: list[Any]) -> list[ImageResult]:
    """Return the results of a batch, or raise one of its errors: first one that may have been charged, then a final one.

    Args:
        results: A result or an exception for each input, in order.

    Returns:
        The results, if there is no exception among them.

    Raises:
        CogViewError: There is one. Its `batch_results` has all results and exceptions. It is retryable only if no image was
            made, so that repeating the whole batch is safe.
    """
    errors = [result for result in results if isinstance(result, Exception)]
    if not errors:
        return results
    cogview_errors = [error for error in errors if isinstance(error, CogViewError)]
    may_all_be_repeated = all(map(is_retryable, results))
    candidates = [error for error in cogview_errors if may_all_be_repeated or not error.is_retryable]
    if not candidates:
        message = f"{len(errors)} of the {len(results)} inputs failed: {type(errors[0]).__name__}."
        candidates = [CogViewBatchError(message)]
        candidates[0].__cause__ = errors[0]
    error = next((error for error in candidates if error.may_have_been_charged), candidates[0])
    error.batch_results = results
    if not isinstance(error, CogViewBatchError) and len(results) > 1:
        made = len(results) - len(errors)
        error.add_note(
            f"{made} of the {len(results)} inputs {'was' if made == 1 else 'were'} made. error.batch_results has the result or "
            "the exception of each input, in order."
        )
    raise error


class BatchRunnable(RunnableSerializable[ImageInput, ImageResult]):
    """A Runnable that generates images, with streams and batches of many requests.

    Each request is a run of its own, by `invoke` or `ainvoke`, in as many workers as the model allows.
    """

    model: str = DEFAULT_MODEL
    """Model of the requests that name none."""
    n: int = 1
    """The number of images for each call; each is one paid request."""

    @abstractmethod
    def max_workers(self, model: str | None = None) -> int:
        """The number of images that are generated at once.

        Args:
            model: Name of the model. None: the model of this Runnable.

        Returns:
            The number of requests in flight, plus that of images being fetched and saved.
        """

    def stream_many(
        self,
        inputs: Iterable[ImageInput],
        config: RunnableConfig | None = None,
        *,
        progress: bool | None = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, ImageResult | Exception]]:
        """Generate the images of any number of requests, and yield each result as it is finished.

        An input is read when a worker is free, and at most twice `max_workers()` results wait to be read, so an endless iterator
        is fine. Closing the iterator stops the work; requests that are in flight then are logged when they end.

        Args:
            inputs: As for `invoke`. They are read by one thread at a time.
            config: The `RunnableConfig` of the runs. Its `max_concurrency` limits the number of requests at once.
            progress: Whether to show a progress bar (extra `progress`). None: only on a terminal or in a notebook.
            **kwargs: As for `invoke`.

        Yields:
            The number of the input, from 0, and its result or the exception that it raised.

        Raises:
            CogViewInvalidRequestError: The inputs are an async iterable or a single input.
        """
        if isinstance(inputs, AsyncIterable):
            raise CogViewInvalidRequestError(
                "Nothing was sent: stream_many takes an iterable, and this is an async one.", hint="Call astream_many."
            )
        config = without_key(config)
        check_iterable(inputs)
        with progress_bar(self._count(inputs), config, progress) as (shared, count):
            config_of = _configs(shared)
            tasks = (
                partial(self._invoke_in_batch, item, config_of(number), **kwargs) for number, item in enumerate(inputs)
            )
            with closing(stream_in_threads(tasks, self._workers(shared))) as finished:
                for number, result in finished:
                    count(result)
                    yield number, result

    async def astream_many(
        self,
        inputs: Iterable[ImageInput] | AsyncIterable[ImageInput],
        config: RunnableConfig | None = None,
        *,
        progress: bool | None = False,
        **kwargs: Any,
    ) -> AsyncIterator[tuple[int, ImageResult | Exception]]:
        """Async version of `stream_many`. Closing the iterator (`contextlib.aclosing`) cancels the requests in flight.

        Yields:
            As `stream_many`.
        """
        config = without_key(config)
        check_iterable(inputs, Iterable | AsyncIterable)
        await load_progress_bar(progress)
        with progress_bar(self._count(inputs), config, progress) as (shared, count):
            config_of = _configs(shared)

            def call(number: int, item: ImageInput) -> Callable[[], Any]:
                return partial(self._ainvoke_in_batch, item, config_of(number), **kwargs)

            async with AsyncExitStack() as open_:
                if isinstance(inputs, AsyncIterable):
                    pulled = await open_.enter_async_context(aclosing(numbered(inputs)))
                    tasks: Any = (call(number, item) async for number, item in pulled)
                else:
                    tasks = (call(number, item) for number, item in enumerate(inputs))
                finished = await open_.enter_async_context(aclosing(astream_tasks(tasks, self._workers(shared))))
                async for number, result in finished:
                    count(result)
                    yield number, result

    def batch(
        self,
        inputs: list[ImageInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> list[ImageResult]:
        """Generate the images of many requests.

        An error of one request does not stop the others, so that nothing paid is lost.

        Args:
            inputs: As for `invoke`.
            config: The `RunnableConfig` of the runs. Its `max_concurrency` limits the number of requests at once, if it is less
                than `max_workers()`.
            return_exceptions: Return exceptions in the list instead of raising the first one.
            **kwargs: As for `invoke`.

        Returns:
            A result for each input, in order.

        Raises:
            CogViewError: After all requests have ended, one of the errors. Its `batch_results` has every result and exception.
                It is retryable only if no image was made; else a `CogViewBatchError` replaces retryable and foreign errors.
        """
        tasks, workers = self._tasks(self._invoke_in_batch, inputs, config, kwargs)
        results = BatchResults(in_threads(tasks, workers))
        return results if return_exceptions else all_or_first_error(results)

    async def abatch(
        self,
        inputs: list[ImageInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> list[ImageResult]:
        """Async version of `batch`.

        Returns:
            As `batch`.
        """
        tasks, workers = self._tasks(self._ainvoke_in_batch, inputs, config, kwargs)
        results = BatchResults(await in_tasks(tasks, workers))
        return results if return_exceptions else all_or_first_error(results)

    def batch_as_completed(  # type: ignore[override]
        self,
        inputs: Sequence[ImageInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> Iterator[tuple[int, ImageResult | Exception]]:
        """Generate the images of many requests, and yield each result as it is finished.

        Args:
            inputs: As for `batch`.
            config: As for `batch`.
            return_exceptions: Yield exceptions too, instead of raising the first one.
            **kwargs: As for `invoke`.

        Yields:
            The number of the input, from 0, and its result.

        Raises:
            CogViewError: As `batch`.
        """
        tasks, workers = self._tasks(self._invoke_in_batch, inputs, config, kwargs)
        results: list[Any] = [None] * len(tasks)
        with closing(stream_in_threads(tasks, workers)) as finished:
            for number, result in finished:
                results[number] = result
                if return_exceptions or not isinstance(result, Exception):
                    yield number, result
        if not return_exceptions:
            all_or_first_error(results)

    async def abatch_as_completed(  # type: ignore[override]
        self,
        inputs: Sequence[ImageInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> AsyncIterator[tuple[int, ImageResult | Exception]]:
        """Async version of `batch_as_completed`.

        Yields:
            As `batch_as_completed`.
        """
        tasks, workers = self._tasks(self._ainvoke_in_batch, inputs, config, kwargs)
        results: list[Any] = [None] * len(tasks)
        async with aclosing(astream_tasks(tasks, workers)) as finished:
            async for number, result in finished:
                results[number] = result
                if return_exceptions or not isinstance(result, Exception):
                    yield number, result
        if not return_exceptions:
            all_or_first_error(results)

    def _invoke_in_batch(self, *args: Any, **kwargs: Any) -> ImageResult:
        with batch_work():
            return self.invoke(*args, **kwargs)

    async def _ainvoke_in_batch(self, *args: Any, **kwargs: Any) -> ImageResult:
        with batch_work():
            return await self.ainvoke(*args, **kwargs)

    def _count(self, inputs: Any) -> int | None:
        return len(inputs) * self.n if isinstance(inputs, Sized) else None

    def _workers(self, config: RunnableConfig) -> int:
        return min(self.max_workers(), config.get("max_concurrency") or self.max_workers())

    def _tasks(
        self,
        call: Callable[..., Any],
        inputs: Sequence[ImageInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None,
        overrides: dict[str, Any],
    ) -> tuple[list[Callable[[], Any]], int]:
        # The calls of a batch, and how many of them run at once.
        config = without_key(config)
        check_many(inputs)
        configs = get_config_list(config, len(inputs)) if len(inputs) else []
        tasks: list[Callable[[], Any]] = [
            partial(call, item, item_config, **overrides) for item, item_config in zip(inputs, configs, strict=True)
        ]
        models = {
            str(item.get("model") or self.model) if isinstance(item, dict) else self.model
            for item in (*inputs, overrides)
        }
        workers = max(map(self.max_workers, models))
        return tasks, min(workers, configs[0].get("max_concurrency") or workers) if configs else 1


# --- calls that run at the same time


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
        """Count a call, and add a note about the images of other calls to its error.

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
