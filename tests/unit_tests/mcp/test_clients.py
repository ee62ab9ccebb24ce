"""The server by clients that are not ours: the MCP inspector's command line, and LangChain's adapters. Each in an environment of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("mcp")

pytestmark = pytest.mark.heavy
SERVER = [sys.executable, "-m", "langchain_cogview.cli", "mcp", "--sandbox"]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def inspector(tmp_path_factory):
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("inspector")
    install = ["npm", "install", "--no-save", "--prefix", str(folder), "@modelcontextprotocol/inspector"]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"the inspector cannot be installed: {installed.stderr[-200:]}")
    return str(folder / "node_modules" / ".bin" / "mcp-inspector")


def inspect(inspector, folder, *arguments):
    command = [inspector, "--cli", *SERVER, "--output-dir", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_inspector_lists_and_calls_the_tools(inspector, tmp_path):
    tools = inspect(inspector, tmp_path, "--method", "tools/list")["tools"]
    assert {tool["name"] for tool in tools} == {"generate_image", "get_image", "list_images", "estimate_cost"}
    assert all(tool["outputSchema"]["type"] == "object" and tool["annotations"] for tool in tools)
    call = ("--method", "tools/call", "--tool-name")
    made = inspect(inspector, tmp_path, *call, "generate_image", "--tool-arg", "prompt=a kitten")
    assert made["structuredContent"]["status"] == "made"  # the inspector checks it by the schema
    image_id = made["structuredContent"]["id"]
    found = inspect(inspector, tmp_path, *call, "get_image", "--tool-arg", f"id={image_id}")
    assert found["structuredContent"]["images"] == made["structuredContent"]["images"]
    listed = inspect(inspector, tmp_path, *call, "list_images")
    assert listed["structuredContent"]["images"][0]["id"] == image_id
    assert (
        inspect(inspector, tmp_path, *call, "estimate_cost", "--tool-arg", "prompt=x")["structuredContent"]["total"]
        == "0.06"
    )
    refused = inspect(inspector, tmp_path, *call, "generate_image", "--tool-arg", "prompt=a kitten", "size=1x1")
    assert refused["isError"] is True
    read = inspect(inspector, tmp_path, "--method", "resources/read", "--uri", f"cogview://images/{image_id}?size=64")
    assert read["contents"][0]["mimeType"] == "image/jpeg"
    templates = inspect(inspector, tmp_path, "--method", "resources/templates/list")["resourceTemplates"]
    assert templates[0]["uriTemplate"] == "cogview://images/{id}{?size}"


def test_langchains_adapters_call_the_tools(tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = next(path for path in (venv / "bin" / "python", venv / "Scripts" / "python.exe") if path.exists())
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", "langchain-mcp-adapters>=0.3"], capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"the adapters cannot be installed: {installed.stderr[-200:]}")
    script = textwrap.dedent("""
        import asyncio, json, sys
        from langchain_mcp_adapters.client import MultiServerMCPClient

        async def main():
            command, *args = sys.argv[1:]
            client = MultiServerMCPClient({"cogview": {"transport": "stdio", "command": command, "args": args}})
            tools = {tool.name: tool for tool in await client.get_tools()}
            call = {"type": "tool_call", "id": "1", "name": "generate_image", "args": {"prompt": "a kitten"}}
            message = await tools["generate_image"].ainvoke(call)
            print(json.dumps({"tools": sorted(tools), "content": message.content, "artifact": message.artifact}, default=str))

        asyncio.run(main())
    """)
    command = [python, "-c", script, *SERVER, "--output-dir", str(tmp_path / "images")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    assert answer["tools"] == ["estimate_cost", "generate_image", "get_image", "list_images"]
    assert "Made 1 image" in json.dumps(answer["content"])
    assert len([*(tmp_path / "images").glob("*.png")]) == 1
