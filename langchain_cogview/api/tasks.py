"""The task endpoint of glm-image: a paid POST that takes milliseconds, and free polls until the picture is there.

A poll may be repeated as often as one likes, so a lost answer costs nothing: the task's id finds the picture again, in another
process too.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from langchain_cogview.api.endpoint import Call
from langchain_cogview.api.protocol import ImagesReply, TaskReply, read_task
from langchain_cogview.api.retry import MAX_RETRY_AFTER
from langchain_cogview.errors import (
    CogViewContentFilterError,
    CogViewError,
    CogViewMalformedReplyError,
    CogViewNotFoundError,
    CogViewTaskFailedError,
    CogViewTaskUnfinishedError,
    Outcome,
)
from langchain_cogview.stopping import STOPPED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_cogview.api.client import ImagesClient, Watch
    from langchain_cogview.deadline import Deadline

TASK_ROUTE: Final = "/async/images/generations"
RESULT_ROUTE: Final = "/async-result/"
_FIRST_POLL_SECONDS = 0.25

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TasksClient:
    """Calls of the task endpoint; in form like `ImagesClient`.

    A task holds its place in flight until its end is known.

    Args:
        images: Sends the paid POST.
        poll_interval: Seconds between two polls; the first ones come sooner.
        plain_route: Whether to use the plain route where the service does not know the task endpoint.
    """

    images: ImagesClient
    poll_interval: float = 3.0
    plain_route: bool = False

    def generate(self, body: dict[str, Any], deadline: Deadline, watch: Watch) -> ImagesReply:
        """Submit a task and wait for its picture.

        Raises:
            CogViewTaskUnfinishedError: The task runs on; its id is on the error.
            CogViewError: As for `ImagesClient.generate`.
        """
        try:
            task, place = self.images.paid(TASK_ROUTE, body, read_task, deadline, watch)
        except CogViewNotFoundError as error:
            if not (self.plain_route and _no_such_route(error)):
                raise
            return _said_plain(self.images.generate(body, deadline, watch))
        try:
            with _paid_for(body, task.task_id):
                return _warned(task.reply or self.result(_accepted(task, watch), deadline, watch), task)
        finally:
            place.done()

    async def agenerate(self, body: dict[str, Any], deadline: Deadline, watch: Watch) -> ImagesReply:
        """Submit a task and wait for its picture. The twin of `generate`."""
        try:
            task, place = await self.images.apaid(TASK_ROUTE, body, read_task, deadline, watch)
        except CogViewNotFoundError as error:
            if not (self.plain_route and _no_such_route(error)):
                raise
            return _said_plain(await self.images.agenerate(body, deadline, watch))
        try:
            with _paid_for(body, task.task_id):
                return _warned(task.reply or await self.aresult(_accepted(task, watch), deadline, watch), task)
        finally:
            place.done()

    def submit(self, body: dict[str, Any], deadline: Deadline, watch: Watch) -> str:
        """Submit a task and give its id."""
        task, place = self.images.paid(TASK_ROUTE, body, read_task, deadline, watch)
        place.done()
        return _accepted(task, watch)

    async def asubmit(self, body: dict[str, Any], deadline: Deadline, watch: Watch) -> str:
        """Submit a task and give its id. The twin of `submit`."""
        task, place = await self.images.apaid(TASK_ROUTE, body, read_task, deadline, watch)
        place.done()
        return _accepted(task, watch)

    def status(self, task_id: str, deadline: Deadline) -> TaskReply:
        """Ask once.

        Raises:
            CogViewError: The task failed, is not known, or could not be asked for.
        """
        return self.images.endpoint.exchange(_poll(task_id), deadline, read_task)

    async def astatus(self, task_id: str, deadline: Deadline) -> TaskReply:
        """Ask once. The twin of `status`."""
        return await self.images.endpoint.aexchange(_poll(task_id), deadline, read_task)

    def result(self, task_id: str, deadline: Deadline, watch: Watch) -> ImagesReply:
        """Poll until the task ends.

        Raises:
            CogViewTaskUnfinishedError: It has not ended in time.
            CogViewError: The task failed or is not known.
        """
        last: CogViewError | None = None
        for wait in self._waits():
            pause = _pause(wait, last, deadline, task_id)
            if STOPPED.get().wait(pause):
                raise _unfinished(task_id, None)
            try:
                task = self.status(task_id, deadline)
            except CogViewError as error:
                last = _passing(error, task_id)
            else:
                if task.reply:
                    return replace(task.reply, task_id=task_id)
                last = None
            watch.processing(task_id)
        raise AssertionError  # the waits do not end

    async def aresult(self, task_id: str, deadline: Deadline, watch: Watch) -> ImagesReply:
        """Poll until the task ends. The twin of `result`."""
        last: CogViewError | None = None
        for wait in self._waits():
            await asyncio.sleep(_pause(wait, last, deadline, task_id))
            try:
                task = await self.astatus(task_id, deadline)
            except CogViewError as error:
                last = _passing(error, task_id)
            else:
                if task.reply:
                    return replace(task.reply, task_id=task_id)
                last = None
            await watch.aprocessing(task_id)
        raise AssertionError  # the waits do not end

    def _waits(self) -> Iterator[float]:
        return (min(self.poll_interval, _FIRST_POLL_SECONDS * 2.0 ** min(number, 20)) for number in itertools.count())


def _poll(task_id: str) -> Call:
    return Call("GET", RESULT_ROUTE + quote(task_id, safe=""))


def _accepted(task: TaskReply, watch: Watch) -> str:
    if task.task_id is None:
        raise CogViewMalformedReplyError
    watch.submitted(task.task_id)
    return task.task_id


def _pause(wait: float, last: CogViewError | None, deadline: Deadline, task_id: str) -> float:
    """Seconds until the next poll, at most until the deadline."""
    if deadline.passed:
        raise _unfinished(task_id, last)
    asked = last.retry_after if last and last.retry_after is not None else 0.0
    return deadline.clamp(max(wait, min(asked, MAX_RETRY_AFTER))) or 0.0


def _passing(error: CogViewError, task_id: str) -> CogViewError:
    """An error of a poll after which it may be asked again; others, the task's own end among them, are raised."""
    error.task_id = task_id
    if error.outcome is Outcome.FINAL or isinstance(error, CogViewNotFoundError):
        raise error
    return error


def _unfinished(task_id: str, last: CogViewError | None) -> CogViewTaskUnfinishedError:
    error = CogViewTaskUnfinishedError(detail=str(last) if last else None)
    error.task_id = task_id
    return error


@contextmanager
def _paid_for(body: dict[str, Any], task_id: str | None) -> Iterator[None]:
    """What ends a wait for a task that runs on says so: it may be paid for, and can be resumed."""
    try:
        yield
    except CogViewError as error:
        told = error
        if task_id and not _is_end(error):
            told = _unfinished(task_id, None if isinstance(error, CogViewTaskUnfinishedError) else error)
        told.request_id, told.attempts = body.get("request_id"), 1
        if told is error:
            raise
        raise told from None
    except BaseException as error:
        note = f"Task {task_id} was submitted and may be paid for (request id {body.get('request_id')})."
        logger.warning("The caller left before it ended. %s", note)
        error.add_note(note)
        raise


def _is_end(error: CogViewError) -> bool:
    """Whether the service said that the task ended without a picture, rather than that it cannot be asked."""
    return isinstance(error, CogViewTaskFailedError | CogViewContentFilterError)


def _no_such_route(error: CogViewError) -> bool:
    return error.code != "1211"


def _said_plain(reply: ImagesReply) -> ImagesReply:
    note = "The service does not know the task endpoint; the picture was made by the plain one. use_tasks=False says so at once."
    return replace(reply, warnings=(*reply.warnings, note))


def _warned(reply: ImagesReply, task: TaskReply) -> ImagesReply:
    return replace(reply, warnings=(*task.warnings, *reply.warnings)) if task.warnings else reply
