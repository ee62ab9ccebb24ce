"""A job of many prompts on a Ray cluster (extra `ray`).

Ray repeats tasks by design, when a worker or a node is lost. Each task here is one shard of a job, which remembers what it paid
for: a repeated task continues where the lost one ended, and pays for nothing twice.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.api.settings import BASE_URL_VARIABLE, KEY_VARIABLES, SHARED_LIMIT_VARIABLE
from langchain_cogview.errors import CogViewConfigurationError
from langchain_cogview.jobs import FolderInUseError, MergedJob, merge_shards, run_job
from langchain_cogview.jobs.prompts import read_prompts
from langchain_cogview.jobs.shards import begun_count, local_folder
from langchain_cogview.limits import LimitShare, LimitUsage, allocate

try:
    import ray
except ImportError:
    raise CogViewConfigurationError(
        "langchain_cogview.ray needs the package ray.", hint="pip install 'langchain-cogview[ray]'"
    ) from None

if TYPE_CHECKING:
    from pathlib import Path

    from langchain_cogview.jobs.prompts import PromptSource

NAMESPACE: Final = "langchain_cogview"
ACTOR: Final = "cogview-limit"
CPUS: Final = 0.1
"""How much of a CPU a shard uses: it waits for the service most of the time."""
_TIMEOUT_SECONDS: Final = 2.0
_HELD: Final = (
    "api_key",
    "http_client",
    "http_async_client",
    "generator",
    "rate_limiter",
    "stop",
    "on_plan",
    "cache",
    "enhance",
)
_VARIABLES: Final = (*KEY_VARIABLES.values(), BASE_URL_VARIABLE, SHARED_LIMIT_VARIABLE)


class _Pages:
    """The pages of a shared limit, in an actor, on the clock of its node."""

    def __init__(self) -> None:
        self._pages: dict[str, Any] = {}

    def exchange(self, account: str, usage: LimitUsage) -> LimitShare:
        self._pages[account], share = allocate(self._pages.get(account), usage, time.monotonic())
        return share


class RayLimit:
    """A shared limit in a named actor, for all tasks and actors of a Ray cluster: `shared_limit=RayLimit()`.

    The actor is created by the first process that asks for it, and lives as long as the cluster.
    """

    def __init__(self) -> None:
        self._actor: Any = None

    def __repr__(self) -> str:
        return "The shared limit of this Ray cluster"

    def exchange(self, account: str, usage: LimitUsage) -> LimitShare:
        """Enter one report; see `SharedLimit.exchange`.

        Returns:
            The share of the process.

        Raises:
            Exception: Ray's error, when the actor does not answer within two seconds.
        """
        try:
            if self._actor is None:
                options = {"name": ACTOR, "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached"}
                self._actor = ray.remote(_Pages).options(num_cpus=0, max_restarts=-1, **options).remote()
            share: LimitShare = ray.get(self._actor.exchange.remote(account, usage), timeout=_TIMEOUT_SECONDS)
        except Exception:
            self._actor = None  # it may have been killed; the next report finds or makes it
            raise
        return share


def run_job_on_ray(
    prompts: PromptSource,
    output_dir: str | Path,
    *,
    shard_size: int = 1000,
    max_retries: int = 3,
    env_vars: dict[str, str] | None = None,
    **arguments: Any,
) -> MergedJob:
    """Run a job on a Ray cluster, one task for each shard. Run again, it continues and pays for nothing twice.

    Ray repeats a task whose worker was lost. A request that was in flight then may have been charged: it is listed as unknown,
    and not sent again. The limit of requests in flight is shared by all tasks through an actor, unless `shared_limit` or
    `COGVIEW_SHARED_LIMIT` names another store. `ray.init` decides about the cluster; without it a local one is started.

    Args:
        prompts: As for `run_job`. A file must have the same path on all nodes.
        output_dir: As for `run_job`: a folder that all nodes share.
        shard_size: About how many prompts each task gets. A job that has begun keeps its division.
        max_retries: How often Ray repeats a task whose worker was lost.
        env_vars: Environment variables of the tasks. The API key, `COGVIEW_BASE_URL` and `COGVIEW_SHARED_LIMIT` of this process
            are passed on in any case, by Ray's runtime environment.
        **arguments: Other arguments of `run_job`, and settings of the generator, but for those that cannot leave this process. A
            `budget` and a `limit` hold for each shard.

    Returns:
        What the shards have made together.

    Raises:
        CogViewConfigurationError: A setting is wrong, or cannot leave this process. Nothing was sent.
        CogViewError: As for `run_job`, from the first shard that raised.
    """
    refused = [name for name in _HELD if arguments.get(name) is not None]
    arguments = {name: value for name, value in arguments.items() if name not in refused}
    if refused:
        raise CogViewConfigurationError(
            f"{refused[0]} cannot be sent to the tasks of a Ray cluster; nothing was sent.",
            hint="Set the key by its environment variable; all other settings are arguments.",
        )
    folder = local_folder(output_dir)
    count = begun_count(folder) or max(1, -(-sum(1 for _ in _read(prompts, arguments)) // max(1, shard_size)))
    passed = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    options = {
        "num_cpus": CPUS,
        "max_retries": max_retries,
        "retry_exceptions": [FolderInUseError],  # the lost worker has not let go yet
        "runtime_env": {"env_vars": {**passed, **(env_vars or {})}},
    }
    task = ray.remote(_make_shard).options(**options)
    shards = [task.remote(prompts, str(folder), f"{number}/{count}", arguments) for number in range(1, count + 1)]
    ray.get(shards)
    return merge_shards(folder)


def _read(prompts: PromptSource, arguments: dict[str, Any]) -> Any:
    return read_prompts(prompts, format=arguments.get("format"))


def _make_shard(prompts: PromptSource, folder: str, shard: str, arguments: dict[str, Any]) -> None:
    if not (arguments.get("shared_limit") or os.environ.get(SHARED_LIMIT_VARIABLE)):
        arguments = {**arguments, "shared_limit": RayLimit()}
    run_job(prompts, folder, shard=shard, progress=False, **arguments)
