"""What a user relies on: a row is paid for once, however often and in whatever batches it is looked at; errors are values."""

from __future__ import annotations

import math
import threading
from collections import Counter

import pytest

from langchain_cogview import CogViewConfigurationError
from langchain_cogview.jobs import merge_shards
from langchain_cogview.jobs.rows import generate_rows
from langchain_cogview.sandbox import Sandbox, SandboxServer

KEY = "0123456789abcdef0123456789abcdef.ABCDEFGHIJKLMNOP"


@pytest.fixture
def server():
    with SandboxServer(Sandbox()) as server:
        yield server


def rows(*numbers):
    return [{"prompt": f"a kitten, number {number}"} for number in numbers]


def generate(server, folder, rows, **arguments):
    return generate_rows(rows, folder, base_url=server.base_url, api_key=KEY, **arguments)


def test_rows_in_other_batches_are_not_paid_for_again(server, tmp_path):
    first = generate(server, tmp_path, rows(1, 2, 3, 4), shards=3)
    assert [row.status for row in first] == ["made"] * 4
    again = generate(server, tmp_path, rows(4, 9, 2), shards=50)  # the division stays
    assert again[0] == first[3]
    assert again[2] == first[1]
    assert len(server.sandbox.requests) == 5
    assert merge_shards(tmp_path).prompts == {"made": 5}
    assert merge_shards(tmp_path).count == 3


def test_a_result_has_the_files_the_ids_and_the_cost(server, tmp_path):
    [row] = generate(server, tmp_path, [{"prompt": "a kitten", "n": 2, "size": "1024x1024"}])
    assert row.error is None
    assert len(row.paths) == len(row.request_ids) == 2
    for path in row.paths:
        with open(path, "rb") as file:
            assert file.read(4) == b"\x89PNG"
    assert set(row.request_ids) == {entry.request_id for entry in server.sandbox.ledger}
    assert row.cost is not None


def test_equal_rows_share_an_image(server, tmp_path):
    results = generate(server, tmp_path, rows(1, 2, 1))
    assert results[0] == results[2] != results[1]
    assert len(server.sandbox.requests) == 2


def test_what_is_not_legal_is_reported_for_its_row(server, tmp_path):
    odd = [{"prompt": "a kitten", "size": "3x3"}, {}, {"prompt": ""}, {"prompt": None}, {"prompt": math.nan}]
    odd += [{"prompt": 5}, {"prompt": ["a"]}, {"prompt": b"\xff"}, {"prompt": "a", "n": math.nan}, {"prompt": "\ud800"}]
    results = generate(server, tmp_path, [*odd, *rows(1)])
    assert [row.status for row in results] == ["invalid"] * len(odd) + ["made"]
    assert all(row.error and len(row.error) <= 500 for row in results[:-1])
    assert len(server.sandbox.requests) == 1


def test_a_blocked_row_is_not_sent_again_unless_it_is_asked_for(server, tmp_path):
    server.sandbox.fail_next("content-filter")
    [row] = generate(server, tmp_path, rows(1))
    assert row.status == "blocked"
    assert row.error
    assert generate(server, tmp_path, rows(1)) == [row]
    assert len(server.sandbox.requests) == 1
    assert generate(server, tmp_path, rows(1), retry_failed=True)[0].status == "made"


def test_workers_that_work_on_the_same_rows_at_once_pay_once(tmp_path):
    with SandboxServer(Sandbox(latency=0.1)) as server:
        results = [None] * 4

        def work(number):
            results[number] = generate(server, tmp_path, rows(*range(8)), shards=2)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [{row.status for row in item} for item in results] == [{"made"}] * 4
        assert max(Counter(entry.prompt for entry in server.sandbox.ledger).values()) == 1


def test_a_refused_key_is_tried_a_few_times_only_and_reported_for_each_row(server, tmp_path):
    server.sandbox.fail_next("auth", 100)
    results = generate(server, tmp_path, rows(*range(100)), max_concurrency=2)
    assert {row.status for row in results} == {"not_run"}
    assert all("key" in row.error for row in results)
    assert len(server.sandbox.requests) <= 4
    server.sandbox.reset()
    assert {row.status for row in generate(server, tmp_path, rows(*range(3)))} == {"made"}


def test_no_network_ends_after_a_few(server, tmp_path):
    server.sandbox.fail_next("unavailable", 100)
    results = generate(server, tmp_path, rows(*range(100)), max_retries=0, max_concurrency=1)
    assert {row.status for row in results} == {"not_run"}
    assert all(row.error for row in results)
    assert 5 <= len(server.sandbox.requests) <= 6


@pytest.mark.parametrize(
    "arguments", [{"size": "16:9"}, {"quality": "high", "model": "cogview-4"}, {"prompt": "  a foal\n"}]
)
def test_arguments_in_other_words_are_paid_for_once(server, tmp_path, arguments):
    row = {"prompt": "a kitten", **arguments}
    first = generate(server, tmp_path, [row])
    assert [item.status for item in first] == ["made"]
    assert generate(server, tmp_path, [row]) == first
    assert len(server.sandbox.requests) == 1


def test_what_may_have_been_charged_is_listed_and_not_sent_again(server, tmp_path):
    server.sandbox.fail_next("malformed")
    first = generate(server, tmp_path, rows(1))
    assert [row.status for row in first] == ["unknown"]
    assert first[0].request_ids == tuple(request.request_id for request in server.sandbox.requests)
    assert generate(server, tmp_path, rows(1)) == first
    assert len(server.sandbox.requests) == 1
    assert generate(server, tmp_path, rows(1), retry_unknown=True)[0].status == "made"


def test_other_defaults_in_the_same_folder_are_reported_and_not_paid_for(server, tmp_path):
    generate(server, tmp_path, rows(1), shards=1)
    [row] = generate(server, tmp_path, rows(2), size="768x1344")
    assert row.status == "not_run"
    assert "begun with other arguments" in row.error
    assert len(server.sandbox.requests) == 1


def test_a_wrong_setting_raises_before_anything_is_sent(server, tmp_path):
    with pytest.raises(Exception, match="no_such_setting"):
        generate(server, tmp_path, rows(1), no_such_setting=1)
    with pytest.raises(CogViewConfigurationError):
        generate(server, "s3://bucket/folder", rows(1))
    assert not server.sandbox.requests
