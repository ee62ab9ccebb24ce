"""The key is in the request's header and nowhere else."""

import asyncio
import base64
import copy
import functools
import html
import json
import logging
import pickle
import re
import traceback
from urllib.parse import unquote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.load import dumpd, dumps
from langchain_core.runnables import ConfigurableField
from langchain_core.tracers.base import BaseTracer
from pydantic import SecretStr

from langchain_cogview import CogViewAuthenticationError, CogViewError, CogViewImageGenerator, CogViewImageTool
from langchain_cogview.api.redaction import redactor
from tests.conftest import FAKE_KEY

keys = st.from_regex(r"[0-9a-f]{32}\.[A-Za-z0-9]{16}", fullmatch=True)


@given(keys, st.sampled_from([CogViewImageGenerator, CogViewImageTool]))
def test_no_form_of_an_object_shows_its_key(key, make):
    made = make(api_key=key)
    for item in (made, copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        forms = (
            repr(item),
            str(item),
            dumps(item),
            json.dumps(dumpd(item), default=str),
            str(item.model_dump()),
            str(pickle.dumps(item)),
        )
        assert all(key not in form and key.split(".")[1] not in form for form in forms)


class Tracer(BaseTracer):
    def __init__(self):
        super().__init__()
        self.kept = []

    def _persist_run(self, run):
        self.kept.append(run.model_dump_json() if hasattr(run, "model_dump_json") else str(run.dict()))


KEY = "0123456789abcdef0123456789abcdef.secretSECRET0123"


def echoing(request):
    """A gateway that repeats what it was sent."""
    return httpx.Response(
        502, headers={"x-was": request.headers["authorization"]}, text=f"You sent {request.headers['authorization']}"
    )


@pytest.mark.parametrize("how", ["invoke", "ainvoke"])
def test_no_trace_log_or_traceback_of_a_call_shows_the_key(how, caplog):
    caplog.set_level(logging.DEBUG)
    tracer = Tracer()
    client, aclient = (
        httpx.Client(transport=httpx.MockTransport(echoing)),
        httpx.AsyncClient(transport=httpx.MockTransport(echoing)),
    )
    # As LangChain's users pass a key for one call: it leaves exactly this name out of a trace.
    chain = CogViewImageGenerator(
        api_key="unused.unused", http_client=client, http_async_client=aclient
    ).configurable_fields(api_key=ConfigurableField(id="api_key"))
    config = {"configurable": {"api_key": KEY}, "callbacks": [tracer]}
    with pytest.raises(CogViewError) as caught:
        chain.invoke("x", config) if how == "invoke" else asyncio.run(chain.ainvoke("x", config))
    client.close()
    asyncio.run(aclient.aclose())
    error = caught.value
    shown = [str(error), repr(error), str(error.__dict__), str(pickle.dumps(error)), caplog.text, *tracer.kept]
    link = error
    while link is not None:
        frames = traceback.TracebackException.from_exception(link, capture_locals=True).stack
        shown += [str(frame.locals) for frame in frames if "langchain_cogview" in frame.filename]
        link = link.__cause__ or link.__context__
    assert tracer.kept
    assert not [text[max(0, text.index("secretSECRET") - 300) :][:400] for text in shown if "secretSECRET0123" in text]


def answer(status, body):
    client = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(status, content=body)))
    return CogViewImageGenerator(api_key=KEY, http_client=client, download=False), client


def test_an_escaped_key_is_a_key_too():
    escaped = "".join(f"\\u{ord(c):04x}" for c in KEY)
    generator, client = answer(400, f'{{"error":{{"code":"1214","message":"You sent {escaped}"}}}}'.encode())
    with client, pytest.raises(CogViewError) as caught:
        generator.invoke("x")
    assert "You sent [key]" in str(caught.value)
    assert "secretSECRET" not in str(pickle.dumps(caught.value))


def test_a_link_with_the_keys_id_in_its_path_stays_whole():
    link = f"https://sfile.chatglm.cn/{KEY.split('.', maxsplit=1)[0]}/a.png"
    generator, client = answer(200, json.dumps({"data": [{"url": link}]}).encode())
    with client:
        assert generator.invoke("x").url == link


def test_storage_options_appear_in_no_form_of_generator_result_or_artifact(sandbox):
    options = {"token": "storage-secret-1234"}
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir="memory://images", storage_options=options)
    result = generator.invoke("a kitten")
    assert result.uri.startswith("memory://images/")
    assert result.read().startswith(b"\x89PNG")
    forms = (
        repr(generator), dumps(generator), str(generator.model_dump()), repr(result), json.dumps(result.to_artifact()),
        str(pickle.dumps(result)), str(result.model_dump()),
    )  # fmt: skip
    assert all("storage-secret" not in form for form in forms)
    with pytest.raises(TypeError, match="storage_options"):
        pickle.dumps(generator)


# What a service or gateway repeats of the key


def spelled(form):
    """Each character of a text in its own form."""
    return lambda text: "".join(form(character) for character in text)


ECHOES = {
    "as it stands": lambda key: key,
    "upper case": str.upper,
    "its secret half": lambda key: key.rpartition(".")[2],
    "reversed": lambda key: key[::-1],
    "spaced": " ".join,
    "dashed": "-".join,
    "with invisible characters": "\u200b".join,
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "base64 without its end": lambda key: base64.b64encode(key.encode()).decode().rstrip("="),
    "base64 of the header": lambda key: base64.b64encode(f"Bearer {key}".encode()).decode(),
    "base64 of a login": lambda key: base64.b64encode(f":{key}:".encode()).decode(),
    "base64 for URLs, in lines": lambda key: base64.encodebytes(f"???{key}???".encode() * 3).decode().replace("/", "_"),
    "hexadecimal": lambda key: key.encode().hex(),
    "hexadecimal with colons": lambda key: key.encode().hex(":").upper(),
    "hexadecimal numbers": lambda key: ", ".join(map(hex, key.encode())),
    "percent": spelled(lambda c: f"%{ord(c):02X}"),
    "percent twice": spelled(lambda c: f"%25{ord(c):02x}"),
    "\\u": spelled(lambda c: f"\\u{ord(c):04x}"),
    "\\\\u": spelled(lambda c: f"\\\\u{ord(c):04X}"),
    "\\x": spelled(lambda c: f"\\x{ord(c):02x}"),
    "entities": spelled(lambda c: f"&#{ord(c)};"),
    "cut off": lambda key: key[:-2],
}
KEYS = {
    "usual": FAKE_KEY,
    "other": "q7-Zw_93.xY8kLmN4-pQ2rS6tU",
    "without a dot": "sk-pQ2rS6tUxY8kLmN4",
    "of three parts": "eyJhbGciOiJIUzI1.eyJhcGlfa2V5Ijoi.pQ2rS6tUxY8kLmN4",
    "short": "sk-1234",
    "short halves": "ab12.cd-34",
}
FRAMES = {
    "message": lambda echo: json.dumps({"error": {"code": "1214", "message": f"You sent {echo} here"}}),
    "message, as it stands": lambda echo: '{"error":{"code":"1214","message":"You sent %s here"}}' % echo,  # noqa: UP031
    "cut": lambda echo: f'{{"error":{{"code":"1214","message":"You sent {echo} he',
    "deep": lambda echo: f'{{"a":"{echo}", "b":{"[" * 100_000}',
    "page": lambda echo: f"<html><body>You sent {echo} here</body></html>",
    "number first": lambda echo: f'{{"error": "{echo}"}}',
    "envelope": lambda echo: json.dumps({"code": 500, "msg": f"{echo}", "success": False}),
}


@functools.cache
def needles(key):
    """Ten characters of the key in a row, in any of the forms above."""
    found = set()
    for name, form in ECHOES.items():
        needle = re.sub(r"[\W_]|0x", "", form(key), flags=re.ASCII).lower()
        needle = needle[
            {"base64 of the header": 10, "base64 of a login": 2, "base64 for URLs, in lines": 4}.get(name, 0) :
        ]
        found |= {needle[start : start + 10] for start in range(max(1, len(needle) - 9))}
    return found


def shows_key(text, key):
    """Whether a text has the key, or 8 characters of it in a row, in any of the forms above."""
    views = [text]
    for _ in range(3):
        views.append(html.unescape(unquote(re.sub(r"\\+(?:u00|x)([0-9a-fA-F]{2})", r"%\1", views[-1]))))
    for view in views:
        squeezed = re.sub(r"[\W_]|0x", "", view, flags=re.ASCII).lower()
        if any(needle in squeezed for needle in needles(key)):
            return True
    return False


@pytest.mark.parametrize("status", [200, 400, 401, 403, 503])
@pytest.mark.parametrize("key", [KEYS["usual"], KEYS["short"]])
@pytest.mark.parametrize("echo", ["as it stands", "\\u", "base64"])
def test_no_error_shows_a_key_that_the_service_repeats(status, key, echo):
    for frame in FRAMES.values():
        error = error_of(status, frame(ECHOES[echo](key)), key)
        assert not shows_key(f"{error} {error!r} {error.detail} {error.code} {pickle.dumps(error)!r}", key)


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
def test_no_form_of_a_key_that_is_repeated_stays(key, echo):
    if echo is ECHOES["cut off"] and len(key) < 12:
        return  # the beginning of a short key is a common word
    without = redactor(SecretStr(key))
    assert not shows_key(without.text(echo(key)), key)
    for frame in FRAMES.values():
        assert not shows_key(without.body(frame(echo(key)).encode()).decode(), key)
        assert without.body(frame("nothing").encode()) == frame("nothing").encode()


@given(st.text(max_size=60), st.text(max_size=60), st.sampled_from(sorted(KEYS)), st.sampled_from(sorted(ECHOES)))
def test_no_text_around_it_hides_a_key(before, after, key, echo):
    if KEYS[key] in (KEYS["short"], KEYS["short halves"]):
        before, after = f"{before} ", f" {after}"
    removed = redactor(SecretStr(KEYS[key])).text(f"{before}{ECHOES[echo](KEYS[key])}{after}")
    assert KEYS[key] not in removed and KEYS[key].rpartition(".")[2] not in removed


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_what_does_not_have_the_key_stays_as_it_is(body):
    assert redactor(SecretStr(FAKE_KEY)).body(body) == body


def test_words_and_links_that_look_like_a_short_key_stay():
    short = redactor(SecretStr("sk-1234"))
    for text in ("ask-1234", "sk-12345", "https://cdn.example/sk-1234/a.png", "order 1234"):
        assert short.text(text) == text
    assert short.text("the key 'sk-1234' is wrong") == "the key '[key]' is wrong"
    assert redactor(SecretStr("any")).text("any key will do") == "any key will do"


def test_nothing_of_what_the_service_says_of_a_wrong_key_is_shown():
    body = {"error": {"code": "401", "message": "You sent TURkeGhPV1U9 (rot13 of rot47)"}, "msg": "TURkeGhPV1U9"}
    for status in (401, 400):
        error = error_of(status, json.dumps(body))
        assert (type(error), error.code, error.detail) == (CogViewAuthenticationError, "401", None)
        assert "TURk" not in f"{error} {error.__dict__}"
    assert error_of(401, '{"error":{"code":"TURkeGhPV1U9","message":"x"}}').code is None
    assert error_of(401, '{"error":{"code":"invalid_api_key","message":"x"}}').code == "invalid_api_key"
    assert error_of(401, "TURkeGhPV1U9").detail is None
    for code in ("1214", "1302", "1234", "9999"):
        assert error_of(401, json.dumps({"error": {"code": code, "message": "TURkeGhPV1U9"}})).detail is None


def test_a_reply_of_a_megabyte_is_searched_in_time_and_memory():
    key = redactor(SecretStr(FAKE_KEY))
    for body in (b"%41" * 333_333, FAKE_KEY[:8].encode() * 125_000, (b"0" + b" " * 99) * 10_000 + b"01234567"):
        assert len(key.body(body)) <= len(body)


def error_of(status, body, key=FAKE_KEY):
    # No time limit allows such a wait: what says that too many requests are in flight is not sent again.
    reply = {"status_code": status, "content": body.encode(), "headers": {"Retry-After": "3600"}}
    transport = httpx.MockTransport(lambda request: httpx.Response(**reply))
    with httpx.Client(transport=transport) as client:
        generator = CogViewImageGenerator(api_key=key, http_client=client, max_retries=0, download=False)
        with pytest.raises(CogViewError) as caught:
            generator.invoke("x")
    return caught.value
