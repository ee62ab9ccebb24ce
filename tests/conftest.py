"""What all tests share: no key, no proxy, and a sandbox of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from langchain_cogview import CogViewImageGenerator, Sandbox

VARIABLES = (
    "ZHIPUAI_API_KEY", "ZAI_API_KEY", "COGVIEW_BASE_URL", "COGVIEW_SHARED_LIMIT", "ZAI_BASE_URL", "LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2",
    "SSL_CERT_FILE", "SSL_CERT_DIR",
    *(f"{name}{suffix}" for name in ("http", "https", "all", "no") for suffix in ("_proxy",)),
    *(f"{name}{suffix}" for name in ("HTTP", "HTTPS", "ALL", "NO") for suffix in ("_PROXY",)),
)  # fmt: skip
FIXTURES = Path(__file__).parent / "fixtures"
SYNC_CALLS = {
    "langchain_cogview/generator.py": {"invoke", "batch", "collect", "submit"},
    "langchain_cogview/batches.py": {"stream", "as_completed"},
    "langchain_cogview/tool.py": {"_run"},
    "langchain_cogview/result.py": {"read", "save", "to_pil"},
    "langchain_cogview/notebook/gallery.py": {"gallery", "save"},
    "langchain_cogview/jobs/__init__.py": {"run_job", "plan_job"},
    # In callbacks of tests:
    "tests/unit_tests/jobs/test_run.py": {"lines"},
    "tests/unit_tests/test_faults_process.py": {"acquire"},
    "tests/unit_tests/api/test_transport.py": {"wait_a_moment"},
}
FAKE_KEY = "0123456789abcdef0123456789abcdef.0123456789abcdef"


HEAVY_SECONDS = 3600
"""How long a heavy test may take; only what hangs reaches it."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Use one process more than there are cores, because many tests wait for a process or a server."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("heavy"):
            item.add_marker(pytest.mark.timeout(HEAVY_SECONDS), append=False)


@pytest.fixture(autouse=True)
def _bare_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("live"):
        return
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session", autouse=True)
def _nothing_blocks_an_event_loop():
    """A file, socket or sleep that this package waits for in a thread with a running event loop raises `BlockingError`.

    That is what `langgraph dev` and other servers do. What is allowed: the sync methods, whose callers block by their own choice.
    """
    from blockbuster import BlockBuster

    blockbuster = BlockBuster(scanned_modules="langchain_cogview")
    for name in [name for name in blockbuster.functions if "Lock" in name]:
        # It sees no `with lock:`, and every lock of every thread would be slower and answer to an interrupt in another way.
        del blockbuster.functions[name]
    for function in blockbuster.functions.values():
        for path, names in SYNC_CALLS.items():
            function.can_block_in(path, names)
    blockbuster.activate()
    yield
    blockbuster.deactivate()


@pytest.fixture
def sandbox():
    with Sandbox() as service:
        yield service


@pytest.fixture
def generator(sandbox: Sandbox) -> CogViewImageGenerator:
    return CogViewImageGenerator(base_url=sandbox.base_url)
