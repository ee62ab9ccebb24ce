"""Check the prompts of a job, each line once, and hold them in little memory.

Most lines of a large job differ in nothing but their prompt: the check of their other arguments is done once.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, overload

from pydantic import ValidationError
from pydantic_core import from_json, to_json

from langchain_cogview.catalog import model_info
from langchain_cogview.errors import CogViewConfigurationError, CogViewInvalidRequestError, printable
from langchain_cogview.jobs.prompts import bullet_list, count_text, file_name, read_prompts
from langchain_cogview.request import ImageRequest, checked_prompt, describe_validation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from langchain_cogview.catalog import ModelInfo
    from langchain_cogview.jobs.prompts import PromptFormat, PromptSource
    from langchain_cogview.jobs.shards import Shard

_MAX_FORMS: Final = 1_000
_BLOCK: Final = 500
"""Rows that are compressed together."""
_ROW_END: Final = b"\0"
"""Between two rows, which are JSON and have no such byte."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a line is not valid.

    Attributes:
        line: The line number.
        text: What is wrong with the line.
    """

    line: int
    text: str

    def __str__(self) -> str:
        return f"Line {self.line}: {printable(self.text, 1000)}"


class PromptItem(NamedTuple):
    """One valid prompt of a job."""

    number: int  # the line number
    key: str  # identifies the prompt: a hash of all its arguments, with a counter for lines that are equal
    arguments: dict[str, Any]  # the checked arguments that the line itself sets
    extra: dict[str, Any] | None  # all other columns or keys of the line
    model: str
    n: int  # how many images to generate


class PromptItems(Sequence[PromptItem]):
    """The valid prompts of a job in their order, held as compressed text: a tenth of the memory of the objects."""

    def __init__(self) -> None:
        # A row has the key, the number of images and the rest as JSON; `extra` is on a second line, if there is any.
        self._tail: list[bytes] = []  # the rows that do not fill a block
        self._blocks: list[bytes] = []  # compressed rows, `_BLOCK` in each
        self._last: tuple[int, list[bytes]] = -1, []  # the block that was read last: most readers go on in it

    def append(self, item: PromptItem) -> None:
        """Add a prompt at the end."""
        number, key, arguments, extra, model, n = item
        row = b"%b %d %b" % (key.encode(), n, to_json((number, arguments, model)))
        if extra:
            # An unpaired surrogate, which UTF-8 cannot encode, becomes a JSON escape.
            row += b"\n" + json.dumps(extra, ensure_ascii=False).encode("utf-8", "backslashreplace")
        self._tail.append(row)
        if len(self._tail) == _BLOCK:
            self._blocks.append(zlib.compress(_ROW_END.join(self._tail), 1))
            self._tail = []

    def keys(self) -> Iterator[tuple[str, int]]:
        """Yield key and number of images of each prompt, which is faster than the prompts themselves."""
        for row in self._rows():
            key, n, _ = row.split(b" ", 2)
            yield key.decode(), int(n)

    def _rows(self) -> Iterator[bytes]:
        return chain.from_iterable(map(self._block, range(len(self._blocks) + 1)))

    def _block(self, number: int) -> list[bytes]:
        last, rows = self._last
        if last == number:
            return rows
        if number == len(self._blocks):
            return self._tail
        rows = zlib.decompress(self._blocks[number]).split(_ROW_END)
        self._last = number, rows
        return rows

    @overload
    def __getitem__(self, index: int) -> PromptItem: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptItem]: ...
    def __getitem__(self, index: int | slice) -> PromptItem | list[PromptItem]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        block, position = divmod(range(len(self))[index], _BLOCK)
        return _item(self._block(block)[position])

    def __iter__(self) -> Iterator[PromptItem]:
        return map(_item, self._rows())

    def __len__(self) -> int:
        return _BLOCK * len(self._blocks) + len(self._tail)


def _item(row: bytes) -> PromptItem:
    key, n, rest = row.split(b" ", 2)
    first, _, extra = rest.partition(b"\n")
    number, arguments, model = from_json(first)
    return PromptItem(number, key.decode(), arguments, json.loads(extra) if extra else None, model, int(n))


@dataclass
class PromptList:
    """The checked prompts of a job, and what was noted while they were read."""

    items: PromptItems = field(default_factory=PromptItems)  # the valid prompts, in their order
    source: str | None = None  # name of the file of prompts; None for a list and for the standard input
    lines: int = 0  # number of lines with a prompt, valid or not
    comments: int = 0
    blank: int = 0  # number of blank lines
    problems: list[Problem] = field(default_factory=list)  # the lines that are not valid
    duplicates: list[int] = field(default_factory=list)  # numbers of the lines that equal an earlier one
    models: set[str] = field(default_factory=set)  # the models of the valid prompts
    unique: bool = False  # whether duplicates are left out
    notes: list[str] = field(default_factory=list)  # remarks for the user

    def refuse_problems(self) -> None:
        """Raise if a line is not valid.

        Raises:
            CogViewInvalidRequestError: Its notes name the first twenty invalid lines and what is wrong with them.
        """
        if not self.problems:
            return
        verb, them = ("is", "it") if len(self.problems) == 1 else ("are", "them")
        bad = f"{count_text(len(self.problems), 'line')} of {self.lines:,} {verb} not valid; nothing was sent."
        error = CogViewInvalidRequestError(bad, hint=f"Fix {them}, or leave {them} out with skip_bad=True.")
        for line in bullet_list("Not valid", self.problems)[1:]:
            error.add_note(line.strip())
        raise error


def check_prompts(
    source: PromptSource,
    defaults: Mapping[str, Any],
    *,
    format: PromptFormat | None,  # noqa: A002
    unique: bool,
    shard: Shard | None = None,
) -> PromptList:
    """Read and check all prompts of a source.

    Args:
        source: As for `read_prompts`.
        defaults: Arguments for lines that do not set them.
        format: As for `read_prompts`.
        unique: Leave out lines that equal an earlier one.
        shard: The only shard whose prompts are returned. None: all prompts.

    Returns:
        The valid prompts and the problems of the others.

    Raises:
        CogViewConfigurationError: The file cannot be read or has no prompts, its format is unknown, or its header is wrong.
    """
    result = PromptList(unique=unique)
    for item in checked_items(result, source, defaults, format=format, shard=shard):
        result.items.append(item)
    return result


def checked_items(
    result: PromptList,
    source: PromptSource,
    defaults: Mapping[str, Any],
    *,
    format: PromptFormat | None,  # noqa: A002
    shard: Shard | None = None,
) -> Iterator[PromptItem]:
    """Read and check all prompts of a source, one at a time.

    Args:
        result: Gets everything but the prompts themselves; it is complete after the last prompt.
        source: As for `read_prompts`.
        defaults: Arguments for lines that do not set them.
        format: As for `read_prompts`.
        shard: As for `check_prompts`.

    Yields:
        The valid prompts.

    Raises:
        CogViewConfigurationError: As for `check_prompts`.
    """
    file = read_prompts(source, format=format)
    result.source = _name_of(source)
    check = _Check(defaults)
    elsewhere = 0
    seen: set[int] = set()
    counts: dict[int, int] = {}  # of the prompts that were seen again
    warned: dict[str, None] = {}
    for line in file:
        result.lines += 1
        if line.problem:
            result.problems.append(Problem(line.number, line.problem))
            continue
        try:
            form, arguments, digest = check.line(line.arguments)
        except ValidationError as error:
            result.problems.append(Problem(line.number, describe_validation(error)))
            continue
        if form.warnings:
            warned |= dict.fromkeys(form.warnings)
        if shard and not shard.has(digest.hex()):
            elsewhere += 1
            continue
        key, number = digest.hex(), int.from_bytes(digest)  # a number takes less memory than a string
        if number in seen:
            result.duplicates.append(line.number)
            if result.unique:
                continue
            counts[number] = counts.get(number, 1) + 1
            key = f"{key}-{counts[number]}"
        seen.add(number)
        result.models.add(form.info.name)
        yield PromptItem(line.number, key, arguments, line.extra or None, form.info.name, form.request.n)
    if not result.lines and isinstance(source, str | Path):
        name = "the standard input" if str(source) == "-" else f"the file {printable(str(source), 120)}"
        raise CogViewConfigurationError(
            f"There is no prompt in {name}; nothing was sent.", hint="A text file has one prompt on each line."
        )
    result.blank, result.comments, result.notes = file.blank, file.comments, [*file.notes, *warned]
    if shard:
        result.notes.append(f"Shard {shard.number} of {shard.count}; in other shards: {count_text(elsewhere, 'line')}.")


def _name_of(source: PromptSource) -> str | None:
    """Return the name of a file of prompts, for people; None for a list and for the standard input."""
    return file_name(source) if isinstance(source, str | Path) and str(source) != "-" else None


class _Form(NamedTuple):
    """The checked arguments of all lines that differ in nothing but their prompt."""

    request: ImageRequest  # of the first of these lines
    info: ModelInfo
    warnings: tuple[str, ...]
    head: str  # the JSON of all arguments before the prompt's own
    tail: str  # and after it

    @classmethod
    def of(cls, request: ImageRequest) -> _Form:
        values = resolved_arguments(request)
        head = {name: value for name, value in values.items() if name < "prompt"}
        tail = {name: value for name, value in values.items() if name > "prompt"}
        return cls(
            request,
            model_info(request.model),
            request.warnings,
            f'{json.dumps(head, sort_keys=True)[:-1]}, "prompt": ',
            f", {json.dumps(tail, sort_keys=True)[1:]}",
        )

    def takes(self, prompt: Any) -> bool:
        """Return whether the request of these lines is valid with this prompt."""
        try:
            return type(prompt) is str and bool(checked_prompt(prompt, self.info))
        except ValueError:
            return False

    def digest(self, prompt: str) -> bytes:
        """Return sixteen bytes of the hash of all arguments, which identify the request."""
        return hashlib.sha256(f"{self.head}{json.dumps(prompt)}{self.tail}".encode()).digest()[:16]


class _Check:
    """Checks the arguments of lines."""

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        self._defaults = defaults
        self._forms: dict[str, _Form] = {}

    def line(self, arguments: Mapping[str, Any]) -> tuple[_Form, dict[str, Any], bytes]:
        """Return the form of a line, its checked arguments, and the digest of its request.

        Raises:
            ValidationError: The line is not valid.
        """
        name = _others(arguments)
        form, prompt = self._forms.get(name), arguments.get("prompt")
        if form is None or not form.takes(prompt):
            request = ImageRequest.model_validate({**self._defaults, **arguments})
            form, prompt = _Form.of(request), request.prompt
            if name:
                if len(self._forms) >= _MAX_FORMS:
                    self._forms.clear()
                self._forms[name] = form
        checked = {name: prompt if name == "prompt" else getattr(form.request, name) for name in arguments}
        return form, checked, form.digest(str(prompt))


def _others(arguments: Mapping[str, Any]) -> str:
    """Return all arguments but the prompt as a text; an empty text if a value is one that no file can have."""
    if len(arguments) == 1:  # a line of a text file
        return "{}" if "prompt" in arguments else ""
    try:
        return json.dumps({name: value for name, value in arguments.items() if name != "prompt"}, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return ""


def resolved_arguments(request: ImageRequest) -> dict[str, Any]:
    """Return all arguments of a request, with the model's defaults for size and quality."""
    return request.model_dump() | {"size": request.resolved_size, "quality": request.resolved_quality}
