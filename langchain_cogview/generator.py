"""`CogViewImageGenerator`, the Runnable."""

from __future__ import annotations

import asyncio
import logging
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, cast

import httpx
from langchain_core.rate_limiters import BaseRateLimiter
from langchain_core.runnables import RunnableConfig, RunnableSerializable, ensure_config
from langchain_core.runnables.config import get_config_list
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, ValidationError, field_validator, model_validator

from langchain_cogview.api.client import ImagesClient
from langchain_cogview.api.retry import RetryPolicy
from langchain_cogview.api.settings import (
    BASE_URL_VARIABLE,
    BASE_URLS,
    SANDBOX_ENDPOINT,
    both_keys_are_set,
    environment,
    found_key,
    is_sandbox,
    normal_base_url,
    region_of,
)
from langchain_cogview.api.transport import ASHARED, SHARED, asender, sender
from langchain_cogview.catalog import DEFAULT_MODEL, Quality, Region, find_model, model_info
from langchain_cogview.drawing import ImageCall, ImageOutcome
from langchain_cogview.errors import (
    CogViewConfigurationError,
    CogViewContentFilterError,
    CogViewError,
    CogViewInvalidRequestError,
    CogViewNotFoundError,
    Outcome,
)
from langchain_cogview.events import CONTENT_FILTER_EVENT, ContentFilterEvent, adispatch, content_filter_event, dispatch
from langchain_cogview.inputs import ImageInput, arguments_of
from langchain_cogview.request import ImageRequest, checked_request, describe_validation, unknown_argument
from langchain_cogview.result import ImageFailure, ImageResult
from langchain_cogview.threads import in_threads, or_error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun

logger = logging.getLogger(__name__)

_REQUEST_DEFAULTS: Final = ("model", "size", "quality", "n", "user_id", "watermark_enabled")
_INJECTED: Final = ("http_client", "http_async_client", "rate_limiter")


class CogViewImageGenerator(RunnableSerializable[ImageInput, ImageResult]):
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
        `await generator.ainvoke(...)`, `generator.batch([...])`, `prompt_template | generator`.

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
        timeout: Seconds for one picture in all: look-up, connect, answer, waits between attempts, download and save. Waiting
            for a place (`rate_limiter`, or others of the same call) comes before it. None: no limit.
        max_retries: Further attempts of a request that provably did not run.
        retry_unknown: Also send again what may have been made and charged. Can pay twice.
        max_concurrency: Requests in flight of one `batch`, `abatch` or call with `n`. None: the catalog's figure for the model.
        rate_limiter: A LangChain rate limiter, asked before every attempt.
        http_client: Used for sync API requests as it is, and never closed; `timeout` is then looked at between its socket
            operations. Pictures are fetched by connections of our own.
        http_async_client: The same for async ones.
        download: Fetch the bytes. False: the result has the URL alone, which ends after a day to a week.
        output_dir: A folder, made when missing: each picture is saved there under a name made of time and hash. None: the
            bytes stay in memory on the result.
        allowed_image_hosts: Fetch pictures from these hosts only, such as `"*.ufileos.com"`. None: any public host.
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
    http_client: httpx.Client | None = Field(default=None, exclude=True, repr=False)
    http_async_client: httpx.AsyncClient | None = Field(default=None, exclude=True, repr=False)
    download: bool = True
    output_dir: Path | None = None
    allowed_image_hosts: tuple[str, ...] | None = None
    include_prompt_in_events: bool = False

    # Found from arguments and environment. Not fields, so that an instance made anew with another region or base URL
    # (configurable_fields does that for each call) finds its own.
    _key: SecretStr | None = PrivateAttr(default=None)
    _region: Region = PrivateAttr(default="china")
    _base_url: str = PrivateAttr(default="")

    if not TYPE_CHECKING:  # the type checker and editors see the fields

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Wrapped before anything can raise, so that no traceback shows the key.
            if isinstance(kwargs.get("api_key"), str):
                kwargs["api_key"] = SecretStr(kwargs["api_key"])
            _check_names(kwargs, type(self).model_fields)
            super().__init__(*args, **kwargs)

    @field_validator("timeout")
    @classmethod
    def _timeout_is_a_time(cls, value: float | timedelta | None) -> float | None:
        seconds = value.total_seconds() if isinstance(value, timedelta) else value
        if seconds is not None and not 0 < seconds <= 86_400:  # noqa: PLR2004
            raise ValueError("The time limit is in seconds: more than 0, at most 86,400 (a day), or None for none.")
        return seconds

    @field_validator("allowed_image_hosts", mode="before")
    @classmethod
    def _one_host_is_a_list_too(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("output_dir", mode="before")
    @classmethod
    def _folder_is_local(cls, value: Any) -> Any:
        if isinstance(value, str) and ("://" in value or not value.strip()):
            raise ValueError("output_dir takes a local folder, such as 'pictures'.")
        if "\0" in str(value):
            raise ValueError("output_dir holds a null character.")
        return Path(value).expanduser() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        defaults = {name: getattr(self, name) for name in _REQUEST_DEFAULTS}
        problem = None
        try:
            request = ImageRequest(prompt="-", **defaults)
        except ValidationError as error:
            problem = describe_validation(error)
        if problem:
            raise ValueError(problem)
        for warning in request.warnings:
            warnings.warn(warning, stacklevel=2)
        if not self.download and self.output_dir is not None:
            raise ValueError("output_dir needs the bytes: leave download=False out.")
        self._find_service()
        for warning in self._doubts():
            warnings.warn(warning, stacklevel=2)
        return self

    def _doubts(self) -> list[str]:
        if is_sandbox(self._base_url):
            return []
        doubts = []
        chosen = self.api_key or self.region or self.base_url or environment(BASE_URL_VARIABLE)
        if not chosen and both_keys_are_set():
            doubts.append(
                "ZHIPUAI_API_KEY and ZAI_API_KEY are both set: the first is used, with region='china'. Pass region= to choose."
            )
        info = find_model(self.model)
        if info and self._region not in info.regions:
            doubts.append(
                f"The model {info.name} is not documented for region={self._region!r}; it may not answer there."
            )
        return doubts

    def _find_service(self) -> None:
        base_url = environment(BASE_URL_VARIABLE) if self.base_url is None else self.base_url
        self._region = region_of(None if base_url is None else normal_base_url(base_url), self.region)
        self._base_url = normal_base_url(BASE_URLS[self._region] if base_url is None else base_url)
        if is_sandbox(self._base_url):
            if self.http_client is not None or self.http_async_client is not None:
                raise CogViewConfigurationError(
                    "The sandbox in this process is not reached by an HTTP client.",
                    hint="Leave http_client and http_async_client out, or start `python -m langchain_cogview.sandbox`.",
                )
            self._key = SecretStr("sandbox")
        else:
            self._key = found_key(self.api_key, self._region)

    @property
    def platform(self) -> Region:
        """The platform in use, as found from arguments and environment."""
        return self._region

    # --- LangChain's view

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """LangChain may serialize it; the key becomes a reference to its variable."""
        return True

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Which field is a secret, and under which variable it is found."""
        return {"api_key": "ZAI_API_KEY" if self._region == "international" else "ZHIPUAI_API_KEY"}

    def invoke(self, input: ImageInput, config: RunnableConfig | None = None, **kwargs: Any) -> ImageResult:  # noqa: A002
        """Make the pictures of one request.

        Args:
            input: A prompt, the arguments of `ImageRequest` as a dict or object, a prompt value, or messages.
            config: LangChain's.
            **kwargs: Arguments of `ImageRequest`; what `input` says goes before them.
        """
        made: list[ImageResult] = []
        draw = partial(self._draw, overrides=kwargs, made=made)
        config = self._traced(input, config, kwargs)
        try:
            return self._call_with_config(draw, input, config, run_type="llm")
        except Exception as error:
            if not made:
                raise
            logger.warning("A callback handler failed after the pictures were made", exc_info=error)
            return made[0]

    async def ainvoke(self, input: ImageInput, config: RunnableConfig | None = None, **kwargs: Any) -> ImageResult:  # noqa: A002
        """Make the pictures of one request. The twin of `invoke`."""
        made: list[ImageResult] = []
        draw = partial(self._adraw, overrides=kwargs, made=made)
        config = self._traced(input, config, kwargs)
        try:
            return await self._acall_with_config(draw, input, config, run_type="llm")
        except Exception as error:
            if not made:
                raise
            logger.warning("A callback handler failed after the pictures were made", exc_info=error)
            return made[0]

    def batch(
        self,
        inputs: list[ImageInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> list[ImageResult]:
        """Make the pictures of many requests, `max_concurrency` in flight.

        Every input is drawn, whatever happens to others: nothing paid is lost.

        Args:
            inputs: As for `invoke`.
            config: LangChain's; its `max_concurrency` goes before the field.
            return_exceptions: Give exceptions in the list in place of raising.
            **kwargs: As for `invoke`.

        Raises:
            CogViewError: After all were drawn, the first error; its `batch_results` holds every result and exception in order.
        """
        configs = self._bounded(config, inputs, kwargs)
        tasks = [partial(or_error, self.invoke, each, own, **kwargs) for each, own in zip(inputs, configs, strict=True)]
        results = in_threads(tasks, configs[0]["max_concurrency"] or 1) if tasks else []
        return results if return_exceptions else _all_or_first_error(results)

    async def abatch(
        self,
        inputs: list[ImageInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> list[ImageResult]:
        """Make the pictures of many requests. The twin of `batch`."""
        results = await super().abatch(inputs, self._bounded(config, inputs, kwargs), return_exceptions=True, **kwargs)
        return results if return_exceptions else _all_or_first_error(results)

    def close(self) -> None:
        """Close idle sync connections. They belong to the process; later calls open new ones."""
        SHARED.close()

    async def aclose(self) -> None:
        """Close idle async connections of the running event loop."""
        await ASHARED.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __getstate__(self) -> dict[Any, Any]:
        held = [name for name in _INJECTED if getattr(self, name) is not None]
        if held:
            raise TypeError(f"A generator with {' and '.join(held)} cannot be pickled: make it in the other process.")
        state = super().__getstate__()
        # The key stays in this process; the other one finds it in its environment.
        state["__dict__"] = {**state["__dict__"], "api_key": None}
        state["__pydantic_private__"] = {**state["__pydantic_private__"], "_key": None}
        return state

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy; one with other settings finds its key and service anew."""
        if update:
            return type(self)(**{**self.__dict__, **update})
        return super().model_copy(deep=deep)

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """What LangChain serializes in another form than the field's."""
        return {} if self.output_dir is None else {"output_dir": str(self.output_dir)}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        # Settings are values; what was injected is used as it is, by the copy too.
        return self.model_copy()

    # --- one request

    def _draw(
        self,
        given: ImageInput,
        run_manager: CallbackManagerForChainRun,
        config: RunnableConfig,
        *,
        overrides: dict[str, Any],
        made: list[ImageResult],
    ) -> ImageResult:
        request, notes = self._request(given, overrides)
        call = self._call(request)
        outcomes = in_threads([call.draw] * request.n, self._places(request.model))
        for event in self._filter_events(request, outcomes, run_manager.metadata):
            dispatch(CONTENT_FILTER_EVENT, event, config)
        made.append(self._result(request, outcomes, notes))
        return made[0]

    async def _adraw(
        self,
        given: ImageInput,
        run_manager: AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
        *,
        overrides: dict[str, Any],
        made: list[ImageResult],
    ) -> ImageResult:
        request, notes = self._request(given, overrides)
        call = self._call(request)
        places = asyncio.Semaphore(self._places(request.model))

        async def one() -> ImageOutcome:
            async with places:
                return await call.adraw()

        outcomes = await asyncio.gather(*(one() for _ in range(request.n)))
        for event in self._filter_events(request, outcomes, run_manager.metadata):
            await adispatch(CONTENT_FILTER_EVENT, event, config)
        made.append(self._result(request, outcomes, notes))
        return made[0]

    # --- pure steps

    def _request(self, given: ImageInput, overrides: dict[str, Any]) -> tuple[ImageRequest, tuple[str, ...]]:
        said, notes = arguments_of(given)
        values = {name: getattr(self, name) for name in _REQUEST_DEFAULTS} | overrides | said
        if "prompt" not in values:
            raise CogViewInvalidRequestError(
                "Nothing was sent: there is no prompt.", hint="Pass a string, or a dict with the key 'prompt'."
            )
        request = checked_request(values)
        return request, request.warnings + notes

    def _call(self, request: ImageRequest) -> ImageCall:
        if self._key is None:  # came through pickle: the service is the same, the key is found where it arrived
            self._key = SecretStr("sandbox") if is_sandbox(self._base_url) else found_key(None, self._region)
        # Injected clients follow no redirect: that would hand the key on, and repeat the POST.
        once: dict[str, Any] = {"stream": True, "follow_redirects": False}
        injected, ainjected = self.http_client, self.http_async_client
        client = ImagesClient(
            base_url=SANDBOX_ENDPOINT if is_sandbox(self._base_url) else self._base_url,
            api_key=self._key,
            send=partial(injected.send, **once) if injected else sender(self._base_url),
            asend=partial(ainjected.send, **once) if ainjected else asender(self._base_url),
            build=injected.build_request if injected else httpx.Request,
            abuild=ainjected.build_request if ainjected else httpx.Request,
            policy=RetryPolicy(max_retries=self.max_retries, retry_unknown=self.retry_unknown),
            rate_limiter=self.rate_limiter,
        )
        return ImageCall(
            request=request,
            client=client,
            base_url=self._base_url,
            timeout=cast("float | None", self.timeout),
            download=self.download,
            folder=self.output_dir,
            allowed_hosts=self.allowed_image_hosts,
        )

    def _places(self, model: str) -> int:
        return self.max_concurrency or model_info(model).in_flight

    def _bounded(
        self,
        config: RunnableConfig | list[RunnableConfig] | None,
        inputs: Sequence[ImageInput],
        overrides: dict[str, Any],
    ) -> list[RunnableConfig]:
        """A config for each input, with how many of them may run at once: in flight counts pictures, not inputs."""
        said = [each if isinstance(each, dict) else {} for each in inputs]
        models = {str(each.get("model") or overrides.get("model") or self.model) for each in said}
        counts = {each.get("n") or overrides.get("n") or self.n for each in said}
        most = max((count for count in counts if isinstance(count, int)), default=1)
        places = max(1, min(self._places(model) for model in models or {self.model}) // max(1, most))
        return [
            {**each, "max_concurrency": each.get("max_concurrency") or places}
            for each in (get_config_list(config, len(inputs)) if inputs else [])
        ]

    def _traced(self, given: ImageInput, config: RunnableConfig | None, overrides: dict[str, Any]) -> RunnableConfig:
        config = ensure_config(config)
        said = overrides.get("model")
        if isinstance(given, dict):
            said = given.get("model", said)
        elif isinstance(given, ImageRequest) and "model" in given.model_fields_set:
            said = given.model
        metadata = {"ls_provider": "zhipuai", "ls_model_name": str(said or self.model), "ls_model_type": "image"}
        traced: RunnableConfig = {**config, "metadata": {**(config.get("metadata") or {}), **metadata}}
        if "api_key" in config.get("configurable", {}):
            # It has done its work when this instance was made; from here on no frame of ours holds it.
            traced["configurable"] = {**config["configurable"], "api_key": "**********"}
        return traced

    def _filter_events(
        self, request: ImageRequest, outcomes: Sequence[ImageOutcome], metadata: dict[str, Any] | None
    ) -> list[ContentFilterEvent]:
        events = []
        for outcome in outcomes:
            if isinstance(outcome, CogViewContentFilterError):
                entries, blocked, request_id = outcome.content_filter, True, outcome.request_id
            elif not isinstance(outcome, Exception) and outcome[0].content_filter:
                entries, blocked, request_id = outcome[0].content_filter, False, outcome[0].request_id
            else:
                continue
            events.append(
                content_filter_event(
                    entries,
                    blocked=blocked,
                    model=request.model,
                    request_id=request_id,
                    tool_call_id=(metadata or {}).get("tool_call_id"),
                    sandbox=is_sandbox(self._base_url),
                    prompt=request.prompt if self.include_prompt_in_events else None,
                )
            )
        return events

    def _result(self, request: ImageRequest, outcomes: Sequence[ImageOutcome], notes: tuple[str, ...]) -> ImageResult:
        images = [image for outcome in outcomes if not isinstance(outcome, Exception) for image in outcome]
        errors = [(index, outcome) for index, outcome in enumerate(outcomes) if isinstance(outcome, Exception)]
        if not images:
            # Who may have paid must hear that first: the others can be sent again.
            errors.sort(key=lambda error: getattr(error[1], "outcome", None) is not Outcome.UNKNOWN)
            _, first = errors[0]
            if isinstance(first, CogViewNotFoundError) and request.warnings:
                first.hint = " ".join((first.hint, *request.warnings))
            for index, other in errors[1:]:
                first.add_note(f"Picture {index + 1} of {request.n} failed too: {other}")
            # The frames below say nothing that the error does not say.
            raise first.with_traceback(None) if isinstance(first, CogViewError) else first
        return ImageResult(
            images=tuple(images),
            failures=tuple(ImageFailure.of(error, index) for index, error in errors),
            prompt=request.prompt,
            model=request.model,
            size=request.drawn_size,
            quality=request.drawn_quality,
            sandbox=any(image.sandbox for image in images),
            warnings=tuple(dict.fromkeys([*notes, *(note for image in images for note in image.warnings)])),
        )


def _check_names(values: dict[str, Any], known: Any) -> None:
    unknown = [name for name in values if name not in known]
    if unknown:
        raise CogViewConfigurationError(unknown_argument(unknown[0], known))


def _all_or_first_error(results: list[Any]) -> list[ImageResult]:
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
