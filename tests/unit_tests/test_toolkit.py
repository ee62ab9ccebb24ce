"""A host's time limit ends a call of a tool, not the image: it is paid for once, and collected later for nothing."""

import asyncio
import copy
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda

from langchain_cogview import CogViewToolkit, ContentFilterCallbackHandler, images_from_messages
from langchain_cogview.sandbox import SandboxServer
from langchain_cogview.toolkit import MAX_WAIT
from tests.conftest import FAKE_KEY
from tests.unit_tests.test_agent import Scripted

both = pytest.mark.parametrize("how", ["sync", "async"])
models = pytest.mark.parametrize("model", ["cogview-4-250304", "glm-image"])
SLOW = "[[slow:2]] a kitten"


def toolkit_of(sandbox, folder, **settings):
    return CogViewToolkit(base_url=sandbox.base_url, output_dir=folder, **{"poll_interval": 0.01, **settings})


def called(tool, how, config=None, **args):
    call = {"type": "tool_call", "name": tool.name, "id": "call-1", "args": args}
    return tool.invoke(call, config) if how == "sync" else asyncio.run(tool.ainvoke(call, config))


@both
@models
def test_an_image_is_started_at_once_and_collected_when_it_is_made(sandbox, tmp_path, how, model):
    start, get, *_ = toolkit_of(sandbox, tmp_path, model=model).get_tools()
    started = called(start, how, prompt=SLOW)
    image_id = started.artifact["id"]
    assert (started.artifact["type"], started.artifact["status"]) == ("cogview.image_task", "running")
    assert image_id in started.content
    waiting = called(get, how, id=image_id, wait=0)
    assert waiting.artifact["status"] == "running"
    assert "free" in waiting.content
    made = called(get, how, id=image_id)
    image = images_from_messages([started, waiting, made])[0]
    assert image.path.read_bytes().startswith(b"\x89PNG")
    assert called(get, how, id=image_id).artifact == made.artifact  # for a second look nothing is fetched
    assert len(sandbox.downloads) == sandbox.images_made == 1
    if model != "glm-image":
        assert image.id == image_id


@both
@models
def test_every_id_that_the_model_reads_finds_the_image(sandbox, tmp_path, how, model):
    # A chat model that rewrites the prompt takes longer than the start, which then answers before the request has its id.
    is_read = threading.Event()
    rewriting = RunnableLambda(lambda messages: is_read.wait(60) and messages[-1].text)
    start, get, *_ = toolkit_of(sandbox, tmp_path, model=model, enhance=rewriting).get_tools()
    ids = [called(start, how, prompt=SLOW).artifact["id"]]
    is_read.set()
    while not sandbox.requests:
        time.sleep(0.01)
    waiting = called(get, how, id=ids[0], wait=0.5)
    assert waiting.artifact["id"] in waiting.content
    ids.append(waiting.artifact["id"])
    made = called(get, how, id=ids[1])
    ids.append(images_from_messages(made)[0].id)
    assert all(called(get, how, id=item).artifact == made.artifact for item in ids)
    assert len(sandbox.downloads) == sandbox.images_made == 1


@models
async def test_a_caller_who_gives_up_loses_no_image_and_pays_once(sandbox, tmp_path, model):
    start, get, *_ = toolkit_of(sandbox, tmp_path, model=model).get_tools()
    started = await start.ainvoke({"type": "tool_call", "name": start.name, "id": "1", "args": {"prompt": SLOW}})
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await get.ainvoke({"id": started.artifact["id"]})
    assert "Made 1 image" in await get.ainvoke({"id": started.artifact["id"]})
    assert sandbox.images_made == 1


async def test_a_start_that_is_cancelled_still_saves_its_image(sandbox, tmp_path):
    start, *_ = toolkit_of(sandbox, tmp_path).get_tools()
    sandbox.fail_next("slow", seconds=1)
    task = asyncio.create_task(start.ainvoke({"prompt": "a kitten"}))
    async with asyncio.timeout(60):
        while not sandbox.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        while not list(tmp_path.glob("*.png")):
            await asyncio.sleep(0.01)
    assert sandbox.images_made == 1


@both
@models
def test_what_is_refused_is_reported_at_once_or_when_it_is_collected(sandbox, tmp_path, how, model):
    start, get, *_ = toolkit_of(sandbox, tmp_path, model=model, max_images=1).get_tools()
    handler = ContentFilterCallbackHandler(lambda event: None)
    message = called(start, how, {"callbacks": [handler]}, prompt="[[content-filter]] a kitten")
    if message.artifact is not None:  # the refusal came after the start had answered
        message = called(get, how, id=message.artifact["id"])
    assert message.status == "error"
    assert "No image was made. The content filter blocked the prompt" in message.content
    image_id = called(start, how, prompt="a kitten").artifact["id"]
    called(get, how, id=image_id)
    limit = called(start, how, prompt="a foal")
    if limit.artifact is not None:
        limit = called(get, how, id=limit.artifact["id"])
    assert "limit of 1 image" in limit.content
    assert sandbox.images_made == 1


@both
@models
@pytest.mark.parametrize(
    "image_id", ["deadbeef", "../../etc/passwd", "", "x" * 128, "1234567890123", "a/b", "\x1b[31m"]
)
def test_an_id_that_nobody_started_is_a_text_for_the_model(sandbox, tmp_path, how, model, image_id):
    _, get, *_ = toolkit_of(sandbox, tmp_path, model=model).get_tools()
    message = called(get, how, id=image_id)
    assert message.status == "error"
    assert message.content.startswith("No image with the id")  # it may have been made by a program that has ended
    assert "do not start it again" in message.content
    assert message.content.isprintable()


@both
def test_a_task_is_collected_by_another_process_that_has_only_its_id(sandbox, tmp_path, how):
    started = called(toolkit_of(sandbox, tmp_path, model="glm-image").get_tools()[0], how, prompt="a kitten")
    other = toolkit_of(sandbox, tmp_path, model="glm-image").get_tools()[1]
    assert "Made 1 image" in called(other, how, id=started.artifact["id"]).content
    assert sandbox.images_made == 1


def test_images_that_are_in_no_folder_do_not_fill_the_memory(sandbox, monkeypatch):
    monkeypatch.setattr("langchain_cogview.pending.MAX_HELD_BYTES", 20_000)  # an image of the sandbox has 15 kB
    start, get, *_ = toolkit_of(sandbox, None).get_tools()
    ids = [called(start, "sync", prompt=prompt).artifact["id"] for prompt in "abcd"]
    assert all("Made 1 image" in called(get, "sync", id=item).content for item in ids)  # none is lost before that
    assert [called(get, "sync", id=item).status for item in ids] == ["error", "error", "error", "success"]


@both
def test_a_task_that_fails_costs_the_budget_nothing(sandbox, tmp_path, how):
    toolkit = toolkit_of(sandbox, tmp_path, model="glm-image", max_images=1)
    start, get, *_ = toolkit.get_tools()
    failed = called(start, how, prompt="[[task-fail]] a kitten").artifact["id"]
    assert called(start, how, prompt="a puppy").status == "error"  # until it is known, the image counts
    for _ in range(2):
        assert "failed without an image" in called(get, how, id=failed).content
    assert toolkit.tool.limits().images == 0
    made = called(start, how, prompt="a puppy").artifact["id"]
    assert "Made 1 image" in called(get, how, id=made).content
    assert toolkit.tool.limits().images == sandbox.images_made == 1


@both
def test_a_wait_is_never_longer_than_that_of_the_toolkit(sandbox, tmp_path, how):
    start, get, *_ = toolkit_of(sandbox, tmp_path, wait=0).get_tools()
    image_id = called(start, how, prompt=SLOW).artifact["id"]
    assert called(get, how, id=image_id, wait=500).artifact["status"] == "running"


@pytest.mark.parametrize("wait", [-1, MAX_WAIT + 1, float("nan")])
def test_a_wait_that_makes_no_sense_is_refused(sandbox, tmp_path, wait):
    with pytest.raises(ValueError, match="wait"):
        toolkit_of(sandbox, tmp_path, wait=wait)


@both
def test_parallel_starts_are_all_collected(sandbox, tmp_path, how):
    start, get, *_ = toolkit_of(sandbox, tmp_path, max_concurrency=2).get_tools()

    async def run():
        ids = [
            (await start.ainvoke({"type": "tool_call", "name": start.name, "id": str(n), "args": {"prompt": f"{n}"}}))
            for n in range(12)
        ]
        return await asyncio.gather(*(get.ainvoke({"id": message.artifact["id"]}) for message in ids))

    texts = asyncio.run(run())
    assert all("Made 1 image" in text for text in texts)
    assert sandbox.images_made == len(set(texts)) == 12


def test_an_agent_starts_and_collects(sandbox, tmp_path):
    from langchain.agents import create_agent

    toolkit = toolkit_of(sandbox, tmp_path, model="glm-image")

    class Collecting(Scripted):
        def _generate(self, messages, *args, **kwargs):
            if messages[-1].type == "tool" and messages[-1].artifact["type"] == "cogview.image_task":
                call = {
                    "name": "cogview_get_image",
                    "args": {"id": messages[-1].artifact["id"]},
                    "id": f"{len(messages)}",
                }
                self.responses[self.i] = AIMessage("", tool_calls=[call])
            return super()._generate(messages, *args, **kwargs)

    call = {"name": "cogview_start_image", "args": {"prompt": "a kitten"}, "id": "1"}
    script = [AIMessage("", tool_calls=[call]), AIMessage("?"), AIMessage("Here you are.")]
    output = create_agent(Collecting(responses=script), tools=toolkit.get_tools()).invoke(
        {"messages": "a kitten, please"}
    )
    assert output["messages"][-1].content == "Here you are."
    assert len(images_from_messages(output)) == 1


def test_a_program_that_ends_saves_what_it_has_started(tmp_path):
    code = (
        "from langchain_cogview import CogViewToolkit;"
        f"start = CogViewToolkit(base_url='sandbox:', output_dir={str(tmp_path)!r}).get_tools()[0];"
        "print(start.invoke({'prompt': '[[slow:1.5]] a kitten'}))"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=100)
    assert len(list(tmp_path.glob("*.png"))) == 1


@both
@models
def test_calls_that_collect_at_once_save_one_image(sandbox, tmp_path, how, model):
    start, get, *_ = toolkit_of(sandbox, tmp_path, model=model).get_tools()
    image_id = called(start, how, prompt=SLOW).artifact["id"]

    async def run():
        return await asyncio.gather(*(get.ainvoke({"id": image_id}) for _ in range(4)))

    if how == "async":
        texts = asyncio.run(run())
    else:
        with ThreadPoolExecutor() as pool:
            texts = list(pool.map(get.invoke, [{"id": image_id}] * 4))
    assert len(set(texts)) == len(list(tmp_path.glob("*.png"))) == len(sandbox.downloads) == 1


pickles = pytest.mark.parametrize("pickler", ["pickle", "cloudpickle"])


@pickles
@models
def test_a_pickled_toolkit_brings_its_settings_and_starts_images_of_its_own(sandbox, tmp_path, model, pickler):
    toolkit = toolkit_of(sandbox, tmp_path, model=model, api_key=FAKE_KEY, wait=30, max_images=5)
    start, get, *_ = toolkit.get_tools()
    running = called(start, "sync", prompt=SLOW).artifact["id"]
    content = pytest.importorskip(pickler).dumps(toolkit)
    assert FAKE_KEY.encode() not in content
    other = pickle.loads(content)
    assert (other.wait, other.tool.max_images, other.tool.generator.model) == (30, 5, model)
    its_start, its_get, *_ = other.get_tools()
    if model != "glm-image":  # a task of the service is found by its id everywhere
        assert called(its_get, "sync", id=running).content.startswith("No image with the id")
    started = called(its_start, "sync", prompt="a puppy").artifact["id"]
    assert "Made 1 image" in called(its_get, "sync", id=started).content
    assert "Made 1 image" in called(get, "sync", id=running).content
    assert sandbox.images_made == 2


@pickles
def test_the_pickled_tools_of_a_toolkit_belong_together_again(sandbox, tmp_path, pickler):
    tools = toolkit_of(sandbox, tmp_path).get_tools()
    start, get, estimate = pickle.loads(pytest.importorskip(pickler).dumps(tools))
    assert [item.args for item in (start, get, estimate)] == [item.args for item in tools]
    image_id = called(start, "sync", prompt="a kitten").artifact["id"]
    assert "Made 1 image" in called(get, "sync", id=image_id).content
    assert "Nothing was sent" in called(estimate, "sync", prompt="a kitten", n=2).content


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda toolkit: toolkit.model_copy(deep=True)])
def test_a_copy_in_the_same_process_collects_what_was_started(sandbox, tmp_path, copied):
    toolkit = toolkit_of(sandbox, tmp_path, max_images=1)
    image_id = called(toolkit.get_tools()[0], "sync", prompt=SLOW).artifact["id"]
    start, get, *_ = copied(toolkit).get_tools()
    assert "Made 1 image" in called(get, "sync", id=image_id).content
    assert called(start, "sync", prompt="a puppy").status == "error"  # the copy spends from the same limit
    assert sandbox.images_made == 1


FORKING = """
import os, sys
from langchain_cogview import CogViewToolkit

start, get, _ = CogViewToolkit(base_url=sys.argv[1], output_dir=sys.argv[2], api_key="k").get_tools()

def started(prompt):
    call = {"type": "tool_call", "name": start.name, "id": "1", "args": {"prompt": prompt}}
    return {"id": start.invoke(call).artifact["id"]}

running = started("[[slow:2]] a kitten")
child = os.fork()
if not child:
    print("child:", get.invoke(running), get.invoke(started("a puppy")), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent:", get.invoke(running))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="This system has no fork.")
def test_a_forked_process_starts_and_collects_images_of_its_own(tmp_path):
    with SandboxServer() as server:
        command = [sys.executable, "-c", FORKING, server.base_url, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
        assert server.sandbox.images_made == len(list(tmp_path.glob("*.png"))) == 2
    child, parent = done.stdout.splitlines()
    assert child.startswith("child: No image with the id") and "Made 1 image" in child
    assert parent.startswith("parent: Made 1 image")
