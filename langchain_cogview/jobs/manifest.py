"""The records of a job in its folder: which prompts are finished, and which requests were sent.

    job.json        the arguments that apply to every prompt; the file marks a folder as a job's
    manifest.jsonl  one line for each finished prompt
    attempts.jsonl  one line before each paid request, so that a request without an end in the manifest is not forgotten

Each line is durable before the job continues, and an incomplete last line is ignored. Another program may have written these
files: each line is checked against its schema before anything is sent.

A manifest record has these keys:

key          identifies the prompt: a hash of its arguments, with a counter for lines that are equal
line         its line number in the file of prompts at the time of the request
status       made (all images), blocked, failed, unknown (some images are missing and may have been charged) or left (some images
             are missing because their requests did not run; the next run generates them)
arguments    prompt, model, size, quality, n, ... as sent
extra        other columns or keys of the line; absent if there are none
images       for each image: file (name in the folder), sha256, size_bytes, width, height, mime_type, content_filter, model, cost,
             cached, request_id, sandbox
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

import hashlib
import io
import json
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from langchain_cogview.errors import CogViewDownloadError, CogViewError, Scope, error_class, printable
from langchain_cogview.images.formats import ImageFormatError, ImageInfo, inspect
from langchain_cogview.images.store import image_names, write_whole
from langchain_cogview.jobs.folder import DamagedRecordError, RecordFile, damaged_record, write_error
from langchain_cogview.jobs.prompts import resolved_arguments
from langchain_cogview.result import GeneratedImage, ImageFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from langchain_cogview.jobs.folder import JobFolder
    from langchain_cogview.jobs.prompts import PromptItem
    from langchain_cogview.request import ImageRequest

MANIFEST: Final = "manifest.jsonl"
ATTEMPTS: Final = "attempts.jsonl"
MAX_URL: Final = 2_000
"""Maximum length of a URL in a message, in characters."""
_MAX_AMOUNT: Final = Decimal(10) ** 12
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
_IMAGE: Final = {
    *("sha256", "size_bytes", "width", "height", "mime_type", "content_filter", "model", "cost", "cached"),
    *("request_id", "sandbox", "warnings"),
}
_LINK: Final = {"url", "content_filter", "model", "cost", "cached", "request_id", "sandbox"}
_FAILURE: Final = {"error", "message", "code", "status", "outcome", "scope", "request_id", "content_filter"}


# --- the schema of a line


def _amount(text: str) -> str:
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("NaN")
    exponent = amount.as_tuple().exponent
    if not (amount.is_finite() and 0 <= amount <= _MAX_AMOUNT and isinstance(exponent, int) and exponent >= -30):  # noqa: PLR2004
        raise ValueError("not an amount of money")
    return text


def _file_name(text: str) -> str:
    if text in {"", ".", ".."} or "/" in text or "\\" in text or not text.isprintable():
        raise ValueError("not the name of a file in the folder")
    return text


_Count = Annotated[int, Field(ge=0, le=1 << 53)]
_Name = Annotated[str, Field(max_length=1000)]
_RequestId = Annotated[str, Field(pattern=r"\A[0-9A-Za-z_.-]{1,200}\z")]
_TaskId = Annotated[str, Field(pattern=r"\A[0-9A-Za-z_:-][0-9A-Za-z_.:-]{0,255}\z")]
_Amount = Annotated[str, Field(max_length=60), AfterValidator(_amount)]


class _Checked(BaseModel):
    """Checks without converting; other keys are left unchanged."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _FilterEntry(_Checked):
    role: str | None = None
    level: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None


class _Image(_Checked):
    file: Annotated[str, Field(max_length=255), AfterValidator(_file_name)]
    model: _Name
    cost: _Amount | None
    cached: bool
    sandbox: bool
    request_id: _RequestId | None = None
    sha256: _Name | None = None
    size_bytes: _Count | None = None
    width: _Count | None
    height: _Count | None
    mime_type: _Name | None = None
    content_filter: list[_FilterEntry] = []


class _Failure(_Checked):
    error: _Name
    message: str
    model: _Name
    code: str | None = None
    status: int | None = None
    outcome: _Name
    request_id: _RequestId | None = None
    content_filter: list[_FilterEntry] = []
    url: str | None = None
    expires_at: _Name | None = None
    cost: _Amount | None = None
    cached: bool = False
    sandbox: bool = False

    @model_validator(mode="after")
    def _has_what_a_link_needs(self) -> _Failure:
        if self.url and not (self.request_id and {"expires_at", "cost", "cached", "sandbox"} <= self.model_fields_set):
            raise ValueError("not complete")
        return self


class _GivenUpRequest(_Checked):
    request_id: _RequestId
    model: _Name


class _Arguments(_Checked):
    prompt: str


class ManifestRecord(_Checked):
    """One line of the manifest: what became of one prompt."""

    key: _Name
    line: Annotated[int, Field(ge=0, le=1 << 53)]
    status: _Name
    arguments: _Arguments
    images: list[_Image]
    failures: list[_Failure]
    given_up: list[_GivenUpRequest]
    cost: _Amount | None
    currency: Annotated[str, Field(max_length=16)] | None
    sandbox: bool
    request_ids: list[_RequestId]
    seconds: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
    finished: _Name


class _Sent(_Checked):
    key: _Name
    request_id: _RequestId
    line: Annotated[int, Field(ge=0, le=1 << 53)]
    model: _Name
    prompt: str


class _Task(_Checked):
    key: _Name
    request_id: _RequestId
    task_id: _TaskId | None
    model: _Name = ""


class _Settled(_Checked):
    key: _Name
    request_id: _RequestId
    settled: _Name


def _parsed(raw: bytes, schema: Callable[[dict[str, Any]], type[_Checked]]) -> dict[str, Any]:
    """Parse and check one line. The only parser of records.

    Returns:
        The content of the line.

    Raises:
        DamagedRecordError: The line is not a valid record.
    """
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
    try:
        schema(values).model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the record"
        raise DamagedRecordError(printable(f"{where}: {first['msg']}", 120)) from None
    return values


def _attempt_schema(values: dict[str, Any]) -> type[_Checked]:
    return _Settled if "settled" in values else _Task if "task_id" in values else _Sent


def attempts_of(folder: JobFolder, *, writable: bool = False) -> RecordFile:
    """Return the open file of sent requests; `writable` creates it and allows appending."""
    return RecordFile(folder, ATTEMPTS, lambda raw: _parsed(raw, _attempt_schema), writable=writable)


def manifest_of(folder: JobFolder, *, writable: bool = False) -> RecordFile:
    """Return the open file of finished prompts; `writable` creates it and allows appending."""
    return RecordFile(folder, MANIFEST, lambda raw: _parsed(raw, lambda _: ManifestRecord), writable=writable)


# --- the history of a folder


@dataclass(slots=True)
class Attempt:
    """A paid request, recorded before it was sent."""

    request_id: str  # generated by this client
    key: str  # key of the prompt
    line: int  # line number of the prompt at that time
    model: str  # the model that was asked; for a task, the model that accepted it
    prompt: str  # beginning of the prompt, in one line
    task_id: str | None = None  # id at the task endpoint, once the task is accepted
    posts: int = 1  # how many of its POSTs may have been charged


@dataclass(slots=True)
class Finished:
    """Summary of the manifest record of one prompt."""

    start: int  # the byte at which its line begins in the manifest
    size: int  # length of its line, in bytes
    line: int  # line number of the prompt at the time of the request
    made: int  # number of images
    cost: str | None  # cost of all its images, as a decimal number; None if a price is unknown or there is no image
    currency: str | None  # ISO 4217 code
    spent: tuple[str, ...]  # the model of each image that was paid for, or may have been
    errors: tuple[str, ...]  # class name of the error of each missing image
    links: int  # how many missing images have a URL from which they may still be downloaded


@dataclass(slots=True)
class History:
    """What the folder's records say about earlier requests."""

    # Finished prompts by key; the last record of a prompt counts.
    finished: dict[str, Finished] = field(default_factory=dict)
    superseded: int = 0  # how many lines of the manifest are replaced by a later one
    # Requests without an end in the manifest, by key of the prompt and request id.
    open: dict[str, dict[str, Attempt]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)  # names of the image files in the manifest
    sandbox: bool = False  # whether the sandbox answered

    def take(self, start: int, size: int, values: Mapping[str, Any]) -> None:
        """Add a checked line of the manifest, which begins at byte `start` and has `size` bytes."""
        key, images, failures = values["key"], values["images"], values["failures"]
        paid = [image["model"] for image in images if not image["cached"]]
        paid += [item["model"] for item in failures if item.get("url")]
        paid += [item["model"] for item in values["given_up"]]
        self.superseded += key in self.finished
        self.finished[key] = Finished(
            start,
            size,
            values["line"],
            len(images),
            values["cost"] if images else None,
            values["currency"] and sys.intern(values["currency"]),
            tuple(map(sys.intern, paid)),
            tuple(sys.intern(item["error"]) for item in failures),
            sum(bool(item.get("url")) for item in failures),
        )
        self.sandbox = self.sandbox or values["sandbox"]
        self.files.update(image["file"] for image in images)
        for request_id in values["request_ids"]:
            self.settle(key, request_id)

    def note(self, values: Mapping[str, Any]) -> None:
        """Add a checked line of the attempts.

        Raises:
            KeyError: No earlier line names the request.
        """
        key, request_id = values["key"], values["request_id"]
        if "settled" in values:
            self.settle(key, request_id)
        elif "task_id" in values:
            attempt = self.open[key][request_id]
            attempt.task_id = values["task_id"]
            attempt.model = values.get("model", attempt.model)  # a fallback model accepted the task
        else:
            attempt = Attempt(request_id, key, values["line"], values["model"], values["prompt"])
            before = self.open.setdefault(key, {}).get(request_id)
            if before and before.model == attempt.model:
                attempt.posts = before.posts + 1
            self.open[key][request_id] = attempt

    def settle(self, key: str, request_id: str) -> None:
        """Remove a request whose end is known."""
        attempts = self.open.get(key, {})
        attempts.pop(request_id, None)
        if not attempts:
            self.open.pop(key, None)

    def attempts(self) -> Iterator[Attempt]:
        """Return the requests without an end in the manifest."""
        return (attempt for attempts in self.open.values() for attempt in attempts.values())


def read_history(attempts: RecordFile, manifest: RecordFile) -> History:
    """Return what the records of a folder say, without changing them.

    Raises:
        CogViewConfigurationError: A line is damaged; the message has its number.
        CogViewStorageError: A file cannot be read.
    """
    history = History()
    for number, record in enumerate(attempts.records(), 1):
        try:
            history.note(record.values)
        except KeyError:
            raise damaged_record(attempts.path, number, "its request has no earlier line") from None
    for record in manifest.records():
        history.take(*record)
    return history


# --- building records


@dataclass(frozen=True, slots=True)
class RecoveredImage:
    """An image that was paid for and is complete in the folder, but missing in the manifest."""

    attempt: Attempt  # the request that generated it
    path: Path
    info: ImageInfo  # format and size of the image
    sha256: str  # SHA-256 of the file's bytes, in hexadecimal
    size_bytes: int  # size of the file, in bytes


def kind_of(errors: Iterable[str]) -> str:
    """Return `blocked` if all errors are content filter errors, `failed` for other errors, `unknown` if there are none."""
    kinds = [error_class(name) for name in errors]
    if not kinds:
        return "unknown"
    return "blocked" if all(kind and kind.scope is Scope.PROMPT for kind in kinds) else "failed"


def now() -> str:
    """Return the current time in UTC, to the second."""
    return datetime.now(UTC).strftime(_TIME)


def image_record(image: GeneratedImage, path: Path) -> dict[str, Any]:
    """Return the record of an image whose file is in the folder."""
    values = image.model_dump(mode="json", include=_IMAGE)
    warnings = values.pop("warnings")
    return {"file": path.name, **values, **({"warnings": warnings} if warnings else {})}


class SavedImage(NamedTuple):
    """What happened to the bytes of a generated image."""

    # For the manifest; None if the bytes are not in the folder, so that the request has no end yet.
    record: dict[str, Any] | None
    problem: Exception | None = None  # why the bytes are not in the folder; its notes say where they are


def save_image(folder: JobFolder, image: GeneratedImage) -> SavedImage:
    """Keep an image that was paid for: in the folder, otherwise in the temporary directory, otherwise by its URL.

    Returns:
        The image's record, or the problem.
    """
    try:
        if image.path is not None and image.path.parent == folder.path and is_in_folder(folder, image.path.name):
            return SavedImage(image_record(image, image.path))
        content = _local_bytes(image)
        if content is None:
            return SavedImage(undownloaded_record(image))
    except Exception as error:  # noqa: BLE001  reported at the end; the other images are saved anyway
        return SavedImage(None, write_error(folder.path, error) if isinstance(error, OSError) else error)
    try:
        return SavedImage(write_image(folder, image, content))
    except Exception as problem:  # noqa: BLE001  reported at the end
        elsewhere = _save_elsewhere(image, content)
        if elsewhere:
            problem.add_note(
                f"An image that was paid for is kept in {elsewhere}: move it into the folder before the next run."
            )
            return SavedImage(None, problem)
        link = f"; its link is {printable(image.url, MAX_URL)}" if image.url else ""
        problem.add_note(
            f"An image that was paid for could not be saved anywhere (request id {image.request_id}){link}"
        )
        return SavedImage(undownloaded_record(image) if image.url else None, problem)


def is_in_folder(folder: JobFolder, name: str) -> bool:
    """Return whether a file is durable in this folder, and not in another folder at the same path."""
    try:
        folder.sync(name)
    except FileNotFoundError:
        return False
    return True


def _local_bytes(image: GeneratedImage) -> bytes | None:
    try:
        # Without a type, the bytes are what a gateway sent in place of an image; the image's warnings say so.
        return image.local_bytes() if image.mime_type else None
    except CogViewError:
        return None


def recovered_record(recovered: RecoveredImage, price: Decimal | None, *, sandbox: bool) -> dict[str, Any]:
    """Return the record of an image that was found in the folder; `price` is its list price."""
    image = GeneratedImage(
        id=recovered.attempt.request_id[:8],
        mime_type=recovered.info.mime_type,
        width=recovered.info.width,
        height=recovered.info.height,
        size_bytes=recovered.size_bytes,
        sha256=recovered.sha256,
        request_id=recovered.attempt.request_id,
        model=recovered.attempt.model,
        prompt=recovered.attempt.prompt,
        cost=Decimal(0) if sandbox else price,
        sandbox=sandbox,
    )
    return image_record(image, recovered.path)


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
) -> dict[str, Any]:
    """Return the record of a prompt, without request ids and times; `unknown`: whether a request has no known end."""
    costs = [image["cost"] for image in images]
    made = len(images) >= item.n
    rest = kind_of(failure["error"] for failure in failures)
    return {
        "key": item.key,
        "line": item.number,
        "status": "made" if made else "left" if rest == "unknown" and not unknown else rest,
        "arguments": {name: value for name, value in resolved_arguments(request).items() if value is not None},
        **({"extra": item.extra} if item.extra else {}),
        "images": images,
        "failures": failures,
        "cost": None if None in costs else str(sum(map(Decimal, costs), Decimal(0))),
        "currency": currency,
        "sandbox": sandbox or any(image["sandbox"] for image in images),
    }


def write_image(folder: JobFolder, image: GeneratedImage, content: bytes) -> dict[str, Any]:
    """Return the record of an image after writing it into the folder, under the name that it has in every folder.

    Raises:
        CogViewStorageError: The file cannot be written.
    """
    info = inspect(io.BytesIO(content))
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        path = folder.path / folder.add(image_names(image.request_id[:8], sha256, info.extension), content)
    except OSError as error:
        raise write_error(folder.path, error) from None
    facts = {"mime_type": info.mime_type, "width": info.width, "height": info.height}
    return image_record(image.model_copy(update={**facts, "sha256": sha256, "size_bytes": len(content)}), path)


def _save_elsewhere(image: GeneratedImage, content: bytes) -> Path | None:
    """Return the path in the temporary directory to which the bytes were written, or None if that fails too."""
    try:
        extension = inspect(io.BytesIO(content)).extension
        names = image_names(image.request_id[:8], hashlib.sha256(content).hexdigest(), extension)
        elsewhere = Path(tempfile.gettempdir(), next(names))
        write_whole(elsewhere, content)
    except (OSError, ImageFormatError):
        return None
    return elsewhere
