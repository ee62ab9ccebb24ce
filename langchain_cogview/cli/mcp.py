"""`cogview mcp`: an MCP server that makes images for any client."""

from __future__ import annotations

import os
import signal
import threading
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from langchain_cogview.catalog import DEFAULT_MODEL
from langchain_cogview.cli.output import print_stderr, print_stdout, run_command

if TYPE_CHECKING:
    from langchain_cogview.mcp.server import CogViewServer

MCP_MISSING: Final = 'cogview mcp needs the MCP SDK. Install it with: pip install "langchain-cogview[mcp]"'
TOKEN_VARIABLE: Final = "COGVIEW_MCP_TOKEN"  # noqa: S105  the name of a variable


class Inline(StrEnum):
    """What a result has of an image, besides its link."""

    THUMBNAIL = "thumbnail"
    NONE = "none"
    FULL = "full"


def mcp(
    *,
    http: Annotated[
        int | None, typer.Option(min=0, max=65535, metavar="PORT", help="Serve streamable HTTP. Default: stdio.")
    ] = None,
    host: Annotated[
        str, typer.Option(help=f"With --http: the address. One that is not loopback needs a token in {TOKEN_VARIABLE}.")
    ] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="With --http: a further Host header, and its https origin. Repeatable.")
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option(help="Folder of the images. Default: Pictures/CogView in the home folder.")
    ] = None,
    model: Annotated[str, typer.Option(help="One of the provider's image models.")] = DEFAULT_MODEL,
    size: Annotated[str | None, typer.Option(help="Default size: for example 1024x1024, 16:9 or square.")] = None,
    quality: Annotated[str | None, typer.Option(help="Default quality: standard or hd.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Limit of the money for the folder, in the key's currency; survives a restart.")
    ] = None,
    max_images: Annotated[
        int | None, typer.Option(min=0, help="Limit of the images for the folder; survives a restart.")
    ] = None,
    approve: Annotated[
        str, typer.Option(help="Ask the user before an image is paid for: always, above=0.05 (its price), or never.")
    ] = "never",
    inline: Annotated[
        Inline, typer.Option(help="What a result has of the image, besides its link.")
    ] = Inline.THUMBNAIL,
    region: Annotated[
        str | None, typer.Option(help="china or international. Default: the region of the key that is set.")
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="Default: COGVIEW_BASE_URL, else the region's URL.")] = None,
    timeout: Annotated[float, typer.Option(help="Total time limit for one image, in seconds.")] = 120.0,
    bundle: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Serve nothing: write an MCP bundle (.mcpb) for desktop clients, and end."),
    ] = None,
    sandbox: Annotated[bool, typer.Option("--sandbox", help="Generate placeholders offline: no key, no cost.")] = False,
) -> None:
    """Serve image generation to MCP clients: Claude, Cursor, VS Code, Codex and others.

    The key is read from ZHIPUAI_API_KEY or ZAI_API_KEY. An image that is paid for is saved, whatever becomes of the client.
    """  # noqa: DOC501  the help shows this text
    if base_url is not None and (sandbox or not base_url.strip()):
        raise typer.BadParameter("--base-url needs a URL and cannot be combined with --sandbox.")
    if bundle is not None:
        run_command(lambda: _bundle(bundle))
    folder = Path(output_dir).expanduser() if output_dir else default_folder()
    settings: dict[str, Any] = {"size": size, "quality": quality, "region": region, "budget": budget}
    settings |= {"base_url": "sandbox:" if sandbox else base_url, "max_images": max_images}
    settings = {name: value for name, value in settings.items() if value is not None}
    settings |= {"model": model, "timeout": timeout, "output_dir": folder.absolute()}
    address = {"host": host, "allowed_hosts": allow_host or []}
    run_command(lambda: _serve(settings, approve, inline.value, http, address))


def _bundle(file: str) -> int:
    try:
        from langchain_cogview.mcp.bundle import write_bundle  # noqa: PLC0415
    except ImportError as error:
        return _missing(error)
    return print_stdout(str(write_bundle(Path(file))))


def _missing(error: ImportError) -> int:
    """Return the exit code after saying what to install.

    Raises:
        ImportError: It is not one of a package of the extra.
    """
    if not (error.name or "").startswith(("mcp", "PIL", "starlette", "uvicorn")):
        raise error
    print_stderr(MCP_MISSING)
    return 2


def default_folder() -> Path:
    """Choose the folder of the images: where a person finds it, whatever the working folder of the client is.

    Returns:
        A folder in the home folder.
    """
    home = Path.home()
    return (home / "Pictures" if (home / "Pictures").is_dir() else home) / "CogView"


def _serve(settings: dict[str, Any], approve: str, inline: Any, http: int | None, address: dict[str, Any]) -> int:
    try:
        from langchain_cogview.mcp.http import run_http  # noqa: PLC0415
        from langchain_cogview.mcp.server import Approval, CogViewServer, ServerSettings, run_stdio  # noqa: PLC0415
    except ImportError as error:
        return _missing(error)
    server = CogViewServer(ServerSettings(settings, Approval.parse(approve), inline))
    if http is None:
        _finish_on_signals(server)
        run_stdio(server)
    else:
        run_http(server, port=http, token=os.environ.get(TOKEN_VARIABLE), **address)
    return 0


def _finish_on_signals(server: CogViewServer) -> None:
    """On SIGTERM or Ctrl-C, wait for the images that are being made, and end. A second signal ends at once."""

    def finish() -> None:
        server.finish()
        os._exit(0)  # the thread that reads the standard input cannot be woken

    def handle(number: int, frame: Any) -> None:  # noqa: ARG001
        signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=finish, name="cogview-finish").start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
