"""What an image tool answers: the text that the model reads, the blocks with which it sees the images, and the artifact."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final, Literal

from langchain_cogview.blocks import bytes_block, url_block
from langchain_cogview.concurrency import Deadline, in_thread, raised_by_signal
from langchain_cogview.errors import MAX_MODEL_TEXT, CogViewError, CogViewStorageError, Outcome, printable
from langchain_cogview.images.backend import virtual_path
from langchain_cogview.images.formats import EXTENSIONS
from langchain_cogview.images.store import image_names
from langchain_cogview.text import IN_MEMORY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_cogview.artifact import ImageArtifact
    from langchain_cogview.blocks import BlockSource
    from langchain_cogview.images.backend import BackendFolder
    from langchain_cogview.result import GeneratedImage, ImageResult

    Answer = tuple[str | list[dict[str, Any]], ImageArtifact]

ContentFormat = Literal["text", "image", "thumbnail", "image_url"]
"""What a chat model gets of an image."""
_SEEN: Final = frozenset({"image", "thumbnail"})
_NOT_THE_IMAGE: Final = ", not the image."
_AND_THE_IMAGE: Final = ", and the image to look at."
_SHOWN_TO_USER: Final = " The application shows the image to the user."
_PATH_CHARACTERS: Final = 160
_UPLOAD_SECONDS: Final = 60.0


def described(description: str, settings: Mapping[str, Any]) -> str:
    """Fit the description of a tool to what the tool answers.

    Args:
        description: The description of a tool that answers with a text only, and whose images the application does not show.
        settings: The settings of the tool.

    Returns:
        The description.
    """
    if settings.get("content_format") in _SEEN:
        description = description.replace(_NOT_THE_IMAGE, _AND_THE_IMAGE)
    return description + _SHOWN_TO_USER if settings.get("shown_to_user") is True else description


def answer(result: ImageResult, content_format: ContentFormat, *, shown_to_user: bool) -> Answer:
    """Make the tool message of a result. Nothing that fails here costs the image: it becomes a warning on the artifact.

    Args:
        result: The result. An image that is only in memory is saved in a temporary folder, because an artifact has no bytes.
        content_format: What the model gets of the images.
        shown_to_user: Whether the application shows the images to the user.

    Returns:
        The content for the model, and the artifact for the application.
    """
    if any(map(_is_unsaved, result.images)):
        result = _with_files(result)
    outcomes = [_block_or_note(image, content_format) for image in result.images] if content_format in _SEEN else []
    return _answer(result, outcomes, content_format, shown_to_user=shown_to_user)


async def aanswer(result: ImageResult, content_format: ContentFormat, *, shown_to_user: bool) -> Answer:
    """Async version of `answer`.

    Returns:
        As `answer`.
    """
    if any(map(_is_unsaved, result.images)):
        result = await in_thread(_with_files, result)
    outcomes = []
    if content_format in _SEEN:
        outcomes = [await _ablock_or_note(image, content_format) for image in result.images]
    return _answer(result, outcomes, content_format, shown_to_user=shown_to_user)


# --- the blocks


class _Outcome:
    """The block of an image, with a warning if it has less than was asked for; without a block the warning says why."""

    def __init__(self, block: Any = None, note: str | None = None) -> None:
        self.block = block
        self.note = note


def _block_or_note(image: GeneratedImage, content_format: ContentFormat) -> _Outcome:
    try:
        source = _source(image, content_format)
        return _Outcome(url_block(image)) if source == "url" else _Outcome(*bytes_block(image, image.read(), source))
    except Exception as error:  # noqa: BLE001  the image is paid for
        return _not_shown(image, error)


async def _ablock_or_note(image: GeneratedImage, content_format: ContentFormat) -> _Outcome:
    try:
        source = _source(image, content_format)
        if source == "url":
            return _Outcome(url_block(image))
        return _Outcome(*await in_thread(bytes_block, image, await image.aread(), source))
    except Exception as error:  # noqa: BLE001  the image is paid for
        return _not_shown(image, error)


def _source(image: GeneratedImage, content_format: ContentFormat) -> BlockSource:
    """Choose the source of a block: the link of an image whose bytes the user does not want to fetch.

    Returns:
        The link, if one is wanted, else the image bytes.

    Raises:
        CogViewStorageError: The image is neither at its link nor in memory.
    """
    if image.mime_type is not None:
        return "thumbnail" if content_format == "thumbnail" else "base64"
    if content_format == "thumbnail":
        raise CogViewStorageError("its bytes were not fetched.")
    return "url"


def _not_shown(image: GeneratedImage, error: Exception) -> _Outcome:
    if raised_by_signal(error):
        raise error
    why = error.message if isinstance(error, CogViewError) else f"{type(error).__name__}: {error}"
    if isinstance(error, ImportError):
        why = str(error)
    return _Outcome(
        note=f"Image {printable(image.id, 64)} was not put before the chat model: {printable(why.rstrip('.'))}."
    )


def _answer(
    result: ImageResult, outcomes: Sequence[_Outcome], content_format: ContentFormat, *, shown_to_user: bool
) -> Answer:
    notes = tuple(outcome.note for outcome in outcomes if outcome.note)
    if notes:
        pairs = zip(result.images, outcomes, strict=True)
        images = tuple(
            image.model_copy(update={"warnings": (*image.warnings, outcome.note)}) if outcome.note else image
            for image, outcome in pairs
        )
        result = result.model_copy(update={"images": images, "warnings": (*result.warnings, *notes)})
    unseen = sum(outcome.block is None for outcome in outcomes)
    text = text_for_model(result, shown_to_user=shown_to_user, unseen=unseen)
    blocks = [dict(outcome.block) for outcome in outcomes if outcome.block is not None]
    if content_format == "image_url":
        blocks = [{"type": "image_url", "image_url": {"url": image.url}} for image in result.images if image.url]
    elif content_format == "text":
        return text, result.to_artifact()
    content: list[dict[str, Any]] = [{"type": "text", "text": text}, *blocks]
    return content, result.to_artifact()


# --- files


def _is_unsaved(image: GeneratedImage) -> bool:
    return image.path is None and image.uri is None and image.mime_type is not None


def _with_files(result: ImageResult) -> ImageResult:
    # An artifact has no bytes, so an image that is only in memory is saved in a temporary folder.
    return _replaced(result, [_saved(image) if _is_unsaved(image) else image for image in result.images])


def uploaded(result: ImageResult, folder: BackendFolder) -> ImageResult:
    """Save images in a backend that could not be used where they were made. Blocks.

    Args:
        result: The result.
        folder: The folder in the backend.

    Returns:
        The result, whose images are in the backend if they are nowhere else and the upload succeeds. An image has the same name
        each time, so that a second call makes no second file.
    """
    if not any(map(_is_unsaved, result.images)):
        return result
    return _replaced(result, [_uploaded(image, folder) if _is_unsaved(image) else image for image in result.images])


def _uploaded(image: GeneratedImage, folder: BackendFolder) -> GeneratedImage:
    try:
        extension = EXTENSIONS.get(image.mime_type or "", "")
        names = image_names(image.id, image.sha256 or "", extension, moment=image.created or 0)
        uri = folder.upload(names, image.read(), Deadline(_UPLOAD_SECONDS))
    except Exception as error:
        if raised_by_signal(error):
            raise
        return image
    warnings = tuple(warning for warning in image.warnings if not warning.endswith(IN_MEMORY))
    return image.model_copy(update={"uri": uri, "warnings": warnings})


def _replaced(result: ImageResult, images: Sequence[GeneratedImage]) -> ImageResult:
    of_images = {note for image in result.images for note in image.warnings}
    notes = [
        *(note for note in result.warnings if note not in of_images),
        *(item for image in images for item in image.warnings),
    ]
    return result.model_copy(update={"images": tuple(images), "warnings": tuple(dict.fromkeys(notes))})


def _saved(image: GeneratedImage) -> GeneratedImage:
    kept: dict[str, Any] = {}
    try:
        folder = temporary_folder()
        folder.mkdir(mode=0o700, exist_ok=True)
        path = image.save(folder)
        advice = "Choose another output_dir" if _was_not_saved(image) else "Set output_dir"
        note = f"The image is saved in a temporary folder: {path.parent}. {advice} to keep it."
        kept = {"path": path}
    except Exception as error:  # the image is paid for, and the artifact still has its link
        if raised_by_signal(error):
            raise
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        note = f"The image could not be saved in a temporary folder: {printable(why)}. Only its link is left."
    warnings = [warning.removesuffix(IN_MEMORY).rstrip() for warning in image.warnings]
    return image.model_copy(update={**kept, "warnings": (*warnings, note)})


def _was_not_saved(image: GeneratedImage) -> bool:
    return any(warning.endswith(IN_MEMORY) for warning in image.warnings)


@cache
def temporary_folder() -> Path:
    """Make the folder for images that are saved nowhere else.

    Returns:
        One folder for the process, which only this user can read.
    """
    return Path(tempfile.mkdtemp(prefix="cogview_images-"))


# --- the text


def text_for_model(result: ImageResult, *, shown_to_user: bool = False, unseen: int = 0) -> str:
    """Write the text that the model reads about a result: short ids, whether it worked, and what not to do.

    Args:
        result: The result.
        shown_to_user: Whether the application shows the images to the user.
        unseen: How many images the model should see beside this text, but cannot.

    Returns:
        At most 500 characters, which never suggest that the model has seen an image.
    """
    count = len(result.images)
    fetched = [image for image in result.images if image.mime_type]
    images = []
    for image in result.images[:3]:
        facts = [f"{image.width}x{image.height}" if image.width else image.size or ""]
        location = str(image.path or virtual_path(image.uri or ""))
        if location:
            facts.append(
                f"saved as {location if len(location) <= _PATH_CHARACTERS // min(count, 3) else PurePath(location).name}"
            )
        images.append(f"{image.id} ({', '.join(fact for fact in facts if fact)})")
    more = f" and {count - 3} more" if count > 3 else ""  # noqa: PLR2004
    text = f"Made {count} image{'s' if count > 1 else ''}: {'; '.join(images)}{more}."
    unknown = sum(failure.outcome is Outcome.UNKNOWN for failure in result.failures)
    if len(result.failures) > unknown:
        text += f" {len(result.failures) - unknown} more could not be made."
    if unknown:
        text += f" {unknown} more may have been made and charged, but did not arrive."
    if result.sandbox:
        text += " It is a sandbox placeholder, not a real image."
    if len(fetched) < count:
        missing = "It" if count == 1 else f"{count - len(fetched)} of them"
        if all(image.url or image.mime_type for image in result.images):
            text += f" {missing} was not fetched: the application has only a link, which ends. Tell the user."
        else:
            text += f" {missing} did not arrive as a whole image, and may have been charged. Tell the user."
    elif any(image.path is None and image.uri is None for image in result.images):
        has = "link" if all(image.url for image in result.images) else "bytes"
        text += f" It is not saved as a file; the application has its {has}."
    advice = _advice(result, is_shown=shown_to_user and len(fetched) == count, unseen=unseen)
    return f"{printable(text, MAX_MODEL_TEXT - len(advice) - 1)} {advice}"


def _advice(result: ImageResult, *, is_shown: bool, unseen: int) -> str:
    count = len(result.images)
    it = "it" if count == 1 else "them"
    if is_shown:
        advice = f"The user already sees {it}. Do not write a link, and do not call this tool again unless asked."
    else:
        names = "id or path" if any(image.path or image.uri for image in result.images) else "id"
        advice = f"Refer to {it} by {names}. Do not make up a link, and do not call this tool again unless asked."
    if not unseen:
        return advice
    return f"You cannot see {it if unseen == count else f'{unseen} of them'}: do not describe what you do not see. {advice}"
