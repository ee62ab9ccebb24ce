"""The README is the guide: its blocks run as they stand, in order, and its tables are those of the code."""

import re
from pathlib import Path

import pytest

import langchain_cogview
from langchain_cogview.catalog import MODELS, PRICES_AS_OF
from langchain_cogview.sandbox import faults

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_every_python_block_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COGVIEW_BASE_URL", "")  # so that what the first block sets is undone
    namespace = {}
    for number, block in enumerate(blocks("python"), 1):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    for line in (
        "1344 768 image/png",
        "1024 3 3",
        "A watercolour of a heron, soft light",
        "There it is.",
        "The limit of 2 images",
        "prompt 1 ",
        "filter: most severe",
        "prompt 2 True",
        "CogViewBalanceError 1113 final False",
        "3 a kitten 1",
        "2 made, 0 failed, 0 blocked",
        "2 made, 0 skipped; manifest: manifest.jsonl",
        "0 made, 2 skipped",
        "True 0 True",
        "True True",
        "True 1280",
        "gallery.html",
        "4 images in a labelled grid",
        "cogview-3-flash ",
    ):
        assert line in printed
    assert (tmp_path / "kitten-wide.png").exists()


def section(name):
    return README.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]


def test_the_table_of_models_is_the_catalogs():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section("models").strip().splitlines()[2:]
    ]
    documented = [info for info in MODELS.values() if info.documented]
    expected = [
        [
            f"`{info.name}`",
            "both" if len(info.regions) == 2 else "China",
            ", ".join(info.sizes),
            f"sides {info.rule.min_side}–{info.rule.max_side}, divisible by {info.rule.multiple}, at most {info.rule.max_pixels:,} pixels",
            ", ".join(info.qualities),
            " ".join(map(str, info.price("china"))),
            " ".join(map(str, info.price("international") or "–")),
            str(info.in_flight),
        ]
        for info in documented
    ]
    assert rows == expected
    assert f"as of {PRICES_AS_OF}" in README


def test_the_table_of_triggers_is_the_sandboxes():
    told = set(re.findall(r"\[\[[^\]]+\]\]", section("triggers")))
    known = set(re.findall(r"^    (\[\[[^\]]+\]\])", faults.__doc__, re.MULTILINE))
    assert told == known


def test_every_public_name_is_in_the_reference_or_the_error_tree():
    reference = README.split("## Reference")[1]
    from langchain_cogview import errors

    for name in langchain_cogview.__all__:
        assert f"`{name}`" in reference or name in errors.__doc__, name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_readme_keeps_its_two_commands():
    first, second, *_ = blocks("bash")
    assert "--sandbox" in first and ".venv/bin/pip install" in first
    assert second.rstrip().endswith(".venv/bin/pytest")


@pytest.mark.parametrize("name", ["README.md", "README.zh.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_no_registry_machine_path_or_key_is_named(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"pypi\.org|index-url|/root/|/work/|/home/|[0-9a-f]{32}\.[A-Za-z0-9]{16}", text)
