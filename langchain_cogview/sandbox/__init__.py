"""The service offline: the same wire format without key, cost or network."""

from langchain_cogview.sandbox.server import SandboxServer
from langchain_cogview.sandbox.service import Sandbox
from langchain_cogview.sandbox.state import SandboxImage, SandboxRequest

__all__ = ["Sandbox", "SandboxImage", "SandboxRequest", "SandboxServer"]
