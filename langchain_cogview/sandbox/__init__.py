"""The service, offline: the same wire format without key, cost or network."""

from langchain_cogview.sandbox.records import SandboxPicture, SandboxRequest
from langchain_cogview.sandbox.server import SandboxServer
from langchain_cogview.sandbox.service import Sandbox

__all__ = ["Sandbox", "SandboxPicture", "SandboxRequest", "SandboxServer"]
