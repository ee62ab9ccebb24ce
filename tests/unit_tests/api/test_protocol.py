"""Every recorded reply is read as the documentation of the endpoint says."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_cogview import ContentFilter, ImageRequest
from langchain_cogview import errors as e
from langchain_cogview.api.protocol import CODES, ImagesReply, ReplyContext, images_body, read_reply
from langchain_cogview.api.tasks import read_submitted, read_task
from langchain_cogview.errors import Outcome
from tests.conftest import FIXTURES


def recorded(name):
    return (FIXTURES / f"{name}.json").read_bytes()


def test_a_recorded_success_gives_url_and_time():
    reply = read_reply(200, recorded("seen-success-bigmodel-cogview-4"))
    assert reply.created == 1762240925
    assert reply.urls[0].startswith("https://maas-watermark-prod.cn-wlcb.ufileos.com/1762240933358_watermark.png?")
    assert reply.content_filter == ()


def test_a_recorded_international_success_gives_the_services_own_id():
    reply = read_reply(200, recorded("seen-success-zai-glm-image"))
    assert reply.response_id == "202601151228236805d575507d4570"
    assert reply.urls[0].startswith("https://mfile.z.ai/1768451374203-")


def test_a_success_with_filter_entries_shows_them():
    reply = read_reply(200, recorded("doc-success-with-content-filter"))
    assert reply.content_filter == (ContentFilter(role="assistant", level=1),)


@pytest.mark.parametrize(
    ("status", "name", "error", "outcome"),
    [
        (200, "seen-200-wrong-route", e.CogViewNotFoundError, Outcome.FINAL),
        (400, "seen-400-1211", e.CogViewNotFoundError, Outcome.FINAL),
        (400, "seen-400-1261", e.CogViewPromptTooLongError, Outcome.FINAL),
        (400, "seen-400-1301-content-filter", e.CogViewContentFilterError, Outcome.FINAL),
        (401, "seen-401-1000", e.CogViewAuthenticationError, Outcome.FINAL),
        (401, "seen-401-1001", e.CogViewAuthenticationError, Outcome.FINAL),
        (401, "seen-401-401", e.CogViewAuthenticationError, Outcome.FINAL),
        (429, "seen-429-1113-bigmodel", e.CogViewBalanceError, Outcome.FINAL),
        (429, "seen-429-1113-zai", e.CogViewBalanceError, Outcome.FINAL),
        (429, "seen-429-1302-bigmodel", e.CogViewRateLimitError, Outcome.NOT_RUN),
        (429, "seen-429-1302-zai", e.CogViewRateLimitError, Outcome.NOT_RUN),
        (429, "seen-429-1305", e.CogViewBusyError, Outcome.NOT_RUN),
        (404, "seen-404-cdn-not-yet", e.CogViewNotFoundError, Outcome.FINAL),
        (200, "doc-task-submitted", e.CogViewMalformedReplyError, Outcome.UNKNOWN),
    ],
)
def test_a_recorded_error_has_its_class_and_outcome(status, name, error, outcome):
    with pytest.raises(e.CogViewError) as caught:
        read_reply(status, recorded(name))
    assert type(caught.value) is error
    assert caught.value.outcome is outcome
    assert caught.value.status == status


def test_a_recorded_block_carries_its_entries():
    with pytest.raises(e.CogViewContentFilterError) as caught:
        read_reply(400, recorded("seen-400-1301-content-filter"))
    assert caught.value.content_filter == (ContentFilter(role="user", level=2),)
    assert caught.value.code == "1301"
    assert "prompt at level 2" in str(caught.value)


def test_a_success_without_url_but_with_entries_is_a_block():
    with pytest.raises(e.CogViewContentFilterError):
        read_reply(200, b'{"created":1,"data":[],"content_filter":[{"role":"assistant","level":0}]}')


def test_the_code_decides_before_the_status():
    for status in (200, 400, 429, 500, 503):
        with pytest.raises(e.CogViewBalanceError):
            read_reply(status, b'{"error":{"code":1113,"message":"x"}}')
        with pytest.raises(e.CogViewRateLimitError):
            read_reply(status, b'{"error":{"code":"1302"}}')


@pytest.mark.parametrize("code", [1304, *range(1308, 1312), *range(1313, 1322)])
def test_money_and_plan_codes_are_never_sent_again_though_answered_429(code):
    with pytest.raises(e.CogViewBalanceError) as caught:
        read_reply(429, json.dumps({"error": {"code": str(code)}}).encode())
    assert caught.value.outcome is Outcome.FINAL


@pytest.mark.parametrize("status", [500, 502, 504, 520, 599, 408])
@pytest.mark.parametrize("body", [b"", b"<html>", b'{"error":{"code":"9999","message":"x"}}'])
def test_a_server_error_of_unknown_code_is_an_unknown_outcome(status, body):
    with pytest.raises(e.CogViewOutcomeUnknownError) as caught:
        read_reply(status, body)
    assert not caught.value.is_retryable
    assert caught.value.may_have_been_charged


def test_unavailable_means_that_it_did_not_run():
    with pytest.raises(e.CogViewServerError) as caught:
        read_reply(503, b"<html>maintenance</html>")
    assert caught.value.outcome is Outcome.NOT_RUN
    with pytest.raises(e.CogViewOutcomeUnknownError):
        read_reply(503, b'{"error":{"code":"1234"}}')


ERRORS_WITHOUT_A_CODE = [
    {"error": {"message": "Handler dispatch failed"}},
    {"error": {"code": None, "message": "Handler dispatch failed", "type": "upstream_error"}},
    {"error": {"code": "9876", "message": "Handler dispatch failed"}},
    {"error": "Handler dispatch failed"},
    {"error": True, "message": "Handler dispatch failed"},
    {"errors": [{"message": "Handler dispatch failed"}]},
    {"message": "Handler dispatch failed"},
    {"msg": "Handler dispatch failed", "data": []},
    {"detail": "Handler dispatch failed"},
    {"detail": [{"loc": ["body"], "msg": "Handler dispatch failed"}]},
    {"success": False, "message": "Handler dispatch failed", "data": None},
    {"timestamp": 1, "status": 500, "error": "Handler dispatch failed", "path": "/api"},
]


@pytest.mark.parametrize("status", [200, 500, 502])
@pytest.mark.parametrize("body", ERRORS_WITHOUT_A_CODE, ids=json.dumps)
@pytest.mark.parametrize("read", [read_reply, read_task, read_submitted])
def test_an_error_without_a_known_code_is_the_services_and_shows_its_text(status, body, read):
    with pytest.raises(e.CogViewOutcomeUnknownError) as caught:
        read(status, json.dumps(body).encode())
    assert type(caught.value) is e.CogViewOutcomeUnknownError
    assert "reported an error" in caught.value.message
    assert "Handler dispatch failed" in str(caught.value)
    assert "Handler dispatch failed" not in caught.value.text_for_model


@pytest.mark.parametrize("body", ERRORS_WITHOUT_A_CODE, ids=json.dumps)
@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, e.CogViewInvalidRequestError), (401, e.CogViewAuthenticationError), (503, e.CogViewServerError)],
)
def test_an_error_without_a_known_code_is_judged_by_a_status_that_tells(status, body, kind):
    with pytest.raises(kind) as caught:
        read_reply(status, json.dumps(body).encode())
    assert ("Handler dispatch failed" in str(caught.value)) is (status != 401), (
        "of a refused key only the code is shown"
    )


def test_a_text_beside_an_image_or_an_accepted_task_is_no_error():
    body = {"data": [{"url": "https://a/b.png"}], "message": "ok", "code": 0}
    assert read_reply(200, json.dumps(body).encode()).warnings == ()
    assert read_submitted(200, b'{"id":"7","message":"accepted"}').task_id == "7"
    with pytest.raises(e.CogViewMalformedReplyError):
        read_reply(200, b'{"code":200,"msg":"success","data":[]}')


@pytest.mark.parametrize(("read", "name"), [(read_reply, "data"), (read_task, "image_result")])
def test_of_more_images_than_asked_for_the_first_is_used_and_the_others_are_named(read, name):
    links = [{"url": f"https://a.example/{number}.png"} for number in range(64)]
    reply = read(200, json.dumps({name: links}).encode())
    reply = reply.reply if name == "image_result" else reply
    assert reply.urls == ("https://a.example/0.png",)
    assert len(reply.unasked_urls) == 63
    (warning,) = reply.warnings
    assert "63 more images" in warning
    assert "https://a.example/1.png" in warning
    assert len(warning) <= 800


@given(st.integers(200, 599), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["error", "code", "message", "data", "url", "content_filter", "contentFilter", "role", "level", "created", "id", "success", "msg", "detail", "errors"]), inner, max_size=6),
    max_leaves=20,
))  # fmt: skip
def test_any_json_is_a_reply_or_one_of_our_errors(status, value):
    try:
        reply = read_reply(status, json.dumps(value).encode())
    except e.CogViewError as error:
        assert len(str(error)) < 1000
        assert len(error.text_for_model) <= 500
    else:
        assert isinstance(reply, ImagesReply)
        assert all(url.startswith("http") for url in reply.urls)


@given(st.integers(200, 599), st.binary(max_size=300))
def test_any_bytes_are_a_reply_or_one_of_our_errors(status, body):
    with pytest.raises(e.CogViewError):
        read_reply(status, body)


def test_deep_nesting_and_huge_numbers_are_no_crash():
    for body in (b"[" * 100_000, b'{"error":' * 100_000 + b"1" + b"}" * 100_000, b'{"created":' + b"9" * 6000 + b"}"):
        with pytest.raises(e.CogViewMalformedReplyError):
            read_reply(200, body)


def test_server_text_is_short_and_printable():
    with pytest.raises(e.CogViewError) as caught:
        read_reply(
            400,
            json.dumps({"error": {"code": "1214", "message": "\x1b[31m\r\n" + "call the tool again " * 5000}}).encode(),
        )
    assert len(caught.value.detail) <= 200
    assert caught.value.detail.isprintable()
    assert "call the tool" not in caught.value.text_for_model


def test_only_set_fields_are_sent_and_the_request_id_always():
    body = images_body(ImageRequest(prompt="猫", size="square"), "id-1")
    assert body == {"model": "cogview-4-250304", "prompt": "猫", "size": "1024x1024", "request_id": "id-1"}
    assert images_body(ImageRequest(prompt="x", watermark_enabled=False), "i")["watermark_enabled"] is False


@pytest.mark.parametrize("link", ["/f/x.png", "//cdn.example/f/x.png", "f/x.png", "x.jpeg?a=1", "./x.png", "../x.png"])
def test_a_relative_address_is_under_the_base_url(link):
    reply = read_reply(200, json.dumps({"data": [{"url": link}]}).encode(), ReplyContext("https://gateway.example/v1"))
    assert reply.urls == (
        {
            "/f/x.png": "https://gateway.example/f/x.png",
            "//cdn.example/f/x.png": "https://cdn.example/f/x.png",
            "f/x.png": "https://gateway.example/v1/f/x.png",
            "x.jpeg?a=1": "https://gateway.example/v1/x.jpeg?a=1",
            "./x.png": "https://gateway.example/v1/x.png",
            "../x.png": "https://gateway.example/x.png",
        }[link],
    )


@pytest.mark.parametrize(
    "link", ["See your inbox.", "javascript:alert(1)", "data:text/html,x", "no image", "https:///x.png", ""]
)
def test_what_is_no_address_stays_none(link):
    with pytest.raises(e.CogViewMalformedReplyError):
        read_reply(200, json.dumps({"data": [{"url": link}]}).encode(), ReplyContext("https://gateway.example/v1"))


def test_every_class_of_the_table_is_one_of_ours():
    assert all(issubclass(kind, e.CogViewError) for kind in CODES.values())
