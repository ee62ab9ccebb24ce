"""The fixture for the tests of one's own application, as pytest finds it where the package is installed."""

import subprocess
import sys

TESTS = """
import pytest
from langchain_cogview import CogViewContentFilterError, CogViewImageGenerator, CogViewImageTool


def test_replies_are_scripted_and_requests_counted(cogview_sandbox):
    cogview_sandbox.fail_next("content-filter", after=2)
    generator = CogViewImageGenerator()
    generator.invoke("one")
    generator.invoke("two")
    with pytest.raises(CogViewContentFilterError):
        generator.invoke("three")
    generator.invoke("four")
    assert [request.prompt for request in cogview_sandbox.requests] == ["one", "two", "three", "four"]
    assert cogview_sandbox.images_made == 3


def test_each_test_has_its_own(cogview_sandbox, tmp_path):
    assert not cogview_sandbox.requests
    cogview_sandbox.fail_next("status", status=200, body={"data": []})
    assert "may have been" in CogViewImageTool(output_dir=tmp_path).invoke({"prompt": "a kitten"})
"""


FOLDER = """
from langchain_cogview import CogViewImageTool


def test_a_tool_saves_in_the_folder_of_the_test(cogview_sandbox, tmp_path):
    CogViewImageTool().invoke({"prompt": "a kitten"})
    assert list(tmp_path.glob("cogview_images/*.png"))
"""


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:langsmith_plugin", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_test_gets_a_sandbox_of_its_own_by_naming_the_fixture(tmp_path, monkeypatch):
    monkeypatch.setenv("ZHIPUAI_API_KEY", "0123456789abcdef0123456789abcdef.0123456789abcdef")
    (tmp_path / "test_mine.py").write_text(TESTS)
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_a_tool_without_a_folder_leaves_nothing_in_the_working_folder(tmp_path):
    (tmp_path / "test_mine.py").write_text(FOLDER)
    done = run(tmp_path, f"--basetemp={tmp_path / 'temporary'}")
    assert done.returncode == 0, done.stdout
    assert not (tmp_path / "cogview_images").exists()


def test_nothing_of_the_package_is_imported_where_no_test_asks_for_it(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "import sys\n\n\ndef test_x():\n    ours = {name for name in sys.modules if name.startswith('langchain')}\n"
        "    assert ours <= {'langchain_cogview', 'langchain_cogview.pytest_plugin'}, ours\n"
    )
    done = run(tmp_path, "-p", "no:anyio")
    assert done.returncode == 0, done.stdout
