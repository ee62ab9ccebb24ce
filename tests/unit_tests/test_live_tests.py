"""The live tests, which need a key, run against the sandbox too: so they work, and cost what their names say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from langchain_cogview import Sandbox
from langchain_cogview.catalog import MODELS
from langchain_cogview.sandbox.server import SandboxServer
from tests.conftest import FAKE_KEY
from tests.integration_tests.test_live import PRICE

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "tests" / "integration_tests" / "test_live.py").read_text(encoding="utf-8")


def test_the_name_of_each_live_test_has_a_list_price():
    names = re.findall(r"^def (test_\w+)|^class (Test\w+)", SOURCE, re.MULTILINE)
    assert len(names) > 5
    prices = {
        currency: {str(info.prices[currency]) for info in MODELS.values() if currency in (info.prices or {})}
        for currency in ("CNY", "USD")
    }
    for name in map("".join, names):
        price = PRICE.search(name)
        assert price, name
        for currency in ("cny", "usd"):
            if price[currency]:
                assert price[currency].replace("_", ".") in prices[currency.upper()], name


@pytest.mark.heavy
@pytest.mark.parametrize("variable", ["ZHIPUAI_API_KEY", "ZAI_API_KEY"])
def test_the_live_tests_pass_against_the_sandbox_at_the_prices_in_their_names(variable, tmp_path):
    keys = {"ZHIPUAI_API_KEY", "ZAI_API_KEY"}
    environment = {name: value for name, value in os.environ.items() if name not in keys}
    with Sandbox(latency=0.2, in_flight_limit={"cogview-3-flash": 1}) as sandbox, SandboxServer(sandbox) as server:
        environment |= {variable: FAKE_KEY, "COGVIEW_BASE_URL": server.base_url}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "0", "-m", "live", "tests/integration_tests", f"--basetemp={tmp_path / 'live'}"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
        made = sandbox.images_made
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{11 if variable == 'ZHIPUAI_API_KEY' else 10} passed" in done.stdout
    assert made > 5
