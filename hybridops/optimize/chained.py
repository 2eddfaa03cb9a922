"""Rules for modules that are layers one behind the other: in inference all are one dispatch.

A block is a chain of two layers, a stage a chain of its blocks, nn.Sequential whatever it holds:
the outermost one runs, and settles for all below it, once per call, whether anything has changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.chain import Chain, Layer
from . import rules
from .fast import Fast


class Chained(Fast):
    """Base of those rules: `layers` says what the module is made of."""

    def layers(self) -> list[Layer] | None:
        """The module as layers of a chain, norms folded and weights packed; None if it is not."""
        raise NotImplementedError

    def derive(self) -> Chain | None:
        layers = self.layers()
        return Chain(layers) if layers else None

    def forward(self, x: Tensor) -> Tensor:
        chain = self._hybridops_plan.derived(self, x)
        return self.replaces.forward(self, x) if chain is None else chain(x)


def layers_of(*modules: nn.Module) -> list[Layer] | None:
    """The layers of modules that run one behind the other, or None if one of them is no chain."""
    layers: list[Layer] = []
    for module in modules:
        if type(module) is nn.Identity:
            continue
        found = module.layers() if isinstance(module, Chained) else None
        if found is None:
            return None
        layers += found
    return layers


def not_chained(name: str, module: nn.Module, mode: str) -> str | None:
    """Why a child is no chain, before anything is replaced."""
    if type(module) is nn.Identity:
        return None
    rule, reason = rules.find(module)
    if rule is None or not issubclass(rule, Chained):
        return f"{name}: {reason or 'no chain of layers'}"
    reason = rule.unserved(module, mode)
    return reason and f"{name}: {reason}"


class FastSequential(Chained, nn.Sequential):
    implied = True  # nobody looks for it in the report where it does not apply

    @classmethod
    def unserved(cls, module: Any, mode: str) -> str | None:
        if mode == "train" or len(module) == 0:
            return "nothing to run at once"
        for name, child in module.named_children():
            reason = not_chained(name, child, mode)
            if reason:
                return reason
        return None if any(type(c) is not nn.Identity for c in module) else "nothing to run"

    def layers(self) -> list[Layer] | None:
        # a graph is built of the children, which torch.compile can read
        return None if torch.compiler.is_compiling() else layers_of(*self)
