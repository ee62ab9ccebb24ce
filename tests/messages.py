"""What goes wrong for real, provoked one by one, and what the user is told: the table of docs/errors.md.

    python -m tests.messages      prints the table

Each scenario goes through real parts: the sandbox, loopback hosts and proxies, a certificate that nobody trusts, an event
loop that runs already. Nothing but loopback is asked.
"""

from __future__ import annotations

import asyncio
import functools
import re
import socket
import ssl
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trustme

from langchain_cogview import CogViewError, CogViewImageGenerator, ImageResult, Sandbox
from tests.conftest import FAKE_KEY, FIXTURES, VARIABLES
from tests.host import Host, http

HEAD = "| what went wrong | what you get | what happened | what to do | request id |\n|---|---|---|---|---|"


@dataclass
class Setting:
    """What a scenario runs in: a bare environment, an empty folder, and parts that are ended afterwards."""

    patch: pytest.MonkeyPatch
    folder: Path
    parts: ExitStack
    sandbox: Sandbox = field(init=False)

    def __post_init__(self) -> None:
        self.sandbox = self.parts.enter_context(Sandbox())

    def generate(self, prompt: str = "a kitten", **settings: Any) -> ImageResult:
        """Ask the sandbox once."""
        return self.generator(**settings).invoke(prompt)

    def generator(self, **settings: Any) -> CogViewImageGenerator:
        settings = {"base_url": self.sandbox.base_url, "max_retries": 0, "api_key": FAKE_KEY, "timeout": 5, **settings}
        return CogViewImageGenerator(**settings)

    def refused_with(self, status: int, fixture: str) -> ImageResult:
        """Ask once, and get a reply of the service that somebody recorded."""
        self.sandbox.fail_next("status", status=status, body=(FIXTURES / fixture).read_bytes())
        return self.generate()

    def host(self, reply: bytes, context: ssl.SSLContext | None = None) -> int:
        """The port of a host that answers alike whatever it is asked."""
        return self.parts.enter_context(Host(reply, context)).port


SCENARIOS: dict[str, Callable[[Setting], Any]] = {}


def scenario(name: str) -> Callable[[Callable[[Setting], Any]], Callable[[Setting], Any]]:
    def add(provoke: Callable[[Setting], Any]) -> Callable[[Setting], Any]:
        SCENARIOS[name] = provoke
        return provoke

    return add


# --- keys and accounts


@scenario("no key")
def _(setting):
    CogViewImageGenerator()


@scenario("both keys are set")
def _(setting):
    for name in ("ZHIPUAI_API_KEY", "ZAI_API_KEY"):
        setting.patch.setenv(name, FAKE_KEY)
    CogViewImageGenerator()


@scenario("only the other platform's key is set")
def _(setting):
    setting.patch.setenv("ZAI_API_KEY", FAKE_KEY)
    CogViewImageGenerator(region="china")


@scenario("a key with a blank or quotation marks")
def _(setting):
    CogViewImageGenerator(api_key=f'"{FAKE_KEY}"')


@scenario("the other platform's key, or a wrong one")
def _(setting):
    setting.refused_with(401, "seen-401-1000.json")


@scenario("the coding plan's base URL")
def _(setting):
    CogViewImageGenerator(api_key=FAKE_KEY, base_url="https://api.z.ai/api/coding/paas/v4")


@scenario("no balance, or a coding-plan key")
def _(setting):
    setting.refused_with(429, "seen-429-1113-zai.json")


@scenario("too many requests in flight")
def _(setting):
    # A wait that does not fit the time limit: a shorter one would be waited for.
    setting.sandbox.fail_next("rate-limit", retry_after=3000)
    setting.generate()


@scenario("the model is busy")
def _(setting):
    setting.refused_with(429, "seen-429-1305.json")


@scenario("the service is down")
def _(setting):
    setting.generate("[[unavailable]]")


# --- requests


@scenario("the prompt is blocked")
def _(setting):
    setting.generate("[[content-filter:1]]")


@scenario("the image is blocked")
def _(setting):
    setting.generate("[[content-filter:0:assistant]]")


@scenario("an illegal size")
def _(setting):
    setting.generator().invoke({"prompt": "a kitten", "size": "1000x1000"})


@scenario("a model that this version does not know")
def _(setting):
    setting.generator(model="glm-imag")


@scenario("a model that the service does not know")
def _(setting):
    setting.refused_with(400, "seen-400-1211.json")


@scenario("the prompt is too long")
def _(setting):
    setting.refused_with(400, "seen-400-1261.json")


# --- time and outcome


@scenario("the time was over before the request was sent")
def _(setting):
    silent = setting.parts.enter_context(socket.create_server(("127.0.0.1", 0)))  # takes the connection, and no TLS
    setting.generate(base_url=f"https://127.0.0.1:{silent.getsockname()[1]}/v4", timeout=1)


@scenario("the time was over before the answer came")
def _(setting):
    setting.generate("[[slow:30]]", timeout=1)


@scenario("the service failed without saying whether it made an image")
def _(setting):
    setting.generate("[[server-error]]")


@scenario("a reply that is broken")
def _(setting):
    setting.generate("[[malformed]]")


# --- network


@scenario("the host cannot be reached")
def _(setting):
    setting.generate(base_url="http://127.0.0.1:1/v4")


@scenario("a SOCKS proxy without its package")
def _(setting):
    setting.patch.setitem(sys.modules, "socksio", None)
    setting.patch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1")
    setting.generate(base_url="https://api.invalid/v4")


@scenario("the proxy is not there")
def _(setting):
    setting.patch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    setting.generate(base_url="https://api.invalid/v4")


@scenario("the proxy refuses")
def _(setting):
    setting.patch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{setting.host(http(407))}")
    setting.generate(base_url="https://api.invalid/v4")


@scenario("a certificate that is not trusted")
def _(setting):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    setting.generate(base_url=f"https://127.0.0.1:{setting.host(http(200), context)}/v4")


@scenario("`SSL_CERT_FILE` names no file")
def _(setting):
    setting.patch.setenv("SSL_CERT_FILE", str(setting.folder / "ca.pem"))
    setting.generate(base_url="https://127.0.0.1:1/v4")


@scenario("a base URL that is none")
def _(setting):
    CogViewImageGenerator(api_key=FAKE_KEY, base_url="ftp://example.com")


@scenario("a base URL with a wrong path")
def _(setting):
    setting.refused_with(200, "seen-200-wrong-route.json")


@scenario("a base URL where a web page stands")
def _(setting):
    setting.generate(base_url=f"http://127.0.0.1:{setting.host(http(200, '<html>Log in</html>'))}/v4")


@scenario("a base URL that redirects")
def _(setting):
    setting.generate(base_url=f"http://127.0.0.1:{setting.host(http(302, Location='https://example.com/'))}/v4")


# --- bytes


@scenario("the link has expired")
def _(setting):
    setting.generate("[[expired-url]]").images[0].read()


@scenario("`output_dir` cannot be written to")
def _(setting):
    (setting.folder / "file").touch()
    return setting.generate(output_dir=setting.folder / "file" / "images")


@scenario("`save` to a place that cannot be written to")
def _(setting):
    (setting.folder / "cat.png").mkdir()
    setting.generate().save(setting.folder / "cat")


@scenario("`asyncio.run` where a loop runs already, as in a notebook")
def _(setting):
    generator = setting.generator()

    async def cell() -> None:
        # What to do instead, which has to work here.
        assert (await generator.ainvoke("a kitten")).image
        assert generator.invoke("a kitten").image
        left = generator.ainvoke("a kitten")
        try:
            asyncio.run(left)
        except RuntimeError as error:
            error.hint = "Write `await generator.ainvoke(...)`; `generator.invoke(...)` works there, too."
            raise
        finally:
            left.close()

    asyncio.run(cell())


# --- the table


@dataclass(frozen=True)
class Message:
    """What the user reads.

    Attributes:
        kind: Name of the exception's class, or how else it comes.
        happened: In one sentence.
        remedy: What to do, in another.
        request_id: Whether it has one.
    """

    kind: str
    happened: str
    remedy: str
    request_id: bool


@functools.cache
def message_of(name: str) -> Message:
    """Provoke a scenario and return its message; moments and paths are replaced, because they differ each time."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as parts:
        for variable in VARIABLES:
            patch.delenv(variable, raising=False)
        setting = Setting(patch, Path(parts.enter_context(tempfile.TemporaryDirectory())), parts)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = SCENARIOS[name](setting)
            except (CogViewError, RuntimeError) as error:
                return _message(error, setting)
        if caught:
            return _sentences("`UserWarning`", str(caught[0].message), setting)
        return _sentences("a result, with a warning", result.warnings[0], setting, request_id=bool(result.request_id))


def _message(error: Any, setting: Setting) -> Message:
    kind = f"`{type(error).__name__}`"
    text = getattr(error, "message", str(error))
    request_id = bool(getattr(error, "request_id", None))
    if not getattr(error, "hint", ""):
        return _sentences(kind, text, setting, request_id=request_id)
    return Message(kind, _settled(text, setting), _settled(error.hint, setting), request_id)


def _sentences(kind: str, text: str, setting: Setting, *, request_id: bool = False) -> Message:
    happened, _, remedy = text.partition(". ")
    return Message(kind, _settled(f"{happened.rstrip('.')}.", setting), _settled(remedy, setting), request_id)


def _settled(text: str, setting: Setting) -> str:
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "…", text.replace(str(setting.folder), "…"))
    return text.replace("|", "\\|")


def table() -> str:
    """The Markdown table of all scenarios, in their order."""
    rows = [HEAD]
    for name in SCENARIOS:
        message = message_of(name)
        cells = (name, message.kind, message.happened, message.remedy, "yes" if message.request_id else "–")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
