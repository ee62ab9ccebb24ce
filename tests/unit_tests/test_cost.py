"""What images cost is counted once, exactly, and what is unknown is never counted as nothing."""

import asyncio
import contextlib
import copy
import gc
import json
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from decimal import Decimal

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableLambda

from langchain_cogview import CogViewError, CogViewImageGenerator, CogViewImageTool
from langchain_cogview.callbacks import CostCallbackHandler, collect_content_filter_events, collect_image_costs
from langchain_cogview.cost import Charges, ImageCosts, ModelCosts
from tests.unit_tests.simulated_events import (
    MODEL,
    SENDER,
    blocked,
    failed,
    generated,
    new_id,
    progress,
    retry,
    unknown,
)
from tests.unit_tests.test_agent import agent_of, wants


class Payload(dict):
    """The payload of an event, for a test of whether something still holds it."""


def costs_of(*events):
    costs = ImageCosts()
    for name, event in events:
        costs.on_event(name, event)
    return costs


# --- amounts


def test_amounts_add_up_exactly_by_model_and_currency():
    costs = costs_of(
        *[generated() for _ in range(3)],
        generated(model="glm-image", cost="0.10"),
        generated(cost="0.01", currency="USD"),
        generated(model="cogview-3-flash", cost="0"),
    )
    assert costs.images == 6
    assert costs.total("CNY") == costs.total("cny") == Decimal("0.28")
    assert costs.total("USD") == Decimal("0.01")
    assert costs.total("EUR") == 0
    assert costs.by_currency == {"CNY": Decimal("0.28"), "USD": Decimal("0.01")}
    assert costs.by_model == {
        (MODEL, "CNY"): ModelCosts(3, Decimal("0.18")),
        ("glm-image", "CNY"): ModelCosts(1, Decimal("0.10")),
        (MODEL, "USD"): ModelCosts(1, Decimal("0.01")),
        ("cogview-3-flash", "CNY"): ModelCosts(1, Decimal(0)),
    }
    assert costs.complete
    assert costs.prices_as_of == date(2026, 10, 1)


@pytest.mark.parametrize(
    ("cost", "currency"), [(None, "CNY"), (None, None), ("0.06", None), ("cheap", "CNY"), ("NaN", "CNY"), ("Infinity", "CNY")]
)  # fmt: skip
def test_an_unknown_price_is_unknown_and_not_zero(cost, currency):
    costs = costs_of(generated(), generated(model="tomorrow", cost=cost, currency=currency))
    assert (costs.images, costs.unpriced, costs.complete) == (2, 1, False)
    assert costs.total("CNY") == Decimal("0.06")
    assert costs.by_model["tomorrow", None] == ModelCosts(1, None)
    assert str(costs) == "Made 2 images for 0.06 CNY and 1 of unknown price (list prices of 2026-10-01)"


def test_a_known_price_after_an_unknown_one_does_not_make_the_row_known():
    costs = costs_of(*[generated(cost=cost, currency=None) for cost in ("0", None, "0")])
    assert costs.by_model[MODEL, None] == ModelCosts(3, None)
    assert costs.unpriced == 1


def test_cached_and_sandbox_images_cost_nothing():
    costs = costs_of(
        generated(cached=True, cost="0"),
        generated(cached=True, cost="0.06"),
        generated(sandbox=True, cost="0"),
        generated(sandbox=True, cost=None, currency=None),
    )
    assert (costs.images, costs.cached, costs.sandbox, costs.unpriced) == (4, 2, 2, 0)
    assert costs.by_currency == {"CNY": 0}
    assert str(costs) == "Made 4 images (2 cached, 2 of the sandbox) at no cost"
    assert str(costs_of(generated(sandbox=True, cost="0"))) == "Made 1 image (of the sandbox) at no cost"


def test_what_gave_no_image_costs_nothing_and_is_counted_apart():
    costs = costs_of(blocked(), blocked(), failed(), failed(outcome="not_run"))
    assert (costs.images, costs.blocked, costs.failed) == (0, 2, 2)
    assert costs.by_currency == {}
    assert costs.uncertain == Charges(0, {}, 0)
    assert costs.complete
    assert str(costs) == "Made no image; 2 blocked; 2 failed"


# --- what may have been charged


def test_what_may_have_been_charged_is_in_no_total():
    costs = costs_of(generated(), unknown(), unknown(model="glm-image", cost="0.10"), unknown(cost=None, currency=None))
    assert costs.total("CNY") == Decimal("0.06")
    assert costs.uncertain == Charges(3, {"CNY": Decimal("0.16")}, 1)
    assert costs.failed == 3
    assert costs.complete
    assert str(costs) == (
        "Made 1 image for 0.06 CNY (list prices of 2026-10-01); 3 failed; "
        "3 not received but possibly charged (0.16 CNY and 1 of unknown price)"
    )


def test_an_image_that_comes_after_all_is_no_longer_uncertain():
    request_id = new_id()
    costs = costs_of(unknown(request_id), generated(request_id))
    assert costs.uncertain.count == 0
    assert costs.total("CNY") == Decimal("0.06")


@pytest.mark.parametrize("error", ["CogViewOutcomeUnknownError", "CogViewMalformedReplyError"])
def test_an_attempt_of_unknown_outcome_that_is_sent_again_may_be_charged_besides_the_image(error):
    one, other = new_id(), new_id()
    costs = costs_of(
        progress("sent", one), retry(one, error=error), retry(one, error=error, attempt=2), generated(one),
        progress("sent", other), retry(other), generated(other),
    )  # fmt: skip
    assert costs.images == 2
    assert costs.total("CNY") == Decimal("0.12")
    assert costs.uncertain == Charges(2, {"CNY": Decimal("0.12")}, 0)


def test_an_unknown_outcome_in_the_sandbox_costs_nothing():
    costs = costs_of(unknown(sandbox=True))
    assert costs.uncertain == Charges(1, {"CNY": Decimal(0)}, 0)
    assert "1 not received (no cost)" in str(costs)


def test_images_in_flight_are_shown():
    ids = [new_id() for _ in range(4)]
    costs = costs_of(
        *[progress("sent", item) for item in ids], progress("sent", ids[0]), progress("processing", ids[1])
    )
    assert costs.in_flight == 4
    costs.on_event(*generated(ids[0]))
    costs.on_event(*blocked(ids[1]))
    costs.on_event(*unknown(ids[2]))
    assert costs.in_flight == 1
    assert str(costs).endswith("; 1 in flight; 1 not received but possibly charged (0.06 CNY)")


# --- how it is written


def test_the_text_is_one_line_and_names_the_day_of_the_prices():
    costs = costs_of(*[generated() for _ in range(3)], unknown())
    line = "Made 3 images for 0.18 CNY (list prices of 2026-10-01); 1 failed; 1 not received but possibly charged (0.06 CNY)"
    assert str(costs) == line
    assert repr(costs) == f"<ImageCosts: {line}>"
    assert str(ImageCosts()) == "Made no image"
    assert str(costs_of(generated())) == "Made 1 image for 0.06 CNY (list prices of 2026-10-01)"


def test_an_amount_is_never_written_in_powers_of_ten():
    costs = costs_of(generated(cost="1E-7"), generated(cost="1E+2", currency="USD"))
    assert "0.0000001 CNY + 100 USD" in str(costs)
    assert costs.to_dict()["amounts"] == {"CNY": "0.0000001", "USD": "100"}


def test_the_dict_is_plain_json():
    costs = costs_of(generated(), generated(model="tomorrow", cost=None), unknown(), blocked(), progress("sent"))
    values = costs.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values == {
        "images": 2, "cached": 0, "sandbox": 0, "unpriced": 1, "blocked": 1, "failed": 1, "cancelled": 0, "in_flight": 1, "complete": False,
        "amounts": {"CNY": "0.06"},
        "by_model": [
            {"model": MODEL, "currency": "CNY", "count": 1, "amount": "0.06"},
            {"model": "tomorrow", "currency": None, "count": 1, "amount": None},
        ],
        "uncertain": {"count": 1, "amounts": {"CNY": "0.06"}, "unpriced": 0},
        "prices_as_of": "2026-10-01",
    }  # fmt: skip


def test_what_is_handed_out_is_a_copy():
    costs = costs_of(generated())
    costs.by_currency.clear()
    costs.by_model.clear()
    costs.charges.amounts.clear()
    assert costs.total("CNY") == Decimal("0.06")
    assert len(costs.by_model) == 1


@pytest.mark.parametrize("again", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy])
def test_costs_can_go_to_another_process(again):
    costs = costs_of(generated(), unknown())
    other = again(costs)
    other.on_event(*generated())
    assert (other.images, costs.images) == (2, 1)


def test_events_of_others_are_passed_over():
    costs = ImageCosts()
    handler = CostCallbackHandler()
    payload = Payload()
    held = weakref.ref(payload)
    for name, event in (("other", 5), ("other", payload), ("cogview.content_filter", {}), ("on_tool", None)):
        costs.on_event(name, event)
        handler.on_custom_event(name, event, run_id=new_id())
    assert str(costs) == str(handler.costs) == "Made no image"
    del payload, event
    gc.collect()
    assert held() is None


def test_many_threads_lose_nothing():
    costs = ImageCosts()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work():
        for _ in range(100):
            request_id = new_id()
            costs.on_event(*progress("sent", request_id))
            costs.on_event(*generated(request_id))
            costs.on_event(*unknown())
            str(costs)

    threads = [threading.Thread(target=work) for _ in range(8)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert (costs.images, costs.failed, costs.in_flight) == (800, 800, 0)
    assert costs.total("CNY") == Decimal(48)
    assert costs.uncertain.amounts == {"CNY": Decimal(48)}


# --- runs

RUNS = {
    "invoke": lambda runnable, inputs, config: [runnable.invoke(item, config) for item in inputs],
    "ainvoke": lambda runnable, inputs, config: [asyncio.run(runnable.ainvoke(item, config)) for item in inputs],
    "batch": lambda runnable, inputs, config: runnable.batch(inputs, config),
    "abatch": lambda runnable, inputs, config: asyncio.run(runnable.abatch(inputs, config)),
    "batch as completed": lambda runnable, inputs, config: list(runnable.batch_as_completed(inputs, config)),
    "stream": lambda runnable, inputs, config: [list(runnable.stream(item, config)) for item in inputs],
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


@every_run
@pytest.mark.parametrize("nested", [False, True])
def test_an_image_counts_once_in_every_way_to_run(run, nested):
    runnable = (RunnableLambda(lambda events: events) | SENDER | (lambda count: count)) if nested else SENDER
    handler = CostCallbackHandler()
    with collect_image_costs() as costs:
        run(runnable, [[generated(), blocked()] for _ in range(5)], {"callbacks": [handler]})
    assert str(handler.costs) == str(costs) == "Made 5 images for 0.30 CNY (list prices of 2026-10-01); 5 blocked"


@every_run
def test_a_handler_that_is_in_the_list_twice_counts_once(run):
    handler = CostCallbackHandler()
    runnable = SENDER.with_config(callbacks=[handler])
    run(runnable, [[generated()], [generated()]], {"callbacks": [handler, handler]})
    assert handler.costs.images == 2


@every_run
def test_a_handler_of_the_outer_and_of_the_inner_run_counts_once(run):
    handler = CostCallbackHandler()

    def inner(events, config):
        with collect_image_costs() as costs:
            SENDER.with_config(callbacks=[handler]).invoke(events, config)
        return costs

    with collect_image_costs() as outer:
        run(RunnableLambda(inner), [[generated()], [generated()]], {"callbacks": [handler]})
    assert handler.costs.images == outer.images == 2


@pytest.mark.parametrize("collect", [collect_image_costs, collect_content_filter_events])
def test_a_block_opened_inside_a_run_hands_an_event_to_the_outer_block_once(collect):
    event = "cogview.content_filter", {"level": 1, "blocked": True}
    inners = []

    def inner(events, config):
        with collect() as collected:
            SENDER.invoke(events, config)
        inners.append(collected)

    with collect() as outer:
        RunnableLambda(inner).invoke([generated(), event])
    counts = [item.images if collect is collect_image_costs else len(item) for item in (outer, *inners)]
    assert counts == [1, 1]


def test_blocks_of_both_kinds_can_be_nested_in_any_order():
    filtered = "cogview.content_filter", {"level": 1, "blocked": True}
    with collect_image_costs() as outer, collect_content_filter_events() as events, collect_image_costs() as inner:
        SENDER.invoke([generated(), filtered])
    SENDER.invoke([generated(), filtered])
    assert (outer.images, inner.images, len(events)) == (1, 1, 1)


def test_blocks_leave_nothing_behind_in_langchain():
    from langchain_core.tracers.context import _configure_hooks

    before = len(_configure_hooks)
    for _ in range(50):
        with collect_image_costs():
            pass
    assert len(_configure_hooks) == before


async def test_an_event_arrives_though_every_thread_of_the_loop_is_busy():
    loop, free = asyncio.get_running_loop(), threading.Event()
    with ThreadPoolExecutor(1) as executor:
        loop.set_default_executor(executor)
        busy = loop.run_in_executor(None, free.wait)
        try:
            with collect_image_costs() as costs:
                await asyncio.wait_for(SENDER.ainvoke([generated()]), 60)
        finally:
            free.set()
        await busy
    assert costs.images == 1


def test_two_payloads_that_are_alike_are_two_images():
    request_id = new_id()
    handler = CostCallbackHandler()
    SENDER.invoke([generated(request_id), generated(request_id)], {"callbacks": [handler]})
    assert handler.costs.images == 2


def test_what_a_handler_remembers_of_events_is_bounded():
    handler, held = CostCallbackHandler(), []
    for _ in range(30):
        events = [(name, Payload(event)) for name, event in (generated() for _ in range(100))]
        held += [weakref.ref(event) for _, event in events]
        SENDER.invoke(events, {"callbacks": [handler, handler]})
    del events
    gc.collect()
    assert handler.costs.images == 3000
    assert sum(payload() is not None for payload in held) <= 1100


def test_a_faulty_neighbour_does_not_keep_an_image_from_being_counted():
    class Faulty(BaseCallbackHandler):
        def on_custom_event(self, name, data, **kwargs):
            raise RuntimeError

    handler = CostCallbackHandler()
    SENDER.invoke([generated()], {"callbacks": [Faulty(), handler]})
    asyncio.run(SENDER.ainvoke([generated()], {"callbacks": [Faulty(), handler]}))
    assert handler.costs.images == 2


# --- real work

INPUTS = ["a kitten", {"prompt": "two foals", "n": 2}, "[[content-filter]] x", "[[malformed]] x"]


async def streamed(generator, config):
    return [item async for item in generator.astream_many(INPUTS, config)]


def one_by_one(generator, config):
    for item in INPUTS:
        with contextlib.suppress(CogViewError):
            generator.invoke(item, config)


async def aone_by_one(generator, config):
    for item in INPUTS:
        with contextlib.suppress(CogViewError):
            await generator.ainvoke(item, config)


WORK = {
    "invoke": one_by_one,
    "ainvoke": lambda generator, config: asyncio.run(aone_by_one(generator, config)),
    "batch": lambda generator, config: generator.batch(INPUTS, config, return_exceptions=True),
    "abatch": lambda generator, config: asyncio.run(generator.abatch(INPUTS, config, return_exceptions=True)),
    "stream_many": lambda generator, config: list(generator.stream_many(INPUTS, config)),
    "astream_many": lambda generator, config: asyncio.run(streamed(generator, config)),
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_real_work_is_counted_once_by_handler_and_block(generator, work):
    handler = CostCallbackHandler()
    with collect_image_costs() as costs:
        work(generator, {"callbacks": [handler]})
    assert (
        str(costs)
        == str(handler.costs)
        == ("Made 3 images (of the sandbox), list price 0.18 CNY; 1 blocked; 1 failed; 1 not received (no cost)")
    )
    assert costs.by_model == {(MODEL, "CNY"): ModelCosts(3, Decimal(0))}


@pytest.mark.parametrize("run", ["invoke", "ainvoke", "batch", "abatch"])
def test_a_tool_and_an_agent_count_each_image_once(generator, run):
    tool = CogViewImageTool(generator=generator)
    asked = [
        {"type": "tool_call", "id": str(n), "name": tool.name, "args": {"prompt": f"kitten {n}"}} for n in range(3)
    ]
    handler = CostCallbackHandler()
    with collect_image_costs() as costs:
        RUNS[run](tool, asked, {"callbacks": [handler]})
        agent = agent_of(tool, wants("a", "b"), wants("[[content-filter]] c"))
        RUNS[run](agent, [{"messages": "draw"}], {"callbacks": [handler]})
    assert (costs.images, costs.blocked) == (handler.costs.images, handler.costs.blocked) == (5, 1)


def test_what_was_sent_again_though_its_outcome_is_unknown_may_be_charged_twice(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, retry_unknown=True)
    with collect_image_costs() as costs:
        generator.invoke("[[server-error:1]] x")
    assert (costs.images, costs.failed, costs.uncertain.count) == (1, 0, 1)


async def test_an_image_whose_caller_left_after_it_was_sent_may_be_charged(generator):
    sent = asyncio.Event()

    class Sent(CostCallbackHandler):
        def on_event(self, name, event):
            super().on_event(name, event)
            sent.set()

    handler = Sent()
    task = asyncio.create_task(generator.ainvoke("[[slow:60]] x", {"callbacks": [handler]}))
    await sent.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert str(handler.costs) == "Made no image; 1 cancelled; 1 not received (no cost)"
    assert handler.costs.in_flight == 0
