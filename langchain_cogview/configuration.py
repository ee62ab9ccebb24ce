"""The settings of a generator: their types for editors, and pure checks."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

from pydantic import SecretStr, ValidationError

from langchain_cogview.catalog import Quality, Region, model_warning
from langchain_cogview.request import ImageRequest, describe_validation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from decimal import Decimal
    from pathlib import Path

    import httpx
    from langchain_core.caches import BaseCache
    from langchain_core.rate_limiters import BaseRateLimiter

MAX_AMOUNT: Final = 10**9
"""The largest price and the largest budget."""
_DECIMALS = 12
_DIGITS = 28
_DAY = 86_400


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


def checked_amount(value: Decimal) -> Decimal:
    """An amount of money.

    Returns:
        The amount, as it is.

    Raises:
        ValueError: Negative, not finite, or beyond what a price can be.
    """
    if not value.is_finite() or not 0 <= value <= MAX_AMOUNT or (value and value.adjusted() < -_DECIMALS):
        raise ValueError(f"An amount of money is 0 to {MAX_AMOUNT:,}, and if it is not 0, at least 1E-{_DECIMALS}.")
    if len(value.as_tuple().digits) > _DIGITS:
        raise ValueError(f"An amount of money has at most {_DIGITS} digits.")
    return value


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


def check_hosts(hosts: Iterable[str]) -> None:
    """Check the entries of `allowed_image_hosts`.

    Raises:
        ValueError: One is no host.
    """
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


def checked_defaults(defaults: Mapping[str, Any], fallback_models: Sequence[str]) -> Iterator[str]:
    """Check what every request of a generator says.

    Returns:
        Warnings about its models.

    Raises:
        ValueError: A default is illegal.
    """
    problem = None
    try:
        request = ImageRequest(prompt="-", **defaults)
    except ValidationError as error:
        problem = describe_validation(error)
    if problem:
        raise ValueError(problem)
    return filter(None, (*request.warnings, *map(model_warning, fallback_models)))


def found_folder(output_dir: Path | str | None, storage_options: Mapping[str, Any] | None) -> Any:
    """What `output_dir` names.

    Returns:
        A path, a folder elsewhere, or None.
    """
    if not isinstance(output_dir, str):
        return output_dir
    from langchain_cogview.images.remote import remote_folder  # noqa: PLC0415  an extra

    return remote_folder(output_dir, storage_options or {})
