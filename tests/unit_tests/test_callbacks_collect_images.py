"""All images of a run are collected, also those that are in no message: of sub-agents, supervisors, batches."""

import asyncio
import copy
import json
import pickle

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableParallel
from langchain_core.tools import tool as as_tool
from langgraph.graph import END, START, MessagesState, StateGraph

from langchain_cogview import (
    CogViewImageGenerator,
    CogViewImageTool,
    GeneratedEvent,
    ImageCallbackHandler,
    collect_image_costs,
    collect_images,
    images_from_messages,
)
from langchain_cogview.artifact import GeneratedImageArtifact
from tests.unit_tests.test_agent import Scripted, agent_of, wants

HOWS = pytest.mark.parametrize("how", ["sync", "async"])


@pytest.fixture
def tool(sandbox):
    return CogViewImageTool(base_url=sandbox.base_url, size="512x512")


def run(runnable, how, value="draw", config=None):
    value = {"messages": value} if isinstance(value, str) else value
    return runnable.invoke(value, config) if how == "sync" else asyncio.run(runnable.ainvoke(value, config))


def sub_agent(tool, how):
    """An agent whose only tool is another agent, which generates images."""
    inner = agent_of(tool, wants("a kitten", "a puppy"))

    @as_tool
    def artist(text: str) -> str:
        """Draw."""
        return inner.invoke({"messages": text})["messages"][-1].text

    @as_tool("artist")
    async def async_artist(text: str) -> str:
        """Draw."""
        return (await inner.ainvoke({"messages": text}))["messages"][-1].text

    call = AIMessage("", tool_calls=[{"name": "artist", "args": {"text": "draw"}, "id": "1"}])
    tools = [artist if how == "sync" else async_artist]
    return create_agent(Scripted(responses=[call, AIMessage("There they are.")]), tools=tools)


def supervisor(tool):
    """A graph whose nodes hand the work to agents and keep only their last words."""

    def node(agent):
        async def anode(state):
            return {"messages": (await agent.ainvoke({"messages": "draw"}))["messages"][-1:]}

        def node(state):
            return {"messages": agent.invoke({"messages": "draw"})["messages"][-1:]}

        from langchain_core.runnables import RunnableLambda

        return RunnableLambda(node, afunc=anode)

    graph = StateGraph(MessagesState)
    graph.add_node("one", node(agent_of(tool, wants("a kitten"))))
    graph.add_node("two", node(agent_of(tool, wants("a puppy"))))
    graph.add_edge(START, "one")
    graph.add_edge(START, "two")
    graph.add_edge("one", END)
    graph.add_edge("two", END)
    return graph.compile()


@HOWS
@pytest.mark.parametrize("kind", ["sub-agent", "supervisor"])
def test_images_that_are_in_no_message_are_collected(tool, how, kind):
    runnable = sub_agent(tool, how) if kind == "sub-agent" else supervisor(tool)
    with collect_images() as images, collect_image_costs() as costs:
        output = run(runnable, how)
    assert images_from_messages(output) == []
    assert sorted(image.prompt for image in images) == ["a kitten", "a puppy"]
    assert costs.images == 2
    handler = ImageCallbackHandler()
    run(runnable, how, config={"callbacks": [handler]})
    assert sorted(image.prompt for image in handler.images) == ["a kitten", "a puppy"]


@HOWS
def test_batches_and_parallel_runs_are_collected_once_each(generator, how):
    both = RunnableParallel(one=generator, two=generator)
    with collect_images() as images:
        if how == "sync":
            results = [
                *generator.batch(["a", "b"]),
                *both.invoke("c").values(),
                generator.invoke({"prompt": "d", "n": 2}),
            ]
        else:

            async def work():
                together = await asyncio.gather(generator.ainvoke("e"), generator.ainvoke("f"))
                return [*await generator.abatch(["a", "b"]), *(await both.ainvoke("c")).values(), *together]

            results = asyncio.run(work())
    made = [image for result in results for image in result.images]
    assert sorted(images, key=id) == sorted(made, key=id)
    assert all(any(image is item for item in made) for image in images)


def test_what_is_collected_can_be_read_when_service_and_link_are_gone(sandbox, generator):
    with collect_images() as images:
        generator.invoke("a kitten")
    sandbox.reset()
    assert images[0].read().startswith(b"\x89PNG")


def test_an_image_saved_elsewhere_is_read_with_the_generators_own_access(sandbox):
    pytest.importorskip("fsspec")
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir="memory://collected", size="512x512")
    with collect_images() as images:
        generator.invoke("a kitten")
    assert images[0].uri.startswith("memory://collected/")
    assert len(images[0].read()) == images[0].size_bytes


def test_blocks_can_be_nested_and_other_threads_are_not_collected(generator):
    with collect_images() as outer:
        generator.invoke("one")
        with collect_images() as inner:
            generator.invoke("two")
    generator.invoke("three")
    assert [image.prompt for image in outer] == ["one", "two"]
    assert [image.prompt for image in inner] == ["two"]


def test_cached_images_are_collected_too(sandbox, tmp_path):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, cache=tmp_path, size="512x512")
    with collect_images() as images:
        results = [generator.invoke("a fox"), generator.invoke("a fox")]
    assert [image.cached for image in images] == [False, True]
    assert images == [result.image for result in results]


class Recorder(BaseCallbackHandler):
    def __init__(self):
        self.events = []

    def on_custom_event(self, name, data, **kwargs):
        if name == "cogview.generated":
            self.events.append(data)


def test_the_event_says_all_that_an_artifact_says_and_is_plain_json(tool):
    recorder = Recorder()
    call = {"type": "tool_call", "name": tool.name, "args": {"prompt": "a kitten"}, "id": "call-1"}
    message = tool.invoke(call, {"callbacks": [recorder]})
    [event] = recorder.events
    fields = set(GeneratedImageArtifact.__annotations__)
    assert set(event) == set(GeneratedEvent.__annotations__) | fields == fields | {"version", "tool_call_id"}
    assert event["tool_call_id"] == "call-1"
    in_artifact = message.artifact["images"][0]  # saved in a temporary folder after the event
    for name in fields - {"path", "warnings"}:
        assert event[name] == in_artifact[name]
    assert json.loads(json.dumps(event)) == event
    for same in (copy.deepcopy(event), pickle.loads(pickle.dumps(event))):
        assert type(same) is dict
        assert same == event


def test_an_event_of_somebody_else_is_read_as_foreign_data(caplog):
    handler = ImageCallbackHandler()
    image = {"id": "a", "request_id": "r", "model": "m", "prompt": "p"}
    for data in (image, {**image, "width": "\ud800"}, {}, None, 5, [image]):
        handler.on_custom_event("cogview.generated", data, run_id=1)
    assert [item.id for item in handler.images] == ["a"]
    assert "An image was not collected" in caplog.text
