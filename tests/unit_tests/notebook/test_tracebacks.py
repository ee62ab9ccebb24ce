"""An error in a cell takes at most twelve lines, its message last, and a debugger still has every frame."""

import json
import os
import subprocess
import sys

import pytest

SHELL = """
import contextlib, io, json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(colors="nocolor")
shown = {}
for name, code in json.load(sys.stdin).items():
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        shell.run_cell(code, store_history=True)
    shown[name] = output.getvalue().strip()
print(json.dumps(shown))
"""
PREPARED = """
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda
from langchain_cogview import CogViewError, CogViewImageGenerator, CogViewImageTool, Sandbox, gallery, run_job

class Scripted(FakeMessagesListChatModel):
    def bind_tools(self, tools, **kwargs):
        return self

sandbox = Sandbox().__enter__()
sandbox.fail_next("balance", times=5)
tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=".")
call = {"type": "tool_call", "id": "1", "name": tool.name, "args": {"prompt": "x"}}
agent = create_agent(Scripted(responses=[AIMessage("", tool_calls=[call])]), tools=[tool])
generator = CogViewImageGenerator(base_url="sandbox:")

def paint(prompt):
    return generator.invoke(prompt)

def broken(prompt):
    try:
        1 / 0
    except ZeroDivisionError as error:
        raise CogViewError("It failed.") from error
"""
AROUND = "one = 1\ntwo = 2\n{}\nthree = 3\nfour = 4"
CELLS = {
    "blocked": "generator.invoke('[[content-filter:1]] x')",
    "illegal size": "generator.invoke('x', size='1x1')",
    "bad batch": "generator.batch(['a', {'prompt': ''}, 'c'])",
    "awaited batch": "await generator.abatch(['a', '[[content-filter:1]] b', 'c'])",
    "text in place of a list": "generator.batch('a kitten')",
    "awaited text in place of a list": "await generator.abatch('a kitten')",
    "text in place of a stream": "list(generator.stream_many('a kitten'))",
    "text in place of calls": "tool.batch('a kitten')",
    "text in place of results": "gallery('a kitten')",
    "number in place of a job": "run_job(5, 'job')",
    "tool": "tool.invoke({'prompt': 'x'})",
    "agent": "agent.invoke({'messages': 'x'})",
    "awaited agent": "await agent.ainvoke({'messages': 'x'})",
    "own function in a chain": "RunnableLambda(paint).invoke('[[content-filter:1]] x')",
    "cause": "broken('x')",
    "constructor": "CogViewImageGenerator(modle='x')",
}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    cells = {"": PREPARED} | {name: AROUND.format(code) for name, code in CELLS.items()}
    cells |= {"last": "import sys, traceback\nprint(len(traceback.extract_tb(sys.last_traceback)))"}
    cells |= {"before": CELLS["blocked"], "switch": "%xmode Verbose", "verbose": "%tb"}
    cells |= {"back": "%xmode Context", "setting": "get_ipython().InteractiveTB.skip_hidden = False"}
    cells |= {"unhidden": CELLS["blocked"]}
    done = subprocess.run(
        [sys.executable, "-c", SHELL],
        input=json.dumps(cells),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path_factory.mktemp("cells"),
        env=os.environ | {"IPYTHONDIR": str(tmp_path_factory.mktemp("profile"))},
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CELLS)
def test_an_error_takes_at_most_twelve_lines_and_shows_the_cell(shown, name):
    lines = shown[name].splitlines()
    assert len(lines) <= 12
    assert f"----> 3 {CELLS[name]}" in lines
    assert not [line for line in lines if line.startswith("File ")]


@pytest.mark.parametrize(
    "name",
    ["blocked", "illegal size", "tool", "constructor", *(name for name in CELLS if "in place" in name)],
)
def test_the_message_is_the_last_line(shown, name):
    assert shown[name].splitlines()[-1].startswith("CogView")


@pytest.mark.parametrize("name", ["bad batch", "awaited batch"])
def test_after_a_batch_a_note_says_what_was_made(shown, name):
    *_, message, note = shown[name].splitlines()
    assert message.startswith("CogView")
    assert note == (
        "2 of the 3 inputs were made. error.batch_results has the result or the exception of each input, in order."
    )


def test_a_function_of_the_user_is_shown_beside_the_cell(shown):
    assert "return generator.invoke(prompt)" in shown["own function in a chain"]


def test_the_cause_is_named(shown):
    assert "[Caused by ZeroDivisionError: division by zero]" in shown["cause"]


def test_a_debugger_has_every_frame(shown):
    assert int(shown["last"]) > 1


@pytest.mark.parametrize("name", ["verbose", "unhidden"])
def test_the_settings_of_ipython_show_the_hidden_frames(shown, name):
    assert "langchain_cogview/batches.py" in shown[name] or "langchain_cogview/generator.py" in shown[name]
