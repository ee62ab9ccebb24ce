"""Whatever goes wrong: what happened in one sentence, what to do in another, and the page about errors says the same."""

import re
from pathlib import Path

import pytest

from langchain_cogview import errors
from tests import messages
from tests.conftest import FAKE_KEY

PAGES = [Path(__file__).parents[2] / "docs" / name for name in ("errors.md", "zh/errors.md")]
NOT_SENT = {  # what is found out before a request has an id, or after the result with the id was handed over
    *("no key", "both keys are set", "only the other platform's key is set", "a key with a blank or quotation marks"),
    *(
        "the coding plan's base URL",
        "an illegal size",
        "a model that this version does not know",
        "a base URL that is none",
    ),
    *("the link has expired", "`save` to a place that cannot be written to"),
    "`asyncio.run` where a loop runs already, as in a notebook",
}


@pytest.fixture(scope="module")
def user_messages():
    """Every scenario, provoked once."""
    return {name: messages.message_of(name) for name in messages.SCENARIOS}


def test_each_says_what_happened_and_what_to_do(user_messages):
    for name, message in user_messages.items():
        assert len(message.happened) > 15, name
        assert len(message.remedy) > 15, name
        for text in (message.happened, message.remedy):
            assert text[0].isupper() or text.startswith("asyncio.run"), (name, text)
            assert len(text) <= errors.MAX_MODEL_TEXT, name
            assert text.isprintable(), name
    happened = [message.happened for name, message in user_messages.items() if "asyncio.run" not in name]
    assert all(text.endswith(".") for text in happened)


def test_what_happened_is_one_sentence(user_messages):
    more = {name for name, message in user_messages.items() if re.search(r"[\w)]\. [A-Z]", message.happened)}
    assert more == {"the link has expired"}  # which also says when


def test_the_request_id_is_there_wherever_a_request_was_on_its_way(user_messages):
    assert {name for name, message in user_messages.items() if not message.request_id} == NOT_SENT


def test_no_message_shows_a_key_or_a_path_of_this_machine(user_messages):
    text = str(user_messages)
    assert FAKE_KEY[:8] not in text
    assert "/tmp" not in text
    assert "127.0.0.1" not in text


def test_different_troubles_have_different_classes(user_messages):
    kinds = {message.kind.strip("`") for message in user_messages.values() if message.kind.startswith("`CogView")}
    known = {name for name in vars(errors) if name.startswith("CogView")}
    # Those left are a tool's budget, an account without leave, and what only a batch, a task or a download can bring.
    assert known - kinds == {
        "CogViewError",
        "CogViewBatchError",
        "CogViewBudgetError",
        "CogViewPermissionError",
        "CogViewStoppedError",
        "CogViewTaskUnfinishedError",
        "CogViewTaskFailedError",
        "CogViewDownloadError",
    }


def test_the_page_has_the_table_as_it_is_provoked():
    table = messages.table()
    for page in PAGES:
        section = re.search(
            r"<!-- messages -->\n(.*?)\n<!-- /messages -->", page.read_text(encoding="utf-8"), re.DOTALL
        )
        assert section, f"{page} has no <!-- messages --> section; python -m tests.messages prints it."
        assert section[1] == table
