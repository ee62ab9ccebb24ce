"""How clients end under the reply faults of `tests/faults`: `python -m benchmarks.reliability [--every N]`.

Every client is asked the same of the same server, with a time limit of 2 s and its own default retries, in one run. One judge
for all, from outside: a call is right when it
- ends within the limit and 0.2 s,
- sends no more POSTs than are safe for that fault (as `tests/faults/replies.py` says),
- gives the image's URL where the fault leaves one to be had, and else one of the client's own exceptions,
- and shows neither the key nor a control character nor more than 1,000 characters in that exception's text.
Calls still running after 15 s are counted as over the limit and left to end by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import platform
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tests.faults.replies import REPLIES
from tests.faults.reply_table import KEY, RESULT, ReplyFault
from tests.faults.server import FaultServer

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT, SLACK, PATIENCE = 2.0, 0.2, 15.0
ELSEWHERE = "https://images.invalid/"  # where some faults say that the image is
DATA = "data:"  # stands for an image in the reply itself


@dataclass
class Ended:
    """How one call ended."""

    url: str | None = None
    error: BaseException | None = None
    seconds: float = PATIENCE


def ours(base_url: str) -> Any:
    from langchain_cogview import CogViewImageGenerator

    return CogViewImageGenerator(base_url=base_url, api_key=KEY, timeout=LIMIT, download=False)


def ours_sync(base_url: str) -> str:
    image = ours(base_url).invoke("a kitten").images[0]
    return image.url or (DATA if image.local_bytes() else "")


def ours_async(base_url: str) -> str:
    image = asyncio.run(ours(base_url).ainvoke("a kitten")).images[0]
    return image.url or (DATA if image.local_bytes() else "")


def zai(base_url: str) -> str:
    from zai import ZhipuAiClient

    client = ZhipuAiClient(base_url=base_url, api_key=KEY, timeout=LIMIT)
    image = client.images.generations(model="cogview-4-250304", prompt="a kitten").data[0]
    return image.url or (DATA if image.b64_json else "")


def openai(base_url: str) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key=KEY, timeout=LIMIT)
    image = client.images.generate(model="cogview-4-250304", prompt="a kitten").data[0]
    return image.url or (DATA if image.b64_json else "")


CLIENTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "langchain-cogview, sync": ("langchain_cogview", ours_sync),
    "langchain-cogview, async": ("langchain_cogview", ours_async),
    "zai-sdk": ("zai", zai),
    "openai": ("openai", openai),
}


def ended(call: Callable[[str], str], base_url: str) -> Ended:
    """Run a call in a thread of its own, for at most `PATIENCE` seconds."""
    outcome = Ended()

    def run() -> None:
        began = time.monotonic()
        try:
            outcome.url = call(base_url)
        except BaseException as error:
            outcome.error = error
        outcome.seconds = time.monotonic() - began

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return Ended(outcome.url, outcome.error, outcome.seconds)


def wrong(fault: ReplyFault, server: FaultServer, outcome: Ended, package: str) -> list[str]:
    """What was wrong with how a call ended."""
    found = []
    if outcome.seconds > LIMIT + SLACK:
        found.append("over the time limit")
    if server.posts > fault.posts[1]:
        found.append("too many POSTs")
    if outcome.error is None:
        if RESULT not in fault.expected or not (outcome.url or "").startswith((server.origin, ELSEWHERE, DATA)):
            found.append("rubbish as a result")
        return found
    text = str(outcome.error)
    if fault.expected == (RESULT,):
        found.append("image lost")
    if not type(outcome.error).__module__.startswith(package):
        found.append("foreign exception")
    if KEY.split(".")[1] in text:
        found.append("key shown")
    if len(text) > 1000 or not text.replace("\n", "").isprintable():
        found.append("long or unprintable text")
    return found


def measure(client: str, faults: list[ReplyFault]) -> dict[str, Any]:
    """One client against all faults, eight at a time: most of the time is waiting."""
    package, call = CLIENTS[client]

    def one(fault: ReplyFault) -> tuple[list[str], int, float]:
        server = FaultServer(fault.fault)
        try:
            outcome = ended(call, server.base_url)
            return wrong(fault, server, outcome, package), server.posts, outcome.seconds
        finally:
            with contextlib.suppress(RuntimeError):  # a call that was left running still holds the server
                server.close()

    with ThreadPoolExecutor(8) as executor:
        rows = list(executor.map(one, faults))
    return {
        "right": sum(not problems for problems, _, _ in rows),
        "posts": sum(posts for _, posts, _ in rows),
        "slowest": max(seconds for _, _, seconds in rows),
        "problems": Counter(problem for problems, _, _ in rows for problem in problems),
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, help="take every N-th fault")
    every = parser.parse_args().every
    faults = [
        fault
        for fault in REPLIES.values()
        if fault.base_url is None and fault.resolve is None and fault.tls is None and not fault.download
    ][::every]
    packages = ", ".join(f"{name} {version(name)}" for name in ("langchain-cogview", "zai-sdk", "openai"))
    print(f"{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, {platform.machine()}; {packages}")
    print(f"\n| client | right, of {len(faults)} | POSTs | slowest call | what was wrong |\n|---|---|---|---|---|")
    for client in CLIENTS:
        got = measure(client, faults)
        problems = ", ".join(f"{problem} {count}" for problem, count in got["problems"].most_common())
        slowest = f"over {PATIENCE:g} s" if got["slowest"] >= PATIENCE else f"{got['slowest']:.1f} s"
        print(f"| {client} | {got['right']} | {got['posts']} | {slowest} | {problems or 'nothing'} |", flush=True)


if __name__ == "__main__":
    main()
