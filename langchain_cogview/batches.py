"""Many requests to a generator: streamed, in batches, with their configs, a bar, and what comes of it when some fail."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AsyncExitStack, aclosing, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.runnables.config import get_config_list, merge_configs

from langchain_cogview.errors import CogViewBatchError, CogViewError, is_retryable
from langchain_cogview.request import ImageRequest
from langchain_cogview.worker_pool import astream_tasks, numbered, stream_in_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_cogview.request import ImageInput
    from langchain_cogview.result import ImageResult


class Generator(Protocol):
    """What many requests need of `CogViewImageGenerator`."""

    @property
    def model(self) -> str:
        """The model of requests that name none."""

    @property
    def n(self) -> int:
        """How many images a request makes that does not say."""

    def invoke(self, input: ImageInput, config: RunnableConfig | None = None, **kwargs: Any) -> ImageResult:  # noqa: A002
        """Make the images of one request."""
        ...

    async def ainvoke(self, input: ImageInput, config: RunnableConfig | None = None, **kwargs: Any) -> ImageResult:  # noqa: A002
        """Async version of `invoke`."""
        ...

    def max_workers(self, model: str | None = None) -> int:
        """How many images are worked on at once."""
        ...


def without_key(config: Any) -> Any:
    """A config, or several, without a key that has done its work when this instance was made: no frame of ours holds it."""
    if isinstance(config, Mapping):
        if "api_key" not in config.get("configurable", {}):
            return config
        return {**config, "configurable": {**config["configurable"], "api_key": "**********"}}
    return config if config is None else [without_key(each) for each in config]


def traced_config(
    config: RunnableConfig | None, model: str, given: Any, overrides: Mapping[str, Any] | None = None
) -> RunnableConfig:
    """The config of one run, with what traces tell of an image model, and without the key.

    Args:
        config: The caller's.
        model: The generator's.
        given: The input, which may name another model.
        overrides: Arguments of the call, which may name another one, too.

    Returns:
        A config of its own.
    """
    config = ensure_config(config)
    named = (overrides or {}).get("model")
    if isinstance(given, dict):
        named = given.get("model", named)
    elif isinstance(given, ImageRequest) and "model" in given.model_fields_set:
        named = given.model
    metadata = {"ls_provider": "zhipuai", "ls_model_name": str(named or model), "ls_model_type": "image"}
    traced: RunnableConfig = without_key({**config, "metadata": {**(config.get("metadata") or {}), **metadata}})
    return traced


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
    """The results of a batch, or an error with all of them: one that may have been charged first, then one that is final.

    A retryable error is raised only where it is safe to repeat the whole batch, that is, where no input was made.
    """
    errors = [result for result in results if isinstance(result, Exception)]
    if not errors:
        return results
    ours = [error for error in errors if isinstance(error, CogViewError)]
    raised = [error for error in ours if not error.is_retryable]
    if all(map(is_retryable, results)):
        raised = ours
    if not raised:
        raised = [CogViewBatchError(f"{len(errors)} of the {len(results)} inputs failed: {type(errors[0]).__name__}.")]
        raised[0].__cause__ = errors[0]
    error = next((error for error in raised if error.may_have_been_charged), raised[0])
    error.batch_results = results
    raise error


def _count(generator: Generator, inputs: Any) -> int | None:
    return len(inputs) * generator.n if isinstance(inputs, Sized) else None


def _workers(generator: Generator, config: RunnableConfig) -> int:
    return min(generator.max_workers(), config.get("max_concurrency") or generator.max_workers())


def stream(
    generator: Generator,
    inputs: Iterable[ImageInput],
    config: RunnableConfig | None,
    *,
    progress: bool | None,
    overrides: dict[str, Any],
) -> Iterator[tuple[int, ImageResult | Exception]]:
    """Do what `CogViewImageGenerator.stream_many` says."""
    if isinstance(inputs, AsyncIterable):
        raise TypeError("stream_many takes an iterable; astream_many takes an async one too.")
    config = without_key(config)
    refuse_one(inputs)
    with bar(_count(generator, inputs), config, progress) as (own, note):
        config_of = configs_of(own)
        tasks = (partial(generator.invoke, each, config_of(number), **overrides) for number, each in enumerate(inputs))
        with closing(stream_in_threads(tasks, _workers(generator, own))) as finished:
            for number, result in finished:
                note(result)
                yield number, result


async def astream(
    generator: Generator,
    inputs: Iterable[ImageInput] | AsyncIterable[ImageInput],
    config: RunnableConfig | None,
    *,
    progress: bool | None,
    overrides: dict[str, Any],
) -> AsyncIterator[tuple[int, ImageResult | Exception]]:
    """Async version of `stream`."""
    config = without_key(config)
    refuse_one(inputs)
    with bar(_count(generator, inputs), config, progress) as (own, note):
        config_of = configs_of(own)

        def call(number: int, each: ImageInput) -> Callable[[], Any]:
            return partial(generator.ainvoke, each, config_of(number), **overrides)

        async with AsyncExitStack() as open_:
            if isinstance(inputs, AsyncIterable):
                pulled = await open_.enter_async_context(aclosing(numbered(inputs)))
                tasks: Any = (call(number, each) async for number, each in pulled)
            else:
                tasks = (call(number, each) for number, each in enumerate(inputs))
            finished = await open_.enter_async_context(aclosing(astream_tasks(tasks, _workers(generator, own))))
            async for number, result in finished:
                note(result)
                yield number, result


def batch_of(
    generator: Generator,
    call: Callable[..., Any],
    inputs: Sequence[ImageInput],
    config: RunnableConfig | Sequence[RunnableConfig] | None,
    overrides: dict[str, Any],
) -> tuple[list[Callable[[], Any]], int]:
    """The calls of a batch, and how many of them run at once."""
    config = without_key(config)
    refuse_one(inputs)
    configs = get_config_list(config, len(inputs)) if inputs else []
    tasks: list[Callable[[], Any]] = [
        partial(call, each, own, **overrides) for each, own in zip(inputs, configs, strict=True)
    ]
    models = {
        str(each.get("model") or generator.model) if isinstance(each, dict) else generator.model
        for each in (*inputs, overrides)
    }
    workers = max(map(generator.max_workers, models))
    return tasks, min(workers, configs[0].get("max_concurrency") or workers) if configs else 1


def as_completed(
    generator: Generator,
    inputs: Sequence[ImageInput],
    config: RunnableConfig | Sequence[RunnableConfig] | None,
    *,
    return_exceptions: bool,
    overrides: dict[str, Any],
) -> Iterator[tuple[int, ImageResult | Exception]]:
    """Do what `CogViewImageGenerator.batch_as_completed` says."""
    tasks, workers = batch_of(generator, generator.invoke, inputs, config, overrides)
    collected = Collected(len(tasks))
    with closing(stream_in_threads(tasks, workers)) as finished:
        for number, result in finished:
            if return_exceptions or collected.keep(number, result):
                yield number, result
    collected.raise_first()


async def aas_completed(
    generator: Generator,
    inputs: Sequence[ImageInput],
    config: RunnableConfig | Sequence[RunnableConfig] | None,
    *,
    return_exceptions: bool,
    overrides: dict[str, Any],
) -> AsyncIterator[tuple[int, ImageResult | Exception]]:
    """Async version of `as_completed`."""
    tasks, workers = batch_of(generator, generator.ainvoke, inputs, config, overrides)
    collected = Collected(len(tasks))
    async with aclosing(astream_tasks(tasks, workers)) as finished:
        async for number, result in finished:
            if return_exceptions or collected.keep(number, result):
                yield number, result
    collected.raise_first()
