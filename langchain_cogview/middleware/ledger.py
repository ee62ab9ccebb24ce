"""What the images of a conversation cost: counted in the agent's state, and limited by a budget of the conversation.

Each tool call has an entry of its own, so that parallel calls, repeated writes and a resumed run are counted once. The entries
stand in the state, which a checkpointer stores, and in this process, which also knows of calls in flight, of calls that were
cancelled, and of those in a branch of the conversation that the user has left.
"""

from __future__ import annotations

import re
import threading
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.budget import Budget, Spending
from langchain_cogview.cost import Charges, checked_amount
from langchain_cogview.errors import CogViewBudgetError

if TYPE_CHECKING:
    from collections.abc import Iterator

DAMAGED: Final = "damaged"
"""Name of the entry that marks a record of which a part could not be read."""
OWNER: Final = "this conversation"
_MAX_CONVERSATIONS: Final = 4096
_MAX_ENTRIES: Final = 100_000
_MAX_IMAGES: Final = 1_000_000
_ENTRY: Final = 3
_NAME = re.compile(r"[0-9a-f]{16}")
_CURRENCY = re.compile(r"[A-Za-z]{1,12}")


def new_name() -> str:
    """Make a name for an entry.

    Returns:
        16 hexadecimal digits.
    """
    return uuid.uuid4().hex[:16]


def merge_charges(before: Any, after: Any) -> dict[str, Any]:
    """Merge entries, as the reducer of the agent's state does.

    Args:
        before: The entries of the state.
        after: New entries, which replace those of the same name.

    Returns:
        All entries. What is not a record of entries becomes an entry that no budget accepts.
    """
    parts = [part if isinstance(part, Mapping) else {DAMAGED: None} for part in (before, after)]
    return {**parts[0], **parts[1]}


def read_charges(record: Any) -> dict[str, Spending]:
    """Read the entries of a state, which may come from anywhere.

    Args:
        record: The value of the state; None if there is none yet.

    Returns:
        What each call spent.

    Raises:
        ValueError: A part of it is not an entry.
    """
    if record is None:
        return {}
    if not isinstance(record, Mapping) or len(record) > _MAX_ENTRIES:
        raise ValueError("The entries of a conversation are expected.")
    return {_checked_name(name): _read_entry(entry) for name, entry in record.items()}


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError("The name of an entry is expected.")
    return name


def _read_entry(entry: Any) -> Spending:
    if not isinstance(entry, list | tuple) or len(entry) != _ENTRY:
        raise ValueError("A number of images, an amount and a currency are expected.")
    spending = Spending()
    images, amount, currency = entry
    if type(images) is not int or not 0 <= images <= _MAX_IMAGES:
        raise ValueError("A number of images is expected.")
    if not isinstance(amount, str):
        raise ValueError("An amount of money as text is expected.")  # noqa: TRY004  one kind of error for all of it
    spending.images, spending.amount = images, checked_amount(amount)
    if currency is not None and not (isinstance(currency, str) and _CURRENCY.fullmatch(currency)):
        raise ValueError("The code of a currency is expected.")
    if spending.amount and not currency:
        raise ValueError("An amount needs a currency.")
    spending.currency = currency
    return spending


def _entry(spending: Spending) -> list[Any]:
    return [spending.images, f"{spending.amount:f}", spending.currency]


def charges_of(record: Any) -> Charges:
    """Add up the entries of a state.

    Args:
        record: The value of the state.

    Returns:
        The number of images and the amounts, by currency.

    Raises:
        ValueError: The record is damaged.
    """
    total = Charges()
    for spending in read_charges(record).values():
        total.count += spending.images
        if spending.currency:
            total.amounts[spending.currency] = total.amounts.get(spending.currency, Decimal(0)) + spending.amount
    return total


class Conversation:
    """The calls of one conversation that this process knows of. Thread-safe."""

    def __init__(self) -> None:
        self.running = 0
        """The number of calls that have not ended."""
        self._total = Spending()
        self._calls: dict[str, Spending] = {}
        self._open: set[str] = set()

    def add(self, record: Any) -> None:
        """Add the entries of a state that are not known here.

        Args:
            record: The value of the state.

        Raises:
            CogViewBudgetError: The record is damaged.
        """
        try:
            recorded = read_charges(record)
        except ValueError:
            raise CogViewBudgetError(
                "The record of what this conversation has spent is damaged; nothing was sent.",
                hint="Start a new conversation.",
            ) from None
        with self._total.lock:
            for name, spending in recorded.items():
                if name not in self._calls:
                    self._calls[name] = spending
                    self._count(spending)

    def _count(self, spending: Spending) -> None:
        # The first currency is that of the conversation: the budget refuses another one.
        self._total.currency = self._total.currency or spending.currency
        self._total.images += spending.images
        if spending.currency == self._total.currency:
            self._total.amount += spending.amount

    def budget(self, name: str, amount: Decimal | None, max_images: int | None) -> Budget:
        """Make the budget for one call, which `end` ends.

        Args:
            name: Name of the call's entry.
            amount: Limit of the money for the conversation; None for no limit.
            max_images: Limit of its images; None for no limit.

        Returns:
            A budget that counts this call by itself, and with all others of the conversation.
        """
        call = Spending()
        with self._total.lock:
            self._calls[name] = call
            self._open.add(name)
        counter = Budget(owner=OWNER, spending=call)
        return Budget(amount, max_images=max_images, owner=OWNER, spending=self._total, also=counter)

    def end(self, name: str) -> None:
        """Let others write the entry of a call that has ended.

        Args:
            name: Name of the entry.
        """
        with self._total.lock:
            self._open.discard(name)

    def news(self, record: Any, call: str) -> dict[str, list[Any]]:
        """Find what is missing in a state, or has changed since, when a call ends.

        Args:
            record: The value of the state.
            call: Name of the call's entry.

        Returns:
            The entries to write. Calls in flight write their own: LangGraph merges parallel writes in the order of the calls, so
            that what is reserved for one of them could replace what it has spent in the end.
        """
        known = record if isinstance(record, Mapping) else {}
        with self._total.lock:
            entries = {
                name: _entry(spending)
                for name, spending in self._calls.items()
                if (spending.images or name in known) and (name == call or name not in self._open)
            }
        return {name: entry for name, entry in entries.items() if _plain(known.get(name)) != entry}


def _plain(entry: Any) -> Any:
    return list(entry) if isinstance(entry, tuple) else entry


_ENCLOSING: Final[ContextVar[tuple[Ledger, Conversation] | None]] = ContextVar("cogview_conversation", default=None)
"""The conversation of the tool call in which this code runs."""


class Ledger:
    """The conversations of this process; the least recently used are forgotten, unless a call is running. Thread-safe.

    Args:
        limit: The largest number of conversations.
    """

    def __init__(self, limit: int = _MAX_CONVERSATIONS) -> None:
        self._limit = limit
        self._conversations: OrderedDict[Any, Conversation] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def conversation(self, thread: str | None, step: str | None) -> Iterator[Conversation]:
        """Hold a conversation while a call runs.

        Args:
            thread: Id of the thread; None without one.
            step: Id of the message that has the call, whose parallel calls have to know of each other. It names a conversation
                without a thread, unless the call is one of a sub-agent: that is in the conversation of the call around it.

        Yields:
            The conversation.
        """
        around = _ENCLOSING.get()
        if thread is None and around and around[0] is self:
            conversation = around[1]
            with self._lock:
                conversation.running += 1
        else:
            conversation = self._entered(("step", step) if thread is None and step else thread)
        _ENCLOSING.set((self, conversation))
        try:
            yield conversation
        finally:
            _ENCLOSING.set(around)
            with self._lock:
                conversation.running -= 1

    def _entered(self, key: Any) -> Conversation:
        with self._lock:
            conversation = self._conversations.pop(key, None) or Conversation()
            conversation.running += 1
            if key is not None:
                self._conversations[key] = conversation
                if len(self._conversations) > self._limit:
                    idle = (name for name, item in self._conversations.items() if not item.running)
                    self._conversations.pop(next(idle, None), None)
            return conversation
