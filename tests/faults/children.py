"""What the process tests run in processes of their own: `python -m tests.faults.children NAME ARGUMENTS`.

Each prints one line of JSON. The key comes by the environment, as it would for a user.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from langchain_cogview import CogViewImageGenerator
from langchain_cogview.errors import CogViewStorageError
from tests.faults.tokens import token

LIMIT = 200
"""Time limit of a call in seconds; only what hangs needs it."""


def right(generator: CogViewImageGenerator, prompt: str, *, native: bool) -> bool:
    """Whether a call gets the image of its own prompt."""
    result = asyncio.run(generator.ainvoke(prompt)) if native else generator.invoke(prompt)
    return token(prompt) in result.images[0].url


def fork(base_url: str, forks: str, calls: str) -> None:
    """Children of a process with open connections, each of them and the parent calling at the same time."""
    generator = CogViewImageGenerator(base_url=base_url, download=False, timeout=LIMIT, max_retries=0)
    wrong = 0
    for round_ in range(int(forks)):
        wrong += not right(generator, f"parent {round_}", native=False)
        wrong += not right(generator, f"parent {round_} async", native=True)
        pid = os.fork()
        if pid == 0:
            failed = 1
            try:
                failed = any(
                    not right(generator, f"child {round_} {n}", native=n % 2 == round_ % 2) for n in range(int(calls))
                )
            finally:
                os._exit(int(failed))
        for n in range(5):
            wrong += not right(generator, f"parent {round_} beside {n}", native=False)
        wrong += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    generator.close()
    print(json.dumps({"wrong": wrong}))


def spawn(base_url: str) -> None:
    """A generator that is sent to a process started afresh."""
    generator = CogViewImageGenerator(base_url=base_url, download=False, timeout=LIMIT)
    generator.invoke("warm")
    try:
        packed = pickle.dumps(generator)
    except Exception as exc:
        print(json.dumps({"refused": type(exc).__name__, "text": str(exc)}))
        return
    key = os.environ["ZHIPUAI_API_KEY"]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        url = pool.submit(generator.invoke, "elsewhere").result(LIMIT).images[0].url
    generator.close()
    print(json.dumps({"key": key.encode() in packed, "right": token("elsewhere") in url}))


def interrupted(base_url: str, how: str) -> None:
    """One call that is interrupted from outside; the interrupt is reported and nothing else is done."""
    # A test run in the background of a shell inherits that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    generator = CogViewImageGenerator(base_url=base_url, timeout=1000)
    try:
        if how == "sync":
            generator.invoke("a kitten")
        else:
            asyncio.run(generator.ainvoke("a kitten"))
    except KeyboardInterrupt:
        print(json.dumps({"interrupted": True}), flush=True)
        raise
    print(json.dumps({"interrupted": False}))


def all_ways(base_url: str, folder: str, closing: str) -> None:
    """Sync, async and batch calls, once with the connections closed at the end and once with the process just ending."""
    # That the machine is busy is no news: the development mode tells of each step that takes long.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    generator = CogViewImageGenerator(base_url=base_url, output_dir=folder, timeout=LIMIT)
    done = [generator.invoke("one"), asyncio.run(generator.ainvoke("two")), *generator.batch(["three", "four"])]
    done += asyncio.run(generator.abatch(["five", "six"]))

    async def twice() -> list[Any]:
        own = CogViewImageGenerator(base_url=base_url, timeout=LIMIT)
        results = [await own.ainvoke("seven"), *await own.abatch(["eight", "nine"])]
        if closing == "closed":
            await own.aclose()
        return results

    done += asyncio.run(twice())
    if closing == "closed":
        generator.close()
    del generator
    gc.collect()
    print(json.dumps({"done": len(done), "bytes": sum(len(result.images[0].read()) for result in done)}))


def memory(base_url: str, how: str) -> None:
    """By how many bytes the peak of this process grows in one call, after some good ones."""
    generator = CogViewImageGenerator(base_url=base_url, timeout=LIMIT, max_retries=0)

    def call() -> str:
        try:
            result = generator.invoke("now") if how == "sync" else asyncio.run(generator.ainvoke("now"))
        except Exception as exc:
            return type(exc).__name__
        return "whole" if result.images[0].size_bytes else "no bytes"

    for _ in range(5):
        call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    outcome = call()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"outcome": outcome, "grown": grown, "seconds": time.monotonic() - begin}))


def killed(base_url: str, folder: str, times: str) -> None:
    """A child that saves image after image, killed in the middle of it, again and again."""
    generator = CogViewImageGenerator(base_url=base_url, output_dir=folder, timeout=LIMIT)
    for _ in range(int(times)):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                while True:
                    generator.invoke("again")
                    os.write(writing, b".")
            finally:
                os._exit(1)
        os.close(writing)
        os.read(reading, 1)
        time.sleep(random.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
    print(json.dumps({"files": len(os.listdir(folder))}))


def disk_full(base_url: str, folder: str, how: str) -> None:
    """A call whose image is longer than any file may be."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    generator = CogViewImageGenerator(base_url=base_url, output_dir=folder, timeout=LIMIT)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    result = generator.invoke("a kitten") if how == "sync" else asyncio.run(generator.ainvoke("a kitten"))
    image = result.images[0]
    with tempfile.TemporaryDirectory() as beside:
        old = Path(beside) / "old.png"
        old.write_bytes(b"old")
        try:
            image.save(old)
            saved = "saved"
        except CogViewStorageError as exc:
            saved = "left alone" if old.read_bytes() == b"old" and os.listdir(beside) == ["old.png"] else str(exc)
    print(
        json.dumps(
            {
                "save": saved,
                "path": None if image.path is None else str(image.path),
                "warnings": list(image.warnings),
                "bytes": len(image.read()),
                "files": [path.name for path in Path(folder).rglob("*")],
            }
        )
    )


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command for command in (fork, spawn, interrupted, all_ways, memory, killed, disk_full)
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
