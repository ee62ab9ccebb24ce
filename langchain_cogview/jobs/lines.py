"""The lines of a job's manifest: pictures, failures and prompts as plain JSON, and the files that they name.

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
import tempfile
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pydantic import ValidationError

from langchain_cogview.errors import CogViewDownloadError, CogViewError, printable
from langchain_cogview.images.formats import ImageFormatError, inspect
from langchain_cogview.images.store import image_names, write_whole
from langchain_cogview.jobs.folder import unwritable
from langchain_cogview.jobs.plan import drawn_arguments
from langchain_cogview.jobs.survey import kind_of
from langchain_cogview.result import GeneratedImage, ImageFailure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_cogview.jobs.folder import JobFolder
    from langchain_cogview.jobs.plan import PromptItem
    from langchain_cogview.jobs.survey import Found
    from langchain_cogview.request import ImageRequest

MAX_URL: Final = 2_000
"""Characters of a link that is told."""
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
_IMAGE: Final = {
    *("sha256", "size_bytes", "width", "height", "mime_type", "content_filter", "model", "cost", "cached"),
    *("request_id", "sandbox", "warnings"),
}
_LINK: Final = {"url", "content_filter", "model", "cost", "cached", "request_id", "sandbox"}
_FAILURE: Final = {"error", "message", "code", "status", "outcome", "scope", "request_id", "content_filter"}


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).strftime(_TIME)


def image_entry(image: GeneratedImage, path: Path) -> dict[str, Any]:
    """A picture whose file is in the folder."""
    values = image.model_dump(mode="json", include=_IMAGE)
    warnings = values.pop("warnings")
    return {"file": path.name, **values, **({"warnings": warnings} if warnings else {})}


class Kept(NamedTuple):
    """What became of the bytes of a picture that was made.

    Attributes:
        entry: For the manifest; None where the bytes are elsewhere than in the folder: then its request has no end yet.
        problem: Why they are not in the folder; its notes say where they are.
    """

    entry: dict[str, Any] | None
    problem: Exception | None = None


def keep(folder: JobFolder, image: GeneratedImage) -> Kept:
    """See that a picture that was made is safe: in the folder, else aside, else by its link."""
    try:
        if image.path is not None and image.path.parent == folder.path and is_in_folder(folder, image.path.name):
            return Kept(image_entry(image, image.path))
        content = _at_hand(image)
        if content is None:
            return Kept(lost_entry(image))
    except Exception as error:  # noqa: BLE001  told at the end; the other pictures are kept all the same
        return Kept(None, unwritable(folder.path, error) if isinstance(error, OSError) else error)
    try:
        return Kept(saved_entry(folder, image, content))
    except Exception as problem:  # noqa: BLE001  the same
        aside = _kept_aside(image, content)
        if aside:
            problem.add_note(
                f"A picture that was paid for is kept in {aside}: move it into the folder before the next run."
            )
            return Kept(None, problem)
        link = f"; its link is {printable(image.url, MAX_URL)}" if image.url else ""
        problem.add_note(f"A picture that was paid for could be kept nowhere (request id {image.request_id}){link}")
        return Kept(lost_entry(image) if image.url else None, problem)


def is_in_folder(folder: JobFolder, name: str) -> bool:
    """Whether a file is durable in the folder itself, and not in another one that took its path."""
    try:
        folder.sync(name)
    except FileNotFoundError:
        return False
    return True


def _at_hand(image: GeneratedImage) -> bytes | None:
    try:
        # Without a type it is what a gateway put into its reply in place of an image; the image's warnings say so.
        return image.at_hand() if image.mime_type else None
    except CogViewError:
        return None


def found_entry(found: Found, price: Decimal | None, *, sandbox: bool) -> dict[str, Any]:
    """A picture that was found in the folder."""
    image = GeneratedImage(
        id=found.attempt.request_id[:8],
        mime_type=found.info.mime_type,
        width=found.info.width,
        height=found.info.height,
        size_bytes=found.size_bytes,
        sha256=found.sha256,
        request_id=found.attempt.request_id,
        model=found.attempt.model,
        prompt=found.attempt.prompt,
        cost=Decimal(0) if sandbox else price,
        sandbox=sandbox,
    )
    return image_entry(image, found.path)


def lost_entry(image: GeneratedImage) -> dict[str, Any]:
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


def linked_image(entry: Mapping[str, Any], prompt: str) -> GeneratedImage | None:
    """The picture of a `lost_entry`; None of another one, and of one whose link has ended."""
    if not entry.get("url") or (entry["expires_at"] or now()) < now():
        return None
    facts = {name: entry[name] for name in _LINK if name in entry}
    try:
        return GeneratedImage(id=entry["request_id"][:8], prompt=prompt, **facts)
    except ValidationError:  # a manifest that somebody else wrote
        return None


def failure_entry(failure: ImageFailure, model: str) -> dict[str, Any]:
    """A picture that was not made."""
    return {**failure.model_dump(mode="json", include=_FAILURE), "model": model}


def prompt_line(
    item: PromptItem,
    request: ImageRequest,
    images: list[dict[str, Any]],
    failures: list[dict[str, Any]],
    currency: str | None,
    *,
    unknown: bool,
) -> dict[str, Any]:
    """What a line says of a prompt, its requests and times apart; `unknown`: whether a request of it has no end."""
    costs = [each["cost"] for each in images]
    made = len(images) >= item.n
    rest = kind_of(each["error"] for each in failures)
    return {
        "key": item.key,
        "line": item.number,
        "status": "made" if made else "left" if rest == "unknown" and not unknown else rest,
        "arguments": {name: value for name, value in drawn_arguments(request).items() if value is not None},
        **({"extra": item.extra} if item.extra else {}),
        "images": images,
        "failures": failures,
        "cost": None if None in costs else str(sum(map(Decimal, costs), Decimal(0))),
        "currency": currency,
        "sandbox": any(each["sandbox"] for each in images),
    }


def saved_entry(folder: JobFolder, image: GeneratedImage, content: bytes) -> dict[str, Any]:
    """Write a picture's bytes into the folder, under the name that it has in every folder.

    Raises:
        CogViewStorageError: It cannot be written.
    """
    info = inspect(io.BytesIO(content))
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        path = folder.path / folder.add(image_names(image.request_id[:8], sha256, info.extension), content)
    except OSError as error:
        raise unwritable(folder.path, error) from None
    facts = {"mime_type": info.mime_type, "width": info.width, "height": info.height}
    return image_entry(image.model_copy(update={**facts, "sha256": sha256, "size_bytes": len(content)}), path)


def _kept_aside(image: GeneratedImage, content: bytes) -> Path | None:
    """Where the bytes are that have no room in the folder, under the name by which the folder's next run finds them."""
    try:
        extension = inspect(io.BytesIO(content)).extension
        names = image_names(image.request_id[:8], hashlib.sha256(content).hexdigest(), extension)
        aside = Path(tempfile.gettempdir(), next(names))
        write_whole(aside, content)
    except (OSError, ImageFormatError):
        return None
    return aside
