"""What the shell offers as values of the options: models, sizes, qualities and regions."""

from __future__ import annotations

from typing import Any, Final

import typer  # noqa: TC002  typer reads the annotation of the context

from langchain_cogview.catalog import DEFAULT_MODEL, MODELS, model_info

_SIZE_WORDS: Final = ("square", "portrait", "landscape", "widescreen")


def complete_model(incomplete: str) -> list[str]:
    """List models.

    Args:
        incomplete: The beginning of the value.

    Returns:
        Names that begin with it.
    """
    return _beginning_with(incomplete, MODELS)


def complete_size(ctx: typer.Context, incomplete: str) -> list[str]:
    """List the documented sizes of the model that is chosen, and words for sizes.

    Args:
        ctx: The command line so far.
        incomplete: The beginning of the value.

    Returns:
        Sizes that begin with it.
    """
    return _beginning_with(incomplete, (*model_info(_model(ctx)).sizes, *_SIZE_WORDS))


def complete_quality(ctx: typer.Context, incomplete: str) -> list[str]:
    """List the qualities of the model that is chosen.

    Args:
        ctx: The command line so far.
        incomplete: The beginning of the value.

    Returns:
        Qualities that begin with it.
    """
    return _beginning_with(incomplete, model_info(_model(ctx)).qualities)


def complete_region(incomplete: str) -> list[str]:
    """List the regions.

    Args:
        incomplete: The beginning of the value.

    Returns:
        Regions that begin with it.
    """
    return _beginning_with(incomplete, ("china", "international"))


def _model(ctx: Any) -> str:
    return str(ctx.params.get("model") or DEFAULT_MODEL)


def _beginning_with(incomplete: str, values: Any) -> list[str]:
    return [value for value in values if value.startswith(incomplete.lower())]
