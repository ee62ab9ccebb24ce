"""What a user relies on: the graphs of docs/front-ends.md give agent-chat-ui what it can show. The other apps have a browser's test."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette")
PAGE = (Path(__file__).parents[2] / "docs" / "front-ends.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))


def turns(graph, *prompts):
    from langgraph.checkpoint.memory import InMemorySaver

    graph.checkpointer = InMemorySaver()  # what the server does
    thread = {"configurable": {"thread_id": "1"}}
    return [graph.invoke({"messages": prompt}, thread) for prompt in prompts]


@pytest.fixture
def module_of(tmp_path, monkeypatch):
    """Imports a file of the page, as a program in its folder does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, code in FILES.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    yield importlib.import_module
    for name in FILES:
        sys.modules.pop(name, None)


def test_every_python_block_is_a_named_file():
    assert len(FILES) == PAGE.count("```python\n")
    assert all(ast.parse(code) for code in FILES.values())


def test_each_answer_has_the_image_of_its_turn_as_markdown(module_of):
    chat = module_of("chat_graph")
    first, second = turns(chat.graph, "a red fox", "a blue hare")
    answers = [output["messages"][-1].text for output in (first, second)]
    urls = [re.findall(r"!\[[^\]]*\]\(([^)]+)\)", answer) for answer in answers]
    assert [len(each) for each in urls] == [1, 1] and urls[0] != urls[1]
    assert answers[1].startswith("Here is your image.")
    assert [message.type for message in second["messages"]] == ["human", "ai", "tool", "ai"] * 2


def test_the_server_of_the_graph_serves_the_image(module_of):
    from starlette.testclient import TestClient

    chat = module_of("chat_graph")
    (output,) = turns(chat.graph, "a red fox")
    path = output["messages"][-1].text.split(chat.IMAGES)[1].rstrip(")")
    reply = TestClient(chat.app).get(f"/images{path}")
    assert reply.status_code == 200 and reply.headers["content-type"] == "image/png"


def test_a_blocked_prompt_and_an_error_are_read_and_the_thread_goes_on(module_of):
    blocked, failed, made = turns(module_of("chat_graph").graph, "[[content-filter]] x", "[[balance]] x", "a red fox")
    assert "content filter blocked" in blocked["messages"][-1].text
    assert "no balance" in failed["messages"][-1].text
    assert made["messages"][-1].text.count("![") == 1


def test_each_component_belongs_to_the_answer_of_its_turn(module_of):
    first, second = turns(module_of("chat_ui_graph").graph, "a red fox", "a blue hare")
    assert [each["props"]["caption"] for each in second["ui"]] == ["a red fox", "a blue hare"]
    assert [each["metadata"]["message_id"] for each in second["ui"]] == [
        output["messages"][-1].id for output in (first, second)
    ]
    assert "![" not in second["messages"][-1].text
