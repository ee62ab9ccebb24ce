"""What a call gives: pictures, what went wrong with others, and their plain JSON form.

>>> result = generator.invoke("a kitten")            # doctest: +SKIP
>>> result.images[0].path, result.images[0].width    # doctest: +SKIP
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from langchain_core.messages import ToolMessage
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator

from langchain_cogview.artifact import ARTIFACT_TYPE, ARTIFACT_VERSION, ImageArtifact
from langchain_cogview.content_filter import ContentFilter
from langchain_cogview.deadline import Deadline
from langchain_cogview.errors import (
    CogViewContentFilterError,
    CogViewDownloadError,
    CogViewError,
    CogViewInvalidRequestError,
    CogViewStorageError,
    Outcome,
    Scope,
    error_class,
    printable,
)

if TYPE_CHECKING:
    from langchain_core.messages import BaseMessage

_READ_SECONDS = 60.0


class GeneratedImage(BaseModel):
    """One picture.

    Attributes:
        id: Short and ours; what an agent calls it.
        url: Where the service keeps it, for a day to a week; None where it is not known.
        expires_at: When the link ends, where the URL tells it.
        path: The saved file; None where it was not saved on this machine.
        uri: Where it was saved elsewhere, such as `s3://bucket/name.png`; any process with access can open it.
        mime_type: `image/png`, `image/jpeg` or `image/webp`, by the bytes. None where they were not fetched.
        width: In pixels, from the bytes.
        height: In pixels, from the bytes.
        size_bytes: Number of bytes.
        sha256: Of the bytes, in hexadecimal.
        content_filter: What the filter said of it, though it was made.
        request_id: Ours, the same on every attempt.
        response_id: The service's.
        created: Unix seconds, as the service says.
        model: Which model drew.
        size: As asked for, or the model's default.
        quality: As asked for, or the model's default.
        prompt: What was asked for.
        task_id: Of the task endpoint, where that was used.
        cost: Its list price in `currency`; 0 where it is cached or a placeholder, None where the price is unknown.
        currency: ISO code, such as `CNY`.
        seconds: How long it took, from its place in flight to being saved.
        cached: Whether it came from the cache: nothing was sent or paid.
        sandbox: Whether it is a placeholder of the offline service.
        warnings: What could not be done, such as saving it.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    id: str
    url: str | None = None
    expires_at: datetime | None = None
    path: Path | None = None
    uri: str | None = None
    mime_type: str | None = None
    width: int | None = None
    height: int | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    content_filter: tuple[ContentFilter, ...] = ()
    request_id: str
    response_id: str | None = None
    created: int | None = None
    model: str
    size: str | None = None
    quality: str | None = None
    prompt: str
    task_id: str | None = None
    cost: Decimal | None = None
    currency: str | None = None
    seconds: float | None = None
    cached: bool = False
    sandbox: bool = False
    warnings: tuple[str, ...] = ()

    _content: bytes | None = PrivateAttr(default=None)
    _base_url: str | None = PrivateAttr(default=None)
    _allowed_hosts: tuple[str, ...] | None = PrivateAttr(default=None)
    _storage_options: Mapping[str, Any] | None = PrivateAttr(default=None)

    def with_content(
        self,
        content: bytes | None,
        base_url: str | None,
        allowed_hosts: tuple[str, ...] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """The same picture holding its bytes in memory, and where more may be fetched; in no repr, JSON or trace."""
        self._allowed_hosts = allowed_hosts
        self._content = content
        self._base_url = base_url
        self._storage_options = storage_options
        return self

    def read(self) -> bytes:
        """The picture's bytes, as the service made them: from memory, its file or its URI, else fetched from its URL (free).

        Raises:
            CogViewStorageError: When the saved file, or what stands at its URI, cannot be read.
            CogViewDownloadError: When the URL gives no whole picture any more.
        """
        content = self.at_hand()
        if content is None and self.uri:
            from langchain_cogview.images.remote import read_uri  # noqa: PLC0415

            content = self._content = read_uri(self.uri, self._storage_options)
        if content is None:
            from langchain_cogview.api.transport import sender  # noqa: PLC0415
            from langchain_cogview.images.download import fetch  # noqa: PLC0415

            where = self._where()
            content = fetch(
                sender(where), self._link(), deadline=Deadline(_READ_SECONDS), rules=self._rules(where)
            ).content
            self._content = content
        return content or b""

    async def aread(self) -> bytes:
        """The twin of `read`, without blocking the event loop while it fetches."""
        content = self.at_hand()
        if content is None and self.uri:
            from langchain_cogview.images.remote import aread_uri  # noqa: PLC0415

            content = self._content = await aread_uri(self.uri, self._storage_options)
        if content is None:
            from langchain_cogview.api.transport import asender  # noqa: PLC0415
            from langchain_cogview.images.download import afetch  # noqa: PLC0415

            where = self._where()
            picture = await afetch(
                asender(where), self._link(), deadline=Deadline(_READ_SECONDS), rules=self._rules(where)
            )
            content = self._content = picture.content
        return content or b""

    def save(self, path: str | Path) -> Path:
        """Write the bytes, whole or not at all, and tell where.

        Args:
            path: A file, which is replaced, or an existing folder, where the file gets the picture's id as its name. A
                name without an ending gets the right one; with one, the bytes are written as they came all the same.

        Raises:
            CogViewStorageError: When it cannot be written.
            CogViewDownloadError: When the bytes are not at hand and the URL gives them no more.
        """
        from langchain_cogview.images.store import write_whole  # noqa: PLC0415

        content = self.read()
        target = Path(path)
        try:
            target = target.expanduser()
            ending = self._ending(content)
            if target.is_dir():
                target /= f"{self.id}{ending}"
            elif not target.suffix:
                target = target.with_name(target.name + ending)
            write_whole(target, content)
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CogViewStorageError(
                f"The picture could not be written to {printable(str(target), 120)}: {printable(str(reason), 80)}."
            ) from None
        return target

    def to_pil(self) -> Any:
        """The picture as a `PIL.Image.Image`, decoded.

        Raises:
            ImportError: When Pillow is not installed; names the extra that brings it.
        """
        try:
            from PIL import Image  # noqa: PLC0415
        except ImportError:
            raise ImportError('to_pil needs Pillow. Install it with: pip install "langchain-cogview[images]"') from None
        picture = Image.open(io.BytesIO(self.read()))
        picture.load()
        return picture

    def show(self) -> None:
        """Show the picture: in a notebook as output, elsewhere with the system's viewer (needs Pillow)."""
        from langchain_cogview.images.display import show  # noqa: PLC0415

        show(self, self.to_pil)

    def at_hand(self) -> bytes | None:
        """The bytes without fetching: from memory or the saved file; None where they are in neither."""
        if self._content is not None:
            return self._content
        if self.path is None:
            return None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise CogViewStorageError(
                f"The saved file {printable(self.path.name, 120)} cannot be read: {error.strerror}.",
                hint="If it was moved, open it where it is now; while the link lives, the URL still gives it.",
            ) from None

    def _where(self) -> str | None:
        return self._base_url or ("sandbox:" if self.sandbox else None)

    def _rules(self, base_url: str | None) -> Any:
        from langchain_cogview.images.links import LinkRules  # noqa: PLC0415

        return LinkRules(base_url, self._allowed_hosts)

    def _link(self) -> str:
        if self.url is None:
            raise CogViewDownloadError("This picture has neither a file nor a URL.", hint="")
        return self.url

    def _ending(self, content: bytes) -> str:
        from langchain_cogview.images.formats import EXTENSIONS, sniff  # noqa: PLC0415

        return EXTENSIONS.get(sniff(content[:32]) or "", "")

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        # They may hold secrets; another process finds its own.
        state["__pydantic_private__"] = {**(state["__pydantic_private__"] or {}), "_storage_options": None}
        return state

    def __eq__(self, other: object) -> bool:
        # The bytes at hand are no part of what the picture is: the artifact's picture equals the one that it was made of.
        return self.__dict__ == other.__dict__ if isinstance(other, GeneratedImage) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.id, self.request_id, self.sha256))

    def __repr_args__(self) -> Any:
        yield "id", self.id
        yield "size", f"{self.width}x{self.height}" if self.width else self.size
        yield "mime_type", self.mime_type
        if self.path:
            yield "path", self.path.name
        if self.uri:
            yield "uri", printable(self.uri, 120)
        if self.cached:
            yield "cached", True
        if self.sandbox:
            yield "sandbox", True
        if self.warnings:
            yield "warnings", len(self.warnings)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        from langchain_cogview.images.display import bundle  # noqa: PLC0415

        return bundle(self, self._content)


class ImageFailure(BaseModel):
    """One picture that was not made, beside others that were.

    Attributes:
        index: Which of the `n`, from 0.
        error: Name of the error's class, such as `CogViewContentFilterError`.
        message: What happened.
        hint: What to do.
        code: The service's business code.
        status: The HTTP status.
        request_id: Ours, the same on every attempt.
        task_id: Of the task endpoint: the picture may still come.
        outcome: `not_run`, `unknown` (a picture may have been charged) or `final`.
        scope: What the error concerns, such as `prompt` or `account`; None for an exception of another library.
        is_retryable: Whether the same request may be sent again, and may then succeed.
        content_filter: The filter's entries where it was blocked.
    """

    model_config = ConfigDict(frozen=True)

    index: int
    error: str
    message: str
    hint: str = ""
    code: str | None = None
    status: int | None = None
    request_id: str | None = None
    task_id: str | None = None
    outcome: Outcome = Outcome.FINAL
    scope: Scope | None = None
    is_retryable: bool = False
    content_filter: tuple[ContentFilter, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        # Records of older versions hold only the name of the class, which has the facts.
        kind = error_class(values.get("error")) if isinstance(values, dict) else None
        if kind is None:
            return values
        return {"outcome": kind.outcome, "scope": kind.scope, "is_retryable": kind.is_retryable, **values}

    @classmethod
    def of(cls, error: Exception, index: int) -> Self:
        """The record of an exception."""
        if not isinstance(error, CogViewError):
            return cls(index=index, error=type(error).__name__, message=printable(str(error)) or type(error).__name__)
        return cls(
            index=index,
            error=type(error).__name__,
            message=error.message,
            hint=error.hint,
            code=error.code,
            status=error.status,
            request_id=error.request_id,
            task_id=error.task_id,
            outcome=error.outcome,
            scope=error.scope,
            is_retryable=error.is_retryable,
            content_filter=error.content_filter if isinstance(error, CogViewContentFilterError) else (),
        )


class ImageResult(BaseModel):
    """What one call gives: at least one picture.

    The attributes of the first picture can be read from the result itself: `result.path`, `result.url`, `result.sha256`.

    Attributes:
        images: The pictures that were made.
        failures: Those of the `n` that were not.
        prompt: What was asked for.
        model: Which model drew.
        size: As asked for, or the model's default.
        quality: As asked for, or the model's default.
        cost: List price of all pictures together; None where one is unknown. What failed costs nothing, unless its outcome
            is unknown.
        currency: ISO code.
        sandbox: Whether the offline service made it.
        warnings: What holds for the whole call, then what holds for each picture.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    images: tuple[GeneratedImage, ...]
    failures: tuple[ImageFailure, ...] = ()
    prompt: str
    model: str
    size: str | None = None
    quality: str | None = None
    cost: Decimal | None = None
    currency: str | None = None
    sandbox: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def image(self) -> GeneratedImage:
        """The first picture."""
        return self.images[0]

    @property
    def url(self) -> str | None:
        """The first picture's URL."""
        return self.image.url

    @property
    def expires_at(self) -> datetime | None:
        """When the first picture's link ends, where its URL tells it."""
        return self.image.expires_at

    @property
    def path(self) -> Path | None:
        """The first picture's file."""
        return self.image.path

    @property
    def uri(self) -> str | None:
        """Where the first picture was saved elsewhere."""
        return self.image.uri

    @property
    def cached(self) -> bool:
        """Whether every picture came from the cache."""
        return all(image.cached for image in self.images)

    @property
    def mime_type(self) -> str | None:
        """The first picture's type, by its bytes."""
        return self.image.mime_type

    @property
    def width(self) -> int | None:
        """The first picture's width in pixels, from its bytes."""
        return self.image.width

    @property
    def height(self) -> int | None:
        """The first picture's height in pixels, from its bytes."""
        return self.image.height

    @property
    def size_bytes(self) -> int | None:
        """The first picture's number of bytes."""
        return self.image.size_bytes

    @property
    def sha256(self) -> str | None:
        """The first picture's hash."""
        return self.image.sha256

    @property
    def request_id(self) -> str:
        """The first picture's request id."""
        return self.image.request_id

    @property
    def created(self) -> int | None:
        """When the first picture was asked for, in Unix seconds."""
        return self.image.created

    @property
    def content_filter(self) -> tuple[ContentFilter, ...]:
        """What the filter said of all pictures that were made."""
        return tuple(entry for image in self.images for entry in image.content_filter)

    def read(self) -> bytes:
        """The first picture's bytes; see `GeneratedImage.read`."""
        return self.image.read()

    async def aread(self) -> bytes:
        """The first picture's bytes; see `GeneratedImage.aread`."""
        return await self.image.aread()

    def save(self, path: str | Path) -> Path:
        """Write the pictures and tell where the first is.

        Args:
            path: As in `GeneratedImage.save`. Of several pictures the further ones get `-2`, `-3`, ... before the ending.

        Raises:
            CogViewStorageError: As in `GeneratedImage.save`, for the first that could not be saved, after the others were.
            CogViewDownloadError: The same.
        """
        target = Path(path)
        folder = os.path.isdir(os.path.expanduser(target))  # noqa: PTH111, PTH112  which raise for no name
        saved, errors = [], []
        for number, image in enumerate(self.images, 1):
            try:
                saved.append(
                    image.save(target if folder or number == 1 else target.with_stem(f"{target.stem}-{number}"))
                )
            except CogViewError as error:  # the others are saved all the same
                error.add_note(f"This is picture {number} of {len(self.images)}, id {image.id}.")
                errors.append(error)
        if errors:
            raise errors[0]
        return saved[0]

    def to_pil(self) -> Any:
        """The first picture as a `PIL.Image.Image`; see `GeneratedImage.to_pil`."""
        return self.image.to_pil()

    def show(self) -> None:
        """Show every picture; see `GeneratedImage.show`."""
        for image in self.images:
            image.show()

    def to_artifact(self) -> ImageArtifact:
        """Plain JSON without bytes: survives a checkpointer, a queue, a database."""
        fields = self.model_dump(mode="json")
        return cast("ImageArtifact", {"type": ARTIFACT_TYPE, "version": ARTIFACT_VERSION, **fields})

    @classmethod
    def from_artifact(cls, artifact: Mapping[str, Any]) -> Self:
        """The result of a `to_artifact`.

        Raises:
            CogViewInvalidRequestError: When it is none, or of a later version.
        """
        if not isinstance(artifact, Mapping) or artifact.get("type") != ARTIFACT_TYPE:
            raise CogViewInvalidRequestError(
                "This is no artifact of a CogView result.", hint="Pass ToolMessage.artifact."
            )
        if artifact.get("version") != ARTIFACT_VERSION:
            raise CogViewInvalidRequestError(
                f"This artifact has version {printable(str(artifact.get('version')), 20)}; this package reads version "
                f"{ARTIFACT_VERSION}.",
                hint="Upgrade langchain-cogview.",
            )
        try:
            return cls.model_validate({name: value for name, value in artifact.items() if name in cls.model_fields})
        except ValidationError as error:
            where = ", ".join(".".join(map(str, item["loc"])) for item in error.errors(include_input=False))
            raise CogViewInvalidRequestError(f"This artifact is damaged at {printable(where, 100)}.", hint="") from None

    def __repr_args__(self) -> Any:
        yield "images", list(self.images)
        if self.failures:
            yield "failures", [failure.error for failure in self.failures]
        yield "model", self.model
        if self.content_filter:
            yield "content_filter", [str(entry) for entry in self.content_filter]
        if self.warnings:
            yield "warnings", len(self.warnings)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        from langchain_cogview.images.display import result_bundle  # noqa: PLC0415

        return result_bundle(self, [image._content for image in self.images])  # noqa: SLF001


def total_cost(images: Iterable[GeneratedImage]) -> Decimal | None:
    """What pictures cost together; None where the price of one is unknown."""
    costs = [image.cost for image in images]
    known = [cost for cost in costs if cost is not None]
    return sum(known, Decimal(0)) if len(known) == len(costs) else None


def images_from_messages(messages: Iterable[BaseMessage] | Mapping[str, Any]) -> list[GeneratedImage]:
    """The pictures that an agent's tool calls made, in order; of a longer conversation those of every turn.

    Args:
        messages: An agent's messages, or its whole output (`{"messages": [...]}`).
    """
    if isinstance(messages, Mapping):
        messages = messages.get("messages") or []
    found: list[GeneratedImage] = []
    for message in messages:
        artifact = message.artifact if isinstance(message, ToolMessage) else None
        if isinstance(artifact, Mapping) and artifact.get("type") == ARTIFACT_TYPE:
            try:
                found.extend(ImageResult.from_artifact(artifact).images)
            except CogViewInvalidRequestError as error:  # the others can be read all the same
                warnings.warn(f"An artifact was left out. {error}", stacklevel=2)
    return found
