"""What registries and desktop clients want to know of the server: `server.json`, and an MCP bundle (`.mcpb`)."""

from __future__ import annotations

import io
import json
import zipfile
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.errors import CogViewStorageError, printable
from langchain_cogview.images.store import write_whole
from langchain_cogview.mcp.tools import DESCRIPTIONS

if TYPE_CHECKING:
    from pathlib import Path

NAME: Final = "io.github.langchain-cogview/langchain-cogview"
REPOSITORY: Final = "https://github.com/langchain-cogview/langchain-cogview"
DESCRIPTION: Final = "Generates images with Zhipu's CogView models; a paid image is never lost nor paid twice."
_KEYS: Final = {
    "ZHIPUAI_API_KEY": "Key from open.bigmodel.cn (mainland China). Leave it empty if you have one from z.ai.",
    "ZAI_API_KEY": "Key from z.ai (international). Leave it empty if you have one from open.bigmodel.cn.",
}
_MAIN: Final = '''"""Starts the server, for hosts that run this file in place of the command of the manifest."""

import os
import sys

COMMAND = {command!r}
os.execvp(COMMAND[0], [*COMMAND, *sys.argv[1:]])
'''


def _command() -> list[str]:
    return ["uvx", "--from", f"langchain-cogview[mcp]=={version('langchain-cogview')}", "cogview", "mcp"]


def server_json() -> dict[str, Any]:
    """Describe the server for the MCP registry.

    Returns:
        The content of `server.json`.
    """
    number = version("langchain-cogview")
    return {
        "$schema": "https://static.modelcontextprotocol.io/schemas/2025-12-11/server.schema.json",
        "name": NAME,
        "title": "CogView images",
        "description": DESCRIPTION,
        "version": number,
        "repository": {"url": REPOSITORY, "source": "github"},
        "packages": [
            {
                "registryType": "pypi",
                "identifier": "langchain-cogview",
                "version": number,
                "runtimeHint": "uvx",
                "runtimeArguments": [
                    {"type": "named", "name": "--from", "value": f"langchain-cogview[mcp]=={number}"},
                    {"type": "positional", "value": "cogview"},
                ],
                "packageArguments": [{"type": "positional", "value": "mcp"}],
                "transport": {"type": "stdio"},
                "environmentVariables": [
                    {"name": name, "description": text, "isRequired": False, "isSecret": True, "format": "string"}
                    for name, text in _KEYS.items()
                ],
            }
        ],
    }


def bundle_manifest() -> dict[str, Any]:
    """Describe the server for desktop clients.

    Returns:
        The content of the bundle's `manifest.json`.
    """
    command, *arguments = _command()
    options = ["--output-dir", "${user_config.output_dir}", "--budget", "${user_config.budget}"]
    options += ["--approve", "${user_config.approve}"]
    titles = {"ZHIPUAI_API_KEY": "API key (open.bigmodel.cn)", "ZAI_API_KEY": "API key (z.ai)"}
    keys = {
        name.lower(): {
            "type": "string",
            "title": titles[name],
            "description": text,
            "sensitive": True,
            "required": False,
            "default": "",
        }
        for name, text in _KEYS.items()
    }
    return {
        "manifest_version": "0.3",
        "name": "cogview",
        "display_name": "CogView images",
        "version": version("langchain-cogview"),
        "description": DESCRIPTION,
        "author": {"name": "langchain-cogview maintainers"},
        "license": "MIT",
        "repository": {"type": "git", "url": REPOSITORY},
        "server": {
            "type": "python",
            "entry_point": "server/main.py",
            "mcp_config": {
                "command": command,
                "args": [*arguments, *options],
                "env": {name: f"${{user_config.{name.lower()}}}" for name in _KEYS},
            },
        },
        "tools": [{"name": name, "description": text} for name, text in DESCRIPTIONS.items()],
        "user_config": {
            **keys,
            "output_dir": {
                "type": "directory",
                "title": "Folder of the images",
                "description": "Where the images are saved.",
                "required": False,
                "default": "${HOME}/CogView",
            },
            "budget": {
                "type": "string",
                "title": "Budget",
                "description": "Limit of the money, in the currency of the key. It counts all images of the folder.",
                "required": False,
                "default": "10",
            },
            "approve": {
                "type": "string",
                "title": "Approval",
                "description": "Ask before an image is paid for: always, never, or above=0.05.",
                "required": False,
                "default": "never",
            },
        },
        "compatibility": {"platforms": ["darwin", "win32", "linux"], "runtimes": {"python": ">=3.11"}},
    }


def write_bundle(path: Path) -> Path:
    """Write the bundle, which desktop clients install by a double click. They run the server with uv.

    Args:
        path: The file, which is replaced.

    Returns:
        The path.

    Raises:
        CogViewStorageError: The file cannot be written.
    """
    content = io.BytesIO()
    files = {
        "manifest.json": json.dumps(bundle_manifest(), indent=2) + "\n",
        "server/main.py": _MAIN.format(command=_command()),
    }
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, text in files.items():  # the same bytes each time
            bundle.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), text)
    try:
        write_whole(path, content.getvalue())
    except OSError as error:
        reason = error.strerror or str(error)
        raise CogViewStorageError(
            f"The bundle could not be written to {printable(str(path), 120)}: {reason}."
        ) from None
    return path
