"""The table of what can go wrong with a reply, and the small parts of which its entries are made."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tests.faults.server import Connection, Fault, FaultServer, Request

KEY: Final = "0123456789abcdef0123456789abcdef.0123456789abcdef"
SERVER_WORDS: Final = "Xyzzy-says-the-server"
SHORT: Final = 0.5
"""Time limit in seconds for faults that last until the limit."""
AMPLE: Final = 100.0
"""Time limit in seconds for what ends by itself, however busy the machine is."""

RESULT: Final = "result"
BALANCE: Final = "CogViewBalanceError"
BUSY: Final = "CogViewBusyError"
AUTHENTICATION: Final = "CogViewAuthenticationError"
CONFIGURATION: Final = "CogViewConfigurationError"
CONNECTION: Final = "CogViewConnectionError"
FILTER: Final = "CogViewContentFilterError"
INVALID: Final = "CogViewInvalidRequestError"
MALFORMED: Final = "CogViewMalformedReplyError"
NOT_FOUND: Final = "CogViewNotFoundError"
PERMISSION: Final = "CogViewPermissionError"
RATE: Final = "CogViewRateLimitError"
SERVER: Final = "CogViewServerError"
TIMEOUT: Final = "CogViewTimeoutError"
TOO_LONG: Final = "CogViewPromptTooLongError"
UNKNOWN: Final = "CogViewOutcomeUnknownError"
UNSURE: Final = (UNKNOWN, MALFORMED)
ANY_FINAL: Final = (INVALID, NOT_FOUND, PERMISSION, BALANCE, AUTHENTICATION, FILTER, TOO_LONG, "CogViewError")

WAITED_FOR: Final[dict[str, Any]] = {"posts": (1, 30), "timeout": SHORT}
"""Code 1302 means that the account has too many requests in flight: the call is sent again until its time limit."""

Resolver = Callable[[str], list[str]]
"""A host name in, its addresses out; raises socket.gaierror, or blocks."""


@dataclass(frozen=True)
class ReplyFault:
    """One fault and what must come of it.

    Attributes:
        least: Seconds that the call must take at least.
        within: Seconds that it may take at most; None for its whole time limit.
        base_url: Where the caller is sent instead of the server.
        resolve: Answers every name look-up of the call.
        download: Whether the image is fetched too.
        key_in_head: Whether the server repeats the key in the head of its reply.
    """

    name: str
    fault: Fault | None
    expected: tuple[str, ...]
    posts: tuple[int, int] = (1, 1)
    timeout: float = AMPLE
    least: float = 0.0
    within: float | None = None
    base_url: Callable[[FaultServer], str] | None = None
    resolve: Resolver | None = None
    tls: Callable[[], ssl.SSLContext] | None = None
    download: bool = False
    key_in_head: bool = False


REPLIES: Final[dict[str, ReplyFault]] = {}


def add(name: str, fault: Fault | None, *expected: str, posts: int | tuple[int, int] = 1, **more: Any) -> None:
    """Put one fault into the table."""
    if name in REPLIES:
        raise ValueError(f"Two faults are named {name!r}.")
    both = posts if isinstance(posts, tuple) else (posts, posts)
    REPLIES[name] = ReplyFault(name, fault, expected, both, **more)


def reply_fault(
    name: str, *expected: str, posts: int | tuple[int, int] = 1, **more: Any
) -> Callable[[Callable[[Connection, Request], None]], Callable[[Connection, Request], None]]:
    """Put the function below into the table."""

    def register(fault: Callable[[Connection, Request], None]) -> Callable[[Connection, Request], None]:
        add(name, fault, *expected, posts=posts, **more)
        return fault

    return register


def says(value: Any, status: int = 200, *headers: str) -> Fault:
    """A JSON reply; `IMAGE_URL` in any string of it stands for the address of the server's image."""
    text = json.dumps(value, ensure_ascii=True)

    def fault(connection: Connection, request: Request) -> None:
        body = text.replace("IMAGE_URL", connection.server.image_url).encode()
        connection.reply(status, body, "Content-Type: application/json", *headers)

    return fault


def sends(body: bytes, status: int = 200, *headers: str) -> Fault:
    """A well-framed reply with any body."""

    def fault(connection: Connection, request: Request) -> None:
        connection.reply(status, body.replace(b"IMAGE_URL", connection.server.image_url.encode()), *headers)

    return fault


def raw(*parts: bytes, then: str = "close") -> Fault:
    """Bytes as they are, and then close, reset or hang."""

    def fault(connection: Connection, request: Request) -> None:
        for part in parts:
            connection.send(part.replace(b"IMAGE_URL", connection.server.image_url.encode()))
        if then != "close":
            getattr(connection, then)()

    return fault


def in_turn(*faults: Fault) -> Fault:
    """The first fault for the first request, and so on; the last one for all that follow."""

    def fault(connection: Connection, request: Request) -> None:
        faults[min(request.number, len(faults)) - 1](connection, request)

    return fault


def error(code: Any, message: Any = SERVER_WORDS, **beside: Any) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}, **beside}


GOOD: Final = {"created": 1760335349, "data": [{"url": "IMAGE_URL"}]}
GOOD_BODY: Final = json.dumps(GOOD).encode()
AT_ONCE: Final = "Retry-After: 0"
