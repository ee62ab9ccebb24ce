"""`cogview doctor`: what stands between this machine and a picture: versions, settings, the way to the API, and the key.

Only the API's own host is asked, by the same connections, proxies and certificates as a picture would be. The probe is one
POST that the service has to refuse for two reasons, so that neither alone has to hold: it names a model that does not
exist, and it has no prompt. The refusal tells that the key is good: one for the key itself (401, codes 1000 to 1005) comes
in place of one for the request (1210 to 1215). That the key is judged first is how the service was seen to behave, and is
documented nowhere.
"""

from __future__ import annotations

import os
import platform
import ssl
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import httpcore
import httpx
from pydantic import SecretStr

from langchain_cogview.addresses import resolve
from langchain_cogview.api.endpoint import Call, Endpoint
from langchain_cogview.api.protocol import read_reply
from langchain_cogview.api.settings import (
    BASE_URL_VARIABLE,
    BASE_URLS,
    KEY_VARIABLES,
    SANDBOX_ENDPOINT,
    SANDBOX_KEY,
    both_keys_are_set,
    environment,
    httpcore_proxy,
    is_sandbox,
    normal_base_url,
    proxy_for,
    region_of,
    resolve_key,
    tls_context,
)
from langchain_cogview.api.transport import asender, sender
from langchain_cogview.concurrency import Deadline
from langchain_cogview.errors import (
    CogViewAuthenticationError,
    CogViewConfigurationError,
    CogViewConnectionError,
    CogViewError,
    CogViewInvalidRequestError,
    CogViewMalformedReplyError,
    CogViewNotFoundError,
    CogViewServerError,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

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
PROBE: Final = {"model": "cogview-doctor-probe"}
"""The body of the probe: no such model, and no prompt."""
STEP_SECONDS: Final = 5.0
_KEY_SHOWN_FROM: Final = 16  # characters; of a shorter one, four would be much
_UNUSED_VARIABLES: Final = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "ZAI_BASE_URL", "ZHIPUAI_API_BASE")
_SKEW_SECONDS: Final = 60
_KEY_IS_GOOD: Final = {"1210", "1211", "1212", "1213", "1214", "1215", "1231", "1261"}
_STEPS: Final = (  # the end of httpcore's event, and what it is called here
    ("connect_tcp", "connect"),
    ("start_tls", "TLS"),
    ("receive_response_headers", "HTTP answer"),
)
State = Literal["ok", "note", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        state: `note` is worth a look but stops nothing; `skipped` was not looked at.
        text: What was found.
        hint: What to do; empty where there is nothing to do.
        seconds: How long it took; None where that says nothing.
        error: Name of the `CogViewError` class that a picture would fail with here; tells the exit code.
    """

    name: str
    state: State
    text: str
    hint: str = ""
    seconds: float | None = None
    error: str | None = None

    def __str__(self) -> str:
        took = "" if self.seconds is None else f" ({self.seconds:.2f} s)"
        return printable(f"- [{self.state}] {self.name}: {self.text}{took} {self.hint}", 2000)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, in the order of the way to a picture. As text it is a Markdown list for a bug report.

    Holds no key (but its last four characters), no password of a proxy, and no home directory.
    """

    findings: tuple[Finding, ...]

    @property
    def first_failed(self) -> Finding | None:
        """The one to mend first; None where all is well."""
        return next((item for item in self.findings if item.state == "failed"), None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"ok": self.first_failed is None, "findings": [asdict(item) for item in self.findings]}

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
            Finding(**{**asdict(item), "text": _without_home(item.text, home), "hint": _without_home(item.hint, home)})
            for item in _findings(base_url, region, offline=offline)
        )
    )


def _without_home(text: str, home: str) -> str:
    return text.replace(home, "~") if len(home) > 1 else text


def _findings(base_url: str | None, region: Region | None, *, offline: bool) -> Iterator[Finding]:
    yield from _versions()
    service, found = _service(base_url, region)
    yield from found
    yield from (item for item in (_unused_variables(), _folder()) if item)
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
    elif not any(item.state == "failed" for item in ready):
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


def _service(base_url: str | None, region: Region | None) -> tuple[Target | None, list[Finding]]:
    """Where a picture would be asked for and with what key; None where that cannot be known."""
    configured = environment(BASE_URL_VARIABLE) if base_url is None else base_url
    source = "as given" if base_url is not None else f"set by {BASE_URL_VARIABLE}" if configured else "the region's"
    try:
        normal = None if configured is None else normal_base_url(configured)
        found = region_of(normal, region)
        address = normal or BASE_URLS[found]
    except CogViewError as error:
        return None, [_failed("base URL", error, seconds=None)]
    findings = [Finding("region", "ok", f"{found}."), Finding("base URL", "ok", f"{address} ({source}).")]
    if is_sandbox(address):
        return Target(address, SANDBOX_KEY), [*findings, Finding("key", "ok", "The sandbox needs none.")]
    key = None
    try:
        key = resolve_key(None, found)
    except CogViewError as error:
        findings.append(_failed("key", error))
    else:
        both = not (region or configured) and both_keys_are_set()
        hint = f"{' and '.join(KEY_VARIABLES.values())} are both set: --region chooses." if both else ""
        text = f"from {KEY_VARIABLES[found]}, {_end_of(key)}."
        findings.append(Finding("key", "note" if both else "ok", text, hint))
    return Target(address, key), findings


def _end_of(key: SecretStr) -> str:
    text = key.get_secret_value()
    return f"ends in {text[-4:]}" if len(text) >= _KEY_SHOWN_FROM else "too short to show its end"


def _unused_variables() -> Finding | None:
    names = [name for name in _UNUSED_VARIABLES if environment(name)]
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


# --- the way to the API and the key


class Target(NamedTuple):
    """Where a picture would be asked for, and with what key.

    Attributes:
        base_url: In normal form.
        key: None where there is none that could be used.
    """

    base_url: str
    key: SecretStr | None

    @property
    def url(self) -> httpx.URL:
        """The base URL that requests are made with."""
        return httpx.URL(SANDBOX_ENDPOINT if is_sandbox(self.base_url) else self.base_url)


def network(service: Target) -> Iterator[Finding]:
    """Look the host up, connect to it, and ask it what it must refuse; each step within 5 s."""
    url, proxy = service.url, proxy_for(service.url)
    first = httpx.URL(proxy) if proxy else url
    begun = time.monotonic()
    try:
        addresses = resolve(first.host, first.port or 443, None, Deadline(STEP_SECONDS))
    except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
        hint = "Check the network's name service, the base URL and the proxy settings."
        kind = CogViewConnectionError.__name__
        yield Finding("look-up", "failed", printable(str(error)), hint, time.monotonic() - begun, kind)
        return
    text = f"{first.host}{' (the proxy)' if proxy else ''} has {len(addresses)} address(es)."
    yield Finding("look-up", "ok", text, seconds=time.monotonic() - begun)
    steps: list[Finding] = []
    judged = list(probe(service, steps))
    yield from steps
    yield from judged


@dataclass(slots=True)
class _ProbeTrace:
    """Listens to one request on its way, as httpcore's trace and the reply tell it."""

    steps: list[Finding]
    proxied: bool
    begun: dict[str, float] = field(default_factory=dict)
    date: str | None = None

    def prepare(self, request: httpx.Request, *, has_key: bool) -> None:
        """Take times for each step, and take the header for a key that is not there away."""
        trace = request.extensions["trace"]

        def on_trace(event: str, info: dict[str, Any]) -> None:
            self.on_event(event, info)
            trace(event, info)

        limits = dict.fromkeys(request.extensions["timeout"], STEP_SECONDS)
        request.extensions.update(trace=on_trace, timeout=limits)
        if not has_key:
            del request.headers["Authorization"]

    def on_event(self, event: str, info: dict[str, Any]) -> None:
        name, _, end = event.rpartition(".")
        step = next((shown for traced, shown in _STEPS if name.endswith(traced)), None)
        if name.endswith("send_request_headers") and getattr(info.get("request"), "method", b"CONNECT") != b"CONNECT":
            self.begun["HTTP answer"] = time.monotonic()  # of the API, not of a proxy
        if step is None or (step == "HTTP answer" and step not in self.begun):
            return
        if end == "started" and step != "HTTP answer":
            self.begun[step] = time.monotonic()
        elif end in {"complete", "failed"}:
            self.add_step(step, info, failed=end == "failed")

    def add_step(self, step: str, info: dict[str, Any], *, failed: bool) -> None:
        seconds = time.monotonic() - self.begun.pop(step, time.monotonic())
        if failed:
            said = printable(str(info.get("exception", "")) or "no answer in time")
            self.steps.append(
                Finding(step, "failed", f"{said}.", seconds=seconds, error=CogViewConnectionError.__name__)
            )
            return
        text = {"connect": "to the proxy" if self.proxied else "connected", "TLS": "the certificate is trusted"}
        self.steps.append(Finding(step, "ok", f"{text.get(step, 'the API answers')}.", seconds=seconds))


def probe(service: Target, steps: list[Finding]) -> Iterator[Finding]:
    """Ask for what must be refused, and judge by the refusal. Adds the steps of the way to `steps`."""
    trace = _ProbeTrace(steps, proxied=not is_sandbox(service.base_url) and proxy_for(service.url) is not None)
    send = sender(service.base_url)

    def sent(request: httpx.Request) -> httpx.Response:
        trace.prepare(request, has_key=service.key is not None)
        response = send(request)
        trace.date = response.headers.get("date")
        return response

    endpoint = Endpoint(
        base_url=str(service.url),
        api_key=service.key or SecretStr("no key"),
        account=service.base_url,
        send=sent,
        asend=asender(service.base_url),
    )
    begun = time.monotonic()
    try:
        endpoint.exchange(Call("POST", "/images/generations", dict(PROBE)), Deadline(4 * STEP_SECONDS), read_reply)
        refusal = None
    except CogViewError as error:
        refusal = error
        for step in list(trace.begun):
            trace.add_step(step, {}, failed=True)
    yield from _clock(trace.date)
    took = time.monotonic() - begun
    if refusal is not None and refusal.status is None:
        yield from _unreached(refusal, steps, took)
    else:
        yield _judge_refusal(refusal, service.key is not None, took)


def _unreached(error: CogViewError, steps: list[Finding], took: float) -> Iterator[Finding]:
    """The host gave no answer. What a picture's error says of charges does not hold for the probe."""
    detail = f" ({error.detail})" if error.detail else ""
    sent = error.may_have_been_charged
    message = "The probe got no answer, or a broken one." if sent else error.message
    hint = "Try again later, and check the proxy settings and the base URL." if sent else error.hint
    kind = CogViewConnectionError.__name__ if sent else type(error).__name__
    failed = [item for item in steps if item.state == "failed"]
    steps[:] = [item for item in steps if item.state != "failed"]
    name = failed[-1].name if failed else "API"
    yield Finding(name, "failed", f"{message}{detail}", hint, failed[-1].seconds if failed else took, kind)


def _judge_refusal(refusal: CogViewError | None, has_key: bool, took: float) -> Finding:  # noqa: FBT001
    if refusal is None:
        text = "The service answered the probe, which it has to refuse, with a picture: it is not the provider's API."
        return Finding("probe", "failed", text, "Check the base URL.", took, CogViewMalformedReplyError.__name__)
    said = ", ".join(filter(None, (refusal.code and f"code {refusal.code}", f"HTTP {refusal.status}")))
    if refusal.code in _KEY_IS_GOOD and isinstance(refusal, CogViewInvalidRequestError | CogViewNotFoundError):
        if not has_key:
            return Finding("probe", "skipped", f"The API answers ({said}); there is no key to judge.", seconds=took)
        text = f"The key is accepted: the request itself was refused, as it must be ({said}). No picture was made."
        return Finding("probe", "ok", text, seconds=took)
    if not has_key and isinstance(refusal, CogViewAuthenticationError):
        return Finding("probe", "skipped", f"The API answers ({said}) and asks for a key.", seconds=took)
    if refusal.may_have_been_charged or (isinstance(refusal, CogViewInvalidRequestError) and refusal.code is None):
        busy = (refusal.status or 0) >= 500  # noqa: PLR2004
        text = f"The host answers, but not as the API does ({said})."
        hint = "Try again later." if busy else "Check the base URL: another service, or a login page, may stand there."
        kind = CogViewServerError if busy else CogViewConfigurationError
        return Finding("probe", "failed", text, hint, took, kind.__name__)
    return Finding("probe", "failed", f"{refusal.message} ({said})", refusal.hint, took, type(refusal).__name__)


def _clock(date: str | None) -> Iterator[Finding]:
    try:
        moment = parsedate_to_datetime(date or "")
    except (ValueError, TypeError, OverflowError):
        return
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    skew = round((datetime.now(UTC) - moment).total_seconds())
    if abs(skew) <= _SKEW_SECONDS:
        yield Finding("clock", "ok", "It agrees with the API's to the minute.")
    else:
        ahead = "ahead of" if skew > 0 else "behind"
        hint = "Set it right: certificates and the ends of links are judged by it."
        yield Finding("clock", "note", f"It is {abs(skew):,} s {ahead} the API's.", hint)
