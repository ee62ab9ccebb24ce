"""Find the images of an agent's run in its messages, and put images into messages.

Messages may be objects or dicts, single or inside a state, a checkpoint or the chunks of a stream, and other programs may have
written them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.runnables import Runnable, RunnableLambda

from langchain_cogview.artifact import ARTIFACT_TYPE, check_artifact, is_artifact, validated
from langchain_cogview.errors import (
    MAX_MODEL_TEXT,
    CogViewContentFilterError,
    CogViewError,
    CogViewInvalidRequestError,
    CogViewOutcomeUnknownError,
    printable,
)
from langchain_cogview.images.remote import ImageAccess, image_access
from langchain_cogview.result import GeneratedImage, ImageResult, with_content
from langchain_cogview.text import warn_caller

if TYPE_CHECKING:
    import os

    from langchain_core.messages.content import ImageContentBlock

    from langchain_cogview.artifact import ImageArtifact
    from langchain_cogview.blocks import BlockSource
    from langchain_cogview.images.remote import Storage

_MAX_DEPTH: Final = 24
_NO_IMAGE: Final = ("No image was made. ", "No image was received. ")
_BLOCKED: Final = "The content filter blocked "
"""How the texts for a model begin in `langchain_cogview.errors`."""
_TOOL: Final = frozenset({"tool", "ToolMessage", "ToolMessageChunk"})
_HUMAN: Final = frozenset({"human", "user", "HumanMessage", "HumanMessageChunk"})
_OTHERS: Final = frozenset(
    {"ai", "assistant", "system", "developer", "function", "chat", "remove", "AIMessageChunk", "AIMessage"}
    | {"SystemMessage", "FunctionMessage", "ChatMessage", "RemoveMessage", "SystemMessageChunk"}
)
_HOLDERS: Final = ("messages", "values", "value", "update", "data", "arg")
"""Attributes by which objects of LangChain and LangGraph hold messages: states, snapshots, outputs, commands, stream parts,
sends."""


class _Found(NamedTuple):
    """One message: who it is from, what a tool attached, and the id of the tool call that it answers."""

    role: Literal["tool", "human", "other"]
    artifact: Any = None
    call_id: str | None = None


def images_from_messages(
    messages: Any,
    *,
    last_turn: bool = False,
    within: str | os.PathLike[str] | None = None,
    storage: Storage | None = None,
    storage_options: Mapping[str, Any] | None = None,
    allowed_image_hosts: str | Iterable[str] | None = None,
) -> list[GeneratedImage]:
    """Find the images that the tool calls of an agent made.

    Other people may have written the messages: the options limit what the images may be read from.

    Args:
        messages: An agent's messages, objects or dicts; its output or state (`{"messages": [...]}`, a pydantic model, a
            dataclass, a `StateSnapshot`); or a chunk of `stream`, or a list of them.
        last_turn: Whether only the images after the last message of the user are returned. With a checkpointer an agent's output
            holds the messages of every turn.
        within: The only folder from which files are read. None: any file that is an image with the recorded size and hash.
        storage: URLs of the remote folders from which URIs are read, such as `s3://bucket/images`, and backends
            of deepagents or folders in them (`BackendFolder`). None: no URI is read.
        storage_options: fsspec's options for these folders.
        allowed_image_hosts: The only hosts from which links are fetched. None: any public one.

    Returns:
        The images, in order; once for a message that occurs twice, as in the chunks of a stream. One warning reports what was
        not understood.

    Raises:
        CogViewConfigurationError: `storage` does not name remote folders.
    """
    access = image_access(
        within=within, storage=storage, storage_options=storage_options, allowed_image_hosts=allowed_image_hosts
    )
    problems: list[str] = []
    found = list(_messages(messages, problems))
    if last_turn:
        turns = [index for index, message in enumerate(found) if message.role == "human"]
        found = found[turns[-1] + 1 :] if turns else found
    images: list[GeneratedImage] = []
    seen: set[tuple[str, str, str]] = set()
    for message in found:
        for image in _images(message.artifact, access, problems):
            key = (message.call_id or "", image.id, image.request_id)
            if message.call_id is None or key not in seen:
                images.append(image)
            seen.add(key)
    if problems:
        more = f" ({len(problems) - 1} more like this.)" if len(problems) > 1 else ""
        warn_caller(f"Something was left out. {problems[0]}{more}")
    return images


def failures_from_messages(messages: Any) -> list[CogViewError]:
    """Find the calls of image tools that gave the model the text of an error, such as a blocked prompt.

    Args:
        messages: The messages of an agent.

    Returns:
        An error for each call, in order, with the prompt of the call where it is known.
    """
    prompts: dict[str, str] = {}
    found: list[CogViewError] = []
    for message in messages if isinstance(messages, list | tuple) else ():
        for call in getattr(message, "tool_calls", None) or ():
            arguments = call.get("args")
            prompts[str(call.get("id"))] = str(arguments.get("prompt") or "") if isinstance(arguments, Mapping) else ""
        text = getattr(message, "content", None)
        if getattr(message, "status", None) != "error" or not isinstance(text, str) or not text.startswith(_NO_IMAGE):
            continue
        kind: type[CogViewError] = CogViewOutcomeUnknownError if text.startswith(_NO_IMAGE[1]) else CogViewError
        kind = CogViewContentFilterError if _BLOCKED in text else kind
        error = kind(printable(text.removeprefix(_NO_IMAGE[0]), MAX_MODEL_TEXT), hint="")
        error.prompt = prompts.get(str(getattr(message, "tool_call_id", None))) or None
        found.append(error)
    return found


def images_of(artifact: Any, access: ImageAccess) -> list[GeneratedImage]:
    """Return the images in what a tool attached to its message, in order, without what cannot be understood."""
    return list(_images(artifact, access, []))


def _images(artifact: Any, access: ImageAccess, problems: list[str]) -> Iterator[GeneratedImage]:
    for part in _artifacts(artifact, ()):
        if isinstance(part, ImageResult):
            yield from part.images
            continue
        for item in [part] if isinstance(part, GeneratedImage) else read_each(part, access):
            if isinstance(item, GeneratedImage):
                yield item
            else:
                problems.append(str(item))


def _artifacts(value: Any, above: tuple[int, ...]) -> Iterator[Any]:
    # A tool attached one result or artifact, several, some inside other data, or all of it as JSON text.
    if isinstance(value, ImageResult | GeneratedImage) or is_artifact(value):
        yield value
    elif isinstance(value, str) and not above and ARTIFACT_TYPE in value:
        yield from _artifacts(_parsed(value), (id(value),))
    elif isinstance(value, Mapping | list | tuple) and id(value) not in above and len(above) < _MAX_DEPTH:
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _artifacts(part, (*above, id(value)))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_each(artifact: ImageArtifact | Mapping[str, Any], access: ImageAccess) -> list[Any]:
    """Return an image or an error for each image of an artifact, or a single error if the artifact is damaged."""
    try:
        check_artifact(artifact)
        items = artifact.get("images")
    except CogViewInvalidRequestError as error:
        return [error]
    except Exception as error:  # noqa: BLE001  a foreign mapping raises what it likes
        return [CogViewInvalidRequestError(f"This artifact cannot be read ({type(error).__name__}).", hint="")]
    if not isinstance(items, list | tuple):
        return [CogViewInvalidRequestError("This artifact is damaged at images.", hint="")]
    return [_image_or_error(item, access) for item in items]


def _image_or_error(item: Any, access: ImageAccess) -> GeneratedImage | CogViewInvalidRequestError:
    if not isinstance(item, Mapping):
        return CogViewInvalidRequestError(
            f"An image of this artifact is damaged: it is of type {printable(type(item).__name__, 40)}.", hint=""
        )
    try:
        return with_content(validated(GeneratedImage, item), None, access)
    except CogViewInvalidRequestError as error:
        return error


# --- finding messages


def _messages(value: Any, problems: list[str]) -> Iterator[_Found]:
    if _is_one(value):
        value = [value]
    for item in value:
        found = list(_walked(item, ()))
        yield from found
        if not found and not _is_quiet(item):
            problems.append(
                f"No message was found in an item of type {printable(type(item).__name__, 40)}: the messages, output, state or "
                "stream chunks of an agent are expected."
            )


def _is_one(value: Any) -> bool:
    """Return whether this is one message, state or chunk rather than several of them."""
    if isinstance(value, BaseMessage | Mapping | str | bytes | bytearray) or not isinstance(value, Iterable):
        return True
    return _is_model(value) or _is_state(value) or _is_chunk(value)


def _is_chunk(value: Any) -> bool:
    """Return whether this is a chunk of a stream, such as `("updates", {...})` with its mode, or a message with its metadata."""
    if not isinstance(value, tuple):
        return False
    with_metadata = len(value) == 2 and _message(value[0]) and isinstance(value[1], Mapping)  # noqa: PLR2004
    return any(isinstance(part, str) for part in value) or bool(with_metadata and not list(_walked(value[1], ())))


def _walked(value: Any, above: tuple[int, ...]) -> Iterator[_Found]:
    message = _message(value)
    if message:
        yield message
    elif id(value) not in above and len(above) < _MAX_DEPTH:
        for part in _parts(value):
            yield from _walked(part, (*above, id(value)))


def _message(value: Any) -> _Found | None:
    if isinstance(value, BaseMessage):
        return _of_message(value)
    if isinstance(value, ImageResult | GeneratedImage):
        return _Found("tool", value)
    if isinstance(value, Mapping):
        return _of_mapping(value)
    is_pair = isinstance(value, list | tuple) and len(value) == 2  # noqa: PLR2004  ("user", "text")
    return _Found("human") if is_pair and isinstance(value[0], str) and value[0] in _HUMAN else None


def _parts(value: Any) -> Iterable[Any]:
    """Return what may hold messages inside something that is not one."""
    if isinstance(value, Mapping):
        # A state's other entries may repeat its messages; the chunks of a stream have the names of nodes in their place.
        return [value["messages"]] if "messages" in value else list(value.values())
    if isinstance(value, list | tuple) and not _is_state(value):
        return value
    parts = [part for name in _HOLDERS if (part := _attribute(value, name)) is not None]
    return parts or [part for name in _fields(value) if (part := _attribute(value, name)) is not None]


def _of_message(message: BaseMessage) -> _Found:
    role: Any = "tool" if message.type in _TOOL else "human" if message.type in _HUMAN else "other"
    return _Found(role, getattr(message, "artifact", None), _id(getattr(message, "tool_call_id", None)))


def _of_mapping(value: Mapping[Any, Any]) -> _Found | None:
    """Return the message in a dict of JSON, `model_dump`, `messages_to_dict`, `dumpd` or LangGraph's API, or an artifact."""
    if is_artifact(value):
        return _Found("tool", value)
    fields: Any = value
    role = value.get("type") or value.get("role")
    if value.get("lc") and isinstance(value.get("id"), list | tuple) and isinstance(value.get("kwargs"), Mapping):
        role, fields = (value["id"] or [None])[-1], value["kwargs"]
    elif isinstance(value.get("data"), Mapping) and "content" not in value:
        fields = value["data"]
    if not isinstance(role, str) or "content" not in fields:
        return None
    if role in _TOOL:
        return _Found("tool", fields.get("artifact"), _id(fields.get("tool_call_id")))
    return _Found("human") if role in _HUMAN else _Found("other") if role in _OTHERS else None


def _id(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _is_state(value: Any) -> bool:
    """Return whether an object, such as a pydantic model, which can be iterated, holds messages in an attribute."""
    return not isinstance(value, Mapping) and any(_attribute(value, name) is not None for name in _HOLDERS)


def _attribute(value: Any, name: str) -> Any:
    try:
        found = getattr(value, name, None)
    except Exception:  # noqa: BLE001  a property of a foreign class raises what it likes
        return None
    return found if isinstance(found, BaseMessage | Mapping | list | tuple) or _is_model(found) else None


def _is_model(value: Any) -> bool:
    return hasattr(type(value), "__pydantic_fields__") or hasattr(type(value), "__dataclass_fields__")


def _fields(value: Any) -> Iterable[str]:
    """Return the names of the fields of a pydantic model or a dataclass, which may hold messages under any name."""
    kind = type(value)
    return [*getattr(kind, "__pydantic_fields__", ()), *getattr(kind, "__dataclass_fields__", ())]


def _is_quiet(item: Any) -> bool:
    """Return whether an item without a message needs no warning: a node's update of something else, an empty state."""
    if isinstance(item, Mapping):
        parts = item["messages"] if "messages" in item else list(item.values())
        nothing = parts is None or (isinstance(parts, list | tuple) and not parts)
        return nothing or ("messages" not in item and all(part is None or _is_container(part) for part in parts))
    return item is None or _is_chunk(item) or (isinstance(item, list | tuple) and all(map(_is_container, item)))


def _is_container(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


# --- messages of images


def _human_message(blocks: list[ImageContentBlock], text: str | None) -> list[BaseMessage]:
    content: list[Any] = [{"type": "text", "text": text}] if text else []
    content.extend(blocks)
    return [HumanMessage(content)]


def _images_in(result: Any) -> Iterator[GeneratedImage]:
    if isinstance(result, GeneratedImage):
        return iter((result,))
    if isinstance(result, ImageResult):
        return iter(result.images)
    raise CogViewInvalidRequestError(
        f"to_message takes an ImageResult; this is of type {printable(type(result).__name__, 40)}.",
        hint="Put it after the generator: prompt | generator | to_message | model.",
    )


def _noted(error: Exception, image: GeneratedImage) -> None:
    """Add where the paid image is to an error that ends a chain."""
    where = image.path or image.uri or image.url or "in memory, on the result"
    error.add_note(f"The image was made (id {printable(image.id, 64)}): {printable(str(where), 1000)}")


def _to_message(
    result: ImageResult | GeneratedImage, *, text: str | None = None, source: BlockSource = "base64"
) -> list[BaseMessage]:
    blocks = []
    for image in _images_in(result):
        try:
            blocks.append(image.content_block(source))
        except (CogViewError, ImportError) as error:
            _noted(error, image)
            raise
    return _human_message(blocks, text)


async def _ato_message(
    result: ImageResult | GeneratedImage, *, text: str | None = None, source: BlockSource = "base64"
) -> list[BaseMessage]:
    blocks = []
    for image in _images_in(result):
        try:
            blocks.append(await image.acontent_block(source))
        except (CogViewError, ImportError) as error:
            _noted(error, image)
            raise
    return _human_message(blocks, text)


to_message: Final[Runnable[ImageResult | GeneratedImage, list[BaseMessage]]] = RunnableLambda(
    _to_message, afunc=_ato_message, name="to_message"
)
"""A Runnable from a result to a list with one message of the user, which has a content block for each image: the input of a
chat model that takes images, as in `prompt | generator | to_message | model`. `to_message.bind(text=..., source=...)` puts a
text before the images, and chooses what the blocks have, as in `GeneratedImage.content_block`."""
