"""What the content filter reports reaches whoever asks, and a faulty handler costs nothing."""

import asyncio
import json
import pickle
import threading

import pytest
from langchain_core.callbacks import BaseCallbackHandler

from langchain_cogview import (
    AsyncContentFilterCallbackHandler,
    CogViewContentFilterError,
    CogViewImageGenerator,
    CogViewImageTool,
    ContentFilter,
    ContentFilterCallbackHandler,
    collect_content_filter_events,
)

BLOCKED, FLAGGED = "[[content-filter:1]] x", "[[flagged:3]] x"


@pytest.fixture
def tool(generator):
    return CogViewImageTool(generator=generator)


def call(prompt):
    return {"type": "tool_call", "id": "call-7", "name": "cogview_generate_image", "args": {"prompt": prompt}}


WAYS = {
    "generator invoke": lambda g, t, c: g.invoke(FLAGGED, c),
    "generator ainvoke": lambda g, t, c: asyncio.run(g.ainvoke(FLAGGED, c)),
    "generator batch": lambda g, t, c: g.batch([FLAGGED], c),
    "generator batch of two": lambda g, t, c: g.batch([FLAGGED, "y"], c),
    "generator abatch": lambda g, t, c: asyncio.run(g.abatch([FLAGGED, "y"], c)),
    "tool invoke": lambda g, t, c: t.invoke({"prompt": FLAGGED}, c),
    "tool ainvoke": lambda g, t, c: asyncio.run(t.ainvoke(call(FLAGGED), c)),
    "tool batch": lambda g, t, c: t.batch([call(FLAGGED), call("y")], c),
    "tool abatch": lambda g, t, c: asyncio.run(t.abatch([call(FLAGGED)], c)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [ContentFilterCallbackHandler, AsyncContentFilterCallbackHandler])
def test_a_flagged_image_is_reported_once_by_every_way(generator, tool, way, make):
    got = []
    handler = make(on_content_filter=got.append)
    with collect_content_filter_events() as collected:
        WAYS[way](generator, tool, {"callbacks": [handler]})
    assert len(collected) == 1
    assert handler.events == got == collected
    event = collected[0]
    assert (event["role"], event["level"], event["stage"], event["severity"]) == ("assistant", 3, "image", "mildest")
    assert event["blocked"] is False


@pytest.mark.parametrize("run", ["invoke", "ainvoke"])
def test_a_block_is_reported_and_raised(generator, run):
    handler = ContentFilterCallbackHandler()
    with pytest.raises(CogViewContentFilterError) as caught:
        if run == "invoke":
            generator.invoke(BLOCKED, {"callbacks": [handler]})
        else:
            asyncio.run(generator.ainvoke(BLOCKED, {"callbacks": [handler]}))
    event = handler.events[0]
    assert event == {
        "version": 1, "role": "user", "level": 1, "stage": "prompt", "severity": "severe", "blocked": True,
        "cost": "0",
        "entries": [{"role": "user", "level": 1}], "model": "cogview-4-250304", "request_id": caught.value.request_id,
        "tool_call_id": None, "sandbox": True,
    }  # fmt: skip
    assert json.loads(json.dumps(event)) == event
    assert caught.value.content_filter == (ContentFilter(role="user", level=1),)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.content_filter == caught.value.content_filter
    assert again.request_id == caught.value.request_id


def test_an_event_of_a_tool_call_carries_its_id(tool):
    with collect_content_filter_events() as events:
        message = tool.invoke(call(BLOCKED))
        asyncio.run(tool.ainvoke(call(FLAGGED)))
        tool.invoke({"prompt": FLAGGED})
    assert [event["tool_call_id"] for event in events] == ["call-7", "call-7", None]
    assert message.status == "error"


def test_the_prompt_is_in_an_event_only_when_asked_for(sandbox):
    with collect_content_filter_events() as events:
        CogViewImageGenerator(base_url=sandbox.base_url).invoke(FLAGGED)
        CogViewImageGenerator(base_url=sandbox.base_url, include_prompt_in_events=True).invoke(FLAGGED)
    assert "prompt" not in events[0]
    assert events[1]["prompt"] == FLAGGED


def test_max_level_selects_the_severe_ones(generator):
    handler = ContentFilterCallbackHandler(max_level=1)
    with collect_content_filter_events(max_level=2) as events:
        for level in range(4):
            generator.invoke(f"[[flagged:{level}]]", {"callbacks": [handler]})
    assert [event["level"] for event in handler.events] == [0, 1]
    assert [event["level"] for event in events] == [0, 1, 2]


async def test_events_come_through_astream_events(generator, tool):
    for runnable, value, end in ((generator, FLAGGED, "cogview.generated"), (tool, call(BLOCKED), "cogview.progress")):
        custom = [
            event async for event in runnable.astream_events(value, version="v2") if event["event"] == "on_custom_event"
        ]
        assert [event["name"] for event in custom] == ["cogview.progress", end, "cogview.content_filter"]
        assert {event["data"]["model"] for event in custom} == {"cogview-4-250304"}


class Faulty(BaseCallbackHandler):
    raise_error = True

    def on_custom_event(self, name, data, **kwargs):
        raise RuntimeError("a faulty listener")


@pytest.mark.parametrize("run", ["invoke", "ainvoke"])
def test_a_handler_that_raises_costs_no_image(generator, run, caplog):
    handlers = [Faulty(), ContentFilterCallbackHandler(on_content_filter=lambda event: 1 / 0)]
    result = (
        generator.invoke(FLAGGED, {"callbacks": handlers})
        if run == "invoke"
        else asyncio.run(generator.ainvoke(FLAGGED, {"callbacks": handlers}))
    )
    assert result.images[0].width == 1024
    assert "cogview.content_filter" in caplog.text


def test_an_async_callback_is_awaited(generator):
    got = []

    async def on_filter(event):
        await asyncio.sleep(0)
        got.append(event["level"])

    asyncio.run(generator.ainvoke(FLAGGED, {"callbacks": [AsyncContentFilterCallbackHandler(on_filter)]}))
    generator.invoke(FLAGGED, {"callbacks": [AsyncContentFilterCallbackHandler(on_filter)]})
    assert got == [3, 3]


def test_collecting_blocks_can_be_nested(generator):
    with collect_content_filter_events() as outer:
        with collect_content_filter_events(max_level=0) as inner:
            generator.invoke(FLAGGED)
        generator.invoke(FLAGGED)
    generator.invoke(FLAGGED)
    assert len(outer) == 2
    assert inner == []


@pytest.mark.parametrize("make", [ContentFilterCallbackHandler, AsyncContentFilterCallbackHandler])
@pytest.mark.parametrize("way", WAYS)
def test_a_handler_that_is_in_the_list_twice_is_called_once(generator, tool, way, make):
    got = []
    handler = make(got.append)
    WAYS[way](generator, tool, {"callbacks": [handler, handler]})
    assert len(handler.events) == len(got) == 1


def test_collecting_in_one_thread_does_not_receive_the_events_of_another(generator):
    def other():
        generator.invoke(FLAGGED)

    with collect_content_filter_events() as events:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert events == []


def test_collecting_leaves_nothing_behind_in_langchain(generator):
    from langchain_core.tracers.context import _configure_hooks

    before = len(_configure_hooks)
    for _ in range(50):
        with collect_content_filter_events():
            pass
    assert len(_configure_hooks) == before


def test_an_unsuitable_callback_is_refused_when_the_handler_is_made():
    async def on_filter(event): ...

    with pytest.raises(TypeError, match="AsyncContentFilterCallbackHandler"):
        ContentFilterCallbackHandler(on_filter)
    with pytest.raises(TypeError, match="must be a function"):
        AsyncContentFilterCallbackHandler(5)
    with pytest.raises(ValueError, match="max_level"):
        ContentFilterCallbackHandler(max_level=7)
    with pytest.raises(ValueError, match="max_level"), collect_content_filter_events(max_level=7):
        pass
