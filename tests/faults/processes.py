"""Starts the programs of `tests.faults.children`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.faults.reply_table import KEY

ROOT = Path(__file__).parents[2]
SECRET = KEY.split(".")[1]


def child(*arguments: object, python: tuple[str, ...] = (), **more: Any) -> subprocess.Popen[str]:
    """One of `tests.faults.children`, with the key in its environment; with options of Python in an interpreter of its own."""
    program = (sys.executable, *python)
    return subprocess.Popen(
        [*program, "-m", "tests.faults.children", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "ZHIPUAI_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def reported(process: subprocess.Popen[str], seconds: float = 300) -> dict[str, Any]:
    """What a child printed, once it has ended well."""
    with process:
        out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    assert SECRET not in out + err
    return json.loads(out)  # type: ignore[no-any-return]
