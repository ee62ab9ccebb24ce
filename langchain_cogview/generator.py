"""`CogViewImageGenerator`, the Runnable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, Unpack, cast

from langchain_core.caches import BaseCache
from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.rate_limiters import BaseRateLimiter
from langchain_core.runnables import RunnableConfig
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, ValidationInfo, field_validator, model_validator

from langchain_cogview.api.redaction import SafeErrors, attempt, with_secret_key
from langchain_cogview.api.settings import Service, find_service, find_shared_limit, preload, service_warnings
from langchain_cogview.batches import BatchRunnable, RecentImages, logged_handler_errors, traced_config
from langchain_cogview.budget import Budget, Reservation, reserved
from langchain_cogview.catalog import Quality, Region, model_info, price_of
from langchain_cogview.concurrency import Priority
from langchain_cogview.cost import Money, checked_prices
from langchain_cogview.enhance import PromptEnhancer
from langchain_cogview.events import NO_DISPATCHER, EventDispatcher, graph_streams
from langchain_cogview.images.backend import BackendFolder
from langchain_cogview.notebook.display import show_status
from langchain_cogview.notebook.previews import aremember, remember
from langchain_cogview.pools import in_tasks, in_threads
from langchain_cogview.request import (
    REQUEST_DEFAULTS,
    FolderCheck,
    GeneratorSettings,
    ImageInput,
    ImageRequest,
    as_tuple,
    check_names,
    check_picklable,
    checked_hosts,
    checked_seconds,
    checked_settings,
    request_of,
    specified,
)
from langchain_cogview.result import ImageResult
from langchain_cogview.tasks import ImageTask, checked_task
from langchain_cogview.text import warn_caller

if TYPE_CHECKING:
    from langchain_cogview.api.tasks import TasksClient
    from langchain_cogview.generation import CallSettings, ImageCall

_FETCHING = 4
_Checked = tuple[ImageRequest, tuple[str, ...]]
"""A request, and warnings about it."""
_SERVICE: Final = frozenset({"api_key", "region", "base_url"})

RunManager = CallbackManagerForChainRun | AsyncCallbackManagerForChainRun
_Work = Callable[[ImageInput, EventDispatcher], Any]
"""What one run does with its input; it returns an `ImageResult`, or a coroutine that does."""


class CogViewImageGenerator(SafeErrors, BatchRunnable):
    """Generates images with Zhipu's CogView endpoint, as a Runnable.

    Setup:
        Install `langchain-cogview`, and set `ZHIPUAI_API_KEY` (a key from open.bigmodel.cn, mainland China) or
        `ZAI_API_KEY` (a key from z.ai, international). A key is valid on its own platform only.

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
        model: A model of the catalog. Another model is accepted with a warning.
        api_key: The API key. None: the platform's environment variable.
        region: `china` or `international`. None: the region of the base URL or of the key that is set, else China.
        base_url: The base URL of the API, or `"sandbox:"` for the offline service. None: `COGVIEW_BASE_URL`, else the region's.
        size: The size, in the forms of `ImageRequest`. None: the model's default.
        quality: The quality, in the forms of `ImageRequest`, such as `standard` or `hd`. None: the model's default.
        n: The number of images for each call, 1 to 100; each is one paid request. Default: 1.
        user_id: The end user, for the provider's abuse reports; 6 to 128 characters.
        watermark_enabled: False is only for accounts that signed the provider's waiver. None: the service's default (true).
        timeout: Total seconds for one image: name resolution, connecting, the answer, waits between attempts, download and
            saving. Waiting for a slot, for the `rate_limiter` and for an equal request with the same `cache` does not count.
            Default: 120. None: no limit.
        max_retries: Further attempts, 0 to 100, of a request that certainly did not run, while a tenth of `timeout` (at most
            30 s) is left for the answer. Default: 2. A request that was refused because the account has too many in flight (code
            1302) is sent again within `timeout` without counting here; with `timeout=None`, for at most 10 minutes.
        retry_unknown: Also send a request again that may have been charged, which can pay twice.
        max_concurrency: Requests in flight, of all generators, threads and event loops of this process with the same key, model
            and service together. None: the catalog's figure for the model. It is lowered automatically while the service
            refuses (code 1302), and raised again. A task holds its slot until it ends, but a submitted task does not.
        max_concurrency_per_user: Requests in flight of one `user_id` in this process, so that the batch of one user does not hold
            all slots. None: no limit but `max_concurrency`.
        priority: Which waiting calls of this process are sent first: `interactive`, then `batch`. None: jobs and calls of
            `batch`, `stream_many` and their like are `batch`, all others `interactive`.
        shared_limit: Where that limit is shared with other processes: `"machine"` for all processes of this user on this
            machine, `"redis://host:6379/0"` for all machines (extra `redis`), or a `SharedLimit`. `max_concurrency` is then the
            limit of the account. None: `COGVIEW_SHARED_LIMIT`, else the limit holds for this process. The page "Several
            processes" of the documentation has the details.
        rate_limiter: A LangChain rate limiter that is acquired before every attempt.
        http_client: An `httpx.Client` or `httpx2.Client`, used for sync API requests as it is, and never closed; `timeout` is
            then checked between its socket operations. It does not fetch images.
        http_async_client: The same for async API requests.
        fallback_models: Models that are called in this order if the model before is busy, over its limit or unavailable after all
            attempts, that is, if it did not run. They are never called after a block or an unknown outcome.
        use_tasks: Whether to use the task endpoint: a paid POST of milliseconds, then free polls. `auto`: if the model allows it.
        poll_interval: Seconds between two polls of a task, at most 60. Default: 3.
        usd_per_cny: US dollars for one yuan, so that costs in CNY stand in LangSmith's cost column, which is in USD. None: only
            costs in USD stand there.
        prices: Prices of one image by model, in the platform's currency, which replace the catalog's list prices.
        download: Whether to fetch the bytes. False: the result has only the URL, which expires after a day to a week.
        output_dir: A folder, created if missing, or a URL that fsspec knows, such as `s3://bucket/images` (extra `storage`):
            each image is saved there under a name made of time, id and hash. Or a backend of deepagents, or a `BackendFolder` of
            one: the agent's own file tools read the images there. None: the bytes stay in memory on the result.
        storage_options: Options of fsspec for such a URL. They are in no repr, trace or artifact.
        cache: A LangChain cache, or a directory: the same request gives the same image without paying. None: each call pays.
        allowed_image_hosts: The only hosts that images are fetched from, such as `"*.ufileos.com"`. None: any public host. An
            entry without a wildcard, such as `"gateway.lan"` or `"10.0.0.5:8080"`, allows its private addresses and plain http.
        include_prompt_in_events: Whether `cogview.content_filter` events have the prompt.
        enhance: A chat model that rewrites each prompt in one extra call before the image is requested. Text in quotation marks
            is kept word for word; if the chat model fails, the prompt is used as it is, with a warning. None: no rewriting.

    Raises:
        CogViewConfigurationError: The key or the base URL is missing or malformed, or an argument does not exist.
    """

    model_config = ConfigDict(
        # Frozen: key and service are found once; a changed setting would not change them.
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    api_key: SecretStr | None = Field(default=None, repr=False)
    """The API key; None for that of the environment."""
    region: Region | None = None
    """The platform as it was passed; `resolved_region` is the one in use."""
    base_url: str | None = None
    """The base URL as it was passed; `resolved_base_url` is the one in use."""
    size: str | None = None
    """Size of the images; None for the model's default."""
    quality: Quality | None = None
    """Quality of the images; None for the model's default."""
    user_id: str | None = None
    """The end user, for the provider's abuse reports."""
    watermark_enabled: bool | None = None
    """Whether images have the provider's watermark; None for the service's default (true)."""
    timeout: float | timedelta | None = 120.0
    """Total seconds for one image; None for no limit."""
    max_retries: int = Field(default=2, ge=0, le=100)
    """Further attempts of a request that certainly did not run."""
    retry_unknown: bool = False
    """Whether a request that may have been charged is sent again."""
    max_concurrency: int | None = Field(default=None, ge=1)
    """The number of requests in flight; None for the catalog's figure."""
    max_concurrency_per_user: int | None = Field(default=None, ge=1)
    """The number of requests in flight of one `user_id`; None for no limit of its own."""
    priority: Priority | None = None
    """Whether calls go before or after others of this process that wait; None for what fits the method."""
    shared_limit: Any = Field(default=None, exclude=True, repr=False)
    """Where the limit of requests in flight is shared with other processes; None for `COGVIEW_SHARED_LIMIT`."""
    rate_limiter: BaseRateLimiter | None = Field(default=None, exclude=True, repr=False)
    """A LangChain rate limiter that is acquired before every attempt."""
    http_client: Any = Field(default=None, exclude=True, repr=False)
    """The injected client of sync API requests, which is never closed."""
    http_async_client: Any = Field(default=None, exclude=True, repr=False)
    """The injected client of async API requests, which is never closed."""
    fallback_models: tuple[str, ...] = ()
    """The models that are called if the one before did not run."""
    use_tasks: Literal["auto"] | bool = "auto"
    """Whether the task endpoint is used; `auto` if the model allows it."""
    poll_interval: float = Field(default=3.0, gt=0, le=60)
    """Seconds between two polls of a task."""
    usd_per_cny: Decimal | None = Field(default=None, gt=0)
    """US dollars for one yuan, for the cost column of LangSmith; None: amounts in yuan have no cost there."""
    prices: Mapping[str, Decimal] | None = None
    """Prices of one image by model, which replace the list prices."""
    download: bool = True
    """Whether the bytes are fetched."""
    output_dir: Path | str | BackendFolder | None = None
    """The folder, the fsspec URL or the folder in a backend where images are saved; None for memory."""
    storage_options: Mapping[str, Any] | None = Field(default=None, exclude=True, repr=False)
    """Options of fsspec for such a URL."""
    cache: BaseCache | Path | str | None = Field(default=None, exclude=True, repr=False)
    """A LangChain cache or a directory; None for none."""
    allowed_image_hosts: tuple[str, ...] | None = None
    """The only hosts from which images are fetched; None for every public host."""
    include_prompt_in_events: bool = False
    """Whether `cogview.content_filter` events have the prompt."""
    enhance: Any = Field(default=None, exclude=True, repr=False)
    """A chat model that rewrites each prompt; None for none."""

    # Resolved from arguments and environment. Not fields, so that a copy with another region or base URL resolves its own.
    _service: Service = PrivateAttr(default=Service(None, "china", ""))
    _folder: Any = PrivateAttr(default=None)
    _cache: Any = PrivateAttr(default=None)
    _call_settings: Any = PrivateAttr(default=None)
    _folder_check: Any = PrivateAttr(default=None)
    _enhancer: Any = PrivateAttr(default=None)
    _recent: RecentImages = PrivateAttr(default_factory=RecentImages)

    def __init__(self, *, name: str | None = None, **settings: Unpack[GeneratorSettings]) -> None:
        _, failure = attempt(self._construct, name, settings)
        if failure is not None:
            del self, name, settings
            raise failure

    def _construct(self, name: str | None, settings: Mapping[str, Any]) -> None:
        check_names(settings, type(self).model_fields)
        super().__init__(**({} if name is None else {"name": name}), **with_secret_key(settings))

    _check_size = field_validator("size", mode="before")(partial(specified, quality=False))
    _check_quality = field_validator("quality", mode="before")(partial(specified, quality=True))
    _check_timeout = field_validator("timeout")(checked_seconds)
    _check_prices = field_validator("prices")(checked_prices)
    _accept_one = field_validator("allowed_image_hosts", "fallback_models", mode="before")(as_tuple)
    _check_hosts = field_validator("allowed_image_hosts")(checked_hosts)

    @field_validator("http_client", "http_async_client")
    @classmethod
    def _check_client(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return None
        from langchain_cogview.api.sending import checked_client  # noqa: PLC0415  the HTTP stack

        return checked_client(value, sync=info.field_name == "http_client")

    @field_validator("output_dir", mode="before")
    @classmethod
    def _check_folder(cls, value: Any) -> Any:
        if value is None:
            return None
        from langchain_cogview.images.store import checked_folder  # noqa: PLC0415  what images need

        return checked_folder(value)

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        for warning in checked_settings(dict(self)):
            warn_caller(warning)
        self._folder, self._folder_check = self.output_dir, FolderCheck(self.output_dir)
        if isinstance(self.output_dir, str):
            from langchain_cogview.images.remote import remote_folder  # noqa: PLC0415  an extra

            self._folder = remote_folder(self.output_dir, self.storage_options or {})
        if self.cache is not None:
            from langchain_cogview.cache import image_cache  # noqa: PLC0415  it brings the HTTP stack

            self._cache = image_cache(self.cache)
        find_shared_limit(self.shared_limit)
        if self.enhance is not None:
            self._enhancer = PromptEnhancer(self.enhance)
        injected = self.http_client is not None or self.http_async_client is not None
        self._service = find_service(self.api_key, self.region, self.base_url, injected=injected)
        chosen = bool(self.api_key or self.region or self.base_url)
        for warning in service_warnings(self._service, (self.model, *self.fallback_models), chosen=chosen):
            warn_caller(warning)
        return self

    @property
    def resolved_region(self) -> Region:
        """The platform in use, resolved from arguments and environment."""
        return self._service.region

    @property
    def resolved_base_url(self) -> str:
        """The base URL in use, resolved from arguments and environment."""
        return self._service.base_url

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Whether LangChain may serialize it, in which the key becomes a reference to its variable.

        Returns:
            True.
        """
        return True

    @property
    def lc_secrets(self) -> dict[str, str]:
        """The secret field, and the environment variable that replaces it."""
        return {"api_key": "ZAI_API_KEY" if self._service.region == "international" else "ZHIPUAI_API_KEY"}

    def __getstate__(self) -> dict[Any, Any]:
        # What is left out of a dump is an object of this process, or a secret.
        check_picklable(dict(self), {name for name, field in type(self).model_fields.items() if field.exclude})
        state = super().__getstate__()
        # The key stays in this process; the other one finds it in its environment.
        private = {"_service": self._service._replace(key=None), "_call_settings": None}
        state["__dict__"] = {**state["__dict__"], "api_key": None}
        state["__pydantic_private__"] = {**state["__pydantic_private__"], **private}
        return state

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the generator. A copy with another key, region or base URL resolves these again.

        Returns:
            The copy, which is validated.
        """
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
        # The environment may have changed since: the copy has the service that this instance resolved.
        service = self._service.with_key()
        found = {"api_key": service.key, "region": service.region, "base_url": service.base_url}
        copied = type(self)(**{**self.__dict__, **found, **update})
        return super(CogViewImageGenerator, copied).model_copy(update={name: getattr(self, name) for name in found})

    def _saving_in(self, folder: Path) -> Self:
        # Everything but the folder is shared; validating again would repeat every warning.
        copied = super().model_copy(update={"output_dir": folder})
        private = {"_folder": folder, "_folder_check": FolderCheck(folder)}
        private["_call_settings"] = dataclasses.replace(self._settings(), folder=folder)
        copied.__pydantic_private__ = {**(copied.__pydantic_private__ or {}), **private}
        return copied

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """The fields that LangChain serializes in another form."""
        values = {"output_dir": self.output_dir, "usd_per_cny": self.usd_per_cny}
        forms: dict[str, Any] = {name: str(value) for name, value in values.items() if value is not None}
        return forms if self.prices is None else forms | {"prices": {name: str(p) for name, p in self.prices.items()}}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        # Settings are values, and injected objects are used as they are, in the copy too.
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
        """Generate the images of one request.

        Args:
            input: A prompt, the arguments of `ImageRequest` as a dict or object, a prompt value, or messages.
            config: The `RunnableConfig` of this run.
            budget: The budget that counts each POST that may be charged, before it is sent, and refuses what it does not cover.
            **kwargs: Arguments of `ImageRequest`, unless `input` has them.

        Returns:
            The images, and the failures of others if at least one was made.

        Raises:
            CogViewInvalidRequestError: An argument is illegal. Nothing was sent.
            CogViewError: No image was made; `langchain_cogview.errors` lists the classes.
        """
        config = traced_config(config, self.model, input, kwargs)
        with self._recent.call() as made:
            return made(self._run(partial(self._generate, overrides=kwargs, budget=budget), input, config))

    async def ainvoke(
        self,
        input: ImageInput,  # noqa: A002
        config: RunnableConfig | None = None,
        *,
        budget: Budget | Reservation | None = None,
        **kwargs: Any,
    ) -> ImageResult:
        """Async version of `invoke`.

        Returns:
            As `invoke`.
        """
        config = traced_config(config, self.model, input, kwargs)
        with self._recent.call() as made:
            return made(await self._arun(partial(self._agenerate, overrides=kwargs, budget=budget), input, config))

    # --- tasks

    def submit(self, input: ImageInput, *, budget: Budget | None = None, **kwargs: Any) -> ImageTask:  # noqa: A002
        """Submit a request to the task endpoint, whose paid POST takes milliseconds, and do not wait for the image.

        Args:
            input: As for `invoke`, for a model of the task endpoint, such as `glm-image`.
            budget: As for `invoke`.
            **kwargs: As for `invoke`.

        Returns:
            The task. Its `id` is enough to get the image later, in another process too.
        """
        request, notes = self._request(input, kwargs, {})
        self._folder_check.run()
        with self._call(checked_task(request), NO_DISPATCHER, budget) as call:
            task_id, request_id, charge = call.submit()
        return ImageTask(task_id, generator=self, request=request, request_id=request_id, warnings=notes, charge=charge)

    async def asubmit(self, input: ImageInput, *, budget: Budget | None = None, **kwargs: Any) -> ImageTask:  # noqa: A002
        """Async version of `submit`.

        Returns:
            As `submit`.
        """
        await preload(self._service.base_url)
        request, notes = await self._arequest(input, kwargs, {})
        await self._folder_check.arun()
        with self._call(checked_task(request), NO_DISPATCHER, budget) as call:
            task_id, request_id, charge = await call.asubmit()
        return ImageTask(task_id, generator=self, request=request, request_id=request_id, warnings=notes, charge=charge)

    def collect(self, task: ImageTask, config: RunnableConfig | None = None, *, seconds: float | None) -> ImageResult:
        """Wait for the image of a task, fetch it and save it, within a number of seconds.

        Returns:
            As `ImageTask.result`.
        """
        config = traced_config(config, self.model, task.request)
        return self._run(partial(self._collect, task, seconds), task.request, config)

    async def acollect(
        self, task: ImageTask, config: RunnableConfig | None = None, *, seconds: float | None
    ) -> ImageResult:
        """Async version of `collect`.

        Returns:
            As `collect`.
        """
        config = traced_config(config, self.model, task.request)
        return await self._arun(partial(self._acollect, task, seconds), task.request, config)

    # --- connections

    def close(self) -> None:
        """Close the idle sync connections of the process; later calls open new ones."""
        from langchain_cogview.api.transport import SHARED  # noqa: PLC0415

        SHARED.close()

    async def aclose(self) -> None:
        """Close the idle async connections of the running event loop."""
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

    def _run(self, work: _Work, value: ImageInput, config: RunnableConfig) -> ImageResult:
        made: list[ImageResult] = []

        def run(value: ImageInput, run_manager: RunManager, config: RunnableConfig) -> ImageResult:
            made.append(work(value, self._dispatcher(run_manager, config)))
            return made[0]

        with show_status(config) as report:
            with logged_handler_errors(made):
                self._call_with_config(run, value, config, run_type="llm")
            remember(made[0].images)
            return report(made[0])

    async def _arun(self, work: _Work, value: ImageInput, config: RunnableConfig) -> ImageResult:
        made: list[ImageResult] = []

        async def run(value: ImageInput, run_manager: RunManager, config: RunnableConfig) -> ImageResult:
            made.append(await work(value, self._dispatcher(run_manager, config)))
            return made[0]

        await preload(self._service.base_url)
        with show_status(config) as report:
            with logged_handler_errors(made):
                await self._acall_with_config(run, value, config, run_type="llm")
            await aremember(made[0].images)
            return report(made[0])

    def _generate(
        self, value: ImageInput, dispatcher: EventDispatcher, *, overrides: dict[str, Any], budget: Any
    ) -> ImageResult:
        request, notes = self._request(value, overrides, dispatcher.config)
        self._folder_check.run()
        with self._call(request, dispatcher, budget, request.for_models(self.fallback_models)) as call:
            tasks = [partial(call.generate, index) for index in range(request.n)]
            return call.result(in_threads(tasks, self.max_workers(request.model)), notes + call.notes)

    async def _agenerate(
        self, value: ImageInput, dispatcher: EventDispatcher, *, overrides: dict[str, Any], budget: Any
    ) -> ImageResult:
        request, notes = await self._arequest(value, overrides, dispatcher.config)
        await self._folder_check.arun()
        with self._call(request, dispatcher, budget, request.for_models(self.fallback_models)) as call:
            tasks = [partial(call.agenerate, index) for index in range(request.n)]
            return call.result(await in_tasks(tasks, self.max_workers(request.model)), notes + call.notes)

    def _collect(self, task: ImageTask, seconds: float | None, _: Any, dispatcher: EventDispatcher) -> ImageResult:
        with self._call(checked_task(task.request), dispatcher) as call:
            return call.result([task.settle(call.collect(task.id, task.request_id, seconds))], task.warnings)

    async def _acollect(
        self, task: ImageTask, seconds: float | None, _: Any, dispatcher: EventDispatcher
    ) -> ImageResult:
        with self._call(checked_task(task.request), dispatcher) as call:
            return call.result([task.settle(await call.acollect(task.id, task.request_id, seconds))], task.warnings)

    # --- pure decisions

    def _request(self, value: ImageInput, overrides: dict[str, Any], config: RunnableConfig) -> _Checked:
        checked = request_of(value, {name: getattr(self, name) for name in REQUEST_DEFAULTS} | overrides)
        return checked if self._enhancer is None else self._enhancer.enhance(*checked, config)

    async def _arequest(self, value: ImageInput, overrides: dict[str, Any], config: RunnableConfig) -> _Checked:
        checked = request_of(value, {name: getattr(self, name) for name in REQUEST_DEFAULTS} | overrides)
        return checked if self._enhancer is None else await self._enhancer.aenhance(*checked, config)

    def _dispatcher(self, run_manager: RunManager, config: RunnableConfig) -> EventDispatcher:
        metadata, sandbox = run_manager.metadata or {}, self._service.is_sandbox
        handlers, tool_call_id = bool(run_manager.handlers), metadata.get("tool_call_id")
        return EventDispatcher(config, tool_call_id, sandbox, handlers, metadata, graph_streams())

    # --- what calls are made with. The HTTP stack is loaded with the first call: a tool is made in milliseconds without it.

    def max_workers(self, model: str | None = None) -> int:
        """The number of images of a model (None: the generator's) that are generated at once.

        Returns:
            The number of requests in flight, plus that of images being fetched and saved.
        """
        in_flight = self.max_concurrency or model_info(model or self.model).in_flight
        return in_flight + min(in_flight, _FETCHING) if self.download else in_flight

    def price(self, model: str | None = None) -> tuple[Decimal, str] | None:
        """The price of one image of a model (None: the generator's), also in the sandbox.

        Returns:
            Amount and ISO currency code; None where the price is unknown.
        """
        amount, currency = price_of(model or self.model, self._service.region, self.prices)
        return None if amount is None else (amount, currency)

    def tasks_client(self) -> TasksClient:
        """Make a client of the task endpoint.

        Returns:
            The client.
        """
        from langchain_cogview.api.tasks import TasksClient  # noqa: PLC0415

        return TasksClient(self._settings().client, self.poll_interval)

    @contextmanager
    def _call(
        self, request: ImageRequest, dispatcher: EventDispatcher, budget: Any = None, others: Iterable[Any] = ()
    ) -> Iterator[ImageCall]:
        from langchain_cogview.generation import ImageCall  # noqa: PLC0415  the HTTP stack

        price = Money(*price_of(request.model, self._service.region, self.prices))
        # With a cache, an image may not be requested at all, so each one is counted when it is.
        with reserved(budget, price, request.n if self._cache is None else 0) as reservation:
            settings = self._settings()
            yield ImageCall(settings, ((request, ()), *others), dispatcher, settings.cached(request), reservation)

    def _settings(self) -> CallSettings:
        if self._call_settings is None:
            from langchain_cogview.generation import CallSettings  # noqa: PLC0415  the HTTP stack

            self._service = self._service.with_key()
            settings = {**dict(self), "shared_limit": find_shared_limit(self.shared_limit)}
            self._call_settings = CallSettings.of(self._service, self._folder, self._cache, settings)
        return cast("CallSettings", self._call_settings)
