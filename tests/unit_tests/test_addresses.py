"""A picture's link leads to the public internet or nowhere, whatever it looks like."""

import ipaddress
import socket
import threading

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from langchain_cogview import CogViewDownloadError
from langchain_cogview.addresses import is_public
from langchain_cogview.api.transport import SHARED
from langchain_cogview.deadline import Deadline
from langchain_cogview.images.download import LinkRules, fetch

LOOPBACK = 0x7F000001
PRIVATE = ["0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4"]  # fmt: skip


def wrapped(v4: int) -> list[str]:
    """An IPv4 address in every form that IPv6 has for it."""
    return [
        str(ipaddress.IPv6Address(value))
        for value in (
            0xFFFF << 32 | v4,  # mapped
            v4,  # compatible
            0x0064FF9B << 96 | v4,  # NAT64
            0x0064FF9B0001 << 80 | v4,  # NAT64, local use
            0x2002 << 112 | v4 << 80,  # 6to4
            0x20010000 << 96 | v4 << 64 | 0x08080808 ^ 0xFFFFFFFF,  # Teredo, as the server
            0x20010000 << 96 | 0x08080808 << 64 | v4 ^ 0xFFFFFFFF,  # Teredo, as the client
            0x2606 << 112 | 0x00005EFE << 32 | v4,  # ISATAP
            0x2606 << 112 | 0x02005EFE << 32 | v4,
        )
    ]


@given(st.sampled_from(PRIVATE).flatmap(lambda net: st.ip_addresses(network=net)))
def test_no_private_address_is_public_in_any_form(address):
    assert not is_public(address)
    for form in wrapped(int(address)):
        assert not is_public(ipaddress.ip_address(form)), form


def test_public_addresses_are_public_in_the_forms_that_networks_use():
    for address in ("8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"):
        assert is_public(ipaddress.ip_address(address))
    for outer in ("fe80::5efe:808:808", "fd12::5efe:808:808", "ff02::5efe:808:808", "2001:db8::5efe:808:808"):
        assert not is_public(ipaddress.ip_address(outer)), outer
    assert not is_public(ipaddress.ip_address("64:ff9b:1:a9fe:a9:fe00:808:808"))
    for address in ("::", "::1", "fe80::1", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "100::1"):
        assert not is_public(ipaddress.ip_address(address))


class Canary:
    """Listens on loopback, v4 and where there is one v6; whoever connects is noted."""

    def __init__(self):
        self.reached = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.close()
            self.reached.set()

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture(scope="module")
def canary():
    listening = Canary()
    yield listening
    listening.close()


hosts = st.one_of(
    st.sampled_from(["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "0", "0.0.0.0", "[::1]", "[::]", "127.0.0.1.", "LOCALHOST", "①②⑦.0.0.1", "127。0。0。1"]),
    st.integers(LOOPBACK, LOOPBACK + 300).map(lambda value: str(ipaddress.IPv4Address(value))),
    st.sampled_from([f"[{form}]" for form in wrapped(LOOPBACK)]),
)  # fmt: skip
links = st.builds(
    lambda scheme, user, host, port, path: f"{scheme}://{user}{host}{port}{path}",
    st.sampled_from(["http", "https", "HTTPS", "ftp", "file", "gopher", "javascript", "data", "unix"]),
    st.sampled_from(["", "user@", "good.example:443@", "@", "user:pass@"]),
    hosts | st.text(max_size=12),
    st.sampled_from([":PORT", "", ":PORT#", ":PORT@"]),
    st.sampled_from(["/x.png", "", "?url=http://127.0.0.1:PORT/", "\\@127.0.0.1:PORT/", "/../\r\nHost: x"]),
)


@given(links)
@example("https://127.0.0.1:PORT/x.png")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
def test_the_canary_on_this_machine_is_never_reached(canary, monkeypatch, link):
    real = socket.getaddrinfo

    def numbers_only(host, *rest, **more):
        # What the C library makes of odd spellings of numbers is asked for real; names are not looked up.
        name = host.decode() if isinstance(host, bytes) else host
        if name.rstrip(".").lower() == "localhost" or all(c in "0123456789abcdefABCDEFxX.:%" for c in name):
            return real(host, *rest, **more)
        raise socket.gaierror(socket.EAI_NONAME, "not looked up")

    monkeypatch.setattr(socket, "getaddrinfo", numbers_only)
    with pytest.raises(CogViewDownloadError):
        fetch(SHARED.handle_request, link.replace("PORT", str(canary.port)), deadline=Deadline(0.5), rules=LinkRules())
    assert not canary.reached.is_set()


def test_the_canary_can_be_reached():
    canary = Canary()  # of its own: the tests run in any order
    with socket.create_connection(("127.0.0.1", canary.port)):
        assert canary.reached.wait(5)
    canary.close()


def test_only_the_named_hosts_are_fetched_from():
    rules = LinkRules(allowed_hosts=("mfile.z.ai", "*.ufileos.com"))
    assert rules.check("https://mfile.z.ai/x.png")
    assert rules.check("https://a.b.UFILEOS.com/x.png")
    for link in (
        "https://evil.example/x.png",
        "https://mfile.z.ai.evil.example/",
        "https://ufileos.com/",
        "https://xufileos.com/",
    ):
        with pytest.raises(CogViewDownloadError, match="allowed_image_hosts"):
            rules.check(link)


def test_plain_http_is_for_the_loopback_host_that_the_base_url_names():
    assert LinkRules(base_host="127.0.0.1").check("http://127.0.0.1:9/x.png")
    for base, link in (
        ("127.0.0.1", "http://127.0.0.2/x.png"),
        ("127.0.0.1", "http://localhost/x.png"),
        ("api.z.ai", "http://127.0.0.1/x.png"),
        ("10.0.0.1", "http://10.0.0.1/x"),
        (None, "http://8.8.8.8/x"),
    ):
        with pytest.raises(CogViewDownloadError, match="not https"):
            LinkRules(base_host=base).check(link)
