"""Which links of images may be fetched: the rules for scheme, host, port and address."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Self

import httpx

from langchain_cogview.addresses import is_host, is_loopback, is_public
from langchain_cogview.errors import CogViewDownloadError, printable

if TYPE_CHECKING:
    from langchain_cogview.addresses import Address, AddressCheck

_DEFAULT_PORTS: Final = {"https": 443, "http": 80}
_HTTPS_PORT: Final = 443
_MAX_PORT: Final = 65_535
_MAX_NAME: Final = 253
_NAME: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
_NUMBER: Final = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)\.?", re.DOTALL)
"""A host whose last label is a number is an address, however it is spelled."""

_HAS_USER: Final = re.compile(r"[^:/?#]*:[/\\]*[^/?#]*@")


@dataclass(frozen=True, slots=True)
class AllowedHost:
    """One entry of `allowed_image_hosts`; `parse` makes it.

    Attributes:
        host: A name, or an address in its usual form. For a wildcard the part behind the star, with its dot.
        port: The only port; None: any port of a host, port 443 for a wildcard.
        is_wildcard: Whether it stands for every host below a name; then it covers https and public addresses only.
    """

    host: str
    port: int | None = None
    is_wildcard: bool = False

    @classmethod
    def parse(cls, entry: str) -> Self:
        """Read an entry such as `mfile.z.ai`, `*.ufileos.com`, `10.0.0.5:8080` or `[fd00::5]:8080`.

        Raises:
            ValueError: When it is not a host; the text says what is wrong with it.
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
        """Whether it stands for a host, on some port."""
        return host.endswith(self.host) if self.is_wildcard else host == self.host

    def covers_port(self, scheme: str, port: int) -> bool:
        """Whether it stands for a scheme and port of its hosts."""
        if self.is_wildcard:
            return scheme == "https" and port == (self.port or _HTTPS_PORT)
        return self.port in {None, port}


@lru_cache(maxsize=256)
def allowed_host(entry: str) -> AllowedHost:
    """An entry of `allowed_image_hosts`, parsed once; raises ValueError as `AllowedHost.parse`."""
    return AllowedHost.parse(entry)


@dataclass(frozen=True, slots=True)
class LinkRules:
    """Which links may be fetched.

    Attributes:
        base_url: The API's base URL. Where its host is a loopback one, links to the same host and port may be plain http.
        allowed_hosts: Entries of `allowed_image_hosts`; when given, only these hosts. One that is named without a wildcard may
            have a private address and plain http.
    """

    base_url: str | None = None
    allowed_hosts: tuple[str, ...] | None = None

    def check(self, url: str, subject: str = "The image's link") -> AddressCheck:
        """The check for the addresses of a link.

        Args:
            url: The link.
            subject: What an error calls it.

        Raises:
            CogViewDownloadError: When the link itself may not be fetched.
        """
        link = _Origin.of(url)
        if link is None:
            raise link_refused("it is not a plain link", subject)
        is_named = self._is_named(link, subject)
        is_local = self._is_local(link)
        if link.scheme != "https" and not (link.scheme == "http" and (is_named or is_local)):
            raise link_refused("it is not https", subject)
        if is_named:
            named = _address(link.host)
            return is_host if named is None else lambda address, _: address == named
        if is_local:
            return is_loopback
        # The system's resolver reads numbers in spellings that are not looked up: they are literals all the same.
        return (lambda address, _: is_public(address)) if _NUMBER.fullmatch(link.host) else is_public

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
            host = parsed.raw_host.decode("ascii").lower()
        except (httpx.InvalidURL, ValueError, TypeError):
            return None
        if not host or parsed.port == 0 or _HAS_USER.match(url):
            return None
        address = _address(host)
        port = parsed.port or _DEFAULT_PORTS.get(parsed.scheme, 0)
        return cls(parsed.scheme, str(address) if address else host, port)


def link_refused(why: str, subject: str = "The image's link") -> CogViewDownloadError:
    """The error for a link that may not be fetched; fetching it again would not help."""
    return CogViewDownloadError(
        f"{subject} was not fetched: {why}.", hint="Its URL is on the result: look at it before opening it."
    )


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
        name = httpx.URL(f"https://{host}/").raw_host.decode("ascii").lower()
    except (httpx.InvalidURL, ValueError):
        return None
    return name if len(name) <= _MAX_NAME and _NAME.fullmatch(name) else None
