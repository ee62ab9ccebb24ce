"""What stands between this machine and a picture: versions, settings, the way to the API, and the key."""

from __future__ import annotations

import os
import platform
import ssl
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx

from langchain_cogview.api.settings import (
    BASE_URL_VARIABLE,
    BASE_URLS,
    KEY_VARIABLES,
    SANDBOX_KEY,
    both_keys_are_set,
    environment,
    found_key,
    httpcore_proxy,
    is_sandbox,
    normal_base_url,
    proxy_for,
    region_of,
    tls_context,
)
from langchain_cogview.errors import CogViewError
from langchain_cogview.probe import Finding, Service, network, probe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import SecretStr

    from langchain_cogview.catalog import Region

PACKAGES: Final = ("langchain-core", "httpx", "httpcore", "pydantic")
EXTRAS: Final = {
    "cli": ("typer",),
    "images": ("pillow",),
    "notebook": ("ipython", "pillow"),
    "progress": ("tqdm",),
    "socks": ("socksio",),
    "storage": ("fsspec", "s3fs"),
}

_KEY_SHOWN_FROM: Final = 16  # characters; of a shorter one, four would be much
_UNREAD: Final = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "ZAI_BASE_URL", "ZHIPUAI_API_BASE")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, in the order of the way to a picture. As text it is a Markdown list for a bug report.

    Holds no key (but its last four characters), no password of a proxy, and no home directory.
    """

    findings: tuple[Finding, ...]

    @property
    def first_failed(self) -> Finding | None:
        """The one to mend first; None where all is well."""
        return next((each for each in self.findings if each.state == "failed"), None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"ok": self.first_failed is None, "findings": [asdict(each) for each in self.findings]}

    def __str__(self) -> str:
        return "\n".join(("### cogview doctor", "", *map(str, self.findings)))


def diagnose(*, base_url: str | None = None, region: Region | None = None, offline: bool = False) -> Diagnosis:
    """Look at everything that a picture needs, without making one.

    Args:
        base_url: As for `CogViewImageGenerator`.
        region: The same.
        offline: Ask nobody; settings and folders only.
    """
    home = str(Path.home())
    return Diagnosis(
        tuple(
            Finding(**{**asdict(each), "text": _homeless(each.text, home), "hint": _homeless(each.hint, home)})
            for each in _findings(base_url, region, offline=offline)
        )
    )


def _homeless(text: str, home: str) -> str:
    return text.replace(home, "~") if len(home) > 1 else text


def _findings(base_url: str | None, region: Region | None, *, offline: bool) -> Iterator[Finding]:
    yield from _versions()
    service, found = _service(base_url, region)
    yield from found
    yield from (each for each in (_unread(), _folder()) if each)
    if service is None:
        return
    if is_sandbox(service.base_url):
        yield Finding("network", "skipped", "The sandbox is in this process; there is no network in between.")
        yield from probe(service, [])
        return
    ready = [*_proxy(service.url), *_certificates(service.url)]
    yield from ready
    if offline:
        yield Finding("network", "skipped", "Nothing was asked, as told (offline).")
    elif not any(each.state == "failed" for each in ready):
        yield from network(service)


def _versions() -> Iterator[Finding]:
    system = f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield Finding(
        "versions", "ok", f"langchain-cogview {_version('langchain-cogview')}, {system}, {ssl.OPENSSL_VERSION}."
    )
    yield Finding("packages", "ok", ", ".join(f"{name} {_version(name)}" for name in PACKAGES) + ".")
    extras = (f"{extra} ({', '.join(f'{name} {_version(name)}' for name in names)})" for extra, names in EXTRAS.items())
    yield Finding("extras", "ok", ", ".join(extras) + ".")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _failed(name: str, error: CogViewError, **more: Any) -> Finding:
    return Finding(name, "failed", error.message, error.hint, error=type(error).__name__, **more)


def _service(base_url: str | None, region: Region | None) -> tuple[Service | None, list[Finding]]:
    """Where a picture would be asked for and with what key; None where that cannot be known."""
    given = environment(BASE_URL_VARIABLE) if base_url is None else base_url
    source = "as given" if base_url is not None else f"set by {BASE_URL_VARIABLE}" if given else "the region's"
    try:
        normal = None if given is None else normal_base_url(given)
        found = region_of(normal, region)
        address = normal or BASE_URLS[found]
    except CogViewError as error:
        return None, [_failed("base URL", error, seconds=None)]
    findings = [Finding("region", "ok", f"{found}."), Finding("base URL", "ok", f"{address} ({source}).")]
    if is_sandbox(address):
        return Service(address, SANDBOX_KEY), [*findings, Finding("key", "ok", "The sandbox needs none.")]
    key = None
    try:
        key = found_key(None, found)
    except CogViewError as error:
        findings.append(_failed("key", error))
    else:
        both = not (region or given) and both_keys_are_set()
        hint = f"{' and '.join(KEY_VARIABLES.values())} are both set: --region chooses." if both else ""
        text = f"from {KEY_VARIABLES[found]}, {_end_of(key)}."
        findings.append(Finding("key", "note" if both else "ok", text, hint))
    return Service(address, key), findings


def _end_of(key: SecretStr) -> str:
    text = key.get_secret_value()
    return f"ends in {text[-4:]}" if len(text) >= _KEY_SHOWN_FROM else "too short to show its end"


def _unread() -> Finding | None:
    names = [name for name in _UNREAD if environment(name)]
    text = f"This package does not read {', '.join(names)}."
    hint = "Its own are SSL_CERT_FILE and SSL_CERT_DIR, and COGVIEW_BASE_URL."
    return Finding("other settings", "note", text, hint) if names else None


def _folder() -> Finding:
    try:
        folder = Path.cwd()
        with tempfile.TemporaryFile(dir=folder):
            return Finding("current folder", "ok", f"{folder} can be written to.")
    except OSError as error:
        text = f"It cannot be written to ({error.strerror})."
        return Finding("current folder", "note", text, "Choose another place for pictures: -o FILE, or output_dir=.")


def _proxy(url: httpx.URL) -> Iterator[Finding]:
    proxy = proxy_for(url)
    if proxy is None:
        yield Finding("proxy", "ok", f"none for {url.host}.")
        return
    try:
        httpcore_proxy(proxy, url.scheme)
    except CogViewError as error:
        yield _failed("proxy", error)
        return
    yield Finding("proxy", "ok", f"{_without_password(proxy)}.")


def _without_password(proxy: str) -> str:
    url = httpx.URL(proxy)
    port = f":{url.port}" if url.port else ""
    return f"{url.scheme}://{url.host}{port}" + (" with a user name" if url.username or url.password else "")


def _certificates(url: httpx.URL) -> Iterator[Finding]:
    if url.scheme != "https":
        yield Finding("certificates", "skipped", "The base URL is http.")
        return
    try:
        tls_context()
    except CogViewError as error:
        yield _failed("certificates", error)
        return
    settings = {name: os.environ[name] for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)}
    missing = [name for name, place in settings.items() if not os.access(place, os.R_OK)]
    text = ", ".join(f"{name}={place}" for name, place in settings.items()) or "the built-in ones"
    if missing:
        yield Finding("certificates", "note", f"{text}.", f"{missing[0]} names nothing that can be read.")
    else:
        yield Finding("certificates", "ok", f"{text}.")
