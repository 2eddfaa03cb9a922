"""Parity: how exact every class that we serve is, forward and backward, inside small real models.

Forward, as verify() measures it: each layer that optimize() replaced, on the inputs it has in its
model, against the original in float64. Backward: the layers that optimize(mode="train") replaced,
while training, gradients of all inputs and parameters. Our own modules are compared with their
plain torch meaning. Per class the worst is kept: the error nearest to what the rule allows,

    forward  2 e(torch) + 4 eps        backward  3 e(torch) + 12 eps
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hybridops

from .. import backend
from ..optimize import folded, optimize, verify
from ..optimize.explain import create
from ..optimize.fast import Fast, dotted
from ..optimize.gates import fit_statistics, randomise_gates
from ..optimize.measure import Call, ChannelsLast, capture
from ..optimize.rules import RULES
from ..optimize.shapes import SHAPES, Shaped
from ..optimize.swap import replaced, restore
from .model_task import without_dropout
from .parity_models import MODELS, Small

SAMPLES = 8  # inputs on which a layer that fails is measured
EACH = 2  # layers of one class that are measured, per model
_SPACES = {"torch": nn, "nn": hybridops.nn}
_WITHOUT = {
    "hybridops.nn.block:DropPath": "random while training, the identity otherwise; plain torch both"
}
_SHAPED = {  # rule -> what stands in place of a path
    f"hybridops.optimize.{shape.rule}": f"{shape.what} {name}"
    for name, shapes in SHAPES.items()
    for shape in shapes
}
_FOLDED = {  # the same, of classes that packages have
    f"{folded.__name__}:FastFoldedSequential": "Sequential with a norm to fold",
    f"{folded.__name__}:FastConv2dNormActivation": folded.CONV_NORM_ACTIVATION,
}
_AUTHORS = "the authors' own code, which no package has: --models FILE measures a copy"


@dataclass
class Worst:
    """The error nearest to its limit, of ours and of torch's own, relative to the exact rms."""

    error: float = 0.0
    torchs: float = 0.0
    allowed: float = 0.0
    where: str = ""
    problem: str | None = None

    @property
    def share(self) -> float:
        """Of what is allowed; above 1 the rule is broken."""
        if self.problem is not None:
            return float("inf")
        return self.error / self.allowed if self.allowed else 0.0

    @property
    def ratio(self) -> float:
        """To torch's own error."""
        return self.error / self.torchs if self.torchs else float(self.error > 0)


@dataclass
class Entry:
    """One class: the rule that serves it ("" for our own), and what was seen of it."""

    path: str
    rule: str = ""
    models: list[str] = field(default_factory=list)
    forward: Worst | None = None
    backward: Worst | None = None
    reasons: list[str] = field(default_factory=list)  # why layers of it were left alone
    without: str = "not covered"  # why there is no number

    @property
    def status(self) -> str:
        found = [w for w in (self.forward, self.backward) if w is not None]
        if any(w.share > 1 for w in found):
            return "FAILED"
        if found:
            return "ok"
        return f"left alone: {self.reasons[0]}" if self.reasons else self.without


@dataclass
class Table:
    entries: dict[str, Entry]
    unbuilt: dict[str, str] = field(default_factory=dict)  # model -> why it could not be measured

    @property
    def ok(self) -> bool:
        return not self.unbuilt and all(e.status != "FAILED" for e in self.entries.values())

    def as_json(self) -> dict[str, Any]:
        rows = [{**asdict(e), "status": e.status} for e in self.entries.values()]
        return {"torch": torch.__version__, "isa": backend.ISA, "classes": rows} | {
            "models": [m.name for m in MODELS],
            "unbuilt": self.unbuilt,
        }


def parity(
    models: Sequence[Small] = tuple(MODELS),
    progress: Callable[[str], None] = lambda name: None,
) -> Table:
    """Measure every class that the models are made of; progress is told each model's name."""
    table = Table({path: Entry(path, _name(rule)) for path, rule in RULES.items()})
    for rule, path in _SHAPED.items():
        table.entries[path] = Entry(path, rule.rpartition(":")[2], without=_AUTHORS)
    for rule, path in _FOLDED.items():
        table.entries[path] = Entry(path, rule.rpartition(":")[2])
    for cls in _own_classes():
        table.entries.setdefault(dotted(cls), Entry(dotted(cls)))
    for path, why in _WITHOUT.items():
        table.entries[path].without = why
    for small in models:
        progress(small.name)
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _measure(table, small)
        except Exception as error:  # any library's own; the table says which model is missing
            words = str(error).strip().splitlines() or [""]
            table.unbuilt[small.name] = f"{type(error).__name__}: {words[0][:200]}"
    return table


def build(small: Small) -> nn.Module:
    """The model in eval mode with random weights. Raises whatever its library does."""
    torch.manual_seed(0)
    if small.make is not None:
        return small.make().eval()
    source, _, name = small.name.partition(":")
    if source == "torchvision":
        torchvision = hybridops.compat.import_torchvision()
        cls = getattr(torchvision.models, name, None)
        if isinstance(cls, type):
            return cls(**small.options).eval()
        return torchvision.models.get_model(name, weights=None, **small.options).eval()
    if source in _SPACES:
        return getattr(_SPACES[source], name)(**small.options).eval()
    return create(small.name, **small.options).eval()


def _name(rule: str | type[Fast]) -> str:
    return rule.rpartition(":")[2] if isinstance(rule, str) else rule.__name__


def _path(rule: Any) -> str:
    """The entry of a replaced layer's class."""
    if issubclass(rule, Shaped):
        return (_SHAPED | _FOLDED)[dotted(rule.base)]
    return dotted(rule.replaces)


def _own_classes() -> Iterator[type[nn.Module]]:
    for space in (hybridops.nn, hybridops.models):
        for name in space.__all__:
            cls = getattr(space, name)
            if isinstance(cls, type) and issubclass(cls, nn.Module):
                yield cls


def _measure(table: Table, small: Small) -> None:
    model = without_dropout(build(small))
    args = small.arguments()
    fast = optimize(copy.deepcopy(model), strict=False)
    names = {fqn: _path(type(m)) for fqn, m in replaced(fast)}
    if names:
        for check in verify(fast, args).checks:
            e = check.errors
            problem = None if e.problem == "not run by this example" else e.problem
            if problem is None and e.problem is not None:
                continue
            where = f"{small.name} {check.fqn}".rstrip()
            worst = Worst(e.ours, e.torchs, e.allowed, where, problem)
            _keep(table, names[check.fqn], "forward", small, worst)
    for layer in hybridops.report(fast).layers if names else ():
        entry = table.entries.get(layer.old)
        if entry is not None and layer.reason:
            entry.reasons.append(layer.reason)
    _awaken(model, args)
    _own_modules(table, small, model, args)
    _training(table, small, model, args)


def _awaken(model: nn.Module, args: tuple[Any, ...]) -> None:
    randomise_gates(model, 0)
    fit_statistics(model, args, 0)
    model.train().eval()


def _own_modules(table: Table, small: Small, model: nn.Module, args: tuple[Any, ...]) -> None:
    """Our modules, as they are, against their meaning in plain torch."""
    found = {fqn: m for fqn, m in _few(model) if dotted(type(m)) in table.entries}
    ours = {fqn: m for fqn, m in found.items() if type(m).__module__.startswith("hybridops.")}
    if not ours:
        return
    exact = copy.deepcopy(model).double()
    with backend.use("reference"):
        calls = capture(model, args, dict.fromkeys(ours, Fast()))
    for fqn, call in calls.items():
        layers = (ours[fqn], ours[fqn], exact.get_submodule(fqn))
        where = f"{small.name} {fqn}".rstrip()
        for side in ("forward", "backward"):
            worst = _worst(call, layers, side == "backward", where)
            _keep(table, dotted(type(ours[fqn])), side, small, worst)


def _training(table: Table, small: Small, model: nn.Module, args: tuple[Any, ...]) -> None:
    """Layers that optimize(mode="train") replaced, while the model trains."""
    fast = optimize(copy.deepcopy(model), "train", strict=False)
    layers = {fqn: m for fqn, m in _few(fast) if isinstance(m, Fast)}
    if not layers:
        return
    original = restore(copy.deepcopy(fast)).train()
    exact = copy.deepcopy(original).double()
    fast.train()
    calls = capture(copy.deepcopy(original), args, layers)
    for fqn, call in calls.items():
        own = type(layers[fqn]).torchs_own(original.get_submodule(fqn))
        trio = (layers[fqn], own, exact.get_submodule(fqn))
        worst = _worst(call, trio, True, f"{small.name} {fqn}".rstrip())
        _keep(table, _path(type(layers[fqn])), "backward", small, worst)


def _few(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: dict[type, int] = {}
    for fqn, module in model.named_modules():
        seen[type(module)] = seen.get(type(module), 0) + 1
        if seen[type(module)] <= EACH:
            yield fqn, module


def _keep(table: Table, path: str, side: str, small: Small, worst: Worst | None) -> None:
    entry = table.entries.get(path)
    if entry is None or worst is None:
        return
    if small.name not in entry.models:
        entry.models.append(small.name)
    kept = getattr(entry, side)
    if kept is None or worst.share > kept.share:
        setattr(entry, side, worst)


Layers = tuple[Any, nn.Module, nn.Module]  # ours, torch's in the same dtype, torch's in float64


def _worst(call: Call, layers: Layers, backward: bool, where: str) -> Worst | None:
    """The result nearest to its limit; None where the call has nothing to differentiate.

    Where one breaks the rule, all are measured on more inputs: for each the unluckiest of ours
    against the unluckiest of torch's.
    """
    generator = torch.Generator().manual_seed(0)
    found = _compare(call, layers, backward, where)
    for _ in range(SAMPLES - 1):
        if all(w.share <= 1 for w in found) or any(w.problem for w in found):
            break
        again = _compare(call.jittered(generator), layers, backward, where)
        if len(again) != len(found):
            return Worst(where=where, problem="results differ from input to input")
        for w, other in zip(found, again, strict=True):
            w.error, w.torchs = max(w.error, other.error), max(w.torchs, other.torchs)
            w.allowed, w.problem = max(w.allowed, other.allowed), w.problem or other.problem
    return max(found, key=lambda w: w.share, default=None)


def _compare(call: Call, layers: Layers, backward: bool, where: str) -> list[Worst]:
    """One for each result."""
    ours, own, exact = layers
    run = _gradients if backward else _outputs
    mine = run(call, ours)
    packed = isinstance(ours, Fast) and ours.channels_last and torch.backends.mkldnn.is_available()
    with backend.use("reference"):
        with ChannelsLast() if packed and not backward else nullcontext():
            theirs = run(call, own)
        truth = run(call.doubled(), exact)
    if set(mine) != set(theirs):
        odd = ", ".join(sorted(set(mine) ^ set(theirs))[:3])
        return [Worst(where=where, problem=f"results differ: {odd}")]
    factor, floor = (3, 12) if backward else (2, 4)
    scale = max((_rms(t) for t in truth.values()), default=0.0)
    found = []
    for name, y in mine.items():
        now = Worst(where=f"{where} {name}")
        found.append(now)
        if y.shape != theirs[name].shape or not torch.equal(y.isfinite(), theirs[name].isfinite()):
            now.problem = "other shape, or NaN elsewhere"
            continue
        size = _rms(truth[name])
        size = size if size > 1e-9 * scale else scale  # zero by cancellation: only rounding
        if y.numel() and size > 0:
            errors = ((z.double() - truth[name]).abs().max() for z in (y, theirs[name]))
            now.error, now.torchs = (float(e) / size for e in errors)
            now.allowed = factor * now.torchs + floor * torch.finfo(y.dtype).eps
    return found


def _outputs(call: Call, module: nn.Module) -> dict[str, Tensor]:
    return {f"output {i}": y for i, y in enumerate(call.on(module)) if y.is_floating_point()}


def _gradients(call: Call, module: nn.Module) -> dict[str, Tensor]:
    """Of every floating-point input and parameter, for one gradient of all outputs."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_() if x.is_floating_point() else x

    args, kwargs = pytree.tree_map_only(Tensor, leaf, (call.args, call.kwargs))
    inputs = [x for x in pytree.tree_leaves((args, kwargs)) if _differentiable(x)]
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    leaves = [(f"d{n}", p) for n, p in named] + [(f"dx{i}", x) for i, x in enumerate(inputs)]
    with torch.enable_grad():
        tree = getattr(module, call.method)(*args, **kwargs)
        outputs = [y for y in pytree.tree_leaves(tree) if _differentiable(y)]
        generator = torch.Generator().manual_seed(1)
        dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
        if not outputs or not leaves:
            return {}
        grads = torch.autograd.grad(outputs, [t for _, t in leaves], dys, allow_unused=True)
    return {n: g for (n, _), g in zip(leaves, grads, strict=True) if g is not None}


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0
