"""The pages of the documentation: their blocks run as they stand, in order, and their links lead somewhere.

What a block is, by its language and the comment before it:

- `python` runs in this process, in one namespace for each page. If its first line is `# name.py`, it is a file of that name instead.
- `bash` and `shell` run in a shell, in the page's folder. Port 8765 becomes one that is free.
- `<!-- run by PATH -->` before it: another test or script runs it. `<!-- not run: REASON -->`: nothing does, for that reason.
- Other languages are not run.
"""

import contextlib
import os
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

import langchain_cogview
from langchain_cogview import errors
from langchain_cogview.catalog import MODELS, PRICES_AS_OF
from langchain_cogview.sandbox import faults

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "README.zh.md", *sorted(DOCS.rglob("*.md")))
}
TRANSLATIONS = {name for name in PAGES if ".zh." in name or "/zh/" in name}
"""Pages whose blocks are those of the English page, as another test checks."""
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
FILES = f"{URLS['Repository']}/blob/main/"
PRINTED = {  # what a reader sees of each page, as regular expressions
    "README.md": [r"Here is your image\.", r"1024 1024", "2 made before"],
    "docs/index.md": [r"A lighthouse at dusk 1024x1024"],
    "docs/agents.md": [
        r"1024",
        r"Here is your image\.",
        r"The limit of 2 images",
        r"Made [\w-]+\.png",
        r"\['success', 'error', 'success'\] 2",
        r"True",
        r"1024 0\.06 CNY",
    ],
    "docs/chains.md": [
        r"1344 768 image/png",
        r"1024 3 3",
        r"A watercolour of a heron, soft light",
        r"A heron stands in the reeds",
        r"sent",
        r"cogview-3-flash ",
    ],
    "docs/content-filter.md": [r"prompt 1 ", r"filter: most severe", r"prompt 2 True"],
    "docs/errors.md": [r"CogViewBalanceError 1113 final False"],
    "docs/many-images.md": [
        r"2 made, 0 failed, 0 blocked",
        r"2 made, 0 skipped; manifest: manifest\.jsonl",
        r"0 made, 2 skipped",
        r"True 0 True",
        r"True True",
    ],
    "docs/models.md": [],
    "docs/notebooks.md": [r"gallery\.html", r"4 images in a labelled grid"],
    "docs/processes.md": [r"3 3", r"\{'made': 3\}", r"made invalid", r"1024x1024"],
    "docs/production.md": [r"image/png", r"422", r"1024", r"images"],
    "docs/sandbox.md": [r"Here is your image\.", r"3 a kitten 1", r"1 passed", r'"url":'],
    "docs/tasks.md": [r"True 1280"],
}


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    code: str
    comment: str
    line: int

    @property
    def file(self) -> str | None:
        named = re.match(r"# (\w+\.py)\n", self.code) if self.language == "python" else None
        return named and named[1]

    @property
    def runs(self) -> bool:
        return not re.match(r"not run: |run by ", self.comment)


def blocks(text: str) -> list[Block]:
    found = re.finditer(r"^(?:<!-- ([^\n]*) -->\n)?```(\w*)[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [Block(item[2], item[3], item[1] or "", text[: item.start(2)].count("\n") + 1) for item in found]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_in_a_shell(code: str, folder: Path) -> str:
    """Run a block as a reader does, in a terminal with this environment's programs."""
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    shell = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", code.replace("8765", port)],
        cwd=folder,
        env={**environment, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        output, messages = shell.communicate(timeout=180)
    finally:  # also what the block has started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, f"{code}\n{output}\n{messages}"
    return output


def _marks(page):
    # Each command of a shell takes a second.
    has_commands = any(block.runs and block.language in {"bash", "shell"} for block in blocks(PAGES[page]))
    return [pytest.mark.docs] if has_commands and page != "README.md" else []


@pytest.mark.parametrize("page", [pytest.param(page, marks=_marks(page)) for page in sorted(set(PAGES) - TRANSLATIONS)])
def test_every_block_runs_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("COGVIEW_BASE_URL", "")  # so that what a block sets is undone
    namespace, printed, files = {"__name__": "__main__"}, "", set()
    try:
        for block in blocks(PAGES[page]):
            if block.file:
                compile(block.code, f"{page}:{block.line}", "exec")
                (tmp_path / block.file).write_text(block.code, encoding="utf-8")
                files.add(block.file.removesuffix(".py"))
            elif block.runs and block.language == "python":
                exec(compile(block.code, f"{page}:{block.line}", "exec"), namespace)
            elif block.runs and block.language in {"bash", "shell"}:
                printed += run_in_a_shell(block.code, tmp_path)
    finally:
        for name in files:
            sys.modules.pop(name, None)
    printed += capsys.readouterr().out
    for line in PRINTED.get(page, ()):
        assert re.search(line, printed), line


def test_a_block_that_is_not_run_has_a_reason():
    for page, text in PAGES.items():
        for block in blocks(text):
            if block.runs or page in TRANSLATIONS:
                continue
            position = f"{page}:{block.line}"
            if runner := re.fullmatch(r"run by (\S+)", block.comment):
                assert (ROOT / runner[1]).exists(), position
            else:
                assert len(block.comment.removeprefix("not run: ")) > 10, position


def test_what_is_printed_is_checked_for_every_page_with_blocks_that_run():
    for page in set(PAGES) - TRANSLATIONS:
        runs = any(block.runs and not block.file and block.language == "python" for block in blocks(PAGES[page]))
        assert not runs or page in PRINTED, page


# --- links


def anchors(text: str) -> set[str]:
    """The site's and GitHub's: lower case, punctuation dropped, a hyphen for a space."""
    code_out = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#{1,6} (.+)$", code_out, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_somewhere(page):
    text = PAGES.get(page) or (ROOT / page).read_text(encoding="utf-8")
    code_out = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", code_out) + re.findall(r'(?:src|href)="([^"]+)"', code_out)
    for target in targets:
        if target.startswith(FILES):
            assert (ROOT / target.removeprefix(FILES)).exists(), target
        elif not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), target
            if anchor and file.suffix == ".md":
                assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_no_page_names_another_address_of_the_project():
    known = tuple(URLS.values())
    for page, text in PAGES.items():
        for url in re.findall(r"https://[\w.-]*github[\w.-]*/[\w./-]*cogview[\w./-]*", text):
            assert url.startswith(known), (page, url)


def test_the_site_has_every_page_in_its_navigation():
    # Not parsed: a tag of the file names a Python function.
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    pages = {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")}
    assert set(re.findall(r"([\w/-]+\.md)", navigation)) == pages


# --- tables


def section(page: str, name: str) -> str:
    return PAGES[page].split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]


def test_the_table_of_models_is_the_catalogs():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section("docs/models.md", "models").strip().splitlines()[2:]
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
    assert f"as of {PRICES_AS_OF}" in PAGES["docs/models.md"]
    limits = {info.name: info.max_prompt_characters for info in documented if info.max_prompt_characters}
    assert limits == {"glm-image": 1000}, "docs/models.md says how long a prompt may be"


def test_the_table_of_triggers_is_the_sandboxes():
    listed = set(re.findall(r"\[\[[^\]]+\]\]", section("docs/sandbox.md", "triggers")))
    assert listed == set(re.findall(r"^    (\[\[[^\]]+\]\])", faults.__doc__, re.MULTILINE))


def test_the_table_of_exit_codes_is_the_commands():
    output = pytest.importorskip("langchain_cogview.cli.output")
    rows = re.findall(r"^\| (\d+) \| ", PAGES["docs/command-line.md"], re.MULTILINE)
    assert list(map(int, rows)) == list(output.EXIT_CODES)


def test_every_command_is_on_the_page_about_the_command_line():
    pytest.importorskip("typer")
    command = [sys.executable, "-m", "langchain_cogview.cli", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("Commands:")[1]
    names = re.findall(r"^  ([a-z]+)  ", text.split("Exit codes")[0], re.MULTILINE)
    assert "generate" in names
    for name in names:
        assert f"`cogview {name}" in PAGES["docs/command-line.md"], name


def test_every_extra_is_on_the_first_page():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for_developers = {"benchmark", "test", "integrations", "frontends", "lint", "dev", "docs"}
    listed = re.findall(r"^\| `(\w+)` \| ", PAGES["docs/index.md"], re.MULTILINE)
    assert {name for name in listed if name in extras} == set(extras) - for_developers


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: ([\w.]+)$", PAGES["docs/reference.md"], re.MULTILINE)
    assert "langchain_cogview.errors" in listed  # with all that the module has
    for name in dir(langchain_cogview):
        assert name in vars(errors) or f"langchain_cogview.{name}" in listed, name
    for path in listed:
        assert pkgutil.resolve_name(path) is not None
