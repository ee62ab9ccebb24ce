"""Results where others write them down: LangGraph's checkpoints, JSON servers, another process."""

import concurrent.futures
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from typing import Any, TypedDict

import orjson
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import START, StateGraph

from langchain_cogview import CogViewConfigurationError, CogViewImageGenerator, CogViewImageTool, ImageResult
from tests.conftest import FAKE_KEY

THREAD = {"configurable": {"thread_id": "1"}}


@pytest.fixture
def generator(sandbox, tmp_path):
    return CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path, n=2)


def test_a_result_is_json_in_pythons_form_too(generator):
    result = generator.invoke("[[flagged]] a kitten")
    # As LangServe, FastAPI's encoders and LangGraph's serializer do it.
    plain = orjson.loads(orjson.dumps(result.model_dump()))
    assert ImageResult.model_validate(plain) == ImageResult.model_validate(result.model_dump()) == result


def test_a_result_in_pythons_form_is_plain_json(generator, sandbox):
    sandbox.fail_next("balance")
    result = generator.invoke("[[flagged]] a kitten")
    assert (len(result.images), len(result.failures)) == (1, 1)
    assert json.loads(json.dumps(result.model_dump())) == result.model_dump(mode="json")


def test_a_result_with_a_failure_in_a_strict_checkpoint_comes_back(generator, sandbox, caplog):
    sandbox.fail_next("balance")
    result = generator.invoke("a kitten")
    serde = JsonPlusSerializer(allowed_msgpack_modules=[ImageResult])
    assert serde.loads_typed(serde.dumps_typed(result)) == result
    assert not caplog.records


class State(TypedDict, total=False):
    result: Any
    artifact: dict


def state_after(generator, allowed):
    def generate(state):
        result = generator.invoke("a kitten")
        return {"result": result, "artifact": result.to_artifact()}

    graph = StateGraph(State)
    graph.add_node("generate", generate)
    graph.add_edge(START, "generate")
    serde = JsonPlusSerializer(allowed_msgpack_modules=allowed)
    graph = graph.compile(checkpointer=InMemorySaver(serde=serde))
    graph.invoke({}, THREAD)
    return graph.get_state(THREAD).values


def test_an_artifact_in_a_strict_checkpoint_comes_back(generator):
    values = state_after(generator, None)
    assert len(ImageResult.from_artifact(values["artifact"]).images) == 2
    # The result itself comes back as a dict, of which it can be made again.
    assert isinstance(values["result"], dict)
    assert ImageResult.model_validate(values["result"]).image.read().startswith(b"\x89PNG")


def test_a_result_in_a_strict_checkpoint_comes_back_where_its_type_is_allowed(generator):
    result = state_after(generator, [ImageResult])["result"]
    assert isinstance(result, ImageResult)
    assert result.image.read().startswith(b"\x89PNG")


STRICT = """
from typing import TypedDict
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langchain_cogview import CogViewImageGenerator, ImageResult

class State(TypedDict, total=False):
    result: ImageResult

graph = StateGraph(State)
graph.add_node("generate", lambda state: {"result": CogViewImageGenerator(base_url="sandbox:").invoke("x")})
graph.add_edge(START, "generate")
graph = graph.compile(checkpointer=InMemorySaver())
thread = {"configurable": {"thread_id": "1"}}
graph.invoke({}, thread)
print(type(graph.get_state(thread).values["result"]).__name__)
"""


@pytest.mark.heavy
def test_a_result_in_a_strict_checkpoint_comes_back_where_the_state_names_its_type():
    environment = {**os.environ, "LANGGRAPH_STRICT_MSGPACK": "true"}
    done = subprocess.run([sys.executable, "-c", STRICT], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "ImageResult\n", done.stderr


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
def test_langserve_sends_the_result(generator, sandbox):
    pytest.importorskip("langserve", reason="needs the extra integrations")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from langserve import add_routes

    app = FastAPI()
    add_routes(app, generator, path="/images")
    with TestClient(app) as client:
        one = client.post("/images/invoke", json={"input": "a kitten"})
        many = client.post("/images/batch", json={"inputs": ["a kitten", "a foal"]})
        stream = client.post("/images/stream", json={"input": "a kitten"})
    assert (one.status_code, many.status_code, stream.status_code) == (200, 200, 200)
    assert ImageResult.model_validate(one.json()["output"]).image.read().startswith(b"\x89PNG")
    assert len(many.json()["output"]) == 2
    assert '"request_id"' in stream.text
    assert len(sandbox.requests) == 8


def message_of(generator):
    try:
        generator.invoke("a kitten")
    except CogViewConfigurationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("region", ["china", pytest.param("international", marks=pytest.mark.heavy)])
def test_a_generator_in_another_process_says_that_its_key_stayed_behind(region):
    generator = CogViewImageGenerator(api_key=FAKE_KEY, region=region)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        text = pool.submit(message_of, generator).result()
    variable = {"china": "ZHIPUAI_API_KEY", "international": "ZAI_API_KEY"}[region]
    assert "a pickled generator leaves its key behind" in text
    assert f"Set {variable} in the environment" in text
    assert "api_key=" not in text


@pytest.mark.parametrize("made", [CogViewImageTool, lambda **settings: CogViewImageGenerator(**settings).bind(n=2)])
def test_what_holds_a_generator_says_the_same(made):
    again = pickle.loads(pickle.dumps(made(api_key=FAKE_KEY)))
    with pytest.raises(CogViewConfigurationError, match="leaves its key behind, and ZHIPUAI_API_KEY is not set"):
        again.invoke({"prompt": "a kitten"})


def test_a_changed_copy_of_an_unpickled_generator_says_the_same():
    again = pickle.loads(pickle.dumps(CogViewImageGenerator(api_key=FAKE_KEY)))
    with pytest.raises(CogViewConfigurationError, match="leaves its key behind"):
        again.model_copy(update={"n": 2})
