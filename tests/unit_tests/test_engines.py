"""What a user relies on: the recipes of docs/processes.md for other engines and stores hold, whatever is killed."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
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
        item
        for item in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
        if item.startswith(beginning)
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


class PostgresServer:
    """A server in a folder of its own, on a socket in it; it does not run as root, which it refuses."""

    def __init__(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not found or (os.getuid() == 0 and not NOBODY):
            pytest.skip("no PostgreSQL server here")
        self.programs = found[-1].parent
        self.folder = Path(tempfile.mkdtemp(prefix="pg"))
        self.user = {}
        if os.getuid() == 0:
            shutil.chown(self.folder, NOBODY)
            self.user = {"user": NOBODY, "extra_groups": []}
        self.process = None
        self.run("initdb", "--auth=trust", "--username=cogview", "--no-sync", "--pgdata", str(self.folder / "data"))

    @property
    def conninfo(self) -> str:
        return f"host={self.folder} user=cogview dbname=postgres"

    def run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self.programs / program, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **self.user
        )

    def start(self) -> None:
        options = ["-k", str(self.folder), "-c", "listen_addresses=", "-c", "max_connections=20"]
        self.process = subprocess.Popen(
            [self.programs / "postgres", "-D", str(self.folder / "data"), *options],
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            **self.user,
        )
        end = time.monotonic() + PATIENCE
        while True:
            assert self.process.poll() is None
            assert time.monotonic() < end
            try:
                self.run("pg_isready", "-q", "-h", str(self.folder))
            except subprocess.CalledProcessError:
                time.sleep(0.1)
            else:
                return

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)  # at once, as a crash
            self.process.wait()
            self.process = None


NOBODY = next((item.pw_name for item in pwd.getpwall() if item.pw_name in {"postgres", "nobody"}), None)


@pytest.fixture
def postgres():
    pytest.importorskip("psycopg", reason="needs psycopg")
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.folder, ignore_errors=True)


def test_postgresql_divides_a_limit_as_the_function_does(postgres):
    from langchain_cogview.limits import LimitUsage

    namespace = {}
    exec(block("import json\nimport os\n\nimport psycopg"), namespace)
    stores = [namespace["PostgresLimit"](postgres.conninfo) for _ in range(3)]
    shares = []
    for _ in range(6):  # an allowance at most doubles from one report to the next
        shares = [
            store.exchange("account", LimitUsage(f"member {number}", 0, 9, 6)).allowance
            for number, store in enumerate(stores)
        ]
    assert shares == [2, 2, 2]
    postgres.stop()
    with pytest.raises(Exception, match="connection|server"):
        stores[0].exchange("account", LimitUsage("member 0", 0, 9, 6))
    postgres.start()
    assert stores[0].exchange("account", LimitUsage("member 0", 0, 9, 6)).allowance == 2  # and it is remembered
    for store in stores:
        if store._connection is not None:
            store._connection.close()


PROCESS = """
import sys
from langchain_cogview import CogViewImageGenerator
exec(sys.argv[3])
generator = CogViewImageGenerator(
    base_url=sys.argv[1], api_key="any", shared_limit=PostgresLimit(sys.argv[2]), max_concurrency=5, download=False, timeout=600
)
results = generator.batch(["a kitten"] * 40, return_exceptions=True)
print([repr(each) for each in results if isinstance(each, Exception)])
"""


def test_processes_share_a_limit_by_postgresql_and_outlive_its_crash(server, postgres):
    code = block("import json\nimport os\n\nimport psycopg")
    arguments = [sys.executable, "-c", PROCESS, server.base_url, postgres.conninfo, code]
    workers = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        wait_for_images(server, 40)
        before = len(server.sandbox.requests) - server.sandbox.images_made - server.sandbox.in_flight
        postgres.stop()
        wait_for_images(server, 60)
        postgres.start()
        outputs = [worker.communicate(timeout=PATIENCE)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert outputs == ["[]\n"] * 3  # nothing was lost
    assert server.sandbox.images_made == 120
    assert before <= 2
    assert len(server.sandbox.requests) - 120 <= 20
