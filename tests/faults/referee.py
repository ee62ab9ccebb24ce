"""Runs one fault through a generator, sync or async, and says what was wrong with what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import os
import pickle
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar
from unittest import mock
from urllib.parse import urlsplit

from langchain_cogview import CogViewImageGenerator
from langchain_cogview.images import download
from tests.faults.downloads import DownloadFault
from tests.faults.reply_table import AMPLE, KEY, RESULT, SERVER_WORDS, TIMEOUT, UNKNOWN, ReplyFault, Resolver, says
from tests.faults.reply_transport import HangingResolver
from tests.faults.server import FaultServer

How = Literal["sync", "async"]

STRICT_SLACK = 0.2
"""Seconds over the time limit that are promised; `python -m tests.faults.table` holds to it."""
SLACK = 60.0
"""Seconds over the time limit that the ordinary tests allow, for machines that are busy; what hangs would hang for 100."""
MORE_TIME = 10
"""By how much a short time limit is raised where a busy machine used it up before the fault came."""
USUAL_SECONDS = 2.0
"""Seconds that a call takes at most which ends by itself; the slack comes on top."""
TOO_LONG_TO_WAIT = (3600.0,)
"""Seconds before an image is fetched again, where a fault is about the first attempt alone."""
SECRET = KEY.split(".")[1]
"""A part of either half of the key: whoever shows half of it shows this."""
NUMERIC = re.compile(r"(0[xX])?[0-9a-fA-F]+(\.(0[xX])?[0-9a-fA-F]+){0,3}\.?")


@dataclass
class Guard:
    """Nothing leaves this machine: names are answered by `resolve`, and connections beyond 127.0.0.1 are noted and refused."""

    resolve: Resolver | None = None
    lookups: list[str] = field(default_factory=list)
    connects: list[tuple[str, int]] = field(default_factory=list)

    def __enter__(self) -> Self:
        # Read at this moment, so that guards of the test run itself stay in force beneath.
        self._getaddrinfo = socket.getaddrinfo
        connect, connect_ex = socket.socket.connect, socket.socket.connect_ex
        guard = self

        def guarded(sock: socket.socket, address: Any) -> None:
            guard._note(sock, address)
            connect(sock, address)

        def guarded_ex(sock: socket.socket, address: Any) -> int:
            guard._note(sock, address)
            return connect_ex(sock, address)

        self._patches = contextlib.ExitStack()
        self._patches.enter_context(mock.patch.object(socket, "getaddrinfo", self._look_up))
        self._patches.enter_context(mock.patch.object(socket.socket, "connect", guarded))
        self._patches.enter_context(mock.patch.object(socket.socket, "connect_ex", guarded_ex))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _note(self, sock: socket.socket, address: Any) -> None:
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        self.connects.append((str(address[0]), int(address[1])))
        if address[0] != "127.0.0.1":
            raise ConnectionRefusedError(111, "Refused by the test's guard")

    def _look_up(self, host: Any, port: Any, family: int = 0, *rest: int, **more: int) -> list[Any]:
        name = host.decode("ascii", "replace") if isinstance(host, bytes | bytearray) else host
        if name is None or ":" in name or NUMERIC.fullmatch(name) or name.rstrip(".") == "localhost":
            return self._getaddrinfo(host, port, family, *rest, **more)
        self.lookups.append(name)
        if self.resolve is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found: list[Any] = []
        for address in self.resolve(name):
            kind = socket.AF_INET6 if ":" in address else socket.AF_INET
            socket_address = (address, int(port or 0), 0, 0) if kind is socket.AF_INET6 else (address, int(port or 0))
            if family in (0, kind):
                found.append((kind, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", socket_address))
        return found


class KeyWatch(logging.Handler):
    """Reads every log record of a run, down to DEBUG, for the key."""

    def __init__(self, *, but_for: str | None = None) -> None:
        super().__init__(logging.DEBUG)
        self.but_for = but_for
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))
        self.leaks: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if SECRET in self.format(record) and record.name.split(".")[0] != self.but_for:
            self.leaks.append(record.name)

    def __enter__(self) -> Self:
        root = logging.getLogger()
        self._level = root.level
        root.addHandler(self)
        root.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *_: object) -> None:
        root = logging.getLogger()
        root.removeHandler(self)
        root.setLevel(self._level)


@dataclass
class Verdict:
    """What came of one run; it was right where `problems` is empty."""

    outcome: str = ""
    seconds: float = 0.0
    posts: int = 0
    gets: int = 0
    problems: list[str] = field(default_factory=list)
    needing_time: int = 0
    value: Any = None

    def expect(self, holds: bool, problem: str, *, needs_time: bool = False) -> None:
        """Note a problem; `needs_time` if a machine too slow for the time limit has it too."""
        if not holds:
            self.problems.append(problem)
            self.needing_time += needs_time


@contextlib.contextmanager
def nothing_left(verdict: Verdict) -> Iterator[None]:
    """Notes threads and descriptors that outlive the run."""
    threads, descriptors = _threads(), open_descriptors()
    yield
    end = time.monotonic() + SLACK
    while time.monotonic() < end and (_threads() - threads or open_descriptors() > descriptors):
        time.sleep(0.005)
    left = _threads() - threads
    verdict.expect(not left, f"threads left: {sorted(thread.name for thread in left)}")
    verdict.expect(open_descriptors() <= descriptors, f"descriptors left: {open_descriptors() - descriptors}")


def _threads() -> set[threading.Thread]:
    """Every thread but those of the pool for files, which are few and wait for the next file."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("cogview-io")}


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def call(generator: CogViewImageGenerator, how: How, verdict: Verdict, prompt: Any = "a kitten") -> Any:
    """One call, and then the generator's connections are closed; gives the result or the exception."""
    if how == "sync":
        begin = time.monotonic()
        try:
            return generator.invoke(prompt)
        except Exception as exc:
            return exc
        finally:
            verdict.seconds = time.monotonic() - begin
            generator.close()

    async def main() -> Any:
        try:
            return await generator.ainvoke(prompt)
        except Exception as exc:
            return exc
        finally:
            await generator.aclose()

    # The end of the loop counts: a thread that is still waiting somewhere would hold it up.
    begin = time.monotonic()
    try:
        return asyncio.run(main())
    finally:
        verdict.seconds = time.monotonic() - begin


@functools.cache
def warm_up() -> None:
    """Load what the first call loads, which counts in no time limit here."""
    with FaultServer() as server:
        call(CogViewImageGenerator(base_url=server.base_url, api_key=KEY), "sync", Verdict())


F = TypeVar("F", ReplyFault, DownloadFault)


def with_time(
    judge: Callable[[F, How, Path, float], Verdict], fault: F, how: How, folder: Path, slack: float
) -> Verdict:
    """Run one fault, and once more with a longer time limit if a slow machine alone explains what was wrong.

    What is wrong with the key, the addresses, the files, or with too many requests is never explained by it.
    """
    warm_up()
    verdict = judge(fault, how, folder, slack)
    used_up = fault.timeout < AMPLE and verdict.seconds >= fault.timeout - 0.1
    if slack < SLACK or not used_up or not 0 < len(verdict.problems) == verdict.needing_time:
        return verdict
    return judge(replace(fault, timeout=fault.timeout * MORE_TIME), how, folder / "again", slack)


def judge_reply(fault: ReplyFault, how: How, folder: Path, slack: float = SLACK) -> Verdict:
    """Run one fault of the reply."""
    return with_time(_judge_reply, fault, how, folder, slack)


def judge_download(fault: DownloadFault, how: How, folder: Path, slack: float = SLACK) -> Verdict:
    """Run one fault of the download."""
    return with_time(_judge_download, fault, how, folder, slack)


def _judge_reply(fault: ReplyFault, how: How, folder: Path, slack: float) -> Verdict:
    verdict = Verdict()
    # The HTTP library logs the heads it receives by itself: what the server puts there is beyond this package.
    log = KeyWatch(but_for="httpcore" if fault.key_in_head else None)
    waits = mock.patch.object(download, "WAITS", TOO_LONG_TO_WAIT)
    with nothing_left(verdict), Guard(fault.resolve) as guard, log, waits:
        with FaultServer(fault.fault, tls=fault.tls() if fault.tls else None) as server:
            if isinstance(fault.resolve, HangingResolver):
                fault.resolve.let_go.clear()
            generator = CogViewImageGenerator(
                base_url=fault.base_url(server) if fault.base_url else server.base_url,
                api_key=KEY,
                timeout=fault.timeout,
                max_retries=2,
                download=fault.download,
                output_dir=folder if fault.download else None,
            )
            value = verdict.value = call(generator, how, verdict)
            if isinstance(fault.resolve, HangingResolver):
                fault.resolve.let_go.set()
            low, high = fault.posts
            # What was sent may still lie unread where the machine is busy.
            end = time.monotonic() + (0 if type(value).__name__ == TIMEOUT else SLACK)
            while server.posts < low and time.monotonic() < end:
                time.sleep(0.005)
            verdict.posts, verdict.gets = server.posts, server.gets
            verdict.outcome = RESULT if not isinstance(value, BaseException) else type(value).__name__
            wrong_posts = f"{server.posts} POSTs instead of {low} to {high}"
            verdict.expect(low <= server.posts <= high, wrong_posts, needs_time=server.posts < low)
            verdict.expect(server.canary.knocks == 0, "another host was called")
            check_wire(verdict, server)
    verdict.expect(
        verdict.outcome in fault.expected,
        f"{verdict.outcome} ({value!s:.200}) instead of {' or '.join(fault.expected)}",
        needs_time=verdict.outcome in (TIMEOUT, UNKNOWN),
    )
    check_time(verdict, fault.timeout, fault.least, fault.within, slack)
    strangers = {address for address, _ in guard.connects} - {"127.0.0.1"}
    verdict.expect(not strangers, f"connections to {strangers}")
    check_value(verdict, value, log)
    return verdict


def _judge_download(fault: DownloadFault, how: How, folder: Path, slack: float) -> Verdict:
    verdict = Verdict()
    waits = mock.patch.object(download, "WAITS", download.WAITS if fault.is_fetched_again else TOO_LONG_TO_WAIT)
    with nothing_left(verdict), Guard(fault.resolve) as guard, KeyWatch() as log, waits:
        with FaultServer(None, fault.image) as server:
            url = fault.url(server) if fault.url else server.image_url
            headers = ("Set-Cookie: api=1; Path=/",) if fault.cookie else ()
            server.api = says({"created": 1760335349, "data": [{"url": url}]}, 200, *headers)
            generator = CogViewImageGenerator(
                base_url=server.base_url, api_key=KEY, timeout=fault.timeout, max_retries=2, output_dir=folder
            )
            value = verdict.value = call(generator, how, verdict)
            verdict.posts, verdict.gets = server.posts, server.gets
            verdict.outcome = RESULT if not isinstance(value, BaseException) else type(value).__name__
            verdict.expect(server.posts == 1, f"{server.posts} POSTs instead of one", needs_time=server.posts < 1)
            low, high = fault.gets
            wrong_gets = f"{server.gets} GETs instead of {low} to {high}"
            verdict.expect(low <= server.gets <= high, wrong_gets, needs_time=server.gets < low)
            verdict.expect(server.canary.knocks == 0, "an address was called that nobody should call")
            check_wire(verdict, server)
    check_time(verdict, fault.timeout, fault.least, fault.within, slack)
    strangers = {address for address, _ in guard.connects} - {"127.0.0.1"} - fault.connects
    verdict.expect(not strangers, f"connections to {strangers}")
    ports = {port for address, port in guard.connects if address == "127.0.0.1"} - {server.port, 1}
    verdict.expect(not ports, f"connections to other ports of this machine: {ports}")
    check_value(verdict, value, log)
    if isinstance(value, BaseException):
        right = fault.malformed and verdict.outcome == "CogViewMalformedReplyError"
        failed = f"the call failed with {verdict.outcome} ({value!s:.200}); it must give a result"
        verdict.expect(right, failed, needs_time=verdict.outcome in (TIMEOUT, UNKNOWN))
        return verdict
    verdict.expect(len(value.images) == 1, f"{len(value.images)} images")
    image = value.images[0]
    expected = (None,) if url.startswith("data:") else (url, url.replace(" ", "%20"))
    verdict.expect(image.url in expected, f"the address became {image.url!r:.200}")
    kept = [path for path in folder.rglob("*") if path.is_file()]
    if image.path is None:
        verdict.outcome = "no bytes"
        lost = f"the bytes were not kept: {list(image.warnings)!s:.300}"
        verdict.expect(fault.whole is None or fault.maybe, lost, needs_time=True)
        verdict.expect(bool(image.warnings), "no bytes, and no warning on the image")
        verdict.expect(not kept, f"files left: {kept}")
        return verdict
    verdict.outcome = "bytes"
    verdict.expect(fault.whole is not None, "bytes were kept that are no image")
    if fault.whole is not None:
        content = Path(image.path).read_bytes()
        verdict.expect(content == fault.whole, f"{len(content)} other bytes were kept instead of {len(fault.whole)}")
        verdict.expect(image.mime_type == fault.mime_type, f"the type became {image.mime_type}")
        verdict.expect(image.size_bytes == len(fault.whole), f"the size became {image.size_bytes}")
        verdict.expect(image.sha256 == hashlib.sha256(fault.whole).hexdigest(), "the hash is wrong")
        verdict.expect(image.read() == fault.whole, "read() gives other bytes")
        verdict.expect(
            Path(image.path).parent.resolve() == folder.resolve(), f"saved outside of the folder: {image.path}"
        )
        suffix = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}[fault.mime_type]
        verdict.expect(
            Path(image.path).suffix in (suffix, suffix.replace("jpg", "jpeg")), f"the name became {image.path}"
        )
    verdict.expect(len(kept) == 1, f"files left: {kept}")
    return verdict


def check_time(verdict: Verdict, timeout: float, least: float, within: float | None, slack: float) -> None:
    usual = USUAL_SECONDS if timeout == AMPLE else timeout
    most = (usual if within is None else within) + slack
    verdict.expect(verdict.seconds <= most, f"{verdict.seconds:.2f} s instead of at most {most:.2f}")
    verdict.expect(verdict.seconds >= least, f"{verdict.seconds:.2f} s instead of at least {least:.2f}")


def check_wire(verdict: Verdict, server: FaultServer) -> None:
    """The key is in one header of a POST and nowhere else; a GET carries neither key nor cookie."""
    for method, head in list(server.heads):
        lines = head.decode("latin-1").split("\r\n")
        names = [line.partition(":")[0].lower() for line in lines[1:]]
        if method == "POST":
            verdict.expect(lines.count(f"Authorization: Bearer {KEY}") == 1, "a POST without the key")
            verdict.expect(head.count(SECRET.encode()) == KEY.count(SECRET), "a POST with the key in another place")
        else:
            verdict.expect(SECRET.encode() not in head, "a GET with the key")
            verdict.expect("authorization" not in names, "a GET with an Authorization header")
        verdict.expect("cookie" not in names, f"a {method} with a cookie")
    for request in list(server.requests):
        verdict.expect(SECRET.encode() not in request.body, "a body with the key")


def check_value(verdict: Verdict, value: Any, log: KeyWatch) -> None:
    verdict.expect(not log.leaks, f"the key was logged by {set(log.leaks)}")
    verdict.problems += error_problems(value) if isinstance(value, BaseException) else result_problems(value)


def error_problems(exc: BaseException) -> list[str]:
    """What is wrong with an exception that reached the caller."""
    from langchain_cogview.errors import CogViewError

    if not isinstance(exc, CogViewError):
        return [f"a foreign exception: {exc!r:.300}"]
    problems = []
    text, shown, detail = str(exc), exc.text_for_model, exc.detail or ""
    for what, string, limit in (("str", text, 1000), ("text_for_model", shown, 500), ("detail", detail, 200)):
        if len(string) > limit:
            problems.append(f"{what} has {len(string)} characters")
        if not string.isprintable():
            problems.append(f"{what} is not printable: {string!r:.200}")
    if SERVER_WORDS in shown:
        problems.append("text_for_model has the server's words")
    problems += [f"{what} has the key" for what, string in _shown(exc) if SECRET in string]
    try:
        packed = pickle.dumps(exc)
        again = pickle.loads(packed)
    except Exception as failure:
        problems.append(f"not picklable: {failure!r:.200}")
    else:
        if SECRET.encode() in packed:
            problems.append("its pickle has the key")
        if (type(again), str(again), again.text_for_model) != (type(exc), text, shown):
            problems.append(f"another after pickling: {again!r:.200}")
    return problems


def _shown(exc: BaseException) -> Iterator[tuple[str, str]]:
    """Every text in which an exception shows itself, with those behind it, and the locals of this package's frames."""
    seen: dict[int, BaseException] = {}
    chain = [exc]
    while chain:
        one = chain.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        yield f"str of {type(one).__name__}", str(one)
        yield f"repr of {type(one).__name__}", repr(one)
        yield f"args of {type(one).__name__}", repr(one.args)
        yield f"notes of {type(one).__name__}", repr(getattr(one, "__notes__", ()))
        chain += [other for other in (one.__cause__, one.__context__) if other is not None]
        chain += list(getattr(one, "exceptions", ()))
    for one in seen.values():
        for frame, line in traceback.walk_tb(one.__traceback__):
            code = frame.f_code
            if f"{os.sep}langchain_cogview{os.sep}" in code.co_filename:
                for name, value in frame.f_locals.items():
                    yield f"local {name} of {code.co_name} ({Path(code.co_filename).name}:{line})", _repr(value)


def _repr(value: Any) -> str:
    """As a traceback with locals shows it; an object that is only half made may fail to."""
    try:
        return repr(value)
    except Exception:
        return ""


def sound_address(url: Any) -> bool:
    """Whether somebody could open it in a browser, or show it, without harm."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        url.encode()
    except (ValueError, TypeError, AttributeError):
        return False
    if parts.scheme.lower() in ("ftp", "file"):
        return url.isprintable()
    return (
        parts.scheme.lower() in ("http", "https")
        and bool(host and host.strip())
        and url.isprintable()
        and url == url.strip()
    )


def result_problems(result: Any) -> list[str]:
    """What is wrong with a result that reached the caller."""
    from langchain_cogview import ContentFilter, ImageResult

    if not isinstance(result, ImageResult):
        return [f"rubbish instead of a result: {result!r:.200}"]
    problems = []
    if not result.images:
        problems.append("a result without images")
    problems += [
        f"a result with an address that is none: {image.url!r:.100}"
        for image in result.images
        if not sound_address(image.url) and not (image.url is None and image.read())
    ]
    texts = [("request id", result.request_id or "", 200)]
    texts += [("warning", warning, 1000) for warning in result.warnings]
    texts += [("warning of an image", warning, 1000) for image in result.images for warning in image.warnings]
    for entry in result.content_filter:
        if not isinstance(entry, ContentFilter) or isinstance(entry.level, bool):
            problems.append(f"a filter entry that is none: {entry!r:.100}")
        else:
            texts.append(("role", entry.role or "", 200))
    for what, text, limit in texts:
        if len(text) > limit or not text.isprintable():
            problems.append(f"{what} is long or not printable: {text!r:.200}")
        if SECRET in text:
            problems.append(f"{what} has the key")
    if SECRET in repr(result) or SECRET in str(result):
        problems.append("the result shows the key")
    for warning in [*result.warnings, *(warning for image in result.images for warning in image.warnings)]:
        if SERVER_WORDS in warning:
            problems.append("a warning has the server's words")
    try:
        json.dumps(json.loads(result.model_dump_json()), allow_nan=False)
    except Exception as failure:
        problems.append(f"no plain JSON: {failure!r:.200}")
    return problems
