"""Placeholders of the sandbox: the asked size, the same for the same prompt, and marked SANDBOX."""

from __future__ import annotations

import hashlib
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from langchain_cogview.images.formats import inspect
from langchain_cogview.sandbox.picture import draw


@pytest.mark.parametrize("size", ["1024x1024", "512x512", "1440x720", "720x1440", "2048x512", "528x1328", "1728x960"])
def test_an_image_decodes_at_the_asked_size(size):
    width, height = map(int, size.split("x"))
    data = draw("a kitten", width, height)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.size == (width, height)
        assert image.mode == "P"
        assert image.text["Source"] == "langchain-cogview sandbox"
        assert image.text["Prompt-SHA256"] == hashlib.sha256(b"a kitten").hexdigest()
    assert inspect(io.BytesIO(data)).mime_type == "image/png"


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=30), st.integers(64, 700), st.integers(64, 700))
def test_any_prompt_and_size_gives_a_whole_image(prompt, width, height):
    data = draw(prompt, width, height)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.size == (width, height)


def test_the_landscape_does_not_run_into_the_caption():
    for i in range(100):
        with Image.open(io.BytesIO(draw(f"valley {i}", 512, 512))) as image:
            above_and_below_the_word = image.crop((0, 512 - 65, 512, 512 - 50)), image.crop((0, 512 - 15, 512, 512))
            assert [len(strip.getcolors()) for strip in above_and_below_the_word] == [1, 1]


@pytest.mark.parametrize("size", [(63, 64), (64, 4097), (0, 0)])
def test_a_side_out_of_bounds_is_refused(size):
    with pytest.raises(ValueError, match="64 to 4096"):
        draw("a kitten", *size)


def test_a_prompt_always_gives_the_same_image_and_no_two_prompts_do():
    images = {draw(f"kitten {i}", 512, 512) for i in range(30)}
    assert len(images) == 30
    assert images == {draw(f"kitten {i}", 512, 512) for i in range(30)}


def test_prompts_can_be_told_apart_by_eye():
    seen = set()
    for i in range(12):
        with Image.open(io.BytesIO(draw(f"kitten {i}", 512, 512))) as image:
            seen.add(image.convert("RGB").resize((16, 16)).tobytes())
    assert len(seen) == 12


def test_an_image_says_sandbox():
    with Image.open(io.BytesIO(draw("a kitten", 1024, 1024))) as image:
        dots = image.crop((277, 924, 747, 994)).resize((47, 7), Image.Resampling.NEAREST)
        ground = image.getpixel((0, 1023))
    assert ["".join(".#"[dots.getpixel((x, y)) != ground] for x in range(47)) for y in range(7)] == [
        ".####...###...#...#..####...####....###...#...#",
        "#......#...#..##..#..#...#..#...#..#...#...#.#.",
        "#......#...#..##..#..#...#..#...#..#...#...#.#.",
        ".###...#####..#.#.#..#...#..####...#...#....#..",
        "....#..#...#..#..##..#...#..#...#..#...#...#.#.",
        "....#..#...#..#..##..#...#..#...#..#...#...#.#.",
        "####...#...#..#...#..####...####....###...#...#",
    ]


def test_an_image_is_small():
    assert max(len(draw(f"kitten {i}", 1024, 1024)) for i in range(10)) < 60_000
