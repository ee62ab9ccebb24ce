"""Limits of images and of money, and the journal of what is about to be charged.

An image is reserved before its request, and counts once a POST is sent that may be charged.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from contextvars import ContextVar
from decimal import Decimal
from typing import TYPE_CHECKING, Final, Protocol

from langchain_cogview.cost import MAX_AMOUNT, Money, checked_amount
from langchain_cogview.errors import CogViewBudgetError, CogViewConfigurationError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator


class Spending:
    """What was spent, including what is reserved for requests in flight. Thread-safe."""

    def __init__(self) -> None:
        self.images = 0
        """The number of images."""
        self.amount = Decimal(0)
        """The amount of money."""
        self.currency: str | None = None
        """ISO code of the currency; None until the first image."""
        self.lock = threading.RLock()
        """Held while the figures are read or changed."""

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, lock=threading.RLock())


class Budget:
    """A limit of images and of money for a tool, a job, or your own calls. Thread-safe.

    Images are reserved before a request. Each image is committed when a POST that may be charged is sent, and released if the
    POST certainly made no image or was never sent. What may have been charged stays committed. Prices are list prices, unless
    `prices=` of the generator replaces them. Sandbox images count at these prices too; images from a cache cost nothing.

    Args:
        amount: Limit of the money. None: no limit.
        currency: ISO code of the currency. None: the currency of the first image.
        max_images: Limit of the number of images. None: no limit.
        owner: Name of the budget's owner in errors.
        spending: What was spent so far; several budgets can share it. None: nothing.
        also: A budget that must cover each image as well, and counts it. None: there is no other.

    Raises:
        CogViewConfigurationError: `amount` is not an amount of money.

    Example:
        >>> budget = Budget("0.30", "CNY")
        >>> generator.invoke("a kitten", budget=budget)    # doctest: +SKIP
        >>> str(budget.spent)    # doctest: +SKIP
        '0.06 CNY'
    """

    def __init__(
        self,
        amount: Decimal | float | str | None = None,
        currency: str | None = None,
        *,
        max_images: int | None = None,
        owner: str = "these calls",
        spending: Spending | None = None,
        also: Budget | None = None,
    ) -> None:
        try:
            self.amount = None if amount is None else checked_amount(amount)
        except ValueError:
            raise CogViewConfigurationError(
                f"A budget is an amount of money, from 0 to {MAX_AMOUNT:,}, not {printable(str(amount), 40)!r}.",
                hint="Pass a number in the platform's currency, such as 2.5.",
            ) from None
        self.max_images = max_images
        """Limit of the number of images; None for no limit."""
        self.owner = owner
        """Name of the budget's owner in errors."""
        self._spending = spending or Spending()
        self._also = also
        if currency:
            self._spending.currency = currency

    @property
    def images(self) -> int:
        """The number of images that count as spent, including those of requests in flight."""
        return self._spending.images

    @property
    def spent(self) -> Money:
        """The money that counts as spent, including that of requests in flight."""
        return Money(self._spending.amount, self._spending.currency)

    @property
    def left(self) -> Money | None:
        """The money that is left; None without a limit."""
        others = [] if self._also is None or self._also.left is None else [self._also.left]
        if self.amount is not None:
            others.append(Money(max(self.amount - self._spending.amount, Decimal(0)), self._spending.currency))
        return min(others, key=lambda money: money.amount or 0, default=None)

    @property
    def images_left(self) -> int | None:
        """The number of images that are left; None without a limit."""
        left = None if self.max_images is None else max(self.max_images - self._spending.images, 0)
        other = self._also.images_left if self._also else None
        return min((number for number in (left, other) if number is not None), default=None)

    def reserve(self, price: Money, count: int = 1) -> Reservation:
        """Reserve images for one request.

        Args:
            price: The price of one image.
            count: The number of images.

        Returns:
            The reservation.

        Raises:
            CogViewBudgetError: The budget does not cover all images. Nothing was sent.
        """
        amount = price.amount or Decimal(0)
        self._add(price, count, count * amount)
        return Reservation(self, count, amount)

    def commit(self, price: Money, count: int = 1) -> None:
        """Add images that were paid before, whether or not the budget covers them.

        Args:
            price: The price of one image.
            count: The number of images.
        """
        with self._spending.lock:
            if self._also:
                self._also.commit(price, count)
            self._count(count, count * (price.amount or Decimal(0)), price.currency)

    def release(self, price: Money, count: int = 1) -> None:
        """Subtract images that were not spent after all; the arguments are those of `commit`."""
        self._subtract(count, count * (price.amount or Decimal(0)))

    def copy(self) -> Budget:
        """Copy the budget.

        Returns:
            A budget with the same limits and the same spending, which is then counted independently.
        """
        spending = Spending()
        with self._spending.lock:
            spending.images, spending.amount = self._spending.images, self._spending.amount
        return Budget(
            self.amount, self._spending.currency, max_images=self.max_images, owner=self.owner, spending=spending
        )

    def _add(self, price: Money, count: int, amount: Decimal) -> None:
        with self._spending.lock:
            self._check(price, count, amount)
            if self._also:
                self._also._add(price, count, amount)  # noqa: SLF001  of the same class
            self._count(count, amount, price.currency)

    def _subtract(self, count: int, amount: Decimal) -> None:
        with self._spending.lock:
            if self._also:
                self._also._subtract(count, amount)  # noqa: SLF001
            self._count(-count, -amount, None)

    def _count(self, count: int, amount: Decimal, currency: str | None) -> None:
        self._spending.images += count
        self._spending.amount += amount
        self._spending.currency = self._spending.currency or currency

    def _check(self, price: Money, count: int, amount: Decimal) -> None:
        spending = self._spending
        if self.max_images is not None and spending.images + count > self.max_images:
            images = "1 image" if self.max_images == 1 else f"{self.max_images} images"
            raise CogViewBudgetError(f"The limit of {images} for {self.owner} is reached; nothing was sent.")
        if self.amount is None:
            return
        if price.amount is None:
            raise CogViewBudgetError(
                "Nothing was sent: a budget needs the price of the model, which is not known.",
                hint="Pass prices={model: price} to the generator.",
            )
        if spending.currency not in {None, price.currency}:
            raise CogViewBudgetError(
                f"The budget of {self.owner} is in {spending.currency}, and the image is billed in {price.currency}; "
                "nothing was sent."
            )
        if spending.amount + amount > self.amount:
            raise CogViewBudgetError(
                f"The budget of {Money(self.amount, price.currency)} for {self.owner} does not cover another image "
                f"({price} each); nothing was sent."
            )


class Reservation:
    """Images that a budget reserved for one request. Thread-safe."""

    def __init__(self, budget: Budget, count: int, amount: Decimal) -> None:
        self.count = count
        """The number of images that are reserved and not yet committed."""
        self.released = 0
        """The number of images that were reserved and not spent, once the request has ended."""
        self._budget = budget
        self._amount = amount
        self._lock = threading.Lock()
        self._ended = False

    def commit(self, price: Money) -> Charge:
        """Commit one image, right before a POST that may be charged.

        If none is reserved any more, the image is reserved first.

        Args:
            price: The price of the model that is called, which may differ from the one that the images are reserved at.

        Returns:
            The charge, which is released if the POST certainly made no image.

        Raises:
            CogViewBudgetError: The budget does not cover the image. The POST must not be sent.
        """
        amount = price.amount or Decimal(0)
        with self._lock:
            reserved = min(self.count, 1)
            # Only the difference is added: another model may cost more or less.
            self._budget._add(price, 1 - reserved, amount - reserved * self._amount)  # noqa: SLF001  of the same module
            self.count -= reserved
        return Charge(self, amount)

    def _restore(self, amount: Decimal) -> None:
        # An image that was committed is reserved again, unless the request has ended.
        with self._lock:
            if self._ended:
                self._budget._subtract(1, amount)  # noqa: SLF001
                self.released += 1
            else:
                self._budget._subtract(0, amount - self._amount)  # noqa: SLF001
                self.count += 1

    def release(self) -> None:
        """Release what was not spent, when the request has ended."""
        with self._lock:
            self._budget._subtract(self.count, self.count * self._amount)  # noqa: SLF001
            self.released += self.count
            self.count, self._ended = 0, True


class Charge:
    """One image that was committed."""

    def __init__(self, reservation: Reservation, amount: Decimal) -> None:
        self._reservation: Reservation | None = reservation
        self._amount = amount

    def release(self) -> None:
        """Return the image to its reservation, because the POST certainly made none. Only the first call has an effect."""
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            reservation._restore(self._amount)  # noqa: SLF001


@contextmanager
def reserved(budget: Budget | Reservation | None, price: Money, count: int) -> Iterator[Reservation | None]:
    """Reserve the images of one request until it ends; what was not spent is released then.

    Args:
        budget: The budget, or a reservation that was made before. None: nothing is counted.
        price: The price of one image.
        count: The number of images.

    Yields:
        The reservation; None without a budget.

    Raises:
        CogViewConfigurationError: `budget` is something else.
    """
    if budget is not None and not isinstance(budget, Budget | Reservation):
        raise CogViewConfigurationError(
            f"budget= of a call takes a Budget, not {type(budget).__name__}; nothing was sent.",
            hint='Make one, and pass it to all calls that it is to limit: Budget("0.30", "CNY").',
        )
    reservation = budget.reserve(price, count) if isinstance(budget, Budget) else budget
    try:
        yield reservation
    finally:
        if reservation is not None:
            reservation.release()


class Journal(Protocol):
    """Records what is about to be charged, so that a process that dies leaves a trace.

    Each record has the request id that this client generated and the model that is asked, which may be a fallback model.
    """

    def sending(self, request_id: str, model: str) -> None:
        """Record the first POST to a model, or a POST after one that may have been charged, right before it is sent.

        An exception ends the call, and nothing is sent.
        """

    async def asending(self, request_id: str, model: str) -> None:
        """Async version of `sending`."""

    def not_sent(self, request_id: str, model: str) -> None:
        """Record that the caller left, by a cancelled task or an interrupt, before anything of the POST was sent."""

    async def anot_sent(self, request_id: str, model: str) -> None:
        """Async version of `not_sent`."""

    def submitted(self, request_id: str, task_id: str, model: str) -> None:
        """Record a task that was accepted, by whose id its image is found again."""

    async def asubmitted(self, request_id: str, task_id: str, model: str) -> None:
        """Async version of `submitted`."""


JOURNAL: Final[ContextVar[Journal | None]] = ContextVar("cogview_journal", default=None)
"""The journal of the calls made in this context."""
