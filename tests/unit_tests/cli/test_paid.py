"""`cogview doctor --paid` asks, says the price, makes one image, and says what the service does, without anything secret."""

import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from langchain_cogview.sandbox.server import SandboxServer
from tests.conftest import FAKE_KEY, FIXTURES
from tests.host import Host, http
from tests.unit_tests.cli.test_command import MODULE
from tests.unit_tests.cli.test_doctor import doctor

FACT = re.compile(r"- \[(same|differs|seen)\] [^.]+\. Documented: .+\. Seen: .+\.")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(sandbox):
    with SandboxServer(sandbox) as server:
        yield server


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("ZHIPUAI_API_KEY", FAKE_KEY)


def facts(text):
    """What was seen of each fact, by its name."""
    return dict(
        re.findall(r"^- \[(?:same|differs|seen)\] ([^.]+)\. Documented: .+?\. Seen: (.+)\.$", text, re.MULTILINE)
    )


def test_it_prints_what_is_documented_and_what_the_service_did(folder):
    result = doctor("--sandbox", "--paid", "--yes")
    assert (result.exit_code, result.stderr) == (0, "")
    _, text = result.stdout.split("### cogview doctor --paid\n\n")
    *lines, blank, end = text.splitlines()
    assert [line for line in lines if not FACT.fullmatch(line)] == []
    assert (blank, end) == ("", f"1 of {len(lines)} facts differ: host of the image.")
    assert max(map(len, result.lines)) <= 80
    seen = facts(text)
    assert seen["a model that does not exist"] == "code 1211, HTTP 400"
    assert seen["the size 513x513"] == "code 1214, HTTP 400"
    assert seen["user_id and watermark_enabled"] == "taken"
    assert seen["request_id of the reply"] == "the one that was sent"
    assert seen["the link answers 404 at first"] == "never"
    assert seen["Expires"].startswith("in ")
    assert {"fields of the reply", "usage", "time until the answer", "type of the image", "bytes of the image"} <= {
        *seen
    }
    (saved,) = folder.iterdir()
    assert seen["the image is saved as"] == saved.name


def test_one_image_of_the_cheapest_model_is_made_and_nothing_secret_is_printed(server, sandbox, key):
    result = doctor("--paid", "--yes", "--base-url", server.base_url)
    assert result.exit_code == 0
    assert sandbox.images_made == len(sandbox.downloads) == 1
    probe, no_model, no_size, paid = [request.body for request in sandbox.requests]
    assert "prompt" not in probe
    assert (no_model["model"], no_size["size"]) == ("cogview-doctor-probe", "513x513")
    assert (paid["model"], paid["user_id"], paid["watermark_enabled"]) == ("cogview-3-flash", "cogview-doctor", True)
    report = result.output.split("### cogview doctor --paid")[1]
    assert not any(
        secret in report for secret in (FAKE_KEY[:8], FAKE_KEY[-4:], "http://", "https://", paid["request_id"])
    )


@pytest.mark.parametrize(("answer", "made"), [("y", 1), ("yes", 1), ("n", 0), ("", 0), ("yo", 0)])
def test_it_asks_with_the_price_and_pays_for_nothing_without_a_yes(server, sandbox, folder, answer, made):
    ours, theirs = pty.openpty()
    environment = dict(os.environ) | {"ZAI_API_KEY": FAKE_KEY, "TERM": "dumb", "COLUMNS": "200"}
    arguments = ("doctor", "--paid", "--base-url", server.base_url, "--region", "international")
    process = subprocess.Popen(
        [*MODULE, *arguments],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder,
    )  # fmt: skip
    os.write(ours, f"{answer}\n".encode())
    stdout, stderr = process.communicate(timeout=300)
    os.close(theirs)
    os.close(ours)
    assert "This makes one image with cogview-4-250304 for 0.01 USD. Continue?\n" in stderr
    assert (sandbox.images_made, process.returncode) == (made, 0 if made else 2)
    assert ("### cogview doctor --paid" in stdout) == bool(made)
    assert ("Nothing was paid." in stderr) != bool(made)


def test_a_script_must_say_yes(server, sandbox, key):
    result = doctor("--paid", "--base-url", server.base_url)
    assert (result.exit_code, sandbox.images_made) == (2, 0)
    assert result.stderr.startswith("Error: Nothing was paid, because there is no terminal to ask on.\n")
    assert "cogview-3-flash, whose list price is 0 CNY. In a script, add --yes.\n" in result.stderr
    for wrong in (("--yes",), ("--paid", "--offline")):
        assert doctor("--sandbox", *wrong).exit_code == 2


def test_nothing_is_paid_after_a_problem(server, sandbox):
    result = doctor("--paid", "--yes", "--base-url", server.base_url)  # without a key
    assert (result.exit_code, sandbox.images_made) == (2, 0)
    assert "Nothing was paid, because of the problem above." in result.stderr


def test_json_has_the_findings_and_the_facts(server, key):
    content = json.loads(doctor("--paid", "--yes", "--json", "--base-url", server.base_url).stdout)
    assert content["ok"] is True
    assert {*content["paid"][0]} == {"name", "documented", "seen", "agrees"}


def test_a_link_that_answers_404_at_first_is_reported(server, sandbox, key, monkeypatch):
    monkeypatch.setattr("langchain_cogview.cli.paid.PROMPT", "A kitten [[not-yet:1]]")
    seen = facts(doctor("--paid", "--yes", "--base-url", server.base_url).stdout)
    assert re.fullmatch(r"1 times, until \d+\.\d s after the answer", seen["the link answers 404 at first"])


def test_a_wrong_size_that_is_accepted_is_the_only_image(key, monkeypatch):
    """A service that takes everything: what must be refused is made and charged, so nothing else is sent."""
    monkeypatch.setattr("langchain_cogview.images.download.WAITS", ())  # its host is fetched from once
    refused = http(400, (FIXTURES / "seen-400-1211.json").read_bytes())
    made = http(
        200, json.dumps({"created": 1, "data": [{"url": "https://x.invalid/a.png?Expires=1&Signature=secret"}]})
    )
    with Host([refused, refused, made]) as host:
        result = doctor("--paid", "--yes", "--base-url", f"http://127.0.0.1:{host.port}/v4")
    assert len(host.got) == 3
    assert facts(result.stdout)["the size 513x513"] == "accepted, and an image was made"
    assert result.exit_code == 6  # its link cannot be fetched, and is printed beside the report
    assert "secret" not in result.stdout
    assert "Its URL" in result.stderr
    assert "https://x.invalid/a.png" in result.stderr


def test_an_unknown_outcome_is_7_and_what_was_seen_before_is_kept(key):
    refused = http(400, (FIXTURES / "seen-400-1211.json").read_bytes())
    with Host([refused, refused, refused, http(500, '{"error":{"code":"1234","message":"x"}}')]) as host:
        result = doctor("--paid", "--yes", "--base-url", f"http://127.0.0.1:{host.port}/v4")
    assert result.exit_code == 7
    assert "Request id: " in result.stderr
    assert set(facts(result.stdout)) == {"a model that does not exist", "the size 513x513"}
    assert not list(Path().iterdir())
