"""The records of a job in its folder: what is finished, and what was sent.

    job.json        the arguments that hold for every prompt; it marks a folder as a job's
    manifest.jsonl  one line for each finished prompt
    attempts.jsonl  one line before each paid request: a request without an end in the manifest is not forgotten

A line is on the disk before the next step is taken, and a file cut in the middle of its last line is read up to there. All that
is read here may have been written by somebody else: each line is checked against its schema before anything is sent.

A line of the manifest has

key          of the prompt's arguments, and of which one it is among those that say the same
line         its line in the file of prompts, when it was drawn
status       made (all its pictures), blocked, failed, unknown (made in part, the rest may have been charged), or left (made
             in part, the rest did not run: the next run draws it)
arguments    prompt, model, size, quality, n, ... as drawn
extra        what else its line holds; left out where that is nothing
images       of each: file (in the folder), sha256, size_bytes, width, height, mime_type, content_filter, model, cost,
             cached, request_id, sandbox
failures     of each picture that was not made: error, message, code, status, outcome, scope, request_id, content_filter,
             model;             with url and expires_at where it was made, but its bytes could not be had
given_up     requests that may have been charged besides, and were drawn anew: request_id, model
cost         of all its images, a decimal number; null where a price is unknown
currency     ISO code
sandbox      whether a placeholder is among them
request_ids  of all its requests
seconds      from the first request to the last file
finished     when, UTC
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
"""Characters of a link that is told."""
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
    """Checks without converting; what is not named here is left as it is."""

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
    """One line of a file of records, checked. The only parser of such a line."""
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
    """The file of what was sent."""
    return RecordFile(folder, ATTEMPTS, lambda raw: _parsed(raw, _attempt_schema), writable=writable)


def manifest_of(folder: JobFolder, *, writable: bool = False) -> RecordFile:
    """The file of what is finished."""
    return RecordFile(folder, MANIFEST, lambda raw: _parsed(raw, lambda _: ManifestRecord), writable=writable)


# --- what the records say


@dataclass(slots=True)
class Attempt:
    """A paid request, noted before it was sent.

    Attributes:
        request_id: Ours.
        key: Of the prompt.
        line: Its line at that time.
        model: Which model was asked; of a task, which one took it.
        prompt: Its beginning, in one line.
        task_id: Of the task endpoint, once the task was accepted.
        posts: How often it was sent though it may have been charged.
    """

    request_id: str
    key: str
    line: int
    model: str
    prompt: str
    task_id: str | None = None
    posts: int = 1


@dataclass(slots=True)
class Finished:
    """What the manifest says of one prompt, in short.

    Attributes:
        start: At which byte of the manifest its line begins.
        size: How many bytes its line has.
        line: Of the prompt, when it was drawn.
        made: How many pictures.
        cost: Of all its pictures, as a decimal number; None where a price is unknown, or there is no picture.
        currency: ISO code.
        spent: The models of the pictures that were paid, or may have been.
        errors: Names of the errors' classes, of the pictures that were not made.
        links: How many of those have a link from which they may still be fetched.
    """

    start: int
    size: int
    line: int
    made: int
    cost: str | None
    currency: str | None
    spent: tuple[str, ...]
    errors: tuple[str, ...]
    links: int


@dataclass(slots=True)
class History:
    """What a folder tells of the work so far.

    Attributes:
        finished: By the prompt's key; of several lines the last.
        superseded: How many lines of the manifest a later one replaces.
        open: Requests without an end in the manifest: by the prompt's key, then by their id.
        files: Names of the pictures in the manifest.
        sandbox: Whether a placeholder is among them.
    """

    finished: dict[str, Finished] = field(default_factory=dict)
    superseded: int = 0
    open: dict[str, dict[str, Attempt]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    sandbox: bool = False

    def take(self, start: int, size: int, values: Mapping[str, Any]) -> None:
        """Note a checked line of the manifest."""
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
        """Note a checked line of the attempts.

        Raises:
            KeyError: It is about a request that none before it names.
        """
        key, request_id = values["key"], values["request_id"]
        if "settled" in values:
            self.settle(key, request_id)
        elif "task_id" in values:
            attempt = self.open[key][request_id]
            attempt.task_id = values["task_id"]
            attempt.model = values.get("model", attempt.model)  # a fallback model's task
        else:
            attempt = Attempt(request_id, key, values["line"], values["model"], values["prompt"])
            before = self.open.setdefault(key, {}).get(request_id)
            if before and before.model == attempt.model:
                attempt.posts = before.posts + 1
            self.open[key][request_id] = attempt

    def settle(self, key: str, request_id: str) -> None:
        """A request has its end."""
        attempts = self.open.get(key, {})
        attempts.pop(request_id, None)
        if not attempts:
            self.open.pop(key, None)

    def attempts(self) -> Iterator[Attempt]:
        """The requests without an end."""
        return (attempt for attempts in self.open.values() for attempt in attempts.values())


def read_history(attempts: RecordFile, manifest: RecordFile) -> History:
    """What a folder tells of the work so far; changes nothing.

    Raises:
        CogViewConfigurationError: A line is damaged; with its number.
        CogViewStorageError: A file cannot be read.
    """
    history = History()
    for number, record in enumerate(attempts.records(), 1):
        try:
            history.note(record.values)
        except KeyError:
            raise damaged_record(attempts.path, number, "it names a request that was never sent") from None
    for record in manifest.records():
        history.take(*record)
    return history


# --- what is written


@dataclass(frozen=True, slots=True)
class RecoveredImage:
    """A picture that was paid for, is whole in the folder, and is not in the manifest."""

    attempt: Attempt
    path: Path
    info: ImageInfo
    sha256: str
    size_bytes: int


def kind_of(errors: Iterable[str]) -> str:
    """What became of a prompt that was not made: `blocked` by the content filter alone, `failed`, `unknown` without errors.

    Args:
        errors: Names of the classes of its errors.
    """
    kinds = [error_class(name) for name in errors]
    if not kinds:
        return "unknown"
    return "blocked" if all(kind and kind.scope is Scope.PROMPT for kind in kinds) else "failed"


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).strftime(_TIME)


def image_record(image: GeneratedImage, path: Path) -> dict[str, Any]:
    """A picture whose file is in the folder."""
    values = image.model_dump(mode="json", include=_IMAGE)
    warnings = values.pop("warnings")
    return {"file": path.name, **values, **({"warnings": warnings} if warnings else {})}


class SavedImage(NamedTuple):
    """What became of the bytes of a picture that was made.

    Attributes:
        entry: For the manifest; None where the bytes are elsewhere than in the folder: then its request has no end yet.
        problem: Why they are not in the folder; its notes say where they are.
    """

    record: dict[str, Any] | None
    problem: Exception | None = None


def save_image(folder: JobFolder, image: GeneratedImage) -> SavedImage:
    """See that a picture that was made is safe: in the folder, else aside, else by its link."""
    try:
        if image.path is not None and image.path.parent == folder.path and is_in_folder(folder, image.path.name):
            return SavedImage(image_record(image, image.path))
        content = _local_bytes(image)
        if content is None:
            return SavedImage(undownloaded_record(image))
    except Exception as error:  # noqa: BLE001  told at the end; the other pictures are kept all the same
        return SavedImage(None, write_error(folder.path, error) if isinstance(error, OSError) else error)
    try:
        return SavedImage(write_image(folder, image, content))
    except Exception as problem:  # noqa: BLE001  the same
        elsewhere = _save_elsewhere(image, content)
        if elsewhere:
            problem.add_note(
                f"A picture that was paid for is kept in {elsewhere}: move it into the folder before the next run."
            )
            return SavedImage(None, problem)
        link = f"; its link is {printable(image.url, MAX_URL)}" if image.url else ""
        problem.add_note(f"A picture that was paid for could be kept nowhere (request id {image.request_id}){link}")
        return SavedImage(undownloaded_record(image) if image.url else None, problem)


def is_in_folder(folder: JobFolder, name: str) -> bool:
    """Whether a file is durable in the folder itself, and not in another one that took its path."""
    try:
        folder.sync(name)
    except FileNotFoundError:
        return False
    return True


def _local_bytes(image: GeneratedImage) -> bytes | None:
    try:
        # Without a type it is what a gateway put into its reply in place of an image; the image's warnings say so.
        return image.local_bytes() if image.mime_type else None
    except CogViewError:
        return None


def recovered_record(recovered: RecoveredImage, price: Decimal | None, *, sandbox: bool) -> dict[str, Any]:
    """A picture that was found in the folder."""
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
    """A picture that was made and paid, but whose bytes could not be had: its link may still give them."""
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
    """The picture of a `lost_entry`; None of another one, and of one whose link has ended."""
    if not record.get("url") or (record["expires_at"] or now()) < now():
        return None
    facts = {name: record[name] for name in _LINK if name in record}
    try:
        return GeneratedImage(id=record["request_id"][:8], prompt=prompt, **facts)
    except ValidationError:  # a manifest that somebody else wrote
        return None


def failure_record(failure: ImageFailure, model: str) -> dict[str, Any]:
    """A picture that was not made."""
    return {**failure.model_dump(mode="json", include=_FAILURE), "model": model}


def manifest_record(
    item: PromptItem,
    request: ImageRequest,
    images: list[dict[str, Any]],
    failures: list[dict[str, Any]],
    currency: str | None,
    *,
    unknown: bool,
) -> dict[str, Any]:
    """What a line says of a prompt, its requests and times apart; `unknown`: whether a request of it has no end."""
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
        "sandbox": any(image["sandbox"] for image in images),
    }


def write_image(folder: JobFolder, image: GeneratedImage, content: bytes) -> dict[str, Any]:
    """Write a picture's bytes into the folder, under the name that it has in every folder.

    Raises:
        CogViewStorageError: It cannot be written.
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
    """Where the bytes are that have no room in the folder, under the name by which the folder's next run finds them."""
    try:
        extension = inspect(io.BytesIO(content)).extension
        names = image_names(image.request_id[:8], hashlib.sha256(content).hexdigest(), extension)
        elsewhere = Path(tempfile.gettempdir(), next(names))
        write_whole(elsewhere, content)
    except (OSError, ImageFormatError):
        return None
    return elsewhere
