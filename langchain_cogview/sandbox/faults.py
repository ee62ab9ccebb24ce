"""What can go wrong, on demand: the sandbox's faults and the words in a prompt that bring them.

    trigger                      what the POST gets
    [[content-filter]]           400, code 1301, contentFilter level 2 of role user (the prompt was blocked)
    [[content-filter:1]]         the same with level 1
    [[content-filter:0:assistant]]  the same with level 0 of role assistant (the picture was blocked)
    [[flagged]]                  success, with content_filter level 3 of role assistant
    [[flagged:2]]                the same with level 2
    [[rate-limit]]               429, code 1302, for the prompt's first attempt, then success
    [[rate-limit:2]]             the same for the first 2 attempts
    [[busy]]                     429, code 1305, for every attempt
    [[busy:1]]                   the same for the first attempt only
    [[balance]]                  429, code 1113: no money; sending it again does not help
    [[auth]]                     401, code 1000: the key was refused
    [[unavailable]]              503 with an HTML page, for every attempt
    [[unavailable:1]]            the same for the first attempt only
    [[server-error]]             500, code 1234, for every attempt
    [[server-error:1]]           the same for the first attempt only
    [[slow]]                     success after 3 s
    [[slow:0.5]]                 success after 0.5 s; 120 s is the most
    [[expired-url]]              success with a link that has ended: its GET gives 403
    [[not-yet]]                  success with a link whose first GET gives 404
    [[not-yet:2]]                the same for the first 2 GETs
    [[malformed]]                200 with JSON that is cut in the middle; the picture is made and charged

On the task endpoint those that refuse act on the POST as above, and so does [[malformed]]: the task runs and is charged.
[[slow]] puts off the end of the task, not the answer to the POST, and the others act on the task's picture. Two more act
on tasks alone:

    trigger                      what the GETs of the result get
    [[task-fail]]                FAIL in the end; nothing is made or charged
    [[task-polls]]               PROCESSING for the first GET, whatever the clock says, and then what is due
    [[task-polls:2]]             the same for the first 2 GETs

Attempts are those of one prompt, whatever their request_id, so that a caller who retries a whole call comes through. Ten
minutes after the last one the count starts again, as it does with `Sandbox.reset`. Several triggers in one prompt work
together: those that refuse take their attempts one after the other, those that change a success add up. Anything else
in double brackets is just part of the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

JSON_TYPE: Final = "application/json; charset=UTF-8"
ALWAYS: Final = 10**9
MAX_SLOW_SECONDS: Final = 120
"""The longest delay that a prompt can ask for."""

_TRIGGER = re.compile(r"\[\[([a-z-]{3,20})(?::([0-9]{1,4}(?:\.[0-9]{1,3})?))?(?::([a-z]{1,20}))?\]\]")
_LEVELS: Final = range(4)


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: As in the table, without brackets.
        times: How many attempts it hits.
        options: As `fail_next` takes them.
    """

    name: str
    times: int = ALWAYS
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def refuses(self) -> bool:
        """Whether it stands in place of a success; the others only change it."""
        return self.name in _REFUSALS or self.name in ("content-filter", "unavailable", "status")


# status, code, message
_REFUSALS: Final[dict[str, tuple[int, str, str]]] = {
    "rate-limit": (429, "1302", "Rate limit reached for requests"),
    "busy": (429, "1305", "The model is overloaded at the moment, please try again later"),
    "balance": (429, "1113", "Insufficient balance or no resource package. Please recharge."),
    "auth": (401, "1000", "Authentication failed"),
    "server-error": (500, "1234", "Network error, please try again later"),
}
_UNAVAILABLE: Final = b"<html><head><title>503 Service Temporarily Unavailable</title></head></html>"
_BLOCKED: Final = "The system has detected potentially unsafe or sensitive content in input or generation."

OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "content-filter": {"level": 2, "role": "user"},
    "flagged": {"level": 3, "role": "assistant"},
    "rate-limit": {"retry_after": None},
    "busy": {"retry_after": None},
    "balance": {},
    "auth": {},
    "unavailable": {"retry_after": None},
    "server-error": {},
    "slow": {"seconds": 3.0},
    "expired-url": {},
    "not-yet": {"gets": 1},
    "malformed": {},
    "task-fail": {},
    "task-polls": {"polls": 1},
    "status": {"status": 500, "body": b"", "headers": {}},
}
"""Every fault that `fail_next` knows, with its options and their defaults."""

_FIRST_ATTEMPTS: Final = {"rate-limit": 1, "busy": ALWAYS, "unavailable": ALWAYS, "server-error": ALWAYS}


def make_fault(name: str, times: int, options: Mapping[str, Any]) -> Fault:
    """A fault with its options filled up.

    Raises:
        ValueError: There is no such fault, or it has no such option.
    """
    if name not in OPTIONS:
        raise ValueError(f"There is no fault {name!r}. Known are {', '.join(OPTIONS)}.")
    unknown = sorted(set(options) - set(OPTIONS[name]))
    if unknown:
        raise ValueError(
            f"The fault {name!r} has no option {unknown[0]!r}. It has: {', '.join(OPTIONS[name]) or 'none'}."
        )
    return Fault(
        name, times, {**OPTIONS[name], **{option: _checked(option, value) for option, value in options.items()}}
    )


def _checked(option: str, value: Any) -> Any:
    """An option's value, with a dict or list for a body as JSON."""
    if option == "body":
        value = to_json(value) if isinstance(value, dict | list) else value
        usable, form = isinstance(value, bytes | str), "bytes, text, or a dict or list, which becomes JSON"
    elif option == "headers":
        usable, form = isinstance(value, Mapping), "a dict"
    elif option == "role":
        usable, form = isinstance(value, str), "a text"
    elif option == "retry_after":
        usable, form = isinstance(value, str | int | float), "a number of seconds or the header's text"
    elif option == "seconds":
        usable, form = isinstance(value, int | float) and value >= 0, "a number, 0 or more"
    else:
        least, most = {"status": (200, 599), "level": (0, 3), "gets": (0, 10**6), "polls": (0, 10**6)}[option]
        usable, form = isinstance(value, int) and least <= value <= most, f"a whole number from {least} to {most}"
    if not usable:
        raise ValueError(f"The option {option!r} of a fault is {form}, not {value!r:.60}.")
    return value


def faults_of(prompt: str) -> list[Fault]:
    """The faults that the triggers in a prompt ask for, in their order."""
    found = (_from_trigger(match[1], match[2], match[3]) for match in _TRIGGER.finditer(prompt))
    return [fault for fault in found if fault]


def _from_trigger(name: str, number: str | None, role: str | None) -> Fault | None:
    defaults = OPTIONS.get(name)
    if defaults is None or name == "status" or (role and name != "content-filter"):
        return None
    fault = None
    if number is None:
        fault = Fault(name, _FIRST_ATTEMPTS.get(name, ALWAYS), defaults)
    elif name == "slow":
        fault = Fault(name, options={"seconds": min(float(number), MAX_SLOW_SECONDS)})
    elif number.isdecimal():
        count = int(number)
        if name in _FIRST_ATTEMPTS:
            fault = Fault(name, count, defaults)
        elif name == "not-yet":
            fault = Fault(name, options={"gets": count})
        elif name == "task-polls":
            fault = Fault(name, options={"polls": count})
        elif "level" in defaults and count in _LEVELS:
            fault = Fault(name, options={"level": count, "role": role or defaults["role"]})
    return fault


def error_body(code: str, message: str, **beside: Any) -> bytes:
    """The JSON of an error as the service writes it."""
    return to_json({**beside, "error": {"code": code, "message": message}})


def to_json(value: Any) -> bytes:
    """JSON as the service writes it: without blanks, in UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


def refusal(fault: Fault) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a fault that refuses."""
    if fault.name == "status":
        body = fault.options["body"]
        return fault.options["status"], dict(fault.options["headers"]), body.encode() if isinstance(body, str) else body
    headers = {"content-type": JSON_TYPE}
    if fault.options.get("retry_after") is not None:
        headers["retry-after"] = str(fault.options["retry_after"])
    if fault.name == "unavailable":
        return 503, {**headers, "content-type": "text/html"}, _UNAVAILABLE
    if fault.name == "content-filter":
        entry = {"level": fault.options["level"], "role": fault.options["role"]}
        return 400, headers, error_body("1301", _BLOCKED, contentFilter=[entry])
    status, code, message = _REFUSALS[fault.name]
    return status, headers, error_body(code, message)


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


NO_AUTHORIZATION: Final = error_body("1001", "No Authorization parameter was received in the header")
NO_TASK: Final = error_body("1222", "The task does not exist or has expired, please check the task id")
NO_FILE: Final = to_json({"RetCode": -148654, "ErrMsg": "file not exist"})
NO_ACCESS: Final = to_json({"RetCode": -148643, "ErrMsg": "the link has ended"})
WRONG_ROUTE: Final = to_json({"code": 500, "msg": "404 NOT_FOUND", "success": False})
_MARK: Final = {"x-cogview-sandbox": "1"}


def json_reply(status: int, body: bytes, delay: float = 0.0) -> SandboxReply:
    """A reply with a body of JSON, after `delay` seconds."""
    return SandboxReply(status, {"content-type": JSON_TYPE, **_MARK}, body, delay)


def success(fields: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]], delay: float = 0.0) -> SandboxReply:
    """A 200 with these fields, cut in the middle where `malformed` is among the changes."""
    body = to_json(fields)
    return json_reply(200, body[: len(body) // 2] if "malformed" in changes else body, delay)


def refused(fault: Fault) -> SandboxReply:
    """The reply of a fault that refuses."""
    status, headers, body = refusal(fault)
    return SandboxReply(status, {**headers, **_MARK}, body)


def too_long(limit: int) -> SandboxReply:
    """The reply to a request whose body has more than `limit` bytes."""
    return json_reply(413, error_body("1210", f"The body has more than {limit} bytes"))


def png_reply(body: bytes) -> SandboxReply:
    """A picture."""
    return SandboxReply(200, {"content-type": "image/png", **_MARK}, body)


def filter_entries(changes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The `content_filter` entries of a picture that is made all the same; empty where nothing was flagged."""
    flagged = changes.get("flagged")
    return [{"role": flagged["role"], "level": flagged["level"]}] if flagged else []
