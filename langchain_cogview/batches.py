"""Many requests to a generator: streamed, in batches, with their configs, a bar, and what comes of it when some fail."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AsyncExitStack, aclosing, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.runnables.config import get_config_list, merge_configs

from langchain_cogview.errors import CogViewError
from langchain_cogview.many import astream_tasks, in_tasks, in_threads, numbered, stream_in_threads
from langchain_cogview.request import ImageRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_cogview.configuration import ConfiguredGenerator
    from langchain_cogview.inputs import ImageInput
    from langchain_cogview.result import ImageResult
else:  # beside its settings, so that pydantic makes one class of both
    ConfiguredGenerator = object


def without_key(config: Any) -> Any:
    """A config, or several, without a key that has done its work when this instance was made: no frame of ours holds it."""
    if isinstance(config, Mapping):
        if "api_key" not in config.get("configurable", {}):
            return config
        return {**config, "configurable": {**config["configurable"], "api_key": "**********"}}
    return config if config is None else [without_key(each) for each in config]


@contextmanager
def bar(
    pictures: int | None,
    config: RunnableConfig | None,
    progress: bool | None,  # noqa: FBT001
) -> Iterator[tuple[RunnableConfig, Callable[[Any], None]]]:
    """The config of runs that a bar follows, and what is to be told of each result."""
    if progress is False:
        yield ensure_config(config), _unnoted
        return
    from langchain_cogview.progress import ProgressCallbackHandler  # noqa: PLC0415

    with ProgressCallbackHandler(pictures, show=progress) as shown:

        def note(result: Any) -> None:
            if isinstance(result, Exception):
                shown.count_failure(result)

        yield merge_configs(config, {"callbacks": [shown]}), note


def _unnoted(result: Any) -> None:
    pass


def configs_of(config: RunnableConfig) -> Callable[[int], RunnableConfig]:
    """The config of each of many runs: a run id is only the first one's."""
    later = {name: value for name, value in config.items() if name != "run_id"}
    return lambda number: cast("RunnableConfig", config if number == 0 else later)


def refuse_one(inputs: Any) -> None:
    """Refuse one input where many are taken: its letters or keys would be drawn.

    Raises:
        TypeError: It is one.
    """
    from langchain_core.prompt_values import PromptValue  # noqa: PLC0415

    if isinstance(inputs, str | bytes | Mapping | ImageRequest | PromptValue | BaseMessage):
        raise TypeError(
            f"This takes many inputs, and {type(inputs).__name__} is one. Put it into a list, or use invoke or ainvoke."
        )


class Collected:
    """What a batch gave so far, by the number of its input."""

    def __init__(self, count: int) -> None:
        self._results: list[Any] = [None] * count

    def keep(self, number: int, result: Any) -> bool:
        """Remember a result; whether it is one, rather than an exception."""
        self._results[number] = result
        return not isinstance(result, Exception)

    def raise_first(self) -> None:
        """Raise the first exception, if there is one."""
        all_or_first_error(self._results)


def all_or_first_error(results: list[Any]) -> list[ImageResult]:
    """The results of a batch, or its first error with all of them."""
    for result in results:
        if isinstance(result, CogViewError):
            result.batch_results = results
            raise result
    for result in results:
        if isinstance(result, Exception):
            carrier = CogViewError(
                f"An input failed with {type(result).__name__}.", hint="See __cause__ and batch_results."
            )
            carrier.batch_results = results
            raise carrier from result
    return results


class ManyRequestsGenerator(ConfiguredGenerator):
    """What `CogViewImageGenerator` does with many requests: each is a run of its own, by `invoke` or `ainvoke`."""

    def stream_many(
        self,
        inputs: Iterable[ImageInput],
        config: RunnableConfig | None = None,
        *,
        progress: bool | None = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, ImageResult | Exception]]:
        """Make the pictures of any number of requests; gives them as they finish.

        Inputs are taken as places get free, and at most twice `places()` results wait for you: an endless iterator is fine. An
        iterator that you leave stops the work; what is under way is logged when it ends.

        Args:
            inputs: As for `invoke`; taken from one thread at a time.
            config: LangChain's; its `max_concurrency` is how many requests are worked on at once.
            progress: Draw a bar (extra `progress`). None: where somebody looks at it, a terminal or a notebook.
            **kwargs: As for `invoke`.

        Yields:
            The number of the input, from 0, and its result, or the exception that it raised.
        """
        if isinstance(inputs, AsyncIterable):
            raise TypeError("stream_many takes an iterable; astream_many takes an async one too.")
        config = without_key(config)
        refuse_one(inputs)
        with bar(self._count(inputs), config, progress) as (own, note):
            config_of = configs_of(own)
            tasks = (partial(self.invoke, each, config_of(number), **kwargs) for number, each in enumerate(inputs))
            with closing(stream_in_threads(tasks, self._workers(own))) as finished:
                for number, result in finished:
                    note(result)
                    yield number, result

    async def astream_many(
        self,
        inputs: Iterable[ImageInput] | AsyncIterable[ImageInput],
        config: RunnableConfig | None = None,
        *,
        progress: bool | None = False,
        **kwargs: Any,
    ) -> AsyncIterator[tuple[int, ImageResult | Exception]]:
        """Make the pictures of any number of requests; gives them as they finish. The twin of `stream_many`.

        An iterator that is closed (`contextlib.aclosing`) cancels what is under way.
        """
        config = without_key(config)
        refuse_one(inputs)
        with bar(self._count(inputs), config, progress) as (own, note):
            config_of = configs_of(own)

            def call(number: int, each: ImageInput) -> Callable[[], Any]:
                return partial(self.ainvoke, each, config_of(number), **kwargs)

            async with AsyncExitStack() as open_:
                if isinstance(inputs, AsyncIterable):
                    pulled = await open_.enter_async_context(aclosing(numbered(inputs)))
                    tasks: Any = (call(number, each) async for number, each in pulled)
                else:
                    tasks = (call(number, each) for number, each in enumerate(inputs))
                finished = await open_.enter_async_context(aclosing(astream_tasks(tasks, self._workers(own))))
                async for number, result in finished:
                    note(result)
                    yield number, result

    def batch(
        self,
        inputs: list[ImageInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> list[ImageResult]:
        """Make the pictures of many requests.

        Every input is drawn, whatever happens to others: nothing paid is lost.

        Args:
            inputs: As for `invoke`.
            config: LangChain's; its `max_concurrency` is how many requests are worked on at once, where that is less than the
                generator's.
            return_exceptions: Give exceptions in the list in place of raising.
            **kwargs: As for `invoke`.

        Raises:
            CogViewError: After all were drawn, the first error; its `batch_results` holds every result and exception in order.
        """
        config = without_key(config)
        tasks, workers = self._batch(self.invoke, inputs, config, kwargs)
        results = in_threads(tasks, workers)
        return results if return_exceptions else all_or_first_error(results)

    async def abatch(
        self,
        inputs: list[ImageInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> list[ImageResult]:
        """Make the pictures of many requests. The twin of `batch`."""
        config = without_key(config)
        tasks, workers = self._batch(self.ainvoke, inputs, config, kwargs)
        results = await in_tasks(tasks, workers)
        return results if return_exceptions else all_or_first_error(results)

    def batch_as_completed(  # type: ignore[override]
        self,
        inputs: Sequence[ImageInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> Iterator[tuple[int, ImageResult | Exception]]:
        """Make the pictures of many requests; gives number and result as they finish.

        Raises:
            CogViewError: Unless `return_exceptions`: after all were drawn, the first error, as `batch` does.
        """
        config = without_key(config)
        tasks, workers = self._batch(self.invoke, inputs, config, kwargs)
        collected = Collected(len(tasks))
        with closing(stream_in_threads(tasks, workers)) as finished:
            for number, result in finished:
                if return_exceptions or collected.keep(number, result):
                    yield number, result
        collected.raise_first()

    async def abatch_as_completed(  # type: ignore[override]
        self,
        inputs: Sequence[ImageInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> AsyncIterator[tuple[int, ImageResult | Exception]]:
        """Make the pictures of many requests. The twin of `batch_as_completed`."""
        config = without_key(config)
        tasks, workers = self._batch(self.ainvoke, inputs, config, kwargs)
        collected = Collected(len(tasks))
        async with aclosing(astream_tasks(tasks, workers)) as finished:
            async for number, result in finished:
                if return_exceptions or collected.keep(number, result):
                    yield number, result
        collected.raise_first()

    def _count(self, inputs: Any) -> int | None:
        return len(inputs) * self.n if isinstance(inputs, Sized) else None

    def _workers(self, config: RunnableConfig) -> int:
        return min(self.places(), config.get("max_concurrency") or self.places())

    def _batch(
        self,
        call: Callable[..., Any],
        inputs: Sequence[ImageInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None,
        overrides: dict[str, Any],
    ) -> tuple[list[Callable[[], Any]], int]:
        refuse_one(inputs)
        configs = get_config_list(config, len(inputs)) if inputs else []
        tasks: list[Callable[[], Any]] = [
            partial(call, each, own, **overrides) for each, own in zip(inputs, configs, strict=True)
        ]
        models = {
            str(each.get("model") or self.model) if isinstance(each, dict) else self.model
            for each in (*inputs, overrides)
        }
        workers = max(map(self.places, models))
        return tasks, min(workers, configs[0].get("max_concurrency") or workers) if configs else 1
