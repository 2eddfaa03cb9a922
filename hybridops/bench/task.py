"""One thing to measure: what it computes, on which inputs, and how a candidate goes about it.

A task is a plain-torch module with its inputs and a mode. Peers get the module and make of it what
they can; ours is an op or an optimized copy. `fwd` and `infer` run forward without gradients; `bwd`
is forward and backward together; `train` adds a step of SGD (learning rate 0: the same work, and
the weights stay what they are).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .check import GRADIENT_LIMIT, OURS_LIMIT

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
OP_MODES, MODEL_MODES = ("fwd", "bwd"), ("infer", "train")

World = Callable[[], AbstractContextManager]
Draw = Callable[[int], list[Tensor]]


class Skip(Exception):
    """A candidate cannot take part here; the text says why and, where it helps, what to install."""


@dataclass
class Candidate:
    """run() is timed, inside world(); outcome() gives all results to compare, gradients included.

    The world is entered once a turn, not once a call: it would cost a small op microseconds.
    timer(calls) replaces the clock for a candidate that lives in another process.
    """

    name: str
    backend: str
    run: Callable[[], Any]
    outcome: Callable[[], list[Tensor]]
    world: World = nullcontext
    timer: Callable[[int], float] | None = None


@dataclass
class Task:
    """What every candidate has to compute, on `inputs`, which are changed in place for new draws.

    module holds fp32 parameters and means plain torch inside `world`; draw(seed) gives the inputs
    in fp32. autocast: mixed precision by torch.autocast instead of a cast of the parameters.
    """

    kind: str  # "op" or "model"
    name: str
    case: str
    dtype: str
    mode: str
    threads: int
    module: nn.Module
    draw: Draw
    ours: Callable[[Task], Candidate]
    batch: int | None = None
    layout: str = "contiguous"
    world: World = nullcontext
    work_share: float = 1.0
    repro: str = ""
    seed: int = 0
    label: str = "hybridops"  # what ours is called
    rehearsal: bool = False  # a dry run: peers take a quick way that proves the same call
    no_gradients: World = torch.inference_mode
    flop: float | None = None  # per call; None: counted in the module
    bytes_moved: float | None = None
    inputs: list[Tensor] = field(default_factory=list)
    dy: list[Tensor] = field(default_factory=list)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def on_gpu(self) -> bool:
        return any(x.is_cuda for x in self.inputs)

    @property
    def differentiates(self) -> bool:
        return self.mode in ("bwd", "train")

    @property
    def autocast(self) -> bool:
        """Training in 16 bits keeps fp32 parameters, as people do it."""
        return self.mode == "train" and self.dtype in ("bf16", "fp16")

    def limits(self, results: int, outputs: int) -> list[float]:
        """Allowed error over torch's own: outputs first, then gradients."""
        return [OURS_LIMIT] * outputs + [GRADIENT_LIMIT] * (results - outputs)

    def key(self) -> tuple:
        return (self.kind, self.name, self.case, self.dtype, self.mode, self.batch, self.threads)

    def set_inputs(self, seed: int) -> list[Tensor]:
        """Draw inputs into the tensors that the candidates hold; returns them in fp32."""
        drawn = self.draw(seed)
        cast = [self._cast(x) for x in drawn]
        if self.inputs:
            for held, x in zip(self.inputs, cast, strict=True):
                held.copy_(x)
        else:
            self.inputs = cast
        return drawn

    def _cast(self, x: Tensor) -> Tensor:
        if not x.is_floating_point() or self.autocast:
            return x
        y = torch.empty_like(x, dtype=self.torch_dtype)  # keeps the strides of dense layouts
        if y.stride() != x.stride():
            return x.to(self.torch_dtype)
        return y.copy_(x)

    def cast_module(self, module: nn.Module | None = None) -> nn.Module:
        """A copy of the module in the task's dtype."""
        copy = deepcopy(self.module if module is None else module)
        return copy if self.autocast else copy.to(self.torch_dtype)

    def candidate(
        self,
        name: str,
        module: nn.Module,
        backend: str = "torch",
        *,
        world: World | None = None,
        call: Callable[..., Any] | None = None,
        inputs: Sequence[Tensor] | None = None,
    ) -> Candidate:
        """A candidate that runs a torch module (or `call`, which stands for it) in this mode."""
        held = self.inputs if inputs is None else list(inputs)
        runner = _Runner(self, module, module if call is None else call, world or nullcontext, held)
        return Candidate(name, backend, runner.run, runner.outcome, runner.inside)

    def exact(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        """Every result in float64, and how many of them are outputs (gradients follow)."""
        module = deepcopy(self.module).double()
        if not self.differentiates:
            # torch's counter of FLOPs looks for the function behind whatever requires a gradient,
            # which a view of a parameter does without one
            module.requires_grad_(False)
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        runner = _Runner(self, module, module, self.world, wide, exact=True)
        results = runner.outcome()
        return results, runner.outputs


class _Runner:
    """Runs a module forward, forward and backward, or through a training step."""

    def __init__(self, task, module, call, world, inputs, exact=False):
        self.task, self.module, self.call, self.world, self.inputs = (
            task,
            module,
            call,
            world,
            inputs,
        )
        self.outputs = 0
        self.dtype = torch.float64 if exact else None
        self.cast = task.autocast and not exact
        self.weights: list[Tensor] = []
        if task.differentiates:
            module.train(task.mode == "train")
            self.weights = [p for p in module.parameters() if p.is_floating_point()]
        if task.mode == "train":
            self.optimizer = torch.optim.SGD(self.weights, lr=0.0)
        forward = partial(self.call, *self.inputs)
        self.run = {"bwd": self.backward, "train": self.step}.get(task.mode, forward)

    @contextmanager
    def inside(self) -> Iterator[None]:
        quiet = nullcontext if self.task.differentiates else self.task.no_gradients
        with self.world(), quiet():
            yield

    def backward(self) -> Any:
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in self.inputs]
        outputs = tensors(self.call(*leaves))
        wanted = [x for x in leaves if x.requires_grad] + self.weights
        for weight in self.weights:
            weight.grad = None
        torch.autograd.backward(outputs, self._dy(outputs))
        return outputs, [x.grad if x.grad is not None else torch.zeros_like(x) for x in wanted]

    def step(self) -> Any:
        device = self.inputs[0].device.type
        with torch.autocast(device, self.task.torch_dtype, enabled=self.cast):
            outputs = tensors(self.call(*self.inputs))
        sum(self._losses(outputs), torch.zeros(())).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return outputs

    def outcome(self) -> list[Tensor]:
        """The outputs and, where there are any, the gradients; of a model all in one vector."""
        with self.inside():
            return self._outcome()

    def _outcome(self) -> list[Tensor]:
        if self.task.mode == "train":
            grads: list[Tensor] = []
            hook = self.optimizer.register_step_pre_hook(
                lambda *_: grads.extend(
                    p.grad.detach().flatten().double()
                    if p.grad is not None
                    else torch.zeros(p.numel(), dtype=torch.float64, device=p.device)
                    for p in self.weights
                )
            )
            outputs = self.step()
            hook.remove()
            found = [torch.cat(grads)]
        elif self.task.mode == "bwd":
            outputs, gradients = self.backward()
            found = list(gradients)
        else:
            outputs, found = tensors(self.run()), []
        self.outputs = len(outputs)
        return [y.detach().clone() for y in (*outputs, *found)]

    def _dy(self, outputs: list[Tensor]) -> list[Tensor]:
        if not self.task.dy:
            generator = torch.Generator(outputs[0].device).manual_seed(self.task.seed + 1)
            options: Any = {"generator": generator, "device": generator.device}
            for y in outputs:
                values = torch.randn(y.shape, dtype=torch.float64, **options)
                self.task.dy.append(values.to(self.task.torch_dtype))
        return [dy.to(y.dtype) for dy, y in zip(self.task.dy, outputs, strict=True)]

    def _losses(self, outputs: list[Tensor]) -> Iterator[Tensor]:
        for y in outputs:
            if y.ndim == 2:  # logits
                labels = torch.arange(y.shape[0], device=y.device) % y.shape[1]
                yield F.cross_entropy(y if y.dtype == torch.float64 else y.float(), labels)
            else:
                yield y.square().mean()


def tensors(result: Any) -> list[Tensor]:
    """Every floating-point tensor of a result, however it is nested, in order."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    if hasattr(result, "to_tuple"):  # transformers
        result = result.to_tuple()
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, (list, tuple)):
        return [t for part in result for t in tensors(part)]
    if type(result).__module__ == "numpy":
        return [torch.from_numpy(result)]
    return []


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with that many threads while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
