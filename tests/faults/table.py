"""`python -m tests.faults.table [WORD ...]`: every fault, sync and async, against the strict promises; prints what fails and the sums.

With words, only faults whose names hold all of them.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import get_args

from tests.faults.downloads import DOWNLOADS
from tests.faults.referee import STRICT_SLACK, How, Verdict, judge_download, judge_reply
from tests.faults.replies import REPLIES


def main(words: list[str]) -> int:
    """Run and print; the number of failures is the exit status."""
    failures = 0
    for title, faults, judge in (("replies", REPLIES, judge_reply), ("downloads", DOWNLOADS, judge_download)):
        sums: Counter[str] = Counter()
        slowest = 0.0
        for fault in faults.values():
            if not all(word in fault.name for word in words):
                continue
            for how in get_args(How):
                with tempfile.TemporaryDirectory() as folder:
                    verdict: Verdict = judge(fault, how, Path(folder), STRICT_SLACK)  # type: ignore[operator]
                over = verdict.seconds - fault.timeout
                slowest = max(slowest, over)
                sums.update({"runs": 1, "wrong": bool(verdict.problems), "POSTs": verdict.posts, "GETs": verdict.gets})
                if verdict.problems:
                    print(f"{title} | {fault.name} | {how} | {verdict.outcome} in {verdict.seconds:.2f} s")
                    print(*(f"    {problem}" for problem in verdict.problems), sep="\n", flush=True)
        failures += sums["wrong"]
        print(f"{title}: {dict(sums)}; at most {slowest:+.3f} s beside the time limit", flush=True)
    return min(failures, 100)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
