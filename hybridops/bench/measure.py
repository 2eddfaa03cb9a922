"""From a task to its rows: check every candidate, time those that are right, check again.

The order matters. A candidate is compared with float64 before it is timed; a wrong one is not timed
at all, and where ours is wrong no row claims a speed-up. After the timing new inputs are drawn into
the same tensors and every answer is compared once more, so that a kernel which remembers its answer
does not win.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import backend
from . import check, clock, peers, stats
from . import roof as roofs
from .result import Row
from .sample import Settings, interleaved
from .task import Candidate, Skip, Task, threads
from .work import counted

Progress = Callable[[float, str], None]
CROWD = 0.15  # cores


def measure(
    task: Task,
    peer_builders: Sequence[str] | Mapping[str, Callable[[Task], Candidate]],
    settings: Settings | None = None,
    *,
    progress: Progress = lambda done, text: None,
    timer: clock.Clock | None = None,
) -> list[Row]:
    """One row for ours, then one per peer, in the order given: known peers by name, or others."""
    settings = settings or Settings()
    if not isinstance(peer_builders, Mapping):
        peer_builders = {name: partial(peers.build, name) for name in peer_builders}
    with threads(task.threads):
        torch.manual_seed(task.seed)
        return _Comparison(task, peer_builders, settings, progress, timer).rows()


class Wrong(Exception):
    """A candidate whose answer is wrong, or whose check proves nothing; the text says which."""


def checked(task: Task, peer: str | None = None) -> tuple[Candidate, check.Finding]:
    """Ours, or a peer by name, after the checks that come before timing; and what they found.

    Raises Skip where it cannot take part, and Wrong.
    """
    builders = {} if peer is None else {peer: partial(peers.build, peer)}
    with threads(task.threads):
        torch.manual_seed(task.seed)
        comparison = _Comparison(task, builders, Settings(), lambda done, text: None, None)
        entry = comparison.entries[-1]
        comparison.build(entry)
    if entry.status == "SKIPPED":
        raise Skip(entry.reason)
    if entry.candidate is None or entry.finding is None or entry.status != "OK":
        raise Wrong(f"{entry.status}: {entry.name}: {entry.reason}")
    return entry.candidate, entry.finding


@dataclass
class _Entry:
    """A candidate on its way to a row; `candidate` is None once it is out of the race."""

    name: str
    build: Callable[[Task], Candidate]
    backend: str = ""
    candidate: Candidate | None = None
    ours: bool = False
    status: str = "OK"
    reason: str | None = None
    finding: check.Finding | None = None

    def out(self, status: str, reason: str) -> None:
        self.status, self.reason, self.candidate = status, reason, None


class _Comparison:
    def __init__(self, task, builders, settings, progress, timer):
        self.task, self.settings, self.progress = task, settings, progress
        self.progress(0.0, "computing in float64")
        drawn = task.set_inputs(task.seed)
        (self.exact, self.outputs), work = counted(lambda: task.exact(drawn))
        self.flop = work.flop * task.work_share if task.flop is None else task.flop
        self.least_flop = min(work.least, self.flop) if task.flop is None else task.flop
        self.limits = task.limits(len(self.exact), self.outputs)
        self.device = task.inputs[0].device if task.inputs else torch.device("cpu")
        self.clock = timer or clock.clock_for(self.device, task.kind)
        ours = _Entry(task.label, task.ours, ours=True)
        self.entries = [ours, *(_Entry(name, build) for name, build in builders.items())]
        self.torchs = peers.build("eager", task).outcome()  # torch's own error, asked for or not
        self.bytes = task.bytes_moved
        if self.bytes is None:
            self.bytes = float(_algorithmic_bytes(task, self.torchs[: self.outputs]))

    def rows(self) -> list[Row]:
        for i, entry in enumerate(self.entries):
            self.progress(0.3 * i / len(self.entries), f"building {entry.name}")
            self.build(entry)
        racing = [entry for entry in self.entries if entry.candidate]
        timings = interleaved(
            [entry.candidate for entry in racing if entry.candidate],
            self.clock,
            self.settings,
            self._flush(),
            lambda done, text: self.progress(0.3 + 0.6 * done, text),
        )
        self.progress(0.95, "checking on new inputs")
        self._check_again(racing)
        rows = [self._row(entry, timings.seconds) for entry in self.entries]
        self._mind_the_others(rows, timings.others)
        return rows

    def build(self, entry: _Entry) -> None:
        """Build the entry's candidate and check it; it is None unless it may be timed."""
        try:
            entry.candidate = entry.build(self.task)
            entry.candidate.name = entry.name
            entry.backend = entry.candidate.backend
        except Skip as reason:
            entry.out("SKIPPED", str(reason))
        except Exception as error:  # a peer's own trouble must not end the others' comparison
            if entry.ours:
                raise
            entry.out("FAILED", _line(error))
        if entry.candidate:
            self._check(entry)

    def _check(self, entry: _Entry) -> None:
        candidate = entry.candidate
        assert candidate is not None
        before, fallbacks = [x.clone() for x in self.task.inputs], backend.fallbacks.copy()
        try:
            results = candidate.outcome()
            unserved = backend.fallbacks - fallbacks
            again = candidate.outcome()
        except backend.BackendUnavailable as error:
            return entry.out("SKIPPED", str(error))
        except Exception as error:
            if entry.ours:
                raise
            return entry.out("FAILED", _line(error))
        limits = self.limits if entry.ours else [check.PEER_LIMIT] * len(self.limits)
        finding = check.judge(results, self.exact, self.torchs, limits)
        finding.repeats = check.same_bits(results, again)
        entry.finding = finding
        if finding.status == "FAILED":
            entry.out("FAILED", str(finding.reason))
        elif not check.same_bits(self.task.inputs, before):
            entry.out("FAILED", "it writes to its inputs")
            for held, x in zip(self.task.inputs, before, strict=True):
                held.copy_(x)
        elif why := check.believable(self.exact):
            entry.status, entry.reason = "MISTRUSTED", why
        elif entry.ours and not finding.repeats:
            entry.status, entry.reason = "MISTRUSTED", "two calls on one input differ in their bits"
        elif entry.ours and unserved:
            calls = (f"{op} ({why}) {n} times" for (op, why), n in unserved.items())
            entry.reason = "the reference served " + ", ".join(calls)
        return None

    def _check_again(self, racing: list[_Entry]) -> None:
        drawn = self.task.set_inputs(self.task.seed + 1)
        exact, _ = self.task.exact(drawn)
        torchs = peers.build("eager", self.task).outcome()
        for entry in racing:
            assert entry.candidate is not None
            limits = self.limits if entry.ours else [check.PEER_LIMIT] * len(self.limits)
            # Another draw may be a little less lucky; an answer remembered is wrong altogether.
            finding = check.judge(entry.candidate.outcome(), exact, torchs, [4 * x for x in limits])
            if finding.status != "OK" and entry.status == "OK":
                entry.status = "MISTRUSTED"
                entry.reason = f"wrong on new inputs after the timing: {finding.reason}"

    def _flush(self) -> clock.Flush | None:
        if self.settings.cache == "warm" or self.task.rehearsal:
            return None
        return clock.Flush(self.device, self._roof().cache_bytes.get("L3"))

    def _roof(self, refresh: bool = False) -> roofs.Roof:
        if self.device.type == "cuda":
            return roofs.gpu_roof(self.device, refresh=refresh)
        return roofs.roof(self.task.threads, refresh=refresh)

    def _row(self, entry: _Entry, seconds: dict[str, list[float]]) -> Row:
        task = self.task
        row = Row(
            kind=task.kind,
            name=task.name,
            case=task.case,
            dtype=task.dtype,
            mode=task.mode,
            batch=task.batch,
            threads=task.threads,
            backend=entry.backend,
            candidate=entry.name,
            ours=entry.ours,
            verdict=entry.status,
            reason=entry.reason,
            repro=task.repro,
            layout=task.layout,
            cache=self.settings.cache,
            clock=self.clock.name,
            flop=self.flop,
            bytes=self.bytes,
            device=device_name(self.device),
        )
        if entry.finding:
            row.error, row.error_ratio = entry.finding.error, entry.finding.ratio
            row.repeats = entry.finding.repeats
            row.error_limit = max(self.limits) if entry.ours else None
        if entry.name in seconds:
            row.set_times(stats.summary(seconds[entry.name]))
            if not self.task.rehearsal:
                self._hold_against_the_roof(row)
        ours = self.entries[0]
        both = entry.name in seconds and ours.name in seconds
        both = both and not self.task.rehearsal
        if not entry.ours and both and ours.status == entry.status == "OK":
            speedup = stats.ratio(seconds[entry.name], seconds[ours.name])
            row.speedup, row.speedup_low, row.speedup_high = speedup
            row.verdict = stats.verdict(speedup, self.settings.max_noise)
        return row

    def _mind_the_others(self, rows: list[Row], others: float | None) -> None:
        """Too few cores for us and other processes: a thread that waits for a core makes all wait,
        and which candidate that hits most says nothing about its speed when alone."""
        why = crowded(self.task.threads, others) if self.device.type == "cpu" else None
        for row in rows:
            if row.median_ms is None:
                continue
            row.others_cpu = others
            if why and row.verdict in ("FAST", "SAME", "SLOW", "AMBIGUOUS"):
                row.verdict, row.reason = "AMBIGUOUS", why

    def _hold_against_the_roof(self, row: Row) -> None:
        """Rates, the share of the machine's roof; faster than the roof means mismeasured."""
        assert row.median_ms is not None
        for refresh in (False, True):  # a probe disturbed by others puts the roof too low
            bound = partial(
                roofs.bound,
                self._roof(refresh),
                bytes_moved=self.bytes,
                dtype=self.task.dtype,
                threads=1 if self.device.type == "cuda" else self.task.threads,
                cache=self.settings.cache,
            )
            row.set_rates(bound(flop=self.flop))
            least = bound(flop=self.least_flop)
            if least is None or 105 * row.median_ms >= 100 * 1e3 * least.seconds:
                return
        row.verdict, entry = "INVALID", next(e for e in self.entries if e.name == row.candidate)
        row.reason = (
            f"{row.percent_of_roof:.0f} % of what this machine can do ({row.limit}): work was "
            "skipped, or the clock stopped before it was done"
        )
        entry.status, entry.reason = "INVALID", row.reason


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def crowded(threads: int, others: float | None) -> str | None:
    """Why times say little, where other processes took cores that our threads would have used."""
    cores = len(os.sched_getaffinity(0))
    if others is None or others <= CROWD or threads + others <= cores:
        return None
    return f"other processes used {others:.1f} of {cores} cores meanwhile"


def _algorithmic_bytes(task: Task, outputs: Sequence[Tensor]) -> float:
    """What must move at least: inputs, parameters and outputs once; twice where differentiated.

    A training step also writes and reads each gradient, and reads and writes each parameter.
    """
    kept = [*task.module.parameters(), *task.module.buffers()]
    width = 4 if task.autocast else torch.empty((), dtype=task.torch_dtype).element_size()
    weights = sum(p.numel() * (width if p.is_floating_point() else p.element_size()) for p in kept)
    data = sum(_size(t) for t in (*task.inputs, *outputs))
    return weights * {"bwd": 2, "train": 4}.get(task.mode, 1) + data * (1 + task.differentiates)


def _size(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
