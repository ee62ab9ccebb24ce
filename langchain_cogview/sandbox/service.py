"""The image endpoint, offline: one HTTP request in, one HTTP reply out, in the service's own wire format.

Nothing here opens a socket. `transport.py` puts a `Sandbox` under httpx, `server.py` on a port. Faults are asked for by
words in the prompt (the table is in `faults.py`) or from the outside, with `Sandbox.fail_next`.
"""

from __future__ import annotations

import itertools
import re
import time
import uuid
import weakref
from collections import OrderedDict, deque
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import parse_qs

from langchain_cogview.sandbox.faults import JSON_TYPE, Fault, error_body, faults_of, make_fault, refusal, to_json
from langchain_cogview.sandbox.order import Order, OrderRefusedError, read_body, read_order
from langchain_cogview.sandbox.picture import draw_seed, seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

IN_PROCESS_ORIGIN: Final = "https://sandbox.invalid"
SCHEME: Final = "sandbox:"
LINK_LIFETIME: Final = 86_400
"""Seconds for which a picture's link is good."""
MAX_PICTURES: Final = 100_000
"""Pictures that a sandbox knows at once; the one unused for longest is forgotten first."""
MAX_REQUESTS: Final = 10_000
"""Entries of `Sandbox.requests` and of `Sandbox.downloads`; the oldest go first."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
_PICTURES: Final = "/pictures/"
_SECRET_HEADERS: Final = frozenset({"authorization", "proxy-authorization", "cookie"})
_NO_AUTHORIZATION: Final = "No Authorization parameter was received in the header"
_NO_FILE: Final = to_json({"RetCode": -148654, "ErrMsg": "file not exist"})
_NO_ACCESS: Final = to_json({"RetCode": -148643, "ErrMsg": "the link has ended"})
_WRONG_ROUTE: Final = to_json({"code": 500, "msg": "404 NOT_FOUND", "success": False})


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


@dataclass(frozen=True)
class SandboxReply:
    """What a sandbox answers.

    Attributes:
        status: HTTP status.
        headers: By lower-case name.
        body: Raw bytes.
        delay: Seconds to wait before it is sent.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay: float = 0.0


@dataclass
class _Picture:
    seed: bytes
    width: int
    height: int
    expires: int
    not_yet: int


class Sandbox:
    """The service without key, cost or network: any key is good, every picture is a placeholder marked SANDBOX.

    A sandbox lives as long as somebody holds it, and can be used from many threads and event loops at once.

    Example:
        >>> with Sandbox() as sandbox:
        ...     sandbox.fail_next("rate-limit", retry_after=0)
        ...     generator = CogViewImageGenerator(base_url=sandbox.base_url, api_key="any")
        ...     generator.invoke("a kitten")
        ...     assert sandbox.pictures_made == 1

    Args:
        latency: Seconds that each picture takes.
        in_flight_limit: POSTs under way at once; one more gets 429, code 1302. None for no limit.
        name: Letters, digits, `.`, `_`, `-`; by it the sandbox is found again. None makes one up.

    Raises:
        ValueError: The name is not usable or is in use, or a number is out of bounds.
    """

    def __init__(self, *, latency: float = 0.0, in_flight_limit: int | None = None, name: str | None = None) -> None:
        if latency < 0:
            raise ValueError(f"latency is a number of seconds, 0 or more, not {latency}.")
        if in_flight_limit is not None and in_flight_limit < 1:
            raise ValueError(f"in_flight_limit is 1 or more, or None for no limit, not {in_flight_limit}.")
        self.latency = latency
        self.in_flight_limit = in_flight_limit
        self._lock = Lock()
        self._in_flight = 0
        self._clear()
        self.name = _register(self, name)

    @property
    def base_url(self) -> str:
        """What to give as `base_url`: `sandbox:` and the name."""
        return SCHEME + self.name

    @property
    def requests(self) -> list[SandboxRequest]:
        """The POSTs to the image endpoint so far, refused ones too; the last 10,000, oldest first."""
        with self._lock:
            return list(self._requests)

    @property
    def downloads(self) -> list[SandboxRequest]:
        """The GETs of pictures so far, refused ones too; the last 10,000, oldest first."""
        with self._lock:
            return list(self._downloads)

    @property
    def pictures_made(self) -> int:
        """How many pictures the real service would have made and charged."""
        return self._pictures_made

    @property
    def in_flight(self) -> int:
        """POSTs under way at this moment."""
        return self._in_flight

    def fail_next(self, fault: str, times: int = 1, **options: Any) -> None:
        """Let the next POSTs fail, before anything else about them is looked at.

        Called again, the new fault stands in line behind those not yet used up.

        Args:
            fault: A trigger's name without brackets, or `status` for any reply at all.
            times: How many POSTs it hits.
            options: `retry_after` (a `Retry-After` header, for `rate-limit`, `busy`, `unavailable`); `level`, `role`
                (for `content-filter`, `flagged`); `seconds` (for `slow`); `gets` (for `not-yet`); `status`, `body`,
                `headers` (for `status`).

        Raises:
            ValueError: There is no such fault or option, or `times` is less than 1.
        """
        made = make_fault(fault, times, options)
        if times < 1:
            raise ValueError(f"times is 1 or more, not {times}.")
        with self._lock:
            self._next_faults.append(made)

    def reset(self) -> None:
        """Forget all requests, pictures, counts and faults to come."""
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
        return f"Sandbox({self.base_url!r}, pictures_made={self._pictures_made})"

    @contextmanager
    def admit(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"", *, origin: str = IN_PROCESS_ORIGIN
    ) -> Iterator[SandboxReply]:
        """Answer a request, and count it as in flight until the block ends; wait the reply's `delay` inside it."""
        paid = _is_generation(method, path)
        with self._lock:
            self._in_flight += paid
            full = paid and self.in_flight_limit is not None and self._in_flight > self.in_flight_limit
        try:
            yield self._answer(method, path, headers, body, origin=origin, full=full)
        finally:
            with self._lock:
                self._in_flight -= paid

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
        return self._answer(method, path, headers, body, origin=origin, full=False)

    def _clear(self) -> None:
        self._requests: deque[SandboxRequest] = deque(maxlen=MAX_REQUESTS)
        self._downloads: deque[SandboxRequest] = deque(maxlen=MAX_REQUESTS)
        self._pictures: OrderedDict[str, _Picture] = OrderedDict()
        self._attempts: OrderedDict[bytes, int] = OrderedDict()
        self._next_faults: deque[Fault] = deque()
        self._pictures_made = 0

    def _answer(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes, *, origin: str, full: bool
    ) -> SandboxReply:
        method = method.upper()
        seen = {name.lower(): value for name, value in headers.items()}
        authorization = seen.get("authorization", "")
        seen.update((name, "[removed]") for name in _SECRET_HEADERS & set(seen))
        if _is_generation(method, path):
            return self._generate(SandboxRequest(method, path, seen, read_body(body)), authorization, origin, full=full)
        if method in ("GET", "HEAD") and path.startswith(_PICTURES):
            return self._download(SandboxRequest(method, path, seen))
        return _json_reply(200, _WRONG_ROUTE)

    def _generate(self, request: SandboxRequest, authorization: str, origin: str, *, full: bool) -> SandboxReply:
        with self._lock:
            self._requests.append(request)
            forced = self._next_faults[0] if self._next_faults else None
            if forced and forced.times > 1:
                self._next_faults[0] = replace(forced, times=forced.times - 1)
            elif forced:
                self._next_faults.popleft()
        if forced and forced.refuses:
            return _refuse(forced)
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return _json_reply(401, error_body("1001", _NO_AUTHORIZATION))
        if full:
            return _refuse(make_fault("rate-limit", 1, {}))
        try:
            order = read_order(request.body)
        except OrderRefusedError as error:
            return _json_reply(400, error_body(error.code, error.message))
        faults = faults_of(order.prompt)
        refused = self._refused_attempt(order, [fault for fault in faults if fault.refuses])
        if refused:
            return _refuse(refused)
        changes = {fault.name: fault.options for fault in (*faults, *([forced] if forced else ())) if not fault.refuses}
        return self._succeed(order, changes, origin)

    def _refused_attempt(self, order: Order, faults: list[Fault]) -> Fault | None:
        if not faults:
            return None
        key = seed_of(order.request_id or order.prompt)
        with self._lock:
            attempt = self._attempts[key] = self._attempts.pop(key, 0) + 1
            if len(self._attempts) > MAX_REQUESTS:
                self._attempts.popitem(last=False)
        for fault in faults:
            if attempt <= fault.times:
                return fault
            attempt -= fault.times
        return None

    def _succeed(self, order: Order, changes: Mapping[str, Mapping[str, Any]], origin: str) -> SandboxReply:
        now, identity = int(time.time()), uuid.uuid4().hex
        expires = now - 1 if "expired-url" in changes else now + LINK_LIFETIME
        not_yet = changes["not-yet"]["gets"] if "not-yet" in changes else 0
        with self._lock:
            self._pictures_made += 1
            self._pictures[identity] = _Picture(seed_of(order.prompt), order.width, order.height, expires, not_yet)
            if len(self._pictures) > MAX_PICTURES:
                self._pictures.popitem(last=False)
        reply: dict[str, Any] = {
            "created": now,
            "data": [{"url": f"{origin}{_PICTURES}{identity}.png?Expires={expires}"}],
            "id": identity,
            "request_id": order.request_id or identity,
            "model": order.model.name,
        }
        if "flagged" in changes:
            reply["content_filter"] = [{"role": changes["flagged"]["role"], "level": changes["flagged"]["level"]}]
        body = to_json(reply)
        if "malformed" in changes:
            body = body[: len(body) // 2]
        delay = self.latency + (float(changes["slow"]["seconds"]) if "slow" in changes else 0.0)
        return _json_reply(200, body, delay)

    def _download(self, request: SandboxRequest) -> SandboxReply:
        route, _, query = request.path.partition("?")
        identity = route.removeprefix(_PICTURES).removesuffix(".png")
        with self._lock:
            self._downloads.append(request)
            picture = self._pictures.get(identity)
            if picture is None:
                return _json_reply(404, _NO_FILE)
            self._pictures.move_to_end(identity)
            # The query stands for the signature of a real link: without it, or changed, the link is no good.
            if parse_qs(query).get("Expires") != [str(picture.expires)] or picture.expires < time.time():
                return _json_reply(403, _NO_ACCESS)
            if picture.not_yet > 0:
                picture.not_yet -= 1
                return _json_reply(404, _NO_FILE)
        body = draw_seed(picture.seed, picture.width, picture.height)
        return SandboxReply(200, {"content-type": "image/png", "x-cogview-sandbox": "1"}, body)


def _is_generation(method: str, path: str) -> bool:
    route = path.partition("?")[0]
    return (
        method.upper() == "POST"
        and route.endswith("/images/generations")
        and not route.endswith("/async/images/generations")
    )


def _json_reply(status: int, body: bytes, delay: float = 0.0) -> SandboxReply:
    return SandboxReply(status, {"content-type": JSON_TYPE, "x-cogview-sandbox": "1"}, body, delay)


def _refuse(fault: Fault) -> SandboxReply:
    status, headers, body = refusal(fault)
    return SandboxReply(status, {**headers, "x-cogview-sandbox": "1"}, body)


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
