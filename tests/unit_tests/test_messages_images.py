"""The images of an agent's run are found in its messages, whatever form these come in."""

import asyncio
import dataclasses
import json
import warnings
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.load import dumpd
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    HumanMessageChunk,
    SystemMessage,
    ToolMessage,
    ToolMessageChunk,
    convert_to_openai_messages,
    messages_to_dict,
)
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, Send
from pydantic import BaseModel

from langchain_cogview import CogViewImageTool, ImageResult, images_from_messages
from tests.unit_tests.test_agent import Scripted

RECORD = {"id": "a1", "request_id": "r1", "model": "cogview-4", "prompt": "a kitten"}


def artifact(*ids):
    images = [{**RECORD, "id": name, "request_id": name} for name in ids]
    return {"type": "cogview.image_result", "version": 1, "prompt": "p", "model": "m", "images": images}


def tool_message(*ids):
    return ToolMessage("made", tool_call_id=f"call-{ids[0]}", artifact=artifact(*ids), name="image")


MESSAGES = [
    SystemMessage("s"),
    HumanMessage("one"),
    AIMessage("", tool_calls=[{"name": "x", "args": {}, "id": "call-a"}]),
    tool_message("a", "b"),
    AIMessage("done"),
    HumanMessage("two"),
    AIMessage("", tool_calls=[{"name": "x", "args": {}, "id": "call-c"}]),
    tool_message("c"),
    ToolMessage("other", tool_call_id="call-o", artifact={"type": "other"}),
    AIMessage("done"),
]


class PydanticState(BaseModel):
    messages: list[Any]
    other: int = 1


@dataclasses.dataclass
class DataclassState:
    messages: list[Any]


def json_of(value):
    return json.loads(json.dumps(value))


FORMS = {
    "messages": MESSAGES,
    "a tuple": tuple(MESSAGES),
    "a state": {"messages": MESSAGES, "remaining": 3},
    "a pydantic state": PydanticState(messages=MESSAGES),
    "a dataclass state": DataclassState(MESSAGES),
    "model_dump": [message.model_dump() for message in MESSAGES],
    "a JSON dump": json_of([message.model_dump(mode="json") for message in MESSAGES]),
    "messages_to_dict": messages_to_dict(MESSAGES),
    "dumpd": json_of(dumpd(MESSAGES)),
    "dicts with roles": [
        {"role": "user" if message.type == "human" else message.type, "content": message.content}
        | ({"artifact": message.artifact, "tool_call_id": message.tool_call_id} if message.type == "tool" else {})
        for message in MESSAGES
    ],
    "a state of the API": {"values": {"messages": json_of(messages_to_dict(MESSAGES))}, "next": [], "tasks": []},
    "values": [{"messages": MESSAGES[:count]} for count in range(len(MESSAGES) + 1)],
    "values and modes": [("values", {"messages": MESSAGES[:count]}) for count in range(len(MESSAGES) + 1)],
    "subgraphs": [(("agent:1",), "values", {"messages": MESSAGES}), ((), "values", {"messages": MESSAGES})],
    "stream parts": [{"type": "values", "ns": (), "data": {"messages": MESSAGES}}],
    "commands": [Command(update={"messages": MESSAGES})],
    "pairs": [("user", "one"), *MESSAGES[2:5], ("human", "two"), *MESSAGES[6:]],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_messages_is_read(form):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [image.id for image in images_from_messages(FORMS[form])] == ["a", "b", "c"]
        assert [image.id for image in images_from_messages(FORMS[form], last_turn=True)] == ["c"]


def test_an_iterator_and_a_single_message_are_read():
    assert [image.id for image in images_from_messages(iter(MESSAGES))] == ["a", "b", "c"]
    for one in (MESSAGES[3], MESSAGES[3].model_dump(), artifact("a", "b"), ("messages", (MESSAGES[3], {"node": "x"}))):
        assert [image.id for image in images_from_messages(one)] == ["a", "b"]


@pytest.mark.parametrize(
    "nothing",
    [
        [],
        {},
        {"messages": []},
        {"messages": None},
        None,
        [None],
        {"model": None},
        {"model": {"count": {}}},
        [{"model": {}}, {"__interrupt__": ()}],
        ("updates", {"model": None}),
        [("custom", "half done"), ("messages", (AIMessageChunk("x"), {"langgraph_node": "model"}))],
        convert_to_openai_messages(MESSAGES),
    ],
)
def test_where_there_are_no_images_there_is_no_warning(nothing):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images_from_messages(nothing) == []


@pytest.mark.parametrize(
    "unknown",
    ["text", b"bytes", 5, object(), [5, "x", object()], {"messages": 5}, {"messages": [object()]}, {"output": "text"}],
)
def test_what_is_not_understood_is_reported_in_one_short_warning(unknown):
    with pytest.warns(UserWarning, match="left out") as caught:
        assert images_from_messages(unknown) == []
    [warning] = caught
    assert "No message was found" in str(warning.message)
    assert len(str(warning.message)) < 300


def test_one_damaged_image_costs_the_others_nothing():
    made = artifact("a", "b", "c")
    made["images"][1] |= {"width": 10**400, "cost": "NaN", "prompt": "\ud800" * 1000}
    with pytest.warns(UserWarning, match="Something was left out. This artifact is damaged at width") as caught:
        found = images_from_messages([ToolMessage("x", tool_call_id="1", artifact=made), tool_message("d")])
    assert [image.id for image in found] == ["a", "c", "d"]
    assert len(caught) == 1


def test_the_same_image_of_two_tool_calls_is_returned_twice():
    twice = [ToolMessage("x", tool_call_id=call, artifact=artifact("a")) for call in ("1", "2")]
    assert len(images_from_messages(twice)) == 2
    assert len(images_from_messages([*twice, *twice])) == 2


def test_what_refers_to_itself_comes_to_an_end():
    state = {"messages": [MESSAGES[3]]}
    state["messages"].append(state)
    deep: Any = [MESSAGES[3]]
    for _ in range(10_000):
        deep = [deep]
    assert len(images_from_messages(state)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images_from_messages(deep)


# --- real agents


def image_message(prompt, call_id):
    return AIMessage("", tool_calls=[{"name": "cogview_generate_image", "args": {"prompt": prompt}, "id": call_id}])


@pytest.fixture
def image_tool(sandbox):
    return CogViewImageTool(base_url=sandbox.base_url, size="512x512")


def agent_of(image_tool, calls=1, **options):
    replies = [
        message for n in range(calls) for message in (image_message(f"kitten {n}", f"call-{n}"), AIMessage("Done."))
    ]
    return create_agent(Scripted(responses=replies), tools=[image_tool], **options)


@pytest.mark.parametrize("mode", ["updates", "values", ["updates", "messages"], ["values", "updates", "custom"]])
def test_the_chunks_of_a_stream_hold_each_image_once(image_tool, mode):
    chunks = list(agent_of(image_tool).stream({"messages": "draw"}, stream_mode=mode))
    assert [image.prompt for image in images_from_messages(chunks)] == ["kitten 0"]
    images = [image for chunk in chunks for image in images_from_messages(chunk)]
    assert {image.prompt for image in images} == {"kitten 0"}


async def test_async_streams_with_subgraphs_are_read_chunk_by_chunk(image_tool):
    graph = StateGraph(MessagesState)
    graph.add_node("artist", agent_of(image_tool))
    graph.add_edge(START, "artist")
    stream = graph.compile().astream({"messages": "draw"}, stream_mode="updates", subgraphs=True)
    chunks = [chunk async for chunk in stream]
    assert [image.prompt for image in images_from_messages(chunks)] == ["kitten 0"]


@pytest.mark.parametrize("how", ["sync", "async"])
def test_with_a_checkpointer_the_last_turn_has_its_own_images_alone(image_tool, how):
    agent = agent_of(image_tool, 2, checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}

    def ask(text):
        if how == "sync":
            return agent.invoke({"messages": text}, config)
        return asyncio.run(agent.ainvoke({"messages": text}, config))

    ask("first")
    output = ask("second")
    assert [image.prompt for image in images_from_messages(output)] == ["kitten 0", "kitten 1"]
    assert [image.prompt for image in images_from_messages(output, last_turn=True)] == ["kitten 1"]
    snapshot = agent.get_state(config)
    assert [image.prompt for image in images_from_messages(snapshot, last_turn=True)] == ["kitten 1"]
    assert len(images_from_messages(list(agent.get_state_history(config)))) == 2


def test_what_is_not_a_message_is_an_error_that_names_what_was_expected():
    with pytest.warns(
        UserWarning, match="of type str: the messages, output, state or stream chunks of an agent are exp"
    ):
        assert images_from_messages("nonsense") == []


ATTACHED = {
    "JSON text": lambda: json.dumps(artifact("a")),
    "a list": lambda: [artifact("a")],
    "inside other data": lambda: {"seconds": 3, "made": {"image": artifact("a")}},
    "a result": lambda: ImageResult.from_artifact(artifact("a")),
    "the fields of a result": lambda: ImageResult.from_artifact(artifact("a")).model_dump(),
    "the JSON fields of a result": lambda: ImageResult.from_artifact(artifact("a")).model_dump(mode="json"),
    "an image": lambda: ImageResult.from_artifact(artifact("a")).images[0],
}


@pytest.mark.parametrize("form", ATTACHED.values(), ids=ATTACHED)
def test_what_a_tool_attaches_is_found_in_every_form(form):
    message = ToolMessage("made", tool_call_id="1")
    message.artifact = form()
    assert [image.id for image in images_from_messages([message])] == ["a"]


def test_text_in_what_another_tool_attaches_is_never_read_as_an_artifact():
    page = {"page": json.dumps(artifact("a"))}
    assert images_from_messages([ToolMessage("read", tool_call_id="1", artifact=page)]) == []


@dataclasses.dataclass
class Chat:
    history: list[Any]


WHOLE = {
    "a result": lambda: ImageResult.from_artifact(artifact("a")),
    "the fields of a result": lambda: ImageResult.from_artifact(artifact("a")).model_dump(),
    "the JSON fields of a result": lambda: ImageResult.from_artifact(artifact("a")).model_dump(mode="json"),
    "an image": lambda: ImageResult.from_artifact(artifact("a")).images[0],
    "images": lambda: ImageResult.from_artifact(artifact("a")).images,
    "a chunk of a tool message": lambda: ToolMessageChunk("made", tool_call_id="1", artifact=artifact("a")),
    "its dict": lambda: ToolMessageChunk("made", tool_call_id="1", artifact=artifact("a")).model_dump(),
    "a message and its metadata": lambda: (tool_message("a"), {"langgraph_node": "tools"}),
    "a send": lambda: Send("tools", {"messages": [tool_message("a")]}),
    "a dataclass with another name": lambda: Chat([tool_message("a")]),
}


@pytest.mark.parametrize("form", WHOLE.values(), ids=WHOLE)
def test_images_are_found_in_what_a_program_has_at_hand(form, recwarn):
    assert [image.id for image in images_from_messages(form())] == ["a"]
    assert not recwarn.list


def test_a_chunk_of_the_user_begins_a_turn_too():
    messages = [tool_message("a"), HumanMessageChunk("again"), tool_message("b")]
    assert [image.id for image in images_from_messages(messages, last_turn=True)] == ["b"]
