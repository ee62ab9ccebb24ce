"""The fixture `cogview_sandbox` for the tests of your own application; pytest finds it by its entry point.

The plugin imports the rest of the package only when a test uses the fixture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from langchain_cogview.sandbox import Sandbox

_KEYS = ("ZHIPUAI_API_KEY", "ZAI_API_KEY")


@pytest.fixture
def cogview_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Sandbox]:
    """Provide each test with its own sandbox, which all generators and tools without a `base_url` use.

    The sandbox records requests (`requests`, `ledger`, `images_made`), scripts replies (`fail_next`) and has limits
    (`in_flight_limit`, `latency`). While the test runs, the API keys are removed from the environment, so that nothing is
    paid by mistake, and a tool that is made without `output_dir` saves its images in a folder of `tmp_path`.

    Args:
        monkeypatch: The fixture of pytest that restores the environment.
        tmp_path: The temporary folder of the test.

    Yields:
        The sandbox.

    Example:
        >>> def test_the_third_image_is_blocked(cogview_sandbox):
        ...     cogview_sandbox.fail_next("content-filter", after=2)
        ...     run_my_agent()
        ...     assert cogview_sandbox.images_made == 2
    """
    from langchain_cogview import tool  # noqa: PLC0415
    from langchain_cogview.sandbox import Sandbox  # noqa: PLC0415

    monkeypatch.setattr(tool, "DEFAULT_OUTPUT_DIR", str(tmp_path / tool.DEFAULT_OUTPUT_DIR))
    for name in _KEYS:
        monkeypatch.delenv(name, raising=False)
    with Sandbox() as sandbox:
        monkeypatch.setenv("COGVIEW_BASE_URL", sandbox.base_url)
        yield sandbox
