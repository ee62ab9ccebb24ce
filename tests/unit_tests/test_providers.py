"""What chat models of other packages send of the tool: read from their real requests, on loopback."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from langchain_core.messages import AIMessage, HumanMessage

from langchain_cogview import CogViewImageGenerator, CogViewImageTool, to_message
from tests.unit_tests.test_tool import ACCEPTED_BY_EVERY_PROVIDER

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
        for item in value.values():
            yield from schemas(item)
    for item in value if isinstance(value, list) else ():
        yield from schemas(item)


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
    for item in (schema, *schema["properties"].values()):
        assert {*item} <= ACCEPTED_BY_EVERY_PROVIDER


def found(value, test):
    """Every dict in a request that passes a test."""
    if isinstance(value, dict) and test(value):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from found(item, test)


def sent_images(name, body):
    """Bytes and type of each image in a request, as the provider's API names them."""
    if name == "anthropic":
        sources = [item["source"] for item in found(body, lambda part: part.get("type") == "image")]
        return [(item["data"], item["media_type"]) for item in sources]
    if name == "google":
        parts = found(body, lambda part: "inlineData" in part or "inline_data" in part)
        data = [item.get("inlineData") or item["inline_data"] for item in parts]
        return [(item["data"], item.get("mimeType") or item["mime_type"]) for item in data]
    urls = [item["image_url"] for item in found(body, lambda part: "image_url" in part)]
    urls = [item["url"] if isinstance(item, dict) else item for item in urls]
    return [(url.partition(",")[2], url.partition(";")[0].removeprefix("data:")) for url in urls]


def same_bytes(sent, made):
    return base64.urlsafe_b64decode(sent.replace("+", "-").replace("/", "_")) == base64.b64decode(made)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["base64", "thumbnail"])
@pytest.mark.parametrize("name", ["openai", "anthropic", "google"])
def test_a_provider_is_sent_the_image_of_a_chain(service, name, source):
    pytest.importorskip(PACKAGES[name], reason="needs the extra integrations")
    model = chat_model(name, f"http://127.0.0.1:{service.server_port}")
    result = CogViewImageGenerator(base_url="sandbox:").invoke("a kitten")
    with pytest.raises(Exception):  # noqa: B017  each package has its own error for a refusal
        (to_message.bind(text="What is it?", source=source) | model).invoke(result)
    made = result.image.content_block(source)
    ((sent, mime_type),) = sent_images(name, service.bodies[0])
    assert same_bytes(sent, made["base64"])
    assert mime_type == made["mime_type"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["openai", "anthropic", "google"])
def test_a_provider_is_sent_the_image_of_a_tool_message(service, name, tmp_path):
    pytest.importorskip(PACKAGES[name], reason="needs the extra integrations")
    tool = CogViewImageTool(base_url="sandbox:", output_dir=tmp_path, content_format="thumbnail")
    call = {"type": "tool_call", "id": "call-1", "name": tool.name, "args": {"prompt": "a kitten"}}
    message = tool.invoke(call)
    url = f"http://127.0.0.1:{service.server_port}"
    if name == "openai":
        from langchain_openai import ChatOpenAI

        model = ChatOpenAI(model="m", api_key="k", base_url=url, max_retries=0, use_responses_api=True)
    else:
        model = chat_model(name, url)
    with pytest.raises(Exception):  # noqa: B017
        model.invoke([HumanMessage("Draw a kitten."), AIMessage("", tool_calls=[call]), message])
    ((sent, mime_type),) = sent_images(name, service.bodies[0])
    assert same_bytes(sent, message.content[1]["base64"])
    assert mime_type == "image/jpeg"
