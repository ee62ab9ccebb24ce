"""In a marimo notebook images are shown in the cell, and no program is opened on the server."""

import html
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from langchain_cogview.notebook import previews

APP = """
import marimo

app = marimo.App()


@app.cell
def _():
    import PIL.ImageShow
    from langchain_cogview import CogViewImageGenerator

    def opened(*args, **kwargs):
        raise SystemExit("A program was opened.")

    PIL.ImageShow.show = opened
    generator = CogViewImageGenerator(base_url="sandbox:", output_dir="images", size="512x512")
    result = generator.invoke("a-kitten-as-the-last-line")
    result
    return (generator,)


@app.cell
def _(generator):
    generator.invoke("a-puppy-by-show").show()
    return


@app.cell
async def _(generator):
    results = await generator.abatch(["a-foal-of-a-batch"])
    results[0].image.show()
    return


@app.cell
def _(generator):
    from langchain_cogview import gallery

    gallery(generator.batch(["a-fox-in-a-gallery"]))
    return


if __name__ == "__main__":
    app.run()
"""


@pytest.mark.heavy
def test_images_are_shown_in_the_cells_of_a_real_notebook(tmp_path):
    pytest.importorskip("marimo")
    (tmp_path / "app.py").write_text(APP)
    command = [sys.executable, "-m", "marimo", "export", "html", "app.py", "-o", "out.html", "--no-include-code"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out.html").read_text()
    shown = re.findall(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/=]{100,}", html.unescape(page))
    assert len(set(shown)) == 4, done.stderr
    for prompt in ("a-kitten-as-the-last-line", "a-puppy-by-show", "a-foal-of-a-batch", "a-fox-in-a-gallery"):
        assert prompt in page
    assert "image.show() shows it" not in page
    assert json.dumps("A program was opened.")[1:-1] not in page


def test_show_adds_to_the_cells_output_also_from_another_thread(generator, monkeypatch):
    outputs, in_cell = [], [True]
    stand_in = SimpleNamespace(
        running_in_notebook=lambda: in_cell[0], Html=lambda text: text, output=SimpleNamespace(append=outputs.append)
    )
    monkeypatch.setitem(sys.modules, "marimo", stand_in)
    monkeypatch.setattr(previews._Marimo, "seen", False)
    image = generator.invoke("a kitten").image
    image.show()
    in_cell[0] = False  # as marimo answers in a thread of the cell's
    image.show()
    assert len(outputs) == 2
    assert all("data:image/png;base64," in item for item in outputs)


def test_marimo_is_not_loaded_to_find_out():
    program = """
import sys
from langchain_cogview import CogViewImageGenerator
CogViewImageGenerator(base_url="sandbox:").invoke("x")._repr_mimebundle_()
print([name for name in ("marimo", "IPython") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=400)
    assert done.stdout.strip() == "[]", done.stderr
