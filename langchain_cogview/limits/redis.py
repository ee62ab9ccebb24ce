"""A shared limit in Redis or Valkey, for all machines that reach it (extra `redis`).

One key for each account holds a hash: a field for the limit and one for each process. One script enters a report: it is
`allocation.allocate` in Lua, on the clock of the server. If the server is a node of a cluster and another one holds the key, the
client becomes one for clusters.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from langchain_cogview.errors import CogViewConfigurationError
from langchain_cogview.limits.allocation import LEASE_SECONDS, SETTLE_SECONDS, LimitShare, LimitUsage

if TYPE_CHECKING:
    from collections.abc import Callable

PREFIX: Final = "cogview:limit:"
TIMEOUT_SECONDS: Final = 1.0
KEEP_SECONDS: Final = 7 * 24 * 3600
"""How long an unused account is remembered."""
_REFUSALS: Final = ("NOAUTH", "NOPERM", "WRONGPASS", "unknown command", "SELECT", "Protocol error: unauthenticated")
"""How errors begin that waiting does not help."""

SCRIPT: Final = """
local key, me = KEYS[1], 'member:' .. ARGV[1]
local arguments = {}
for i = 2, #ARGV do arguments[i - 1] = tonumber(ARGV[i]) end
local in_flight, waiting, own_cap, served, epoch, successes, refusals, refused_epoch, lease, settle, keep = unpack(arguments)
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000

local function numbers(text)
  local row = {}
  for word in string.gmatch(text, '%S+') do row[#row + 1] = tonumber(word) end
  return row
end
local function text(row)
  local words = {}
  for i, each in ipairs(row) do words[i] = string.format('%.17g', each) end
  return table.concat(words, ' ')
end

-- Read the page. A row of a member: in_flight, demand, allowance, cap, seen, reported, served, successes, refusals.
local born, limit, members = now, {0, 0, 0, 0, 1}, {}
local fields = redis.call('HGETALL', key)
for i = 1, #fields, 2 do
  local row = numbers(fields[i + 1])
  if fields[i] == 'limit' then
    born = math.min(table.remove(row, 1), now)
    limit = row
  else
    if row[5] > now then -- the clock was set back
      row[5] = now
      redis.call('HSET', key, fields[i], text(row))
    end
    if now - row[5] > lease then redis.call('HDEL', key, fields[i]) else members[fields[i]] = row end
  end
end
local INFINITY = math.huge
local current, value, refused_at, counted, step = unpack(limit)
if value == 0 then value = INFINITY end
if refused_at == 0 then refused_at = INFINITY end

-- Enter the report.
local mine = members[me] or {0, 0, 0, own_cap, now, served, 0, 0, refusals}
local demand = math.min(in_flight + waiting, math.max(own_cap, in_flight))
if mine[2] == 0 and demand > 0 then
  local least = INFINITY
  for _, row in pairs(members) do if row[2] > 0 then least = math.min(least, row[7]) end end
  if least < INFINITY then mine[7] = math.max(mine[7], least) end
end
mine[7] = mine[7] + math.max(0, served - mine[6])
mine[1], mine[2], mine[4], mine[5], mine[6] = in_flight, demand, math.max(1, own_cap), now, served
members[me] = mine

local cap, all_in_flight, all_demand = INFINITY, 0, 0
for _, row in pairs(members) do
  if row[2] > 0 then cap = math.min(cap, row[4]) end
  all_in_flight = all_in_flight + row[1]
  all_demand = all_demand + row[2]
end

if cap == INFINITY then cap = mine[4] end

-- Learn from refusals and successes, as AdaptiveLimit does.
if refusals > mine[9] then
  if math.min(refused_epoch, current) == current then
    current = current + 1
    value = math.floor(math.min(value, cap) / 2)
    refused_at = INFINITY
    for name, row in pairs(members) do
      row[8] = 0
      if name ~= me then redis.call('HSET', key, name, text(row)) end
    end
  end
  value = math.max(1, math.min(value, all_in_flight))
  refused_at = math.min(refused_at, all_in_flight + 1)
  counted, step = 0, 1
end
mine[9] = refusals
if epoch == current then
  for _ = 1, math.min(successes - mine[8], 1000) do
    if all_demand >= value and value < cap then
      counted = counted + 1
      local probes = value + 1 == refused_at
      if counted >= (probes and math.max(10 * value, 30) or value) then
        counted = 0
        if probes then
          value, step = refused_at, 1
        else
          local below = value < refused_at and refused_at - 1 or INFINITY
          value = math.min(value + step, below, cap)
          step = step * 2
        end
      end
    end
  end
  mine[8] = math.max(mine[8], successes)
end
step = math.min(step, 1048576)

-- Divide the limit.
local total = math.min(value, cap)
local level, above = 0, total + 1
while above - level > 1 do
  local middle, sum = math.floor((level + above) / 2), 0
  for _, row in pairs(members) do sum = sum + math.min(row[2], middle) end
  if sum <= total then level = middle else above = middle end
end
local fair = demand
if demand > level then
  local left, ahead = total, 0
  for name, row in pairs(members) do
    left = left - math.min(row[2], level)
    if row[2] > level and (row[7] < mine[7] or (row[7] == mine[7] and name < me)) then ahead = ahead + 1 end
  end
  fair = level + (ahead < left and 1 or 0)
end
local free = total
for name, row in pairs(members) do if name ~= me then free = free - math.max(row[1], row[3]) end end
local target = math.max(0, math.min(fair, free))
local most = now - born < settle and in_flight or 2 * math.max(in_flight, mine[3])
local allowance = math.min(target, math.max(1, most))
mine[3] = allowance
local wanting = 0
for _, row in pairs(members) do if row[2] > row[3] then wanting = wanting + 1 end end
local seconds
if target < fair then
  seconds = math.min(math.max(0.002 * wanting, 0.01), 0.5)
else
  seconds = math.min(math.max(0.0125 * wanting, 0.05), 2)
end

redis.call('HSET', key, me, text(mine), 'limit',
  text({born, current, value == INFINITY and 0 or value, refused_at == INFINITY and 0 or refused_at, counted, step}))
redis.call('EXPIRE', key, keep)
return {allowance, total, cap, current, tostring(seconds)}
"""


class RedisLimit:
    """A shared limit in Redis or Valkey.

    Args:
        url: `redis://`, `rediss://`, `valkey://`, `valkeys://` or `unix://`, as redis-py takes it. A password in it is shown
            nowhere.

    Raises:
        CogViewConfigurationError: redis-py is not installed, or the URL is malformed.
    """

    def __init__(self, url: str) -> None:
        try:
            import redis  # noqa: PLC0415
            from redis.backoff import NoBackoff  # noqa: PLC0415
            from redis.retry import Retry  # noqa: PLC0415
        except ImportError:
            raise CogViewConfigurationError(
                "shared_limit with a Redis URL needs the package redis.",
                hint="pip install 'langchain-cogview[redis]'",
            ) from None
        self._name = _without_secrets(url)
        scheme, _, rest = url.partition("://")
        scheme = scheme.lower().replace("valkey", "redis")
        options: dict[str, Any] = {
            "socket_timeout": TIMEOUT_SECONDS,
            "socket_connect_timeout": TIMEOUT_SECONDS,
            "decode_responses": True,
        }
        once = Retry(NoBackoff(), 0)  # the reporter repeats
        try:
            self._client: Any = redis.Redis.from_url(f"{scheme}://{rest}", retry=once, **options)
        except (ValueError, TypeError):
            raise CogViewConfigurationError(
                f"shared_limit is not a usable URL: {self._name}.", hint="It is like redis://:password@host:6379/0."
            ) from None
        self._script: Callable[..., Any] = self._client.register_script(SCRIPT)
        self._cluster = partial(redis.RedisCluster.from_url, f"{scheme}://{rest}", **options)
        self._elsewhere = redis.exceptions.AskError
        self._refused = redis.exceptions.AuthenticationError, redis.exceptions.AuthorizationError
        self._answered = redis.exceptions.ResponseError

    def __repr__(self) -> str:
        return f"The shared limit at {self._name}"

    def exchange(self, account: str, usage: LimitUsage) -> LimitShare:
        """Enter one report; see `SharedLimit.exchange`.

        Returns:
            The share of the process.

        Raises:
            CogViewConfigurationError: The server refuses the password, the user or the script.
            redis.RedisError: The server cannot be reached, does not answer within a second, or is full.
        """
        numbers = (
            usage.in_flight,
            usage.waiting,
            usage.cap,
            usage.served,
            usage.epoch,
            usage.successes,
            usage.refusals,
            usage.refused_epoch,
            LEASE_SECONDS,
            SETTLE_SECONDS,
            KEEP_SECONDS,
        )
        keys = [PREFIX + account]
        arguments: list[str | float] = [usage.member, *numbers]
        try:
            try:
                answer = self._script(keys=keys, args=arguments)
            except self._answered as error:
                # AskError, of which MovedError is one; redis-py 5 has only the text.
                if not isinstance(error, self._elsewhere) and not str(error).startswith(("MOVED ", "ASK ")):
                    raise
                self._script = self._cluster().register_script(SCRIPT)  # another node of a cluster has the key
                answer = self._script(keys=keys, args=arguments)
        except self._refused as error:
            raise self._unusable(error) from None
        except self._answered as error:
            if str(error).removeprefix("ERR ").startswith(_REFUSALS):
                raise self._unusable(error) from None
            raise
        allowance, limit, cap, epoch, seconds = (float(item) for item in answer)
        return LimitShare(int(allowance), int(limit), int(cap), int(epoch), seconds)

    def _unusable(self, error: Exception) -> CogViewConfigurationError:
        return CogViewConfigurationError(
            f"{self!r} refuses to be used: {error}",
            hint="Check user and password in the URL, and that EVALSHA and SCRIPT LOAD are allowed. A cluster has "
            "the database 0 only.",
        )


def _without_secrets(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return f"{url.partition('://')[0]}://…"
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"
