"""The page about agents: its blocks run as they stand, in order."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "agents.md").read_text(encoding="utf-8")


def test_every_python_block_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE), 1):
        exec(compile(block, f"docs/agents.md block {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    for line in (
        r"Made [\w-]+\.png",
        r"\['success', 'error', 'success'\] 2",
        "True",
        r"1024 0\.06 CNY",
        "It is a heron",
    ):
        assert re.search(line, printed), line
