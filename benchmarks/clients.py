"""The clients that are measured side by side. Each makes one image per call, of a service at a base URL, and gives its link.

Every client is set up as its users would for many images: one shared client, no proxy, the pool as large as asked for. What
is not installed is left out. The ones written here by hand, `httpx tool` and `httpx Runnable`, are the least that an expert
would write around a shared httpx client.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

MODEL = "cogview-4-250304"
KEY = "benchmark.no-key-of-anybody"  # two parts, as zai-sdk wants it
HEADERS = {"Authorization": f"Bearer {KEY}"}
PATIENCE = 600.0
"""Seconds; long enough that nobody's time limit ends a measurement."""

Call = "Callable[[str], Any]"
ACall = "Callable[[str], Awaitable[Any]]"


def body(prompt: str) -> dict[str, str]:
    return {"model": MODEL, "prompt": prompt}


def tool_call(prompt: str) -> dict[str, Any]:
    return {"type": "tool_call", "id": "1", "name": "generate", "args": {"prompt": prompt}}


def _httpx_client(base_url: str, slots: int) -> Any:
    import httpx

    limits = httpx.Limits(max_connections=slots, max_keepalive_connections=slots)
    return httpx.Client(base_url=base_url, headers=HEADERS, limits=limits, timeout=PATIENCE, trust_env=False)


def _httpx_async_client(base_url: str, slots: int) -> Any:
    import httpx

    limits = httpx.Limits(max_connections=slots, max_keepalive_connections=slots)
    return httpx.AsyncClient(base_url=base_url, headers=HEADERS, limits=limits, timeout=PATIENCE, trust_env=False)


# --- bare clients


def httpx_sync(base_url: str, slots: int) -> Call:
    client = _httpx_client(base_url, slots)

    def call(prompt: str) -> str:
        response = client.post("/images/generations", json=body(prompt))
        response.raise_for_status()
        return response.json()["data"][0]["url"]

    return call


def httpx_async(base_url: str, slots: int) -> ACall:
    client = _httpx_async_client(base_url, slots)

    async def call(prompt: str) -> str:
        response = await client.post("/images/generations", json=body(prompt))
        response.raise_for_status()
        return response.json()["data"][0]["url"]

    return call


def aiohttp_async(base_url: str, slots: int) -> ACall:
    import aiohttp

    session: list[Any] = []  # made in the loop that it belongs to

    async def call(prompt: str) -> str:
        if not session:
            connector = aiohttp.TCPConnector(limit=slots)
            total = aiohttp.ClientTimeout(total=PATIENCE)
            session.append(aiohttp.ClientSession(headers=HEADERS, connector=connector, timeout=total))
        async with session[0].post(f"{base_url}/images/generations", json=body(prompt)) as response:
            response.raise_for_status()
            return (await response.json())["data"][0]["url"]

    return call


def zai_sync(base_url: str, slots: int) -> Call:
    from zai import ZhipuAiClient

    client = ZhipuAiClient(base_url=base_url, api_key=KEY, timeout=PATIENCE)
    return lambda prompt: client.images.generations(**body(prompt)).data[0].url


def openai_sync(base_url: str, slots: int) -> Call:
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key=KEY, timeout=PATIENCE)
    return lambda prompt: client.images.generate(**body(prompt)).data[0].url


def openai_async(base_url: str, slots: int) -> ACall:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=base_url, api_key=KEY, timeout=PATIENCE)

    async def call(prompt: str) -> str:
        return (await client.images.generate(**body(prompt))).data[0].url

    return call


def bare_asyncio(base_url: str, slots: int) -> ACall:
    """No HTTP library at all: what an event loop can do."""
    host, _, path = base_url.removeprefix("http://").partition("/")
    address, port = host.split(":")
    idle: list[Any] = []

    async def call(prompt: str) -> str:
        import json

        reader, writer = idle.pop() if idle else await asyncio.open_connection(address, int(port))
        content = json.dumps(body(prompt)).encode()
        head = f"POST /{path}/images/generations HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        reply = json.loads(await reader.readexactly(length))
        idle.append((reader, writer))
        return reply["data"][0]["url"]

    return call


# --- on LangChain, by hand


def _by_hand(base_url: str, slots: int) -> tuple[Any, Any]:
    from langchain_core.runnables import Runnable
    from langchain_core.tools import BaseTool
    from pydantic import BaseModel

    client, aclient = _httpx_client(base_url, slots), _httpx_async_client(base_url, slots)

    def generate(prompt: str, **kwargs: Any) -> str:
        response = client.post("/images/generations", json=body(prompt))
        response.raise_for_status()
        return response.json()["data"][0]["url"]

    async def agenerate(prompt: str, **kwargs: Any) -> str:
        response = await aclient.post("/images/generations", json=body(prompt))
        response.raise_for_status()
        return response.json()["data"][0]["url"]

    class Arguments(BaseModel):
        prompt: str

    class GenerateTool(BaseTool):
        name: str = "generate"
        description: str = "Generates an image."
        args_schema: Any = Arguments

        def _run(self, prompt: str) -> str:
            return generate(prompt)

        async def _arun(self, prompt: str) -> str:
            return await agenerate(prompt)

    class Generate(Runnable[str, str]):
        def invoke(self, input: str, config: Any = None, **kwargs: Any) -> str:
            return self._call_with_config(generate, input, config)

        async def ainvoke(self, input: str, config: Any = None, **kwargs: Any) -> str:
            return await self._acall_with_config(agenerate, input, config)

    return GenerateTool(), Generate()


def hand_tool_sync(base_url: str, slots: int) -> Call:
    tool, _ = _by_hand(base_url, slots)
    return lambda prompt: tool.invoke(tool_call(prompt))


def hand_tool_async(base_url: str, slots: int) -> ACall:
    tool, _ = _by_hand(base_url, slots)
    return lambda prompt: tool.ainvoke(tool_call(prompt))


def hand_runnable_sync(base_url: str, slots: int) -> Call:
    return _by_hand(base_url, slots)[1].invoke


def hand_runnable_async(base_url: str, slots: int) -> ACall:
    return _by_hand(base_url, slots)[1].ainvoke


def dalle_sync(base_url: str, slots: int) -> Call:
    from langchain_community.tools.openai_dalle_image_generation import OpenAIDALLEImageGenerationTool
    from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper

    os.environ.setdefault("OPENAI_API_KEY", KEY)
    tool = OpenAIDALLEImageGenerationTool(api_wrapper=DallEAPIWrapper(base_url=base_url, api_key=KEY, timeout=PATIENCE))
    return lambda prompt: tool.invoke({**tool_call(prompt), "name": tool.name, "args": {"query": prompt}})


# --- ours


def our_generator(base_url: str, slots: int, **settings: Any) -> Any:
    from langchain_cogview import CogViewImageGenerator

    settings = {"download": False, "timeout": PATIENCE, "model": MODEL, **settings}
    return CogViewImageGenerator(base_url=base_url, api_key=KEY, max_concurrency=slots, **settings)


def our_generator_sync(base_url: str, slots: int) -> Call:
    return our_generator(base_url, slots).invoke


def our_generator_async(base_url: str, slots: int) -> ACall:
    return our_generator(base_url, slots).ainvoke


def our_tool_sync(base_url: str, slots: int) -> Call:
    from langchain_cogview import CogViewImageTool

    tool = CogViewImageTool(generator=our_generator(base_url, slots))
    return lambda prompt: tool.invoke({**tool_call(prompt), "name": tool.name})


def our_tool_async(base_url: str, slots: int) -> ACall:
    from langchain_cogview import CogViewImageTool

    tool = CogViewImageTool(generator=our_generator(base_url, slots))
    return lambda prompt: tool.ainvoke({**tool_call(prompt), "name": tool.name})
