"""One picture: the paid call, then its download, then its record. Nothing after the payment can lose it."""

from __future__ import annotations

import logging
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_cogview.api.protocol import ImagesReply, images_body
from langchain_cogview.api.transport import asender, sender
from langchain_cogview.deadline import Deadline
from langchain_cogview.errors import CogViewDownloadError, CogViewError, printable
from langchain_cogview.images.download import LinkRules, Picture, afetch, expires_at, fetch
from langchain_cogview.result import GeneratedImage, base_host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from langchain_cogview.api.client import ImagesClient
    from langchain_cogview.request import ImageRequest

ImageOutcome = list[GeneratedImage] | Exception
"""What became of one paid call: its pictures (one in practice), or why there is none."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageCall:
    """How one picture is made; each `draw` is one paid call under a request id of its own.

    Attributes:
        request: What is asked for.
        client: Makes the paid call.
        base_url: Where the service is; tells which links may be fetched.
        timeout: Seconds for call, download and saving together; None: no limit.
        download: Whether the bytes are fetched.
        folder: Where they are saved; None: kept in memory.
        allowed_hosts: The only hosts to fetch from; None: any public one.
    """

    request: ImageRequest
    client: ImagesClient
    base_url: str
    timeout: float | None
    download: bool
    folder: Path | None
    allowed_hosts: tuple[str, ...] | None

    def draw(self) -> ImageOutcome:
        """Make one picture. Gives the error, so that it is raised or recorded whatever became of the others."""
        request_id = str(uuid.uuid4())
        try:
            self.client.leave()
            deadline = Deadline(self.timeout)
            reply = self.client.generate(images_body(self.request, request_id), deadline)
        except Exception as error:  # noqa: BLE001
            return error
        with _told_when_lost(request_id, reply):
            return [self._image(request_id, reply, url, self._fetched(url, deadline)) for url in reply.urls]

    async def adraw(self) -> ImageOutcome:
        """Make one picture. The twin of `draw`."""
        request_id = str(uuid.uuid4())
        try:
            await self.client.aleave()
            deadline = Deadline(self.timeout)
            reply = await self.client.agenerate(images_body(self.request, request_id), deadline)
        except Exception as error:  # noqa: BLE001
            return error
        with _told_when_lost(request_id, reply):
            return [self._image(request_id, reply, url, await self._afetched(url, deadline)) for url in reply.urls]

    def _fetched(self, url: str, deadline: Deadline) -> Picture | CogViewError | None:
        if not self.download:
            return None
        try:
            return fetch(sender(self.base_url), url, deadline=deadline, folder=self.folder, rules=self._rules())
        except Exception as error:  # noqa: BLE001
            return _download_error(error)

    async def _afetched(self, url: str, deadline: Deadline) -> Picture | CogViewError | None:
        if not self.download:
            return None
        try:
            return await afetch(asender(self.base_url), url, deadline=deadline, folder=self.folder, rules=self._rules())
        except Exception as error:  # noqa: BLE001
            return _download_error(error)

    def _rules(self) -> LinkRules:
        return LinkRules(base_host=base_host(self.base_url), allowed_hosts=self.allowed_hosts)

    def _image(
        self, request_id: str, reply: ImagesReply, url: str, picture: Picture | CogViewError | None
    ) -> GeneratedImage:
        notes = list(reply.warnings)
        made: dict[str, Any] = {}
        content = None
        if isinstance(picture, Picture):
            info, content = picture.info, picture.content
            made = {
                "path": picture.path,
                "mime_type": info.mime_type,
                "width": info.width,
                "height": info.height,
                "size_bytes": picture.size_bytes,
                "sha256": picture.sha256,
            }
            if picture.problem:
                notes.append(
                    f"The picture could not be saved in output_dir ({printable(str(self.folder), 120)}): {picture.problem}. "
                    "Its bytes are in memory: call save(path)."
                )
        elif picture is not None:
            notes.append(f"{picture.message} {picture.hint}".strip())
        return GeneratedImage(
            id=request_id[:8] if len(reply.urls) == 1 else uuid.uuid4().hex[:8],
            url=url,
            expires_at=expires_at(url),
            content_filter=reply.content_filter,
            request_id=request_id,
            response_id=reply.response_id,
            created=reply.created,
            model=self.request.model,
            size=self.request.drawn_size,
            quality=self.request.drawn_quality,
            prompt=self.request.prompt,
            sandbox=reply.sandbox,
            warnings=tuple(notes),
            **made,
        ).with_content(content, self.base_url, self.allowed_hosts)


@contextmanager
def _told_when_lost(request_id: str, reply: ImagesReply) -> Iterator[None]:
    """A caller that leaves after the payment (cancelled, Ctrl-C) is told where its picture is."""
    try:
        yield
    except BaseException as error:
        note = f"A picture was made and paid for (request id {request_id}): {' '.join(reply.urls)}"
        logger.warning("The caller left before it was fetched. %s", note)
        error.add_note(note)
        raise


def _download_error(error: Exception) -> CogViewError:
    if isinstance(error, CogViewError):
        return error
    logger.warning("A picture could not be fetched", exc_info=error)
    return CogViewDownloadError(detail=type(error).__name__)
