"""verify(model, example): is every replaced layer as exact as the one it replaced?

On a copy whose gates are awake, each layer's inputs are captured from a run of the original model.
Then, layer by layer, both the replaced and the original layer are compared with the original in
float64:

    max|ours - ref| / rms(ref)  <=  2 max|torch - ref| / rms(ref)  +  4 eps

Every call also proves that it would notice: faults planted in the layers must fail, or the result
is MISTRUSTED.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import backend
from .fast import dotted
from .gates import fit_statistics, randomise_gates
from .report import aligned
from .swap import JOURNAL, replaced, restore

RATIO, FLOOR = 2.0, 4.0
FAULTS = 4  # tensors of a layer that get a planted fault, in turn


class VerificationError(AssertionError):
    """A replaced layer is less exact than the rule allows, or the check could not be trusted."""


@dataclass(frozen=True)
class Check:
    """One replaced layer: its error and torch's, against float64, relative to the output's rms."""

    fqn: str
    rule: str
    error: float
    eager: float
    allowed: float
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None and self.error <= self.allowed

    @property
    def ratio(self) -> float:
        return self.error / self.eager if self.eager else float(self.error > 0)


@dataclass(frozen=True)
class Verification:
    """The checks of all replaced layers; `missed` names the planted faults that went unnoticed."""

    checks: tuple[Check, ...]
    planted: int
    missed: tuple[str, ...]

    @property
    def trusted(self) -> bool:
        return self.planted > 0 and not self.missed

    @property
    def ok(self) -> bool:
        return self.trusted and bool(self.checks) and all(check.ok for check in self.checks)

    def __str__(self) -> str:
        rows = [["layer", "rule", "error", "torch's", "ratio", "result"]]
        for c in self.checks:
            result = "ok" if c.ok else c.problem or f"FAILED: {c.allowed:.1e} allowed"
            rows.append(
                [
                    c.fqn or "(model)",
                    c.rule,
                    f"{c.error:.1e}",
                    f"{c.eager:.1e}",
                    f"{c.ratio:.2f}",
                    result,
                ]
            )
        failed = sum(not c.ok for c in self.checks)
        verdict = "MISTRUSTED" if not self.trusted else "FAILED" if failed else "ok"
        summary = (
            f"{verdict}: {len(self.checks)} layers, {failed} failed; "
            f"{self.planted - len(self.missed)} of {self.planted} planted faults noticed"
        )
        return "\n".join(
            [*aligned(rows), "", summary, *(f"unnoticed: {name}" for name in self.missed)]
        )


def verify(model: nn.Module, example: Any, *, raises: bool = False, seed: int = 0) -> Verification:
    """Compare every layer that optimize() replaced with the original, on a copy of the model.

    example: an input of the model, or a tuple of its arguments, in its dtype. raises:
    VerificationError unless ok.
    Raises ValueError for a model without replaced layers, TypeError for one whose dtype is float64
    (there is nothing better to compare it with).
    """
    args = example if isinstance(example, tuple) else (example,)
    if not any(True for _ in replaced(model)):
        raise ValueError("verify: no layer of this model is replaced; call optimize(model) first")
    if any(p.dtype == torch.float64 for p in model.parameters()):
        raise TypeError(
            "verify: the reference is float64, so the model must be in a lower precision"
        )
    fast = copy.deepcopy(model).train().eval()  # train() also drops caches that timm keeps
    original = restore(copy.deepcopy(fast))
    randomise_gates(original, seed)
    fit_statistics(original, args, seed)
    original.train().eval()
    fast.load_state_dict(original.state_dict())
    exact = copy.deepcopy(original).double()
    calls = _capture(original, args, dict(replaced(fast)))
    checks, planted, missed, seen = [], 0, [], set()
    for fqn, module in replaced(fast):
        rule = dotted(type(module)).partition(":")[2]
        if fqn not in calls:
            checks.append(Check(fqn, rule, 0.0, 0.0, 0.0, "not run by this example"))
            continue
        args, kwargs = calls[fqn]
        call = _Call(module.overrides, args, kwargs)
        with backend.use("reference"):  # our own models' originals run as plain torch too
            eager = call.on(original.get_submodule(fqn))
            reference = call.doubled().on(exact.get_submodule(fqn))
        checks.append(Check(fqn, rule, *_compare(call.on(module), eager, reference)))
        if type(module) in seen:
            continue
        seen.add(type(module))
        for fault in _plant(module, seed):
            planted += 1
            error, _, allowed, problem = _compare(call.on(module), eager, reference)
            if problem is None and error <= allowed:
                missed.append(f"{fqn}.{fault}".lstrip("."))
    result = Verification(tuple(checks), planted, tuple(missed))
    if JOURNAL in model.__dict__:
        model.__dict__[JOURNAL].verification = result
    if raises and not result.ok:
        raise VerificationError(
            f"verify: the optimized model is not as exact as the original\n{result}"
        )
    return result


class _Call(NamedTuple):
    """A call of one method of a layer."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @torch.no_grad()
    def on(self, module: nn.Module) -> list[Tensor]:
        """The tensors that the call returns."""
        tree = getattr(module, self.method)(*self.args, **self.kwargs)
        return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]

    def doubled(self) -> _Call:
        """The call with its floating-point tensors in float64."""
        return _Call(self.method, *pytree.tree_map_only(Tensor, _double, (self.args, self.kwargs)))


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@torch.no_grad()
def _capture(
    model: nn.Module, args: tuple[Any, ...], layers: dict[str, Any]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """(args, kwargs) of the first call of each layer's method, in one run of the original model."""
    calls: dict[str, Any] = {}

    def recorded(fqn, method):
        def call(*args, **kwargs):
            if fqn not in calls:
                calls[fqn] = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            return method(*args, **kwargs)

        return call

    peers = {fqn: model.get_submodule(fqn) for fqn in layers}
    for fqn, peer in peers.items():
        name = layers[fqn].overrides
        peer.__dict__[name] = recorded(fqn, getattr(peer, name))
    try:
        model(*args)
    finally:
        for fqn, peer in peers.items():
            peer.__dict__.pop(layers[fqn].overrides, None)
    return calls


def _compare(ours, eager, reference) -> tuple[float, float, float, str | None]:
    """(our error, torch's, what is allowed, problem), of the worst tensor."""
    error = theirs = allowed = 0.0
    if len(ours) != len(eager):
        return error, theirs, allowed, f"returns {len(ours)} tensors in place of {len(eager)}"
    for y, e, r in zip(ours, eager, reference, strict=True):
        if (y.shape, y.dtype, y.device) != (e.shape, e.dtype, e.device):
            got, want = (f"{tuple(t.shape)} {t.dtype}" for t in (y, e))
            return error, theirs, allowed, f"returns {got} in place of {want}"
        if not torch.equal(y.isfinite(), e.isfinite()):
            return error, theirs, allowed, "has NaN or Inf where torch has none, or the reverse"
        if not y.is_floating_point() or not y.numel():
            continue
        size = r.square().mean().sqrt().item()
        if not size > 0:
            return error, theirs, allowed, "the output is zero, which proves nothing"
        ours_error = ((y.double() - r).abs().max() / size).item()
        eager_error = ((e.double() - r).abs().max() / size).item()
        limit = RATIO * eager_error + FLOOR * torch.finfo(y.dtype).eps
        if ours_error / limit >= error / (allowed or 1.0):
            error, theirs, allowed = ours_error, eager_error, limit
    return error, theirs, allowed, None


def _plant(module: Any, seed: int) -> Iterator[str]:
    """Disturb a few of the layer's tensors, one at a time; yields while the fault is in place."""
    own = [(name, t) for name, t in _own_tensors(module) if t.is_floating_point() and t.numel()]
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in own[:: max(1, -(-len(own) // FAULTS))]:
        size = min(
            1.0, 2.0**15 * torch.finfo(tensor.dtype).eps
        )  # fp32: 0.4 %, bf16: as large as itself
        healthy = tensor.detach().clone()
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        with torch.no_grad():
            tensor.add_(noise * healthy.square().mean().sqrt().clamp_min(0.1) * size)
        yield name
        with torch.no_grad():
            tensor.copy_(healthy)


def _own_tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """What the rule computes with: the layer's own tensors, and its bypassed children's."""
    bypassed = {id(m) for child in type(module).bypassed(module) for m in child.modules()}
    for prefix, part in module.named_modules():
        if part is module or id(part) in bypassed:
            for name, tensor in [
                *part.named_parameters(recurse=False),
                *part.named_buffers(recurse=False),
            ]:
                yield f"{prefix}.{name}".lstrip("."), tensor
