"""An untouched model against its optimized copy: time side by side, error against float64."""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

import hybridops

from ..bench.clock import Wall
from ..bench.plain import plain_torch
from ..bench.sample import Settings, interleaved
from ..bench.task import Candidate
from . import UserError

SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 3.0, 15, 1000


@dataclass
class Comparison:
    """Times in ms per call, errors as max |x - float64| / rms(float64) over all logits."""

    eager_ms: list[float]
    optimized_ms: list[float]
    eager_error: float
    optimized_error: float
    error_limit: float
    top5_shared: int  # of the top-5 classes of all images, how many both name
    top5_total: int
    top1: list[int]  # the optimized model's first class per image

    @property
    def eager(self) -> float:
        return statistics.median(self.eager_ms)

    @property
    def optimized(self) -> float:
        return statistics.median(self.optimized_ms)

    @property
    def speedup(self) -> float:
        return self.eager / self.optimized

    @property
    def within_rule(self) -> bool:
        return self.optimized_error <= self.error_limit  # False for NaN too

    def figures(self) -> dict:
        """All of it as plain data, medians and verdict included."""
        derived = {
            "eager_median_ms": self.eager,
            "optimized_median_ms": self.optimized,
            "speedup": self.speedup,
            "within_rule": self.within_rule,
        }
        return derived | asdict(self)


def compare(
    model: nn.Module,
    batches: list[Tensor],
    *,
    ours: bool = False,
    rounds: int | None = None,
    quick: bool = False,
    freeze: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Comparison, nn.Module]:
    """Compare `model`, which stays as it is, with an optimized copy; returns that copy too.

    ours: the model is built from hybridops' own modules, so eager means plain torch in them.
    freeze: as for optimize().
    rounds: default as many as fit into about 3 s, at least 15.
    """
    eager_world = plain_torch if ours else nullcontext
    say("optimizing")
    with warnings.catch_warnings():
        if ours:  # fast as they are: that optimize() finds nothing to replace is no news
            warnings.simplefilter("ignore")
        optimized = hybridops.optimize(deepcopy(model), freeze=freeze, strict=not ours)
    say("computing in float64")
    with torch.inference_mode():
        with eager_world():
            twin = deepcopy(model).double()
            exact = torch.cat([_logits(twin, x.double()) for x in batches])
            del twin
            torchs = torch.cat([_logits(model, x) for x in batches])
        mine = torch.cat([_logits(optimized, x) for x in batches])
        eager_ms, optimized_ms = _time(model, optimized, batches, eager_world, rounds, quick, say)
    eager_error, optimized_error = _error(torchs, exact), _error(mine, exact)
    k = min(5, exact.shape[1])
    pairs = zip(mine.topk(k).indices.tolist(), torchs.topk(k).indices.tolist(), strict=True)
    result = Comparison(
        eager_ms,
        optimized_ms,
        eager_error,
        optimized_error,
        2 * eager_error + 4 * torch.finfo(model_dtype(model)).eps,
        sum(len(set(a) & set(b)) for a, b in pairs),
        k * exact.shape[0],
        mine.argmax(1).tolist(),
    )
    return result, optimized


def model_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def thread_count() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count != 1)}"


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    if not isinstance(y, Tensor) or y.ndim != 2:
        raise UserError("the model does not give one row of class scores per image")
    return y


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).abs().max() / exact.square().mean().sqrt())


def _time(
    eager: nn.Module,
    optimized: nn.Module,
    batches: list[Tensor],
    eager_world: Callable[[], AbstractContextManager],
    rounds: int | None,
    quick: bool,
    say: Callable[[str], None],
) -> tuple[list[float], list[float]]:
    """Milliseconds per call, both sides in turn within each round, so that drift hits both."""

    def side(name: str, model: nn.Module, world: Callable[[], AbstractContextManager]) -> Candidate:
        images = itertools.cycle(batches)
        return Candidate(name, "", lambda: model(next(images)), list, world)

    least = rounds or (3 if quick else LEAST_ROUNDS)
    settings = Settings(
        min_time=SECONDS / 2,
        timeout=4 * SECONDS,
        least_rounds=least,
        most_rounds=least if rounds or quick else MOST_ROUNDS,
    )
    timings = interleaved(
        [side("eager", eager, eager_world), side("optimized", optimized, nullcontext)],
        Wall(),
        settings,
        progress=lambda share, text: say(f"timing, {text}"),
    )
    first, second = ([1e3 * s for s in timings.seconds[n]] for n in ("eager", "optimized"))
    return first, second
