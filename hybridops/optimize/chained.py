"""Rules for modules that are layers one behind the other: in inference all are one dispatch.

A block is a chain of two layers, a stage a chain of its blocks, nn.Sequential whatever it holds:
the outermost one runs, and settles for all below it, once per call, whether anything has changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain as joined
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.chain import Chain, Layer
from . import rules
from .fast import Fast, first
from .plan import Plan

_apart = False


@contextmanager
def apart() -> Iterator[None]:
    """Run every block by itself while this is open, so that each can be watched."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def is_apart() -> bool:
    """Whether blocks run one by one: watched, or in a graph, which torch.compile builds of them."""
    return _apart or torch.compiler.is_compiling()


class Chained(Fast):
    """Base of those rules: `layers` says what the module is made of."""

    _hybridops_plan: Plan

    def layers(self) -> list[Layer] | None:
        """The module as layers of a chain, norms folded and weights packed; None if it is not."""
        raise NotImplementedError

    @classmethod
    def links(cls, module: Any) -> bool:
        """Whether its layers may join a longer chain: the module runs on tokens and no more."""
        return True

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
        found = None
        if isinstance(module, Chained) and module.links(module):
            found = module.layers()
        if found is None:
            return None
        layers += found
    return layers


class Runs:
    """Modules of which any that stand side by side may run as one chain: runs(x, start, stop).

    The last of them is called by itself.
    """

    def __init__(self, layers: list[list[Layer]], last: nn.Module) -> None:
        self._layers = layers
        self._last = last
        self._chains: dict[tuple[int, int], Chain] = {}

    @classmethod
    def of(cls, modules: nn.ModuleList) -> Runs | None:
        """None where one of them is no chain."""
        *chained, last = modules
        layers = []
        for module in chained:
            found = layers_of(module)
            if found is None:
                return None
            layers.append(found)
        return cls(layers, last)

    def __call__(self, x: Tensor, start: int, stop: int) -> Tensor:
        end = min(stop, len(self._layers))
        if start < end:
            chain = self._chains.get((start, end))
            if chain is None:
                chain = self._chains[start, end] = Chain(
                    joined.from_iterable(self._layers[start:end])
                )
            x = chain(x)
        return x if stop <= len(self._layers) else self._last(x)


def not_chained(name: str, module: nn.Module, mode: str) -> str | None:
    """Why a child is no chain, before anything is replaced."""
    if type(module) is nn.Identity:
        return None
    rule, reason = rules.find(module)
    if rule is None or not issubclass(rule, Chained) or not rule.links(module):
        return f"{name}: {reason or 'no chain of layers'}"
    reason = rule.unserved(module, mode)
    return reason and f"{name}: {reason}"


class Container(Chained):
    """Base of the rules for what holds blocks: `apart` makes it call them one by one."""

    def forward(self, x: Tensor) -> Tensor:
        if is_apart():
            return self.replaces.forward(self, x)
        return Chained.forward(self, x)


class FastSequential(Container, nn.Sequential):
    implied = True  # nobody looks for it in the report where it does not apply

    @classmethod
    def unserved(cls, module: Any, mode: str) -> str | None:
        if mode == "train" or all(type(child) is nn.Identity for child in module):
            return "nothing to run at once"
        return first(not_chained(name, child, mode) for name, child in module.named_children())

    def layers(self) -> list[Layer] | None:
        return layers_of(*self)

    def __getitem__(self, index):
        if isinstance(index, slice):  # torch would make another FastSequential, without a plan
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return nn.Sequential.__getitem__(self, index)
