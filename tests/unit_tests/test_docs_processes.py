"""The page about several processes: its blocks run as they stand, in order."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "processes.md").read_text(encoding="utf-8")


def test_every_python_block_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE), 1):
        exec(compile(block, f"docs/processes.md block {number}", "exec"), namespace)
    assert capsys.readouterr().out.splitlines() == ["3 3", "{'made': 3}", "1024x1024"]
