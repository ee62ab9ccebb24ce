"""Output of the `cogview` command: exit codes, standard output and error output, and images in a terminal.

The environment tells whether a terminal can show images: kitty's graphics protocol (kitty, Ghostty), iTerm2's inline images
(iTerm2, WezTerm) and OSC 8 links. Escape sequences contain only base64, numbers and percent-encoded URLs, so untrusted text
cannot end them.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn
from urllib.parse import quote

from langchain_cogview.cli.style import message, terminal_width, without_spinner, wrapped
from langchain_cogview.images.formats import sniff
from langchain_cogview.text import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

EXIT_CODES: Final = {
    0: "generated",
    1: "another failure",
    2: "wrong usage or settings; of batch: no prompt, or a budget that does not cover the next prompt",
    3: "blocked by the content filter",
    4: "key, permission or balance",
    5: "limit, busy, network or time: not charged, try later",
    6: "generated, but not saved where asked: the error output says where it is",
    7: "outcome unknown: an image may have been generated and charged",
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
_CLI_OPTIONS: Final = (
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
    ("Set output_dir, or call save() in time: links", "Links"),
    ("Call image.read() to fetch it again, which is free; its URL is on the result.", ""),
)
_KITTY_CHUNK: Final = 4096
_MAX_SHOWN_BYTES: Final = 8 << 20
_WIDEST: Final = 60
_VIEWER_SECONDS: Final = 2.0


def exit_code(kind: type[BaseException] | None) -> int:
    """Determine the exit code of an error.

    Args:
        kind: The error's class; None for an unknown class.

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
    """Choose what to do about an error, in terms of the command's options.

    Args:
        kind: The error's class; None for an unknown class.
        hint: The error's own hint.

    Returns:
        A hint for the class that names the command's options if there is one; else `hint`.
    """
    from langchain_cogview import errors  # noqa: PLC0415

    hints: dict[type[BaseException], str] = {
        errors.CogViewRateLimitError: "Try again later, with fewer images at once (--n); the provider's console shows the limit.",
        errors.CogViewBusyError: "Try again in a few minutes.",
        errors.CogViewTimeoutError: "Raise --timeout (seconds), or try again later.",
        errors.CogViewOutcomeUnknownError: "Check the provider's console before you run it again: that can pay twice.",
    }
    return next((hints[item] for item in getattr(kind, "__mro__", ()) if item in hints), hint)


def _without(text: str, sentences: Iterable[str]) -> str:
    """Return a text without what was already shown."""
    for sentence in sentences:
        text = text.replace(sentence, "")
    return text.strip()


_warnings: Final[dict[str, None]] = {}
"""The warnings that this command has written."""


def print_warning(text: str) -> None:
    """Write a warning to the error output, unless this command has written it before.

    Args:
        text: What the user should know; nothing is written if it is empty.
    """
    if text and text not in _warnings:
        _warnings[text] = None
        print_stderr(f"Warning: {text}")


class _LogHandler(logging.Handler):
    """Writes the package's log records to the error output."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, without its traceback."""
        print_warning(record.getMessage())


@contextlib.contextmanager
def _logs_on_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("langchain_cogview"), _LogHandler(logging.WARNING)
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def run_command(work: Callable[[], int]) -> NoReturn:
    """Run a command, and exit with its exit code or that of the error that it raised, which is reported.

    Args:
        work: The command; returns its exit code.

    Raises:
        Exit: Always; ends the process with the exit code.
    """
    import typer  # noqa: PLC0415  so that a command can say what to install where it is missing
    from pydantic import ValidationError  # noqa: PLC0415

    from langchain_cogview.errors import CogViewError  # noqa: PLC0415
    from langchain_cogview.request import describe_validation  # noqa: PLC0415

    _warnings.clear()
    with warnings.catch_warnings(), _logs_on_stderr():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print_warning(str(message))
        try:
            code = work()
        except CogViewError as error:
            facts = (error.code and f"code {error.code}", error.status and f"HTTP {error.status}", error.detail)
            details = ", ".join(fact for fact in facts if fact)
            print_stderr(
                f"Error: {error.message}",
                _without(hint_of(type(error), error.hint), _warnings),
                *getattr(error, "__notes__", ()),
                details and f"Details: {details}",
                error.request_id and f"Request id: {error.request_id}",
            )
            code = exit_code(type(error))
        except ValidationError as error:
            print_stderr(f"Error: {describe_validation(error)}")
            code = 2
        except KeyboardInterrupt:
            print_stderr("Interrupted. A request that was already sent may have been charged.")
            code = 130
    raise typer.Exit(code)


def shows_on_terminal() -> bool:
    """Check where the standard output goes.

    Returns:
        Whether it is a terminal.
    """
    return sys.stdout is not None and sys.stdout.isatty()


def json_text(value: Any) -> str:
    """Format a value as JSON for the standard output.

    Args:
        value: Plain JSON values.

    Returns:
        The text; in printable ASCII if it goes to a terminal.
    """
    terminal = shows_on_terminal()
    ascii_only = terminal or not sys.stdout or sys.stdout.encoding.lower() != "utf-8"
    text = json.dumps(value, indent=2, ensure_ascii=ascii_only)
    text = text.replace("\x7f", "\\u007f") if terminal else text
    return text.encode("utf-8", "backslashreplace").decode()  # undecodable bytes of a path, in JSON's own notation


def print_stdout(text: str, *, sequences: bool = False, wrap: bool = False) -> int:
    """Write a text to the standard output.

    Args:
        text: Characters that are not printable are replaced if it goes to a terminal, and unchanged for another program.
        sequences: The text contains escape sequences of ours, and is clean otherwise.
        wrap: The text is for people: on a terminal its lines are broken between words.

    Returns:
        The exit code: 0, or 1 if the output cannot be written.
    """
    if shows_on_terminal() and not sequences:
        text = visible(text)
        text = wrapped(text, terminal_width(sys.stdout)) if wrap else text

    def write() -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    try:
        if sys.stdout:
            without_spinner(write)
    except OSError as error:
        _drop_output()
        print_stderr(f"Error: The standard output cannot be written ({error.strerror}). The output is:", text)
        return 1
    return 0


def write_stdout(content: bytes) -> bool:
    """Write bytes to the standard output.

    Args:
        content: The bytes.

    Returns:
        False if they could not all be written, which is reported.
    """
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except OSError as error:
        _drop_output()
        print_stderr(f"Error: The standard output cannot be written ({error.strerror}).")
        return False
    return True


def _drop_output() -> None:
    # The rest of the buffer would fail again when Python exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_stderr(*lines: str | None) -> None:
    """Write lines that belong together to the error output, with options of the command in place of Python's arguments.

    Args:
        *lines: Empty lines and None are skipped. On a terminal, the lines after an error or a warning are indented below it.
    """
    texts = [visible(with_cli_options(line)) for line in lines if line]
    if not texts or not sys.stderr:
        return

    def write() -> None:
        sys.stderr.write(f"{message(texts, sys.stderr)}\n")
        sys.stderr.flush()

    with contextlib.suppress(OSError):
        without_spinner(write)


def with_cli_options(text: str) -> str:
    """Replace Python's arguments in a text by the options of the command.

    Args:
        text: A message of the library.

    Returns:
        The message for a user of the command.
    """
    for python, shell in _CLI_OPTIONS:
        text = text.replace(python, shell)
    return text


# --- images and links on a terminal


class Terminal(StrEnum):
    """What a terminal can show, in ascending order."""

    PLAIN = "plain"
    """Text only: a pipe, a file, or a dumb terminal."""
    LINK = "link"
    """Links (OSC 8); terminals without support show the text."""
    ITERM2 = "iterm2"
    """Links, and images in iTerm2's protocol."""
    KITTY = "kitty"
    """Links, and images in kitty's protocol."""


_PROGRAMS: Final = {
    "kitty": Terminal.KITTY,
    "ghostty": Terminal.KITTY,
    "iTerm.app": Terminal.ITERM2,
    "WezTerm": Terminal.ITERM2,
}


def detect_terminal(environment: Mapping[str, str], *, is_terminal: bool) -> Terminal:
    """Determine what the terminal behind the standard output can show.

    The terminal itself is not queried: its answer would arrive on the standard input, which may be the prompt.

    Args:
        environment: Environment variables of the process.
        is_terminal: Whether the standard output is a terminal.

    Returns:
        What it can show.
    """
    term = environment.get("TERM", "")
    if not is_terminal or term in {"", "dumb", "linux"} or environment.get("STY"):  # STY: inside GNU screen
        return Terminal.PLAIN
    if environment.get("TMUX") or term.startswith(("screen", "tmux")):
        # tmux and screen pass links on or drop them, but lose the position of images.
        return Terminal.LINK
    if term in {"xterm-kitty", "xterm-ghostty"}:
        return Terminal.KITTY
    program = environment.get("TERM_PROGRAM")
    if program:  # more reliable than the variables below, which are inherited from another terminal
        return _PROGRAMS.get(program, Terminal.LINK)
    if environment.get("KITTY_WINDOW_ID"):
        return Terminal.KITTY
    return Terminal.ITERM2 if environment.get("LC_TERMINAL") == "iTerm2" else Terminal.LINK


def inline_image(terminal: Terminal, content: bytes, size: tuple[int, int], terminal_size: tuple[int, int]) -> str:
    """Encode an image for a terminal.

    Args:
        terminal: From `detect_terminal`.
        content: A whole PNG, JPEG or WebP file. kitty shows PNG only; the other formats need Pillow there.
        size: Width and height of the image, in pixels.
        terminal_size: Columns and rows of the terminal.

    Returns:
        The escape sequences and a line break; empty if the image cannot be shown.
    """
    if terminal in {Terminal.PLAIN, Terminal.LINK} or len(content) > _MAX_SHOWN_BYTES:
        return ""
    columns = _columns(size, terminal_size)
    if terminal is Terminal.ITERM2:
        encoded = base64.b64encode(content).decode()
        return f"\x1b]1337;File=inline=1;size={len(content)};width={columns};preserveAspectRatio=1:{encoded}\x07\n"
    png = _as_png(content)
    encoded = base64.b64encode(png).decode()
    chunks = [encoded[start : start + _KITTY_CHUNK] for start in range(0, len(encoded), _KITTY_CHUNK)]
    # q=2: the terminal must not answer, because the shell would read the answer as input.
    heads = [f"a=T,f=100,q=2,c={columns},", *[""] * (len(chunks) - 1)]
    pieces = [
        f"\x1b_G{head}m={int(chunk is not chunks[-1])};{chunk}\x1b\\"
        for head, chunk in zip(heads, chunks, strict=False)
    ]
    return "".join(pieces) + "\n" if pieces else ""


def _columns(size: tuple[int, int], terminal_size: tuple[int, int]) -> int:
    """Return the width in columns that leaves a few rows free; a cell is twice as high as it is wide."""
    width, height = size
    by_height = 2 * max(terminal_size[1] - 4, 4) * width // max(height, 1)
    return max(1, min(_WIDEST, terminal_size[0], by_height))


def _as_png(content: bytes) -> bytes:
    if sniff(content[:32]) == "image/png":
        return content
    try:
        from langchain_cogview.notebook.previews import decoded  # noqa: PLC0415

        out = io.BytesIO()
        decoded(content).save(out, "PNG", compress_level=1)
        return out.getvalue()
    except Exception:  # noqa: BLE001  no Pillow, or an image that it does not read: the link stands in
        return b""


def path_link(terminal: Terminal, path: Path) -> str:
    """Format a path for a terminal.

    Args:
        terminal: From `detect_terminal`.
        path: The file.

    Returns:
        A link to the file if the terminal shows links, with question marks for characters that are not printable; else the path.
    """
    if terminal is Terminal.PLAIN:
        return str(path)
    shown = visible(str(path)).replace("\n", "?")
    # With the host name, so that a terminal on another host does not open a local file.
    host = quote(socket.gethostname(), safe="")
    url = path.absolute().as_uri().replace("file://", f"file://{host}", 1)
    return f"\x1b]8;;{url}\x1b\\{shown}\x1b]8;;\x1b\\"


def open_file(path: Path) -> str | None:
    """Open a file with the system's viewer, without waiting for the viewer to be closed.

    Args:
        path: The file.

    Returns:
        Why it could not be opened; None if no problem was seen.
    """
    name = str(path.absolute())
    if sys.platform == "win32":
        try:
            os.startfile(name)  # noqa: S606
        except OSError as error:
            return error.strerror or type(error).__name__
        return None
    command = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
    if command is None:
        return "there is no xdg-open"
    quiet = subprocess.DEVNULL
    try:
        viewer = subprocess.Popen([command, name], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)  # noqa: S603
        code = viewer.wait(_VIEWER_SECONDS)
    except subprocess.TimeoutExpired:  # the command is the viewer itself, which keeps running
        return None
    except OSError as error:
        return error.strerror or type(error).__name__
    return f"{Path(command).name} ended with {code}" if code else None
