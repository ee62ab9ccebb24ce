"""One budget for all shards of a job: a page in the job's folder, under a lock, with an amount for each shard.

Each entry is a state, not a change: what the shard has spent, and what it has reserved beyond that while it runs. A shard whose
process was killed is not locked any more, so that its entry is computed again from its own manifest and attempts.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import contextmanager, suppress
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from langchain_cogview.budget import Budget
from langchain_cogview.cost import Money
from langchain_cogview.errors import (
    CogViewBudgetError,
    CogViewConfigurationError,
    CogViewError,
    CogViewStorageError,
    printable,
)
from langchain_cogview.jobs.folder import SHARD_FOLDER, FolderInUseError, JobFolder, write_error
from langchain_cogview.jobs.history import read_history
from langchain_cogview.jobs.manifest import Amount, attempts_of, manifest_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from langchain_cogview.budget import Reservation, Spending
    from langchain_cogview.jobs.history import History

LEDGER: Final = "budget.json"
_MAX_BYTES: Final = 4 << 20
_LOCK_SECONDS: Final = 60.0
_PAUSE_SECONDS: Final = 0.002
_MAX_RESERVED: Final = 64
"""The most requests that a shard reserves at once, so that it seldom needs the page."""


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)

    amount: Amount  # spent, and reserved while it is open
    open: bool  # whether a process works on the shard, or was killed while it did
    budget: Amount | None = None  # the budget of that process


class _Page(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["cogview.budget"] = "cogview.budget"
    version: Literal[1] = 1
    currency: Annotated[str, Field(max_length=10)] | None
    shards: Annotated[dict[Annotated[str, Field(pattern=SHARD_FOLDER.pattern)], _Entry], Field(max_length=10_000)]


@contextmanager
def locked_parent(path: Path) -> Iterator[JobFolder]:
    """Lock the folder of a divided job for a moment; only one thread of one process has it.

    Args:
        path: The folder of the job.

    Yields:
        The folder.

    Raises:
        CogViewStorageError: The folder cannot be locked, or another process has held it for a minute.
    """
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        folder = JobFolder(path)
        try:
            folder.lock()
            break
        except FolderInUseError:
            folder.close()
            if time.monotonic() > until:
                raise CogViewStorageError(
                    f"Another process has held {printable(str(path), 120)} for {_LOCK_SECONDS:g} s.",
                    hint="See whether it is suspended, then run the job again.",
                ) from None
            time.sleep(_PAUSE_SECONDS)
        except BaseException:
            folder.close()
            raise
    with folder:
        yield folder


class ShardLedger:
    """The part of one shard in the budget of all shards.

    Args:
        path: The folder of the job, with a sub-folder for each shard.
        name: The name of the shard's folder.
        currency: The currency of the budget.
        price: Returns the price of one image of a model.
        fallback_models: Models that may be called in place of the one that a prompt asks for.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        currency: str | None,
        *,
        price: Callable[[str], Money],
        fallback_models: Iterable[str] = (),
    ) -> None:
        self.path = path
        self._name = name
        self._currency = currency
        self._price = price
        self.highest = max((price(model).amount or Decimal(0) for model in fallback_models), default=Decimal(0))
        """The highest price of a fallback model."""
        self._limit: Decimal | None = None
        self._is_kept = False  # whether the page has an entry of this shard
        self._others = Decimal(0)

    # --- the life of a shard

    def begin(self, parent: JobFolder, limit: Decimal | None) -> None:
        """Enter a shard that this process has just locked, while it also holds the folder of the job.

        Args:
            parent: The locked folder of the job.
            limit: The budget for all shards. None: no limit.

        Raises:
            CogViewConfigurationError: A process works on another shard with another budget, or in another currency.
            CogViewStorageError: The folder cannot be read or written.
        """
        self._limit = limit
        page = self._read(parent)
        if page is None:
            if limit is None:
                return
            page = _Page(currency=self._currency, shards={})
        if page.currency != self._currency:
            raise CogViewConfigurationError(
                f"The budget of the job in {self._where} is in {page.currency}, and this one would be in {self._currency}; "
                "nothing was sent.",
                hint="Use the same region in all processes.",
            )
        for name in sorted(filter(SHARD_FOLDER.fullmatch, parent.names() - {self._name})):
            entry = page.shards.get(name)
            budget = Decimal(entry.budget) if entry and entry.budget is not None else None
            known = entry is not None and (not entry.open or budget == limit)
            if known:
                continue
            spent = self._spent_if_idle(parent, name)
            if spent is None:
                raise self._conflict(name, budget)
            page.shards[name] = _Entry(amount=str(spent), open=False)
        before = page.shards.get(self._name)
        amount = before.amount if before else str(self._spent(parent, self._name))
        page.shards[self._name] = _Entry(amount=amount, open=True, budget=None if limit is None else str(limit))
        self._write(parent, page)
        self._is_kept = True

    def preview(self, limit: Decimal | None) -> None:
        """Read what other shards have spent or reserved, for a plan; changes no file.

        Args:
            limit: The budget for all shards.
        """
        self._limit = limit
        if limit is None:
            return
        with JobFolder(self.path) as parent:
            page = self._read(parent)
            entries = dict(page.shards) if page else {}
            for name in filter(SHARD_FOLDER.fullmatch, parent.names() - {self._name, *entries}):
                entries[name] = _Entry(amount=str(self._spent(parent, name)), open=False)
        self._others = _total(entries, but=self._name)

    def budget(self, counted: Budget) -> Budget:
        """Make the budget of this shard, which asks the page when it needs more.

        Args:
            counted: The budget that counts what the shard has spent.

        Returns:
            The budget; `counted` itself where there is no limit.
        """
        return counted if self._limit is None else ShardBudget(self, self._limit, counted)

    def reserve(self, held: Decimal, short: Decimal, step: Decimal) -> Decimal | None:
        """Reserve more for this shard.

        Args:
            held: What the shard has spent, and what it has reserved and not spent.
            short: How much it needs beyond that.
            step: What one request costs.

        Returns:
            By how much the reserved amount has grown, which may be more than was asked for; None if the budget does not cover it.

        Raises:
            CogViewStorageError: The page cannot be read or written, or is not there any more.
        """
        limit = self._limit or Decimal(0)
        with locked_parent(self.path) as parent:
            page = self._read(parent)
            if page is None or self._name not in page.shards:
                raise CogViewStorageError(
                    f"{printable(str(self.path / LEDGER), 120)} was deleted or damaged while the job ran.",
                    hint="Run the job again; what was spent is computed again.",
                )
            free = limit - held - _total(page.shards, but=self._name)
            if free < short and self._close_abandoned(parent, page):
                free = limit - held - _total(page.shards, but=self._name)
            more = None
            if free >= short:
                holders = sum(entry.open for entry in page.shards.values())
                # The less is left, the less is reserved at once, so that no shard ends while another holds much.
                steps = min(_MAX_RESERVED, int(free / (2 * holders * step))) if step else 0
                more = max(short, min(free, steps * step))
            page.shards[self._name] = _Entry(amount=str(held + (more or 0)), open=True, budget=str(limit))
            self._write(parent, page)
            return more

    def end(self, history: History) -> None:
        """Give back what the shard did not spend, while its folder is still locked.

        Args:
            history: What its records say.
        """
        if not self._is_kept:
            return
        # Otherwise the entry stays open, and whoever needs the rest computes it again.
        with suppress(CogViewError), locked_parent(self.path) as parent:
            page = self._read(parent)
            if page is not None and self._name in page.shards:
                page.shards[self._name] = _Entry(amount=str(self._amount(history)), open=False)
                self._write(parent, page)

    @property
    def others(self) -> Decimal:
        """What the other shards had spent or reserved when the page was last read."""
        return self._others

    # --- other shards

    def _close_abandoned(self, parent: JobFolder, page: _Page) -> bool:
        # Enter what shards have really spent that no process works on any more.
        closed = False
        for name, entry in page.shards.items():
            if entry.open and name != self._name:
                spent = self._spent_if_idle(parent, name)
                if spent is not None:
                    page.shards[name] = _Entry(amount=str(spent), open=False)
                    closed = True
        return closed

    def _spent_if_idle(self, parent: JobFolder, name: str) -> Decimal | None:
        # None while a process works on it. No process begins it meanwhile: that needs the folder of the job, which is locked.
        try:
            return self._spent(parent, name, lock=True)
        except FolderInUseError:
            return None

    def _spent(self, parent: JobFolder, name: str, *, lock: bool = False) -> Decimal:
        try:
            with parent.subfolder(name) as folder:
                if lock:
                    folder.lock()
                with attempts_of(folder) as attempts, manifest_of(folder) as manifest:
                    return self._amount(read_history(attempts, manifest))
        except FileNotFoundError:
            return Decimal(0)
        except OSError as error:
            failure = write_error(self.path / name, error)
            raise failure from None

    def _amount(self, history: History) -> Decimal:
        images = history.spent()
        return sum((count * (self._price(model).amount or Decimal(0)) for model, count in images.items()), Decimal(0))

    def _conflict(self, name: str, budget: Decimal | None) -> CogViewConfigurationError:
        other = "no budget" if budget is None else f"a budget of {Money(budget, self._currency)}"
        this = "none" if self._limit is None else f"one of {Money(self._limit, self._currency)}"
        return CogViewConfigurationError(
            f"Another process works on {name} of {self._where} with {other}, and this one has {this}; nothing was sent.",
            hint="Use the same budget in all processes, or wait until the other one ends.",
        )

    @property
    def _where(self) -> str:
        return printable(str(self.path), 120)

    # --- the page

    def _read(self, parent: JobFolder) -> _Page | None:
        # None if there is no page, or none that can be used: it is computed again.
        raw = parent.read(LEDGER, _MAX_BYTES)
        if raw is None:
            return None
        try:
            page = _Page.model_validate_json(raw)
        except ValidationError:
            return None
        self._others = _total(page.shards, but=self._name)
        return page

    def _write(self, parent: JobFolder, page: _Page) -> None:
        page.currency = self._currency
        content = json.dumps(page.model_dump(), indent=1).encode() + b"\n"
        try:
            parent.replace(LEDGER, [content])
        except OSError as error:
            raise write_error(self.path / LEDGER, error) from None
        self._others = _total(page.shards, but=self._name)


def _total(entries: dict[str, _Entry], *, but: str) -> Decimal:
    return sum((Decimal(entry.amount) for name, entry in entries.items() if name != but), Decimal(0))


class ShardBudget(Budget):
    """The budget of one shard: what it may spend of the budget of all shards.

    It has reserved `amount`, and asks the ledger for more, except on an event loop, which must not wait for files.

    Args:
        ledger: The ledger of all shards.
        limit: The budget of all shards.
        counted: The budget that counts what the shard has spent.
    """

    def __init__(self, ledger: ShardLedger, limit: Decimal, counted: Budget) -> None:
        spending: Spending = counted._spending  # noqa: SLF001  of this package
        super().__init__(limit, spending.currency, owner="all shards of this job", spending=spending)
        self.limit = limit
        """The budget of all shards."""
        self.amount = spending.amount
        self._ledger = ledger
        self._asking = threading.Lock()

    def reserve(self, price: Money, count: int = 1) -> Reservation:
        """Reserve images for one request, at the price of the dearest model that may be called.

        A fallback model is called on the event loop, where nothing more can be reserved.

        Returns:
            The reservation.

        Raises:
            CogViewBudgetError: The budget does not cover all images at that price. Nothing was sent.
        """
        if price.amount is not None and self._ledger.highest > price.amount:
            return super().reserve(Money(self._ledger.highest, price.currency), count)
        return super().reserve(price, count)

    def copy(self) -> Budget:
        """Copy the budget.

        Returns:
            A budget with what all shards have left, which is then counted independently.
        """
        copied = super().copy()
        copied.amount = max(self.limit - self._ledger.others, Decimal(0))
        return copied

    def _add(self, price: Money, count: int, amount: Decimal) -> None:
        while True:
            try:
                super()._add(price, count, amount)
            except CogViewBudgetError:
                if not self._ask(price, amount):
                    raise
            else:
                return

    def _check(self, price: Money, count: int, amount: Decimal) -> None:
        try:
            super()._check(price, count, amount)
        except CogViewBudgetError as error:
            if price.amount is None or self._spending.currency not in {None, price.currency}:
                raise
            raise CogViewBudgetError(
                f"The budget of {Money(self.limit, price.currency)} for {self.owner} does not cover another image "
                f"({price} each); nothing was sent.",
                hint=error.hint,
            ) from None

    def _ask(self, price: Money, amount: Decimal) -> bool:
        # Whether more is reserved now. The lock of the figures is not held while the file is read.
        if price.amount is None or self._spending.currency not in {None, price.currency} or _on_event_loop():
            return False
        with self._asking:
            with self._spending.lock:
                held = self.amount or Decimal(0)
                short = self._spending.amount + amount - held
            if short <= 0:  # another thread has asked meanwhile
                return True
            more = self._ledger.reserve(held, short, amount)
            if more is None:
                return False
            with self._spending.lock:
                self.amount = held + more
            return True


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
