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
CONTENT_FILTER_EVENT: Final = "cogview.content_filter"
GENERATED_EVENT: Final = "cogview.generated"
PROGRESS_EVENT: Final = "cogview.progress"
RETRY_EVENT: Final = "cogview.retry"
MAX_INTEGER: Final = 2**53
_MAX_DIGITS: Final = 100
_DUMPED: Final = frozenset({"images", "failures", "prompt", "model", "sandbox", "warnings"})


def _not_a_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected")  # noqa: TRY004  pydantic takes a ValueError
    return value


def _bounded(value: Decimal) -> Decimal:
    exponent = value.as_tuple().exponent
    if not isinstance(exponent, int) or value < 0 or max(-exponent, value.adjusted()) > _MAX_DIGITS:
        raise ValueError("an amount of money is expected")
    return value


def _in_utc(value: datetime) -> datetime:
    # A moment that can be compared with others; one without a time zone is taken to be in UTC.
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError:
        raise ValueError("a moment of the calendar is expected") from None


def _text(value: str) -> str:
    if not value.isascii():
        value.encode()  # a lone surrogate raises a ValueError: it can be written to no file, JSON or request
    return value


def _entries(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError("a list is expected")  # noqa: TRY004
    return tuple(
        entry for item in value for entry in ([item] if isinstance(item, ContentFilter) else read_entries(item))
    )


# `model_dump()` writes amounts, moments and paths as text in Python mode too: LangServe writes what it returns as JSON.
Text = Annotated[str, AfterValidator(_text)]
Number = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=0, le=MAX_INTEGER)]
Pixels = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=1, le=1_000_000)]
Seconds = Annotated[float, BeforeValidator(_not_a_bool), Field(ge=0, le=MAX_INTEGER, allow_inf_nan=False)]
Currency = Annotated[str, Field(pattern=r"^[A-Za-z]{0,12}$")]
Amount = Annotated[Decimal, Field(allow_inf_nan=False), AfterValidator(_bounded), PlainSerializer(str)]
Moment = Annotated[
    datetime,
    BeforeValidator(_not_a_bool),
    AfterValidator(_in_utc),
    PlainSerializer(lambda moment: moment.isoformat().replace("+00:00", "Z"), return_type=str),
]
# Bytes of a file name that are not UTF-8 become question marks: JSON and a checkpoint cannot hold them.
LocalPath = Annotated[Path, PlainSerializer(lambda path: str(path).encode(errors="replace").decode(), return_type=str)]
Entries = Annotated[tuple[ContentFilter, ...], BeforeValidator(_entries)]


class ContentFilterArtifact(TypedDict):
    """One entry of the content filter."""

    role: str | None
    """`user` for the prompt, `assistant` for the image, `history` for earlier messages; None if the service sent none."""
    level: int | None
    """From 0 (most severe) to 3 (mildest); None if the service sent none."""


class GeneratedImageArtifact(TypedDict):
    """One image, without its bytes."""

    id: str
    """Short id that this client generated; an agent refers to the image by it."""
    url: str | None
    """Link to the image at the service, valid for a day to a week; None if it is unknown."""
    expires_at: str | None
    """When the link expires, in ISO 8601 and UTC; None if the URL does not say."""
    path: str | None
    """Path of the saved file; None if the image was not saved on this machine."""
    uri: str | None
    """Where the image was saved remotely, such as `s3://bucket/name.png`; None if it was not."""
    mime_type: str | None
    """`image/png`, `image/jpeg` or `image/webp`, read from the bytes; None if they were not downloaded."""
    width: int | None
    """Width in pixels, read from the bytes; None if they were not downloaded."""
    height: int | None
    """Height in pixels, read from the bytes; None if they were not downloaded."""
    size_bytes: int | None
    """Number of bytes of the image; None if they were not downloaded."""
    sha256: str | None
    """SHA-256 of the image bytes, in hexadecimal; None if they were not downloaded."""
    content_filter: list[ContentFilterArtifact]
    """Entries of the content filter for an image that was made in spite of them."""
    request_id: str
    """Request id that this client generated; every attempt has the same."""
    response_id: str | None
    """Id that the service gave to the response; None if it gave none."""
    created: int | None
    """When the service created the image, in Unix seconds; None if it did not say."""
    model: str
    """Model that generated the image."""
    size: str | None
    """Size that was requested, or the default of the model."""
    quality: str | None
    """Quality that was requested, or the default of the model."""
    prompt: str
    """The prompt."""
    task_id: str | None
    """Id of the task; None unless the task endpoint was used."""
    list_price: NotRequired[str | None]
    """What the service charges for such an image, as a decimal number; None if it is unknown."""
    cost: str | None
    """List price as a decimal number; "0" for a cached or sandbox image, None if the price is unknown."""
    currency: str | None
    """ISO code of the currency, such as `CNY`."""
    seconds: float | None
    """Seconds from acquiring a slot until the image was saved."""
    cached: bool
    """Whether the image came from the cache: nothing was sent or paid."""
    sandbox: bool
    """Whether the image is a placeholder of the offline sandbox."""
    warnings: list[str]
    """What could not be done, such as saving the image."""


class ImageFailureArtifact(TypedDict):
    """One image that was not made."""

    index: int
    """Which of the `n` images, from 0."""
    error: str
    """Name of the error's class, such as `CogViewContentFilterError`."""
    message: str
    """What happened."""
    hint: str
    """What to do; empty where nothing can be done."""
    code: str | None
    """Error code of the service; None if it sent none."""
    status: int | None
    """HTTP status; None without a response."""
    request_id: str | None
    """Request id that this client generated; every attempt has the same."""
    task_id: str | None
    """Id of the task, whose image may still be made; None unless the task endpoint was used."""
    outcome: str
    """`not_run`, `unknown` (an image may have been charged) or `final`."""
    scope: str | None
    """What the error concerns, such as `prompt` or `account`; None for an exception of another library."""
    is_retryable: bool
    """Whether the same request may be sent again and may succeed then."""
    content_filter: list[ContentFilterArtifact]
    """Entries of the content filter, if it blocked the image."""


class ImageArtifact(TypedDict):
    """The plain JSON form of an `ImageResult`, which a `ToolMessage.artifact` holds: neither image bytes nor the API key."""

    type: Literal["cogview.image_result"]
    """Always `cogview.image_result`."""
    version: int
    """1. A change that existing readers would misread increments it."""
    prompt: str
    """The prompt that was sent."""
    original_prompt: NotRequired[str | None]
    """The prompt before a chat model rewrote it; None if it was not rewritten."""
    model: str
    """Model that generated the images."""
    size: str | None
    """Size that was requested, or the default of the model."""
    quality: str | None
    """Quality that was requested, or the default of the model."""
    cost: str | None
    """List price of all images as a decimal number; None if one is unknown."""
    currency: str | None
    """ISO code of the currency, such as `CNY`."""
    sandbox: bool
    """Whether the offline sandbox made the images."""
    images: list[GeneratedImageArtifact]
    """The images; at least one."""
    failures: list[ImageFailureArtifact]
    """Records of those of the `n` images that were not made."""
    warnings: list[str]
    """Warnings about the whole call, then those of each image."""


Model = TypeVar("Model", bound=BaseModel)


def is_artifact(value: Any) -> bool:
    """Return whether a value is an artifact of any version or, without a type, has the fields of a result's `model_dump()`."""
    if not isinstance(value, Mapping):
        return False
    return value.get("type") == ARTIFACT_TYPE or ("type" not in value and set(value) >= _DUMPED)


def check_artifact(artifact: Any) -> None:
    """Check that a value is an artifact of this version, or the `model_dump()` of a result.

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
    """Return an instance of a model for fields from storage. Fields of later versions are ignored.

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
