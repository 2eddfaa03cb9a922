"""verify(model, example): is every replaced layer as exact as the one it replaced?

On a copy whose gates are awake, each layer's inputs are captured from a run of the original model.
Then, layer by layer, both the replaced and the original layer are compared with the original in
float64:

    max|ours - ref| / rms(ref)  <=  2 max|torch - ref| / rms(ref)  +  4 eps

and the same for the root mean square of the errors. The largest error of an attention with sharp
scores is that of its unluckiest row, so a layer that fails is measured on more inputs, and the
worst of ours compared with the worst of torch's.

Every call also proves that it would notice: faults planted in the layers must fail, or the result
is MISTRUSTED. Where a layer's own input hides one, as equal tokens hide which of them attention
takes, the layer is measured on input with noise added too, which it must pass and the fault not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backend
from .fast import dotted
from .gates import fit_statistics, randomise_gates
from .measure import Call, ChannelsLast, Errors, capture, compare, plant
from .plan import PLAN
from .report import aligned
from .swap import JOURNAL, replaced, restore

SAMPLES = 8  # inputs on which a layer that fails is measured


class VerificationError(AssertionError):
    """A replaced layer is less exact than the rule allows, or the check could not be trusted."""


@dataclass(frozen=True)
class Check:
    """One replaced layer: its error and torch's, against float64, relative to the output's rms."""

    fqn: str
    rule: str
    errors: Errors

    @property
    def ok(self) -> bool:
        return self.errors.ok

    @property
    def error(self) -> float:
        return self.errors.ours

    @property
    def eager(self) -> float:
        return self.errors.torchs

    @property
    def ratio(self) -> float:
        return self.error / self.eager if self.eager else float(self.error > 0)

    @property
    def problem(self) -> str | None:
        if self.ok:
            return None
        return self.errors.problem or f"FAILED: {self.errors.allowed:.1e} allowed"


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
            numbers = [f"{c.error:.1e}", f"{c.eager:.1e}", f"{c.ratio:.2f}"]
            rows.append([c.fqn or "(model)", c.rule, *numbers, c.problem or "ok"])
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

    example, in the model's dtype: an input of the model, a tuple of its arguments, or a mapping of
    its keyword arguments, as transformers' processors return them (a model whose one argument is a
    mapping takes it in a tuple). raises: VerificationError unless ok.
    Raises ValueError for a model without replaced layers, TypeError for one whose dtype is float64
    (there is nothing better to compare it with).
    """
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    args = () if kwargs else example if isinstance(example, tuple) else (example,)
    if not any(True for _ in replaced(model)):
        raise ValueError("verify: no layer of this model is replaced; call optimize(model) first")
    if any(p.dtype == torch.float64 for p in model.parameters()):
        raise TypeError(
            "verify: the reference is float64, so the model must be in a lower precision"
        )
    fast = copy.deepcopy(model)
    for _, module in replaced(fast):
        module.__dict__[PLAN].frozen = False  # or a planted fault would not be seen
    _drop_caches(fast)
    original = restore(copy.deepcopy(fast))
    randomise_gates(original, seed)
    fit_statistics(original, args, seed, **kwargs)
    _drop_caches(original)
    fast.load_state_dict(original.state_dict())
    exact = copy.deepcopy(original).double()
    calls = capture(original, args, dict(replaced(fast)), **kwargs)
    generator = torch.Generator().manual_seed(seed)
    checks, planted, proven = [], 0, set()
    missed: dict[type, list[str]] = {}
    for fqn, module in replaced(fast):
        rule = dotted(type(module)).partition(":")[2]
        if fqn not in calls:
            checks.append(Check(fqn, rule, Errors(problem="not run by this example")))
            continue
        own = type(module).torchs_own(original.get_submodule(fqn))
        layers = module, own, exact.get_submodule(fqn)
        sight = _look(calls[fqn], layers, generator)
        rule_class = type(module)
        if rule_class not in proven:
            faults, hidden = _hidden(module, sight, seed)
            if hidden:  # by what it is given here; then it is held to the rule on other input too
                stirred = _look(calls[fqn].stirred(generator), layers, generator)
                hidden &= _hidden(module, stirred, seed)[1]
                sight = sight if stirred.errors.ok else stirred
            planted += faults
            missed[rule_class] = [f"{fqn}.{fault}".lstrip(".") for fault in sorted(hidden)]
            if not hidden:  # else the next layer of the class is tried
                proven.add(rule_class)
        checks.append(Check(fqn, rule, sight.errors))
    unnoticed = tuple(name for names in missed.values() for name in names)
    result = Verification(tuple(checks), planted, unnoticed)
    if JOURNAL in model.__dict__:
        model.__dict__[JOURNAL].verification = result
    if raises and not result.ok:
        raise VerificationError(
            f"verify: the optimized model is not as exact as the original\n{result}"
        )
    return result


def _drop_caches(model):
    model.train()  # where timm's LeViT and its kin forget their biases, and return None
    model.eval()


def _expected(call, module, original, exact):
    """What torch returns for the call, in the model's dtype and in float64."""
    packed = module.channels_last and torch.backends.mkldnn.is_available()
    own = ChannelsLast() if packed else nullcontext()
    with backend.use("reference"):  # our own models' originals run as plain torch too
        with own:
            eager = call.on(original)
        return eager, call.doubled().on(exact)


class _Sight(NamedTuple):
    """A call, what torch returns for it, in the model's dtype and in float64, and the errors."""

    call: Call
    eager: list[Tensor]
    reference: list[Tensor]
    errors: Errors


def _look(call, layers, generator):
    """Measure a replaced layer on a call, and where it fails on others like it."""
    eager, reference = _expected(call, *layers)
    errors = compare(call.on(layers[0]), eager, reference)
    for _ in range(SAMPLES - 1):
        if errors.ok or errors.problem:
            break
        other = call.jittered(generator)
        errors = errors.worst(compare(other.on(layers[0]), *_expected(other, *layers)))
    return _Sight(call, eager, reference, errors)


def _hidden(module, sight, seed):
    """(how many faults were planted in the layer, those that went unnoticed)"""
    planted, hidden = 0, set()
    for fault in plant(module, seed):
        planted += 1
        disturbed = compare(sight.call.on(module), sight.eager, sight.reference)
        if disturbed.problem is None and disturbed.ours <= sight.errors.allowed:
            hidden.add(fault)
    return planted, hidden
