"""Renew the images of the README and the site: `python docs/images.py`. The gallery needs Chromium.

The sandbox generates all of them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from langchain_cogview import CogViewImageGenerator, gallery

DOCS = Path(__file__).parent
PROMPTS = ["A fox", "A heron at dawn", "[[content-filter]] something", "An owl", "[[flagged:2]] A hare", "A lighthouse"]
WINDOW = "1056,930"
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
    "--hide-scrollbars",
)


def main() -> int:
    generator = CogViewImageGenerator(base_url="sandbox:")
    generator.invoke("A lighthouse at dusk").save(DOCS / "placeholder.png")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("There is no Chromium; docs/gallery.png stays as it is. Debian has it as the package chromium.")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        page = gallery(generator.batch(PROMPTS, return_exceptions=True)).save(
            Path(folder, "gallery.html"), title="A gallery"
        )
        screenshot = Path(folder, "gallery.png")
        subprocess.run(  # noqa: S603
            [chromium, *QUIET, f"--user-data-dir={folder}/profile", f"--window-size={WINDOW}", f"--screenshot={screenshot}",
             page.absolute().as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
        # Few colours: an image in the repository stays small.
        from PIL import Image  # noqa: PLC0415

        with Image.open(screenshot) as shot:
            shot.convert("RGB").quantize(96).save(DOCS / "gallery.png", optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
