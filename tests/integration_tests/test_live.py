"""Against the paid service: skipped without a key. The name of each test says what it costs, and a fixture checks it.

`cny` is what a key of BigModel pays, `usd` what one of Z.ai pays. `make integration_test` runs all of them: 0.16 CNY in mainland
China, or 0.075 USD elsewhere. With `COGVIEW_BASE_URL` of a served sandbox they run offline, for nothing.
"""

import asyncio
import os
import re
from decimal import Decimal
from pathlib import Path

import pytest
from langchain_tests.integration_tests import ToolsIntegrationTests

from langchain_cogview import (
    CogViewAuthenticationError,
    CogViewContentFilterError,
    CogViewImageGenerator,
    CogViewImageTool,
    collect_image_costs,
)
from langchain_cogview.callbacks import CostCallbackHandler
from langchain_cogview.events import RETRY_EVENT

HAS_KEY = bool(os.environ.get("ZHIPUAI_API_KEY") or os.environ.get("ZAI_API_KEY"))
IN_CHINA = bool(os.environ.get("ZHIPUAI_API_KEY"))
OFFLINE = os.environ.get("COGVIEW_BASE_URL", "").startswith("http://127.0.0.1:")
CHEAPEST = "cogview-3-flash" if IN_CHINA else "cogview-4-250304"
BLOCKED = "[[content-filter]]" if OFFLINE else os.environ.get("COGVIEW_BLOCKED_PROMPT", "")
PRICE = re.compile(r"_for_(nothing|(?P<cny>\d+(_\d+)?)_cny(_or_(?P<usd>\d+(_\d+)?)_usd)?)(_each)?$")

pytestmark = [
    pytest.mark.live,
    pytest.mark.enable_socket,
    pytest.mark.skipif(not HAS_KEY, reason="needs ZHIPUAI_API_KEY or ZAI_API_KEY"),
]


@pytest.fixture(autouse=True)
def costs_what_the_name_says(request):
    """Compare the price in the name of the test, or of its class, with the list prices of the images that it made."""
    name = request.node.cls.__name__ if request.node.cls else request.node.originalname
    price = PRICE.search(name)
    assert price, f"The name {name} has no price."
    if request.node.name == "test_no_overrides_DO_NOT_OVERRIDE":  # of langchain-tests; it makes nothing
        yield
        return
    expected = Decimal((price["cny" if IN_CHINA else "usd"] or "0").replace("_", "."))
    with collect_image_costs() as costs:
        yield
    charges = costs.charges
    spent = sum((charges.listed or charges.amounts).values(), Decimal(0))
    assert (spent, charges.unpriced, costs.uncertain.count) == (expected, 0, 0)


def test_an_image_is_made_and_saved_for_0_06_cny_or_0_01_usd(tmp_path: Path) -> None:
    result = CogViewImageGenerator(output_dir=tmp_path).invoke("A cute little kitten")
    assert result.path is not None and result.path.parent == tmp_path
    assert result.to_pil().size == (result.width, result.height)


def test_an_async_call_makes_an_image_for_0_cny_or_0_01_usd(tmp_path: Path) -> None:
    generator = CogViewImageGenerator(model=CHEAPEST, output_dir=tmp_path)
    result = asyncio.run(generator.ainvoke("A cute little kitten"))
    assert result.path is not None


def test_the_task_endpoint_makes_an_image_for_0_10_cny_or_0_015_usd(tmp_path: Path) -> None:
    generator = CogViewImageGenerator(model="glm-image", use_tasks=True, output_dir=tmp_path, timeout=600)
    result = generator.invoke('A sign that says "OPEN"')
    assert result.image.task_id
    assert result.path is not None


@pytest.mark.skipif(not BLOCKED, reason="needs COGVIEW_BLOCKED_PROMPT, a prompt that the content filter blocks")
def test_the_content_filter_blocks_a_prompt_for_nothing() -> None:
    with pytest.raises(CogViewContentFilterError) as caught:
        CogViewImageGenerator(model=CHEAPEST).invoke(BLOCKED)
    assert caught.value.code in {"1301", "1300"}
    assert all(entry.level in range(4) for entry in caught.value.content_filter)


@pytest.mark.skipif(not IN_CHINA, reason="the free model needs ZHIPUAI_API_KEY")
def test_a_burst_of_the_free_model_gets_1302_and_loses_nothing_for_0_cny() -> None:
    codes = []

    class Retries(CostCallbackHandler):
        def on_event(self, name, event) -> None:
            if name == RETRY_EVENT:
                codes.append(event["code"])

    generator = CogViewImageGenerator(model="cogview-3-flash", max_concurrency=4, timeout=300)
    results = generator.batch(["A cute little kitten"] * 4, {"callbacks": [Retries()]})
    assert len(results) == 4
    assert "1302" in codes


def test_a_wrong_size_is_refused_before_it_is_sent_for_nothing() -> None:
    with pytest.raises(ValueError, match="513x513"):
        CogViewImageGenerator(model=CHEAPEST).invoke({"prompt": "A cute little kitten", "size": "513x513"})


@pytest.mark.skipif(OFFLINE, reason="the sandbox takes every key")
def test_a_wrong_key_is_refused_for_nothing() -> None:
    with pytest.raises(CogViewAuthenticationError):
        CogViewImageGenerator(api_key="0" * 32 + "." + "0" * 16).invoke("A cute little kitten")


class TestTool_for_0_cny_or_0_01_usd_each(ToolsIntegrationTests):  # noqa: N801  the price is in the name
    @property
    def tool_constructor(self):
        return CogViewImageTool

    @property
    def tool_constructor_params(self):
        return {"model": CHEAPEST}

    @property
    def tool_invoke_params_example(self):
        return {"prompt": "A cute little kitten"}
