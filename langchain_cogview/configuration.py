"""Settings of a generator: checked, completed from the environment, copied and carried to other processes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, cast

from langchain_core.caches import BaseCache
from langchain_core.rate_limiters import BaseRateLimiter
from langchain_core.runnables import RunnableSerializable
from pydantic import (
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from langchain_cogview.api.settings import (
    BASE_URL_VARIABLE,
    BASE_URLS,
    both_keys_are_set,
    environment,
    found_key,
    is_sandbox,
    normal_base_url,
    region_of,
)
from langchain_cogview.catalog import DEFAULT_MODEL, Quality, Region, currency_of, find_model, model_info, model_warning
from langchain_cogview.errors import CogViewConfigurationError
from langchain_cogview.request import ImageRequest, describe_validation, unknown_argument

if TYPE_CHECKING:
    import httpx

    from langchain_cogview.api.tasks import TasksClient
    from langchain_cogview.cache import CachedRequest, PictureCache
    from langchain_cogview.drawing import CallSettings, ImageCall
    from langchain_cogview.events import Teller
    from langchain_cogview.images.remote import RemoteFolder
    from langchain_cogview.inputs import ImageInput
    from langchain_cogview.result import ImageResult

    HTTPClient = httpx.Client | None
    HTTPAsyncClient = httpx.AsyncClient | None
    Base = RunnableSerializable[ImageInput, ImageResult]
else:  # httpx takes as long to load as all of this: the validator looks, once there is something to look at
    HTTPClient = HTTPAsyncClient = Any
    Base = RunnableSerializable

REQUEST_DEFAULTS: Final = ("model", "size", "quality", "n", "user_id", "watermark_enabled")
_FETCHING = 4
_CACHE_SECONDS = 60.0
_INJECTED: Final = ("http_client", "http_async_client", "rate_limiter", "cache", "storage_options")


_SERVICE: Final = frozenset({"api_key", "region", "base_url"})
_FOUND: Final[ContextVar[tuple[SecretStr | None, Region, str] | None]] = ContextVar("cogview_found", default=None)
"""The service of the generator that is being copied: the environment may have changed since it was made."""


class ConfiguredGenerator(Base):
    """What `CogViewImageGenerator` is set up with, and what it finds out about it. Its docstring says what each is."""

    model_config = ConfigDict(
        # Frozen: key and service are found once; a changed setting would not change them.
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
        protected_namespaces=(),
        # This class is never made, only the generator below it: its schema alone is built, when it is.
        defer_build=True,
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
    http_client: HTTPClient = Field(default=None, exclude=True, repr=False)
    http_async_client: HTTPAsyncClient = Field(default=None, exclude=True, repr=False)
    fallback_models: tuple[str, ...] = ()
    use_tasks: Literal["auto"] | bool = "auto"
    poll_interval: float = Field(default=3.0, gt=0, le=60)
    prices: Mapping[str, Annotated[Decimal, Field(ge=0)]] | None = None
    download: bool = True
    output_dir: Path | str | None = None
    storage_options: Mapping[str, Any] | None = Field(default=None, exclude=True, repr=False)
    cache: BaseCache | Path | str | None = Field(default=None, exclude=True, repr=False)
    allowed_image_hosts: tuple[str, ...] | None = None
    include_prompt_in_events: bool = False

    # Found from arguments and environment. Not fields, so that an instance made anew with another region or base URL
    # (configurable_fields does that for each call) finds its own.
    _key: SecretStr | None = PrivateAttr(default=None)
    _region: Region = PrivateAttr(default="china")
    _base_url: str = PrivateAttr(default="")
    _folder: Any = PrivateAttr(default=None)
    _cache: Any = PrivateAttr(default=None)
    _made_settings: CallSettings | None = PrivateAttr(default=None)

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

    @field_validator("http_client", "http_async_client")
    @classmethod
    def _client_is_one(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return None
        import httpx  # noqa: PLC0415

        kind = httpx.Client if info.field_name == "http_client" else httpx.AsyncClient
        if not isinstance(value, kind):
            raise ValueError(f"It takes an httpx.{kind.__name__}; this is of type {type(value).__name__}.")  # noqa: TRY004  pydantic's own
        return value

    @field_validator("allowed_image_hosts", "fallback_models", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("allowed_image_hosts")
    @classmethod
    def _hosts_are_hosts(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None:
            from langchain_cogview.images.links import allowed_host  # noqa: PLC0415

            for entry in value:
                allowed_host(entry)
        return value

    @field_validator("output_dir", mode="before")
    @classmethod
    def _folder_is_one(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():
            raise ValueError("output_dir takes a folder, such as 'pictures', or a URL, such as 's3://bucket/pictures'.")
        if "\0" in str(value):
            raise ValueError("output_dir holds a null character.")
        if isinstance(value, str) and "://" not in value:
            return Path(value).expanduser()
        return value

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        defaults = {name: getattr(self, name) for name in REQUEST_DEFAULTS}
        problem = None
        try:
            request = ImageRequest(prompt="-", **defaults)
        except ValidationError as error:
            problem = describe_validation(error)
        if problem:
            raise ValueError(problem)
        fallbacks = [model_warning(name) for name in self.fallback_models]
        for warning in (*request.warnings, *filter(None, fallbacks)):
            warnings.warn(warning, stacklevel=2)
        if not self.download and self.output_dir is not None:
            raise ValueError("output_dir needs the bytes: leave download=False out.")
        if self.use_tasks is True and not all(model_info(name).tasks for name in (self.model, *self.fallback_models)):
            raise ValueError("use_tasks=True needs a model of the task endpoint, such as 'glm-image'.")
        self._folder = self._found_folder()
        self._cache = self._found_cache()
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
        for name in (self.model, *self.fallback_models):
            info = find_model(name)
            if info and self._region not in info.regions:
                doubts.append(
                    f"The model {info.name} is not documented for region={self._region!r}; it may not answer there."
                )
        return doubts

    def _found_folder(self) -> Path | RemoteFolder | None:
        if not isinstance(self.output_dir, str):
            return self.output_dir
        from langchain_cogview.images.remote import remote_folder  # noqa: PLC0415

        return remote_folder(self.output_dir, self.storage_options or {})

    def _find_service(self) -> None:
        found = _FOUND.get()
        if found:
            self._key, self._region, self._base_url = found
        else:
            base_url = environment(BASE_URL_VARIABLE) if self.base_url is None else self.base_url
            self._region = region_of(None if base_url is None else normal_base_url(base_url), self.region)
            self._base_url = normal_base_url(BASE_URLS[self._region] if base_url is None else base_url)
            self._key = SecretStr("sandbox") if is_sandbox(self._base_url) else found_key(self.api_key, self._region)
        if is_sandbox(self._base_url) and (self.http_client is not None or self.http_async_client is not None):
            raise CogViewConfigurationError(
                "The sandbox in this process is not reached by an HTTP client.",
                hint="Leave http_client and http_async_client out, or start `python -m langchain_cogview.sandbox`.",
            )

    @property
    def InputType(self) -> Any:  # noqa: N802  LangChain's name
        """What a call takes."""
        from langchain_cogview.inputs import ImageInput  # noqa: PLC0415

        return ImageInput

    @property
    def OutputType(self) -> Any:  # noqa: N802
        """What a call gives."""
        from langchain_cogview.result import ImageResult  # noqa: PLC0415

        return ImageResult

    @property
    def platform(self) -> Region:
        """The platform in use, as found from arguments and environment."""
        return self._region

    @property
    def service(self) -> str:
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
        found = None if _SERVICE & update.keys() else (self._key, self._region, self._base_url)
        token = _FOUND.set(found)
        try:
            return type(self)(**{**self.__dict__, **update})
        finally:
            _FOUND.reset(token)

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

    # --- what calls are made with

    def places(self, model: str | None = None) -> int:
        """How many pictures are worked on at once: those in flight, and a few that are being fetched and saved, if they are.

        Args:
            model: None: the generator's.
        """
        in_flight = self.max_concurrency or model_info(model or self.model).in_flight
        return in_flight + min(in_flight, _FETCHING) if self.download else in_flight

    def price(self, model: str | None = None) -> tuple[Decimal, str] | None:
        """List price of one picture and its currency; None where unknown. Sandbox pictures cost nothing all the same.

        Args:
            model: None: the generator's.
        """
        amount, currency = self._price(model or self.model)
        return None if amount is None else (amount, currency)

    def _price(self, model: str) -> tuple[Decimal | None, str]:
        return _price_of(model, self._region, self.prices)

    def _found_cache(self) -> PictureCache | None:
        if self.cache is None:
            return None
        from langchain_cogview.cache import picture_cache  # noqa: PLC0415

        return picture_cache(self.cache)

    def _cached(self, request: ImageRequest) -> CachedRequest | None:
        if self._cache is None:
            return None
        cache: PictureCache = self._cache
        return cache.request(
            request,
            base_url=self._base_url,
            download=self.download,
            folder=self._folder,
            storage_options=self.storage_options,
            allowed_hosts=self.allowed_image_hosts,
            timeout=min(cast("float | None", self.timeout) or _CACHE_SECONDS, _CACHE_SECONDS),
        )

    # What a call needs (the wire, the download, retries) is loaded with the first call: a tool is made at once.

    def tasks_client(self) -> TasksClient:
        """The task endpoint of this service."""
        from langchain_cogview.api.tasks import TasksClient  # noqa: PLC0415

        return TasksClient(self._settings().client, self.poll_interval)

    def _call(self, requests: tuple[tuple[ImageRequest, tuple[str, ...]], ...], teller: Teller) -> ImageCall:
        from langchain_cogview.drawing import ImageCall  # noqa: PLC0415

        return ImageCall(self._settings(), requests, teller, self._cached(requests[0][0]))

    def _settings(self) -> CallSettings:
        made = self._made_settings
        if made is None:
            made = self._made_settings = self._make_settings()
        return made

    def _make_settings(self) -> CallSettings:
        from langchain_cogview.api.client import client_of  # noqa: PLC0415
        from langchain_cogview.drawing import CallSettings  # noqa: PLC0415

        if self._key is None:  # came through pickle: the service is the same, the key is found where it arrived
            self._key = SecretStr("sandbox") if is_sandbox(self._base_url) else found_key(None, self._region)
        client = client_of(
            self._base_url,
            self._key,
            max_concurrency=self.max_concurrency,
            max_retries=self.max_retries,
            retry_unknown=self.retry_unknown,
            rate_limiter=self.rate_limiter,
            http_client=self.http_client,
            http_async_client=self.http_async_client,
        )
        return CallSettings(
            client=client,
            base_url=self._base_url,
            timeout=cast("float | None", self.timeout),
            download=self.download,
            folder=self._folder,
            allowed_hosts=self.allowed_image_hosts,
            use_tasks=self.use_tasks,
            poll_interval=self.poll_interval,
            price=partial(_price_of, region=self._region, prices=self.prices),
            include_prompt=self.include_prompt_in_events,
        )


def _price_of(model: str, region: Region, prices: Mapping[str, Decimal] | None) -> tuple[Decimal | None, str]:
    info = model_info(model)
    own = {model_info(each).name: amount for each, amount in prices.items()} if prices else {}
    listed = info.price(region)
    return own.get(info.name, listed[0] if listed else None), currency_of(region)


def _check_names(values: dict[str, Any], known: Any) -> None:
    unknown = [name for name in values if name not in known]
    if unknown:
        raise CogViewConfigurationError(unknown_argument(unknown[0], known))
