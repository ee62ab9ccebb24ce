"""The task endpoint's memory: which task is still worked on, and what is told of it.

A task ends when it is due by the clock and has been asked for as often as `[[task-polls:N]]` says. Until then it has a
place of its account, asked for or not. Nothing runs by itself: whoever looks at the tasks says what time it is, and they
catch up.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

from langchain_cogview.sandbox.limits import Account, Places
from langchain_cogview.sandbox.records import API_PREFIX

ROUTE: Final = f"{API_PREFIX}/async/images/generations"
MAX_TASKS: Final = 20_000
"""Tasks that a sandbox knows at once."""
_RESULTS: Final = f"{API_PREFIX}/async-result/"


@dataclass(slots=True, eq=False)
class Task:
    """One picture to be made in the background.

    Attributes:
        identity: The id under which it is asked for.
        request_id: As in the replies.
        account: Whose place it has until it ends.
        due: When it is done, in seconds of the sandbox's clock.
        polls: How often it is still told to be under way, whatever the clock says.
        picture: The picture's path and query; None for a task that fails.
        content_filter: Entries to tell with the picture.
        ended: Whether its place has been given back.
    """

    identity: str
    request_id: str
    account: Account
    due: float
    polls: int
    picture: str | None
    content_filter: list[dict[str, Any]]
    ended: bool = False

    def submitted(self) -> dict[str, Any]:
        """The reply to its POST."""
        return {
            "model": self.account.model,
            "id": self.identity,
            "request_id": self.request_id,
            "task_status": "PROCESSING",
        }

    def state(self, origin: str) -> dict[str, Any]:
        """The reply to a GET, with the picture at `origin` once it is made."""
        told: dict[str, Any] = {"model": self.account.model, "request_id": self.request_id}
        if not self.ended:
            return {**told, "task_status": "PROCESSING"}
        if self.picture is None:
            return {**told, "task_status": "FAIL"}
        told |= {"task_status": "SUCCESS", "image_result": [{"url": origin + self.picture}]}
        return {**told, "content_filter": self.content_filter} if self.content_filter else told


class Tasks:
    """The tasks of a sandbox, and the places that they take. Not locked: the sandbox is."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Task] = OrderedDict()
        self._by_time: list[tuple[float, int, Task]] = []
        self._numbers = itertools.count()  # so that no two tasks are ever compared
        self._places = Places()

    def add(self, task: Task, now: float) -> None:
        """Begin a task; of too many the one unasked for longest is forgotten, and gives its place back."""
        self._known[task.identity] = task
        self._places.take(task.account)
        heapq.heappush(self._by_time, (task.due, next(self._numbers), task))
        while len(self._known) > MAX_TASKS:
            self._end(self._known.popitem(last=False)[1])
        if len(self._by_time) > 2 * MAX_TASKS:
            self._by_time = [entry for entry in self._by_time if not entry[2].ended]
            heapq.heapify(self._by_time)
        self._catch_up(now)

    def poll(self, identity: str, origin: str, now: float) -> dict[str, Any] | None:
        """What is told to a GET; None for an id that is not known."""
        self._catch_up(now)
        task = self._known.get(identity)
        if task is None:
            return None
        self._known.move_to_end(identity)
        told = task.state(origin)
        if task.polls > 0:
            task.polls -= 1
            if not task.polls and task.due <= now:
                self._end(task)
        return told

    def in_flight(self, now: float) -> int:
        """How many are under way."""
        self._catch_up(now)
        return self._places.total()

    def in_flight_of(self, account: Account, now: float) -> int:
        """How many of an account are under way."""
        self._catch_up(now)
        return self._places[account]

    def _catch_up(self, now: float) -> None:
        while self._by_time and self._by_time[0][0] <= now:
            task = heapq.heappop(self._by_time)[2]
            if task.polls == 0:  # the others end with the last of their polls
                self._end(task)

    def _end(self, task: Task) -> None:
        if not task.ended:
            task.ended = True
            self._places.give_back(task.account)


def asked_for(path: str) -> str | None:
    """The id of the task whose result a path asks for; None where it asks for something else."""
    before, results, identity = path.partition("?")[0].partition(_RESULTS)
    return identity if results and not before and identity and "/" not in identity else None
