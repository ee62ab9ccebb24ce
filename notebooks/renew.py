"""Run every notebook on the sandbox and keep its outputs: `python notebooks/renew.py`, or with the names of some."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LEFT_OUT = re.compile(r".*_API_KEY|.*_PROXY|(COGVIEW|LANGCHAIN|LANGSMITH)_.*", re.IGNORECASE)
"""Variables that a run does not see: it asks no service, goes through no proxy, and sends no traces."""
RUN_FACTS = (
    (
        re.compile(r"(?<=id=')[0-9a-f]{8}(?=')|(?<=path=')(?:[^']*[/\\])?[0-9TZ]{16}-[0-9a-f]{8}-[0-9a-f]{16}(?=\.)"),
        "...",
    ),
    (re.compile(r"link expires \d{4}-\d\d-\d\d \d\d:\d\d UTC"), "link expires in a day"),
    (re.compile(r"\b\d+\.\d( |&nbsp;)s(?= · )"), r"0.1\1s"),
)
"""What differs from run to run, and what stands for it."""


def executed(path: Path, folder: str, **variables: str) -> nbformat.NotebookNode:
    """A notebook with the outputs of a run in `folder`.

    The run sees no keys and no proxies, `variables` apart, and draws no line of elapsed time.
    """
    kept = {name: value for name, value in os.environ.items() if not LEFT_OUT.fullmatch(name)}
    own = {"PYTHONWARNINGS": "error::UserWarning", "IPYTHONDIR": folder, "COGVIEW_STATUS_LINE": "off"}
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,  # seconds; only a cell that hangs takes them
        startup_timeout=600,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # of the kernel
        resources={"metadata": {"path": folder}},
    )
    return client.execute(env={**kept, **own, **variables})


def settled(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what differs from run to run."""
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
        for output in cell.get("outputs", []):
            shown = output.get("data", {})
            for kind in {"text/plain", "text/html"} & set(shown):
                for fact, stand_in in RUN_FACTS:
                    shown[kind] = fact.sub(stand_in, shown[kind])
    return notebook


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs in which what was printed at once stands together: a slow machine sends it in pieces."""
    whole: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and whole and whole[-1].get("name") == output.name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def main(names: list[str]) -> None:
    """Renew those that are named, or all."""
    for path in sorted(Path(name) for name in names) or sorted(HERE.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(settled(executed(path, folder)), path)
            print(f"{path.name}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
