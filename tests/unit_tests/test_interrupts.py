"""What is paid when a graph is interrupted and resumed: the patterns of docs/agents.md pay once."""

from typing import TypedDict

import pytest
from langchain_core.messages import AIMessage
from langchain_core.tools import tool as as_tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, interrupt

from langchain_cogview import CogViewImageGenerator, CogViewImageTool, ImageResult, images_from_messages


class State(TypedDict, total=False):
    artifact: dict
    approved: bool


THREAD = {"configurable": {"thread_id": "1"}}


def sequence(*nodes):
    graph = StateGraph(State)
    graph.add_sequence(nodes)
    graph.add_edge(START, nodes[0].__name__)
    return graph.compile(checkpointer=InMemorySaver())


def resumed(graph, value):
    graph.invoke(value, THREAD)
    return graph.invoke(Command(resume=True), THREAD)


def generate_and_ask(generator):
    def both_in_one(state):
        artifact = generator.invoke("a kitten").to_artifact()
        return {"artifact": artifact, "approved": interrupt("Good?")}

    return both_in_one


def test_an_interrupt_after_the_call_in_one_node_pays_twice(generator, sandbox):
    resumed(sequence(generate_and_ask(generator)), {})
    assert len(sandbox.requests) == 2


def test_an_interrupt_in_the_next_node_pays_once(generator, sandbox):
    def generate(state):
        return {"artifact": generator.invoke("a kitten").to_artifact()}

    def ask(state):
        return {"approved": interrupt("Good?")}

    output = resumed(sequence(generate, ask), {})
    assert len(sandbox.requests) == 1
    assert ImageResult.from_artifact(output["artifact"]).images
    assert output["approved"] is True


def test_a_cache_pays_once_even_in_one_node(sandbox, tmp_path):
    generator = CogViewImageGenerator(
        base_url=sandbox.base_url, output_dir=tmp_path / "images", cache=tmp_path / "cache"
    )
    output = resumed(sequence(generate_and_ask(generator)), {})
    assert len(sandbox.requests) == 1
    assert ImageResult.from_artifact(output["artifact"]).image.cached


def test_a_task_pays_once(generator, sandbox):
    @task
    def generate(prompt):
        return generator.invoke(prompt).to_artifact()

    @entrypoint(checkpointer=InMemorySaver())
    def review(prompt):
        artifact = generate(prompt).result()
        return {"artifact": artifact, "approved": interrupt("Good?")}

    output = resumed(review, "a kitten")
    assert len(sandbox.requests) == 1
    assert ImageResult.from_artifact(output["artifact"]).images


@as_tool
def ask_user(question: str) -> str:
    """Ask the user."""
    return str(interrupt(question))


def tool_node(image_tool):
    graph = StateGraph(MessagesState)
    graph.add_node("tools", ToolNode([image_tool, ask_user]))
    graph.add_edge(START, "tools")
    calls = [
        {"name": image_tool.name, "args": {"prompt": "a kitten"}, "id": "1"},
        {"name": "ask_user", "args": {"question": "Good?"}, "id": "2"},
    ]
    return graph.compile(checkpointer=InMemorySaver()), {"messages": [AIMessage("", tool_calls=calls)]}


@pytest.mark.parametrize(("cached", "sent"), [(False, 2), (True, 1)])
def test_a_tool_node_beside_a_tool_that_interrupts_pays_once_with_a_cache(sandbox, tmp_path, cached, sent):
    cache = {"cache": tmp_path / "cache"} if cached else {}
    graph, value = tool_node(CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path / "images", **cache))
    output = resumed(graph, value)
    assert len(sandbox.requests) == sent
    assert len(images_from_messages(output)) == 1
