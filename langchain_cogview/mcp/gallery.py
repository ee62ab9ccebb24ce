"""The gallery of the MCP server, an MCP App: the package's own gallery of the newest images, and what a tool has just made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from langchain_cogview.errors import CogViewError
from langchain_cogview.notebook.gallery import gallery
from langchain_cogview.notebook.html import page

if TYPE_CHECKING:
    from langchain_cogview.mcp.images import ServerImages

MAX_IMAGES: Final = 24
"""The largest number of images in the gallery."""


def gallery_html(images: ServerImages) -> str:
    """Render the gallery. Blocks.

    Args:
        images: What has made the images.

    Returns:
        A page of at most about 150 kB, with embedded images, that loads nothing.
    """
    items = []
    for record in images.listed(MAX_IMAGES):
        if "artifact" in record:
            try:
                items.append(images.read(record))
            except CogViewError:  # a damaged record is left out, as list_images shows it
                continue
    body = gallery(items)._repr_mimebundle_()["text/html"]
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
