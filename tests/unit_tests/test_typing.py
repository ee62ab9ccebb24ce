"""What editors, notebooks and type checkers know of the constructors."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from langchain_core.runnables import RunnableSerializable
from langchain_core.tools import BaseTool

from langchain_cogview import CogViewImageGenerator, CogViewImageTool
from langchain_cogview.request import GeneratorSettings
from langchain_cogview.tool import ToolSettings

TYPED = Path(__file__).with_name("typed.py")
REFUSED = [number for number, line in enumerate(TYPED.read_text().splitlines(), 1) if line.endswith("# refused")]
KERNEL = """
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from langchain_cogview import CogViewImageGenerator, CogViewImageTool

shell = InteractiveShell.instance()
shell.push({"CogViewImageGenerator": CogViewImageGenerator, "CogViewImageTool": CogViewImageTool})
for name in ("CogViewImageGenerator", "CogViewImageTool"):
    shell.run_line_magic("pinfo", name)
    for part in ("waterm", "max_r", "max_i"):
        line = f"{name}({part}"
        with provisionalcompleter():
            print("COMPLETES", name, *(found.text for found in shell.Completer.completions(line, len(line))))
"""


@pytest.fixture(scope="module")
def kernel():
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, check=True)
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)


def test_a_fresh_kernel_shows_every_argument_with_type_and_default(kernel):
    generator, tool = kernel.split("Init signature:")[1:]
    for shown in (generator, tool):
        for name in GeneratorSettings.__annotations__:
            assert re.search(rf"\b{name}: [^\n]+ = ", shown), name
        assert re.search(r"timeout: [^\n]*float[^\n]* = 120\.0", shown)
    for name in ToolSettings.__annotations__:
        assert re.search(rf"\b{name}: [^\n]+ = ", tool), name


def test_a_fresh_kernel_completes_the_arguments(kernel):
    lines = [line.split()[1:] for line in kernel.splitlines() if line.startswith("COMPLETES")]
    completed = {(name, found) for name, *all_found in lines for found in all_found}
    for name in ("CogViewImageGenerator", "CogViewImageTool"):
        assert (name, "watermark_enabled=") in completed
        assert (name, "max_retries=") in completed
    assert ("CogViewImageTool", "max_images=") in completed


def test_the_typed_arguments_are_the_fields():
    assert GeneratorSettings.__annotations__.keys() == CogViewImageGenerator.model_fields.keys() - {"name"}
    own = ToolSettings.__annotations__.keys() - GeneratorSettings.__annotations__.keys()
    assert own == CogViewImageTool.model_fields.keys() - {"generator"}


def test_a_subclass_shows_all_arguments_too():
    class Mine(CogViewImageTool):
        """With a field of its own."""

        house_style: str = "plain"

    shown = inspect.signature(Mine).parameters
    assert {"house_style", "max_images", "watermark_enabled"} <= shown.keys()
    assert Mine(base_url="sandbox:", size="square").generator.size == "square"


@pytest.mark.heavy
def test_mypy_refuses_what_does_not_exist(tmp_path):
    settings = tmp_path / "mypy.ini"  # without pydantic's plugin: users need none
    settings.write_text("[mypy]\ndisable_error_code = import-untyped\nfollow_imports = silent\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), "--cache-dir", str(tmp_path), str(TYPED)]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert sorted({int(line) for line in re.findall(r"typed\.py:(\d+): error", output)}) == REFUSED, output


@pytest.mark.heavy
def test_pyright_refuses_what_does_not_exist(tmp_path):
    settings = tmp_path / "pyrightconfig.json"
    include = {"include": [str(TYPED)], "typeCheckingMode": "standard", "pythonVersion": "3.11"}
    settings.write_text(json.dumps(include))
    command = [sys.executable, "-m", "basedpyright", "--project", str(settings), "--pythonpath", sys.executable]
    output = json.loads(subprocess.run([*command, "--outputjson"], capture_output=True, text=True, check=False).stdout)
    errors = [item for item in output["generalDiagnostics"] if item["severity"] == "error"]
    assert sorted({item["range"]["start"]["line"] + 1 for item in errors}) == REFUSED, errors


@pytest.mark.parametrize(
    ("ours", "theirs", "allowed"),
    [
        (CogViewImageTool, BaseTool, {"_run", "_arun"}),
        (CogViewImageGenerator, RunnableSerializable, set()),
    ],
)
def test_nothing_private_of_langchain_is_overridden(ours, theirs, allowed):
    langchains = {
        name
        for base in theirs.__mro__
        if base.__module__.startswith("langchain_core")
        for name in vars(base)
        if name.startswith("_") and not name.startswith(("__", "_abc"))
    }
    assert vars(ours).keys() & langchains <= allowed
