"""Text for people: untrusted text made safe to show, moments, warnings, and notes about paid images."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_SERVER_TEXT: Final = 200
"""Maximum length of the service's text in an error, in characters."""
IN_MEMORY: Final = "Its bytes are in memory: call save(path)."
"""The end of the warning about an image that could not be saved in `output_dir`."""
_MOST_LOGGED_CHARACTERS: Final = 1000
_CALLEES: Final = {__name__.partition(".")[0], "pydantic", "langchain_core"}
_USUAL_KEY = re.compile(r"\b[0-9A-Fa-f]{32}\.[0-9A-Za-z]{16}\b")
_SPACES: Final = "\t\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_JOINERS: Final = {0x200C: None, 0x200D: None}
"""Joiners between the parts of an emoji; without them the parts stand side by side."""

logger = logging.getLogger(__name__)


def visible(text: str, *, instead: str = "?") -> str:
    """Replace everything in a text that a terminal does not show as it is.

    Control characters, changes of writing direction and unpaired surrogates are replaced.

    Args:
        text: May come from outside.
        instead: Replaces each character that is not printable. Line breaks stay, and other white space becomes a space.

    Returns:
        Printable characters and line breaks.
    """
    if text.isprintable():
        return text
    text = text.replace("\r\n", "\n").translate(_JOINERS)
    return "".join(c if c.isprintable() or c == "\n" else " " if c in _SPACES else instead for c in text)


def moment_text(moment: datetime) -> str:
    """Return a moment for people, to the minute, such as `2026-10-01 08:30 UTC`."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def without_key(text: str) -> str:
    """Return a text without API keys of the usual form; a value passed under a wrong name may be one."""
    return _USUAL_KEY.sub("[key]", text)


def printable(text: str, limit: int = MAX_SERVER_TEXT) -> str:
    """Make untrusted text safe to show in one line.

    Args:
        text: May come from outside.
        limit: Maximum length of the result, in characters.

    Returns:
        One line of printable characters; a longer text ends in an ellipsis.
    """
    line = " ".join(without_key(visible(text[: limit * 8], instead=" ")).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def warn_caller(message: str) -> None:
    """Warn with the line of the code outside this package, pydantic and LangChain that led to the warning.

    Args:
        message: The text of the `UserWarning`.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _CALLEES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def unsaved_note(folder: object, why: str) -> str:
    """Word the warning about an image whose file could not be saved.

    Args:
        folder: The folder that was asked for.
        why: The reason, as in `DownloadedImage.problem`.

    Returns:
        The text of the warning.
    """
    return f"The image could not be saved in output_dir ({printable(str(folder), 120)}): {why}. {IN_MEMORY}"


@contextmanager
def noting_lost_image(request_id: str, *urls: str | None) -> Iterator[None]:
    """Add a note about the paid image to the exception of a caller that is cancelled or interrupted after the payment.

    Args:
        request_id: The request id.
        *urls: The links of the image, as far as there are any.

    Yields:
        Once, for the work after the payment.
    """
    try:
        yield
    except BaseException as error:
        where = (
            " ".join(printable(url, _MOST_LOGGED_CHARACTERS) for url in urls if url) or "its bytes were in the reply"
        )
        note = f"An image was made and paid for (request id {printable(request_id)}): {where}"
        logger.warning("The caller left before it received an image. %s", note)
        error.add_note(note)
        raise


def log_unasked(request_id: str, urls: Sequence[str]) -> None:
    """Log the links of images that were not asked for, so that they can be found.

    Args:
        request_id: The request id.
        urls: The links.
    """
    if urls:
        logger.warning(
            "The reply to request %s held more images than the one that was asked for: %s",
            printable(request_id),
            " ".join(printable(url, _MOST_LOGGED_CHARACTERS) for url in urls),
        )
