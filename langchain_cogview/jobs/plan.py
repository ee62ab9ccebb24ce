"""What a job would do: the prompts checked, matched with what its folder tells of the work so far, counted and priced."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pydantic import ValidationError

from langchain_cogview.api.settings import is_sandbox
from langchain_cogview.catalog import money_text
from langchain_cogview.errors import CogViewConfigurationError, CogViewInvalidRequestError, printable
from langchain_cogview.jobs.prompts import PromptFormat, PromptSource, read_prompts
from langchain_cogview.request import ImageRequest, describe_validation
from langchain_cogview.text import visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from decimal import Decimal
    from pathlib import Path

    from langchain_cogview.generator import CogViewImageGenerator

SETTINGS: Final = ("model", "size", "quality", "n", "user_id", "watermark_enabled")
_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a line is not valid.

    Attributes:
        line: Its number.
        text: What is wrong with it.
    """

    line: int
    text: str

    def __str__(self) -> str:
        return f"Line {self.line}: {printable(self.text, 1000)}"


@dataclass(frozen=True, slots=True)
class UnknownAttempt:
    """A paid request of which nothing tells what became of it: it may have been charged.

    Attributes:
        line: Of the prompt.
        prompt: Its beginning, in one line.
        request_id: Ours; quote it to the provider.
    """

    line: int
    prompt: str
    request_id: str

    def __str__(self) -> str:
        return f"Line {self.line}: request id {self.request_id}: {printable(self.prompt)}"


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What a job would do. Nothing was sent or written for it.

    Attributes:
        lines: Lines with a prompt, good or not.
        blank: Lines without anything.
        problems: Lines that are not valid, by number.
        duplicates: Numbers of the lines that say the same as one before them.
        unique: Whether those are left out.
        notes: What else to know.
        done: Prompts whose pictures are all there.
        blocked: Prompts that the content filter blocked, and that are not repeated.
        failed: Prompts that failed otherwise, and that are not repeated.
        unknown: Requests that may have been charged; repeated only with `retry_unknown`.
        recovered: Pictures found in the folder, or under way at the service, that the manifest does not have: free.
        prompts: Those to be drawn now.
        pictures: How many that makes.
        cost: Their list price, by currency.
        unpriced: How many of them have no known price.
    """

    lines: int
    blank: int
    problems: tuple[Problem, ...]
    duplicates: tuple[int, ...]
    unique: bool
    notes: tuple[str, ...]
    done: int
    blocked: int
    failed: int
    unknown: tuple[UnknownAttempt, ...]
    recovered: int
    prompts: int
    pictures: int
    cost: Mapping[str, Decimal]
    unpriced: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        return plain | {
            "problems": [{"line": each.line, "text": each.text} for each in self.problems],
            "unknown": [unknown_dict(each) for each in self.unknown],
            "cost": {currency: str(amount) for currency, amount in self.cost.items()},
        }

    def __str__(self) -> str:
        found = f"{counted(self.lines, 'line')} with a prompt"
        found += f", {counted(self.blank, 'blank line')} skipped" if self.blank else ""
        old = [
            f"{count} {word}"
            for count, word in ((self.done, "done"), (self.blocked, "blocked"), (self.failed, "failed"))
            if count
        ]
        found += f"; {', '.join(old)} before" if old else ""
        return visible(
            "\n".join(
                (
                    f"{found}.",
                    *listed("Not valid", self.problems),
                    *self.warnings(),
                    f"To generate: {counted(self.prompts, 'prompt')}, {self._amount()}.",
                )
            )
        )

    def _amount(self) -> str:
        return f"{counted(self.pictures, 'picture')}, {money(self.cost, self.unpriced)}"

    def warnings(self) -> list[str]:
        """What the sender should know before anything is sent, a line each."""
        lines = list(self.notes)
        if self.duplicates:
            shown = ", ".join(map(str, self.duplicates[:_SHOWN])) + (", ..." if len(self.duplicates) > _SHOWN else "")
            lines.append(
                f"{counted(len(self.duplicates), 'duplicate line')} (the same as one before): {shown}. "
                + ("They are left out." if self.unique else "Each is generated and paid for, unless unique=True.")
            )
        if self.recovered:
            lines.append(
                f"{counted(self.recovered, 'picture')} paid for before will be recovered without paying again."
            )
        if self.unknown:
            lines += listed("May have been charged, and repeated only with retry_unknown=True", self.unknown)
        return lines


def unknown_dict(each: UnknownAttempt) -> dict[str, Any]:
    """Plain JSON."""
    return {"line": each.line, "prompt": each.prompt, "request_id": each.request_id}


def counted(count: int, what: str) -> str:
    """`1 picture`, `1,632 pictures`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def money(cost: Mapping[str, Decimal], unpriced: int = 0) -> str:
    """`0.06 CNY`; what has no price is told beside."""
    known = [money_text(amount, currency) for currency, amount in cost.items()]
    unknown = [f"{counted(unpriced, 'picture')} of unknown price"] if unpriced else []
    return " and ".join(known + unknown) or "no cost"


def listed(title: str, items: Iterable[Any]) -> list[str]:
    """A title and a line for each, the first twenty of them."""
    texts = [str(each) for each in items]
    more = [f"  and {len(texts) - _SHOWN:,} more"] if len(texts) > _SHOWN else []
    return [f"{title} ({len(texts):,}):", *(f"  {text}" for text in texts[:_SHOWN]), *more] if texts else []


@dataclass(frozen=True, slots=True)
class PromptItem:
    """One prompt of a job.

    Attributes:
        number: Its line.
        key: Of its whole arguments, and of which one it is among those that say the same.
        said: The arguments that it says for itself, checked.
        extra: What else stands in its line.
        model: Which model is asked.
        n: How many pictures.
    """

    number: int
    key: str
    said: dict[str, Any]
    extra: dict[str, Any] | None
    model: str
    n: int


@dataclass
class PromptList:
    """The prompts of a job, checked.

    Attributes:
        items: Those that can be drawn, in their order.
        lines: Lines with a prompt, good or not.
        blank: Lines without anything.
        problems: Of the lines that are not valid.
        duplicates: Numbers of lines that say the same as one before.
        unique: Whether those are left out.
        notes: What else to know.
    """

    items: list[PromptItem] = field(default_factory=list)
    lines: int = 0
    blank: int = 0
    problems: list[Problem] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)
    unique: bool = False
    notes: list[str] = field(default_factory=list)

    def refuse_problems(self) -> None:
        """Raise where a line is not valid.

        Raises:
            CogViewInvalidRequestError: With every such line, the first twenty by what is wrong with them.
        """
        if not self.problems:
            return
        verb = "is" if len(self.problems) == 1 else "are"
        bad = f"{counted(len(self.problems), 'line')} of {self.lines:,} {verb} not valid; nothing was sent."
        error = CogViewInvalidRequestError(bad, hint="Fix them, or leave them out with skip_bad=True.")
        for line in listed("Not valid", self.problems)[1:]:
            error.add_note(line.strip())
        raise error


def checked_prompts(
    source: PromptSource,
    defaults: Mapping[str, Any],
    *,
    format: PromptFormat | None,  # noqa: A002
    unique: bool,
) -> PromptList:
    """Read and check all prompts of a source.

    Raises:
        CogViewConfigurationError: As `read_prompts`.
    """
    found = PromptList(unique=unique)
    file = read_prompts(source, format=format)
    seen: Counter[str] = Counter()
    warned: dict[str, None] = {}
    for line in file:
        found.lines += 1
        if line.problem:
            found.problems.append(Problem(line.number, line.problem))
            continue
        try:
            request = ImageRequest.model_validate({**defaults, **line.arguments})
        except ValidationError as error:
            found.problems.append(Problem(line.number, describe_validation(error)))
            continue
        warned |= dict.fromkeys(request.warnings)
        digest = _digest(request)
        seen[digest] += 1
        if seen[digest] > 1:
            found.duplicates.append(line.number)
            if unique:
                continue
        key = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        said = {name: getattr(request, name) for name in line.arguments}
        found.items.append(PromptItem(line.number, key, said, line.extra or None, request.model, request.n))
    found.blank, found.notes = file.blank, [*file.notes, *warned]
    return found


def _digest(request: ImageRequest) -> str:
    return hashlib.sha256(json.dumps(drawn_arguments(request), sort_keys=True).encode()).hexdigest()[:32]


def drawn_arguments(request: ImageRequest) -> dict[str, Any]:
    """All arguments, with the model's defaults where none was said."""
    return request.model_dump() | {"size": request.resolved_size, "quality": request.resolved_quality}


def job_settings(generator: CogViewImageGenerator) -> dict[str, Any]:
    """What holds for every prompt of a job: another value is another job."""
    base_url = generator.resolved_base_url
    parts = urlsplit(base_url)
    service = "sandbox" if is_sandbox(base_url) else f"{parts.scheme}://{parts.netloc}"
    return {**{name: getattr(generator, name) for name in SETTINGS}, "service": service}


def refuse_other_settings(folder: Path, begun: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> None:
    """Raise where a folder's job was begun with other arguments.

    Raises:
        CogViewConfigurationError: With those that differ.
    """
    if begun is None:
        return
    names = [name for name in {**settings, **begun} if begun.get(name) != settings.get(name)]
    if names:
        said = "; ".join(
            f"{name} was {_shown(begun.get(name))} and is now {_shown(settings.get(name))}" for name in names
        )
        raise CogViewConfigurationError(
            f"The job in {printable(str(folder), 120)} was begun with other arguments; nothing was sent. {said}.",
            hint="Go on with those arguments, or choose another folder.",
        )


def _shown(value: Any) -> str:
    return "not set" if value is None else printable(repr(value), 100)
