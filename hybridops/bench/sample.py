"""Timing candidates against each other: interleaved, warmed up, until the answer is sure enough.

In every round each candidate has one turn, in a new random order, so that whatever the machine
does meanwhile hits all of them. A turn is: wait until the process is idle, a few calls that do not
count (they wake the thread pool and bring the weights back into the caches), then calls for at
least two milliseconds.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import stats
from .clock import Clock, settle
from .task import Candidate

TURN_SECONDS = 2e-3
# Calls that do not count: behind another candidate's turn LeViT's first three calls took 1.35, 1.15
# and 1.05 times the later ones. Calls that last longer than this warm up by themselves.
UNCOUNTED, LONG_CALL = 3, 30e-3
LEAST_ROUNDS, MOST_ROUNDS = 15, 1000
_CHECK_EVERY = 5


@dataclass(frozen=True)
class Settings:
    """How long and how exactly to measure.

    Raises ValueError for times that are not positive or a noise bound outside (0, 1).
    """

    min_time: float = 0.5  # seconds of timed calls per candidate, at least
    max_noise: float = 0.02  # stop when every ratio's interval is within +- this
    timeout: float = 30.0  # seconds for all rounds of one comparison, warm-up not counted
    cache: str = "warm"  # or "cold": the caches are emptied before every call
    seed: int = 0
    least_rounds: int = LEAST_ROUNDS
    most_rounds: int = MOST_ROUNDS

    def __post_init__(self) -> None:
        for name in ("min_time", "timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.max_noise < 1:
            raise ValueError(f"max_noise must be between 0 and 1, got {self.max_noise}")
        if self.cache not in ("warm", "cold"):
            raise ValueError(f"cache must be warm or cold, got {self.cache!r}")


@dataclass
class Timings:
    """seconds per call of every candidate, one entry per round.

    others: how many cores' worth of work other processes did meanwhile; None where nobody knows.
    """

    seconds: dict[str, list[float]]
    others: float | None = None


def interleaved(
    candidates: Sequence[Candidate],
    clock: Clock,
    settings: Settings,
    flush: Callable[[], None] | None = None,
    progress: Callable[[float, str], None] = lambda done, text: None,
) -> Timings:
    """Time all candidates; the first one is compared with each other one.

    progress is told how much is done (0 to 1) and what is going on.
    """
    if not candidates:
        return Timings({})
    calls, uncounted = {}, {}
    for i, c in enumerate(candidates):
        progress(0.1 * i / len(candidates), f"warming up {c.name}")
        with c.world():
            once = _warm_up(c, clock)
        uncounted[c.name] = 1 if flush or once > LONG_CALL else UNCOUNTED
        calls[c.name] = 1 if flush else max(1, min(10_000, round(TURN_SECONDS / max(once, 1e-7))))
    seconds: dict[str, list[float]] = {c.name: [] for c in candidates}
    spent = dict.fromkeys(seconds, 0.0)
    order, shuffle = list(candidates), random.Random(settings.seed).shuffle
    start, busy = time.perf_counter(), _busy_elsewhere()
    for done in range(1, settings.most_rounds + 1):
        shuffle(order)
        for c in order:
            settle()
            with c.world():
                for _ in range(uncounted[c.name]):
                    c.run()
                mean = _time(c, clock, calls[c.name], flush)
            seconds[c.name].append(mean)
            spent[c.name] += mean * calls[c.name]
        elapsed = time.perf_counter() - start
        noise = None
        if done >= settings.least_rounds and min(spent.values()) >= settings.min_time:
            noise = _noise(seconds) if done % _CHECK_EVERY == 0 else None
            if noise is not None and noise <= settings.max_noise:
                break
        if elapsed >= settings.timeout and done >= 3:
            break
        share = max(elapsed / settings.timeout, done / settings.most_rounds)
        sure = f", within {noise:.1%}" if noise else ""
        progress(0.1 + 0.9 * share, f"round {done}{sure}")
    now = _busy_elsewhere()
    if busy is None or now is None or any(c.timer for c in candidates):
        return Timings(seconds)
    return Timings(seconds, max(0.0, now - busy) / (time.perf_counter() - start))


def _busy_elsewhere() -> float | None:
    """CPU seconds spent since boot outside this process, stolen time of a virtual machine too."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq, steal, *_ = map(
                int, file.readline().split()[1:]
            )
    except (OSError, ValueError):
        return None
    total = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return total - time.process_time()


def _time(c: Candidate, clock: Clock, calls: int, flush: Callable[[], None] | None) -> float:
    return c.timer(calls) if c.timer else clock.time(c.run, calls, flush)


def _warm_up(c: Candidate, clock: Clock, longest: float = 3.0) -> float:
    """Call until three calls are no faster than the three before; their median, in seconds."""
    start, last = time.perf_counter(), float("inf")
    while True:
        now = sorted(_time(c, clock, 1, None) for _ in range(3))[1]
        if now > 0.95 * last or time.perf_counter() - start > longest:
            return min(now, last)
        last = now


def _noise(seconds: dict[str, list[float]]) -> float:
    """The widest of the intervals, first candidate against each other one."""
    (_, ours), *peers = seconds.items()
    if not peers:  # nothing to compare with: how well the median itself is known
        return stats.ratio(ours, [1.0] * len(ours), resamples=200).noise
    return max(stats.ratio(theirs, ours, resamples=200).noise for _, theirs in peers)
