"""Against the paid service: skipped without a key. Each test buys at most one picture of the cheapest model that it can."""

import os
from pathlib import Path

import pytest
from langchain_tests.integration_tests import ToolsIntegrationTests

from langchain_cogview import CogViewAuthenticationError, CogViewImageGenerator, CogViewImageTool

HAS_KEY = bool(os.environ.get("ZHIPUAI_API_KEY") or os.environ.get("ZAI_API_KEY"))

pytestmark = [
    pytest.mark.live,
    pytest.mark.enable_socket,
    pytest.mark.skipif(not HAS_KEY, reason="needs ZHIPUAI_API_KEY or ZAI_API_KEY"),
]


def test_a_picture_is_made_and_saved(tmp_path: Path) -> None:
    result = CogViewImageGenerator(output_dir=tmp_path).invoke("A cute little kitten")
    assert result.path is not None and result.path.parent == tmp_path
    assert not result.sandbox
    assert result.to_pil().size == (result.width, result.height)


async def test_a_picture_is_made_by_an_async_call(tmp_path: Path) -> None:
    result = await CogViewImageGenerator(output_dir=tmp_path).ainvoke("A cute little kitten")
    assert result.path is not None


def test_a_wrong_key_is_refused() -> None:
    with pytest.raises(CogViewAuthenticationError):
        CogViewImageGenerator(api_key="0" * 32 + "." + "0" * 16).invoke("A cute little kitten")


class TestToolLive(ToolsIntegrationTests):
    @property
    def tool_constructor(self):
        return CogViewImageTool

    @property
    def tool_invoke_params_example(self):
        return {"prompt": "A cute little kitten"}
