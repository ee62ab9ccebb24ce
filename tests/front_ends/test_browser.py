"""What a user relies on: the apps of docs/front-ends.md, in a real browser, over several turns."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from langchain_cogview.sandbox import Sandbox, SandboxServer
from tests.conftest import FAKE_KEY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.frontend, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
ROOT = Path(__file__).parents[2]
WAIT = 180_000  # milliseconds; only what hangs reaches it


@dataclass(frozen=True)
class FrontEnd:
    """How an app is started, and where on its page a person types and reads."""

    name: str
    arguments: tuple[str, ...]
    ready: str
    """What the program prints once it accepts connections."""
    prompt: str
    """Selector of the text field."""
    answers: str
    """Selector of the answers."""
    images: str
    """Selector of the images in the conversation."""
    can_send: str
    """Selector of what is there once the page can send a typed prompt."""


FRONT_ENDS = (
    FrontEnd(
        "gradio",
        ("gradio_app.py",),
        "Running on local URL",
        "textarea",
        ".bot.message",
        ".bot.message img",
        "button.submit-button:enabled",
    ),
    FrontEnd(
        "streamlit",
        ("-m", "streamlit", "run", "streamlit_app.py", "--server.headless=true", "--browser.gatherUsageStats=false"),
        "You can now view your Streamlit app",
        "[data-testid=stChatInputTextArea]",
        "[data-testid=stChatMessage]",
        "[data-testid=stChatMessage] [data-testid=stImage] img",
        "[data-testid=stChatInputSubmitButton]:enabled",
    ),
    FrontEnd(
        "chainlit",
        ("-m", "chainlit", "run", "chainlit_app.py", "--headless"),
        "Your app is available at",
        "#chat-input",
        ".ai-message",
        "img.inline-image, .inline-image img",
        "#chat-submit:enabled",  # disabled until the page is connected, and replaced while an answer is made
    ),
)


class HeldSandbox(Sandbox):
    """Answers a POST once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_answer = threading.Event()

    @contextmanager
    def admit(self, *arguments: Any, **options: Any) -> Any:
        with super().admit(*arguments, **options) as reply:
            assert self.may_answer.wait(WAIT / 1000)
            yield reply


@pytest.fixture
def held() -> Any:
    """The service of the apps, for a test that looks at the page while an image is generated."""
    with SandboxServer(HeldSandbox()) as server:
        yield server
        server.sandbox.may_answer.set()


def write_apps(folder: Path, base_url: str) -> None:
    """Write each Python and TypeScript block of the page under the name in its first line."""
    page = (ROOT / "docs" / "front-ends.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:python|tsx)\n(?:#|//) (\w+\.(?:py|tsx))\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for name, code in blocks:
        (folder / name).write_text(code.replace('"sandbox:"', f'"{base_url}"'), encoding="utf-8")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def environment_of(folder: Path) -> dict[str, str]:
    path = f"{folder}{os.pathsep}{ROOT}"
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HOME": str(folder)}


@contextmanager
def running(arguments: tuple[str, ...], folder: Path, ready: str, environment: dict[str, str]) -> Any:
    """Run Python with these arguments, once it printed that it is ready."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environment_of(folder) | environment, text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if ready in line:
                break
        else:
            pytest.fail("".join(printed))
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def browser() -> Any:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        flags.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost")
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@pytest.fixture(params=FRONT_ENDS, ids=lambda item: item.name)
def chat(request: pytest.FixtureRequest, tmp_path: Path, browser: Any) -> Any:
    """The page of a running app, and how it is used."""
    front_end: FrontEnd = request.param
    if find_spec(front_end.name) is None:  # not imported here: chainlit writes its settings where it is imported
        pytest.skip(f"needs {front_end.name}")
    write_apps(tmp_path, request.getfixturevalue("held").base_url if "held" in request.fixturenames else "sandbox:")
    port = free_port()
    environment = {
        "GRADIO_SERVER_PORT": port, "GRADIO_ANALYTICS_ENABLED": "False", "CHAINLIT_PORT": port, "CHAINLIT_HOST": "127.0.0.1",
        "STREAMLIT_SERVER_PORT": port, "STREAMLIT_SERVER_ADDRESS": "127.0.0.1", "ZHIPUAI_API_KEY": FAKE_KEY,
    }  # fmt: skip
    with running(front_end.arguments, tmp_path, front_end.ready, environment):
        page = browser.new_page(viewport={"width": 1000, "height": 1600})
        page.set_default_timeout(WAIT)
        page.goto(f"http://127.0.0.1:{port}")
        yield Chat(page, front_end)
        page.close()


@dataclass
class Chat:
    page: Any
    front_end: FrontEnd

    def ask(self, prompt: str, answer: str) -> None:
        """Type a prompt, and wait for an answer more that has these words."""
        answers = self.page.locator(self.front_end.answers).filter(has_text=answer)
        before = answers.count()
        self.send(prompt)
        answers.nth(before).wait_for()

    def send(self, prompt: str) -> None:
        """Type a prompt and send it."""
        field = self.page.locator(self.front_end.prompt).first
        field.click()
        field.fill(prompt)
        self.page.locator(self.front_end.can_send).first.wait_for()
        field.press("Enter")

    def sources(self, count: int) -> list[str]:
        """Wait until this many different images were decoded; return the sources of all that are there."""
        self.page.wait_for_function(
            "([images, count]) => new Set([...document.querySelectorAll(images)].filter(each => each.naturalWidth === 1024)"
            ".map(each => each.currentSrc)).size >= count",
            arg=[self.front_end.images, count],
        )
        return self.page.evaluate(
            "images => [...document.querySelectorAll(images)].map(each => each.currentSrc)", self.front_end.images
        )

    def look(self, name: str) -> None:
        look(self.page, f"{self.front_end.name}-{name}")


def look(page: Any, name: str) -> None:
    """Keep a screenshot where somebody wants to look at it."""
    if folder := os.environ.get("FRONT_END_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def test_each_turn_shows_its_own_image_once(chat):
    chat.ask("a red fox", "Here is your image.")
    first = chat.sources(1)
    chat.look("1-image")
    assert len(first) == 1

    chat.ask("a blue hare", "Here is your image.")
    both = chat.sources(2)
    chat.look("2-images")
    assert len(both) == len(set(both)) == 2


def test_the_chat_goes_on_after_a_blocked_prompt_and_an_error(chat):
    chat.ask("[[content-filter]] something", "The content filter blocked the prompt")
    assert chat.sources(0) == []
    chat.ask("[[balance]] something", "The account has no balance")
    assert chat.sources(0) == []
    chat.ask("a red fox", "Here is your image.")
    assert len(chat.sources(1)) == 1
    chat.look("3-blocked-and-error")


def test_the_page_says_that_an_image_is_being_made(held, chat):
    chat.send("a red fox")
    chat.page.get_by_text("Making the image").first.wait_for()
    chat.look("4-progress")
    held.sandbox.may_answer.set()
    assert len(chat.sources(1)) == 1


TURNS = """
import json
from chat_ui_graph import graph
from langgraph.checkpoint.memory import InMemorySaver

graph.checkpointer = InMemorySaver()  # what the server does
for prompt in ("a red fox", "[[content-filter]] something", "a blue hare"):
    output = graph.invoke({"messages": prompt}, {"configurable": {"thread_id": "1"}})
print(json.dumps(output["ui"]))
"""
RENDER = """
import { createRoot } from "react-dom/client";
import components from "./ui";
import messages from "./messages.json";

const all = messages.map(({ id, name, props }) => {
  const Component = components[name];
  return <Component key={id} {...props} />;
});
createRoot(document.body.appendChild(document.createElement("div"))).render(all);
"""


@pytest.fixture
def react(tmp_path):
    """Bundles a file of the folder with React, as the server of a graph does."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm")
    packages = ("react@19", "react-dom@19", "esbuild@0.28")
    done = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", *packages], cwd=tmp_path, text=True, encoding="utf-8", capture_output=True
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"needs {', '.join(packages)} from npm: {done.stderr[-500:]}")

    def bundle(name: str) -> Path:
        esbuild = tmp_path / "node_modules" / ".bin" / "esbuild"
        subprocess.run([esbuild, name, "--bundle", "--jsx=automatic", "--outfile=bundle.js"], cwd=tmp_path, check=True)
        return tmp_path / "bundle.js"

    return bundle


def test_the_component_for_agent_chat_ui_shows_each_image_with_its_prompt(tmp_path, browser, react):
    port = free_port()
    write_apps(tmp_path, "sandbox:")
    chat_graph = tmp_path / "chat_graph.py"
    chat_graph.write_text(chat_graph.read_text(encoding="utf-8").replace("localhost:2024", f"127.0.0.1:{port}"))
    turns = [sys.executable, "-c", TURNS]
    messages = subprocess.check_output(turns, cwd=tmp_path, env=environment_of(tmp_path), text=True, encoding="utf-8")
    (tmp_path / "messages.json").write_text(messages, encoding="utf-8")
    (tmp_path / "render.jsx").write_text(RENDER, encoding="utf-8")

    with running(("-m", "uvicorn", "chat_graph:app", "--port", port), tmp_path, "Uvicorn running", {}):
        page = browser.new_page(viewport={"width": 1000, "height": 1600})
        page.set_default_timeout(WAIT)
        page.add_script_tag(path=react("render.jsx"))
        page.wait_for_function(
            "[...document.images].filter(each => each.naturalWidth === 1024).length === 2 && document.images.length === 2"
        )
        look(page, "agent-chat-ui-component")
        urls = page.evaluate("[...document.images].map(each => each.src)")
        assert urls == [item["props"]["url"] for item in json.loads(messages)]
        assert page.locator("figcaption").all_inner_texts() == ["a red fox", "a blue hare"]
        page.close()
