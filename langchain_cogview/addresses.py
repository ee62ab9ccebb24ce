"""Which addresses a connection may go to."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Final

import httpcore
import httpx

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
AddressCheck = Callable[[Address, bool], bool]
"""Whether a connection may go to an address; the second argument says whether the URL spells the address out (a literal) or a
name was looked up."""

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
"""Addresses at which clouds hand credentials to whoever asks from within; `ipaddress` calls some of them public."""

FAKE_DNS: Final = (
    ipaddress.ip_network("198.18.0.0/15"),  # the default of Clash, mihomo, Surge, sing-box, V2Ray and Xray
    ipaddress.ip_network("fc00::/18"),  # the IPv6 default of sing-box, V2Ray and Xray
    ipaddress.ip_network("2001:2::/48"),  # the IPv6 benchmarking range (RFC 5180), used like 198.18.0.0/15 (RFC 2544)
)
"""Ranges from which proxies with fake DNS answer every name; a connection to such an answer reaches the name's true host. No
public or well-kept private network uses them."""

SANDBOX_SERVERS: Final[set[tuple[str, int]]] = set()
"""Host and port of each sandbox that this process serves at the moment."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.IPv6Network("64:ff9b:1::/48")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)


class AddressRefusedError(httpcore.ConnectError, httpx.ConnectError):
    """When a name leads only to addresses that the request may not go to. One class in both libraries' families."""


def is_public(address: Address, literal: bool = True) -> bool:  # noqa: FBT001, FBT002  an AddressCheck
    """Whether an address belongs to the public internet, seen through every form that wraps an IPv4 address in IPv6.

    Args:
        address: The address that would be connected to.
        literal: Whether the URL spells it out. The answer of a fake DNS is public only where a name was looked up.
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
    """Whether an address is this machine's own."""
    return address.is_loopback


def is_host(address: Address, literal: bool = True) -> bool:  # noqa: ARG001, FBT001, FBT002  an AddressCheck
    """Whether an address, public or private, may be that of a host which the user named."""
    if is_metadata(address) or address.is_multicast or address.is_unspecified:
        return False
    return not isinstance(address, ipaddress.IPv6Address) or all(is_host(inner) for inner in _wrapped(address))


def is_metadata(address: Address) -> bool:
    """Whether an address is a cloud's metadata service, seen through every form that wraps an IPv4 address in IPv6."""
    if address in METADATA_ADDRESSES:
        return True
    if isinstance(address, ipaddress.IPv4Address):
        return False
    inner = _wrapped(address)
    if address in _NAT64_LOCAL or (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
        inner = [*inner, _low(address)]
    return any(each in METADATA_ADDRESSES for each in inner)


def _low(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)


def _wrapped(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that a packet to this one ends up at."""
    if address.ipv4_mapped or address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):
        return [_low(address)]
    if address.sixtofour:
        return [address.sixtofour]
    return list(address.teredo or ())
