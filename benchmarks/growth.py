"""How a job grows with its prompts: memory, the start of a resume, the files in a folder and the pages of the contact sheet.

    python -m benchmarks.growth --prompts 100000 --dry-run 1000000

Each figure is measured in a process of its own; the service is the sandbox, which runs in another process, unless `--in-
process` says otherwise. A resume is ready when the first call of the new prompt starts; the time begins at the call of
`run_job`. Memory is the peak of the resident set of the process, Python and the imported packages included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler

from langchain_cogview.jobs import plan_job, run_job

PROMPT = "Product photo {number}: a ceramic teapot on a wooden table, soft light from the left, style {style}"
KEY = "any"
IN_FLIGHT = 8


def peak() -> float:
    """Peak of the resident set of this process, in MB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (1e6 if sys.platform == "darwin" else 1e3)


class FirstCall(BaseCallbackHandler):
    """The moment at which the first call of a job starts."""

    at: tuple[float, float] | None = None

    def on_chain_start(self, *arguments: Any, **named: Any) -> None:
        self.at = self.at or (time.perf_counter(), time.process_time())


def job(prompts: str, folder: str, base_url: str) -> dict[str, float]:
    first = FirstCall()
    start, cpu = time.perf_counter(), time.process_time()
    settings = {"base_url": base_url, "api_key": KEY, "max_concurrency": IN_FLIGHT, "size": "512x512"}
    report = run_job(prompts, folder, progress=False, config={"callbacks": [first]}, **settings)
    if report.stopped:
        raise report.stopped
    seconds = time.perf_counter() - start
    ready, used = first.at or (start, cpu)
    return {"seconds": seconds, "ready": ready - start, "cpu": used - cpu, "peak": peak(), "images": report.images}


def plan(prompts: str, folder: str) -> dict[str, float]:
    start, cpu = time.perf_counter(), time.process_time()
    images = plan_job(prompts, folder, base_url="sandbox:").images
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "cpu": time.process_time() - cpu, "peak": peak(), "images": images}


def child(*arguments: str) -> dict[str, float]:
    """Run one measurement in a new process."""
    command = [sys.executable, "-m", "benchmarks.growth", "--measure", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def write_prompts(path: Path, count: int) -> None:
    with path.open("w") as file:
        file.writelines(PROMPT.format(number=number, style=number % 7) + "\n" for number in range(count))


def folder_facts(folder: Path) -> str:
    most = max(len(files) for _, _, files in os.walk(folder))
    pages = [path.stat().st_size for path in folder.rglob("*.html")]
    return f"{most:,} files at most in one folder; {len(pages):,} pages, the largest {max(pages) / 1e6:.2f} MB"


def measure_job(count: int, folder: Path, base_url: str) -> None:
    prompts = folder / "prompts.txt"
    write_prompts(prompts, count)
    first = child("job", str(prompts), str(folder / "job"), base_url)
    milliseconds = 1000 * first["seconds"] / count
    print(
        f"| {count:,} prompts | {first['seconds']:.0f} s ({milliseconds:.1f} ms each) | {first['peak']:.0f} MB |",
        flush=True,
    )
    write_prompts(prompts, count + 1)
    again = child("job", str(prompts), str(folder / "job"), base_url)
    ready = f"{again['ready']:.1f} s to the first call (CPU {again['cpu']:.1f} s), {again['seconds']:.1f} s in all"
    print(f"| resumed with one more | {ready} | {again['peak']:.0f} MB |", flush=True)
    print(f"| folder | {folder_facts(folder / 'job')} | |", flush=True)


def measure_plan(count: int, folder: Path) -> None:
    prompts = folder / "dry-run.txt"
    write_prompts(prompts, count)
    found = child("plan", str(prompts), str(folder / "none"))
    print(
        f"| dry run of {count:,} | {found['seconds']:.1f} s (CPU {found['cpu']:.1f} s) | {found['peak']:.0f} MB |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000, help="prompts of the job (default: %(default)s)")
    parser.add_argument("--dry-run", type=int, default=100_000, help="lines of the dry run (default: %(default)s)")
    parser.add_argument("--in-process", action="store_true", help="the sandbox in the process of the job")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, *arguments = options.measure
        print(json.dumps({"job": job, "plan": plan}[what](*arguments)))
        return
    print("| what | time or number | memory peak |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        measure_plan(options.dry_run, Path(name))
        if options.in_process:
            measure_job(options.prompts, Path(name), "sandbox:")
            return
        command = [sys.executable, "-m", "langchain_cogview.sandbox", "--port", "0", "--latency", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            base_url = next(word for word in server.stdout.readline().split() if word.startswith("http://"))
            measure_job(options.prompts, Path(name), base_url)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
