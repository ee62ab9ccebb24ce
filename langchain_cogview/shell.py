"""How the `cogview` command talks: exit codes, the two outputs, and Python's words in a shell's."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any, Final, NoReturn

from langchain_cogview.text import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXIT_CODES: Final = {
    0: "made",
    1: "another failure",
    2: "wrong usage or settings: not made",
    3: "blocked by the content filter",
    4: "key, permission or balance",
    5: "limit, busy, network or time: not charged, try later",
    6: "made, but not saved where asked: the error output says where it is",
    7: "outcome unknown: a picture may have been made and charged",
    130: "interrupted",
}
_CODES_OF_SCOPES: Final = {
    "prompt": 3,
    "request": 2,
    "model": 2,
    "account": 4,
    "service": 5,
    "local": 2,
    "cancelled": 130,
}
_SHELL_WORDS: Final = (
    ("; or pass api_key=...", ""),
    ("base_url='sandbox:'", "--sandbox"),
    ("Pass prices={model: price}, or leave the budget out.", "Leave --budget out."),
    ("format=: '", "--format: '"),
    ("unless unique=True", "unless --unique is given"),
    ("into_existing=True", "--into-existing"),
    ("retry_unknown=True", "--retry-unknown"),
    ("run the job again", "run the same command"),
    ("skip_bad=True", "--skip-bad"),
    ("region='", "--region '"),
    (": set output_dir, or call save() in time", ""),
    ("Its URL is on the result; fetching again costs nothing: image.read() tries again.", ""),
)


def exit_code(kind: type[BaseException] | None) -> int:
    """The exit code of an error.

    Args:
        kind: The error's class; None for one that is not known here.

    Returns:
        A key of `EXIT_CODES`.
    """
    from langchain_cogview import errors  # noqa: PLC0415

    if kind is None or kind is errors.CogViewError or not issubclass(kind, errors.CogViewError):
        return 1
    if issubclass(kind, (errors.CogViewDownloadError, errors.CogViewStorageError)):
        return 6
    return 7 if kind.outcome is errors.Outcome.UNKNOWN else _CODES_OF_SCOPES.get(kind.scope, 1)


def hint_of(kind: type[BaseException] | None, hint: str) -> str:
    """What to do about an error, without Python's arguments.

    Args:
        kind: The error's class; None for one that is not known here.
        hint: The error's own hint.

    Returns:
        A hint that names the command's options, where there is one for the class; else `hint`.
    """
    from langchain_cogview import errors  # noqa: PLC0415

    hints: dict[type[BaseException], str] = {
        errors.CogViewRateLimitError: "Try again later, with fewer pictures at once (--n); the console shows the limit.",
        errors.CogViewBusyError: "Try again in a few minutes.",
        errors.CogViewTimeoutError: "Raise --timeout (seconds), or try again later.",
        errors.CogViewOutcomeUnknownError: "Look in the provider's console before you run it again: that can pay twice.",
    }
    return next((hints[each] for each in getattr(kind, "__mro__", ()) if each in hints), hint)


class _SayHandler(logging.Handler):
    """Writes what the package logs as a line of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, without its traceback."""
        say(f"Warning: {record.getMessage()}")


@contextlib.contextmanager
def _logs_said() -> Iterator[None]:
    logger, handler = logging.getLogger("langchain_cogview"), _SayHandler(logging.WARNING)
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def finish(work: Callable[[], int]) -> NoReturn:
    """End a command with the exit code of its work, or of the error that it raised, which is told."""
    import typer  # noqa: PLC0415  so that a command can say what to install where it is missing
    from pydantic import ValidationError  # noqa: PLC0415

    from langchain_cogview.errors import CogViewError  # noqa: PLC0415
    from langchain_cogview.request import describe_validation  # noqa: PLC0415

    with warnings.catch_warnings(), _logs_said():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: say(f"Warning: {message}")
        try:
            code = work()
        except CogViewError as error:
            say(f"Error: {error.message}", hint_of(type(error), error.hint))
            facts = (error.code and f"code {error.code}", error.status and f"HTTP {error.status}", error.detail)
            said = ", ".join(fact for fact in facts if fact)
            about = error.request_id and f"Request id: {error.request_id}"
            say(*getattr(error, "__notes__", ()), said and f"Details: {said}", about)
            code = exit_code(type(error))
        except ValidationError as error:
            say(f"Error: {describe_validation(error)}")
            code = 2
        except KeyboardInterrupt:
            say("Interrupted. A request that was already sent may have been charged.")
            code = 130
    raise typer.Exit(code)


def shows_on_terminal() -> bool:
    """Whether the standard output is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def json_text(value: Any) -> str:
    """JSON that the standard output can take; for a terminal in printable ASCII."""
    terminal = shows_on_terminal()
    ascii_only = terminal or not sys.stdout or sys.stdout.encoding.lower() != "utf-8"
    text = json.dumps(value, indent=2, ensure_ascii=ascii_only)
    text = text.replace("\x7f", "\\u007f") if terminal else text
    return text.encode("utf-8", "backslashreplace").decode()  # a path's byte that is no letter: JSON writes it alike


def write(text: str, *, sequences: bool = False) -> int:
    """Write to the standard output; 1 where nobody takes it.

    Args:
        text: On a terminal, what is not printable in it is replaced. Elsewhere a program reads it as it is.
        sequences: It holds escape sequences of ours, and is clean otherwise.
    """
    text = text if sequences or not shows_on_terminal() else visible(text)
    try:
        if sys.stdout:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
    except OSError as error:
        _drop_output()
        say(f"Error: The standard output cannot be written ({error.strerror}). It would have been:", text)
        return 1
    return 0


def write_bytes(content: bytes) -> bool:
    """Write bytes to the standard output; False where it did not take them all, which is told."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except OSError as error:
        _drop_output()
        say(f"Error: The standard output cannot be written ({error.strerror}).")
        return False
    return True


def _drop_output() -> None:
    # What is left in the buffer would fail again when Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(*lines: str | None) -> None:
    """Write lines to the error output, in a shell's words where they name Python's arguments."""
    for line in filter(None, lines if sys.stderr else ()):
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{visible(in_shell_words(line))}\n")
            sys.stderr.flush()


def in_shell_words(text: str) -> str:
    """A text with a shell's options in place of Python's arguments."""
    for python, shell in _SHELL_WORDS:
        text = text.replace(python, shell)
    return text
