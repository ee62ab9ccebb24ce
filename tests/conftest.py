"""What all tests share: no key, no proxy, and a sandbox of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from langchain_cogview import CogViewImageGenerator, Sandbox

VARIABLES = (
    "ZHIPUAI_API_KEY", "ZAI_API_KEY", "COGVIEW_BASE_URL", "ZAI_BASE_URL", "LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2",
    "SSL_CERT_FILE", "SSL_CERT_DIR",
    *(f"{name}{suffix}" for name in ("http", "https", "all", "no") for suffix in ("_proxy",)),
    *(f"{name}{suffix}" for name in ("HTTP", "HTTPS", "ALL", "NO") for suffix in ("_PROXY",)),
)  # fmt: skip
FIXTURES = Path(__file__).parent / "fixtures"
FAKE_KEY = "0123456789abcdef0123456789abcdef.0123456789abcdef"


@pytest.fixture(autouse=True)
def _bare_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("live"):
        return
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sandbox():
    with Sandbox() as service:
        yield service


@pytest.fixture
def generator(sandbox: Sandbox) -> CogViewImageGenerator:
    return CogViewImageGenerator(base_url=sandbox.base_url)
