"""The findings of `cogview doctor`: versions, settings, the connection to the API, and the key.

Only the API's own host is contacted, through the same connections, proxies and certificates as for an image. The probe is one
POST that the service must refuse for two independent reasons: it names a model that does not exist, and it has no prompt. The
refusal shows whether the key is accepted: an error about the key (401, codes 1000 to 1005) takes precedence over one about the
request (1210 to 1215). That order was observed, and is not documented by the provider.
"""

from __future__ import annotations

import os
import platform
import ssl
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
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
from langchain_cogview.api.sending import asender, sender
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
    "agents": ("langchain", "pillow"),
    "cli": ("typer",),
    "images": ("pillow",),
    "mcp": ("mcp", "pillow", "typer"),
    "notebook": ("ipython", "pillow"),
    "progress": ("tqdm",),
    "ray": ("ray",),
    "redis": ("redis",),
    "socks": ("socksio",),
    "storage": ("fsspec", "s3fs"),
}
PROBE: Final = {"model": "cogview-doctor-probe"}
"""Body of the probe: a model that does not exist, and no prompt."""
PHASE_SECONDS: Final = 5.0
_ABSENT: Final = "not installed"
_KEY_SHOWN_FROM: Final = 16  # characters; four characters of a shorter key would reveal too much
_UNUSED_VARIABLES: Final = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "ZAI_BASE_URL", "ZHIPUAI_API_BASE")
_SKEW_SECONDS: Final = 60
_KEY_IS_GOOD: Final = {"1210", "1211", "1212", "1213", "1214", "1215", "1231", "1261"}
_PHASES: Final = (  # suffix of httpcore's event name, and the name of the finding
    ("connect_tcp", "connect"),
    ("start_tls", "TLS"),
    ("receive_response_headers", "HTTP answer"),
)
_NETWORK: Final = frozenset({"look-up", "connect", "TLS", "HTTP answer", "API"})
"""Findings that the verdict calls "network"."""
State = Literal["ok", "note", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        name: Name of the check.
        state: `ok`; `note` for a remark that prevents nothing; `failed`; `skipped` if it was not checked.
        text: What was found.
        hint: What to do; empty if there is nothing to do.
        seconds: Duration in seconds; None if it has no meaning.
        error: Name of the `CogViewError` class with which a request would fail; determines the exit code.
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
    """All findings, in the order of a request. `str(diagnosis)` is a Markdown list for a bug report.

    It contains no key except the last four characters, no password of a proxy, and no home directory.

    Attributes:
        findings: The results of all checks.
    """

    findings: tuple[Finding, ...]

    @property
    def first_failed(self) -> Finding | None:
        """The finding to fix first; None if nothing failed."""
        return next((item for item in self.findings if item.state == "failed"), None)

    @property
    def problems(self) -> tuple[str, ...]:
        """Names of what failed, each once; every check of the network is `network`."""
        failed = (item.name for item in self.findings if item.state == "failed")
        return tuple(dict.fromkeys("network" if name in _NETWORK else name for name in failed))

    @property
    def verdict(self) -> str:
        """One sentence: how many problems there are, and where."""
        problems = self.problems
        if not problems:
            return "No problem was found."
        return f"{len(problems)} problem{'' if len(problems) == 1 else 's'}: {', '.join(problems)}."

    def to_dict(self) -> dict[str, Any]:
        """Convert the diagnosis to plain JSON.

        Returns:
            `ok`, the names of the problems, and the list of findings.
        """
        findings = [asdict(item) for item in self.findings]
        return {"ok": self.first_failed is None, "problems": [*self.problems], "findings": findings}

    def __str__(self) -> str:
        return "\n".join(("### cogview doctor", "", *map(str, self.findings), "", self.verdict))


def diagnose(*, base_url: str | None = None, region: Region | None = None, offline: bool = False) -> Diagnosis:
    """Check everything that an image needs, without generating one.

    Args:
        base_url: As for `CogViewImageGenerator`.
        region: As for `CogViewImageGenerator`.
        offline: Send nothing; check settings and folders only.

    Returns:
        The findings.
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
    service, found = find_service(base_url, region)
    yield from found
    in_sandbox = service is not None and is_sandbox(service.base_url)
    if not in_sandbox and (unused := _unused_variables()):
        yield unused
    yield _folder()
    if service is None:
        return
    if in_sandbox:
        yield from probe(service, [])
        return
    ready = [*_proxy(service.url), *_certificates(service.url)]
    yield from ready
    if offline:
        yield Finding("network", "skipped", "Nothing was sent, because of --offline.")
    elif not any(item.state == "failed" for item in ready):
        yield from network(service)


def _versions() -> Iterator[Finding]:
    system = f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield Finding(
        "versions", "ok", f"langchain-cogview {_version('langchain-cogview')}, {system}, {ssl.OPENSSL_VERSION}."
    )
    yield Finding("packages", "ok", ", ".join(f"{name} {_version(name)}" for name in PACKAGES) + ".")
    missing = {extra: [name for name in names if _version(name) == _ABSENT] for extra, names in EXTRAS.items()}
    extras = (
        f"{extra} ({', '.join(f'{name} {_version(name)}' for name in names)})"
        for extra, names in EXTRAS.items()
        if not missing[extra]
    )
    yield Finding("extras", "ok", (", ".join(extras) or "none") + ".")
    absent = [f"{extra} ({', '.join(names)})" for extra, names in missing.items() if names]
    if absent:
        first = next(extra for extra, names in missing.items() if names)
        hint = f'They are optional; for example: pip install "langchain-cogview[{first}]"'
        yield Finding("extras", "note", f"Not installed: {', '.join(absent)}.", hint)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _ABSENT


def _failed(name: str, error: CogViewError, **more: Any) -> Finding:
    return Finding(name, "failed", error.message, error.hint, error=type(error).__name__, **more)


def find_service(base_url: str | None, region: Region | None) -> tuple[Target | None, list[Finding]]:
    """Determine the API and its key.

    Args:
        base_url: As for `diagnose`.
        region: As for `diagnose`.

    Returns:
        The API and its key, or None if they cannot be determined, with the findings about them.
    """
    configured = environment(BASE_URL_VARIABLE) if base_url is None else base_url
    source = (
        "from --base-url" if base_url is not None else f"set by {BASE_URL_VARIABLE}" if configured else "the region's"
    )
    try:
        normal = None if configured is None else normal_base_url(configured)
        found = region_of(normal, region)
        address = normal or BASE_URLS[found]
    except CogViewError as error:
        return None, [_failed("base URL", error, seconds=None)]
    if is_sandbox(address):
        text = "The offline sandbox, which needs no key and no network."
        return Target(address, SANDBOX_KEY), [Finding("base URL", "ok", text)]
    findings = [Finding("region", "ok", f"{found}."), Finding("base URL", "ok", f"{address} ({source}).")]
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
    hint = "It reads SSL_CERT_FILE, SSL_CERT_DIR and COGVIEW_BASE_URL."
    return Finding("other settings", "note", text, hint) if names else None


def _folder() -> Finding:
    try:
        folder = Path.cwd()
        with tempfile.TemporaryFile(dir=folder):
            return Finding("current folder", "ok", f"{folder} is writable.")
    except OSError as error:
        text = f"The current folder is not writable ({error.strerror})."
        return Finding("current folder", "note", text, "Choose another folder for images with -o.")


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
    missing = [name for name, path in settings.items() if not os.access(path, os.R_OK)]
    text = ", ".join(f"{name}={path}" for name, path in settings.items()) or "the built-in ones"
    if missing:
        yield Finding("certificates", "note", f"{text}.", f"{missing[0]} does not name a readable file or folder.")
    else:
        yield Finding("certificates", "ok", f"{text}.")


# --- the way to the API and the key


class Target(NamedTuple):
    """The API and the key to use.

    Attributes:
        base_url: In normal form.
        key: None if there is no usable key.
    """

    base_url: str
    key: SecretStr | None

    @property
    def url(self) -> httpx.URL:
        """The base URL that requests are sent to."""
        return httpx.URL(SANDBOX_ENDPOINT if is_sandbox(self.base_url) else self.base_url)


def network(service: Target) -> Iterator[Finding]:
    """Look up the host, connect to it, and send a request that it must refuse; each phase has a limit of 5 s.

    Args:
        service: The API and its key.

    Yields:
        The findings.
    """
    url, proxy = service.url, proxy_for(service.url)
    first = httpx.URL(proxy) if proxy else url
    begun = time.monotonic()
    try:
        addresses = resolve(first.host, first.port or 443, None, Deadline(PHASE_SECONDS))
    except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
        hint = "Check the DNS settings, the base URL and the proxy settings."
        kind = CogViewConnectionError.__name__
        yield Finding(
            "look-up", "failed", f"{printable(str(error)).rstrip('.')}.", hint, time.monotonic() - begun, kind
        )
        return
    text = f"{first.host}{' (the proxy)' if proxy else ''} has {len(addresses)} address(es)."
    yield Finding("look-up", "ok", text, seconds=time.monotonic() - begun)
    phases: list[Finding] = []
    judged = list(probe(service, phases))
    yield from phases
    yield from judged


@dataclass(slots=True)
class _ProbeTrace:
    """Observes one request, through httpcore's trace and the reply.

    Attributes:
        phases: Findings about the phases of the request.
        proxied: Whether a proxy is used.
        begun: When each phase started, on the monotonic clock, in seconds.
        date: The `Date` header of the reply.
    """

    phases: list[Finding]
    proxied: bool
    begun: dict[str, float] = field(default_factory=dict)
    date: str | None = None

    def prepare(self, request: httpx.Request, *, has_key: bool) -> None:
        """Trace the request, limit each phase, and remove the header if there is no key."""
        trace = request.extensions["trace"]

        def on_trace(event: str, info: dict[str, Any]) -> None:
            self.on_event(event, info)
            trace(event, info)

        limits = dict.fromkeys(request.extensions["timeout"], PHASE_SECONDS)
        request.extensions.update(trace=on_trace, timeout=limits)
        if not has_key:
            del request.headers["Authorization"]

    def on_event(self, event: str, info: dict[str, Any]) -> None:
        name, _, end = event.rpartition(".")
        phase = next((shown for traced, shown in _PHASES if name.endswith(traced)), None)
        if name.endswith("send_request_headers") and getattr(info.get("request"), "method", b"CONNECT") != b"CONNECT":
            self.begun["HTTP answer"] = time.monotonic()  # the API's answer, not a proxy's
        if phase is None or (phase == "HTTP answer" and phase not in self.begun):
            return
        if end == "started" and phase != "HTTP answer":
            self.begun[phase] = time.monotonic()
        elif end in {"complete", "failed"}:
            self.add_phase(phase, info, failed=end == "failed")

    def add_phase(self, phase: str, info: dict[str, Any], *, failed: bool) -> None:
        seconds = time.monotonic() - self.begun.pop(phase, time.monotonic())
        if failed:
            reason = printable(str(info.get("exception", "")) or "no answer in time")
            self.phases.append(
                Finding(phase, "failed", f"{reason}.", seconds=seconds, error=CogViewConnectionError.__name__)
            )
            return
        text = {"connect": "to the proxy" if self.proxied else "connected", "TLS": "the certificate is trusted"}
        self.phases.append(Finding(phase, "ok", f"{text.get(phase, 'the API answers')}.", seconds=seconds))


def probe(service: Target, phases: list[Finding]) -> Iterator[Finding]:
    """Send a request that must be refused, and judge the refusal.

    Args:
        service: The API and its key.
        phases: Findings about the phases of the request are added here.

    Yields:
        The findings about the clock and the key.
    """
    trace = _ProbeTrace(phases, proxied=not is_sandbox(service.base_url) and proxy_for(service.url) is not None)
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
        endpoint.exchange(Call("POST", "/images/generations", dict(PROBE)), Deadline(4 * PHASE_SECONDS), read_reply)
        refusal = None
    except CogViewError as error:
        refusal = error
        for phase in list(trace.begun):
            trace.add_phase(phase, {}, failed=True)
    yield from _clock(trace.date)
    took = time.monotonic() - begun
    if refusal is not None and refusal.status is None:
        yield from _unreached(refusal, phases, took)
    else:
        finding = _judge_refusal(refusal, service.key is not None, took)
        if finding.state == "ok" and is_sandbox(service.base_url):  # which has no key to accept
            finding = replace(
                finding, text=finding.text.replace("The key is accepted; the request itself", "The request")
            )
        yield finding


def _unreached(error: CogViewError, phases: list[Finding], took: float) -> Iterator[Finding]:
    """Yield what failed without an answer. What an image's error says about charges does not apply to the probe."""
    detail = f" ({error.detail})" if error.detail else ""
    sent = error.may_have_been_charged
    message = "The probe got no answer, or a broken one." if sent else error.message
    hint = "Try again later, and check the proxy settings and the base URL." if sent else error.hint
    kind = CogViewConnectionError.__name__ if sent else type(error).__name__
    failed = [item for item in phases if item.state == "failed"]
    phases[:] = [item for item in phases if item.state != "failed"]
    name = failed[-1].name if failed else "API"
    yield Finding(name, "failed", f"{message}{detail}", hint, failed[-1].seconds if failed else took, kind)


def _judge_refusal(refusal: CogViewError | None, has_key: bool, took: float) -> Finding:  # noqa: FBT001
    if refusal is None:
        text = "The service answered the probe, which it must refuse, with an image: this is not the provider's API."
        return Finding("probe", "failed", text, "Check the base URL.", took, CogViewMalformedReplyError.__name__)
    answer = ", ".join(filter(None, (refusal.code and f"code {refusal.code}", f"HTTP {refusal.status}")))
    if refusal.code in _KEY_IS_GOOD and isinstance(refusal, CogViewInvalidRequestError | CogViewNotFoundError):
        if not has_key:
            return Finding("probe", "skipped", f"The API answers ({answer}); there is no key to check.", seconds=took)
        text = f"The key is accepted; the request itself was refused, as expected ({answer}). No image was generated."
        return Finding("probe", "ok", text, seconds=took)
    if not has_key and isinstance(refusal, CogViewAuthenticationError):
        return Finding("probe", "skipped", f"The API answers ({answer}) and asks for a key.", seconds=took)
    if refusal.may_have_been_charged or (isinstance(refusal, CogViewInvalidRequestError) and refusal.code is None):
        busy = (refusal.status or 0) >= 500  # noqa: PLR2004
        text = f"The host answers, but not as the API does ({answer})."
        hint = "Try again later." if busy else "Check the base URL: it may belong to another service or a login page."
        kind = CogViewServerError if busy else CogViewConfigurationError
        return Finding("probe", "failed", text, hint, took, kind.__name__)
    return Finding("probe", "failed", f"{refusal.message} ({answer})", refusal.hint, took, type(refusal).__name__)


def _clock(date: str | None) -> Iterator[Finding]:
    try:
        moment = parsedate_to_datetime(date or "")
    except (ValueError, TypeError, OverflowError):
        return
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    skew = round((datetime.now(UTC) - moment).total_seconds())
    if abs(skew) <= _SKEW_SECONDS:
        yield Finding("clock", "ok", "The clock agrees with the API's within a minute.")
    else:
        ahead = "ahead of" if skew > 0 else "behind"
        hint = "Set the clock: certificates and link expiry depend on it."
        yield Finding("clock", "note", f"The clock is {abs(skew):,} s {ahead} the API's.", hint)
