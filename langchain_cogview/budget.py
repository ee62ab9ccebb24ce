"""How much a tool may spend: asked before a request, across threads and tasks."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Final, NamedTuple

from langchain_cogview.errors import CogViewBudgetError, CogViewError, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator


class Limits(NamedTuple):
    """What may be spent.

    Attributes:
        max_images: Pictures in all; None: no limit.
        budget: Money in all, in the currency of `price`; None: no limit.
        price: Of one picture.
        currency: Its ISO code.
    """

    max_images: int | None
    budget: Decimal | None
    price: Decimal
    currency: str

    def refuse_over(self, wanted: int) -> None:
        """Refuse a number of pictures in all that is over a limit.

        Raises:
            CogViewBudgetError: With the limit; nothing has been sent.
        """
        if self.max_images is not None and wanted > self.max_images:
            images = "1 image" if self.max_images == 1 else f"{self.max_images} images"
            raise CogViewBudgetError(f"The limit of {images} for this tool is reached; nothing was sent.")
        if self.budget is not None and wanted * self.price > self.budget:
            raise CogViewBudgetError(
                f"The budget of {self.budget} {self.currency} for this tool does not cover another image "
                f"({self.price} {self.currency} each); nothing was sent."
            )


NO_LIMITS: Final = Limits(None, None, Decimal(0), "")


class Allowance:
    """How many pictures count as spent.

    A place is taken before a request and given back when the request provably made no picture. One whose outcome is
    unknown, or that was cancelled under way, counts as spent.
    """

    def __init__(self) -> None:
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def images(self) -> int:
        """Pictures that count as spent, those under way included."""
        return self._taken

    @contextmanager
    def taken(self, count: int, limits: Limits) -> Iterator[Spending]:
        """Take places for the pictures of one request; inside, say how many of them were spent.

        Raises:
            CogViewBudgetError: When they do not fit; nothing has been sent.
        """
        with self._lock:
            limits.refuse_over(self._taken + count)
            self._taken += count
        spending = Spending(count)
        try:
            yield spending
        except CogViewError as error:
            if error.outcome is not Outcome.UNKNOWN:
                spending.spent = 0
            raise
        finally:
            with self._lock:
                self._taken -= count - spending.spent

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


class Spending:
    """Of one request.

    Attributes:
        spent: How many pictures count as paid; all, until the caller knows better.
    """

    def __init__(self, count: int) -> None:
        self.spent = count
