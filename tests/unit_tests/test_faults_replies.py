"""Whatever the service answers, a call gives a result or one of our errors, in time, and never pays twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from langchain_cogview import CogViewImageGenerator, CogViewImageTool
from tests.faults.referee import SECRET, Guard, How, judge_reply
from tests.faults.replies import REPLIES
from tests.faults.reply_table import KEY, SERVER_WORDS, SHORT
from tests.faults.reply_transport import HangingResolver
from tests.faults.server import FaultServer

REPORTED = [
    name
    for name, fault in REPLIES.items()
    if fault.base_url is None
    and fault.timeout > SHORT
    and any(word in name for word in ("a text", "repeats", "escape", "address", "filter", "closed", "HTML", "role"))
]


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_is_judged_right(name: str, how: How, tmp_path: Path) -> None:
    verdict = judge_reply(REPLIES[name], how, tmp_path)
    assert not verdict.problems


@pytest.mark.parametrize("name", REPORTED)
def test_the_model_reads_a_short_text_of_ours(name: str) -> None:
    fault = REPLIES[name]
    with Guard(), FaultServer(fault.fault) as server:
        generator = CogViewImageGenerator(base_url=server.base_url, api_key=KEY, timeout=fault.timeout, download=False)
        tool = CogViewImageTool(generator=generator)
        call = {"type": "tool_call", "id": "1", "name": tool.name, "args": {"prompt": "a kitten"}}
        try:
            text = tool.invoke(call).text
        except Exception as exc:
            # Errors that no model can act on go to the caller.
            text = str(getattr(exc, "text_for_model", exc))
        finally:
            generator.close()
    assert 0 < len(text) <= 500
    assert text.replace("\n", "").isprintable()
    assert SERVER_WORDS not in text
    assert SECRET not in text


def test_all_that_can_go_wrong_with_a_reply_is_tried() -> None:
    assert len(REPLIES) >= 84
    assert sum(isinstance(fault.resolve, HangingResolver) for fault in REPLIES.values()) == 1
