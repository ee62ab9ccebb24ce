"""What comes with the MCP server: the documentation page, the registry's file, the bundle and the skill."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("mcp")

from langchain_cogview.mcp.bundle import bundle_manifest, server_json, write_bundle
from langchain_cogview.mcp.tools import DESCRIPTIONS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "mcp.md").read_text(encoding="utf-8")
SKILL = (ROOT / "skills" / "cogview" / "SKILL.md").read_text(encoding="utf-8")
KEYS = {"ZHIPUAI_API_KEY", "ZAI_API_KEY"}
COMMAND = ["uvx", "--from", "langchain-cogview[mcp]", "cogview", "mcp"]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def configured():
    for block in blocks(PAGE, "json"):
        content = json.loads(block)
        yield content.get("mcpServers", content.get("servers"))["cogview"]
    for block in blocks(PAGE, "toml"):
        yield tomllib.loads(block)["mcp_servers"]["cogview"]


def options_of(command):
    from typer.testing import CliRunner

    from langchain_cogview.cli import application

    help_page = CliRunner().invoke(application(), [command, "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"}).output
    return set(re.findall(r"--[a-z-]+", help_page))


def test_the_page_configures_six_clients_with_the_command_and_its_options():
    servers = list(configured())
    assert len(servers) == 6
    known = options_of("mcp")
    for server in servers:
        assert [server["command"], *server["args"]][:5] == COMMAND
        assert {part for part in server["args"][4:] if part.startswith("--")} <= known
        assert server["env"].keys() <= KEYS and not re.search(r"[0-9a-f]{32}", json.dumps(server))


def test_the_options_and_tools_that_the_page_names_exist():
    known = options_of("mcp")
    assert set(re.findall(r"(?<!\S)`?(--[a-z-]+)", re.sub(r"--from", "", PAGE))) <= known
    for name in DESCRIPTIONS:
        assert f"| `{name}` |" in PAGE


def test_the_file_for_the_registry_is_up_to_date():
    content = json.loads((ROOT / "server.json").read_text(encoding="utf-8"))
    assert content == server_json()
    assert content["version"] == content["packages"][0]["version"] == version("langchain-cogview")
    assert re.fullmatch(r"[A-Za-z0-9.-]+/[A-Za-z0-9._-]+", content["name"]) and len(content["description"]) <= 100
    assert all(variable["isSecret"] for variable in content["packages"][0]["environmentVariables"])


def test_the_bundle_has_a_manifest_with_a_key_field_and_is_the_same_each_time(tmp_path):
    paths = [write_bundle(tmp_path / name) for name in ("a.mcpb", "b.mcpb")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with zipfile.ZipFile(paths[0]) as bundle:
        manifest = json.loads(bundle.read("manifest.json"))
        main = bundle.read(manifest["server"]["entry_point"]).decode()
    assert manifest == bundle_manifest()
    fields = manifest["user_config"]
    assert fields["zhipuai_api_key"]["sensitive"] and fields["zai_api_key"]["sensitive"]
    launch = manifest["server"]["mcp_config"]
    used = re.findall(r"\$\{user_config\.(\w+)\}", json.dumps(launch))
    assert set(used) == set(fields) and all("default" in field for field in fields.values())
    assert {part for part in launch["args"] if part.startswith("--")} <= {*options_of("mcp"), "--from"}
    compile(main, "main.py", "exec")
    assert [tool["name"] for tool in manifest["tools"]] == list(DESCRIPTIONS)


def test_an_empty_key_of_the_bundle_counts_as_none(monkeypatch, tmp_path):
    from langchain_cogview import CogViewImageGenerator

    monkeypatch.setenv("ZHIPUAI_API_KEY", "")
    monkeypatch.setenv("ZAI_API_KEY", "0123456789abcdef0123456789abcdef.0123456789abcdef")
    assert CogViewImageGenerator(output_dir=tmp_path).resolved_region == "international"


def test_the_skill_has_what_agents_need_to_find_it():
    head = re.match(r"---\n(.*?)\n---\n", SKILL, re.DOTALL)[1]
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    assert fields["name"] == "cogview" == (ROOT / "skills" / "cogview").name
    assert 50 < len(fields["description"]) <= 1024 and len(fields["compatibility"]) <= 500
    assert set(fields) <= {"name", "description", "license", "compatibility", "metadata", "allowed-tools"}
    assert len(SKILL.splitlines()) < 500


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform == "win32", reason="runs a shell")
def test_the_commands_of_the_skill_work(tmp_path):
    script = "set -eu\n" + "\n".join(blocks(SKILL, "bash"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, env={"PATH": path, "HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "lighthouse.png").is_file() and len([*(tmp_path / "kittens").glob("*.png")]) == 2


def test_the_exit_codes_of_the_skill_are_those_of_the_command():
    from langchain_cogview.cli.output import EXIT_CODES

    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", SKILL, re.MULTILINE)]
    assert codes and set(codes) <= set(EXIT_CODES)


@pytest.mark.parametrize("options", [[], ["--bundle", "x.mcpb"]])
def test_without_the_sdk_the_command_says_what_to_install(tmp_path, options):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('mcp', 'mcp_types', 'uvicorn', 'starlette')));"
        "from langchain_cogview.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "mcp", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and 'pip install "langchain-cogview[mcp]"' in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
