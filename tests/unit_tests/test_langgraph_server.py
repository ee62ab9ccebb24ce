"""A real `langgraph dev`, which refuses blocking calls on its event loop, runs agents that have this tool."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from langchain_cogview import Sandbox, images_from_messages
from langchain_cogview.sandbox.server import SandboxServer
from tests.conftest import FAKE_KEY

ROOT = Path(__file__).parents[2]
GRAPHS = """
import os
from pathlib import Path

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult

from langchain_cogview import CogViewImageGenerator, CogViewImageTool

HERE = Path(os.environ["HERE"])
SERVICE = {"base_url": os.environ["SERVICE"], "api_key": os.environ["FAKE_KEY"]}


class Painter(BaseChatModel):
    @property
    def _llm_type(self):
        return "scripted"

    def bind_tools(self, tools, **kwargs):
        return self

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        last = messages[-1]
        if isinstance(last, ToolMessage):
            answer = AIMessage(f"Here it is. {last.text}")
        else:
            call = {"name": "cogview_generate_image", "args": {"prompt": last.text}, "id": "1", "type": "tool_call"}
            answer = AIMessage("", tool_calls=[call])
        return ChatResult(generations=[ChatGeneration(message=answer)])

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        return self._generate(messages)


def agent(**settings):
    return create_agent(Painter(), tools=[CogViewImageTool(generator=CogViewImageGenerator(**SERVICE, **settings))])


folder = agent(output_dir=HERE / "out")
memory = agent()
cached = agent(output_dir=HERE / "cached", cache=HERE / "cache")
tasks = agent(output_dir=HERE / "tasks", model="glm-image")


async def made_for_each_run():  # on the event loop
    return agent(output_dir="relative", cache="relative_cache")
"""
NAMES = ("folder", "memory", "cached", "tasks", "made_for_each_run")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until_ready(client, process, log):
    for _ in range(3000):
        assert process.poll() is None, log.read_text()
        try:
            if client.get("/ok").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)  # another program starts
    raise AssertionError(log.read_text())


@pytest.fixture
def server(tmp_path):
    """`langgraph dev` with the graphs above, and the sandbox that they generate in."""
    pytest.importorskip("langgraph_api", reason="needs langgraph-cli[inmem]")
    (tmp_path / "graphs.py").write_text(GRAPHS)
    settings = {"dependencies": ["."], "graphs": {name: f"./graphs.py:{name}" for name in NAMES}}
    (tmp_path / "langgraph.json").write_text(json.dumps(settings))
    port, log = free_port(), tmp_path / "log"
    with SandboxServer(Sandbox()) as service, log.open("w") as output:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HERE": str(tmp_path),
            "SERVICE": service.base_url,
            "FAKE_KEY": FAKE_KEY,
            "LANGSMITH_TRACING": "false",
            "LANGGRAPH_CLI_NO_ANALYTICS": "1",
            "NO_PROXY": "*",
        }
        program = "from langgraph_cli.cli import cli; cli()"
        process = subprocess.Popen(
            [sys.executable, "-c", program, "dev", "--no-browser", "--no-reload", "--port", str(port)],
            cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False) as client:
                wait_until_ready(client, process, log)
                yield client, service.sandbox, log
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.heavy
def test_an_agent_on_a_langgraph_server_has_its_image_on_disk_and_in_its_output(server, tmp_path):
    client, sandbox, log = server
    for name in NAMES:
        for _ in range(2):
            request = {"assistant_id": name, "input": {"messages": [{"role": "user", "content": f"a fox for {name}"}]}}
            reply = client.post("/runs/wait", json=request)
            assert reply.status_code == 200, (reply.text, log.read_text())
            output = reply.json()
            (image,) = images_from_messages(output)
            assert Path(image.path).is_absolute(), output
            assert image.read().startswith(b"\x89PNG")
            assert not any("could not" in warning for warning in image.warnings), image.warnings
            assert "saved as" in output["messages"][-1]["content"]
    assert sandbox.images_made == 2 * len(NAMES) - 2  # two of them have a cache
    for folder in ("out", "cached", "tasks", "relative"):
        assert len(list((tmp_path / folder).iterdir())) >= 1
    assert "Blocking call" not in log.read_text()
