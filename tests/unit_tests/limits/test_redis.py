"""What a user relies on: a Redis that refuses, is full, answers late or is a cluster costs nothing but speed, or says what is wrong."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from langchain_cogview import CogViewConfigurationError, CogViewImageGenerator
from langchain_cogview.limits import LimitUsage
from langchain_cogview.limits.redis import RedisLimit
from langchain_cogview.sandbox import Sandbox, SandboxServer
from tests.unit_tests.limits.servers import RedisServer

redis = pytest.importorskip("redis", reason="needs the extra redis")
pytestmark = pytest.mark.heavy

USAGE = LimitUsage("member", 0, 1, 5)
ACCOUNTS = [f"{number:032x}" for number in range(12)]  # in the slots of all nodes
PATIENCE = 60


@pytest.fixture
def service():
    with SandboxServer(Sandbox(in_flight_limit=5)) as server:
        yield server


def generator(service, url: str) -> CogViewImageGenerator:
    return CogViewImageGenerator(
        base_url=service.base_url, api_key="any", shared_limit=url, download=False, timeout=120
    )


def comes_back(exchange) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            exchange()
        except redis.RedisError:
            assert time.monotonic() < end
            time.sleep(0.1)
        else:
            return


@pytest.mark.parametrize("credentials", ["", ":wrong@", "nobody:secret@"])
def test_a_wrong_password_ends_calls_before_anything_is_sent(service, tmp_path, credentials):
    with RedisServer(tmp_path, "--requirepass", "right") as server:
        wrong = server.url.replace("redis://", f"redis://{credentials}")
        with pytest.raises(CogViewConfigurationError, match="refuses to be used") as caught:
            generator(service, wrong).invoke("a kitten")
        assert "secret" not in str(caught.value)
        assert "wrong" not in str(caught.value).replace("WRONGPASS", "")
        assert not service.sandbox.requests
        assert generator(service, server.url.replace("redis://", "redis://:right@")).invoke("a kitten").images


def test_a_password_that_is_changed_costs_no_call(service, tmp_path):
    with RedisServer(tmp_path) as server:
        made = generator(service, server.url)
        assert made.invoke("a kitten").images
        with redis.Redis.from_url(server.url) as admin:
            admin.config_set("requirepass", "changed")
            admin.execute_command("AUTH", "changed")
            admin.client_kill_filter(_type="normal", skipme=True)
        assert made.invoke("a foal").images


def test_a_full_memory_costs_no_call_and_all_goes_on_when_there_is_space(service, tmp_path):
    with RedisServer(tmp_path, "--maxmemory", "1", "--maxmemory-policy", "noeviction") as server:
        store = RedisLimit(server.url)
        with pytest.raises(redis.exceptions.ResponseError, match="maxmemory"):
            store.exchange(ACCOUNTS[0], USAGE)
        assert generator(service, server.url).invoke("a kitten").images
        with redis.Redis.from_url(server.url) as admin:
            admin.config_set("maxmemory", 0)
        assert store.exchange(ACCOUNTS[0], USAGE).limit == 5


def test_answers_that_are_late_cost_no_call(service, tmp_path):
    with RedisServer(tmp_path) as server:
        store = RedisLimit(server.url)
        store.exchange(ACCOUNTS[0], USAGE)
        with redis.Redis.from_url(server.url) as admin:
            admin.client_pause(3000)
        with pytest.raises(redis.exceptions.TimeoutError):
            store.exchange(ACCOUNTS[0], USAGE)
        assert generator(service, server.url).invoke("a kitten").images
        # A late answer is not mistaken for the answer to a later report.
        comes_back(lambda: store.exchange(ACCOUNTS[0], USAGE))
        assert store.exchange(ACCOUNTS[1], LimitUsage("other", 0, 1, 3)).limit == 3


class ClusterNode(RedisServer):
    def __init__(self, folder, *arguments) -> None:
        super().__init__(folder, "--cluster-enabled", "yes", "--cluster-require-full-coverage", "no", *arguments)
        while not self._has_bus():
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]

    def _has_bus(self) -> bool:
        # The nodes talk on a second port, which is 10,000 higher.
        with socket.socket() as probe, contextlib.suppress(OSError, OverflowError):
            probe.bind(("127.0.0.1", self.port + 10_000))
            return True
        return False


def is_whole(admin) -> bool:
    facts = admin.cluster("INFO")
    return facts["cluster_state"] == "ok" and facts["cluster_slots_assigned"] == "16384"


@pytest.fixture
def cluster(tmp_path):
    with contextlib.ExitStack() as stack:
        nodes = []
        for number in range(3):
            (tmp_path / str(number)).mkdir()
            nodes.append(stack.enter_context(ClusterNode(tmp_path / str(number))))
        slots = [range(5461), range(5461, 10923), range(10923, 16384)]
        for node, own in zip(nodes, slots, strict=True):
            with redis.Redis.from_url(node.url) as admin:
                admin.execute_command("CLUSTER", "ADDSLOTS", *own)
                for other in nodes:
                    admin.execute_command("CLUSTER", "MEET", "127.0.0.1", other.port)
        end = time.monotonic() + PATIENCE
        for node in nodes:
            with redis.Redis.from_url(node.url, decode_responses=True) as admin:
                while not is_whole(admin):
                    assert time.monotonic() < end
                    time.sleep(0.1)
        yield nodes


@pytest.mark.parametrize("node", range(3))
def test_any_node_of_a_cluster_will_do(service, cluster, node):
    store = RedisLimit(cluster[node].url)
    for account in ACCOUNTS:
        assert store.exchange(account, USAGE).limit == 5
        # The members see each other, whichever node they name.
        assert RedisLimit(cluster[0].url).exchange(account, LimitUsage("other", 0, 1, 3)).limit == 3
        assert store.exchange(account, USAGE).limit == 3
    assert generator(service, cluster[node].url).invoke("a kitten").images


def test_a_node_that_is_lost_costs_no_call_and_is_found_again(service, cluster):
    url = cluster[0].url
    store = RedisLimit(url)
    for account in ACCOUNTS:
        store.exchange(account, USAGE)
    cluster[1].stop()
    lost = 0
    for account in ACCOUNTS:
        try:
            store.exchange(account, USAGE)
        except redis.RedisError:
            lost += 1
    assert 0 < lost < len(ACCOUNTS)
    assert generator(service, url).invoke("a kitten").images
    cluster[1].start()
    for account in ACCOUNTS:
        comes_back(lambda account=account: store.exchange(account, USAGE))


def test_a_database_that_a_cluster_does_not_have_is_reported(service, cluster):
    with pytest.raises(CogViewConfigurationError, match="database 0 only"):
        generator(service, cluster[0].url.replace("/0", "/1")).invoke("a kitten")
    assert not service.sandbox.requests
