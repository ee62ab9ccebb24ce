"""The notebooks run from top to bottom without a key, what is committed of them is small and clean, and a browser shows it."""

import base64
import importlib.util
import io
import os
import re
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from langchain_cogview import Sandbox
from langchain_cogview.sandbox.server import SandboxServer
from tests.unit_tests.notebook.test_html_browser import CHROMIUM, COUNTED, opened

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
IMAGE = re.compile(r"data:image/[a-z]+;base64,([A-Za-z0-9+/=]+)")
OWNED = "document.title='owned'"
HOSTILE = [
    f"<script>{OWNED}</script>",
    f'"><img src=x onerror="{OWNED}">',
    f"' onload='{OWNED}' <svg onload={OWNED}>",
    f"</figcaption></div></textarea></script><script>{OWNED}</script>",
    f"[x](javascript:{OWNED}) $\\href{{javascript:{OWNED}}}{{x}}$",
    f"[[content-filter:1]] <iframe srcdoc='<script>parent.{OWNED}</script>'>",
]

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
in_a_kernel = pytest.mark.filterwarnings("ignore")  # the kernel client's own, and nbconvert's
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def renew():
    spec = importlib.util.spec_from_file_location("renew", NOTEBOOKS[0].with_name("renew.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def images_of(notebook):
    """The bytes of all images in the outputs."""
    found = [IMAGE.findall(output.get("data", {}).get("text/html", "")) for output in outputs(notebook)]
    return [base64.b64decode(content, validate=True) for item in found for content in item]


def content_of(output):
    """What an output says, without the bytes of its images: those depend on the machine's zlib."""
    shown = {kind: IMAGE.sub("image", str(value)) for kind, value in output.get("data", {}).items()}
    return output.output_type, output.get("name"), output.get("text"), shown


def written(folder, *cells):
    """A scratch notebook."""
    path = folder / "scratch.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), path)
    return path


def seen_in_a_browser(notebook, folder):
    """Title and images of the exported notebook, once a browser has decoded them and run every script."""
    nbconvert = pytest.importorskip("nbconvert")
    html, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    page = folder / "page.html"
    page.write_text(html.replace("</body>", f"{COUNTED}</body>"), encoding="utf-8")
    dom = opened(page, folder / "profile")
    return re.search(r"<title>(.*?)</title>", dom)[1], re.search(r'data-seen="(.*?)"', dom)[1]


# --- what is committed


def test_they_tell_one_story_in_order():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_quickstart",
        "02_agents",
        "03_chains",
        "04_content_filter_and_cost",
        "05_galleries_and_storage",
    ]


@every
def test_the_committed_outputs_are_small_and_hold_no_secret(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) <= 150_000
    without_images = IMAGE.sub("", text)
    assert not re.search(r"Signature=|Expires=|[0-9a-f]{32}\.[A-Za-z0-9]{16}|widget|[0-9a-f]{12}", without_images)
    assert not re.search(
        r"""(?:^|[\s'"=(])(/[a-z]+/|[A-Z]:\\)|file://|/(?:tmp|home|root|work|Users)/""", without_images
    )
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not [
        output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"
    ]


@every
def test_every_committed_image_is_whole(path):
    shown = images_of(nbformat.read(path, as_version=4))
    assert shown
    for content in shown:
        Image.open(io.BytesIO(content)).load()


@every
@pytest.mark.parametrize(
    ("variables", "service"),
    [
        ({}, "the sandbox"),
        ({"ZHIPUAI_API_KEY": ""}, "the sandbox"),
        ({"ZHIPUAI_API_KEY": "k"}, "BigModel"),
        ({"ZAI_API_KEY": "k"}, "Z.ai"),
        ({"ZAI_API_KEY": "k", "COGVIEW_BASE_URL": "sandbox:"}, "the sandbox"),
    ],
)
def test_the_first_cell_says_which_service_draws(path, variables, service, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", dict(variables))
    first = next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    exec(first.source, {})
    assert capsys.readouterr().out.startswith(f"Pictures come from {service}: ")
    assert os.environ.get("COGVIEW_BASE_URL") == ("sandbox:" if service == "the sandbox" else None)


@every
def test_its_links_to_other_notebooks_lead_somewhere(path):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", "\n".join(cells)):
        assert (path.parent / target).exists(), target


# --- a run


@pytest.mark.notebook
@in_a_kernel
@every
def test_it_runs_on_the_sandbox_and_gives_what_is_committed(path, renew, tmp_path):
    notebook = renew.settled(renew.executed(path, str(tmp_path)))
    committed = outputs(nbformat.read(path, as_version=4))
    assert [content_of(output) for output in outputs(notebook)] == [content_of(output) for output in committed]


@pytest.mark.heavy
@in_a_kernel
@every
def test_with_a_key_it_asks_the_service_and_pays_for_as_many_images_as_it_says(path, renew, tmp_path):
    with Sandbox() as sandbox, SandboxServer(sandbox) as service:
        notebook = renew.executed(path, str(tmp_path), ZHIPUAI_API_KEY="k" * 32, COGVIEW_BASE_URL=service.base_url)
        assert outputs(notebook)[0].text == f"Pictures come from {service.base_url}: each is paid for.\n"
        number_word = re.search(r"pay for (\w+) (?:images|pictures)", notebook.cells[0].source)[1]
        assert (
            sandbox.images_made
            == {"three": 3, "five": 5, "seven": 7, "eight": 8, "twelve": 12, "seventeen": 17}[number_word]
        )
    assert not [output for output in outputs(notebook) if output.output_type == "error"]


@pytest.mark.notebook
@in_a_kernel
def test_a_second_renewal_leaves_no_difference(renew, tmp_path, capsys):
    path = written(
        tmp_path,
        "from langchain_cogview import CogViewImageGenerator, gallery\n"
        "made = CogViewImageGenerator(base_url='sandbox:', output_dir='images').invoke({'prompt': 'x', 'n': 2})\n"
        "gallery(made)",
        "made.images[0].show()",
        "print('slowly', flush=True)\nprint('done')",
    )
    renew.main([str(path)])
    first = path.read_bytes()
    renew.main([str(path)])
    assert path.read_bytes() == first
    notebook = nbformat.read(path, as_version=4)
    assert [len(cell.outputs) for cell in notebook.cells] == [1, 1, 1]  # without the line of elapsed time
    assert len(images_of(notebook)) == 3
    assert capsys.readouterr().out.startswith("scratch.ipynb: ")


@pytest.mark.notebook
@in_a_kernel
def test_a_run_sees_neither_keys_nor_proxies(renew, tmp_path, monkeypatch):
    for name in ("ZHIPUAI_API_KEY", "ZAI_API_KEY", "OPENAI_API_KEY", "https_proxy", "HTTPS_PROXY", "LANGSMITH_TRACING"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("COGVIEW_BASE_URL", "https://example.invalid")
    code = "import os\nprint([n for n in os.environ if 'KEY' in n or 'proxy' in n.lower() or 'SMITH' in n or 'BASE_URL' in n])"
    assert outputs(renew.executed(written(tmp_path, code), str(tmp_path)))[0].text == "[]\n"


@pytest.mark.notebook
@in_a_kernel
def test_show_puts_every_image_into_the_cells_output(renew, tmp_path):
    code = (
        "from langchain_cogview import CogViewImageGenerator\n"
        "CogViewImageGenerator(base_url='sandbox:', output_dir='images').invoke({'prompt': 'x', 'n': 2}).show()"
    )
    notebook = renew.executed(written(tmp_path, code), str(tmp_path))
    assert [output.output_type for output in outputs(notebook)] == ["display_data", "display_data"]
    assert len(images_of(notebook)) == 2


def test_what_was_printed_in_pieces_stands_together(renew):
    def printed(text, name="stdout"):
        return nbformat.v4.new_output("stream", text=text, name=name)

    image = nbformat.v4.new_output("display_data", data={"text/plain": "x"})
    pieces = [printed("a"), printed("b\n"), printed("!", "stderr"), printed("c"), image, printed("d")]
    assert [(item.get("name"), item.get("text")) for item in renew.joined(pieces)] == [
        ("stdout", "ab\n"),
        ("stderr", "!"),
        ("stdout", "c"),
        (None, None),
        ("stdout", "d"),
    ]


# --- in a browser


@pytest.mark.notebook
@in_a_kernel
@in_a_browser
@every
def test_a_browser_shows_every_image_of_the_exported_notebook(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    title, seen = seen_in_a_browser(notebook, tmp_path)
    count = len(images_of(notebook))
    assert title == "Notebook"
    assert seen == f"{count}/{count}"


@pytest.mark.notebook
@in_a_kernel
@in_a_browser
def test_no_prompt_changes_the_page(renew, tmp_path):
    path = written(
        tmp_path,
        "from langchain_cogview import CogViewImageGenerator, compare, gallery\n"
        f"hostile = {HOSTILE!r}\n"
        "generator = CogViewImageGenerator(base_url='sandbox:', size='512x512')\n"
        "generator.invoke(hostile[0])",
        "generator.invoke({'prompt': hostile[1], 'n': 2})",
        "generator.invoke(hostile[2]).show()",
        "results = generator.batch(hostile, return_exceptions=True)\ngallery([*results, ValueError(hostile[0])])",
        "compare(hostile[1], sizes=['512x512', hostile[0]], qualities=['standard', hostile[3]], generator=generator)",
        "print(results, *hostile, sep='\\n')\nhostile",
    )
    notebook = renew.executed(path, str(tmp_path))
    title, seen = seen_in_a_browser(notebook, tmp_path)
    assert title == "Notebook"
    assert seen == "10/10"


@in_a_browser
@pytest.mark.notebook
@in_a_kernel
def test_a_script_in_an_output_would_be_noticed(tmp_path):
    output = nbformat.v4.new_output("display_data", data={"text/html": HOSTILE[1]})
    cell = nbformat.v4.new_code_cell("x", outputs=[output])
    title, seen = seen_in_a_browser(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
    assert (title, seen) == ("owned", "0/1")
