"""A BatchNorm behind a convolution or a product in any nn.Sequential goes into its weights.

nn.Sequential, and what inherits its forward, calls its members in order, so that it is known what
follows each. Such pairs, with the activation behind them, run as one; all other members are called.
Where torch's own layers are all that there is below, a few convolutions run in channels_last. The
result has the memory format that torch gives it: the code around may view it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import backend
from ..nn._fusion import is_hooked
from ..nn.conv import folded_conv, is_channels_last
from ..ops import linear
from . import rules
from .convs import BATCH_NORMS, TRAINING, Unserved, path_of, read_chain
from .fast import (
    activation_name,
    batch_normed,
    dotted,
    first,
    not_foldable_norm,
    not_one_of,
    not_plain_weight,
    original_class,
)
from .shapes import SHAPES, Shaped, bind, hidden_methods

CONV_NORM_ACTIVATION = "torchvision.ops.misc:Conv2dNormActivation"
_KNOWN = {
    *(nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.Identity, nn.Dropout, nn.Dropout2d),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Upsample, nn.ZeroPad2d),
}
_TURNS = 3  # convolutions for which it is worth to turn an image to channels_last, and back


class Part(NamedTuple):
    """A member that is called; or a convolution or product with what is folded into it.

    members: the layer, its norm, an activation behind that. Called: the one that stands at `name`.
    reason: why the norm behind this layer is not folded.
    """

    holder: dict[str, Any]
    name: str
    members: tuple[Any, ...]
    activation: str = "none"
    reason: str | None = None

    @property
    def folds(self) -> bool:
        return len(self.members) > 1


def parts(module: nn.Sequential) -> list[Part]:
    """What a Sequential calls, in order; what the Sequentials in it call, where it is_known."""
    entries = list(_below(module) if is_known(module) else _beside(module))
    unordered = _not_in_order(original_class(module))
    found: list[Part] = []
    i = 0
    while i < len(entries):
        holder, name, layer = entries[i]
        behind = [member for _, _, member in entries[i + 1 : i + 3]]
        members: tuple[Any, ...] = (layer,)
        activation, reason = "none", None
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and behind and _is_batch_norm(behind[0]):
            norm, *after = behind
            activation, reason = _read(module, name, layer, norm)
            reason = unordered or reason
            if reason is None:
                members = layer, norm
                if activation == "none" and after and not is_hooked(after[0]):
                    activation = activation_name(after[0]) or "none"
                    members += (after[0],) if activation != "none" else ()
        found.append(Part(holder, name, members, activation, reason))
        i += len(members)
    return found


Entry = tuple[dict[str, Any], str, Any]  # where a member stands, and the member


def _beside(module: nn.Module) -> Iterator[Entry]:
    return ((module._modules, name, member) for name, member in module._modules.items())


def _below(module: nn.Module) -> Iterator[Entry]:
    """The members of a Sequential that is_known, those of the Sequentials in it for these."""
    for entry in _beside(module):
        inside = isinstance(entry[2], nn.Sequential)
        yield from _below(entry[2]) if inside else [entry]


def is_known(module: nn.Module) -> bool:
    """Whether all that is called below a Sequential takes images in either memory format."""
    return _not_in_order(original_class(module)) is None and all(
        not is_hooked(member)
        and (
            _has_no_rule(member) and is_known(member)
            if isinstance(member, nn.Sequential)
            else type(member) in _KNOWN and not getattr(member, "return_indices", False)
        )
        for member in module._modules.values()
    )


def _has_no_rule(member: nn.Module) -> bool:
    """Whether a Sequential is none of the classes that a rule of their own serves."""
    cls = original_class(member)
    own = dotted(cls) in rules.RULES or cls.__name__ in SHAPES
    return cls is nn.Sequential or not own


def _not_in_order(cls: type[nn.Module]) -> str | None:
    """Why a subclass of Sequential may do something else than call its members in order."""
    own = [
        name
        for name in ("forward", "__call__", "__iter__")
        if getattr(cls, name) is not getattr(nn.Sequential, name)
    ]
    own += hidden_methods(cls, FastFoldedSequential)
    if type(cls) is not type:
        return f"{cls.__name__} is a {type(cls).__name__}"
    return f"{cls.__name__} has a {own[0]} of its own" if own else None


def _is_batch_norm(module: Any) -> bool:
    frozen = module is not None and path_of(module) in BATCH_NORMS
    return frozen or isinstance(module, _BatchNorm)


def _read(module: nn.Module, name: str, layer: Any, norm: Any) -> tuple[str, str | None]:
    """The activation inside the norm, and why it cannot be folded into the layer."""
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    hooked = (type(m).__name__ for m in (layer, *norm.modules()) if is_hooked(m))
    reason = first(f"the {hook} is hooked" for hook in hooked) or first(
        [
            not_one_of(name, layer, kind),
            not_plain_weight(name, layer),
            None if kind is nn.Conv2d else not_foldable_norm("the norm", norm, nn.BatchNorm1d),
        ]
    )
    activation = "none"
    if reason is None and kind is nn.Conv2d:
        try:
            activation = read_chain([layer, norm])[0].activation
        except Unserved as unserved:
            reason = str(unserved)
    if reason is None:
        reason = _not_alike(layer, norm)
    if reason is None and norm.training and not module.training:
        reason = "the norm alone is in training mode"
    return activation, reason


def _not_alike(layer: Any, norm: Any) -> str | None:
    """Why the tensors of both make no single weight."""
    shifts = (layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    tensors = [t for t in (layer.weight, *shifts) if t is not None]
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1 or not layer.weight.is_floating_point():
        return f"its dtype is {', '.join(sorted(map(str, dtypes)))}"
    if len({len(t) for t in tensors}) > 1:
        return f"it takes {len(norm.running_mean)} channels, not {len(layer.weight)}"
    return None


def unfolded(module: nn.Module, reason: str | None) -> dict[int, str]:
    """Why norms in a Sequential stay apart, by the id of the layer in front of each.

    reason: why its rule does not serve the whole of it, or None.
    """
    if not isinstance(module, nn.Sequential):
        return {}
    return {
        id(part.members[0]): f"a BatchNorm follows, not folded: {part.reason or reason}"
        for part in parts(module)
        if part.reason or (part.folds and reason)
    }


def match(module: nn.Module) -> Any:
    """The rule for a Sequential that holds a norm to fold, or None."""
    if not isinstance(module, nn.Sequential) or not any(part.folds for part in parts(module)):
        return None
    known = dotted(original_class(module)) == CONV_NORM_ACTIVATION
    return bind(FastConv2dNormActivation if known else FastFoldedSequential, type(module))


class FastFoldedSequential(Shaped):
    implied = True  # its convolutions have the reason where it does not apply
    yields = True
    lays = False  # whether its images become channels_last, whatever they were

    @property
    def channels_last(self):  # nor would other code take such images where verify() compares
        return is_known(self)

    @classmethod
    def unserved(cls, module, mode):
        return TRAINING if mode == "train" else None

    @classmethod
    def bypassed(cls, module):
        if is_known(module):
            return list(module._modules.values())
        return [member for part in parts(module) if part.folds for member in part.members]

    @classmethod
    def covered(cls, module):
        folded = [member for part in parts(module) if part.folds for member in part.members]
        inside = module.modules() if is_known(module) else ()
        return folded + [below for below in inside if isinstance(below, nn.Sequential)]

    def forward(self, input):
        plan = self._hybridops_plan
        # a graph is given the layers as they are, which its compiler folds or fuses in its own way
        served = not (backend.is_captured() or backend.reference_forced()) and type(input) is Tensor
        steps = plan.derived(self, input) if served and not plan.records() else None
        if steps is None:
            return self.replaces.forward(self, input)
        y, turned = input, False
        for i, step in enumerate(steps.calls):
            if i == steps.turn and y.ndim == 4 and not is_channels_last(y):
                y, turned = y.contiguous(memory_format=torch.channels_last), True
            y = step(y) if type(step) is not Part else step.holder[step.name](y)
        return y.contiguous() if turned and y.ndim == 4 else y

    def derive(self):
        return _Steps(self)

    def __getitem__(self, index):
        if isinstance(index, slice):  # torch would make another of this class, without a plan
            return self.replaces(OrderedDict(list(self._modules.items())[index]))
        return self.replaces.__getitem__(self, index)


class FastConv2dNormActivation(FastFoldedSequential):
    lays = True  # torchvision's own networks take either format


class _Steps:
    """A Sequential, ready to run: what to call, and before which the image is turned.

    That is the first convolution: what stands before may write to the very input.
    """

    def __init__(self, module: Any) -> None:
        found = parts(module)
        convs = [i for i, part in enumerate(found) if isinstance(part.members[0], nn.Conv2d)]
        turns = len(convs) >= _TURNS and not module.lays and is_known(module)
        self.turn = convs[0] if turns else None
        self.calls: list[Any] = []
        for part in found:
            if not part.folds:
                self.calls.append(part)
            elif isinstance(part.members[0], nn.Conv2d):
                self.calls.append(_Conv(part, module.lays))
            else:
                self.calls.append(_Linear(part))


class _Folded:
    """A layer with its norm, ready to run; what the layer does not take goes to its members."""

    ndim: int

    def __init__(self, part: Part) -> None:
        self.members, self.activation = part.members, part.activation
        weight, groups = part.members[0].weight, getattr(part.members[0], "groups", 1)
        self.width, self.dtype, self.device = weight.shape[1] * groups, weight.dtype, weight.device

    def __call__(self, x: Any) -> Any:
        if (
            type(x) is Tensor
            and x.ndim == self.ndim
            and x.shape[1] == self.width
            and x.dtype == self.dtype
            and x.device == self.device
        ):
            return self.run(x)
        for member in self.members:
            x = member(x)
        return x

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _Conv(_Folded):
    ndim = 4

    def __init__(self, part: Part, lays: bool) -> None:
        super().__init__(part)
        layer, norm, *behind = part.members
        self.lays = lays or is_channels_last(layer.weight)  # then torch's result is, too
        self.conv = folded_conv(layer, norm, channels_last=self.lays)
        self.act = behind[0] if behind else getattr(norm, "act", None)

    def run(self, x: Tensor) -> Tensor:
        if self.lays or is_channels_last(x):
            return self.conv(x, self.activation)
        y = self.conv.plain(x)
        return y if self.act is None else self.act(y)


class _Linear(_Folded):
    ndim = 2  # of tokens (B, N, C) BatchNorm1d would norm N

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self.weights = batch_normed(*part.members[:2])

    def run(self, x: Tensor) -> Tensor:
        w = self.weights
        return linear(x, w.weight, w.bias, activation=self.activation, packed=w.packed)
