"""Where the service is and with what key; wrong settings are reported before any request, never with the key."""

import traceback
import uuid
import warnings

import pytest

from langchain_cogview import CogViewConfigurationError, CogViewImageGenerator, CogViewImageTool
from langchain_cogview.api.settings import normal_base_url
from tests.conftest import FAKE_KEY

CHINA, INTERNATIONAL = "https://open.bigmodel.cn/api/paas/v4", "https://api.z.ai/api/paas/v4"


def where(**settings):
    generator = CogViewImageGenerator(**settings)
    return generator.resolved_base_url, generator.resolved_region, generator._service.key.get_secret_value()


def test_the_variable_that_is_set_tells_the_platform(monkeypatch):
    monkeypatch.setenv("ZAI_API_KEY", "z.key")
    assert where() == (INTERNATIONAL, "international", "z.key")
    monkeypatch.setenv("ZHIPUAI_API_KEY", "c.key")
    with pytest.warns(UserWarning, match="both set: the first is used"):
        assert where() == (CHINA, "china", "c.key")
    assert where(region="international") == (INTERNATIONAL, "international", "z.key")


def test_the_base_url_tells_the_platform_and_its_key(monkeypatch):
    monkeypatch.setenv("ZAI_API_KEY", "z.key")
    monkeypatch.setenv("ZHIPUAI_API_KEY", "c.key")
    assert where(base_url="https://api.z.ai")[1:] == ("international", "z.key")
    monkeypatch.setenv("COGVIEW_BASE_URL", f"{INTERNATIONAL}/")
    assert where() == (INTERNATIONAL, "international", "z.key")


def test_a_key_is_never_sent_to_the_other_platform(monkeypatch):
    monkeypatch.setenv("ZAI_API_KEY", "z.key")
    with pytest.raises(CogViewConfigurationError, match="ZAI_API_KEY is set, but that is the other platform's key"):
        CogViewImageGenerator(region="china")
    with pytest.raises(CogViewConfigurationError, match="does not go with the base URL"):
        CogViewImageGenerator(region="china", base_url=INTERNATIONAL)


def test_a_missing_key_names_both_variables_both_consoles_and_the_sandbox():
    with pytest.raises(CogViewConfigurationError) as caught:
        CogViewImageGenerator()
    for part in ("ZHIPUAI_API_KEY", "ZAI_API_KEY", "open.bigmodel.cn", "z.ai", "sandbox:"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("base_url", "normal"),
    [
        ("https://open.bigmodel.cn", CHINA),
        ("https://open.bigmodel.cn/api", CHINA),
        ("open.bigmodel.cn/api/paas/v4/", CHINA),
        ("https://open.bigmodel.cn/api/paas/v4/images/generations", CHINA),
        ("https://api.z.ai/api/paas/v4/chat/completions/", INTERNATIONAL),
        ("https://api.z.ai/api/paas/v4/async/images/generations", INTERNATIONAL),
        ("http://127.0.0.1:8765/api/paas/v4", "http://127.0.0.1:8765/api/paas/v4"),
        ("https://gateway.example.com/zhipu/", "https://gateway.example.com/zhipu"),
        ("sandbox:", "sandbox:"),
    ],
)
def test_a_pasted_url_is_made_normal(base_url, normal):
    assert normal_base_url(base_url) == normal


@pytest.mark.parametrize(
    "base_url",
    [
        "ftp://x",
        "http://",
        "https://[",
        "https://x:99999/",
        "https://u:p@host/",
        "https://host/?a=b",
        "https://a b/",
        "https://api.z.ai/api/coding/paas/v4",
    ],
)
def test_a_base_url_that_cannot_be_used_is_refused(base_url):
    with pytest.raises(CogViewConfigurationError) as caught:
        CogViewImageGenerator(api_key=FAKE_KEY, base_url=base_url)
    assert "u:p" not in str(caught.value)


BAD_KEYS = {
    "blank inside": FAKE_KEY[:10] + " " + FAKE_KEY[10:],
    "blank around": f" {FAKE_KEY}",
    "quotes": f'"{FAKE_KEY}"',
    "newline": f"{FAKE_KEY}\n",
    "bearer": f"Bearer {FAKE_KEY}",
    "empty": "   ",
    "not ascii": f"{FAKE_KEY}密",
}


@pytest.mark.parametrize("make", [CogViewImageGenerator, CogViewImageTool])
@pytest.mark.parametrize("kind", BAD_KEYS)
@pytest.mark.parametrize("source", ["argument", "environment"])
def test_a_malformed_key_is_reported_and_never_shown(make, kind, source, monkeypatch):
    key = BAD_KEYS[kind]
    if source == "environment":
        monkeypatch.setenv("ZHIPUAI_API_KEY", key)
    with pytest.raises(CogViewConfigurationError) as caught:
        make(api_key=key) if source == "argument" else make()
    if kind == "empty" and source == "argument":
        assert "is empty" in str(caught.value)
        return
    if not key.strip():
        return
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    shown = str(caught.value) + "".join(
        str(frame.locals) for frame in frames.stack if "langchain_cogview" in frame.filename
    )
    assert FAKE_KEY[:10] not in shown


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"seed": 1}, "takes no seed"),
        ({"negative_prompt": FAKE_KEY}, "takes no negative prompt"),
        ({"response_format": "b64_json"}, "always answers with a URL"),
        ({"zhipuai_api_key": FAKE_KEY}, "Did you mean 'api_key'?"),
        ({"sise": "x"}, "Did you mean 'size'?"),
    ],
)
@pytest.mark.parametrize("make", [CogViewImageGenerator, CogViewImageTool])
def test_an_argument_that_does_not_exist_gets_an_answer_without_its_value(make, settings, text):
    with pytest.raises(CogViewConfigurationError) as caught:
        make(base_url="sandbox:", **settings)
    assert text in str(caught.value)
    assert FAKE_KEY not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"max_retries": -1},
        {"max_concurrency": 0},
        {"output_dir": " "},
        {"download": False, "output_dir": "x"},
        {"n": 0},
        {"user_id": "12345"},
        {"quality": "sepia"},
        {"size": "1x1"},
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_at_once(settings):
    with pytest.raises(ValueError) as caught:
        CogViewImageGenerator(api_key=FAKE_KEY, **settings)
    assert FAKE_KEY not in str(caught.value)
    assert FAKE_KEY not in repr(caught.value.errors())


def test_an_unknown_model_warns_when_the_generator_is_made():
    with pytest.warns(UserWarning, match="Did you mean 'cogview-4'"):
        CogViewImageGenerator(base_url="sandbox:", model="cogview4")


@pytest.mark.parametrize(
    ("base_url", "text"),
    [
        ("sandbox", "Did you mean 'sandbox:'"),
        ("foo", "not an http"),
        ("http://api.z.ai/api/paas/v4", "plain text"),
        ("http://dev.bigmodel.cn", "plain text"),
        ("HTTP://Z.AI.:8080", "plain text"),
    ],
)
def test_slips_in_the_base_url_are_explained(base_url, text):
    with pytest.raises(CogViewConfigurationError, match=text):
        CogViewImageGenerator(api_key=FAKE_KEY, base_url=base_url)


@pytest.mark.parametrize(
    "base_url",
    ["http://open.bigmodel.cn", "http://OPEN.BIGMODEL.CN:80/x", "http://open.bigmodel.cn./", "http://api.z.ai./v4"],
)
def test_plain_http_to_the_providers_own_hosts_is_refused(base_url):
    with pytest.raises(CogViewConfigurationError, match="plain text"):
        CogViewImageGenerator(api_key=FAKE_KEY, base_url=base_url)


def test_plain_http_to_another_host_is_warned_of_once():
    base_url = f"http://gateway-{uuid.uuid4().hex}"
    with pytest.warns(UserWarning, match=r"goes over the network to gateway-\w+ in plain text"):
        CogViewImageGenerator(api_key=FAKE_KEY, base_url=base_url)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in ("", "/v1", ":8080/v2"):
            CogViewImageGenerator(api_key=FAKE_KEY, base_url=base_url + path)


@pytest.mark.parametrize(
    "base_url",
    [
        "http://127.0.0.1:9",
        "http://[::1]:9",
        "http://localhost",
        "http://api.localhost:8080",
        "https://gateway",
        "sandbox:",
    ],
)
def test_what_stays_on_this_machine_or_is_encrypted_is_not_warned_of(base_url):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CogViewImageGenerator(api_key=FAKE_KEY, base_url=base_url)


def test_a_model_of_the_other_platform_is_warned_of():
    with pytest.warns(UserWarning, match="cogview-4 is not documented for region='international'"):
        CogViewImageGenerator(api_key=FAKE_KEY, region="international", model="cogview-4")
    with pytest.warns(UserWarning, match="cogview-3-flash is not documented for region='international'"):
        CogViewImageGenerator(base_url="sandbox:", region="international", model="cogview-3-flash")


def test_one_host_may_be_passed_as_text():
    assert CogViewImageGenerator(api_key=FAKE_KEY, allowed_image_hosts="mfile.z.ai").allowed_image_hosts == (
        "mfile.z.ai",
    )


@pytest.mark.parametrize("folder", ["https://example.com/images", "nosuch://bucket", "s3://key:secret@bucket/x"])
def test_a_folder_that_cannot_be_one_is_refused_at_once(folder):
    with pytest.raises(CogViewConfigurationError) as caught:
        CogViewImageGenerator(api_key=FAKE_KEY, output_dir=folder)
    assert "secret" not in str(caught.value)
