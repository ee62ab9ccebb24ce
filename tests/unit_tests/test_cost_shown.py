"""What an image costs stands where people look: in LangSmith's column, in the sandbox, and in the event of a blocked call."""

import asyncio

import pytest
from langchain_core.tracers.base import BaseTracer

from langchain_cogview import (
    CogViewContentFilterError,
    CogViewImageGenerator,
    ImageResult,
    collect_content_filter_events,
    collect_image_costs,
)
from tests.unit_tests.test_events import Recorder

both = pytest.mark.parametrize("how", ["sync", "async"])


class Traced(BaseTracer):
    """Keeps the metadata of the last root run."""

    def _persist_run(self, run):
        self.metadata = run.extra["metadata"]


def traced(generator, how, prompt="a kitten"):
    tracer = Traced()
    config = {"callbacks": [tracer]}
    generator.invoke(prompt, config) if how == "sync" else asyncio.run(generator.ainvoke(prompt, config))
    return tracer.metadata


def paid(reply, **settings):
    """A generator of a service that charges, by recorded replies."""
    return CogViewImageGenerator(download=False, **reply, **settings)


@both
def test_langsmith_sees_the_cost_in_dollars(how, service):
    international = paid(service("https://api.z.ai/api/paas/v4"), n=2)
    total = traced(international, how)["usage_metadata"]["total_cost"]
    assert total == pytest.approx(2 * float(international.price()[0]))


@both
def test_yuan_are_converted_only_at_the_users_rate(how, service):
    chinese = service("https://open.bigmodel.cn/api/paas/v4")
    assert "usage_metadata" not in traced(paid(chinese), how)
    assert traced(paid(chinese, usd_per_cny="0.14"), how)["usage_metadata"] == {
        "total_cost": pytest.approx(0.06 * 0.14)
    }


@pytest.mark.parametrize("rate", [0, -1, "much", float("nan"), float("inf")])
def test_a_rate_that_makes_no_sense_is_refused(rate):
    with pytest.raises(ValueError, match="usd_per_cny"):
        CogViewImageGenerator(base_url="sandbox:", usd_per_cny=rate)


@both
def test_the_sandbox_says_what_the_service_would_have_charged(sandbox, how):
    generator = CogViewImageGenerator(base_url=sandbox.base_url)
    with collect_image_costs() as costs:
        result = generator.invoke("a kitten") if how == "sync" else asyncio.run(generator.ainvoke("a kitten"))
    assert str(costs) == "Made 1 image (of the sandbox), list price 0.06 CNY"
    assert (str(result.image.cost), str(result.image.list_price)) == ("0", "0.06")
    assert str(ImageResult.from_artifact(result.to_artifact()).image.list_price) == "0.06"


@both
def test_a_blocked_event_says_that_nothing_was_charged(sandbox, how):
    recorder, generator = Recorder(), CogViewImageGenerator(base_url=sandbox.base_url)
    config, prompt = {"callbacks": [recorder]}, "[[content-filter]] a kitten"
    with collect_content_filter_events() as events, pytest.raises(CogViewContentFilterError):
        generator.invoke(prompt, config) if how == "sync" else asyncio.run(generator.ainvoke(prompt, config))
    assert events[0]["cost"] == "0"
    assert [event["cost"] for name, event in recorder.events if event.get("stage") == "failed"] == ["0"]


@pytest.fixture
def service():
    """Settings of a generator whose injected clients answer as the service does."""
    import httpx

    def respond(request):
        body = {"created": 1, "data": [{"url": "https://aigc-files.bigmodel.cn/a.png"}], "id": "1", "request_id": ""}
        return httpx.Response(200, json=body)

    def settings(base_url):
        transport = httpx.MockTransport(respond)
        return {
            "base_url": base_url,
            "api_key": "0123456789abcdef0123456789abcdef.0123456789abcdef",
            "http_client": httpx.Client(transport=transport),
            "http_async_client": httpx.AsyncClient(transport=transport),
        }

    return settings
