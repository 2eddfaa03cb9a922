"""How a call is timed: wall clock on the CPU, events on a GPU; what happens between the calls.

Two things spoil a comparison in one process. Thread pools (libgomp, onnxruntime's) go on spinning
for milliseconds after a call and take a core from whoever comes next: `settle` waits for them. And
a cache that still holds the last call's data flatters it: `Flush` empties it where that is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

_IDLE = 0.15  # of one core: the process counts as idle below that
_LONGEST_SETTLE = 0.05


class Clock(Protocol):
    name: str

    def time(self, run: Callable[[], Any], calls: int, before: Callable[[], None] | None) -> float:
        """Mean seconds of `calls` finished calls; `before` runs ahead of each, untimed."""
        ...


class Wall:
    """The time until a call returns. Right for anything that is done when it returns."""

    name = "wall"

    def time(self, run, calls, before=None) -> float:
        if before is None:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) / calls
        total = 0.0
        for _ in range(calls):
            before()
            start = time.perf_counter()
            run()
            total += time.perf_counter() - start
        return total / calls


class CudaEvents:
    """Time on the GPU between two events in the current stream. Written without a GPU at hand.

    For an op the GPU sleeps first, so that what Python needs to launch everything is over when it
    begins: the time is that of kernels which follow each other, as in a captured graph. A whole
    model's launches are part of its time, as they are for whoever runs it; what a graph saves of
    them shows.
    """

    name = "cuda-events"
    SLEEP_CYCLES = 2_000_000  # about a millisecond

    def __init__(self, sleeps: bool = True) -> None:
        self.sleeps = sleeps

    def time(self, run, calls, before=None) -> float:
        pairs = []
        for _ in range(calls):
            if before is not None:
                before()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            if self.sleeps:
                torch.cuda._sleep(self.SLEEP_CYCLES)
            pair[0].record()
            run()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) * 1e-3 / calls


def clock_for(device: torch.device, kind: str = "op") -> Clock:
    return CudaEvents(sleeps=kind == "op") if device.type == "cuda" else Wall()


def settle() -> None:
    """Return when this process burns no CPU any more, after 50 ms at the latest."""
    give_up = time.perf_counter() + _LONGEST_SETTLE
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(0.001)
        now = time.perf_counter()
        if time.process_time() - cpu < _IDLE * (now - wall) or now > give_up:
            return


class Flush:
    """Writes a buffer larger than the last cache, so that what was there before is gone."""

    def __init__(self, device: torch.device, last_cache: int | None = None):
        if device.type == "cuda":
            last_cache = torch.cuda.get_device_properties(device).L2_cache_size
        size = max(2 * (last_cache or 0), 1 << 26)
        self.buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        self.buffer.add_(1)
