"""The documentation site: it builds without a warning, and its pages load nothing from another host."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=[\"']?([^\"'\s>]+)"
    r"|<link\b(?![^>]*rel=[\"']?canonical)[^>]*?\bhref=[\"']?([^\"'\s>]+)"
    r"|url\(\s*[\"']?(?!data:|#)([^)\"']+)"
    r"|@import\s+[\"']([^\"']+)"
)


@pytest.mark.heavy
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")]
    assert (tmp_path / "zh" / "agents" / "index.html") in pages
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert 'data-md-component="source"' not in text  # its script asks GitHub
        for loaded in LOADED.findall(text):
            address = "".join(loaded)
            assert not re.match(r"(https?:)?//", address), (page.relative_to(tmp_path), address)
