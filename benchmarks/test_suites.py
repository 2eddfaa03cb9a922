"""The suites beside this file through pytest-benchmark: its JSON, comparisons and histograms.

    pytest benchmarks -k test_op --benchmark-json new.json
    pytest-benchmark compare old.json new.json --group-by group --histogram

One test is one candidate on one case. It is compared with float64 before it is timed, and a wrong
one fails. pytest-benchmark times each candidate by itself: to know which of two is faster, and how
sure that is, `hybridops bench run` lets them take turns.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridops.bench.jobs import Job, suite_jobs
from hybridops.bench.measure import Wrong, checked
from hybridops.bench.task import Skip, threads

HERE = Path(__file__).parent


def candidates(suite: str) -> list:
    return [
        pytest.param(job, peer, id=f"{job.title}-{peer or 'hybridops'}".replace(" ", "-"))
        for job in suite_jobs(HERE / suite)
        for peer in (None, *job.peers)
    ]


@pytest.mark.parametrize(("job", "peer"), candidates("hot_paths.toml"))
def test_op(job: Job, peer: str | None, benchmark) -> None:
    measure(job, peer, benchmark)


@pytest.mark.parametrize(("job", "peer"), candidates("models.toml"))
def test_model(job: Job, peer: str | None, benchmark) -> None:
    measure(job, peer, benchmark)


def measure(job: Job, peer: str | None, benchmark) -> None:
    torch.compiler.reset()  # what one test compiled must not count for the next
    task = job.task()
    try:
        candidate, finding = checked(task, peer)
    except Skip as reason:
        pytest.skip(str(reason))
    except Wrong as reason:
        pytest.fail(str(reason), pytrace=False)
    benchmark.group = job.title
    benchmark.extra_info |= {
        "backend": candidate.backend,
        "threads": task.threads,
        "error": finding.error,
        "error_ratio": finding.ratio,
    }
    with threads(task.threads), candidate.world():
        benchmark(candidate.run)
