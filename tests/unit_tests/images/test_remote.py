"""Images that stay elsewhere: whole or not there, readable by any process, and never a reason to lose or block anything."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import pickle
import subprocess
import sys
import threading
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree as ET

import fsspec
import httpx
import pytest
from fsspec.implementations.local import LocalFileSystem
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from langchain_cogview.addresses import LinkRules
from langchain_cogview.api.sending import asender, sender
from langchain_cogview.concurrency import Deadline
from langchain_cogview.errors import CogViewConfigurationError, CogViewStorageError
from langchain_cogview.images.download import afetch, fetch
from langchain_cogview.images.formats import MAX_IMAGE_BYTES, ImageInfo
from langchain_cogview.images.remote import RemoteFolder, remote_folder
from langchain_cogview.images.store import ImageFile
from tests.faults.server import IMAGE, FaultServer, good_image

PNG = ImageInfo("image/png", ".png", 1, 1)
CANARY = "CANARYwJalrXUtnFEMI"
ROOT = Path(__file__).parents[3]
HOWS = pytest.mark.parametrize("how", ["sync", "async"])
RULES = LinkRules(allowed_hosts=("127.0.0.1",))


class Quiet(WSGIRequestHandler):
    def log(self, *args):
        pass


class S3:
    """moto's S3 on a loopback port; remembers what it was sent, and can hold or refuse it."""

    def __init__(self):
        self.app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.forget_requests()

    def forget_requests(self):
        self.seen, self.held, self.go, self.refuses_conditions = [], lambda: None, None, False

    def __call__(self, environ, start_response):
        self.seen.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE")))
        if environ["REQUEST_METHOD"] == "PUT" and self.go:
            self.held()
            self.go.wait(60)
        if self.refuses_conditions and "HTTP_IF_NONE_MATCH" in environ:
            start_response("501 Not Implemented", [("Content-Type", "application/xml")])
            return [b"<Error><Code>NotImplemented</Code><Message>No conditions here</Message></Error>"]
        return self.app(environ, start_response)

    def hold(self, held=lambda: None):
        self.held, self.go = held, threading.Event()
        return self.go

    def puts(self):
        return [path for method, path, _ in self.seen if method == "PUT"]

    def names(self, bucket):
        tree = ET.fromstring(httpx.get(f"{self.url}/{bucket}?list-type=2").content)
        return [key.text for key in tree.iter("{http://s3.amazonaws.com/doc/2006-03-01/}Key")]

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def storage_threads():
    return [thread for thread in threading.enumerate() if thread.name == "cogview-storage"]


def nobody_is_left():
    for thread in storage_threads():
        thread.join(20)
    return not storage_threads()


@pytest.fixture(scope="module")
def server():
    s3 = S3()
    yield s3
    s3.stop()


@pytest.fixture(autouse=True)
def environment(server, monkeypatch, tmp_path):
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    fsspec.get_filesystem_class(
        "s3"
    ).clear_instance_cache()  # it is cached by its options, which do not include the environment
    server.forget_requests()
    yield
    if server.go:
        server.go.set()


@pytest.fixture
def bucket(server):
    name = f"b{uuid.uuid4().hex[:12]}"
    httpx.put(f"{server.url}/{name}").raise_for_status()
    server.forget_requests()
    return name


class Shelf(LocalFileSystem):
    """A blocking file system with real folders, on `shelf://` URLs; can hold, or break in the middle."""

    protocol = "shelf"
    breaks = False
    started, go = threading.Event(), None

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("shelf://")

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self.started.set()
        if self.go:
            self.go.wait(60)
        if self.breaks:
            Path(path).write_bytes(value[: len(value) // 2])
            raise OSError(28, CANARY)
        super().pipe_file(path, value, mode=mode, **kwargs)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    monkeypatch.setattr(Shelf, "started", threading.Event())
    yield tmp_path / "shelf"
    if Shelf.go:
        Shelf.go.set()
    assert nobody_is_left()


@pytest.fixture(params=["memory", "s3", "shelf"])
def folder(request, shelf):
    if request.param == "s3":
        return remote_folder(f"s3://{request.getfixturevalue('bucket')}/images")
    if request.param == "shelf":
        return remote_folder(f"shelf://{shelf}/images")
    return remote_folder(f"memory://{uuid.uuid4().hex}/images")


async def uploaded(how, folder, content=b"bytes", seconds=30.0):
    """The URI of an upload, what went wrong, and the bytes of the file afterwards."""
    file = ImageFile(None)
    file.write(content)
    with contextlib.closing(file):
        names, deadline, uri = file.names(PNG), Deadline(seconds), None
        with file.noting_problems():
            if how == "async":
                uri = await folder.aupload(names, file.read(), deadline)
            else:
                uri = await asyncio.to_thread(folder.upload, names, file.read(), deadline)
        return uri, file.problem, file.read()


async def read(how, uri, options=None, **more):
    folder = RemoteFolder(uri, options or {})
    return await folder.aread(uri, **more) if how == "async" else await asyncio.to_thread(folder.read, uri, **more)


def read_uri(uri):
    return RemoteFolder(uri).read(uri)


async def fetched(how, server, folder, seconds=30.0):
    deadline = Deadline(seconds)
    if how == "async":
        return await afetch(asender(server.base_url), server.image_url, deadline=deadline, folder=folder, rules=RULES)
    return await asyncio.to_thread(
        fetch, sender(server.base_url), server.image_url, deadline=deadline, folder=folder, rules=RULES
    )


# --- which URLs


@pytest.mark.parametrize(
    ("url", "means"),
    [
        ("s3://bucket/images", "s3://bucket/images"),
        ("S3://bucket/a/b//", "s3://bucket/a/b"),
        ("s3://bucket", "s3://bucket"),
        (
            "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/mine",
            "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/mine",
        ),
        ("memory://images", "memory://images"),
        ("memory://", "memory://"),
        ("memory://host:8020/a@b", "memory://host:8020/a@b"),
    ],
)
def test_a_url_is_a_folder_elsewhere(url, means):
    assert remote_folder(url) == RemoteFolder(means)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("images", "images"),
        ("/tmp/a b", "/tmp/a b"),
        (Path("images"), "images"),
        ("C:\\images", "C:\\images"),
        ("C:/images", "C:/images"),
        ("c://images", "c:/images"),
        ("file:///tmp/images", "/tmp/images"),
        ("file:///tmp/a%20b", "/tmp/a b"),
        ("file://localhost/tmp", "/tmp"),
    ],
)
def test_paths_and_file_urls_are_folders_of_this_machine(url, path):
    assert remote_folder(url) == Path(path)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"s3://AKIA:{CANARY}@bucket/x", "credentials"),
        (f"s3://AKIA:{CANARY}/a/b@bucket/x", "credentials"),
        (f"s3://{CANARY}@bucket", "credentials"),
        (f"memory://user:{CANARY}@host/x", "credentials"),
        (f"s3://bucket/x?secret={CANARY}", "query"),
        (f"s3://bucket/x#{CANARY}", "fragment"),
        (f"nonsense://{CANARY}", "knows no protocol 'nonsense'"),
        ("s3://", "no bucket"),
        ("s3:///x", "no bucket"),
        ("s3://bucket/a\nb", "unprintable"),
        ("https://bucket.s3.amazonaws.com/x", "not folders"),
        ("simplecache::s3://bucket", "not the URL"),
        ("s3://bucket/x::memory://y", "chained"),
        (Path("s3://bucket/x"), "as a string"),
        ("file://elsewhere/x", "not the file URL"),
        ("file://", "not the file URL"),
    ],
)
def test_what_is_no_folder_is_refused_without_showing_secrets(url, says):
    with pytest.raises(CogViewConfigurationError, match=says) as caught:
        remote_folder(url)
    assert CANARY not in "".join(traceback.format_exception(caught.value)).replace(str(url), "")
    assert CANARY not in str(caught.value) + repr(caught.value)


def test_options_are_never_dropped_and_never_shown():
    folder = remote_folder("s3://bucket", {"key": "AKIA", "secret": CANARY})
    assert CANARY not in repr(folder) + str(folder)
    assert pickle.loads(pickle.dumps(folder)) == folder
    assert hash(folder) == hash(remote_folder(folder.url))
    with pytest.raises(CogViewConfigurationError, match="on this machine"):
        remote_folder("images", {"secret": CANARY})
    with pytest.raises(CogViewConfigurationError, match="'asynchronous'"):
        remote_folder("s3://bucket", {"asynchronous": True})


@pytest.mark.parametrize("missing", ["fsspec", "s3fs"])
def test_a_missing_package_is_named_with_its_install_line(missing):
    program = f"""
import sys
from langchain_cogview.errors import CogViewError
from langchain_cogview.images.remote import RemoteFolder, remote_folder
assert "fsspec" not in sys.modules and "s3fs" not in sys.modules  # imported where they are used
sys.modules[{missing!r}] = None
for what in remote_folder, RemoteFolder("s3://bucket").read:
    try:
        what("s3://bucket/x.png")
    except CogViewError as error:
        print(type(error).__name__, error)
"""
    lines = python(program).splitlines()
    assert [line.split()[0] for line in lines] == ["CogViewConfigurationError", "CogViewStorageError"]
    assert all('pip install "langchain-cogview[storage]"' in line for line in lines)


def python(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- saving


@HOWS
async def test_a_fetched_image_stays_elsewhere_and_can_be_read_back(how, folder):
    with FaultServer(None, good_image) as image_server:
        image = await fetched(how, image_server, folder)
    assert image.uri.startswith(f"{folder.url}/2")
    assert image.uri.endswith(f"-{image.sha256[:16]}.png")
    assert (image.path, image.content, image.problem) == (None, None, None)
    assert await read(how, image.uri) == IMAGE


def test_another_process_reads_an_image_by_its_uri_alone(server, bucket):
    uri = asyncio.run(uploaded("sync", remote_folder(f"s3://{bucket}/a b"), IMAGE))[0]
    assert server.names(bucket) == [uri.removeprefix(f"s3://{bucket}/")]
    program = "import hashlib, sys; from langchain_cogview.images.remote import RemoteFolder; print(hashlib.sha256(RemoteFolder(sys.argv[1]).read(sys.argv[1])).hexdigest())"
    assert python(program, uri).strip() == hashlib.sha256(IMAGE).hexdigest()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="This system has no fork.")
def test_a_forked_process_saves_and_reads_too(server, bucket):
    program = """
import os, sys, warnings
warnings.simplefilter("ignore")  # of fork beside threads
from langchain_cogview.concurrency import Deadline
from langchain_cogview.images.remote import remote_folder
folder = remote_folder(sys.argv[1])
first = folder.upload(["parent.png"], b"parent", Deadline(30))
child = os.fork()
if not child:
    same = folder.read(first) == b"parent"
    folder.upload(["child.png"], b"child", Deadline(30))
    os._exit(0 if same else 1)
print(os.waitpid(child, 0)[1])
"""
    assert python(program, f"s3://{bucket}").strip() == "0"
    assert server.names(bucket) == ["child.png", "parent.png"]


def test_a_large_image_is_one_put(server, bucket):
    content = os.urandom(MAX_IMAGE_BYTES)
    uri, problem, _ = asyncio.run(uploaded("sync", remote_folder(f"s3://{bucket}"), content))
    assert problem is None
    assert [method for method, _, _ in server.seen] == ["PUT"]
    assert read_uri(uri) == content
    assert server.seen[-1][2] == f"bytes=0-{MAX_IMAGE_BYTES}"  # of what is larger, no more than that is fetched


@pytest.mark.parametrize("conditions", ["kept", "refused"])
async def test_a_name_that_is_in_use_is_never_written_over(folder, server, conditions):
    server.refuses_conditions = conditions == "refused"
    names = ["a.png", "a-2.png", "a-3.png"]
    uris = [folder.upload(names, b"mine", Deadline(30)), await folder.aupload(names, b"yours", Deadline(30))]
    assert uris == [f"{folder}/a.png", f"{folder}/a-2.png"]
    assert [read_uri(uri) for uri in uris] == [b"mine", b"yours"]
    with pytest.raises(OSError, match="every name is in use"):
        folder.upload(names[:2], b"theirs", Deadline(30))
    assert [read_uri(uri) for uri in uris] == [b"mine", b"yours"]


@pytest.mark.parametrize("conditions", ["kept", "refused"])
def test_the_same_name_at_the_same_moment_goes_to_one_upload(folder, server, conditions):
    server.refuses_conditions = conditions == "refused"
    barrier = threading.Barrier(8)

    def upload(number):
        barrier.wait(20)
        return folder.upload((f"{at}.png" for at in range(9)), b"%d" % number, Deadline(60))

    with ThreadPoolExecutor(8) as pool:
        uris = list(pool.map(upload, range(8)))
    assert len(set(uris)) == 8
    assert [read_uri(uri) for uri in uris] == [b"%d" % number for number in range(8)]


async def test_fifty_uploads_at_once_leave_the_event_loop_free(server, bucket):
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    go = server.hold(lambda: loop.call_soon_threadsafe(arrived.set))
    folder = remote_folder(f"s3://{bucket}")
    with FaultServer(None, good_image, keep_requests=False) as image_server:
        tasks = [asyncio.create_task(fetched("async", image_server, folder, 100)) for _ in range(50)]
        await asyncio.wait_for(arrived.wait(), 60)  # a loop that waits for the upload would not come here
        assert not any(task.done() for task in tasks)
        go.set()
        saved = await asyncio.gather(*tasks)
    uris = {image.uri for image in saved}
    assert [image.problem for image in saved] == [None] * 50
    assert len(uris) == len(server.names(bucket)) == 50


# --- what can go wrong


@HOWS
async def test_a_missing_bucket_costs_no_image_and_no_second_fetch(how):
    with FaultServer(None, good_image) as image_server:
        image = await fetched(how, image_server, remote_folder("s3://nobody-made-this"))
        assert image_server.gets == 1
    assert (image.path, image.uri, image.content) == (None, None, IMAGE)
    assert image.problem == "the bucket, folder or file does not exist"


@HOWS
async def test_refused_credentials_cost_no_image_and_are_not_shown(how, server, bucket):
    folder = remote_folder(f"s3://{bucket}", {"key": f"AKIA{CANARY}", "secret": CANARY, "token": CANARY})
    httpx.post(f"{server.url}/moto-api/reset-auth", content="0").raise_for_status()
    try:
        uri, problem, content = await uploaded(how, folder)
        with pytest.raises(CogViewStorageError, match="access was denied") as caught:
            await read(how, f"s3://{bucket}/x.png", options=folder.options)
    finally:
        httpx.post(f"{server.url}/moto-api/reset-auth", content="inf").raise_for_status()
    assert (uri, problem, content) == (None, "access was denied", b"bytes")
    assert CANARY not in "".join(traceback.format_exception(caught.value))


@HOWS
async def test_no_credentials_are_reported_as_missing(how, monkeypatch, bucket):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert (await uploaded(how, remote_folder(f"s3://{bucket}")))[:2] == (None, "no credentials were found")


@HOWS
async def test_options_that_the_store_does_not_understand_cost_no_image(how, bucket):
    folder = remote_folder(f"s3://{bucket}", {"client_kwargs": {"nonsense": CANARY}})
    assert await uploaded(how, folder) == (None, "its storage_options were not understood", b"bytes")


@HOWS
async def test_a_server_that_is_gone_is_reported_within_the_deadline(how, monkeypatch):
    gone = S3()
    httpx.put(f"{gone.url}/bucket").raise_for_status()
    gone.stop()
    monkeypatch.setenv("AWS_ENDPOINT_URL", gone.url)
    uri, problem, content = await asyncio.wait_for(uploaded(how, remote_folder("s3://bucket"), seconds=1.0), 20)
    assert (uri, content) == (None, b"bytes")
    assert problem in {"the time limit passed while it was uploaded", "the store could not be reached"}
    assert await asyncio.to_thread(nobody_is_left)


@HOWS
async def test_the_deadline_stops_an_upload_and_leaves_nothing(how, server, bucket):
    go = server.hold()
    content = os.urandom(MAX_IMAGE_BYTES)  # more than the sockets between hold
    uri, problem, back = await uploaded(how, remote_folder(f"s3://{bucket}"), content, seconds=1.0)
    assert (uri, problem) == (None, "the time limit passed while it was uploaded")
    assert back == content
    assert await asyncio.to_thread(nobody_is_left)
    go.set()
    assert server.names(bucket) == []


@HOWS
async def test_nothing_is_sent_when_no_time_is_left(how, shelf):
    assert (await uploaded(how, remote_folder(f"shelf://{shelf}"), seconds=0.0))[1].startswith("the time limit passed")
    assert await asyncio.to_thread(nobody_is_left)
    assert not Shelf.started.is_set()


@HOWS
async def test_a_passed_deadline_does_not_wait_for_a_store_that_blocks(how, shelf, monkeypatch):
    monkeypatch.setattr(Shelf, "go", threading.Event())
    shelf.mkdir()
    uri, problem, content = await uploaded(how, remote_folder(f"shelf://{shelf}"), seconds=0.2)
    assert (uri, problem, content) == (None, "the time limit passed while it was uploaded", b"bytes")
    assert storage_threads()
    Shelf.go.set()
    assert await asyncio.to_thread(nobody_is_left)
    assert list(shelf.iterdir()) == []  # what came too late is taken away: nobody knows its name


async def test_a_cancelled_upload_ends_and_leaves_nothing(server, bucket):
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    go = server.hold(lambda: loop.call_soon_threadsafe(arrived.set))
    task = asyncio.create_task(uploaded("async", remote_folder(f"s3://{bucket}"), os.urandom(MAX_IMAGE_BYTES), None))
    await asyncio.wait_for(arrived.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    assert await asyncio.to_thread(nobody_is_left)
    assert server.names(bucket) == []
    assert len(server.puts()) == 1


@HOWS
async def test_a_half_upload_is_removed(how, shelf, monkeypatch):
    monkeypatch.setattr(Shelf, "breaks", True)
    shelf.mkdir()
    uri, problem, content = await uploaded(how, remote_folder(f"shelf://{shelf}"))
    assert (uri, problem, content) == (None, "No space left on device", b"bytes")
    assert list(shelf.iterdir()) == []


@HOWS
async def test_what_cannot_be_read_is_our_error(how, bucket, shelf):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/large.png", b"x" * (MAX_IMAGE_BYTES + 1))
    for uri, says in {
        "memory://large.png": "larger than 32 MiB",
        "memory://nobody-put-this.png": "does not exist",
        f"s3://{bucket}/nobody-put-this.png": "does not exist",
        "file:///etc/hostname": "on this machine",
        "/etc/hostname": "on this machine",
        "nonsense://x": "no protocol",
        "http://127.0.0.1/x.png": "not folders",
        f"s3://AKIA:{CANARY}@bucket/x": "credentials",
    }.items():
        with pytest.raises(CogViewStorageError, match=says) as caught:
            await read(how, uri)
        assert CANARY not in str(caught.value)
    memory.rm_file("/large.png")


@HOWS
async def test_reading_ends_with_its_time(how, server, bucket):
    with pytest.raises(CogViewStorageError, match="time limit passed while it was read"):
        await read(how, f"s3://{bucket}/x.png", seconds=0.0)
