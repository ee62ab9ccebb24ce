"""Event loops of every kind: never closed, abandoned in the middle of a call, patched. None is kept alive, none blocks the others."""

import asyncio
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from langchain_cogview import CogViewImageGenerator
from tests.conftest import FAKE_KEY
from tests.faults.server import FaultServer
from tests.faults.tokens import named_image

REPOSITORY = Path(__file__).parents[2]


def generator_for(server, **settings):
    return CogViewImageGenerator(
        **{
            "base_url": server.base_url,
            "api_key": FAKE_KEY,
            "timeout": 1,
            "download": False,
            "max_retries": 0,
            **settings,
        }
    )


def run_script(code, server, *options):
    begin = f"""
import asyncio, gc, resource, sys, weakref
from langchain_cogview import CogViewImageGenerator
generator = CogViewImageGenerator(base_url={server.base_url!r}, api_key={FAKE_KEY!r}, timeout=100, download=False)
"""
    return subprocess.run(
        [sys.executable, *options, "-c", begin + textwrap.dedent(code)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip


def test_a_loop_for_each_request_that_is_never_closed_uses_up_no_files():
    # A common recipe of Flask and Celery code. Python closes such loops when it collects them; when that is, differs from version
    # to version.
    with FaultServer(named_image) as server:
        done = run_script(
            """
            resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
            loops = []
            gc.freeze()  # what is loaded is in no cycle with a loop, and takes long to look through
            for number in range(150):
                loop = asyncio.new_event_loop()
                loop.run_until_complete(generator.ainvoke(f"kitten {number}"))
                loops.append(weakref.ref(loop))
                del loop
                gc.collect()
            print(sum(loop() is not None for loop in loops))
            """,
            server, "-W", "ignore",
        )  # fmt: skip
        assert (done.stdout, done.stderr, server.posts) == ("0\n", "", 150)


def test_connections_end_with_their_loop_without_a_warning():
    with FaultServer(named_image) as server:
        done = run_script(
            """
            for number in range(3):
                asyncio.run(generator.ainvoke(f"kitten {number}"))
            with asyncio.Runner() as runner:
                for number in range(3):
                    runner.run(generator.ainvoke(f"kitten {number}"))
            loop = asyncio.new_event_loop()
            loop.run_until_complete(generator.ainvoke("a kitten"))
            loop.close()
            print("done")
            """,
            server, "-X", "dev", "-W", "error",
        )  # fmt: skip
        # The debug mode reports slow callbacks.
        errors = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
        assert (done.stdout, errors, server.posts) == ("done\n", [], 7)


@pytest.mark.parametrize("module", ["nest_asyncio", pytest.param("nest_asyncio2", marks=pytest.mark.heavy)])
def test_under_nest_asyncio_nothing_is_printed_at_exit(module):
    pytest.importorskip(module)
    with FaultServer(named_image) as server:
        done = run_script(
            f"""
            import {module}
            {module}.apply()

            async def main():
                inner = asyncio.get_event_loop().run_until_complete(generator.ainvoke("inner"))
                outer = await generator.ainvoke("outer")
                return len(inner.images) + len(outer.images)

            print(asyncio.run(main()))
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            print(loop.run_until_complete(main()))
            """,
            server,
        )  # fmt: skip
        assert (done.stdout, done.stderr, server.posts) == ("2\n2\n", "", 4)


# Loops that were left in the middle of a call.


@pytest.fixture
def abandoned():
    """Starts calls in a loop, and runs the loop no more once the first of them is sent."""
    loops = []

    def abandon(server, *prompts):
        for limit in (0.3, 1, 10, 100):  # a busy machine may use a short time limit up before anything is sent
            generator = generator_for(server, max_concurrency=1, timeout=limit)
            loop = asyncio.new_event_loop()

            async def start(generator=generator, limit=limit):
                tasks = [asyncio.ensure_future(generator.ainvoke(prompt)) for prompt in prompts]
                await asyncio.to_thread(server.arrived.wait, limit)
                return tasks

            loops.append((loop, loop.run_until_complete(start())))
            if server.posts:
                return

    yield abandon
    for loop, tasks in loops:
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def test_a_loop_that_is_abandoned_during_a_download_is_collected_and_no_thread_goes_on_for_it(tmp_path):
    def hangs(connection, request):
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n\x89PNG\r\n\x1a\n")
        (tmp_path / str(request.number)).touch()
        connection.hang()

    with FaultServer(None, hangs) as server:
        done = run_script(
            f"""
            import os
            generator = generator.model_copy(update={{"download": True}})

            async def abandoned(number):
                task = asyncio.create_task(generator.ainvoke(f"kitten {{number}}"))
                while len(os.listdir({str(tmp_path)!r})) < number:
                    await asyncio.sleep(0.01)
                asyncio.get_running_loop().call_later(0.05, asyncio.get_running_loop().stop)
                await task

            def start(number):
                loop = asyncio.new_event_loop()
                loop.create_task(abandoned(number))
                loop.run_forever()
                return weakref.ref(loop)

            loops = [start(number) for number in range(1, 9)]
            gc.collect()
            print(sum(loop() is not None for loop in loops))
            """,
            server, "-W", "ignore",
        )  # fmt: skip
        # With Python 3.13 one coroutine stays suspended now and then, probably because LangChain awaits while it is closed.
        assert int(done.stdout) <= (2 if sys.version_info >= (3, 13) else 0), done.stderr
        assert (server.posts, server.gets) == (8, 8)
    assert "a thread fetches it" not in done.stderr


def first_hangs(connection, request):
    if request.json()["prompt"] == "left":
        connection.hang()
    else:
        named_image(connection, request)


@pytest.mark.parametrize("how", ["sync", "async", "thread"])
def test_a_call_in_an_abandoned_loop_holds_its_slot_no_longer_than_its_time_limit(how, abandoned):
    with FaultServer(first_hangs) as server:
        patient = generator_for(server, max_concurrency=1, timeout=200)
        abandoned(server, "left")
        if how == "async":
            results = asyncio.run(patient.abatch(["a", "b"]))
        elif how == "sync":
            results = patient.batch(["a", "b"])
        else:
            results = []
            threads = [threading.Thread(target=lambda n=n: results.append(patient.invoke(n))) for n in "ab"]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(200)
        assert [len(result.images) for result in results] == [1, 1]
        assert server.posts == 3


@pytest.mark.parametrize("how", ["sync", "async"])
def test_calls_that_wait_in_an_abandoned_loop_do_not_stand_in_the_way(how, abandoned, monkeypatch):
    monkeypatch.setattr("langchain_cogview.api.limiter._PICK_UP_SECONDS", 0.5)
    with FaultServer(first_hangs) as server:
        patient = generator_for(server, max_concurrency=1, timeout=200)
        abandoned(server, "left", *(f"waits {n}" for n in range(4)))
        result = asyncio.run(patient.ainvoke("a")) if how == "async" else patient.invoke("a")
        assert len(result.images) == 1
