r"""The key is taken out of what a service, a gateway or the network says: many repeat what they were sent.

The key is found as it stands, in another case, with other characters between its own, reversed, in hexadecimal and in base64,
each also behind escapes (`%41`, `\u0041`, `&#65;`) and also when its end is cut off.
"""

from __future__ import annotations

import base64
import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from langchain_cogview.api.settings import SANDBOX_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic import SecretStr

REDACTED: Final = "[key]"

_LONG = 12
"""Characters from which a part of the key is found anywhere; a shorter one is found as a word of its own."""
_SHORTEST = 4
_CUT = 8
"""Characters from which the beginning of a long part is found where its end is missing."""
_MAX_NESTED = 100
_ROUNDS = 3
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
    """Takes one key out of texts. What it holds is in no repr."""

    def __init__(self, key: SecretStr) -> None:
        parts = list(_parts(key.get_secret_value()))
        self._everywhere = _Needles(parts)
        # The first part of a key is an id, which the path of an image's link may hold.
        self._in_urls = _Needles([part for part, is_id in zip(parts, _are_ids(parts), strict=True) if not is_id])

    def text(self, text: str) -> str:
        """The text with `[key]` in place of the key. Where the key was behind escapes, they are decoded."""
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
        """The body of a reply without the key; the same object where the key is not in it."""
        if not self._everywhere.are_in(body):
            return body
        try:
            # Through JSON, where there is some: what is taken out of its strings leaves it whole.
            return json.dumps(self._value(json.loads(body))).encode()
        except (ValueError, RecursionError):
            # Latin-1 gives every byte back as it was. Of what is not JSON, only the beginning is ever shown.
            return self.text(body[:_MAX_CHARACTERS].decode("latin-1")).encode("latin-1", "replace")

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self._value(each) for each in value]
        if isinstance(value, dict):
            return {self._in_urls.replaced(name): self._value(each) for name, each in value.items()}
        return value


@lru_cache(maxsize=64)
def redactor(key: SecretStr) -> Redactor:
    """The redactor of a key."""
    return Redactor(key)


class _Needles:
    """Forms of some parts of a key, and how they are found."""

    def __init__(self, parts: list[str]) -> None:
        forms = sorted({form for part in parts for form in _forms(part)}, key=lambda form: -len(form.text))
        self._starts = {form.start.lower().encode() for form in forms}
        self._replace: Callable[[str, str], str] | None = None
        if forms:
            self._replace = re.compile("|".join(form.pattern for form in forms), re.IGNORECASE | re.ASCII).sub

    def are_in(self, body: bytes) -> bool:
        """Whether the key may be in it: quick, for nearly every text is without."""
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
    """The whole key, then those between its dots that say enough of it."""
    if key == SANDBOX_KEY.get_secret_value():
        return
    *others, last = key.split(".")
    if len(_squeezed(key)) >= _SHORTEST:
        yield key
    for part in (*others, last) if others else ():
        if len(_squeezed(part)) >= (_SHORTEST if part == last else _LONG):
            yield part


def _are_ids(parts: list[str]) -> list[bool]:
    """Which parts a link may hold: the key's beginning, and what is too short to be told from a word."""
    whole = parts[0] if parts else ""
    has_id = "." in whole
    return [len(_squeezed(part)) < _LONG or (has_id and whole.startswith(part)) for part in parts]


class _Form(NamedTuple):
    """One way to write a part of the key; `text` has its letters and digits."""

    text: str
    is_encoded: bool

    @property
    def is_word(self) -> bool:
        """Whether it is too short to be found inside of another word."""
        return len(self.text) < (_CUT if self.is_encoded else _LONG)

    @property
    def start(self) -> str:
        """What is always there."""
        return self.text if self.is_word else self.text[:_CUT]

    @property
    def pattern(self) -> str:
        """Finds the form with any other characters between its own."""
        between = r"[\W_]*+"
        if self.is_word:
            return rf"(?<![^\W_]){between.join(self.text)}(?![^\W_])"
        nested = ""
        for character in reversed(self.text[_CUT : _CUT + _MAX_NESTED]):
            nested = f"(?:{between}{character}{nested})?+"
        # What follows in base64 has bits of the last character.
        return between.join(self.start) + nested + ("[A-Za-z0-9+/=_-]{0,4}" if self.is_encoded else "")


def _forms(part: str) -> Iterator[_Form]:
    data = part.encode()
    encoded = [data.hex()]
    for offset in range(3):
        text = base64.b64encode(b"\0" * offset + data).decode()
        # Only the characters that this part alone decides.
        encoded.append(_squeezed(text[-(-offset * 8 // 6) : (offset + len(data)) * 8 // 6]))
    for text, is_encoded in ((_squeezed(part), False), *((each, True) for each in encoded)):
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
