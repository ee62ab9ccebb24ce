"""`CogViewToolkit`: tools that start an image and collect it later, for hosts that end a tool call before the image is made."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, TypedDict, Unpack

from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.tools import BaseTool, BaseToolkit
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SkipValidation, WithJsonSchema, create_model

from langchain_cogview.answers import uploaded
from langchain_cogview.batches import ImageTask
from langchain_cogview.catalog import model_info
from langchain_cogview.concurrency import Deadline, in_thread
from langchain_cogview.errors import (
    MAX_MODEL_TEXT,
    CogViewInvalidRequestError,
    CogViewNotFoundError,
    CogViewTaskUnfinishedError,
    printable,
)
from langchain_cogview.events import PROGRESS_EVENT, EventHandler
from langchain_cogview.generator import CogViewImageGenerator
from langchain_cogview.images.backend import BackendFolder
from langchain_cogview.tool import CogViewImageTool, ImageToolBase, ToolSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langchain_cogview.budget import Budget
    from langchain_cogview.estimate import EstimateArtifact
    from langchain_cogview.result import ImageResult

START_NAME: Final = "cogview_start_image"
GET_NAME: Final = "cogview_get_image"
ESTIMATE_NAME: Final = "cogview_estimate"
MAX_WAIT: Final = 600.0
"""The longest time, in seconds, that one call of `cogview_get_image` may wait."""
MAX_REMEMBERED: Final = 1000
"""How many ids a toolkit remembers; the oldest images that have ended are forgotten first."""
MAX_HELD_BYTES: Final = 64 << 20
"""How many bytes of images that were collected, and are in no folder, a toolkit remembers."""
PENDING_TYPE: Final = "cogview.image_task"
_STATE_ACCESS: Final = frozenset({"__pregel_read", "__pregel_send"})
_START_SECONDS: Final = 0.6
_DOWNLOAD_ATTEMPTS: Final = 3
_CHECK_SECONDS: Final = 0.2
_ID_CHARACTERS: Final = 8
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


class PendingImage:
    """An image that was started: a task of the service, or a request that runs in a thread of this process.

    Attributes:
        id: Id for the chat model. It changes when the paid request is on its way, which can be after the start has answered.
        prompt: The prompt.
        task: The task of the service; None until it is known, and for requests that run in this process.
        result: Ends with the result or the exception of a request that runs in this process, and with that of a failed start.
        announced: Ends when the paid request is on its way.
        is_collected: Whether the chat model has been answered with the result.
    """

    def __init__(self, prompt: str, *, task: ImageTask | None = None) -> None:
        self.id = task.id if task else uuid.uuid4().hex[:_ID_CHARACTERS]
        self.prompt = prompt
        self.task = task
        self.result: Future[ImageResult] = Future()
        self.announced: Future[None] = Future()
        for future in (self.result, self.announced):
            future.set_running_or_notify_cancel()  # a caller that is cancelled cannot cancel them
        self.fetches = 0
        self.is_collected = False
        self.collecting = threading.Lock()  # held by the call that collects the task
        self._started = None if task else time.monotonic()
        if task:
            self.announce()

    @property
    def elapsed(self) -> float | None:
        """Seconds since the start; None for a task that another process started."""
        return None if self._started is None else round(time.monotonic() - self._started, 1)

    @property
    def held_bytes(self) -> int:
        """Bytes in memory of images that were collected and are in no folder: a backend, for example, has a copy of them."""
        if not self.is_collected:
            return 0
        images = self.result.result().images
        return sum(image.size_bytes or 0 for image in images if image.path is None and image.uri is None)

    def announce(self) -> None:
        """Tell the waiting start that the paid request is on its way."""
        if not self.announced.done():
            self.announced.set_result(None)

    def run(self, work: Callable[[], ImageResult | ImageTask]) -> None:
        """Run the work of the background, and keep its result or its exception.

        Args:
            work: Returns an `ImageResult`, or the `ImageTask` whose result is collected later.
        """
        try:
            made = work()
        except BaseException as error:  # noqa: BLE001  it is raised to whoever collects the image
            self.result.set_exception(error)
        else:
            if isinstance(made, ImageTask):
                self.task, self.id = made, made.id
            else:
                self.result.set_result(made)
        self.announce()


class _Announcement(EventHandler):
    """Announces an image when its paid request is sent."""

    def __init__(self, image: PendingImage) -> None:
        super().__init__()
        self._image = image

    def on_event(self, name: str, event: Any) -> None:
        if name == PROGRESS_EVENT and event["stage"] == "sent" and not self._image.announced.done():
            self._image.id = event["request_id"][:_ID_CHARACTERS]  # the id that the image has then
            self._image.announce()


class PendingImages:
    """The images that a toolkit has started. Thread-safe.

    Args:
        tool: The tool whose generator and limits are used.
    """

    def __init__(self, tool: CogViewImageTool) -> None:
        self._tool = tool
        self._images: OrderedDict[str, PendingImage] = OrderedDict()
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    @property
    def tasks_generator(self) -> CogViewImageGenerator | None:
        """The generator, if its model is asked by the task endpoint."""
        generator = self._tool.generator
        if not isinstance(generator, CogViewImageGenerator) or generator.use_tasks is False:
            return None
        return generator if model_info(generator.model).tasks and generator.n == 1 else None

    def start(self, arguments: dict[str, Any], config: RunnableConfig, budget: Budget) -> PendingImage:
        """Start an image in a thread, which goes on whatever becomes of the caller.

        Args:
            arguments: The arguments of `ImageRequest`.
            config: The `RunnableConfig` of the run that starts it, whose handlers get the events.
            budget: What must cover the image.

        Returns:
            The image. `announced` or `result` ends soon.
        """
        image = PendingImage(arguments["prompt"])
        work: Callable[[], ImageResult | ImageTask]
        if self.tasks_generator:
            work = partial(self.tasks_generator.submit, arguments, budget=budget)
        else:
            config = _with_handler(_without_state(config), image)
            work = partial(self._tool.generator.invoke, arguments, config, budget=budget)
        with self._lock:
            if self._threads is None:
                # Threads of a pool are joined when the interpreter ends: an image that is paid for is saved.
                workers = self._tool.generator.max_workers()
                self._threads = ThreadPoolExecutor(workers, thread_name_prefix="cogview-start")
            self._threads.submit(image.run, work)
        self.remember(image)
        return image

    def remember(self, image: PendingImage, *others: str) -> str:
        """Remember an image under the id that it has now, besides those that the chat model has read before.

        Args:
            image: The image.
            *others: Further ids that the chat model reads.

        Returns:
            The id.
        """
        image_id = image.id
        with self._lock:
            for each in (image_id, *others):
                self._images[each] = image
            self._forget()
        return image_id

    def collected(self, image: PendingImage, result: ImageResult) -> None:
        """Remember an image that the chat model is answered with, under the ids that the answer has too.

        Args:
            image: The image.
            result: Its result.
        """
        image.is_collected = True
        self.remember(image, *(made.id for made in result.images))

    def _forget(self) -> None:
        images = list(dict.fromkeys(self._images.values()))
        held = sum(each.held_bytes for each in images)
        for image in images:
            is_one_too_many = len(self._images) > MAX_REMEMBERED and image.result.done()
            if is_one_too_many or (held > MAX_HELD_BYTES and image.held_bytes):
                held -= image.held_bytes
                for key in [key for key, found in self._images.items() if found is image]:
                    del self._images[key]

    def find(self, image_id: str) -> PendingImage:
        """Find an image by the id that the chat model has.

        Args:
            image_id: The id, which is not trusted.

        Returns:
            The image; for an id that is not known here, a task of the service that another process may have started.

        Raises:
            CogViewInvalidRequestError: No image has this id.
        """
        image_id = image_id.strip()
        with self._lock:
            image = self._images.get(image_id)
        if image is not None:
            return image
        generator = self.tasks_generator
        if generator is None or len(image_id) <= _ID_CHARACTERS:
            raise unknown_id(image_id)
        try:
            return PendingImage("(unknown)", task=ImageTask.resume(image_id, generator=generator))
        except CogViewInvalidRequestError:
            raise unknown_id(image_id) from None

    def get(self, image: PendingImage, seconds: float, config: RunnableConfig) -> ImageResult | None:
        """Wait for an image.

        Args:
            image: The image.
            seconds: The most seconds to wait.
            config: The `RunnableConfig` of the run that collects it.

        Returns:
            The result; None if it is not there in time.

        Raises:
            CogViewError: No image was made.
        """
        deadline = Deadline(seconds)
        wait([image.announced], deadline.remaining())
        while image.task is not None and not image.result.done():
            if image.collecting.acquire(blocking=False):
                with _collecting(image):
                    return self._collected(image, image.task.result(config, timeout=deadline.remaining()))
                return None
            # Another call collects the task: it is fetched and saved once.
            if deadline.passed:
                return None
            wait([image.result], min(deadline.remaining() or 0.0, _CHECK_SECONDS))
        return image.result.result() if wait([image.result], deadline.remaining()).done else None

    async def aget(self, image: PendingImage, seconds: float, config: RunnableConfig) -> ImageResult | None:
        """Async version of `get`.

        Returns:
            As `get`.
        """
        deadline = Deadline(seconds)
        await asyncio.wait([asyncio.wrap_future(image.announced)], timeout=deadline.remaining())
        while image.task is not None and not image.result.done():
            if image.collecting.acquire(blocking=False):
                with _collecting(image):
                    return self._collected(image, await image.task.aresult(config, timeout=deadline.remaining()))
                return None
            if deadline.passed:
                return None
            left = min(deadline.remaining() or 0.0, _CHECK_SECONDS)
            await asyncio.wait([asyncio.wrap_future(image.result)], timeout=left)
        done, _ = await asyncio.wait([asyncio.wrap_future(image.result)], timeout=deadline.remaining())
        return image.result.result() if done else None

    def _collected(self, image: PendingImage, result: ImageResult) -> ImageResult | None:
        """Keep the result of a task, unless the wait ended in the middle of the download: then it is fetched again."""
        image.fetches += 1
        is_whole = all(item.mime_type or not item.url for item in result.images)
        if not is_whole and self._tool.generator.download and image.fetches < _DOWNLOAD_ATTEMPTS:
            return None
        with self._lock:
            if not image.result.done():
                image.result.set_result(result)
        return result


@contextmanager
def _collecting(image: PendingImage) -> Iterator[None]:
    """Let others collect a task again in the end; one that is not made yet is no error."""
    try:
        yield
    except CogViewTaskUnfinishedError:
        pass
    except CogViewNotFoundError:
        raise unknown_id(image.id) from None
    finally:
        image.collecting.release()


class UnknownImageError(CogViewInvalidRequestError):
    """No image that was started has this id."""

    @property
    def text_for_model(self) -> str:
        """The text that an agent's model reads. It does not say that no image was made: one may have been paid for."""
        return printable(f"{self.message} {self.hint}", MAX_MODEL_TEXT)


def unknown_id(image_id: str) -> UnknownImageError:
    """Make the error of an id that no image has.

    Args:
        image_id: The id, which is not trusted.

    Returns:
        The error.
    """
    return UnknownImageError(
        f"No image with the id {printable(image_id, 40)!r} was started here.",
        hint=f"Use an id as {START_NAME} returned it. What a program that has ended started cannot be collected: it may have "
        "been made and paid for, so do not start it again unless the user asks.",
    )


def _without_state(config: RunnableConfig) -> RunnableConfig:
    """Drop a graph's access to its state: what is written after the tool call has ended would be lost without an error."""
    configurable = {name: value for name, value in config.get("configurable", {}).items() if name not in _STATE_ACCESS}
    return {**config, "configurable": configurable}


def _with_handler(config: RunnableConfig, image: PendingImage) -> RunnableConfig:
    handler, callbacks = _Announcement(image), config.get("callbacks")
    if callbacks is None or isinstance(callbacks, list):
        return {**config, "callbacks": [*(callbacks or ()), handler]}
    callbacks = callbacks.copy()
    callbacks.add_handler(handler)
    return {**config, "callbacks": callbacks}


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
        """The folder in the agent's files: a request that ran in the background could not write there."""
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


class ToolkitSettings(ToolSettings, total=False):
    """The keyword arguments of `CogViewToolkit` other than `tool` and `wait`: those of `CogViewImageTool`."""

    generator: CogViewImageGenerator | None


class CogViewToolkit(BaseToolkit):
    """Tools that start an image and collect it later.

    Chat clients and servers end a tool call after 40 to 60 seconds, and a model such as `glm-image` needs longer. Here the paid
    call returns within a second with an id, and collecting the image is free and waits at most `wait` seconds at a time. A model
    with a task endpoint goes on at the service, where another process can collect it too; for the others the paid request goes on
    in a thread of this process, whatever becomes of the tool call. Nothing is sent twice.

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
