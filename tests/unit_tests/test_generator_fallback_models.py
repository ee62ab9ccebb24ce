"""Another model generates the image when the first did not run, and only then."""

import asyncio

import pytest

from langchain_cogview import (
    CogViewBalanceError,
    CogViewBusyError,
    CogViewContentFilterError,
    CogViewImageGenerator,
    CogViewOutcomeUnknownError,
)

both = pytest.mark.parametrize("how", ["sync", "async"])


def invoked(generator, how, value="a kitten"):
    return generator.invoke(value) if how == "sync" else asyncio.run(generator.ainvoke(value))


def made(sandbox, *others, **settings):
    return CogViewImageGenerator(base_url=sandbox.base_url, fallback_models=others, max_retries=0, **settings)


@both
@pytest.mark.parametrize("fault", ["busy", "rate-limit", "unavailable"])
def test_a_model_that_did_not_run_is_followed_by_the_next_and_the_result_says_which_drew(sandbox, how, fault):
    sandbox.fail_next(fault)
    result = invoked(made(sandbox, "cogview-3-flash"), how)
    assert [request.model for request in sandbox.requests] == ["cogview-4-250304", "cogview-3-flash"]
    assert result.model == result.image.model == "cogview-3-flash"
    assert "cogview-3-flash made the image" in result.warnings[0]
    assert sandbox.images_made == 1


@both
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("content-filter", CogViewContentFilterError),
        ("server-error", CogViewOutcomeUnknownError),
        ("malformed", CogViewOutcomeUnknownError),
        ("balance", CogViewBalanceError),
    ],
)
def test_after_a_block_an_unknown_outcome_or_no_money_no_other_model_is_asked(sandbox, how, fault, error):
    sandbox.fail_next(fault)
    with pytest.raises(error):
        invoked(made(sandbox, "cogview-3-flash"), how)
    assert len(sandbox.requests) == 1


@both
def test_when_none_runs_the_last_error_names_those_before(sandbox, how):
    sandbox.fail_next("busy", times=3)
    with pytest.raises(CogViewBusyError) as caught:
        invoked(made(sandbox, "cogview-3-flash", "cogview-4"), how)
    assert [request.model for request in sandbox.requests] == ["cogview-4-250304", "cogview-3-flash", "cogview-4"]
    assert len(caught.value.__notes__) == 2


@both
def test_a_size_or_quality_that_the_other_model_does_not_know_is_changed_with_a_warning(sandbox, how):
    sandbox.fail_next("busy")
    result = invoked(made(sandbox, "glm-image", size="1040x1040", quality="standard", poll_interval=0.01), how)
    assert result.model == "glm-image"
    assert (result.width, result.height) in {(1024, 1024), (1056, 1056)}
    assert any("1040x1040" in warning for warning in result.warnings)
    assert any("standard" in warning for warning in result.warnings)


def test_a_prompt_that_is_too_long_for_the_other_model_leaves_it_out(sandbox):
    sandbox.fail_next("busy")
    with pytest.raises(CogViewBusyError):
        made(sandbox, "glm-image").invoke("x" * 2000)
    assert len(sandbox.requests) == 1


def test_one_model_may_be_passed_as_text_and_an_unknown_one_warns(sandbox):
    assert CogViewImageGenerator(base_url=sandbox.base_url, fallback_models="cogview-4").fallback_models == (
        "cogview-4",
    )
    with pytest.warns(UserWarning, match="does not know"):
        made(sandbox, "tomorrow-1")


@both
def test_one_time_limit_holds_for_all_models(sandbox, how):
    sandbox.fail_next("busy")
    sandbox.fail_next("slow", seconds=5)
    generator = made(sandbox, "cogview-3-flash").model_copy(update={"timeout": 0.3})
    with pytest.raises(CogViewOutcomeUnknownError):
        invoked(generator, how)
