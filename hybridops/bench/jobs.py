"""What is to be measured, before anything is built: from options or a suite file to rows.

A suite is a TOML file with tables [[op]] and [[model]], whose keys are the options of the commands:

    [[op]]
    name = "attention"
    shape = ["levit_*", "cpvt_tiny,B=16"]
    dtype = ["fp32", "bf16"]

    [[model]]
    name = "timm:levit_128s"
    batch = [1, 16]
    peers = ["eager", "compile"]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .case import INPUT_LAYOUTS
from .measure import Progress, measure
from .memory import measure_memory
from .model_task import build_model, full_name, model_task
from .op_task import OPS, chosen_backends, find_cases, op_task
from .peers import peer
from .result import Row
from .sample import Settings
from .task import DTYPES, MODEL_MODES, OP_MODES, Task

OP_PEERS, MODEL_PEERS = ("eager", "sdpa"), ("eager", "compile")
METRICS = ("latency", "throughput", "peak-mem")
BACKENDS = ("auto", "all", "cpu", "triton", "cuda", "reference")


class BadSuite(ValueError):
    """A suite file that cannot be read, or asks for what does not exist."""


@dataclass
class Job:
    """One comparison to come. task() builds it, which for a model takes seconds."""

    title: str
    task: Callable[[], Task]
    peers: tuple[str, ...]
    memory: bool = False


def op_jobs(
    name: str,
    *,
    shape: Sequence[str] = ("*",),
    dtype: Sequence[str] = ("fp32",),
    mode: Sequence[str] = ("fwd",),
    threads: Sequence[int] = (),
    backend: str = "auto",
    layout: str | None = None,
    peers: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Job]:
    """A job for every combination. Raises ValueError that names what there is."""
    if name not in OPS:
        raise ValueError(f"unknown op {name!r}; there are {', '.join(OPS)}")
    _among(dtype, tuple(DTYPES), "dtype")
    _among(mode, OP_MODES, "mode")
    _among([] if layout is None else [layout], (*INPUT_LAYOUTS, "channels_last"), "layout")
    _among([backend], BACKENDS, "backend")
    if peers is None:
        peers = OP_PEERS if name == "attention" else OP_PEERS[:1]
    for p in peers:
        peer(p)
    cases = [case for s in shape for case in find_cases(name, s)]
    jobs = []
    for case, d, m, count in product(cases, dtype, mode, threads or _threads()):
        for b in chosen_backends(backend):
            make = partial(op_task, case, d, m, count, b, layout, seed)
            jobs.append(Job(f"{case} {m} {d}", make, tuple(peers)))
    return jobs


def model_jobs(
    name: str,
    *,
    batch: Sequence[int] = (1,),
    size: Sequence[int | None] = (None,),
    dtype: Sequence[str] = ("fp32",),
    mode: Sequence[str] = ("infer",),
    threads: Sequence[int] = (),
    peers: Sequence[str] | None = None,
    metric: Sequence[str] = ("latency",),
    seed: int = 0,
) -> list[Job]:
    """A job for every combination; a model is built once for all jobs of one size.

    Raises ValueError for an unknown name, dtype, mode, metric or peer.
    """
    name = full_name(name)
    _among(dtype, ("fp32", "bf16"), "dtype")
    _among(mode, MODEL_MODES, "mode")
    _among(metric, METRICS, "metric")
    for p in peers or ():
        peer(p)
    built: dict[int | None, Any] = {}

    def task(size, batch, dtype, mode, threads) -> Task:
        if size not in built:
            built.clear()  # one model at a time stays in memory
            built[size] = build_model(name, size)
        model, takes = built[size]
        return model_task(
            name, model, size=takes, batch=batch, dtype=dtype, mode=mode, threads=threads, seed=seed
        )

    jobs = []
    for s, b, d, m, count in product(size, batch, dtype, mode, threads or _threads()):
        make = partial(task, s, b, d, m, count)
        title = f"{name} {m} {d} batch {b}"
        jobs.append(Job(title, make, tuple(peers or MODEL_PEERS), "peak-mem" in metric))
    return jobs


def suite_jobs(path: Path) -> list[Job]:
    """The jobs of a suite file. Raises BadSuite for what cannot be read or served."""
    try:
        import tomllib
    except ImportError:
        raise BadSuite("reading suites needs Python 3.11 or newer") from None
    try:
        suite = tomllib.loads(path.read_text())
    except OSError as error:
        raise BadSuite(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise BadSuite(f"{path} is not TOML: {error}") from None
    jobs: list[Job] = []
    makers: dict[str, Callable[..., list[Job]]] = {"op": op_jobs, "model": model_jobs}
    for kind, make in makers.items():
        for i, entry in enumerate(suite.pop(kind, [])):
            where = f"{path}: [[{kind}]] number {i + 1}"
            if not isinstance(entry, dict) or "name" not in entry:
                raise BadSuite(f"{where} has no name")
            single = ("name", "backend", "layout", "seed")
            options = {
                k: v if k in single or isinstance(v, list) else [v] for k, v in entry.items()
            }
            try:
                jobs += make(options.pop("name"), **options)
            except (ValueError, TypeError) as error:
                text = str(error).partition("unexpected keyword argument ")
                raise BadSuite(
                    f"{where}: unknown key {text[2]}" if text[1] else f"{where}: {error}"
                ) from None
    if suite:
        raise BadSuite(f"{path}: unknown tables {', '.join(suite)} (op and model are known)")
    if not jobs:
        raise BadSuite(f"{path} asks for nothing")
    return jobs


def run_jobs(
    jobs: Iterable[Job],
    settings: Settings | None = None,
    *,
    started: Callable[[str], None] = lambda title: None,
    progress: Progress = lambda share, text: None,
) -> Iterator[list[Row]]:
    """Each job's rows, in order, as soon as they are measured."""
    settings = settings or Settings()
    for job in jobs:
        started(job.title)
        progress(0.0, "building")
        if "torch._dynamo" in sys.modules:  # what one job compiled must not count for the next
            torch.compiler.reset()
        task = job.task()
        found = measure(task, job.peers, settings, progress=progress)
        if job.memory:
            measure_memory(task, found, progress)
        for row in found:
            row.repro = _repro(row, settings)
        yield found


def _repro(row: Row, settings: Settings) -> str:
    changed = [
        f"--{name.replace('_', '-')} {getattr(settings, name):g}"
        for name in ("min_time", "max_noise", "timeout")
        if getattr(settings, name) != getattr(Settings, name)
    ]
    changed += [] if row.ours else [f"--peers {row.candidate}"]
    changed += [f"--cache {settings.cache}"] * (settings.cache != "warm")
    changed += [f"--seed {settings.seed}"] * (settings.seed != 0)
    return " ".join([row.repro, *changed])


def _threads() -> tuple[int]:
    return (torch.get_num_threads(),)


def _among(values: Sequence[str], known: Sequence[str], what: str) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; there are {', '.join(known)}")
