"""What code relies on that handles our errors: facts on the class, the same in every record of an error."""

import copy
import json
import pickle

import pytest

from langchain_cogview import ImageFailure, ImageResult, errors
from langchain_cogview.errors import CogViewError, Outcome, Scope, error_class

CLASSES = [kind for name, kind in vars(errors).items() if name.startswith("CogView")]
every_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


@every_class
def test_facts_of_an_error_stand_on_its_class_and_in_its_record(kind):
    failure = ImageFailure.of(kind("It failed."), 0)
    assert (failure.outcome, failure.scope, failure.is_retryable) == (kind.outcome, kind.scope, kind.is_retryable)
    record = json.loads(failure.model_dump_json())
    assert (record["outcome"], record["scope"]) == (str(kind.outcome), str(kind.scope))
    assert error_class(failure.error) is kind


@every_class
def test_a_record_of_an_older_version_gets_the_facts_of_its_class(kind):
    old = ImageFailure(index=0, error=kind.__name__, message="It failed.")
    assert (old.outcome, old.scope, old.is_retryable) == (kind.outcome, kind.scope, kind.is_retryable)


def test_an_artifact_of_an_older_version_is_read(generator):
    artifact = generator.invoke("a kitten").to_artifact()
    artifact["failures"] = [
        {"index": 1, "error": "CogViewBalanceError", "message": "No balance.", "outcome": "final"},
        {"index": 2, "error": ["no", "name"], "message": "x"},
    ]
    with pytest.raises(errors.CogViewInvalidRequestError, match="damaged at failures"):
        ImageResult.from_artifact(artifact)
    del artifact["failures"][1]
    assert ImageResult.from_artifact(artifact).failures[0].scope is Scope.ACCOUNT


def test_an_exception_of_another_library_has_no_scope_and_is_not_retryable():
    failure = ImageFailure.of(KeyError("x"), 0)
    assert (failure.scope, failure.is_retryable) == (None, False)
    assert error_class("KeyError") is error_class("Outcome") is error_class(None) is None


@every_class
def test_what_may_be_sent_again_did_not_run(kind):
    if kind.is_retryable:
        assert kind.outcome is Outcome.NOT_RUN
        assert kind.scope is Scope.SERVICE


@every_class
def test_an_error_can_be_copied_and_pickled(kind):
    error = kind("It failed.", hint="Try.", code="1", status=400, request_id="r", detail="d")
    error.prompt, error.attempts, error.batch_results = "a kitten", 2, ["x"]
    error.add_note("A note.")
    for again in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(again) is kind
        assert again.__dict__ == error.__dict__
        assert str(again) == str(error)


def test_an_error_that_holds_itself_can_be_pickled():
    error = CogViewError("It failed.")
    error.batch_results = [error]
    again = pickle.loads(pickle.dumps(error))
    assert again.batch_results == [again]


@every_class
def test_what_a_model_reads_of_an_error_is_short_and_says_whether_to_call_again(kind):
    for text in (kind().text_for_model, kind("x " * 400, request_id="r" * 36).text_for_model):
        assert text.startswith(("No image was made.", "No image was received."))
        assert len(text) <= 500
        if kind.scope in {Scope.ACCOUNT, Scope.LOCAL, Scope.MODEL} or kind.is_retryable:
            assert "do not call this tool again" in text
            assert "Tell the user" in text


def test_an_error_after_several_attempts_says_how_often_it_was_tried():
    error = errors.CogViewConnectionError("The service could not be reached; nothing was sent.")
    error.attempts = 3
    assert str(error).endswith("(tried 3 times)")
    assert "sent 3 times" not in str(error)
