"""Images that were started: paid requests that run in threads of this process, and tasks of the service. Collecting is free."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
import weakref
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.artifact import PROGRESS_EVENT
from langchain_cogview.catalog import model_info
from langchain_cogview.concurrency import Deadline
from langchain_cogview.errors import (
    MAX_MODEL_TEXT,
    CogViewInvalidRequestError,
    CogViewNotFoundError,
    CogViewTaskUnfinishedError,
    printable,
)
from langchain_cogview.events import EventHandler
from langchain_cogview.generator import CogViewImageGenerator
from langchain_cogview.tasks import ImageTask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langchain_core.runnables import RunnableConfig

    from langchain_cogview.budget import Budget
    from langchain_cogview.result import ImageResult
    from langchain_cogview.tool import CogViewImageTool

START_NAME: Final = "cogview_start_image"
MAX_REMEMBERED: Final = 1000
"""How many ids are remembered; the oldest images that have ended are forgotten first."""
MAX_HELD_BYTES: Final = 64 << 20
"""How many bytes of images that were collected, and are in no folder, are remembered."""
_STATE_ACCESS: Final = frozenset({"__pregel_read", "__pregel_send"})
_DOWNLOAD_ATTEMPTS: Final = 3
_CHECK_SECONDS: Final = 0.2
_ID_CHARACTERS: Final = 8


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
        """Notify the waiting start that the paid request is on its way."""
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

    They belong to the process that started them: an unpickled object and a forked process begin without any. A deep copy in the
    same process shares them.

    Args:
        tool: The tool whose generator and limits are used.
    """

    def __init__(self, tool: CogViewImageTool) -> None:
        self._tool = tool
        self.forget()
        _alive.add(self)

    def forget(self) -> None:
        """Reset, in a forked process: the threads that make the images are those of the parent."""
        self._images: OrderedDict[str, PendingImage] = OrderedDict()
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return PendingImages, (self._tool,)

    def __copy__(self) -> PendingImages:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PendingImages:
        return self

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
        self.run(image, self.work(image, arguments, config, budget))
        return image

    def work(
        self, image: PendingImage, arguments: dict[str, Any], config: RunnableConfig, budget: Budget
    ) -> Callable[[], ImageResult | ImageTask]:
        """Make the function that makes an image, or submits its task; the arguments are those of `start`.

        Returns:
            A function for the background.
        """
        if self.tasks_generator:
            return partial(self.tasks_generator.submit, arguments, budget=budget)
        config = _with_handler(_without_state(config), image)
        return partial(self._tool.generator.invoke, arguments, config, budget=budget)

    def run(self, image: PendingImage, work: Callable[[], ImageResult | ImageTask]) -> None:
        """Run the work of an image in a thread of the background, and remember the image.

        Args:
            image: The image.
            work: As `PendingImage.run` takes it.
        """
        with self._lock:
            if self._threads is None:
                # Threads of a pool are joined when the interpreter ends: an image that is paid for is saved.
                workers = self._tool.generator.max_workers()
                self._threads = ThreadPoolExecutor(workers, thread_name_prefix="cogview-start")
            self._threads.submit(image.run, work)
        self.remember(image)

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
            for item in (image_id, *others):
                self._images[item] = image
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
        held = sum(item.held_bytes for item in images)
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
            UnknownImageError: No image has this id.
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
        await asyncio.wait([_waited(image.announced)], timeout=deadline.remaining())
        while image.task is not None and not image.result.done():
            if image.collecting.acquire(blocking=False):
                with _collecting(image):
                    return self._collected(image, await image.task.aresult(config, timeout=deadline.remaining()))
                return None
            if deadline.passed:
                return None
            left = min(deadline.remaining() or 0.0, _CHECK_SECONDS)
            await asyncio.wait([_waited(image.result)], timeout=left)
        done, _ = await asyncio.wait([_waited(image.result)], timeout=deadline.remaining())
        return image.result.result() if done else None

    def _collected(self, image: PendingImage, result: ImageResult) -> ImageResult | None:
        """Return the result of a task, and keep it; None if the wait ended in the middle of the download: it is fetched again."""
        image.fetches += 1
        is_whole = all(item.mime_type or not item.url for item in result.images)
        if not is_whole and self._tool.generator.download and image.fetches < _DOWNLOAD_ATTEMPTS:
            return None
        with self._lock:
            if not image.result.done():
                image.result.set_result(result)
        return result


_alive: Final[weakref.WeakSet[PendingImages]] = weakref.WeakSet()


def _after_fork() -> None:
    for images in list(_alive):
        images.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _waited(future: Future[Any]) -> asyncio.Future[Any]:
    # An exception that comes after the wait belongs to whoever collects the image, and is no exception that nobody has read.
    waited = asyncio.wrap_future(future)
    waited.add_done_callback(lambda done: done.cancelled() or done.exception())
    return waited


@contextmanager
def _collecting(image: PendingImage) -> Iterator[None]:
    """Let others collect a task again in the end; one that is not made yet is no error.

    Raises:
        UnknownImageError: The service does not know the task.
    """
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
    """Return the config without a graph's access to its state: what is written after the tool call has ended would be lost."""
    configurable = {name: value for name, value in config.get("configurable", {}).items() if name not in _STATE_ACCESS}
    return {**config, "configurable": configurable}


def _with_handler(config: RunnableConfig, image: PendingImage) -> RunnableConfig:
    handler, callbacks = _Announcement(image), config.get("callbacks")
    if callbacks is None or isinstance(callbacks, list):
        return {**config, "callbacks": [*(callbacks or ()), handler]}
    callbacks = callbacks.copy()
    callbacks.add_handler(handler)
    return {**config, "callbacks": callbacks}
