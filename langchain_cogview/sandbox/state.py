"""What a sandbox keeps: requests, images that were charged, tasks, and what is in flight."""

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

API_PREFIX: Final = "/api/paas/v4"
"""Path under which the API is served, as the provider serves it."""
RecordT = TypeVar("RecordT")

_REQUEST_BYTES: Final = 500
_IMAGE_BYTES: Final = 300
_JSON_VALUE_BYTES: Final = 100


@dataclass(frozen=True)
class SandboxRequest:
    """A request that a sandbox received.

    Attributes:
        method: In capitals.
        path: With its query.
        headers: By lower-case name; the values of those that hold secrets are `[removed]`.
        body: The JSON object that was sent; None where there was none.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any] | None = None

    @property
    def prompt(self) -> str | None:
        """The prompt that was sent."""
        return self._text("prompt")

    @property
    def model(self) -> str | None:
        """The model that was asked for."""
        return self._text("model")

    @property
    def size(self) -> str | None:
        """The size that was asked for, `WIDTHxHEIGHT` in pixels."""
        return self._text("size")

    @property
    def request_id(self) -> str | None:
        """The id that the client gave its request."""
        return self._text("request_id")

    def _text(self, name: str) -> str | None:
        value = (self.body or {}).get(name)
        return value if isinstance(value, str) else None


@dataclass(frozen=True, slots=True)
class SandboxImage:
    """A picture that the real service would have made and charged.

    Attributes:
        prompt: As it was sent.
        model: As the catalog writes it.
        size: `WIDTHxHEIGHT` in pixels.
        request_id: The id that the client gave its request, or where it gave none, the one that was made up for it.
        task_id: The id of its task; None where it was answered at once.
        charged_at: Unix seconds. A task is charged when it is taken, since from then on it is made whoever asks for it.
    """

    prompt: str
    model: str
    size: str
    request_id: str
    task_id: str | None
    charged_at: float


class History(Generic[RecordT]):
    """The newest records, bounded in number and in memory. Not locked: the sandbox is.

    Args:
        max_records: How many are kept.
        max_bytes: How much memory they may take, by the sizes that `append` is given.
    """

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._bytes = 0
        self._records: deque[tuple[RecordT, int]] = deque()

    def append(self, record: RecordT, size: int) -> None:
        """Add a record of `size` bytes; the oldest ones are dropped to make room for it. The newest is always kept."""
        self._records.append((record, size))
        self._bytes += size
        while len(self._records) > self._max_records or (self._bytes > self._max_bytes and len(self._records) > 1):
            self._bytes -= self._records.popleft()[1]

    def __iter__(self) -> Iterator[RecordT]:
        return (record for record, _ in self._records)


def request_size(request: SandboxRequest, body: bytes) -> int:
    """Upper estimate of the memory that a request takes, with the body that its JSON was read from."""
    texts = (request.path, *request.headers, *request.headers.values())
    # A character takes at most four bytes, and each value of the JSON has a bracket, a comma or a colon of its own.
    values = sum(body.count(sign) for sign in b"[{,:")
    return _REQUEST_BYTES + sum(map(sys.getsizeof, texts)) + 4 * len(body) + _JSON_VALUE_BYTES * values


def image_size(image: SandboxImage) -> int:
    """Memory that an entry of the ledger takes."""
    return _IMAGE_BYTES + sys.getsizeof(image.prompt) + sys.getsizeof(image.request_id)


_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_USER_ID_CHARACTERS: Final = range(6, 129)
_MAX_REQUEST_ID_CHARACTERS: Final = 128


class OrderRefusedError(ValueError):
    """The service would answer 400 with this `code` and `message`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Order:
    """A request body that the service takes: one picture of `width`x`height` pixels."""

    model: ModelInfo
    prompt: str
    width: int
    height: int
    request_id: str | None


def read_body(body: bytes) -> dict[str, Any] | None:
    """The JSON object of a request; None where it is none."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_order(body: dict[str, Any] | None, *, task: bool = False) -> Order:
    """Check a request body. Fields that the service does not know are ignored, as it does.

    Args:
        body: The JSON object that was sent; None where there was none.
        task: Whether it came to the task endpoint, which serves fewer models.

    Raises:
        OrderRefusedError: With the code that the service would give.
    """
    if body is None:
        raise OrderRefusedError("1210", "The request body is not a JSON object")
    name, prompt, user_id = body.get("model"), body.get("prompt"), body.get("user_id")
    model = find_model(name) if isinstance(name, str) else None
    if model is None:
        raise OrderRefusedError("1211", "The model does not exist, please check the model code")
    if not isinstance(prompt, str) or not prompt.strip():
        raise OrderRefusedError("1213", "The prompt parameter was not received properly")
    if model.max_prompt_characters is not None and len(prompt) > model.max_prompt_characters:
        raise OrderRefusedError("1261", "Prompt exceeds max length")
    width, height = _read_size(model, body.get("size"))
    if body.get("quality") not in (None, *model.qualities):
        raise OrderRefusedError("1214", f"The quality parameter is illegal: it is one of {', '.join(model.qualities)}")
    if user_id is not None and not (isinstance(user_id, str) and len(user_id) in _USER_ID_CHARACTERS):
        raise OrderRefusedError("1210", "The user_id parameter is illegal: it has 6 to 128 characters")
    if task and not model.tasks:
        raise OrderRefusedError("1222", "The model does not support this API")
    request_id = body.get("request_id")
    if isinstance(request_id, str) and len(request_id) > _MAX_REQUEST_ID_CHARACTERS:
        raise OrderRefusedError(
            "1210", f"The request_id parameter is illegal: it has at most {_MAX_REQUEST_ID_CHARACTERS} characters"
        )
    return Order(model, prompt, width, height, request_id if isinstance(request_id, str) and request_id else None)


def _read_size(model: ModelInfo, size: Any) -> tuple[int, int]:
    if size is None:
        size = model.default_size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match:
        width, height = int(match[1]), int(match[2])
        if size in model.sizes or (model.rule is not None and model.rule.allows(width, height)):
            return width, height
    raise OrderRefusedError("1214", f"The size parameter is illegal: {model.rule}")


Limit = int | MappingProxyType[str, int] | None


class Account(NamedTuple):
    """What is counted by itself: one model under one key, of which only a hash is kept."""

    key: bytes
    model: str


def account_of(key: str, model: str) -> Account:
    """The account of a key, for a model as the catalog writes it."""
    return Account(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest(), model)


def read_limit(given: int | Mapping[str, int] | None) -> Limit:
    """A limit that holds for each model, or one for each model named, by the catalog's names.

    Raises:
        ValueError: It is less than 1, no whole number, or names a model that the sandbox does not know.
    """
    if not isinstance(given, Mapping):
        return None if given is None else _at_least_one(given)
    limits = {}
    for name, number in given.items():
        model = find_model(str(name))
        if model is None:
            raise ValueError(f"in_flight_limit names a model that the sandbox does not know: {name!r:.60}.")
        limits[model.name] = _at_least_one(number)
    return MappingProxyType(limits)


def _at_least_one(number: int) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"in_flight_limit is a whole number, 1 or more, or None for no limit, not {number!r:.60}.")
    return number


class Places:
    """The places taken, by account. Not locked: its owner is."""

    def __init__(self) -> None:
        self._taken: Counter[Account] = Counter()

    def __getitem__(self, account: Account) -> int:
        """The places that an account has taken."""
        return self._taken[account]

    def take(self, account: Account) -> None:
        """One more; whether it is allowed has been asked before."""
        self._taken[account] += 1

    def give_back(self, account: Account) -> None:
        """One less. An account without any is forgotten."""
        self._taken[account] -= 1
        if not self._taken[account]:
            del self._taken[account]

    def total(self) -> int:
        """Over all accounts."""
        return self._taken.total()


def allowed(limit: Limit, model: str) -> float:
    """How many places an account has for a model; infinity for no limit."""
    number = limit.get(model) if isinstance(limit, MappingProxyType) else limit
    return float("inf") if number is None else number


FILE_ROUTE: Final = "/files/"
LINK_LIFETIME: Final = 86_400
"""Seconds for which a picture's link is good."""
MAX_PICTURES: Final = 100_000
"""Pictures that are listed, and that can be fetched; the oldest, and those unfetched for longest, are forgotten first."""
MAX_LEDGER_BYTES: Final = 64 << 20
"""Memory for the list of pictures."""


@dataclass(slots=True)
class PictureLink:
    """A picture behind a link.

    Attributes:
        seed: From which it is drawn.
        width: Pixels.
        height: Pixels.
        expires: Unix seconds until which the link is good.
        not_yet: GETs that still find nothing.
    """

    seed: bytes
    width: int
    height: int
    expires: int
    not_yet: int


class Ledger:
    """The pictures of a sandbox. Not locked: the sandbox is.

    Attributes:
        made: How many pictures were charged.
        entries: The last of them, oldest first.
    """

    def __init__(self) -> None:
        self.made = 0
        self.entries: History[SandboxImage] = History(MAX_PICTURES, MAX_LEDGER_BYTES)
        self._links: OrderedDict[str, PictureLink] = OrderedDict()

    def charge(
        self, order: Order, changes: Mapping[str, Mapping[str, Any]], identity: str, *, ready_in: float | None = None
    ) -> str:
        """Make a picture and write it down.

        Args:
            order: What was asked for.
            changes: Options of the faults that spoil it, by name.
            identity: The id of reply and link.
            ready_in: Seconds after which the task of this id has it; None where there is no task.

        Returns:
            Path and query of its link.
        """
        now = time.time()
        expires = int(now) - 1 if "expired-url" in changes else int(now + (ready_in or 0.0)) + LINK_LIFETIME
        not_yet = changes["not-yet"]["gets"] if "not-yet" in changes else 0
        self._links[identity] = PictureLink(seed_of(order.prompt), order.width, order.height, expires, not_yet)
        if len(self._links) > MAX_PICTURES:
            self._links.popitem(last=False)
        self.made += 1
        made = SandboxImage(
            prompt=order.prompt,
            model=order.model.name,
            size=f"{order.width}x{order.height}",
            request_id=order.request_id or identity,
            task_id=None if ready_in is None else identity,
            charged_at=now,
        )
        self.entries.append(made, image_size(made))
        return f"{FILE_ROUTE}{identity}.png?Expires={expires}"

    def fetch(self, path: str) -> PictureLink | SandboxReply:
        """The picture behind a path and query, or the reply that it is not to be had."""
        route, _, query = path.partition("?")
        identity = route.removeprefix(FILE_ROUTE).removesuffix(".png")
        link = self._links.get(identity)
        if link is None:
            return json_reply(404, NO_FILE)
        self._links.move_to_end(identity)
        # The query stands for the signature of a real link: without it, or changed, the link is no good.
        if parse_qs(query).get("Expires") != [str(link.expires)] or link.expires < time.time():
            return json_reply(403, NO_ACCESS)
        if link.not_yet > 0:
            link.not_yet -= 1
            return json_reply(404, NO_FILE)
        return link


TASK_ROUTE: Final = f"{API_PREFIX}/async/images/generations"
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
