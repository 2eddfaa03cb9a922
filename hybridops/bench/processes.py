"""One run made of several processes, each of which measures everything once.

Within a process the rounds of a comparison share a layout of pages, a placement of threads and a
stretch of time, and their interval cannot know what the next process will say. So what several
processes found is taken as so many independent samples (Georges et al., "Statistically Rigorous
Java Performance Evaluation", OOPSLA 2007, section 3.2). Each goes through all comparisons before
the next one begins, so that those of one comparison lie apart in time, too.
"""

from __future__ import annotations

import argparse
import copy
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from . import stats
from .measure import crowded
from .result import WRONG, Row, load, rows_of

# Of several processes' values the median, and the largest
_TIMED = (
    *("median_ms", "p20_ms", "p80_ms", "iqr_ms", "images_per_s", "gflops", "gbps"),
    *("percent_of_roof", "others_cpu"),
)
_WORST = ("error", "error_ratio", "peak_mb")

_CHILD = "from hybridops.bench.processes import child; child()"


class ProcessFailed(RuntimeError):
    """A process of a run ended without its rows."""


def in_processes(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of each of `arguments.processes` processes, one after the other.

    arguments: of a command of `hybridops bench` that measures. A process's progress and errors
    appear on stderr. Raises ProcessFailed.
    """
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, arguments.processes + 1):
            if not arguments.quiet:
                print(f"process {number} of {arguments.processes}", file=sys.stderr, flush=True)
            asked = copy.copy(arguments)
            asked.processes, asked.json = 1, Path(folder) / f"{number}.json"
            asked.csv = asked.save = asked.baseline = None
            done = subprocess.run(
                [sys.executable, "-c", _CHILD],
                input=pickle.dumps(asked),
                stdout=subprocess.DEVNULL,
            )
            if not asked.json.exists():
                raise ProcessFailed(f"process {number} ended with exit code {done.returncode}")
            yield rows_of(load(asked.json))


def child() -> None:
    """What such a process does: it reads from stdin what to measure."""
    from ..cli import bench

    sys.exit(bench.run(pickle.load(sys.stdin.buffer)))


def combined(found: Sequence[Sequence[Row]], max_noise: float) -> list[Row]:
    """The rows of several processes as those of one run, in their order.

    Times are medians over the processes. A ratio is the geometric mean of theirs, its interval
    tells how they differ. Of errors and verdicts the worst counts.
    """
    by_row: dict[tuple, list[Row]] = {}
    for rows in found:
        for row in rows:
            by_row.setdefault((row.job, row.key(), row.ours, row.candidate), []).append(row)
    return [_combined(rows, max_noise) for rows in by_row.values()]


def _combined(rows: list[Row], max_noise: float) -> Row:
    """Of one candidate in one comparison."""
    bad = next((row for row in rows if row.verdict in (*WRONG, "SKIPPED")), None)
    one = replace(bad or rows[0], processes=len(rows))
    one.repro += f" --processes {len(rows)}"
    one.speedup = one.speedup_low = one.speedup_high = None
    for name in _WORST:
        setattr(one, name, max(_known(rows, name), default=None))
    one.repeats = min(_known(rows, "repeats"), default=None)
    for name in _TIMED:
        values = _known(rows, name)
        setattr(one, name, median(values) if values else None)
    one.min_ms = min(_known(rows, "min_ms"), default=None)
    one.n = sum(_known(rows, "n")) or None
    speedups = _known(rows, "speedup")
    if bad or one.ours:
        return one
    if len(speedups) < len(rows):  # ours was wrong in one of them
        one.verdict, one.reason = "OK", None
        return one
    one.speedup, one.speedup_low, one.speedup_high = found = stats.over_processes(speedups)
    one.verdict, one.reason = stats.verdict(found, max_noise), None
    if why := crowded(one.threads, one.others_cpu):
        one.verdict, one.reason = "AMBIGUOUS", why
    return one


def _known(rows: Sequence[Row], name: str) -> list:
    return [value for row in rows if (value := getattr(row, name)) is not None]
