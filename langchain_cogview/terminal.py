"""Pictures and links on a terminal: which of them it can show, by its environment, and the escape sequences for it.

kitty's graphics protocol (kitty, Ghostty), iTerm2's inline images (iTerm2, WezTerm) and OSC 8 links. What goes into a
sequence is base64, numbers, or a percent-encoded URL: no foreign text can end it.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import socket
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from langchain_cogview.images.formats import sniff
from langchain_cogview.text import visible

if TYPE_CHECKING:
    from collections.abc import Mapping

_KITTY_CHUNK: Final = 4096
_MAX_SHOWN_BYTES: Final = 8 << 20
_WIDEST: Final = 60
_VIEWER_SECONDS: Final = 2.0


class Terminal(StrEnum):
    """What a terminal can show, beginning with the least."""

    PLAIN = "plain"
    """Text alone: a pipe, a file, a dumb terminal."""
    LINK = "link"
    """Links (OSC 8); terminals that do not know them show their text."""
    ITERM2 = "iterm2"
    """Links, and pictures by iTerm2's protocol."""
    KITTY = "kitty"
    """Links, and pictures by kitty's protocol."""


_PROGRAMS: Final = {
    "kitty": Terminal.KITTY,
    "ghostty": Terminal.KITTY,
    "iTerm.app": Terminal.ITERM2,
    "WezTerm": Terminal.ITERM2,
}


def terminal_of(environment: Mapping[str, str], *, is_terminal: bool) -> Terminal:
    """What the terminal behind the standard output can show.

    Nothing is asked of the terminal itself: its answer would come on the standard input, which may be the prompt.

    Args:
        environment: The variables of the process.
        is_terminal: Whether the standard output is one.
    """
    term = environment.get("TERM", "")
    if not is_terminal or term in {"", "dumb", "linux"} or environment.get("STY"):  # STY: inside GNU screen
        return Terminal.PLAIN
    if environment.get("TMUX") or term.startswith(("screen", "tmux")):
        # It passes links on, or drops them; the pictures it would have to be told of, and it would lose their place.
        return Terminal.LINK
    if term in {"xterm-kitty", "xterm-ghostty"}:
        return Terminal.KITTY
    program = environment.get("TERM_PROGRAM")
    if program:  # says more than the variables below, which a terminal inherits from the one it was started in
        return _PROGRAMS.get(program, Terminal.LINK)
    if environment.get("KITTY_WINDOW_ID"):
        return Terminal.KITTY
    return Terminal.ITERM2 if environment.get("LC_TERMINAL") == "iTerm2" else Terminal.LINK


def picture_on(terminal: Terminal, content: bytes, size: tuple[int, int], room: tuple[int, int]) -> str:
    """The text that shows a picture, with the line's end behind it.

    Args:
        terminal: From `terminal_of`.
        content: A whole PNG, JPEG or WebP. kitty takes PNG alone; the others need Pillow there.
        size: Width and height of the picture, in pixels.
        room: Columns and rows of the terminal.

    Returns:
        Empty where it cannot be shown.
    """
    if terminal in {Terminal.PLAIN, Terminal.LINK} or len(content) > _MAX_SHOWN_BYTES:
        return ""
    columns = _columns(size, room)
    if terminal is Terminal.ITERM2:
        encoded = base64.b64encode(content).decode()
        return f"\x1b]1337;File=inline=1;size={len(content)};width={columns};preserveAspectRatio=1:{encoded}\x07\n"
    png = _as_png(content)
    encoded = base64.b64encode(png).decode()
    chunks = [encoded[start : start + _KITTY_CHUNK] for start in range(0, len(encoded), _KITTY_CHUNK)]
    # q=2: the terminal answers nothing, which would be read as the user's next command.
    heads = [f"a=T,f=100,q=2,c={columns},", *[""] * (len(chunks) - 1)]
    pieces = [
        f"\x1b_G{head}m={int(chunk is not chunks[-1])};{chunk}\x1b\\"
        for head, chunk in zip(heads, chunks, strict=False)
    ]
    return "".join(pieces) + "\n" if pieces else ""


def _columns(size: tuple[int, int], room: tuple[int, int]) -> int:
    """Columns for a picture that leaves a few rows of the terminal free; a cell is twice as high as it is wide."""
    width, height = size
    by_height = 2 * max(room[1] - 4, 4) * width // max(height, 1)
    return max(1, min(_WIDEST, room[0], by_height))


def _as_png(content: bytes) -> bytes:
    if sniff(content[:32]) == "image/png":
        return content
    try:
        from langchain_cogview.notebook.previews import decoded  # noqa: PLC0415

        out = io.BytesIO()
        decoded(content).save(out, "PNG", compress_level=1)
        return out.getvalue()
    except Exception:  # noqa: BLE001  no Pillow, or a picture that it does not read: the link stands in
        return b""


def path_on(terminal: Terminal, path: Path) -> str:
    """A path as the terminal shows it: a link to the file where it can, its plain text where it cannot.

    In a link, characters of a file's name that are not printable are shown as question marks.
    """
    if terminal is Terminal.PLAIN:
        return str(path)
    shown = visible(str(path)).replace("\n", "?")
    # With the host, so that a terminal on another one does not take it for a file of its own.
    host = quote(socket.gethostname(), safe="")
    url = path.absolute().as_uri().replace("file://", f"file://{host}", 1)
    return f"\x1b]8;;{url}\x1b\\{shown}\x1b]8;;\x1b\\"


def open_file(path: Path) -> str | None:
    """Open a file with the system's viewer, and do not wait for it to be closed.

    Returns:
        Why it could not be opened; None where nothing speaks against it.
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
    except subprocess.TimeoutExpired:  # it is the viewer itself, which stays
        return None
    except OSError as error:
        return error.strerror or type(error).__name__
    return f"{Path(command).name} ended with {code}" if code else None
