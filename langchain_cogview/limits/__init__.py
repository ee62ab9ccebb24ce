"""One limit of requests in flight for many processes and machines (`shared_limit=`).

`"machine"` serves all processes of this user on this machine, and `"redis://host:6379/0"` all machines. Any object with the
methods of `SharedLimit` serves as well. For a store of your own, keep one JSON value for each account and let `allocate` make the
next one from it and a report, under a lock or in a transaction; the page "Several processes" of the documentation has
an example, and `langchain_cogview.ray` is one for a Ray cluster.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, Protocol, runtime_checkable

from langchain_cogview.errors import CogViewConfigurationError
from langchain_cogview.limits.allocation import LimitShare, LimitUsage, allocate

__all__ = ["LimitShare", "LimitUsage", "SharedLimit", "allocate", "shared_limit"]

MACHINE: Final = "machine"
_SERVERS: Final = ("redis", "rediss", "valkey", "valkeys", "unix")


@runtime_checkable
class SharedLimit(Protocol):
    """A store that divides the limit of an account among the processes that report their use of it."""

    def exchange(self, account: str, usage: LimitUsage) -> LimitShare:
        """Enter one report, and return the share of the process. It is called from one thread of each process.

        Args:
            account: The account and model, as a hash.
            usage: The report.

        Returns:
            The share, as `allocate` makes it.

        Raises:
            CogViewConfigurationError: Waiting does not help, such as a wrong password. If it is the first report, calls end with
                this error and nothing is sent.
            Exception: The store cannot be reached now. Calls go on with the requests in flight that the process has.
        """
        ...


def shared_limit(value: SharedLimit | str | None) -> SharedLimit | None:
    """Find the store that a setting names.

    Args:
        value: `"machine"`, a URL of Redis or Valkey, an object with the method of `SharedLimit`, or None.

    Returns:
        The store, the same for the same text; None for None.

    Raises:
        CogViewConfigurationError: It is none of these, or its package is not installed.
    """
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        if isinstance(value, SharedLimit):
            return value
        raise CogViewConfigurationError("shared_limit is not usable: the object has no method `exchange`.", hint=_HINT)
    store: SharedLimit = _named(value.strip())
    return store


_HINT: Final = "Use 'machine', 'redis://host:6379/0', or an object with the method of SharedLimit."


@lru_cache(maxsize=64)
def _named(value: str) -> Any:
    if value == MACHINE:
        from langchain_cogview.limits.machine import MachineLimit  # noqa: PLC0415  on use

        return MachineLimit()
    scheme, separator, rest = value.partition("://")
    if scheme.lower() in _SERVERS and separator and rest:
        from langchain_cogview.limits.redis import RedisLimit  # noqa: PLC0415  an extra

        return RedisLimit(value)
    raise CogViewConfigurationError("shared_limit is not usable: it names no store.", hint=_HINT)
