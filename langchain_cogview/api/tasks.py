"""The task endpoint of glm-image: a paid POST that takes milliseconds, and free polls until the image is ready.

Polls can be repeated at no cost, so that a lost reply loses nothing: the task's id finds the image again, in another process
too.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from langchain_cogview.api.client import MAX_RETRY_AFTER
from langchain_cogview.api.endpoint import Call
from langchain_cogview.api.protocol import (
    CODES,
    NO_CONTEXT,
    ImagesReply,
    ReplyContext,
    images_reply,
    parse_reply,
    reply_error,
)
from langchain_cogview.concurrency import CANCEL_TOKEN, Deadline
from langchain_cogview.errors import (
    CogViewContentFilterError,
    CogViewError,
    CogViewInvalidRequestError,
    CogViewMalformedReplyError,
    CogViewNotFoundError,
    CogViewOutcomeUnknownError,
    CogViewTaskFailedError,
    CogViewTaskUnfinishedError,
    CogViewTimeoutError,
    Outcome,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_cogview.api.client import CallEvents, ImagesClient
    from langchain_cogview.api.limiter import Slot

MAX_ID_CHARACTERS: Final = 512
_TASK_ID: Final = re.compile(r"(?!\.+$)[0-9A-Za-z._~:=+@|-]+")
TASK_ROUTE: Final = "/async/images/generations"
RESULT_ROUTE: Final = "/async-result/"
BAD_TASK_ID: Final = "A task's id is a text of letters, digits and . _ ~ : = + @ | - with at most 512 characters."
_FIRST_POLL_SECONDS = 0.25
_LAST_POLL_SECONDS = 1.0
"""Seconds that are left for the reply of the last poll; of a short time limit, a quarter."""
KNOWN_AFTER_SECONDS: Final = 10.0
"""Seconds in which the service may not know a task yet that it has just accepted."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TaskReply:
    """What the task endpoint says of a task that has not failed.

    Attributes:
        task_id: The service's id; None where a poll's reply leaves it out.
        reply: The images; None while it is processing.
        warnings: What was odd on the way.
    """

    task_id: str | None
    reply: ImagesReply | None = None
    warnings: tuple[str, ...] = ()


def read_task(status: int, body: bytes, context: ReplyContext = NO_CONTEXT) -> TaskReply:
    """Read one reply of the task endpoint, to the POST or to a poll.

    Returns:
        The state of the task.

    Raises:
        CogViewError: The class says what became of the request; `CogViewTaskFailedError` where the task itself failed.
        CogViewContentFilterError: The content filter blocked the task.
        CogViewTaskFailedError: The task ended without an image.
        CogViewError: The reply is another error.
    """
    fields, entries, failure = parse_reply(status, body)
    if 200 <= status < 300:  # noqa: PLR2004
        task_id = _task_id(fields.get("id"))
        images = images_reply(fields, "image_result", entries, failure, context)
        if images:
            return TaskReply(task_id, images)
        status_text = fields.get("task_status")
        state = status_text.strip().upper() if isinstance(status_text, str) else ""
        if state == "FAIL" and failure is None:
            if entries:
                raise CogViewContentFilterError(content_filter=entries, status=status)
            raise CogViewTaskFailedError(status=status)
        if failure is None and state not in {"", "SUCCESS", "FAIL"}:
            return TaskReply(task_id)
        if state == "FAIL" and failure is not None and failure.code not in CODES:
            raise CogViewTaskFailedError(code=failure.code, status=status, detail=failure.message)
    raise reply_error(status, failure, entries, body)


def read_submitted(status: int, body: bytes, context: ReplyContext = NO_CONTEXT) -> TaskReply:
    """Read the reply to the POST of a task. With an id and no error, the task is accepted, whatever else is missing.

    Returns:
        The state of the task.

    Raises:
        CogViewError: As `read_task`; with the task's id where the reply has one, for it may be running.
    """
    fields, _, failure = parse_reply(status, body)
    task_id = _task_id(fields.get("id"))
    try:
        return read_task(status, body, context)
    except CogViewError as error:
        error.task_id = task_id
        unsure = type(error) in {CogViewMalformedReplyError, CogViewOutcomeUnknownError}
        if task_id and unsure and 200 <= status < 300 and (failure is None or failure.is_text_alone):  # noqa: PLR2004
            return TaskReply(task_id)
        raise


def _task_id(value: Any) -> str | None:
    """Return an id in full: cut, it would be another one."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    text = value.strip() if isinstance(value, str) else str(value) if abs(value) < 10**MAX_ID_CHARACTERS else ""
    return text if is_task_id(text) else None


def is_task_id(text: str) -> bool:
    """Return whether a text can be a task's id.

    That is a part of a URL's path that leads to no other route, however often it is decoded.
    """
    return len(text) <= MAX_ID_CHARACTERS and _TASK_ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class TasksClient:
    """Calls of the task endpoint, with the interface of `ImagesClient`.

    A task holds its slot until its end is known. A task that is only submitted does not.

    Args:
        images: Sends the paid POST.
        poll_interval: Seconds between two polls; the first ones come sooner.
        plain_route: Whether to use the images endpoint if the service does not know the task endpoint.
    """

    images: ImagesClient
    poll_interval: float = 3.0
    plain_route: bool = False

    def generate(self, body: dict[str, Any], deadline: Deadline, events: CallEvents) -> ImagesReply:
        """Submit a task and wait for its image.

        Returns:
            The reply with the image.

        Raises:
            CogViewTaskUnfinishedError: The task runs on; its id is on the error.
            CogViewError: As for `ImagesClient.generate`.
            CogViewNotFoundError: The service has no task endpoint.
        """
        try:
            task, slot = self.images.paid(TASK_ROUTE, body, read_submitted, deadline, events)
        except CogViewNotFoundError as error:
            if not (self.plain_route and _no_such_route(error)):
                raise
            return _with_route_warning(self.images.generate(body, deadline, events))
        with _paid_for(body, task.task_id, slot):
            reply = task.reply or self._polled(self._polls(_accepted(task, events), deadline), events)
            return _warned(reply, task)

    async def agenerate(self, body: dict[str, Any], deadline: Deadline, events: CallEvents) -> ImagesReply:
        """Async version of `generate`.

        Returns:
            As `generate`.

        Raises:
            CogViewNotFoundError: As `generate`.
        """
        try:
            task, slot = await self.images.apaid(TASK_ROUTE, body, read_submitted, deadline, events)
        except CogViewNotFoundError as error:
            if not (self.plain_route and _no_such_route(error)):
                raise
            return _with_route_warning(await self.images.agenerate(body, deadline, events))
        with _paid_for(body, task.task_id, slot):
            reply = task.reply or await self._apolled(self._polls(await _aaccepted(task, events), deadline), events)
            return _warned(reply, task)

    def submit(self, body: dict[str, Any], deadline: Deadline, events: CallEvents) -> str:
        """Submit a task.

        Returns:
            Its id.
        """
        task, slot = self.images.paid(TASK_ROUTE, body, read_submitted, deadline, events)
        with _paid_for(body, task.task_id, slot):
            return _accepted(task, events)

    async def asubmit(self, body: dict[str, Any], deadline: Deadline, events: CallEvents) -> str:
        """Async version of `submit`.

        Returns:
            As `submit`.
        """
        task, slot = await self.images.apaid(TASK_ROUTE, body, read_submitted, deadline, events)
        with _paid_for(body, task.task_id, slot):
            return await _aaccepted(task, events)

    def status(self, task_id: str, deadline: Deadline) -> TaskReply:
        """Poll a task once.

        Returns:
            The state of the task.

        Raises:
            CogViewError: The task failed, is not known, or could not be polled.
        """
        return self.images.endpoint.exchange(_poll(task_id), deadline, read_task)

    async def astatus(self, task_id: str, deadline: Deadline) -> TaskReply:
        """Async version of `status`.

        Returns:
            As `status`.
        """
        return await self.images.endpoint.aexchange(_poll(task_id), deadline, read_task)

    def result(self, task_id: str, deadline: Deadline, events: CallEvents) -> ImagesReply:
        """Poll until the task ends.

        Returns:
            The reply with the image.

        Raises:
            CogViewTaskUnfinishedError: It has not ended in time.
            CogViewError: The task failed or is not known.
        """
        return self._polled(_Polls(task_id, deadline, self.poll_interval), events)

    async def aresult(self, task_id: str, deadline: Deadline, events: CallEvents) -> ImagesReply:
        """Async version of `result`.

        Returns:
            As `result`.
        """
        return await self._apolled(_Polls(task_id, deadline, self.poll_interval), events)

    def _polls(self, task_id: str, deadline: Deadline) -> _Polls:
        """Return the polls of a task that was accepted just now."""
        return _Polls(task_id, deadline, self.poll_interval, known_after=KNOWN_AFTER_SECONDS)

    def _polled(self, polls: _Polls, events: CallEvents) -> ImagesReply:
        while True:
            if CANCEL_TOKEN.get().wait_until_abandoned(polls.pause()):
                raise polls.unfinished()
            try:
                task = self.status(polls.task_id, polls.deadline)
            except CogViewError as error:
                polls.record_or_raise(error)
            else:
                if task.reply:
                    return replace(task.reply, task_id=polls.task_id)
                polls.last = None
            events.processing(polls.task_id)

    async def _apolled(self, polls: _Polls, events: CallEvents) -> ImagesReply:
        while True:
            await asyncio.sleep(polls.pause())
            try:
                task = await self.astatus(polls.task_id, polls.deadline)
            except CogViewError as error:
                polls.record_or_raise(error)
            else:
                if task.reply:
                    return replace(task.reply, task_id=polls.task_id)
                polls.last = None
            await events.aprocessing(polls.task_id)


class _Polls:
    """When to poll a task again, and after which errors.

    Args:
        task_id: The id of the task.
        deadline: Bounds all polls together.
        interval: Seconds between two polls; the first ones come sooner.
        known_after: Seconds in which the service may not know the task yet.
    """

    def __init__(self, task_id: str, deadline: Deadline, interval: float, *, known_after: float = 0.0) -> None:
        self.task_id = task_id
        self.deadline = deadline
        self.last: CogViewError | None = None
        self._waits = (min(interval, _FIRST_POLL_SECONDS * 2.0 ** min(n, 20)) for n in itertools.count())
        self._not_known = Deadline(known_after)
        self._is_last = False

    def pause(self) -> float:
        """Seconds until the next poll. The last poll leaves time for its reply.

        Returns:
            The wait in seconds.

        Raises:
            CogViewTaskUnfinishedError: There is no time for another.
        """
        if self._is_last or self.deadline.passed:
            raise self.unfinished()
        asked = self.last.retry_after if self.last and self.last.retry_after is not None else 0.0
        wait = max(next(self._waits), min(asked, MAX_RETRY_AFTER))
        left = self.deadline.remaining()
        if left is None:
            return wait
        reserve = min(_LAST_POLL_SECONDS, left / 4)
        if wait + reserve < left:
            return wait
        self._is_last = True
        return max(0.0, min(wait, left - reserve))

    def record_or_raise(self, error: CogViewError) -> None:
        """Store the error of a poll that can be repeated. Raise any other, such as the failure of the task."""
        error.task_id = self.task_id
        unknown = isinstance(error, CogViewNotFoundError)
        if (unknown and self._not_known.passed) or (error.outcome is Outcome.FINAL and not unknown):
            raise error
        if not isinstance(error, CogViewTimeoutError):  # that only says that the time ran out
            self.last = error

    def unfinished(self) -> CogViewTaskUnfinishedError:
        """Make the error for a task whose end was not seen.

        Returns:
            The error.
        """
        return _unfinished(self.task_id, self.last)


def _poll(task_id: str) -> Call:
    if not is_task_id(task_id):
        raise CogViewInvalidRequestError(BAD_TASK_ID, hint="Pass task.id or error.task_id.")
    return Call("GET", RESULT_ROUTE + quote(task_id, safe=""))


def _accepted(task: TaskReply, events: CallEvents) -> str:
    task_id = _id_of(task)
    events.submitted(task_id)
    return task_id


async def _aaccepted(task: TaskReply, events: CallEvents) -> str:
    task_id = _id_of(task)
    await events.asubmitted(task_id)
    return task_id


def _id_of(task: TaskReply) -> str:
    if task.task_id is None:
        raise CogViewMalformedReplyError
    return task.task_id


def _unfinished(task_id: str, last: CogViewError | None) -> CogViewTaskUnfinishedError:
    error = CogViewTaskUnfinishedError(detail=str(last) if last else None)
    error.task_id = task_id
    return error


@contextmanager
def _paid_for(body: dict[str, Any], task_id: str | None, slot: Slot) -> Iterator[None]:
    """Whatever ends the wait for a running task says that the task may be paid for and can be resumed.

    Raises:
        CogViewError: The error, with what is known of the task.
    """
    try:
        yield
    except CogViewError as error:
        reported = error
        if isinstance(error, CogViewTaskFailedError | CogViewContentFilterError):  # the task has ended without an image
            slot.done()
        elif task_id:
            reported = _unfinished(task_id, None if isinstance(error, CogViewTaskUnfinishedError) else error)
            reported.detail = reported.detail or error.detail
        reported.request_id, reported.attempts = body.get("request_id"), max(error.attempts, 1)
        if reported is error:
            raise
        raise reported from None
    except BaseException as error:
        note = f"Task {task_id} was submitted and may be paid for (request id {body.get('request_id')})."
        logger.warning("The caller left before it ended. %s", note)
        error.add_note(note)
        raise
    else:
        slot.done()
    finally:
        slot.release()  # has no effect after `done`; a task that is still running says nothing about the limit


def _no_such_route(error: CogViewError) -> bool:
    return error.code != "1211"


def _with_route_warning(reply: ImagesReply) -> ImagesReply:
    note = "The service does not know the task endpoint; the image was made by the plain one. use_tasks=False says so at once."
    return replace(reply, warnings=(*reply.warnings, note))


def _warned(reply: ImagesReply, task: TaskReply) -> ImagesReply:
    return replace(reply, warnings=(*task.warnings, *reply.warnings)) if task.warnings else reply
