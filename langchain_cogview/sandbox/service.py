"""The image and task endpoints, offline: one HTTP request in, one HTTP reply out, in the service's own wire format.

Nothing here opens a socket. `transport.py` puts a `Sandbox` under httpx, `server.py` on a port. Faults are asked for by
words in the prompt (the table is in `faults.py`) or from the outside, with `Sandbox.fail_next`.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import time
import uuid
import weakref
from collections import OrderedDict, deque
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, Self

import httpx

from langchain_cogview.catalog import find_model
from langchain_cogview.sandbox.faults import (
    NO_AUTHORIZATION,
    NO_TASK,
    WRONG_ROUTE,
    Fault,
    SandboxReply,
    error_body,
    faults_of,
    filter_entries,
    json_reply,
    make_fault,
    png_reply,
    refused,
    success,
    to_json,
    too_long,
)
from langchain_cogview.sandbox.picture import draw_seed, seed_of
from langchain_cogview.sandbox.state import (
    API_PREFIX,
    FILE_ROUTE,
    TASK_ROUTE,
    Account,
    History,
    Ledger,
    Limit,
    Order,
    OrderRefusedError,
    Places,
    SandboxImage,
    SandboxRequest,
    Task,
    Tasks,
    account_of,
    allowed,
    asked_for,
    read_body,
    read_limit,
    read_order,
    request_size,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

IN_PROCESS_ORIGIN: Final = "https://sandbox.invalid"
SCHEME: Final = "sandbox:"
MAX_REQUESTS: Final = 10_000
"""Entries of `Sandbox.requests`, `Sandbox.polls` and `Sandbox.downloads`; the oldest are dropped first."""
MAX_REQUESTS_BYTES: Final = 32 << 20
"""Memory for each of these three lists."""
MAX_BODY: Final = 1_000_000
"""Bytes of a request body; a longer one gets 413."""
ATTEMPTS_SECONDS: Final = 600
"""How long after its last attempt the attempts of a prompt are still counted."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
_ROUTE: Final = f"{API_PREFIX}/images/generations"
_SECRET_HEADERS: Final = frozenset({"authorization", "proxy-authorization", "cookie"})


class Sandbox:
    """The service without key, cost or network: any key is good, every picture is a placeholder marked SANDBOX.

    A sandbox lives as long as somebody holds it, and can be used from many threads and event loops at once.

    The account is the bearer key, and the service limits how many pictures an account may have in flight for each
    model. In flight is a POST until it is answered and a task while it is PROCESSING, whoever asks for it; its POST
    takes no second place. What is refused is answered at once and takes none. An unknown task answers 404 with code
    1222, which the provider does not document.

    Example:
        >>> with Sandbox() as sandbox:
        ...     sandbox.fail_next("rate-limit", retry_after=0)
        ...     generator = CogViewImageGenerator(base_url=sandbox.base_url, api_key="any")
        ...     generator.invoke("a kitten")
        ...     assert sandbox.images_made == 1

    Args:
        latency: Seconds that each picture takes. A task's POST is answered at once, and the task takes them.
        in_flight_limit: Pictures in flight for one key and model; one more POST gets 429, code 1302. One number for
            each model, or numbers by model (the others have no limit); None for no limit.
        name: Letters, digits, `.`, `_`, `-`; by it the sandbox is found again. None makes one up.
        clock: Seconds by which tasks come to their end; another one lets a test go through hours at once.

    Attributes:
        latency: As given; may be changed at any time.
        clock: As given.

    Raises:
        ValueError: The name is not usable or is in use, or a number or model is not possible.
    """

    def __init__(
        self,
        *,
        latency: float = 0.0,
        in_flight_limit: int | Mapping[str, int] | None = None,
        name: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not (math.isfinite(latency) and latency >= 0):
            raise ValueError(f"latency is a number of seconds, 0 or more, not {latency}.")
        self.latency = latency
        self.clock = clock
        self._lock = Lock()
        self._limit: Limit = read_limit(in_flight_limit)
        self._posts = Places()
        self._clear()
        self.name = _register(self, name)

    @property
    def base_url(self) -> str:
        """What to give as `base_url`: `sandbox:` and the name."""
        return SCHEME + self.name

    @property
    def requests(self) -> list[SandboxRequest]:
        """The POSTs for pictures and tasks so far, refused ones too; the last 10,000 (or 32 MiB), oldest first."""
        with self._lock:
            return list(self._requests)

    @property
    def polls(self) -> list[SandboxRequest]:
        """The GETs of a task's result so far, refused ones too; the last 10,000 (or 32 MiB), oldest first."""
        with self._lock:
            return list(self._polls)

    @property
    def downloads(self) -> list[SandboxRequest]:
        """The GETs of pictures so far, refused ones too; the last 10,000 (or 32 MiB), oldest first."""
        with self._lock:
            return list(self._downloads)

    @property
    def ledger(self) -> list[SandboxImage]:
        """The pictures that the real service would have made and charged; the last 100,000 (or 64 MiB), oldest first."""
        with self._lock:
            return list(self._ledger.entries)

    @property
    def images_made(self) -> int:
        """How many pictures the real service would have made and charged."""
        return self._ledger.made

    @property
    def in_flight(self) -> int:
        """POSTs and tasks under way at this moment, of all accounts."""
        with self._lock:
            return self._posts.total() + self._tasks.in_flight(self.clock())

    @property
    def in_flight_limit(self) -> Limit:
        """The limit for each key and model; may be set anew at any time, and holds for the POSTs that follow."""
        return self._limit

    @in_flight_limit.setter
    def in_flight_limit(self, limit: int | Mapping[str, int] | None) -> None:
        self._limit = read_limit(limit)

    def fail_next(self, fault: str, times: int = 1, *, after: int = 0, **options: Any) -> None:
        """Let the next POSTs fail, before anything else about them is looked at.

        Called again, the new fault stands in line behind those not yet used up. `task-fail` and `task-polls` change what
        becomes of a task; a POST for a picture uses them up unchanged.

        Args:
            fault: A trigger's name without brackets, or `status` for any reply at all.
            times: How many POSTs it hits.
            after: How many POSTs it lets pass before.
            options: `retry_after` (a `Retry-After` header, for `rate-limit`, `busy`, `unavailable`); `level`, `role`
                (for `content-filter`, `flagged`); `seconds` (for `slow`); `gets` (for `not-yet`); `polls` (for
                `task-polls`); `status`, `body`, `headers` (for `status`).

        Raises:
            ValueError: There is no such fault or option, `times` is less than 1, or `after` less than 0.
        """
        made = make_fault(fault, times, options)
        if times < 1:
            raise ValueError(f"times is 1 or more, not {times}.")
        if after < 0:
            raise ValueError(f"after is 0 or more, not {after}.")
        with self._lock:
            if after:
                self._next_faults.append(Fault("none", after))
            self._next_faults.append(made)

    def reset(self) -> None:
        """Forget all requests, pictures, tasks, counts and faults to come; POSTs under way stay in flight."""
        with self._lock:
            self._clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.reset()
        _unregister(self)

    def __repr__(self) -> str:
        return f"Sandbox({self.base_url!r}, images_made={self.images_made})"

    @contextmanager
    def admit(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"", *, origin: str = IN_PROCESS_ORIGIN
    ) -> Iterator[SandboxReply]:
        """Answer a request, and count it as in flight until the block ends; wait the reply's `delay` inside it."""
        reply, place = self._answer(method, path, headers, body, origin=origin, limited=True)
        try:
            yield reply
        finally:
            if place:
                with self._lock:
                    self._posts.give_back(place)

    def reply(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"", *, origin: str = IN_PROCESS_ORIGIN
    ) -> SandboxReply:
        """Answer one HTTP request, whatever is in flight.

        Args:
            method: HTTP method.
            path: Path and query.
            headers: Of any case.
            body: Raw bytes.
            origin: Scheme, host and port under which the caller serves the pictures.
        """
        return self._answer(method, path, headers, body, origin=origin, limited=False)[0]

    def _clear(self) -> None:
        self._requests: History[SandboxRequest] = History(MAX_REQUESTS, MAX_REQUESTS_BYTES)
        self._polls: History[SandboxRequest] = History(MAX_REQUESTS, MAX_REQUESTS_BYTES)
        self._downloads: History[SandboxRequest] = History(MAX_REQUESTS, MAX_REQUESTS_BYTES)
        self._ledger = Ledger()
        self._tasks = Tasks()
        self._attempts: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # by prompt: how many, and when the last
        self._next_faults: deque[Fault] = deque()

    def _answer(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes, *, origin: str, limited: bool
    ) -> tuple[SandboxReply, Account | None]:
        """The reply, and whose place in flight the caller is to give back."""
        method, route = method.upper(), path.partition("?")[0]
        seen = {name.lower(): value for name, value in headers.items()}
        key = _bearer_key(seen.get("authorization", ""))
        seen.update((name, "[removed]") for name in _SECRET_HEADERS & set(seen))
        if method == "POST" and route in (_ROUTE, TASK_ROUTE):
            if len(body) > MAX_BODY:
                return too_long(MAX_BODY), None
            request = SandboxRequest(method, path, seen, read_body(body))
            # In one go: of those that come at the same moment, as many are served as there are places.
            with self._lock:
                self._requests.append(request, request_size(request, body))
                return self._generate(request, key, origin, task=route == TASK_ROUTE, limited=limited)
        if method == "GET" and asked_for(path):
            return self._poll(SandboxRequest(method, path, seen), key, origin), None
        if method in ("GET", "HEAD") and path.startswith(FILE_ROUTE):
            return self._download(SandboxRequest(method, path, seen)), None
        return json_reply(200, WRONG_ROUTE), None

    def _generate(
        self, request: SandboxRequest, key: str, origin: str, *, task: bool, limited: bool
    ) -> tuple[SandboxReply, Account | None]:
        forced = self._next_fault()
        away = self._turned_away(forced, key, request.model, limited=limited)
        if away:
            return away, None
        try:
            order = read_order(request.body, task=task)
        except OrderRefusedError as error:
            return json_reply(400, error_body(error.code, error.message)), None
        faults = faults_of(order.prompt)
        refusing = self._refused_attempt(order, [fault for fault in faults if fault.refuses])
        if refusing:
            return refused(refusing), None
        changes = {fault.name: fault.options for fault in (*faults, *([forced] if forced else ())) if not fault.refuses}
        account = account_of(key, order.model.name)
        if task:
            return self._submit(order, changes, account), None  # the task has the place from here on
        if limited:
            self._posts.take(account)
        return self._succeed(order, changes, origin), account if limited else None

    def _turned_away(self, forced: Fault | None, key: str, model: str | None, *, limited: bool) -> SandboxReply | None:
        """The reply to a POST that is not even read."""
        if forced and forced.refuses:
            return refused(forced)
        if not key:
            return json_reply(401, NO_AUTHORIZATION)
        if limited and self._is_full(key, model):
            return refused(make_fault("rate-limit", 1, {}))
        return None

    def _next_fault(self) -> Fault | None:
        forced = self._next_faults[0] if self._next_faults else None
        if forced and forced.times > 1:
            self._next_faults[0] = replace(forced, times=forced.times - 1)
        elif forced:
            self._next_faults.popleft()
        return forced

    def _is_full(self, key: str, name: str | None) -> bool:
        model = find_model(name or "")
        if self._limit is None or model is None:
            return False
        account = account_of(key, model.name)
        taken = self._posts[account] + self._tasks.in_flight_of(account, self.clock())
        return taken >= allowed(self._limit, model.name)

    def _refused_attempt(self, order: Order, faults: list[Fault]) -> Fault | None:
        if not faults:
            return None
        prompt, now = seed_of(order.prompt), self.clock()
        attempt, last = self._attempts.pop(prompt, (0, now))
        attempt = attempt + 1 if now - last <= ATTEMPTS_SECONDS else 1
        self._attempts[prompt] = attempt, now
        if len(self._attempts) > MAX_REQUESTS:
            self._attempts.popitem(last=False)
        for fault in faults:
            if attempt <= fault.times:
                return fault
            attempt -= fault.times
        return None

    def _succeed(self, order: Order, changes: Mapping[str, Mapping[str, Any]], origin: str) -> SandboxReply:
        identity = uuid.uuid4().hex
        reply: dict[str, Any] = {
            "created": int(time.time()),
            "data": [{"url": origin + self._ledger.charge(order, changes, identity)}],
            "id": identity,
            "request_id": order.request_id or identity,
            "model": order.model.name,
        }
        entries = filter_entries(changes)
        if entries:
            reply["content_filter"] = entries
        return success(reply, changes, self._seconds(changes))

    def _submit(self, order: Order, changes: Mapping[str, Mapping[str, Any]], account: Account) -> SandboxReply:
        identity, seconds, now = uuid.uuid4().hex, self._seconds(changes), self.clock()
        fails = "task-fail" in changes
        task = Task(
            identity=identity,
            request_id=order.request_id or identity,
            account=account,
            due=now + seconds,
            polls=changes["task-polls"]["polls"] if "task-polls" in changes else 0,
            picture=None if fails else self._ledger.charge(order, changes, identity, ready_in=seconds),
            content_filter=filter_entries(changes),
        )
        self._tasks.add(task, now)
        return success(task.submitted(), changes)

    def _seconds(self, changes: Mapping[str, Mapping[str, Any]]) -> float:
        return self.latency + (float(changes["slow"]["seconds"]) if "slow" in changes else 0.0)

    def _poll(self, request: SandboxRequest, key: str, origin: str) -> SandboxReply:
        with self._lock:
            self._polls.append(request, request_size(request, b""))
            if not key:
                return json_reply(401, NO_AUTHORIZATION)
            told = self._tasks.poll(asked_for(request.path) or "", origin, self.clock())
        return json_reply(404, NO_TASK) if told is None else json_reply(200, to_json(told))

    def _download(self, request: SandboxRequest) -> SandboxReply:
        with self._lock:
            self._downloads.append(request, request_size(request, b""))
            found = self._ledger.fetch(request.path)
        if isinstance(found, SandboxReply):
            return found
        return png_reply(draw_seed(found.seed, found.width, found.height))


def _bearer_key(authorization: str) -> str:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


_registry: weakref.WeakValueDictionary[str, Sandbox] = weakref.WeakValueDictionary()
_registry_lock = Lock()
_numbers = itertools.count(1)
_default: list[Sandbox] = []


def sandbox_at(base_url: str) -> Sandbox:
    """The living sandbox of a `base_url`; for `sandbox:` alone, the one that this process has by default.

    Raises:
        LookupError: There is none.
    """
    scheme, colon, name = base_url.partition(":")
    if scheme.lower() + colon != SCHEME:
        raise LookupError(f"{base_url!r} is not the address of a sandbox. It looks like 'sandbox:' or 'sandbox:NAME'.")
    with _registry_lock:
        found = _registry.get(name)
    if found is not None:
        return found
    if name:
        raise LookupError(
            f"There is no sandbox {base_url!r} in this process. Make one with Sandbox(name={name!r}) and keep it as "
            "long as it is used, or use 'sandbox:'."
        )
    try:
        _default.append(Sandbox(name=""))
    except ValueError:  # another thread was faster
        return sandbox_at(SCHEME)
    return _default[-1]


def _register(sandbox: Sandbox, name: str | None) -> str:
    if name and not _NAME.fullmatch(name):
        raise ValueError(f"A sandbox's name has letters, digits, '.', '_' and '-', at most 100, not {name[:100]!r}.")
    with _registry_lock:
        if name is None:
            name = next(number for number in map(str, _numbers) if number not in _registry)
        if name in _registry:
            raise ValueError(
                f"There already is a sandbox {SCHEME + name!r}. Get it with sandbox_at, or use another name."
            )
        _registry[name] = sandbox
    return name


def _unregister(sandbox: Sandbox) -> None:
    with _registry_lock:
        if _registry.get(sandbox.name) is sandbox:
            del _registry[sandbox.name]


class SandboxTransport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Carries the requests of an `httpx.Client` or `httpx.AsyncClient` to a sandbox, whatever host they name.

    A reply that is later than the client's read timeout becomes `httpx.ReadTimeout`, as over a wire; by then the
    sandbox has made, and counted, its picture.

    Example:
        >>> client = httpx.Client(transport=SandboxTransport(Sandbox()))
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Answer, after the reply's delay."""
        body = request.read()
        with self.sandbox.admit(request.method, _path(request), request.headers, body) as reply:
            wait = _wait(request, reply)
            if wait:
                time.sleep(wait)
        return _response(request, reply, wait)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer, after the reply's delay."""
        body = await request.aread()
        with self.sandbox.admit(request.method, _path(request), request.headers, body) as reply:
            wait = _wait(request, reply)
            if wait:
                await asyncio.sleep(wait)
        return _response(request, reply, wait)


def _path(request: httpx.Request) -> str:
    return request.url.raw_path.decode("ascii")


def _wait(request: httpx.Request, reply: SandboxReply) -> float:
    read = request.extensions.get("timeout", {}).get("read")
    return reply.delay if read is None else min(reply.delay, read)


def _response(request: httpx.Request, reply: SandboxReply, waited: float) -> httpx.Response:
    if waited < reply.delay:
        raise httpx.ReadTimeout("The sandbox took longer than the read timeout.", request=request)
    headers = {**reply.headers, "content-length": str(len(reply.body))}
    # As a stream and not as content, which httpx would read at once: then nobody could iterate over the raw bytes.
    return httpx.Response(reply.status, headers=headers, stream=httpx.ByteStream(reply.body), request=request)
