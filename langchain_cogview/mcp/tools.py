"""The tools of the MCP server: their names, descriptions, annotations and schemas, and the check of their arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, get_args, get_origin, get_type_hints, is_typeddict

from mcp_types import Tool, ToolAnnotations
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, create_model

from langchain_cogview.artifact import ImageArtifact
from langchain_cogview.errors import MAX_MODEL_TEXT, CogViewInvalidRequestError, Outcome, printable
from langchain_cogview.estimate import EstimateArtifact
from langchain_cogview.request import describe_validation

if TYPE_CHECKING:
    from collections.abc import Mapping

GALLERY_URI: Final = "ui://cogview/gallery"
MAX_WAIT: Final = 50.0
"""The longest time that a call waits, in seconds: clients end a call after about 60 s."""
DEFAULT_WAIT: Final = 40.0
MAX_LISTED: Final = 100
"""The largest number of images in a list."""

DESCRIPTIONS: Final = {
    "generate_image": (
        "Generate an image from a text description. Use it when the user asks for an image, drawing, photo or "
        "illustration. Each call costs money: call it once for each image that the user asked for. You get a short "
        "confirmation with the id and where the image is saved; the user sees a thumbnail. If the image is not made "
        "in time, you get its id: then call get_image, which is free."
    ),
    "get_image": (
        "Get an image that generate_image started, also in an earlier session. It is free. If it is still being "
        "made, the call waits; if it is not made in time, call it again."
    ),
    "list_images": "List the images that were made in this folder, the newest first, with ids and paths. It is free.",
    "estimate_cost": (
        "Say what images would cost, what has been spent, and what the limits leave. It is free, and makes no image. "
        "Use it when the user asks about the price, or before many images."
    ),
}
"""What chat models read about the tools."""

Id = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z_-]{1,128}$")]
"""Id of an image. It is no path: a slash or a dot is refused."""
_WAIT: Final = (
    float,
    Field(
        default=DEFAULT_WAIT,
        ge=0,
        le=MAX_WAIT,
        allow_inf_nan=False,
        description="Seconds to wait at most; then the answer says that the image is still being made.",
    ),
)


class ArgumentsError(CogViewInvalidRequestError):
    """An argument is illegal. Nothing was sent."""

    outcome = Outcome.NOT_RUN

    @property
    def text_for_model(self) -> str:
        """The text that an agent's model reads."""
        return printable(f"{self.message} {self.hint}", MAX_MODEL_TEXT)


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class GetArguments(_Arguments):
    """Arguments of `get_image`."""

    id: Annotated[Id, Field(description="The id that generate_image or list_images returned.")]
    """Id of the image."""
    wait_seconds: Annotated[
        float,
        Field(ge=0, le=MAX_WAIT, allow_inf_nan=False, description="Seconds to wait at most if it is still being made."),
    ] = DEFAULT_WAIT
    """Seconds to wait at most."""


class ListArguments(_Arguments):
    """Arguments of `list_images`."""

    limit: Annotated[int, Field(ge=1, le=MAX_LISTED, description="The largest number of images, the newest first.")] = (
        20
    )
    """The largest number of images."""


class ToolArguments:
    """The schemas of the tools for one image model.

    Args:
        image_arguments: The schema of the image tool.
    """

    def __init__(self, image_arguments: type[BaseModel]) -> None:
        self._schemas: dict[str, type[BaseModel]] = {
            "generate_image": create_model("GenerateArguments", __base__=image_arguments, wait_seconds=_WAIT),
            "get_image": GetArguments,
            "list_images": ListArguments,
            "estimate_cost": create_model(
                "EstimateArguments",
                __base__=image_arguments,
                n=(int, Field(default=1, ge=1, le=100, description="The number of images.")),
            ),
        }

    def checked(self, name: str, arguments: Mapping[str, Any] | None) -> Any:
        """Check the arguments of a call.

        Args:
            name: Name of the tool.
            arguments: What the client sent.

        Returns:
            An instance of the schema.

        Raises:
            ArgumentsError: An argument is illegal. Nothing was sent.
        """
        try:
            return self._schemas[name].model_validate(dict(arguments or {}))
        except ValidationError as error:
            problem = printable(f"Wrong arguments: {describe_validation(error)}", MAX_MODEL_TEXT - 100)
            raise ArgumentsError(problem, hint="Nothing was sent. Correct them, and call again.") from None

    def __contains__(self, name: object) -> bool:
        return name in self._schemas

    def tools(self) -> list[Tool]:
        """Make the tools as clients list them.

        Returns:
            The four tools.
        """
        gallery = {"ui": {"resourceUri": GALLERY_URI}}
        return [
            Tool(
                name="generate_image",
                title="Generate an image",
                description=DESCRIPTIONS["generate_image"],
                input_schema=_schema(self._schemas["generate_image"]),
                output_schema=_IMAGE_OUTPUT,
                annotations=ToolAnnotations(
                    read_only_hint=False, destructive_hint=False, idempotent_hint=False, open_world_hint=True
                ),
                _meta=gallery,
            ),
            Tool(
                name="get_image",
                title="Get an image",
                description=DESCRIPTIONS["get_image"],
                input_schema=_schema(GetArguments),
                output_schema=_IMAGE_OUTPUT,
                annotations=_FREE.model_copy(update={"open_world_hint": True}),
                _meta=gallery,
            ),
            Tool(
                name="list_images",
                title="List images",
                description=DESCRIPTIONS["list_images"],
                input_schema=_schema(ListArguments),
                output_schema=_LIST_OUTPUT,
                annotations=_FREE,
                _meta=gallery,
            ),
            Tool(
                name="estimate_cost",
                title="Estimate the cost",
                description=DESCRIPTIONS["estimate_cost"],
                input_schema=_schema(self._schemas["estimate_cost"]),
                output_schema=_output(EstimateArtifact, "estimated"),
                annotations=_FREE,
            ),
        ]


_FREE: Final = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False)


def _schema(arguments: type[BaseModel]) -> dict[str, Any]:
    schema: dict[str, Any] = _untitled(arguments.model_json_schema())
    schema.pop("description", None)
    return schema


def _untitled(value: Any, *, is_name: bool = False) -> Any:
    """Return a schema without the titles that pydantic makes of names; a property of that name stays."""
    if isinstance(value, dict):
        return {
            name: _untitled(item, is_name=name in {"properties", "$defs"})
            for name, item in value.items()
            if is_name or name != "title"
        }
    return [_untitled(item) for item in value] if isinstance(value, list) else value


def _model(kind: Any) -> Any:
    """Return a model of a TypedDict, whose JSON schema pydantic does not make on Python 3.11; other types are unchanged."""
    if get_origin(kind) is list:
        return list[_model(get_args(kind)[0])]  # type: ignore[misc]
    if not is_typeddict(kind):
        return kind
    fields: dict[str, Any] = {name: (_model(hint), ...) for name, hint in get_type_hints(kind).items()}
    return create_model(str(kind.__name__), **fields)


def _output(kind: type, *statuses: str) -> dict[str, Any]:
    """Return the schema of a result: its artifact, or what is answered while there is none, distinguished by `status`."""
    schema: dict[str, Any] = _untitled(_model(kind).model_json_schema())
    for definition in schema.get("$defs", {}).values():
        definition.pop("required", None)  # later versions may leave something out
    described = {
        "status": {"type": "string", "enum": [*statuses, "error"], "description": "What happened."},
        "message": {"type": "string", "description": "Of an error: what happened."},
        "hint": {"type": "string", "description": "Of an error: what to do."},
        "error": {"type": "string", "description": "Of an error: its class."},
    }
    schema["properties"] |= described
    schema["required"] = ["status"]
    schema.pop("additionalProperties", None)
    return schema


_IMAGE_OUTPUT: Final = _output(ImageArtifact, "made", "running")
_IMAGE_OUTPUT["properties"] |= {
    "id": {"type": "string", "description": "Id of the image."},
    "elapsed": {"type": ["number", "null"], "description": "While it is being made: seconds since the start."},
}
_LIST_OUTPUT: Final = {
    "type": "object",
    "properties": {
        "status": {"type": "string", "enum": ["listed", "error"]},
        "images": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    name: {"type": ["string", "null"]}
                    for name in ("id", "status", "prompt", "at", "path", "uri", "model", "size", "cost", "currency")
                },
                "required": ["id", "status"],
            },
        },
    },
    "required": ["status"],
}
