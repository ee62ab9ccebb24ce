"""A terminal shows the image where it can, a link where it cannot, and nothing foreign gets into an escape sequence."""

import base64
import io
import re
import socket
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from langchain_cogview.cli.output import Terminal, detect_terminal, inline_image, open_file, path_link


def encoded_image(form="PNG", size=(64, 32)) -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(out, form)
    return out.getvalue()


PNG = encoded_image()
AVAILABLE = (120, 40)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty"}, Terminal.KITTY),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, Terminal.KITTY),
        ({"TERM": "xterm-ghostty"}, Terminal.KITTY),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, Terminal.KITTY),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, Terminal.ITERM2),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, Terminal.ITERM2),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, Terminal.ITERM2),
        ({"TERM": "xterm-256color"}, Terminal.LINK),
        # A terminal inherits the variables of the one that it was started in.
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode", "KITTY_WINDOW_ID": "1"}, Terminal.LINK),
        ({"TERM": "tmux-256color", "TMUX": "/tmp/tmux", "KITTY_WINDOW_ID": "1"}, Terminal.LINK),
        ({"TERM": "screen-256color", "LC_TERMINAL": "iTerm2"}, Terminal.LINK),
        ({"TERM": "screen", "STY": "1.pts", "TERM_PROGRAM": "iTerm.app"}, Terminal.PLAIN),
        ({"TERM": "dumb", "TERM_PROGRAM": "iTerm.app"}, Terminal.PLAIN),
        ({"TERM": "linux"}, Terminal.PLAIN),
        ({}, Terminal.PLAIN),
    ],
)
def test_the_environment_tells_what_the_terminal_shows(environment, expected):
    assert detect_terminal(environment, is_terminal=True) is expected
    assert detect_terminal(environment, is_terminal=False) is Terminal.PLAIN


def kitty_pieces(text):
    assert text.endswith("\n")
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in pieces) == text[:-1]
    return [dict(pair.split("=") for pair in keys.split(",")) for keys, _ in pieces], [data for _, data in pieces]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_kitty_gets_png_in_chunks_and_answers_nothing(form):
    content = encoded_image(form, (200, 100))
    keys, data = kitty_pieces(inline_image(Terminal.KITTY, content, (200, 100), AVAILABLE))
    assert keys[0] == {"a": "T", "f": "100", "q": "2", "c": "60", "m": "1"}
    assert [item for item in keys[1:-1] if item != {"m": "1"}] == []
    assert keys[-1] == {"m": "0"}
    assert all(len(item) == 4096 for item in data[:-1])
    assert 0 < len(data[-1]) <= 4096
    sent = base64.b64decode("".join(data))
    assert sent.startswith(b"\x89PNG")
    assert sent == content or form != "PNG"
    with Image.open(io.BytesIO(sent)) as shown, Image.open(io.BytesIO(content)) as original:
        assert shown.convert("RGB").tobytes() == original.convert("RGB").tobytes()


def test_an_image_of_one_chunk_is_the_last(monkeypatch):
    keys, data = kitty_pieces(inline_image(Terminal.KITTY, b"\x89PNG\r\n\x1a\n" + bytes(30), (64, 32), AVAILABLE))
    assert (len(data), keys[0]["m"]) == (1, "0")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_iterm2_gets_the_bytes_as_they_are(form):
    content = encoded_image(form)
    text = inline_image(Terminal.ITERM2, content, (64, 32), AVAILABLE)
    head, _, rest = text.partition(":")
    assert head == f"\x1b]1337;File=inline=1;size={len(content)};width=60;preserveAspectRatio=1"
    assert rest.endswith("\x07\n")
    assert base64.b64decode(rest[:-2], validate=True) == content


@pytest.mark.parametrize(
    ("size", "available", "columns"),
    [((1024, 1024), (80, 24), 40), ((768, 1344), (80, 24), 22), ((1344, 768), (40, 50), 40), ((512, 2048), (80, 2), 2)],
)
def test_an_image_fits_on_the_screen(size, available, columns):
    assert f";width={columns};" in inline_image(Terminal.ITERM2, PNG, size, available)
    assert f",c={columns}," in inline_image(Terminal.KITTY, PNG, size, available)


def test_what_cannot_be_shown_is_left_to_the_link(monkeypatch):
    for terminal in (Terminal.PLAIN, Terminal.LINK):
        assert inline_image(terminal, PNG, (64, 32), AVAILABLE) == ""
    assert inline_image(Terminal.ITERM2, PNG + bytes(9 << 20), (64, 32), AVAILABLE) == ""
    assert inline_image(Terminal.KITTY, b"\xff\xd8\xff\xe0 no JPEG after all", (64, 32), AVAILABLE) == ""
    jpeg = encoded_image("JPEG")
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    assert inline_image(Terminal.KITTY, jpeg, (64, 32), AVAILABLE) == ""
    assert inline_image(Terminal.KITTY, PNG, (64, 32), AVAILABLE) != ""


def test_a_path_is_a_link_to_the_file_on_this_host(tmp_path):
    path = tmp_path / "a b;猫.png"
    match = re.fullmatch(r"\x1b\]8;;([^\x1b]*)\x1b\\([^\x1b]*)\x1b\]8;;\x1b\\", path_link(Terminal.LINK, path))
    url = urlsplit(match[1])
    assert match[1].isascii()
    assert (url.scheme, unquote(url.netloc), unquote(url.path)) == ("file", socket.gethostname(), str(path))
    assert match[2] == str(path)
    assert path_link(Terminal.PLAIN, path) == str(path)


@pytest.mark.parametrize(
    "evil", ["\x1b]8;;https://evil.invalid\x1b\\", "\x07", "\x9c\x9b31m", "a\nb", "\x1b_Ga=T\x1b\\"]
)
def test_a_files_name_cannot_end_a_sequence_or_begin_one(evil):
    text = path_link(Terminal.KITTY, Path(f"x{evil}.png"))
    assert text.count("\x1b") == 4
    assert not re.search(r"[\x00-\x1a\x1c-\x1f\x7f-\x9f]", text)


@pytest.fixture
def viewer(tmp_path, monkeypatch):
    """The system's viewer, which keeps what it is asked to open and then behaves as the test asks."""

    def make(then):
        command = tmp_path / "xdg-open"
        command.write_text(f'#!/bin/sh\necho noise\nprintf %s "$1" > "{tmp_path}/opened"\n{then}\n')
        command.chmod(0o755)
        return tmp_path / "opened"

    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return make


def test_the_viewer_gets_the_whole_path_and_says_nothing(viewer, tmp_path, monkeypatch, capfd):
    opened = viewer("exit 0")
    monkeypatch.chdir(tmp_path)
    assert open_file(Path("-猫.png")) is None
    assert opened.read_text() == str(tmp_path / "-猫.png")
    assert capfd.readouterr() == ("", "")


def test_a_viewer_that_cannot_is_a_reason(viewer, tmp_path, monkeypatch):
    viewer("exit 4")
    assert open_file(Path("cat.png")) == "xdg-open ended with 4"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert open_file(Path("cat.png")) == "there is no xdg-open"


def test_a_viewer_that_stays_is_not_waited_for(viewer, monkeypatch):
    started = []

    class Kept(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Kept)
    monkeypatch.setattr("langchain_cogview.cli.output._VIEWER_SECONDS", 0.01)
    viewer("exec sleep 60")
    assert open_file(Path("cat.png")) is None
    assert started[0].poll() is None
    started[0].kill()
    started[0].wait()
