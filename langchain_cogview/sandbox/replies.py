"""The replies of the service as HTTP: their bodies, and the header by which a sandbox is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.sandbox.faults import JSON_TYPE, error_body, refusal, to_json
from langchain_cogview.sandbox.records import SandboxReply

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_cogview.sandbox.faults import Fault

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
