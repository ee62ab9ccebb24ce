"""A sandbox under httpx, in the same process: no port, no socket."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from langchain_cogview.sandbox.records import SandboxReply
    from langchain_cogview.sandbox.service import Sandbox


class SandboxTransport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Carries the requests of an `httpx.Client` or `httpx.AsyncClient` to a sandbox, whatever host they name.

    A reply that is later than the client's read timeout becomes `httpx.ReadTimeout`, as over a wire; by then the
    sandbox has made, and counted, its picture.

    Example:
        >>> client = httpx.Client(transport=SandboxTransport(Sandbox()))
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Answer, after the reply's delay."""
        body = request.read()
        with self.sandbox.admit(request.method, _path(request), request.headers, body) as reply:
            wait = _wait(request, reply)
            if wait:
                time.sleep(wait)
        return _response(request, reply, wait)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer, after the reply's delay."""
        body = await request.aread()
        with self.sandbox.admit(request.method, _path(request), request.headers, body) as reply:
            wait = _wait(request, reply)
            if wait:
                await asyncio.sleep(wait)
        return _response(request, reply, wait)


def _path(request: httpx.Request) -> str:
    return request.url.raw_path.decode("ascii")


def _wait(request: httpx.Request, reply: SandboxReply) -> float:
    read = request.extensions.get("timeout", {}).get("read")
    return reply.delay if read is None else min(reply.delay, read)


def _response(request: httpx.Request, reply: SandboxReply, waited: float) -> httpx.Response:
    if waited < reply.delay:
        raise httpx.ReadTimeout("The sandbox took longer than the read timeout.", request=request)
    headers = {**reply.headers, "content-length": str(len(reply.body))}
    # As a stream and not as content, which httpx would read at once: then nobody could iterate over the raw bytes.
    return httpx.Response(reply.status, headers=headers, stream=httpx.ByteStream(reply.body), request=request)
