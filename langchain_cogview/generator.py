"""`CogViewImageGenerator`, the Runnable."""

from __future__ import annotations

import logging
import warnings
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, Unpack, cast

from langchain_core.caches import BaseCache
from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.rate_limiters import BaseRateLimiter
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, ValidationInfo, field_validator, model_validator

from langchain_cogview.api.redaction import SafeErrors, attempt, with_secret_key
from langchain_cogview.api.settings import (
    SANDBOX_KEY,
    Service,
    find_service,
    is_sandbox,
    preload,
    resolve_key,
    service_warnings,
)
from langchain_cogview.batches import (
    aas_completed,
    all_or_first_error,
    as_completed,
    astream,
    batch_of,
    stream,
    traced_config,
)
from langchain_cogview.catalog import DEFAULT_MODEL, Quality, Region, model_info, price_of
from langchain_cogview.concurrency import raised_by_signal
from langchain_cogview.cost import Budget, Money, Reservation, checked_amount, reserved
from langchain_cogview.events import NO_DISPATCHER, EventDispatcher
from langchain_cogview.notebook import status_line
from langchain_cogview.notebook.previews import aremember, remember
from langchain_cogview.request import (
    REQUEST_DEFAULTS,
    GeneratorSettings,
    ImageInput,
    ImageRequest,
    check_names,
    checked_seconds,
    checked_settings,
    request_of,
    specified,
)
from langchain_cogview.result import ImageResult
from langchain_cogview.tasks import ImageTask, checked_task
from langchain_cogview.worker_pool import in_tasks, in_threads

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from langchain_cogview.api.tasks import TasksClient
    from langchain_cogview.generation import CallSettings, ImageCall

_FETCHING = 4
_INJECTED: Final = ("http_client", "http_async_client", "rate_limiter", "cache", "storage_options")
_SERVICE: Final = frozenset({"api_key", "region", "base_url"})

_HANDLER_FAILED: Final = "A callback handler failed after the pictures were made"
RunManager = CallbackManagerForChainRun | AsyncCallbackManagerForChainRun

logger = logging.getLogger(__name__)


class CogViewImageGenerator(SafeErrors, RunnableSerializable[ImageInput, ImageResult]):
    """Pictures from Zhipu's CogView endpoint, as a Runnable.

    Setup:
        Install `langchain-cogview`, and set `ZHIPUAI_API_KEY` (a key from open.bigmodel.cn, mainland China) or
        `ZAI_API_KEY` (a key from z.ai, international). A key is good on its own platform only.

    Instantiation:
        >>> from langchain_cogview import CogViewImageGenerator
        >>> generator = CogViewImageGenerator(base_url="sandbox:", size="16:9")  # offline; leave base_url out for the service

    Invocation:
        >>> result = generator.invoke("a cute little kitten")
        >>> result.images[0].width, result.images[0].height
        (1344, 768)

        Per call: `generator.invoke({"prompt": "a kitten", "size": "square"})`, `generator.bind(quality="hd")`.

    Async, many, in a chain:
        `await generator.ainvoke(...)`, `generator.batch([...])`, `generator.stream_many(prompts)`, `prompt_template | generator`.

    Args:
        model: One of the catalog's models, or any other, with a warning.
        api_key: None: from the platform's environment variable.
        region: `china` or `international`. None: as the base URL or the key that is set tells, else China.
        base_url: The API's, or `"sandbox:"` for the offline service. None: `COGVIEW_BASE_URL`, else the region's.
        size: As in `ImageRequest`. None: the model's default.
        quality: `standard` or `hd`. None: the model's default.
        n: Pictures for each call; each is one request, and one price.
        user_id: The end user, for the provider's abuse reports; 6 to 128 characters.
        watermark_enabled: False only for accounts that signed the provider's waiver.
        timeout: Seconds for one picture in all: look-up, connect, answer, waits between attempts, download and save. The queue
            for a place in flight, and for the `rate_limiter`, comes before it, and with a `cache` an equal request that is under
            way. None: no limit.
        max_retries: Further attempts of a request that provably did not run, while a tenth of `timeout` (at most 30 s) is left
            for the answer.
        retry_unknown: Also send again what may have been made and charged. Can pay twice.
        max_concurrency: Requests in flight, of all generators, threads and event loops of this process with the same key, model
            and service together. None: the catalog's figure for the model. It is lowered by itself while the service
            refuses (code 1302), and raised again. A task holds its place until it ends, one that was submitted does not.
        rate_limiter: A LangChain rate limiter, asked before every attempt.
        http_client: An `httpx.Client` or `httpx2.Client`, used for sync API requests as it is, and never closed; `timeout` is
            then looked at between its socket operations. Pictures are fetched by connections of our own.
        http_async_client: The same for async ones.
        fallback_models: Asked in this order when the model before is busy, over its limit or unavailable after all attempts,
            that is, did not run. Never after a block or an unknown outcome.
        use_tasks: The task endpoint: a paid POST of milliseconds, then free polls. `auto`: where the model allows it.
        poll_interval: Seconds between two polls of a task.
        prices: Of one picture by model, in the platform's currency, in place of the catalog's list prices.
        download: Fetch the bytes. False: the result has the URL alone, which ends after a day to a week.
        output_dir: A folder, made when missing, or a URL that fsspec knows, such as `s3://bucket/pictures` (extra `storage`):
            each picture is saved there under a name made of time, id and hash. None: the bytes stay in memory on the result.
        storage_options: fsspec's, for such a URL. They are in no repr, trace or artifact.
        cache: A LangChain cache, or a directory: the same request gives the same picture without paying. None: each call pays.
        allowed_image_hosts: Fetch images from these hosts only, such as `"*.ufileos.com"`. None: any public host. An entry
            without a wildcard, such as `"gateway.lan"` or `"10.0.0.5:8080"`, allows that host's private addresses and plain http.
        include_prompt_in_events: Put the prompt into `cogview.content_filter` events.

    Raises:
        CogViewConfigurationError: Key or base URL missing or malformed, unknown argument; before any request.
        CogViewInvalidRequestError: An argument of a call is illegal; before any request.
        CogViewError: As the class says, when no picture was made; see `langchain_cogview.errors`.
    """

    model_config = ConfigDict(
        # Frozen: key and service are found once; a changed setting would not change them.
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    model: str = DEFAULT_MODEL
    api_key: SecretStr | None = Field(default=None, repr=False)
    region: Region | None = None
    base_url: str | None = None
    size: str | None = None
    quality: Quality | None = None
    n: int = 1
    user_id: str | None = None
    watermark_enabled: bool | None = None
    timeout: float | timedelta | None = 120.0
    max_retries: int = Field(default=2, ge=0, le=100)
    retry_unknown: bool = False
    max_concurrency: int | None = Field(default=None, ge=1)
    rate_limiter: BaseRateLimiter | None = Field(default=None, exclude=True, repr=False)
    http_client: Any = Field(default=None, exclude=True, repr=False)
    http_async_client: Any = Field(default=None, exclude=True, repr=False)
    fallback_models: tuple[str, ...] = ()
    use_tasks: Literal["auto"] | bool = "auto"
    poll_interval: float = Field(default=3.0, gt=0, le=60)
    prices: Mapping[str, Decimal] | None = None
    download: bool = True
    output_dir: Path | str | None = None
    storage_options: Mapping[str, Any] | None = Field(default=None, exclude=True, repr=False)
    cache: BaseCache | Path | str | None = Field(default=None, exclude=True, repr=False)
    allowed_image_hosts: tuple[str, ...] | None = None
    include_prompt_in_events: bool = False

    # Found from arguments and environment: not fields, so that an instance with another region or base URL finds its own.
    _key: SecretStr | None = PrivateAttr(default=None)
    _region: Region = PrivateAttr(default="china")
    _base_url: str = PrivateAttr(default="")
    _folder: Any = PrivateAttr(default=None)
    _cache: Any = PrivateAttr(default=None)
    _made_settings: Any = PrivateAttr(default=None)

    def __init__(self, *, name: str | None = None, **settings: Unpack[GeneratorSettings]) -> None:
        _, failure = attempt(self._construct, name, settings)
        if failure is not None:
            del self, name, settings
            raise failure

    def _construct(self, name: str | None, settings: Mapping[str, Any]) -> None:
        check_names(settings, type(self).model_fields)
        values = with_secret_key(settings)
        super().__init__(**values if name is None else {"name": name, **values})

    @field_validator("timeout")
    @classmethod
    def _timeout_is_a_time(cls, value: float | timedelta | None) -> float | None:
        return checked_seconds(value)

    @field_validator("http_client", "http_async_client")
    @classmethod
    def _client_is_one(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return None
        from langchain_cogview.api.transport import checked_client  # noqa: PLC0415  the HTTP stack

        return checked_client(value, sync=info.field_name == "http_client")

    @field_validator("prices")
    @classmethod
    def _prices_are_amounts(cls, value: Mapping[str, Decimal] | None) -> Mapping[str, Decimal] | None:
        for amount in (value or {}).values():
            checked_amount(amount)
        return value

    @field_validator("allowed_image_hosts")
    @classmethod
    def _hosts_are_hosts(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value:
            from langchain_cogview.addresses import allowed_host  # noqa: PLC0415  the HTTP stack

            for entry in value:
                allowed_host(entry)
        return value

    @field_validator("allowed_image_hosts", "fallback_models", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("size", "quality", mode="before")
    @classmethod
    def _unspecified_is_none(cls, value: Any, info: ValidationInfo) -> Any:
        return specified(value, quality=info.field_name == "quality")

    @field_validator("output_dir", mode="before")
    @classmethod
    def _folder_is_one(cls, value: Any) -> Any:
        if value is None:
            return None
        from langchain_cogview.images.store import checked_folder  # noqa: PLC0415  what images need

        return checked_folder(value)

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        for warning in checked_settings(dict(self)):
            warnings.warn(warning, stacklevel=2)
        self._folder = self.output_dir
        if isinstance(self.output_dir, str):
            from langchain_cogview.images.remote import remote_folder  # noqa: PLC0415  an extra

            self._folder = remote_folder(self.output_dir, self.storage_options or {})
        if self.cache is not None:
            from langchain_cogview.cache import image_cache  # noqa: PLC0415  it brings the HTTP stack

            self._cache = image_cache(self.cache)
        injected = self.http_client is not None or self.http_async_client is not None
        service = find_service(self.api_key, self.region, self.base_url, injected=injected)
        self._key, self._region, self._base_url = service
        chosen = bool(self.api_key or self.region or self.base_url)
        for warning in service_warnings(service, (self.model, *self.fallback_models), chosen=chosen):
            warnings.warn(warning, stacklevel=2)
        return self

    @property
    def resolved_region(self) -> Region:
        """The platform in use, as found from arguments and environment."""
        return self._region

    @property
    def resolved_base_url(self) -> str:
        """The base URL in use, as found from arguments and environment."""
        return self._base_url

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """LangChain may serialize it; the key becomes a reference to its variable."""
        return True

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Which field is a secret, and under which variable it is found."""
        return {"api_key": "ZAI_API_KEY" if self._region == "international" else "ZHIPUAI_API_KEY"}

    def __getstate__(self) -> dict[Any, Any]:
        held = [name for name in _INJECTED if not isinstance(getattr(self, name), str | Path | None)]
        if held:
            raise TypeError(f"A generator with {' and '.join(held)} cannot be pickled: make it in the other process.")
        state = super().__getstate__()
        # The key stays in this process; the other one finds it in its environment.
        state["__dict__"] = {**state["__dict__"], "api_key": None}
        state["__pydantic_private__"] = {**state["__pydantic_private__"], "_key": None, "_made_settings": None}
        return state

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy; one with another key, region or base URL finds its service anew."""
        if not update:
            return super().model_copy(deep=deep)
        copied, failure = attempt(self._copy, update)
        if failure is not None:
            del update
            raise failure
        return cast("Self", copied)

    def _copy(self, update: Mapping[str, Any]) -> Self:
        if _SERVICE & update.keys():
            return type(self)(**{**self.__dict__, **update})
        # The environment may have changed since: the copy has the service that this instance found.
        found = {"api_key": self._found_key(), "region": self._region, "base_url": self._base_url}
        copied = type(self)(**{**self.__dict__, **found, **update})
        return super(CogViewImageGenerator, copied).model_copy(update={name: getattr(self, name) for name in found})

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """What LangChain serializes in another form than the field's."""
        own: dict[str, Any] = {} if self.output_dir is None else {"output_dir": str(self.output_dir)}
        return (
            own if self.prices is None else own | {"prices": {name: str(price) for name, price in self.prices.items()}}
        )

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        # Settings are values; what was injected is used as it is, by the copy too.
        return self.model_copy()

    # --- one request

    def invoke(
        self,
        input: ImageInput,  # noqa: A002
        config: RunnableConfig | None = None,
        *,
        budget: Budget | Reservation | None = None,
        **kwargs: Any,
    ) -> ImageResult:
        """Make the pictures of one request.

        Args:
            input: A prompt, the arguments of `ImageRequest` as a dict or object, a prompt value, or messages.
            config: The `RunnableConfig` of this run.
            budget: Counts each POST that may be charged, before it is sent, and refuses what it does not cover.
            **kwargs: Arguments of `ImageRequest`; what `input` says goes before them.

        Returns:
            The pictures, and what went wrong with others.
        """
        config = traced_config(config, self.model, input, kwargs)
        return self._run(partial(self._generate, overrides=kwargs, budget=budget), input, config)

    async def ainvoke(
        self,
        input: ImageInput,  # noqa: A002
        config: RunnableConfig | None = None,
        *,
        budget: Budget | Reservation | None = None,
        **kwargs: Any,
    ) -> ImageResult:
        """Async version of `invoke`."""
        config = traced_config(config, self.model, input, kwargs)
        return await self._arun(partial(self._agenerate, overrides=kwargs, budget=budget), input, config)

    # --- many requests: each is a run of its own, by `invoke` or `ainvoke`

    def stream_many(
        self,
        inputs: Iterable[ImageInput],
        config: RunnableConfig | None = None,
        *,
        progress: bool | None = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, ImageResult | Exception]]:
        """Make the pictures of any number of requests; gives them as they finish.

        An input is taken when a worker is free, and at most twice `max_workers()` results wait for you, so an endless iterator
        is fine. An iterator that you leave stops the work; what is under way is logged when it ends.

        Args:
            inputs: As for `invoke`; taken from one thread at a time.
            config: LangChain's; its `max_concurrency` is how many requests are worked on at once.
            progress: Draw a bar (extra `progress`). None: where somebody looks at it, a terminal or a notebook.
            **kwargs: As for `invoke`.

        Yields:
            The number of the input, from 0, and its result, or the exception that it raised.
        """
        return stream(self, inputs, config, progress=progress, overrides=kwargs)

    def astream_many(
        self,
        inputs: Iterable[ImageInput] | AsyncIterable[ImageInput],
        config: RunnableConfig | None = None,
        *,
        progress: bool | None = False,
        **kwargs: Any,
    ) -> AsyncIterator[tuple[int, ImageResult | Exception]]:
        """Async version of `stream_many`.

        An iterator that is closed (`contextlib.aclosing`) cancels what is under way.
        """
        return astream(self, inputs, config, progress=progress, overrides=kwargs)

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
            CogViewError: After all were drawn, one of the errors; its `batch_results` holds every result and exception in order.
                Retryable only where no input was made; else `CogViewBatchError` stands for errors that are retryable or foreign.
        """
        tasks, workers = batch_of(self, self.invoke, inputs, config, kwargs)
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
        """Async version of `batch`."""
        tasks, workers = batch_of(self, self.ainvoke, inputs, config, kwargs)
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
            CogViewError: Unless `return_exceptions`: after all were drawn, one of the errors, as `batch` does.
        """
        return as_completed(self, inputs, config, return_exceptions=return_exceptions, overrides=kwargs)

    def abatch_as_completed(  # type: ignore[override]
        self,
        inputs: Sequence[ImageInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> AsyncIterator[tuple[int, ImageResult | Exception]]:
        """Async version of `batch_as_completed`."""
        return aas_completed(self, inputs, config, return_exceptions=return_exceptions, overrides=kwargs)

    # --- tasks

    def submit(self, input: ImageInput, *, budget: Budget | None = None, **kwargs: Any) -> ImageTask:  # noqa: A002
        """Give a request to the task endpoint and come back at once: the paid POST takes milliseconds.

        Args:
            input: As for `invoke`; with a model of the task endpoint, such as `glm-image`.
            budget: As for `invoke`.
            **kwargs: As for `invoke`.

        Returns:
            The task; its `id` finds the picture again, in another process too.
        """
        request, notes = self._request(input, kwargs)
        with self._reserved(budget, checked_task(request)) as reservation:
            task_id, request_id = self._call(request, NO_DISPATCHER, (), reservation).submit()
        return ImageTask(task_id, generator=self, request=request, request_id=request_id, warnings=notes)

    async def asubmit(self, input: ImageInput, *, budget: Budget | None = None, **kwargs: Any) -> ImageTask:  # noqa: A002
        """Async version of `submit`."""
        await preload(self._base_url)
        request, notes = self._request(input, kwargs)
        with self._reserved(budget, checked_task(request)) as reservation:
            task_id, request_id = await self._call(request, NO_DISPATCHER, (), reservation).asubmit()
        return ImageTask(task_id, generator=self, request=request, request_id=request_id, warnings=notes)

    def collect(self, task: ImageTask, config: RunnableConfig | None = None, *, seconds: float | None) -> ImageResult:
        """Wait for a task's picture, fetch and save it, all in so many seconds; see `ImageTask.result`."""
        config = traced_config(config, self.model, task.request)
        return self._run(partial(self._collect, task=task, seconds=seconds), task.request, config)

    async def acollect(
        self, task: ImageTask, config: RunnableConfig | None = None, *, seconds: float | None
    ) -> ImageResult:
        """Async version of `collect`."""
        config = traced_config(config, self.model, task.request)
        return await self._arun(partial(self._acollect, task=task, seconds=seconds), task.request, config)

    # --- connections

    def close(self) -> None:
        """Close idle sync connections. They belong to the process; later calls open new ones."""
        from langchain_cogview.api.transport import SHARED  # noqa: PLC0415

        SHARED.close()

    async def aclose(self) -> None:
        """Close idle async connections of the running event loop."""
        from langchain_cogview.api.transport import ASHARED  # noqa: PLC0415

        await ASHARED.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    # --- one run

    def _run(
        self, work: Callable[[ImageInput, EventDispatcher], ImageResult], given: ImageInput, config: RunnableConfig
    ) -> ImageResult:
        made: list[ImageResult] = []

        def run(given: ImageInput, run_manager: CallbackManagerForChainRun, config: RunnableConfig) -> ImageResult:
            made.append(work(given, self._dispatcher(run_manager, config)))
            return made[0]

        with status_line.call(config) as told:
            try:
                self._call_with_config(run, given, config, run_type="llm")
            except Exception as error:
                if not made or raised_by_signal(error):
                    raise
                logger.warning(_HANDLER_FAILED, exc_info=error)
            remember(made[0].images)
            return told(made[0])

    async def _arun(
        self, work: Callable[[ImageInput, EventDispatcher], Any], given: ImageInput, config: RunnableConfig
    ) -> ImageResult:
        made: list[ImageResult] = []

        async def run(
            given: ImageInput, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
        ) -> ImageResult:
            made.append(await work(given, self._dispatcher(run_manager, config)))
            return made[0]

        await preload(self._base_url)
        with status_line.call(config) as told:
            try:
                await self._acall_with_config(run, given, config, run_type="llm")
            except Exception as error:
                if not made or raised_by_signal(error):
                    raise
                logger.warning(_HANDLER_FAILED, exc_info=error)
            await aremember(made[0].images)
            return told(made[0])

    def _generate(
        self, given: ImageInput, dispatcher: EventDispatcher, *, overrides: dict[str, Any], budget: Any
    ) -> ImageResult:
        request, notes = self._request(given, overrides)
        with self._reserved(budget, request) as reservation:
            call = self._call(request, dispatcher, request.for_models(self.fallback_models), reservation)
            tasks = [partial(call.generate, index) for index in range(request.n)]
            return call.result(in_threads(tasks, self.max_workers(request.model)), notes + call.notes)

    async def _agenerate(
        self, given: ImageInput, dispatcher: EventDispatcher, *, overrides: dict[str, Any], budget: Any
    ) -> ImageResult:
        request, notes = self._request(given, overrides)
        with self._reserved(budget, request) as reservation:
            call = self._call(request, dispatcher, request.for_models(self.fallback_models), reservation)
            tasks = [partial(call.agenerate, index) for index in range(request.n)]
            return call.result(await in_tasks(tasks, self.max_workers(request.model)), notes + call.notes)

    def _reserved(self, budget: Any, request: ImageRequest) -> AbstractContextManager[Reservation | None]:
        # What a cache has is not sent: then each image is counted when it is.
        price = Money(*price_of(request.model, self._region, self.prices))
        return reserved(budget, price, request.n if self._cache is None else 0)

    def _collect(
        self, given: Any, dispatcher: EventDispatcher, *, task: ImageTask, seconds: float | None
    ) -> ImageResult:
        call = self._call(checked_task(task.request), dispatcher)
        return call.result([call.collect(task.id, task.request_id, seconds)], task.warnings)

    async def _acollect(
        self, given: Any, dispatcher: EventDispatcher, *, task: ImageTask, seconds: float | None
    ) -> ImageResult:
        call = self._call(checked_task(task.request), dispatcher)
        return call.result([await call.acollect(task.id, task.request_id, seconds)], task.warnings)

    # --- pure decisions

    def _request(self, given: ImageInput, overrides: dict[str, Any]) -> tuple[ImageRequest, tuple[str, ...]]:
        return request_of(given, {name: getattr(self, name) for name in REQUEST_DEFAULTS} | overrides)

    def _dispatcher(self, run_manager: RunManager, config: RunnableConfig) -> EventDispatcher:
        metadata, sandbox = run_manager.metadata or {}, is_sandbox(self._base_url)
        return EventDispatcher(config, metadata.get("tool_call_id"), sandbox, bool(run_manager.handlers), metadata)

    # --- what calls are made with. The HTTP stack is loaded with the first call: a tool is made in milliseconds without it.

    def max_workers(self, model: str | None = None) -> int:
        """How many pictures of a model (None: the generator's) are worked on at once: in flight, or fetched and saved."""
        in_flight = self.max_concurrency or model_info(model or self.model).in_flight
        return in_flight + min(in_flight, _FETCHING) if self.download else in_flight

    def price(self, model: str | None = None) -> tuple[Decimal, str] | None:
        """List price and currency of one picture of a model (None: the generator's), also in the sandbox; None: unknown."""
        amount, currency = price_of(model or self.model, self._region, self.prices)
        return None if amount is None else (amount, currency)

    def tasks_client(self) -> TasksClient:
        """The task endpoint of this service."""
        from langchain_cogview.api.tasks import TasksClient  # noqa: PLC0415

        return TasksClient(self._settings().client, self.poll_interval)

    def _call(
        self,
        request: ImageRequest,
        dispatcher: EventDispatcher,
        others: Iterable[Any] = (),
        reservation: Reservation | None = None,
    ) -> ImageCall:
        from langchain_cogview.generation import ImageCall  # noqa: PLC0415  the HTTP stack

        settings = self._settings()
        return ImageCall(settings, ((request, ()), *others), dispatcher, settings.cached(request), reservation)

    def _found_key(self) -> SecretStr:
        # None came through a pickle: the service is the same, the key is found where it arrived.
        sandbox = is_sandbox(self._base_url)
        return self._key or (SANDBOX_KEY if sandbox else resolve_key(None, self._region, unpickled=True))

    def _settings(self) -> CallSettings:
        if self._made_settings is None:
            from langchain_cogview.generation import CallSettings  # noqa: PLC0415  the HTTP stack

            self._key = self._found_key()
            service = Service(self._key, self._region, self._base_url)
            self._made_settings = CallSettings.of(service, self._folder, self._cache, dict(self))
        return cast("CallSettings", self._made_settings)
