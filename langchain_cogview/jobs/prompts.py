"""Read the prompts of a job: text, CSV, TSV and JSON lines, one line at a time.

A line has at least a prompt, and may have `model`, `size`, `quality`, `n`, `user_id` and `watermark_enabled` of its own. Other
columns and keys are kept as `extra`. Each problem is reported with its line number.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import stat
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from langchain_cogview.catalog import money_text
from langchain_cogview.errors import CogViewConfigurationError, printable
from langchain_cogview.request import UNSUPPORTED_ARGUMENTS, ImageRequest, unknown_argument

if TYPE_CHECKING:
    from decimal import Decimal
    from typing import BinaryIO, TextIO


PromptFormat = Literal["txt", "csv", "tsv", "jsonl"]
_FORMATS: Final = get_args(PromptFormat)
PromptSource = str | Path | Iterable[str | Mapping[str, Any]]
"""A file (`-` is the standard input), or the prompts themselves, each a string or a dict of arguments."""
MAX_LINE: Final = 100_000
"""Maximum length of a line, of the lines that a quoted cell spans, or of a prompt of a list, in characters."""
_MAX_DEPTH: Final = 100
"""How deeply the other keys of a prompt may be nested: a manifest is read where less of the stack is left."""
MAX_LISTED: Final = 20
_TOO_LONG: Final = f"It has more than {MAX_LINE:,} characters."
_ENDINGS: Final[dict[str, PromptFormat]] = {
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_BLOCK: Final = 1 << 20
_NOT_UTF_8: Final = re.compile("[\udc80-\udcff]")  # what the error handler surrogateescape makes of such bytes
_UTF_16: Final = (b"\xff\xfe", b"\xfe\xff")
_ARGUMENTS: Final = frozenset(ImageRequest.model_fields)


@dataclass(slots=True)
class PromptLine:
    """One line of a file of prompts, before it is checked."""

    number: int  # the line in the file where the prompt begins, counted from 1; in a list, the position of the prompt
    # The arguments as written; values of a CSV or TSV file are strings.
    arguments: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # all other columns or keys of the line
    problem: str | None = None  # why the line cannot be read; None if it can


class PromptFile:
    """The prompts of a source, read in one pass.

    Attributes:
        blank: Number of blank lines skipped so far.
        comments: Number of comments skipped so far: lines of a text file that begin with `#`.
        notes: Remarks for the user, such as columns that are not arguments; each appears once.
    """

    def __init__(self, source: PromptSource, *, format: PromptFormat | None = None) -> None:  # noqa: A002
        self.blank = self.comments = 0
        self.notes: list[str] = []
        self._source = source
        self._format = format
        self._others: set[str] = set()

    def __iter__(self) -> Iterator[PromptLine]:
        if not isinstance(self._source, str | Path):
            refuse_one(self._source)
            yield from self._from_values(self._source)
            return
        form = format_of(self._source, self._format)
        with _opened(self._source) as file:
            text = io.TextIOWrapper(
                file, "utf-8-sig", "surrogateescape", newline="" if form == "csv" else None, write_through=True
            )
            try:
                yield from {"txt": self._txt, "csv": self._csv, "tsv": self._tsv, "jsonl": self._jsonl}[form](text)
            finally:
                text.detach()

    # --- formats

    def _txt(self, file: TextIO) -> Iterator[PromptLine]:
        for number, text, problem in self._lines(file):
            begun = text.lstrip()
            if begun.startswith("#"):
                self.comments += 1
            else:
                prompt = text.replace("\\#", "#", 1) if begun.startswith("\\#") else text
                yield PromptLine(number, {"prompt": prompt}, problem=problem)

    def _jsonl(self, file: TextIO) -> Iterator[PromptLine]:
        for number, text, problem in self._lines(file):
            yield PromptLine(number, problem=problem) if problem else self._of_json(number, text)

    def _of_json(self, number: int, text: str) -> PromptLine:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            return PromptLine(number, problem=f"Not valid JSON: {error.msg} at character {error.colno}.")
        except (ValueError, RecursionError):
            return PromptLine(number, problem="Its JSON is nested too deeply, or holds a number that is too long.")
        return self._of_value(number, value)

    def _of_value(self, number: int, value: Any) -> PromptLine:
        if isinstance(value, str):
            return PromptLine(number, {"prompt": value})
        if not isinstance(value, Mapping):
            return PromptLine(
                number, problem=f"A prompt is a string or an object with the key 'prompt', not {_kind(value)}."
            )
        if "prompt" not in value:
            close = next((name for name in value if str(name).strip().lower() == "prompt"), None)
            return PromptLine(
                number,
                problem="The key 'prompt' is missing." + (f" It is written {printable(close, 60)!r}." if close else ""),
            )
        arguments = {name: item for name, item in value.items() if name in _ARGUMENTS and item is not None}
        extra = {str(name): item for name, item in value.items() if name not in _ARGUMENTS}
        self._note_others("key", extra)
        try:
            json.dumps(extra)
        except (TypeError, ValueError, RecursionError):
            return PromptLine(number, arguments, problem="A value beside its arguments cannot be written as JSON.")
        if _is_deeper(extra, _MAX_DEPTH):
            return PromptLine(number, arguments, problem="A value beside its arguments is nested too deeply.")
        return PromptLine(number, arguments, {name: _in_json(item) for name, item in extra.items()})

    def _from_values(self, values: Iterable[str | Mapping[str, Any]]) -> Iterator[PromptLine]:
        for number, value in enumerate(values, 1):
            if isinstance(value, str) and not value.strip():
                self.blank += 1
            else:
                line = self._of_value(number, value)
                yield line if line.problem or _length(line) <= MAX_LINE else PromptLine(number, problem=_TOO_LONG)

    def _csv(self, file: TextIO) -> Iterator[PromptLine]:
        bounded = _Bounded(file)
        # strict: without it, a quote that is never closed silently swallows the rest of the file.
        rows = csv.reader(bounded, strict=True)
        header: list[str] | None = None
        while True:
            start = rows.line_num + 1
            bounded.begin()
            try:
                row = next(rows, None)
                problem = bounded.problem
            except csv.Error as error:
                row, problem = [], bounded.problem or _csv_problem(error, start, rows.line_num)
            if row is None:
                break
            if not problem and not any(cell.strip() for cell in row):
                self.blank += 1
            elif header is None:
                header = self._header(start, row, problem, "commas")
            else:
                yield PromptLine(start, problem=problem) if problem else self._of_row(start, header, row)
        if header is None:
            raise _no_header(1, "it is empty")

    def _tsv(self, file: TextIO) -> Iterator[PromptLine]:
        # A cell cannot contain a tab here, so quotes have no meaning; only a cell that is quoted as spreadsheets do it
        # (quotes at both ends, doubled within) loses them.
        header: list[str] | None = None
        for number, text, problem in self._lines(file):
            row = [_unquoted(cell) for cell in text.split("\t")]
            if header is None:
                header = self._header(number, row, problem, "tabs")
            elif not problem and not any(cell.strip() for cell in row):
                self.blank += 1
            else:
                yield PromptLine(number, problem=problem) if problem else self._of_row(number, header, row)
        if header is None:
            raise _no_header(1, "it is empty")

    def _header(self, number: int, row: list[str], problem: str | None, separators: str) -> list[str]:
        names = [name.strip() for name in row]
        known = [name.lower() if name.lower() in _ARGUMENTS else name for name in names]
        double = next((name for name in known if name in _ARGUMENTS and known.count(name) > 1), None)
        if problem:
            raise _no_header(number, problem.rstrip("."))
        if double:
            raise _no_header(number, f"it has the column {double!r} twice")
        if "prompt" not in known:
            shown = ", ".join(repr(printable(name, 30)) for name in names[:10])
            raise _no_header(number, f"it has no column 'prompt'; its columns, separated by {separators}, are {shown}")
        self._note_others("column", [name for name in known if name not in _ARGUMENTS and name])
        return known

    def _of_row(self, number: int, header: list[str], row: list[str]) -> PromptLine:
        if len(row) > len(header) and any(cell.strip() for cell in row[len(header) :]):
            return PromptLine(
                number,
                problem=f"It has {len(row)} cells, the header {len(header)}: quote a cell that holds a separator.",
            )
        cells = dict(zip(header, row, strict=False))
        arguments = {
            name: cell.replace("\r\n", "\n") if name == "prompt" else cell.strip()
            for name, cell in cells.items()
            if name in _ARGUMENTS and (name == "prompt" or cell.strip())
        }
        extra = {name: cell for name, cell in cells.items() if name not in _ARGUMENTS and name and cell}
        return PromptLine(number, arguments, cast("dict[str, Any]", extra))

    # --- shared by the formats

    def _lines(self, file: TextIO) -> Iterator[tuple[int, str, str | None]]:
        """Yield number, text and problem of each line that is not blank."""
        number = 0
        while text := file.readline(MAX_LINE + 2):
            number += 1
            problem = _line_problem(text, file)
            text = text.rstrip("\r\n")
            if problem or text.strip():
                yield number, text, problem
            else:
                self.blank += 1

    def _note_others(self, kind: str, names: Iterable[str]) -> None:
        for name in names:
            if name in self._others:
                continue
            self._others.add(name)
            if len(self._others) > 20:  # noqa: PLR2004  a file may have thousands of columns
                continue
            close = unknown_argument(name, _ARGUMENTS) if name in UNSUPPORTED_ARGUMENTS else ""
            self.notes.append(
                f"The {kind} {printable(name, 60)!r} is not an argument; it is copied to the manifest. {close}".strip()
            )


def _exists(source: str | Path) -> bool:
    try:
        return Path(source).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # the name is too long, or names an unknown user
        return False


def refuse_one(source: Any) -> None:
    """Raise if the source is a single prompt or not a collection of prompts.

    Iterating over a mapping, bytes or a model would send its keys, bytes or fields as prompts.

    Raises:
        CogViewConfigurationError: The source is not a list of prompts.
    """
    if isinstance(source, Mapping | bytes | bytearray | BaseModel) or not isinstance(source, Iterable):
        raise CogViewConfigurationError(
            f"The prompts must be a list of strings and dicts, or the name of a file, not {_kind(source)}.",
            hint="Put a single prompt into a list: [prompt].",
        )


def format_of(source: str | Path, form: PromptFormat | None = None) -> PromptFormat:
    """Return the format of a file of prompts.

    Args:
        source: The file; `-` is the standard input.
        form: The format that the caller chose; None to take it from the file's extension.

    Raises:
        CogViewConfigurationError: The extension names no format, or the caller's choice is none.
    """
    if form is not None:
        if form not in _FORMATS:
            raise CogViewConfigurationError(
                f"format is one of {', '.join(map(repr, _FORMATS))}, not {printable(repr(form), 40)}.",
                hint="Leave it out to take the format from the file's extension.",
            )
        return form
    if str(source) == "-":
        return "txt"
    form = _ENDINGS.get(Path(source).suffix.lower())
    if form is None and not _exists(source):
        raise CogViewConfigurationError(
            f"There is no file {printable(str(source), 120)!r}. A single string is read as the name of a file of prompts.",
            hint="Check the path. Pass the prompts themselves as a list, [prompt], or on the standard input, '-'.",
        )
    if form is None:
        raise CogViewConfigurationError(
            f"The extension of {printable(str(source), 120)} does not name a format of prompts.",
            hint="Choose one with format=: 'txt' (one prompt per line), 'csv', 'tsv' or 'jsonl'.",
        )
    return form


@contextmanager
def _opened(source: str | Path) -> Iterator[BinaryIO]:
    name = printable(str(source), 120)
    if str(source) == "-" and sys.stdin is None:
        raise CogViewConfigurationError("There is no standard input to read prompts from.", hint="Name a file.")
    try:
        if str(source) == "-":
            file: Any = sys.stdin.buffer
        else:
            file = Path(source).expanduser().open("rb")
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise CogViewConfigurationError(
            f"The file of prompts, {name}, cannot be read: {reason}.", hint="Check the path."
        ) from None
    shared = None if str(source) != "-" else file
    file = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)
    try:
        if file.peek(2)[:2] in _UTF_16:
            raise CogViewConfigurationError(
                f"The prompts in {name} are in UTF-16, which some programs call 'Unicode'.", hint="Save them as UTF-8."
            )
        yield file
    except OSError as error:
        raise CogViewConfigurationError(
            f"The file of prompts, {name}, cannot be read: {error.strerror}.", hint="Check the path."
        ) from None
    finally:
        if shared is None:
            file.close()
        elif file is not shared:
            file.detach()


def _length(line: PromptLine) -> int:
    # In characters, about as the line would have in a file.
    texts = sum(len(value) for value in line.arguments.values() if isinstance(value, str | bytes))
    return texts + (len(json.dumps(line.extra, ensure_ascii=False)) if line.extra else 0)


def _is_deeper(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list | tuple):
        return False
    items = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in items)


def _in_json(value: Any) -> Any:
    """Return a value with null for the numbers that JSON lacks: pandas has NaN where a value is missing."""
    if isinstance(value, dict):
        return {name: _in_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line_problem(text: str, file: TextIO) -> str | None:
    """Return what is wrong with a line, or None; skip the rest of a line that is too long."""
    if len(text.rstrip("\r\n")) > MAX_LINE:
        while text and not text.endswith(("\n", "\r")):
            text = file.readline(MAX_LINE)
        return _TOO_LONG
    wrong = _NOT_UTF_8.search(text)
    return f"Not valid UTF-8 at character {wrong.start() + 1}." if wrong else None


class _Bounded:
    """The lines of a CSV file for its reader, cut off where one record is too long."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.problem: str | None = None
        self._length = 0

    def begin(self) -> None:
        """Start a new record."""
        self.problem, self._length = None, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text = self._file.readline(MAX_LINE + 2)
        if not text:
            raise StopIteration
        if problem := _line_problem(text, self._file):
            self.problem = self.problem or problem
            text = text if len(text) <= MAX_LINE else "\n"  # a line that is cut may open a quote and never close it
        self._length += len(text)
        if self._length > MAX_LINE + 2:
            self.problem = self.problem or (
                f"With the lines that its quoted cell spans, it has more than {MAX_LINE:,} characters."
            )
            raise csv.Error(self.problem)
        return text


def _csv_problem(error: csv.Error, start: int, end: int) -> str:
    lines = f" Lines {start} to {end} are read as one line." if end > start else ""
    if "unexpected end" in str(error):
        return f"A quote in it is never closed.{lines}"
    return f"Its quotes are wrong ({printable(str(error), 80)}); double a quote within a quoted cell.{lines}"


def _no_header(number: int, reason: str) -> CogViewConfigurationError:
    return CogViewConfigurationError(
        f"The first line of the prompts must name the columns, but line {number} cannot be used: {reason}.",
        hint="Name a column 'prompt', and optionally model, size, quality, n, user_id and watermark_enabled.",
    )


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), printable(type(value).__name__, 40))


def read_prompts(source: PromptSource, *, format: PromptFormat | None = None) -> PromptFile:  # noqa: A002
    """Read the prompts of a file or of an iterable.

    Args:
        source: A file, or the prompts themselves as strings and dicts of arguments. A `.txt` file holds one prompt per line,
            `.csv` and `.tsv` a header with the column `prompt` (in any case), `.jsonl` an object or a string on each line. In a
            text file, a line that begins with `#` is a comment; a prompt that begins with it is written with a backslash before.
            Files are UTF-8, with or without a byte order mark. `-` is the standard input.
        format: `txt`, `csv`, `tsv` or `jsonl`. None: taken from the file's extension; `txt` for the standard input.

    Returns:
        The prompts, read while they are iterated over.

    Raises:
        CogViewConfigurationError: Raised on iteration: the file cannot be read, its format is unknown, or its header is wrong.
    """
    return PromptFile(source, format=format)


# --- a copy of the prompts


def can_be_read_once(source: str | Path) -> bool:
    """Return whether a file of prompts is the standard input, a pipe or a device, which give their text only once."""
    if str(source) == "-":
        return True
    try:
        mode = Path(source).expanduser().stat().st_mode
    except (OSError, ValueError, RuntimeError):  # reading it says what is wrong
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def copied_prompts(source: PromptSource, form: PromptFormat | None) -> tuple[str, PromptFormat, Generator[bytes]]:
    """Return a copy of the prompts that gives the same job: each prompt on its line, and what is not valid not valid.

    Args:
        source: A file or a list, which was checked before.
        form: As for `read_prompts`.

    Returns:
        The name of the copy, its format, and its content.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        return file_name(path) or "prompts", format_of(path, form), _blocks(path)
    return "prompts.jsonl", "jsonl", _json_lines(source)


def file_name(source: str | Path) -> str:
    """Return the name of a file of prompts as the manifest has it."""
    return printable(Path(source).name, 200)


def _blocks(path: Path) -> Generator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _json_lines(source: PromptSource) -> Generator[bytes]:
    written = 0
    for line in read_prompts(source):
        text = "null"  # no prompt
        if not line.problem:
            with suppress(ValueError, RecursionError):  # arguments that are not valid
                values = {**line.extra, **to_jsonable_python(line.arguments, fallback=str)}
                text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
        # Blank prompts of the list are blank lines.
        yield b"\n" * (line.number - written - 1) + text.encode("utf-8", "backslashreplace") + b"\n"
        written = line.number


# --- words


def count_text(count: int, what: str) -> str:
    """Return a count with its noun: `1 image`, `1,632 images`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def bullet_list(title: str, items: Iterable[Any]) -> list[str]:
    """Return a title and one line for each of the first twenty items; an empty list if there are none."""
    texts = [str(item) for item in items]
    more = [f"  and {len(texts) - MAX_LISTED:,} more"] if len(texts) > MAX_LISTED else []
    return [f"{title} ({len(texts):,}):", *(f"  {text}" for text in texts[:MAX_LISTED]), *more] if texts else []


def cost_text(cost: Mapping[str, Decimal], unpriced: int = 0, *, sandbox: bool = False) -> str:
    """Return a text such as `0.06 CNY`, or `list price 0.06 CNY, nothing is charged` for the sandbox."""
    known = [money_text(amount, currency) for currency, amount in cost.items()]
    unknown = [f"{count_text(unpriced, 'image')} of unknown price"] if unpriced else []
    amounts = " and ".join(known + unknown)
    if sandbox:
        return f"list price {amounts}, nothing is charged" if amounts else "nothing is charged"
    return amounts or "no cost"
