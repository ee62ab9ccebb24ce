"""The public names, and what the modules of the package import."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

import langchain_cogview

PACKAGE = Path(langchain_cogview.__file__).parent


def test_public_names_are_all_there():
    for name in dir(langchain_cogview):
        assert getattr(langchain_cogview, name).__doc__
    needing_extras = ["CogViewMiddleware"]  # `import *` works without any extra
    assert dir(langchain_cogview) == sorted([*langchain_cogview.__all__, *needing_extras])
    with pytest.raises(AttributeError):
        langchain_cogview.nothing  # noqa: B018


def test_the_layers_keep_their_direction():
    # In a process of its own: it configures logging, which disables the existing loggers.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_is_in_a_layer_and_each_layer_in_a_row_of_the_table_for_developers():
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    layers = [
        {name.removeprefix("langchain_cogview.").replace(".", "/") for name in re.split(" [:|] ", layer)}
        for layer in settings["tool"]["importlinter"]["contracts"][0]["layers"]
    ]
    table = re.findall(
        r"^\| (`\w[^|]*) \|", (PACKAGE.parent / "CONTRIBUTING.md").read_text().split("Rules for")[0], re.MULTILINE
    )
    assert [set(re.findall(r"`([\w/]+?)/?`", row)) for row in table] == layers
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {name.split("/")[0] for layer in layers for name in layer} == modules - {"__init__"}


def test_no_modules_import_each_other_in_a_circle():
    graph = grimp.build_graph("langchain_cogview", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_optional_packages_are_imported_where_they_are_used():
    optional = {"PIL", "IPython", "typer", "rich", "socksio", "langchain", "langgraph", "mcp", "tqdm", "fsspec", "s3fs"}
    for path in PACKAGE.rglob("*.py"):
        if path.parts[-2:] in {
            ("cli", "batch.py"),
            ("cli", "completion.py"),
            ("cli", "mcp.py"),
        }:  # which `cli` loads once it has found typer
            continue
        if path.parts[-2] == "mcp":  # which `cli` loads once it has found the SDK
            continue
        for node in ast.parse(path.read_text()).body:
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {name.split(".")[0] for name in names} & optional, path


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, langchain_cogview; print([m for m in ('langchain_core', 'httpx', 'pydantic') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_using_the_core_imports_no_extra():
    code = (
        "import sys; from langchain_cogview import CogViewImageTool; CogViewImageTool(api_key='a.b');"
        "print([m for m in ('PIL', 'IPython', 'typer', 'langchain_cogview.sandbox') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_private_parts_of_langchain_are_not_imported():
    for path in PACKAGE.rglob("*.py"):
        assert "langchain_core._" not in path.read_text(), path
