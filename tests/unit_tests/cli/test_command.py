"""What a user relies on: one line on stdout for each image, the rest on stderr, and exit codes that a script can act on."""

from __future__ import annotations

import base64
import fcntl
import inspect
import io
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import termios
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from langchain_cogview import CogViewImageGenerator, ImageFailure, ImageResult, cli, errors
from langchain_cogview.cli import output as shell
from langchain_cogview.concurrency import CancelToken
from langchain_cogview.images import store

KEY = "0123456789abcdef0123456789abcdef.0123456789abcdef"
SANDBOX_NOTE = "Sandbox: this is a placeholder, not a real image.\n"
SCRIPT = Path(sysconfig.get_path("scripts"), "cogview")
MODULE = (sys.executable, "-m", "langchain_cogview.cli")


def command(*arguments: str, folder: Path, by: tuple[str, ...] = MODULE, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own, piped."""
    options = {"text": True, "capture_output": True, **options}
    return subprocess.run([*by, *arguments], cwd=folder, timeout=300, check=False, **options)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cogview(*arguments: str, **options) -> Result:
    """The same command in this process."""
    result = CliRunner().invoke(cli.application(), list(arguments), **options)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.stderr
    return result


def generate(prompt: str, *arguments: str, **options) -> Result:
    return cogview(prompt, "--sandbox", *arguments, **options)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as decoded:
        decoded.load()
        return decoded.size


# --- an image, by the real command


def test_the_installed_command_writes_the_path_and_nothing_else_to_stdout(tmp_path):
    done = command("A cute little kitten", "-o", "kitten.png", "--sandbox", folder=tmp_path, by=(str(SCRIPT),))
    assert (done.returncode, done.stdout, done.stderr) == (0, "kitten.png\n", SANDBOX_NOTE)
    assert size_of(tmp_path / "kitten.png") == (1024, 1024)
    assert [item.name for item in tmp_path.iterdir()] == ["kitten.png"]


def test_json_is_the_only_thing_on_stdout_and_is_the_artifact(tmp_path):
    done = command("一只小猫 [[flagged]]", "-o", "猫.png", "--size", "16:9", "--sandbox", "--json", folder=tmp_path)
    assert done.returncode == 0
    result = ImageResult.from_artifact(json.loads(done.stdout))
    assert (result.path, result.prompt, result.size) == (Path("猫.png"), "一只小猫 [[flagged]]", "1344x768")
    assert size_of(tmp_path / "猫.png") == (1344, 768)
    assert done.stderr == f"Content filter: image (level 3, mildest)\n{SANDBOX_NOTE}"
    assert "一只小猫" in done.stdout


def link(path: Path) -> str:
    return f"\x1b]8;;file://{socket.gethostname()}{path}\x1b\\{path.name}\x1b]8;;\x1b\\"


@pytest.mark.parametrize(
    ("environment", "more"),
    [
        ({}, ()),
        pytest.param({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, (), marks=pytest.mark.heavy),
        ({"TERM": "xterm-kitty"}, ("--no-show",)),
    ],
)
def test_on_a_terminal_the_path_is_a_link(tmp_path, environment, more):
    arguments = (str(SCRIPT), "a kitten", "-o", "kitten.png", "--sandbox", *more)
    seen, code = on_a_terminal(*arguments, folder=tmp_path, **environment)
    assert (code, without_spinner(seen).startswith(f"{link(tmp_path / 'kitten.png')}  \x1b[2m1024x1024, ")) == (0, True)
    assert without_spinner(seen).count("\n") == 1


FACTS = r"1024x1024, \d+ kB, \d+\.\d s, sandbox placeholder, no cost"


def without_spinner(seen: str) -> str:
    return re.sub(r"\r[^\r\n]*\x1b\[K", "", seen)


@pytest.mark.parametrize("plain", [{"TERM": "dumb"}, {"TERM": "dumb", "NO_COLOR": "1"}])
def test_on_a_dumb_terminal_an_image_is_one_plain_line_with_its_size_time_and_cost(tmp_path, plain):
    seen, code = on_a_terminal(str(SCRIPT), "a kitten", "-o", "kitten.png", "--sandbox", folder=tmp_path, **plain)
    assert code == 0
    assert re.fullmatch(rf"kitten\.png  {FACTS}\n", seen)


def test_without_colours_the_line_of_an_image_has_only_the_link(tmp_path):
    arguments = (str(SCRIPT), "a kitten", "-o", "kitten.png", "--sandbox")
    seen, _ = on_a_terminal(*arguments, folder=tmp_path, NO_COLOR="1")
    assert re.fullmatch(rf"{re.escape(link(tmp_path / 'kitten.png'))}  {FACTS}\n", without_spinner(seen))


def test_while_an_image_is_made_the_terminal_shows_the_seconds(tmp_path):
    arguments = ("-o", "kitten.png", "--sandbox")
    seen, code = on_a_terminal(*MODULE, "a kitten [[slow:2]]", *arguments, folder=tmp_path, NO_COLOR="1")
    assert code == 0
    assert re.search(r"\r\S Making the image 1 s\x1b\[K", seen)
    assert re.search(r"\r\x1b\[K[^\r]*kitten\.png", seen)  # its line is empty before the result is written
    plain, _ = on_a_terminal(*MODULE, "a kitten [[slow:0.5]]", *arguments, folder=tmp_path, TERM="dumb")
    assert "Making" not in plain


ERRORS = [("a cat", "--size", "1000x1000", "--sandbox"), ("a cat", "--no-such-option", "--sandbox")]


@pytest.mark.parametrize("arguments", ERRORS)
def test_an_error_and_a_usage_error_have_the_same_mark_and_colour_on_a_terminal(tmp_path, arguments):
    coloured, code = on_a_terminal(*MODULE, *arguments, folder=tmp_path, COLUMNS="60")
    plain, _ = on_a_terminal(*MODULE, *arguments, folder=tmp_path, COLUMNS="60", NO_COLOR="1")
    assert code == 2
    assert coloured.startswith("\x1b[1;31m✗ Error:\x1b[0m ")
    assert plain == re.sub(r"\x1b\[[\d;]*m", "", coloured)
    first, *others = plain.splitlines()
    assert first.startswith("✗ Error: ")
    assert others
    assert all(line.startswith("  ") and len(line) <= 60 for line in others)


def test_a_terminal_without_these_characters_gets_an_ascii_mark(tmp_path):
    seen, _ = on_a_terminal(*MODULE, *ERRORS[0], folder=tmp_path, PYTHONIOENCODING="ascii", NO_COLOR="1")
    assert seen.startswith("x Error: ")


@pytest.mark.parametrize(
    ("environment", "form"),
    [
        ({"TERM": "xterm-kitty"}, r"(?:\x1b_G[a-zA-Z0-9=,]+;[A-Za-z0-9+/=]+\x1b\\)+\n"),
        ({"TERM_PROGRAM": "iTerm.app"}, r"\x1b\]1337;File=[a-zA-Z0-9=;]+:[A-Za-z0-9+/=]+\x07\n"),
    ],
)
def test_a_terminal_that_can_shows_each_image_above_its_link(tmp_path, environment, form):
    prompt = "\x1b]0;a hostile prompt\x07"
    arguments = (*MODULE, prompt, "-o", "kitten.png", "--n", "2", "--sandbox")
    seen, code = on_a_terminal(*arguments, folder=tmp_path, **environment)
    first, second = (re.escape(link(tmp_path / name)) for name in ("kitten.png", "kitten-2.png"))
    assert code == 0
    facts = rf"  \x1b\[2m{FACTS}\x1b\[0m\n"
    seen = without_spinner(seen)
    assert re.fullmatch(f"{form}{first}{facts}{form}{second}{facts}", seen)
    assert "hostile" not in seen
    encoded = "".join(re.findall(r"[;:]([A-Za-z0-9+/=]{100,})", seen.split("\n")[0]))
    assert base64.b64decode(encoded) == (tmp_path / "kitten.png").read_bytes()


def test_json_on_a_terminal_is_json(tmp_path):
    arguments = (*MODULE, "a kitten", "-o", "kitten.png", "--sandbox", "--json")
    seen, code = on_a_terminal(*arguments, folder=tmp_path, TERM="xterm-kitty")
    assert code == 0
    assert json.loads(without_spinner(seen).replace(SANDBOX_NOTE, ""))["images"][0]["path"] == "kitten.png"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("schema",), 0),
        pytest.param(("--version",), 0, marks=pytest.mark.heavy),
        pytest.param(("a cat", "--size", "1000x1000", "--sandbox"), 2, marks=pytest.mark.heavy),
        (("a cat [[content-filter]]", "--sandbox"), 3),
        pytest.param(("batch", "prompts.txt", "-o", "job", "--sandbox", "--dry-run"), 0, marks=pytest.mark.heavy),
        pytest.param(("batch", "nowhere.txt", "-o", "job", "--sandbox"), 2, marks=pytest.mark.heavy),
        (("doctor", "--offline", "--sandbox"), 0),
        pytest.param(("doctor", "--offline"), 2, marks=pytest.mark.heavy),
    ],
)
def test_every_command_says_the_same_piped_and_on_a_terminal(tmp_path, arguments, code):
    (tmp_path / "prompts.txt").write_text("a fox\na hare\n")
    piped = command(*arguments, folder=tmp_path)
    seen, seen_code = on_a_terminal(*MODULE, *arguments, folder=tmp_path)
    assert (piped.returncode, seen_code) == (code, code)
    assert ("Error: " in piped.stderr) == (piped.stdout == "")
    words = {text: sorted(normal(text).split()) for text in (piped.stdout + piped.stderr, seen)}
    assert len({str(item) for item in words.values()}) == 1


def normal(text: str) -> str:
    text = re.sub(r"\x1b\[[\d;]*m|\r[^\r\n]*\x1b\[K|[✗!] (?=Error:|Warning:)", "", text)
    return re.sub(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b|\b[0-9a-f]{32}\b|Expires=\d*|\d+\.\d+ s\b|created\W+\d+", "", text)


def test_help_is_plain_when_piped_and_may_be_styled_on_a_terminal(tmp_path):
    piped = command("--help", folder=tmp_path, env=dict(os.environ) | {"FORCE_COLOR": "1"})
    seen, code = on_a_terminal(*MODULE, "--help", folder=tmp_path)
    assert piped.returncode == code == 0
    assert piped.stderr == ""
    assert piped.stdout.isascii()
    assert "\x1b" not in piped.stdout
    assert "╭" in seen
    for text in (piped.stdout, seen):
        for number, meaning in cli.EXIT_CODES.items():
            assert f"{number}: {meaning}\n" in text.replace(" " * 2, "").replace(" \n", "\n")


def test_an_unknown_model_is_described_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cogview("a cat", "--model", "no-such-model", "--sandbox")
    assert result.exit_code == 2
    assert result.stderr.count("This version does not know the model 'no-such-model'") == 1
    assert "Check the model's name" in result.stderr


def test_a_missing_key_names_no_option_that_was_not_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (("a cat",), ("doctor", "--offline")):
        result = cogview(*arguments)
        assert "There is no API key for the region 'china'." in result.output
        assert "--region" not in result.output


def on_a_terminal(*arguments: str, folder: Path, **more: str) -> tuple[str, int]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    telling = {"TMUX", "STY", "TERM_PROGRAM", "KITTY_WINDOW_ID", "LC_TERMINAL"}
    environment = {name: value for name, value in os.environ.items() if name not in telling}
    environment |= {"TERM": "xterm", "COLUMNS": "120", **more}
    process = subprocess.Popen(
        arguments, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 65536):
            seen += piece
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    return seen.decode().replace("\r\n", "\n"), process.wait(300)


def test_ctrl_c_ends_with_130_and_says_that_it_may_cost(tmp_path):
    process = subprocess.Popen(
        [*MODULE, "a cat [[slow:60]]", "--model", "cogview-3", "--sandbox"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr.readline().startswith(
        "Warning: The provider's documentation no longer lists the model 'cogview-3'"
    )  # it is about to generate
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "Interrupted. A request that was already sent may have been charged.\n"


def test_without_typer_one_line_tells_what_to_install(tmp_path):
    blocked = "import sys; sys.modules['typer'] = None; from langchain_cogview.cli import main; sys.exit(main())"
    done = command("a kitten", folder=tmp_path, by=(sys.executable, "-c", blocked))
    line = 'The cogview command needs typer. Install it with: pip install "langchain-cogview[cli]"\n'
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_help_comes_without_loading_langchain(tmp_path):
    code = (
        "import sys; from langchain_cogview import cli; sys.argv[1:] = ['--help']\n"
        "try: cli.main()\n"
        "finally: sys.stderr.write(str(sorted({'langchain_core', 'pydantic', 'httpx'} & {*sys.modules})))"
    )
    assert command(folder=tmp_path, by=(sys.executable, "-c", code)).stderr == "[]"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout_does_not_lose_the_path(tmp_path):
    with open("/dev/full", "w") as full:
        done = command(
            "a kitten",
            "-o",
            "k.png",
            "--sandbox",
            folder=tmp_path,
            capture_output=False,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 1
    assert done.stderr == (
        f"Error: The standard output cannot be written (No space left on device). The output is:\nk.png\n{SANDBOX_NOTE}"
    )
    assert size_of(tmp_path / "k.png") == (1024, 1024)


def test_a_file_name_that_is_not_valid_text_is_written_and_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    done = command("a cafe", "-o", name, "--sandbox", folder=tmp_path, text=False)
    assert (done.returncode, done.stdout) == (0, b"caf\xe9.png\n")
    assert (tmp_path / name).exists()


# --- which command is meant


def test_help_is_a_word_that_shows_help_and_is_never_painted(folder):
    for arguments in (("help",), ("help", "batch")):
        result = cogview(*arguments)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == cogview(*arguments[1:], "--help").stdout
    assert cogview("version").stdout == cogview("--version").stdout
    assert cogview("help", "--sandbox").stdout == cogview("--help").stdout
    assert [*folder.iterdir()] == []


def test_help_shows_no_type_beside_an_option_that_takes_no_value(folder):
    for name in ("generate", "batch", "doctor"):
        page = cogview(name, "--help").stdout
        assert "--sandbox" in page
        assert "<bool>" not in page
    assert "<bool>" not in cogview("--help").stdout


def test_alone_it_prints_help(folder):
    alone, asked = cogview(), cogview("--help")
    assert alone.exit_code == 0
    assert alone.stdout == asked.stdout
    for option in ("--size", "--quality", "--model", "--n", "--user-id", "--region", "--base-url", "--timeout"):
        assert option in alone.stdout
    for word in ("--sandbox", "--json", "--output", "--version", "generate", "schema", "Exit codes"):
        assert word in alone.stdout


def test_version_is_the_installed_one(folder):
    from importlib.metadata import version

    result = cogview("--version")
    assert (result.exit_code, result.output) == (0, f"langchain-cogview {version('langchain-cogview')}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "schema"),
        ("--sandbox", "a cat"),
        ("--", "--a prompt that begins with dashes"),
        ("generate", "generate"),
    ],
)
def test_the_command_generate_may_be_left_out(folder, arguments):
    result = cogview(*arguments, env={"COGVIEW_BASE_URL": "sandbox:"})
    assert result.exit_code == 0
    assert size_of(folder / result.stdout.strip()) == (1024, 1024)


@pytest.mark.parametrize(("model", "size"), [("cogview-4-250304", "1024x1024"), ("glm-image", "1280x1280")])
def test_schema_is_the_tool_as_an_llm_gets_it_and_needs_no_key(folder, model, size):
    result = cogview("schema", "--model", model)
    assert (result.exit_code, result.stderr) == (0, "")
    tool = json.loads(result.stdout)
    assert tool["function"]["name"] == "cogview_generate_image"
    parameters = tool["function"]["parameters"]
    assert (sorted(parameters["properties"]), parameters["required"]) == (["prompt", "quality", "size"], ["prompt"])
    assert parameters["properties"]["size"]["enum"][0] == size
    assert [*folder.iterdir()] == []


def test_the_defaults_are_the_generators(folder):
    parameters = inspect.signature(cli.generate).parameters
    fields = CogViewImageGenerator.model_fields
    for name in ("model", "size", "quality", "n", "user_id", "region", "base_url", "timeout"):
        assert parameters[name].default == fields[name].default


# --- where the image goes


def test_without_o_the_name_is_made_of_the_id(folder):
    result = generate("a cat")
    (path,) = folder.iterdir()
    assert (result.stdout, path.suffix) == (f"{path.name}\n", ".png")
    assert path.name.startswith("cogview-")


def test_of_several_each_has_its_line_and_its_number(folder):
    result = generate("a cat", "-o", "cat", "--n", "3")
    assert result.stdout == "cat.png\ncat-2.png\ncat-3.png\n"
    assert {item.name for item in folder.iterdir()} == {"cat.png", "cat-2.png", "cat-3.png"}


def test_a_folder_is_made_and_filled(folder):
    result = generate("a cat", "-o", "images/", "--n", "2")
    assert len(result.stdout.splitlines()) == 2
    assert {Path(line) for line in result.stdout.splitlines()} == {*Path("images").iterdir()}
    assert generate("a cat", "-o", "deep/er/cat.png").stdout == "deep/er/cat.png\n"


@pytest.mark.parametrize(
    ("name", "form"), [("cat.jpg", "JPEG"), ("cat.JPEG", "JPEG"), ("cat.webp", "WEBP"), ("c.png", "PNG")]
)
def test_the_ending_of_the_file_chooses_the_format(folder, name, form):
    result = generate("a cat", "-o", name, "--json")
    assert (result.exit_code, result.stderr) == (0, SANDBOX_NOTE)
    with Image.open(name) as decoded:
        assert (decoded.format, decoded.size) == (form, (1024, 1024))
    image = ImageResult.from_artifact(json.loads(result.stdout)).image
    assert image.mime_type == f"image/{form.lower()}"
    assert image.read() == Path(name).read_bytes()


def test_a_file_extension_of_an_unknown_format_is_reported(folder):
    result = generate("a cat", "-o", "cat.gif")
    assert (result.exit_code, result.stdout) == (0, "cat.gif\n")
    assert "Warning: cat.gif holds a PNG image, which its ending does not say." in result.stderr


@pytest.mark.parametrize(
    "output", ["file.txt/cat.png", "file.txt/deep/cat.png", "/dev/null", "", "x" * 300, "~no-such-user/cat"]
)
def test_a_path_that_cannot_work_is_reported_before_anything_is_sent(folder, sandbox, output):
    Path("file.txt").write_text("a file, no folder")
    result = cogview("a cat", "--base-url", sandbox.base_url, "-o", output)
    assert sandbox.requests == []
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: The image cannot be written to ")
    assert result.stderr.endswith("\nNothing was sent. Choose another file or folder with -o.\n")
    assert [item.name for item in folder.iterdir()] == ["file.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission_to_write_is_reported_before_anything_is_sent(folder):
    Path("locked").mkdir(mode=0o500)
    assert generate("a cat", "-o", "locked/cat.png").exit_code == 2


def test_an_image_that_cannot_be_saved_where_asked_is_kept_in_the_current_folder(folder):
    Path("cat.png").mkdir()  # where the file called cat would go
    result = generate("a cat", "-o", "cat")
    kept = Path(result.stdout.strip())
    assert result.exit_code == 6
    assert result.stderr == (
        "Error: The image could not be written to cat.png: Is a directory.\n"
        f"The image was generated and saved as {kept}\n{SANDBOX_NOTE}"
    )
    assert (kept.parent, size_of(kept)) == (Path(), (1024, 1024))


def test_json_has_the_path_where_it_is_kept(folder):
    Path("cat.png").mkdir()
    result = generate("a cat", "-o", "cat", "--json", "--n", "2")
    first, second = (image["path"] for image in json.loads(result.stdout)["images"])
    assert result.exit_code == 6
    assert first.startswith("cogview-")
    assert second == "cat-2.png"
    assert size_of(first) == size_of(second) == (1024, 1024)


class FullDisk:
    """Writes nothing but below one folder, and records what it was asked for."""

    def __init__(self, allowed: Path | None) -> None:
        self.allowed = allowed
        self.asked: list[Path] = []
        self._write = store.write_whole

    def __call__(self, path: Path, content: bytes) -> None:
        self.asked.append(path)
        if self.allowed is None or self.allowed not in path.parents:
            raise OSError(28, "No space left on device")
        self._write(path, content)


def test_then_in_the_temporary_folder(folder, monkeypatch, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(store, "write_whole", FullDisk(allowed=temporary))
    result = generate("a cat", "-o", "cat.png")
    assert result.exit_code == 6
    assert (Path(result.stdout.strip()),) == (*temporary.iterdir(),)


def test_when_there_is_no_space_at_all_its_link_is_printed(folder, monkeypatch):
    disk = FullDisk(allowed=None)
    monkeypatch.setattr(store, "write_whole", disk)
    result = generate("a cat", "-o", "cat.png")
    assert (result.exit_code, result.stdout, len(disk.asked)) == (6, "", 3)
    assert "The image was generated, but could not be saved. Its URL (until " in result.stderr
    assert "https://sandbox.invalid/files/" in result.stderr


# --- the image's bytes on the standard output


def test_a_dash_writes_the_bytes_and_no_file(tmp_path):
    done = command("a cat", "-o", "-", "--sandbox", folder=tmp_path, text=False)
    assert (done.returncode, done.stderr.decode()) == (0, SANDBOX_NOTE)
    with Image.open(io.BytesIO(done.stdout)) as decoded:
        decoded.load()
        assert decoded.size == (1024, 1024)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("more", [("--n", "2"), ("--json",), ("--open",)])
def test_bytes_go_with_nothing_else_and_nothing_is_sent(folder, sandbox, more):
    result = cogview("a cat", "--base-url", sandbox.base_url, "-o", "-", *more)
    assert (result.exit_code, result.stdout, sandbox.requests) == (2, "", [])
    assert "-o - writes the bytes of one image and cannot be combined with --n, --json or --open." in result.stderr


def test_bytes_are_not_thrown_at_a_terminal(tmp_path):
    seen, code = on_a_terminal(*MODULE, "a cat", "-o", "-", "--sandbox", folder=tmp_path)
    assert code == 2
    assert "pipe it, or name a file." in " ".join(seen.replace("│", "").split())
    assert "PNG" not in seen


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_bytes_that_nobody_takes_are_kept_in_the_current_folder(tmp_path):
    with open("/dev/full", "w") as full:
        options = {"capture_output": False, "stdout": full, "stderr": subprocess.PIPE}
        done = command("a cat", "-o", "-", "--sandbox", folder=tmp_path, **options)
    (kept,) = tmp_path.iterdir()
    assert (done.returncode, size_of(kept)) == (6, (1024, 1024))
    assert done.stderr == (
        "Error: The standard output cannot be written (No space left on device).\n"
        f"The image was generated and saved as {kept.name}\n{SANDBOX_NOTE}"
    )


def test_a_pipe_that_is_closed_early_keeps_the_image_too(tmp_path):
    ours, theirs = os.pipe()
    os.close(ours)
    options = {"capture_output": False, "stdout": theirs, "stderr": subprocess.PIPE}
    done = command("a cat", "-o", "-", "--sandbox", folder=tmp_path, **options)
    os.close(theirs)
    (kept,) = tmp_path.iterdir()
    assert (done.returncode, size_of(kept)) == (6, (1024, 1024))
    assert "Traceback" not in done.stderr


def test_bytes_that_cannot_be_fetched_are_6_and_the_link_is_printed(tmp_path):
    done = command("a cat [[expired-url]]", "-o", "-", "--sandbox", folder=tmp_path)
    assert (done.returncode, done.stdout) == (6, "")
    assert "https://sandbox.invalid/files/" in done.stderr


# --- the system's viewer


def with_viewer(folder: Path, ends_with: int) -> dict[str, str]:
    viewer = folder / "bin" / "xdg-open"
    viewer.parent.mkdir()
    viewer.write_text(f'#!/bin/sh\nprintf "%s\\n" "$1" >> "{folder}/opened"\nexit {ends_with}\n')
    viewer.chmod(0o755)
    return dict(os.environ) | {"PATH": f"{viewer.parent}:/usr/bin:/bin"}


@pytest.mark.skipif(sys.platform != "linux", reason="xdg-open is Linux's")
def test_open_opens_every_saved_file(tmp_path):
    arguments = ("a cat", "-o", "cat.png", "--n", "2", "--open", "--sandbox")
    done = command(*arguments, folder=tmp_path, env=with_viewer(tmp_path, 0))
    assert (done.returncode, done.stdout, done.stderr) == (0, "cat.png\ncat-2.png\n", SANDBOX_NOTE)
    assert (tmp_path / "opened").read_text().split() == [str(tmp_path / "cat.png"), str(tmp_path / "cat-2.png")]


@pytest.mark.skipif(sys.platform != "linux", reason="xdg-open is Linux's")
def test_a_viewer_that_fails_is_a_warning(tmp_path):
    done = command("a cat", "-o", "cat.png", "--open", "--sandbox", folder=tmp_path, env=with_viewer(tmp_path, 3))
    assert (done.returncode, done.stdout) == (0, "cat.png\n")
    assert done.stderr == f"Warning: cat.png could not be opened: xdg-open ended with 3.\n{SANDBOX_NOTE}"


# --- completion by the shell


@pytest.mark.parametrize(
    ("words", "number", "expected"),
    [
        ("cogview ", 1, ["generate", "schema", "batch", "work", "merge", "doctor", "mcp"]),
        ("cogview do", 1, ["doctor"]),
        ("cogview --si", 1, ["--size"]),
        ("cogview 'a cat' --qua", 2, ["--quality"]),
        ("cogview generate 'a cat' --no-sh", 3, ["--no-show"]),
        ("cogview doctor --off", 2, ["--offline"]),
        ("cogview batch prompts.txt --dry", 3, ["--dry-run"]),
        ("cogview 'a cat' --model cogview-4", 3, ["cogview-4-250304", "cogview-4"]),
        ("cogview generate 'a cat' --model glm-image --size 15", 6, ["1568x1056"]),
        ("cogview 'a cat' --size p", 3, ["portrait"]),
        ("cogview batch p.txt --model glm-image --quality ", 6, ["hd"]),
        ("cogview doctor --region ", 3, ["china", "international"]),
    ],
)
def test_the_shell_completes_commands_and_options_with_and_without_generate(tmp_path, words, number, expected):
    asked = {"_COGVIEW_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
    done = command(folder=tmp_path, by=(str(SCRIPT),), env=dict(os.environ) | asked)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, expected, "")


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_completion_is_shown_for_each_shell(tmp_path, shell_name):
    done = command(
        folder=tmp_path, by=(str(SCRIPT),), env=dict(os.environ) | {"_COGVIEW_COMPLETE": f"source_{shell_name}"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "_COGVIEW_COMPLETE=complete_" in done.stdout


def test_the_options_for_completion_are_no_prompt(tmp_path):
    help_page = command("--help", folder=tmp_path).stdout
    assert "--install-completion" in help_page
    done = command("--show-completion", folder=tmp_path, by=(str(SCRIPT),))
    assert "was not made" not in done.stderr
    assert "API key" not in done.stderr


# --- exit codes

FAULTS = [
    ("[[content-filter]]", 3, "Error: The content filter blocked the prompt at level 2 (moderate).\n"),
    ("[[balance]]", 4, "Error: The account has no balance"),
    ("[[auth]]", 4, "Error: The API key was refused.\n"),
    ("[[malformed]]", 7, "Error: The service's reply could not be understood;"),
    ("[[server-error]]", 7, "Error: The request was sent, but no answer says"),
]


@pytest.mark.parametrize(("trigger", "code", "start"), FAULTS)
def test_each_failure_has_its_exit_code_its_hint_and_its_request_id(folder, trigger, code, start):
    result = generate(f"a cat {trigger}")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(start)
    _, hint, *_, last = result.stderr.splitlines()
    assert len(hint) > 20
    assert last.startswith("Request id: ")
    assert len(last) == 48
    assert [*folder.iterdir()] == []


@pytest.fixture
def no_waits(monkeypatch):
    """Between two attempts of a request, and between two of a download."""
    monkeypatch.setattr(CancelToken, "wait", lambda token, seconds=None: token.is_set())
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_busy_is_5_after_all_attempts(folder, no_waits):
    for trigger, message in (("busy", "The model is overloaded"), ("unavailable", "The service is unavailable")):
        result = generate(f"a cat [[{trigger}]]")
        assert (result.exit_code, result.stdout) == (5, "")
        assert result.stderr.startswith(f"Error: {message}")


def test_time_that_ends_after_the_request_was_sent_is_7(folder):
    result = generate("a cat [[slow:5]]", "--timeout", "0.2")
    assert (result.exit_code, result.stdout) == (7, "")
    assert "the time limit of 0.2 s passed before an answer came" in result.stderr
    assert "Check the provider's console before you run it again: that can pay twice.\n" in result.stderr


def test_nobody_at_the_address_is_5_and_shows_no_key(folder, no_waits):
    result = cogview("a cat", "--base-url", "http://127.0.0.1:9", env={"ZHIPUAI_API_KEY": KEY})
    assert result.exit_code == 5
    assert result.stderr.startswith("Error: The service could not be reached; nothing was sent.\n")
    assert KEY not in result.output


def test_an_image_whose_bytes_cannot_be_fetched_is_6_and_its_link_is_printed(folder):
    result = generate("a cat [[expired-url]]", "-o", "cat.png")
    assert (result.exit_code, result.stdout) == (6, "")
    assert "https://sandbox.invalid/files/" in result.stderr
    assert "Warning: The image's link has expired or is refused" in result.stderr
    as_json = generate("a cat [[expired-url]]", "-o", "cat.png", "--json")
    (image,) = json.loads(as_json.stdout)["images"]
    assert (as_json.exit_code, image["path"]) == (6, None)
    assert image["url"].startswith("https://sandbox.invalid/files/")
    assert not Path("cat.png").exists()


@pytest.mark.parametrize(
    ("faults", "code", "words"),
    [
        (["balance"], 4, ["The account has no balance"]),
        (["balance", "malformed"], 7, ["The account has no balance", "The service's reply could not be understood"]),
    ],
)
def test_images_that_were_made_are_kept_when_others_fail_and_the_highest_code_counts(
    folder, sandbox, faults, code, words
):
    for fault in faults:
        sandbox.fail_next(fault)
    result = cogview("a cat", "-o", "cat.png", "--n", "3", "--base-url", sandbox.base_url)
    lines = ["cat.png", "cat-2.png", "cat-3.png"][: 3 - len(faults)]
    assert (result.exit_code, result.stdout.splitlines()) == (code, lines)
    assert {item.name for item in folder.iterdir()} == {*lines}
    assert result.stderr.count(" of 3 was not generated. ") == result.stderr.count("Request id: ") == len(faults)
    for text in words:
        assert f" of 3 was not generated. {text}" in result.stderr


def test_an_error_that_is_not_ours_among_several_is_1(folder, sandbox, monkeypatch):
    made = CogViewImageGenerator(base_url=sandbox.base_url).invoke("a cat")
    failed = made.model_copy(update={"failures": (ImageFailure.of(RuntimeError("a surprise"), 1),)})
    monkeypatch.setattr(CogViewImageGenerator, "invoke", lambda *_: failed)
    result = generate("a cat", "-o", "cat.png", "--n", "2")
    assert (result.exit_code, result.stdout) == (1, "cat.png\n")
    assert "Error: Image 2 of 2 was not generated. a surprise" in result.stderr


def test_every_error_has_its_exit_code():
    classes = [kind for name, kind in vars(errors).items() if name.startswith("CogView") and name != "CogViewError"]
    codes = {kind: shell.exit_code(kind) for kind in classes}
    assert {*codes.values()} == {2, 3, 4, 5, 6, 7, 130}
    for kind in classes:  # none is milder than what it is a kind of
        assert codes.get(kind.__base__, codes[kind]) == codes[kind]
    assert codes[errors.CogViewBudgetError] == codes[errors.CogViewNotFoundError] == 2
    assert codes[errors.CogViewTaskFailedError] == codes[errors.CogViewBusyError] == 5
    assert codes[errors.CogViewTaskUnfinishedError] == 7
    assert shell.exit_code(ValueError) == shell.exit_code(None) == 1


# --- wrong usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--size", "1000x1000"), "size: The size '1000x1000' is not legal for cogview-4-250304"),
        (("--quality", "purple"), "quality must be 'standard' or 'hd'"),
        (("--model", "glm-image", "--quality", "standard"), "glm-image accepts only quality 'hd'."),
        (("--n", "0"), "n must be at least 1"),
        (("--n", "two"), "Invalid value for '--n'"),
        (("--user-id", "abcde"), "user_id must have at least 6 characters"),
        (("--region", "mars"), "region must be 'china' or 'international'"),
        (("--timeout", "0"), "timeout: A time limit is a number of seconds"),
        (("--seed", "1"), "No such option: --seed"),
        (("kitten",), 'The prompt is one argument. Put it in quotes: cogview "a cat kitten"'),
        (("--base-url", "http://127.0.0.1:9"), "--base-url needs a URL and cannot be combined with --sandbox."),
    ],
)
def test_a_wrong_argument_is_2_with_its_name_and_the_rule(folder, arguments, words):
    result = generate("a cat", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr
    assert words in result.stderr
    assert not any(foreign in result.stderr for foreign in ("pydantic", "input_value", "\x1b", "╭"))
    assert [*folder.iterdir()] == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("ftp://example.com", "The base URL is not an http or https URL."),
        ("", "--base-url needs a URL"),
        ("https://api.z.ai/api/coding/paas/v4", "The base URL is the coding plan's"),
    ],
)
def test_a_wrong_address_is_2(folder, value, words):
    result = cogview("a cat", "--base-url", value, env={"ZHIPUAI_API_KEY": KEY, "ZAI_API_KEY": KEY})
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert KEY not in result.stderr


def test_a_missing_key_names_both_variables_both_consoles_and_the_sandbox(folder):
    result = cogview("a cat")
    assert (result.exit_code, result.stdout) == (2, "")
    for word in ("ZHIPUAI_API_KEY", "ZAI_API_KEY", "open.bigmodel.cn", "https://z.ai", "--sandbox"):
        assert word in result.stderr
    assert not any(python in result.stderr for python in ("base_url", "api_key", "region="))


@pytest.mark.parametrize("key", [f"Bearer {KEY}", f'"{KEY}"', f"{KEY[:20]} {KEY[20:]}", f"{KEY}\n"])
def test_a_key_of_wrong_form_is_2_and_is_not_shown(folder, key):
    result = cogview("a cat", env={"ZHIPUAI_API_KEY": key})
    assert (result.exit_code, result.stdout) == (2, "")
    assert "The API key in ZHIPUAI_API_KEY" in result.stderr
    assert KEY[:10] not in result.output


def test_hints_speak_of_options_not_of_python(folder, no_waits):
    for trigger in ("auth", "busy", "malformed", "expired-url", "rate-limit:9"):
        # A wait of 9 seconds fits into no time limit of 8: the request is not sent again.
        text = generate(f"a cat [[{trigger}]]", *(("--timeout", "8") if "rate" in trigger else ())).stderr
        assert "Error: " in text or "Warning: " in text
        assert not any(word in text for word in ("region=", "max_", "retry_unknown", "output_dir", "save()", "()")), (
            text
        )


def test_an_unknown_model_is_one_plain_line(folder):
    result = cogview("schema", "--model", "glm-imag")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("Warning: This version does not know the model 'glm-imag':")
    assert "Did you mean 'glm-image'?" in line
    unknown = generate("a cat", "--model", "cogview-3", "-o", "cat.png")
    assert unknown.stderr.count("Warning: ") == 1


# --- the prompt on the standard input


def test_a_dash_reads_the_prompt_from_stdin(folder):
    result = generate("-", "--json", input="a cat\non a mat\n")
    assert json.loads(result.stdout)["prompt"] == "a cat\non a mat"


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe"])
def test_no_prompt_on_stdin_is_2(folder, content, monkeypatch):
    monkeypatch.setattr(cli.sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))
    with pytest.raises((SystemExit, cli.typer.Exit, cli.typer.BadParameter)) as caught:
        cli.generate("-", sandbox=True)
    assert getattr(caught.value, "exit_code", 2) == 2
    assert [*folder.iterdir()] == []


def test_a_blank_prompt_is_2(folder):
    for prompt in ("", "  "):
        result = generate(prompt)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: Nothing was sent: prompt: ")


@pytest.mark.parametrize(("word", "meant"), [("doctr", "doctor"), ("schemas", "schema"), ("btach", "batch")])
def test_a_mistyped_command_is_not_painted(tmp_path, word, meant):
    done = command(word, "--sandbox", folder=tmp_path)
    assert done.returncode == 2
    assert f"Did you mean the command {meant}?" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_word_that_looks_like_a_command_is_a_prompt_after_generate(tmp_path):
    assert command("generate", "doctr", "-o", "x.png", "--sandbox", folder=tmp_path).returncode == 0
