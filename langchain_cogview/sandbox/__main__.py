"""`python -m langchain_cogview.sandbox` serves a sandbox on a port until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from typing import TYPE_CHECKING, Final

from langchain_cogview.sandbox.server import SandboxServer
from langchain_cogview.sandbox.service import Sandbox

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_PORT: Final = 8765


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        argv: The options; None takes those of the process.

    Returns:
        The exit code: 0, or 1 if the port is not available.

    Raises:
        SystemExit: An option is invalid (code 2), or help was requested (code 0).
    """
    parser = argparse.ArgumentParser(
        prog="python -m langchain_cogview.sandbox",
        description="Serve the CogView image endpoint on a port of this machine, without key, cost or network.",
    )
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="the port; 0 selects a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--latency",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="time that each image takes (default: %(default)s)",
    )
    parser.add_argument(
        "--in-flight-limit",
        type=int,
        metavar="N",
        help="images in flight for each key and model; one more gets 429 (default: no limit)",
    )
    options = parser.parse_args(argv)
    port = options.port
    try:
        sandbox = Sandbox(latency=options.latency, in_flight_limit=options.in_flight_limit)
    except ValueError as error:
        parser.error(str(error))
    server = SandboxServer(sandbox, port=port)
    try:
        server.start()
    except (OSError, OverflowError) as error:
        sys.stderr.write(
            f"Port {port} is not available ({error}). Use another one with --port, or --port 0 for a free one.\n"
        )
        return 1
    sys.stdout.write(
        f"CogView sandbox at {server.base_url} until Ctrl-C. Pass this base_url to ZhipuAiClient (zai-sdk) or OpenAI (openai) "
        "with any api_key, and to CogViewImageGenerator (langchain-cogview) with api_key='sandbox'.\n"
    )
    sys.stdout.flush()
    # Set explicitly, because a shell starts background jobs with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
