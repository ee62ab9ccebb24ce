"""Tasks: images that the task endpoint generates, which are submitted and found again."""

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

    from langchain_cogview.api.tasks import TaskReply
    from langchain_cogview.budget import Charge
    from langchain_cogview.generation import ImageOutcome
    from langchain_cogview.generator import CogViewImageGenerator
    from langchain_cogview.result import ImageResult

TASK_MODEL = "glm-image"
_STATUS_SECONDS = 30.0

TaskStatus = Literal["processing", "succeeded", "failed"]


class ImageTask:
    """An image that the task endpoint generates. `CogViewImageGenerator.submit` creates one, and `resume` finds it again.

    Example:
        >>> task = CogViewImageGenerator(model="glm-image").submit("a kitten")    # doctest: +SKIP
        >>> task.id                                                               # doctest: +SKIP
        >>> ImageTask.resume(task.id).result().path  # in this process or another # doctest: +SKIP

    Attributes:
        id: The task id that the service assigned.
        generator: The generator whose key, service and folder are used.
        request: The request that was submitted.
        request_id: The request id that this client generated; for a resumed task, the task id.
        warnings: Warnings about the request.
    """

    def __init__(
        self,
        task_id: str,
        *,
        generator: CogViewImageGenerator,
        request: ImageRequest,
        request_id: str,
        warnings: tuple[str, ...] = (),
        charge: Charge | None = None,
    ) -> None:
        self.id = task_id
        self.generator = generator
        self.request = request
        self.request_id = request_id
        self.warnings = warnings
        self._charge = charge

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
        """Find a task that was submitted before, perhaps by another process.

        Args:
            task_id: The task id.
            generator: The generator to use; it must have the same service and account. None creates one from `settings`, with
                the model `glm-image`.
            model: The model of the task, for the result and its price. None: the generator's model if it uses the task endpoint,
                otherwise `glm-image`.
            prompt: The prompt, for the result; the service does not return it.
            **settings: Arguments of `CogViewImageGenerator`.

        Returns:
            The task. Nothing is sent.

        Raises:
            CogViewInvalidRequestError: The id is blank, or has characters that no task id has, such as `/`.
        """
        from langchain_cogview.api.tasks import BAD_TASK_ID, is_task_id  # noqa: PLC0415

        task_id = task_id.strip() if isinstance(task_id, str) else ""
        if not is_task_id(task_id):
            settings.clear()  # the key may be among them: the frame of an error holds none
            raise CogViewInvalidRequestError(BAD_TASK_ID, hint="Pass task.id or error.task_id.")
        if generator is None:
            # By its public name: the module of the generator imports this one.
            from langchain_cogview import CogViewImageGenerator  # noqa: PLC0415

            try:
                generator = CogViewImageGenerator(**({"model": model or TASK_MODEL} | settings))
            finally:
                settings.clear()
        if model is None:
            model = generator.model if model_info(generator.model).tasks else TASK_MODEL
        request = ImageRequest(prompt=prompt, model=model)
        return cls(task_id, generator=generator, request=request, request_id=task_id)

    def status(self) -> TaskStatus:
        """Poll the task once, which is free.

        Returns:
            `processing`, `succeeded` or `failed`.

        Raises:
            CogViewError: The service does not know the task, or could not be reached.
        """
        try:
            return _status(self.generator.tasks_client().status(self.id, Deadline(_STATUS_SECONDS)))
        except (CogViewTaskFailedError, CogViewContentFilterError):
            return "failed"

    async def astatus(self) -> TaskStatus:
        """Async version of `status`.

        Returns:
            `processing`, `succeeded` or `failed`.
        """
        await preload(self.generator.resolved_base_url)
        try:
            return _status(await self.generator.tasks_client().astatus(self.id, Deadline(_STATUS_SECONDS)))
        except (CogViewTaskFailedError, CogViewContentFilterError):
            return "failed"

    def result(self, config: RunnableConfig | None = None, *, timeout: float | timedelta | None = 600.0) -> ImageResult:
        """Wait for the image, download and save it, as `invoke` does. May be called again.

        Args:
            config: The `RunnableConfig` of this run.
            timeout: Limit in seconds for polling, download and saving together; None: no limit.

        Returns:
            The result, with one image.

        Raises:
            CogViewTaskUnfinishedError: The task has not ended in time; polling again later is free.
            CogViewTaskFailedError: The task ended without an image.
            CogViewContentFilterError: The content filter blocked the task.
            CogViewNotFoundError: The service does not know the task id.
        """
        return self.generator.collect(self, config, seconds=_seconds(timeout))

    async def aresult(
        self,
        config: RunnableConfig | None = None,
        *,
        timeout: float | timedelta | None = 600.0,  # noqa: ASYNC109  the same as the sync one's
    ) -> ImageResult:
        """Async version of `result`.

        Returns:
            The result, with one image.
        """
        return await self.generator.acollect(self, config, seconds=_seconds(timeout))

    def settle(self, outcome: ImageOutcome) -> ImageOutcome:
        """Take a task that ended without an image out of the budget that it was submitted with.

        Args:
            outcome: What the task ended with.

        Returns:
            The same.
        """
        if self._charge is not None and isinstance(outcome, CogViewTaskFailedError | CogViewContentFilterError):
            self._charge.release()
        return outcome

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_charge": None}  # the budget stays in its process

    def __repr__(self) -> str:
        return f"ImageTask({printable(self.id, 64)!r}, model={self.request.model!r})"


def _seconds(timeout: float | timedelta | None) -> float | None:
    return timeout.total_seconds() if isinstance(timeout, timedelta) else timeout


def _status(reply: TaskReply) -> TaskStatus:
    return "succeeded" if reply.reply else "processing"


def checked_task(request: ImageRequest) -> ImageRequest:
    """Check that the task endpoint takes a request.

    Returns:
        The same request.

    Raises:
        CogViewInvalidRequestError: The task endpoint does not take the request; nothing has been sent.
    """
    if not model_info(request.model).tasks:
        raise CogViewInvalidRequestError(
            f"Nothing was sent: {request.model} cannot make images as tasks.",
            hint="Call invoke, or use model='glm-image'.",
        )
    if request.n > 1:
        raise CogViewInvalidRequestError(
            "Nothing was sent: a task generates one image.", hint="Submit the request n times."
        )
    return request
