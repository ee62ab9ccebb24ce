"""The records of a sandbox: requests, replies, and what was charged; and a history of them that is bounded in memory."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

API_PREFIX: Final = "/api/paas/v4"
"""Path under which the API is served, as the provider serves it."""
RecordT = TypeVar("RecordT")

_REQUEST_BYTES: Final = 500
_IMAGE_BYTES: Final = 300
_JSON_VALUE_BYTES: Final = 100


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


class History(Generic[RecordT]):
    """The newest records, bounded in number and in memory. Not locked: the sandbox is.

    Args:
        max_records: How many are kept.
        max_bytes: How much memory they may take, by the sizes that `append` is given.
    """

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._bytes = 0
        self._records: deque[tuple[RecordT, int]] = deque()

    def append(self, record: RecordT, size: int) -> None:
        """Add a record of `size` bytes; the oldest ones are dropped to make room for it. The newest is always kept."""
        self._records.append((record, size))
        self._bytes += size
        while len(self._records) > self._max_records or (self._bytes > self._max_bytes and len(self._records) > 1):
            self._bytes -= self._records.popleft()[1]

    def __iter__(self) -> Iterator[RecordT]:
        return (record for record, _ in self._records)


def request_size(request: SandboxRequest, body: bytes) -> int:
    """Upper estimate of the memory that a request takes, with the body that its JSON was read from."""
    texts = (request.path, *request.headers, *request.headers.values())
    # A character takes at most four bytes, and each value of the JSON has a bracket, a comma or a colon of its own.
    values = sum(body.count(sign) for sign in b"[{,:")
    return _REQUEST_BYTES + sum(map(sys.getsizeof, texts)) + 4 * len(body) + _JSON_VALUE_BYTES * values


def image_size(image: SandboxPicture) -> int:
    """Memory that an entry of the ledger takes."""
    return _IMAGE_BYTES + sys.getsizeof(image.prompt) + sys.getsizeof(image.request_id)
