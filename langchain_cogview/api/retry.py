"""What may be sent again, and when: pure decisions, no I/O.

A paid POST is sent again only when it provably did not run. The errors carry that in `outcome`; replies are classified in
`protocol.py`, transport failures here.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Final

from langchain_cogview.errors import (
    CogViewBudgetError,
    CogViewBusyError,
    CogViewConfigurationError,
    CogViewConnectionError,
    CogViewError,
    CogViewMalformedReplyError,
    CogViewOutcomeUnknownError,
    CogViewRateLimitError,
    CogViewStoppedError,
    CogViewTimeoutError,
    Outcome,
)

MAX_RETRY_AFTER: Final = 3600.0
"""Seconds; a service that asks for a longer wait is not waited for."""
_NEVER_AGAIN: Final = (CogViewBudgetError, CogViewConfigurationError, CogViewStoppedError, CogViewTimeoutError)


class Phase(StrEnum):
    """How far a request had come when its transport failed."""

    CONNECTING = "connecting"
    """Look-up, connect, TLS, proxy: nothing of the request was sent."""
    SENT = "sent"
    """Some or all of the request was sent."""


class Fault(StrEnum):
    """How a transport failed."""

    TIMEOUT = "timeout"
    BROKEN = "broken"
    RUBBISH = "rubbish"
    """What came back is not HTTP."""
    PROXY = "proxy"
    """A proxy answered in place of the host."""
    UNTRUSTED = "untrusted"
    """The host's certificate did not verify."""
    SETTINGS = "settings"
    """The client's own settings make the request impossible."""


def transport_error(  # noqa: PLR0911
    fault: Fault, phase: Phase, *, detail: str | None = None, limit: float | None = None
) -> CogViewError:
    """The error for a transport failure; total over its arguments. `limit` is the time limit in seconds, to name it."""
    time_limit = "the time limit" if limit is None else f"the time limit of {limit:g} s"
    if fault is Fault.SETTINGS:
        return CogViewConfigurationError(
            "The request could not be sent with these settings.",
            hint="Check base_url and the injected client.",
            detail=detail,
        )
    if phase is Phase.SENT:
        if fault is Fault.TIMEOUT:
            return CogViewOutcomeUnknownError(
                f"The request was sent, but {time_limit} passed before an answer came; "
                "a picture may have been made and charged.",
                hint=f"{CogViewOutcomeUnknownError.default_hint} A longer timeout gives the service more time.",
            )
        if fault is Fault.RUBBISH:
            return CogViewMalformedReplyError(detail=detail)
        return CogViewOutcomeUnknownError(
            "The connection broke after the request was sent; a picture may have been made and charged.", detail=detail
        )
    if fault is Fault.TIMEOUT:
        return CogViewTimeoutError(
            f"{time_limit[0].upper()}{time_limit[1:]} passed before the request was sent; nothing was made or charged."
        )
    if fault is Fault.PROXY:
        return CogViewConnectionError(
            "The proxy did not pass the request on; nothing was sent.",
            hint=(
                "Ask its operator to allow the API's host, put name and password into the proxy's URL if it wants them, or "
                "go around it with NO_PROXY."
            ),
            detail=detail,
        )
    if fault is Fault.UNTRUSTED:
        error = CogViewConnectionError(
            "The host's certificate is not trusted; nothing was sent.",
            hint=(
                "If a company proxy inspects TLS, point SSL_CERT_FILE to a PEM file with its root certificate. "
                "Otherwise check base_url and the machine's clock."
            ),
            detail=detail,
        )
        error.outcome = Outcome.FINAL
        error.is_retryable = False
        return error
    return CogViewConnectionError(detail=detail)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and after which wait, a request is sent again.

    Attributes:
        max_retries: Further attempts after the first.
        retry_unknown: Also send again what may have been charged. Can pay twice.
    """

    max_retries: int = 2
    retry_unknown: bool = False

    def sends_again(self, error: BaseException) -> bool:
        """Whether the decision allows another attempt, however many there were."""
        if not isinstance(error, CogViewError) or isinstance(error, _NEVER_AGAIN):
            return False
        return error.outcome is Outcome.NOT_RUN or (self.retry_unknown and error.outcome is Outcome.UNKNOWN)

    def wait(self, error: BaseException, attempt: int) -> float:
        """Seconds before attempt number `attempt` + 1: what the service asked for, else full jitter.

        The jitter's bound doubles with each attempt: from 1 s, at a limit from 2 s, when the model is overloaded from 5 s;
        never over 60 s.
        """
        asked = error.retry_after if isinstance(error, CogViewError) else None
        if asked is not None:
            return asked if asked <= MAX_RETRY_AFTER else math.inf
        first = 5.0 if isinstance(error, CogViewBusyError) else 2.0 if isinstance(error, CogViewRateLimitError) else 1.0
        return random.uniform(0.0, min(first * 2 ** (attempt - 1), 60.0))


def parse_retry_after(value: str | None, *, now: datetime | None = None) -> float | None:
    """Seconds to wait of a `Retry-After` header: a number of seconds or an HTTP date.

    Returns:
        0.0 or more; infinity for an absurd number; None where the header is missing or says nothing usable.
    """
    text = (value or "").strip()
    if not text or len(text) > 4096:  # noqa: PLR2004
        return None
    if text.replace(".", "", 1).isascii() and text.replace(".", "", 1).isdigit():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    try:
        return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())
    except OverflowError:
        return math.inf
