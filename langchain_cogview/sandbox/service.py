"""The image and task endpoints, offline: one HTTP request in, one HTTP reply out, in the wire format of the service.

Nothing here opens a socket. `SandboxTransport` puts a `Sandbox` under an httpx client, `server.py` serves one on a port.
Faults are requested by triggers in the prompt (the table is in `faults.py`) or by `Sandbox.fail_next`.
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
    Changes,
    Fault,
    SandboxReply,
    content_filter_of,
    error_body,
    image_reply,
    json_reply,
    make_fault,
    parse_triggers,
    refusal,
    success_reply,
    to_json,
    too_long_reply,
)
from langchain_cogview.sandbox.picture import draw_seed, seed_of
from langchain_cogview.sandbox.state import (
    API_PREFIX,
    FILE_ROUTE,
    TASK_ROUTE,
    Account,
    History,
    ImageParameters,
    InvalidRequestError,
    Ledger,
    Limit,
    SandboxImage,
    SandboxRequest,
    Slots,
    Task,
    Tasks,
    account_of,
    max_slots,
    parse_body,
    parse_limit,
    parse_parameters,
    polled_task_id,
    request_bytes,
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
"""Seconds after the last attempt of a prompt until its attempts are forgotten."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
_ROUTE: Final = f"{API_PREFIX}/images/generations"
_SECRET_HEADERS: Final = frozenset({"authorization", "proxy-authorization", "cookie"})


class Sandbox:
    """The service without key, cost or network: it accepts any key, and every image is a placeholder marked SANDBOX.

    A sandbox exists as long as there is a reference to it. Threads and event loops can share one.

    The bearer key is the account, and the service limits how many images an account may have in flight for each model.
    A POST is in flight until it is answered, and a task while it is PROCESSING, whether it is polled or not; the POST of
    a task uses no second slot. A refused request is answered at once and uses no slot. A poll of an unknown task gets
    404 with code 1222, which the provider does not document.

    Example:
        >>> with Sandbox() as sandbox:
        ...     sandbox.fail_next("rate-limit", retry_after=0)
        ...     generator = CogViewImageGenerator(base_url=sandbox.base_url, api_key="any")
        ...     generator.invoke("a kitten")
        ...     assert sandbox.images_made == 1

    Args:
        latency: Seconds that each image takes. The POST of a task is answered at once, and the task takes them.
        in_flight_limit: Images in flight for one key and model; one more POST gets 429, code 1302. One number for each
            model, or numbers by model (other models have no limit); None for no limit.
        name: Letters, digits, `.`, `_` and `-`; the part of `base_url` after `sandbox:`. None generates one.
        clock: Returns the current time in seconds, for the end of tasks and for the attempts of a prompt. A clock of
            your own lets a test pass hours in no time.

    Attributes:
        name: The name, as passed or generated.
        latency: As passed; it can be changed at any time.
        clock: As passed.

    Raises:
        ValueError: The name is invalid or in use, the latency or limit is invalid, or a model is unknown.
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
            raise ValueError(f"latency is {latency}. Use a number of seconds of at least 0.")
        self.latency = latency
        self.clock = clock
        self._lock = Lock()
        self._limit: Limit = parse_limit(in_flight_limit)
        self._posts = Slots()
        self._clear()
        self.name = _register(self, name)

    @property
    def base_url(self) -> str:
        """The `base_url` for generators and tools: `sandbox:` and the name."""
        return SCHEME + self.name

    @property
    def requests(self) -> list[SandboxRequest]:
        """The POSTs for images and tasks so far: the last 10,000 (or 32 MiB), oldest first.

        Refused ones are included, except those with a body of more than 1,000,000 bytes.
        """
        with self._lock:
            return list(self._requests)

    @property
    def polls(self) -> list[SandboxRequest]:
        """The GETs of task results so far, refused ones included: the last 10,000 (or 32 MiB), oldest first."""
        with self._lock:
            return list(self._polls)

    @property
    def downloads(self) -> list[SandboxRequest]:
        """The GETs and HEADs of images so far, refused ones included: the last 10,000 (or 32 MiB), oldest first."""
        with self._lock:
            return list(self._downloads)

    @property
    def ledger(self) -> list[SandboxImage]:
        """The images that the real service would have charged: the last 100,000 (or 64 MiB), oldest first."""
        with self._lock:
            return list(self._ledger.entries)

    @property
    def images_made(self) -> int:
        """How many images the real service would have made and charged."""
        return self._ledger.images_made

    @property
    def in_flight(self) -> int:
        """How many POSTs and tasks of all accounts are in flight now."""
        with self._lock:
            return self._posts.total() + self._tasks.in_flight(self.clock())

    @property
    def in_flight_limit(self) -> Limit:
        """The limit for each key and model. It can be set at any time and applies to later POSTs."""
        return self._limit

    @in_flight_limit.setter
    def in_flight_limit(self, limit: int | Mapping[str, int] | None) -> None:
        self._limit = parse_limit(limit)

    def fail_next(self, fault: str, times: int = 1, *, after: int = 0, **options: Any) -> None:
        """Apply a fault to the next POSTs for images and tasks.

        A fault that refuses replaces the reply before the request is validated; any other fault changes a success. Faults
        of several calls act one after the other. `task-fail` and `task-polls` change a task; a POST for an image
        uses them up without effect.

        Args:
            fault: The name of a trigger without brackets, or `status` for a reply of your own.
            times: How many POSTs it acts on.
            after: How many POSTs pass before it acts.
            options: `retry_after` (the `Retry-After` header of `rate-limit`, `busy`, `unavailable`); `level`, `role`
                (of `content-filter`, `flagged`); `seconds` (of `slow`); `gets` (of `not-yet`); `polls` (of
                `task-polls`); `status`, `body`, `headers` (of `status`).

        Raises:
            ValueError: The fault or an option does not exist, an option has an invalid value, `times` is less than 1, or
                `after` is less than 0.
        """
        made = make_fault(fault, times, options)
        if times < 1:
            raise ValueError(f"times is {times}. Use an integer of at least 1.")
        if after < 0:
            raise ValueError(f"after is {after}. Use an integer of at least 0.")
        with self._lock:
            if after:
                self._next_faults.append(Fault("none", after))  # a fault without effect
            self._next_faults.append(made)

    def reset(self) -> None:
        """Forget all requests, images, tasks, counts and coming faults. POSTs that are in flight stay in flight."""
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
        """Answer one HTTP request, within the in-flight limit.

        The request is in flight until the `with` block ends: wait the `delay` of the reply inside it.

        Args:
            method: HTTP method.
            path: Path and query.
            headers: Header values by name, in any case.
            body: Raw bytes.
            origin: Scheme, host and port under which the caller serves the images.

        Yields:
            The reply.
        """
        reply, account = self._answer(method, path, headers, body, origin=origin, is_limited=True)
        try:
            yield reply
        finally:
            if account:
                with self._lock:
                    self._posts.release(account)

    def reply(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"", *, origin: str = IN_PROCESS_ORIGIN
    ) -> SandboxReply:
        """Answer one HTTP request, without the in-flight limit.

        Args:
            method: HTTP method.
            path: Path and query.
            headers: Header values by name, in any case.
            body: Raw bytes.
            origin: Scheme, host and port under which the caller serves the images.

        Returns:
            The reply.
        """
        return self._answer(method, path, headers, body, origin=origin, is_limited=False)[0]

    def _clear(self) -> None:
        self._requests: History[SandboxRequest] = History(MAX_REQUESTS, MAX_REQUESTS_BYTES)
        self._polls: History[SandboxRequest] = History(MAX_REQUESTS, MAX_REQUESTS_BYTES)
        self._downloads: History[SandboxRequest] = History(MAX_REQUESTS, MAX_REQUESTS_BYTES)
        self._ledger = Ledger()
        self._tasks = Tasks()
        self._attempts: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # by prompt: how many, time of the last
        self._next_faults: deque[Fault] = deque()

    def _answer(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes, *, origin: str, is_limited: bool
    ) -> tuple[SandboxReply, Account | None]:
        """Return the reply, and the account whose slot the caller has to release."""
        method, route = method.upper(), path.partition("?")[0]
        recorded = {name.lower(): value for name, value in headers.items()}
        key = _bearer_key(recorded.get("authorization", ""))
        recorded.update((name, "[removed]") for name in _SECRET_HEADERS & set(recorded))
        if method == "POST" and route in (_ROUTE, TASK_ROUTE):
            if len(body) > MAX_BODY:
                return too_long_reply(MAX_BODY), None
            request = SandboxRequest(method, path, recorded, parse_body(body))
            # Under one lock: of concurrent requests, exactly as many are served as there are free slots.
            with self._lock:
                self._requests.append(request, request_bytes(request, body))
                return self._generate(request, key, origin, is_task=route == TASK_ROUTE, is_limited=is_limited)
        task_id = polled_task_id(path)
        if method == "GET" and task_id:
            return self._poll(SandboxRequest(method, path, recorded), task_id, key, origin), None
        if method in ("GET", "HEAD") and path.startswith(FILE_ROUTE):
            return self._download(SandboxRequest(method, path, recorded)), None
        return json_reply(200, WRONG_ROUTE), None

    def _generate(
        self, request: SandboxRequest, key: str, origin: str, *, is_task: bool, is_limited: bool
    ) -> tuple[SandboxReply, Account | None]:
        forced = self._next_fault()
        early = self._early_refusal(forced, key, request.model, is_limited=is_limited)
        if early:
            return early, None
        try:
            parameters = parse_parameters(request.body, is_task=is_task)
        except InvalidRequestError as error:
            return json_reply(400, error_body(error.code, error.message)), None
        faults = parse_triggers(parameters.prompt)
        refusing = self._count_attempt(parameters.prompt, [fault for fault in faults if fault.refuses])
        if refusing:
            return refusal(refusing), None
        changes = {fault.name: fault.options for fault in (*faults, *([forced] if forced else ())) if not fault.refuses}
        account = account_of(key, parameters.model.name)
        if is_task:
            return self._submit(parameters, changes, account), None  # the task uses the slot, not its POST
        if is_limited:
            self._posts.acquire(account)
        return self._succeed(parameters, changes, origin), account if is_limited else None

    def _early_refusal(
        self, forced: Fault | None, key: str, model: str | None, *, is_limited: bool
    ) -> SandboxReply | None:
        """Return the reply to a POST that is refused before its body is validated; None if it is not refused."""
        if forced and forced.refuses:
            return refusal(forced)
        if not key:
            return json_reply(401, NO_AUTHORIZATION)
        if is_limited and self._is_full(key, model):
            return refusal(make_fault("rate-limit", 1, {}))
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
        used = self._posts[account] + self._tasks.in_flight_of(account, self.clock())
        return used >= max_slots(self._limit, model.name)

    def _count_attempt(self, prompt: str, faults: list[Fault]) -> Fault | None:
        """Return the fault that refuses this attempt of a prompt; None if all are used up. The attempt is counted."""
        if not faults:
            return None
        seed, now = seed_of(prompt), self.clock()
        attempt, last = self._attempts.pop(seed, (0, now))
        attempt = attempt + 1 if now - last <= ATTEMPTS_SECONDS else 1
        self._attempts[seed] = attempt, now
        if len(self._attempts) > MAX_REQUESTS:
            self._attempts.popitem(last=False)
        for fault in faults:
            if attempt <= fault.times:
                return fault
            attempt -= fault.times
        return None

    def _succeed(self, parameters: ImageParameters, changes: Changes, origin: str) -> SandboxReply:
        image_id = uuid.uuid4().hex
        fields: dict[str, Any] = {
            "created": int(time.time()),
            "data": [{"url": origin + self._ledger.charge(parameters, changes, image_id)}],
            "id": image_id,
            "request_id": parameters.request_id or image_id,
            "model": parameters.model.name,
        }
        entries = content_filter_of(changes)
        if entries:
            fields["content_filter"] = entries
        return success_reply(fields, changes, self._delay(changes))

    def _submit(self, parameters: ImageParameters, changes: Changes, account: Account) -> SandboxReply:
        task_id, delay, now = uuid.uuid4().hex, self._delay(changes), self.clock()
        fails = "task-fail" in changes
        task = Task(
            task_id=task_id,
            request_id=parameters.request_id or task_id,
            account=account,
            due=now + delay,
            polls_left=changes["task-polls"]["polls"] if "task-polls" in changes else 0,
            image_path=None if fails else self._ledger.charge(parameters, changes, task_id, ready_in=delay),
            content_filter=content_filter_of(changes),
        )
        self._tasks.add(task, now)
        return success_reply(task.submit_reply(), changes)

    def _delay(self, changes: Changes) -> float:
        return self.latency + (float(changes["slow"]["seconds"]) if "slow" in changes else 0.0)

    def _poll(self, request: SandboxRequest, task_id: str, key: str, origin: str) -> SandboxReply:
        with self._lock:
            self._polls.append(request, request_bytes(request, b""))
            if not key:
                return json_reply(401, NO_AUTHORIZATION)
            fields = self._tasks.poll(task_id, origin, self.clock())
        return json_reply(404, NO_TASK) if fields is None else json_reply(200, to_json(fields))

    def _download(self, request: SandboxRequest) -> SandboxReply:
        with self._lock:
            self._downloads.append(request, request_bytes(request, b""))
            link = self._ledger.find(request.path)
        if isinstance(link, SandboxReply):
            return link
        return image_reply(draw_seed(link.seed, link.width, link.height))


def _bearer_key(authorization: str) -> str:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


# --- the sandboxes of this process, by name

_registry: weakref.WeakValueDictionary[str, Sandbox] = weakref.WeakValueDictionary()
_registry_lock = Lock()
_numbers = itertools.count(1)
_default: list[Sandbox] = []  # keeps the default sandbox alive


def sandbox_at(base_url: str) -> Sandbox:
    """Find the sandbox of a `base_url`.

    Args:
        base_url: `sandbox:NAME`, or `sandbox:` alone for the default sandbox, which is created on first use.

    Returns:
        The sandbox.

    Raises:
        LookupError: There is no such sandbox in this process.
    """
    scheme, colon, name = base_url.partition(":")
    if scheme.lower() + colon != SCHEME:
        raise LookupError(f"{base_url!r} is not the base URL of a sandbox. Use 'sandbox:' or 'sandbox:NAME'.")
    with _registry_lock:
        sandbox = _registry.get(name)
    if sandbox is not None:
        return sandbox
    if name:
        raise LookupError(
            f"There is no sandbox {base_url!r} in this process. Create it with Sandbox(name={name!r}) and keep a reference "
            "to it as long as it is used, or use 'sandbox:'."
        )
    try:
        _default.append(Sandbox(name=""))
    except ValueError:  # another thread was faster
        return sandbox_at(SCHEME)
    return _default[-1]


def _register(sandbox: Sandbox, name: str | None) -> str:
    """Return the name under which a sandbox is found.

    Raises:
        ValueError: The name is invalid or in use.
    """
    if name and not _NAME.fullmatch(name):
        raise ValueError(
            f"{name[:100]!r} is not a valid name for a sandbox. Use at most 100 letters, digits, '.', '_' and '-'."
        )
    with _registry_lock:
        if name is None:
            name = next(number for number in map(str, _numbers) if number not in _registry)
        if name in _registry:
            raise ValueError(f"The sandbox {SCHEME + name!r} exists already. Use another name, or its base_url.")
        _registry[name] = sandbox
    return name


def _unregister(sandbox: Sandbox) -> None:
    with _registry_lock:
        if _registry.get(sandbox.name) is sandbox:
            del _registry[sandbox.name]


# --- under httpx, in the same process


class SandboxTransport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Sends the requests of an `httpx.Client` or `httpx.AsyncClient` to a sandbox, whatever their host is.

    A reply that takes longer than the client's read timeout becomes `httpx.ReadTimeout`, as on a network; the sandbox has
    made and counted its image by then.

    Example:
        >>> client = httpx.Client(transport=SandboxTransport(Sandbox()))

    Args:
        sandbox: The sandbox that answers.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Answer a request after the delay of the reply.

        Returns:
            The response.

        Raises:
            httpx.ReadTimeout: The delay is longer than the read timeout of the request.
        """
        body = request.read()
        with self.sandbox.admit(request.method, _path(request), request.headers, body) as reply:
            wait = _wait(request, reply)
            if wait:
                time.sleep(wait)
        return _response(request, reply, wait)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Async version of `handle_request`.

        Returns:
            The response.

        Raises:
            httpx.ReadTimeout: The delay is longer than the read timeout of the request.
        """
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
    # As a stream and not as content, which httpx would read at once: then a caller could not iterate over the raw bytes.
    return httpx.Response(reply.status, headers=headers, stream=httpx.ByteStream(reply.body), request=request)
