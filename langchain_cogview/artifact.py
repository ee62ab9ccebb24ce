"""The plain JSON form of a result, which a `ToolMessage.artifact` contains and a checkpointer stores.

The field types are also those of the results. Data from storage can contain anything; a value that passes validation can be
compared, added, shown and written.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainSerializer, ValidationError

from langchain_cogview.errors import CogViewInvalidRequestError, ContentFilter, printable, read_entries

ARTIFACT_TYPE: Final = "cogview.image_result"
ARTIFACT_VERSION: Final = 1
MAX_INTEGER: Final = 2**53
_MAX_DIGITS: Final = 100
_DUMPED: Final = frozenset({"images", "failures", "prompt", "model", "sandbox", "warnings"})


def _not_a_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected")  # noqa: TRY004  pydantic takes a ValueError
    return value


def _bounded(value: Decimal) -> Decimal:
    """An amount that can be added to others and written out."""
    exponent = value.as_tuple().exponent
    if not isinstance(exponent, int) or value < 0 or max(-exponent, value.adjusted()) > _MAX_DIGITS:
        raise ValueError("an amount of money is expected")
    return value


def _in_utc(value: datetime) -> datetime:
    """A moment that can be compared with others; one without a time zone is taken to be in UTC."""
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError:
        raise ValueError("a moment of the calendar is expected") from None


def _text(value: str) -> str:
    if not value.isascii():
        value.encode()  # a lone surrogate raises a ValueError: it can be written to no file, JSON or request
    return value


def _written(value: datetime) -> str:
    return value.isoformat().replace("+00:00", "Z")


def _path_text(value: Path) -> str:
    """A path as text that JSON and a checkpoint can hold: bytes of a file name that are not UTF-8 become question marks."""
    return str(value).encode(errors="replace").decode()


def _entries(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError("a list is expected")  # noqa: TRY004
    return tuple(
        entry for item in value for entry in ([item] if isinstance(item, ContentFilter) else read_entries(item))
    )


# Amounts, moments and paths are written as text by `model_dump()` in Python mode too: LangServe writes what that gives as JSON.
Text = Annotated[str, AfterValidator(_text)]
Number = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=0, le=MAX_INTEGER)]
Pixels = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=1, le=1_000_000)]
Seconds = Annotated[float, BeforeValidator(_not_a_bool), Field(ge=0, le=MAX_INTEGER, allow_inf_nan=False)]
Currency = Annotated[str, Field(pattern=r"^[A-Za-z]{0,12}$")]
Amount = Annotated[Decimal, Field(allow_inf_nan=False), AfterValidator(_bounded), PlainSerializer(str)]
Moment = Annotated[datetime, BeforeValidator(_not_a_bool), AfterValidator(_in_utc), PlainSerializer(_written)]
LocalPath = Annotated[Path, PlainSerializer(_path_text)]
Entries = Annotated[tuple[ContentFilter, ...], BeforeValidator(_entries)]


class ContentFilterArtifact(TypedDict):
    """One entry of the content filter."""

    role: str | None
    level: int | None


class GeneratedImageArtifact(TypedDict):
    """One image, without its bytes."""

    id: str
    url: str | None
    expires_at: str | None
    """ISO 8601, UTC; None where the URL does not tell."""
    path: str | None
    uri: str | None
    """Where it is saved when that is no local file, such as `s3://bucket/name.png`."""
    mime_type: str | None
    width: int | None
    height: int | None
    """Width and height in pixels, read from the bytes; None where they were not fetched."""
    size_bytes: int | None
    sha256: str | None
    content_filter: list[ContentFilterArtifact]
    request_id: str
    response_id: str | None
    created: int | None
    """Unix seconds, as the service says."""
    model: str
    size: str | None
    quality: str | None
    prompt: str
    task_id: str | None
    cost: str | None
    """A decimal number; "0" for a cached or sandbox image; None where the price is unknown."""
    currency: str | None
    seconds: float | None
    """From its place in flight to being saved."""
    cached: bool
    sandbox: bool
    warnings: list[str]


class ImageFailureArtifact(TypedDict):
    """One image that was not made."""

    index: int
    error: str
    message: str
    hint: str
    code: str | None
    status: int | None
    request_id: str | None
    task_id: str | None
    outcome: str
    scope: str | None
    """What the error concerns, such as "prompt" or "account"; None for an exception of another library."""
    is_retryable: bool
    """Whether the same request may be sent again, and may then succeed."""
    content_filter: list[ContentFilterArtifact]


class ImageArtifact(TypedDict):
    """The plain JSON form of an `ImageResult`: what a `ToolMessage.artifact` holds. Never bytes, never the key."""

    type: Literal["cogview.image_result"]
    version: int
    """1. A change that old readers would misread raises it."""
    prompt: str
    """The prompt that was sent."""
    original_prompt: NotRequired[str | None]
    """The prompt before a chat model rewrote it; None if it was not rewritten."""
    model: str
    size: str | None
    quality: str | None
    cost: str | None
    """Of all images; None where a price is unknown."""
    currency: str | None
    sandbox: bool
    images: list[GeneratedImageArtifact]
    failures: list[ImageFailureArtifact]
    warnings: list[str]


Model = TypeVar("Model", bound=BaseModel)


def is_artifact(value: Any) -> bool:
    """Whether a value is an artifact of this package, of any version, or the `model_dump()` of a result.

    Args:
        value: Any value.

    Returns:
        Whether it has the type of an artifact or, without a type, the fields that every result has.
    """
    if not isinstance(value, Mapping):
        return False
    return value.get("type") == ARTIFACT_TYPE or ("type" not in value and set(value) >= _DUMPED)


def check_artifact(artifact: Any) -> None:
    """Check that a value is an artifact of this package and version, or the `model_dump()` of a result.

    Args:
        artifact: Any value.

    Raises:
        CogViewInvalidRequestError: It is not.
    """
    if not is_artifact(artifact):
        raise CogViewInvalidRequestError(
            "This is not an artifact of a CogView result.", hint="Pass ToolMessage.artifact."
        )
    version = artifact.get("version") if "type" in artifact else ARTIFACT_VERSION
    if version != ARTIFACT_VERSION:
        shown = str(version) if isinstance(version, int) and abs(version) < MAX_INTEGER else type(version).__name__
        raise CogViewInvalidRequestError(
            f"This artifact has version {shown}; this package reads version {ARTIFACT_VERSION}.",
            hint="Upgrade langchain-cogview.",
        )


def validated(kind: type[Model], fields: Mapping[str, Any]) -> Model:
    """Validate fields from storage. Fields of later versions are ignored.

    Args:
        kind: The pydantic model.
        fields: The fields.

    Returns:
        An instance of the model.

    Raises:
        CogViewInvalidRequestError: A field is missing or invalid.
    """
    try:
        return kind.model_validate({name: value for name, value in fields.items() if name in kind.model_fields})
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)[:9]
        where = ", ".join(".".join(map(str, item["loc"])) for item in errors)
        raise CogViewInvalidRequestError(f"This artifact is damaged at {printable(where, 100)}.", hint="") from None
    except Exception as error:  # noqa: BLE001  a mapping or a value of a foreign class raises what it likes
        raise CogViewInvalidRequestError(f"This artifact cannot be read ({type(error).__name__}).", hint="") from None
