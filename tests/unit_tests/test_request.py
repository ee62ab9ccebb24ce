"""Arguments are checked before anything is sent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from langchain_cogview import CogViewImageGenerator, CogViewImageTool, CogViewInvalidRequestError, ImageRequest
from langchain_cogview.catalog import model_info, parse_quality, parse_size
from langchain_cogview.request import UNSUPPORTED_ARGUMENTS, checked_request


def test_sizes_are_turned_into_legal_ones_of_the_model():
    assert ImageRequest(prompt="x", size="16:9").size == "1344x768"
    assert ImageRequest(prompt="x", size="16:9", model="glm-image").size == "1728x960"
    assert ImageRequest(prompt="x", size="2048×2048", model="GLM-Image").size == "2048x2048"
    assert ImageRequest(prompt="x").resolved_size == "1024x1024"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"prompt": ""}, "The prompt is blank"),
        ({"prompt": " \n\t"}, "The prompt is blank"),
        ({"prompt": "\ud800"}, "half a character"),
        ({"prompt": None}, "prompt"),
        ({}, "prompt is missing"),
        ({"prompt": "x", "user_id": "12345"}, "user_id must have at least 6"),
        ({"prompt": "x", "user_id": "1" * 129}, "user_id must have at most 128"),
        ({"prompt": "x", "size": "2048x2048"}, "nearest legal size"),
        ({"prompt": "x", "quality": "shiny"}, "quality must be 'standard' or 'hd'"),
        ({"prompt": "x", "model": "glm-image", "quality": "standard"}, "glm-image accepts only quality 'hd'"),
        ({"prompt": "x" * 1001, "model": "glm-image"}, "1,001 characters; glm-image takes at most 1,000"),
        ({"prompt": "x", "model": " "}, "blank"),
        ({"prompt": "x", "n": 0}, "n must be at least 1"),
        ({"prompt": "x", "n": 101}, "n must be at most 100"),
        ({"prompt": "x", "promt": "y"}, "Did you mean 'prompt'?"),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule(values, text):
    with pytest.raises(CogViewInvalidRequestError) as caught:
        checked_request(values)
    assert text in str(caught.value)
    assert "Nothing was sent" in str(caught.value)
    with pytest.raises(ValidationError):
        ImageRequest(**values)


@pytest.mark.parametrize("name", UNSUPPORTED_ARGUMENTS)
def test_what_people_try_gets_an_answer(name):
    with pytest.raises(CogViewInvalidRequestError) as caught:
        checked_request({"prompt": "x", name: "SECRET VALUE"})
    assert UNSUPPORTED_ARGUMENTS[name] in str(caught.value)
    assert "SECRET VALUE" not in str(caught.value)


def test_auto_and_the_words_of_other_image_apis_are_accepted():
    for value in ("", "auto", "default", "null", None):
        request = ImageRequest(prompt="x", size=value, quality=value)
        assert (request.size, request.quality) == (None, None)
    assert [ImageRequest(prompt="x", quality=value).quality for value in ("HD", "high", "low")] == [
        "hd",
        "hd",
        "standard",
    ]


@given(st.text(max_size=60) | st.from_regex(r"\s*\d{1,7}\s*[xX×:/_*,.]\s*\d{1,7} ?(px)?", fullmatch=True))
def test_any_text_for_size_and_quality_is_resolved_or_refused_with_the_rule(text):
    try:
        size = ImageRequest(prompt="x", size=text).size
    except ValidationError as error:
        assert "is not legal" in str(error)
    else:
        pixels = parse_size(size) if size else None
        assert size is None or model_info("cogview-4-250304").rule.allows(*pixels)
    assert parse_quality(text) in {"standard", "hd", None}


def test_a_prompt_of_the_limit_passes():
    assert ImageRequest(prompt="画" * 1000, model="glm-image").prompt


def test_an_unknown_model_passes_with_a_warning():
    request = ImageRequest(prompt="x", model="cogview-5", size="640x480")
    assert request.size == "640x480"
    assert "cogview-5" in request.warnings[0]


@pytest.mark.parametrize("made", [CogViewImageGenerator, CogViewImageTool])
def test_the_warning_about_an_unknown_model_names_the_line_of_the_user(made):
    with pytest.warns(UserWarning, match="does not know the model") as caught:
        made(model="glm-imag", base_url="sandbox:")
    assert [warning.filename for warning in caught] == [__file__]
