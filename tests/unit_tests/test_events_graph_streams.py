"""Inside a graph, events reach the streams that front ends read; outside, nothing of LangGraph is loaded."""

import asyncio
import json
import subprocess
import sys

import pytest
from langchain_core.runnables import RunnableLambda
from langgraph.graph import START, MessagesState, StateGraph

from langchain_cogview import CogViewImageGenerator, CogViewImageTool
from tests.unit_tests.test_agent import agent_of, wants

both = pytest.mark.parametrize("how", ["sync", "async"])


def streamed(graph, how, mode, **options):
    """What a stream mode gives: the chunks."""
    question = {"messages": "Make an image of a kitten"}
    if how == "sync":
        return list(graph.stream(question, stream_mode=mode, **options))

    async def chunks():
        return [chunk async for chunk in graph.astream(question, stream_mode=mode, **options)]

    return asyncio.run(chunks())


def stages(chunks):
    names = [chunk["type"].removeprefix("cogview.") for chunk in chunks]
    return [chunk["stage"] if name == "progress" else name for name, chunk in zip(names, chunks, strict=True)]


@pytest.fixture
def tool(sandbox, tmp_path):
    return CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path)


@both
def test_the_custom_stream_of_an_agent_has_the_progress_of_its_images(tool, how):
    chunks = streamed(agent_of(tool, wants("a kitten")), how, "custom")
    assert stages(chunks) == ["sent", "generated"]
    assert {chunk["tool_call_id"] for chunk in chunks} == {"call-0"}
    assert json.loads(json.dumps(chunks)) == chunks


@both
def test_parallel_tools_stream_each_under_its_own_call(tool, how):
    chunks = streamed(agent_of(tool, wants("a kitten", "[[content-filter]] a puppy", "a foal")), how, "custom")
    by_call = {}
    for chunk in chunks:
        by_call.setdefault(chunk["tool_call_id"], []).append(chunk)
    assert {call: stages(found) for call, found in by_call.items()} == {
        "call-0": ["sent", "generated"],
        "call-1": ["sent", "failed", "content_filter"],
        "call-2": ["sent", "generated"],
    }


@both
def test_the_tools_stream_has_the_events_as_deltas_of_their_call(tool, how):
    chunks = streamed(agent_of(tool, wants("a kitten", "a foal")), how, "tools")
    deltas = [(chunk["tool_call_id"], chunk["delta"]) for chunk in chunks if chunk["event"] == "tool-output-delta"]
    for call in ("call-0", "call-1"):
        assert stages([delta for name, delta in deltas if name == call]) == ["sent", "generated"]


@both
def test_a_sub_graph_streams_under_its_own_namespace(tool, how):
    graph = StateGraph(MessagesState)
    graph.add_node("agent", agent_of(tool, wants("a kitten")))
    graph.add_edge(START, "agent")
    chunks = streamed(graph.compile(), how, "custom", subgraphs=True)
    assert stages([chunk for _, chunk in chunks]) == ["sent", "generated"]
    assert all(namespace for namespace, _ in chunks)


@both
def test_a_generator_in_a_node_streams_and_so_does_each_of_several_images(sandbox, tmp_path, how):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path, n=3)

    def node(state):
        return {"messages": [("ai", str(len(generator.invoke(state["messages"]).images)))]}

    async def anode(state):
        return {"messages": [("ai", str(len((await generator.ainvoke(state["messages"])).images)))]}

    graph = StateGraph(MessagesState)
    graph.add_node("image", RunnableLambda(node, anode))
    graph.add_edge(START, "image")
    chunks = streamed(graph.compile(), how, "custom")
    assert sorted(stages(chunks)) == ["generated"] * 3 + ["sent"] * 3


def test_outside_a_graph_langgraph_is_not_loaded():
    code = (
        "import sys; from langchain_cogview import CogViewImageTool;"
        "tool = CogViewImageTool(base_url='sandbox:', download=False); tool.invoke({'prompt': 'a kitten'});"
        "assert not [name for name in sys.modules if name.startswith('langgraph')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
