"""Replies that come late, broken or from nowhere, and services that cannot be reached."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable
from threading import Event
from typing import Final

import trustme

from tests.faults.reply_table import (
    AMPLE,
    AT_ONCE,
    CONFIGURATION,
    CONNECTION,
    GOOD_BODY,
    INVALID,
    RATE,
    RESULT,
    SHORT,
    TIMEOUT,
    UNKNOWN,
    UNSURE,
    WAITED_FOR,
    add,
    error,
    raw,
    reply_fault,
    says,
)
from tests.faults.server import PREFIX, Connection, Fault, FaultServer, Request, at, success

# Transport: closed, reset, silent, slow.


@at("connect")
def closes_at_once(connection: Connection, request: Request) -> None:
    """Say goodbye before the request is read."""


@at("connect")
def resets_at_once(connection: Connection, request: Request) -> None:
    """Reset before the request is read, but after it was sent: a reset that overtakes the connect is another fault."""
    connection.sock.recv(1, socket.MSG_PEEK)
    connection.reset()


@at("connect")
def never_reads(connection: Connection, request: Request) -> None:
    """Accept and do nothing."""
    connection.server.closing.wait(AMPLE)


add("closed before the request was read", closes_at_once, *UNSURE, posts=0)
add("reset before the request was read", resets_at_once, *UNSURE, posts=0)
add("accepted and never read", never_reads, UNKNOWN, posts=0, timeout=SHORT)
add("closed after the request's head", at("head")(lambda connection, _: None), *UNSURE, posts=0)
add("reset after the request's head", at("head")(lambda connection, _: connection.reset()), *UNSURE, posts=0)
add("closed instead of a reply", lambda connection, _: None, *UNSURE)
add("reset instead of a reply", lambda connection, _: connection.reset(), *UNSURE)
add("no answer", lambda connection, _: connection.hang(), UNKNOWN, timeout=SHORT, least=SHORT - 0.1)
for _what, _part in (
    ("in the status line", b"HTTP/1.1 20"),
    ("in the head", b"HTTP/1.1 200 OK\r\nContent-Ty"),
    ("after the head", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"),
    ("in the body", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + GOOD_BODY[:20]),
    ("in a chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n" + GOOD_BODY[:20]),
):
    add(f"closed {_what}", raw(_part), *UNSURE)
    add(f"reset {_what}", raw(_part, then="reset"), *UNSURE)
    add(f"silent {_what}", raw(_part, then="hang"), *UNSURE, timeout=SHORT)
add("closed in the body of a 400", raw(b"HTTP/1.1 400 No\r\nContent-Length: 500\r\n\r\n{"), INVALID, *UNSURE)
add(
    "silent in the body of a 400",
    raw(b"HTTP/1.1 400 No\r\nContent-Length: 500\r\n\r\n{", then="hang"),
    INVALID,
    *UNSURE,
    timeout=SHORT,
)


@reply_fault("an answer later than the limit", UNKNOWN, timeout=SHORT, least=SHORT - 0.1)
def _(connection: Connection, request: Request) -> None:
    if not connection.server.closing.wait(AMPLE):
        success(connection, request)


@reply_fault("a head byte by byte", UNKNOWN, timeout=SHORT, least=SHORT - 0.1)
def _(connection: Connection, request: Request) -> None:
    connection.dribble(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + b"X-Slow: 1\r\n" * 500)


@reply_fault("a body byte by byte", UNKNOWN, timeout=SHORT, least=SHORT - 0.1)
def _(connection: Connection, request: Request) -> None:
    connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    connection.dribble(b" " * 100_000)


@reply_fault("chunks of one byte", UNKNOWN, timeout=SHORT, least=SHORT - 0.1)
def _(connection: Connection, request: Request) -> None:
    connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not connection.server.closing.wait(0.05):
        connection.send(b"1\r\n \r\n")


@reply_fault("a good reply byte by byte, in time", RESULT)
def _(connection: Connection, request: Request) -> None:
    body = json.dumps({"data": [{"url": connection.server.image_url}]}).encode()
    connection.dribble(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body, 0.002)


@reply_fault("the body of a 429 byte by byte", RATE, *UNSURE, timeout=SHORT)
def _(connection: Connection, request: Request) -> None:
    connection.send(b"HTTP/1.1 429 Slow\r\nRetry-After: 0\r\nContent-Length: 100000\r\n\r\n")
    connection.dribble(b" " * 100_000)


# Lengths that lie, chunks that break, heads that are none.


def framed(*headers: str, body: bytes = GOOD_BODY, then: str = "close", first: str = "HTTP/1.1 200 OK") -> Fault:
    """A head as given, the body behind it."""
    return raw("\r\n".join((first, *headers)).encode("latin-1") + b"\r\n\r\n", body, then=then)


add("a length too long, then closed", framed("Content-Length: 9999"), *UNSURE, RESULT)
add("a length too long, then silent", framed("Content-Length: 9999", then="hang"), *UNSURE, RESULT, timeout=SHORT)
add("a length too short", framed("Content-Length: 20"), *UNSURE)
add("a length of 0 before a body", framed("Content-Length: 0"), *UNSURE)
add("a negative length", framed("Content-Length: -5"), *UNSURE, RESULT)
add("a length in words", framed("Content-Length: many"), *UNSURE, RESULT)
add("a length of 10,000 digits", framed("Content-Length: " + "9" * 10_000), *UNSURE, RESULT)
add("a length beyond all memory", framed("Content-Length: " + "9" * 18), *UNSURE, RESULT)
add("two lengths that differ", framed("Content-Length: 20", "Content-Length: 60"), *UNSURE, RESULT)
add("two lengths in one line", framed("Content-Length: 20, 60"), *UNSURE, RESULT)
add("no length, then closed", framed("Content-Type: application/json"), RESULT)
add("HTTP/1.0", framed(first="HTTP/1.0 200 OK"), RESULT)
add("no reason", framed(first="HTTP/1.1 200"), RESULT)
add("a reason of 10,000 letters", framed(first="HTTP/1.1 200 " + "o" * 10_000), RESULT, *UNSURE)
_CHUNKED: Final = "Transfer-Encoding: chunked"
_WHOLE: Final = b'{"data":[{"url":"https://images.invalid/x.png"}]}'
_CHUNK: Final = b"%x\r\n%s\r\n" % (len(_WHOLE), _WHOLE)
add("good chunks", framed(_CHUNKED, body=_CHUNK + b"0\r\n\r\n"), RESULT)
add("good chunks with a trailer", framed(_CHUNKED, body=_CHUNK + b"0\r\nX-Sum: 1\r\n\r\n"), RESULT)
add("chunks with extensions", framed(_CHUNKED, body=_CHUNK.replace(b"\r\n", b";a=b\r\n", 1) + b"0\r\n\r\n"), RESULT)
add("a chunk size that is no number", framed(_CHUNKED, body=b"zz\r\n" + _WHOLE), *UNSURE)
add("a negative chunk size", framed(_CHUNKED, body=b"-5\r\n" + _WHOLE), *UNSURE)
add("a chunk size of 30 digits", framed(_CHUNKED, body=b"f" * 30 + b"\r\n" + _WHOLE), *UNSURE)
add("a chunk size without end", framed(_CHUNKED, body=b"f" * 500_000), *UNSURE)
add("a chunk longer than it said", framed(_CHUNKED, body=b"5\r\n" + _WHOLE + b"\r\n0\r\n\r\n"), *UNSURE)
add("no last chunk, then closed", framed(_CHUNKED, body=_CHUNK), *UNSURE, RESULT)
add("no last chunk, then silent", framed(_CHUNKED, body=_CHUNK, then="hang"), *UNSURE, RESULT, timeout=SHORT)
add("a trailer without end", framed(_CHUNKED, body=_CHUNK + b"0\r\n" + b"X: 1\r\n" * 200_000), *UNSURE, RESULT)
add("chunks and a length", framed(_CHUNKED, "Content-Length: 5", body=_CHUNK + b"0\r\n\r\n"), *UNSURE, RESULT)
add("an unknown transfer encoding", framed("Transfer-Encoding: gzip, smoke"), *UNSURE, RESULT)
add(
    "a 103 before the reply",
    raw(b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\nHTTP/1.1 200 OK\r\n\r\n" + GOOD_BODY),
    RESULT,
)
add(
    "a thousand 100s before the reply",
    raw(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000 + b"HTTP/1.1 200 OK\r\n\r\n" + GOOD_BODY),
    RESULT,
    *UNSURE,
)


@reply_fault("100s without end", *UNSURE, timeout=SHORT)
def _(connection: Connection, request: Request) -> None:
    connection.flood(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)


@reply_fault("one 100 every moment", *UNSURE, timeout=SHORT)
def _(connection: Connection, request: Request) -> None:
    while not connection.server.closing.wait(0.02):
        connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")


for _what, _bytes in (
    ("nothing but a line end", b"\r\n\r\n"),
    ("an HTTP/0.9 page", b"<html>hello</html>"),
    ("an SSH banner", b"SSH-2.0-OpenSSH_9.6\r\n"),
    ("an HTTP/2 preface", b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + b"\x00" * 18),
    ("TLS where none was asked", b"\x15\x03\x01\x00\x02\x02\x46"),
    ("null bytes", b"\0" * 5000),
    ("every byte there is", bytes(range(256)) * 40),
    ("a status of letters", b"HTTP/1.1 abc OK\r\n\r\n"),
    ("a status of four digits", b"HTTP/1.1 2000 OK\r\n\r\n"),
    ("a header without colon", b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n" + GOOD_BODY),
    ("a header without name", b"HTTP/1.1 200 OK\r\n: x\r\n\r\n" + GOOD_BODY),
    ("a null byte in a header", b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n" + GOOD_BODY),
    ("a request instead of a reply", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
):
    add(f"a reply that is {_what}", raw(_bytes), *UNSURE)
add("a reply that calls itself HTTP/3.0", raw(b"HTTP/3.0 200 OK\r\n\r\n" + GOOD_BODY), RESULT, *UNSURE)
add("a folded header", raw(b"HTTP/1.1 200 OK\r\nX-Long: a\r\n b\r\n\r\n" + GOOD_BODY), RESULT, *UNSURE)
add("line ends without CR", raw(b"HTTP/1.1 200 OK\nX: 1\n\n" + GOOD_BODY), RESULT, *UNSURE)
add(
    "a head of 1 MB in one line",
    raw(b"HTTP/1.1 200 OK\r\nX-Big: " + b"x" * 1_000_000 + b"\r\n\r\n" + GOOD_BODY),
    *UNSURE,
)
add(
    "a head of 50,000 lines",
    raw(b"HTTP/1.1 200 OK\r\n" + b"X-Many: 1234567\r\n" * 50_000 + b"\r\n" + GOOD_BODY),
    *UNSURE,
)


@reply_fault("a head without end", *UNSURE, timeout=SHORT)
def _(connection: Connection, request: Request) -> None:
    connection.send(b"HTTP/1.1 200 OK\r\nX-Big: ")
    connection.flood(b"x" * 65536)


# Redirects: never followed, wherever they lead.


def redirects(where: Callable[[FaultServer], str], status: int) -> Fault:
    def fault(connection: Connection, request: Request) -> None:
        connection.reply(status, b"", f"Location: {where(connection.server)}")

    return fault


for _status in (301, 302, 303, 307, 308):
    add(f"{_status} to another host", redirects(lambda server: server.canary.url + "/x", _status), CONFIGURATION)
for _what, _where in (
    ("to itself", lambda server: server.base_url + "/images/generations"),
    ("to a file", lambda server: "file:///etc/passwd"),
    ("to a metadata address", lambda server: "http://169.254.169.254/latest/meta-data"),
    ("to a private address", lambda server: "http://10.0.0.1/"),
    ("to nowhere", lambda server: ""),
    ("to rubbish", lambda server: "http://[::bad\x7f"),
    ("to 50,000 letters", lambda server: "http://x.invalid/" + "x" * 50_000),
):
    add(f"307 {_what}", redirects(_where, 307), CONFIGURATION)
add("307 with an error of known code", says(error("1302"), 307, AT_ONCE), RATE, CONFIGURATION, **WAITED_FOR)

# No way to the service at all.


def refused_port(server: FaultServer) -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}{PREFIX}"


def no_such_name(host: str) -> list[str]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def no_resolver(host: str) -> list[str]:
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


class HangingResolver:
    """A look-up that does not come back until it is let go."""

    def __init__(self) -> None:
        self.let_go = Event()

    def __call__(self, host: str) -> list[str]:
        self.let_go.wait(AMPLE)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


add("refused port", None, CONNECTION, posts=0, base_url=refused_port, timeout=SHORT)
add(
    "unresolved name",
    None,
    CONNECTION,
    posts=0,
    base_url=lambda _: "https://name.invalid/v4",
    resolve=no_such_name,
    timeout=SHORT,
)
add(
    "no resolver",
    None,
    CONNECTION,
    posts=0,
    base_url=lambda _: "https://name.invalid/v4",
    resolve=no_resolver,
    timeout=SHORT,
)
add(
    "unresolved name without TLS",
    None,
    CONNECTION,
    CONFIGURATION,
    posts=0,
    base_url=lambda _: "http://name.invalid/v4",
    resolve=no_such_name,
    timeout=SHORT,
)
add(
    "a name without any address",
    None,
    CONNECTION,
    posts=0,
    base_url=lambda _: "https://name.invalid/v4",
    resolve=lambda _: [],
    timeout=SHORT,
)
add(
    "hanging look-up",
    None,
    TIMEOUT,
    posts=0,
    base_url=lambda _: "https://name.invalid/v4",
    resolve=HangingResolver(),
    timeout=SHORT,
    least=SHORT - 0.1,
)


def over_tls(server: FaultServer) -> str:
    return f"https://127.0.0.1:{server.port}{PREFIX}"


def of_nobody() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    return context


@at("connect")
def speaks_plainly(connection: Connection, request: Request) -> None:
    """Answer a TLS greeting in plain HTTP."""
    connection.sock.recv(65536)
    connection.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


@at("connect")
def closes_after_greeting(connection: Connection, request: Request) -> None:
    """Close in the middle of the TLS handshake."""
    connection.sock.recv(65536)


@at("connect")
def resets_after_greeting(connection: Connection, request: Request) -> None:
    """Reset in the middle of the TLS handshake."""
    connection.sock.recv(65536)
    connection.reset()


for _what, _fault in (
    ("a plain server", speaks_plainly),
    ("a server that closes", closes_after_greeting),
    ("a server that resets", resets_after_greeting),
):
    add(f"TLS with {_what}", _fault, CONNECTION, posts=0, base_url=over_tls, timeout=SHORT)
add("TLS with a silent server", never_reads, TIMEOUT, posts=0, base_url=over_tls, timeout=SHORT, least=SHORT - 0.1)
add("TLS with a certificate of nobody", success, CONNECTION, posts=0, base_url=over_tls, tls=of_nobody, timeout=SHORT)
