"""The state of a sandbox: recorded requests, charged images, tasks, and requests in flight.

Nothing here is locked: the sandbox holds its lock while it uses these objects.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import re
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar
from urllib.parse import parse_qs

from langchain_cogview.catalog import find_model
from langchain_cogview.sandbox.faults import NO_ACCESS, NO_FILE, SandboxReply, json_reply
from langchain_cogview.sandbox.picture import seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_cogview.catalog import ModelInfo
    from langchain_cogview.sandbox.faults import Changes

API_PREFIX: Final = "/api/paas/v4"
"""Path under which the API is served; it is that of the provider."""
TASK_ROUTE: Final = f"{API_PREFIX}/async/images/generations"
FILE_ROUTE: Final = "/files/"
LINK_LIFETIME: Final = 86_400
"""Seconds for which the link of an image is valid."""
MAX_IMAGES: Final = 100_000
"""Images in the ledger, and images that can be downloaded. The oldest entries, and the images that were not downloaded for
the longest time, are dropped first."""
MAX_LEDGER_BYTES: Final = 64 << 20
"""Memory for the entries of the ledger."""
MAX_TASKS: Final = 20_000
"""Tasks that a sandbox remembers at once."""

_RESULT_ROUTE: Final = f"{API_PREFIX}/async-result/"
_REQUEST_BYTES: Final = 500
_IMAGE_BYTES: Final = 300
_JSON_VALUE_BYTES: Final = 100
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_USER_ID_CHARACTERS: Final = range(6, 129)
_MAX_REQUEST_ID_CHARACTERS: Final = 128

RecordT = TypeVar("RecordT")

# --- records


@dataclass(frozen=True)
class SandboxRequest:
    """A request that a sandbox received.

    Attributes:
        method: HTTP method, in capitals.
        path: Path and query.
        headers: Header values by lower-case name; the values of headers that hold secrets are `[removed]`.
        body: The JSON object of the body; None if the body is not a JSON object.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any] | None = None

    @property
    def prompt(self) -> str | None:
        """The prompt in the body; None if there is none."""
        return self._text("prompt")

    @property
    def model(self) -> str | None:
        """The model in the body; None if there is none."""
        return self._text("model")

    @property
    def size(self) -> str | None:
        """The size in the body, `WIDTHxHEIGHT` in pixels; None if there is none."""
        return self._text("size")

    @property
    def request_id(self) -> str | None:
        """The id that the client gave its request; None if there is none."""
        return self._text("request_id")

    def _text(self, name: str) -> str | None:
        value = (self.body or {}).get(name)
        return value if isinstance(value, str) else None


@dataclass(frozen=True, slots=True)
class SandboxImage:
    """An image that the real service would have made and charged.

    Attributes:
        prompt: The prompt as it was sent.
        model: The model, by its name in the catalog.
        size: `WIDTHxHEIGHT` in pixels.
        request_id: The id that the client gave its request, or the id that the sandbox generated if there was none.
        task_id: The id of its task; None if the image came in the reply to the POST.
        charged_at: Unix time in seconds. A task is charged when it is accepted, because it then runs to its end.
    """

    prompt: str
    model: str
    size: str
    request_id: str
    task_id: str | None
    charged_at: float


class History(Generic[RecordT]):
    """The newest records, bounded in number and in memory.

    Args:
        max_records: The greatest number of records.
        max_bytes: The memory that they may take, by the sizes that `append` receives.
    """

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._bytes = 0
        self._records: deque[tuple[RecordT, int]] = deque()

    def append(self, record: RecordT, size: int) -> None:
        """Add a record of `size` bytes and drop the oldest ones beyond the bounds; the newest always stays."""
        self._records.append((record, size))
        self._bytes += size
        while len(self._records) > self._max_records or (self._bytes > self._max_bytes and len(self._records) > 1):
            self._bytes -= self._records.popleft()[1]

    def __iter__(self) -> Iterator[RecordT]:
        return (record for record, _ in self._records)


def request_bytes(request: SandboxRequest, body: bytes) -> int:
    """Return an upper estimate, in bytes, of the memory that a request takes whose JSON was parsed from `body`."""
    texts = (request.path, *request.headers, *request.headers.values())
    # A character takes at most four bytes, and each value of the JSON has a bracket, a comma or a colon of its own.
    values = sum(body.count(sign) for sign in b"[{,:")
    return _REQUEST_BYTES + sum(map(sys.getsizeof, texts)) + 4 * len(body) + _JSON_VALUE_BYTES * values


def image_bytes(image: SandboxImage) -> int:
    """Return the memory, in bytes, that an entry of the ledger takes."""
    return _IMAGE_BYTES + sys.getsizeof(image.prompt) + sys.getsizeof(image.request_id)


# --- request bodies


class InvalidRequestError(ValueError):
    """A request body for which the service would answer 400.

    Attributes:
        code: The business code of the reply.
        message: The message of the reply.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class ImageParameters:
    """The validated parameters of a request for one image of `width`x`height` pixels."""

    model: ModelInfo
    prompt: str
    width: int
    height: int
    request_id: str | None


def parse_body(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a request body; None if it is anything else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_parameters(body: dict[str, Any] | None, *, is_task: bool) -> ImageParameters:
    """Validate a request body. Unknown fields are ignored, as the service does.

    Args:
        body: The JSON object that was sent; None if the body is not one.
        is_task: Whether the request came to the task endpoint, which serves fewer models.

    Returns:
        The parameters.

    Raises:
        InvalidRequestError: With the code and message of the service.
    """
    if body is None:
        raise InvalidRequestError("1210", "The request body is not a JSON object")
    name, prompt, user_id = body.get("model"), body.get("prompt"), body.get("user_id")
    model = find_model(name) if isinstance(name, str) else None
    if model is None:
        raise InvalidRequestError("1211", "The model does not exist, please check the model code")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidRequestError("1213", "The prompt parameter was not received properly")
    if model.max_prompt_characters is not None and len(prompt) > model.max_prompt_characters:
        raise InvalidRequestError("1261", "Prompt exceeds max length")
    width, height = _parse_size(model, body.get("size"))
    if body.get("quality") not in (None, *model.qualities):
        raise InvalidRequestError(
            "1214", f"The quality parameter is illegal: it is one of {', '.join(model.qualities)}"
        )
    if user_id is not None and not (isinstance(user_id, str) and len(user_id) in _USER_ID_CHARACTERS):
        raise InvalidRequestError("1210", "The user_id parameter is illegal: it has 6 to 128 characters")
    if is_task and not model.tasks:
        raise InvalidRequestError("1222", "The model does not support this API")
    request_id = body.get("request_id")
    if isinstance(request_id, str) and len(request_id) > _MAX_REQUEST_ID_CHARACTERS:
        raise InvalidRequestError(
            "1210", f"The request_id parameter is illegal: it has at most {_MAX_REQUEST_ID_CHARACTERS} characters"
        )
    return ImageParameters(
        model, prompt, width, height, request_id if isinstance(request_id, str) and request_id else None
    )


def _parse_size(model: ModelInfo, size: Any) -> tuple[int, int]:
    if size is None:
        size = model.default_size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match:
        width, height = int(match[1]), int(match[2])
        if size in model.sizes or (model.rule is not None and model.rule.allows(width, height)):
            return width, height
    raise InvalidRequestError("1214", f"The size parameter is illegal: {model.rule}")


# --- requests in flight

Limit = int | MappingProxyType[str, int] | None
"""Slots of an account: one number for each model, or numbers by model; None for no limit."""


class Account(NamedTuple):
    """The unit of the in-flight limit: one model under one key, of which only a SHA-256 is stored."""

    key: bytes
    model: str


def account_of(key: str, model: str) -> Account:
    """Return the account of a key for a model, by its name in the catalog."""
    return Account(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest(), model)


def parse_limit(limit: int | Mapping[str, int] | None) -> Limit:
    """Validate an in-flight limit.

    Args:
        limit: One number for each model, or numbers by model, in any case; None for no limit.

    Returns:
        The limit, by the names of the catalog.

    Raises:
        ValueError: A number is not an integer of at least 1, or a model is unknown.
    """
    if not isinstance(limit, Mapping):
        return None if limit is None else _check_positive(limit)
    limits = {}
    for name, number in limit.items():
        model = find_model(str(name))
        if model is None:
            raise ValueError(f"in_flight_limit has the unknown model {name!r:.60}. Use a model of the catalog.")
        limits[model.name] = _check_positive(number)
    return MappingProxyType(limits)


def _check_positive(number: int) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"in_flight_limit is {number!r:.60}. Use an integer of at least 1, or None for no limit.")
    return number


def max_slots(limit: Limit, model: str) -> float:
    """Return how many slots an account has for a model; infinity if there is no limit."""
    number = limit.get(model) if isinstance(limit, MappingProxyType) else limit
    return float("inf") if number is None else number


class Slots:
    """The slots in use, by account."""

    def __init__(self) -> None:
        self._used: Counter[Account] = Counter()

    def __getitem__(self, account: Account) -> int:
        """Return how many slots an account uses."""
        return self._used[account]

    def acquire(self, account: Account) -> None:
        """Use one more slot; the caller has checked the limit."""
        self._used[account] += 1

    def release(self, account: Account) -> None:
        """Use one slot less, and drop the account if it uses none."""
        self._used[account] -= 1
        if not self._used[account]:
            del self._used[account]

    def total(self) -> int:
        """Return how many slots all accounts use."""
        return self._used.total()


# --- charged images


@dataclass(slots=True)
class ImageLink:
    """An image behind a link.

    Attributes:
        seed: The seed of the placeholder.
        width: Pixels.
        height: Pixels.
        expires: Unix time, in seconds, until which the link is valid.
        not_yet: How many more GETs get 404.
    """

    seed: bytes
    width: int
    height: int
    expires: int
    not_yet: int


class Ledger:
    """The charged images and their links.

    Attributes:
        images_made: How many images were charged.
        entries: The newest of them, oldest first.
    """

    def __init__(self) -> None:
        self.images_made = 0
        self.entries: History[SandboxImage] = History(MAX_IMAGES, MAX_LEDGER_BYTES)
        self._links: OrderedDict[str, ImageLink] = OrderedDict()

    def charge(
        self, parameters: ImageParameters, changes: Changes, image_id: str, *, ready_in: float | None = None
    ) -> str:
        """Record an image and create its link.

        Args:
            parameters: The parameters of the request.
            changes: The faults that change the image.
            image_id: The id in the reply and in the link.
            ready_in: Seconds until the task of this id has the image; None if there is no task.

        Returns:
            Path and query of the link.
        """
        now = time.time()
        expires = int(now) - 1 if "expired-url" in changes else int(now + (ready_in or 0.0)) + LINK_LIFETIME
        not_yet = changes["not-yet"]["gets"] if "not-yet" in changes else 0
        self._links[image_id] = ImageLink(
            seed_of(parameters.prompt), parameters.width, parameters.height, expires, not_yet
        )
        if len(self._links) > MAX_IMAGES:
            self._links.popitem(last=False)
        self.images_made += 1
        image = SandboxImage(
            prompt=parameters.prompt,
            model=parameters.model.name,
            size=f"{parameters.width}x{parameters.height}",
            request_id=parameters.request_id or image_id,
            task_id=None if ready_in is None else image_id,
            charged_at=now,
        )
        self.entries.append(image, image_bytes(image))
        return f"{FILE_ROUTE}{image_id}.png?Expires={expires}"

    def find(self, path: str) -> ImageLink | SandboxReply:
        """Return the image behind a path and query, or the reply that there is none."""
        route, _, query = path.partition("?")
        image_id = route.removeprefix(FILE_ROUTE).removesuffix(".png")
        link = self._links.get(image_id)
        if link is None:
            return json_reply(404, NO_FILE)
        self._links.move_to_end(image_id)
        # The query stands for the signature of a real link: a link without it, or with another one, is not valid.
        if parse_qs(query).get("Expires") != [str(link.expires)] or link.expires < time.time():
            return json_reply(403, NO_ACCESS)
        if link.not_yet > 0:
            link.not_yet -= 1
            return json_reply(404, NO_FILE)
        return link


# --- tasks


@dataclass(slots=True, eq=False)
class Task:
    """One image that is made in the background.

    Attributes:
        task_id: The id under which it is polled.
        request_id: The request id in its replies.
        account: The account whose slot it uses until it ends.
        due: When it ends, in seconds of the sandbox's clock.
        polls_left: How many more polls get PROCESSING even if the task is due.
        image_path: Path and query of the image; None if the task fails.
        content_filter: Entries that the reply has beside the image.
        has_ended: Whether its slot was released.
    """

    task_id: str
    request_id: str
    account: Account
    due: float
    polls_left: int
    image_path: str | None
    content_filter: list[dict[str, Any]]
    has_ended: bool = False

    def submit_reply(self) -> dict[str, Any]:
        """Return the JSON of the reply to the POST."""
        return {
            "model": self.account.model,
            "id": self.task_id,
            "request_id": self.request_id,
            "task_status": "PROCESSING",
        }

    def poll_reply(self, origin: str) -> dict[str, Any]:
        """Return the JSON of the reply to a poll, with the image at `origin` once it is made."""
        reply: dict[str, Any] = {"model": self.account.model, "request_id": self.request_id}
        if not self.has_ended:
            return {**reply, "task_status": "PROCESSING"}
        if self.image_path is None:
            return {**reply, "task_status": "FAIL"}
        reply |= {"task_status": "SUCCESS", "image_result": [{"url": origin + self.image_path}]}
        return {**reply, "content_filter": self.content_filter} if self.content_filter else reply


class Tasks:
    """The tasks of a sandbox, and the slots that they use.

    A task ends when it is due by the clock and was polled as often as `[[task-polls:N]]` asks for. Until then it uses a
    slot of its account, whether it is polled or not. There is no background thread: each method takes the current time
    and first ends the tasks that are due.
    """

    def __init__(self) -> None:
        self._tasks: OrderedDict[str, Task] = OrderedDict()
        self._by_time: list[tuple[float, int, Task]] = []
        self._numbers = itertools.count()  # so that no two tasks are ever compared
        self._slots = Slots()

    def add(self, task: Task, now: float) -> None:
        """Start a task. Beyond `MAX_TASKS`, the one that was not polled for the longest time is dropped."""
        self._tasks[task.task_id] = task
        self._slots.acquire(task.account)
        heapq.heappush(self._by_time, (task.due, next(self._numbers), task))
        while len(self._tasks) > MAX_TASKS:
            self._end(self._tasks.popitem(last=False)[1])
        if len(self._by_time) > 2 * MAX_TASKS:
            self._by_time = [entry for entry in self._by_time if not entry[2].has_ended]
            heapq.heapify(self._by_time)
        self._end_due(now)

    def poll(self, task_id: str, origin: str, now: float) -> dict[str, Any] | None:
        """Return the JSON of the reply to a poll; None for an unknown id."""
        self._end_due(now)
        task = self._tasks.get(task_id)
        if task is None:
            return None
        self._tasks.move_to_end(task_id)
        reply = task.poll_reply(origin)
        if task.polls_left > 0:
            task.polls_left -= 1
            if not task.polls_left and task.due <= now:
                self._end(task)
        return reply

    def in_flight(self, now: float) -> int:
        """Return how many tasks are processing."""
        self._end_due(now)
        return self._slots.total()

    def in_flight_of(self, account: Account, now: float) -> int:
        """Return how many tasks of an account are processing."""
        self._end_due(now)
        return self._slots[account]

    def _end_due(self, now: float) -> None:
        while self._by_time and self._by_time[0][0] <= now:
            task = heapq.heappop(self._by_time)[2]
            if task.polls_left == 0:  # the others end with the last of their polls
                self._end(task)

    def _end(self, task: Task) -> None:
        if not task.has_ended:
            task.has_ended = True
            self._slots.release(task.account)


def polled_task_id(path: str) -> str | None:
    """Return the id of the task whose result a path and query ask for; None for any other path."""
    before, route, task_id = path.partition("?")[0].partition(_RESULT_ROUTE)
    return task_id if route and not before and task_id and "/" not in task_id else None
