"""`cogview doctor` reports what stands in the way, check by check, makes no image, and can be pasted into a bug report."""

import json
import re
import socket
import ssl
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import trustme
from typer.testing import CliRunner

from langchain_cogview import Sandbox, cli
from langchain_cogview.cli.doctor import diagnose
from langchain_cogview.sandbox.server import SandboxServer
from tests.conftest import FAKE_KEY, FIXTURES
from tests.host import Host, http

LINE = re.compile(r"- \[(ok|note|failed|skipped)\] [^:]+: \S.*")


@pytest.fixture
def server(sandbox):
    with SandboxServer(sandbox) as server:
        yield server


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("ZHIPUAI_API_KEY", FAKE_KEY)


def states(diagnosis):
    return {item.name: item.state for item in diagnosis.findings}


def doctor(*arguments, **options):
    result = CliRunner().invoke(cli.application(), ["doctor", *arguments], **options)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    whole = {name: re.sub(r"\n +(?=\S)", " ", getattr(result, name)) for name in ("stdout", "output", "stderr")}
    return SimpleNamespace(exit_code=result.exit_code, lines=result.stdout.splitlines(), **whole)


# --- all is well


def test_each_check_is_reported_with_its_time_and_no_image_is_made(server, sandbox, key):
    diagnosis = diagnose(base_url=server.base_url)
    assert diagnosis.first_failed is None
    names = [item.name for item in diagnosis.findings]
    assert names[:3] == ["versions", "packages", "extras"]
    assert [name for name in names if name in {"look-up", "connect", "HTTP answer", "clock", "probe"}] == [
        "look-up",
        "connect",
        "HTTP answer",
        "clock",
        "probe",
    ]
    timed = {item.name for item in diagnosis.findings if item.seconds is not None}
    assert timed == {"look-up", "connect", "HTTP answer", "probe"}
    (request,) = sandbox.requests
    assert request.body == {"model": "cogview-doctor-probe"}
    assert (sandbox.images_made, sandbox.downloads) == (0, [])


def test_no_reason_alone_is_relied_on_for_the_refusal(sandbox):
    headers = {"authorization": "Bearer x"}
    for half in ({"model": "cogview-4-250304"}, {"model": "cogview-doctor-probe", "prompt": "a cat"}):
        reply = sandbox.reply("POST", "/api/paas/v4/images/generations", headers, json.dumps(half).encode())
        assert reply.status == 400
    assert sandbox.images_made == 0


def test_the_sandbox_needs_nothing():
    result = doctor("--sandbox")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "- [ok] base URL: The offline sandbox, which needs no key and no network.\n" in result.stdout
    assert "- [ok] probe: The request was refused, as expected (code 1211, HTTP 400)." in result.stdout
    assert not any(word in result.stdout for word in ("key is accepted", "network: ", "region", "does not read"))
    assert result.stdout.endswith("\n\nNo problem was found.\n")


def test_it_fits_80_columns_and_ends_in_a_verdict(monkeypatch):
    monkeypatch.setenv("COGVIEW_BASE_URL", "http://api.invalid/v4")
    result = doctor()
    assert [line for line in result.lines if len(line) > 80] == []
    assert result.lines[-2:] == ["", "2 problems: key, network."]
    assert json.loads(doctor("--json").stdout)["problems"] == ["key", "network"]
    assert doctor("--offline").lines[-1] == "1 problem: key."


def test_an_extra_that_is_missing_is_a_note_with_what_to_install(monkeypatch):
    def version(package):
        if package in {"tqdm", "s3fs"}:
            raise PackageNotFoundError
        return "1.0"

    monkeypatch.setattr("langchain_cogview.cli.doctor.version", version)
    ok, note = [line for line in doctor("--sandbox").stdout.splitlines() if "] extras: " in line]
    assert ok.startswith("- [ok] extras: ")
    assert "tqdm" not in ok
    assert "not installed" not in ok
    assert note == (
        "- [note] extras: Not installed: progress (tqdm), storage (s3fs). They are optional; for example: "
        'pip install "langchain-cogview[progress]"'
    )


def test_it_mentions_no_option_that_was_not_used(key, monkeypatch):
    assert "--" not in doctor("--sandbox").stdout
    assert "(from --base-url)" in doctor("--base-url", "http://127.0.0.1:9/v4", "--offline").stdout


# --- made to be pasted


def test_the_report_is_a_list_without_key_password_or_home(server, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "work").mkdir(parents=True)
    (home / "ca.pem").write_bytes(trustme.CA().cert_pem.bytes())
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    environment = {
        "ZHIPUAI_API_KEY": FAKE_KEY,
        "SSL_CERT_FILE": str(home / "ca.pem"),
        "HTTPS_PROXY": "http://someone:secret-password@127.0.0.1:1",
    }
    for arguments in ((), ("--json",), ("--base-url", server.base_url)):
        result = doctor(*arguments, env=environment)
        assert not any(
            secret in result.output for secret in (FAKE_KEY[:8], FAKE_KEY[-8:], "secret", "someone", str(home))
        )
        assert f"ends in {FAKE_KEY[-4:]}." in result.stdout
        assert "~/work is writable." in result.stdout
    assert "SSL_CERT_FILE=~/ca.pem" in doctor(env=environment).stdout
    title, blank, *lines, end, verdict = doctor(env=environment).stdout.splitlines()
    assert (title, blank, end, verdict[-1]) == ("### cogview doctor", "", "", ".")
    assert [line for line in lines if not LINE.fullmatch(line)] == []


def test_json_is_the_findings_and_nothing_else(server, key):
    result = doctor("--json", "--base-url", server.base_url)
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert {item["state"] for item in report["findings"]} <= {"ok", "note", "skipped"}
    assert {*report["findings"][0]} == {"name", "state", "text", "hint", "seconds", "error"}


def test_of_a_short_key_nothing_is_shown(monkeypatch):
    monkeypatch.setenv("ZHIPUAI_API_KEY", "short-secret")
    text = str(diagnose(offline=True))
    assert "from ZHIPUAI_API_KEY, too short to show its end." in text
    assert "cret" not in text


# --- settings


def test_offline_asks_nobody(server, sandbox, key):
    diagnosis = diagnose(base_url=server.base_url, offline=True)
    assert (states(diagnosis)["network"], sandbox.requests) == ("skipped", [])
    assert not {"look-up", "connect", "probe"} & {*states(diagnosis)}


def test_both_keys_are_reported_and_which_is_used(key, monkeypatch):
    monkeypatch.setenv("ZAI_API_KEY", FAKE_KEY[::-1])
    text = str(diagnose(offline=True))
    assert (
        f"[note] key: from ZHIPUAI_API_KEY, ends in {FAKE_KEY[-4:]}. ZHIPUAI_API_KEY and ZAI_API_KEY are both set"
        in text
    )
    chosen = diagnose(offline=True, region="international")
    assert (states(chosen)["key"], states(chosen)["region"]) == ("ok", "ok")
    assert f"from ZAI_API_KEY, ends in {FAKE_KEY[::-1][-4:]}" in str(chosen)


def test_where_the_base_url_comes_from_is_reported(monkeypatch, key):
    assert "(the region's)" in str(diagnose(offline=True))
    monkeypatch.setenv("COGVIEW_BASE_URL", "https://api.z.ai/api")
    text = str(diagnose(offline=True))
    assert "https://api.z.ai/api/paas/v4 (set by COGVIEW_BASE_URL)" in text
    assert "region: international." in text


def test_without_a_key_the_network_is_still_looked_at(server, sandbox):
    diagnosis = diagnose(base_url=server.base_url)
    assert diagnosis.first_failed.name == "key"
    assert (states(diagnosis)["connect"], states(diagnosis)["probe"]) == ("ok", "skipped")
    assert "authorization" not in sandbox.requests[0].headers
    assert doctor("--base-url", server.base_url).exit_code == 2


@pytest.mark.parametrize(
    ("setting", "name", "words"),
    [
        (("COGVIEW_BASE_URL", "ftp://x.invalid"), "base URL", "not an http or https URL"),
        (("COGVIEW_BASE_URL", "https://me:secret@x.invalid"), "base URL", "holds a query, a fragment or a user name"),
        (("HTTPS_PROXY", "socks5://127.0.0.1:1"), "proxy", "langchain-cogview[socks]"),
        (("HTTPS_PROXY", "http://host:port"), "proxy", "HTTPS_PROXY is not a URL"),
        (("SSL_CERT_FILE", "/nowhere/ca.pem"), "certificates", "SSL_CERT_FILE cannot be read"),
        (("ZHIPUAI_API_KEY", f"Bearer {FAKE_KEY}"), "key", "starts with 'Bearer '"),
    ],
)
def test_a_wrong_setting_is_the_first_failure_and_2(monkeypatch, key, setting, name, words):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv(*setting)
    result = doctor("--offline")
    assert result.exit_code == 2
    (failed,) = [line for line in result.stdout.splitlines() if line.startswith("- [failed]")]
    assert failed.startswith(f"- [failed] {name}: ")
    assert words in failed
    assert "secret" not in failed


def test_settings_that_are_not_read_are_named(monkeypatch, key):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/x.pem")
    assert "This package does not read REQUESTS_CA_BUNDLE" in str(diagnose(offline=True))
    monkeypatch.setenv("SSL_CERT_DIR", "/nowhere")
    assert "SSL_CERT_DIR does not name a readable file or folder" in str(diagnose(offline=True))


def test_wrong_usage_is_2():
    for arguments in (("--region", "mars"), ("--base-url", " "), ("--base-url", "http://127.0.0.1:9", "--sandbox")):
        result = doctor(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")


# --- the way, and what stands in it


def test_a_name_that_is_not_there_stops_at_the_look_up(key):
    diagnosis = diagnose(base_url="http://api.invalid/v4")
    assert diagnosis.first_failed.name == "look-up"
    assert diagnosis.first_failed.text.endswith(".")
    assert "connect" not in states(diagnosis)


def test_nobody_there_stops_at_the_connect_with_5(key):
    result = doctor("--base-url", "http://127.0.0.1:1/v4")
    assert result.exit_code == 5
    assert "- [ok] look-up" in result.stdout
    assert "- [failed] connect: The service could not be reached" in result.stdout


def test_a_certificate_that_is_not_trusted_stops_at_tls(key, monkeypatch, tmp_path):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    refused = http(400, (FIXTURES / "seen-400-1211.json").read_bytes())
    with Host(refused, context) as host:
        url = f"https://127.0.0.1:{host.port}/v4"
        failed = diagnose(base_url=url)
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        good = diagnose(base_url=url)
    assert (failed.first_failed.name, states(failed)["connect"]) == ("TLS", "ok")
    assert "SSL_CERT_FILE" in failed.first_failed.hint
    assert (good.first_failed, states(good)["TLS"], len(host.got)) == (None, "ok", 1)


def test_a_proxy_is_used_and_one_that_refuses_is_reported(key, monkeypatch):
    with Host(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://u:pw@127.0.0.1:{proxy.port}")
        diagnosis = diagnose(base_url="https://api.invalid/v4")
    assert "127.0.0.1 (the proxy)" in str(diagnosis)
    assert "to the proxy" in str(diagnosis)
    assert diagnosis.first_failed.error == "CogViewConnectionError"
    assert "proxy" in diagnosis.first_failed.text
    assert [item.split(b"\r\n")[0] for item in proxy.got] == [b"CONNECT api.invalid:443 HTTP/1.1"]
    assert FAKE_KEY.encode() not in proxy.got[0]


def test_no_answer_is_5_and_speaks_of_no_charge(key, monkeypatch):
    monkeypatch.setattr("langchain_cogview.cli.doctor.PHASE_SECONDS", 1.0)
    quiet = socket.create_server(("127.0.0.1", 0))
    with quiet:
        result = doctor("--base-url", f"http://127.0.0.1:{quiet.getsockname()[1]}/v4")
    assert result.exit_code == 5
    assert "- [failed] HTTP answer: The probe got no answer, or a broken one." in result.stdout
    assert "charged" not in result.stdout


def test_a_clock_that_is_wrong_is_reported(key):
    with Host(http(400, '{"error":{"code":"1211","message":"x"}}', Date="Mon, 01 Jan 2001 00:00:00 GMT")) as host:
        diagnosis = diagnose(base_url=f"http://127.0.0.1:{host.port}/v4")
    assert re.search(r"\[note\] clock: The clock is [\d,]+ s ahead of the API's\.", str(diagnosis))
    assert diagnosis.first_failed is None


@pytest.mark.parametrize(
    ("status", "body", "code", "words"),
    [
        (401, "seen-401-1000.json", 4, "The API key was refused. (code 1000, HTTP 401)"),
        (429, "seen-429-1113-zai.json", 4, "no balance"),
        (429, "seen-429-1305.json", 5, "overloaded"),
        (200, "seen-200-wrong-route.json", 2, "does not know this model or URL path"),
        (404, "<html>Not found</html>", 2, "does not know this model or URL path"),
        (200, "<html>Log in to the guest network</html>", 2, "answers, but not as the API does"),
        (400, "nonsense", 2, "answers, but not as the API does"),
        (502, "<html>Bad gateway</html>", 5, "answers, but not as the API does"),
        (302, "", 2, "redirect"),
        (200, '{"data":[{"url":"https://x.invalid/p.png"}]}', 7, "this is not the provider's API"),
    ],
)
def test_what_the_api_says_of_the_probe_is_judged(key, status, body, code, words):
    content = (FIXTURES / body).read_bytes() if body.endswith(".json") else body
    with Host(http(status, content)) as host:
        result = doctor("--base-url", f"http://127.0.0.1:{host.port}/v4")
    (failed,) = [line for line in result.stdout.splitlines() if line.startswith("- [failed]")]
    assert failed.startswith("- [failed] probe: ")
    assert words in failed
    assert result.exit_code == code
    assert len(host.got) == 1


@pytest.mark.parametrize("code", ["1210", "1211", "1213", "1214"])
def test_a_refusal_of_the_request_means_that_the_key_is_good(key, code):
    with Host(http(400, json.dumps({"error": {"code": code, "message": "x"}}))) as host:
        diagnosis = diagnose(base_url=f"http://127.0.0.1:{host.port}/v4")
    assert states(diagnosis)["probe"] == "ok"


def test_the_folder_is_left_as_it_was(tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    assert states(diagnose(offline=True))["current folder"] == "ok"
    assert [*Path().iterdir()] == []


def test_a_sandbox_that_is_gone_is_explained():
    with Sandbox() as gone:
        pass
    result = doctor("--base-url", gone.base_url)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
