"""What pictures cost: a tally over the events, in decimal numbers, where unknown is not zero."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from langchain_cogview.catalog import PRICES_AS_OF
from langchain_cogview.errors import Outcome
from langchain_cogview.events import GENERATED_EVENT, PROGRESS_EVENT, RETRY_EVENT

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping
    from datetime import date


@dataclass(frozen=True, slots=True)
class Price:
    """What one picture costs.

    Attributes:
        amount: None where the price is unknown.
        currency: ISO code; None where the price is unknown.
    """

    amount: Decimal | None = None
    currency: str | None = None

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Price:
        """Read the price of an event; a cached or sandbox picture costs nothing."""
        currency = event.get("currency")
        if event.get("sandbox") or event.get("cached"):
            return cls(Decimal(0), currency)
        try:
            amount = Decimal(str(event.get("cost")))
        except InvalidOperation:
            return cls()
        # An amount of no currency can be added to nothing, unless it is nothing itself.
        return cls(amount, currency) if amount.is_finite() and (currency or not amount) else cls()


@dataclass(frozen=True, slots=True)
class Charges:
    """What a number of pictures costs.

    Attributes:
        count: How many pictures.
        amounts: What those of known price cost, by currency (ISO code).
        unpriced: How many of them are of unknown price, and in no amount.
    """

    count: int
    amounts: dict[str, Decimal]
    unpriced: int

    def __str__(self) -> str:
        money = " + ".join(f"{amount:f} {currency}" for currency, amount in self.amounts.items() if amount)
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

    def plus(self, price: Price) -> ModelCosts:
        """With one more picture."""
        known = self.amount is not None and price.amount is not None
        return ModelCosts(self.count + 1, self.amount + price.amount if known else None)  # type: ignore[operator]


class ImageCosts:
    """What pictures cost, and what became of those that did not come. Thread-safe.

    It is filled by `collect_image_costs` or `CostCallbackHandler`. Prices are list prices, or those that `prices=` on the
    generator gives in their place.

    Attributes:
        images: Pictures made, the cached and the placeholders included.
        cached: Of them, those that came from the cache: no cost.
        sandbox: Of them, placeholders of the offline service: no cost.
        unpriced: Of them, those of unknown price: they are in no amount.
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
        self.images = 0
        self.cached = 0
        self.sandbox = 0
        self.unpriced = 0
        self.blocked = 0
        self.failed = 0
        self.prices_as_of: date = PRICES_AS_OF
        self._by_model: dict[tuple[str, str | None], ModelCosts] = {}
        self._amounts: dict[str, Decimal] = {}
        self._under_way: dict[str, Price] = {}
        self._uncertain: dict[Hashable, Price] = {}
        self._lock = threading.RLock()

    @property
    def by_model(self) -> dict[tuple[str, str | None], ModelCosts]:
        """Count and amount of the pictures, by model and currency; the currency is None where the price is unknown."""
        with self._lock:
            return dict(self._by_model)

    @property
    def by_currency(self) -> dict[str, Decimal]:
        """What the pictures of known price cost, by currency."""
        with self._lock:
            return dict(self._amounts)

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
            return Charges(self.images, dict(self._amounts), self.unpriced)

    @property
    def uncertain(self) -> Charges:
        """What may have been charged though no picture came; in no other amount."""
        with self._lock:
            return _charges(self._uncertain.values())

    @property
    def in_flight(self) -> int:
        """Pictures that were sent and have not ended; after the work, those whose caller left before the end."""
        return len(self._under_way)

    def hear(self, name: str, event: Mapping[str, Any]) -> None:
        """Count an event of this package; others are passed over."""
        with self._lock:
            if name == GENERATED_EVENT:
                self._made(event)
            elif name == PROGRESS_EVENT and event["stage"] == "failed":
                self._lost(event)
            elif name == PROGRESS_EVENT:
                self._under_way.setdefault(event["request_id"], Price.of(event))
            elif name == RETRY_EVENT and event["outcome"] == Outcome.UNKNOWN:
                # It is sent again all the same: what it may have cost comes besides the picture's price.
                attempt = (event["request_id"], event["attempt"])
                self._uncertain[attempt] = self._under_way.get(event["request_id"], Price())

    def _made(self, event: Mapping[str, Any]) -> None:
        price = Price.of(event)
        self._under_way.pop(event["request_id"], None)
        # A task whose end was not seen, and which was resumed: it came after all.
        for name in (event["request_id"], event.get("task_id")):
            self._uncertain.pop(name, None)
        self.images += 1
        self.cached += bool(event["cached"])
        self.sandbox += bool(event["sandbox"])
        self.unpriced += price.amount is None
        row = event["model"], price.currency
        self._by_model[row] = self._by_model.get(row, ModelCosts()).plus(price)
        _add(self._amounts, price)

    def _lost(self, event: Mapping[str, Any]) -> None:
        self._under_way.pop(event["request_id"], None)
        if event["blocked"]:
            self.blocked += 1
            return
        self.failed += 1
        if event["outcome"] == Outcome.UNKNOWN:
            self._uncertain[event["task_id"] or event["request_id"]] = Price.of(event)

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
                "amounts": _in_text(self._amounts),
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
                    "amounts": _in_text(uncertain.amounts),
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


def _charges(prices: Any) -> Charges:
    amounts: dict[str, Decimal] = {}
    count = unpriced = 0
    for price in prices:
        count += 1
        unpriced += price.amount is None
        _add(amounts, price)
    return Charges(count, amounts, unpriced)


def _add(amounts: dict[str, Decimal], price: Price) -> None:
    if price.amount is not None and price.currency:
        amounts[price.currency] = amounts.get(price.currency, Decimal(0)) + price.amount


def _in_text(amounts: dict[str, Decimal]) -> dict[str, str]:
    return {currency: f"{amount:f}" for currency, amount in amounts.items()}
