"""The records of a job in its folder: which prompts are finished, and which requests were sent.

    job.json        the arguments that apply to every prompt; the file marks a folder as a job's
    manifest.jsonl  one line for each finished prompt
    attempts.jsonl  one line before each paid request, so that a request without an end in the manifest is not forgotten

Each line is durable before the job continues, and an incomplete last line is ignored. Another program may have written these
files: each line is checked against its schema before anything is sent.

A manifest record has these keys:

key          identifies the prompt: a hash of its arguments, with a counter for lines that are equal
line         its line number in the file of prompts at the time of the request
source       name of the file of prompts; absent for a list and for the standard input
status       made (all images), blocked, failed, unknown (some images are missing and may have been charged) or left (some images
             are missing because their requests did not run; the next run generates them)
arguments    prompt, model, size, quality, n, ... as sent
extra        other columns or keys of the line; absent if there are none
images       for each image: file (path in the folder, with `/`), sha256, size_bytes, width, height, mime_type, content_filter,
             model, cost, cached, request_id, sandbox
failures     for each image that is missing: error, message, code, status, outcome, scope, request_id, content_filter, model; with
             url and expires_at if the image was generated but could not be downloaded
given_up     earlier requests that may have been charged, and whose images were generated again: request_id, model
cost         of all its images, as a decimal number; null if a price is unknown
currency     ISO 4217 code
sandbox      whether the sandbox answered, also where it blocked the prompt
request_ids  ids of all its requests
seconds      time from the first request to the last file
finished     time of the record, in UTC
"""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Final, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config

from langchain_cogview.errors import CogViewDownloadError, Scope, error_class, printable
from langchain_cogview.jobs.folder import SHARD_FOLDER, SUBFOLDER, DamagedRecordError, RecordFile
from langchain_cogview.jobs.items import resolved_arguments
from langchain_cogview.result import GeneratedImage, ImageFailure

if sys.version_info >= (3, 12):
    from typing import TypedDict
else:  # pydantic needs the one that knows its own base classes
    from typing_extensions import TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from langchain_cogview.jobs.folder import JobFolder
    from langchain_cogview.jobs.items import PromptItem
    from langchain_cogview.request import ImageRequest

MANIFEST: Final = "manifest.jsonl"
ATTEMPTS: Final = "attempts.jsonl"
MAX_URL: Final = 2_000
"""Maximum length of a URL in a message, in characters."""
_MAX_AMOUNT: Final = Decimal(10) ** 12
_SUBFOLDER: Final = re.compile(rf"{SHARD_FOLDER.pattern}|(?:{SHARD_FOLDER.pattern}/)?{SUBFOLDER.pattern}", re.ASCII)
"""Of the job, or of a shard where the manifest is that of a merged job."""
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
_IMAGE: Final = {
    *("sha256", "size_bytes", "width", "height", "mime_type", "content_filter", "model", "cost", "cached"),
    *("request_id", "sandbox", "warnings"),
}
_LINK: Final = {"url", "content_filter", "model", "cost", "cached", "request_id", "sandbox"}
_FAILURE: Final = {"error", "message", "code", "status", "outcome", "scope", "request_id", "content_filter"}


# --- the schema of a line


@lru_cache(maxsize=1024)
def _amount(text: str) -> str:
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("NaN")
    exponent = amount.as_tuple().exponent
    if not (amount.is_finite() and 0 <= amount <= _MAX_AMOUNT and isinstance(exponent, int) and exponent >= -30):  # noqa: PLR2004
        raise ValueError("not an amount of money")
    return text


def _file(text: str) -> str:
    subfolder, _, name = text.rpartition("/")
    if subfolder and not _SUBFOLDER.fullmatch(subfolder):
        raise ValueError("not a sub-folder of the job")
    if name in {"", ".", ".."} or text[0] == "/" or "\\" in text or not text.isprintable():
        raise ValueError("not the name of a file in the folder")
    return text


_Count = Annotated[int, Field(ge=0, le=1 << 53)]
_Name = Annotated[str, Field(max_length=1000)]
_RequestId = Annotated[str, Field(pattern=r"\A[0-9A-Za-z_.-]{1,200}\z")]
_TaskId = Annotated[str, Field(pattern=r"\A[0-9A-Za-z_:-][0-9A-Za-z_.:-]{0,255}\z")]
Amount = Annotated[str, Field(max_length=60), AfterValidator(_amount)]
"""An amount of money as text, from 0."""


_CHECKED: Final = ConfigDict(strict=True, extra="allow", cache_strings="keys")
"""Checks without converting; other keys are left unchanged. Values differ from line to line and are not worth a cache."""


@with_config(_CHECKED)
class _FilterEntry(TypedDict):
    role: NotRequired[str | None]
    level: NotRequired[Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None]


@with_config(_CHECKED)
class _Image(TypedDict):
    file: Annotated[str, Field(max_length=255), AfterValidator(_file)]
    model: _Name
    cost: Amount | None
    cached: bool
    sandbox: bool
    request_id: NotRequired[_RequestId | None]
    sha256: NotRequired[_Name | None]
    size_bytes: NotRequired[_Count | None]
    width: _Count | None
    height: _Count | None
    mime_type: NotRequired[_Name | None]
    content_filter: NotRequired[list[_FilterEntry]]


@with_config(_CHECKED)
class _Failure(TypedDict):
    error: _Name
    message: str
    model: _Name
    code: NotRequired[str | None]
    status: NotRequired[int | None]
    outcome: _Name
    request_id: NotRequired[_RequestId | None]
    content_filter: NotRequired[list[_FilterEntry]]
    url: NotRequired[str | None]
    expires_at: NotRequired[_Name | None]
    cost: NotRequired[Amount | None]
    cached: NotRequired[bool]
    sandbox: NotRequired[bool]


def _has_what_a_link_needs(failure: _Failure) -> _Failure:
    if failure.get("url") and not (
        failure.get("request_id") and {"expires_at", "cost", "cached", "sandbox"} <= failure.keys()
    ):
        raise ValueError("not complete")
    return failure


@with_config(_CHECKED)
class _GivenUpRequest(TypedDict):
    request_id: _RequestId
    model: _Name


@with_config(_CHECKED)
class _Arguments(TypedDict):
    prompt: str


@with_config(_CHECKED)
class _Record(TypedDict):
    """One line of the manifest: what became of one prompt."""

    key: _Name
    line: _Count
    source: NotRequired[_Name]
    status: _Name
    arguments: _Arguments
    images: list[_Image]
    failures: list[Annotated[_Failure, AfterValidator(_has_what_a_link_needs)]]
    given_up: list[_GivenUpRequest]
    cost: Amount | None
    currency: Annotated[str, Field(max_length=16)] | None
    sandbox: bool
    request_ids: list[_RequestId]
    seconds: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
    finished: _Name


@with_config(_CHECKED)
class _Sent(TypedDict):
    key: _Name
    request_id: _RequestId
    line: _Count
    model: _Name
    prompt: str


@with_config(_CHECKED)
class _Task(TypedDict):
    key: _Name
    request_id: _RequestId
    task_id: _TaskId | None
    model: NotRequired[_Name]


@with_config(_CHECKED)
class _Settled(TypedDict):
    key: _Name
    request_id: _RequestId
    settled: _Name


_RECORD, _SENT, _TASK, _SETTLED = (TypeAdapter[Any](schema).validator for schema in (_Record, _Sent, _Task, _Settled))


# The only parsers of records. A line is parsed and checked in one step, which is three times as fast as one after the other;
# what does not pass is parsed by json, which takes the escape of an unpaired surrogate and says what is wrong.


def manifest_line(raw: bytes) -> dict[str, Any]:
    """Return the checked content of a line of the manifest; raise `DamagedRecordError` if it is none."""
    try:
        values: dict[str, Any] = _RECORD.validate_json(raw)
    except ValidationError:
        values = _checked(_json_object(raw), _RECORD)
    return values


def attempts_line(raw: bytes) -> dict[str, Any]:
    """Return the checked content of a line of the attempts; raise `DamagedRecordError` if it is none."""
    try:
        values: dict[str, Any] = _SENT.validate_json(raw)
    except ValidationError:  # the two other kinds of lines are rare
        values = _json_object(raw)
    else:
        if "settled" not in values and "task_id" not in values:
            return values
    return _checked(values, _SETTLED if "settled" in values else _TASK if "task_id" in values else _SENT)


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        values = json.loads(raw)
    except UnicodeDecodeError:
        raise DamagedRecordError("not UTF-8", incomplete=True) from None
    except RecursionError:
        raise DamagedRecordError("nested too deeply") from None
    except ValueError:
        raise DamagedRecordError("not valid JSON", incomplete=True) from None
    if not isinstance(values, dict):
        raise DamagedRecordError("not a JSON object")
    return values


def _checked(values: dict[str, Any], schema: Any) -> dict[str, Any]:
    try:
        checked: dict[str, Any] = schema.validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the record"
        raise DamagedRecordError(printable(f"{where}: {first['msg']}", 120)) from None
    return checked


def attempts_of(
    folder: JobFolder, *, writable: bool = False, kind: Callable[..., RecordFile] = RecordFile
) -> RecordFile:
    """Return the open file of sent requests; `writable` creates it and allows appending."""
    return kind(folder, ATTEMPTS, attempts_line, writable=writable)


def manifest_of(
    folder: JobFolder, *, writable: bool = False, kind: Callable[..., RecordFile] = RecordFile
) -> RecordFile:
    """Return the open file of finished prompts; `writable` creates it and allows appending."""
    return kind(folder, MANIFEST, manifest_line, writable=writable)


# --- building records


def kind_of(errors: Iterable[str]) -> str:
    """Return `blocked` if all errors are content filter errors, `failed` for other errors, `unknown` if there are none."""
    kinds = [error_class(name) for name in errors]
    if not kinds:
        return "unknown"
    return "blocked" if all(kind and kind.scope is Scope.PROMPT for kind in kinds) else "failed"


def now() -> str:
    """Return the current time in UTC, to the second."""
    return datetime.now(UTC).strftime(_TIME)


def image_record(image: GeneratedImage, file: str) -> dict[str, Any]:
    """Return the record of an image; `file` is its path in the job's folder."""
    values = image.model_dump(mode="json", include=_IMAGE)
    warnings = values.pop("warnings")
    return {"file": file, **values, **({"warnings": warnings} if warnings else {})}


def undownloaded_record(image: GeneratedImage) -> dict[str, Any]:
    """Return the record of an image that was paid for but not downloaded; its URL may still work."""
    return {
        "error": CogViewDownloadError.__name__,
        "message": " ".join(image.warnings) or CogViewDownloadError.default_message,
        "code": None,
        "status": None,
        "outcome": str(CogViewDownloadError.outcome),
        "scope": str(CogViewDownloadError.scope),
        **image.model_dump(mode="json", include=_LINK),
        "expires_at": image.expires_at.astimezone(UTC).strftime(_TIME) if image.expires_at else None,
    }


def image_with_link(record: Mapping[str, Any], prompt: str) -> GeneratedImage | None:
    """Return the image of a record of `undownloaded_record`; None if it has no URL, or the URL has expired."""
    if not record.get("url") or (record["expires_at"] or now()) < now():
        return None
    facts = {name: record[name] for name in _LINK if name in record}
    try:
        return GeneratedImage(id=record["request_id"][:8], prompt=prompt, **facts)
    except ValidationError:  # another program wrote the manifest
        return None


def failure_record(failure: ImageFailure, model: str) -> dict[str, Any]:
    """Return the record of an image that was not generated."""
    return {**failure.model_dump(mode="json", include=_FAILURE), "model": model}


def manifest_record(
    item: PromptItem,
    request: ImageRequest,
    images: list[dict[str, Any]],
    failures: list[dict[str, Any]],
    currency: str | None,
    *,
    unknown: bool,
    sandbox: bool,
    source: str | None = None,
) -> dict[str, Any]:
    """Return the record of a prompt, without request ids and times; `unknown`: whether a request has no known end."""
    costs = [image["cost"] for image in images]
    made = len(images) >= item.n
    rest = kind_of(failure["error"] for failure in failures)
    return {
        "key": item.key,
        "line": item.number,
        **({"source": source} if source else {}),
        "status": "made" if made else "left" if rest == "unknown" and not unknown else rest,
        "arguments": {name: value for name, value in resolved_arguments(request).items() if value is not None},
        **({"extra": item.extra} if item.extra else {}),
        "images": images,
        "failures": failures,
        "cost": None if None in costs else str(sum(map(Decimal, costs), Decimal(0))),
        "currency": currency,
        "sandbox": sandbox or any(image["sandbox"] for image in images),
    }
