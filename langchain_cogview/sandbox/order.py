"""Which request bodies the service takes, and which business code the others get."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.catalog import find_model

if TYPE_CHECKING:
    from langchain_cogview.catalog import ModelInfo

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
