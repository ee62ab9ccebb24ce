"""Requests to a sandbox, and what its replies say."""

from __future__ import annotations

import io
import json

import httpx
from PIL import Image

from tests.conftest import FAKE_KEY, FIXTURES

KEY = FAKE_KEY
AUTHORIZED = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
API = "/api/paas/v4"
ROUTE = f"{API}/images/generations"
TASKS = f"{API}/async/images/generations"
BODY = {"model": "cogview-4-250304", "prompt": "a kitten"}


def recorded(name: str):
    """What the real service answered."""
    return json.loads((FIXTURES / f"{name}.json").read_bytes())


def to_body(prompt="a kitten", **fields) -> bytes:
    return json.dumps({**BODY, "prompt": prompt, **fields}).encode()


def post(sandbox, prompt="a kitten", *, headers=AUTHORIZED, route=ROUTE, **fields):
    reply = sandbox.reply("POST", route, headers, to_body(prompt, **fields))
    assert reply.headers["x-cogview-sandbox"] == "1"
    return reply


def admit(sandbox, prompt="a kitten", *, key=KEY, route=ROUTE, **fields):
    return sandbox.admit("POST", route, {"Authorization": f"Bearer {key}"}, to_body(prompt, **fields))


def status(sandbox, *args, **fields):
    """The status of a POST within the limit."""
    with admit(sandbox, *args, **fields) as reply:
        return reply.status


def get(sandbox, reply):
    """The download of the image that a reply links to."""
    return fetch(sandbox, json.loads(reply.body)["data"][0]["url"])


def fetch(sandbox, url):
    return sandbox.reply("GET", httpx.URL(url).raw_path.decode(), {})


def error_of(reply):
    """Status and code, and proof that the body has the recorded shape."""
    body = json.loads(reply.body)
    assert set(body) - {"contentFilter"} == {"error"}
    assert set(body["error"]) == {"code", "message"}
    assert isinstance(body["error"]["code"], str)
    assert body["error"]["message"].isascii() and body["error"]["message"]
    assert reply.headers["content-type"].startswith("application/json")
    return reply.status, body["error"]["code"]


def download(url: str) -> Image.Image:
    """The image of a link that is served on a port."""
    image = Image.open(io.BytesIO(httpx.get(url, trust_env=False).raise_for_status().content))
    image.load()
    return image
