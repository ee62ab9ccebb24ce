"""Print the lowest version that pyproject.toml allows for each dependency of the package and its run-time extras.

The output is a pip constraints file. Test and lint tools stay at the newest version that fits.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

TOOLS = {"benchmark", "test", "integrations", "frontends", "lint", "dev", "docs"}

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
requirements = set(project["dependencies"])
for extra, listed in project["optional-dependencies"].items():
    if extra not in TOOLS:
        requirements.update(listed)
for requirement in sorted(requirements):
    if found := re.match(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?>=([0-9][0-9.]*)", requirement):
        print(f"{found[1]}=={found[2]}")
