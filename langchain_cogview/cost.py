"""Money: what images cost. Amounts are decimal numbers, and an unknown amount is not zero."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.artifact import GENERATED_EVENT, PROGRESS_EVENT, RETRY_EVENT
from langchain_cogview.catalog import PRICES_AS_OF, money_text
from langchain_cogview.errors import Outcome

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping
    from datetime import date


NO_COST: Final = "no cost"
"""The text of costs that are zero."""
MAX_AMOUNT: Final = 10**9
"""The largest price and the largest budget, in any currency."""
_DECIMALS: Final = 12
_DIGITS: Final = 28


def checked_amount(value: Any) -> Decimal:
    """Check an amount of money, such as a price or a budget.

    Args:
        value: A number, or the text of one.

    Returns:
        The amount as a decimal number.

    Raises:
        ValueError: The value is not a finite number from 0 to `MAX_AMOUNT`, or it has too many digits.
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


def checked_prices(prices: Mapping[str, Decimal] | None) -> Mapping[str, Decimal] | None:
    """Check prices by model, each as `checked_amount` does.

    Returns:
        The prices as they were passed.
    """
    for amount in (prices or {}).values():
        checked_amount(amount)
    return prices


@dataclass(frozen=True, slots=True)
class Money:
    """An amount of money, such as the price of one image."""

    amount: Decimal | None = None
    """The amount; None where it is unknown."""
    currency: str | None = None
    """ISO code of the currency; None where the amount is unknown."""
    list_price: Decimal | None = None
    """What the service would have charged for an image of the sandbox; None for other images."""

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Money:
        """Read the cost of an image from an event or an artifact. A cached image and a sandbox image cost nothing.

        Args:
            event: The event, or the record of the image in an artifact.

        Returns:
            The cost; unknown if it is missing or not an amount of money.
        """
        currency = event.get("currency")
        if event.get("sandbox") or event.get("cached"):
            try:
                listed = None if event.get("cached") else checked_amount(event.get("list_price"))
            except ValueError:
                listed = None
            return cls(Decimal(0), currency, listed if currency else None)
        try:
            amount = checked_amount(event.get("cost"))
        except ValueError:
            return cls()
        # An amount without a currency cannot be added to anything, unless it is zero.
        return cls(amount, currency) if currency or not amount else cls()

    @classmethod
    def of_image(cls, image: Any) -> Money:
        """Read the cost of a `GeneratedImage`. A cached image and a sandbox image cost nothing.

        Args:
            image: The image.

        Returns:
            The cost, which may be unknown.
        """
        facts = ("cost", "currency", "list_price", "sandbox", "cached")
        return cls.of({name: getattr(image, name) for name in facts})

    def __str__(self) -> str:
        if self.list_price is not None:
            return f"sandbox; list price {money_text(self.list_price, self.currency)}"
        return "unknown price" if self.amount is None else money_text(self.amount, self.currency)


@dataclass(slots=True)
class Charges:
    """What a number of images costs, by currency."""

    count: int = 0
    """The number of images."""
    amounts: dict[str, Decimal] = field(default_factory=dict)
    """The cost of the images of known price, by ISO currency code."""
    unpriced: int = 0
    """The number of images of unknown price, which are in no amount."""
    listed: dict[str, Decimal] = field(default_factory=dict)
    """What the service would have charged for the images of the sandbox, by ISO currency code."""

    def add(self, money: Money, count: int = 1) -> None:
        """Add images.

        Args:
            money: The cost of one image.
            count: The number of images.
        """
        self.count += count
        if money.amount is None:
            self.unpriced += count
        elif money.currency:
            self.amounts[money.currency] = self.amounts.get(money.currency, Decimal(0)) + count * money.amount
            if money.list_price is not None:
                self.listed[money.currency] = self.listed.get(money.currency, Decimal(0)) + count * money.list_price

    def in_text(self) -> dict[str, str]:
        """Return the amounts for JSON: decimal numbers as text, by ISO currency code."""
        return {currency: f"{amount:f}" for currency, amount in self.amounts.items()}

    def __str__(self) -> str:
        money = _sum_text(self.amounts)
        if self.listed:
            listed = f"sandbox; list price {_sum_text(self.listed) or NO_COST}"
            money = f"{money} ({listed})" if money else listed
        if self.unpriced:
            return " and ".join(part for part in (money, f"{self.unpriced} of unknown price") if part)
        return money or NO_COST


def _sum_text(amounts: Mapping[str, Decimal]) -> str:
    return " + ".join(money_text(amount, currency) for currency, amount in amounts.items() if amount)


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """What the images of one model cost in one currency."""

    count: int = 0
    """The number of images, including those that cost nothing."""
    amount: Decimal | None = Decimal(0)
    """The total cost; None if the price of an image is unknown."""


class ImageCosts:
    """What images cost, including those that were not received. Thread-safe.

    `collect_image_costs` and `CostCallbackHandler` fill it. Prices are list prices, unless `prices=` of the generator replaces
    them.

    Example:
        >>> with collect_image_costs() as costs:    # doctest: +SKIP
        ...     generator.batch(["a kitten", "a puppy", "a foal"])
        >>> print(costs)    # doctest: +SKIP
        Made 3 images for 0.18 CNY (list prices of 2026-10-01)
    """

    def __init__(self) -> None:
        self.cached = 0
        """The number of images from a cache, which cost nothing."""
        self.sandbox = 0
        """The number of placeholder images of the sandbox, which cost nothing."""
        self.blocked = 0
        """The number of images that the content filter blocked, which cost nothing."""
        self.failed = 0
        """The number of images that failed otherwise; `uncertain` has those that may have been charged."""
        self.cancelled = 0
        """The number of images whose caller left before they were received; `uncertain` has those that may have been charged."""
        self.prices_as_of: date = PRICES_AS_OF
        """The day of the list prices."""
        self._by_model: dict[tuple[str, str | None], Charges] = {}
        self._charges = Charges()
        self._under_way: dict[str, Money] = {}
        self._uncertain: dict[Hashable, Money] = {}
        self._lock = threading.RLock()

    @property
    def images(self) -> int:
        """The number of images received, including cached ones and sandbox placeholders."""
        return self._charges.count

    @property
    def unpriced(self) -> int:
        """The number of images of unknown price, which are in no amount."""
        return self._charges.unpriced

    @property
    def by_model(self) -> dict[tuple[str, str | None], ModelCosts]:
        """Number and cost of the images, by model and currency; the currency is None where the price is unknown."""
        with self._lock:
            return {
                row: ModelCosts(made.count, None if made.unpriced else sum(made.amounts.values(), Decimal(0)))
                for row, made in self._by_model.items()
            }

    @property
    def by_currency(self) -> dict[str, Decimal]:
        """The cost of the images of known price, by ISO currency code."""
        with self._lock:
            return dict(self._charges.amounts)

    def total(self, currency: str) -> Decimal:
        """The cost of the images of known price in one currency; `complete` says whether that covers all images.

        Args:
            currency: ISO code; case does not matter.

        Returns:
            The amount.
        """
        return self.by_currency.get(currency.upper(), Decimal(0))

    @property
    def complete(self) -> bool:
        """Whether the price of every image is known, so that the amounts cover all images."""
        return not self.unpriced

    @property
    def charges(self) -> Charges:
        """The cost of all images, in all currencies."""
        with self._lock:
            return replace(self._charges, amounts=dict(self._charges.amounts))

    @property
    def uncertain(self) -> Charges:
        """What may have been charged for images that were not received; it is in no other amount."""
        uncertain = Charges()
        with self._lock:
            for money in self._uncertain.values():
                uncertain.add(money)
        return uncertain

    @property
    def in_flight(self) -> int:
        """The number of images that were requested and have not ended."""
        return len(self._under_way)

    def on_event(self, name: str, event: Mapping[str, Any]) -> None:
        """Count an event of this package; other events are ignored.

        Args:
            name: Name of the event.
            event: Its payload.
        """
        with self._lock:
            if name == GENERATED_EVENT:
                self._made(event)
            elif name == PROGRESS_EVENT and event["stage"] in {"failed", "cancelled"}:
                self._lost(event)
            elif name == PROGRESS_EVENT:
                self._under_way.setdefault(event["request_id"], Money.of(event))
            elif name == RETRY_EVENT and event["outcome"] == Outcome.UNKNOWN:
                # The request is sent again anyway: what this attempt may have cost is added to the price of the image.
                attempt = (event["request_id"], event["attempt"])
                self._uncertain[attempt] = self._under_way.get(event["request_id"], Money())

    def _made(self, event: Mapping[str, Any]) -> None:
        price = Money.of(event)
        self._under_way.pop(event["request_id"], None)
        # The image of a task that had not ended in time was received after the task was resumed.
        for name in (event["request_id"], event.get("task_id")):
            self._uncertain.pop(name, None)
        self.cached += bool(event["cached"])
        self.sandbox += bool(event["sandbox"])
        row = event["model"], price.currency
        self._by_model.setdefault(row, Charges()).add(price)
        self._charges.add(price)

    def _lost(self, event: Mapping[str, Any]) -> None:
        self._under_way.pop(event["request_id"], None)
        if event["blocked"]:
            self.blocked += 1
        elif event["stage"] == "cancelled":
            self.cancelled += 1
        else:
            self.failed += 1
        if event["outcome"] == Outcome.UNKNOWN:
            # The event also covers the attempts before the last one; the last one itself may not have been sent.
            for attempt in [key for key in self._uncertain if isinstance(key, tuple) and key[0] == event["request_id"]]:
                del self._uncertain[attempt]
            name = event["task_id"] or event["request_id"]
            for number in range(max(1, event.get("uncertain") or 1)):
                self._uncertain[(event["request_id"], number) if number else name] = Money.of(event)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain JSON; amounts are decimal numbers as text."""
        with self._lock:
            uncertain = self.uncertain
            return {
                "images": self.images,
                "cached": self.cached,
                "sandbox": self.sandbox,
                "unpriced": self.unpriced,
                "blocked": self.blocked,
                "failed": self.failed,
                "cancelled": self.cancelled,
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
                    for (model, currency), costs in self.by_model.items()
                ],
                "uncertain": {"count": uncertain.count, "amounts": uncertain.in_text(), "unpriced": uncertain.unpriced},
                "prices_as_of": self.prices_as_of.isoformat(),
            }

    def __str__(self) -> str:
        with self._lock:
            charges, uncertain = self.charges, self.uncertain
            free = ((self.cached, "cached"), (self.sandbox, "of the sandbox"))
            possible = "" if str(uncertain) == NO_COST else " but possibly charged"
            others = _named(
                (self.blocked, "blocked"),
                (self.failed, "failed"),
                (self.cancelled, "cancelled"),
                (self.in_flight, "in flight"),
                (uncertain.count, f"not received{possible} ({uncertain})"),
            )
        text = f"Made {charges.count or 'no'} image{'s' if charges.count > 1 else ''}"
        # One kind of image that is all there is needs no second count.
        named = [name for count, name in free if 0 < count == charges.count] or _named(*free)
        text += f" ({', '.join(named)})" if named else ""
        amount = str(charges).removeprefix("sandbox; ")  # the sandbox is named before
        if any(charges.amounts.values()):
            text += f" for {amount} (list prices of {self.prices_as_of})"
        elif charges.count:
            text += " at no cost" if amount == NO_COST else f", {amount}"
        return "; ".join((text, *others))

    def __repr__(self) -> str:
        return f"<ImageCosts: {self}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: FBT001  IPython's protocol
        printer.text(str(self))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


def _named(*counts: tuple[int, str]) -> list[str]:
    return [f"{count} {name}" for count, name in counts if count]
