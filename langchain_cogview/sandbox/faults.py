"""Faults on demand, and the replies of the service as HTTP.

A trigger is a word in double brackets anywhere in the prompt:

    trigger                      reply to the POST
    [[content-filter]]           400, code 1301, contentFilter level 2 of role user (the prompt was blocked)
    [[content-filter:1]]         the same with level 1
    [[content-filter:0:assistant]]  the same with level 0 of role assistant (the image was blocked)
    [[flagged]]                  success, with content_filter level 3 of role assistant
    [[flagged:2]]                the same with level 2
    [[rate-limit]]               429, code 1302, for the first attempt of the prompt, then success
    [[rate-limit:2]]             the same for the first 2 attempts
    [[busy]]                     429, code 1305, for every attempt
    [[busy:1]]                   the same for the first attempt only
    [[balance]]                  429, code 1113 (no balance), for every attempt
    [[auth]]                     401, code 1000 (the key was refused), for every attempt
    [[unavailable]]              503 with an HTML page, for every attempt
    [[unavailable:1]]            the same for the first attempt only
    [[server-error]]             500, code 1234, for every attempt
    [[server-error:1]]           the same for the first attempt only
    [[slow]]                     success after 3 s
    [[slow:0.5]]                 success after 0.5 s; at most 120 s
    [[expired-url]]              success with an expired link, whose GET gives 403
    [[not-yet]]                  success with a link whose first GET gives 404
    [[not-yet:2]]                the same for the first 2 GETs
    [[malformed]]                200 with truncated JSON; the image is made and charged

On the task endpoint, triggers that refuse act on the POST as above, and so does [[malformed]]: the task runs and is
charged. [[slow]] delays the end of the task instead of the reply to its POST; the other triggers act on the image of the
task. Two triggers act on tasks only:

    trigger                      reply to the GETs of the result
    [[task-fail]]                FAIL in the end; nothing is made or charged
    [[task-polls]]               PROCESSING for the first GET, even if the task is due
    [[task-polls:2]]             the same for the first 2 GETs

Attempts are counted for each prompt, whatever the request_id, so that a caller who retries a whole call succeeds. The
count starts again ten minutes after the last attempt, and after `Sandbox.reset`. Several triggers in one prompt
combine: those that refuse use up their attempts one after the other, those that change a success are all applied. Any
other text in double brackets is an ordinary part of the prompt; a warning is logged where it looks like a mistyped trigger.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from langchain_cogview.errors import printable

logger = logging.getLogger(__name__)

ALWAYS: Final = 10**9
MAX_SLOW_SECONDS: Final = 120
"""The longest delay that a prompt can ask for."""
Changes = Mapping[str, Mapping[str, Any]]
"""The faults that change a success: their options by name."""

_TRIGGER = re.compile(r"\[\[([a-z-]{3,20})(?::([0-9]{1,4}(?:\.[0-9]{1,3})?))?(?::([a-z]{1,20}))?\]\]")
_BRACKETS = re.compile(r"\[\[([^\[\]]{3,60})\]\]")
_LEVELS: Final = range(4)


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: The name of its trigger, without brackets.
        times: How many attempts it acts on.
        options: Its options, as `Sandbox.fail_next` takes them.
    """

    name: str
    times: int = ALWAYS
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def refuses(self) -> bool:
        """Whether it replaces a success; other faults only change one."""
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
"""Every fault that `Sandbox.fail_next` knows, with its options and their defaults."""

_FIRST_ATTEMPTS: Final = {"rate-limit": 1, "busy": ALWAYS, "unavailable": ALWAYS, "server-error": ALWAYS}
"""Faults whose trigger takes a number of attempts, and how many there are without a number."""


def make_fault(name: str, times: int, options: Mapping[str, Any]) -> Fault:
    """Create a fault; options that are not given have their defaults.

    Args:
        name: A key of `OPTIONS`.
        times: How many attempts it acts on.
        options: The options that differ from their defaults.

    Returns:
        The fault, with all its options.

    Raises:
        ValueError: The fault or an option does not exist, or an option has an invalid value.
    """
    if name not in OPTIONS:
        raise ValueError(f"There is no fault {name!r}. Use one of {', '.join(OPTIONS)}.")
    unknown = sorted(set(options) - set(OPTIONS[name]))
    if unknown:
        raise ValueError(
            f"The fault {name!r} has no option {unknown[0]!r}. Its options: {', '.join(OPTIONS[name]) or 'none'}."
        )
    checked = {option: _check_option(option, value) for option, value in options.items()}
    return Fault(name, times, {**OPTIONS[name], **checked})


def _check_option(option: str, value: Any) -> Any:
    """Return the value of an option; a dict or list for a body becomes JSON.

    Raises:
        ValueError: The value is invalid.
    """
    if option == "body":
        value = to_json(value) if isinstance(value, dict | list) else value
        is_valid, expected = isinstance(value, bytes | str), "bytes, str, or a dict or list, which becomes JSON"
    elif option == "headers":
        is_valid, expected = isinstance(value, Mapping), "a dict"
    elif option == "role":
        is_valid, expected = isinstance(value, str), "a str"
    elif option == "retry_after":
        is_valid, expected = isinstance(value, str | int | float), "a number of seconds or the text of the header"
    elif option == "seconds":
        is_valid, expected = isinstance(value, int | float) and value >= 0, "a number of at least 0"
    else:
        least, most = {"status": (200, 599), "level": (0, 3), "gets": (0, 10**6), "polls": (0, 10**6)}[option]
        is_valid, expected = isinstance(value, int) and least <= value <= most, f"an integer from {least} to {most}"
    if not is_valid:
        raise ValueError(f"The option {option!r} of a fault is {value!r:.60}. Pass {expected}.")
    return value


def parse_triggers(prompt: str) -> list[Fault]:
    """Return the faults of the triggers in a prompt, in their order, and log a warning about what nearly is a trigger."""
    faults = []
    for brackets in _BRACKETS.finditer(prompt):
        match = _TRIGGER.fullmatch(brackets[0])
        fault = _parse_trigger(match[1], match[2], match[3]) if match else None
        if fault:
            faults.append(fault)
        else:
            _warn_if_nearly_a_trigger(brackets[1])
    return faults


def _warn_if_nearly_a_trigger(text: str) -> None:
    """Log a warning about a text in double brackets whose first word is a trigger or similar to one."""
    name = re.sub(r"[\s_]+", "-", text.partition(":")[0].strip().lower())
    close = difflib.get_close_matches(name, [trigger for trigger in OPTIONS if trigger != "status"], n=1, cutoff=0.75)
    if close:
        logger.warning(
            "[[%s]] in the prompt is not a trigger of the sandbox, so nothing fails. Did you mean [[%s]]? "
            "If you did, write it as in the table of langchain_cogview.sandbox.faults.",
            printable(text, 60),
            close[0],
        )


def _parse_trigger(name: str, number: str | None, role: str | None) -> Fault | None:
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


@dataclass(frozen=True)
class SandboxReply:
    """The reply of a sandbox to one HTTP request.

    Attributes:
        status: HTTP status.
        headers: Header values by lower-case name.
        body: Raw bytes.
        delay: Seconds to wait before the reply is sent.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay: float = 0.0


_SANDBOX_HEADER: Final = {"x-cogview-sandbox": "1"}


def to_json(value: Any) -> bytes:
    """Return JSON as the service writes it: compact, in UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


def error_body(code: str, message: str, **fields: Any) -> bytes:
    """Return the JSON of an error as the service writes it, with `fields` beside the error."""
    return to_json({**fields, "error": {"code": code, "message": message}})


NO_AUTHORIZATION: Final = error_body("1001", "No Authorization parameter was received in the header")
NO_TASK: Final = error_body("1222", "The task does not exist or has expired, please check the task id")
NO_FILE: Final = to_json({"RetCode": -148654, "ErrMsg": "file not exist"})
NO_ACCESS: Final = to_json({"RetCode": -148643, "ErrMsg": "the link has expired"})
WRONG_ROUTE: Final = to_json({"code": 500, "msg": "404 NOT_FOUND", "success": False})


def json_reply(status: int, body: bytes, delay: float = 0.0) -> SandboxReply:
    """Return a reply with a JSON body, to be sent after `delay` seconds."""
    return _reply(status, "application/json; charset=UTF-8", body, delay)


def image_reply(png: bytes) -> SandboxReply:
    """Return the reply to the download of an image."""
    return _reply(200, "image/png", png)


def success_reply(fields: Mapping[str, Any], changes: Changes, delay: float = 0.0) -> SandboxReply:
    """Return a 200 with these fields as JSON, truncated if `malformed` is among the changes."""
    body = to_json(fields)
    return json_reply(200, body[: len(body) // 2] if "malformed" in changes else body, delay)


def refusal(fault: Fault) -> SandboxReply:
    """Return the reply of a fault that refuses."""
    options = fault.options
    if fault.name == "status":
        body = options["body"]
        return SandboxReply(
            options["status"],
            {**options["headers"], **_SANDBOX_HEADER},
            body.encode() if isinstance(body, str) else body,
        )
    if fault.name == "unavailable":
        reply = _reply(503, "text/html", _UNAVAILABLE)
    elif fault.name == "content-filter":
        entry = {"level": options["level"], "role": options["role"]}
        reply = json_reply(400, error_body("1301", _BLOCKED, contentFilter=[entry]))
    else:
        status, code, message = _REFUSALS[fault.name]
        reply = json_reply(status, error_body(code, message))
    if options.get("retry_after") is not None:
        reply.headers["retry-after"] = str(options["retry_after"])
    return reply


def too_long_reply(max_bytes: int) -> SandboxReply:
    """Return the reply to a request whose body is longer than `max_bytes`."""
    return json_reply(413, error_body("1210", f"The body has more than {max_bytes} bytes"))


def content_filter_of(changes: Changes) -> list[dict[str, Any]]:
    """Return the `content_filter` entries of a success; empty unless the image is flagged."""
    flagged = changes.get("flagged")
    return [{"role": flagged["role"], "level": flagged["level"]}] if flagged else []


def _reply(status: int, content_type: str, body: bytes, delay: float = 0.0) -> SandboxReply:
    return SandboxReply(status, {"content-type": content_type, **_SANDBOX_HEADER}, body, delay)
