"""What a user relies on: no text of others moves the cursor, hides a line or turns the direction on their terminal."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langchain_cogview import ProgressCallbackHandler, Sandbox, cli, plan_job, run_job
from langchain_cogview.text import printable, visible
from tests.unit_tests.cli.test_command import MODULE, on_a_terminal

EVIL = "\x1b[2J\x1b]0;owned\x07\x08\x7f\x9b31m\r\u202e\u2066\u2069\u200e\u200f\u061c\u2028\u2029\ud800\udc80\x00\ufeff\u200d"
HOSTILE = st.text(alphabet=st.one_of(st.sampled_from(EVIL), st.sampled_from("ab猫 \t.-=")), min_size=1, max_size=12)


class Terminal(io.StringIO):
    """A terminal, as far as a program can tell."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def on_terminal(*arguments: str, stdin: str = "") -> tuple[str, str, object]:
    """What the command shows on a terminal, and its exit code."""
    out, err, code = Terminal(), Terminal(), None
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.chdir(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        patch.setenv("TERM", "dumb")
        patch.setenv("NO_COLOR", "1")
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode("utf-8", "replace"))))
        try:
            cli.application()(list(arguments), prog_name="cogview")
        except SystemExit as end:
            code = end.code
    return out.getvalue(), err.getvalue(), code


def clean(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def odd(text: str) -> list[str]:
    return [c for c in text if not (c.isprintable() or c == "\n")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shell")


@given(HOSTILE)
def test_visible_text_has_printable_characters_and_line_breaks_alone(text):
    assert odd(visible(text)) == []
    assert printable(text).isprintable()
    assert visible("猫 and\na cat") == "猫 and\na cat"


OPTIONS = st.sampled_from(
    ["--size", "--quality", "--model", "--user-id", "--region", "--base-url", "--n", "--timeout", "--output", "--odd"]
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=HOSTILE, option=OPTIONS, command=st.sampled_from(["generate", "batch", "doctor", "schema", ""]), data=st.data()
)
def test_no_argument_reaches_the_terminal_as_it_is(folder, text, option, command, data):
    text = text.replace("\0", "")
    (folder / "p.txt").write_text("a cat\n")
    more = {"generate": [text], "batch": [str(folder / "p.txt"), "-o", str(folder / "out")], "": [text]}.get(
        command, []
    )
    more += data.draw(st.sampled_from([[], ["--json"], ["--sandbox"], ["--sandbox", "--json"], ["--dry-run"]]))
    if option == "--base-url" or "--sandbox" not in more:
        more = [*more, "--offline"] if command == "doctor" else [*more, "--sandbox"]
    value = str(folder / text.replace("/", "")) if option == "--output" else text
    out, err, _ = on_terminal(*filter(None, (command, *more, f"{option}={value}")))
    assert odd(out + err) == []
    shutil.rmtree(folder)
    folder.mkdir()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=HOSTILE,
    column=HOSTILE,
    trigger=st.sampled_from(["", "[[content-filter]]", "[[malformed]]", "[[expired]]", "[[balance]]"]),
    form=st.sampled_from(["txt", "csv", "tsv", "jsonl"]),
    options=st.sampled_from([(), ("--json",), ("--dry-run",), ("--dry-run", "--json"), ("--skip-bad",)]),
)
def test_no_prompt_and_no_column_reaches_the_terminal_as_it_is(  # noqa: PLR0917  what is shown
    folder, prompt, column, trigger, form, options
):
    rows = {
        "txt": f"{prompt} {trigger}\n",
        "jsonl": json.dumps({"prompt": f"a {prompt} {trigger}", column: prompt}) + "\n",
        "csv": f'prompt,"{column}"\n"a {prompt} {trigger}","{prompt}"\n',
        "tsv": f"prompt\t{column}\na {prompt} {trigger}\t{prompt}\n",
    }
    path = folder / f"p.{form}"
    path.write_bytes(rows[form].encode("utf-8", "surrogatepass"))
    arguments = ("batch", str(path), "-o", str(folder / "out"), "--sandbox", "--size", "512x512", "--timeout", "5")
    for _ in range(2):
        out, err, _ = on_terminal(*arguments, *options)
        assert odd(out + err) == []
        assert "--json" not in options or out.isascii()
    shutil.rmtree(folder)
    folder.mkdir()


def test_json_is_whole_in_a_pipe_and_ascii_on_a_terminal(tmp_path):
    (tmp_path / "p.txt").write_text("猫\x7f\n")
    out, _, code = on_terminal("a 猫\x7f\u202e", "-o", str(tmp_path / "a.png"), "--sandbox", "--json")
    assert code == 0
    assert out.replace("\n", "").isprintable()
    assert out.isascii()
    assert json.loads(out)["prompt"] == "a 猫\x7f\u202e"


def test_a_foreign_folder_cannot_write_to_the_terminal(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\nb [[malformed]]\nc [[content-filter]]\n")
    out = tmp_path / "out"
    arguments = ("batch", str(tmp_path / "p.txt"), "-o", str(out), "--sandbox", "--size", "512x512")
    on_terminal(*arguments)
    text = EVIL.replace("\ud800", "").replace("\udc80", "")
    for name, fields in (("attempts.jsonl", ("prompt",)), ("manifest.jsonl", ("message", "currency"))):
        lines = []
        for line in map(json.loads, (out / name).read_text().splitlines()):
            for values in (line, *line.get("failures", ())):
                values.update({field: text[:16] for field in fields if field in values})
            lines.append(json.dumps(line) + "\n")
        (out / name).write_text("".join(lines))
    for more in ((), ("--json",), ("--dry-run",), ("--dry-run", "--json"), ("--quality", "hd")):
        shown, err, _ = on_terminal(*arguments, *more)
        assert odd(shown + err) == []
    (out / "job.json").write_text(json.dumps({"type": text, "version": 1, "settings": {"model": text}}))
    shown, err, code = on_terminal(*arguments)
    assert (odd(shown + err), code) == ([], 2)


def test_plans_reports_and_the_bar_are_clean_for_scripts_too(tmp_path, capfd):
    pytest.importorskip("tqdm")
    text = EVIL.replace("\ud800", "").replace("\udc80", "").replace("\0", "")
    with Sandbox() as sandbox:
        prompts = [{"prompt": f"a {text} [[malformed]]", text: 1}, {"prompt": f"b {text}", "size": text}]
        plan = plan_job(prompts, tmp_path / "out", base_url=sandbox.base_url)
        with ProgressCallbackHandler(label=text, show=True) as bar:
            report = run_job(
                prompts,
                tmp_path / "out",
                base_url=sandbox.base_url,
                skip_bad=True,
                progress=False,
                config={"callbacks": [bar]},
            )
    assert odd(f"{plan}{report}") == []
    assert odd(capfd.readouterr().err.replace("\r", "")) == []


def test_what_is_logged_is_a_clean_line_of_the_command(tmp_path):
    from langchain_cogview.cli.output import run_command

    err = Terminal()

    def work() -> int:
        logging.getLogger("langchain_cogview.jobs.run").warning("It is %s", EVIL)
        return 0

    with contextlib.redirect_stderr(err), pytest.raises(cli.typer.Exit):
        run_command(work)
    text = err.getvalue().replace("\x1b[33m", "").replace("\x1b[0m", "")
    assert text.startswith("! Warning: It is ")
    assert odd(text) == []


def test_a_warning_is_written_once_whoever_gives_it(capsys):
    from langchain_cogview.cli.output import print_warning, run_command

    def work() -> int:
        for _ in range(2):
            logging.getLogger("langchain_cogview.jobs.run").warning("The disk is full.")
            warnings.warn("The disk is full.", stacklevel=1)
            print_warning("The disk is full.")
        return 0

    for _ in range(2):  # and again in the next command
        with pytest.raises(cli.typer.Exit):
            run_command(work)
    assert capsys.readouterr().err == "Warning: The disk is full.\n" * 2


def test_text_is_broken_between_words_and_a_url_is_left_whole():
    from langchain_cogview.cli.style import columns_of, wrapped

    url = "https://open.bigmodel.cn/api/paas/v4/images/generations/of/a/long/path"
    text = wrapped(f"- [ok] API: the base URL is {url} and it answers.\nA second line", 40)
    assert text.splitlines() == ["- [ok] API: the base URL is", f"  {url}", "  and it answers.", "A second line"]
    for line in wrapped("一只可爱的小猫坐在窗台上看着外面的雨" * 5, 30).splitlines():
        assert columns_of(line) <= 30


def test_on_a_real_terminal_only_our_own_sequences_are_written(tmp_path):
    (tmp_path / "p.txt").write_text("a \x1b[2J\u202e cat\n")
    name = "\x1b[2J\x07out"
    seen, code = on_a_terminal(*MODULE, "batch", "p.txt", "-o", name, "--sandbox", "--no-progress", folder=tmp_path)
    assert code == 0
    assert odd(seen) == []
    assert [item for item in os.listdir(tmp_path) if item == name]
