"""What comes over a connection means what h11 says that it means, whichever of the two reads it; requests are written alike."""

from itertools import pairwise

import h11
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_cogview.api import http1
from langchain_cogview.api.http1 import Conversation
from langchain_cogview.plain import PlainRequest


def _request(method="POST", **headers):
    return PlainRequest(
        method,
        httpx.URL("http://api.invalid:8080/v4/images?x=1 2"),
        headers={"Authorization": "Bearer key", **headers},
        content=b'{"prompt": "\xe7\x8c\xab"}',
        extensions={},
    )


def test_a_request_is_written_as_h11_writes_it():
    request, h11_connection = _request(), h11.Connection(h11.CLIENT)
    event = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
    parts = [h11_connection.send(each) for each in (event, h11.Data(data=request.content), h11.EndOfMessage())]
    assert Conversation().request(request) == b"".join(parts)


@pytest.mark.parametrize("text", ["a\r\nX-Other: b", "a\nb", "a\rb", "a\0b"])
def test_a_header_that_would_become_two_is_refused(text):
    with pytest.raises(httpx.LocalProtocolError):
        Conversation().request(_request(**{"User-Agent": text}))


def read(conversation, pieces, method="POST"):
    """What a reader makes of the pieces of a reply: all that a transport asks for, or the error."""
    conversation.request(_request(method))
    pieces = [*pieces, b""]
    try:
        while (head := conversation.head()) is None:
            conversation.received(pieces.pop(0))
        body = []
        while (chunk := conversation.chunk()) != b"":
            body.append(chunk) if chunk else conversation.received(pieces.pop(0))
    except httpx.RemoteProtocolError as error:
        return "disconnected" if "disconnected" in str(error).lower() else "broken"
    # What comes later is told by the connection that is readable while idle.
    return head, b"".join(body), conversation.renewed()


def by_h11(pieces, method="POST"):
    conversation = Conversation()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http1._SizedReply, "of", lambda method, data: None)
        return read(conversation, pieces, method)


STATUS, LENGTH = b"HTTP/1.1 200 OK", b"Content-Length: 3"
STATUSES = [
    STATUS,
    b"HTTP/1.1 200",
    b"HTTP/1.1 200 ",
    b"HTTP/1.1 400 \xe4\xbd\xa0",
    b"HTTP/1.1 599 No",
    b"HTTP/1.1 600 No",
    b"HTTP/1.1 100 Continue",
    b"HTTP/1.1 101 Switching",
    b"HTTP/1.1 204 No Content",
    b"HTTP/1.1 304 Not Modified",
    b"HTTP/1.0 200 OK",
    b"HTTP/2.0 200 OK",
    b"HTTP/1.1  200 OK",
    b"HTTP/1.1 20 OK",
    b"HTTP/1.1 200 O\0K",
    b"http/1.1 200 OK",
    b"",
]
LENGTHS = [
    LENGTH,
    b"content-length:3",
    b"Content-Length: 3 ",
    b"Content-Length: 03",
    b"Content-Length: 0",
    b"Content-Length: 2",
    b"Content-Length: 4",
    b"Content-Length: -3",
    b"Content-Length: +3",
    b"Content-Length: 3, 3",
    b"Content-Length: 3\r\nContent-Length: 3",
    b"Content-Length: 3\r\nContent-Length: 4",
    b"Content-Length: 3x",
    b"Content-Length: \xb3",
    b"Content-Length:",
    b"Content-Length: " + b"9" * 40,
    b"X-No: length",
]
LINES = [
    b"Server: nginx",
    b"Connection: keep-alive",
    b"Connection: Keep-Alive",
    b"Connection: close",
    b"Connection: keep-alive, close",
    b"Transfer-Encoding: chunked",
    b"transfer-encoding: gzip",
    b"Upgrade: h2c",
    b"Set-Cookie: a=1\r\nSet-Cookie: b=2",
    b"X-Empty:",
    b"X-Latin: caf\xe9 \x01",
    b"X-Nul: \0",
    b"X-Feed: a\x0bb",
    b"X-Return: a\rb",
    b"X-Folded: a\r\n folded",
    b"X-Space : a",
    b": nameless",
    b"no colon",
    b"X-\xe9: a",
]
BODIES = [b"", b"ab", b"abc", b"abcd", b"3\r\nabc\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"]


def whole(status=STATUS, lines=(), length=LENGTH, end=b"\r\n"):
    return end.join([status, *lines, length, b"", b""])


@pytest.mark.parametrize("method", ["POST", "GET", "HEAD"])
@pytest.mark.parametrize(
    "head",
    [
        whole(end=b"\n"),
        *(whole(status=status) for status in STATUSES),
        *(whole(length=length) for length in LENGTHS),
        *(whole(lines=[line]) for line in LINES),
    ],
    ids=repr,
)
def test_what_is_odd_is_read_as_h11_reads_it(head, method):
    for body in BODIES:
        for pieces in (
            [head + body],
            [head, body],
            [head + body[:1], body[1:2], body[2:]],
            [head[:-1], head[-1:] + body],
        ):
            pieces = [piece for piece in pieces if piece]
            assert read(Conversation(), pieces, method) == by_h11(pieces, method), pieces


@given(
    head=st.builds(
        whole,
        st.one_of(st.just(STATUS), st.sampled_from(STATUSES)),
        st.lists(st.sampled_from(LINES), max_size=3),
        st.one_of(st.just(LENGTH), st.sampled_from(LENGTHS)),
    ),
    body=st.sampled_from(BODIES),
    cuts=st.one_of(st.just([]), st.lists(st.integers(0, 200), max_size=3)),
)
def test_whatever_comes_is_read_as_h11_reads_it(head, body, cuts):
    places = [0, *sorted(min(cut, len(head + body)) for cut in cuts), len(head + body)]
    pieces = [piece for start, stop in pairwise(places) if (piece := (head + body)[start:stop])]
    assert read(Conversation(), pieces) == by_h11(pieces)


def test_the_usual_reply_is_read_without_h11(monkeypatch):
    monkeypatch.setattr(http1, "_AnyReply", None)
    whole = b"HTTP/1.1 200 OK\r\nServer: nginx\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nabc"
    conversation = Conversation()
    for pieces in ([whole], [whole[:-2], whole[-2:-1], whole[-1:]]):
        (status, fields), body, again = read(conversation, pieces)
        assert (status, body, again) == (200, b"abc", True)
        assert fields == [(b"Server", b"nginx"), (b"Connection", b"keep-alive"), (b"Content-Length", b"3")]


@pytest.mark.parametrize("behind", [[b"abcX"], [b"ab", b"cX"]], ids=["at once", "across"])
def test_a_connection_with_something_behind_its_reply_is_not_used_again(behind):
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"
    _, body, again = read(Conversation(), [head + behind[0], *behind[1:]])
    assert body == b"abc"
    assert not again


def test_a_reply_that_is_left_unread_ends_its_connection():
    conversation = Conversation()
    conversation.request(_request())
    conversation.received(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab")
    assert conversation.head()
    assert conversation.chunk() == b"ab"
    assert not conversation.renewed()
    assert not Conversation().renewed()


@pytest.mark.parametrize("came", [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_an_end_before_the_reply_is_a_connection_that_broke(came):
    conversation = Conversation()
    conversation.request(_request())
    if came:
        conversation.received(came)
    assert conversation.head() is None
    with pytest.raises(httpx.RemoteProtocolError, match="disconnected"):
        conversation.received(b"")


def test_a_reply_cut_short_tells_how_much_came():
    conversation = Conversation()
    conversation.request(_request())
    conversation.received(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab")
    assert conversation.chunk() == b"ab"
    with pytest.raises(httpx.RemoteProtocolError, match="after 2 of 3 bytes"):
        conversation.received(b"")


SLOW = [
    (b"X-A:" + b" " * 60_000 + b"\0\r\nContent-Length: 3\r\n\r\nabc", True),
    (b"X-A:" + b" " * 60_000, True),
    (b"X-A:" + b"\t" * 60_000 + b"\r\r\n\r\n", True),
    (b"X: a\r\n" * 8_000 + b"\0", True),
    (b"a" * 60_000, True),
    (b"Transfer-Encoding: chunked\r\n\r\n5;" + b" " * 60_000 + b"\n\r\n", True),
    (b"Transfer-Encoding: chunked\r\n\r\nfffff\r\n" + b" " * 0xFFFFF + b"\r\n0\r\n\r\n", False),
]


@pytest.mark.parametrize("size", [2**16, 100, 2**20], ids="{} bytes at once".format)
@pytest.mark.parametrize(("sent", "broken"), SLOW, ids=["blanks", "endless", "tabs", "lines", "name", "chunk", "body"])
def test_what_is_made_to_be_read_slowly_is_not(sent, broken, size):
    # Without a bound each of the first and the fifth takes half a minute and more.
    sent = b"HTTP/1.1 200 OK\r\n" + sent
    got = read(Conversation(), [sent[start : start + size] for start in range(0, len(sent), size)])
    assert isinstance(got, str) == broken


def test_a_head_with_many_blanks_in_a_row_is_not_given_to_h11():
    conversation = Conversation()
    conversation.request(_request())
    conversation.received(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX: a" + b" " * 150)
    assert conversation.head() is None
    conversation.received(b" " * 150 + b"b\r\n\r\n")
    with pytest.raises(httpx.RemoteProtocolError, match="blanks"):
        conversation.head()


def test_a_chunk_with_too_much_before_it_is_not_given_to_h11():
    conversation = Conversation()
    conversation.request(_request())
    conversation.received(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;" + b" " * 10_000 + b"\n\r\n")
    assert conversation.head()
    with pytest.raises(httpx.RemoteProtocolError, match="between two chunks"):
        conversation.chunk()


def test_blanks_in_a_body_are_a_body():
    sent = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2000\r\n" + b" " * 0x2000 + b"\r\n0\r\n\r\n"
    for size in (len(sent), 300, 7):
        assert read(Conversation(), [sent[n : n + size] for n in range(0, len(sent), size)])[1:] == (
            b" " * 0x2000,
            True,
        )


@pytest.mark.parametrize("size", [7_000, 50_000])
def test_a_large_head_is_read_however_it_comes(size):
    head = b"HTTP/1.1 200 OK\r\nX: " + b"b" * size + b"\r\nContent-Length: 3\r\n\r\n"
    got = read(Conversation(), [head + b"abc"])
    assert got == read(Conversation(), [head[:5_000], head[5_000:], b"abc"])
    assert got[1:] == (b"abc", True)


def test_a_head_without_end_is_refused():
    assert read(Conversation(), [b"HTTP/1.1 200 OK\r\nX: ", *[b"b" * 10_000] * 20]) == "broken"


def test_what_h11_was_not_given_yet_is_behind_the_reply_too():
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"fa0\r\n" + b"a" * 0xFA0 + b"\r\n0\r\n"
    exact = head + body + b"X: %s\r\n\r\n" % (b"y" * (http1._PIECE_BYTES - len(head + body) - 7))
    assert len(exact) == http1._PIECE_BYTES
    assert read(Conversation(), [exact])[2]
    assert not read(Conversation(), [exact + b"X"])[2]
