"""`cogview batch`: a file of prompts into a folder of images."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from enum import StrEnum
from heapq import nsmallest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from langchain_cogview.catalog import DEFAULT_MODEL
from langchain_cogview.cli.completion import complete_model, complete_quality, complete_region, complete_size
from langchain_cogview.cli.output import exit_code, json_text, print_stderr, print_stdout, run_command, with_cli_options
from langchain_cogview.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langchain_cogview.jobs import JobReport

_ReportT = TypeVar("_ReportT")
_SHOWN: Final = 20
_PROMPT_CHARACTERS: Final = 60


class Format(StrEnum):
    """Format of a file of prompts."""

    TXT = "txt"
    CSV = "csv"
    TSV = "tsv"
    JSONL = "jsonl"


def batch(
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Prompts: .txt (one per line, # for a comment), .csv, .tsv, .jsonl; - reads the standard input.",
        ),
    ],
    *,
    output: Annotated[
        str, typer.Option("-o", "--output", help="Folder for images, manifest and contact sheet; or s3://bucket/job.")
    ],
    form: Annotated[Format | None, typer.Option("--format", help="Default: taken from the file's extension.")] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="For lines without a size: for example 1024x1024, 16:9 or square.", autocompletion=complete_size
        ),
    ] = None,
    quality: Annotated[
        str | None, typer.Option(help="For lines without a quality: standard or hd.", autocompletion=complete_quality)
    ] = None,
    model: Annotated[
        str, typer.Option(help="For lines without a model.", autocompletion=complete_model)
    ] = DEFAULT_MODEL,
    n: Annotated[int, typer.Option("--n", help="Images per prompt, for lines without a number.")] = 1,
    user_id: Annotated[str | None, typer.Option(help="The end user, for abuse reports; 6 to 128 characters.")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Maximum number of remaining prompts to generate.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Stop before list prices exceed this; all runs in the folder count, in the key's currency."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Generate again what failed or was blocked.")
    ] = False,
    retry_unknown: Annotated[
        bool, typer.Option("--retry-unknown", help="Generate again what may have been charged: can pay twice.")
    ] = False,
    unique: Annotated[bool, typer.Option("--unique", help="Generate equal lines only once.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip lines that are not valid.")] = False,
    into_existing: Annotated[
        bool, typer.Option("--into-existing", help="Begin the job in a folder with other files; none is overwritten.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(help="Only the prompts of one shard, such as 3/20, in a sub-folder of its own.")
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Divide the job, and work on the shards that no other process holds."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, count and price; send and write nothing. Needs no key.")
    ] = False,
    region: Annotated[
        str | None,
        typer.Option(
            help="china or international. Default: the region of the key that is set.", autocompletion=complete_region
        ),
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="Default: COGVIEW_BASE_URL, else the region's URL.")] = None,
    timeout: Annotated[float, typer.Option(help="Total time limit for one image, in seconds.")] = 120.0,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Requests in flight at once. Default: the model's usual limit.")
    ] = None,
    shared_limit: Annotated[
        str | None,
        typer.Option(
            help="Share that limit with other processes: machine, or redis://host. Default: COGVIEW_SHARED_LIMIT."
        ),
    ] = None,
    sandbox: Annotated[bool, typer.Option("--sandbox", help="Generate placeholders offline: no key, no cost.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Show no progress bar.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the summary, or the plan, as JSON.")] = False,
) -> None:
    """Generate the images of each prompt in a file. After an interruption, the same command continues and pays for nothing twice.

    The folder gets a manifest (JSON lines) and a contact sheet (index.html), whose path is written to the standard output.
    """  # noqa: DOC501  the help shows this text
    if base_url is not None and (sandbox or not base_url.strip()):
        raise typer.BadParameter("--base-url needs a URL and cannot be combined with --sandbox.")
    if Path(output).is_file():
        raise typer.BadParameter(f"--output must be the folder of the job; {printable(output)} is a file.")
    if shards is not None and (shard is not None or dry_run):
        raise typer.BadParameter("--shards cannot be combined with --shard or --dry-run.")
    overrides: dict[str, Any] = {"size": size, "quality": quality, "user_id": user_id, "region": region}
    overrides |= {"max_concurrency": max_concurrency, "shared_limit": shared_limit}
    overrides |= {"base_url": "sandbox:" if sandbox else base_url}
    settings = {name: value for name, value in overrides.items() if value is not None}
    settings |= {"model": model, "n": n, "timeout": timeout}
    job: dict[str, Any] = {"limit": limit, "budget": budget, "shard": shard}
    job |= {"retry_failed": retry_failed, "retry_unknown": retry_unknown}
    job |= {"into_existing": into_existing, "unique": unique, "format": form.value if form else None, **settings}
    if dry_run:
        run_command(lambda: _plan(prompts, output, job, as_json=as_json, skip_bad=skip_bad))
    job |= {"skip_bad": skip_bad, "progress": False if no_progress else None}
    if shards is not None:
        del job["shard"]
        run_command(lambda: _run_shards(prompts, output, shards, job, as_json=as_json))
    run_command(lambda: _run(prompts, output, job, as_json=as_json))


def work(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The folder of a job that was begun with --shards.")],
    *,
    budget: Annotated[
        str | None, typer.Option(help="Another limit for all shards together. Default: that of the job.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Generate again what failed or was blocked.")
    ] = False,
    retry_unknown: Annotated[
        bool, typer.Option("--retry-unknown", help="Generate again what may have been charged: can pay twice.")
    ] = False,
    base_url: Annotated[str | None, typer.Option(help="Default: COGVIEW_BASE_URL, else the region's URL.")] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Requests in flight at once. Default: that of the job.")
    ] = None,
    shared_limit: Annotated[
        str | None, typer.Option(help="Share that limit: machine, or redis://host. Default: COGVIEW_SHARED_LIMIT.")
    ] = None,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Show no progress bar.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the reports as JSON.")] = False,
) -> None:
    """Take shards of a job that nobody holds, until none is left. Any number of processes and machines can do so at once.

    Prompts and settings are in the folder; the key is that of this process.
    """
    overrides = {"budget": budget, "base_url": base_url, "max_concurrency": max_concurrency}
    overrides |= {"shared_limit": shared_limit}
    job: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    job |= {"retry_failed": retry_failed, "retry_unknown": retry_unknown, "progress": False if no_progress else None}

    def run() -> int:
        from langchain_cogview.jobs import work_on_shards  # noqa: PLC0415

        return _report_shards(lambda settings: work_on_shards(folder, **settings), job, folder, as_json=as_json)

    run_command(run)


def merge(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The folder of a job in shards, or a job's URL.")],
) -> None:
    """Make one manifest and one contact sheet of a job in shards, or of a job at a URL. Sends nothing."""

    def run() -> int:
        from langchain_cogview.jobs import merge_shards  # noqa: PLC0415

        merged = merge_shards(folder)
        print_stderr(str(merged))
        return print_stdout(str(merged.contact_sheet))

    run_command(run)


def _run_shards(prompts: str, output: str, shards: int, job: dict[str, Any], *, as_json: bool) -> int:
    from langchain_cogview.jobs import run_shards  # noqa: PLC0415

    return _report_shards(
        lambda settings: run_shards(prompts, output, shards, **settings), job, output, prompts, as_json=as_json
    )


def _report_shards(
    run: Callable[[dict[str, Any]], list[JobReport]],
    job: dict[str, Any],
    folder: str,
    prompts: str | None = None,
    *,
    as_json: bool,
) -> int:
    from langchain_cogview.jobs.shards import begun_count, local_folder  # noqa: PLC0415

    reports = _until_interrupted(run, job)
    if reports is None:
        return 130
    for report in reports:
        print_stderr(*_failure_lines(report, prompts), f"{Path(report.folder).name}: {report}")
    count = begun_count(local_folder(folder)) or 0
    if reports and (reports[-1].stopped or reports[-1].interrupted or reports[-1].over_budget):
        print_stderr("It ended before the other shards; run it again to continue.")
    elif len(reports) < count:
        print_stderr(f"Other processes work on {count - len(reports):,} of {count:,} shards.")
    elif any(report.left or report.unknown for report in reports):
        print_stderr("No other shard is left for this process; cogview merge makes one contact sheet of all.")
    else:
        print_stderr(f"All {count:,} shards are finished; cogview merge makes one contact sheet of them.")
    codes = [0, *map(_exit_code, reports)]
    return max(*codes, print_stdout(json_text([report.to_dict() for report in reports]) if as_json else ""))


def _plan(prompts: str, output: str, job: dict[str, Any], *, as_json: bool, skip_bad: bool) -> int:
    from langchain_cogview.jobs import plan_job  # noqa: PLC0415

    # Nothing is sent, so any key is accepted; the key that is set still determines the region.
    plan = plan_job(prompts, output, **job, api_key="dry-run")
    code = 2 if plan.problems and not skip_bad else 0
    if as_json:
        return max(code, print_stdout(json_text(plan.to_dict())))
    return max(code, print_stdout(with_cli_options(str(plan)), wrap=True))


def _run(prompts: str, output: str, job: dict[str, Any], *, as_json: bool) -> int:
    from langchain_cogview.jobs import run_job  # noqa: PLC0415

    report = _until_interrupted(lambda settings: run_job(prompts, output, **settings), job)
    if report is None:
        return 130
    print_stderr(*_failure_lines(report, prompts), str(report))
    shown = json_text(report.to_dict()) if as_json else str(report.contact_sheet or "")
    return max(_exit_code(report), print_stdout(shown))


def _until_interrupted(run: Callable[[dict[str, Any]], _ReportT], job: dict[str, Any]) -> _ReportT | None:
    # What the run returns; None after a second Ctrl-C.
    from langchain_cogview.callbacks import TQDM_MISSING, ProgressCallbackHandler, interactive  # noqa: PLC0415

    if job["progress"] is None and interactive() and not ProgressCallbackHandler().shown:
        print_stderr(TQDM_MISSING)
    stop = threading.Event()
    try:
        with _graceful_signals(stop):
            return run({**job, "on_plan": lambda plan: print_stderr(str(plan)), "stop": stop})
    except KeyboardInterrupt:
        from langchain_cogview.jobs.plan import INTERRUPTED, UNDER_WAY  # noqa: PLC0415

        print_stderr(INTERRUPTED, UNDER_WAY)
        return None


def _exit_code(report: JobReport) -> int:
    from langchain_cogview.errors import error_class  # noqa: PLC0415

    codes = [exit_code(error_class(name)) for name in report.errors]
    codes += [130] if report.interrupted else []
    codes += [7] if report.unknown else []
    codes += [2] if report.over_budget else []
    codes += [exit_code(type(report.stopped))] if report.stopped else []
    return max([0, *codes])


def _failure_lines(report: JobReport, prompts: str | None) -> Iterator[str]:
    """Yield one line for each of the first twenty prompts that were blocked or failed; with `prompts` none of other files."""
    source = None if prompts is None else printable(Path(prompts).name, 200)
    lines = (line for line in report.items() if line["failures"] and source in {None, line.get("source", source)})
    for line in nsmallest(_SHOWN, lines, key=lambda line: int(line["line"])):
        prompt = " ".join(line["arguments"]["prompt"].split())
        prompt = prompt if len(prompt) <= _PROMPT_CHARACTERS else f"{prompt[: _PROMPT_CHARACTERS - 1]}…"
        yield f"Line {line['line']} was not generated: {prompt!r}. {printable(line['failures'][0]['message'], 500)}"
    more = report.blocked + report.failed - _SHOWN
    if more > 0:
        yield f"{more:,} more were not generated; the manifest says why."


@contextmanager
def _graceful_signals(stop: threading.Event) -> Iterator[None]:
    """Within this block, the first Ctrl-C or SIGTERM lets requests in flight finish, and the second ends the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            signal.default_int_handler(number, frame)
        stop.set()
        # Not through the stream: the signal may interrupt a write to it.
        os.write(
            2, b"\nWaiting for requests in flight. Press Ctrl-C again to leave them; they may have been charged.\n"
        )

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
