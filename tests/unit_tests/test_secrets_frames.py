"""The key is in no frame, chain or dump of an error, however a construction or a call fails."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import json
import logging
import pickle
import re
import signal
import socket
import socketserver
import threading
import traceback
import types
import warnings

import httpx
import pytest
import rich
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.runnables import ConfigurableField
from langchain_core.tracers.base import BaseTracer
from pydantic import SecretStr
from pydantic_core import PydanticSerializationError
from rich.console import Console

from langchain_cogview import CogViewError, CogViewImageGenerator, CogViewImageTool, ImageTask, arun_job, run_job
from langchain_cogview.sandbox import SandboxServer
from tests.conftest import FAKE_KEY

KEY = FAKE_KEY.replace(".0123456789abcdef", ".sECRETsECRET0123")
SECRET = KEY.rpartition(".")[2]
CALLERS = {__file__, contextlib.__file__}


def reprs(value, seen, depth=0):
    """Representations of a value, and of what it holds; of each object once."""
    if id(value) in seen:
        return
    seen[id(value)] = value  # kept, so that no other object gets its id
    if isinstance(value, (str, bytes)) and len(value) > 10_000:
        value = (value if isinstance(value, str) else value.decode("latin-1")).replace("x" * 1000, "")
    yield repr(value)
    if depth > 4 or isinstance(value, (str, bytes, int, types.ModuleType, type, SecretStr, types.FunctionType)):
        return
    if isinstance(value, dict):
        inner = [*value, *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = list(value)
    elif isinstance(value, BaseException):
        inner = [str(value), value.args, value.__dict__]
    elif type(value).__module__.startswith(("langchain_cogview", "httpx", "httpcore", "h11")):
        inner = list(getattr(value, "__dict__", {}).values())
    else:
        inner = []
    for item in inner[:100]:
        yield from reprs(item, seen, depth + 1)


def chain(error):
    """An exception and all that it carries along."""
    found, seen = [error], set()
    while found:
        item = found.pop()
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        found += [item.__cause__, item.__context__, *getattr(item, "exceptions", ())]
        if hasattr(item, "errors") and callable(item.errors):
            found += [entry["ctx"]["error"] for entry in item.errors() if "error" in entry.get("ctx", {})]


def leaks(error):
    """Where the key is to be seen in an exception."""
    found, seen = [], {}
    for item in chain(error):
        shown = {"the exception": list(reprs(item, seen))}
        if hasattr(item, "errors") and callable(item.errors):
            shown["errors()"] = [*reprs(item.errors(), seen), item.json()]
        for frame, line in traceback.walk_tb(item.__traceback__):
            code = frame.f_code
            if code.co_filename in CALLERS or "pluggy" in code.co_filename or "_pytest" in code.co_filename:
                continue
            for name, value in frame.f_locals.items():
                shown[f"{name} of {code.co_filename.rpartition('/')[2]}:{code.co_name}:{line}"] = list(
                    reprs(value, seen)
                )
        with contextlib.suppress(Exception):
            shown["its pickle"] = [repr(pickle.dumps(item))]
        found += [location for location, texts in shown.items() if any(SECRET in text for text in texts)]
    return found


def assert_safe(call):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except BaseException as error:
        assert not leaks(error), f"{leaks(error)} of {error!r}"
        return error
    return None


WRONG = {
    "a mistyped name": {"apikey": KEY},
    "another provider's name": {"zhipuai_api_key": KEY},
    "two wrong names": {"key": KEY, "token": KEY},
    "bytes in quotes": {"api_key": f"'{KEY}'".encode()},
    "a list": {"api_key": [KEY]},
    "a dict": {"api_key": {"key": KEY}},
    "blanks": {"api_key": f" {KEY}"},
    "a line end": {"api_key": f"{KEY}\n"},
    "quotes": {"api_key": f'"{KEY}"'},
    "Bearer": {"api_key": f"Bearer {KEY}"},
    "not ASCII": {"api_key": f"{KEY}é"},
    "a wrong size": {"api_key": KEY, "size": "2000x7"},
    "a wrong quality": {"api_key": KEY, "quality": "worst"},
    "a wrong number": {"api_key": KEY, "n": "many"},
    "a wrong timeout": {"api_key": KEY, "timeout": -1},
    "a wrong client": {"api_key": KEY, "http_client": object()},
    "a wrong cache": {"api_key": KEY, "cache": object()},
    "a folder with a null": {"api_key": KEY, "output_dir": "\0"},
    "an unknown protocol": {"api_key": KEY, "output_dir": "nothing://x"},
    "a wrong region": {"api_key": KEY, "region": "mars"},
    "region and host apart": {"api_key": KEY, "region": "china", "base_url": "https://api.z.ai"},
    "a wrong host rule": {"api_key": KEY, "allowed_image_hosts": "https://*/x"},
    "a wrong price": {"api_key": KEY, "prices": {"cogview-4": "1E+9999999"}},
    "a key as region": {"region": KEY},
    "a key as size": {"api_key": "a.b", "size": KEY},
    "a key as timeout": {"timeout": KEY},
    "a key as number": {"n": KEY, "max_retries": KEY},
    "a key as client": {"http_client": KEY},
    "a key in the query": {"api_key": "a.b", "base_url": f"https://gateway.example/?key={KEY}"},
    "a key as login": {"api_key": "a.b", "base_url": f"https://{KEY}@gateway.example/"},
    "a key as base URL": {"base_url": KEY.replace(".", "_")},
    "a key as URL's port": {"api_key": "a.b", "base_url": f"https://gateway.example:{KEY}"},
    "the coding plan": {"api_key": KEY, "base_url": "https://api.z.ai/api/coding/paas/v4"},
    "plain http": {"api_key": KEY, "base_url": "http://api.z.ai/"},
    "a sandbox and a client": {"api_key": KEY, "base_url": "sandbox:", "http_client": httpx.Client(headers={"x": KEY})},
    "storage options": {"api_key": KEY, "storage_options": KEY},
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("make", [CogViewImageGenerator, CogViewImageTool])
def test_no_construction_that_fails_shows_the_key(make, arguments):
    assert assert_safe(lambda: make(**arguments)) is not None


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from([*CogViewImageGenerator.model_fields, *CogViewImageTool.model_fields, "apikey", KEY])
        | st.text(max_size=8),
        st.sampled_from(
            [KEY, f"x{KEY}", [KEY], {KEY: KEY}, SecretStr(KEY), KEY.encode(), (KEY, 1), None, 0, -1, "x", {}]
        ),
        max_size=5,
    ),
    st.sampled_from([CogViewImageGenerator, CogViewImageTool]),
    st.sampled_from(["call", "validate", "validate_json", "copy"]),
)
def test_no_arguments_let_a_construction_show_the_key(arguments, make, how):
    if how == "call":
        error = assert_safe(lambda: make(**arguments))
    elif how == "validate":
        error = assert_safe(lambda: make.model_validate(arguments))
    elif how == "validate_json":
        text = json.dumps(arguments, default=str)
        error = assert_safe(lambda: make.model_validate_json(text))
    else:
        made = CogViewImageGenerator(base_url="sandbox:")
        error = assert_safe(lambda: made.model_copy(update=arguments))
    assert error is None or KEY not in str(error)


@pytest.mark.parametrize("value", [f" {KEY}", f"{KEY} ", f'"{KEY}"', f"Bearer {KEY}", f"{KEY}\t{KEY}", f"{KEY}é"])
@pytest.mark.parametrize("make", [CogViewImageGenerator, CogViewImageTool])
def test_no_key_of_the_environment_that_is_wrong_is_shown(monkeypatch, make, value):
    monkeypatch.setenv("ZHIPUAI_API_KEY", value)
    assert assert_safe(make) is not None
    monkeypatch.setenv("ZHIPUAI_API_KEY", "a.b")
    monkeypatch.setenv("COGVIEW_BASE_URL", f"https://x:{value}@gateway.example/")
    assert assert_safe(make) is not None


WAYS = {
    "both": lambda: CogViewImageTool(generator=CogViewImageGenerator(api_key=KEY), api_key=KEY),
    "a class": lambda: CogViewImageTool(generator=CogViewImageGenerator, api_key=KEY),
    "a key as generator": lambda: CogViewImageTool(generator=KEY),
    "a bound key": lambda: CogViewImageTool(generator=CogViewImageGenerator(api_key=KEY).with_fallbacks([])),
    "a copy of another key": lambda: CogViewImageGenerator(api_key="a.b").model_copy(update={"api_key": f"{KEY} "}),
    "a copy of a wrong name": lambda: CogViewImageGenerator(api_key=KEY).model_copy(update={"apikey": KEY}),
    "a copy of a wrong value": lambda: CogViewImageGenerator(api_key=KEY).model_copy(update={"n": KEY}),
    "validation": lambda: CogViewImageGenerator.model_validate({"apikey": KEY}),
    "validation of a text": lambda: CogViewImageGenerator.model_validate(KEY),
    "validation of JSON": lambda: CogViewImageGenerator.model_validate_json(json.dumps({"api_key": KEY, "n": KEY})),
    "validation of broken JSON": lambda: CogViewImageGenerator.model_validate_json(f'{{"api_key": "{KEY}'),
    "positional": lambda: CogViewImageGenerator(KEY),
    "pickling": lambda: pickle.dumps(CogViewImageGenerator(api_key=KEY, http_client=httpx.Client())),
    "an attribute": lambda: setattr(CogViewImageGenerator(api_key=KEY), "api_key", "a.b"),
    "a call without a key": lambda: pickle.loads(pickle.dumps(CogViewImageGenerator(api_key=KEY))).invoke("x"),
    "a wrong argument of a call": lambda: CogViewImageGenerator(api_key=KEY).invoke({"prompt": "x", "size": "2000x7"}),
    "an argument of a call": lambda: CogViewImageGenerator(api_key=KEY).invoke("x", sise="1"),
    "a wrong task": lambda: CogViewImageGenerator(api_key=KEY).submit("x"),
    "a key as attribute": lambda: setattr(CogViewImageGenerator(base_url="sandbox:"), "api_key", KEY),
    "a key as a tool's attribute": lambda: setattr(CogViewImageTool(base_url="sandbox:"), "apikey", KEY),
    "validation of texts": lambda: CogViewImageGenerator.model_validate_strings({"apikey": KEY}),
    "a task's wrong id": lambda: ImageTask.resume("x/..", api_key=KEY),
    "a task's mistyped name": lambda: ImageTask.resume("x", apikey=KEY),
    "a job's mistyped name": lambda: run_job(["x"], "job", apikey=KEY),
    "a job's wrong prompts": lambda: run_job([{"n": "many"}], "job", api_key=KEY),
    "a job's mistyped name, async": lambda: asyncio.run(arun_job(["x"], "job", apikey=KEY)),
    "no image": lambda: CogViewImageTool(api_key=KEY).invoke({"prompt": ""}).no,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_other_way_to_fail_shows_the_key(way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert assert_safe(way) is not None


@pytest.mark.parametrize("field", ["model", "size", "fallback_models"])
def test_a_key_in_another_field_is_not_in_its_error(field):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            CogViewImageGenerator(base_url="sandbox:", **{field: KEY}).invoke("x", size=KEY)
        except (ValueError, CogViewError) as error:
            caught.append(error)
    assert caught
    # Nor a part of it that is cut off.
    assert not [item for item in map(str, caught) if KEY[:20] in item]


@pytest.mark.parametrize("configurable", [{"key": f"{KEY}\n"}, {"key": KEY, "size": "2000x7"}, {"key": [KEY]}])
@pytest.mark.parametrize("how", ["invoke", "ainvoke", "with_config"])
def test_no_configured_key_is_shown_by_frames_of_ours(configurable, how):
    chain = CogViewImageGenerator(api_key="a.b").configurable_fields(
        api_key=ConfigurableField(id="key"), size=ConfigurableField(id="size")
    )

    def call():
        if how == "with_config":
            return chain.with_config(configurable=configurable).invoke("x")
        config = {"configurable": configurable}
        return chain.invoke("x", config) if how == "invoke" else asyncio.run(chain.ainvoke("x", config))

    with pytest.raises(Exception) as caught:
        call()
    # LangChain's own frames hold the configuration that the caller passed.
    assert not [
        location for location in leaks(caught.value) if "langchain_cogview" in location or " of " not in location
    ]
    assert not [
        location for location in leaks(caught.value) if any(ours in location for ours in ("generator.py", "request.py"))
    ]


def dumps_of(made):
    """What people print of an object."""
    file = io.StringIO()
    console = Console(file=file, width=300)
    console.print(made, made.model_dump(), vars(made), made.__pydantic_private__)
    yield file.getvalue()
    with warnings.catch_warnings(), contextlib.suppress(PydanticSerializationError):
        warnings.simplefilter("ignore")
        yield repr(made.dict())
        yield made.json()
    yield from (repr(made), str(made), repr(made.__getstate__()), repr(pickle.dumps(made)))
    yield from reprs([vars(made), made.__pydantic_private__, made.model_dump()], {})


@pytest.mark.parametrize("make", [CogViewImageGenerator, CogViewImageTool])
def test_no_dump_of_an_object_shows_the_key(make, sandbox, tmp_path):
    with SandboxServer(sandbox) as server:
        made = make(api_key=KEY, base_url=server.base_url, output_dir=tmp_path)
        for state in ("new", "used"):
            copies = (made, copy.copy(made), copy.deepcopy(made), made.model_copy(), pickle.loads(pickle.dumps(made)))
            for item in copies:
                assert not [text for text in dumps_of(item) if SECRET in text], state
            made.invoke("a kitten" if make is CogViewImageGenerator else {"prompt": "a kitten"})
    file = io.StringIO()
    rich.inspect(made, console=Console(file=file, width=300), all=True)
    assert SECRET not in file.getvalue()
    assert sandbox.requests


@pytest.mark.parametrize("how", ["configured", "bound"])
def test_no_dump_of_a_tool_shows_a_key_that_its_generator_was_configured_with(how):
    generator = CogViewImageGenerator(api_key="a.b").configurable_fields(api_key=ConfigurableField(id="api_key"))
    if how == "configured":
        made = CogViewImageTool(generator=generator.with_config(configurable={"api_key": KEY}))
    else:
        made = CogViewImageTool(generator=generator.bind(api_key=KEY))
    file = io.StringIO()
    Console(file=file, width=300).print(made, made.model_dump())
    with warnings.catch_warnings(), contextlib.suppress(PydanticSerializationError):
        warnings.simplefilter("ignore")
        file.write(repr(made.dict()))
        file.write(made.model_dump_json())
    assert SECRET not in f"{file.getvalue()} {made!r} {made} {made.model_dump()}"


def test_a_key_is_wrapped_also_where_nothing_is_validated():
    made = CogViewImageGenerator.model_construct(api_key=KEY)
    assert not [text for text in dumps_of(made) if SECRET in text]


def test_no_traceback_of_rich_or_ipython_shows_the_key():
    from IPython.core.ultratb import VerboseTB
    from rich.traceback import Traceback

    for arguments in list(WRONG.values())[::6]:
        try:
            CogViewImageTool(**arguments)
        except Exception as error:
            # Of this frame only the arguments would be shown.
            inner = error.with_traceback(error.__traceback__.tb_next)
            file = io.StringIO()
            Console(file=file, width=300).print(
                Traceback.from_exception(type(inner), inner, inner.__traceback__, show_locals=True)
            )
            shown = file.getvalue() + VerboseTB().text(type(inner), inner, inner.__traceback__)
            assert SECRET not in shown


# Calls that fail over real connections

UNTIL = 100


class Service(socketserver.ThreadingTCPServer):
    """A service on loopback whose handler is `answer(connection)`, called once the first bytes have come."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, answer):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                with contextlib.suppress(OSError):
                    answer(self.request)

        super().__init__(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self.server_address[1]}/api/paas/v4"


@contextlib.contextmanager
def service(answer):
    with Service(answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def request_of(connection):
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65_536)
    return received


def replying(status, *lines, body=None):
    def answer(connection):
        authorization = re.search(rb"(?i)authorization: ([^\r]+)", request_of(connection))[1]
        content = (body or b'{"error":{"code":"1000","message":"You sent KEY"}}').replace(b"KEY", authorization)
        head = [
            f"HTTP/1.1 {status} x".encode(),
            *lines,
            b"Content-Length: %d" % len(content),
            b"X-Was: " + authorization,
        ]
        connection.sendall(b"\r\n".join([*head, b"", content]).replace(b"KEY", authorization))

    return answer


def closing(sent=b""):
    def answer(connection):
        request = request_of(connection)
        connection.sendall(sent.replace(b"ALL", request))

    return answer


def hanging(sent=b""):
    def answer(connection):
        connection.sendall(sent.replace(b"ALL", request_of(connection)) if sent else b"")
        connection.recv(1_000_000)
        connection.settimeout(UNTIL)
        while connection.recv(1_000_000):
            pass

    return answer


FAULTS = {
    **{f"{status}": replying(status) for status in (200, 301, 400, 401, 403, 404, 418, 429, 500, 503)},
    "a redirect": replying(302, b"Location: http://127.0.0.1/?KEY"),
    "a long reply": replying(200, body=b"KEY" * 50_000),
    "a page": replying(502, body=b"<html>KEY</html>"),
    "a broken encoding": replying(200, b"Content-Encoding: gzip"),
    "closed": closing(),
    "closed in the head": closing(b"HTTP/1.1 200 OK\r\nX-Was: ALL"),
    "closed in the body": closing(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nALL"),
    "the request sent back": closing(b"ALL"),
    "no HTTP": closing(b"\0\1\2ALL"),
    "broken chunks": closing(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nALL"),
    "no answer": hanging(),
    "half an answer": hanging(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{"),
}


def called(base_url, how, prompt="a kitten", **settings):
    settings = {"max_retries": 0, "timeout": 0.3, "download": True, **settings}
    generator = CogViewImageGenerator(api_key=KEY, base_url=base_url, **settings)
    tool = CogViewImageTool(generator=generator, handle_tool_error=False)
    if how == "invoke":
        return generator.invoke(prompt)
    if how == "tool":
        return tool.invoke({"prompt": prompt})
    if how == "batch":
        return generator.batch([prompt])
    if how == "submit":
        return generator.model_copy(update={"model": "glm-image"}).submit(prompt)
    return asyncio.run({"ainvoke": generator.ainvoke, "atool": tool.ainvoke}[how](prompt))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("how", ["invoke", "ainvoke", "tool", "atool", "batch", "submit"])
def test_no_call_that_fails_shows_the_key(fault, how, caplog):
    caplog.set_level(logging.DEBUG)
    with service(fault) as server:
        error = assert_safe(lambda: called(server.base_url, how))
    assert error is not None
    assert SECRET not in caplog.text
    assert not [record for record in caplog.records if SECRET in repr(vars(record))]


class InterruptError(Exception):
    """What a signal handler raises, as Celery's does."""


@pytest.fixture
def stalled():
    """A service that accepts a connection and never reads, and an event that is set when a request has begun to come."""
    begun = threading.Event()

    def answer(connection):
        connection.recv(1)
        begun.set()
        done.wait(UNTIL)

    done = threading.Event()
    with service(answer) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        yield server, begun
        done.set()


LARGE = "x" * 5_000_000


@pytest.mark.parametrize("how", ["ainvoke", "atool"])
def test_a_call_that_is_cancelled_while_it_writes_shows_no_key(stalled, how):
    server, begun = stalled

    async def call():
        generator = CogViewImageGenerator(api_key=KEY, base_url=server.base_url, timeout=UNTIL)
        tool = CogViewImageTool(generator=generator)
        made = generator.ainvoke(LARGE) if how == "ainvoke" else tool.ainvoke({"prompt": LARGE})
        task = asyncio.create_task(made)
        await asyncio.to_thread(begun.wait, UNTIL)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError) as caught:
        asyncio.run(call())
    assert not leaks(caught.value)


def test_a_call_that_a_signal_interrupts_while_it_writes_shows_no_key(stalled, monkeypatch):
    server, begun = stalled

    def handler(*_):
        raise InterruptError

    before = signal.signal(signal.SIGUSR1, handler)
    main = threading.main_thread().ident

    def interrupt():
        begun.wait(UNTIL)
        signal.pthread_kill(main, signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(InterruptError) as caught:
            called(server.base_url, "invoke", LARGE, timeout=UNTIL)
    finally:
        signal.signal(signal.SIGUSR1, before)
        thread.join()
    assert not leaks(caught.value)


@pytest.mark.parametrize("how", ["invoke", "ainvoke"])
@pytest.mark.parametrize("fault", ["401", "closed", "no answer", "no HTTP", "a redirect"])
def test_no_call_over_an_injected_client_shows_the_key(fault, how, caplog):
    caplog.set_level(logging.DEBUG, "langchain_cogview")

    async def call(base_url):
        async with httpx.AsyncClient() as client:
            generator = CogViewImageGenerator(
                api_key=KEY, base_url=base_url, http_async_client=client, timeout=0.3, max_retries=0
            )
            await generator.ainvoke("x")

    with service(FAULTS[fault]) as server, httpx.Client() as client:
        if how == "invoke":
            error = assert_safe(lambda: called(server.base_url, "invoke", http_client=client))
        else:
            error = assert_safe(lambda: asyncio.run(call(server.base_url)))
    assert error is not None
    assert SECRET not in caplog.text


class Traces(BaseTracer):
    """Keeps what LangSmith would be sent."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def _persist_run(self, run):
        self.kept.append(run.model_dump_json() if hasattr(run, "model_dump_json") else run.json())


@pytest.mark.parametrize("how", ["invoke", "tool"])
def test_no_trace_and_no_debug_output_of_langchain_shows_the_key(how, capfd):
    from langchain_core.globals import set_debug, set_verbose

    traces = Traces()
    set_debug(True)
    set_verbose(True)
    try:
        with service(FAULTS["401"]) as server:
            generator = CogViewImageGenerator(api_key=KEY, base_url=server.base_url, max_retries=0)
            made = generator if how == "invoke" else CogViewImageTool(generator=generator, handle_tool_error=False)
            with pytest.raises(CogViewError):
                made.invoke("x", {"callbacks": [traces]})
    finally:
        set_debug(False)
        set_verbose(False)
    out, err = capfd.readouterr()
    assert traces.kept and "x" in out
    assert SECRET not in "".join([*traces.kept, out, err])
