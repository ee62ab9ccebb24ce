"""`CogViewToolkit`: tools that start an image and collect it later, for hosts that end a tool call before the image is made."""

from __future__ import annotations

import asyncio
from concurrent.futures import wait
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, TypedDict, Unpack

from langchain_core.runnables import ensure_config
from langchain_core.tools import BaseTool, BaseToolkit
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SkipValidation, WithJsonSchema, create_model

from langchain_cogview.answers import uploaded
from langchain_cogview.concurrency import in_thread
from langchain_cogview.generator import CogViewImageGenerator  # noqa: TC001  read at run time
from langchain_cogview.images.backend import BackendFolder
from langchain_cogview.pending import START_NAME, PendingImage, PendingImages
from langchain_cogview.tool import CogViewImageTool, ImageToolBase, ToolSettings

if TYPE_CHECKING:
    from langchain_cogview.budget import Budget
    from langchain_cogview.estimate import EstimateArtifact

GET_NAME: Final = "cogview_get_image"
ESTIMATE_NAME: Final = "cogview_estimate"
MAX_WAIT: Final = 600.0
"""The longest time, in seconds, that one call of `cogview_get_image` may wait."""
PENDING_TYPE: Final = "cogview.image_task"
_START_SECONDS: Final = 0.6
_MAX_ID_CHARACTERS: Final = 128


class PendingArtifact(TypedDict):
    """The artifact of an image that is still being made. Plain JSON."""

    type: Literal["cogview.image_task"]
    """What it is, as opposed to the artifact of a result."""
    version: int
    """1."""
    id: str
    """Id for `cogview_get_image`."""
    status: Literal["running"]
    """The image is not made yet."""
    task_id: str | None
    """Id of the service's task, with which another process can collect it; None if the request runs in this process."""
    elapsed: float | None
    """Seconds since the start; None for a task that another process started."""
    prompt: str
    """The prompt."""
    model: str
    """The model."""
    sandbox: bool
    """Whether the offline sandbox makes it."""


# --- the tools


class GetImageArguments(BaseModel):
    """Arguments of `cogview_get_image`."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    id: Annotated[str, Field(description="The id that cogview_start_image returned.", max_length=_MAX_ID_CHARACTERS)]
    """The id of the image."""
    wait: Annotated[
        float | None,
        Field(
            default_factory=lambda: None,
            ge=0,
            description="Seconds to wait at most. Leave it out unless the user is in a hurry.",
        ),
        WithJsonSchema({"type": "number"}),
    ]
    """Seconds to wait at most; None for the toolkit's."""


class _ToolkitTool(ImageToolBase):
    tool: Annotated[CogViewImageTool, SkipValidation] = Field(repr=False, exclude=True)
    """The tool whose generator, limits and texts are used."""
    images: Any = Field(repr=False, exclude=True)
    """The images that the toolkit has started."""

    def _pending(self, image: PendingImage, image_id: str, text: str) -> tuple[str, PendingArtifact]:
        generator = self.tool.generator
        artifact: PendingArtifact = {
            "type": PENDING_TYPE,
            "version": 1,
            "id": image_id,
            "status": "running",
            "task_id": image.task.id if image.task else None,
            "elapsed": image.elapsed,
            "prompt": image.prompt,
            "model": generator.model,
            "sandbox": generator.resolved_base_url.startswith("sandbox:"),
        }
        return text, artifact


class _LimitedTool(_ToolkitTool):
    def with_budget(self, budget: Budget) -> Self:
        """Make a copy whose images another budget must cover as well, as `CogViewImageTool.with_budget` does.

        Args:
            budget: The other budget.

        Returns:
            A copy that belongs to the same toolkit.
        """
        return self.model_copy(update={"tool": self.tool.with_budget(budget)})

    def _schema(self) -> Any:
        return self.tool.args_schema


class StartImageTool(_LimitedTool):
    """Starts an image, which is paid for, and returns its id within a second."""

    name: str = START_NAME
    """Name of the tool for the model."""
    description: str = (
        "Start making an image from a text description. Use it when the user asks for an image, drawing, photo or illustration. "
        f"You get an id at once, not the image: then call {GET_NAME} with the id. "
        "Each call costs money: call it once for each image that the user asked for."
    )
    """Description of the tool for the model."""

    def _run(self, prompt: str, size: str | None = None, quality: str | None = None) -> tuple[str, PendingArtifact]:
        with self.tool.failures():
            image = self.images.start(
                self.tool.call_arguments(prompt, size, quality), ensure_config(), self.tool.limits()
            )
            wait([image.announced], _START_SECONDS)
            return self._started(image)

    async def _arun(
        self, prompt: str, size: str | None = None, quality: str | None = None
    ) -> tuple[str, PendingArtifact]:
        with self.tool.failures():
            # The first call loads the HTTP stack, and starting a thread can block.
            arguments = self.tool.call_arguments(prompt, size, quality)
            image = await in_thread(self.images.start, arguments, ensure_config(), self.tool.limits())
            await asyncio.wait([asyncio.wrap_future(image.announced)], timeout=_START_SECONDS)
            return self._started(image)

    def _started(self, image: PendingImage) -> tuple[str, PendingArtifact]:
        if image.result.done() and (error := image.result.exception()):
            raise error
        image_id = self.images.remember(image)
        return self._pending(
            image,
            image_id,
            f"Started image {image_id}. It is being made, and is paid for once. Call {GET_NAME} with this id to collect it, "
            "which is free. Do not start it again.",
        )


class GetImageTool(_ToolkitTool):
    """Collects an image that was started, which is free."""

    name: str = GET_NAME
    """Name of the tool for the model."""
    description: str = (
        f"Collect an image that {START_NAME} started. It is free, and waits until the image is made or the time is over; then "
        "call it again with the same id. You get a short confirmation with where the image is saved, not the image."
    )
    """Description of the tool for the model."""
    args_schema: Any = GetImageArguments
    """Schema of the arguments."""
    wait: float = 40.0
    """Seconds that a call waits at most."""

    def _run(self, id: str, wait: float | None = None) -> tuple[Any, Any]:  # noqa: A002
        with self.tool.failures():
            image = self.images.find(id)
            result = self.images.get(image, self._seconds(wait), ensure_config())
            folder = self._backend()
            if folder and result:
                result = uploaded(result, folder)
        if result is None:
            return self._unfinished(image)
        self.images.collected(image, result)
        return self.tool.answer(result)

    async def _arun(self, id: str, wait: float | None = None) -> tuple[Any, Any]:  # noqa: A002
        with self.tool.failures():
            image = self.images.find(id)
            result = await self.images.aget(image, self._seconds(wait), ensure_config())
            folder = self._backend()
            if folder and result:
                result = await in_thread(uploaded, result, folder)
        if result is None:
            return self._unfinished(image)
        self.images.collected(image, result)
        return await self.tool.aanswer(result)

    def _backend(self) -> BackendFolder | None:
        """Return the folder in the agent's files: a request that ran in the background could not write there."""
        return next((folder for folder in self.tool.image_access().storage if isinstance(folder, BackendFolder)), None)

    def _seconds(self, wait: float | None) -> float:
        return self.wait if wait is None else min(wait, self.wait)

    def _unfinished(self, image: PendingImage) -> tuple[Any, Any]:
        elapsed = "" if image.elapsed is None else f" ({image.elapsed:.0f} s so far)"
        image_id = self.images.remember(image)
        return self._pending(
            image,
            image_id,
            f"Image {image_id} is still being made{elapsed}. Call {GET_NAME} again with this id, which is free. "
            "Do not start it again.",
        )


class EstimateTool(_LimitedTool):
    """Says what images would cost, which is free."""

    name: str = ESTIMATE_NAME
    """Name of the tool for the model."""
    description: str = (
        "Say what an image would cost, what has been spent, and what the limits leave. It is free, and makes no image. "
        "Use it when the user asks about the price, or before many images."
    )
    """Description of the tool for the model."""

    def _run(
        self, prompt: str, size: str | None = None, quality: str | None = None, n: int | None = None
    ) -> tuple[str, EstimateArtifact]:
        with self.tool.failures():
            estimate = self.tool.estimate(prompt, size, quality, n)
        return f"{estimate} Nothing was sent.", estimate.to_artifact()

    async def _arun(
        self, prompt: str, size: str | None = None, quality: str | None = None, n: int | None = None
    ) -> tuple[str, EstimateArtifact]:
        return self._run(prompt, size, quality, n)

    def _schema(self) -> Any:
        return _estimate_schema(self.tool.args_schema)


class ToolkitSettings(ToolSettings, total=False):
    """The keyword arguments of `CogViewToolkit` other than `tool` and `wait`: those of `CogViewImageTool`."""

    generator: CogViewImageGenerator | None


class CogViewToolkit(BaseToolkit):
    """Tools that start an image and collect it later.

    Chat clients and servers end a tool call after 40 to 60 seconds, and a model such as `glm-image` needs longer. Here the paid
    call returns within a second with an id, and collecting the image is free and waits at most `wait` seconds at a time. A model
    with a task endpoint goes on at the service, where another process can collect it too; for the others the paid request goes on
    in a thread of this process, whatever becomes of the tool call. Nothing is sent twice.

    A pickled toolkit brings its settings, without the key. What it has started stays in its process, after a fork too.

    Example:
        >>> from langchain_cogview import CogViewToolkit
        >>> toolkit = CogViewToolkit(base_url="sandbox:", output_dir="images")  # offline; leave base_url out for the service
        >>> [tool.name for tool in toolkit.get_tools()]
        ['cogview_start_image', 'cogview_get_image', 'cogview_estimate']

    Args:
        tool: A tool whose generator, limits and spending the toolkit shares. None: one is made of the other arguments.
        wait: Seconds that a call of `cogview_get_image` waits at most, from 0 to 600. Choose less than the host's time limit.
        **settings: Arguments of `CogViewImageTool`, if `tool` is None.

    Raises:
        CogViewConfigurationError: An argument is missing, malformed or unknown.
    """

    tool: Annotated[CogViewImageTool, SkipValidation] = Field(repr=False)
    """The tool whose generator, limits and texts the toolkit uses."""
    wait: float = Field(default=40.0, ge=0, le=MAX_WAIT)
    """Seconds that a call of `cogview_get_image` waits at most."""

    _images: PendingImages = PrivateAttr()

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, arbitrary_types_allowed=True)

    def __init__(
        self, *, tool: CogViewImageTool | None = None, wait: float = 40.0, **settings: Unpack[ToolkitSettings]
    ) -> None:
        super().__init__(tool=CogViewImageTool(**settings) if tool is None else tool, wait=wait)
        self._images = PendingImages(self.tool)

    def get_tools(self) -> list[BaseTool]:
        """Make the tools, which share the images that were started.

        Returns:
            `cogview_start_image`, `cogview_get_image` and `cogview_estimate`.
        """
        shared: dict[str, Any] = {"tool": self.tool, "images": self._images}
        handlers = {name: getattr(self.tool, name) for name in ("handle_tool_error", "handle_validation_error")}
        return [
            StartImageTool(args_schema=self.tool.args_schema, **shared, **handlers),
            GetImageTool(wait=self.wait, **shared, **handlers),
            EstimateTool(args_schema=_estimate_schema(self.tool.args_schema), **shared, **handlers),
        ]


def _estimate_schema(image_arguments: type[BaseModel]) -> type[BaseModel]:
    # Those of the image tool, and the number of images.
    number = Annotated[int | None, WithJsonSchema({"type": "integer"})]
    field = Field(
        default_factory=lambda: None, ge=1, le=100, description="The number of images. 1 unless the user wants more."
    )
    return create_model("EstimateArguments", __base__=image_arguments, n=(number, field))
