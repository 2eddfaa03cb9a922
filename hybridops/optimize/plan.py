"""The plan of a replaced module: whether it may bypass its children, and what it computes with.

A replaced module reads its children's parameters and does not call them, so its plan first makes
sure that nobody would notice: no child hooked, replaced or overridden, and no setting (a norm's
eps, an attention's scale) another than the one that was read.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from itertools import repeat
from operator import attrgetter, contains, getitem, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from .. import backend
from ..nn._derived import derived, forget, keep, kept
from ..ops._contract import is_autocast_on
from .watch import Watch, make_watch, unchanged

PLAN = "_hybridops_plan"
GLOBAL_HOOKS = (_module._global_forward_hooks, _module._global_forward_pre_hooks)
GLOBAL_BACKWARD_HOOKS = (_module._global_backward_hooks, _module._global_backward_pre_hooks)
_training, _held = attrgetter("training"), attrgetter("_modules")
_READY = "ready plan"

# Settings that no rule takes over: sizes that parameters have too, and what training alone reads
_INERT = {"training", "in_features", "out_features", "in_channels", "out_channels", "num_features"}
_INERT |= {"momentum", "affine", "track_running_stats", "elementwise_affine", "normalized_shape"}
_INERT |= {"p", "inplace", "drop_prob", "scale_by_keep"}
_PLAIN = (bool, int, float, str, type(None))


def _settings(module: nn.Module) -> list[str]:
    """The names of the numbers and words that stand on a module."""
    return [
        name
        for name, value in vars(module).items()
        if _is_plain(value) and not name.startswith("_") and name not in _INERT
    ]


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return type(value) in _PLAIN


class _Ready(NamedTuple):
    """What serves the next call if nothing has changed."""

    watch: Watch | None  # None: frozen
    value: Any


class Plan:
    """What one replaced module may do; part of the module, so copies and pickles carry it."""

    def __init__(self, fold: bool, frozen: bool = False) -> None:
        self.fold = fold
        self.frozen = frozen  # what was derived once serves without another look
        self.rule: Any = None  # the class by which the module's was replaced
        self.facts: Any = None  # the rule's own
        self._given: tuple[tuple[nn.Module, str, Any], ...] = ()
        self._readers: tuple[tuple[Any, nn.Module], ...] = ()
        self._values: list[Any] = []
        self._watch([])

    def watch(self, module: nn.Module, bypassed: Iterable[nn.Module]) -> None:
        """Remember the children that the rule bypasses, and all below them, as they are now."""
        top = {id(child) for child in bypassed}
        parents = [(module, [k for k, c in module._modules.items() if id(c) in top])]
        below = [m for child in module.children() if id(child) in top for m in child.modules()]
        self._watch([*parents, *((m, list(m._modules)) for m in below)])
        # one by one, not as dicts: a copied module has another __dict__
        named = [(m, names) for m in (module, *below) if (names := _settings(m))]
        self._given = tuple((m, name, getattr(m, name)) for m, names in named for name in names)
        self._readers = tuple((attrgetter(*names), m) for m, names in named)
        self._values = self._read()

    def _read(self) -> list[Any]:
        return [read(module) for read, module in self._readers]

    def settled(self) -> bool:
        """Whether every setting is the one that was read: 0.7 us for a transformer block."""
        return self._read() == self._values

    def _watch(self, parents: list[tuple[nn.Module, list[str]]]) -> None:
        self._parents = tuple(p for p, keys in parents if keys)
        self._holders = tuple(map(_held, self._parents))  # del sequential[i] makes a new one
        self._sizes = tuple(map(len, self._holders))
        held = [(p._modules, k, p._modules[k]) for p, keys in parents for k in keys]
        held = [(modules, name, child) for modules, name, child in held if child is not None]
        self._modules = tuple(modules for modules, _, _ in held)
        self._names = tuple(name for _, name, _ in held)
        self._children: tuple[Any, ...] = tuple(child for _, _, child in held)
        self._classes = tuple(map(type, self._children))
        self._hooks = tuple(
            d for c in self._children for d in (c._forward_hooks, c._forward_pre_hooks)
        )
        self._backward_hooks = tuple(
            d for c in self._children for d in (c._backward_hooks, c._backward_pre_hooks)
        )
        tensors = [
            (d, name)
            for part, _ in parents
            for d in (part._parameters, part._buffers)
            for name in d  # num_batches_tracked too: torch counts no version of the statistics
        ]
        self._tensors = tuple(d for d, _ in tensors)
        self._tensor_names = tuple(name for _, name in tensors)

    def intact(self) -> bool:
        """Whether the children may be bypassed: none hooked, added, replaced, overridden, set."""
        if torch.compiler.is_compiling():
            return self._intact_in_graph()
        if any(self._hooks) or any(GLOBAL_HOOKS):
            return False
        if torch.is_grad_enabled() and (any(self._backward_hooks) or any(GLOBAL_BACKWARD_HOOKS)):
            return False
        children = self._children
        return (
            all(map(is_, map(_held, self._parents), self._holders))
            and tuple(map(len, self._holders)) == self._sizes
            and all(map(is_, map(dict.get, self._modules, self._names), children))
            and tuple(map(type, children)) == self._classes
            and not any(map(contains, map(vars, children), repeat("forward")))
            and self.settled()
        )

    def folds(self, module: nn.Module, x: Tensor) -> bool:
        """Whether norms may be folded, weights packed and children bypassed for this call.

        Not while any part trains (dropout alone, say), nor under autocast, which keeps norms and
        sums in fp32.
        """
        if not self.fold or module.training or is_autocast_on(x):
            return False
        if torch.compiler.is_compiling():
            return self._intact_in_graph() and not any(c.training for c in self._children)
        return not any(map(_training, self._children)) and self.intact()

    def records(self) -> bool:
        """Whether a gradient of what derive() reads is recorded."""
        return torch.is_grad_enabled() and any(
            t is not None and t.requires_grad
            for t in map(getitem, self._tensors, self._tensor_names)
        )

    def _intact_in_graph(self) -> bool:
        """intact() in words that torch.compile can read."""
        hooked = any(
            c._forward_hooks or c._forward_pre_hooks or "forward" in c.__dict__
            for c in self._children
        )
        return not hooked and all(getattr(m, name) == value for m, name, value in self._given)

    def derived(self, module: Any, x: Tensor) -> Any:
        """module.derive(), kept until a tensor it reads changes; None unless this call folds."""
        plain = _is_plain_inference(x)
        ready = kept(module, _READY) if plain else None
        if ready is not None:
            if not module.training if self.frozen else unchanged and unchanged(ready.watch):
                return ready.value
            forget(module, _READY)  # what it holds is gone before another comes
            ready = None
        if not self.folds(module, x):
            return None
        if torch.compiler.is_compiling():
            return module.derive()
        sources = tuple(map(getitem, self._tensors, self._tensor_names))
        value = derived(module, "plan", sources, module.derive)
        # frozen: also weights made in inference mode, which carry no version to watch
        if plain and (self.frozen or (unchanged and kept(module, "plan") is not None)):
            with suppress(KeyError):  # a setting that its class has by now: asked for in every call
                watch = None if self.frozen else self._watch_of(module)
                keep(module, _READY, _Ready(watch, value))
        return value

    def _watch_of(self, module: nn.Module) -> Watch:
        """All that `folds` and `derived` ask of a call that is plain inference, as it is now."""
        children = self._children
        settings = [(vars(m), name, vars(m)[name]) for m, name, _ in self._given]
        named = zip(self._tensors, self._tensor_names, strict=True)
        tensors = [(d, name, d[name]) for d, name in named]
        places = [
            *((vars(m), "training", False) for m in (module, *children)),
            *((vars(p), "_modules", vars(p)["_modules"]) for p in self._parents),
            *zip(self._modules, self._names, children, strict=True),
        ]
        return make_watch(
            places=[*places, *settings, *tensors],
            owners={id(m): m for m in (module, *self._parents, *children)}.values(),
            children=children,
            empty=(*self._hooks, *GLOBAL_HOOKS),
            sized=self._holders,
            tensors=[t for _, _, t in tensors],
        )


def _is_plain_inference(x: Tensor) -> bool:
    """Whether a call records nothing, casts nothing, and ends in no graph."""
    return not (
        torch.is_grad_enabled()
        or backend.is_captured()
        or backend.reference_forced()
        or is_autocast_on(x)
    )
