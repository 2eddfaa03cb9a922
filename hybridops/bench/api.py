"""hybridops.bench.compare: your own kernel against others, held to the same rules as ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import clock, environment, result, table
from .measure import measure
from .result import Row
from .sample import Settings
from .task import DTYPES, Candidate, Task

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Result:
    """The rows of one comparison; printing it prints the table."""

    rows: list[Row]

    @property
    def ok(self) -> bool:
        """Whether nothing is FAILED, MISTRUSTED or INVALID."""
        return result.exit_code(self.rows) == 0

    def document(self) -> dict:
        env = environment.environment(tuple({row.threads for row in self.rows}))
        return result.document(env, self.rows)

    def save(self, path: str | Path) -> None:
        """Write the JSON document that `hybridops bench compare` and `report` read."""
        result.write_json(self.document(), Path(path))

    def report(self, path: str | Path) -> None:
        """Write the HTML report."""
        from .report import report_html

        Path(path).write_text(report_html([self.document()]), encoding="utf-8")

    def __str__(self) -> str:
        return table.table(self.rows)


def compare(
    candidates: Mapping[str, Callable[..., Any]],
    inputs: Sequence[Tensor],
    *,
    reference: Callable[..., Any],
    name: str = "custom",
    case: str | None = None,
    gradients: bool = False,
    flop: float | None = None,
    bytes_moved: float | None = None,
    threads: int | None = None,
    timer: clock.Clock | None = None,
    min_time: float = Settings.min_time,
    max_noise: float = Settings.max_noise,
    timeout: float = Settings.timeout,
    cache: str = "warm",
    seed: int = 0,
) -> Result:
    """Check, then time, functions of the same inputs against each other, interleaved.

    candidates: label -> function (or nn.Module) of *inputs; the first one is yours and is compared
        with each other one. It must be as right as torch: its error against float64 at most twice
        (gradients: three times) that of `reference` in the inputs' dtype.
    inputs: tensors, which are copied. For the check on fresh inputs their values are shuffled.
    reference: the meaning, in plain torch; also runs in float64. nn.Modules are cast.
    gradients: forward and backward, compared by the gradients of all floating-point inputs.
    flop, bytes_moved: per call, for the roof; by default counted in the reference, and the size of
        inputs and results.
    threads: of torch while this runs. timer: see hybridops.bench.clock.
    min_time, timeout: seconds; max_noise: the interval's half-width to stop at.

    Raises ValueError for no candidates, no inputs or settings out of range, TypeError for inputs
    that are not tensors. What a candidate raises while it is checked is raised if it is the first.
    """
    if not candidates:
        raise ValueError("compare: at least one candidate is needed")
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TypeError(f"compare: inputs must be tensors, input {i} is {type(x).__name__}")
    floating = [x for x in inputs if x.is_floating_point()]
    if not floating:
        raise ValueError("compare: at least one input must be a floating-point tensor")
    first, *others = candidates.items()
    task = _FunctionTask(
        kind="op",
        name=name,
        case=case or "x".join(map(str, floating[0].shape)),
        dtype=_DTYPE_NAMES.get(floating[0].dtype, str(floating[0].dtype)),
        mode="bwd" if gradients else "fwd",
        threads=threads or torch.get_num_threads(),
        module=_Function(reference),
        draw=lambda seed: [],
        ours=lambda task: task.candidate(first[0], _Function(first[1]), ""),
        label=first[0],
        repro=" ".join(["python", *sys.argv]),
        seed=seed,
        no_gradients=torch.no_grad,  # inference tensors would surprise threads and graphs of yours
        flop=flop,
        bytes_moved=bytes_moved,
    )
    task.given = [x.detach().clone() for x in inputs]
    settings = Settings(min_time, max_noise, timeout, cache, seed)
    builders = {label: _builder(label, function) for label, function in others}
    return Result(measure(task, builders, settings, timer=timer))


def _builder(label: str, function: Callable) -> Callable[[Task], Candidate]:
    return lambda task: task.candidate(label, _Function(function), "")


class _Function(nn.Module):
    """A function, or a module, as a module."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


class _FunctionTask(Task):
    """Inputs are given, in dtypes of their own; new ones are the same values in another order."""

    given: list[Tensor]

    def set_inputs(self, seed: int) -> list[Tensor]:
        if not self.inputs:
            self.inputs = [x.clone() for x in self.given]
            return self.given
        generator = torch.Generator().manual_seed(seed)
        for held, x in zip(self.inputs, self.given, strict=True):
            if x.is_floating_point():
                order = torch.randperm(x.numel(), generator=generator).to(x.device)
                held.copy_(x.flatten()[order].view(x.shape))
        return [x.clone() for x in self.inputs]
