"""Base URL, key, region, proxies and certificates: from arguments and the environment, checked before any request.

No function here raises while it holds a key in plain text, so that no traceback can show one.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import os
import ssl
import urllib.request
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import SplitResult, urlsplit

from pydantic import SecretStr

from langchain_cogview.catalog import find_model
from langchain_cogview.concurrency import in_thread
from langchain_cogview.errors import CogViewConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import httpcore
    import httpx

    from langchain_cogview.catalog import Region
    from langchain_cogview.limits import SharedLimit

BASE_URLS: Final[dict[Region, str]] = {
    "china": "https://open.bigmodel.cn/api/paas/v4",
    "international": "https://api.z.ai/api/paas/v4",
}
KEY_VARIABLES: Final[dict[Region, str]] = {"china": "ZHIPUAI_API_KEY", "international": "ZAI_API_KEY"}
BASE_URL_VARIABLE: Final = "COGVIEW_BASE_URL"
SHARED_LIMIT_VARIABLE: Final = "COGVIEW_SHARED_LIMIT"
SANDBOX_SCHEME: Final = "sandbox:"
SANDBOX_KEY: Final = SecretStr("sandbox")
"""Stands for a key at the sandbox in this process; not a secret."""
SANDBOX_ENDPOINT: Final = "https://sandbox.invalid/api/paas/v4"
"""What requests to the sandbox in this process are addressed to; `.invalid` names are never looked up."""

_CONSOLES: Final[dict[Region, str]] = {
    "china": "https://open.bigmodel.cn (user centre, API keys)",
    "international": "https://z.ai (manage API keys)",
}
_ROUTES = ("/async/images/generations", "/images/generations", "/chat/completions", "/async-result")
_warned_hosts: Final[set[str]] = set()
_HOSTS: Final[dict[str, Region]] = {"open.bigmodel.cn": "china", "api.z.ai": "international"}
_DOMAINS: Final = (".bigmodel.cn", ".z.ai")
"""Ends of the names of the provider's own hosts."""


def environment(name: str) -> str | None:
    """Return an environment variable, or None if it is not set or empty."""
    return os.environ.get(name, "").strip() or None


def find_shared_limit(setting: SharedLimit | str | None) -> SharedLimit | None:
    """Find the store of a shared limit: from a setting, else from `COGVIEW_SHARED_LIMIT`.

    Returns:
        The store; None if neither names one.

    Raises:
        CogViewConfigurationError: It is not usable.
    """
    named = setting or environment(SHARED_LIMIT_VARIABLE)
    if not named:
        return None
    from langchain_cogview.limits import shared_limit  # noqa: PLC0415  on use

    return shared_limit(named)


def is_sandbox(base_url: str | None) -> bool:
    """Return whether a base URL is that of a sandbox in this process."""
    return bool(base_url) and str(base_url).startswith(SANDBOX_SCHEME)


def is_free(base_url: str, key: SecretStr) -> bool:
    """Return whether images can be placeholders of the sandbox, which cost nothing. A header of the reply is not enough for that.

    Args:
        base_url: The base URL as the user wrote it.
        key: The API key.

    Returns:
        True for the sandbox in this process, for a sandbox that this process serves, and for a service of this machine that the
        user marks as a sandbox by the key "sandbox".
    """
    if is_sandbox(base_url):
        return True
    from langchain_cogview.addresses import SANDBOX_SERVERS, is_loopback  # noqa: PLC0415  the HTTP stack

    parts = urlsplit(base_url)
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname or ""
    try:
        if not is_loopback(ipaddress.ip_address(host)):
            return False
    except ValueError:
        return False
    return (host, parts.port) in SANDBOX_SERVERS or key.get_secret_value() == SANDBOX_KEY.get_secret_value()


def normal_base_url(text: str) -> str:
    """Normalise a base URL: remove a pasted route or a trailing slash, and add the path of the API at the provider's hosts.

    Returns:
        The URL that routes are added to.

    Raises:
        CogViewConfigurationError: It is not an http or https URL, or it holds a query or a user name.
    """
    url = text.strip()
    if is_sandbox(url):
        return url
    if "://" not in url and "." in url:
        url = f"https://{url}"
    parts = _parts(url)
    if parts is None:
        also = " Did you mean 'sandbox:'?" if url.lower() == "sandbox" else ""
        raise CogViewConfigurationError(
            "The base URL is not an http or https URL.",
            hint=f"Use {BASE_URLS['china']}, {BASE_URLS['international']}, 'sandbox:' or your gateway's URL.{also}",
        )
    if parts.query or parts.fragment or parts.username or parts.password:
        raise CogViewConfigurationError(
            "The base URL holds a query, a fragment or a user name.",
            hint="Give scheme, host and path alone; the key goes into api_key.",
        )
    if parts.scheme != "https" and f".{_host(parts)}".endswith(_DOMAINS):
        raise CogViewConfigurationError(
            "The base URL is http: the key would go over the network in plain text.", hint="Use https."
        )
    path = parts.path.rstrip("/")
    for route in _ROUTES:
        path = path.removesuffix(route)
    if _host(parts) in _HOSTS:
        path = _known_path(parts, path)
    return f"{parts.scheme}://{parts.netloc}{path.rstrip('/')}"


def _host(parts: SplitResult) -> str:
    return (parts.hostname or "").rstrip(".")  # with and without the dot of the root it is the same host


def _parts(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return None
    return parts if usable and url.isprintable() and " " not in url else None


def _known_path(parts: SplitResult, path: str) -> str:
    """Return the path at one of the provider's own hosts.

    Raises:
        CogViewConfigurationError: The path is that of the coding plan, which does not cover images.
    """
    if "/coding/" in f"{path}/":
        raise CogViewConfigurationError(
            "The base URL is the coding plan's, which does not cover images.",
            hint=f"Use {BASE_URLS[_HOSTS[_host(parts)]]} with an ordinary API key.",
        )
    return "/api/paas/v4" if path in {"", "/api", "/api/paas"} else path


def plain_text_warning(base_url: str) -> str | None:
    """Return a warning, once per host, for a base URL that sends the key over the network in plain text."""
    parts = urlsplit(base_url)
    host = _host(parts)
    if parts.scheme != "http" or _is_loopback(host) or host in _warned_hosts:
        return None
    _warned_hosts.add(host)
    return f"The base URL is http: the key goes over the network to {host} in plain text. Use https if the gateway offers it."


@lru_cache(maxsize=256)
def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def both_keys_are_set() -> bool:
    """Return whether the environment has the keys of both regions."""
    return all(environment(variable) for variable in KEY_VARIABLES.values())


def region_of(base_url: str | None, region: Region | None) -> Region:
    """Find the region: the argument, else the one of the base URL's host, else the one whose key is set, else China.

    Returns:
        The region.

    Raises:
        CogViewConfigurationError: The argument is no region, or not the one of the base URL's host.
    """
    host = _host(urlsplit(base_url)) if base_url and not is_sandbox(base_url) else ""
    known = _HOSTS.get(host)
    if region and known and region != known:
        raise CogViewConfigurationError(
            f"region={region!r} does not go with the base URL {base_url}, which is {known}.",
            hint="Leave one of the two out.",
        )
    only_international = bool(environment("ZAI_API_KEY")) and not environment("ZHIPUAI_API_KEY")
    return region or known or ("international" if only_international else "china")


def key_problem(key: SecretStr) -> str | None:
    """Return what is wrong with the form of a key, without showing any of it, or None."""
    text = key.get_secret_value()
    if not text.strip():
        return "is empty"
    if text.lower().startswith("bearer "):
        return "starts with 'Bearer '; give the key alone"
    if any(quote in text for quote in "\"'`“”‘’"):
        return "has quotation marks in it"
    if any(c.isspace() for c in text):
        return "has a blank or a line end in it"
    if not (text.isascii() and text.isprintable()):
        return "has a character that no key has"
    return None


def resolve_key(key: SecretStr | None, region: Region, *, unpickled: bool = False) -> SecretStr:
    """Return the API key to use: the argument, else the region's environment variable.

    Args:
        key: The key that was passed, or None.
        region: The region whose variable is read.
        unpickled: Whether the key is for a generator that was unpickled, perhaps in another process.

    Returns:
        A key whose form is valid.

    Raises:
        CogViewConfigurationError: There is no key, or its form is not valid.
    """
    variable = KEY_VARIABLES[region]
    source = "api_key"
    if key is None:
        source = variable
        key = SecretStr(os.environ.get(variable, ""))
        if not key.get_secret_value():
            message, hint = _missing_after_pickle(region) if unpickled else _missing(region)
            raise CogViewConfigurationError(message, hint=hint)
    problem = key_problem(key)
    if problem:
        raise CogViewConfigurationError(
            f"The API key in {source} {problem}.", hint="Copy it from the provider's console as it stands there."
        )
    return key


def _missing_after_pickle(region: Region) -> tuple[str, str]:
    variable = KEY_VARIABLES[region]
    return (
        f"There is no API key in this process: a pickled generator leaves its key behind, and {variable} is not set here.",
        f"Set {variable} in the environment of both processes before they start, or make the generator in this process.",
    )


def _missing(region: Region) -> tuple[str, str]:
    """Return the message and the hint for a missing key."""
    other: Region = "international" if region == "china" else "china"
    ways = ", or ".join(f"{KEY_VARIABLES[item]} to a key from {_CONSOLES[item]}" for item in (region, other))
    hint = f"Set {ways}; or pass api_key=...; or try it without a key: base_url='sandbox:'."
    if not os.environ.get(KEY_VARIABLES[other]):
        return f"There is no API key for the region {region!r}.", hint
    return (
        f"There is no API key for the region {region!r}; {KEY_VARIABLES[other]} is set, but that is the other platform's key.",
        f"Pass region={other!r} to use it. Otherwise: {hint[0].lower()}{hint[1:]}",
    )


class Service(NamedTuple):
    """Where requests go, and with which key.

    Attributes:
        key: The API key; None in an unpickled generator until it is read from the environment.
        region: The region of the account.
        base_url: The normalised base URL.
    """

    key: SecretStr | None
    region: Region
    base_url: str

    @property
    def is_sandbox(self) -> bool:
        """Whether it is the sandbox in this process."""
        return is_sandbox(self.base_url)

    def with_key(self) -> Service:
        """Complete the service of an unpickled generator with the key of this process's environment.

        Returns:
            The service with its key.

        Raises:
            CogViewConfigurationError: The environment has no key, or its form is not valid.
        """
        if self.key is not None:
            return self
        return self._replace(key=SANDBOX_KEY if self.is_sandbox else resolve_key(None, self.region, unpickled=True))


def find_service(
    api_key: SecretStr | None, region: Region | None, base_url: str | None, *, injected: bool = False
) -> Service:
    """Complete the arguments from the environment.

    Returns:
        The service to use.

    Raises:
        CogViewConfigurationError: An argument is missing or malformed, or two of them contradict each other.
    """
    base_url = environment(BASE_URL_VARIABLE) if base_url is None else base_url
    found = region_of(None if base_url is None else normal_base_url(base_url), region)
    url = normal_base_url(BASE_URLS[found] if base_url is None else base_url)
    if injected and is_sandbox(url):
        raise CogViewConfigurationError(
            "The sandbox in this process is not reached by an HTTP client.",
            hint="Leave http_client and http_async_client out, or start `python -m langchain_cogview.sandbox`.",
        )
    key = SANDBOX_KEY if is_sandbox(url) else resolve_key(api_key, found)
    return Service(key, found, url)


def service_warnings(service: Service, models: Iterable[str], *, chosen: bool) -> Iterator[str]:
    """Yield warnings about a service.

    Args:
        service: The service to check.
        models: The names of the models that will be used.
        chosen: Whether the caller passed a key, a region or a base URL.

    Yields:
        One warning at a time, as text.
    """
    for name in models:
        info = find_model(name)
        if info and service.region not in info.regions:
            yield f"The model {info.name} is not documented for region={service.region!r}; it may not answer there."
    if is_sandbox(service.base_url):
        return
    plain_text = plain_text_warning(service.base_url)
    if plain_text:
        yield plain_text
    if not (chosen or environment(BASE_URL_VARIABLE)) and both_keys_are_set():
        yield "ZHIPUAI_API_KEY and ZAI_API_KEY are both set: the first is used, with region='china'. Pass region= to choose."


# --- what the environment says of proxies and certificates


def proxy_for(url: httpx.URL) -> str | None:
    """Return the proxy that the environment sets for a URL, or None. Loopback addresses are never reached through a proxy."""
    if _is_loopback(url.host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _proxy_variable(scheme: str) -> str:
    names = (f"{scheme}_proxy", f"{scheme}_proxy".upper(), "all_proxy", "ALL_PROXY")
    return next((name for name in names if os.environ.get(name)), "the system's proxy setting")


def httpcore_proxy(proxy: str, scheme: str) -> httpcore.Proxy:
    """Convert the URL of a proxy for httpcore. `scheme` is that of the request, to name the variable in an error.

    Returns:
        The proxy.

    Raises:
        CogViewConfigurationError: The proxy cannot be used.
    """
    import httpcore  # noqa: PLC0415  the HTTP stack
    import httpx  # noqa: PLC0415

    problem = None
    try:
        url = httpx.URL(proxy)
        if url.scheme in {"http", "https", "socks5", "socks5h"} and url.host:
            if url.scheme.startswith("socks"):
                import socksio  # noqa: F401, PLC0415  httpcore needs it and says so too late
            auth = (url.username, url.password) if url.username or url.password else None
            tls = tls_context() if url.scheme == "https" else None
            return httpcore.Proxy(str(url.copy_with(username=None, password=None)), auth=auth, ssl_context=tls)
        problem = f"{_proxy_variable(scheme)} names a proxy that is not understood."
    except ImportError:
        raise CogViewConfigurationError(
            f"{_proxy_variable(scheme)} names a SOCKS proxy, which needs the package socksio.",
            hint='Install it with: pip install "langchain-cogview[socks]", or unset the variable.',
        ) from None
    except httpx.InvalidURL:
        problem = f"{_proxy_variable(scheme)} is not a URL."
    raise CogViewConfigurationError(problem, hint="Set it to http://host:port or socks5://host:port, or unset it.")


_tls_contexts: dict[tuple[str | None, str | None], ssl.SSLContext] = {}


def tls_context() -> ssl.SSLContext:
    """Return the TLS context for the environment's certificates. It is cached, because making one takes 15 ms.

    Raises:
        CogViewConfigurationError: The certificates cannot be read.
    """
    import httpx  # noqa: PLC0415  the HTTP stack

    setting = (os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    context = _tls_contexts.get(setting)
    if context is None:
        try:
            context = httpx.create_ssl_context()
        except (OSError, ssl.SSLError, ValueError) as error:
            name = "SSL_CERT_FILE" if setting[0] else "SSL_CERT_DIR" if setting[1] else "the certificate store"
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise CogViewConfigurationError(
                f"The certificates named by {name} cannot be read ({reason}).",
                hint=f"Point {name} to a readable PEM file, or unset it.",
            ) from None
        _tls_contexts[setting] = context
    return context


async def preload(base_url: str) -> None:
    """Load in a thread what the first call to a service needs: the HTTP stack, and the certificates for https.

    Each takes tens of milliseconds, for which it would block the event loop.
    """
    scheme = base_url.partition(":")[0]
    if scheme not in _LOADED:
        await in_thread(_load, scheme)
        _LOADED.add(scheme)


def _load(scheme: str) -> None:
    for name in ("langchain_cogview.generation", *_MODULES.get(scheme, _HTTP_MODULES)):
        importlib.import_module(name)
    if scheme == "https":
        with contextlib.suppress(Exception):  # known by the call that needs them
            tls_context()


_HTTP_MODULES: Final = ("anyio.streams.tls",)
_MODULES: Final = {"sandbox": ("langchain_cogview.sandbox.service",)}
_LOADED: Final[set[str]] = set()
