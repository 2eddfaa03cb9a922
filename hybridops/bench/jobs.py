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

Either may name the time asked for, and a better one, in microseconds per mode ("bwd" is forward and
backward together), or how many times as fast as a peer ours shall be:

    target = { fwd = [58, 46], bwd = [193, 154] }
    target = { infer = { eager = [2.5], compile-max-graph = [1.5, 2] } }

Peers named as `later` are compared too, but behind all that the suite asks for otherwise; what is
`first` comes before it, so that a run that is cut short has it:

    later = ["compile-max"]
    first = true
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .case import INPUT_LAYOUTS
from .measure import Progress, measure
from .memory import measure_memory
from .model_task import Size, build_model, full_name, model_task, read_size, written
from .op_task import OPS, chosen_backends, find_cases, op_task, rehearsed
from .peers import peer
from .result import Row
from .sample import Settings
from .task import DTYPES, MODEL_MODES, OP_MODES, Task

OP_PEERS, MODEL_PEERS = ("eager", "sdpa"), ("eager", "compile")
METRICS = ("latency", "throughput", "peak-mem")
DEVICES = ("cpu", "cuda")
REHEARSED_SIZE = 64
BACKENDS = ("auto", "all", "cpu", "triton", "cuda", "reference")


class BadSuite(ValueError):
    """A suite file that cannot be read, or asks for what does not exist."""


# Asked for, and better still: milliseconds, or by peer how many times as fast
Target = tuple[float, ...] | dict[str, tuple[float, ...]]


@dataclass
class Job:
    """One comparison to come. task() builds it, which for a model takes seconds."""

    title: str
    task: Callable[[], Task]
    peers: tuple[str, ...]
    memory: bool = False
    target: Target = ()
    how: str = ""  # what else tells it from other jobs of its title
    kind: str = "op"
    late: bool = False

    @property
    def key(self) -> str:
        """What `--resume` knows it by."""
        return " ".join(filter(None, (self.title, self.how, ",".join(self.peers))))


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
    later: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
    target: Mapping[str, Any] | None = None,
    rehearsal: bool = False,
) -> list[Job]:
    """A job for every combination. Raises ValueError that names what there is.

    later, target: see above. rehearsal: the same on small inputs on the CPU, whatever the device.
    """
    if name not in OPS:
        raise ValueError(f"unknown op {name!r}; there are {', '.join(OPS)}")
    _among(dtype, tuple(DTYPES), "dtype")
    _among(mode, OP_MODES, "mode")
    _among([] if layout is None else [layout], (*INPUT_LAYOUTS, "channels_last"), "layout")
    _among([backend], BACKENDS, "backend")
    _check_device(device, rehearsal)
    if peers is None:
        peers = OP_PEERS if name == "attention" else OP_PEERS[:1]
    asked = _targets(target or {}, mode, [*peers, *later])
    cases = [case for s in shape for case in find_cases(name, s)]
    jobs = []
    if rehearsal:
        cases, device, backend = [rehearsed(case) for case in cases], "cpu", "auto"
    for case, d, m, count in product(cases, dtype, mode, threads or _threads()):
        for b in chosen_backends(backend, device):
            make = partial(_op, rehearsal, case, d, m, count, b, layout, seed, device)
            how = " ".join([device, b, f"{count} threads", *filter(None, [layout])])
            job = Job(f"{case} {m} {d}", make, tuple(peers), False, asked.get(m, ()), how)
            jobs += _now_and_later(job, later)
    return jobs


def _check_device(device: str, rehearsal: bool) -> None:
    _among([device], DEVICES, "device")
    if device == "cuda" and not (rehearsal or torch.cuda.is_available()):
        raise ValueError("device cuda: torch sees no GPU (--dry-run rehearses without one)")


def _now_and_later(job: Job, later: Sequence[str]) -> list[Job]:
    late = replace(job, peers=tuple(later), late=True, memory=False)
    return [job, late] if later else [job]


def _op(rehearsal: bool, *arguments: Any) -> Task:
    task = op_task(*arguments)
    task.rehearsal = rehearsal
    return task


def _targets(target: Any, modes: Sequence[str], peers: Sequence[str]) -> dict[str, Target]:
    """By mode. Raises ValueError for anything else than is documented above, and unknown peers."""
    for name in peers:
        peer(name)
    found: dict[str, Target] = {}
    for mode, asked in target.items():
        _among([mode], tuple(modes), "mode of target")
        if isinstance(asked, Mapping):
            _among(list(asked), tuple(peers), "peer of target")
            found[mode] = {p: _pair(times, "ratios", better=max) for p, times in asked.items()}
        else:
            found[mode] = tuple(t / 1e3 for t in _pair(asked, "times in us", better=min))
    return found


def _pair(values: Any, what: str, better: Callable) -> tuple[float, ...]:
    """One or two positive numbers, the better one last."""
    given = list(values) if isinstance(values, list | tuple) else []
    numbers = [t for t in given if isinstance(t, int | float) and 0 < t < 1e9]
    if not 1 <= len(numbers) == len(given) <= 2 or better(numbers) != numbers[-1]:
        raise ValueError(f"target: one or two {what}, the better one last, got {values}")
    return tuple(float(t) for t in numbers)


def model_jobs(
    name: str,
    *,
    batch: Sequence[int] = (1,),
    size: Sequence[int | str | None] = (None,),
    dtype: Sequence[str] = ("fp32",),
    mode: Sequence[str] = ("infer",),
    threads: Sequence[int] = (),
    peers: Sequence[str] | None = None,
    later: Sequence[str] = (),
    metric: Sequence[str] = ("latency",),
    seed: int = 0,
    device: str = "cpu",
    graph: bool = False,
    freeze: bool = False,
    offload: bool = False,
    target: Mapping[str, Any] | None = None,
    rehearsal: bool = False,
) -> list[Job]:
    """A job for every combination; a model is built once for all jobs of one size.

    size: sides, or "HxW". graph: ours replays a CUDA graph. freeze: as for optimize(); offload
    too, which freezes. later, target: see above. rehearsal: the same on two small images on the
    CPU, whatever the device.
    Raises ValueError for an unknown name, dtype, mode, metric or peer, and for a bad size.
    """
    name = full_name(name)
    sizes = [s if s is None else read_size(s) for s in size]
    _among(dtype, ("fp32", "bf16", "fp16") if device == "cuda" else ("fp32", "bf16"), "dtype")
    _among(mode, MODEL_MODES, "mode")
    _among(metric, METRICS, "metric")
    _check_device(device, rehearsal)
    if device == "cuda" and "peak-mem" in metric:
        raise ValueError("peak-mem is the memory of a process, not of a GPU")
    if graph and (device != "cuda" or tuple(mode) != ("infer",)):
        raise ValueError("graph: a CUDA graph is captured on a GPU, of inference")
    freeze = freeze or offload
    if freeze and tuple(mode) != ("infer",):
        raise ValueError("freeze: a snapshot is taken for inference")
    peers = tuple(peers or MODEL_PEERS)
    asked = _targets(target or {}, mode, [*peers, *later])
    if rehearsal:
        batch, sizes, device = [2], [REHEARSED_SIZE], "cpu"
    built: dict[Size | None, Any] = {}

    def task(size, batch, dtype, mode, threads) -> Task:
        if size not in built:
            built.clear()  # one model at a time stays in memory
            model, takes = build_model(name, size)
            built[size] = model.to(device), takes
        model, takes = built[size]
        task = model_task(
            name,
            model,
            size=takes,
            batch=batch,
            dtype=dtype,
            mode=mode,
            threads=threads,
            seed=seed,
            device=device,
            graph=graph,
            freeze=freeze,
            offload=offload,
        )
        task.rehearsal = rehearsal
        return task

    jobs = []
    for s, b, d, m, count in product(sizes, batch, dtype, mode, threads or _threads()):
        make = partial(task, s, b, d, m, count)
        title = f"{name} {m} {d} batch {b}"
        how = f"{written(s) if s else ''} {count} threads {','.join(metric)}"
        how += f" {device}" * (device != "cpu") + " graph" * graph
        how += " offloaded" if offload else " frozen" * freeze
        job = Job(title, make, peers, "peak-mem" in metric, asked.get(m, ()), how, "model")
        jobs += _now_and_later(job, later)
    return jobs


def suite_jobs(path: Path, *, rehearsal: bool = False) -> list[Job]:
    """The jobs of a suite file. Raises BadSuite for what cannot be read or served.

    rehearsal: see op_jobs and model_jobs.
    """
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
    ranked: list[tuple[bool, bool, Job]] = []
    makers: dict[str, Callable[..., list[Job]]] = {"op": op_jobs, "model": model_jobs}
    for kind, make in makers.items():
        for i, entry in enumerate(suite.pop(kind, [])):
            where = f"{path}: [[{kind}]] number {i + 1}"
            if not isinstance(entry, dict) or "name" not in entry:
                raise BadSuite(f"{where} has no name")
            if not isinstance(entry["name"], str):
                raise BadSuite(f"{where}: name must be a string, got {entry['name']!r}")
            single = {"name", "backend", "layout", "seed", "device", "target", "graph"}
            single |= {"freeze", "offload", "first"}
            options = {
                k: v if k in single or isinstance(v, list) else [v] for k, v in entry.items()
            }
            first = options.pop("first", False)
            if rehearsal:
                options["rehearsal"] = True
            try:
                if not isinstance(first, bool):
                    raise TypeError(f"first is true or false, not {first!r}")
                made = make(options.pop("name"), **options)
                ranked += [(job.late, not first, job) for job in made]
            except (ValueError, TypeError) as error:
                text = str(error).partition("unexpected keyword argument ")
                raise BadSuite(
                    f"{where}: unknown key {text[2]}" if text[1] else f"{where}: {error}"
                ) from None
    if suite:
        raise BadSuite(f"{path}: unknown tables {', '.join(suite)} (op and model are known)")
    if not ranked:
        raise BadSuite(f"{path} asks for nothing")
    return [job for *_, job in sorted(ranked, key=lambda job: job[:2])]


def run_jobs(
    jobs: Iterable[Job],
    settings: Settings | None = None,
    *,
    started: Callable[[str], None] = lambda title: None,
    progress: Progress = lambda share, text: None,
    keep_going: bool = False,
) -> Iterator[list[Row]]:
    """Each job's rows, in order, as soon as they are measured.

    keep_going: what a job raises becomes its row, FAILED; a GPU that is lost to this process ends
    the run all the same (Lost).
    """
    settings = settings or Settings()
    for job in jobs:
        started(job.title)
        progress(0.0, "building")
        if "torch._dynamo" in sys.modules:  # what one job compiled must not count for the next
            torch.compiler.reset()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        task, lost = None, None
        try:
            task = job.task()
            found = measure(task, job.peers, settings, progress=progress)
            if job.memory:
                measure_memory(task, found, progress)
        except Exception as error:
            if not keep_going:
                raise
            found = [_failed(job, task, error)]
            lost = error if "CUDA error" in str(error) else None
        for row in found:
            row.repro, row.job = _repro(row, settings), job.key
            _set_target(row, job.target)
        yield found
        if lost:
            raise Lost(f"{job.title}: {lost}")


def _set_target(row: Row, target: Target) -> None:
    """A time is asked of ours, a ratio stands in the peer's row, where the speed-up does."""
    if isinstance(target, dict):
        asked = target.get(row.candidate)
        if asked and not row.ours:
            row.target_speedup, row.stretch_speedup = asked[0], asked[-1]
    elif row.ours and target:
        row.target_ms, row.stretch_ms = target[0], target[-1]


class Lost(RuntimeError):
    """The GPU answers this process no more."""


def _failed(job: Job, task: Task | None, error: Exception) -> Row:
    """The row of a comparison that raised; without a task only its title is known."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if task is None:
        return Row(
            job.kind, job.title, "", "", "", None, 1, "", "hybridops", True, "FAILED", reason
        )
    known = (task.kind, task.name, task.case, task.dtype, task.mode, task.batch, task.threads)
    return Row(*known, "", task.label, True, "FAILED", reason, task.repro, task.layout)


def unmeasured(jobs: Sequence[Job], doc: dict) -> list[Job]:
    """The jobs of which an earlier document of the same run has no rows."""
    done = {row.get("job") for row in doc["rows"]}
    return [job for job in jobs if job.key not in done]


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
