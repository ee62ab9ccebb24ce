"""What a call reports while it goes on, and what it costs: events, results and traces say the same."""

import asyncio
import json
from decimal import Decimal
from uuid import UUID

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.rate_limiters import BaseRateLimiter
from langchain_core.runnables import ensure_config
from langchain_core.tracers.base import BaseTracer

from langchain_cogview import CogViewContentFilterError, CogViewError, CogViewImageGenerator, CogViewImageTool

both = pytest.mark.parametrize("how", ["sync", "async"])


class Recorder(BaseCallbackHandler):
    def __init__(self):
        self.events = []

    def on_custom_event(self, name, data, **kwargs):
        json.dumps(data)
        self.events.append((name.removeprefix("cogview."), data))

    @property
    def names(self):
        return [data.get("stage", name) for name, data in self.events]


def invoked(generator, how, value="a kitten", *handlers):
    config = {"callbacks": list(handlers)}
    return generator.invoke(value, config) if how == "sync" else asyncio.run(generator.ainvoke(value, config))


@both
def test_an_image_has_an_event_when_it_is_sent_and_one_when_it_is_generated(sandbox, tmp_path, how):
    recorder = Recorder()
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path)
    result = invoked(generator, how, "a kitten", recorder)
    assert recorder.names == ["sent", "generated"]
    payload = recorder.events[1][1]
    assert payload["id"] == result.image.id
    assert payload["path"] == str(result.path)
    assert (payload["cost"], payload["currency"], payload["cached"], payload["sandbox"]) == ("0", "CNY", False, True)
    assert {data["request_id"] for _, data in recorder.events} == {result.request_id}
    assert all(data["version"] == 1 for _, data in recorder.events)


@both
def test_a_wait_before_a_retry_is_an_event_with_the_reason(sandbox, how):
    recorder = Recorder()
    sandbox.fail_next("rate-limit", retry_after=0)
    sandbox.fail_next("unavailable", retry_after=0)
    invoked(CogViewImageGenerator(base_url=sandbox.base_url), how, "x", recorder)
    assert recorder.names == ["sent", "retry", "retry", "generated"]
    assert [(data["attempt"], data["error"]) for name, data in recorder.events if name == "retry"] == [
        (1, "CogViewRateLimitError"), (2, "CogViewServerError"),
    ]  # fmt: skip


@both
@pytest.mark.parametrize(
    ("prompt", "facts"),
    [
        ("[[content-filter]]", (True, "final", "prompt", False)),
        ("[[server-error]]", (False, "unknown", "request", False)),
        ("[[busy]]", (False, "not_run", "service", True)),
        ("[[balance]]", (False, "final", "account", False)),
    ],
)
def test_the_event_of_an_image_that_was_not_made_says_why(sandbox, how, prompt, facts):
    recorder = Recorder()
    with pytest.raises(CogViewError):
        invoked(CogViewImageGenerator(base_url=sandbox.base_url, max_retries=0), how, prompt, recorder)
    failed = recorder.events[1][1]
    assert failed["stage"] == "failed"
    assert (failed["blocked"], failed["outcome"], failed["scope"], failed["is_retryable"]) == facts


@both
def test_each_image_of_several_has_its_own_events(sandbox, how):
    recorder = Recorder()
    invoked(CogViewImageGenerator(base_url=sandbox.base_url, n=3), how, "x", recorder)
    assert sorted(recorder.names) == ["generated"] * 3 + ["sent"] * 3


def test_the_tool_hands_its_call_id_on_to_every_event(sandbox, tmp_path):
    recorder = Recorder()
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path)
    call = {"type": "tool_call", "id": "call-7", "name": tool.name, "args": {"prompt": "a kitten"}}
    tool.invoke(call, {"callbacks": [recorder]})
    assert recorder.names == ["sent", "generated"]
    assert {data["tool_call_id"] for _, data in recorder.events} == {"call-7"}


def paid(**settings):
    """A generator whose service is no sandbox: the sandbox on a port, without the header that identifies it."""
    import httpx

    def answer(request):
        return httpx.Response(200, json={"data": [{"url": "https://example.com/x.png"}]})

    return CogViewImageGenerator(
        api_key="a.b", http_client=httpx.Client(transport=httpx.MockTransport(answer)), download=False, **settings
    )


def test_a_result_and_its_artifact_say_what_it_cost():
    result = paid().bind(n=2).invoke("x")
    assert (result.cost, result.currency, result.image.cost) == (Decimal("0.12"), "CNY", Decimal("0.06"))
    artifact = json.loads(json.dumps(result.to_artifact()))
    assert (artifact["cost"], artifact["currency"], artifact["images"][0]["cost"]) == ("0.12", "CNY", "0.06")
    assert type(result).from_artifact(artifact).cost == Decimal("0.12")


def test_an_international_key_is_billed_in_dollars():
    assert paid(region="international").invoke("x").currency == "USD"


def test_an_unknown_price_is_unknown_and_not_zero():
    with pytest.warns(UserWarning, match="does not know"):
        generator = paid(model="tomorrow-1")
    assert generator.price() is None
    assert generator.invoke("x").cost is None


def test_prices_can_be_set():
    generator = paid(prices={"CogView-4-250304": "0.05", "tomorrow-1": 1})
    assert generator.price() == (Decimal("0.05"), "CNY")
    assert generator.price("tomorrow-1") == (Decimal(1), "CNY")
    assert generator.invoke("x").cost == Decimal("0.05")
    with pytest.raises(ValueError):
        paid(prices={"cogview-4": -1})


class Tracer(BaseTracer):
    def __init__(self):
        super().__init__()
        self.metadata = []

    def _persist_run(self, run):
        self.metadata.append(run.extra["metadata"])


@both
def test_the_trace_of_a_run_says_what_it_cost_and_what_the_filter_said(sandbox, how):
    tracer = Tracer()
    generator = CogViewImageGenerator(base_url=sandbox.base_url)
    invoked(generator, how, "[[flagged:2]]", tracer)
    with pytest.raises(CogViewContentFilterError):
        invoked(generator, how, "[[content-filter:1]]", tracer)
    made, blocked = tracer.metadata
    assert (made["cogview_images"], made["cogview_cost"], made["cogview_currency"]) == (1, "0", "CNY")
    assert "2" in made["cogview_content_filter"][0]
    assert blocked["cogview_images"] == 0
    assert "1" in blocked["cogview_content_filter"][0]


def test_nothing_is_made_for_handlers_where_there_are_none(sandbox, monkeypatch):
    from langchain_cogview import events

    monkeypatch.setattr(events, "dispatch_custom_event", lambda *args: pytest.fail("an event was sent"))
    CogViewImageGenerator(base_url=sandbox.base_url).invoke("[[flagged]]")


@both
def test_a_call_without_any_handler_is_a_run_too(sandbox, how):
    run_ids = []

    class Limiter(BaseRateLimiter):
        def acquire(self, *, blocking=True):
            run_ids.append(ensure_config()["callbacks"].parent_run_id)
            return True

        async def aacquire(self, *, blocking=True):
            return self.acquire()

    invoked(CogViewImageGenerator(base_url=sandbox.base_url, rate_limiter=Limiter()), how)
    assert [type(run_id) for run_id in run_ids] == [UUID]


def test_help_describes_every_field_of_a_progress_event():
    import pydoc

    from langchain_cogview import ProgressEvent

    described = pydoc.render_doc(ProgressEvent, renderer=pydoc.plaintext)
    own = ProgressEvent.__required_keys__ - {"version", "tool_call_id", "sandbox"}  # which all events have
    assert len(own) >= 10
    assert not [name for name in own if f"{name}: " not in described]
