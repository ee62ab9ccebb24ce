"""The service, offline: the same wire format without key, cost or network."""

from langchain_cogview.sandbox.server import SandboxServer
from langchain_cogview.sandbox.service import Sandbox
from langchain_cogview.sandbox.state import SandboxPicture, SandboxRequest

__all__ = ["Sandbox", "SandboxPicture", "SandboxRequest", "SandboxServer"]
