"""`python -m langchain_cogview.sandbox` serves until Ctrl-C, and says in one line what is wrong."""

from __future__ import annotations

import signal
import subprocess
import sys

import httpx
import pytest

from langchain_cogview.sandbox import SandboxServer
from langchain_cogview.sandbox.__main__ import main
from tests.unit_tests.sandbox.calls import AUTHORIZED, BODY, download


def test_it_serves_until_ctrl_c():
    command = [sys.executable, "-W", "error", "-m", "langchain_cogview.sandbox", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        base_url = next(word for word in line.split() if word.startswith("http://127.0.0.1:"))
        for name in ("langchain-cogview", "zai-sdk", "openai"):
            assert name in line
        reply = httpx.post(f"{base_url}/images/generations", json=BODY, headers=AUTHORIZED, trust_env=False, timeout=60)
        assert download(reply.json()["data"][0]["url"]).size == (1024, 1024)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=200)
    assert (process.returncode, rest, errors) == (0, "", "")


def test_a_port_in_use_is_one_line(capsys):
    with SandboxServer() as server:
        assert main(["--port", str(httpx.URL(server.base_url).port)]) == 1
    assert main(["--port", "99999"]) == 1
    out, errors = capsys.readouterr()
    assert out == ""
    assert [line.startswith("Port ") for line in errors.splitlines()] == [True, True]


def test_it_can_be_slow_and_limited():
    command = [sys.executable, "-W", "error", "-m", "langchain_cogview.sandbox", "--port", "0"]
    command += ["--latency", "3600", "--in-flight-limit", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        base_url = next(word for word in process.stdout.readline().split() if word.startswith("http://127.0.0.1:"))
        with httpx.Client(trust_env=False, timeout=60, headers={"Authorization": "Bearer any"}) as client:
            # Tasks, because they are answered at once and stay in flight.
            url, body = f"{base_url}/async/images/generations", {**BODY, "model": "glm-image"}
            first, second = client.post(url, json=body), client.post(url, json=body)
            polled = client.get(f"{base_url}/async-result/{first.json()['id']}").json()
        process.terminate()
        process.communicate(timeout=200)
    assert (first.status_code, second.status_code, polled["task_status"]) == (200, 429, "PROCESSING")


@pytest.mark.parametrize("options", [["--latency", "-1"], ["--in-flight-limit", "0"], ["--latency", "soon"]])
def test_an_invalid_option_is_one_line(options, capsys):
    with pytest.raises(SystemExit) as raised:
        main(options)
    assert raised.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]
