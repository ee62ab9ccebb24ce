"""What type checkers say of the constructors: read by mypy and pyright, never run."""

from datetime import timedelta
from decimal import Decimal
from typing import assert_type

from langchain_core.messages.content import ImageContentBlock
from langchain_core.rate_limiters import InMemoryRateLimiter
from pydantic import SecretStr

from langchain_cogview import BackendFolder, CogViewImageGenerator, CogViewImageTool, ImageResult

generator = CogViewImageGenerator(api_key="a key", timeout=timedelta(minutes=2), fallback_models=["cogview-4"])
CogViewImageGenerator(api_key=SecretStr("a key"), prices={"glm-image": 0.05}, rate_limiter=InMemoryRateLimiter())
CogViewImageTool(size="16:9", output_dir="images", max_images=3, budget=Decimal("0.5"), name="draw")
CogViewImageTool(size="auto", quality="high")
CogViewImageTool(generator=generator, content_format="image_url", handle_tool_error=False)
CogViewImageTool(generator=generator, content_format="thumbnail")


class Files:
    def upload_files(self, files: list[tuple[str, bytes]]) -> list[str]:
        return []

    def download_files(self, paths: list[str]) -> list[str]:
        return []


CogViewImageTool(output_dir=Files())
CogViewImageGenerator(output_dir=BackendFolder(Files(), "/art"))
assert_type(generator.invoke("a kitten"), ImageResult)
assert_type(generator.invoke("a kitten").image.content_block("url"), ImageContentBlock)
assert_type(generator.batch(["a kitten"]), list[ImageResult])

CogViewImageTool(sise="16:9")  # refused
CogViewImageTool(max_images="many")  # refused
CogViewImageTool(quality=2)  # refused
CogViewImageGenerator(sise="16:9")  # refused
CogViewImageGenerator(n="two")  # refused
CogViewImageGenerator(region="mars")  # refused
