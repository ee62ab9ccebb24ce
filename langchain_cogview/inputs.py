"""What a call takes, and which arguments it says."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import ChatPromptValue, PromptValue

from langchain_cogview.errors import CogViewInvalidRequestError
from langchain_cogview.request import ImageRequest, checked_request

ImageInput = str | dict[str, Any] | ImageRequest | PromptValue | BaseMessage | list[BaseMessage]
"""A prompt, the arguments of `ImageRequest`, or messages, whose text is the prompt."""


def arguments_of(given: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments that an input says, and what was left out of it."""
    if isinstance(given, ImageRequest):
        return {name: getattr(given, name) for name in given.model_fields_set}, ()
    if isinstance(given, dict):
        if "prompt" not in given or isinstance(given["prompt"], str):
            return dict(given), ()
        text, notes = _text(given["prompt"])
        return {**given, "prompt": text}, notes
    text, notes = _text(given)
    return {"prompt": text}, notes


def _text(given: Any) -> tuple[str, tuple[str, ...]]:
    if isinstance(given, str):
        return given, ()
    if isinstance(given, PromptValue) and not isinstance(given, ChatPromptValue):
        return given.to_string(), ()
    messages = given.to_messages() if isinstance(given, PromptValue) else given
    if isinstance(messages, BaseMessage):
        return str(messages.text), ()
    if isinstance(messages, list | tuple) and messages and all(isinstance(each, BaseMessage) for each in messages):
        left_out = len(messages) - 1
        note = (
            f"Only the text of the last message is the prompt; {left_out} before it were left out." if left_out else ""
        )
        return str(messages[-1].text), (note,) if note else ()
    raise CogViewInvalidRequestError(
        f"Nothing was sent: a prompt cannot be made of {type(given).__name__}.",
        hint="Pass a string, a dict with the key 'prompt', an ImageRequest, a prompt value, or messages.",
    )


def request_of(given: Any, defaults: dict[str, Any]) -> tuple[ImageRequest, tuple[str, ...]]:
    """The request that an input makes.

    Args:
        given: An `ImageInput`.
        defaults: Arguments that hold where the input names none.

    Returns:
        The request, and warnings about it.

    Raises:
        CogViewInvalidRequestError: An argument is illegal; nothing has been sent.
    """
    arguments, notes = arguments_of(given)
    values = defaults | arguments
    if "prompt" not in values:
        raise CogViewInvalidRequestError(
            "Nothing was sent: there is no prompt.", hint="Pass a string, or a dict with the key 'prompt'."
        )
    request = checked_request(values)
    return request, request.warnings + notes
