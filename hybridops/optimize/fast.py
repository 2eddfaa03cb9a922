"""What every replacement class shares, and the reasons why a module is left alone.

`module.__class__ = FastX` keeps parameters, buffers, hooks and names. A Fast forward reads its
children's parameters and does not call them, where its plan says that nobody would notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import backend
from ..nn._derived import Weights, fold_behind, packed_weights
from ..ops import pack_linear, pack_patch
from .plan import GLOBAL_BACKWARD_HOOKS, GLOBAL_HOOKS

_ACTIVATIONS = {
    "torch.nn.modules.activation:Hardswish": "hardswish",
    "torch.nn.modules.activation:ReLU": "relu",
    "torch.nn.modules.activation:SiLU": "silu",
    "torch.nn.modules.linear:Identity": "none",
    "timm.layers.activations:GELU": "gelu",
    "timm.layers.activations:GELUTanh": "gelu_tanh",
    "timm.layers.activations:HardSwish": "hardswish",
    "timm.layers.activations:Swish": "silu",
    "transformers.activations:GELUActivation": "gelu",
    "transformers.activations:GELUTanh": "gelu_tanh",
    "transformers.activations:NewGELUActivation": "gelu_tanh",
    "transformers.activations:SiLUActivation": "silu",
}


class Fast:
    """Base of every rule: class FastX(Fast, X), where X is the class that it replaces.

    `forward` has X's signature and meaning. `plan(self)` is the module's Plan. Where a call cannot
    be served, forward calls X.forward(self, ...), whose children are replaced in their own right.
    """

    replaces: ClassVar[type[nn.Module]]
    overrides: ClassVar[str] = "forward"  # the method it overrides: verify() compares its results
    channels_last: ClassVar[bool] = False  # runs oneDNN's channels_last convolutions: see verify()
    implied: ClassVar[bool] = False  # report() says nothing of it where it does not apply
    yields: ClassVar[bool] = False  # not looked for in what another rule bypasses, nor used twice
    invisible: ClassVar[tuple[str, ...]] = ()  # ends of the names of tensors that cancel out

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        again = len(cls.__bases__) == 2 and issubclass(cls.__bases__[1], Fast)  # FSDP2's wrapping
        if len(cls.__bases__) == 2 and not again and "replaces" not in vars(cls):
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
    def covered(cls, module: Any) -> Iterable[nn.Module]:
        """What the report does not name where the rule applies: all below what is bypassed."""
        return [below for child in cls.bypassed(module) for below in child.modules()]

    @classmethod
    def facts(cls, module: Any) -> Any:
        """What can be settled once (an activation's name, say): becomes plan.facts."""
        return None

    def derive(self) -> Any:
        """What inference computes with in place of the parameters: folded, packed.

        None where the parameters cannot be fused as they are (differing dtypes, say).
        """
        return None

    @classmethod
    def torchs_own(cls, original: Any) -> nn.Module:
        """The original (verify()'s copy) in the memory format in which the rule computes."""
        return original

    @classmethod
    def learn(cls, module: Any, holders: Sequence[tuple[nn.Module, str]]) -> None:
        """What the plan takes from those that hold the module, and under which name."""

    @classmethod
    def note(cls, module: Any, holders: Sequence[tuple[nn.Module, str]]) -> str | None:
        """What the report adds to the rule's name: a part of the work that stays torch's, say."""
        return None

    def as_called(self, args: Any, kwargs: Any) -> Any:
        """The arguments by which verify() measures a call of the original's that it looks on at."""
        return args, kwargs

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


def is_watched(module: nn.Module) -> bool:
    """Whether a hook sees what the module returns, or the gradients of that."""
    behind = (GLOBAL_HOOKS[0], *GLOBAL_BACKWARD_HOOKS)
    own = (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(map(bool, (*own, *behind)))


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
    return not_one_of(name, module, nn.Linear) or not_plain_weight(name, module)


def not_plain_conv(name: str, module: Any) -> str | None:
    """Why conv_stem and patch_embed cannot run this convolution."""
    reason = not_one_of(name, module, nn.Conv2d) or not_plain_weight(name, module)
    if reason:
        return reason
    if module.groups != 1 or module.dilation != (1, 1) or module.padding_mode != "zeros":
        return f"{name} is grouped, dilated or not zero-padded"
    if module.stride[0] != module.stride[1] or isinstance(module.padding, str):
        return f"{name} has stride {module.stride} and padding {module.padding!r}"
    if module.padding[0] != module.padding[1]:
        return f"{name} has padding {module.padding}"
    return None


def not_pointwise(name: str, module: Any) -> str | None:
    """Why this is not a 1 x 1 convolution: a product on the pixels of an image."""
    reason = not_plain_conv(name, module)
    if reason:
        return reason
    plain = (module.kernel_size, module.stride, module.padding) == ((1, 1), (1, 1), (0, 0))
    return None if plain else f"{name} is not a 1 x 1 convolution"


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


def not_plain_weight(name: str, module: Any) -> str | None:
    weight = module.weight
    if type(weight) not in (nn.Parameter, Tensor):
        return f"{name}.weight is a {type(weight).__name__}"
    return None


def activation_name(module: nn.Module) -> str | None:
    """The kernels' name for an activation module, or None."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(dotted(type(module)))


# weights, made inside derive()
def packed_linear(weight: Tensor, bias: Tensor | None) -> Weights:
    return packed_weights(weight, bias, pack_linear)


def scaled(linear: Any, gamma: Tensor | None = None) -> Weights:
    """An nn.Linear, with the LayerScale behind it folded in."""
    weight, bias = linear.weight, linear.bias
    if gamma is None:
        return packed_linear(weight, bias)
    wide = gamma.double()
    folded = (weight.double() * wide[:, None]).to(weight.dtype)
    return packed_linear(folded, None if bias is None else (bias.double() * wide).to(bias.dtype))


def batch_normed(linear: Any, norm: Any) -> Weights:
    """An nn.Linear with the eval-mode BatchNorm behind it folded in."""
    return packed_linear(*fold_behind(linear.weight, linear.bias, norm))


def packed_patch(conv: Any) -> Weights:
    """An nn.Conv2d that cuts an image into patches."""
    return packed_weights(conv.weight, conv.bias, pack_patch)


def norm_of(norm: Any) -> tuple[Tensor, Tensor | None, float]:
    """A LayerNorm as `norm=` of linear and patch_embed."""
    return norm.weight, norm.bias, norm.eps


def one_dtype(tensors: Iterable[Tensor | None]) -> bool:
    return len({t.dtype for t in tensors if t is not None}) == 1
