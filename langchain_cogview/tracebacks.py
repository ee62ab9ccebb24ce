"""Short tracebacks in IPython and Jupyter: the frames of the user's own code, and the message last."""

from __future__ import annotations

import sys
import traceback
from itertools import dropwhile
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

_LIBRARIES: Final = ("langchain", "langgraph")
_HIDDEN: Final = frozenset(
    {"IPython", "ipykernel", "pydantic", "pydantic_core", "tenacity", "httpx", "httpcore", "anyio"}
)
_CONTEXT: Final = 5
_CAUSE_CHARACTERS: Final = 200


def short_traceback(error: BaseException) -> list[str]:
    """Render the traceback of an error as IPython does, without the frames of libraries and without chained exceptions.

    The exception itself is unchanged, so that a debugger has all frames. `%xmode Verbose` shows them in IPython as well.

    Args:
        error: The error.

    Returns:
        Parts of the traceback, in the form that IPython expects.
    """
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    renderer = getattr(shell, "InteractiveTB", None)
    if renderer is None:
        return traceback.format_exception(error)
    if renderer.mode == "Verbose" or not renderer.skip_hidden:
        return list(renderer.structured_traceback(type(error), error, error.__traceback__))
    frames = list(_frames(error.__traceback__))
    if any(not _is_library(frame) for frame in frames):  # before them there is only the frame of IPython
        frames = list(dropwhile(_is_library, frames))
    shown = [frame for frame in frames if not _is_library(frame)] or frames[:1]
    # The first frame is the cell, and the last one is where the user's code called this package.
    shown = shown if len(shown) == 1 else [shown[0], shown[-1]]
    cause, notes = error.__cause__, len(getattr(error, "__notes__", ()))
    context = 1 if len(shown) > 1 else max(1, _CONTEXT - 2 * (notes + (cause is not None)))
    chain = error.__cause__, error.__context__, error.__suppress_context__
    try:
        error.__cause__, error.__context__, error.__suppress_context__ = None, None, True
        parts = list(renderer.structured_traceback(type(error), error, _joined(shown), 0, context))
    finally:
        error.__cause__, error.__context__, error.__suppress_context__ = chain
    hidden = len(frames) - len(shown)
    omitted = []
    if hidden:
        what = "1 frame is" if hidden == 1 else f"{hidden} frames are"
        omitted.append(f"[{what} hidden: %xmode Verbose and then %tb show {'it' if hidden == 1 else 'them'}]")
    if cause is not None:
        omitted.append(f"[Caused by {_described(cause)}]")
    position = len(parts) - 1 - notes
    parts[position:position] = omitted
    return parts


def _described(cause: BaseException) -> str:
    try:
        return printable(f"{type(cause).__name__}: {cause}", _CAUSE_CHARACTERS)
    except Exception:  # noqa: BLE001  the class of another library makes the text
        return type(cause).__name__


def _frames(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _is_library(trace: TracebackType) -> bool:
    module = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return module.startswith(_LIBRARIES) or module in _HIDDEN or module in sys.stdlib_module_names


def _joined(traces: list[TracebackType]) -> TracebackType | None:
    joined: TracebackType | None = None
    for trace in reversed(traces):
        joined = TracebackType(joined, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)
    return joined
