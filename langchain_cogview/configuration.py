"""The settings of a generator: their types for editors, and pure checks."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypedDict, cast

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from langchain_cogview.catalog import Quality, Region, model_info, model_warning
from langchain_cogview.cost import checked_amount
from langchain_cogview.request import ImageRequest, describe_validation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from decimal import Decimal
    from pathlib import Path

    import httpx
    from langchain_core.caches import BaseCache
    from langchain_core.rate_limiters import BaseRateLimiter

REQUEST_DEFAULTS: Final = ("model", "size", "quality", "n", "user_id", "watermark_enabled")
"""The arguments of a request that a generator has defaults for."""
_DAY = 86_400
_USUAL_KEY = re.compile(r"\b[0-9A-Fa-f]{32}\.[0-9A-Za-z]{16}\b")


class GeneratorSettings(TypedDict, total=False):
    """The arguments of `CogViewImageGenerator`; its docstring says what each of them does."""

    model: str
    api_key: SecretStr | str | None
    region: Region | None
    base_url: str | None
    size: str | None
    quality: Quality | None
    n: int
    user_id: str | None
    watermark_enabled: bool | None
    timeout: float | timedelta | None
    max_retries: int
    retry_unknown: bool
    max_concurrency: int | None
    rate_limiter: BaseRateLimiter | None
    http_client: httpx.Client | Any
    http_async_client: httpx.AsyncClient | Any
    fallback_models: str | Sequence[str]
    use_tasks: Literal["auto"] | bool
    poll_interval: float
    prices: Mapping[str, Decimal | float | str] | None
    download: bool
    output_dir: Path | str | None
    storage_options: Mapping[str, Any] | None
    cache: BaseCache | Path | str | None
    allowed_image_hosts: str | Sequence[str] | None
    include_prompt_in_events: bool


class SafeErrors(BaseModel):
    """A model whose errors of construction do not hold what it was constructed of, for the key is among it."""

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Construct an instance from a dict."""
        made, failure = attempt(super().model_validate, obj, **options)
        if failure is not None:
            del obj, options
            raise failure
        return cast("Self", made)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Construct an instance from JSON."""
        made, failure = attempt(super().model_validate_json, json_data, **options)
        if failure is not None:
            del json_data, options
            raise failure
        return cast("Self", made)

    @classmethod
    def model_construct(cls, _fields_set: set[str] | None = None, **values: Any) -> Self:  # type: ignore[override]
        """Construct an instance without validation; a key is wrapped all the same."""
        return super().model_construct(_fields_set, **with_secret_key(values))


def with_secret_key(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with the key in a `SecretStr`."""
    key = values.get("api_key")
    return {**values, "api_key": SecretStr(key)} if isinstance(key, str) else dict(values)


def attempt(make: Callable[..., Any], *args: Any, **values: Any) -> tuple[Any, Exception | None]:
    """Call a constructor, and return its error in place of raising it.

    The frames of the error, its causes and the input that pydantic keeps with it may show the key: they are taken off it. The
    caller raises it, after it has deleted its own variables that hold arguments.
    """
    try:
        return make(*args, **values), None
    except ValidationError as error:
        return None, _without_input(error)
    except Exception as error:  # noqa: BLE001
        error.args = tuple(map(_without_key, error.args))
        vars(error).update({name: _without_key(value) for name, value in vars(error).items()})
        error.__cause__ = error.__context__ = None
        return None, error.with_traceback(None)


def _without_input(error: ValidationError) -> ValidationError:
    details = [
        InitErrorDetails(
            type=PydanticCustomError(cast("Any", item["type"]), cast("Any", _without_key(item["msg"]))),
            loc=tuple(map(_without_key, item["loc"])),
            input=None,
        )
        for item in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    return ValidationError.from_exception_data(error.title, details, hide_input=True)


def _without_key(value: Any) -> Any:
    """A text without keys of the usual form: what was passed under a wrong name is not known to be a key."""
    return _USUAL_KEY.sub("[key]", value) if isinstance(value, str) else value


def checked_seconds(value: float | timedelta | None) -> float | None:
    """A time limit in seconds.

    Returns:
        Seconds; None for no limit.

    Raises:
        ValueError: Not more than 0, or more than a day.
    """
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if seconds is not None and not 0 < seconds <= _DAY:
        raise ValueError("The time limit is in seconds: more than 0, at most 86,400 (a day), or None for none.")
    return seconds


def checked_client(value: Any, *, sync: bool) -> Any:
    """An injected HTTP client, as it is.

    Raises:
        ValueError: It is none.
    """
    if value is None:
        return None
    from langchain_cogview.api.transport import is_client  # noqa: PLC0415  it brings the HTTP stack

    if not is_client(value, is_async=not sync):
        kind = "Client" if sync else "AsyncClient"
        name = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
        raise ValueError(f"It takes an httpx.{kind} or httpx2.{kind}; this is of type {name}.")
    return value


def check_hosts(hosts: Sequence[str]) -> None:
    """Check the entries of `allowed_image_hosts`.

    Raises:
        ValueError: One is no host.
    """
    if not hosts:
        return
    from langchain_cogview.images.links import allowed_host  # noqa: PLC0415  it brings the HTTP stack

    for entry in hosts:
        allowed_host(entry)


def checked_folder(value: Any) -> Any:
    """A folder or a URL.

    Raises:
        ValueError: It is neither.
        CogViewConfigurationError: It begins with `~`, and there is no such home folder.
    """
    if isinstance(value, str) and not value.strip():
        raise ValueError("output_dir takes a folder, such as 'pictures', or a URL, such as 's3://bucket/pictures'.")
    if "\0" in str(value):
        raise ValueError("output_dir holds a null character.")
    if isinstance(value, os.PathLike) or (isinstance(value, str) and "://" not in value):
        from langchain_cogview.images.store import local_path  # noqa: PLC0415  it brings what images need

        return local_path(value, "output_dir")
    return value


def checked_settings(settings: Mapping[str, Any]) -> Iterator[str]:
    """Check the settings of a generator that depend on each other or on tables.

    Args:
        settings: By the name of the field, each of the right type.

    Returns:
        Warnings about its models.

    Raises:
        ValueError: A setting is illegal, or does not go with another.
    """
    problem = None
    try:
        request = ImageRequest(prompt="-", **{name: settings[name] for name in REQUEST_DEFAULTS})
    except ValidationError as error:
        problem = describe_validation(error)
    if problem:
        raise ValueError(problem)
    check_hosts(settings["allowed_image_hosts"] or ())
    for amount in (settings["prices"] or {}).values():
        checked_amount(amount)
    if not settings["download"] and settings["output_dir"] is not None:
        raise ValueError("output_dir needs the bytes: leave download=False out.")
    models = (settings["model"], *settings["fallback_models"])
    if settings["use_tasks"] is True and not all(model_info(name).tasks for name in models):
        raise ValueError("use_tasks=True needs a model of the task endpoint, such as 'glm-image'.")
    return filter(None, (*request.warnings, *map(model_warning, settings["fallback_models"])))


def found_folder(output_dir: Path | str | None, storage_options: Mapping[str, Any] | None) -> Any:
    """What `output_dir` names.

    Returns:
        A path, a folder elsewhere, or None.
    """
    if not isinstance(output_dir, str):
        return output_dir
    from langchain_cogview.images.remote import remote_folder  # noqa: PLC0415  an extra

    return remote_folder(output_dir, storage_options or {})
