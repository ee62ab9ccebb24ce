"""The measurements, each made for one client in a process of its own: `python -m benchmarks.measures NAME '{"...": ...}'`.

Each is a function with JSON arguments that gives JSON. `fresh` runs one in a new process.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import ssl
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import clients, stub

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

SLEEP = 0.05
LONGEST = 60.0


def fresh(name: str, **arguments: Any) -> dict[str, Any]:
    """Make a measurement in a new process.

    Gives `{"missing": ...}` where a package is not installed, and `{"unfinished": ...}` after `LONGEST` seconds.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LANGSMITH", "LANGCHAIN"))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's second import finds the bytecode
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.measures", name, json.dumps(arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return {"unfinished": LONGEST}
    if done.returncode:
        raise RuntimeError(f"{name} {arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_mb() -> float:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- many calls -------------------------------------------------------------------------------------------------


def _threads(call: Callable[[str], Any], count: int, slots: int) -> None:
    with ThreadPoolExecutor(slots) as executor:
        for future in [executor.submit(call, f"a kitten {number}") for number in range(count)]:
            future.result()


async def _tasks(call: Callable[[str], Any], count: int, slots: int) -> None:
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await call(f"a kitten {number}")

    await asyncio.gather(*(work() for _ in range(slots)))


def _run_of(client: str, base_url: str, slots: int) -> tuple[Callable[[int], Any], bool]:
    """A function that makes so many calls, and whether it gives a coroutine."""
    if client in {"our_abatch", "our_astream_many", "our_batch"}:
        generator = clients.our_generator(base_url, slots)

        async def abatch(count: int) -> None:
            await generator.abatch([f"a kitten {number}" for number in range(count)])

        async def astream_many(count: int) -> None:
            async for _, result in generator.astream_many(f"a kitten {number}" for number in range(count)):
                if isinstance(result, Exception):
                    raise result

        def batch(count: int) -> None:
            generator.batch([f"a kitten {number}" for number in range(count)])

        return {"our_abatch": abatch, "our_astream_many": astream_many, "our_batch": batch}[
            client
        ], client != "our_batch"
    call = getattr(clients, client)(base_url, slots)
    if client.endswith("_sync"):
        return partial(_threads, call, slots=slots), False
    return partial(_tasks, call, slots=slots), True


def bulk(client: str, slots: int, seconds: float, waves: int, warm: int) -> dict[str, Any]:
    """Share of the ideal time, new connections and CPU per call, after some waves that open the connections."""
    with stub.running() as service:
        run, is_async = _run_of(client, service.base_url(seconds), slots)
        measured: dict[str, float] = {}

        def timed(work: Callable[[], Any]) -> None:
            measured["connections"] = -service.counts()["connections"]
            begun, cpu = time.perf_counter(), time.process_time()
            work()
            measured["seconds"], measured["cpu"] = time.perf_counter() - begun, time.process_time() - cpu

        if is_async:

            async def both() -> None:
                await run(slots * warm)
                before = await asyncio.to_thread(service.counts)
                begun, cpu = time.perf_counter(), time.process_time()
                await run(slots * waves)
                measured["seconds"], measured["cpu"] = time.perf_counter() - begun, time.process_time() - cpu
                measured["connections"] = -before["connections"]

            asyncio.run(both())
        else:
            run(slots * warm)
            timed(lambda: run(slots * waves))
        opened = measured["connections"] + service.counts()["connections"]
        calls = slots * waves
        return {
            "share": waves * seconds / measured["seconds"],
            "connections": opened / calls,
            "cpu_us": measured["cpu"] / calls * 1e6,
        }


def unbounded(client: str, count: int, seconds: float, slots: int) -> dict[str, Any]:
    """A thousand prompts at once: how many fail, and the time over the ideal of the generator's limit."""
    with stub.running() as service:
        prompts = [f"a kitten {number}" for number in range(count)]
        generator = clients.our_generator(service.base_url(seconds), slots)
        begun = time.perf_counter()
        if client == "our_abatch":
            results = asyncio.run(generator.abatch(prompts, return_exceptions=True))
        else:
            results = asyncio.run(_all_at_once(service.base_url(seconds), prompts))
        elapsed = time.perf_counter() - begun
        failed = sum(isinstance(result, Exception) for result in results)
        return {"failed": failed, "over": elapsed / (-(-count // slots) * seconds), "seconds": elapsed}


async def _all_at_once(base_url: str, prompts: list[str]) -> list[Any]:
    import httpx

    async with httpx.AsyncClient(base_url=base_url, trust_env=False) as client:
        posts = (client.post("/images/generations", json=clients.body(prompt)) for prompt in prompts)
        return await asyncio.gather(*posts, return_exceptions=True)


def batch_48(client: str, seconds: float) -> dict[str, Any]:
    """48 calls passed to `batch`; the generator's limit is 48, LangChain's config says nothing."""
    with stub.running() as service:
        base_url = service.base_url(seconds)
        runnable = clients.our_generator(base_url, 48) if client == "our_batch" else clients._by_hand(base_url, 48)[1]
        begun = time.perf_counter()
        runnable.batch([f"a kitten {number}" for number in range(48)])
        return {"seconds": time.perf_counter() - begun}


def apart(client: str, pause: float) -> dict[str, Any]:
    """Connections of two calls with a pause between them."""
    with stub.running() as service:
        call = getattr(clients, client)(service.base_url(), 4)

        async def twice() -> None:
            await call("a kitten")
            await asyncio.sleep(pause)
            await call("a kitten")

        if client.endswith("_async"):
            asyncio.run(twice())
        else:
            call("a kitten")
            time.sleep(pause)
            call("a kitten")
        return {"connections": service.counts()["connections"]}


# --- the machinery alone ----------------------------------------------------------------------------------------


def machinery(client: str, count: int, slots: int) -> dict[str, Any]:
    """So many inputs, each a run that sleeps 50 ms: memory above the start, share of ideal, the event loop's lag."""
    run, workers = _sleeping_runs(client, slots)
    lags: list[float] = []

    async def tick() -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.005)
            lags.append(time.perf_counter() - begun - 0.005)

    async def main() -> dict[str, Any]:
        await run(slots)
        gc.collect()
        before = peak_mb()
        ticking = asyncio.create_task(tick())
        begun = time.perf_counter()
        await run(count)
        elapsed = time.perf_counter() - begun
        ticking.cancel()
        return {"mb": peak_mb() - before, "share": -(-count // workers) * SLEEP / elapsed, "lag_ms": max(lags) * 1000}

    return asyncio.run(main())


def _sleeping_runs(client: str, slots: int) -> tuple[Callable[[int], Coroutine[Any, Any, None]], int]:
    """A function that makes so many runs, and how many are under way at once."""
    from langchain_core.callbacks import AsyncCallbackHandler
    from langchain_core.runnables import RunnableLambda

    from langchain_cogview import CogViewImageGenerator

    result = CogViewImageGenerator(base_url="sandbox:", download=False).invoke("a kitten")

    async def sleep(*_: Any, **__: Any) -> Any:
        await asyncio.sleep(SLEEP)
        return result

    class Sleeping(CogViewImageGenerator):
        _agenerate = sleep

    generator = Sleeping(base_url="sandbox:", download=False, max_concurrency=slots)
    config: Any = {"callbacks": [AsyncCallbackHandler()]} if client.endswith("_with_handler") else None

    async def astream_many(count: int) -> None:
        async for _ in generator.astream_many((f"a kitten {number}" for number in range(count)), config):
            pass

    async def abatch(count: int) -> None:
        await generator.abatch([f"a kitten {number}" for number in range(count)], config)

    async def sleep_for(prompt: str) -> Any:
        return await sleep()

    async def langchain_abatch(count: int) -> None:
        await RunnableLambda(sleep_for).abatch(
            [f"a kitten {number}" for number in range(count)], {"max_concurrency": slots}
        )

    if client == "langchain_abatch":
        return langchain_abatch, slots
    return astream_many if client.startswith("our_astream_many") else abatch, generator.max_workers()


# --- images ---------------------------------------------------------------------------------------------------


def images(client: str, count: int, slots: int) -> dict[str, Any]:
    """So many images of 3 MB, made and saved: memory above the start, CPU of each."""
    with stub.running() as service, tempfile.TemporaryDirectory() as folder:
        run = _image_run(client, service.base_url(), slots, Path(folder))
        run(slots)
        gc.collect()
        memory, cpu, begun = peak_mb(), time.process_time(), time.perf_counter()
        run(count)
        cpu, elapsed = time.process_time() - cpu, time.perf_counter() - begun
        saved = sum(1 for path in Path(folder).rglob("*") if path.is_file())
        if client != "httpx_kept" and saved != count + slots:
            raise AssertionError(f"{saved} images were saved")
        return {"mb": peak_mb() - memory, "cpu_ms": cpu / count * 1000, "seconds": elapsed}


def _image_run(client: str, base_url: str, slots: int, folder: Path) -> Callable[[int], Any]:
    if client.startswith("our_"):
        generator = clients.our_generator(base_url, slots, download=True, output_dir=str(folder))
        if client == "our_stream_many":
            return lambda count: [None for _ in generator.stream_many(f"a kitten {number}" for number in range(count))]
        return lambda count: asyncio.run(_drained(generator, count))
    return lambda count: asyncio.run(_by_httpx(base_url, count, slots, None if client == "httpx_kept" else folder))


async def _drained(generator: Any, count: int) -> None:
    async for _, result in generator.astream_many(f"a kitten {number}" for number in range(count)):
        if isinstance(result, Exception) or not result.images[0].path:
            raise AssertionError(result)


async def _by_httpx(base_url: str, count: int, slots: int, folder: Path | None) -> None:
    import uuid

    client = clients._httpx_async_client(base_url, slots)
    kept = []

    async def call(prompt: str) -> None:
        response = await client.post("/images/generations", json=clients.body(prompt))
        url = response.json()["data"][0]["url"]
        if folder is None:
            kept.append((await client.get(url)).content)
            return
        with (folder / f"{uuid.uuid4()}.png").open("wb") as file:
            async with client.stream("GET", url) as image:
                async for chunk in image.aiter_raw():
                    file.write(chunk)

    await _tasks(call, count, slots)
    await client.aclose()


# --- before the first call --------------------------------------------------------------------------------------

_HEAVY = ("PIL", "fsspec", "typer", "http.server", "IPython", "ipykernel", "tqdm", "tornado", "s3fs")


def start(what: str) -> dict[str, Any]:
    """Milliseconds of an import or a first construction, above what its users have loaded already."""
    if what in {"zai", "openai"}:
        return {"ms": _timed(lambda: __import__(what))}
    if what == "dalle":
        return {"ms": _timed(lambda: clients.dalle_sync("http://127.0.0.1:9", 1))}
    from langchain_core.tools import BaseTool  # noqa: F401

    before = set(sys.modules)
    took = {"ms": _timed(lambda: __import__("langchain_cogview"))}
    if what == "tool":  # the package loads a name when it is asked for

        def first_tool() -> None:
            from langchain_cogview import CogViewImageTool

            CogViewImageTool(api_key=clients.KEY)

        took = {"ms": _timed(first_tool) + took["ms"]}
    loaded = set(sys.modules) - before
    return {**took, "modules": len(loaded), "heavy": sorted(name for name in _HEAVY if name in loaded)}


def construct(count: int) -> dict[str, Any]:
    """Milliseconds for each of so many generators, the SSL contexts that were made, and the sockets that were opened."""
    from langchain_cogview import CogViewImageGenerator

    made = {"contexts": 0}
    original = ssl.SSLContext.__new__

    def counted(cls: Any, *arguments: Any, **settings: Any) -> Any:
        made["contexts"] += 1
        return original(cls, *arguments, **settings)

    ssl.SSLContext.__new__ = counted  # type: ignore[method-assign]
    CogViewImageGenerator(api_key=clients.KEY)
    files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    took = _timed(lambda: [CogViewImageGenerator(api_key=clients.KEY) for _ in range(count)])
    opened = len(os.listdir("/proc/self/fd")) - files if files else 0
    return {"ms": took / count, "contexts": made["contexts"], "opened": opened}


def httpx_clients(count: int) -> dict[str, Any]:
    """The same for httpx clients."""
    import httpx

    httpx.Client()
    return {"ms": _timed(lambda: [httpx.Client() for _ in range(count)]) / count}


def _timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1000


# --- one call ---------------------------------------------------------------------------------------------------


def per_call(names: list[str], rounds: int, calls: int) -> dict[str, Any]:
    """CPU microseconds of a call, client after client in each round; the names are all sync or all async."""
    with stub.running() as service:
        found, missing = {}, []
        for name in names:
            try:
                found[name] = getattr(clients, name)(service.base_url(), 4)
            except ImportError:
                missing.append(name)
        run = _cpu_async if names[0].endswith("_async") else _cpu_sync
        return {"us": run(found, rounds, calls), "missing": missing}


def _cpu_sync(found: dict[str, Callable[[str], Any]], rounds: int, calls: int) -> dict[str, list[float]]:
    measured: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, call in found.items():
            call("a kitten")
            begun = time.process_time()
            for _ in range(calls):
                call("a kitten")
            measured[name].append((time.process_time() - begun) / calls * 1e6)
    return measured


def _cpu_async(
    found: dict[str, Callable[[str], Coroutine[Any, Any, Any]]], rounds: int, calls: int
) -> dict[str, list[float]]:
    measured: dict[str, list[float]] = {name: [] for name in found}

    async def main() -> None:
        for _ in range(rounds):
            for name, call in found.items():
                await call("a kitten")
                begun = time.process_time()
                for _ in range(calls):
                    await call("a kitten")
                measured[name].append((time.process_time() - begun) / calls * 1e6)

    asyncio.run(main())
    return measured


def ceiling(slots: int, calls: int) -> dict[str, Any]:
    """Requests per second that the stub answers to raw sockets; half of the CPU time is the asking side's."""
    import socket

    with stub.running() as service:
        host, port = service.origin.removeprefix("http://").split(":")
        request = b"POST /0/images/generations HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"
        sockets = [socket.create_connection((host, int(port))) for _ in range(slots)]
        begun = time.perf_counter()
        for _ in range(calls // slots):
            for item in sockets:
                item.sendall(request)
            for item in sockets:
                item.recv(65536)
        elapsed = time.perf_counter() - begun
        for item in sockets:
            item.close()
        return {"per_second": calls // slots * slots / elapsed}


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    item.__name__: item
    for item in (
        bulk, unbounded, batch_48, apart, machinery, images, start, construct, httpx_clients, per_call, ceiling,
    )
}  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    name, arguments = sys.argv[1:]
    try:
        reported = MEASURES[name](**json.loads(arguments))
    except ImportError as error:
        reported = {"missing": str(error)}
    print(json.dumps(reported), flush=True)
    os._exit(0)  # a peer's threads or unclosed sessions are not what is measured


if __name__ == "__main__":
    main()
