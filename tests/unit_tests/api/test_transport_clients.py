"""Clients of the caller's, of httpx, httpx2 and openai, are used alike: same results, same errors, same phase."""

import asyncio
import socket

import httpx
import httpx2
import openai
import pytest

from langchain_cogview import CogViewImageGenerator, Sandbox
from langchain_cogview.errors import (
    CogViewAuthenticationError,
    CogViewBusyError,
    CogViewConnectionError,
    CogViewMalformedReplyError,
    CogViewOutcomeUnknownError,
)
from langchain_cogview.sandbox.server import SandboxServer
from tests.conftest import FAKE_KEY
from tests.faults.server import FaultServer

CLIENTS = {
    "httpx": (httpx.Client, httpx.AsyncClient),
    "httpx2": (httpx2.Client, httpx2.AsyncClient),
    "openai": (openai.DefaultHttpxClient, openai.DefaultAsyncHttpxClient),
}
clients = pytest.mark.parametrize("library", CLIENTS)
both = pytest.mark.parametrize("how", ["sync", "async"])


def outcome(base_url, library, how, prompt="a kitten", **settings):
    sync, asynchronous = CLIENTS[library]
    settings = {
        "api_key": FAKE_KEY,
        "base_url": base_url,
        "timeout": 5,
        "max_retries": 0,
        "download": False,
        **settings,
    }

    async def acall():
        async with asynchronous(trust_env=False) as client:
            (result,) = await asyncio.gather(
                CogViewImageGenerator(http_async_client=client, **settings).ainvoke(prompt), return_exceptions=True
            )
            assert not client.is_closed
        return result

    if how == "async":
        return asyncio.run(acall())
    with sync(trust_env=False) as client:
        try:
            result = CogViewImageGenerator(http_client=client, **settings).invoke(prompt)
        except Exception as error:
            result = error
        assert not client.is_closed
    return result


@clients
@both
def test_the_served_sandbox_is_reached_by_any_client(library, how):
    with SandboxServer(Sandbox()) as server:
        result = outcome(server.base_url, library, how)
        assert len(result.images) == 1
        refused = outcome(server.base_url, library, how, "[[busy]]")
        assert isinstance(refused, CogViewBusyError)


def closes(connection, request):
    pass


def hangs(connection, request):
    connection.hang()


def speaks_no_http(connection, request):
    connection.send(b"SSH-2.0-OpenSSH\r\n\r\n")


def refuses_the_key(connection, request):
    connection.json({"error": {"code": "1002", "message": "no"}}, 401)


def compressed_rubbish(connection, request):
    connection.reply(200, b"not gzip", "Content-Encoding: gzip")


@clients
@both
@pytest.mark.parametrize(
    ("fault", "kind", "settings"),
    [
        (closes, CogViewOutcomeUnknownError, {}),
        (hangs, CogViewOutcomeUnknownError, {"timeout": 0.4}),
        (speaks_no_http, CogViewMalformedReplyError, {}),
        (refuses_the_key, CogViewAuthenticationError, {}),
        (compressed_rubbish, CogViewMalformedReplyError, {}),
    ],
)
def test_what_goes_wrong_is_the_same_error_by_any_client(fault, kind, settings, library, how):
    with FaultServer(fault) as server:
        error = outcome(server.base_url, library, how, **settings)
        assert type(error) is kind
        assert server.posts == 1


@clients
@both
def test_a_request_that_was_not_sent_is_known_not_to_be(library, how):
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
    error = outcome(f"http://127.0.0.1:{port}", library, how)
    assert type(error) is CogViewConnectionError
    assert "nothing was sent" in str(error) or not error.may_have_been_charged


@clients
@both
def test_a_connection_that_hangs_is_known_to_have_sent_nothing(library, how):
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        error = outcome(f"http://127.0.0.1:{full.getsockname()[1]}", library, how, timeout=0.4)
    assert not error.may_have_been_charged


@both
def test_other_things_than_clients_are_refused_by_their_full_name(how):
    name = "http_client" if how == "sync" else "http_async_client"
    for value in (
        openai.OpenAI(api_key="x"),
        object(),
        httpx2.Client,
        (httpx2.AsyncClient if how == "sync" else httpx2.Client)(),
    ):
        with pytest.raises(ValueError, match=r"takes an httpx\.\w+ or httpx2\.\w+; this is of type \w+\.\w+"):
            CogViewImageGenerator(api_key=FAKE_KEY, **{name: value})
