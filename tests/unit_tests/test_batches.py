"""Any number of images: as they finish, a bounded number in memory, failures as values, one limiter for all calls."""

import asyncio
import csv
import itertools
import threading
from pathlib import Path

import pytest
from langchain_core.rate_limiters import BaseRateLimiter
from PIL import Image

from langchain_cogview import (
    CogViewContentFilterError,
    CogViewError,
    CogViewImageGenerator,
    CogViewImageTool,
    CogViewInvalidRequestError,
    CogViewToolkit,
    ImageRequest,
    Sandbox,
)
from langchain_cogview.pools import astream_tasks, stream_in_threads

PATIENCE = 60
"""Seconds that are waited for what should happen at once; only what hangs needs them."""

both = pytest.mark.parametrize("how", ["sync", "async"])


def all_of(generator, how, inputs, config=None, **kwargs):
    if how == "sync":
        return list(generator.stream_many(inputs, config, **kwargs))

    async def collected():
        return [item async for item in generator.astream_many(inputs, config, **kwargs)]

    return asyncio.run(collected())


@both
def test_every_input_comes_back_with_its_number_and_a_failure_is_a_value(generator, how):
    prompts = ["a fox", "[[content-filter]] x", "", "a hare"]
    found = dict(all_of(generator, how, iter(prompts)))
    assert sorted(found) == [0, 1, 2, 3]
    assert [found[0].prompt, found[3].prompt] == ["a fox", "a hare"]
    assert isinstance(found[1], CogViewContentFilterError)
    assert "blank" in str(found[2])


@both
def test_an_endless_iterator_is_read_only_as_far_as_it_is_used(sandbox, how):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, download=False, max_concurrency=2)
    consumed = []

    def endless():
        for number in itertools.count():
            consumed.append(number)
            yield f"prompt {number}"

    async def first_five():
        found = []
        stream = generator.astream_many(endless())
        async for item in stream:
            found.append(item)
            if len(found) == 5:
                break
        await stream.aclose()
        return found

    if how == "sync":
        stream = generator.stream_many(endless())
        found = list(itertools.islice(stream, 5))
        stream.close()
    else:
        found = asyncio.run(first_five())
    assert len(found) == 5
    assert len(consumed) <= 5 + 2 * generator.max_workers() + 1


async def test_an_async_iterable_is_accepted_too(generator):
    async def prompts():
        for animal in ("a fox", "a hare"):
            await asyncio.sleep(0)
            yield animal

    found = dict([item async for item in generator.astream_many(prompts())])
    assert [found[0].prompt, found[1].prompt] == ["a fox", "a hare"]


def test_the_sync_stream_says_that_an_async_iterable_is_for_the_other(generator):
    async def prompts():
        yield "a fox"

    with pytest.raises(CogViewInvalidRequestError, match="astream_many"):
        next(generator.stream_many(prompts()))


@both
def test_what_the_iterable_raises_comes_after_everything_that_was_read(generator, how):
    def prompts():
        yield "a fox"
        yield "a hare"
        raise LookupError("no more prompts")

    found = []
    with pytest.raises(LookupError, match="no more prompts"):
        if how == "sync":
            for item in generator.stream_many(prompts()):
                found.append(item)
        else:

            async def collect():
                async for item in generator.astream_many(prompts()):
                    found.append(item)

            asyncio.run(collect())
    assert sorted(number for number, _ in found) == [0, 1]


def test_a_stream_that_is_left_sends_nothing_more_and_logs_the_results_that_nobody_read(caplog):
    going_on = threading.Event()
    begun = threading.Barrier(2, timeout=PATIENCE)

    def first():
        return "first"

    def second():
        begun.wait()
        going_on.wait(PATIENCE)
        return "second"

    ran = []
    stream = stream_in_threads(iter([first, second, *(lambda: ran.append(1) for _ in range(20))]), 1)
    assert next(stream) == (0, "first")
    begun.wait()
    stream.close()
    going_on.set()
    for thread in threading.enumerate():
        if thread.name == "cogview":
            thread.join(PATIENCE)
    assert not ran
    assert "'second'" in caplog.text


async def test_an_async_stream_that_is_left_cancels_what_is_under_way():
    begun, ended = asyncio.Event(), []

    async def first():
        return "first"

    async def second():
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("second")

    stream = astream_tasks([first, second], 2)
    assert await anext(stream) == (0, "first")
    await begun.wait()
    await stream.aclose()
    assert ended == ["second"]


def test_work_within_work_that_is_left_does_not_stop_the_work_around_it():
    def outer(number):
        nested = stream_in_threads(iter([lambda: 1] * 10), 2)
        next(nested)
        nested.close()
        return number

    found = sorted(stream_in_threads([lambda n=n: outer(n) for n in range(8)], 2))
    assert found == [(n, n) for n in range(8)]


@both
def test_batch_as_completed_gives_all_results_and_then_raises_with_every_one(generator, how):
    prompts = ["a fox", "[[content-filter]] x", "a hare"]
    found = []
    with pytest.raises(CogViewContentFilterError) as caught:
        if how == "sync":
            for item in generator.batch_as_completed(prompts):
                found.append(item)
        else:

            async def collect():
                async for item in generator.abatch_as_completed(prompts):
                    found.append(item)

            asyncio.run(collect())
    assert sorted(number for number, _ in found) == [0, 2]
    assert [type(item).__name__ for item in caught.value.batch_results] == [
        "ImageResult", "CogViewContentFilterError", "ImageResult",
    ]  # fmt: skip
    assert len(list(generator.batch_as_completed(prompts, return_exceptions=True))) == 3


@pytest.mark.parametrize("way", ["batch", "abatch", "stream", "astream", "n", "an", "threads", "loops"])
def test_an_account_of_five_never_sees_a_sixth_request_whichever_way_they_come(way):
    with Sandbox(in_flight_limit=5, latency=0.02) as sandbox:
        generator = CogViewImageGenerator(base_url=sandbox.base_url, download=False, max_retries=0)
        other = CogViewImageGenerator(base_url=sandbox.base_url, download=False, max_retries=0, size="512x512")
        prompts = [f"prompt {n}" for n in range(24)]
        if way == "batch":
            generator.batch(prompts, {"max_concurrency": 20})
        elif way == "abatch":
            asyncio.run(generator.abatch(prompts))
        elif way in ("stream", "astream"):
            results = all_of(generator, "sync" if way == "stream" else "async", prompts)
            assert not [item for _, item in results if isinstance(item, Exception)]
        elif way == "n":
            generator.bind(n=24).invoke("x")
        elif way == "an":
            asyncio.run(generator.bind(n=24).ainvoke("x"))
        else:
            one = (lambda g: g.invoke("x")) if way == "threads" else (lambda g: asyncio.run(g.ainvoke("x")))
            failed = []

            def work(item):
                try:
                    one(item)
                except CogViewError as error:
                    failed.append(error)

            threads = [threading.Thread(target=work, args=(item,)) for item in (generator, other) * 12]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert not failed
        assert sandbox.images_made == 24
        assert len(sandbox.requests) == 24


def test_with_one_slot_the_second_call_waits_for_the_first():
    with Sandbox(in_flight_limit=1, latency=0.3) as sandbox:  # refuses a second request beside the first
        generator = CogViewImageGenerator(base_url=sandbox.base_url, download=False, max_concurrency=1, max_retries=0)
        threads = [threading.Thread(target=generator.invoke, args=(f"image {n}",)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert (len(sandbox.requests), sandbox.images_made) == (2, 2)


async def test_a_cancelled_waiter_sends_nothing_and_leaves_no_hole(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, download=False, max_concurrency=1)
    first = asyncio.create_task(generator.ainvoke("[[slow:60]] first"))
    while not sandbox.requests:
        await asyncio.sleep(0.001)
    waiter, last = asyncio.create_task(generator.ainvoke("waiter")), asyncio.create_task(generator.ainvoke("last"))
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.wait([waiter])
    first.cancel()
    await last
    assert waiter.cancelled()
    assert [request.prompt for request in sandbox.requests] == ["[[slow:60]] first", "last"]


def test_the_wait_for_a_slot_is_not_part_of_the_time_limit(sandbox):
    for latency in (0.2, 2, 20):
        sandbox.latency = latency
        generator = CogViewImageGenerator(
            base_url=sandbox.base_url, download=False, max_concurrency=1, timeout=3 * latency, max_retries=0
        )
        results = generator.batch([f"image {n}" for n in range(6)], return_exceptions=True)
        failed = [item for item in results if isinstance(item, Exception)]
        if not failed:  # else a busy machine may have needed all the time for one call
            break
    assert not failed


def test_a_refused_call_is_sent_again_and_keeps_its_position_in_the_queue():
    with Sandbox(in_flight_limit=2, latency=0.05) as sandbox:
        generator = CogViewImageGenerator(base_url=sandbox.base_url, download=False, max_concurrency=8)
        results = generator.batch([f"prompt {n}" for n in range(20)], return_exceptions=True)
        assert not [item for item in results if isinstance(item, Exception)]
        assert sandbox.images_made == 20


def test_a_run_id_is_the_first_ones_alone(generator):
    import uuid

    results = list(generator.stream_many(["a", "b"], {"run_id": uuid.uuid4()}))
    assert len(results) == 2


class Kept:
    """A result whose lifetime can be observed."""


@both
def test_a_hundred_thousand_results_are_never_in_hand_at_once(how):
    import weakref

    alive, most, count, slots = weakref.WeakSet(), 0, 0, 8

    def made():
        result = Kept()
        alive.add(result)
        return result

    async def amade():
        return made()

    if how == "sync":
        for _, result in stream_in_threads(itertools.repeat(made, 100_000), slots):
            count += 1
            most = max(most, len(alive))
            del result
    else:

        async def collect():
            nonlocal count, most
            async for _, result in astream_tasks(itertools.repeat(amade, 100_000), slots):
                count += 1
                most = max(most, len(alive))
                del result

        asyncio.run(collect())
    assert count == 100_000
    assert most <= 3 * slots + 2


async def each(iterator):
    return [item async for item in iterator]


def many_of(generator, how):
    tool = CogViewImageTool(generator=generator)
    start, *_ = CogViewToolkit(tool=tool).get_tools()
    if how == "async":
        streams = generator.astream_many, generator.abatch_as_completed, tool.abatch_as_completed
        batches = generator.abatch, tool.abatch, start.abatch
        awaited = [lambda inputs, stream=stream: each(stream(inputs)) for stream in streams]
        return [lambda inputs, many=many: asyncio.run(many(inputs)) for many in (*awaited, *batches)]
    streams = generator.stream_many, generator.batch_as_completed, tool.batch_as_completed
    return [*(lambda inputs, s=stream: list(s(inputs)) for stream in streams), generator.batch, tool.batch, start.batch]


@both
@pytest.mark.parametrize(
    "one", ["a cat", b"a cat", {"prompt": "a cat"}, ImageRequest(prompt="a cat"), 5, None], ids=repr
)
def test_one_input_in_place_of_many_is_refused_before_anything_is_sent(generator, sandbox, how, one):
    for many in many_of(generator, how):
        with pytest.raises(CogViewInvalidRequestError, match="Pass a list"):
            many(one)
    assert not sandbox.requests


@both
def test_an_iterator_is_for_the_stream(generator, sandbox, how):
    stream, *others = many_of(generator, how)
    for batch in others:
        with pytest.raises(CogViewInvalidRequestError, match="stream_many"):
            batch(iter(["a cat"]))
    assert not sandbox.requests
    assert [number for number, _ in stream(iter(["a cat"]))] == [0]


@both
def test_a_column_of_a_table_is_a_list_of_prompts(generator, how):
    column = pytest.importorskip("pandas").Series(["a cat", "a dog"])
    results = generator.batch(column) if how == "sync" else asyncio.run(generator.abatch(column))
    assert [result.prompt for result in results] == ["a cat", "a dog"]


async def test_a_sync_call_that_blocks_the_loop_whose_tasks_have_all_slots_ends_with_an_error(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, max_concurrency=1, download=False, timeout=0.2)
    patient = generator.model_copy(update={"timeout": 200})
    first = asyncio.create_task(patient.ainvoke("[[slow:100]] first"))
    while not sandbox.requests:
        await asyncio.sleep(0.001)
    with pytest.raises(CogViewError, match="ainvoke"):
        generator.invoke("second")
    first.cancel()


def test_where_no_thread_can_be_started_the_others_do_the_work(monkeypatch):
    start, started = threading.Thread.start, []

    def only_two(thread):
        if thread.name == "cogview":
            if len(started) == 2:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", only_two)
    assert sorted(stream_in_threads([lambda n=n: n for n in range(20)], 8)) == [(n, n) for n in range(20)]


def test_what_makes_the_inputs_runs_in_the_callers_context(generator):
    from langchain_cogview import collect_image_costs

    def prompts():
        yield generator.invoke("a fox").prompt

    with collect_image_costs() as costs:
        list(generator.stream_many(prompts()))
    assert costs.images == 2


async def test_a_task_that_cancels_itself_ends_the_stream_and_is_not_passed_over():
    async def cancelled():
        raise asyncio.CancelledError

    async def fine():
        return "fine"

    with pytest.raises(asyncio.CancelledError):
        _ = [item async for item in astream_tasks([cancelled, fine], 1)]


class Twice(BaseRateLimiter):
    """Gives its permission twice, and never again."""

    asked = 0

    def acquire(self, *, blocking=True):
        raise NotImplementedError

    async def aacquire(self, *, blocking=True):
        self.asked += 1
        if self.asked > 2:
            await asyncio.Event().wait()
        return True


async def test_the_images_of_a_cancelled_call_are_logged(sandbox, caplog):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, n=3, max_concurrency=1, rate_limiter=Twice())
    call = asyncio.create_task(generator.ainvoke("a fox"))
    while len(sandbox.downloads) < 2:
        await asyncio.sleep(0.001)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert sandbox.requests[0].request_id in caplog.text


# --- real prompts in bulk

PARTI = Path(__file__).parents[3] / "shared" / "data" / "parti_prompts.tsv"
OWN = [
    "一只可爱的小猫", "A cute little kitten", "a cute little kitten", "a \"quoted\" fox, and a 'dog'", "猫\n犬", "🦊" * 40,
    "the word STOP", "a map of Iceland; rivers in blue", "…", "x", "X", " x", "x ", "1024x1024", "../kitten", "%s {0} $HOME",
]  # fmt: skip


def prompts(step):
    """A list of our own, and each `step`th of the Parti prompts where they are."""
    if not PARTI.exists():
        return OWN
    with PARTI.open(encoding="utf-8", newline="") as file:
        found = [row["Prompt"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    return list(dict.fromkeys(OWN + found[::step]))


@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("how", ["batch", "abatch"])
def test_every_prompt_gets_a_file_of_its_own_that_decodes(sandbox, tmp_path, how, step):
    inputs = prompts(step)
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path, size="640x512")
    results = generator.batch(inputs) if how == "batch" else asyncio.run(generator.abatch(inputs))
    assert [result.prompt for result in results] == inputs
    paths = {result.path for result in results}
    hashes = {result.sha256 for result in results}
    assert len(paths) == len(hashes) == len(inputs) == sandbox.images_made
    assert set(tmp_path.iterdir()) == paths
    for path in paths:
        with Image.open(path) as decoded:
            decoded.load()
            assert decoded.size == (640, 512)


# Fairness inside one application.


async def _order(sandbox, *calls):
    """The prompts in the order in which the service saw them, when all waited for one slot."""
    tasks = []
    for call in calls:
        tasks.append(asyncio.create_task(call))
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    return [request.prompt for request in sandbox.requests]


async def test_an_interactive_call_goes_before_the_rest_of_several_batches():
    sandbox = Sandbox(latency=0.05)
    generator = CogViewImageGenerator(base_url=sandbox.base_url, max_concurrency=1, download=False)
    batches = [generator.abatch([f"batch {number} a", f"batch {number} b"]) for number in range(3)]
    seen = await _order(sandbox, *batches, generator.ainvoke("a person waits"))
    assert "a person waits" in seen[:2]


async def test_the_priority_of_a_generator_holds_for_all_its_calls():
    sandbox = Sandbox(latency=0.05)
    settings = {"base_url": sandbox.base_url, "max_concurrency": 1, "download": False}
    urgent = CogViewImageGenerator(**settings, priority="interactive")
    later = CogViewImageGenerator(**settings, priority="batch")
    seen = await _order(sandbox, later.ainvoke("1"), later.ainvoke("2"), later.ainvoke("3"), urgent.abatch(["now"]))
    assert seen.index("now") < seen.index("2")


async def test_the_batch_of_one_user_leaves_slots_for_others():
    sandbox = Sandbox(latency=0.05, in_flight_limit=5)
    generator = CogViewImageGenerator(
        base_url=sandbox.base_url, max_concurrency=3, max_concurrency_per_user=1, download=False
    )
    greedy = generator.abatch([{"prompt": f"greedy {number}", "user_id": "user-one"} for number in range(4)])
    other = generator.ainvoke({"prompt": "other", "user_id": "user-two"})
    seen = await _order(sandbox, greedy, other)
    assert seen.index("other") <= 1


def test_a_user_is_limited_by_threads_too():
    sandbox = Sandbox(latency=0.02, in_flight_limit=1)
    generator = CogViewImageGenerator(
        base_url=sandbox.base_url, max_concurrency=5, max_concurrency_per_user=1, download=False, user_id="user-one"
    )
    assert len(generator.batch(["a kitten"] * 6)) == 6
    assert len(sandbox.requests) == 6  # none was refused
