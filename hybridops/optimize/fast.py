"""What every replacement class shares: its plan, and the test whether it may bypass its children.

`module.__class__ = FastX` keeps parameters, buffers, hooks and names. A Fast forward reads its
children's parameters and does not call them, so it first makes sure that nobody would notice: no
child hooked, replaced or overridden, and no setting (a norm's eps, an attention's scale) another
than the one that was read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import attrgetter, contains, getitem, is_
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from .. import backend
from ..nn._derived import Weights, derived, fold_behind, packed_weights
from ..ops import pack_linear, pack_patch
from ..ops._contract import is_autocast_on

PLAN = "_hybridops_plan"
_GLOBAL_HOOKS = (_module._global_forward_hooks, _module._global_forward_pre_hooks)
_GLOBAL_BACKWARD_HOOKS = (_module._global_backward_hooks, _module._global_backward_pre_hooks)
_training, _held = attrgetter("training"), attrgetter("_modules")

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


class Plan:
    """What one replaced module may do; part of the module, so copies and pickles carry it."""

    def __init__(self, fold: bool) -> None:
        self.fold = fold
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
        if any(self._hooks) or any(_GLOBAL_HOOKS):
            return False
        if torch.is_grad_enabled() and (any(self._backward_hooks) or any(_GLOBAL_BACKWARD_HOOKS)):
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
        if not self.folds(module, x):
            return None
        if torch.compiler.is_compiling():
            return module.derive()
        sources = tuple(map(getitem, self._tensors, self._tensor_names))
        return derived(module, "plan", sources, module.derive)


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
    behind = (_GLOBAL_HOOKS[0], *_GLOBAL_BACKWARD_HOOKS)
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
