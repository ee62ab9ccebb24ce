"""A caller who leaves before anything of the request was sent keeps the budget; after that, the image counts.

The server is the witness: it hangs in the TLS handshake, as a proxy, or once the whole request is there.
"""

import asyncio
import signal
import socket
import threading

import pytest

from langchain_cogview import (
    Budget,
    CogViewImageGenerator,
    CogViewImageTool,
    Sandbox,
    arun_job,
    collect_image_costs,
    plan_job,
)
from tests.conftest import FAKE_KEY
from tests.faults.reply_transport import over_tls
from tests.faults.server import FaultServer, at

STAGES = {"TLS": 0, "proxy": 0, "reply": 1}
"""How many images count if the caller leaves at a stage."""
stages = pytest.mark.parametrize("stage", STAGES)

# The standard library leaves the socket of an interrupted handshake to the garbage collector.
handshake = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class LeftError(Exception):
    """Raised by a signal handler."""


@pytest.fixture
def hanging(stage, monkeypatch):
    """A server that hangs at a stage, with `reached` to be called when it does, and its base URL."""

    def hangs(connection, request):
        server.reached()
        connection.server.closing.wait(100)

    fault = at({"TLS": "connect", "proxy": "head", "reply": "request"}[stage])(hangs)
    with FaultServer(fault, fault) as server:
        if stage == "proxy":
            monkeypatch.setenv("HTTPS_PROXY", server.origin)
        urls = {"TLS": over_tls(server), "proxy": "https://api.invalid/v4", "reply": server.base_url}
        server.reached = lambda: None
        yield server, urls[stage]


def cancelled_at(server, call):
    """Start a call, and cancel it where the server hangs."""

    async def main():
        loop, reached = asyncio.get_running_loop(), asyncio.Event()
        server.reached = lambda: loop.call_soon_threadsafe(reached.set)
        task = asyncio.create_task(call())
        await asyncio.wait_for(reached.wait(), 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


@pytest.fixture(params=[KeyboardInterrupt, LeftError, TimeoutError])
def interrupted_at(request):
    """Make a call whose thread gets the exception of a signal handler where the server hangs."""

    def handler(number, frame):
        raise request.param("time is up")

    def interrupt(server, call):
        main = threading.get_ident()
        server.reached = lambda: signal.pthread_kill(main, signal.SIGUSR1)
        with pytest.raises(request.param):
            call()

    before = signal.signal(signal.SIGUSR1, handler)
    yield interrupt
    signal.signal(signal.SIGUSR1, before)


@stages
def test_a_cancelled_call_counts_in_a_budget_only_once_it_is_sent(hanging, stage):
    server, url = hanging
    generator, budget = CogViewImageGenerator(base_url=url, api_key=FAKE_KEY), Budget("0.06", "CNY", max_images=1)
    with collect_image_costs() as costs:
        cancelled_at(server, lambda: generator.ainvoke("a kitten", budget=budget))
    assert (server.posts, budget.images) == (STAGES[stage], STAGES[stage])
    assert (costs.cancelled, costs.in_flight, costs.uncertain.count) == (1, 0, STAGES[stage])
    assert bool(budget.spent.amount) is (stage == "reply")


@handshake
@stages
def test_an_interrupted_call_counts_in_a_budget_only_once_it_is_sent(hanging, stage, interrupted_at):
    server, url = hanging
    generator, budget = CogViewImageGenerator(base_url=url, api_key=FAKE_KEY), Budget("0.06", "CNY", max_images=1)
    with collect_image_costs() as costs:
        interrupted_at(server, lambda: generator.invoke("a kitten", budget=budget))
    assert (costs.cancelled + costs.failed, costs.in_flight, costs.uncertain.count) == (1, 0, STAGES[stage])
    assert (server.posts, budget.images) == (STAGES[stage], STAGES[stage])
    assert bool(budget.spent.amount) is (stage == "reply")


@stages
def test_several_images_that_are_cancelled_count_only_once_they_are_sent(hanging, stage):
    server, url = hanging
    generator, budget = CogViewImageGenerator(base_url=url, api_key=FAKE_KEY, max_concurrency=1), Budget(max_images=3)
    cancelled_at(server, lambda: generator.ainvoke({"prompt": "a kitten", "n": 3}, budget=budget))
    assert (server.posts, budget.images) == (STAGES[stage], STAGES[stage])


def test_an_image_whose_caller_leaves_during_the_download_is_closed_and_stays_paid():
    budget = Budget(max_images=1)

    async def main(sandbox):
        generator = CogViewImageGenerator(base_url=sandbox.base_url)
        call = asyncio.create_task(generator.ainvoke("[[not-yet:1000]]", budget=budget))
        while not sandbox.downloads:
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    with Sandbox() as sandbox, collect_image_costs() as costs:
        asyncio.run(main(sandbox))
    assert (costs.images, costs.cancelled, costs.in_flight) == (0, 1, 0)
    assert (costs.uncertain.count, budget.images) == (1, 1)


def test_an_image_whose_caller_is_interrupted_during_the_download_is_closed_and_stays_paid(monkeypatch):
    from langchain_cogview import generation

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "fetch", interrupted)
    budget = Budget(max_images=1)
    with Sandbox() as sandbox, collect_image_costs() as costs, pytest.raises(KeyboardInterrupt):
        CogViewImageGenerator(base_url=sandbox.base_url).invoke("a kitten", budget=budget)
    assert (costs.images, costs.cancelled, costs.in_flight) == (0, 1, 0)
    assert (costs.uncertain.count, budget.images) == (1, 1)


def test_a_task_whose_collection_is_cancelled_is_not_paid_again_when_it_is_collected_later():
    async def main(sandbox):
        generator = CogViewImageGenerator(base_url=sandbox.base_url, model="glm-image", use_tasks=True)
        task = await generator.asubmit("[[task-polls:2]]")
        call = asyncio.create_task(task.aresult())
        while not sandbox.polls:
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert costs.in_flight == 0
        return await task.aresult()

    with Sandbox() as sandbox, collect_image_costs() as costs:
        result = asyncio.run(main(sandbox))
        assert result.image.task_id
        assert len(sandbox.requests) == 1
    assert (costs.images, costs.in_flight, costs.uncertain.count) == (1, 0, 0)


def allows_another(tool):
    with Sandbox() as sandbox:
        again = tool.model_copy(update={"generator": CogViewImageGenerator(base_url=sandbox.base_url)})
        answer = again.invoke({"prompt": "a kitten"})
        return len(sandbox.requests) == 1 and "limit of 1 image" not in answer


@stages
def test_a_tools_budget_is_released_after_a_call_that_was_cancelled_unsent(hanging, stage):
    server, url = hanging
    tool = CogViewImageTool(base_url=url, api_key=FAKE_KEY, max_images=1)
    cancelled_at(server, lambda: tool.ainvoke({"prompt": "a kitten"}))
    assert allows_another(tool) is (stage != "reply")


@handshake
@stages
def test_a_tools_budget_is_released_after_a_call_that_was_interrupted_unsent(hanging, stage, interrupted_at):
    server, url = hanging
    tool = CogViewImageTool(base_url=url, api_key=FAKE_KEY, max_images=1)
    interrupted_at(server, lambda: tool.invoke({"prompt": "a kitten"}))
    assert allows_another(tool) is (stage != "reply")


def test_a_deadline_of_the_caller_while_nobody_accepts_the_connection_leaves_the_budget_free():
    budget = Budget(max_images=1)
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for waiting in (first, second):  # a full queue: whoever connects next hangs
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        generator = CogViewImageGenerator(base_url=f"http://127.0.0.1:{full.getsockname()[1]}/v4", api_key=FAKE_KEY)

        async def main():
            await asyncio.wait_for(generator.ainvoke("a kitten", budget=budget), 0.2)

        with pytest.raises(TimeoutError):
            asyncio.run(main())
    assert budget.images == 0


@stages
def test_a_cancelled_job_goes_on_with_the_prompt_whose_request_was_not_sent(hanging, stage, tmp_path):
    server, url = hanging
    settings = {"api_key": FAKE_KEY, "progress": False, "budget": "0.06"}
    cancelled_at(server, lambda: arun_job(["a kitten"], tmp_path, base_url=url, **settings))
    lines = (tmp_path / "attempts.jsonl").read_text(encoding="utf-8")
    assert ("settled" in lines) is (stage != "reply")
    plan = plan_job(["a kitten"], tmp_path, base_url=url, api_key=FAKE_KEY, budget="0.06")
    assert plan.images == 1 - STAGES[stage]
