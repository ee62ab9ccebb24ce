"""What `batch`, a job and an agent returned, as a notebook shows it."""

import asyncio
import json
import pickle
from pathlib import Path

import pytest
from langchain_core.messages import AIMessage, HumanMessage

from langchain_cogview import CogViewImageGenerator, CogViewImageTool, Sandbox, gallery
from langchain_cogview.jobs import run_job
from tests.unit_tests.notebook.displayed import Seen

PROMPTS = ["a kitten", "[[content-filter:1]] x", "an owl"]


def html_of(value):
    return value._repr_mimebundle_()["text/html"]


@pytest.mark.parametrize("how", ["batch", "abatch"])
def test_a_batch_in_a_cell_is_a_small_gallery(generator, how):
    call = getattr(generator, how)(PROMPTS, return_exceptions=True)
    results = asyncio.run(call) if how == "abatch" else call
    seen = Seen(html_of(results))
    assert len(seen.all("img")) == 2
    assert seen.text.startswith("2 images · 1 blocked · sandbox; list price 0.12 CNY")
    assert "an owl" in seen.text
    assert "The content filter blocked the prompt" in seen.text


def test_a_batch_is_a_list_in_every_other_way(generator):
    results = generator.batch(["a kitten", "an owl"])
    assert isinstance(results, list)
    assert results == list(results)
    assert type(pickle.loads(pickle.dumps(results))) is list
    assert pickle.loads(pickle.dumps(results)) == results
    assert json.loads(json.dumps([result.to_artifact() for result in results]))
    assert repr(results) == repr(list(results))


def test_a_large_batch_stays_a_small_output(generator):
    results = generator.batch(["a kitten"])
    many = type(results)(results * 1000)
    output = many._repr_mimebundle_()
    assert len(json.dumps(output)) <= 150_000
    assert "not shown here" in output["text/html"]


def test_a_job_in_a_cell_links_to_its_contact_sheet(generator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = run_job(["a kitten", "[[content-filter]] <b>x</b>"], "my job", generator=generator, progress=False)
    seen = Seen(report._repr_html_())
    assert "1 prompt made, 1 blocked" in seen.text
    [link] = seen.all("a")
    assert link["href"] == "my%20job/index.html"
    assert (Path("my job") / "index.html").is_file()


def test_the_blocked_calls_of_an_agent_are_tiles(tmp_path):
    with Sandbox() as sandbox:
        tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path)
        sandbox.fail_next("content-filter", times=1)
        calls = [
            {"type": "tool_call", "id": str(number), "name": tool.name, "args": {"prompt": prompt}}
            for number, prompt in enumerate(["a fight", "a kitten"])
        ]
        messages = [HumanMessage("x"), AIMessage("", tool_calls=calls), *map(tool.invoke, calls)]
        sandbox.fail_next("status", status=200, body={"data": []})
        last = {**calls[1], "id": "3"}
        messages += [AIMessage("", tool_calls=[last]), tool.invoke(last)]
    shown = gallery({"messages": messages})
    assert repr(shown) == "Gallery(1 image, 1 blocked, 1 of unknown outcome, sandbox; list price 0.06 CNY)"
    text = Seen(html_of(shown)).text
    assert "a fight" in text
    assert "The content filter blocked" in text


def test_what_other_tools_report_is_no_tile(generator):
    assert isinstance(generator, CogViewImageGenerator)
    from langchain_core.messages import ToolMessage

    messages = [ToolMessage("No file was found.", tool_call_id="1", status="error")]
    assert repr(gallery({"messages": messages})) == "Gallery(0 images)"
