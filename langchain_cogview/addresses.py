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

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.IPv6Network("64:ff9b:1::/48")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)


class AddressRefusedError(httpcore.ConnectError, httpx.ConnectError):
    """When a name leads only to addresses that the request may not go to. One class in both libraries' families."""


def is_public(address: Address, literal: bool = True) -> bool:  # noqa: ARG001, FBT001, FBT002  an AddressCheck
    """Whether an address belongs to the public internet, seen through every form that wraps an IPv4 address in IPv6."""
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


def _low(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)


def _wrapped(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that a packet to this one ends up at."""
    if address.ipv4_mapped or address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):
        return [_low(address)]
    if address.sixtofour:
        return [address.sixtofour]
    return list(address.teredo or ())
