"""What a user relies on: an interrupted job says how to go on, and pays for nothing twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from langchain_cogview.sandbox import Sandbox, SandboxServer
from tests.unit_tests.cli.test_command import KEY

IDLE = 0.005
IN_A_NOTEBOOK = """
import sys
import time
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell

base_url, out = sys.argv[1:]
shell = InteractiveShell.instance()
prompts = ["a", "b", "c [[slow:8]]", "d [[slow:8]]", "e"]
shell.run_cell("from langchain_cogview import run_job")
cell = f"report = run_job({prompts}, {out!r}, base_url={base_url!r}, size='640x512', progress=False, max_concurrency=2)"
shell.run_cell(cell)                     # interrupted
assert "report" not in shell.user_ns
shell.run_cell(cell)                     # at once, while the requests of the first run are under way
while len(list(Path(out).glob("*.png"))) < 5:
    time.sleep(0.05)
shell.run_cell(cell)
print(len(shell.user_ns["report"].unknown), shell.user_ns["report"].left, flush=True)
"""
IN_A_SCRIPT = """
import sys
from langchain_cogview import run_job

base_url, out = sys.argv[1:]
prompts = ["a", "b", "c [[slow:8]]", "d [[slow:8]]", "e"]
report = run_job(prompts, out, base_url=base_url, size="640x512", progress=False, max_concurrency=2)
print(len(report.unknown), report.left)
"""


@pytest.fixture
def interrupted(tmp_path):
    with Sandbox() as sandbox, SandboxServer(sandbox) as server:

        def run(code: str, *, interrupt: bool = True) -> tuple[str, str]:
            process = subprocess.Popen(
                [sys.executable, "-c", code, server.base_url, str(tmp_path / "out")],
                env=dict(os.environ) | {"ZHIPUAI_API_KEY": KEY, "IPYTHONDIR": str(tmp_path / "ipython")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
            while interrupt and process.poll() is None and len(sandbox.requests) < 4:
                time.sleep(IDLE)
            if interrupt:
                process.send_signal(signal.SIGINT)
            return process.communicate(timeout=300)

        yield run, sandbox


@pytest.mark.heavy
def test_a_cell_that_is_interrupted_is_run_again_and_pays_for_nothing_twice(interrupted):
    run, sandbox = interrupted
    stdout, stderr = run(IN_A_NOTEBOOK)
    assert stdout.splitlines()[-1] == "0 0", (stdout, stderr)
    assert "KeyboardInterrupt" in stdout
    assert sorted(entry.prompt[0] for entry in sandbox.ledger) == ["a", "b", "c", "d", "e"]


def test_a_script_that_is_interrupted_says_how_to_go_on_and_pays_for_nothing_twice(interrupted):
    run, sandbox = interrupted
    _, stderr = run(IN_A_SCRIPT)
    interrupt, *notes = stderr.splitlines()[-3:]
    assert interrupt == "KeyboardInterrupt"
    assert notes[-1].startswith("Interrupted; run the job again to continue.")
    assert "what became of it" not in stderr
    stdout, _ = run(IN_A_SCRIPT, interrupt=False)
    unknown, left = map(int, stdout.split())
    assert left == 0
    assert unknown <= 4  # those in flight, and those that were not recorded yet
    assert max(Counter(entry.prompt for entry in sandbox.ledger).values()) == 1
