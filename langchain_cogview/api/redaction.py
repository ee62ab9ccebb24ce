r"""Removes the key from replies, which may repeat what was sent, and from the errors of constructors.

The key is found as it is, in another case, with other characters between its own, reversed, in hexadecimal and in base64.
Each of these forms is also found in escapes (`%41`, `\u0041`, `&#65;`), and when its end is missing.
"""

from __future__ import annotations

import base64
import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, cast

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from langchain_cogview.api.settings import SANDBOX_KEY
from langchain_cogview.text import without_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

REDACTED: Final = "[key]"

_LONG = 12
"""Characters from which a part of the key is found inside other words; a shorter part is found as a whole word only."""
_SHORTEST = 4
"""Characters from which a part of the key is found at all."""
_CUT = 8
"""Characters of the beginning of a long part that are enough to find it when its end is missing."""
_MAX_NESTED = 100
_ROUNDS = 3
"""How often escapes within escapes are decoded."""
_MAX_CHARACTERS = 65_536
_ALPHANUMERIC = frozenset(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_OTHER_BYTES = bytes(set(range(256)) - _ALPHANUMERIC)
_ESCAPE = re.compile(
    r"\\+u\{([0-9a-f]{1,6})\}|\\+u([0-9a-f]{4})|%u([0-9a-f]{4})|(?:\\+|0)x([0-9a-f]{2})|%([0-9a-f]{2})|&#x([0-9a-f]{1,6});?"
    r"|&#([0-9]{1,7});?|\\+([0-7]{3})",
    re.IGNORECASE,
)
_ESCAPE_SIGNS = (b"\\", b"%", b"&#", b"0x")
_BASES = (16, 16, 16, 16, 16, 16, 10, 8)


class Redactor:
    """Removes one key from texts. Its repr does not show the key.

    Args:
        key: The API key.
    """

    def __init__(self, key: SecretStr) -> None:
        parts = list(_parts(key.get_secret_value()))
        self._everywhere = _Needles(parts)
        # The first part of a key is an id, which the path of an image link may contain.
        self._in_urls = _Needles([part for part, is_id in zip(parts, _are_ids(parts), strict=True) if not is_id])

    def text(self, text: str) -> str:
        """Replace the key in a text by `[key]`.

        Args:
            text: Any text, or a URL.

        Returns:
            The text without the key. If the key was in escapes, they are decoded.
        """
        needles = self._in_urls if text.startswith(("http:", "https:")) else self._everywhere
        if not needles.are_in(text.encode("latin-1", "replace")):
            return text
        kept = decoded = text[:_MAX_CHARACTERS]
        for _ in range(_ROUNDS):
            without = needles.replaced(decoded)
            if without != decoded:
                kept = without
            decoded = _unescaped(without)
            if decoded == without:
                break
        return kept

    def body(self, body: bytes) -> bytes:
        """Replace the key in the body of a reply by `[key]`.

        Args:
            body: Raw bytes.

        Returns:
            The body without the key; the same object if it does not contain the key.
        """
        if not self._everywhere.are_in(body):
            return body
        try:
            # JSON is parsed first, so that it is still valid when its strings have changed.
            return json.dumps(self._value(json.loads(body))).encode()
        except (ValueError, RecursionError):
            # Latin-1 round-trips every byte. Of a body that is not JSON, only the beginning is ever shown.
            return self.text(body[:_MAX_CHARACTERS].decode("latin-1")).encode("latin-1", "replace")

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if isinstance(value, dict):
            return {self._in_urls.replaced(name): self._value(item) for name, item in value.items()}
        return value


@lru_cache(maxsize=64)
def redactor(key: SecretStr) -> Redactor:
    """Return the redactor of a key."""
    return Redactor(key)


class _Needles:
    """The forms of some parts of a key, and a pattern that finds them."""

    def __init__(self, parts: list[str]) -> None:
        forms = sorted({form for part in parts for form in _forms(part)}, key=lambda form: -len(form.text))
        self._starts = {form.start.lower().encode() for form in forms}
        self._replace: Callable[[str, str], str] | None = None
        if forms:
            self._replace = re.compile("|".join(form.pattern for form in forms), re.IGNORECASE | re.ASCII).sub

    def are_in(self, body: bytes) -> bool:
        """Return whether the body may contain the key. It is quick, because nearly no text does."""
        if not self._starts:
            return False
        found = self._begins_in(body)
        if found or not any(sign in body for sign in _ESCAPE_SIGNS):
            return found
        decoded = body.decode("latin-1")
        for _ in range(_ROUNDS):
            before, decoded = decoded, _unescaped(decoded)
            if decoded == before:
                return False
            if self._begins_in(decoded.encode("latin-1", "replace")):
                return True
        return False

    def replaced(self, text: str) -> str:
        return self._replace(REDACTED, text) if self._replace else text

    def _begins_in(self, body: bytes) -> bool:
        squeezed = body.translate(None, _OTHER_BYTES).lower()
        return any(start in squeezed for start in self._starts)


def _parts(key: str) -> Iterator[str]:
    """Yield the whole key, then the parts between its dots that are long enough to be secret."""
    if key == SANDBOX_KEY.get_secret_value():
        return
    *others, last = key.split(".")
    if len(_squeezed(key)) >= _SHORTEST:
        yield key
    for part in (*others, last) if others else ():
        if len(_squeezed(part)) >= (_SHORTEST if part == last else _LONG):
            yield part


def _are_ids(parts: list[str]) -> list[bool]:
    """Return which parts a link may contain: the id at the beginning of the key, and parts as short as ordinary words."""
    whole = parts[0] if parts else ""
    has_id = "." in whole
    return [len(_squeezed(part)) < _LONG or (has_id and whole.startswith(part)) for part in parts]


class _Form(NamedTuple):
    """One way to write a part of the key; `text` is its letters and digits."""

    text: str
    is_encoded: bool

    @property
    def is_word(self) -> bool:
        """Whether it is too short to be found inside other words."""
        return len(self.text) < (_CUT if self.is_encoded else _LONG)

    @property
    def start(self) -> str:
        """The characters that every occurrence begins with."""
        return self.text if self.is_word else self.text[:_CUT]

    @property
    def pattern(self) -> str:
        """A regular expression for the form, with any other characters between its own."""
        between = r"[\W_]*+"
        if self.is_word:
            return rf"(?<![^\W_]){between.join(self.text)}(?![^\W_])"
        nested = ""
        for character in reversed(self.text[_CUT : _CUT + _MAX_NESTED]):
            nested = f"(?:{between}{character}{nested})?+"
        # The characters that follow in base64 share bits with the last character.
        return between.join(self.start) + nested + ("[A-Za-z0-9+/=_-]{0,4}" if self.is_encoded else "")


def _forms(part: str) -> Iterator[_Form]:
    data = part.encode()
    encoded = [data.hex()]
    for offset in range(3):
        text = base64.b64encode(b"\0" * offset + data).decode()
        # Only the characters that depend on this part alone.
        encoded.append(_squeezed(text[-(-offset * 8 // 6) : (offset + len(data)) * 8 // 6]))
    for text, is_encoded in ((_squeezed(part), False), *((form, True) for form in encoded)):
        if len(text) >= _SHORTEST:
            yield _Form(text, is_encoded)
            yield _Form(text[::-1], is_encoded)


def _squeezed(text: str) -> str:
    return "".join(character for character in text if character.isascii() and character.isalnum())


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(_character, text)


def _character(match: re.Match[str]) -> str:
    number = int(match[match.lastindex or 0], _BASES[(match.lastindex or 1) - 1])
    return chr(number) if number <= 0x10FFFF else match[0]  # noqa: PLR2004


class SafeErrors(BaseModel):
    """A model whose construction errors do not hold the arguments, because the key is among them."""

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Construct an instance from a dict.

        Args:
            obj: The values by field name.
            options: As in pydantic.

        Returns:
            The instance.

        Raises:
            ValidationError: A value is invalid; the error does not hold the values.
        """
        made, failure = attempt(super().model_validate, obj, **options)
        if failure is not None:
            del obj, options
            raise failure
        return cast("Self", made)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Construct an instance from JSON.

        Args:
            json_data: The values by field name, as JSON.
            options: As in pydantic.

        Returns:
            The instance.

        Raises:
            ValidationError: A value is invalid; the error does not hold the values.
        """
        made, failure = attempt(super().model_validate_json, json_data, **options)
        if failure is not None:
            del json_data, options
            raise failure
        return cast("Self", made)

    @classmethod
    def model_validate_strings(cls, obj: Any, **options: Any) -> Self:
        """Construct an instance from a dict of texts.

        Args:
            obj: The values by field name.
            options: As in pydantic.

        Returns:
            The instance.

        Raises:
            ValidationError: A value is invalid; the error does not hold the values.
        """
        made, failure = attempt(super().model_validate_strings, obj, **options)
        if failure is not None:
            del obj, options
            raise failure
        return cast("Self", made)

    def __setattr__(self, name: str, value: Any) -> None:
        _, failure = attempt(super().__setattr__, name, value)
        if failure is not None:
            del value
            raise failure

    @classmethod
    def model_construct(cls, _fields_set: set[str] | None = None, **values: Any) -> Self:  # type: ignore[override]
        """Construct an instance without validation. Only the key is wrapped in a `SecretStr`.

        Args:
            _fields_set: As in pydantic.
            values: The values by field name.

        Returns:
            The instance.
        """
        return super().model_construct(_fields_set, **with_secret_key(values))


def with_secret_key(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with the key in a `SecretStr`."""
    key = values.get("api_key")
    return {**values, "api_key": SecretStr(key)} if isinstance(key, str) else dict(values)


def attempt(make: Callable[..., Any], *args: Any, **values: Any) -> tuple[Any, Exception | None]:
    """Call a constructor, and return its error instead of raising it.

    The frames of the error, its causes and the input that pydantic stores in it may show the key, so they are removed. The
    caller deletes its own variables that hold arguments and then raises the error.

    Args:
        make: The constructor.
        args: Its positional arguments.
        values: Its keyword arguments.

    Returns:
        The instance and None, or None and the error.
    """
    try:
        return make(*args, **values), None
    except ValidationError as error:
        return None, _without_input(error)
    except Exception as error:  # noqa: BLE001
        error.args = tuple(map(_without_key, error.args))
        vars(error).update({name: _without_key(value) for name, value in vars(error).items()})
        error.__cause__ = error.__context__ = None
        return None, error.with_traceback(None)


def _without_input(error: ValidationError) -> ValidationError:
    details = [
        InitErrorDetails(
            type=PydanticCustomError(cast("Any", item["type"]), cast("Any", _without_key(item["msg"]))),
            loc=tuple(map(_without_key, item["loc"])),
            input=None,
        )
        for item in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    return ValidationError.from_exception_data(error.title, details, hide_input=True)


def _without_key(value: Any) -> Any:
    """Return a text without keys of the usual form: a key under a misspelled name is not known to be one."""
    return without_key(value) if isinstance(value, str) else value
