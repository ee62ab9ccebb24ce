"""Content blocks with which chat models see images, in LangChain's standard form."""

from __future__ import annotations

import io
from base64 import b64encode
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal, get_args

from langchain_core.messages.content import ImageContentBlock, create_image_block

from langchain_cogview.concurrency import in_thread
from langchain_cogview.errors import (
    CogViewDownloadError,
    CogViewExpiredURLError,
    CogViewInvalidRequestError,
    CogViewStorageError,
    printable,
)
from langchain_cogview.images.formats import ImageFormatError, inspect
from langchain_cogview.images.store import safe_name
from langchain_cogview.notebook.previews import make_thumbnail
from langchain_cogview.text import moment_text, warn_caller

if TYPE_CHECKING:
    from langchain_cogview.result import GeneratedImage

BlockSource = Literal["url", "base64", "thumbnail"]
"""What a content block has of an image."""
MAX_BASE64_BYTES: Final = 10_000_000
"""The largest image whose bytes become a block as they are; providers refuse larger ones."""
_INSTALL: Final = 'Install it with: pip install "langchain-cogview[images]"'


def content_block(image: GeneratedImage, source: BlockSource = "base64") -> ImageContentBlock:
    """Make the content block of an image, as `GeneratedImage.content_block` describes it.

    Returns:
        The block.
    """
    _check_source(source)
    if source == "url":
        return url_block(image)
    block, note = bytes_block(image, image.read(), source)
    if note:
        warn_caller(note)
    return block


async def acontent_block(image: GeneratedImage, source: BlockSource = "base64") -> ImageContentBlock:
    """Async version of `content_block`.

    Returns:
        The block.
    """
    _check_source(source)
    if source == "url":
        return url_block(image)
    block, note = await in_thread(bytes_block, image, await image.aread(), source)
    if note:
        warn_caller(note)
    return block


def url_block(image: GeneratedImage) -> ImageContentBlock:
    """Make a block with the link of an image.

    Args:
        image: The image, whose record may be false. The link is checked by the rules for links that this package opens, because
            some chat models' packages fetch it in this process.

    Returns:
        The block.

    Raises:
        CogViewDownloadError: There is no link, it may not be opened, or its time is over.
        CogViewExpiredURLError: The link has expired.
    """
    if image.url is None:
        raise CogViewDownloadError(
            "The image has no URL for a content block.", hint='Use content_block("base64") or "thumbnail".'
        )
    if image.expires_at is not None and image.expires_at <= datetime.now(UTC):
        raise CogViewExpiredURLError(
            f"The image's link ended at {moment_text(image.expires_at)}, so that no chat model can fetch it.",
            hint='Use content_block("base64") or "thumbnail", if the image is saved.',
        )
    image._link()[1].check(image.url)  # noqa: SLF001
    return create_image_block(url=image.url, mime_type=image.mime_type, id=safe_name(image.id))


def bytes_block(
    image: GeneratedImage, content: bytes, source: Literal["base64", "thumbnail"]
) -> tuple[ImageContentBlock, str | None]:
    """Make a block with the bytes of an image, or of its thumbnail.

    Args:
        image: The image.
        content: Its bytes.
        source: What the block has. An image of more than 10 MB becomes a thumbnail.

    Returns:
        The block; and a warning if it has less than was asked for, else None.

    Raises:
        CogViewStorageError: The bytes are not a whole image, or there is no thumbnail.
        ImportError: Pillow is not installed, and a thumbnail needs it.
    """
    try:
        mime_type = inspect(io.BytesIO(content)).mime_type
    except ImageFormatError as error:
        raise CogViewStorageError(
            f"No chat model can be shown these bytes: {printable(str(error), 120)}.", hint="image.read() returns them."
        ) from None
    note = None
    if source == "thumbnail" or len(content) > MAX_BASE64_BYTES:
        if source == "base64":
            note = (
                f"Image {printable(image.id, 64)} has {len(content) / 1e6:.1f} MB, more than the "
                f"{MAX_BASE64_BYTES // 10**6} MB that a content block may have: the block has a thumbnail."
            )
        content, mime_type = _thumbnail(content)
    return create_image_block(base64=b64encode(content).decode(), mime_type=mime_type, id=safe_name(image.id)), note


def _thumbnail(content: bytes) -> tuple[bytes, str]:
    try:
        import PIL.Image  # noqa: F401, PLC0415
    except ImportError:
        raise ImportError(f"A thumbnail needs Pillow. {_INSTALL}") from None
    thumbnail = make_thumbnail(content)
    if thumbnail is None:
        raise CogViewStorageError(
            "No thumbnail can be made: the image cannot be decoded, or would take too much memory.",
            hint="image.read() returns its bytes.",
        )
    return thumbnail


def _check_source(source: str) -> None:
    if source not in get_args(BlockSource):
        raise CogViewInvalidRequestError(
            f"A content block is not made of {printable(str(source), 40)!r}.",
            hint='Pass "url", "base64" or "thumbnail".',
        )
