"""The MCP server over streamable HTTP: loopback, or elsewhere with a bearer token. Host and Origin are checked."""

from __future__ import annotations

import hmac
import ipaddress
from typing import TYPE_CHECKING, Final

import uvicorn
from mcp.server.transport_security import TransportSecuritySettings
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

from langchain_cogview.errors import CogViewConfigurationError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp, Receive, Scope, Send

    from langchain_cogview.mcp.server import CogViewServer

PATH: Final = "/mcp"
MAX_BODY: Final = 1 << 20
"""Largest body of a request, in bytes."""
MIN_TOKEN: Final = 16
"""Smallest number of characters of a token."""
_GRACE_SECONDS: Final = 3


class _BearerToken:
    """Refuses requests without the token, before anything else looks at them."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
            # Headers are latin-1; compared in constant time.
            if kind.lower() != "bearer" or not hmac.compare_digest(token.strip().encode("latin-1"), self._token):
                refused = PlainTextResponse("A bearer token is needed.", 401, {"WWW-Authenticate": "Bearer"})
                await refused(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only.

    Args:
        host: A name or an address.

    Returns:
        True for `localhost` and loopback addresses.
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def http_app(
    server: CogViewServer, *, host: str = "127.0.0.1", token: str | None = None, allowed_hosts: Sequence[str] = ()
) -> ASGIApp:
    """Make the ASGI application, whose path is `/mcp`.

    Args:
        server: The server.
        host: The address on which it is served.
        token: The bearer token that requests need; None for none.
        allowed_hosts: Further values of the Host header, such as `images.example.com`; pages of these hosts may call it by https.

    Returns:
        The application.

    Raises:
        CogViewConfigurationError: The address is not loopback and there is no token, or the token is too short.
    """
    if token is not None and (len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable()):
        raise CogViewConfigurationError(
            f"The token in COGVIEW_MCP_TOKEN is not {MIN_TOKEN} printable ASCII characters or more.",
            hint="Make one with: python -c 'import secrets; print(secrets.token_urlsafe())'",
        )
    if token is None and not is_loopback(host):
        raise CogViewConfigurationError(
            f"{host} is not loopback, so that others could spend your money.",
            hint="Set a bearer token in the variable COGVIEW_MCP_TOKEN, which clients send, or leave --host out.",
        )
    names = ["127.0.0.1", "localhost", "[::1]"]
    if not is_loopback(host) and host not in {"0.0.0.0", "::"}:  # noqa: S104  compared, not bound
        names.append(f"[{host}]" if ":" in host else host)
    hosts = [value for name in [*names, *allowed_hosts] for value in (name, f"{name}:*")]
    origins = [f"http://{name}{port}" for name in names for port in ("", ":*")]
    origins += [f"https://{name}{port}" for name in allowed_hosts for port in ("", ":*")]
    security = TransportSecuritySettings(allowed_hosts=hosts, allowed_origins=origins)
    app: ASGIApp = server.app.streamable_http_app(
        streamable_http_path=PATH, host=host, transport_security=security, max_request_body_size=MAX_BODY
    )
    return app if token is None else _BearerToken(app, token)


def run_http(
    server: CogViewServer, *, host: str, port: int, token: str | None, allowed_hosts: Sequence[str] = ()
) -> None:
    """Serve until SIGTERM or Ctrl-C, and wait in the end for the images that are being made. The log is on standard error.

    Args:
        server: The server.
        host: The address.
        port: The port; 0 for a free one, which the log names.
        token: The bearer token; None for none.
        allowed_hosts: As for `http_app`.

    Raises:
        CogViewConfigurationError: The address is in use, or cannot be served for another reason.
    """
    app = http_app(server, host=host, token=token, allowed_hosts=allowed_hosts)
    config = uvicorn.Config(
        app, host=host, port=port, log_config=_LOG, access_log=False, timeout_graceful_shutdown=_GRACE_SECONDS
    )
    try:
        uvicorn.Server(config).run()
    except SystemExit:
        raise CogViewConfigurationError(
            f"The server could not start at {printable(host, 80)}, port {port}; the log says why.",
            hint="Choose another port, or end the program that uses it.",
        ) from None
    finally:
        server.finish()


_LOG: Final = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(levelname)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stderr"}},
    "loggers": {"uvicorn": {"handlers": ["stderr"], "level": "INFO", "propagate": False}},
}
