"""`CogViewMiddleware` with the chat models of other packages, read from their real requests, and with deep agents."""

import asyncio
import json

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver

from langchain_cogview import CogViewMiddleware, images_from_messages
from tests.unit_tests import test_providers
from tests.unit_tests.test_middleware import IN_INPUTS, IN_TOOLS, THREAD, blocks, call, model_of, texts, wants
from tests.unit_tests.test_providers import PACKAGES, chat_model

service = test_providers.service
pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]  # the packages take seconds to import


@pytest.mark.parametrize("profile", [IN_TOOLS, IN_INPUTS], ids=["in tools", "in inputs"])
@pytest.mark.parametrize("name", [*PACKAGES, "openai responses"])
def test_a_provider_is_sent_the_image_where_it_takes_it_and_once_more_without(
    service, sandbox, tmp_path, name, profile
):
    package = name.split()[0]
    pytest.importorskip(PACKAGES[package], reason="needs the extra integrations")
    model = chat_model(package, f"http://127.0.0.1:{service.server_port}")
    if name == "openai responses":
        model.use_responses_api = True
    model.profile = profile
    middleware = CogViewMiddleware(base_url=sandbox.base_url, output_dir=tmp_path)
    (tool, _) = middleware.tools
    calls = [call(tool.name, each, prompt=each) for each in ("kitten", "puppy")]
    answers = [tool.invoke(each) for each in calls]
    thumbnails = middleware._thumbnails.of_images(images_from_messages(answers))
    assert len(thumbnails) == 2
    agent = create_agent(model, middleware=[middleware])
    with pytest.raises(Exception):  # noqa: B017  the service refuses everything
        agent.invoke({"messages": [HumanMessage("x"), AIMessage("", tool_calls=calls), *answers]})
    with_images, without = service.bodies[0], service.bodies[-1]
    assert json.dumps(with_images).count("image/jpeg") == 2
    assert "image/jpeg" not in json.dumps(without)
    assert len(service.bodies) == 2
    if name == "openai" or (name == "mistral" and profile is IN_INPUTS):
        kinds = [item["role"] for item in with_images["messages"]]
        assert kinds == ["system", "user", "assistant", "tool", "tool", "assistant", "user"]
        assert json.dumps(with_images["messages"][-1]).count("image/jpeg") == 2


# --- deep agents


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_deep_agent_sees_its_images_and_shares_the_budget_with_a_sub_agent(sandbox, tmp_path, how):
    deepagents = pytest.importorskip("deepagents", reason="needs the extra integrations")
    middleware = CogViewMiddleware(base_url=sandbox.base_url, output_dir=tmp_path, max_images=3)
    painter = model_of(wants("a", "b"), AIMessage("Painted."), wants("c", "d"), AIMessage("Painted."))
    script = [
        AIMessage("", tool_calls=[call("task", item, description="Paint.", subagent_type="painter")]) for item in "xy"
    ]
    model = model_of(wants("a kitten"), *script, wants("a foal"), profile=IN_TOOLS)
    agent = deepagents.create_deep_agent(
        model=model,
        middleware=[middleware],
        subagents=[
            {
                "name": "painter",
                "description": "Paints.",
                "system_prompt": "Paint.",
                "model": painter,
                "tools": [],
                "middleware": [middleware],
            }
        ],
        checkpointer=InMemorySaver(),
    )
    state = {"messages": "Draw"}
    output = agent.invoke(state, THREAD) if how == "sync" else asyncio.run(agent.ainvoke(state, THREAD))
    assert len(sandbox.requests) == 3
    assert middleware.spent(agent.get_state(THREAD)).count == 3
    answers = [message for message in output["messages"] if isinstance(message, ToolMessage)]
    assert "The limit of 3 images for this conversation is reached" in answers[-1].text
    assert [len(blocks(request)) for request in model.requests] == [0, 1, 1, 1, 1]
    assert "You are shown small versions" in texts(model.requests[-1][:1])
    assert not blocks(output["messages"])
