"""Real agents with a scripted model: they generate images, survive recoverable errors, and their checkpoints stay small."""

import asyncio
import json

import httpx
import pytest
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

from langchain_cogview import (
    CogViewBalanceError,
    CogViewImageTool,
    ContentFilterCallbackHandler,
    collect_content_filter_events,
    images_from_messages,
)
from tests.conftest import FAKE_KEY


class Scripted(FakeMessagesListChatModel):
    """Says what the script says, whatever tools it has."""

    def bind_tools(self, tools, **kwargs):
        return self


def wants(*prompts, **args):
    calls = [
        {
            "type": "tool_call",
            "id": f"call-{number}",
            "name": "cogview_generate_image",
            "args": {"prompt": prompt, **args},
        }
        for number, prompt in enumerate(prompts)
    ]
    return AIMessage("", tool_calls=calls)


def agent_of(tool, *script, **options):
    return create_agent(Scripted(responses=[*script, AIMessage("Here you are.")]), tools=[tool], **options)


def run(agent, how, **kwargs):
    state = {"messages": "Draw me a kitten"}
    return agent.invoke(state, **kwargs) if how == "invoke" else asyncio.run(agent.ainvoke(state, **kwargs))


both = pytest.mark.parametrize("how", ["invoke", "ainvoke"])


@pytest.fixture
def tool(sandbox, tmp_path):
    return CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path)


@both
def test_an_agent_generates_and_the_image_is_in_its_output(tool, how):
    output = run(agent_of(tool, wants("a kitten", size="1344x768")), how)
    image = images_from_messages(output)[0]
    assert image.path.read_bytes().startswith(b"\x89PNG")
    assert (image.width, image.height) == (1344, 768)
    assert output["messages"][-1].content == "Here you are."


@both
def test_an_agent_survives_a_blocked_prompt_and_an_illegal_size(tool, sandbox, how):
    agent = agent_of(tool, wants("[[content-filter]] a kitten"), wants("a kitten", size="1x1"), wants("a fine kitten"))
    with collect_content_filter_events() as events:
        output = run(agent, how)
    texts = [message for message in output["messages"] if isinstance(message, ToolMessage)]
    assert [message.status for message in texts] == ["error", "error", "success"]
    assert all("No image was made" in message.content for message in texts[:2])
    assert len(images_from_messages(output)) == 1
    assert [(event["tool_call_id"], event["blocked"]) for event in events] == [("call-0", True)]


@both
def test_parallel_calls_keep_their_own_ids(tool, how):
    with collect_content_filter_events() as events:
        output = run(agent_of(tool, wants("[[flagged]] a", "b", "[[flagged:0]] c")), how)
    assert len(images_from_messages(output)) == 3
    assert {event["tool_call_id"]: event["level"] for event in events} == {"call-0": 3, "call-2": 0}


@both
def test_an_empty_account_ends_the_run_with_its_error(tool, how):
    with pytest.raises(CogViewBalanceError):
        run(agent_of(tool, wants("[[balance]]")), how)


@both
@pytest.mark.parametrize(
    "fault", ["[[balance]]", "[[auth]]", "[[unavailable]]", "[[content-filter]]", "[[server-error]]"]
)
def test_parallel_calls_keep_their_images_when_one_fails(sandbox, tmp_path, how, fault):
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path, max_retries=0, on_failure="continue")
    agent = agent_of(tool, wants("a kitten", f"{fault} a puppy", "a foal"), checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}
    output = run(agent, how, config=config)
    assert [image.prompt for image in images_from_messages(output)] == ["a kitten", "a foal"]
    assert len(sandbox.requests) == 3
    again = asyncio.run(agent.ainvoke(None, config)) if how == "ainvoke" else agent.invoke(None, config)
    assert len(images_from_messages(again)) == 2
    assert len(sandbox.requests) == 3


@both
def test_a_tool_node_keeps_the_images_of_parallel_calls_when_one_cannot_be_sent(tmp_path, how):
    sent = []

    def answer(request):
        if b"unreachable" in request.content:
            raise httpx.ConnectError("refused", request=request)
        sent.append(request)
        return httpx.Response(200, json={"data": [{"url": "https://example.com/x.png"}]})

    tool = CogViewImageTool(
        api_key=FAKE_KEY,
        http_client=httpx.Client(transport=httpx.MockTransport(answer)),
        http_async_client=httpx.AsyncClient(transport=httpx.MockTransport(answer)),
        download=False,
        max_retries=0,
        on_failure="continue",
    )
    graph = StateGraph(MessagesState)
    graph.add_node("tools", ToolNode([tool]))
    graph.add_edge(START, "tools")
    state = {"messages": [wants("a kitten", "unreachable", "a foal")]}
    graph = graph.compile()
    output = graph.invoke(state) if how == "invoke" else asyncio.run(graph.ainvoke(state))
    assert [message.status for message in output["messages"][1:]] == ["success", "error", "success"]
    assert len(images_from_messages(output)) == len(sent) == 2


@both
def test_a_checkpoint_keeps_the_artifact_and_stays_small(tool, how):
    saver = InMemorySaver()
    agent = agent_of(tool, wants("a", "b", "c", "d", "e"), checkpointer=saver)
    config = {"configurable": {"thread_id": "1"}}
    run(agent, how, config=config)
    kept = images_from_messages(agent.get_state(config).values)
    assert len(kept) == 5
    assert all(image.read().startswith(b"\x89PNG") for image in kept)
    values = saver.get_tuple(config).checkpoint["channel_values"]
    assert len(json.dumps(values, default=str)) < 20_000


async def test_filter_events_come_through_the_agents_event_stream(tool):
    agent = agent_of(tool, wants("[[flagged]] a kitten"))
    names = [
        event["name"]
        async for event in agent.astream_events({"messages": "x"}, version="v2")
        if event["event"] == "on_custom_event"
    ]
    assert names == ["cogview.progress", "cogview.generated", "cogview.content_filter"]


@both
def test_a_handler_of_the_agent_receives_the_content_filter_event(tool, how):
    handler = ContentFilterCallbackHandler()
    run(agent_of(tool, wants("[[content-filter:1]] a", "[[flagged]] b")), how, config={"callbacks": [handler]})
    assert {(event["tool_call_id"], event["blocked"], event["level"]) for event in handler.events} == {
        ("call-0", True, 1),
        ("call-1", False, 3),
    }
