"""What the MCP server answers with, under 150 kB: the results of its tools, and the page of its gallery.

A result has one line of text, a thumbnail, a link, and the artifact. The gallery is an MCP App: the package's own gallery of the
newest images, and what a tool has just made.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any, Final, Literal

from mcp_types import Annotations, CallToolResult, ContentBlock, ImageContent, ResourceLink, TextContent

from langchain_cogview.answers import text_for_model
from langchain_cogview.concurrency import in_thread
from langchain_cogview.cost import Money
from langchain_cogview.errors import MAX_MODEL_TEXT, CogViewError, Outcome, printable
from langchain_cogview.notebook.gallery import Gallery
from langchain_cogview.notebook.html import page
from langchain_cogview.notebook.previews import THUMBNAIL_SIDE, Preview, make_thumbnail

if TYPE_CHECKING:
    from langchain_cogview.estimate import Estimate
    from langchain_cogview.mcp.images import ServerImage, ServerImages
    from langchain_cogview.result import GeneratedImage, ImageResult

Inline = Literal["thumbnail", "none", "full"]
"""What a result has of an image, besides its link."""
MAX_RESULT: Final = 150_000
"""Largest size of a result, in bytes of JSON."""
MAX_FULL_RESULT: Final = 950_000
"""Largest size of a result with the whole image: clients refuse a megabyte."""
MAX_THUMBNAIL: Final = 100_000
"""Largest size of a thumbnail, in bytes."""
MAX_IMAGES: Final = 24
"""The largest number of images in the gallery."""
_MAX_PROMPT: Final = 2_000
_PROMPTS: Final = ("prompt", "original_prompt")
_ENVELOPE: Final = 3_000
_MIN_THUMBNAIL: Final = 2_000
_PROMPT_CHARACTERS: Final = 100


def image_uri(image_id: str) -> str:
    """Make the URI of an image.

    Args:
        image_id: Its id.

    Returns:
        The URI, whose bytes `resources/read` returns.
    """
    return f"cogview://images/{image_id}"


def encoded(content: bytes) -> str:
    """Encode bytes for JSON.

    Args:
        content: The bytes.

    Returns:
        Base64.
    """
    return base64.b64encode(content).decode()


async def made(result: ImageResult, inline: Inline) -> CallToolResult:
    """Make the answer of an image that was made.

    Args:
        result: The result.
        inline: What the answer has of the image.

    Returns:
        The answer. A problem with a thumbnail never costs the image.
    """
    image = result.image
    cost = Money(image.cost, image.currency)
    price = "nothing (sandbox)" if result.sandbox else "an unknown amount" if image.cost is None else str(cost)
    text = f"{text_for_model(result)} Cost: {price}.".replace("\n", " ")
    structured = _shortened({"status": "made", "id": image.id, **result.to_artifact()})
    blocks: list[ContentBlock] = [TextContent(type="text", text=text)]
    size = _ENVELOPE + len(json.dumps([text, structured], ensure_ascii=False).encode())
    shown = await _shown(image, inline, size)
    if shown is not None:
        blocks.append(
            ImageContent(
                type="image",
                data=encoded(shown.content),
                mime_type=shown.mime_type,
                annotations=Annotations(audience=["user"]),
            )
        )
    link: dict[str, Any] = {"uri": image_uri(image.id), "name": f"{image.id} (full size)"}
    if image.mime_type:
        link |= {"mime_type": image.mime_type, "size": image.size_bytes}
    blocks.append(ResourceLink(type="resource_link", description=printable(result.prompt, _PROMPT_CHARACTERS), **link))
    return CallToolResult(content=blocks, structured_content=structured)


def _shortened(structured: dict[str, Any]) -> dict[str, Any]:
    """Return an answer whose long prompts are cut: the client has sent the prompt, and the records have it."""
    parts = [structured, *structured["images"]]
    if not any(len(part.get(name) or "") > _MAX_PROMPT for part in parts for name in _PROMPTS):
        return structured
    for part in parts:
        part |= {name: f"{part[name][:_MAX_PROMPT]}…" for name in _PROMPTS if len(part.get(name) or "") > _MAX_PROMPT}
    structured["warnings"] = [*structured["warnings"], f"The prompt is cut to {_MAX_PROMPT} characters in this answer."]
    return structured


async def _shown(image: GeneratedImage, inline: Inline, used: int) -> Preview | None:
    if inline == "none":
        return None
    try:
        content = await image.aread()
    except (CogViewError, OSError):
        return None
    if inline == "full" and image.mime_type and len(content) * 4 // 3 + used < MAX_FULL_RESULT:
        return Preview(content, image.mime_type)
    limit = min(MAX_THUMBNAIL, (MAX_RESULT - used) * 3 // 4)
    if limit < _MIN_THUMBNAIL:
        return None
    return await in_thread(lambda: make_thumbnail(content, side=THUMBNAIL_SIDE, limit=limit))


def running(image_id: str, prompt: str, elapsed: float | None, note: str = "") -> CallToolResult:
    """Make the answer of an image that is still being made.

    Args:
        image_id: Its id.
        prompt: Its prompt.
        elapsed: Seconds since it was started; None if that is unknown.
        note: A sentence before the others.

    Returns:
        The answer.
    """
    so_far = "" if elapsed is None else f" ({elapsed:.0f} s so far)"
    text = (
        f"{note}Image {image_id} is still being made{so_far}. Call get_image with the id {image_id}; it is free. "
        "Do not call generate_image again for it."
    )
    structured = {"status": "running", "id": image_id, "elapsed": elapsed, "prompt": printable(prompt, MAX_MODEL_TEXT)}
    return CallToolResult(content=[TextContent(type="text", text=text)], structured_content=structured)


def still_running(image: ServerImage, image_id: str, note: str = "") -> CallToolResult:
    """Make the answer of an image of this process that is still being made.

    Args:
        image: The image.
        image_id: Its id now.
        note: A sentence before the others.

    Returns:
        The answer.
    """
    return running(image_id, image.arguments["prompt"], image.elapsed, note)


def failed(error: CogViewError) -> CallToolResult:
    """Make the answer of an image that was not made, or of a call that was refused.

    Args:
        error: Why.

    Returns:
        The answer, with `isError`.
    """
    entries = [{"role": entry.role, "level": entry.level} for entry in getattr(error, "content_filter", ())]
    structured = {
        "status": "error",
        "error": type(error).__name__,
        "message": printable(error.message, MAX_MODEL_TEXT),
        "hint": printable(error.hint, MAX_MODEL_TEXT),
        "outcome": str(error.outcome),
        "scope": str(error.scope),
        "may_have_been_charged": error.outcome is Outcome.UNKNOWN,
        "is_retryable": error.is_retryable,
        "code": error.code,
        "http_status": error.status,
        "request_id": error.request_id,
        "content_filter": entries,
    }
    text = TextContent(type="text", text=error.text_for_model)
    return CallToolResult(content=[text], structured_content=structured, is_error=True)


def estimated(estimate: Estimate) -> CallToolResult:
    """Make the answer of an estimate.

    Args:
        estimate: The estimate.

    Returns:
        The answer.
    """
    text = TextContent(type="text", text=f"{estimate} Nothing was sent.")
    return CallToolResult(content=[text], structured_content={"status": "estimated", **estimate.to_artifact()})


def listed(records: list[dict[str, Any]]) -> CallToolResult:
    """Make the answer of a list of images.

    Args:
        records: The records of the images, the newest first.

    Returns:
        The answer.
    """
    items = [_item(record) for record in records]
    lines = [f"{len(items)} image{'' if len(items) == 1 else 's'}, the newest first."]
    for item in items:
        path = f", {item['path']}" if item["path"] else ""
        lines.append(f"{item['id']}: {item['status']}{path}, {item['prompt']!r}")
    structured = {"status": "listed", "images": items}
    return CallToolResult(content=[TextContent(type="text", text="\n".join(lines))], structured_content=structured)


def _item(record: dict[str, Any]) -> dict[str, Any]:
    if "status" not in record:  # a request without an end
        facts = {
            "id": record["key"],
            "status": "running or unknown",
            "prompt": record["prompt"],
            "at": record.get("at"),
        }
        facts |= {"path": None, "uri": None, "model": record["model"], "size": record.get("size"), "cost": None}
        facts |= {"currency": None}
    else:
        images = (record.get("artifact") or {}).get("images") or []
        image = images[0] if images and isinstance(images[0], dict) else {}
        facts = {"id": image.get("id") or record["key"], "status": record["status"], "at": record["finished"]}
        facts |= {"prompt": record["arguments"]["prompt"], "path": image.get("path")}
        facts |= {"uri": image_uri(image["id"]) if image.get("id") else None, "model": record["arguments"].get("model")}
        facts |= {"size": record["arguments"].get("size"), "cost": record["cost"], "currency": record["currency"]}
    return {**facts, "prompt": printable(str(facts["prompt"]), _PROMPT_CHARACTERS)}


# --- the gallery


def gallery_html(images: ServerImages) -> str:
    """Render the gallery. Blocks.

    Args:
        images: What has made the images.

    Returns:
        A page of at most about 150 kB, with embedded images, that loads nothing.
    """
    labelled: list[tuple[str, ImageResult]] = []
    for record in images.listed(MAX_IMAGES):
        if "artifact" in record:
            try:
                result = images.read(record)
            except CogViewError:  # a damaged record is left out, as list_images shows it
                continue
            labelled.append((result.images[0].id if result.images else record["key"], result))
    body = Gallery(labelled)._repr_mimebundle_()["text/html"]
    return page(f'<div id="new"></div>\n{body}', title="CogView", script=_SCRIPT).decode()


# The host shows the page in a frame, and sends what a tool answered. Text is set as text, never as HTML.
_SCRIPT: Final = """(() => {
  let id = 0;
  const send = (message) => parent.postMessage({jsonrpc: "2.0", ...message}, "*");
  const show = (result) => {
    const place = document.getElementById("new");
    for (const block of result.content || []) {
      if (block.type === "image" && /^image\\/(png|jpeg|webp)$/.test(block.mimeType)) {
        const image = document.createElement("img");
        image.src = "data:" + block.mimeType + ";base64," + block.data;
        image.style.maxWidth = "100%";
        place.prepend(image);
      } else if (block.type === "text") {
        const text = document.createElement("p");
        text.textContent = block.text;
        place.prepend(text);
      }
    }
    send({method: "ui/notifications/size-changed", params: {height: document.documentElement.scrollHeight}});
  };
  addEventListener("message", (event) => {
    if (event.source !== parent || !event.data || event.data.jsonrpc !== "2.0") return;
    if (event.data.id === id && event.data.result) send({method: "ui/notifications/initialized", params: {}});
    if (event.data.method === "ui/notifications/tool-result") show(event.data.params || {});
  });
  send({id: ++id, method: "ui/initialize", params: {
    protocolVersion: "2026-01-26", appInfo: {name: "cogview-gallery", version: "1"}, appCapabilities: {}}});
})();"""
