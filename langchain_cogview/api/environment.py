"""What the environment says of proxies and certificates, and what to tell somebody whose settings are wrong."""

from __future__ import annotations

import ipaddress
import os
import ssl
import urllib.request
from functools import lru_cache

import httpcore
import httpx

from langchain_cogview.api.network import literal_address
from langchain_cogview.errors import CogViewConfigurationError


@lru_cache(maxsize=256)
def _is_loopback(host: str) -> bool:
    literal = literal_address(host)
    return host == "localhost" or bool(literal and ipaddress.ip_address(literal).is_loopback)


def proxy_for(url: httpx.URL) -> str | None:
    """The proxy that the environment names for a URL; loopback is never reached through one."""
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
    """A proxy's URL as httpcore takes it; `scheme` is the request's, to name the variable in an error."""
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
    """One context for a setting of the environment: making one takes 15 ms."""
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
