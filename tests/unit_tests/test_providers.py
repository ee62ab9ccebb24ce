"""What chat models of other packages send of the tool: read from their real requests, on loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from langchain_cogview import CogViewImageTool
from tests.unit_tests.test_tool import EVERY_PROVIDER_TAKES

pytestmark = pytest.mark.heavy  # the packages take seconds to import

PACKAGES = {
    "openai": "langchain_openai",
    "anthropic": "langchain_anthropic",
    "mistral": "langchain_mistralai",
    "google": "langchain_google_genai",
}


class Refusing(BaseHTTPRequestHandler):
    """Keeps the body of each request, and refuses it."""

    def do_POST(self):
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(400)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


@pytest.fixture
def service():
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.bodies = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def chat_model(name, url):
    if name == "openai":
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(model="m", api_key="k", base_url=url, max_retries=0)
    if name == "anthropic":
        from langchain_anthropic import ChatAnthropic

        return ChatAnthropic(model="m", api_key="k", base_url=url, max_retries=0)
    if name == "mistral":
        from langchain_mistralai import ChatMistralAI

        return ChatMistralAI(model="m", api_key="k", endpoint=url, max_retries=1)
    from langchain_google_genai import ChatGoogleGenerativeAI

    return ChatGoogleGenerativeAI(model="m", api_key="k", base_url=url, max_retries=1)


def schemas(value):
    """Every JSON schema of an object's properties in a request."""
    if isinstance(value, dict):
        if "properties" in value:
            yield value
        for each in value.values():
            yield from schemas(each)
    for each in value if isinstance(value, list) else ():
        yield from schemas(each)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", PACKAGES)
def test_a_provider_is_sent_only_keywords_that_it_takes(service, name, strict):
    pytest.importorskip(PACKAGES[name], reason="needs the extra integrations")
    tool = CogViewImageTool(base_url="sandbox:", model="glm-image")
    options = {"strict": True} if strict and name in {"openai", "anthropic"} else {}
    model = chat_model(name, f"http://127.0.0.1:{service.server_port}").bind_tools([tool], **options)
    with pytest.raises(Exception):  # noqa: B017  each package has its own error for a refusal
        model.invoke("Draw a kitten.")
    (schema,) = schemas(service.bodies[0])
    assert list(schema["properties"]) == ["prompt", "size", "quality"]
    for each in (schema, *schema["properties"].values()):
        assert {*each} <= EVERY_PROVIDER_TAKES
