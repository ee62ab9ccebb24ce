"""Foreign text, made safe to show: on a terminal, in a log, in an error."""

from __future__ import annotations

import re
from typing import Final

MAX_SERVER_TEXT: Final = 200
"""Characters of a text of the service that an error holds."""
_USUAL_KEY = re.compile(r"\b[0-9A-Fa-f]{32}\.[0-9A-Za-z]{16}\b")
_SPACES: Final = "\t\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_JOINERS: Final = {0x200C: None, 0x200D: None}
"""Between the parts of an emoji: without them its parts stand side by side."""


def visible(text: str, *, instead: str = "?") -> str:
    """Text that a terminal shows as it is: no control character, no change of direction, no half of a character.

    Args:
        text: May be foreign.
        instead: Stands for each character that is not printable. Line breaks stay, and other spaces become a space.

    Returns:
        Printable characters and line breaks.
    """
    if text.isprintable():
        return text
    text = text.replace("\r\n", "\n").translate(_JOINERS)
    return "".join(c if c.isprintable() or c == "\n" else " " if c in _SPACES else instead for c in text)


def without_key(text: str) -> str:
    """A text without API keys of the usual form: what was passed under a wrong name is not known to be one."""
    return _USUAL_KEY.sub("[key]", text)


def printable(text: str, limit: int = MAX_SERVER_TEXT) -> str:
    """Foreign text made safe to show: one line, printable, without a key of the usual form, at most `limit` characters."""
    line = " ".join(without_key(visible(text[: limit * 8], instead=" ")).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
