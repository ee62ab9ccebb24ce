"""The chat model without a network: what a user's agent does with it."""

import pytest
from langchain.agents import create_agent
from langchain_core.tools import tool

from langchain_cogview import CogViewImageTool, images_from_messages
from langchain_cogview.testing import SandboxChatModel


@tool
def weather(city: str) -> str:
    """Say the weather of a city."""
    return city


@pytest.mark.parametrize("how", ["sync", "async"])
async def test_an_agent_makes_an_image_of_the_users_words(sandbox, how):
    image_tool = CogViewImageTool(base_url=sandbox.base_url, download=False)
    agent = create_agent(SandboxChatModel(), tools=[weather, image_tool])
    question = {"messages": "A red fox"}
    output = agent.invoke(question) if how == "sync" else await agent.ainvoke(question)
    assert [image.prompt for image in images_from_messages(output)] == ["A red fox"]
    assert output["messages"][-1].text == "Here is your image."


def test_the_answer_says_why_no_image_was_made(sandbox):
    agent = create_agent(SandboxChatModel(), tools=[CogViewImageTool(base_url=sandbox.base_url)])
    output = agent.invoke({"messages": "[[content-filter]] A red fox"})
    assert "content filter" in output["messages"][-1].text


def test_without_an_image_tool_it_repeats_the_message():
    assert SandboxChatModel().invoke("A red fox").text == "A red fox"
    assert SandboxChatModel().bind_tools([weather]).invoke("A red fox").text == "A red fox"
