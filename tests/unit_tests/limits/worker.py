"""One process of the tests on disturbances: makes images until it is asked to stop, and prints what became of them."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading

from langchain_cogview import CogViewImageGenerator


async def main(url: str, shared: str, limit: int) -> None:
    generator = CogViewImageGenerator(
        base_url=url, api_key="any", shared_limit=shared, max_concurrency=limit, download=False, timeout=600
    )
    print("ready", flush=True)
    sys.stdin.readline()
    stopped = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), stopped.set()), daemon=True).start()
    made, lost = 0, []

    async def generate() -> None:
        nonlocal made
        while not stopped.is_set():
            try:
                await generator.ainvoke("a kitten")
                made += 1
            except Exception as error:
                lost.append(repr(error))

    await asyncio.gather(*(generate() for _ in range(2 * limit)))
    print(json.dumps({"made": made, "lost": lost}), flush=True)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
