"""`ImageTask`: a picture that the service is making, found again by its id."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Self

from langchain_cogview.api.settings import preload
from langchain_cogview.catalog import model_info
from langchain_cogview.concurrency import Deadline
from langchain_cogview.errors import (
    CogViewContentFilterError,
    CogViewInvalidRequestError,
    CogViewTaskFailedError,
    printable,
)
from langchain_cogview.request import ImageRequest

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig

    from langchain_cogview.api.protocol import TaskReply
    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.result import ImageResult

TASK_MODEL = "glm-image"
_STATUS_SECONDS = 30.0

TaskStatus = Literal["processing", "succeeded", "failed"]


class ImageTask:
    """A picture that the service is making; `CogViewImageGenerator.submit` gives one, and `resume` finds it again.

    Example:
        >>> task = CogViewImageGenerator(model="glm-image").submit("a kitten")    # doctest: +SKIP
        >>> task.id                                                               # doctest: +SKIP
        >>> ImageTask.resume(task.id).result().path  # in this process or another # doctest: +SKIP

    Attributes:
        id: The service's.
        generator: Whose settings hold: key, service, folder.
        request: What was asked for.
        request_id: Ours; of a resumed task, its id.
        warnings: What to tell of the request.
    """

    def __init__(
        self,
        task_id: str,
        *,
        generator: CogViewImageGenerator,
        request: ImageRequest,
        request_id: str,
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.id = task_id
        self.generator = generator
        self.request = request
        self.request_id = request_id
        self.warnings = warnings

    @classmethod
    def resume(
        cls,
        task_id: str,
        *,
        generator: CogViewImageGenerator | None = None,
        model: str | None = None,
        prompt: str = "(unknown)",
        **settings: Any,
    ) -> Self:
        """A task that was submitted before, perhaps by another process.

        Args:
            task_id: Its id.
            generator: Whose settings hold; they must reach the same service with the same account. None: one is made of
                `settings`, with the model `glm-image`.
            model: Which model took it, for the record and the price. None: the generator's, where that is one of the task
                endpoint, else `glm-image`.
            prompt: What was asked for, for the record; the service does not tell it.
            **settings: Arguments of `CogViewImageGenerator`.

        Raises:
            CogViewInvalidRequestError: The id is blank, or holds characters that no id has, such as `/`.
        """
        from langchain_cogview.api.protocol import is_task_id  # noqa: PLC0415
        from langchain_cogview.api.tasks import BAD_TASK_ID  # noqa: PLC0415

        task_id = task_id.strip() if isinstance(task_id, str) else ""
        if not is_task_id(task_id):
            settings.clear()  # the key may be among them: the frame of an error holds none
            raise CogViewInvalidRequestError(BAD_TASK_ID, hint="Pass task.id or error.task_id.")
        if generator is None:
            from langchain_cogview.generator import CogViewImageGenerator  # noqa: PLC0415

            try:
                generator = CogViewImageGenerator(**({"model": model or TASK_MODEL} | settings))
            finally:
                settings.clear()
        if model is None:
            model = generator.model if model_info(generator.model).tasks else TASK_MODEL
        request = ImageRequest(prompt=prompt, model=model)
        return cls(task_id, generator=generator, request=request, request_id=task_id)

    def status(self) -> TaskStatus:
        """Ask once, which is free.

        Raises:
            CogViewError: The task is not known, or the service could not be asked.
        """
        try:
            return _status(self.generator.tasks_client().status(self.id, Deadline(_STATUS_SECONDS)))
        except (CogViewTaskFailedError, CogViewContentFilterError):
            return "failed"

    async def astatus(self) -> TaskStatus:
        """Ask once. The twin of `status`."""
        await preload(self.generator.resolved_base_url)
        try:
            return _status(await self.generator.tasks_client().astatus(self.id, Deadline(_STATUS_SECONDS)))
        except (CogViewTaskFailedError, CogViewContentFilterError):
            return "failed"

    def result(self, config: RunnableConfig | None = None, *, timeout: float | timedelta | None = 600.0) -> ImageResult:
        """Wait for the picture, fetch and save it, as `invoke` does. May be called again.

        Args:
            config: LangChain's.
            timeout: Seconds for all of it; None: no limit.

        Raises:
            CogViewTaskUnfinishedError: It has not ended in time; asking again later is free.
            CogViewTaskFailedError: It ended without a picture.
            CogViewContentFilterError: It was blocked.
            CogViewNotFoundError: The service does not know the id.
        """
        return self.generator.collect(self, config, seconds=_seconds(timeout))

    async def aresult(
        self,
        config: RunnableConfig | None = None,
        *,
        timeout: float | timedelta | None = 600.0,  # noqa: ASYNC109  the same as the sync one's
    ) -> ImageResult:
        """Wait for the picture. The twin of `result`."""
        return await self.generator.acollect(self, config, seconds=_seconds(timeout))

    def __repr__(self) -> str:
        return f"ImageTask({printable(self.id, 64)!r}, model={self.request.model!r})"


def _seconds(timeout: float | timedelta | None) -> float | None:
    return timeout.total_seconds() if isinstance(timeout, timedelta) else timeout


def _status(reply: TaskReply) -> TaskStatus:
    return "succeeded" if reply.reply else "processing"


def checked_task(request: ImageRequest) -> ImageRequest:
    """A request for the task endpoint, as it is.

    Raises:
        CogViewInvalidRequestError: The task endpoint does not take it; nothing has been sent.
    """
    if not model_info(request.model).tasks:
        raise CogViewInvalidRequestError(
            f"Nothing was sent: {request.model} is no model of the task endpoint.", hint="Use model='glm-image'."
        )
    if request.n > 1:
        raise CogViewInvalidRequestError("Nothing was sent: a task makes one picture.", hint="Submit it n times.")
    return request
