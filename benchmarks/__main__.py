"""How fast, beside the peers, in one run: `python -m benchmarks [--only NAME ...] [--rounds N] [--quick]`.

On loopback, against a stub in a process of its own (`benchmarks.stub`). Every measurement is made in a new process; the clients
take turns within a round, figures are medians over the rounds, and a ratio is the median of the rounds' own ratios. Prints
Markdown. CPU time is that of the asking process alone: it says more than the clock where other work runs on the same machine.
For one call the clients take turns in one process, in many short rounds. Needs the extra `benchmark` for the peers; what is not
installed is left out and named.

Peers: bare httpx and aiohttp (one shared client, pool as large as asked for); `by hand`, the least that an expert would write
around that httpx client as a BaseTool or a Runnable; zai-sdk and openai, sync ones in as many threads; langchain-community's
DALL-E tool. They give a link, so ours is asked with `download=False` where they are compared. `bare asyncio` has no HTTP
library: it shows what an event loop can do.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from benchmarks.measures import fresh

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = {
    "our_abatch": "**langchain-cogview, `abatch`**",
    "our_astream_many": "**langchain-cogview, `astream_many`**",
    "our_astream_many_with_handler": "**langchain-cogview, `astream_many`** with a callback handler",
    "our_stream_many": "**langchain-cogview, `stream_many`**",
    "our_batch": "**langchain-cogview, `batch`**",
    "our_generator_sync": "**langchain-cogview, `generator.invoke`**",
    "our_generator_async": "**langchain-cogview, `generator.ainvoke`**",
    "our_tool_sync": "**langchain-cogview, `tool.invoke(ToolCall)`**",
    "our_tool_async": "**langchain-cogview, `tool.ainvoke(ToolCall)`**",
    "httpx_sync": "httpx",
    "httpx_async": "httpx, async",
    "httpx_at_once": "httpx, async, its defaults",
    "httpx_streamed": "httpx, async, streamed to files; neither hash nor check",
    "httpx_kept": "httpx, async, `.content` kept in memory",
    "aiohttp_async": "aiohttp",
    "zai_sync": "zai-sdk",
    "openai_sync": "openai",
    "openai_async": "openai, async",
    "dalle_sync": "langchain-community's DALL-E tool",
    "hand_tool_sync": "tool by hand",
    "hand_tool_async": "tool by hand, async",
    "hand_runnable_sync": "Runnable by hand",
    "hand_runnable_async": "Runnable by hand, async",
    "by_hand_batch": "Runnable by hand, `batch`",
    "langchain_abatch": "LangChain's `abatch`, `max_concurrency` in the config",
    "bare_asyncio": "bare asyncio",
}
missing: set[str] = set()


class Rounds:
    """The figures of one table: clients by name, each with what its rounds gave."""

    def __init__(self, names: list[str], rounds: int, measure: Callable[[str], dict[str, Any]]) -> None:
        self.reported: dict[str, list[dict[str, Any]]] = {}
        self.unfinished: dict[str, str] = {}
        for _ in range(rounds):
            for name in names:
                if name in self.unfinished:
                    continue
                reported = measure(name)
                if "missing" in reported:
                    missing.add(reported["missing"])
                elif "unfinished" in reported:
                    self.unfinished[name] = f"not done in {reported['unfinished']:.0f} s"
                    self.reported.pop(name, None)
                else:
                    self.reported.setdefault(name, []).append(reported)

    def median(self, name: str, figure: str) -> float:
        return statistics.median(reported[figure] for reported in self.reported[name])

    def ratio(self, name: str, to: str, figure: str) -> float:
        pairs = zip(self.reported[name], self.reported[to], strict=True)
        return statistics.median(one[figure] / other[figure] for one, other in pairs)

    def __iter__(self) -> Any:
        return iter(self.reported)


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n**{title}**\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


# --- the figures


def in_bulk(rounds: int, *, quick: bool) -> None:
    """Many in flight: share of the ideal time, new connections and CPU per call."""
    points = (
        [(4, 0.05, 2, 2)]
        if quick
        else [(16, 0.05, 10, 3), (64, 0.05, 6, 3), (256, 0.05, 4, 3), (200, 1.0, 2, 1), (200, 5.0, 2, 1)]
    )
    names = [
        "our_abatch", "our_astream_many", "httpx_async", "hand_tool_async", "zai_sync", "openai_async", "aiohttp_async",
        "bare_asyncio",
    ]  # fmt: skip
    found = {
        point: Rounds(
            names,
            rounds,
            lambda name, p=point: fresh("bulk", client=name, slots=p[0], seconds=p[1], waves=p[2], warm=p[3]),
        )
        for point in points
    }
    rows = [
        [
            NAMES[name],
            *(
                f"{item.median(name, 'share'):.0%}, {item.median(name, 'connections'):.2f}, "
                f"{item.median(name, 'cpu_us'):.0f} µs"
                if name in item.reported
                else item.unfinished.get(name, "–")
                for item in found.values()
            ),
        ]
        for name in names
    ]
    head = [f"{slots} in flight, {seconds:g} s" for slots, seconds, _, _ in points]
    table("Share of the ideal time, new connections and CPU per call", ["", *head], rows)


def at_once(rounds: int, *, quick: bool) -> None:
    """What happens without a number: 1,000 prompts, and 48."""
    count, seconds, slots = (20, 0.05, 5) if quick else (1000, 1.0, 100)
    found = Rounds(
        ["our_abatch", "httpx_at_once"],
        1,
        lambda name: fresh("unbounded", client=name, count=count, seconds=seconds, slots=slots),
    )
    rows = [
        [
            NAMES[name],
            f"{found.median(name, 'failed'):.0f}",
            f"{found.median(name, 'over'):.2f}" if name == "our_abatch" else "–",
        ]
        for name in found
    ]
    title = f"{count:,} prompts at once, {seconds:g} s each, no `max_concurrency` in the config"
    table(title, ["", "errors", f"time over the ideal of the generator's {slots} in flight"], rows)

    seconds = 0.05 if quick else 1.0
    found = Rounds(["our_batch", "by_hand_batch"], rounds, lambda name: fresh("batch_48", client=name, seconds=seconds))
    rows = [[NAMES[name], f"{found.median(name, 'seconds'):.2f} s"] for name in found]
    table(f"`batch` of 48 calls of {seconds:g} s, 48 allowed, nothing in the config", ["", "time"], rows)

    pause = 0.1 if quick else 20.0
    names = ["our_generator_sync", "our_generator_async", "httpx_sync", "httpx_async", "zai_sync"]
    found = Rounds(names, 1, lambda name: fresh("apart", client=name, pause=pause))
    rows = [[NAMES[name], f"{found.median(name, 'connections'):.0f}"] for name in found]
    table(f"Connections of two calls {pause:g} s apart", ["", "connections"], rows)


def machinery(rounds: int, *, quick: bool) -> None:
    """Runs that sleep in place of a request."""
    counts, slots = ((100, 200), 20) if quick else ((1000, 10_000), 256)
    names = ["our_astream_many", "our_abatch", "our_astream_many_with_handler", "langchain_abatch"]
    found = [
        Rounds(names, rounds, lambda name, n=count: fresh("machinery", client=name, count=n, slots=slots))
        for count in counts
    ]
    rows = [
        [
            NAMES[name],
            *(
                f"{item.median(name, 'mb'):.1f} MB, {item.median(name, 'share'):.0%}, {item.median(name, 'lag_ms'):.0f} ms"
                for item in found
            ),
        ]
        for name in names
    ]
    head = [f"{count:,} inputs" for count in counts]
    title = f"Runs that sleep 50 ms in place of a request, {slots} in flight: memory, share of ideal, longest lag"
    table(title, ["", *head], rows)


def images(rounds: int, *, quick: bool) -> None:
    """Made and saved."""
    count, slots = (4, 2) if quick else (200, 16)
    names = ["our_astream_many", "our_stream_many", "httpx_streamed", "httpx_kept"]
    found = Rounds(names, rounds, lambda name: fresh("images", client=name, count=count, slots=slots))
    rows = [
        [
            NAMES[name],
            f"{found.median(name, 'mb'):.0f} MB",
            f"{found.median(name, 'cpu_ms'):.1f} ms",
            f"{found.ratio(name, 'httpx_streamed', 'cpu_ms'):.2f}",
        ]
        for name in found
    ]
    title = f"{count} images of 3 MB, {slots} in flight, made and saved; ours with hash and wholeness check"
    table(title, ["", "memory above the start", "CPU each", "CPU over streamed httpx"], rows)


def start(rounds: int, *, quick: bool) -> None:
    """Before the first call."""
    names = {
        "import": "**`import langchain_cogview`**, above `BaseTool`",
        "tool": "**the same and `CogViewImageTool()`**",
        "zai": "`import zai`",
        "openai": "`import openai`",
        "dalle": "langchain-community's DALL-E tool and its wrapper, imported and made",
    }
    found = Rounds(list(names), 2 * rounds + 1, lambda name: fresh("start", what=name))
    rows = [[names[name], f"{found.median(name, 'ms'):.1f} ms"] for name in found]
    count = 10 if quick else 1000
    made = Rounds(["construct"], rounds, lambda name: fresh(name, count=count))
    others = Rounds(["httpx_clients"], rounds, lambda name: fresh(name, count=min(count, 50)))
    for name, item, text in (
        ("construct", made, f"**a `CogViewImageGenerator`, of {count:,}**"),
        ("httpx_clients", others, "an `httpx.Client`"),
    ):
        rows.append([text, f"{item.median(name, 'ms'):.2f} ms"])
    table("Before the first call", ["", "time"], rows)
    reported = found.reported["tool"][0]
    one = made.reported["construct"][0]
    print(
        f"\nHeavy modules loaded by the tool: {', '.join(reported['heavy']) or 'none'}. {count:,} generators made ",
        end="",
    )
    print(f"{one['contexts']} SSL contexts and opened {one['opened']} files.")


def one_call(rounds: int, *, quick: bool) -> None:
    """CPU of one call beside bare httpx."""
    rounds, calls = (2, 5) if quick else (100 * rounds, 5)
    rows = []
    for names in (
        ["httpx_sync", "our_generator_sync", "our_tool_sync", "hand_runnable_sync", "hand_tool_sync", "zai_sync",
         "openai_sync", "dalle_sync"],
        ["httpx_async", "our_generator_async", "our_tool_async", "hand_runnable_async", "hand_tool_async",
         "openai_async", "aiohttp_async"],
    ):  # fmt: skip
        reported = fresh("per_call", names=names, rounds=rounds, calls=calls)
        missing.update(reported["missing"])
        bare = reported["us"][names[0]]
        for name, times in reported["us"].items():
            ratio = statistics.median(one / other for one, other in zip(times, bare, strict=True))
            rows.append([NAMES[name], f"{statistics.median(times):.0f} µs", f"{ratio:.2f}"])
    table("One call without latency, warm: CPU", ["", "CPU", "over bare httpx"], rows)


FIGURES = {item.__name__: item for item in (in_bulk, at_once, machinery, images, start, one_call)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FIGURES, metavar="NAME", help=f"of {', '.join(FIGURES)}")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few calls each: to see that it runs, not how fast")
    arguments = parser.parse_args()
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    )
    print(", ".join(f"{name} {_version(name)}" for name in ("langchain-core", "httpx", "aiohttp", "zai-sdk", "openai")))
    reported = fresh("ceiling", slots=16, calls=160 if arguments.quick else 16_000)
    print(f"The stub answers {reported['per_second']:,.0f} requests a second (16 raw sockets).")
    for name in arguments.only or FIGURES:
        FIGURES[name](1 if arguments.quick else arguments.rounds, quick=arguments.quick)
    if missing:
        print(f"\nNot installed, and left out: {', '.join(sorted(missing))}.")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


if __name__ == "__main__":
    main()
