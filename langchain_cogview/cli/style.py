"""How texts look on a terminal: wrapped at words, errors with a mark and a colour, and a spinner while an image is made.

Everything here applies to a terminal only. A pipe or a file gets the texts as they are.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import time
import unicodedata
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_NARROWEST: Final = 20
_MARKS: Final = {"Error:": ("✗", "x", "1;31"), "Warning:": ("!", "!", "33")}
"""For each label: its mark, the same in ASCII, and the colour as an SGR sequence."""
_FRAMES: Final = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_ASCII_FRAMES: Final = "|/-\\"
_FRAME_SECONDS: Final = 0.12
_SPINNER_AFTER: Final = 0.4
"""Seconds before the spinner appears: what takes less time needs none."""
_BULLET: Final = re.compile(r" *(?:- )?")


def is_terminal(stream: Any) -> bool:
    """Check where a stream goes.

    Args:
        stream: A text stream; None if the process has none.

    Returns:
        Whether it is a terminal.
    """
    try:
        return stream is not None and bool(stream.isatty())
    except ValueError:  # closed
        return False


def terminal_width(stream: Any) -> int:
    """Determine how many columns the terminal behind a stream has.

    Args:
        stream: A text stream that is a terminal.

    Returns:
        The number of columns; 80 if it is unknown.
    """
    columns = os.environ.get("COLUMNS", "")
    if columns.isascii() and columns.isdigit() and int(columns):
        return max(_NARROWEST, int(columns))
    try:
        return max(_NARROWEST, os.get_terminal_size(stream.fileno()).columns or 80)
    except (OSError, ValueError, AttributeError):
        return max(_NARROWEST, shutil.get_terminal_size().columns)


def has_colours(stream: Any) -> bool:
    """Check whether colours may be written: on a terminal, unless `NO_COLOR` is set or the terminal is dumb.

    Args:
        stream: A text stream.

    Returns:
        Whether it may get colours.
    """
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def dimmed(text: str, stream: Any) -> str:
    """Return a text in a weaker colour, if the stream may have colours."""
    return f"\x1b[2m{text}\x1b[0m" if has_colours(stream) else text


def columns_of(text: str) -> int:
    """Return how many columns of a terminal a text takes; a Chinese character takes two."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in {"W", "F"} else 1 for c in text
    )


def wrapped(text: str, width: int, hang: int | None = None) -> str:
    """Break the lines of a text between words.

    A word that is wider than a line is left whole, so that a URL can be clicked and copied; a text without spaces, such as a
    Chinese sentence, is broken between its characters.

    Args:
        text: Lines of printable characters.
        width: Number of columns.
        hang: Indentation of the lines that follow a break; None: below the text of each line, after its bullet.

    Returns:
        The text with more line breaks.
    """
    return "\n".join(_wrapped_line(line, width, hang) for line in text.split("\n"))


def _wrapped_line(line: str, width: int, hang: int | None) -> str:
    if columns_of(line) <= width:
        return line
    start = _BULLET.match(line)
    first = start.group() if start else ""
    indent = " " * (len(first) if hang is None else hang)
    lines, current, empty = [], first, True
    for word in line[len(first) :].split():
        for number, piece in enumerate(_pieces(word, width - len(indent))):
            gap = "" if empty or number else " "
            if not empty and columns_of(current) + len(gap) + columns_of(piece) > width:
                lines.append(current)
                current, gap = indent, ""
            current += gap + piece
            empty = False
    return "\n".join([*lines, current])


def _pieces(word: str, width: int) -> list[str]:
    """Return a word in one piece, or its characters if it is too wide and has wide ones, which may be broken anywhere."""
    if (
        word.isascii()
        or columns_of(word) <= width
        or not any(unicodedata.east_asian_width(c) in {"W", "F"} for c in word)
    ):
        return [word]
    return list(word)


def message(lines: list[str], stream: Any) -> str:
    """Format lines that belong together for a stream.

    Args:
        lines: Lines of printable characters. The first one may begin with `Error:` or `Warning:`.
        stream: Where they are written.

    Returns:
        On a terminal: wrapped, with a mark and a colour before an error or a warning, and the other lines indented below it.
        Elsewhere the lines as they are.
    """
    if not is_terminal(stream):
        return "\n".join(lines)
    width = terminal_width(stream)
    label = next((label for label in _MARKS if lines and lines[0].startswith(label)), None)
    if label is None:
        return "\n".join(wrapped(line, width) for line in lines)
    mark, plain, colour = _MARKS[label]
    mark = mark if _can_write(mark, stream) else plain
    first = wrapped(f"{mark} {lines[0]}", width, 2)
    if has_colours(stream):
        head = f"{mark} {label}"
        first = f"\x1b[{colour}m{head}\x1b[0m{first.removeprefix(head)}"
    return "\n".join([first, *(wrapped(f"  {part}", width, 2) for line in lines[1:] for part in line.split("\n"))])


def _can_write(text: str, stream: Any) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


# --- the spinner


class _Current:
    spinner: _Spinner | None = None


class _Spinner:
    """One line of a terminal that says what is done, and for how long."""

    def __init__(self, stream: Any, text: str) -> None:
        self._stream = stream
        self._text = text
        self._frames = _FRAMES if _can_write(_FRAMES, stream) else _ASCII_FRAMES
        self._begun = time.monotonic()
        self._ended = threading.Event()
        self._shown = False
        self.lock = threading.RLock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="cogview-spinner")

    def start(self) -> None:
        with contextlib.suppress(RuntimeError):  # no thread can be started: there is no spinner
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        with self.lock:
            self.clear()
        if self._thread.ident is not None:
            self._thread.join(1.0)

    def clear(self) -> None:
        """Empty the line, so that other text can be written; the caller holds the lock."""
        if self._shown:
            self._shown = False
            self._write("\r\x1b[K")

    def _run(self) -> None:
        wait, number = _SPINNER_AFTER, 0
        while not self._ended.wait(wait):
            wait, number = _FRAME_SECONDS, number + 1
            with self.lock:
                if self._ended.is_set():
                    return
                seconds = time.monotonic() - self._begun
                frame = self._frames[number % len(self._frames)]
                line = f"{frame} {self._text} {seconds:.0f} s"[: terminal_width(self._stream) - 1]
                self._shown = True
                self._write(f"\r{line}\x1b[K")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


@contextlib.contextmanager
def spinner(text: str) -> Iterator[None]:
    """Show on the error output, within this block, what is done and for how many seconds; on a terminal only.

    Args:
        text: What is done.

    Yields:
        Nothing.
    """
    stream = sys.stderr
    if not is_terminal(stream) or os.environ.get("TERM", "dumb") == "dumb":
        yield
        return
    _Current.spinner = running = _Spinner(stream, text)
    running.start()
    try:
        yield
    finally:
        running.stop()
        _Current.spinner = None


def without_spinner(write: Callable[[], None]) -> None:
    """Write to the terminal while the line of the spinner is empty.

    Args:
        write: Writes whole lines.
    """
    running = _Current.spinner
    if running is None:
        write()
        return
    with running.lock:
        running.clear()
        write()
