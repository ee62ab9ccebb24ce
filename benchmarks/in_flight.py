"""Many images from an account that allows few at once: time against the ideal, and requests that were refused.

    python -m benchmarks.in_flight

The service is the sandbox on a port of this machine, with a limit in flight, in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time

import httpx

from langchain_cogview import CogViewImageGenerator

IMAGES = 200
LIMIT = 5


def measured(way: str, base_url: str, latency: float, max_concurrency: int | None) -> tuple[float, int, int]:
    """Seconds, images that were lost, and requests that were sent again."""
    from langchain_core.callbacks import BaseCallbackHandler

    class Retries(BaseCallbackHandler):
        count = 0

        def on_custom_event(self, name: str, data: object, **kwargs: object) -> None:
            self.count += name == "cogview.retry"

    retries = Retries()
    generator = CogViewImageGenerator(base_url=base_url, api_key="any", max_concurrency=max_concurrency, download=True)
    prompts = [f"an image of {latency} {number}" for number in range(IMAGES)]
    config = {"callbacks": [retries]}
    start = time.perf_counter()
    if way == "sync":
        results = generator.batch(prompts, config, return_exceptions=True)
    else:
        results = asyncio.run(generator.abatch(prompts, config, return_exceptions=True))
    seconds = time.perf_counter() - start
    return seconds, sum(isinstance(result, Exception) for result in results), retries.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.5, help="seconds for each image (default: %(default)s)")
    latency = parser.parse_args().latency
    print(f"{IMAGES} images, {LIMIT} allowed in flight, {latency} s each; httpx {httpx.__version__}\n")
    print("| max_concurrency | way | share of ideal | lost | sent again |")
    print("|---|---|---|---|---|")
    for max_concurrency in (None, 8, 20):
        for way in ("sync", "async"):
            command = [sys.executable, "-m", "langchain_cogview.sandbox", "--port", "0", "--latency", str(latency)]
            server = subprocess.Popen([*command, "--in-flight-limit", str(LIMIT)], stdout=subprocess.PIPE, text=True)
            try:
                base_url = next(word for word in server.stdout.readline().split() if word.startswith("http://"))
                seconds, lost, again = measured(way, base_url, latency, max_concurrency)
            finally:
                server.terminate()
                server.wait()
            ideal = IMAGES / LIMIT * latency
            cap = max_concurrency or "the catalog's 5"
            print(f"| {cap} | {way} | {ideal / seconds:.0%} | {lost} | {again} ({again / (IMAGES + again):.1%}) |")


if __name__ == "__main__":
    main()
