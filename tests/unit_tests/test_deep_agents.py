"""Real deep agents: the image tool saves into the agent's own files, and its `read_file` shows the image."""

import asyncio
import base64
import hashlib
import re
from pathlib import Path

import pytest
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.memory import InMemoryStore

from langchain_cogview import (
    BackendFolder,
    CogViewImageGenerator,
    CogViewImageTool,
    CogViewMiddleware,
    CogViewStorageError,
    CogViewToolkit,
    images_from_messages,
)

pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]  # deepagents takes seconds to import

both = pytest.mark.parametrize("how", ["sync", "async"])
NAME = "cogview_generate_image"
THREAD = {"configurable": {"thread_id": "1"}}


def call(name, number=1, **args):
    return {"type": "tool_call", "id": f"{name}-{number}", "name": name, "args": args}


class Deep:
    """The names of deepagents, which is imported where a test runs, and not in every process that collects this module."""

    def __getattr__(self, name):
        package = pytest.importorskip("deepagents", reason="needs the extra integrations")
        return getattr(package if name == "create_deep_agent" else package.backends, name)


deep = Deep()


class Model(GenericFakeChatModel):
    """Makes the images, then reads the files that the tool messages name, then answers."""

    messages: object = iter(())
    first: list
    profile: dict | None = {"image_inputs": True, "image_tool_message": True}

    def bind_tools(self, tools, **kwargs):
        return self

    def _generate(self, messages, *args, **kwargs):
        from langchain_core.outputs import ChatGeneration, ChatResult

        made = [message for message in messages if isinstance(message, ToolMessage)]
        if not made:
            reply = AIMessage("", tool_calls=self.first)
        elif any(message.name == "read_file" for message in made):
            reply = AIMessage("Done.")
        elif made[-1].name == "cogview_start_image":
            reply = AIMessage(
                "", tool_calls=[call("cogview_get_image", id=re.search(r"image (\S+)\.", made[-1].text)[1])]
            )
        else:
            paths = [path for message in made for path in re.findall(r"saved as (\S+?)\)", message.text)]
            reply = AIMessage("", tool_calls=[call("read_file", path, file_path=path) for path in paths] or [])
            reply = reply if paths else AIMessage("There is no file.")
        return ChatResult(generations=[ChatGeneration(message=reply)])


def run(how, backend, *, prompts=("a kitten",), first=None, **options):
    first = first or [call(NAME, prompt, prompt=prompt) for prompt in prompts]
    agent = deep.create_deep_agent(Model(first=first), backend=backend, **options)
    state = {"messages": "Draw."}
    return agent.invoke(state, THREAD) if how == "sync" else asyncio.run(agent.ainvoke(state, THREAD))


def shown(output):
    """Path and bytes of each image that the agent's `read_file` shows."""
    found = {}
    for message in output["messages"]:
        if isinstance(message, ToolMessage) and message.name == "read_file":
            (block,) = message.content_blocks
            assert (block["type"], block["mime_type"]) == ("image", "image/png")
            found[message.additional_kwargs["read_file_path"]] = base64.b64decode(block["base64"])
    return found


def backends(tmp_path):
    on_disk = deep.FilesystemBackend(root_dir=tmp_path / "work")
    return {
        "state": deep.StateBackend(),
        "filesystem": on_disk,
        "store": deep.StoreBackend(namespace=lambda _: ("files",)),
        "composite, routed": deep.CompositeBackend(default=deep.StateBackend(), routes={"/images/": on_disk}),
        "composite, default": deep.CompositeBackend(default=deep.StateBackend(), routes={"/memories/": on_disk}),
    }


@both
@pytest.mark.parametrize("kind", ["state", "filesystem", "store", "composite, routed", "composite, default"])
def test_read_file_shows_the_images_that_the_tool_made(tmp_path, kind, how):
    backend = backends(tmp_path)[kind]
    tool = CogViewImageTool(base_url="sandbox:", output_dir=backend)
    output = run(how, backend, prompts=["a kitten", "a puppy"], tools=[tool], store=InMemoryStore())
    images = images_from_messages(output)
    files = shown(output)
    assert sorted(f"backend://{path}" for path in files) == sorted(image.uri for image in images)
    assert len(files) == 2
    assert not any(image.warnings for image in images)
    made = {image.uri: image.sha256 for image in images}
    for path, content in files.items():
        assert hashlib.sha256(content).hexdigest() == made[f"backend://{path}"]
    assert set(files) <= set(output.get("files", {})) or kind in {"filesystem", "store", "composite, routed"}


@both
def test_the_artifact_is_read_where_the_backend_can_be_used(tmp_path, how):
    backend = deep.FilesystemBackend(root_dir=tmp_path)
    output = run(how, backend, tools=[CogViewImageTool(base_url="sandbox:", output_dir=backend)])
    (image,) = images_from_messages(output, storage=backend)
    assert image.read() == next(iter(shown(output).values()))
    backend = deep.StateBackend()
    output = run(how, backend, tools=[CogViewImageTool(base_url="sandbox:", output_dir=backend)])
    (image,) = images_from_messages(output, storage=backend)
    with pytest.raises(CogViewStorageError, match="StateBackend needs a running graph"):
        image.read()


@both
def test_outside_a_graph_a_state_backend_keeps_the_image_in_memory(how):
    generator = CogViewImageGenerator(base_url="sandbox:", output_dir=deep.StateBackend())
    result = generator.invoke("a kitten") if how == "sync" else asyncio.run(generator.ainvoke("a kitten"))
    assert "StateBackend needs a running graph" in result.warnings[0]
    assert result.read()


@both
def test_the_middleware_shows_images_that_are_in_the_agent_files(how):
    backend = deep.StateBackend()
    images = CogViewMiddleware(base_url="sandbox:", output_dir=backend)
    seen = []

    class Watching(Model):
        def _generate(self, messages, *args, **kwargs):
            blocks = [
                part
                for message in messages
                if message.name == NAME and isinstance(message.content, list)
                for part in message.content
            ]
            seen.append([part["mime_type"] for part in blocks if part["type"] == "image"])
            return super()._generate(messages, *args, **kwargs)

    agent = deep.create_deep_agent(
        Watching(first=[call(NAME, prompt="a kitten")]),
        backend=backend,
        middleware=[images],
        checkpointer=InMemorySaver(),
    )
    state = {"messages": "Draw."}
    output = agent.invoke(state, THREAD) if how == "sync" else asyncio.run(agent.ainvoke(state, THREAD))
    assert len(shown(output)) == 1
    assert ["image/jpeg"] in seen


@both
@pytest.mark.parametrize("model", ["cogview-4", "glm-image"])
def test_an_image_that_is_collected_later_is_in_the_agent_files(how, model):
    # A request of `cogview-4` goes on after the tool call that could write to the state.
    backend = deep.StateBackend()
    toolkit = CogViewToolkit(base_url="sandbox:", output_dir=backend, model=model)
    output = run(how, backend, first=[call("cogview_start_image", prompt="a kitten")], tools=toolkit.get_tools())
    (image,) = images_from_messages(output)
    assert list(output["files"]) == [image.uri.removeprefix("backend://")] == list(shown(output))
    assert not image.warnings


@both
def test_an_image_that_is_collected_where_no_graph_runs_is_in_a_temporary_folder(how):
    toolkit = CogViewToolkit(base_url="sandbox:", output_dir=deep.StateBackend(), model="cogview-4")
    tools = {item.name: item for item in toolkit.get_tools()}
    start, get = tools["cogview_start_image"], tools["cogview_get_image"]

    async def acollected():
        message = await start.ainvoke(call(start.name, prompt="a kitten"))
        return await get.ainvoke(call(get.name, id=message.artifact["id"]))

    def collected():
        return get.invoke(call(get.name, id=start.invoke(call(start.name, prompt="a kitten")).artifact["id"]))

    (image,) = images_from_messages([collected() if how == "sync" else asyncio.run(acollected())])
    assert "StateBackend needs a running graph" in image.warnings[0]
    assert image.path.read_bytes() == image.read()


@both
def test_a_folder_of_the_users_choice_is_routed_by_its_path(tmp_path, how):
    backend = deep.CompositeBackend(
        default=deep.StateBackend(), routes={"/art/": deep.FilesystemBackend(root_dir=tmp_path / "art")}
    )
    tool = CogViewImageTool(base_url="sandbox:", output_dir=BackendFolder(backend, "/art/drafts"))
    output = run(how, backend, tools=[tool])
    ((path, content),) = shown(output).items()
    assert (tmp_path / path.removeprefix("/")).read_bytes() == content


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "agents.md").read_text(encoding="utf-8")
    mark = r"^<!-- run by tests/unit_tests/test_deep_agents\.py -->\n"
    (block,) = re.findall(mark + r"```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    deep.create_deep_agent  # noqa: B018  skips the test without deepagents
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COGVIEW_BASE_URL", "sandbox:")
    namespace = {"model": Model(first=[call(NAME, prompt="a kitten")])}
    exec(compile(block, "docs/agents.md", "exec"), namespace)
    ((path, content),) = shown(namespace["agent"].invoke({"messages": "Draw."})).items()
    assert (tmp_path / path.removeprefix("/")).read_bytes() == content
