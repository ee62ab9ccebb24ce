"""Money: what images cost, what was spent, and what may still be spent. In decimal numbers, where unknown is not zero."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.catalog import PRICES_AS_OF, money_text
from langchain_cogview.errors import CogViewBudgetError, CogViewConfigurationError, Outcome, printable
from langchain_cogview.events import GENERATED_EVENT, PROGRESS_EVENT, RETRY_EVENT

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping
    from datetime import date


MAX_AMOUNT: Final = 10**9
"""The largest price and the largest budget."""
_DECIMALS: Final = 12
_DIGITS: Final = 28


def checked_amount(value: Any) -> Decimal:
    """An amount of money, such as a price or a budget.

    Args:
        value: A number, or its text.

    Returns:
        The amount as a decimal number.

    Raises:
        ValueError: Not a number, negative, not finite, or beyond what an amount of money can be.
    """
    try:
        amount = Decimal(value if isinstance(value, Decimal | int) else str(value))
    except (InvalidOperation, ValueError):
        amount = Decimal(-1)
    if not amount.is_finite() or not 0 <= amount <= MAX_AMOUNT:
        raise ValueError(f"An amount of money is a number from 0 to {MAX_AMOUNT:,}.")
    exponent = amount.as_tuple().exponent
    if amount and (len(amount.as_tuple().digits) > _DIGITS or (isinstance(exponent, int) and exponent < -_DECIMALS)):
        raise ValueError(f"An amount of money has at most {_DECIMALS} decimal places and {_DIGITS} digits.")
    return amount or Decimal(0)


@dataclass(frozen=True, slots=True)
class Money:
    """An amount of money, such as the price of one image.

    Attributes:
        amount: None where it is unknown.
        currency: ISO code; None where the amount is unknown.
    """

    amount: Decimal | None = None
    currency: str | None = None

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Money:
        """Read the cost of an event, or of an image in an artifact; a cached or sandbox image costs nothing.

        Returns:
            The cost; unknown where it is missing, or no amount of money.
        """
        currency = event.get("currency")
        if event.get("sandbox") or event.get("cached"):
            return cls(Decimal(0), currency)
        try:
            amount = checked_amount(event.get("cost"))
        except ValueError:
            return cls()
        # An amount of no currency can be added to nothing, unless it is nothing itself.
        return cls(amount, currency) if currency or not amount else cls()

    @classmethod
    def of_image(cls, image: Any) -> Money:
        """What a `GeneratedImage` costs; a cached one and one of the sandbox cost nothing."""
        facts = ("cost", "currency", "sandbox", "cached")
        return cls.of({name: getattr(image, name) for name in facts})

    def __str__(self) -> str:
        return "unknown price" if self.amount is None else money_text(self.amount, self.currency)


@dataclass(slots=True)
class Charges:
    """What a number of images costs, by currency.

    Attributes:
        count: How many images.
        amounts: What those of known price cost, by currency (ISO code).
        unpriced: How many of them are of unknown price, and in no amount.
    """

    count: int = 0
    amounts: dict[str, Decimal] = field(default_factory=dict)
    unpriced: int = 0

    def add(self, money: Money, count: int = 1) -> None:
        """Count images.

        Args:
            money: What one of them costs.
            count: How many.
        """
        self.count += count
        if money.amount is None:
            self.unpriced += count
        elif money.currency:
            self.amounts[money.currency] = self.amounts.get(money.currency, Decimal(0)) + count * money.amount

    def copy(self) -> Charges:
        """The same figures, to be changed apart."""
        return Charges(self.count, dict(self.amounts), self.unpriced)

    def in_text(self) -> dict[str, str]:
        """The amounts as JSON takes them: decimal numbers in text, by currency."""
        return {currency: f"{amount:f}" for currency, amount in self.amounts.items()}

    def __str__(self) -> str:
        money = " + ".join(str(Money(amount, currency)) for currency, amount in self.amounts.items() if amount)
        if self.unpriced:
            return " and ".join(part for part in (money, f"{self.unpriced} of unknown price") if part)
        return money or "nothing"


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """What the pictures of one model cost in one currency.

    Attributes:
        count: How many pictures, those that cost nothing included.
        amount: None where a price among them is unknown.
    """

    count: int = 0
    amount: Decimal | None = Decimal(0)

    def plus(self, price: Money) -> ModelCosts:
        """With one more picture."""
        known = self.amount is not None and price.amount is not None
        return ModelCosts(self.count + 1, self.amount + price.amount if known else None)  # type: ignore[operator]


class ImageCosts:
    """What pictures cost, and what became of those that did not come. Thread-safe.

    It is filled by `collect_image_costs` or `CostCallbackHandler`. Prices are list prices, or those that `prices=` on the
    generator gives in their place.

    Attributes:
        cached: Of them, those that came from the cache: no cost.
        sandbox: Of them, placeholders of the offline service: no cost.
        blocked: Pictures that the content filter blocked: no cost.
        failed: Pictures that failed otherwise; `uncertain` says which of them may have been charged.
        prices_as_of: The day of the table of list prices.

    Example:
        >>> with collect_image_costs() as costs:    # doctest: +SKIP
        ...     generator.batch(["a kitten", "a puppy", "a foal"])
        >>> print(costs)    # doctest: +SKIP
        3 images, 0.18 CNY (list prices of 2026-10-01)
    """

    def __init__(self) -> None:
        self.cached = 0
        self.sandbox = 0
        self.blocked = 0
        self.failed = 0
        self.prices_as_of: date = PRICES_AS_OF
        self._by_model: dict[tuple[str, str | None], ModelCosts] = {}
        self._charges = Charges()
        self._under_way: dict[str, Money] = {}
        self._uncertain: dict[Hashable, Money] = {}
        self._lock = threading.RLock()

    @property
    def images(self) -> int:
        """Images made, the cached and the placeholders included."""
        return self._charges.count

    @property
    def unpriced(self) -> int:
        """Of them, those of unknown price: they are in no amount."""
        return self._charges.unpriced

    @property
    def by_model(self) -> dict[tuple[str, str | None], ModelCosts]:
        """Count and amount of the pictures, by model and currency; the currency is None where the price is unknown."""
        with self._lock:
            return dict(self._by_model)

    @property
    def by_currency(self) -> dict[str, Decimal]:
        """What the pictures of known price cost, by currency."""
        with self._lock:
            return dict(self._charges.amounts)

    def total(self, currency: str) -> Decimal:
        """What the pictures of known price cost in one currency (ISO code); `complete` tells whether that is all."""
        return self.by_currency.get(currency.upper(), Decimal(0))

    @property
    def complete(self) -> bool:
        """Whether every picture's price is known, so that the amounts cover all pictures."""
        return not self.unpriced

    @property
    def charges(self) -> Charges:
        """What the pictures cost, in all currencies."""
        with self._lock:
            return self._charges.copy()

    @property
    def uncertain(self) -> Charges:
        """What may have been charged though no picture came; in no other amount."""
        with self._lock:
            uncertain = Charges()
            for money in self._uncertain.values():
                uncertain.add(money)
            return uncertain

    @property
    def in_flight(self) -> int:
        """Pictures that were sent and have not ended; after the work, those whose caller left before the end."""
        return len(self._under_way)

    def on_event(self, name: str, event: Mapping[str, Any]) -> None:
        """Count an event of this package; others are passed over."""
        with self._lock:
            if name == GENERATED_EVENT:
                self._made(event)
            elif name == PROGRESS_EVENT and event["stage"] == "failed":
                self._lost(event)
            elif name == PROGRESS_EVENT:
                self._under_way.setdefault(event["request_id"], Money.of(event))
            elif name == RETRY_EVENT and event["outcome"] == Outcome.UNKNOWN:
                # It is sent again all the same: what it may have cost comes besides the picture's price.
                attempt = (event["request_id"], event["attempt"])
                self._uncertain[attempt] = self._under_way.get(event["request_id"], Money())

    def _made(self, event: Mapping[str, Any]) -> None:
        price = Money.of(event)
        self._under_way.pop(event["request_id"], None)
        # A task whose end was not seen, and which was resumed: it came after all.
        for name in (event["request_id"], event.get("task_id")):
            self._uncertain.pop(name, None)
        self.cached += bool(event["cached"])
        self.sandbox += bool(event["sandbox"])
        row = event["model"], price.currency
        self._by_model[row] = self._by_model.get(row, ModelCosts()).plus(price)
        self._charges.add(price)

    def _lost(self, event: Mapping[str, Any]) -> None:
        self._under_way.pop(event["request_id"], None)
        if event["blocked"]:
            self.blocked += 1
            return
        self.failed += 1
        if event["outcome"] == Outcome.UNKNOWN:
            # It tells of the attempts before the last one, too; the last one itself may not have been sent.
            for attempt in [key for key in self._uncertain if isinstance(key, tuple) and key[0] == event["request_id"]]:
                del self._uncertain[attempt]
            name = event["task_id"] or event["request_id"]
            for number in range(max(1, event.get("uncertain") or 1)):
                self._uncertain[(event["request_id"], number) if number else name] = Money.of(event)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON; amounts are decimal numbers in text."""
        with self._lock:
            uncertain = self.uncertain
            return {
                "images": self.images,
                "cached": self.cached,
                "sandbox": self.sandbox,
                "unpriced": self.unpriced,
                "blocked": self.blocked,
                "failed": self.failed,
                "in_flight": self.in_flight,
                "complete": self.complete,
                "amounts": self._charges.in_text(),
                "by_model": [
                    {
                        "model": model,
                        "currency": currency,
                        "count": costs.count,
                        "amount": None if costs.amount is None else f"{costs.amount:f}",
                    }
                    for (model, currency), costs in self._by_model.items()
                ],
                "uncertain": {
                    "count": uncertain.count,
                    "amounts": uncertain.in_text(),
                    "unpriced": uncertain.unpriced,
                },
                "prices_as_of": self.prices_as_of.isoformat(),
            }

    def __str__(self) -> str:
        with self._lock:
            charges, uncertain = self.charges, self.uncertain
            free = [
                f"{count} {what}"
                for count, what in ((self.cached, "cached"), (self.sandbox, "of the sandbox"))
                if count
            ]
            besides = [
                f"{count} {what}"
                for count, what in (
                    (self.blocked, "blocked"),
                    (self.failed, "failed"),
                    (self.in_flight, "under way"),
                    (uncertain.count, f"may have been charged besides ({uncertain})"),
                )
                if count
            ]
        text = "1 image" if charges.count == 1 else f"{charges.count} images"
        text += f" ({', '.join(free)})" if free else ""
        text += f", {charges}" if charges.count else ""
        text += f" (list prices of {self.prices_as_of})" if any(charges.amounts.values()) else ""
        return "; ".join((text, *besides))

    def __repr__(self) -> str:
        return f"<ImageCosts: {self}>"

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


class Spending:
    """What counts as spent, what is held for requests under way included. Thread-safe."""

    def __init__(self) -> None:
        self.images = 0
        self.amount = Decimal(0)
        self.currency: str | None = None
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, lock=threading.RLock())


class Budget:
    """How many images, and how much money, may be spent; for a tool, a job, or calls of your own. Thread-safe.

    Images are reserved before a request, committed one by one when a POST that may be charged is sent, and released when the
    POST made no image for sure, or was never sent. What may have been charged stays committed. Prices are list prices, or those
    of `prices=` on the generator; images of the sandbox count alike, and images from a cache cost nothing.

    Args:
        amount: Money in all. None: no limit.
        currency: Its ISO code. None: that of the first image.
        max_images: Images in all. None: no limit.
        owner: What has this budget, as errors name it.
        spending: What counts as spent so far; budgets can share it. None: nothing.

    Raises:
        CogViewConfigurationError: `amount` is no amount of money.

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
    ) -> None:
        try:
            self.amount = None if amount is None else checked_amount(amount)
        except ValueError:
            raise CogViewConfigurationError(
                f"A budget is an amount of money, from 0 to {MAX_AMOUNT:,}, not {printable(str(amount), 40)!r}.",
                hint="Give it in the platform's currency, such as 2.5.",
            ) from None
        self.max_images = max_images
        self.owner = owner
        self._spending = spending or Spending()
        if currency:
            self._spending.currency = currency

    @property
    def images(self) -> int:
        """Images that count as spent, those of requests under way included."""
        return self._spending.images

    @property
    def spent(self) -> Money:
        """Money that counts as spent, for requests under way included."""
        return Money(self._spending.amount, self._spending.currency)

    def reserve(self, price: Money, count: int = 1) -> Reservation:
        """Hold images for one request.

        Args:
            price: Of one image.
            count: How many.

        Returns:
            What is held.

        Raises:
            CogViewBudgetError: The budget does not cover all of them; nothing has been sent.
        """
        each = price.amount or Decimal(0)
        self._take(price, count, count * each)
        return Reservation(self, count, each)

    def commit(self, price: Money, count: int = 1) -> None:
        """Count images that were paid before, whether or not the budget covers them.

        Args:
            price: Of one image.
            count: How many.
        """
        with self._spending.lock:
            self._spending.images += count
            self._spending.amount += count * (price.amount or 0)
            self._spending.currency = self._spending.currency or price.currency

    def release(self, price: Money, count: int = 1) -> None:
        """Count images as not spent after all.

        Args:
            price: What one of them was counted with.
            count: How many.
        """
        self._give_back(count, count * (price.amount or Decimal(0)))

    def copy(self) -> Budget:
        """A budget with the same limits, of which the same is spent, to be used up apart."""
        spending = Spending()
        with self._spending.lock:
            spending.images, spending.amount = self._spending.images, self._spending.amount
        return Budget(
            self.amount, self._spending.currency, max_images=self.max_images, owner=self.owner, spending=spending
        )

    def _take(self, price: Money, count: int, amount: Decimal) -> None:
        with self._spending.lock:
            self._refuse_over(price, count, amount)
            self._spending.images += count
            self._spending.amount += amount
            self._spending.currency = self._spending.currency or price.currency

    def _give_back(self, count: int, amount: Decimal) -> None:
        with self._spending.lock:
            self._spending.images -= count
            self._spending.amount -= amount

    def _refuse_over(self, price: Money, count: int, amount: Decimal) -> None:
        spending = self._spending
        if self.max_images is not None and spending.images + count > self.max_images:
            images = "1 image" if self.max_images == 1 else f"{self.max_images} images"
            raise CogViewBudgetError(f"The limit of {images} for {self.owner} is reached; nothing was sent.")
        if self.amount is None:
            return
        if price.amount is None:
            raise CogViewBudgetError(
                "The price of the model is not known, so a budget cannot be kept; nothing was sent.",
                hint="Tell it with prices={model: price} on the generator.",
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
    """Images that a budget holds for one request. Thread-safe.

    Attributes:
        count: How many are held and not yet committed.
        released: How many were held and not spent, once the request has ended.
    """

    def __init__(self, budget: Budget, count: int, each: Decimal) -> None:
        self.count = count
        self.released = 0
        self._budget = budget
        self._each = each
        self._lock = threading.Lock()
        self._ended = False

    def commit(self, price: Money) -> Charge:
        """Spend one image, right before a POST that may be charged; one that is not held is taken from the budget.

        Args:
            price: Of the model that is asked, which may be another than the one that was counted with.

        Returns:
            The charge, to be released where the POST made no image for sure.

        Raises:
            CogViewBudgetError: The budget does not cover it; the POST must not be sent.
        """
        amount = price.amount or Decimal(0)
        with self._lock:
            held = min(self.count, 1)
            # Only the difference is taken: another model may cost more or less.
            self._budget._take(price, 1 - held, amount - held * self._each)  # noqa: SLF001  of the same module
            self.count -= held
        return Charge(self, amount)

    def give_back(self, amount: Decimal) -> None:
        """Hold an image again that was committed."""
        with self._lock:
            if self._ended:
                self._budget._give_back(1, amount)  # noqa: SLF001
                self.released += 1
            else:
                self._budget._give_back(0, amount - self._each)  # noqa: SLF001
                self.count += 1

    def release(self) -> None:
        """Give back what was not spent: the request has ended."""
        with self._lock:
            self._budget._give_back(self.count, self.count * self._each)  # noqa: SLF001
            self.released += self.count
            self.count, self._ended = 0, True


class Charge:
    """One image that was committed.

    Args:
        reservation: Where it came from.
        amount: What it costs.
    """

    def __init__(self, reservation: Reservation, amount: Decimal) -> None:
        self._reservation: Reservation | None = reservation
        self._amount = amount

    def release(self) -> None:
        """The POST made no image for sure. Has an effect once."""
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            reservation.give_back(self._amount)


@contextmanager
def reserved(budget: Budget | Reservation | None, price: Money, count: int) -> Iterator[Reservation | None]:
    """Hold the images of one request while it is under way; what was not spent is released at the end.

    Args:
        budget: One that was reserved before is used as it is. None: nothing is counted.
        price: Of one image.
        count: How many.

    Yields:
        What is held.

    Raises:
        CogViewBudgetError: The budget does not cover all of them; nothing has been sent.
    """
    reservation = budget.reserve(price, count) if isinstance(budget, Budget) else budget
    try:
        yield reservation
    finally:
        if reservation is not None:
            reservation.release()
