"""What a user relies on: `cogview batch` says what it will do, does it, and ends with a code that a script can act on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from langchain_cogview import cli
from langchain_cogview.sandbox import Sandbox, SandboxServer
from tests.unit_tests.cli.test_command import KEY, MODULE, cogview, command, on_a_terminal

PROMPTS = "a cat\n\na dog\nx [[content-filter]]\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text(PROMPTS)
    return tmp_path


@pytest.fixture
def batch(folder, sandbox):
    def run(*arguments: str, file: str = "p.txt", **options):
        return cogview(
            "batch", file, "-o", "out", "--base-url", sandbox.base_url, "--size", "640x512", *arguments, **options
        )

    return run


def manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "manifest.jsonl").read_text().splitlines()]


def test_stdout_is_the_page_alone_and_stderr_says_what_is_done_and_what_came_of_it(batch, folder):
    result = batch()
    assert (result.exit_code, Path(result.stdout.strip())) == (3, folder / "out" / "index.html")
    plan, to_generate, blocked, summary = result.stderr.splitlines()
    assert plan == "3 lines with a prompt, 1 blank line skipped."
    assert to_generate == "To generate: 3 prompts, 3 images, list price 0.18 CNY, nothing is charged."
    assert blocked.startswith("Line 4 was not generated: 'x [[content-filter]]'. The content filter blocked the prompt")
    assert summary.startswith("2 prompts made, 1 blocked; list price 0.12 CNY, nothing is charged; ")
    assert len(manifest(folder)) == 3
    assert {item.suffix for item in (folder / "out").iterdir()} == {".png", ".jsonl", ".json", ".html"}


def test_all_made_is_0_and_again_says_that_it_was_done(batch, folder, sandbox):
    (folder / "p.txt").write_text("a cat\na dog\n")
    assert batch().exit_code == 0
    again = batch()
    assert again.exit_code == 0
    assert "2 lines with a prompt; 2 done before.\nTo generate: 0 prompts" in again.stderr
    assert "0 prompts made, 2 made before; nothing is charged;" in again.stderr
    assert sandbox.images_made == 2


def test_json_is_the_only_thing_on_stdout(batch, folder):
    result = batch("--json")
    report = json.loads(result.stdout)
    assert (report["made"], report["blocked"], report["errors"]) == (2, 1, {"CogViewContentFilterError": 1})
    assert (report["cost"], report["list_price"], report["sandbox"]) == ({"CNY": "0"}, {"CNY": "0.12"}, True)
    assert report["stopped"] is None
    assert Path(report["manifest"]) == folder / "out" / "manifest.jsonl"


def test_a_job_in_the_sandbox_says_in_one_wording_that_nothing_is_charged(folder):
    arguments = ("batch", "p.txt", "-o", "out", "--sandbox", "--size", "640x512")
    planned = cogview(*arguments, "--dry-run")
    assert planned.stdout.endswith("To generate: 3 prompts, 3 images, list price 0.18 CNY, nothing is charged.\n")
    result = cogview(*arguments)
    assert "3 images, list price 0.18 CNY, nothing is charged.\n" in result.stderr
    assert "2 prompts made, 1 blocked; list price 0.12 CNY, nothing is charged; " in result.stderr
    assert "nothing is charged; " in cogview(*arguments).stderr
    page = (folder / "out" / "index.html").read_text()
    assert "<p>2 images · 1 blocked · nothing is charged</p>" in page
    assert "<p>3 prompts · written 20" in page


def test_a_line_with_a_number_sign_is_a_comment_which_is_counted(folder):
    (folder / "p.txt").write_text("# animals\na fox\n  # more\n\\#hashtag art\n\na #2 pencil\n")
    arguments = ("batch", "p.txt", "-o", "out", "--sandbox", "--size", "640x512")
    expected = "3 lines with a prompt, 1 blank line and 2 comments skipped.\n"
    assert cogview(*arguments, "--dry-run").stdout.startswith(expected)
    assert cogview(*arguments).exit_code == 0
    records = [json.loads(line) for line in (folder / "out" / "manifest.jsonl").read_text().splitlines()]
    assert {item["line"]: item["arguments"]["prompt"] for item in records} == {
        2: "a fox",
        4: "#hashtag art",
        6: "a #2 pencil",
    }


def test_a_second_file_in_the_folder_adds_to_the_job_and_is_reported(folder):
    (folder / "a.txt").write_text("a fox\na hare [[content-filter]]\n")
    (folder / "b.txt").write_text("a cow\na fox\n")
    options = ("-o", "out", "--sandbox", "--size", "640x512")
    assert "2 comments" not in cogview("batch", "a.txt", *options).stderr
    again = cogview("batch", "a.txt", *options)
    assert "not among these" not in again.stderr
    assert "Line 2 was not generated: 'a hare [[content-filter]]'" in again.stderr
    for more in (("--dry-run",), ()):
        second = cogview("batch", "b.txt", *options, *more)
        assert (
            "The folder also has 1 prompt that is not among these: what was made of it stays, "
            "and the contact sheet shows it too.\n"
        ) in second.stdout + second.stderr
        assert "1 done before" in second.stdout + second.stderr
        assert "hare" not in second.stderr
    page = (folder / "out" / "index.html").read_text()
    assert "<p>3 prompts of 2 files · written 20" in page
    assert [page.index(f"<b>{label}</b>") for label in ("1 a.txt", "2 a.txt", "1 b.txt")] == sorted(
        page.index(f"<b>{label}</b>") for label in ("1 a.txt", "2 a.txt", "1 b.txt")
    )


def test_every_record_of_a_job_in_the_sandbox_says_so_even_where_it_is_blocked(folder):
    (folder / "p.txt").write_text("x [[content-filter]]\n")
    assert cogview("batch", "p.txt", "-o", "out", "--sandbox").exit_code == 3
    assert [record["sandbox"] for record in manifest(folder)] == [True]


def test_a_terminal_without_tqdm_says_in_one_line_how_to_get_the_bar(folder):
    (folder / "p.txt").write_text("a cat\n")
    (folder / "tqdm.py").write_text("raise ImportError")  # in the first folder that `python -m` imports from
    arguments = (*MODULE, "batch", "p.txt", "-o", "out", "--sandbox", "--size", "640x512")
    seen, code = on_a_terminal(*arguments, folder=folder)
    assert code == 0
    assert seen.count("The progress bar needs tqdm.") == 1
    assert "needs tqdm" not in on_a_terminal(*arguments, "--no-progress", folder=folder)[0]


# --- the dry run


def test_a_dry_run_needs_no_key_sends_nothing_and_creates_nothing(folder):
    result = cogview("batch", "p.txt", "-o", "out", "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "3 lines with a prompt, 1 blank line skipped.\nTo generate: 3 prompts, 3 images, 0.18 CNY.\n"
    )
    abroad = cogview("batch", "p.txt", "-o", "out", "--dry-run", "--region", "international", "--model", "glm-image")
    assert abroad.stdout.endswith("3 images, 0.045 USD.\n")
    assert [item.name for item in folder.iterdir()] == ["p.txt"]


def test_a_dry_run_counts_everything_that_is_bad_by_its_line(folder):
    (folder / "p.csv").write_bytes(
        b"\xef\xbb\xbfPrompt,size,mood\r\n"
        b"a cat,1000x1000,calm\r\n"
        b"\r\n"
        b"caf\xe9,,\r\n"
        b'"a ""dog""",square,\r\n'
        b'"a ""dog""",square,\r\n'
        b",square,\r\n"
        b'"open,,\r\n'
    )
    result = cogview("batch", "p.csv", "-o", "out", "--dry-run")
    output = result.stdout.splitlines()
    assert result.exit_code == 2
    assert output[0] == "6 lines with a prompt, 1 blank line skipped."
    assert output[1] == "Not valid (4):"
    assert [line.split(":")[0] for line in output[2:6]] == ["  Line 2", "  Line 4", "  Line 7", "  Line 8"]
    assert "the nearest legal size is 992x992" in output[2]
    assert "Not valid UTF-8" in output[3]
    assert "The prompt is blank" in output[4]
    assert "never closed" in output[5]
    assert output[6] == "The column 'mood' is not an argument; it is copied to the manifest."
    assert output[7].endswith(
        "1 duplicate prompt (line 6). Duplicates are generated and paid for, unless --unique is given."
    )
    assert output[8] == "To generate: 2 prompts, 2 images, 0.12 CNY."
    as_json = cogview("batch", "p.csv", "-o", "out", "--dry-run", "--json", "--skip-bad")
    plan = json.loads(as_json.stdout)
    assert as_json.exit_code == 0
    assert [item["line"] for item in plan["problems"]] == [2, 4, 7, 8]
    assert (plan["duplicates"], plan["images"], plan["cost"]) == ([6], 2, {"CNY": "0.12"})


def test_only_the_first_twenty_bad_lines_are_shown(folder):
    (folder / "p.jsonl").write_text("{}\n" * 50)
    result = cogview("batch", "p.jsonl", "-o", "out", "--dry-run")
    assert len(result.stdout.splitlines()) == 1 + 1 + 20 + 1 + 1
    assert "  and 30 more" in result.stdout


def test_bad_lines_refuse_the_job_and_skip_bad_leaves_them_out(batch, folder, sandbox):
    (folder / "p.jsonl").write_text('"a cat"\n{"prompt": "x", "seed": 1, "n": 0}\n[]\n')
    refused = batch(file="p.jsonl")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.splitlines() == [
        "Error: 2 lines of 3 are not valid; nothing was sent.",
        "Fix them, or leave them out with --skip-bad.",
        "Line 2: n must be at least 1.",
        "Line 3: A prompt is a string or an object with the key 'prompt', not a list.",
    ]
    assert not (folder / "out").exists()
    assert sandbox.requests == []
    assert batch("--skip-bad", file="p.jsonl").exit_code == 0
    assert len(manifest(folder)) == 1
    (folder / "one.jsonl").write_text('"a cat"\n[]\n')
    assert batch(file="one.jsonl").stderr.splitlines()[:2] == [
        "Error: 1 line of 2 is not valid; nothing was sent.",
        "Fix it, or leave it out with --skip-bad.",
    ]


@pytest.mark.parametrize(("name", "text"), [("empty.txt", ""), ("blank.txt", "\n \n"), ("head.csv", "prompt,size\n")])
def test_a_file_without_prompts_is_an_error_and_makes_no_folder(batch, folder, name, text):
    (folder / name).write_text(text)
    for arguments in ((), ("--dry-run",)):
        result = batch(*arguments, file=name)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"Error: There is no prompt in the file {name}; nothing was sent.\n" in result.stderr
    assert "no prompt in the standard input" in batch(file="-", input="").stderr
    assert not (folder / "out").exists()


def test_the_table_of_exit_codes_says_what_a_budget_does():
    meaning = cli.EXIT_CODES[2]
    assert "budget" in meaning
    assert "nothing" not in meaning


# --- options


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        (("--quality", "hd"), {"quality": "hd"}),
        (("--model", "cogview-4"), {"model": "cogview-4"}),
        (("--size", "landscape"), {"size": "1152x864"}),
        (("--user-id", "user-123"), {"user_id": "user-123"}),
        (("--n", "2"), {"n": 2}),
    ],
)
def test_an_option_holds_where_a_line_says_none(batch, folder, sandbox, options, argument):
    (folder / "p.jsonl").write_text('"a cat"\n{"prompt": "a dog", "size": "768x1344"}\n')
    assert batch(*options, file="p.jsonl").exit_code == 0
    for line in manifest(folder):
        own = {"size": "768x1344"} if line["line"] == 2 else {}
        assert {**argument, **own}.items() <= line["arguments"].items()


@pytest.mark.parametrize("option", [("--timeout", "30"), ("--max-concurrency", "1"), ("--no-progress",)])
def test_options_of_how_an_image_is_generated_do_not_change_which_prompts_are_done(batch, folder, option):
    assert batch(*option).exit_code == 3
    assert batch().exit_code == 3
    assert len(manifest(folder)) == 3


def test_format_tells_how_the_file_is_read(batch, folder):
    (folder / "data").write_text('prompt\tNote\n"G I G" painted\tx\n')
    assert batch(file="data").exit_code == 2
    assert batch("--format", "tsv", file="data").exit_code == 0
    (line,) = manifest(folder)
    assert (line["arguments"]["prompt"], line["extra"]) == ('"G I G" painted', {"Note": "x"})


def test_a_dash_reads_the_prompts_from_stdin(batch, folder):
    assert batch(file="-", input="a cat\r\n\r\na hare").exit_code == 0
    assert {line["arguments"]["prompt"] for line in manifest(folder)} == {"a cat", "a hare"}
    more = batch("--format", "jsonl", file="-", input='{"prompt": "a fox"}')
    assert more.exit_code == 0


def test_limit_and_budget_leave_the_rest(batch, folder, sandbox):
    limited = batch("--limit", "1")
    assert (limited.exit_code, sandbox.images_made) == (0, 1)
    assert "1 prompt made, 2 not generated yet" in limited.stderr
    bounded = batch("--budget", "0.06")
    assert (bounded.exit_code, sandbox.images_made) == (2, 1)
    assert "The budget does not cover the next prompt." in bounded.stderr
    assert batch("--budget", "nothing").exit_code == 2
    assert batch("--limit", "-1").exit_code == 2


def test_retry_failed_generates_what_was_blocked_again(batch, sandbox):
    sandbox.fail_next("content-filter")
    assert batch("--limit", "1").exit_code == 3
    done = batch("--limit", "1", "--retry-failed")
    assert done.exit_code == 0
    assert "1 prompt made, 2 not generated yet" in done.stderr


def test_unique_generates_the_same_line_once(batch, folder):
    (folder / "p.txt").write_text("a cat\na cat\n")
    result = batch("--unique")
    assert len(manifest(folder)) == 1
    assert "1 duplicate prompt (line 2). Duplicates are left out." in result.stderr


def test_what_may_have_been_charged_is_7_and_is_listed_and_repeated_when_asked_for(batch, sandbox):
    sandbox.fail_next("malformed")
    result = batch("--limit", "1")
    request_id = sandbox.requests[0].request_id
    assert result.exit_code == 7
    assert "May have been charged, and repeated only with --retry-unknown (1):" in result.stderr
    assert f"  Line 1: request id {request_id}: a cat" in result.stderr
    assert batch("--limit", "0").exit_code == 7
    assert batch("--limit", "1", "--retry-unknown").exit_code == 0
    assert sandbox.images_made == 2


@pytest.mark.parametrize(("fault", "code"), [("auth", 4), ("balance", 4)])
def test_key_and_balance_stop_the_job_with_4(batch, folder, sandbox, fault, code):
    (folder / "p.txt").write_text("".join(f"prompt {number}\n" for number in range(50)))
    sandbox.fail_next(fault, times=1000)
    result = batch()
    assert result.exit_code == code
    assert "Stopped: The " in result.stderr
    assert len(sandbox.requests) <= 10


def test_no_network_is_5(folder):
    (folder / "p.txt").write_text("".join(f"prompt {number}\n" for number in range(20)))
    result = command(
        *(
            "batch",
            "p.txt",
            "-o",
            "out",
            "--base-url",
            "http://127.0.0.1:9",
            "--timeout",
            "0.2",
            "--max-concurrency",
            "1",
        ),
        folder=folder,
        env=dict(os.environ) | {"ZHIPUAI_API_KEY": KEY},
    )
    assert result.returncode == 5
    assert "Stopped: The service could not be reached; nothing was sent." in result.stderr
    assert KEY not in result.stderr + result.stdout


def test_other_arguments_and_a_damaged_manifest_are_2(batch, folder):
    batch()
    other = batch("--quality", "hd")
    assert other.exit_code == 2
    assert "quality was not set and is now 'hd'" in other.stderr
    path = folder / "out" / "manifest.jsonl"
    path.write_text(path.read_text().replace("{", "", 1))
    damaged = batch()
    assert damaged.exit_code == 2
    assert "Line 1 of " in damaged.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.txt", "-o", "out"), "none.txt, cannot be read: No such file or directory."),
        (("p.md", "-o", "out"), "There is no file 'p.md'"),
        ((".", "-o", "out"), "Choose one with --format: 'txt'"),
        (("p.txt",), "Missing option '-o'"),
        (("p.txt", "-o", "https://example.com/x"), "https:// URLs are not folders"),
        (("p.txt", "-o", "out", "--format", "xml"), "Invalid value for '--format'"),
        (("p.txt", "-o", "out", "--base-url", "http://127.0.0.1:9"), "cannot be combined with --sandbox"),
        (("p.txt", "-o", "out", "--model", "cogview-3", "--budget", "1"), "Leave --budget out."),
        (("p.txt", "-o", "out", "--seed", "1"), "No such option: --seed"),
    ],
)
def test_wrong_usage_is_2_with_what_to_do(folder, arguments, words):
    result = cogview("batch", *arguments, "--sandbox")
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr.replace("\n", " ")
    assert not (folder / "out").exists()


def test_without_a_key_nothing_is_begun(folder):
    result = cogview("batch", "p.txt", "-o", "out")
    assert result.exit_code == 2
    assert "ZHIPUAI_API_KEY" in result.stderr
    assert not (folder / "out").exists()


def test_its_help_names_every_option(folder):
    text = cogview("batch", "--help").stdout
    for option in (
        *("--output", "--format", "--size", "--quality", "--model", "--n", "--user-id", "--limit", "--budget"),
        *("--retry-failed", "--retry-unknown", "--unique", "--skip-bad", "--dry-run", "--region", "--base-url"),
        *("--timeout", "--max-concurrency", "--sandbox", "--no-progress", "--json"),
    ):
        assert option in text
    assert "batch" in cogview("--help").stdout


def test_the_word_batch_can_still_be_painted(folder):
    assert cogview("generate", "batch", "--sandbox", "-o", "b.png").exit_code == 0
    assert cli.GenerateByDefault.__doc__


# --- the terminal and its signals


def test_on_a_terminal_there_is_a_bar_which_can_be_left_out(folder):
    pytest.importorskip("tqdm")
    arguments = ("batch", "p.txt", "-o", "out", "--sandbox", "--size", "640x512")
    seen, code = on_a_terminal(*MODULE, *arguments, folder=folder)
    assert code == 3
    assert "3/3" in seen
    assert "1 blocked" in seen
    shutil.rmtree(folder / "out")
    seen, code = on_a_terminal(*MODULE, *arguments, "--no-progress", folder=folder)
    assert code == 3
    assert "\r" not in seen
    assert "\x1b[" not in seen


def with_a_key() -> dict[str, str]:
    return dict(os.environ) | {"ZHIPUAI_API_KEY": KEY}


def started(*arguments: str, folder: Path) -> subprocess.Popen:
    """The real command, under way, which minds Ctrl-C as in a terminal."""
    return subprocess.Popen(
        [*MODULE, *arguments],
        cwd=folder,
        env=with_a_key(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.heavy)])
def test_a_signal_ends_it_with_130_and_the_same_command_goes_on(folder, number):
    (folder / "p.txt").write_text("a\nb\nc [[slow:60]]\nd\n")
    with Sandbox() as sandbox, SandboxServer(sandbox) as server:
        arguments = (
            *("batch", "p.txt", "-o", "out", "--size", "640x512", "--base-url", server.base_url),
            *("--max-concurrency", "1", "--no-progress"),
        )
        process = started(*arguments, folder=folder)
        manifest_file = folder / "out" / "manifest.jsonl"
        # One request at a time, in the order in which threads start: the slow one holds up those behind it.
        while process.poll() is None and "c [[slow:60]]" not in [request.prompt for request in sandbox.requests]:
            time.sleep(0.01)
        before = len(sandbox.requests) - 1
        while process.poll() is None and manifest_file.read_text().count("\n") < before:
            time.sleep(0.01)
        process.send_signal(number)
        assert any("Press Ctrl-C again to leave them" in line for line in process.stderr)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=300)
        assert (process.returncode, stdout) == (130, "")
        assert stderr.startswith("Interrupted; run the same command to continue.\n")
        assert "Traceback" not in stderr
        assert KEY not in stderr
        again = command(*arguments, "--json", folder=folder, env=with_a_key())
        report = json.loads(again.stdout)
        assert again.returncode == 7
        assert (report["made"], report["skipped"], [item["line"] for item in report["unknown"]]) == (
            3 - before,
            before,
            [3],
        )
        assert sandbox.images_made == 4


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.heavy), signal.SIGTERM])
def test_one_signal_lets_what_is_under_way_end_so_that_nothing_paid_is_lost(folder, number):
    (folder / "p.txt").write_text("".join(f"prompt {n} [[slow:3]]\n" for n in range(7)))
    with Sandbox() as sandbox, SandboxServer(sandbox) as server:
        arguments = ("batch", "p.txt", "-o", "out", "--size", "640x512", "--base-url", server.base_url, "--no-progress")
        process = started(*arguments, folder=folder)
        while process.poll() is None and len(sandbox.requests) < 5:
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 130, stderr
        assert stdout == f"{folder / 'out' / 'index.html'}\n"
        made = len((folder / "out" / "manifest.jsonl").read_text().splitlines())
        assert made == sandbox.images_made == len(sandbox.requests)
        assert f"{made} prompts made" in stderr
        again = json.loads(command(*arguments, "--json", folder=folder, env=with_a_key()).stdout)
        assert (again["made"], again["skipped"], again["unknown"]) == (7 - made, made, [])
        assert sandbox.images_made == 7


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.heavy)])
def test_what_waits_when_a_signal_comes_is_not_sent_and_not_called_failed(folder, number):
    prompts = [f"prompt {n} [[slow:2]]" for n in range(4)]
    (folder / "p.txt").write_text("\n".join(prompts))
    with Sandbox(in_flight_limit=1) as sandbox, SandboxServer(sandbox) as server:
        arguments = ("batch", "p.txt", "-o", "out", "--size", "640x512", "--base-url", server.base_url, "--no-progress")
        process = started(*arguments, "--max-concurrency", "4", folder=folder)
        while process.poll() is None and len(sandbox.requests) < 4:  # one is made, and three wait to be sent again
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 130
        assert "fail" not in stderr
        assert "request id" not in stderr.lower()
        assert stderr.splitlines()[-1] == "Interrupted; run the same command to continue."
        again = json.loads(command(*arguments, "--json", folder=folder, env=with_a_key()).stdout)
        assert (again["unknown"], again["made"] + again["skipped"]) == ([], 4)
        assert sorted(entry.prompt for entry in sandbox.ledger) == prompts
