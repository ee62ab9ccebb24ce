"""Run every notebook on the sandbox and keep its outputs: `python notebooks/renew.py`."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LEFT_OUT = re.compile(r"(ZHIPUAI_API_KEY|ZAI_API_KEY|COGVIEW_BASE_URL|.*_proxy)", re.IGNORECASE)
RUN_FACTS = re.compile(r"(?<=id=')[0-9a-f]{8}(?=')|(?<=path=')[0-9TZ]{16}-[0-9a-f]{16}")


def executed(path: Path, folder: str) -> nbformat.NotebookNode:
    """A notebook with the outputs of a run in `folder`, without keys and proxies."""
    kept = {name: value for name, value in os.environ.items() if not LEFT_OUT.fullmatch(name)}
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=120, record_timing=False, resources={"metadata": {"path": folder}})
    return client.execute(env={**kept, "PYTHONWARNINGS": "error::UserWarning", "IPYTHONDIR": folder})


def settled(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what differs from run to run."""
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        for output in cell.get("outputs", []):
            plain = output.get("data", {})
            if "text/plain" in plain:
                plain["text/plain"] = RUN_FACTS.sub("...", plain["text/plain"])
    return notebook


def main() -> None:
    """Renew them all."""
    for path in sorted(HERE.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(settled(executed(path, folder)), path)
            print(f"{path.name}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
