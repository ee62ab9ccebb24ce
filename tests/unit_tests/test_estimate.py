"""What an image costs is shown before it is paid for: to the program, to the agent, and to the person who approves it."""

import asyncio
import json

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from langchain_cogview import (
    CogViewConfigurationError,
    CogViewImageTool,
    CogViewInvalidRequestError,
    CogViewToolkit,
    spending_approval,
)
from tests.unit_tests.test_agent import Scripted, wants

both = pytest.mark.parametrize("how", ["sync", "async"])


@pytest.fixture
def tool(sandbox, tmp_path):
    return CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path, budget="0.20", max_images=5)


def test_an_estimate_has_price_spent_and_left_and_sends_nothing(tool, sandbox):
    first = tool.estimate("a kitten", "16:9", n=2)
    assert (first.n, first.size, first.total.amount) == (2, "1344x768", 2 * first.price.amount)
    assert (str(first.left), first.images_left, first.is_covered, first.sandbox) == ("0.20 CNY", 3, True, True)
    assert sandbox.requests == []
    tool.invoke({"prompt": "a kitten"})
    second = tool.estimate("a kitten")
    assert (second.spent, second.images_left) == (first.price, 2)
    assert second.left.amount == first.left.amount - first.price.amount
    assert not tool.estimate("a kitten", n=3).is_covered
    assert "nothing is charged; list price 0.06 CNY as of" in str(second)
    assert json.loads(json.dumps(second.to_artifact())) == second.to_artifact()


def test_without_limits_nothing_is_left_to_say(sandbox):
    estimate = CogViewImageTool(base_url=sandbox.base_url, download=False).estimate("a kitten", n=100)
    assert (estimate.left, estimate.images_left, estimate.is_covered) == (None, None, True)
    assert "Left" not in str(estimate)


def test_an_unknown_price_is_not_free(sandbox):
    with pytest.warns(UserWarning, match="cogview-9"):
        tool = CogViewImageTool(base_url=sandbox.base_url, download=False, model="cogview-9")
    estimate = tool.estimate("a kitten")
    assert estimate.price.amount is estimate.total.amount is None
    assert "unknown price" in str(estimate)


@pytest.mark.parametrize("arguments", [{"prompt": " "}, {"prompt": "x", "size": "1x1"}, {"prompt": "x", "n": 0}])
def test_an_illegal_request_has_no_estimate(tool, arguments):
    with pytest.raises(CogViewInvalidRequestError):
        tool.estimate(**arguments)


@both
def test_an_agent_asks_for_the_price_for_nothing(tool, sandbox, how):
    estimate = CogViewToolkit(tool=tool).get_tools()[2]
    call = {"type": "tool_call", "name": estimate.name, "id": "1", "args": {"prompt": "a kitten", "n": 2}}
    message = estimate.invoke(call) if how == "sync" else asyncio.run(estimate.ainvoke(call))
    assert message.content.endswith("Nothing was sent.")
    assert message.artifact["total"] == "0.12"
    assert sandbox.requests == []
    bad = {"prompt": "a kitten", "size": "1x1"}
    assert "not" in (estimate.invoke(bad) if how == "sync" else asyncio.run(estimate.ainvoke(bad)))


# --- approval


def agent_of(tool, *script, above=None):
    approval = HumanInTheLoopMiddleware({tool.name: spending_approval(tool, above=above)})
    responses = [*script, AIMessage("Here you are.")]
    return create_agent(
        Scripted(responses=responses), tools=[tool], middleware=[approval], checkpointer=InMemorySaver()
    )


def run(agent, value, how):
    thread = {"configurable": {"thread_id": "1"}}
    return agent.invoke(value, thread) if how == "sync" else asyncio.run(agent.ainvoke(value, thread))


QUESTION = {"messages": "Make an image of a kitten"}


@both
def test_a_person_sees_price_size_spent_and_left_before_anything_is_paid(tool, sandbox, how):
    agent = agent_of(tool, wants("a kitten", size="1344x768"))
    asked = run(agent, QUESTION, how)["__interrupt__"][0].value["action_requests"][0]["description"]
    for fact in ("0.06 CNY", "1344x768", "Left: 0.20 CNY, 3 images", "Prompt: a kitten"):
        assert fact in asked
    assert sandbox.requests == []
    run(agent, Command(resume={"decisions": [{"type": "approve"}]}), how)
    assert sandbox.images_made == 1


@both
def test_what_a_person_rejects_is_not_paid(tool, sandbox, how):
    agent = agent_of(tool, wants("a kitten"))
    run(agent, QUESTION, how)
    output = run(agent, Command(resume={"decisions": [{"type": "reject"}]}), how)
    assert sandbox.images_made == 0
    assert next(message for message in output["messages"] if isinstance(message, ToolMessage)).status == "error"


@pytest.mark.parametrize(("above", "prompts", "asks"), [
    ("0.20", ["a"], False), ("0.06", ["a"], False), ("0.05", ["a"], True), (0, ["a"], True), (None, ["a"], True),
    ("0.11", ["a", "b"], True), ("0.12", ["a", "b"], False),
])  # fmt: skip
def test_only_what_costs_more_together_is_asked_for(tool, sandbox, above, prompts, asks):
    output = run(agent_of(tool, wants(*prompts), above=above), QUESTION, "sync")
    assert ("__interrupt__" in output) == asks
    assert sandbox.images_made == (0 if asks else len(prompts))


def test_started_images_are_asked_for_by_what_they_cost_together(tool, sandbox):
    toolkit = CogViewToolkit(tool=tool)
    calls = [{"name": "cogview_start_image", "args": {"prompt": item}, "id": item} for item in "ab"]
    asks = AIMessage("", tool_calls=calls)
    approval = HumanInTheLoopMiddleware({"cogview_start_image": spending_approval(toolkit.tool, above="0.11")})
    model = Scripted(responses=[asks, AIMessage("Done.")])
    agent = create_agent(model, tools=toolkit.get_tools(), middleware=[approval], checkpointer=InMemorySaver())
    assert "__interrupt__" in run(agent, QUESTION, "sync")
    assert sandbox.requests == []


def test_illegal_arguments_are_refused_by_the_tool_without_asking(tool, sandbox):
    output = run(agent_of(tool, wants("a kitten", size="1x1")), QUESTION, "sync")
    assert "__interrupt__" not in output
    assert sandbox.requests == []


@pytest.mark.parametrize("above", ["much", -1, float("nan")])
def test_a_threshold_that_is_no_amount_is_refused(tool, above):
    with pytest.raises(CogViewConfigurationError, match="above="):
        spending_approval(tool, above=above)
