"""A chat model without a network, to try an agent and its front end before there is a chat model's key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.utils.function_calling import convert_to_openai_tool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from langchain_core.callbacks import CallbackManagerForLLMRun
    from langchain_core.language_models import LanguageModelInput
    from langchain_core.messages import BaseMessage
    from langchain_core.runnables import Runnable
    from langchain_core.tools import BaseTool


class SandboxChatModel(BaseChatModel):
    """Stands in for a chat model in an agent: passes the user's words to the image tool, and then says how it went.

    The tool is the first of the agent's tools that takes a `prompt`. Without such a tool, the model repeats the user's words.

    Instantiation:
        >>> from langchain.agents import create_agent
        >>> from langchain_cogview import CogViewImageTool
        >>> from langchain_cogview.testing import SandboxChatModel
        >>> agent = create_agent(SandboxChatModel(), tools=[CogViewImageTool(base_url="sandbox:")])
    """

    @property
    def _llm_type(self) -> str:
        return "cogview-sandbox-chat"

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Offer tools to the model.

        Args:
            tools: The tools.
            tool_choice: Not used.
            **kwargs: Not used.

        Returns:
            The model with these tools.
        """
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools])

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        last = messages[-1]
        names = [tool["function"]["name"] for tool in kwargs.get("tools", ()) if _takes_prompt(tool["function"])]
        if isinstance(last, ToolMessage):
            answer = AIMessage(last.text if last.status == "error" else "Here is your image.")
        elif names:
            call = {"name": names[0], "args": {"prompt": last.text}, "id": f"call-{len(messages)}"}
            answer = AIMessage("", tool_calls=[call])
        else:
            answer = AIMessage(last.text)
        return ChatResult(generations=[ChatGeneration(message=answer)])


def _takes_prompt(function: dict[str, Any]) -> bool:
    return "prompt" in function.get("parameters", {}).get("properties", {})
