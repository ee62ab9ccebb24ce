"""Decide which links may be opened and which addresses a connection may go to, and look up host names."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import queue
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Self

import httpcore
import httpx

from langchain_cogview.errors import CogViewDownloadError, printable

if TYPE_CHECKING:
    from langchain_cogview.concurrency import Deadline

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
AddressCheck = Callable[[Address, bool], bool]
"""Returns whether a connection may go to an address. The second argument is True when the URL holds the address itself (a
literal), and False when a name was looked up."""

ADDRESSES: Final = "cogview.addresses"
"""The request extension that holds an `AddressCheck`."""

METADATA_ADDRESSES: Final = frozenset(
    ipaddress.ip_address(address)
    for address in (
        "169.254.169.254",  # AWS, Azure, Google Cloud, OpenStack, Oracle, DigitalOcean: their "instance metadata" pages
        "fd00:ec2::254",  # AWS EC2 over IPv6: "Access instance metadata" in the EC2 User Guide
        "169.254.170.2",  # AWS ECS: "Task IAM role" in the ECS Developer Guide
        "169.254.170.23",  # AWS EKS: "EKS Pod Identity" in the EKS User Guide
        "fd00:ec2::23",  # the same over IPv6
        "fd20:ce::254",  # Google Cloud over IPv6: "View and query VM metadata" in the Compute Engine documentation
        "fe80::a9fe:a9fe",  # OpenStack over IPv6: "Metadata service" in the Nova documentation
        "168.63.129.16",  # Azure: "What is IP address 168.63.129.16?" in the Virtual Network documentation
        "192.0.0.192",  # Oracle Cloud Classic: "Retrieving instance metadata" in its documentation
        "100.100.100.200",  # Alibaba Cloud: "Instance metadata" in the ECS documentation
        "100.96.0.96",  # Volcengine: "Instance metadata" in the ECS documentation
        "169.254.0.23",  # Tencent Cloud: metadata.tencentyun.com, "Instance metadata" in the CVM documentation
        "169.254.42.42",  # Scaleway: "Metadata" in the Instances documentation
        "fd00:42::42",  # the same over IPv6
    )
)
"""Addresses at which clouds give credentials to programs on their machines; `ipaddress` calls some of them public."""

FAKE_DNS: Final = (
    ipaddress.ip_network("198.18.0.0/15"),  # the default of Clash, mihomo, Surge, sing-box, V2Ray and Xray
    ipaddress.ip_network("fc00::/18"),  # the IPv6 default of sing-box, V2Ray and Xray
    ipaddress.ip_network("2001:2::/48"),  # the IPv6 benchmarking range (RFC 5180), used like 198.18.0.0/15 (RFC 2544)
)
"""Ranges from which proxies with fake DNS answer every look-up; a connection to such an address reaches the real host of the
name. Public networks do not use them, and private networks should not."""

SANDBOX_SERVERS: Final[set[tuple[str, int]]] = set()
"""Host and port of every sandbox that this process serves at the moment."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.IPv6Network("64:ff9b:1::/48")
_TRANSLATED = ipaddress.IPv6Network("::ffff:0:0:0/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)
_DEFAULT_PORTS: Final = {"https": 443, "http": 80}
_HTTPS_PORT: Final = 443
_MAX_PORT: Final = 65_535
_MAX_NAME: Final = 253
_NAME: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
_NUMBER: Final = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)\.?", re.DOTALL)
"""A host whose last label is a number is an address, in any spelling."""

_HAS_USER: Final = re.compile(r"[^:/?#]*:[/\\]*[^/?#]*@")


class AddressRefusedError(httpcore.ConnectError, httpx.ConnectError):
    """The host has only addresses that the request may not go to. A subclass of the errors of httpcore and of httpx."""


def is_public(address: Address, literal: bool = True) -> bool:  # noqa: FBT001, FBT002  an AddressCheck
    """Tell whether an address belongs to the public internet; IPv4 addresses inside of IPv6 addresses are found.

    Args:
        address: The address of the connection.
        literal: Whether the URL holds the address itself. Answers of a fake DNS count as public only for a name.

    Returns:
        Whether it is public.
    """
    if not literal and any(address in network for network in FAKE_DNS):
        return True
    if is_metadata(address):
        return False
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = _wrapped(address)
        if wrapped:
            return all(is_public(inner) for inner in wrapped)
        if address.is_site_local or address in _NAT64_LOCAL:
            return False
        if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP and not is_public(_low(address)):
            return False
    return address.is_global and not (
        address.is_multicast
        or address.is_reserved
        or address.is_unspecified
        or address.is_loopback
        or address.is_link_local
    )


def is_loopback(address: Address, literal: bool = True) -> bool:  # noqa: ARG001, FBT001, FBT002  an AddressCheck
    """Tell whether an address belongs to this machine.

    Args:
        address: The address of the connection.
        literal: Not used.

    Returns:
        Whether it is a loopback address.
    """
    return address.is_loopback


def is_host(address: Address, literal: bool = True) -> bool:  # noqa: ARG001, FBT001, FBT002  an AddressCheck
    """Tell whether an address may belong to a host that the user named. Private addresses may.

    Args:
        address: The address of the connection.
        literal: Not used.

    Returns:
        False for metadata services, multicast and unspecified addresses.
    """
    if is_metadata(address) or address.is_multicast or address.is_unspecified:
        return False
    return not isinstance(address, ipaddress.IPv6Address) or all(is_host(inner) for inner in _wrapped(address))


def is_metadata(address: Address) -> bool:
    """Tell whether an address is a cloud's metadata service; IPv4 addresses inside of IPv6 addresses are found.

    Args:
        address: The address of the connection.

    Returns:
        Whether it is in `METADATA_ADDRESSES`.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return address in METADATA_ADDRESSES
    if ipaddress.IPv6Address(int(address)) in METADATA_ADDRESSES:  # whatever its zone, as in fe80::1%eth0
        return True
    inner = _wrapped(address)
    if address in _NAT64_LOCAL or (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
        inner = [*inner, _low(address)]
    return any(item in METADATA_ADDRESSES for item in inner)


def _low(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)


def _wrapped(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """Return the IPv4 addresses at which a packet to this IPv6 address arrives."""
    if (
        address.ipv4_mapped
        or address in _NAT64
        or address in _TRANSLATED
        or (address in _COMPATIBLE and int(address) > 1)
    ):
        return [_low(address)]
    if address.sixtofour:
        return [address.sixtofour]
    return list(address.teredo or ())


# --- links


@dataclass(frozen=True, slots=True)
class AllowedHost:
    """One entry of `allowed_image_hosts`, made by `parse`.

    Attributes:
        host: A name, or an address in its usual form. For a wildcard, the part behind the star, with its dot.
        port: The only port. None: any port for a host, port 443 for a wildcard.
        is_wildcard: Whether the entry covers every host below a name; it covers https and public addresses only then.
    """

    host: str
    port: int | None = None
    is_wildcard: bool = False

    @classmethod
    def parse(cls, entry: str) -> Self:
        """Read an entry such as `mfile.z.ai`, `*.ufileos.com`, `10.0.0.5:8080` or `[fd00::5]:8080`.

        Args:
            entry: The text of the entry.

        Returns:
            The entry.

        Raises:
            ValueError: The entry is not a host; the text says what is wrong.
        """
        text = entry.strip().lower()
        shown = f"The entry {printable(entry, 80)!r} of allowed_image_hosts"
        if not text:
            raise ValueError("allowed_image_hosts holds an empty entry. Leave it out.")
        if re.search(r"[/?#@\\\s]", text) or not text.isprintable():
            raise ValueError(f"{shown} is not a host. Leave scheme, user, path and query out: 'host' or 'host:port'.")
        is_wildcard = text.startswith("*.")
        host, port = _host_and_port(text.removeprefix("*."))
        if port is not None and not (port.isascii() and port.isdigit() and 0 < int(port[:6]) <= _MAX_PORT):
            raise ValueError(f"{shown} has a port that is not a number from 1 to {_MAX_PORT}.")
        if "*" in host:
            raise ValueError(
                f"{shown} has a star that is not its first label. Use '*.example.com' for every host below."
            )
        normal = _normal_host(host)
        if normal is None or (is_wildcard and _address(normal)):
            raise ValueError(
                f"{shown} is not a host. Pass names or addresses, such as 'mfile.z.ai' or '10.0.0.5:8080'."
            )
        return cls(f".{normal}" if is_wildcard else normal, int(port) if port else None, is_wildcard)

    def covers(self, host: str) -> bool:
        """Tell whether the entry covers a host, on some port.

        Args:
            host: The host of a link, in its usual form.

        Returns:
            Whether it does.
        """
        return host.endswith(self.host) if self.is_wildcard else host == self.host

    def covers_port(self, scheme: str, port: int) -> bool:
        """Tell whether the entry covers a scheme and a port of its hosts.

        Args:
            scheme: `https` or `http`.
            port: The port of a link.

        Returns:
            Whether it does.
        """
        if self.is_wildcard:
            return scheme == "https" and port == (self.port or _HTTPS_PORT)
        return self.port in {None, port}


@lru_cache(maxsize=256)
def allowed_host(entry: str) -> AllowedHost:
    """Read an entry as `AllowedHost.parse` does, once for equal entries.

    Args:
        entry: The text of the entry.

    Returns:
        The entry.
    """
    return AllowedHost.parse(entry)


@dataclass(frozen=True, slots=True)
class LinkRules:
    """Which links may be opened.

    Attributes:
        base_url: The base URL of the API. If its host is a loopback host, links to the same host and port may be plain http.
        allowed_hosts: Entries of `allowed_image_hosts`: the only hosts. A host that is named without a wildcard may have a
            private address and plain http. None: any public host.
    """

    base_url: str | None = None
    allowed_hosts: tuple[str, ...] | None = None

    def check(self, url: str, subject: str = "The image's link") -> AddressCheck:
        """Check a link.

        Args:
            url: The link.
            subject: What an error calls the link.

        Returns:
            The check for the addresses of its host.

        Raises:
            CogViewDownloadError: The link may not be opened.
            CogViewUnsafeURLError: The link is refused.
        """
        link = _Origin.of(url)
        if link is None:
            raise link_refused("it is not a valid link", subject)
        is_named = self._is_named(link, subject)
        is_local = self._is_local(link)
        if link.scheme != "https" and not (link.scheme == "http" and (is_named or is_local)):
            raise link_refused("it is not https", subject)
        if is_named:
            named = _address(link.host)
            return is_host if named is None else lambda address, _: address == named
        if is_local:
            return is_loopback
        # Here and not at the connection alone: behind a proxy that one is not ours, and the proxy would read the spelling.
        address = _address(link.host)
        if address is None and _NUMBER.fullmatch(link.host):
            raise link_refused("its host is an address in an unusual spelling", subject)
        if (address is not None and not is_public(address)) or _is_localhost(link.host):
            raise link_refused("its host has no address that may be connected to", subject)
        return is_public

    def _is_named(self, link: _Origin, subject: str) -> bool:
        if self.allowed_hosts is None:
            return False
        entries = [entry for entry in map(allowed_host, self.allowed_hosts) if entry.covers(link.host)]
        if not entries:
            raise link_refused(f"its host {printable(link.host, 100)!r} is not in allowed_image_hosts", subject)
        entries = [entry for entry in entries if entry.covers_port(link.scheme, link.port)]
        if not entries:
            where = f"{link.scheme} on port {link.port} of {printable(link.host, 100)!r}"
            raise link_refused(f"{where} is not in allowed_image_hosts: name 'host' or 'host:port'", subject)
        return any(not entry.is_wildcard for entry in entries)

    def _is_local(self, link: _Origin) -> bool:
        base = _Origin.of(self.base_url) if self.base_url and self.base_url.startswith("http") else None
        if base is None or base.port != link.port:
            return False
        return _is_loopback_host(link.host) and base.host in {link.host, "localhost"}


ANY_PUBLIC_HOST: Final = LinkRules()
"""Rules for https links to any public host."""


@dataclass(frozen=True, slots=True)
class _Origin:
    """Scheme, host and port of a URL, read by the library that sends the request."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Self | None:
        try:
            parsed = httpx.URL(url)
            host = parsed.raw_host.decode("ascii").lower().removesuffix(".")
        except (httpx.InvalidURL, ValueError, TypeError):
            return None
        if not host or parsed.port == 0 or _HAS_USER.match(url):
            return None
        address = _address(host)
        port = parsed.port or _DEFAULT_PORTS.get(parsed.scheme, 0)
        return cls(parsed.scheme, str(address) if address else host, port)


def link_refused(why: str, subject: str = "The image's link") -> CogViewDownloadError:
    """Make the error for a link that may not be opened; another attempt would not help.

    Args:
        why: The reason.
        subject: What the error calls the link.

    Returns:
        The error.
    """
    return CogViewDownloadError(
        f"{subject} was not opened: {why}.", hint="Its URL is on the result: look at it before opening it."
    )


def _is_localhost(host: str) -> bool:
    return host == "localhost" or host.endswith(".localhost")


def _is_loopback_host(host: str) -> bool:
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _host_and_port(text: str) -> tuple[str, str | None]:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            return "", None
        return host if _address(host) else "", rest[1:] if rest else None
    if text.count(":") > 1:  # an IPv6 address without brackets
        return text, None
    host, colon, port = text.partition(":")
    return host, port if colon else None


def _normal_host(host: str) -> str | None:
    address = _address(host)
    if address:
        return str(address)
    try:
        name = httpx.URL(f"https://{host}/").raw_host.decode("ascii").lower().removesuffix(".")
    except (httpx.InvalidURL, ValueError):
        return None
    return name if len(name) <= _MAX_NAME and _NAME.fullmatch(name) else None


# --- name look-ups


@lru_cache(maxsize=256)
def literal_address(host: str) -> str | None:
    """Read an address that a host spells out.

    Args:
        host: The host of a URL.

    Returns:
        The address in its usual form; None for a name.
    """
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return None


def _look_up(host: str, port: int) -> list[str]:
    return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


def _look_up_in_thread(host: str, port: int, deliver: Callable[[list[str] | Exception], None]) -> None:
    # A daemon thread: the system's resolver cannot be interrupted, and must hold up neither the call nor the exit.
    def work() -> None:
        try:
            answer: list[str] | Exception = _look_up(host, port)
        except (OSError, UnicodeError) as error:
            answer = error
        deliver(answer)

    threading.Thread(target=work, daemon=True, name="cogview-look-up").start()


def _allowed(
    host: str, answer: list[str] | Exception, check: AddressCheck | None, *, literal: bool = False
) -> list[str]:
    if isinstance(answer, Exception):
        raise httpcore.ConnectError(f"The name {host[:100]!r} could not be looked up: {answer}")
    if check is None:
        return answer
    addresses = [address for address in answer if check(ipaddress.ip_address(address.partition("%")[0]), literal)]
    if not addresses:
        raise AddressRefusedError(f"The host {host[:100]!r} has no address that may be connected to.")
    return addresses


def check_literal(host: str, check: AddressCheck | None) -> None:
    """Check a host that is an address. A name passes, because a proxy looks it up.

    Args:
        host: The host of a URL.
        check: The check; None: every address passes.
    """
    if literal := literal_address(host):
        _allowed(host, [literal], check, literal=True)


def resolve(host: str, port: int, check: AddressCheck | None, deadline: Deadline) -> list[str]:
    """Look up a host.

    Args:
        host: A name or an address.
        port: The port of the connection.
        check: The check for addresses; None: every address passes.
        deadline: For the look-up.

    Returns:
        The addresses that a connection may go to.

    Raises:
        httpcore.ConnectTimeout: The look-up took longer than the deadline.
    """
    if literal := literal_address(host):
        return _allowed(host, [literal], check, literal=True)
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()
    _look_up_in_thread(host, port, answers.put)
    try:
        answer = answers.get(timeout=deadline.remaining())
    except queue.Empty:
        raise httpcore.ConnectTimeout("The name look-up took too long.") from None
    return _allowed(host, answer, check)


async def aresolve(host: str, port: int, check: AddressCheck | None) -> list[str]:
    """Async version of `resolve`. The caller's `asyncio.timeout` limits its time.

    Returns:
        As `resolve`.
    """
    if literal := literal_address(host):
        return _allowed(host, [literal], check, literal=True)
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[str] | Exception] = loop.create_future()

    def settle(answer: list[str] | Exception) -> None:
        if not future.done():
            future.set_result(answer)

    def deliver(answer: list[str] | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits
            loop.call_soon_threadsafe(settle, answer)

    _look_up_in_thread(host, port, deliver)
    return _allowed(host, await future, check)
