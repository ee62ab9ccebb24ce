"""An image's link leads to the public internet or nowhere, whatever it looks like."""

import asyncio
import ipaddress
import socket
import threading

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from langchain_cogview import CogViewDownloadError, CogViewImageGenerator
from langchain_cogview.addresses import METADATA_ADDRESSES, LinkRules, is_host, is_public
from langchain_cogview.api.transport import ASHARED, SHARED
from langchain_cogview.concurrency import Deadline
from langchain_cogview.images.download import afetch, fetch
from tests.host import Host, http

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
    """Listens on loopback, v4 and where there is one v6; whoever connects is recorded."""

    def __init__(self):
        self.reached = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self):
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


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize(
    "host",
    ["2130706433", "127.1", "0x7f000001", "127.0.0.1.", "169.254.169.254.", "localhost.", "a.localhost", "[::1]"],
)
def test_a_proxy_is_asked_for_no_private_address_in_any_spelling(monkeypatch, host, how):
    with Host(http(403)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        link = f"https://{host}/x.png"
        with pytest.raises(CogViewDownloadError, match="was not opened: its host"):
            if how == "sync":
                fetch(SHARED.handle_request, link, deadline=Deadline(60), rules=LinkRules())
            else:
                asyncio.run(afetch(ASHARED.handle_async_request, link, deadline=Deadline(60), rules=LinkRules()))
        assert proxy.got == []
        with pytest.raises(CogViewDownloadError):
            fetch(SHARED.handle_request, "https://images.example/x.png", deadline=Deadline(60), rules=LinkRules())
        assert len(proxy.got) == 1


def test_the_canary_can_be_reached():
    canary = Canary()  # of its own: the tests run in any order
    with socket.create_connection(("127.0.0.1", canary.port)):
        assert canary.reached.wait(60)
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


def test_plain_http_is_for_the_loopback_host_and_port_that_the_base_url_names():
    assert LinkRules("http://127.0.0.1:9/v1").check("http://127.0.0.1:9/x.png")
    assert LinkRules("http://localhost:9/v1").check("http://127.0.0.1:9/x.png")
    assert LinkRules("http://[::1]:9/v1").check("http://[0:0::1]:9/x.png")
    assert LinkRules("http://127.0.0.1/v1").check("http://127.0.0.1:80/x.png")
    for base, link in (
        ("http://127.0.0.1:9", "http://127.0.0.1:10/admin?shutdown=1"),
        ("http://127.0.0.1:9", "http://127.0.0.1/x.png"),
        ("http://127.0.0.1:9", "http://127.0.0.2:9/x.png"),
        ("http://127.0.0.1", "http://localhost/x.png"),
        ("https://api.z.ai", "http://127.0.0.1/x.png"),
        ("http://10.0.0.1", "http://10.0.0.1/x"),
        ("sandbox:", "http://127.0.0.1/x"),
        (None, "http://8.8.8.8/x"),
    ):
        with pytest.raises(CogViewDownloadError, match="not https"):
            LinkRules(base).check(link)


def allows(rules, link, address, literal=False):
    """Whether a link may be fetched and its connection go to an address."""
    try:
        return rules.check(link)(ipaddress.ip_address(address), literal)
    except CogViewDownloadError:
        return False


def test_answers_of_a_fake_dns_are_fetched_from_and_the_same_addresses_in_a_link_are_not():
    for address in ("198.18.0.1", "198.19.255.255", "fc00::1", "2001:2::7"):
        shown = f"[{address}]" if ":" in address else address
        assert allows(LinkRules(), "https://mfile.z.ai/x.png", address)
        assert allows(LinkRules(allowed_hosts=("*.z.ai",)), "https://mfile.z.ai/x.png", address)
        assert not allows(LinkRules(), f"https://{shown}/x.png", address, literal=True)
        assert not allows(LinkRules("http://localhost:9"), "http://localhost:9/x.png", address)
    # Numbers that the resolver reads as addresses are no names, though they are looked up.
    for number in ("3323068417", "0xc6120001", "198.18.1", "0306.022.0.1", "198.18.0.1."):
        assert not allows(LinkRules(), f"https://{number}/x.png", "198.18.0.1")
    for address in ("10.0.0.1", "192.168.1.1", "127.0.0.1", "100.64.0.1", "fd00::1", "::1", "::ffff:198.18.0.1"):
        assert not allows(LinkRules(), "https://mfile.z.ai/x.png", address), address


@settings(deadline=None)
@given(st.sampled_from(sorted(METADATA_ADDRESSES, key=str)))
def test_no_rule_allows_a_metadata_address_unless_it_names_it(address):
    forms = [address, *map(ipaddress.ip_address, wrapped(int(address)) if address.version == 4 else [])]
    for form in forms:
        assert not is_public(form)
        assert not is_public(form, False)
        assert not is_host(form, False), form
        for rules in (LinkRules(), LinkRules(allowed_hosts=("gateway.lan",)), LinkRules(allowed_hosts=("*.lan",))):
            assert not allows(rules, "https://gateway.lan/x.png", str(form))
    shown = f"[{address}]" if address.version == 6 else str(address)
    assert allows(LinkRules(allowed_hosts=(shown,)), f"http://{shown}/x.png", str(address), literal=True)
    assert not allows(LinkRules(), f"https://{shown}/x.png", str(address), literal=True)


def test_the_addresses_of_known_metadata_services_are_in_the_table():
    for address in ("169.254.169.254", "168.63.129.16", "192.0.0.192", "100.100.100.200", "fd00:ec2::254"):
        assert ipaddress.ip_address(address) in METADATA_ADDRESSES


@pytest.mark.parametrize(
    "address", ["fe80::a9fe:a9fe%eth0", "fd00:ec2::254%2", "::ffff:0:a9fe:a9fe", "::ffff:0:a83f:8110"]
)
def test_a_metadata_address_is_known_in_every_zone_and_translated_form(address):
    assert not allows(LinkRules(), "https://gateway.lan/x.png", address)
    assert not allows(LinkRules(allowed_hosts=("gateway.lan",)), "http://gateway.lan/x.png", address)


def test_a_name_with_its_trailing_dot_is_the_same_host():
    for entry, link in (
        ("gateway.lan.", "http://gateway.lan/x.png"),
        ("gateway.lan", "http://Gateway.LAN./x.png"),
        ("*.gateway.lan.", "https://a.gateway.lan./x.png"),
    ):
        assert allows(LinkRules(allowed_hosts=(entry,)), link, "93.184.216.34"), entry
    assert not allows(LinkRules(), "https://127.0.0.1./x.png", "127.0.0.1", literal=True)
    assert not allows(LinkRules(allowed_hosts=("gateway.lan",)), "http://gateway.lan../x.png", "93.184.216.34")


def test_a_host_that_is_named_may_be_private_and_plain_http():
    rules = LinkRules("http://10.0.0.5:8080/v1", ("10.0.0.5:8080", "gateway.lan", "[fd12::5]:81", "*.ufileos.com"))
    assert allows(rules, "http://10.0.0.5:8080/x.png", "10.0.0.5", literal=True)
    assert allows(rules, "http://gateway.lan:1234/x.png", "192.168.1.9")
    assert allows(rules, "https://GATEWAY.lan/x.png", "127.0.0.1")
    assert allows(rules, "http://[fd12:0::5]:81/x.png", "fd12::5", literal=True)
    assert allows(rules, "https://a.ufileos.com/x.png", "93.184.216.34")
    for link, address in (
        ("http://10.0.0.5/x.png", "10.0.0.5"),  # another port
        ("http://10.0.0.6:8080/x.png", "10.0.0.6"),  # another host
        ("ftp://gateway.lan/x.png", "192.168.1.9"),  # another scheme
        ("http://gateway.lan/x.png", "224.0.0.1"),  # not the address of a host
        ("http://gateway.lan/x.png", "169.254.169.254"),
        ("http://sub.gateway.lan/x.png", "192.168.1.9"),
        ("http://a.ufileos.com/x.png", "93.184.216.34"),  # a wildcard is for https ...
        ("https://a.ufileos.com:8443/x.png", "93.184.216.34"),  # ... on its own port ...
        ("https://a.ufileos.com/x.png", "10.0.0.5"),  # ... and public addresses
    ):
        assert not allows(rules, link, address), link
    assert not allows(LinkRules("http://10.0.0.5:8080/v1"), "http://10.0.0.5:8080/x.png", "10.0.0.5", literal=True)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("https://mfile.z.ai", "Leave scheme"),
        ("mfile.z.ai/path", "Leave scheme"),
        ("user@mfile.z.ai", "Leave scheme"),
        ("mfile z.ai", "Leave scheme"),
        ("mfile.z.ai\x00", "Leave scheme"),
        ("*", "star"),
        ("*.*.z.ai", "star"),
        ("m*.z.ai", "star"),
        ("*.", "not a host"),
        ("*.10.0.0.1", "not a host"),
        (".z.ai", "not a host"),
        ("a..b", "not a host"),
        ("-a.b", "not a host"),
        ("[::1", "not a host"),
        ("[x]:80", "not a host"),
        ("x" * 300, "not a host"),
        ("z.ai:0", "port"),
        ("z.ai:65536", "port"),
        ("z.ai:http", "port"),
        ("z.ai:", "port"),
    ],
)
def test_an_entry_that_is_no_host_is_refused_when_the_generator_is_made(entry, why):
    for value in (entry, ["mfile.z.ai", entry]):
        with pytest.raises(ValidationError, match=why) as caught:
            CogViewImageGenerator(base_url="sandbox:", allowed_image_hosts=value)
        assert len(str(caught.value)) < 500


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_entry_is_a_host_or_refused_in_our_words(entry):
    try:
        CogViewImageGenerator(base_url="sandbox:", allowed_image_hosts=entry)
    except ValidationError as error:
        assert "allowed_image_hosts" in str(error)
