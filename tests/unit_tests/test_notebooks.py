"""The notebooks run from top to bottom without a key, and what is committed of them is small and clean."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def renewal():
    spec = importlib.util.spec_from_file_location("renew", NOTEBOOKS[0].with_name("renew.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def told(output):
    """What an output says, without the bytes of its pictures: those depend on the machine's zlib."""
    return (
        output.output_type,
        output.get("text"),
        {kind: text for kind, text in output.get("data", {}).items() if kind == "text/plain"},
        sorted(output.get("data", {})),
    )


@pytest.mark.notebook
@pytest.mark.filterwarnings("ignore")  # the kernel client's own
@every
def test_it_runs_on_the_sandbox_and_gives_what_is_committed(path, tmp_path):
    renew = renewal()
    notebook = renew.settled(renew.executed(path, str(tmp_path)))
    assert [told(output) for output in outputs(notebook)] == [
        told(output) for output in outputs(nbformat.read(path, as_version=4))
    ]


@every
def test_the_committed_outputs_are_small_and_hold_no_secret(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) <= 150_000
    assert not re.search(
        r"Signature=|Expires=|/root/|/home/|/tmp/|/work/|[0-9a-f]{32}\.[A-Za-z0-9]{16}|widget-state", text
    )
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    pictures = [output for output in outputs(notebook) if "data:image/" in output.get("data", {}).get("text/html", "")]
    assert pictures
    assert not [
        output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"
    ]


@pytest.mark.notebook
@pytest.mark.filterwarnings("ignore")  # the kernel client's own
def test_show_puts_every_picture_into_the_cells_output(tmp_path):
    code = (
        "from langchain_cogview import CogViewImageGenerator\n"
        "CogViewImageGenerator(base_url='sandbox:', output_dir='pictures').invoke({'prompt': 'x', 'n': 2}).show()"
    )
    path = tmp_path / "show.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)
    shown = outputs(renewal().executed(path, str(tmp_path)))
    assert [output.output_type for output in shown] == ["display_data", "display_data"]
    assert all("data:image/png" in output.data["text/html"] for output in shown)
