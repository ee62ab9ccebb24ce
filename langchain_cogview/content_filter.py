"""What the provider's content filter says of a prompt or a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

Stage = Literal["prompt", "picture", "history", "other"]

_STAGES: Final[dict[str, Stage]] = {"user": "prompt", "assistant": "picture", "history": "history"}
_MEANINGS: Final = {0: "most severe", 1: "severe", 2: "moderate", 3: "mildest"}


@dataclass(frozen=True, slots=True)
class ContentFilter:
    """One entry of the filter, as the service sends it in `content_filter`.

    Attributes:
        role: What was judged: `user` the prompt, `assistant` the picture, `history` earlier turns; others may come.
            None where the service left it out.
        level: 0 is the most severe, 3 the mildest. None where the service left it out.
    """

    role: str | None = None
    level: int | None = None

    @property
    def stage(self) -> Stage:
        """What was judged: the prompt, the picture, earlier turns, or something else."""
        return _STAGES.get(self.role or "", "other")

    @property
    def severity(self) -> str:
        """The level in words."""
        return _MEANINGS.get(-1 if self.level is None else self.level, "unknown")

    def __str__(self) -> str:
        level = "level unknown" if self.level is None else f"level {self.level}, {self.severity}"
        return f"{self.stage} ({level})"


def most_severe(entries: tuple[ContentFilter, ...]) -> ContentFilter | None:
    """The entry with the lowest level; one without a level counts as the mildest. None of none."""
    return min(entries, key=lambda entry: 99 if entry.level is None else entry.level, default=None)


def read_entries(value: Any) -> tuple[ContentFilter, ...]:
    """Read `content_filter` of a reply, whatever it holds. An entry that tells nothing is left out."""
    found = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict):
            continue
        role, level = item.get("role"), item.get("level")
        if isinstance(level, str) and level.strip().isdecimal() and len(level) < 4:  # noqa: PLR2004
            level = int(level)
        if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= 99:  # noqa: PLR2004
            level = None
        role = "".join(c for c in role if c.isprintable())[:32] if isinstance(role, str) else None
        if role or level is not None:
            found.append(ContentFilter(role=role or None, level=level))
    return tuple(found[:32])
