"""Proxy and certificate settings of the environment work, and wrong ones are explained."""

import asyncio
import ssl
import sys

import pytest
import trustme

from langchain_cogview import CogViewConfigurationError, CogViewConnectionError, CogViewImageGenerator
from tests.conftest import FAKE_KEY
from tests.host import Host, http

REPLY = b'{"data":[{"url":"https://host.invalid/x.png"}]}'
both = pytest.mark.parametrize("how", ["invoke", "ainvoke"])


class Answering(Host):
    """Answers every connection with one image's URL, and returns each request's first line."""

    def __init__(self, context=None):
        super().__init__(http(200, REPLY), context)

    @property
    def lines(self):
        return [got.split(b"\r\n", 1)[0].decode() for got in self.got]


def run(generator, how):
    return generator.invoke("x") if how == "invoke" else asyncio.run(generator.ainvoke("x"))


def of(base_url, **settings):
    return CogViewImageGenerator(
        api_key=FAKE_KEY, base_url=base_url, download=False, max_retries=0, timeout=60, **settings
    )


@both
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_used(monkeypatch, how, variable):
    with Answering() as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        assert run(of("http://api.invalid/v4"), how).url == "https://host.invalid/x.png"
    assert proxy.lines == ["POST http://api.invalid/v4/images/generations HTTP/1.1"]


@both
def test_loopback_is_reached_without_the_proxy(monkeypatch, how):
    with Answering() as server:
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
        assert run(of(f"http://127.0.0.1:{server.port}/v4"), how).url


@both
def test_no_proxy_is_kept_to(monkeypatch, how):
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "api.invalid")
    with pytest.raises(CogViewConnectionError) as caught:
        run(of("http://api.invalid/v4"), how)
    assert "api.invalid" in caught.value.detail


@both
def test_a_proxy_that_refuses_means_that_nothing_was_sent(monkeypatch, how):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with pytest.raises(CogViewConnectionError, match="nothing was sent.*proxy"):
        run(of("https://api.invalid/v4"), how)


@both
@pytest.mark.parametrize(
    ("proxy", "text"),
    [
        ("socks5://127.0.0.1:1", r'HTTPS_PROXY names a SOCKS proxy.*pip install "langchain-cogview\[socks\]"'),
        ("ftp://user:pass@127.0.0.1:1", "HTTPS_PROXY names a proxy that is not understood"),
        ("http://host:port", "HTTPS_PROXY is not a URL"),
    ],
)
def test_a_proxy_that_cannot_be_used_names_its_variable_and_the_remedy(monkeypatch, how, proxy, text):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(CogViewConfigurationError, match=text) as caught:
        run(of("https://api.invalid/v4"), how)
    assert "pass" not in str(caught.value)


@both
@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_a_certificate_setting_that_cannot_be_read_names_its_variable(monkeypatch, tmp_path, how, variable):
    monkeypatch.setenv(variable, str(tmp_path / "missing"))
    if variable == "SSL_CERT_FILE":
        with pytest.raises(CogViewConfigurationError, match="SSL_CERT_FILE cannot be read .No such file"):
            run(of("https://127.0.0.1:1/v4"), how)
    else:  # an absent folder holds no certificates: OpenSSL finds nothing wrong with it
        with pytest.raises(CogViewConnectionError):
            run(of("https://127.0.0.1:1/v4"), how)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def tls(authority):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@both
def test_an_untrusted_certificate_says_what_to_set(tls, how):
    with Answering(tls) as server, pytest.raises(CogViewConnectionError, match="not trusted.*SSL_CERT_FILE") as caught:
        run(of(f"https://127.0.0.1:{server.port}/v4"), how)
    assert server.lines == []
    assert caught.value.attempts == 1


@both
def test_a_certificate_of_the_environment_is_trusted(authority, tls, how, monkeypatch, tmp_path):
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with Answering(tls) as server:
        assert run(of(f"https://127.0.0.1:{server.port}/v4"), how).url


def test_equal_generators_are_equal_after_their_calls_too():
    with Answering() as server:
        first, second = (of(f"http://127.0.0.1:{server.port}/v4") for _ in range(2))
        assert run(first, "invoke").url == run(second, "invoke").url
    assert first == second
