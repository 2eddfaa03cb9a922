"""One entry on the GPU at hand: is a configuration right, and how long does its kernel take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..bench import measure
from ..bench.op_task import op_task
from ..bench.task import Skip
from ..kernels import tuned
from . import work
from .search import Config, Entry

LAUNCHES, BATCH = 30, 8


class Trial:
    """An entry's case, run through Triton with one configuration in place of the table's.

    clock(launch) gives the seconds of one launch; tests have no GPU and bring their own.
    """

    def __init__(
        self,
        entry: Entry,
        call: work.Call,
        device: str = "cuda",
        batch: int = BATCH,
        clock: Callable[[Callable[[], Any]], float] | None = None,
    ):
        case, dtype = work.case(call, batch)
        name = {"bfloat16": "bf16", "float32": "fp32"}[str(dtype).removeprefix("torch.")]
        self.entry, self.clock = entry, clock or Events()
        self.task = op_task(case, name, "bwd", backend="triton", device=device)

    def right(self, config: Config) -> str | None:
        """None, or why the case fails the error rule of the benchmark with this configuration."""
        with self._instead(config):
            try:
                measure.checked(self.task)
            except (measure.Wrong, Skip) as why:
                return str(why)
            except Exception as error:  # what Triton or the driver refuses
                return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return None

    def seconds(self, config: Config) -> float:
        """The median of the entry's own launches, each with a cold cache; a call's launches of it
        are added up."""
        with self._instead(config), self._timed() as times:
            candidate = self.task.ours(self.task)
            with candidate.world():
                candidate.run()
                times.clear()
                for _ in range(LAUNCHES):
                    times.append(0.0)
                    candidate.run()
        return statistics.median(times)

    @contextmanager
    def _instead(self, config: Config) -> Iterator[None]:
        kernel, kind, largest = self.entry
        usual, self.due = tuned.config, False

        def instead(asked, x, width):
            if asked != kernel:
                return usual(asked, x, width)
            x_kind = "half" if x.element_size() == 2 else "float32"
            arch = tuned.architecture(x.device)
            if (x_kind, tuned.row(kernel, x_kind, width, arch)[0]) != (kind, largest):
                return usual(asked, x, width)
            self.due = True
            return config | tuned.FUSED

        tuned.config = instead
        try:
            yield
        finally:
            tuned.config = usual

    @contextmanager
    def _timed(self) -> Iterator[list[float]]:
        """Times the launches that follow our entry, and lets all others pass."""
        from triton.runtime.jit import KernelInterface

        times: list[float] = [0.0]
        usual = KernelInterface.__getitem__

        def getitem(kernel, grid):
            launch = usual(kernel, grid)

            def timed(*arguments, **options):
                if not (self.due and "num_warps" in options):
                    return launch(*arguments, **options)
                self.due = False
                times[-1] += self.clock(lambda: launch(*arguments, **options))
                return None

            return timed

        KernelInterface.__getitem__ = getitem
        try:
            yield times
        finally:
            KernelInterface.__getitem__ = usual


class Events:
    """Between two events on the GPU, the caches flushed before. Written without a GPU at hand."""

    def __init__(self) -> None:
        import torch

        from ..bench.clock import CudaEvents, Flush

        self.events, self.flush = CudaEvents(), Flush(torch.device("cuda"))

    def __call__(self, launch: Callable[[], Any]) -> float:
        return self.events.time(launch, 1, self.flush)
