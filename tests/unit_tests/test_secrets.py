"""The key is in the request's header and nowhere else."""

import asyncio
import copy
import json
import logging
import pickle
import traceback

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.load import dumpd, dumps
from langchain_core.runnables import ConfigurableField
from langchain_core.tracers.base import BaseTracer

from langchain_cogview import CogViewError, CogViewImageGenerator, CogViewImageTool

keys = st.from_regex(r"[0-9a-f]{32}\.[A-Za-z0-9]{16}", fullmatch=True)


@given(keys, st.sampled_from([CogViewImageGenerator, CogViewImageTool]))
def test_no_form_of_an_object_shows_its_key(key, make):
    made = make(api_key=key)
    for each in (made, copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        forms = (
            repr(each),
            str(each),
            dumps(each),
            json.dumps(dumpd(each), default=str),
            str(each.model_dump()),
            str(pickle.dumps(each)),
        )
        assert all(key not in form and key.split(".")[1] not in form for form in forms)


class Tracer(BaseTracer):
    def __init__(self):
        super().__init__()
        self.kept = []

    def _persist_run(self, run):
        self.kept.append(run.model_dump_json() if hasattr(run, "model_dump_json") else str(run.dict()))


KEY = "0123456789abcdef0123456789abcdef.secretSECRET0123"


def echoing(request):
    """A gateway that repeats what it was sent."""
    return httpx.Response(
        502, headers={"x-was": request.headers["authorization"]}, text=f"You sent {request.headers['authorization']}"
    )


@pytest.mark.parametrize("how", ["invoke", "ainvoke"])
def test_no_trace_log_or_traceback_of_a_call_shows_the_key(how, caplog):
    caplog.set_level(logging.DEBUG)
    tracer = Tracer()
    client, aclient = (
        httpx.Client(transport=httpx.MockTransport(echoing)),
        httpx.AsyncClient(transport=httpx.MockTransport(echoing)),
    )
    # As LangChain's users pass a key for one call: it leaves exactly this name out of a trace.
    chain = CogViewImageGenerator(
        api_key="unused.unused", http_client=client, http_async_client=aclient
    ).configurable_fields(api_key=ConfigurableField(id="api_key"))
    config = {"configurable": {"api_key": KEY}, "callbacks": [tracer]}
    with pytest.raises(CogViewError) as caught:
        chain.invoke("x", config) if how == "invoke" else asyncio.run(chain.ainvoke("x", config))
    client.close()
    asyncio.run(aclient.aclose())
    error = caught.value
    shown = [str(error), repr(error), str(error.__dict__), str(pickle.dumps(error)), caplog.text, *tracer.kept]
    link = error
    while link is not None:
        frames = traceback.TracebackException.from_exception(link, capture_locals=True).stack
        shown += [str(frame.locals) for frame in frames if "langchain_cogview" in frame.filename]
        link = link.__cause__ or link.__context__
    assert tracer.kept
    assert not [text[max(0, text.index("secretSECRET") - 300) :][:400] for text in shown if "secretSECRET0123" in text]


def answer(status, body):
    client = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(status, content=body)))
    return CogViewImageGenerator(api_key=KEY, http_client=client, download=False), client


def test_an_escaped_key_is_a_key_too():
    escaped = "".join(f"\\u{ord(c):04x}" for c in KEY)
    generator, client = answer(400, f'{{"error":{{"code":"1214","message":"You sent {escaped}"}}}}'.encode())
    with client, pytest.raises(CogViewError) as caught:
        generator.invoke("x")
    assert "You sent [key]" in str(caught.value)
    assert "secretSECRET" not in str(pickle.dumps(caught.value))


def test_a_link_with_the_keys_id_in_its_path_stays_whole():
    link = f"https://sfile.chatglm.cn/{KEY.split('.', maxsplit=1)[0]}/a.png"
    generator, client = answer(200, json.dumps({"data": [{"url": link}]}).encode())
    with client:
        assert generator.invoke("x").url == link


def test_storage_options_appear_in_no_form_of_generator_result_or_artifact(sandbox):
    options = {"token": "storage-secret-1234"}
    generator = CogViewImageGenerator(
        base_url=sandbox.base_url, output_dir="memory://pictures", storage_options=options
    )
    result = generator.invoke("a kitten")
    assert result.uri.startswith("memory://pictures/")
    assert result.read().startswith(b"\x89PNG")
    forms = (
        repr(generator), dumps(generator), str(generator.model_dump()), repr(result), json.dumps(result.to_artifact()),
        str(pickle.dumps(result)), str(result.model_dump()),
    )  # fmt: skip
    assert all("storage-secret" not in form for form in forms)
    with pytest.raises(TypeError, match="storage_options"):
        pickle.dumps(generator)
