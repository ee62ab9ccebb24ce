"""What comes in, what goes out, and what is paid for: the plain records of a sandbox."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SandboxRequest:
    """A request that a sandbox received.

    Attributes:
        method: In capitals.
        path: With its query.
        headers: By lower-case name; the values of those that hold secrets are `[removed]`.
        body: The JSON object that was sent; None where there was none.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any] | None = None

    @property
    def prompt(self) -> str | None:
        """The prompt that was sent."""
        return self._text("prompt")

    @property
    def model(self) -> str | None:
        """The model that was asked for."""
        return self._text("model")

    @property
    def size(self) -> str | None:
        """The size that was asked for, `WIDTHxHEIGHT` in pixels."""
        return self._text("size")

    @property
    def request_id(self) -> str | None:
        """The id that the client gave its request."""
        return self._text("request_id")

    def _text(self, name: str) -> str | None:
        value = (self.body or {}).get(name)
        return value if isinstance(value, str) else None


@dataclass(frozen=True)
class SandboxReply:
    """What a sandbox answers.

    Attributes:
        status: HTTP status.
        headers: By lower-case name.
        body: Raw bytes.
        delay: Seconds to wait before it is sent.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class SandboxPicture:
    """A picture that the real service would have made and charged.

    Attributes:
        prompt: As it was sent.
        model: As the catalog writes it.
        size: `WIDTHxHEIGHT` in pixels.
        request_id: The id that the client gave its request, or where it gave none, the one that was made up for it.
        task_id: The id of its task; None where it was answered at once.
        charged_at: Unix seconds. A task is charged when it is taken, since from then on it is made whoever asks for it.
    """

    prompt: str
    model: str
    size: str
    request_id: str
    task_id: str | None
    charged_at: float
