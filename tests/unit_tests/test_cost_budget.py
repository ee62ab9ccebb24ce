"""What may be spent: each POST that may be charged counts before it is sent, whatever stands around the generator.

The sandbox's ledger is the witness: how many POSTs came, and what they cost.
"""

import asyncio
import threading
from decimal import Decimal

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.rate_limiters import BaseRateLimiter
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough

from langchain_cogview import (
    Budget,
    CogViewBudgetError,
    CogViewConfigurationError,
    CogViewContentFilterError,
    CogViewError,
    CogViewImageGenerator,
    CogViewImageTool,
    CogViewOutcomeUnknownError,
    Sandbox,
    collect_image_costs,
    run_job,
)
from langchain_cogview.budget import Spending
from langchain_cogview.cost import Charges, Money, checked_amount
from langchain_cogview.sandbox.server import SandboxServer
from tests.conftest import FAKE_KEY

both = pytest.mark.parametrize("how", ["sync", "async"])


def call(**args):
    return {"type": "tool_call", "id": "1", "name": "cogview_generate_image", "args": args}


def run(tool, how, config=None, **args):
    message = call(**args)
    return tool.invoke(message, config) if how == "sync" else asyncio.run(tool.ainvoke(message, config))


def posts(sandbox):
    return [request for request in sandbox.requests if request.method == "POST"]


def configurable(generator, **values):
    fields = {name: ConfigurableField(id=name) for name in values}
    return generator.configurable_fields(**fields).with_config(configurable=values)


WRAPPED = {
    "bound": lambda generator: generator.bind(n=10),
    "bound twice": lambda generator: generator.bind(n=10).bind(quality="hd"),
    "bound, then with a config": lambda generator: generator.bind(n=10).with_config(tags=["x"]),
    "with listeners": lambda generator: generator.bind(n=10).with_listeners(on_end=lambda run: None),
    "with types": lambda generator: generator.bind(n=10).with_types(input_type=str),
    "configured": lambda generator: configurable(generator, n=10),
    "an alternative": lambda generator: generator.configurable_alternatives(
        ConfigurableField(id="which"), default_key="one", many=generator.bind(n=10)
    ).with_config(configurable={"which": "many"}),
    "bound with a budget of its own": lambda generator: generator.bind(n=10, budget=None),
}


@both
@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("limit", [{"max_images": 2}, {"budget": Decimal("0.12")}])
def test_a_limit_holds_whatever_langchain_wraps_around_the_generator(sandbox, tmp_path, wrapped, limit, how):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path)
    tool = CogViewImageTool(generator=wrapped(generator), **limit)
    message = run(tool, how, prompt="a kitten")
    assert "nothing was sent" in message.content
    assert sandbox.requests == []


@both
@pytest.mark.parametrize("budget", ["0.50", 1, Decimal(1), True])
def test_an_amount_in_place_of_a_budget_is_refused_and_nothing_is_sent(sandbox, how, budget):
    generator = CogViewImageGenerator(base_url=sandbox.base_url)
    with pytest.raises(CogViewConfigurationError, match="takes a Budget"):
        if how == "sync":
            generator.invoke("x", budget=budget)
        else:
            asyncio.run(generator.ainvoke("x", budget=budget))
    assert not sandbox.requests


@both
def test_what_is_configured_at_the_call_is_counted(sandbox, tmp_path, how):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path)
    fields = generator.configurable_fields(n=ConfigurableField(id="n"), model=ConfigurableField(id="model"))
    tool = CogViewImageTool(generator=fields, budget=Decimal("0.19"))
    assert "nothing was sent" in run(tool, how, {"configurable": {"n": 4}}, prompt="x").content
    assert (
        "nothing was sent"
        in run(tool, how, {"configurable": {"n": 2, "model": "glm-image"}}, prompt="x", quality="hd").content
    )
    assert run(tool, how, {"configurable": {"n": 3}}, prompt="x").status == "success"
    assert len(posts(sandbox)) == 3


@both
def test_a_bound_model_counts_at_its_own_price(sandbox, tmp_path, how):
    free = CogViewImageGenerator(model="cogview-3-flash", base_url=sandbox.base_url, output_dir=tmp_path)
    tool = CogViewImageTool(generator=free.bind(model="glm-image"), budget=Decimal("0.25"))
    assert [run(tool, how, prompt="x").status for _ in range(3)] == ["success", "success", "error"]
    assert sandbox.images_made == 2


def test_a_price_cannot_be_bound(sandbox, tmp_path):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path)
    tool = CogViewImageTool(generator=generator.bind(prices={"cogview-4-250304": 0}), budget=Decimal("0.06"))
    assert "There is no argument 'prices'" in tool.invoke(call(prompt="x")).content
    assert sandbox.requests == []


def test_the_schema_is_that_of_the_bound_model(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url)
    assert CogViewImageTool(generator=generator.bind(model="glm-image")).args["size"]["enum"][0] == "1280x1280"


def test_a_currency_that_is_configured_away_is_refused(sandbox, tmp_path):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path)
    fields = generator.configurable_fields(region=ConfigurableField(id="region"))
    tool = CogViewImageTool(generator=fields, budget=Decimal("0.10"))
    message = tool.invoke(call(prompt="x"), {"configurable": {"region": "international"}})
    assert "is in CNY, and the image is billed in USD" in message.content
    assert sandbox.requests == []


def test_what_cannot_be_counted_is_refused_when_the_tool_is_made(generator):
    others = [
        generator.with_retry(),
        generator.with_fallbacks([generator]),
        RunnablePassthrough() | generator,
        RunnableLambda(generator.invoke),
        RunnablePassthrough.assign(image=generator),
        generator.configurable_alternatives(ConfigurableField(id="which"), lazy=lambda: generator),
        generator.configurable_alternatives(ConfigurableField(id="which"), other=RunnableLambda(generator.invoke)),
        generator.bind(n=2).with_retry().bind(n=3),
    ]
    for other in others:
        with pytest.raises(CogViewConfigurationError, match="generator= takes a CogViewImageGenerator"):
            CogViewImageTool(generator=other)


def test_an_unknown_price_behind_a_binding_is_refused_when_the_tool_is_made(generator):
    with pytest.raises(CogViewConfigurationError, match="A budget needs the price of cogview-3"):
        CogViewImageTool(generator=generator.bind(model="cogview-3"), budget=1)


@pytest.fixture
def no_waits(monkeypatch):
    """Between attempts for which no reply asks for a wait."""
    monkeypatch.setattr("random.uniform", lambda least, most: least)


@both
@pytest.mark.usefixtures("no_waits")
def test_each_post_that_may_be_charged_counts(sandbox, tmp_path, how):
    tool = CogViewImageTool(
        base_url=sandbox.base_url, output_dir=tmp_path, max_images=2, retry_unknown=True, max_retries=5
    )
    sandbox.fail_next("server-error", times=20)
    assert "may have been" in run(tool, how, prompt="x").content
    assert len(posts(sandbox)) == 2
    assert "nothing was sent" in run(tool, how, prompt="x").content
    assert len(posts(sandbox)) == 2


@both
@pytest.mark.usefixtures("no_waits")
def test_what_was_charged_before_the_image_came_counts_too(sandbox, tmp_path, how):
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path, budget=Decimal("0.18"), retry_unknown=True)
    sandbox.fail_next("server-error")
    assert run(tool, how, prompt="x").status == "success"
    assert [run(tool, how, prompt="x").status for _ in range(2)] == ["success", "error"]
    assert len(posts(sandbox)) == 3


@both
def test_a_fallback_model_counts_at_its_own_price(sandbox, tmp_path, how):
    dear = {"fallback_models": ["glm-image"], "max_retries": 0, "use_tasks": False}
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path, budget=Decimal("0.16"), **dear)
    sandbox.fail_next("busy")
    assert run(tool, how, prompt="x").status == "success"
    assert run(tool, how, prompt="x").status == "success"  # 0.10 + 0.06
    assert "nothing was sent" in run(tool, how, prompt="x").content
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path, budget=Decimal("0.07"), **dear)
    sandbox.fail_next("busy")
    before = sandbox.images_made
    assert "does not cover" in run(tool, how, prompt="x").content
    assert sandbox.images_made == before


@both
def test_a_cached_image_is_free(sandbox, tmp_path, how):
    tool = CogViewImageTool(
        base_url=sandbox.base_url, output_dir=tmp_path / "images", cache=tmp_path / "cache", max_images=1
    )
    assert [run(tool, how, prompt="x").status for _ in range(3)] == ["success"] * 3
    assert run(tool, how, prompt="y").status == "error"
    assert len(posts(sandbox)) == 1


class Refusing(BaseRateLimiter):
    def acquire(self, *, blocking=True):
        raise RuntimeError("no leave")

    async def aacquire(self, *, blocking=True):
        raise RuntimeError("no leave")


@both
def test_a_call_that_the_rate_limiter_refuses_uses_nothing_up(sandbox, tmp_path, how):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path)
    tool = CogViewImageTool(
        generator=generator.configurable_fields(rate_limiter=ConfigurableField(id="limiter")), max_images=1
    )
    for _ in range(3):
        with pytest.raises(RuntimeError):
            run(tool, how, {"configurable": {"limiter": Refusing()}}, prompt="x")
    assert run(tool, how, prompt="x").status == "success"


async def test_a_call_that_is_cancelled_in_the_queue_uses_nothing_up(tmp_path):
    with Sandbox() as sandbox:
        settings = {"base_url": sandbox.base_url, "output_dir": tmp_path, "max_concurrency": 1}
        first = asyncio.create_task(CogViewImageGenerator(**settings).ainvoke("[[slow:60]]"))
        while not sandbox.requests:
            await asyncio.sleep(0.001)
        tool = CogViewImageTool(**settings, max_images=1)
        queued = asyncio.create_task(tool.ainvoke(call(prompt="x")))
        await asyncio.sleep(0.05)
        for task in (queued, first):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (await tool.ainvoke(call(prompt="x"))).status == "success"
        assert len(posts(sandbox)) == 2


@both
def test_a_request_that_could_not_be_sent_uses_nothing_up(how):
    budget = Budget(max_images=1)
    generator = CogViewImageGenerator(base_url="http://127.0.0.1:9", api_key="a.b", max_retries=0)
    with pytest.raises(CogViewError):
        generator.invoke("x", budget=budget) if how == "sync" else asyncio.run(generator.ainvoke("x", budget=budget))
    assert budget.images == 0


def test_one_budget_holds_for_many_threads_and_tasks_and_generators():
    with Sandbox(latency=0.01) as sandbox:
        budget = Budget("0.30", "CNY")
        generators = [CogViewImageGenerator(base_url=sandbox.base_url, max_concurrency=8) for _ in range(4)]

        def work(generator):
            generator.batch([f"p{number}" for number in range(10)], return_exceptions=True, budget=budget)

        threads = [threading.Thread(target=work, args=(generator,)) for generator in generators[:3]]
        for thread in threads:
            thread.start()
        asyncio.run(generators[3].abatch([f"q{number}" for number in range(10)], return_exceptions=True, budget=budget))
        for thread in threads:
            thread.join()
        assert sandbox.images_made == len(posts(sandbox)) == budget.images == 5
        assert str(budget.spent) == "0.30 CNY"


@both
def test_a_submitted_task_counts(sandbox, how):
    budget = Budget(max_images=1)
    generator = CogViewImageGenerator(base_url=sandbox.base_url, model="glm-image")

    def submit():
        if how == "sync":
            return generator.submit("x", budget=budget)
        return asyncio.run(generator.asubmit("x", budget=budget))

    submit()
    with pytest.raises(CogViewBudgetError):
        submit()
    assert len(posts(sandbox)) == 1


@both
def test_a_task_that_makes_no_image_releases_its_reservation(sandbox, tmp_path, how):
    tool = CogViewImageTool(base_url=sandbox.base_url, model="glm-image", output_dir=tmp_path, max_images=1)
    for _ in range(2):
        assert "nothing" not in run(tool, how, prompt="[[content-filter]]").content
    assert run(tool, how, prompt="x").status == "success"


def test_parallel_calls_of_an_agent_stay_within_the_limit(tmp_path):
    from langchain.agents import create_agent
    from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
    from langchain_core.messages import AIMessage

    class Model(GenericFakeChatModel):
        def bind_tools(self, tools, **kwargs):
            return self

    calls = [{"name": "cogview_generate_image", "id": str(n), "args": {"prompt": f"p{n}"}} for n in range(8)]
    with Sandbox(latency=0.01) as sandbox:
        tool = CogViewImageTool(
            generator=CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path).bind(n=2), max_images=5
        )
        agent = create_agent(Model(messages=iter([AIMessage("", tool_calls=calls), AIMessage("done")])), tools=[tool])
        output = agent.invoke({"messages": "draw"})
        made = [message for message in output["messages"] if message.type == "tool" and message.status == "success"]
        assert (len(made), len(posts(sandbox))) == (2, 4)


@both
@pytest.mark.usefixtures("no_waits")
def test_a_job_counts_each_post_that_may_be_charged_over_all_runs(sandbox, tmp_path, how):
    from langchain_cogview import arun_job

    prompts = [f"p{number}" for number in range(8)]
    generator = CogViewImageGenerator(
        base_url=sandbox.base_url, retry_unknown=True, max_retries=5, max_concurrency=1, output_dir=tmp_path
    )

    def again(budget):
        arguments = {"generator": generator, "retry_unknown": True, "progress": False, "budget": budget}
        if how == "sync":
            return run_job(prompts, tmp_path / "out", **arguments)
        return asyncio.run(arun_job(prompts, tmp_path / "out", **arguments))

    sandbox.fail_next("server-error", times=50)
    again("0.12")
    assert len(posts(sandbox)) == 2
    again("0.12")
    assert len(posts(sandbox)) == 2
    again("0.18")
    assert len(posts(sandbox)) == 3
    sandbox.reset()
    report = again("0.30")
    assert (report.made, len(posts(sandbox))) == (2, 2)


@both
@pytest.mark.usefixtures("no_waits")
def test_the_costs_count_each_post_that_may_have_been_charged(sandbox, how):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, retry_unknown=True, max_retries=2)
    sandbox.fail_next("server-error", times=3)
    with collect_image_costs() as costs, pytest.raises(CogViewOutcomeUnknownError):
        generator.invoke("x") if how == "sync" else asyncio.run(generator.ainvoke("x"))
    assert (len(posts(sandbox)), costs.uncertain.count) == (3, 3)
    budget = Budget(max_images=1)
    sandbox.fail_next("server-error", times=3)
    with collect_image_costs() as costs, pytest.raises(CogViewOutcomeUnknownError):
        generator.invoke("x", budget=budget) if how == "sync" else asyncio.run(generator.ainvoke("x", budget=budget))
    assert (len(posts(sandbox)), costs.uncertain.count) == (4, 1)


# --- amounts


ABSURD = ["1E+1000000", "-1", "NaN", "Infinity", "-0.01", "1E-1000000", "1000000001", "a lot", "", "0." + "1" * 30]


@pytest.mark.parametrize("amount", ABSURD)
def test_an_absurd_amount_is_refused_as_a_price_and_as_a_budget(amount, tmp_path):
    with pytest.raises(CogViewConfigurationError):
        Budget(amount)
    with pytest.raises(ValueError):
        CogViewImageGenerator(base_url="sandbox:", prices={"cogview-4": amount})
    with pytest.raises(ValueError):
        CogViewImageTool(base_url="sandbox:", budget=amount)
    with pytest.raises(CogViewConfigurationError):
        run_job(["x"], tmp_path, base_url="sandbox:", budget=amount, progress=False)
    assert Money.of({"cost": amount, "currency": "CNY"}) == Money()


@given(st.decimals(min_value=0, max_value=10**9, places=6), st.integers(1, 100))
def test_every_price_that_is_accepted_can_be_counted(amount, count):
    price = Money(checked_amount(amount), "CNY")
    charges = Charges()
    charges.add(price, count)
    assert str(charges) == (str(Money(count * amount, "CNY")) if amount else "no cost")
    budget = Budget(max_images=count)
    held = budget.reserve(price, count)
    for _ in range(count):
        held.commit(price)
    with pytest.raises(CogViewBudgetError):
        held.commit(price)
    assert budget.spent.amount == count * amount


@given(st.lists(st.sampled_from(["reserve", "commit", "dearer", "release", "end"]), max_size=40))
def test_a_budget_is_never_exceeded_and_forgets_nothing(calls):
    budget, price, dearer = (
        Budget("1.00", "CNY", max_images=7),
        Money(Decimal("0.1"), "CNY"),
        Money(Decimal("0.3"), "CNY"),
    )
    open_, charges, spent = [], [], Decimal(0)
    for call in calls:
        try:
            if call == "reserve":
                open_.append(budget.reserve(price, 2))
            elif call in {"commit", "dearer"} and open_:
                amount = price if call == "commit" else dearer
                charges.append((open_[-1].commit(amount), amount.amount))
                spent += amount.amount
            elif call == "release" and charges:
                charge, amount = charges.pop()
                charge.release()
                charge.release()
                spent -= amount
            elif call == "end" and open_:
                open_.pop().release()
        except CogViewBudgetError:
            pass
        assert spent <= budget.spent.amount <= budget.amount
        assert len(charges) <= budget.images <= 7
    for held in open_:
        held.release()
    assert (budget.spent.amount, budget.images) == (spent, len(charges))


class Sent(BaseCallbackHandler):
    def __init__(self):
        self.uncertain = []

    def on_custom_event(self, name, data, **kwargs):
        if data.get("stage") == "failed":
            self.uncertain.append(data["uncertain"])


def test_the_event_of_a_failure_says_how_many_requests_may_have_been_charged(sandbox):
    sent = Sent()
    generator = CogViewImageGenerator(base_url=sandbox.base_url, retry_unknown=True, max_retries=2)
    sandbox.fail_next("server-error")
    sandbox.fail_next("content-filter")
    with pytest.raises(CogViewError):
        generator.invoke("x", {"callbacks": [sent]})
    with pytest.raises(CogViewError):
        generator.invoke("[[content-filter]]", {"callbacks": [sent]})
    assert sent.uncertain == [1, 0]


# --- what is free


def posing(**settings):
    """A generator of a service that calls its images placeholders."""
    reply = httpx.Response(
        200, json={"data": [{"url": "https://images.example/a.png"}]}, headers={"x-cogview-sandbox": "1"}
    )
    client = httpx.Client(transport=httpx.MockTransport(lambda request: reply))
    return CogViewImageGenerator(**{"api_key": FAKE_KEY, "download": False, "http_client": client} | settings)


@pytest.mark.parametrize(
    ("settings", "cost"),
    [
        ({}, "0.06"),
        ({"api_key": "sandbox"}, "0.06"),
        ({"base_url": "https://gateway.example/v1"}, "0.06"),
        ({"base_url": "http://127.0.0.1:8765/api/paas/v4"}, "0.06"),
        ({"base_url": "https://sandbox.invalid/api/paas/v4"}, "0.06"),
        ({"base_url": "http://127.0.0.1.example:8765/api/paas/v4", "api_key": "sandbox"}, "0.06"),
        ({"base_url": "http://127.0.0.1:8765/api/paas/v4", "api_key": "sandbox"}, "0"),
        ({"base_url": "http://localhost:8765/api/paas/v4", "api_key": "sandbox"}, "0"),
        ({"base_url": "http://[::1]:8765/api/paas/v4", "api_key": "sandbox"}, "0"),
    ],
)
@pytest.mark.filterwarnings("ignore:The base URL")
def test_a_service_that_calls_itself_a_sandbox_is_not_believed(settings, cost):
    with collect_image_costs() as costs:
        image = posing(**settings).invoke("x").images[0]
    assert (str(image.cost), image.sandbox) == (cost, cost == "0")
    assert costs.total("CNY") == Decimal(cost)


def test_a_sandbox_that_this_process_serves_is_free_while_it_runs():
    with SandboxServer() as server:
        for base_url in (server.base_url, server.base_url.replace("127.0.0.1", "localhost")):
            assert CogViewImageGenerator(base_url=base_url, api_key=FAKE_KEY).invoke("x").sandbox
        url = server.base_url
    assert not posing(base_url=url).invoke("x").sandbox


def test_an_image_must_fit_two_budgets_and_counts_in_both(sandbox):
    spending, of_one = Spending(), Budget(max_images=2, owner="this conversation")
    of_all = Budget("0.18", "CNY", owner="this tool", spending=spending)
    both = Budget("0.18", "CNY", owner="this tool", spending=spending, also=of_one)
    generator = CogViewImageGenerator(base_url=sandbox.base_url, max_retries=0)
    generator.invoke("a kitten", budget=both)
    with pytest.raises(CogViewContentFilterError):
        generator.invoke("[[content-filter]] a puppy", budget=both)
    assert (str(both.spent), both.images, str(of_one.spent), of_one.images) == ("0.06 CNY", 1, "0.06 CNY", 1)
    generator.invoke("a foal", budget=both)
    with pytest.raises(CogViewBudgetError, match="limit of 2 images for this conversation"):
        generator.invoke("a calf", budget=both)
    assert (str(of_all.spent), of_one.images) == ("0.12 CNY", 2)
    generator.invoke("a lamb", budget=of_all)
    with pytest.raises(CogViewBudgetError, match="for this tool does not cover"):
        generator.invoke("a calf", budget=both)
    both.commit(Money(Decimal("0.06"), "CNY"))
    both.release(Money(Decimal("0.06"), "CNY"))
    assert (of_all.images, of_one.images) == (3, 2)
