"""The result of a call: images, failures, and their plain JSON form."""

from __future__ import annotations

import os
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self, cast

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PrivateAttr, model_validator

from langchain_cogview.artifact import (
    ARTIFACT_TYPE,
    ARTIFACT_VERSION,
    Amount,
    Currency,
    Entries,
    ImageArtifact,
    LocalPath,
    Moment,
    Number,
    Pixels,
    Seconds,
    Text,
    check_artifact,
    validated,
)
from langchain_cogview.concurrency import Deadline, in_thread
from langchain_cogview.errors import (
    CogViewContentFilterError,
    CogViewDownloadError,
    CogViewError,
    ContentFilter,
    Outcome,
    Scope,
    error_class,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from langchain_core.messages.content import ImageContentBlock

    from langchain_cogview.addresses import LinkRules
    from langchain_cogview.blocks import BlockSource
    from langchain_cogview.images.download import DownloadedImage
    from langchain_cogview.images.remote import ImageAccess, Storage

_READ_SECONDS = 60.0
_SHOWN = 50
_ID_CHARACTERS = 512
_IDS: Final = ("request_id", "task_id")
_OF_CLASS: Final = ("outcome", "scope", "is_retryable")


class GeneratedImage(BaseModel):
    """One image."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    id: Text
    """Short id that this client generated; an agent refers to the image by it."""
    url: Text | None = None
    """Link to the image at the service, valid for a day to a week; None if it is unknown."""
    expires_at: Moment | None = None
    """When the link expires; None if the URL does not say."""
    path: LocalPath | None = None
    """The saved file; None if the image was not saved on this machine."""
    uri: Text | None = None
    """Where the image was saved remotely, such as `s3://bucket/name.png`, or `backend:///images/name.png` in a backend."""
    mime_type: Text | None = None
    """`image/png`, `image/jpeg` or `image/webp`, read from the bytes; None if they were not downloaded."""
    width: Pixels | None = None
    """Width in pixels, read from the bytes."""
    height: Pixels | None = None
    """Height in pixels, read from the bytes."""
    size_bytes: Number | None = None
    """Number of bytes of the image."""
    sha256: Text | None = None
    """SHA-256 of the image bytes, in hexadecimal."""
    content_filter: Entries = ()
    """Entries of the content filter for an image that was made in spite of them."""
    request_id: Text
    """Request id that this client generated; every attempt has the same."""
    response_id: Text | None = None
    """Id that the service gave to the response."""
    created: Number | None = None
    """When the service created the image, in Unix seconds."""
    model: Text
    """Model that generated the image."""
    size: Text | None = None
    """Size that was requested, or the default of the model."""
    quality: Text | None = None
    """Quality that was requested, or the default of the model."""
    prompt: Text
    """The prompt."""
    task_id: Text | None = None
    """Id of the task; None unless the task endpoint was used."""
    list_price: Amount | None = None
    """What the service charges for such an image, also for one from a cache or the sandbox; None if it is unknown."""
    cost: Amount | None = None
    """List price in `currency`; 0 for a cached or sandbox image, None if the price is unknown."""
    currency: Currency | None = None
    """ISO code of the currency, such as `CNY`."""
    seconds: Seconds | None = None
    """Seconds from acquiring a slot until the image was saved."""
    cached: bool = False
    """Whether the image came from the cache: nothing was sent or paid."""
    sandbox: bool = False
    """Whether the image is a placeholder of the offline sandbox."""
    warnings: tuple[Text, ...] = ()
    """What could not be done, such as saving the image."""

    _content: bytes | None = PrivateAttr(default=None)
    _access: Any = PrivateAttr(default=None)

    def read(self) -> bytes:
        """Read the image from memory, its file or its URI, or else download it from its URL, which is free.

        The content is checked: it is a whole image, with the recorded size and hash if these are known.

        Returns:
            The bytes of the image file, as the service made them.

        Raises:
            CogViewStorageError: The saved file or the content of the URI cannot be read, or is another image. An image of an
                artifact is read from its URI only if `storage=` names the folder.
            CogViewDownloadError: The URL no longer returns a whole image, or it returns another one.
        """
        content = self.local_bytes()
        if content is None and self.uri:
            content = self._content = self._reading().read_uri(self.uri, **self._recorded())
        if content is None:
            from langchain_cogview.api.sending import sender  # noqa: PLC0415
            from langchain_cogview.images.download import fetch  # noqa: PLC0415

            url, rules = self._link()
            image = fetch(sender(rules.base_url), url, deadline=Deadline(_READ_SECONDS), rules=rules)
            content = self._content = self._fetched(image)
        return content

    async def aread(self) -> bytes:
        """Async version of `read`: files, stores and hosts are read without blocking the event loop.

        Returns:
            The bytes of the image file.
        """
        content = self._content
        if content is None and self.path is not None:
            content = await in_thread(self.local_bytes)
        if content is None and self.uri:
            content = self._content = await self._reading().aread_uri(self.uri, **self._recorded())
        if content is None:
            from langchain_cogview.api.sending import asender  # noqa: PLC0415
            from langchain_cogview.images.download import afetch  # noqa: PLC0415

            url, rules = self._link()
            image = await afetch(asender(rules.base_url), url, deadline=Deadline(_READ_SECONDS), rules=rules)
            content = self._content = self._fetched(image)
        return content

    def save(self, path: str | Path) -> Path:
        """Write the image to a file, as a whole or not at all.

        Args:
            path: A file, which is replaced, or an existing folder, where the file gets the image's id as its name; characters
                other than letters, digits, `_` and `-` become `_`. A name without an ending gets the right one. If `.png`,
                `.jpg` or `.webp` asks for another format than the service made, the image is converted, which needs Pillow;
                without it the bytes are written as they are, with a warning.

        Returns:
            Path of the file.

        Raises:
            CogViewStorageError: The file cannot be written.
            CogViewDownloadError: The bytes are not on this machine, and the URL no longer returns them.
        """
        from langchain_cogview.images.store import save_as  # noqa: PLC0415
        from langchain_cogview.notebook.previews import as_named  # noqa: PLC0415

        return save_as(Path(path), as_named(Path(path), self.read()), name=self.id)

    def to_pil(self) -> Any:
        """Decode the image with Pillow.

        Returns:
            A `PIL.Image.Image`.

        Raises:
            ImportError: Pillow is not installed; the message names the extra.
            CogViewStorageError: The image cannot be decoded, or would take more than 220 MB of memory: a WebP of more than 12
                million pixels or a progressive JPEG of more than 22 million; PNG and ordinary JPEG pass up to 50 million.
        """
        from langchain_cogview.notebook.previews import decoded  # noqa: PLC0415

        return decoded(self.read())

    def content_block(self, source: BlockSource = "base64") -> ImageContentBlock:
        """Make a standard content block of LangChain, with which a chat model sees the image.

        Args:
            source: `base64`: all bytes, up to 10 MB; a larger image becomes a thumbnail, with a warning. `thumbnail`: a JPEG of
                at most 512 pixels and 60 kB, which needs Pillow. `url`: the link, which the provider fetches while it lives.

        Returns:
            The content block.

        Raises:
            CogViewError: As `read`; or no thumbnail can be made, or there is no link that may be opened.
            ImportError: When Pillow is not installed and a thumbnail needs it.
        """
        from langchain_cogview.blocks import content_block  # noqa: PLC0415

        return content_block(self, source)

    async def acontent_block(self, source: BlockSource = "base64") -> ImageContentBlock:
        """Async version of `content_block`.

        Returns:
            The content block.
        """
        from langchain_cogview.blocks import acontent_block  # noqa: PLC0415

        return await acontent_block(self, source)

    def show(self) -> None:
        """Show the image: as an output in a notebook, in the system's image viewer elsewhere, which needs Pillow."""
        from langchain_cogview.notebook.display import show  # noqa: PLC0415

        show(self)

    def local_bytes(self) -> bytes | None:
        """Read the image from memory or its file, without the network.

        Returns:
            The bytes of the image file; None if they are neither in memory nor in a file.

        Raises:
            CogViewStorageError: The saved file cannot be read, or is another image.
        """
        if self._content is not None or self.path is None:
            return self._content
        return self._reading().read_file(self.path, **self._recorded())

    def _reading(self) -> ImageAccess:
        from langchain_cogview.images.remote import ANY_FILE  # noqa: PLC0415

        return cast("ImageAccess", self._access or ANY_FILE)

    def _recorded(self) -> dict[str, Any]:
        return {"size_bytes": self.size_bytes, "sha256": self.sha256}

    def _fetched(self, image: DownloadedImage) -> bytes:
        if self.sha256 not in {None, image.sha256}:
            raise CogViewDownloadError("The image's link returns another image than the recorded one.", hint="")
        return image.content or b""

    def _link(self) -> tuple[str, LinkRules]:
        # The URL, and what may be opened to follow it.
        from langchain_cogview.addresses import LinkRules  # noqa: PLC0415

        if self.url is None:
            raise CogViewDownloadError("This image has neither a file nor a URL.", hint="")
        access = self._reading()
        return self.url, LinkRules(access.base_url or ("sandbox:" if self.sandbox else None), access.allowed_hosts)

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        # They may hold secrets; another process finds its own.
        private = state["__pydantic_private__"] or {}
        access: ImageAccess | None = private.get("_access")
        state["__pydantic_private__"] = {**private, "_access": access and access.without_options()}
        return state

    def __eq__(self, other: object) -> bool:
        # The bytes in memory do not matter: an image of an artifact equals the one that the artifact was made of.
        return self.__dict__ == other.__dict__ if isinstance(other, GeneratedImage) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.id, self.request_id, self.sha256))

    def __repr_args__(self) -> Any:
        from langchain_cogview.notebook.display import cost_text  # noqa: PLC0415

        size = f"{self.width}x{self.height}" if self.width else self.size
        yield "id", printable(self.id, 64)
        yield "prompt", printable(self.prompt, 60)
        yield "size", size and printable(size, 40)
        if self.path:
            yield "path", printable(str(self.path), 1_000)
        if self.uri:
            yield "uri", printable(self.uri, 120)
        yield "cost", cost_text(self)
        if self.warnings:
            yield "warnings", len(self.warnings)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        from langchain_cogview.notebook.display import image_output  # noqa: PLC0415

        return image_output(self, self._content)


def with_content(image: GeneratedImage, content: bytes | None, access: ImageAccess | None = None) -> GeneratedImage:
    """Return the new image with its bytes, which no repr, JSON or trace shows, and what it may be read from; None: any file."""
    image._content, image._access = content, access  # noqa: SLF001
    return image


class ImageFailure(BaseModel):
    """The record of an image that was not made, in a result with others that were."""

    model_config = ConfigDict(frozen=True)

    index: Number
    """Which of the `n` images, from 0."""
    error: Text
    """Name of the error's class, such as `CogViewContentFilterError`."""
    message: Text
    """What happened."""
    hint: Text = ""
    """What to do."""
    code: Text | None = None
    """Error code of the service."""
    status: Number | None = None
    """HTTP status."""
    request_id: Text | None = None
    """Request id that this client generated; every attempt has the same."""
    task_id: Text | None = None
    """Id of the task, whose image may still be made."""
    outcome: Annotated[Outcome, PlainSerializer(str)] = Outcome.FINAL
    """`not_run`, `unknown` (an image may have been charged) or `final`."""
    scope: Annotated[Scope, PlainSerializer(str)] | None = None
    """What the error concerns, such as `prompt` or `account`; None for an exception of another library."""
    is_retryable: bool = False
    """Whether the same request may be sent again and may succeed then."""
    content_filter: Entries = ()
    """Entries of the content filter, if it blocked the image."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        # Records of older versions hold only the name of the class, which has the facts.
        kind = error_class(values.get("error")) if isinstance(values, dict) else None
        return {**{name: getattr(kind, name) for name in _OF_CLASS}, **values} if kind else values

    @classmethod
    def of(cls, error: Exception, index: int) -> Self:
        """Make the record of an exception.

        Args:
            error: The exception.
            index: Which of the `n` images, from 0.

        Returns:
            The record.
        """
        kind = type(error).__name__
        if not isinstance(error, CogViewError):
            return cls(index=index, error=kind, message=printable(str(error)) or kind)
        facts = {name: getattr(error, name) for name in ("message", "hint", "code", "status", *_OF_CLASS)}
        ids = {name: value and printable(value, _ID_CHARACTERS) for name in _IDS for value in [getattr(error, name)]}
        entries = error.content_filter if isinstance(error, CogViewContentFilterError) else ()
        return cls(index=index, error=kind, content_filter=entries, **facts, **ids)


class ImageResult(BaseModel):
    """The result of one call: at least one image.

    The attributes of the first image can be read from the result: `result.path`, `result.url`, `result.sha256`.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    images: Annotated[tuple[GeneratedImage, ...], Field(min_length=1)]
    """The images."""
    failures: tuple[ImageFailure, ...] = ()
    """Records of those of the `n` images that were not made."""
    prompt: Text
    """The prompt that was sent."""
    original_prompt: Text | None = None
    """The prompt before the chat model of `enhance=` rewrote it; None if it was not rewritten."""
    model: Text
    """Model that generated the images."""
    size: Text | None = None
    """Size that was requested, or the default of the model."""
    quality: Text | None = None
    """Quality that was requested, or the default of the model."""
    cost: Amount | None = None
    """List price of all images; None if one is unknown. Failures cost nothing, unless their outcome is unknown."""
    currency: Currency | None = None
    """ISO code of the currency."""
    sandbox: bool = False
    """Whether the offline sandbox made the images."""
    warnings: tuple[Text, ...] = ()
    """Warnings about the whole call, then those of each image."""

    @property
    def image(self) -> GeneratedImage:
        """The first image."""
        return self.images[0]

    @property
    def url(self) -> str | None:
        """Link to the first image at the service."""
        return self.image.url

    @property
    def expires_at(self) -> datetime | None:
        """When the first image's link expires; None if the URL does not say."""
        return self.image.expires_at

    @property
    def path(self) -> Path | None:
        """The first image's file; None if it was not saved on this machine."""
        return self.image.path

    @property
    def uri(self) -> str | None:
        """Where the first image was saved remotely."""
        return self.image.uri

    @property
    def cached(self) -> bool:
        """Whether every image came from the cache."""
        return all(image.cached for image in self.images)

    @property
    def mime_type(self) -> str | None:
        """The first image's MIME type, read from the bytes."""
        return self.image.mime_type

    @property
    def width(self) -> int | None:
        """The first image's width in pixels, read from the bytes."""
        return self.image.width

    @property
    def height(self) -> int | None:
        """The first image's height in pixels, read from the bytes."""
        return self.image.height

    @property
    def size_bytes(self) -> int | None:
        """The first image's number of bytes."""
        return self.image.size_bytes

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the first image's bytes, in hexadecimal."""
        return self.image.sha256

    @property
    def request_id(self) -> str:
        """The first image's request id."""
        return self.image.request_id

    @property
    def created(self) -> int | None:
        """When the service created the first image, in Unix seconds."""
        return self.image.created

    @property
    def content_filter(self) -> tuple[ContentFilter, ...]:
        """Entries of the content filter of all images that were made."""
        return tuple(entry for image in self.images for entry in image.content_filter)

    def read(self) -> bytes:
        """Read the first image; see `GeneratedImage.read`.

        Returns:
            The bytes of the image file.
        """
        return self.image.read()

    async def aread(self) -> bytes:
        """Async version of `read`.

        Returns:
            The bytes of the image file.
        """
        return await self.image.aread()

    def save(self, path: str | Path) -> Path:
        """Write all images to files.

        Args:
            path: As in `GeneratedImage.save`. The names of further images get `-2`, `-3`, ... before the ending.

        Returns:
            Path of the first image's file.

        Raises:
            CogViewStorageError: An image could not be saved; this is the first such error, raised after the others were saved.
            CogViewDownloadError: An image could not be saved because its bytes could not be fetched.
        """
        from langchain_cogview.images.store import safe_name, save_as  # noqa: PLC0415
        from langchain_cogview.notebook.previews import as_named  # noqa: PLC0415

        target = Path(path)
        folder = os.path.isdir(os.path.expanduser(target))  # noqa: PTH111, PTH112  which raise for no name
        saved, errors = [], []
        used: set[str] = set()
        for number, image in enumerate(self.images, 1):
            name = safe_name(image.id).lower() if folder else ""
            suffix = next(text for text in chain([""], (f"-{copy}" for copy in count(2))) if name + text not in used)
            used.add(name + suffix)
            try:
                saved.append(save_as(target, as_named(target, image.read()), name=image.id, suffix=suffix))
            except CogViewError as error:  # the others are saved all the same
                error.add_note(f"This is image {number} of {len(self.images)}, id {printable(image.id, 64)}.")
                errors.append(error)
        if errors:
            raise errors[0]
        return saved[0]

    def to_pil(self) -> Any:
        """Decode the first image with Pillow; see `GeneratedImage.to_pil`.

        Returns:
            A `PIL.Image.Image`.
        """
        return self.image.to_pil()

    def show(self) -> None:
        """Show every image; see `GeneratedImage.show`."""
        for image in self.images:
            image.show()

    def to_artifact(self) -> ImageArtifact:
        """Make the plain JSON form of the result, for a checkpointer, a queue or a database.

        Returns:
            The artifact, without image bytes.
        """
        header = {"type": ARTIFACT_TYPE, "version": ARTIFACT_VERSION}
        return cast("ImageArtifact", header | self.model_dump(mode="json"))

    @classmethod
    def from_artifact(
        cls,
        artifact: Mapping[str, Any],
        *,
        within: str | os.PathLike[str] | None = None,
        storage: Storage | None = None,
        storage_options: Mapping[str, Any] | None = None,
        allowed_image_hosts: str | Iterable[str] | None = None,
    ) -> Self:
        """Make a result from its plain JSON form.

        Other people may have written the artifact: the options limit what its images may be read from.

        Args:
            artifact: `ToolMessage.artifact`, or what `to_artifact` returned, also after JSON.
            within: The only folder from which files are read. None: any file that is an image with the recorded size and hash.
            storage: URLs of the remote folders, such as `s3://bucket`, and backends from which URIs are read. None: none.
            storage_options: fsspec's options for these folders.
            allowed_image_hosts: The only hosts from which links are fetched. None: any public one.

        Returns:
            The result, without image bytes.

        Raises:
            CogViewInvalidRequestError: It is not an artifact, is damaged, or is of a later version.
            CogViewConfigurationError: `storage` does not name remote folders.
        """
        from langchain_cogview.images.remote import image_access  # noqa: PLC0415

        access = image_access(
            within=within, storage=storage, storage_options=storage_options, allowed_image_hosts=allowed_image_hosts
        )
        return cls.read_artifact(artifact, access)

    @classmethod
    def read_artifact(cls, artifact: Mapping[str, Any], access: ImageAccess | None) -> Self:
        """Return the result of an artifact, as `from_artifact` does, with its options as one object."""
        check_artifact(artifact)
        result = validated(cls, artifact)
        for image in result.images:
            with_content(image, None, access)
        return result

    def __repr_args__(self) -> Any:
        images = list(self.images)
        yield "images", images if len(images) <= _SHOWN else [*images[:_SHOWN], f"… and {len(images) - _SHOWN} more"]
        if self.failures:
            yield "failures", [printable(failure.error, 80) for failure in self.failures[:_SHOWN]]
        yield "model", printable(self.model, 80)
        if self.content_filter:
            yield "content_filter", [str(entry) for entry in self.content_filter[:_SHOWN]]
        if self.warnings:
            yield "warnings", len(self.warnings)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        from langchain_cogview.notebook.display import result_output  # noqa: PLC0415

        return result_output(self, [image._content for image in self.images])  # noqa: SLF001
