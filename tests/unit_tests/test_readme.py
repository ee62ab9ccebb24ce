"""The README is one page that a person can read in a few minutes. Its blocks and links are tested with those of the other pages."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES, MAX_WORDS = 220, 1800


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_readme_is_short():
    readme = text("README.md")
    assert len(readme.splitlines()) <= MAX_LINES
    assert len(readme.split()) <= MAX_WORDS
    assert len(text("README.zh.md").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readme_keeps_its_two_commands(name):
    commands = re.findall(r"^```bash\n(.*?)^```", text(name), re.DOTALL | re.MULTILINE)  # .ci/run takes the first two
    assert "--sandbox" in commands[0] and ".venv/bin/pip install" in commands[0]
    assert commands[1].rstrip().endswith(".venv/bin/pytest")


@pytest.mark.parametrize("name", ["README.md", "README.zh.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_no_registry_machine_path_or_key_is_named(name):
    assert not re.search(r"pypi\.org|index-url|/root/|/work/|/home/|[0-9a-f]{32}\.[A-Za-z0-9]{16}", text(name))


def test_every_link_and_image_of_the_package_page_has_an_address():
    # What the hook of the build does, without the build.
    project = tomllib.loads(text("pyproject.toml"))
    readme = text("README.md")
    for substitution in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        readme = re.sub(substitution["pattern"], substitution["replacement"], readme)
    targets = re.findall(r"\]\(([^)]+)\)", readme) + re.findall(r'src="([^"]+)"', readme)
    assert len(targets) > 30
    assert all(target.startswith("https://") for target in targets)
    repository = project["project"]["urls"]["Repository"]
    raw = repository.replace("github.com", "raw.githubusercontent.com")
    images = re.findall(r'(?:!\[[^\]]*\]\(|src=")([^)"]+)', readme)
    assert [image for image in images if "shields.io" not in image] == [
        f"{raw}/main/docs/placeholder.png",
        f"{raw}/main/docs/gallery.png",
    ]
    assert f"]({repository}/blob/main/docs/agents.md)" in readme
