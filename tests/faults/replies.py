"""The ways in which the reply to a paid request can go wrong, and what each must come to.

`expected` names the exception classes that are right, or "result"; the class must match exactly. `posts` is how many POSTs the server may
have seen whole, with max_retries=2. Every text of the server carries `SERVER_WORDS`, which no model may ever read.
"""

from __future__ import annotations

from tests.faults import reply_bodies, reply_codes, reply_transport
from tests.faults.reply_table import REPLIES

__all__ = ["REPLIES"]

# Importing them fills the table.
PARTS = (reply_codes, reply_bodies, reply_transport)
