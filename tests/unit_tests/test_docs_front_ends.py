"""What a user relies on: the graphs of docs/front-ends.md give agent-chat-ui, and the pipe gives Open WebUI, what it can show.

The other apps have a browser's test.
"""

import ast
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("starlette")
PAGE = (Path(__file__).parents[2] / "docs" / "front-ends.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))


def ask(graph, *prompts):
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
    first, second = ask(chat.graph, "a red fox", "a blue hare")
    answers = [output["messages"][-1].text for output in (first, second)]
    urls = [re.findall(r"!\[[^\]]*\]\(([^)]+)\)", answer) for answer in answers]
    assert [len(item) for item in urls] == [1, 1] and urls[0] != urls[1]
    assert answers[1].startswith("Here is your image.")
    assert [message.type for message in second["messages"]] == ["human", "ai", "tool", "ai"] * 2


def test_the_server_of_the_graph_serves_the_image(module_of):
    from starlette.testclient import TestClient

    chat = module_of("chat_graph")
    (output,) = ask(chat.graph, "a red fox")
    path = output["messages"][-1].text.split(chat.IMAGES)[1].rstrip(")")
    reply = TestClient(chat.app).get(f"/images{path}")
    assert reply.status_code == 200 and reply.headers["content-type"] == "image/png"


def test_a_blocked_prompt_and_an_error_are_read_and_the_thread_goes_on(module_of):
    blocked, failed, made = ask(module_of("chat_graph").graph, "[[content-filter]] x", "[[balance]] x", "a red fox")
    assert "content filter blocked" in blocked["messages"][-1].text
    assert "no balance" in failed["messages"][-1].text
    assert made["messages"][-1].text.count("![") == 1


def test_each_component_belongs_to_the_answer_of_its_turn(module_of):
    first, second = ask(module_of("chat_ui_graph").graph, "a red fox", "a blue hare")
    assert [item["props"]["caption"] for item in second["ui"]] == ["a red fox", "a blue hare"]
    assert [item["metadata"]["message_id"] for item in second["ui"]] == [
        output["messages"][-1].id for output in (first, second)
    ]
    assert "![" not in second["messages"][-1].text


@pytest.fixture
def open_webui(module_of, monkeypatch):
    """Sends messages to the pipe, as Open WebUI does; what it stores and shows."""
    stored, events = [], []

    async def upload_image(request, content, mime_type, metadata, user):
        stored.append((content, mime_type, user.id))
        return None, {"id": str(len(stored)), "url": f"/files/{len(stored)}"}

    async def emit(event):
        events.append(event)

    for name in ("open_webui", "open_webui.models", "open_webui.routers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, content in (
        ("models.users", {"UserModel": SimpleNamespace}),
        ("routers.images", {"upload_image": upload_image}),
    ):
        module = ModuleType(f"open_webui.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"open_webui.{name}", module)
    pipe = module_of("cogview_pipe").Pipe().pipe

    async def send(content, **options):
        body = {"messages": [{"role": "user", "content": "an older prompt"}, {"role": "user", "content": content}]}
        return await pipe(body, {"id": "somebody"}, None, {}, emit, **options)

    return SimpleNamespace(send=send, stored=stored, events=events)


@pytest.mark.parametrize("content", ["a red fox", [{"type": "text", "text": "a red fox"}]], ids=["text", "blocks"])
async def test_open_webui_stores_and_shows_the_image_of_the_last_message(open_webui, content):
    assert await open_webui.send(content) == "Here is your image."
    ((image, mime_type, user),) = open_webui.stored
    assert (image[:4], mime_type, user) == (b"\x89PNG", "image/png", "somebody")
    (shown,) = [event["data"]["files"] for event in open_webui.events if event["type"] == "files"]
    assert shown == [{"type": "image", "id": "1", "url": "/files/1"}]
    assert [event["data"]["done"] for event in open_webui.events if event["type"] == "status"] == [False, True]


@pytest.mark.parametrize(
    ("prompt", "words"), [("[[content-filter]] x", "content filter blocked"), ("[[balance]] x", "no balance")]
)
async def test_open_webui_says_why_no_image_was_made(open_webui, prompt, words):
    assert words in await open_webui.send(prompt)
    assert not open_webui.stored
    assert open_webui.events[-1]["data"] == {"description": "No image was made", "done": True}


async def test_open_webui_gets_no_image_for_the_title_of_a_chat(open_webui):
    assert await open_webui.send("Write a title for this chat", __task__="title_generation") == ""
    assert not open_webui.stored and not open_webui.events
