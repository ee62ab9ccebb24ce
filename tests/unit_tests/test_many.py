"""Real prompts in bulk: every file decodes at its size, and no two prompts share one."""

import asyncio
import csv
from pathlib import Path

import pytest
from PIL import Image

from langchain_cogview import CogViewImageGenerator

PARTI = Path(__file__).parents[3] / "shared" / "data" / "parti_prompts.tsv"
OWN = [
    "一只可爱的小猫", "A cute little kitten", "a cute little kitten", "a \"quoted\" fox, and a 'dog'", "猫\n犬", "🦊" * 40,
    "the word STOP", "a map of Iceland; rivers in blue", "…", "x", "X", " x", "x ", "1024x1024", "../kitten", "%s {0} $HOME",
]  # fmt: skip


def prompts():
    if not PARTI.exists():
        return OWN
    with PARTI.open(encoding="utf-8", newline="") as file:
        return list(
            dict.fromkeys(row["Prompt"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["batch", "abatch"])
def test_every_prompt_gets_a_file_of_its_own_that_decodes(sandbox, tmp_path, how):
    given = prompts()
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path, size="640x512")
    results = generator.batch(given) if how == "batch" else asyncio.run(generator.abatch(given))
    assert [result.prompt for result in results] == given
    paths = {result.path for result in results}
    hashes = {result.sha256 for result in results}
    assert len(paths) == len(hashes) == len(given) == sandbox.images_made
    assert set(tmp_path.iterdir()) == paths
    for path in paths:
        with Image.open(path) as picture:
            picture.load()
            assert picture.size == (640, 512)
