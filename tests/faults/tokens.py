"""Replies that name the prompt they belong to, so that a mixed-up reply shows."""

from __future__ import annotations

import hashlib

from tests.faults.server import Connection, Request


def token(prompt: str) -> str:
    """What the address of a prompt's image holds."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:24]


def named_image(connection: Connection, request: Request) -> None:
    """A success whose address holds the token of the prompt."""
    connection.json({"data": [{"url": f"{connection.server.origin}/{token(request.json()['prompt'])}.png"}]})
