"""The table of models agrees with the documentation, and every size that it gives is legal."""

import copy
import pickle
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_cogview.catalog import MODELS, find_model, legal_size, model_info, model_warning, parse_size

known = pytest.mark.parametrize("name", MODELS)


@known
def test_every_documented_size_passes_its_own_rule(name):
    info = MODELS[name]
    assert info.sizes and all(info.rule.allows(*parse_size(size)) for size in info.sizes)


@known
@pytest.mark.parametrize("word", ["square", "portrait", "landscape", "16:9", "9:16", "21:9", "3:2", "1/2", "4:1"])
def test_words_and_ratios_give_a_legal_size_of_that_shape(name, word):
    size = parse_size(legal_size(MODELS[name], word))
    assert MODELS[name].rule.allows(*size)
    width, height = {"square": (1, 1), "portrait": (3, 4), "landscape": (4, 3)}.get(word) or map(
        float, word.replace("/", ":").split(":")
    )
    assert size[0] / size[1] == pytest.approx(width / height, rel=0.07)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(sorted(MODELS)))
def test_the_size_named_as_nearest_is_legal_and_no_legal_neighbour_is_nearer(width, height, name):
    rule = MODELS[name].rule
    best = rule.nearest(width, height)
    assert rule.allows(*best)
    if 1 / 4 <= width / height <= 4:
        assert best[0] / best[1] == pytest.approx(width / height, rel=0.14)
    inside = all(rule.min_side <= side <= rule.max_side for side in (width, height))
    if not inside or width * height > rule.max_pixels:
        return
    distance = sum((a - b) ** 2 for a, b in zip(best, (width, height), strict=True))
    step = rule.multiple
    for dx in (-step, 0, step):
        for dy in (-step, 0, step):
            other = (best[0] + dx, best[1] + dy)
            if rule.allows(*other):
                # Rounding each side first costs at most half a step a side.
                assert (
                    sum((a - b) ** 2 for a, b in zip(other, (width, height), strict=True))
                    >= distance - step * step * 80
                )


@given(st.integers(1, 20_000), st.sampled_from(sorted(MODELS)))
def test_the_size_named_for_an_illegal_square_is_a_square(side, name):
    width, height = MODELS[name].rule.nearest(side, side)
    assert width == height


def test_the_size_named_for_a_size_that_is_too_large_has_its_shape():
    assert MODELS["cogview-4"].rule.nearest(5000, 2500) == (2048, 1024)
    assert MODELS["cogview-4"].rule.nearest(4000, 3000) == (1664, 1248)


def test_an_illegal_size_names_the_nearest_legal_one_and_the_rule():
    with pytest.raises(ValueError, match="nearest legal size is 1600x896.*divisible by 16, at most 2,097,152"):
        legal_size(MODELS["cogview-4"], "1600x900")
    with pytest.raises(ValueError, match="divisible by 32, at most 4,194,304"):
        legal_size(MODELS["glm-image"], "1040x1040")


@pytest.mark.parametrize("text", ["1024×1024", "1024X1024", " 1024 x 1024 ", "1024*1024"])
def test_a_size_may_be_written_as_people_write_it(text):
    assert legal_size(MODELS["cogview-4"], text) == "1024x1024"


@pytest.mark.parametrize(
    ("text", "model", "size"),
    [
        ("1344x768 (landscape)", "cogview-4", "1344x768"),
        ("landscape (1344x768)", "cogview-4", "1344x768"),
        ("1024x1024 (square)", "glm-image", "1024x1024"),
        ("1024 x 768, 4:3", "cogview-4", "1024x768"),
        ("landscape 16x9", "cogview-4", "1344x768"),
        ("1920x1080 (16:9)", "cogview-4", "1344x768"),
        ("portrait: 768x1344 or 864x1152", "cogview-4", "864x1152"),
    ],
)
def test_pixels_go_before_the_words_around_them(text, model, size):
    assert legal_size(MODELS[model], text) == size


@pytest.mark.parametrize("text", ["", "big", "1024", "x", "0:1", "1:0", "0x0", "-1x5", "1024x1024x3", "9" * 500])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="not legal"):
        legal_size(MODELS["cogview-4"], text)


def test_prices_are_those_of_the_documentation():
    assert MODELS["cogview-4-250304"].price("china") == (Decimal("0.06"), "CNY")
    assert MODELS["cogview-4-250304"].price("international") == (Decimal("0.01"), "USD")
    assert MODELS["cogview-3-flash"].price("china") == (Decimal(0), "CNY")
    assert MODELS["cogview-3-flash"].price("international") is None
    assert MODELS["cogview-3"].price("china") is None


def test_model_names_are_found_whatever_their_case():
    assert find_model(" CogView-4 ") is MODELS["cogview-4"]


def test_an_unknown_model_passes_and_a_typo_gets_a_suggestion():
    assert "Did you mean 'cogview-4'?" in model_warning("cogview4")
    assert "Known models" in model_warning("dall-e-3")
    assert model_warning("cogview-4") is None
    assert "no longer lists" in model_warning("cogview-3-plus")
    assert legal_size(model_info("cogview-9"), "640x480") == "640x480"


@pytest.mark.parametrize("name", [*MODELS, "a-model-of-tomorrow"])
def test_what_is_known_of_a_model_goes_to_other_processes(name):
    info = model_info(name)
    assert pickle.loads(pickle.dumps(info)) == copy.deepcopy(info) == info
