"""The MCP server: answers the calls of clients, each within its time, and asks for approval where that is wanted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import secrets
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

import anyio
from mcp.server import Server
from mcp.server.apps import APP_MIME_TYPE, EXTENSION_ID
from mcp.server.request_state import RequestStateBoundary, RequestStateSecurity
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INVALID_PARAMS,
    BlobResourceContents,
    CallToolResult,
    ElicitRequest,
    ElicitRequestFormParams,
    ElicitResult,
    InputRequiredResult,
    ListResourcesResult,
    ListResourceTemplatesResult,
    ListToolsResult,
    ReadResourceResult,
    Resource,
    ResourceTemplate,
    TextResourceContents,
)
from mcp_types.version import is_version_at_least

from langchain_cogview.budget import Budget
from langchain_cogview.concurrency import Deadline, in_thread
from langchain_cogview.cost import checked_amount
from langchain_cogview.errors import (
    MAX_MODEL_TEXT,
    CogViewBudgetError,
    CogViewConfigurationError,
    CogViewError,
    CogViewInvalidRequestError,
    CogViewTaskUnfinishedError,
    Outcome,
    printable,
)
from langchain_cogview.mcp import results
from langchain_cogview.mcp.images import OWNER, ServerImages
from langchain_cogview.mcp.tools import GALLERY_URI, MAX_LISTED, ToolArguments
from langchain_cogview.notebook.previews import make_thumbnail
from langchain_cogview.result import ImageResult
from langchain_cogview.tool import CogViewImageTool, arguments_schema

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from decimal import Decimal

    from mcp.server.context import ServerRequestContext
    from mcp_types import CallToolRequestParams, PaginatedRequestParams, ReadResourceRequestParams

    from langchain_cogview.estimate import Estimate
    from langchain_cogview.mcp.images import ServerImage
    from langchain_cogview.mcp.results import Inline

NAME: Final = "cogview"
INSTRUCTIONS: Final = (
    "Generates images with Zhipu's CogView models. generate_image costs money; the other tools are free. If generate_image "
    "answers that the image is still being made, call get_image with its id: never generate it again. You do not see the images."
)
NO_KEY: Final = "There is no API key"
"""How the message of a missing key begins."""
PROGRESS_SECONDS: Final = 2.0
"""Seconds between two reports of progress."""
_ANSWER_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 0.5
_INPUT_REQUIRED: Final = "2026-07-28"
_URI: Final = re.compile(r"cogview://images/([0-9A-Za-z_-]{1,128})")
_MAX_SIZE: Final = 2048
_MIN_SIZE: Final = 32
_MAX_SMALLER_BYTES: Final = 3_000_000
_MAX_APPROVALS: Final = 1000
_APPROVAL: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"approve": {"type": "boolean", "title": "Make this image", "description": "Yes: it is paid for."}},
    "required": ["approve"],
}

try:
    _VERSION = version("langchain-cogview")
except PackageNotFoundError:
    _VERSION = ""
logger = logging.getLogger(__name__)


class ApprovalError(CogViewInvalidRequestError):
    """An image needs the approval of the user, which is not there. Nothing was sent."""

    outcome = Outcome.NOT_RUN

    @property
    def text_for_model(self) -> str:
        """The text that an agent's model reads."""
        return printable(f"No image was made, and nothing was charged. {self.message} {self.hint}", MAX_MODEL_TEXT)


class KeyMissingError(CogViewConfigurationError):
    """The server has no API key. Nothing was sent."""

    default_message = "The server has no API key, so no image was made and nothing was sent."
    default_hint = (
        "Set ZHIPUAI_API_KEY (a key from https://open.bigmodel.cn) or ZAI_API_KEY (a key from https://z.ai) in the env of this "
        "server in the client's configuration, and restart it. cogview mcp --sandbox works without a key: it makes placeholders."
    )

    @property
    def text_for_model(self) -> str:
        """The text that an agent's model reads."""
        return printable(f"{self.message} Tell the user: {self.hint}", MAX_MODEL_TEXT)


@dataclass(frozen=True)
class Approval:
    """Which images need the approval of the user.

    Attributes:
        is_needed: Whether any does.
        above: Only those whose price is higher, in the platform's currency, or unknown; None for all.
    """

    is_needed: bool = False
    above: Decimal | None = None

    @classmethod
    def parse(cls, text: str) -> Approval:
        """Parse the option.

        Args:
            text: `always`, `never` or `above=` and an amount.

        Returns:
            The approval.

        Raises:
            CogViewConfigurationError: It is something else.
        """
        if text in {"always", "never"}:
            return cls(text == "always")
        name, _, amount = text.partition("=")
        try:
            return cls(is_needed=True, above=checked_amount(amount if name == "above" else "?"))
        except ValueError:
            raise CogViewConfigurationError(
                f"--approve is always, never or above=0.05, not {printable(text, 40)!r}.", hint="Correct it."
            ) from None

    def applies(self, estimate: Estimate) -> bool:
        """Return whether an image needs the approval."""
        price = estimate.price.amount
        return self.is_needed and (self.above is None or price is None or price > self.above)


@dataclass
class ServerSettings:
    """The options of the server.

    Attributes:
        tool: Arguments of `CogViewImageTool`, with `output_dir`.
        approve: Which images need the approval of the user.
        inline: What a result has of an image, besides its link.
    """

    tool: dict[str, Any] = field(default_factory=dict)
    approve: Approval = field(default_factory=Approval)
    inline: Inline = "thumbnail"


class CogViewServer:
    """The MCP server. `app` is the SDK's server, for any transport.

    Args:
        settings: The options.

    Raises:
        CogViewConfigurationError: An option is malformed. A missing key and a folder that cannot be written are no reason to
            end: each call answers with what to do about them.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        Budget(settings.tool.get("budget"))
        # The schema depends on the model only, and is there without a key.
        known = {name: value for name, value in settings.tool.items() if name in {"model", "size", "quality", "style"}}
        draft = CogViewImageTool(**{**known, "base_url": "sandbox:"})
        self._arguments = ToolArguments(arguments_schema(draft.generator, draft.style))
        self._images: ServerImages | None = None
        self._opening = threading.Lock()
        self._approved: dict[str, ServerImage] = {}
        self.app: Server[Any] = Server(
            NAME,
            version=_VERSION,
            title="CogView images",
            instructions=INSTRUCTIONS,
            lifespan=self._lifespan,
            on_list_tools=self._list_tools,
            on_call_tool=self._call_tool,
            on_list_resources=self._list_resources,
            on_list_resource_templates=self._list_templates,
            on_read_resource=self._read_resource,
        )
        # What a client sends back with an approval is sealed, and belongs to the call that asked for it.
        self.app.middleware.append(RequestStateBoundary(RequestStateSecurity.ephemeral(), default_audience=NAME))
        self.app.extensions[EXTENSION_ID] = {}

    @asynccontextmanager
    async def _lifespan(self, _: Server[Any]) -> AsyncIterator[dict[str, Any]]:
        # What an earlier server had paid for is collected at the start, whether or not anybody asks.
        try:
            await in_thread(self.open)
        except CogViewError as error:
            logger.warning("No image can be made yet: %s", error)
        yield {}

    def open(self) -> ServerImages:
        """Find the key, and open the folder. Blocks.

        Returns:
            What makes the images, the same each time.

        Raises:
            KeyMissingError: There is no key.
            CogViewConfigurationError: Another option is malformed, or the records of the folder are damaged.
            CogViewStorageError: The folder cannot be used. The next call tries again.
        """
        with self._opening:
            if self._images is None:
                try:
                    tool = CogViewImageTool(**self._settings.tool)
                except CogViewConfigurationError as error:
                    if not error.message.startswith(NO_KEY):
                        raise
                    raise KeyMissingError from None
                self._images = ServerImages(tool)
            return self._images

    def finish(self) -> None:
        """Wait for the images that are being made, so that none that is paid for is lost. Blocks."""
        if self._images is not None:
            for image in self._images.busy():
                image.result.exception()

    # --- tools

    async def _list_tools(
        self, ctx: ServerRequestContext[Any], params: PaginatedRequestParams | None
    ) -> ListToolsResult:
        return ListToolsResult(tools=self._arguments.tools())

    async def _call_tool(
        self, ctx: ServerRequestContext[Any], params: CallToolRequestParams
    ) -> CallToolResult | InputRequiredResult:
        if params.name not in self._arguments:
            raise MCPError(code=INVALID_PARAMS, message=f"There is no tool {printable(params.name, 40)!r}.")
        call = {
            "generate_image": self._generate,
            "get_image": self._get,
            "list_images": self._list,
            "estimate_cost": self._estimate,
        }[params.name]
        try:
            arguments = self._arguments.checked(params.name, params.arguments)
            return await call(ctx, params, arguments)
        except CogViewError as error:
            return results.failed(error)
        except Exception:
            logger.exception("The tool %s failed", params.name)
            hint = "Tell the user, and look at the server's error output."
            return results.failed(CogViewError("The server failed.", hint=hint))

    async def _generate(
        self, ctx: ServerRequestContext[Any], params: CallToolRequestParams, arguments: Any
    ) -> CallToolResult | InputRequiredResult:
        deadline = Deadline(arguments.wait_seconds)
        images = await in_thread(self.open)
        wanted = images.identity(arguments.prompt, arguments.size, arguments.quality)
        # The approval of an image is used once: a client that sends the call again gets the same image.
        approval = json.loads(params.request_state) if params.request_state else {}
        approved = self._approved.get(approval.get("nonce", ""))
        image = images.unanswered(wanted) if approved is None else images.joined(approved)
        is_new = image is None
        if image is None:
            estimate = await in_thread(self._covered, images, wanted)
            if self._settings.approve.applies(estimate):
                asked = await self._ask(
                    ctx, params, approval=approval, wanted=wanted, estimate=estimate, deadline=deadline
                )
                if asked is not None:
                    return asked
            image = await self._begun(images, wanted, approval.get("nonce"))
        note = "" if is_new else "An earlier call asked for the same image, so nothing is paid again. "
        with images.waiting_for(image):
            return await self._answer(ctx, images, image, deadline, note)

    async def _begun(self, images: ServerImages, wanted: dict[str, Any], nonce: str | None) -> ServerImage:
        """Return a new image. If the call is cancelled now, the image goes on, and waits for an equal call.

        Raises:
            CancelledError: The client has ended the call.
        """
        beginning = asyncio.ensure_future(in_thread(images.begin, wanted))
        try:
            image = await asyncio.shield(beginning)
        except asyncio.CancelledError:
            beginning.add_done_callback(lambda done: None if done.exception() else images.leave(done.result()))
            raise
        if nonce:
            self._approve(nonce, image)
        return image

    def _covered(self, images: ServerImages, wanted: dict[str, Any]) -> Estimate:
        images.limits()  # counts what other servers have spent
        estimate = images.tool.estimate(wanted["prompt"], wanted["size"], wanted["quality"])
        if not estimate.is_covered:
            left = "" if estimate.left is None else f" {estimate.left} are left."
            raise CogViewBudgetError(f"The limits of {OWNER} do not cover another image; nothing was sent.{left}")
        return estimate

    def _approve(self, nonce: str, image: ServerImage) -> None:
        self._approved[nonce] = image
        while len(self._approved) > _MAX_APPROVALS:
            del self._approved[next(iter(self._approved))]

    async def _ask(
        self,
        ctx: ServerRequestContext[Any],
        params: CallToolRequestParams,
        *,
        approval: dict[str, Any],
        wanted: dict[str, Any],
        estimate: Estimate,
        deadline: Deadline,
    ) -> InputRequiredResult | None:
        """Ask the user, where the client can.

        Returns:
            The question if the client has to call again with the answer; None if the user has approved.

        Raises:
            ApprovalError: There is no approval.
        """
        capability = getattr(ctx.session.client_capabilities, "elicitation", None)
        if capability is None or (capability.form is None and capability.url is not None):
            raise ApprovalError(
                "This server makes images only with the user's approval (--approve), which this client cannot ask for.",
                hint="Tell the user to use a client with elicitation, or to start the server with --approve never.",
            )
        question = f"{estimate}\nPrompt: {printable(wanted['prompt'], 200)}"
        digest = hashlib.sha256(json.dumps([wanted, str(estimate.total)]).encode()).hexdigest()
        if is_version_at_least(ctx.protocol_version, _INPUT_REQUIRED):
            answer = (params.input_responses or {}).get("approval")
            if answer is None or approval.get("digest") != digest:
                form = ElicitRequestFormParams(message=question, requested_schema=_APPROVAL)
                state = json.dumps({"digest": digest, "nonce": secrets.token_hex(16)})
                return InputRequiredResult(input_requests={"approval": ElicitRequest(params=form)}, request_state=state)
        else:
            answer = None
            with anyio.move_on_after(deadline.remaining() or 0):
                answer = await ctx.session.elicit_form(question, _APPROVAL, ctx.request_id)
            if answer is None:
                raise ApprovalError("The user has not answered yet.", hint="Ask the user, then call again.")
        content = answer.content if isinstance(answer, ElicitResult) and answer.action == "accept" else None
        if not content or content.get("approve") is not True:
            raise ApprovalError("The user did not approve it.", hint="Do not call again unless the user asks.")
        return None

    async def _answer(
        self,
        ctx: ServerRequestContext[Any],
        images: ServerImages,
        image: ServerImage,
        deadline: Deadline,
        note: str = "",
    ) -> CallToolResult:
        """Return the answer about an image of this process, after waiting for it until the deadline, with progress."""
        result = None
        try:
            while result is None:
                left = deadline.remaining() or 0.0
                # A thumbnail takes time as well.
                seconds = min(PROGRESS_SECONDS, max(0.0, left - _ANSWER_SECONDS))
                result = await images.aget(image, seconds, {})
                if result is None:
                    if left <= _ANSWER_SECONDS:
                        return results.still_running(image, images.remember(image, image.key), note)
                    await _report(ctx, image)
        except CogViewTaskUnfinishedError:  # it is collected by the next call
            return results.still_running(image, image.key, note)
        answer = await results.made(result, self._settings.inline)
        images.collected(image, result)
        return _with_note(answer, note)

    async def _get(self, ctx: ServerRequestContext[Any], params: Any, arguments: Any) -> CallToolResult:
        deadline = Deadline(arguments.wait_seconds)
        images = await in_thread(self.open)
        while True:
            found = await in_thread(images.look_up, arguments.id)
            if isinstance(found, ImageResult):
                return await results.made(found, self._settings.inline)
            if found is not None:
                with images.waiting_for(images.joined(found)):
                    return await self._answer(ctx, images, found, deadline)
            left = deadline.remaining() or 0.0
            if left <= _POLL_SECONDS:  # another server makes it
                return results.running(arguments.id, "", None)
            await anyio.sleep(_POLL_SECONDS)

    async def _list(self, ctx: ServerRequestContext[Any], params: Any, arguments: Any) -> CallToolResult:
        images = await in_thread(self.open)
        return results.listed(await in_thread(images.listed, arguments.limit))

    async def _estimate(self, ctx: ServerRequestContext[Any], params: Any, arguments: Any) -> CallToolResult:
        images = await in_thread(self.open)
        await in_thread(images.limits)
        return results.estimated(images.tool.estimate(arguments.prompt, arguments.size, arguments.quality, arguments.n))

    # --- resources

    async def _list_resources(
        self, ctx: ServerRequestContext[Any], params: PaginatedRequestParams | None
    ) -> ListResourcesResult:
        gallery = Resource(uri=GALLERY_URI, name="gallery", title="Gallery of the images", mime_type=APP_MIME_TYPE)
        resources = [gallery]
        try:
            images = await in_thread(self.open)
            records = await in_thread(images.listed, MAX_LISTED)
        except CogViewError:
            records = []
        for record in records:
            for image in (record.get("artifact") or {}).get("images") or []:
                facts: dict[str, Any] = {"mime_type": image.get("mime_type"), "size": image.get("size_bytes")}
                text = printable(record["arguments"]["prompt"], 100)
                resources.append(
                    Resource(uri=results.image_uri(image["id"]), name=image["id"], description=text, **facts)
                )
        return ListResourcesResult(resources=resources)

    async def _list_templates(
        self, ctx: ServerRequestContext[Any], params: PaginatedRequestParams | None
    ) -> ListResourceTemplatesResult:
        template = ResourceTemplate(
            uri_template="cogview://images/{id}{?size}",
            name="image",
            title="An image",
            description=(
                "The bytes of an image. With size, from 32 to 2048: a JPEG whose longer side has at most so many pixels."
            ),
        )
        return ListResourceTemplatesResult(resource_templates=[template])

    async def _read_resource(
        self, ctx: ServerRequestContext[Any], params: ReadResourceRequestParams
    ) -> ReadResourceResult:
        uri = str(params.uri)
        try:
            if uri == GALLERY_URI:
                return await self._read_gallery()
            image_id, size = _parsed_uri(uri)
            images = await in_thread(self.open)
            found = await in_thread(images.look_up, image_id)
            if found is not None and not isinstance(found, ImageResult):
                found = await images.aget(found, 0.0, {})
            if found is None:
                raise CogViewInvalidRequestError("The image is still being made.", hint="Call get_image.")
            content = await found.image.aread()
            mime_type = found.image.mime_type or "application/octet-stream"
            if size is not None:
                smaller = await in_thread(lambda: make_thumbnail(content, side=size, limit=_MAX_SMALLER_BYTES))
                if smaller is None:
                    raise CogViewInvalidRequestError("No smaller version could be made.", hint="Leave size out.")
                content, mime_type = smaller
        except CogViewError as error:
            data = {"uri": printable(uri, 200), "error": type(error).__name__}
            raise MCPError(code=INVALID_PARAMS, message=f"{error.message} {error.hint}".strip(), data=data) from None
        return ReadResourceResult(
            contents=[BlobResourceContents(uri=uri, mime_type=mime_type, blob=results.encoded(content))]
        )

    async def _read_gallery(self) -> ReadResourceResult:
        images = await in_thread(self.open)
        html = await in_thread(results.gallery_html, images)
        contents = TextResourceContents(uri=GALLERY_URI, mime_type=APP_MIME_TYPE, text=html)
        return ReadResourceResult(contents=[contents])


def _parsed_uri(uri: str) -> tuple[str, int | None]:
    address, _, _ = uri.partition("?")
    match = _URI.fullmatch(address)
    query = parse_qs(urlsplit(uri).query, keep_blank_values=True)
    sizes = query.pop("size", [])
    size = int(sizes[0]) if len(sizes) == 1 and re.fullmatch(r"[0-9]{1,4}", sizes[0]) else None
    if match is None or query or (sizes and (size is None or not _MIN_SIZE <= size <= _MAX_SIZE)):
        raise CogViewInvalidRequestError(
            "There is no such resource.",
            hint=f"An image is cogview://images/<id>, or cogview://images/<id>?size=512 with {_MIN_SIZE} to {_MAX_SIZE} pixels.",
        )
    return match[1], size


def _with_note(answer: CallToolResult, note: str) -> CallToolResult:
    if note:
        answer.content[0].text = f"{note}{answer.content[0].text}"  # type: ignore[union-attr]
    return answer


async def _report(ctx: ServerRequestContext[Any], image: ServerImage) -> None:
    try:
        elapsed = image.elapsed or 0.0
        await ctx.session.report_progress(elapsed, None, f"Making the image ({elapsed:.0f} s)")
    except Exception:
        logger.debug("The progress could not be reported", exc_info=True)


def run_stdio(server: CogViewServer) -> None:
    """Serve one client on the standard streams, and wait in the end for the images that are being made.

    Args:
        server: The server.
    """
    from mcp.server.stdio import stdio_server  # noqa: PLC0415

    async def serve() -> None:
        async with stdio_server() as (reading, writing):
            await server.app.run(reading, writing, server.app.create_initialization_options())

    try:
        anyio.run(serve)
    except* ConnectionError:
        logger.warning("The client has closed its end of the streams.")
    finally:
        server.finish()
