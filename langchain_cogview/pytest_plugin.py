"""The fixture `cogview_sandbox` for the tests of your own application; pytest finds it by its entry point.

Of the package only its front, which loads nothing, is imported until a test asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_cogview.sandbox import Sandbox

_KEYS = ("ZHIPUAI_API_KEY", "ZAI_API_KEY")


@pytest.fixture
def cogview_sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A sandbox of this test's own, which every generator and tool uses that names no `base_url`.

    It counts requests (`requests`, `ledger`, `images_made`), scripts replies (`fail_next`), and has limits (`in_flight_limit`,
    `latency`). The keys are out of the environment while the test runs, so that nothing can be paid by mistake.

    Example:
        >>> def test_the_third_picture_is_blocked(cogview_sandbox):
        ...     cogview_sandbox.fail_next("content-filter", after=2)
        ...     run_my_agent()
        ...     assert cogview_sandbox.images_made == 2
    """
    from langchain_cogview.sandbox import Sandbox  # noqa: PLC0415

    for name in _KEYS:
        monkeypatch.delenv(name, raising=False)
    with Sandbox() as sandbox:
        monkeypatch.setenv("COGVIEW_BASE_URL", sandbox.base_url)
        yield sandbox
