"""`cogview mcp` as a process, as clients start it: on the standard streams, killed, and started again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from langchain_cogview.sandbox import SandboxServer

pytest.importorskip("mcp")
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client

COMMAND = [sys.executable, "-m", "langchain_cogview.cli", "mcp"]
INITIALIZE = {
    "jsonrpc": "2.0", "id": 0, "method": "initialize",
    "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}},
}  # fmt: skip
INITIALIZED = {"jsonrpc": "2.0", "method": "notifications/initialized"}


@pytest.fixture
def service():
    """The service on a port, which outlives the servers."""
    with SandboxServer() as server:
        yield server


def environment(service=None):
    names = ("PATH", "HOME", "VIRTUAL_ENV", "SYSTEMROOT")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    if service is None:
        return kept
    return {**kept, "ZHIPUAI_API_KEY": "any", "COGVIEW_BASE_URL": service.base_url}


class Process:
    """A server whose standard streams the test holds, so that it sees every byte."""

    def __init__(self, folder, *options, env):
        self.process = subprocess.Popen(
            [*COMMAND, "--output-dir", str(folder), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
        )  # fmt: skip
        self.send(INITIALIZE)
        self.receive(0)
        self.send(INITIALIZED)

    def send(self, message):
        raw = message if isinstance(message, bytes) else json.dumps(message).encode()
        self.process.stdin.write(raw + b"\n")
        self.process.stdin.flush()

    def call(self, number, name, **arguments):
        self.send(
            {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": {"name": name, "arguments": arguments}}
        )

    def receive(self, number):
        while True:
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read().decode()
            message = json.loads(line)  # nothing but messages of the protocol
            assert message["jsonrpc"] == "2.0"
            if message.get("id") == number:
                return message

    def end(self, number=None):
        """End it by a signal, or as clients do: by the end of its input."""
        if number is not None:
            self.process.send_signal(number)
        else:
            self.process.stdin.close()
        self.process.wait()
        rest = self.process.stdout.read(), self.process.stderr.read().decode()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()
        return rest


@pytest.mark.parametrize("mode", ["legacy", pytest.param("2026-07-28", marks=pytest.mark.heavy)])
async def test_the_command_serves_the_sdks_client(tmp_path, mode):
    options = ["--sandbox", "--output-dir", str(tmp_path), "--max-images", "1"]
    parameters = StdioServerParameters(command=COMMAND[0], args=[*COMMAND[1:], *options], env=environment())
    async with Client(stdio_client(parameters), mode=mode) as client:
        made = await client.call_tool("generate_image", {"prompt": "a kitten"})
        assert not made.is_error and Path(made.structured_content["images"][0]["path"]).parent == tmp_path
        refused = await client.call_tool("generate_image", {"prompt": "a dog"})
    assert refused.is_error


def test_garbage_is_answered_or_ignored_and_the_server_goes_on(tmp_path):
    server = Process(tmp_path, "--sandbox", env=environment())
    for garbage in (
        b"\xff\xfe garbage",
        b"{",
        b"[]",
        b"null",
        b'{"jsonrpc": "2.0"}',
        b'{"jsonrpc":"2.0","id":7,"method":"x"}',
    ):
        server.send(garbage)
    server.send(b'{"jsonrpc":"2.0","id":8,"method":"tools/call","params":{"name":5}}')
    server.send(b'{"jsonrpc":"2.0","id":9,"method":"tools/call","params":{"name":"get_image","arguments":[1]}}')
    server.call(10, "generate_image", prompt="a kitten")
    assert server.receive(10)["result"]["structuredContent"]["status"] == "made"
    output, errors = server.end()
    assert output == b"" and "Traceback" not in errors


def test_a_client_that_reads_no_more_ends_the_server_without_a_traceback_once_the_image_is_saved(tmp_path, service):
    server = Process(tmp_path, env=environment(service))
    server.call(1, "generate_image", prompt="a kitten", wait_seconds=0)
    server.receive(1)
    server.process.stdout.close()
    server.send({"jsonrpc": "2.0", "id": 2, "method": "ping"})
    errors = server.process.communicate()[1].decode()
    assert server.process.returncode == 0 and "Traceback" not in errors
    assert service.sandbox.images_made == 1 and len([*tmp_path.glob("*.png")]) == 1


@pytest.mark.heavy
def test_the_image_of_a_client_that_disconnects_is_saved_and_a_later_session_has_it(tmp_path, service):
    server = Process(tmp_path, env=environment(service))
    server.call(1, "generate_image", prompt="a kitten [[slow:2]]", wait_seconds=0)
    image_id = server.receive(1)["result"]["structuredContent"]["id"]
    output, _ = server.end()  # the client is gone, and the request is in flight
    assert output == b"" and server.process.returncode == 0
    assert service.sandbox.images_made == 1 and len([*tmp_path.glob("*.png")]) == 1
    later = Process(tmp_path, env=environment(service))
    later.call(1, "generate_image", prompt="a kitten [[slow:2]]")  # no call was answered with it
    joined = later.receive(1)["result"]
    assert "nothing is paid again" in joined["content"][0]["text"]
    later.call(2, "get_image", id=image_id)
    found = later.receive(2)["result"]["structuredContent"]
    assert found["status"] == "made" and Path(found["images"][0]["path"]).is_file()
    assert joined["structuredContent"]["images"] == found["images"]
    later.end()
    assert service.sandbox.images_made == 1


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process can handle")
def test_a_server_that_is_terminated_saves_the_image_first(tmp_path, service):
    server = Process(tmp_path, env=environment(service))
    server.call(1, "generate_image", prompt="a kitten [[slow:2]]", wait_seconds=0)
    server.receive(1)
    server.end(signal.SIGTERM)
    assert service.sandbox.images_made == 1 and len([*tmp_path.glob("*.png")]) == 1


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_server_finds_its_task_at_the_next_start_and_pays_once(tmp_path, service):
    server = Process(tmp_path, "--model", "glm-image", env=environment(service))
    server.call(1, "generate_image", prompt="a kitten [[slow:3]]", wait_seconds=0)
    image_id = server.receive(1)["result"]["structuredContent"]["id"]
    wait_for_record(tmp_path, "task_id")
    server.end(signal.SIGKILL)
    later = Process(tmp_path, "--model", "glm-image", env=environment(service))
    later.call(1, "get_image", id=image_id, wait_seconds=50)
    found = later.receive(1)["result"]["structuredContent"]
    assert found["status"] == "made" and found["prompt"] == "a kitten [[slow:3]]"
    later.call(2, "generate_image", prompt="a kitten [[slow:3]]")  # collected: another one is meant
    assert later.receive(2)["result"]["structuredContent"]["id"] != found["id"]
    later.end()
    assert service.sandbox.images_made == 2


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_the_request_of_a_killed_server_that_no_task_keeps_counts_as_spent_and_says_so(tmp_path, service):
    server = Process(tmp_path, "--max-images", "1", env=environment(service))
    server.call(1, "generate_image", prompt="a kitten [[slow:30]]", wait_seconds=0)
    image_id = server.receive(1)["result"]["structuredContent"]["id"]
    wait_for_record(tmp_path, "request_id")
    server.end(signal.SIGKILL)
    later = Process(tmp_path, "--max-images", "1", env=environment(service))
    later.call(1, "get_image", id=image_id)
    found = later.receive(1)["result"]
    assert found["isError"] and found["structuredContent"]["may_have_been_charged"] is True
    later.call(2, "generate_image", prompt="a dog")
    assert later.receive(2)["result"]["isError"]
    later.end()


def wait_for_record(folder, name):
    """Wait until a record has a field: the server writes it before, or right after, the request."""
    import time

    while not any(f'"{name}":"' in path.read_text() for path in folder.glob(".cogview-mcp/*/attempts.jsonl")):
        time.sleep(0.05)


@pytest.mark.heavy
def test_wrong_options_end_the_command_with_a_sentence(tmp_path):
    for options, says in (
        (["--approve", "sometimes"], "--approve"), (["--size", "1x1"], "size"),
        (["--budget", "much"], "budget"), (["--http", "0", "--host", "0.0.0.0"], "COGVIEW_MCP_TOKEN"),
    ):  # fmt: skip
        command = [*COMMAND, "--sandbox", "--output-dir", str(tmp_path), *options]
        ended = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment(), check=False
        )
        assert ended.returncode == 2, (options, ended.stderr)
        assert says in ended.stderr and "Traceback" not in ended.stderr and not ended.stdout


@pytest.mark.heavy
async def test_a_hundred_calls_from_one_client_each_answer(tmp_path, service):
    """They wait at the limit of requests in flight; a call that is not served in its wait says that the image is being made."""
    options = ["--output-dir", str(tmp_path), "--inline", "none"]
    parameters = StdioServerParameters(command=COMMAND[0], args=[*COMMAND[1:], *options], env=environment(service))
    async with Client(stdio_client(parameters)) as client:
        calls = [
            client.call_tool("generate_image", {"prompt": f"kitten {number} [[slow:0.1]]", "wait_seconds": 2})
            for number in range(100)
        ]
        answers = await asyncio.gather(*calls)
        assert {answer.structured_content["status"] for answer in answers} <= {"made", "running"}
        ids = [answer.structured_content["id"] for answer in answers]
        for image_id in ids:
            while (found := await client.call_tool("get_image", {"id": image_id})).structured_content[
                "status"
            ] == "running":
                pass
            assert found.structured_content["status"] == "made"
    assert len(set(ids)) == service.sandbox.images_made == 100
