"""Many images on a Ray cluster (extra `ray`): a job of many prompts, or the rows of a dataset of Ray Data.

Ray repeats tasks by design, when a worker or a node is lost, or when somebody looks at a dataset again. The folder remembers what
was paid for: a repeated task continues where the lost one ended, and pays for nothing twice.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final

from langchain_cogview.api.settings import BASE_URL_VARIABLE, KEY_VARIABLES, SHARED_LIMIT_VARIABLE
from langchain_cogview.errors import CogViewConfigurationError, printable
from langchain_cogview.jobs import FolderInUseError, MergedJob, merge_shards, run_job
from langchain_cogview.jobs.prompts import read_prompts
from langchain_cogview.jobs.rows import MAX_ERROR, SHARDS, RowResult, generate_rows
from langchain_cogview.jobs.shards import begun_count, local_folder
from langchain_cogview.limits import LimitShare, LimitUsage, allocate

try:
    import ray
except ImportError:
    raise CogViewConfigurationError(
        "langchain_cogview.ray needs the package ray.", hint="pip install 'langchain-cogview[ray]'"
    ) from None

if TYPE_CHECKING:
    from collections.abc import Mapping
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
            `budget` holds for all shards together, and a `limit` for each.

    Returns:
        What the shards have made together.

    Raises:
        CogViewConfigurationError: A setting is wrong, or cannot leave this process. Nothing was sent.
        CogViewError: As for `run_job`, from the first shard that raised.
    """
    arguments = _sendable(arguments)
    folder = local_folder(output_dir)
    count = begun_count(folder) or max(1, -(-sum(1 for _ in _read(prompts, arguments)) // max(1, shard_size)))
    options = {
        "num_cpus": CPUS,
        "max_retries": max_retries,
        "retry_exceptions": [FolderInUseError],  # the lost worker has not let go yet
        "runtime_env": _Environment(env_vars or {}),
    }
    task = ray.remote(_make_shard).options(**options)
    shards = [task.remote(prompts, str(folder), f"{number}/{count}", arguments) for number in range(1, count + 1)]
    ray.get(shards)
    return merge_shards(folder)


def _read(prompts: PromptSource, arguments: dict[str, Any]) -> Any:
    return read_prompts(prompts, format=arguments.get("format"))


def _make_shard(prompts: PromptSource, folder: str, shard: str, arguments: dict[str, Any]) -> None:
    run_job(prompts, folder, shard=shard, progress=False, **_with_limit(arguments))


def _with_limit(arguments: dict[str, Any]) -> dict[str, Any]:
    if arguments.get("shared_limit") or os.environ.get(SHARED_LIMIT_VARIABLE):
        return arguments
    return {**arguments, "shared_limit": RayLimit()}


def _sendable(arguments: dict[str, Any]) -> dict[str, Any]:
    refused = [name for name in _HELD if arguments.get(name) is not None]
    arguments = {name: value for name, value in arguments.items() if name not in refused}
    if refused:
        raise CogViewConfigurationError(
            f"{refused[0]} cannot be sent to the tasks of a Ray cluster; nothing was sent.",
            hint="Set the key by its environment variable; all other settings are arguments.",
        )
    return arguments


class _Environment(dict[str, Any]):
    """Ray's runtime environment with the key. A pickle of it has no key: where it is loaded, it has the key of that process."""

    def __init__(self, env_vars: dict[str, str]) -> None:
        self._env_vars = env_vars
        passed = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
        super().__init__(env_vars={**passed, **env_vars})

    def __reduce__(self) -> tuple[Any, ...]:
        return _Environment, ({name: value for name, value in self._env_vars.items() if name not in _VARIABLES},)


# --- Ray Data

RESULT_COLUMNS: Final = (
    "image_status",
    "image_error",
    "image_paths",
    "image_request_ids",
    "image_cost",
    "image_currency",
)
"""The columns that `generate_images` adds; `langchain_cogview.jobs.rows.RowResult` describes them."""


def generate_images(
    dataset: Any,
    output_dir: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 64,
    actors: int = 2,
    shards: int = SHARDS,
    retry_failed: bool = False,
    retry_unknown: bool = False,
    env_vars: dict[str, str] | None = None,
    **settings: Any,
) -> Any:
    """Generate an image for each row of a dataset of Ray Data. However often the dataset is looked at, a row is paid for once.

    Nothing is sent before the dataset is looked at, as with all of Ray Data. Then the folder says of each row what it has cost
    already. What Ray repeats, because a worker was lost or because somebody looks again, is found there; a request that was
    in flight in a lost worker may have been charged: its row has the status `unknown`, and is not sent again. Rows with equal
    arguments share an image. `merge_shards` makes a contact sheet of the folder.

    The key is not in the dataset: the workers find it in Ray's runtime environment, as it is in the environment of the process
    that looks at the dataset. For Ray Train, whose own actor does so, set it by `ray.init(runtime_env={"env_vars": ...})`.

    The limit of requests in flight is shared by all workers through an actor, unless `shared_limit` or `COGVIEW_SHARED_LIMIT`
    names another store.

    Args:
        dataset: A `ray.data.Dataset`.
        output_dir: A folder that all nodes share.
        columns: The column of each argument, such as `{"prompt": "caption", "size": "format"}`. None: the prompt is in the column
            `prompt`. An empty cell leaves its argument out.
        batch_size: How many rows a worker takes at a time; more than the account's limit of requests in flight. Who takes three
            rows of the result pays for the batches that were begun, and finds them later; `dataset.limit(3)` costs three.
        actors: Number of workers. One or two fill any account.
        shards: As for `generate_rows`.
        retry_failed: Generate again what failed or was blocked, at each look.
        retry_unknown: Generate again what may have been charged. This can pay twice.
        env_vars: As for `run_job_on_ray`.
        **settings: Settings of the generator, but for those that cannot leave this process.

    Returns:
        The dataset with the columns of `RESULT_COLUMNS`. Errors are in `image_status` and `image_error`; none ends the dataset.

    Raises:
        CogViewConfigurationError: A setting is wrong or cannot leave this process, or Ray Data is not installed. Nothing was
            sent.
    """
    from langchain_cogview.generator import CogViewImageGenerator  # noqa: PLC0415

    settings = _sendable(settings)
    try:
        import pyarrow  # noqa: F401, ICN001, PLC0415
        from ray.data import ActorPoolStrategy  # noqa: PLC0415
    except ImportError:
        raise CogViewConfigurationError(
            "generate_images needs Ray Data.", hint="pip install 'langchain-cogview[ray]'"
        ) from None
    environment = _Environment(env_vars or {})
    if not env_vars:
        CogViewImageGenerator(**settings)  # raises here, and not in each row
    arguments = {"shards": shards, "retry_failed": retry_failed, "retry_unknown": retry_unknown, **settings}
    return dataset.map_batches(
        _Worker,
        fn_constructor_args=(str(local_folder(output_dir)), dict(columns or {"prompt": "prompt"}), arguments),
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=actors),
        num_cpus=CPUS,
        runtime_env=environment,
    )


class _Worker:
    """A worker of `generate_images`."""

    def __init__(self, folder: str, columns: dict[str, str], arguments: dict[str, Any]) -> None:
        self._folder = folder
        self._columns = columns
        self._arguments = arguments
        self._options: dict[str, Any] | None = None

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa  # noqa: PLC0415

        rows = self._rows(batch)
        try:
            results = generate_rows(rows, self._folder, **self._with_generator())
        except Exception as error:  # noqa: BLE001  no error ends the dataset
            text = printable(str(error), MAX_ERROR)
            results = [RowResult("not_run", text) for _ in rows]
        strings = pa.string()
        types = (strings, strings, pa.list_(strings), pa.list_(strings), pa.float64(), strings)
        for name, kind in zip(RESULT_COLUMNS, types, strict=True):
            values = [getattr(result, name.removeprefix("image_")) for result in results]
            if kind == pa.float64():
                values = [None if value is None else float(value) for value in values]
            column = pa.array(values, kind)
            index = batch.schema.get_field_index(name)
            batch = batch.append_column(name, column) if index < 0 else batch.set_column(index, name, column)
        return batch

    def _rows(self, batch: Any) -> list[dict[str, Any]]:
        known = {
            name: batch[column].to_pylist() for name, column in self._columns.items() if column in batch.schema.names
        }
        return (
            [
                {name: value for name, value in zip(known, values, strict=True) if not _is_empty(value)}
                for values in zip(*known.values(), strict=True)
            ]
            if known
            else [{} for _ in range(batch.num_rows)]
        )

    def _with_generator(self) -> dict[str, Any]:
        # One generator for all batches keeps its connections.
        if self._options is None:
            from langchain_cogview.generator import CogViewImageGenerator  # noqa: PLC0415

            options = {name: self._arguments[name] for name in ("shards", "retry_failed", "retry_unknown")}
            settings = {name: value for name, value in self._arguments.items() if name not in options}
            self._options = {**options, "generator": CogViewImageGenerator(**_with_limit(settings))}
        return self._options


def _is_empty(value: Any) -> bool:
    return value is None or value != value  # noqa: PLR0124  NaN, as pandas writes an empty cell
