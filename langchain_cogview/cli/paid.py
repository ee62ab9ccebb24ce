"""The paid part of `cogview doctor`: one real image, and what the service does compared with what is documented.

Nobody who wrote this package could call the service. Each fact here is documented by the provider, or was recorded by somebody
else, and the first user with a key can confirm it. The report contains no key, no URL and no text of the service.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlsplit

from pydantic import SecretStr

from langchain_cogview.addresses import LinkRules
from langchain_cogview.api.endpoint import Call, Endpoint
from langchain_cogview.api.protocol import NO_CONTEXT, images_body, parse_reply, read_reply
from langchain_cogview.api.sending import asender, sender
from langchain_cogview.api.settings import is_sandbox
from langchain_cogview.catalog import MODELS, money_text
from langchain_cogview.concurrency import Deadline
from langchain_cogview.errors import CogViewError, CogViewInvalidRequestError, CogViewNotFoundError, Outcome, printable
from langchain_cogview.images.download import expires_at, fetch
from langchain_cogview.request import ImageRequest
from langchain_cogview.text import moment_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from decimal import Decimal

    import httpx

    from langchain_cogview.api.protocol import ImagesReply, ReplyContext
    from langchain_cogview.catalog import ModelInfo, Region
    from langchain_cogview.cli.doctor import Target

PROMPT: Final = "A cute little kitten"
USER_ID: Final = "cogview-doctor"
SECONDS: Final = 180.0
"""Time limit of the image and of its download, each."""
_WRONG: Final[tuple[tuple[str, dict[str, str], str, set[str]], ...]] = (
    ("a model that does not exist", {"model": "cogview-doctor-probe"}, "code 1211, HTTP 400", {"1211"}),
    ("the size 513x513", {"size": "513x513"}, "code 1214 or 1210, HTTP 400", {"1210", "1214"}),
)
"""Requests that the service must refuse: name, what is wrong, the documented answer, and its codes."""
_HOSTS: Final = "sfile.chatglm.cn, aigc-files.bigmodel.cn, maas-watermark-prod*.cn-wlcb.ufileos.com or mfile.z.ai"
_FIELDS: Final = {"created", "data", "content_filter", "id", "request_id", "model", "timestamp", "usage"}
_KNOWN_HOSTS: Final = ("sfile.chatglm.cn", "aigc-files.bigmodel.cn", "ufileos.com", "mfile.z.ai")


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact about the service.

    Attributes:
        name: What it is about.
        documented: What is documented or was recorded by others.
        seen: What was seen now.
        agrees: Whether both are the same; None if that is unknown.
    """

    name: str
    documented: str
    seen: str
    agrees: bool | None = None

    def __str__(self) -> str:
        mark = {True: "same", False: "differs", None: "seen"}[self.agrees]
        return printable(f"- [{mark}] {self.name}. Documented: {self.documented}. Seen: {self.seen}.", 1000)


@dataclass(frozen=True, slots=True)
class PaidCheck:
    """What `cogview doctor --paid` would do.

    Attributes:
        service: The API and its key.
        model: The cheapest model of the region.
        price: Its list price.
        currency: ISO code of the price.
    """

    service: Target
    model: ModelInfo
    price: Decimal
    currency: str

    @classmethod
    def of(cls, service: Target, region: Region) -> PaidCheck:
        """Choose the cheapest model of a region.

        Args:
            service: The API and its key.
            region: The region, which decides on models and prices.

        Returns:
            The check.
        """
        offers = [(offer, info) for info in MODELS.values() if region in info.regions and (offer := info.price(region))]
        offer, model = min(offers, key=lambda item: item[0][0])
        return cls(service, model, *offer)

    @property
    def question(self) -> str:
        """What is made and what it costs, for the user to agree to."""
        made = f"This makes one image with {self.model.name}"
        if is_sandbox(self.service.base_url):
            return f"{made}, in the sandbox: nothing is charged. Continue?"
        if not self.price:
            return f"{made}, whose list price is 0 {self.currency}. Continue?"
        return f"{made} for {money_text(self.price, self.currency)}. Continue?"

    def run(self) -> Iterator[Fact]:
        """Make the image and compare. The free requests come first.

        Yields:
            The facts.

        Raises:
            CogViewError: The image was not made, or its outcome is unknown.
        """
        for name, change, documented, codes in _WRONG:
            body = self._body(optional=False) | change
            try:
                accepted = self._send(body)
            except (CogViewInvalidRequestError, CogViewNotFoundError) as error:
                yield Fact(name, documented, _answer(error), error.code in codes)
            else:  # this is the image that the user has agreed to: there is no second one
                yield Fact(name, documented, "accepted, and an image was made", agrees=False)
                yield from self._facts_of_reply(accepted, body)
                yield from self._facts_of_download(accepted.reply)
                return
        yield from self._image()

    def _image(self) -> Iterator[Fact]:
        names = "user_id and watermark_enabled"
        try:
            body = self._body(optional=True)
            sent = self._send(body)
            fact = Fact(names, "taken", "taken", agrees=True)
        except CogViewInvalidRequestError as error:  # refused, so that nothing is charged
            body = self._body(optional=False)
            sent = self._send(body)
            fact = Fact(names, "taken", f"refused ({_answer(error)}); without them an image is made", agrees=False)
        yield fact
        yield from self._facts_of_reply(sent, body)
        yield from self._facts_of_download(sent.reply)

    def _facts_of_reply(self, sent: _Sent, body: dict[str, Any]) -> Iterator[Fact]:
        fields = sent.fields
        yield Fact("time until the answer", "5 to 20 s, up to 39 s seen", f"{sent.seconds:.1f} s")
        names = ", ".join(sorted(map(_name, fields))) or "none"
        yield Fact("fields of the reply", ", ".join(sorted(_FIELDS)), names, fields.keys() <= _FIELDS)
        created = fields.get("created")
        kind = {int: "an integer", str: "a string"}.get(
            type(created), "absent" if created is None else "of another type"
        )
        yield Fact("created", "Unix seconds, as an integer or a string", kind, created is not None)
        yield Fact("usage", "tokens, price, cost, duration (Z.ai only)", _numbers(fields.get("usage")))
        answered = fields.get("request_id")
        same = (
            "absent"
            if answered is None
            else "the one that was sent"
            if answered == body["request_id"]
            else "another one"
        )
        yield Fact("request_id of the reply", "the one that was sent, or absent", same, same != "another one")
        model = fields.get("model")
        text = "absent" if model is None else printable(str(model), 40)
        yield Fact(
            "model of the reply", f"{self.model.name} or absent", text, text.lower() in {"absent", self.model.name}
        )

    def _facts_of_download(self, reply: ImagesReply) -> Iterator[Fact]:
        if not reply.urls:
            yield Fact("the image", "a URL", "bytes in the reply", agrees=False)
            return
        url = reply.urls[0]
        host = urlsplit(url).hostname or ""
        known = any(host == name or host.endswith(f".{name}") for name in _KNOWN_HOSTS)
        yield Fact("host of the image", _HOSTS, printable(host, 100), known)
        yield Fact("parameters of the link", "Expires and a signature, or none", _parameters(url))
        until = expires_at(url)
        days = "absent" if until is None else f"in {(until - datetime.now(UTC)).total_seconds() / 86400:.1f} days"
        yield Fact("Expires", "after 1 to 7 days, or absent", days)
        seen: list[_Got] = []
        begun = time.monotonic()
        send = sender(self.service.base_url)

        def sent(request: httpx.Request) -> httpx.Response:
            response: httpx.Response = send(request)
            seen.append(_Got(time.monotonic() - begun, response.status_code, response.headers.get("content-type", "")))
            return response

        try:
            image = fetch(
                sent,
                url,
                deadline=Deadline(SECONDS),
                folder=Path.cwd(),
                label="doctor",
                rules=LinkRules(self.service.base_url),
            )
        except CogViewError as error:
            yield Fact("download", "a whole image", f"none ({_answer(error)})", agrees=False)
            raise PaidImageLostError(url, error) from None
        early = [item for item in seen if item.status == 404]  # noqa: PLR2004
        waited = "never" if not early else f"{len(early)} times, until {seen[-1].seconds:.1f} s after the answer"
        yield Fact("the link answers 404 at first", "sometimes, for some seconds", waited)
        yield Fact("time of the download", "no figure", f"{time.monotonic() - begun:.1f} s")
        label, ending = seen[-1].label.partition(";")[0].strip().lower(), Path(urlsplit(url).path).suffix.lower()
        kind = image.info.mime_type
        types = f"{kind} by its bytes, {printable(label, 60) or 'no type'} by its label, {printable(ending, 10) or 'no'} ending"
        yield Fact("type of the image", "may differ from its label", types, label == kind or None)
        size = f"{image.info.width}x{image.info.height}"
        yield Fact("size of the image", str(self.model.default_size), size, size == self.model.default_size)
        yield Fact("bytes of the image", "0.15 to 3 MB", f"{image.size_bytes / 1e6:.2f} MB")
        where = image.path.name if image.path else "nowhere, because the current folder is not writable"
        yield Fact("the image is saved as", "a file in the current folder", where, image.path is not None)

    def _body(self, *, optional: bool) -> dict[str, Any]:
        more: dict[str, Any] = {"user_id": USER_ID, "watermark_enabled": True} if optional else {}
        request = ImageRequest(prompt=PROMPT, model=self.model.name, **more)
        return images_body(request, str(uuid.uuid4()))

    def _send(self, body: dict[str, Any]) -> _Sent:
        raw: list[bytes] = []

        def read(status: int, body: bytes, context: ReplyContext = NO_CONTEXT) -> ImagesReply:
            raw.append(body)
            return read_reply(status, body, context)

        endpoint = Endpoint(
            base_url=str(self.service.url),
            api_key=self.service.key or SecretStr("no key"),
            account=self.service.base_url,
            send=sender(self.service.base_url),
            asend=asender(self.service.base_url),
        )
        begun = time.monotonic()
        try:
            reply = endpoint.exchange(Call("POST", "/images/generations", body), Deadline(SECONDS), read)
        except CogViewError as error:
            error.request_id = error.request_id or body.get("request_id")
            raise
        return _Sent(reply, parse_reply(200, raw[-1])[0] if raw else {}, time.monotonic() - begun)


class PaidImageLostError(Exception):
    """The image was made, and its link could not be downloaded.

    Attributes:
        url: The link, which may still work later.
        reason: Why it was not downloaded.
    """

    def __init__(self, url: str, reason: CogViewError) -> None:
        super().__init__(reason.message)
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        until = expires_at(self.url)
        end = f" (until {moment_text(until)})" if until else ""
        return f"The image was made, but could not be downloaded. {self.reason.message} Its URL{end}: {self.url}"


@dataclass(frozen=True, slots=True)
class _Sent:
    reply: ImagesReply
    fields: dict[str, Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Got:
    seconds: float
    status: int
    label: str


def report_text(facts: list[Fact]) -> str:
    """Format facts as a Markdown list, to be pasted.

    Args:
        facts: The facts.

    Returns:
        A title, a line for each fact, and a summary.
    """
    differs = [item.name for item in facts if item.agrees is False]
    end = f"{len(differs)} of {len(facts)} facts differ: {', '.join(differs)}." if differs else "No fact differs."
    return "\n".join(("### cogview doctor --paid", "", *map(str, facts), "", end))


def facts_as_json(facts: list[Fact]) -> list[dict[str, Any]]:
    """Convert facts to plain JSON.

    Args:
        facts: The facts.

    Returns:
        One object for each fact.
    """
    return [asdict(item) for item in facts]


def _answer(error: CogViewError) -> str:
    facts = [f"code {error.code}"] if error.code else []
    facts += [f"HTTP {error.status}"] if error.status else []
    facts += ["outcome unknown"] if error.outcome is Outcome.UNKNOWN else []
    return printable(", ".join(facts) or type(error).__name__, 100)


def _name(name: str) -> str:
    return printable(name, 40)


def _numbers(usage: Any) -> str:
    """Return the names in `usage`, and their values if they are numbers: text may be anything."""
    if usage is None:
        return "absent"
    if not isinstance(usage, dict):
        return "not an object"
    shown = {_name(name): value for name, value in list(usage.items())[:10] if isinstance(value, int | float)}
    others = [_name(name) for name in usage if not isinstance(usage[name], int | float)][:10]
    return ", ".join([*(f"{name} {json.dumps(value)}" for name, value in shown.items()), *others]) or "empty"


def _parameters(url: str) -> str:
    names = [_name(name) for name, _ in parse_qsl(urlsplit(url).query, keep_blank_values=True)][:10]
    return ", ".join(names) or "none"
