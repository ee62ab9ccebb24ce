"""The plain JSON form of a result: what a `ToolMessage.artifact` holds, and what survives a checkpointer."""

from __future__ import annotations

from typing import Final, Literal, TypedDict

ARTIFACT_TYPE: Final = "cogview.image_result"
ARTIFACT_VERSION: Final = 1


class ContentFilterArtifact(TypedDict):
    """One entry of the content filter."""

    role: str | None
    level: int | None


class GeneratedImageArtifact(TypedDict):
    """One picture, without its bytes."""

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
    """A decimal number; "0" for a cached or sandbox picture; None where the price is unknown."""
    currency: str | None
    seconds: float | None
    """From its place in flight to being saved."""
    cached: bool
    sandbox: bool
    warnings: list[str]


class ImageFailureArtifact(TypedDict):
    """One picture that was not made."""

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
    model: str
    size: str | None
    quality: str | None
    cost: str | None
    """Of all pictures; None where a price is unknown."""
    currency: str | None
    sandbox: bool
    images: list[GeneratedImageArtifact]
    failures: list[ImageFailureArtifact]
    warnings: list[str]
