"""Show the examples of docstrings as code: griffe knows `>>>` only in a section called `Examples`."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^[ ]*>>>.*\n?)(?:^[ ]*\S.*\n?)*", re.MULTILINE)


class Examples(griffe.Extension):
    """Puts a fence around each example."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)


def fenced(example: re.Match[str]) -> str:
    """The example within a fence, with its indentation."""
    indent = re.match(r" *", example[0])[0]  # type: ignore[index]
    return f"{indent}```pycon\n{example[0].rstrip()}\n{indent}```\n"
