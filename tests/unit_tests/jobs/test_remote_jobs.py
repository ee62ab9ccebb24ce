"""What a user relies on: a job at a URL pays for nothing twice, however many workers it has and whenever one is killed."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import Counter
from pathlib import Path

import boto3
import fsspec
import httpx
import pytest

from langchain_cogview.errors import CogViewConfigurationError, CogViewStorageError
from langchain_cogview.jobs import FolderInUseError, arun_job, merge_shards, plan_job, run_job
from langchain_cogview.jobs.remote import merged
from langchain_cogview.sandbox import Sandbox, SandboxServer
from tests.unit_tests.cli.test_command import KEY, MODULE
from tests.unit_tests.images.test_remote import S3

PROMPTS = [f"a heron, number {number}" for number in range(8)]
SECRET = "wJalrXUtnFEMICANARY"
RECORD = re.compile(r"/records/[0-9a-f]{32}\.(\d{6})\.json$")


class JobStore(S3):
    """moto's S3, which lets a test act before or after a PUT, and can lack conditions. A PUT is atomic, as in S3."""

    def __init__(self):
        self.atomic = threading.Lock()
        self.clear()
        super().__init__()

    def clear(self):
        self.before = self.after = None  # called with the path of each PUT; `after` may replace the answer
        self.after_read = None  # called with the path of each GET and HEAD, before it is answered
        self.ignores_conditions = False

    def __call__(self, environ, start_response):
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] != "PUT":
            answer = super().__call__(environ, start_response)
            if self.after_read:
                self.after_read(path)
            return answer
        if self.ignores_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if self.before and self.before(path):
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code></Error>"]
        with self.atomic:
            answer = super().__call__(environ, start_response)
        if self.after and self.after(path):
            start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
            return [b"<Error><Code>InternalError</Code></Error>"]
        return answer


@pytest.fixture(scope="module")
def store():
    s3 = JobStore()
    yield s3
    s3.stop()


@pytest.fixture(autouse=True)
def environment(store, monkeypatch, tmp_path):
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": store.url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "TMPDIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # it is kept by its options, which lack the environment
    store.clear()
    store.forget_requests()
    yield
    store.clear()


@pytest.fixture
def url(store):
    name = f"b{uuid.uuid4().hex[:12]}"
    httpx.put(f"{store.url}/{name}").raise_for_status()
    return f"s3://{name}/herons"


def names(store, url):
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return {name.removeprefix(f"{prefix}/") for name in store.names(bucket)}


def content(store, url, name):
    return boto(store).get_object(**_at(url, name))["Body"].read()


def put(store, url, name, body):
    boto(store).put_object(**_at(url, name), Body=body)


def delete(store, url, name):
    boto(store).delete_object(**_at(url, name))


@functools.cache
def boto(store):
    return boto3.client(
        "s3", endpoint_url=store.url, aws_access_key_id="testing", aws_secret_access_key=SECRET, region_name="us-east-1"
    )


def _at(url, name):
    bucket, _, prefix = f"{url}/{name}".removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": prefix}


def manifest(store, url):
    return [json.loads(line) for line in content(store, url, "manifest.jsonl").splitlines()]


def run(sandbox, url, prompts=PROMPTS, **arguments):
    return run_job(prompts, url, base_url=sandbox.base_url, progress=False, **arguments)


def images_of(found):
    return {name for name in found if name.endswith(".png")}


def once(function):
    """Call a function for the first record only that a worker puts for a prompt, and not for what it does itself."""
    done = []

    def act(path, number="000000"):
        match = RECORD.search(path)
        if match and match[1] == number and not done:
            done.append(path)
            return function()
        return None

    return act


def test_images_manifest_and_contact_sheet_are_at_the_url(store, sandbox, url, tmp_path):
    report = run(sandbox, url, n=2)
    found = names(store, url)
    records = manifest(store, url)
    files = {image["file"] for record in records for image in record["images"]}
    assert files == images_of(found)
    assert (report.made, report.images, len(files)) == (8, 16, 16)
    assert (report.folder, report.manifest) == (url, f"{url}/manifest.jsonl")
    assert report.contact_sheet == f"{url}/index.html"
    page = content(store, url, "index.html").decode()
    assert all(file in page for file in files)
    assert [*report.items()] == records
    assert json.loads(json.dumps(report.to_dict()))["folder"] == url
    assert not any(name.startswith(("workers/", "checks/")) for name in found)
    assert not [*tmp_path.glob("cogview-*")]


def test_a_second_run_continues_and_pays_for_nothing_again(store, sandbox, url):
    first = run(sandbox, url, limit=3)
    assert (first.made, first.left) == (3, 5)
    plan = plan_job(PROMPTS, url, base_url=sandbox.base_url)
    assert (plan.done, plan.prompts) == (3, 5)
    second = run(sandbox, url)
    third = run(sandbox, url)
    assert (second.made, second.skipped, third.made, third.skipped) == (5, 3, 0, 8)
    assert Counter(request.prompt for request in sandbox.requests) == Counter(PROMPTS)
    assert len(manifest(store, url)) == 8


async def test_the_event_loop_goes_on_while_records_and_images_are_put(store, sandbox, url):
    loop = asyncio.get_running_loop()
    puts = []

    def before(path):
        puts.append(path)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(60)  # waits for the loop

    store.before = before
    report = await arun_job(PROMPTS, url, base_url=sandbox.base_url, progress=False)
    assert report.made == 8
    assert {Path(path).suffix for path in puts} >= {".json", ".png", ".jsonl", ".html"}


def test_a_plan_writes_nothing(store, sandbox, url):
    assert plan_job(PROMPTS, url, base_url=sandbox.base_url).prompts == 8
    assert names(store, url) == set()


def test_credentials_are_used_and_written_nowhere(store, sandbox, url, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    options = {"key": "testing", "secret": SECRET, "endpoint_url": store.url}
    kept = []
    store.before = lambda path: kept.extend(item.read_bytes() for item in tmp_path.rglob("*") if item.is_file())
    report = run(sandbox, url, storage_options=options)
    assert report.made == 8
    assert len([*report.items(options)]) == 8
    written = [content(store, url, name) for name in names(store, url)]
    assert not [item for item in (*written, *kept, repr(report).encode()) if SECRET.encode() in item]
    generator_report = run_job(
        PROMPTS, url, generator=_generator(sandbox, url, storage_options=options), progress=False
    )
    assert generator_report.skipped == 8


def _generator(sandbox, url, **settings):
    from langchain_cogview import CogViewImageGenerator

    return CogViewImageGenerator(base_url=sandbox.base_url, output_dir=url, **settings)


# --- several workers


def test_of_two_workers_one_sends_each_prompt(store, sandbox, url):
    others = []
    # The first worker has read the records, and is about to send: now the second one does the whole job.
    report = run(sandbox, url, on_plan=lambda plan: others.append(run(sandbox, url)))
    assert others[0].images == 8
    assert report.images == 0
    assert report.stopped is None
    assert len(sandbox.requests) == 8
    assert report.unknown == ()
    assert "Other workers came first for 8 requests" in str(report)
    assert len(manifest(store, url)) == len(images_of(names(store, url))) == 8


def test_two_workers_share_the_prompts_and_the_last_one_writes_the_whole_manifest(store, sandbox, url):
    others = []
    report = run(sandbox, url, on_plan=lambda plan: others.append(run(sandbox, url, limit=3)))
    assert (others[0].images, report.images) == (3, 5)
    assert len(sandbox.requests) == 8
    assert len(manifest(store, url)) == 8
    assert content(store, url, "index.html").count(b"<img ") == 8


@pytest.mark.parametrize("done", ["settings", "one image", "everything"])
def test_a_job_that_another_worker_begins_while_this_one_looks_is_joined(store, sandbox, url, done):
    others = []

    def begin(path):
        if path.endswith("/job.json") and not others:  # this worker has found no job
            others.append(None)
            others.append(run(sandbox, url, limit={"settings": 0, "one image": 1, "everything": None}[done]))

    store.after_read = begin
    report = run(sandbox, url)
    assert (report.stopped, report.unknown, report.images + others[1].images) == (None, (), 8)
    assert len(sandbox.requests) == 8
    assert len(manifest(store, url)) == len(images_of(names(store, url))) == 8


def test_a_claim_whose_answer_was_lost_is_still_the_workers_own(store, sandbox, url):
    store.after = once(lambda: True)  # written, but answered with an error: the store's client sends it again
    report = run(sandbox, url)
    assert (report.made, len(sandbox.requests), report.unknown) == (8, 8, ())


def test_a_request_of_another_worker_that_is_in_flight_is_listed_and_not_sent_again(store, sandbox, url):
    others = []
    store.before = lambda path: path.endswith(".png") and act(path)
    act = lambda path: others or others.append(None) or others.append(run(sandbox, url, ["one"]))  # noqa: E731
    report = run(sandbox, url, ["one"])
    assert others[1].images == 0
    assert len(others[1].unknown) == 1
    assert "1 other worker still had the job" in str(others[1])
    assert len(sandbox.requests) == 1
    del report


def test_images_of_two_workers_for_one_prompt_are_both_in_the_manifest(store, sandbox, url):
    others = []

    def before(path):
        if path.endswith(".png") and not others:
            others.append(None)
            others.append(run(sandbox, url, ["one"], retry_unknown=True))

    store.before = before
    report = run(sandbox, url, ["one"])
    assert report.stopped is None
    (record,) = manifest(store, url)
    assert {image["file"] for image in record["images"]} == images_of(names(store, url))
    assert (len(record["images"]), len(sandbox.requests), record["given_up"]) == (2, 2, [])
    assert run(sandbox, url, ["one"]).skipped == 1


def test_records_of_two_workers_are_united_whichever_comes_first():
    image = {"file": "a.png", "request_id": "r1", "cost": "0.06", "model": "m"}
    other = {**image, "file": "b.png", "request_id": "r2"}
    given_up = {"request_id": "r1", "model": "m"}
    shared = {"key": "k", "arguments": {"prompt": "p", "n": 1}, "currency": "CNY", "sandbox": False, "status": "made"}
    first = {**shared, "images": [image], "failures": [], "given_up": [], "request_ids": ["r1"]}
    second = {**shared, "images": [other], "failures": [], "given_up": [given_up], "request_ids": ["r2", "r1"]}
    for one, two in ((first, second), (second, first)):
        both = merged(one, two)
        assert {item["file"] for item in both["images"]} == {"a.png", "b.png"}
        assert (both["cost"], both["given_up"], sorted(both["request_ids"])) == ("0.12", [], ["r1", "r2"])
        assert merged(both, one)["images"] == both["images"] == [*one["images"], *two["images"]]
    third = {
        **shared,
        "images": [],
        "failures": [],
        "given_up": [given_up] * 2,
        "request_ids": ["r1"],
        "status": "left",
    }
    assert merged({**third, "given_up": [given_up]}, third)["given_up"] == [given_up] * 2


# --- one worker at a time


@pytest.mark.parametrize("how", ["ignores", "refuses"])
def test_where_a_store_checks_no_condition_a_second_worker_is_refused(store, sandbox, url, how):
    store.ignores_conditions, store.refuses_conditions = how == "ignores", how == "refuses"
    refused = []

    def second(plan):
        with pytest.raises(FolderInUseError, match="does not check the condition") as error:
            run(sandbox, url)
        refused.append(error.value)

    report = run(sandbox, url, on_plan=second, limit=5)
    assert refused
    assert (report.made, len(sandbox.requests)) == (5, 5)
    assert (run(sandbox, url).made, len(sandbox.requests)) == (3, 8)


def test_a_store_that_only_looks_before_it_writes_gets_one_worker(sandbox):
    url = f"memory://{uuid.uuid4().hex}/job"

    def second(plan):
        with pytest.raises(FolderInUseError, match="does not check the condition"):
            run(sandbox, url)

    assert run(sandbox, url, on_plan=second).made == 8
    assert run(sandbox, url).skipped == 8


def test_the_marker_of_a_killed_worker_is_named(store, sandbox, url):
    store.ignores_conditions = True
    put(store, url, "workers/host-1-ab.json", '{"only": "store"}')
    with pytest.raises(FolderInUseError, match="workers/host-1-ab.json"):
        run(sandbox, url)
    assert not sandbox.requests
    delete(store, url, "workers/host-1-ab.json")
    assert run(sandbox, url).made == 8


def test_a_budget_is_for_one_worker(store, sandbox, url):
    def second(budget):
        def refused(plan):
            with pytest.raises(FolderInUseError, match="a budget holds for one worker"):
                run(sandbox, url, budget=budget)

        return refused

    report = run(sandbox, url, budget="0.2", on_plan=second(None))
    assert (report.made, report.over_budget) == (3, True)
    report = run(sandbox, url, budget="0.25", on_plan=second("5"))
    assert (report.made, report.skipped, len(sandbox.requests)) == (1, 3, 4)
    run(sandbox, url, on_plan=second("5"))
    assert len(sandbox.requests) == 8


# --- killed


WORKER = """
import sys, json
from langchain_cogview.jobs import run_job
report = run_job(json.loads(sys.argv[1]), sys.argv[2], base_url=sys.argv[3], progress=False)
print(json.dumps(report.to_dict()))
"""


def worker(url, base_url, prompts=PROMPTS):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, json.dumps(prompts), url, base_url],
        env={**os.environ, "ZHIPUAI_API_KEY": KEY}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("moment", ["before the POST", "after the POST", "before the record"])
def test_a_killed_worker_is_never_repeated_unasked(store, url, moment):
    started = []

    def kill(path):
        record = RECORD.search(path)
        due = {
            "before the POST": record and record[1] == "000000" and store.after is kill,
            "after the POST": path.endswith(".png"),
            "before the record": record and record[1] == "000001",
        }
        if due[moment]:
            started[0].kill()
            started[0].wait()
            return True  # what arrives after the end is not written
        return False

    setattr(store, "after" if moment == "before the POST" else "before", kill)
    with Sandbox() as sandbox, SandboxServer(sandbox) as server:
        started.append(worker(url, server.base_url, ["one"]))
        _, err = started[0].communicate(timeout=300)
        assert started[0].returncode == -signal.SIGKILL, err
        store.clear()
        sent = len(sandbox.requests)
        assert sent == (0 if moment == "before the POST" else 1)
        report = run_job(["one", "two"], url, base_url=server.base_url, api_key=KEY, progress=False)
        assert len(sandbox.requests) == sent + 1
        if moment == "before the record":  # the image is there, and found again
            assert (report.made, report.unknown) == (2, ())
        else:
            assert (report.made, len(report.unknown)) == (1, 1)
            again = run_job(
                ["one", "two"], url, base_url=server.base_url, api_key=KEY, progress=False, retry_unknown=True
            )
            assert (again.made, again.unknown, len(sandbox.requests)) == (1, (), sent + 2)
        records = manifest(store, url)
        assert {image["file"] for record in records for image in record["images"]} == images_of(names(store, url))
        assert len(images_of(names(store, url))) == 2


@pytest.mark.heavy
def test_two_workers_killed_and_started_again_pay_for_nothing_twice(store, url):
    prompts = [f"an owl, number {number}" for number in range(40)]
    ends, listed = [0], set()
    reached = threading.Event()

    def after(path):
        record = RECORD.search(path)
        if record and record[1] == "000001":
            ends[0] += 1
            if ends[0] >= limit:
                reached.set()

    store.after = after
    with Sandbox(in_flight_limit=5, latency=0.05) as sandbox, SandboxServer(sandbox) as server:
        for limit in (6, 14, 22):
            reached.clear()
            pair = [worker(url, server.base_url, prompts) for _ in range(2)]
            assert reached.wait(300)
            pair[0].kill()  # while both have requests in flight
            pair[0].communicate()
            _, err = pair[1].communicate(timeout=300) if limit == 22 else (pair[1].kill(), pair[1].communicate()[1])
            assert pair[1].returncode in ((0,) if limit == 22 else (-signal.SIGKILL,)), err
        store.clear()
        report = run_job(prompts, url, base_url=server.base_url, api_key=KEY, progress=False)
        listed |= {item.prompt for item in report.unknown}
        posts = Counter(entry.prompt for entry in sandbox.ledger)
        assert set(posts.values()) == {1}  # nothing is paid twice
        assert len(report.unknown) + report.made + report.skipped == 40
        assert {record["arguments"]["prompt"] for record in manifest(store, url)} | listed == set(prompts)
        final = run_job(prompts, url, base_url=server.base_url, api_key=KEY, progress=False, retry_unknown=True)
        assert (final.unknown, final.made + final.skipped) == ((), 40)
        posts = Counter(entry.prompt for entry in sandbox.ledger)
        assert {prompt for prompt, count in posts.items() if count > 1} <= listed
        assert sum(posts.values()) <= 40 + len(listed)
        records = manifest(store, url)
        assert {record["status"] for record in records} == {"made"}
        assert {image["file"] for record in records for image in record["images"]} <= images_of(names(store, url))


# --- what cannot be written or read


def test_an_image_that_cannot_be_uploaded_is_kept_and_recovered_by_the_next_run(store, sandbox, url):
    store.before = lambda path: path.endswith(".png")
    report = run(sandbox, url, ["one"])
    assert isinstance(report.stopped, CogViewStorageError)
    note = " ".join(report.stopped.__notes__)
    path, target = re.search(r"kept in (\S+): upload it to (\S+) before", note).groups()
    store.clear()
    put(store, target.rpartition("/")[0], Path(path).name, Path(path).read_bytes())
    report = run(sandbox, url, ["one"])
    assert (report.made, report.unknown, len(sandbox.requests)) == (1, (), 1)


def test_a_claim_that_cannot_be_put_sends_nothing(store, sandbox, url):
    store.before = lambda path: RECORD.search(path)
    report = run(sandbox, url)
    assert isinstance(report.stopped, CogViewStorageError)
    assert "access was denied" in str(report.stopped)
    assert not sandbox.requests


def test_a_url_with_other_objects_is_refused(store, sandbox, url):
    put(store, url, "holiday.jpg", b"x")
    with pytest.raises(CogViewConfigurationError, match="is not empty and holds no job"):
        run(sandbox, url)
    assert names(store, url) == {"holiday.jpg"}
    assert not sandbox.requests


def test_a_missing_bucket_is_named(sandbox):
    with pytest.raises(CogViewStorageError, match="s3://missing-bucket/x could not be"):
        run(sandbox, "s3://missing-bucket/x")
    assert not sandbox.requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "512x512"}, "begun with other arguments"),
        ({"shard": "1/2"}, "has no shards"),
        ({"into_existing": True}, "into_existing is for local folders"),
    ],
)
def test_what_does_not_fit_is_refused(store, sandbox, url, arguments, message):
    run(sandbox, url, limit=1)
    with pytest.raises(CogViewConfigurationError, match=message):
        run(sandbox, url, **arguments)
    assert len(sandbox.requests) == 1


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"key":"x"}', "other prompt", "other name", "no settings"])
def test_damaged_records_are_refused_by_name(store, sandbox, url, damage):
    run(sandbox, url, limit=2)
    first, *_, last = sorted(name for name in names(store, url) if name.startswith("records/"))
    target, body = first, damage
    if damage == "other prompt":
        body = content(store, url, last)
    elif damage == "other name":
        target, body = "records/x.json", b"{}"
    if damage == "no settings":
        delete(store, url, "job.json")
        target = "job.json"
        for name in names(store, url):
            if not name.startswith("records/"):
                delete(store, url, name)
    else:
        put(store, url, target, body)
    with pytest.raises(CogViewConfigurationError, match=re.escape(target)):
        run(sandbox, url)
    assert len(sandbox.requests) == 2


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"type":"cogview.job","version":99,"settings":{}}'])
def test_damaged_settings_are_named_by_the_url(store, sandbox, url, damage):
    run(sandbox, url, limit=1)
    put(store, url, "job.json", damage)
    with pytest.raises(CogViewConfigurationError, match=re.escape(f" {url}")):
        run(sandbox, url)
    assert len(sandbox.requests) == 1


# --- the command


@pytest.mark.heavy
def test_the_commands_of_the_documentation_run_a_job_at_a_url_and_renew_its_pages(store, url, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    page = (Path(__file__).parents[3] / "docs" / "processes.md").read_text(encoding="utf-8")
    (block,) = [text for text in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "s3://bucket/job" in text]
    commands = [line.partition("#")[0].replace("s3://bucket/job", url).split() for line in block.splitlines()]
    assert [command[:2] for command in commands] == [["cogview", "batch"], ["cogview", "merge"]]
    for _, *arguments in commands:
        done = subprocess.run(
            [*MODULE, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout.strip()) == (0, f"{url}/index.html"), done.stderr
        assert content(store, url, "index.html").count(b"<img ") == 8
        delete(store, url, "index.html")


def test_pages_are_made_again_from_the_records(store, sandbox, url):
    run(sandbox, url)
    before = {name: content(store, url, name) for name in ("manifest.jsonl", "index.html")}
    for name in before:
        delete(store, url, name)
    job = merge_shards(url)
    assert (job.folder, job.prompts, job.images, job.unknown) == (url, {"made": 8}, 8, 0)
    assert "8 made" in str(job)
    assert sorted(content(store, url, "manifest.jsonl").splitlines()) == sorted(before["manifest.jsonl"].splitlines())
    pages = [
        re.sub(rb"written \d{4}[\d: -]+", b"", page)
        for page in (content(store, url, "index.html"), before["index.html"])
    ]
    assert pages[0] == pages[1]
    with pytest.raises(CogViewConfigurationError, match="There is no job"):
        merge_shards(f"{url}-other")
