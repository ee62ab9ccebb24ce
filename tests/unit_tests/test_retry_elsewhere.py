"""Whoever retries around us by their defaults pays nothing twice: LangGraph, LangChain's middleware, tenacity."""

import asyncio
from typing import TypedDict

import pytest
import tenacity
from langchain.agents.middleware import ToolRetryMiddleware
from langchain_core.exceptions import ModelError, ModelTimeoutError
from langchain_core.rate_limiters import BaseRateLimiter
from langgraph.graph import END, START, StateGraph
from langgraph.types import RetryPolicy

from langchain_cogview import (
    RETRYABLE_ERRORS,
    CogViewBatchError,
    CogViewError,
    CogViewImageGenerator,
    CogViewImageTool,
    CogViewOutcomeUnknownError,
    errors,
    is_retryable,
)
from tests.unit_tests.test_agent import agent_of, wants

CLASSES = [kind for name, kind in vars(errors).items() if name.startswith("CogView")]
CLASSES.remove(CogViewError)  # the base, which is never raised itself
every_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
AT_ONCE = {"initial_interval": 0.001, "jitter": False}
FINAL = {
    "[[content-filter]]": 1, "[[content-filter:0:assistant]]": 1, "[[balance]]": 1, "[[auth]]": 1, "[[server-error]]": 1,
    "[[malformed]]": 1, " ": 0,
}  # fmt: skip
"""Prompts that fail for good, and how many requests are sent for each."""


class State(TypedDict, total=False):
    prompt: str


def graph_of(work, **policy):
    graph = StateGraph(State)
    graph.add_node("generate", work, retry_policy=RetryPolicy(**AT_ONCE, **policy))
    graph.add_edge(START, "generate")
    graph.add_edge("generate", END)
    return graph.compile()


@every_class
def test_the_default_policy_of_langgraph_repeats_no_node_that_may_have_been_paid(kind):
    runs = []

    def generate(state):
        runs.append(1)
        raise kind("It failed.")

    with pytest.raises(kind):
        graph_of(generate).invoke({})
    assert len(runs) == (3 if kind.is_retryable else 1)


@pytest.mark.parametrize("how", ["invoke", "ainvoke"])
@pytest.mark.parametrize("prompt", FINAL)
def test_a_node_that_fails_for_good_sends_its_request_once(sandbox, prompt, how):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, max_retries=0)

    def generate(state):
        generator.invoke(state["prompt"])

    async def agenerate(state):
        await generator.ainvoke(state["prompt"])

    with pytest.raises(CogViewError):
        if how == "invoke":
            graph_of(generate).invoke({"prompt": prompt})
        else:
            asyncio.run(graph_of(agenerate).ainvoke({"prompt": prompt}))
    assert len(sandbox.requests) == FINAL[prompt]


def test_a_node_that_did_not_run_may_be_repeated_by_langgraph(sandbox):
    sandbox.fail_next("busy")
    generator = CogViewImageGenerator(base_url=sandbox.base_url, max_retries=0)
    graph_of(lambda state: generator.invoke(state["prompt"]) and None).invoke({"prompt": "a kitten"})
    assert len(sandbox.requests) == 2


@every_class
def test_the_predicate_and_the_list_of_types_agree_with_the_class(kind):
    assert is_retryable(kind("x")) is issubclass(kind, RETRYABLE_ERRORS) is kind.is_retryable


def test_the_predicate_knows_langchains_errors_and_trusts_no_other():
    assert is_retryable(ModelTimeoutError("x"))
    assert not any(map(is_retryable, (ModelError("x"), ValueError("x"), ConnectionError("x"), KeyboardInterrupt())))


@pytest.mark.parametrize("retry_on", [is_retryable, RETRYABLE_ERRORS], ids=["predicate", "types"])
def test_a_policy_of_langgraph_takes_the_predicate_and_the_types(sandbox, retry_on):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, max_retries=0)
    graph = graph_of(lambda state: generator.invoke(state["prompt"]), retry_on=retry_on)
    with pytest.raises(CogViewOutcomeUnknownError):
        graph.invoke({"prompt": "[[server-error]]"})
    assert len(sandbox.requests) == 1
    with pytest.raises(errors.CogViewBusyError):
        graph.invoke({"prompt": "[[busy]]"})
    assert len(sandbox.requests) == 4


@pytest.mark.parametrize("how", ["batch", "abatch", "batch_as_completed", "abatch_as_completed"])
@pytest.mark.parametrize("prompt", ["[[busy]]", "[[unavailable]]"])
def test_a_batch_of_which_a_part_was_paid_is_repeated_by_nobody(sandbox, how, prompt):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, max_retries=0)
    inputs = ["a kitten", prompt, "a foal"]

    def generate(state):
        done = getattr(generator, how)(inputs)
        if how == "abatch":
            asyncio.run(done)
        elif how == "batch_as_completed":
            list(done)
        elif how == "abatch_as_completed":
            asyncio.run(exhausted(done))

    async def exhausted(results):
        return [result async for result in results]

    for policy in ({}, {"retry_on": is_retryable}):
        sandbox.reset()
        with pytest.raises(CogViewBatchError, match="1 of the 3 inputs failed") as caught:
            graph_of(generate, **policy).invoke({})
        assert (len(sandbox.requests), sandbox.images_made) == (3, 2)
        assert [type(result).__name__ for result in caught.value.batch_results][::2] == ["ImageResult", "ImageResult"]
        assert caught.value.__cause__ is caught.value.batch_results[1]


def test_a_batch_of_which_nothing_ran_may_be_repeated(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, max_retries=0)
    with pytest.raises(errors.CogViewBusyError):
        graph_of(lambda state: generator.batch(["[[busy]] a", "[[busy]] b"])).invoke({})
    assert len(sandbox.requests) == 6


def test_a_batch_raises_first_what_may_have_been_charged(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, max_retries=0)
    with pytest.raises(CogViewOutcomeUnknownError):
        generator.batch(["[[busy]]", "[[content-filter]]", "[[server-error]]"])
    with pytest.raises(errors.CogViewContentFilterError):
        generator.batch(["[[busy]]", "[[content-filter]]"])


def test_a_batch_that_fails_in_a_foreign_way_is_not_repeated(sandbox):
    class Broken(BaseRateLimiter):
        def acquire(self, *, blocking=True):
            raise OSError("The limiter is down.")

        async def aacquire(self, *, blocking=True):
            return self.acquire(blocking=blocking)

    generator = CogViewImageGenerator(base_url=sandbox.base_url, rate_limiter=Broken())
    runs = []
    with pytest.raises(CogViewBatchError, match="OSError"):
        graph_of(lambda state: runs.append(1) or generator.batch(["a kitten"])).invoke({})
    assert len(runs) == 1


def test_with_retry_and_with_fallbacks_take_the_types(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, max_retries=0)
    other = CogViewImageGenerator(base_url=sandbox.base_url, model="cogview-3-flash", max_retries=0)
    retried = generator.with_retry(
        retry_if_exception_type=RETRYABLE_ERRORS, wait_exponential_jitter=False, stop_after_attempt=2
    )
    backed = generator.with_fallbacks([other], exceptions_to_handle=RETRYABLE_ERRORS)
    for runnable, again in ((retried, 2), (backed, 2)):
        for prompt, sent in (("[[server-error]]", 1), ("[[unavailable]]", again)):
            before = len(sandbox.requests)
            with pytest.raises(CogViewError):
                runnable.invoke(prompt)
            assert len(sandbox.requests) - before == sent


def test_tenacity_takes_the_predicate(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, max_retries=0)

    @tenacity.retry(retry=tenacity.retry_if_exception(is_retryable), stop=tenacity.stop_after_attempt(3), reraise=True)
    def generate(prompt):
        return generator.invoke(prompt)

    for prompt, sent in (("[[server-error]]", 1), ("[[content-filter]]", 2), ("[[busy]]", 5)):
        with pytest.raises(CogViewError):
            generate(prompt)
        assert len(sandbox.requests) == sent


@pytest.mark.parametrize("prompt", ["[[balance]]", "[[auth]]"])
def test_langchains_tool_middleware_does_not_repeat_a_call_that_fails_for_good(sandbox, tmp_path, prompt):
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path)
    middleware = ToolRetryMiddleware(initial_delay=0, jitter=False, on_failure="error")
    with pytest.raises(CogViewError):
        agent_of(tool, wants(prompt), middleware=[middleware]).invoke({"messages": "x"})
    assert len(sandbox.requests) == 1
