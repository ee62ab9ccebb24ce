"""How many pictures an account may have under way at once. An account is a key, and each model counts by itself."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from langchain_cogview.catalog import find_model

Limit = int | MappingProxyType[str, int] | None


class Account(NamedTuple):
    """What is counted by itself: one model under one key, of which only a hash is kept."""

    key: bytes
    model: str


def account_of(key: str, model: str) -> Account:
    """The account of a key, for a model as the catalog writes it."""
    return Account(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest(), model)


def read_limit(given: int | Mapping[str, int] | None) -> Limit:
    """A limit that holds for each model, or one for each model named, by the catalog's names.

    Raises:
        ValueError: It is less than 1, no whole number, or names a model that the sandbox does not know.
    """
    if not isinstance(given, Mapping):
        return None if given is None else _at_least_one(given)
    limits = {}
    for name, number in given.items():
        model = find_model(str(name))
        if model is None:
            raise ValueError(f"in_flight_limit names a model that the sandbox does not know: {name!r:.60}.")
        limits[model.name] = _at_least_one(number)
    return MappingProxyType(limits)


def _at_least_one(number: int) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"in_flight_limit is a whole number, 1 or more, or None for no limit, not {number!r:.60}.")
    return number


class Places:
    """The places taken, by account. Not locked: its owner is."""

    def __init__(self) -> None:
        self._taken: Counter[Account] = Counter()

    def __getitem__(self, account: Account) -> int:
        """The places that an account has taken."""
        return self._taken[account]

    def take(self, account: Account) -> None:
        """One more; whether it is allowed has been asked before."""
        self._taken[account] += 1

    def give_back(self, account: Account) -> None:
        """One less. An account without any is forgotten."""
        self._taken[account] -= 1
        if not self._taken[account]:
            del self._taken[account]

    def total(self) -> int:
        """Over all accounts."""
        return self._taken.total()


def allowed(limit: Limit, model: str) -> float:
    """How many places an account has for a model; infinity for no limit."""
    number = limit.get(model) if isinstance(limit, MappingProxyType) else limit
    return float("inf") if number is None else number
