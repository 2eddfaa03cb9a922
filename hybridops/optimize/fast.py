"""What every replacement class shares: its plan, and the test whether it may bypass its children.

`module.__class__ = FastX` keeps parameters, buffers, hooks and names. A Fast forward reads its
children's parameters and does not call them, so it first makes sure that nobody would notice: no
child hooked, replaced or overridden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import attrgetter, contains
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from .. import backend
from ..nn._derived import Weights, fold_behind
from ..ops import pack_linear

PLAN = "_hybridops_plan"
_GLOBAL_HOOKS = (_module._global_forward_hooks, _module._global_forward_pre_hooks)
_GLOBAL_BACKWARD_HOOKS = (_module._global_backward_hooks, _module._global_backward_pre_hooks)
_training = attrgetter("training")

_ACTIVATIONS = {
    "torch.nn.modules.activation:Hardswish": "hardswish",
    "torch.nn.modules.activation:ReLU": "relu",
    "torch.nn.modules.activation:SiLU": "silu",
    "torch.nn.modules.linear:Identity": "none",
    "timm.layers.activations:GELU": "gelu",
    "timm.layers.activations:GELUTanh": "gelu_tanh",
    "timm.layers.activations:HardSwish": "hardswish",
    "timm.layers.activations:Swish": "silu",
}


class Plan:
    """What one replaced module may do; part of the module, so copies and pickles carry it."""

    def __init__(self, fold: bool) -> None:
        self.fold = fold
        self.facts: Any = None  # the rule's own
        self._watch([])

    def watch(self, module: nn.Module, bypassed: Iterable[nn.Module]) -> None:
        """Remember the children that the rule bypasses, and all below them, as they are now."""
        top = {id(child) for child in bypassed}
        parents = [(module, [k for k, c in module._modules.items() if id(c) in top])]
        below = [m for child in module.children() if id(child) in top for m in child.modules()]
        self._watch([*parents, *((m, list(m._modules)) for m in below)])

    def _watch(self, parents: list[tuple[nn.Module, list[str]]]) -> None:
        held = [(p._modules, k, p._modules[k]) for p, keys in parents for k in keys]
        self._held = tuple((m, k, child) for m, k, child in held if child is not None)
        self._children = tuple(child for _, _, child in self._held)
        self._classes = tuple(map(type, self._children))
        self._hooks = tuple(
            d for c in self._children for d in (c._forward_hooks, c._forward_pre_hooks)
        )
        self._backward_hooks = tuple(
            d for c in self._children for d in (c._backward_hooks, c._backward_pre_hooks)
        )

    def intact(self) -> bool:
        """Whether the children may be bypassed: none hooked, replaced, or overridden since."""
        if any(self._hooks) or any(_GLOBAL_HOOKS):
            return False
        for modules, name, child in self._held:
            if modules.get(name) is not child:
                return False
        if tuple(map(type, self._children)) != self._classes:
            return False
        if torch.is_grad_enabled() and (any(self._backward_hooks) or any(_GLOBAL_BACKWARD_HOOKS)):
            return False
        return not any(map(contains, map(vars, self._children), repeat("forward")))

    def folds(self, module: nn.Module, x: Tensor) -> bool:
        """Whether norms may be folded, weights packed and children bypassed for this call.

        Not while any part trains (dropout alone, say), nor under autocast, which keeps norms and
        sums in fp32.
        """
        return (
            self.fold
            and not module.training
            and not any(map(_training, self._children))
            and not torch.is_autocast_enabled(x.device.type)
            and self.intact()
        )


class Fast:
    """Base of every rule: class FastX(Fast, X), where X is the class that it replaces.

    `forward` has X's signature and meaning. `plan(self)` is the module's Plan. Where a call cannot
    be served, forward calls X.forward(self, ...), whose children are replaced in their own right.
    """

    replaces: ClassVar[type[nn.Module]]
    overrides: ClassVar[str] = "forward"  # the method it overrides: verify() compares its results

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if len(cls.__bases__) == 2:
            cls.replaces = cls.__bases__[1]

    @classmethod
    def unserved(cls, module: Any, mode: str) -> str | None:
        """Why this module must be left alone, or None. mode: "inference" or "train"."""
        return None

    @classmethod
    def bypassed(cls, module: Any) -> Iterable[nn.Module]:
        """The direct children whose forward is not called: all, unless the rule says otherwise."""
        return module.children()

    @classmethod
    def facts(cls, module: Any) -> Any:
        """What forward needs and can be settled once (an activation's name, say): plan.facts."""
        return None

    @classmethod
    def on_swap(cls, module: Any) -> None:
        """Whatever changes beside the class; on_restore takes it back."""

    @classmethod
    def on_restore(cls, module: Any) -> None:
        """The opposite of on_swap."""


def fall_back(rule: str, reason: str) -> None:
    """Count a call that a replaced module hands to the original forward."""
    if not torch.compiler.is_compiling():
        backend.fallbacks[rule, reason] += 1


def dotted(cls: type) -> str:
    """The path by which rules name a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, or the one it had before optimize()."""
    return module.replaces if isinstance(module, Fast) else type(module)


# reasons: each returns one line, or None
def not_one_of(name: str, module: nn.Module | None, *classes: type) -> str | None:
    """Why a child does not have one of exactly these classes."""
    found = original_class(module) if module is not None else type(None)
    if found in classes:
        return None
    return f"{name} is {found.__name__}, not {' or '.join(c.__name__ for c in classes)}"


def first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)


def not_plain_linear(name: str, module: nn.Module | None) -> str | None:
    return not_one_of(name, module, nn.Linear) or _not_plain_weight(name, module)


def not_plain_conv(name: str, module: Any) -> str | None:
    """Why conv_stem and patch_embed cannot run this convolution."""
    reason = not_one_of(name, module, nn.Conv2d) or _not_plain_weight(name, module)
    if reason:
        return reason
    if module.groups != 1 or module.dilation != (1, 1) or module.padding_mode != "zeros":
        return f"{name} is grouped, dilated or not zero-padded"
    if module.stride[0] != module.stride[1] or isinstance(module.padding, str):
        return f"{name} has stride {module.stride} and padding {module.padding!r}"
    if module.padding[0] != module.padding[1]:
        return f"{name} has padding {module.padding}"
    return None


def not_foldable_norm(name: str, module: Any, cls: type) -> str | None:
    reason = not_one_of(name, module, cls)
    if reason:
        return reason
    return f"{name} has no running statistics" if module.running_mean is None else None


def not_layer_norm(name: str, module: Any, *classes: type) -> str | None:
    reason = not_one_of(name, module, nn.LayerNorm, *classes)
    if reason:
        return reason
    if module.weight is None or len(module.normalized_shape) != 1:
        return f"{name} has no weight, or normalises more than one dimension"
    return None


def not_activation(name: str, module: nn.Module) -> str | None:
    return (
        None
        if activation_name(module)
        else f"{name} is {type(module).__name__}, which no kernel applies"
    )


def _not_plain_weight(name: str, module: Any) -> str | None:
    weight = module.weight
    if type(weight) not in (nn.Parameter, Tensor):
        return f"{name}.weight is a {type(weight).__name__}"
    return None


def activation_name(module: nn.Module) -> str | None:
    """The kernels' name for an activation module, or None."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(dotted(type(module)))


# weights, made inside derived()
def packed_linear(weight: Tensor, bias: Tensor | None) -> Weights:
    graph = torch.compiler.is_compiling() or weight.requires_grad
    return Weights(weight, bias, None if graph else pack_linear(weight))


def scaled(linear: Any, gamma: Tensor | None) -> Weights:
    """An nn.Linear with the LayerScale behind it folded in."""
    weight, bias = linear.weight, linear.bias
    if gamma is None:
        return packed_linear(weight, bias)
    wide = gamma.double()
    folded = (weight.double() * wide[:, None]).to(weight.dtype)
    return packed_linear(folded, None if bias is None else (bias.double() * wide).to(bias.dtype))


def normed(layer: Any) -> Weights:
    """An nn.Linear `layer.linear` with the eval-mode BatchNorm `layer.bn` behind it folded in."""
    return packed_linear(*fold_behind(layer.linear.weight, layer.linear.bias, layer.bn))


def norm_sources(norm: Any) -> tuple[Tensor | None, ...]:
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def one_dtype(tensors: Sequence[Tensor | None]) -> bool:
    return len({t.dtype for t in tensors if t is not None}) == 1
