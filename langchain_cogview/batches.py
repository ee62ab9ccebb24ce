"""What many runs of a generator share: their configs, a bar, and what comes of it when some fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.runnables.config import merge_configs

from langchain_cogview.errors import CogViewError
from langchain_cogview.request import ImageRequest

if TYPE_CHECKING:
    from langchain_cogview.result import ImageResult


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
