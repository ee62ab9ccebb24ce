"""What a user relies on: the recipes of docs/processes.md for other engines and stores hold, whatever is killed."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from langchain_cogview.jobs import merge_shards
from langchain_cogview.sandbox import Sandbox, SandboxServer
from tests.unit_tests.cli.test_command import KEY

pytestmark = pytest.mark.heavy

PAGE = (Path(__file__).parents[2] / "docs" / "processes.md").read_text(encoding="utf-8")
PROMPTS = [f"a kitten, number {number}" for number in range(48)]
PATIENCE = 300


def block(beginning: str) -> str:
    """The block of the page that begins so; it runs as it stands."""
    [found] = [
        each
        for each in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
        if each.startswith(beginning)
    ]
    return found


@pytest.fixture
def server():
    with SandboxServer(Sandbox(latency=0.2, in_flight_limit=5)) as server:
        yield server


def wait_for_images(server, count: int) -> None:
    end = time.monotonic() + PATIENCE
    while server.sandbox.images_made < count:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.filterwarnings("default")
def test_dask_pays_once_though_a_worker_is_killed(server, tmp_path, monkeypatch, capsys):
    distributed = pytest.importorskip("distributed", reason="needs distributed")
    for name, value in {
        "ZHIPUAI_API_KEY": KEY,
        "COGVIEW_BASE_URL": server.base_url,
        "COGVIEW_SHARED_LIMIT": "machine",
        "XDG_RUNTIME_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "job"
    prompts.write_text("\n".join(PROMPTS))
    # The page as it stands, but for the paths.
    code = block("import time\n\nfrom langchain_cogview.jobs import FolderInUseError") + block("from dask.distributed")
    namespace = {}
    exec(code.replace("prompts.txt", str(prompts)).replace("/shared/job", str(folder)), namespace)
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, host="127.0.0.1", dashboard_address=None, silence_logs="ERROR"
    )
    killed = []

    def kill() -> None:
        wait_for_images(server, 10)
        killed.append(next(iter(cluster.workers.values())).pid)
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    with cluster:
        killer.start()
        namespace["main"](cluster.scheduler_address)
        killer.join()
    assert killed
    assert len(capsys.readouterr().out.splitlines()) >= 20
    paid = Counter(entry.prompt for entry in server.sandbox.ledger)
    merged = merge_shards(folder)
    assert merged.prompts["made"] + merged.unknown == len(PROMPTS)
    assert max(paid.values()) == 1
    assert merged.prompts["made"] <= len(paid) <= len(PROMPTS)
