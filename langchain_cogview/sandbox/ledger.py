"""What has been made and charged, and the links under which it is fetched."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

from langchain_cogview.sandbox.picture import seed_of
from langchain_cogview.sandbox.records import History, SandboxPicture, SandboxReply, image_size
from langchain_cogview.sandbox.replies import NO_ACCESS, NO_FILE, json_reply

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_cogview.sandbox.order import Order

ROUTE: Final = "/pictures/"
LINK_LIFETIME: Final = 86_400
"""Seconds for which a picture's link is good."""
MAX_PICTURES: Final = 100_000
"""Pictures that are listed, and that can be fetched; the oldest, and those unfetched for longest, are forgotten first."""
MAX_LEDGER_BYTES: Final = 64 << 20
"""Memory for the list of pictures."""


@dataclass(slots=True)
class PictureLink:
    """A picture behind a link.

    Attributes:
        seed: From which it is drawn.
        width: Pixels.
        height: Pixels.
        expires: Unix seconds until which the link is good.
        not_yet: GETs that still find nothing.
    """

    seed: bytes
    width: int
    height: int
    expires: int
    not_yet: int


class Ledger:
    """The pictures of a sandbox. Not locked: the sandbox is.

    Attributes:
        made: How many pictures were charged.
        entries: The last of them, oldest first.
    """

    def __init__(self) -> None:
        self.made = 0
        self.entries: History[SandboxPicture] = History(MAX_PICTURES, MAX_LEDGER_BYTES)
        self._links: OrderedDict[str, PictureLink] = OrderedDict()

    def charge(
        self, order: Order, changes: Mapping[str, Mapping[str, Any]], identity: str, *, ready_in: float | None = None
    ) -> str:
        """Make a picture and write it down.

        Args:
            order: What was asked for.
            changes: Options of the faults that spoil it, by name.
            identity: The id of reply and link.
            ready_in: Seconds after which the task of this id has it; None where there is no task.

        Returns:
            Path and query of its link.
        """
        now = time.time()
        expires = int(now) - 1 if "expired-url" in changes else int(now + (ready_in or 0.0)) + LINK_LIFETIME
        not_yet = changes["not-yet"]["gets"] if "not-yet" in changes else 0
        self._links[identity] = PictureLink(seed_of(order.prompt), order.width, order.height, expires, not_yet)
        if len(self._links) > MAX_PICTURES:
            self._links.popitem(last=False)
        self.made += 1
        made = SandboxPicture(
            prompt=order.prompt,
            model=order.model.name,
            size=f"{order.width}x{order.height}",
            request_id=order.request_id or identity,
            task_id=None if ready_in is None else identity,
            charged_at=now,
        )
        self.entries.append(made, image_size(made))
        return f"{ROUTE}{identity}.png?Expires={expires}"

    def fetch(self, path: str) -> PictureLink | SandboxReply:
        """The picture behind a path and query, or the reply that it is not to be had."""
        route, _, query = path.partition("?")
        identity = route.removeprefix(ROUTE).removesuffix(".png")
        link = self._links.get(identity)
        if link is None:
            return json_reply(404, NO_FILE)
        self._links.move_to_end(identity)
        # The query stands for the signature of a real link: without it, or changed, the link is no good.
        if parse_qs(query).get("Expires") != [str(link.expires)] or link.expires < time.time():
            return json_reply(403, NO_ACCESS)
        if link.not_yet > 0:
            link.not_yet -= 1
            return json_reply(404, NO_FILE)
        return link
