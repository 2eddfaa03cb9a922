"""Convolution bodies: what a chain of conv, norm and activation modules comes to in inference.

A rule names the modules of its chain in order; `read_chain` says what stands in the way, or gives
the links. BatchNorm (frozen too) goes into the weights, weights are standardised once, activations
and residuals run inside the convolution, or inside the GroupNorm behind it. Images stay
channels_last from the first convolution on, so that the tokens at the end are a view.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ..nn._fusion import is_hooked
from ..nn.conv import folded_conv, not_bare_conv
from ..nn.conv_body import max_pool_same, norm_of
from ..ops import group_norm
from .fast import Fast, activation_name, dotted, not_activation, original_class
from .plan import PLAN

STANDARDISED = {"timm.layers.std_conv:StdConv2d", "timm.layers.std_conv:StdConv2dSame"}
_SAME = "timm.layers.conv2d_same:Conv2dSame"
_CONVS = {"torch.nn.modules.conv:Conv2d", _SAME, *STANDARDISED}
_FAMILIES = {  # transformers', each with copies of its own
    "conditional_detr": "ConditionalDetr",
    "d_fine": "DFine",
    "dab_detr": "DabDetr",
    "deformable_detr": "DeformableDetr",
    "detr": "Detr",
    "omdet_turbo": "OmDetTurbo",
    "rt_detr": "RTDetr",
    "rt_detr_v2": "RTDetrV2",
    "table_transformer": "TableTransformer",
}
FROZEN = {
    f"transformers.models.{model}.modeling_{model}:{prefix}FrozenBatchNorm2d"
    for model, prefix in _FAMILIES.items()
}
BATCH_NORMS = {
    "torch.nn.modules.batchnorm:BatchNorm2d",
    "torchvision.ops.misc:FrozenBatchNorm2d",
    "timm.layers.norm_act:BatchNormAct2d",
    *FROZEN,
}
_GROUP_NORMS = {"torch.nn.modules.normalization:GroupNorm", "timm.layers.norm_act:GroupNormAct"}
_NESTED = {
    "torch.nn.modules.container:Sequential",
    "timm.layers.conv_bn_act:ConvNormAct",
    "timm.models.resnetv2:DownsampleConv",
    "timm.models.resnetv2:DownsampleAvg",
    "torchvision.ops.misc:Conv2dNormActivation",
    *(
        f"transformers.models.{path}{name}"
        for path in (
            "resnet.modeling_resnet:ResNet",
            "rt_detr.modeling_rt_detr_resnet:RTDetrResNet",
        )
        for name in ("ConvLayer", "ShortCut")
    ),
    *(
        f"transformers.models.{model}.modeling_{model}:{prefix}ConvNormLayer"
        for model, prefix in _FAMILIES.items()
    ),
}
_MAX_POOL_SAME = "timm.layers.pool2d_same:MaxPool2dSame"
_CALLED = {
    "torch.nn.modules.pooling:MaxPool2d",
    "torch.nn.modules.pooling:AvgPool2d",
    _MAX_POOL_SAME,
}
TRAINING = "training keeps the convolutions as they are"


@dataclass
class Link:
    """A convolution and what follows it; or, without a convolution, a pooling that is called."""

    conv: Any
    norm: Any = None
    activation: str = "none"


class Unserved(Exception):
    """Why a chain cannot be fused."""


def path_of(module: nn.Module) -> str:
    return dotted(original_class(module))


def read_chain(modules: Iterable[nn.Module | None]) -> list[Link]:
    """The links of these modules, called one after the other; raises Unserved."""
    links: list[Link] = []
    for module in _flat(modules):
        path, last = path_of(module), links[-1] if links else None
        if path in _CONVS:
            reason = not_bare_conv(module)
            if reason:
                raise Unserved(reason)
            links.append(Link(module))
        elif path in _CALLED:
            links.append(Link(module, activation="called"))
        elif last is None or last.activation != "none":
            known = path in BATCH_NORMS or path in _GROUP_NORMS or activation_name(module)
            why = "follows no convolution" if known else "has no kernel"
            raise Unserved(f"{original_class(module).__name__} {why}")
        elif path in BATCH_NORMS or path in _GROUP_NORMS:
            if last.norm is not None:
                raise Unserved("two norms behind one convolution")
            if path in BATCH_NORMS and module.running_mean is None:
                raise Unserved("a BatchNorm without running statistics")
            last.norm = module
            last.activation = _own_activation(module)
        else:
            name = activation_name(module)
            if name is None:
                raise Unserved(f"{original_class(module).__name__} has no kernel")
            last.activation = name
    if not links or links[0].activation == "called" and len(links) == 1:
        raise Unserved("no convolution")
    return links


def _flat(modules):
    for module in modules:
        if module is None or type(module) is nn.Identity:
            continue
        if path_of(module) in _NESTED:
            yield from _flat(module._modules.values())  # children() drops one used twice
        elif "parametrizations" in module._modules:
            raise Unserved(f"a parametrised {original_class(module).__name__}")
        else:
            yield module


def _own_activation(norm: Any) -> str:
    """The activation inside timm's norm-and-activation layers."""
    if not hasattr(norm, "act"):
        return "none"
    if type(norm.drop) is not nn.Identity:
        raise Unserved("dropout behind a norm")
    name = activation_name(norm.act)
    if name is None:
        raise Unserved(f"{type(norm.act).__name__} has no kernel")
    return name


class Step:
    """A link, ready to run."""

    def __init__(self, link: Link) -> None:
        self.activation = link.activation
        self.norm = link.norm if link.norm is not None and _is_group(link.norm) else None
        if link.activation == "called":
            self.conv = _pooling(link.conv)
        else:
            norm = None if self.norm is not None else link.norm
            same = path_of(link.conv) == _SAME
            self.conv = folded_conv(link.conv, norm, is_standardised(link.conv), same)

    def __call__(self, x: Tensor) -> Tensor:
        if self.activation == "called":
            return self.conv(x)
        return self.run(x, self.activation, None)

    def run(self, x: Tensor, activation: str, residual: Tensor | None) -> Tensor:
        """activation(norm(conv(x)) + residual)"""
        norm = self.norm
        if norm is None:
            return self.conv(x, activation, residual)
        return self.conv.normed(x, norm_of(norm), activation, residual)


def _pooling(pool: Any) -> Any:
    """A pool as it is called; timm's SAME without the copy of the image that it pads."""
    if path_of(pool) != _MAX_POOL_SAME or pool.dilation != (1, 1) or pool.ceil_mode:
        return pool
    return partial(max_pool_same, kernel=pool.kernel_size, stride=pool.stride)


def _is_group(norm):
    return path_of(norm) in _GROUP_NORMS


def is_standardised(conv: Any) -> bool:
    """Whether this convolution standardises its weight."""
    return path_of(conv) in STANDARDISED


def steps(modules: Iterable[nn.Module | None]) -> list[Step]:
    return [Step(link) for link in read_chain(modules)]


def run(chain: Iterable[Any], x: Tensor) -> Tensor:
    for step in chain:
        x = step(x)
    return x


def run_pooled(chain: list[Step], x: Tensor, pool: nn.Module) -> Tensor:
    """pool(run(chain, x)): of an image in one kernel, where the last step is all that lies between.

    A pool of another class, or with hooks, is called.
    """
    *before, last = chain
    x = run(before, x)
    ends_bare = last.norm is None and last.activation != "called"
    if ends_bare and type(pool) is nn.MaxPool2d and not is_hooked(pool):
        return last.conv.pooled(x, last.activation, pool)
    return pool(last(x))


def why_not(*chains: Iterable[nn.Module | None]) -> str | None:
    """Why one of these chains cannot be fused, or None."""
    try:
        for chain in chains:
            read_chain(chain)
    except Unserved as reason:
        return str(reason)
    return None


def one_dtype_in(modules: Iterable[nn.Module | None]) -> bool:
    tensors = [t for m in modules if m is not None for t in m.parameters()]
    return len({t.dtype for t in tensors}) <= 1


class Residual(Fast):
    """Base of the rules for residual blocks: activation(chain(x) + shortcut(x))."""

    channels_last = True

    @classmethod
    def parts(cls, module: Any) -> tuple[list[nn.Module | None], nn.Module | None, nn.Module]:
        """The modules of the main chain, the shortcut's (None: x itself), the last activation."""
        raise NotImplementedError

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return TRAINING
        main, shortcut, last = cls.parts(module)
        if activation_name(last) is None:
            return f"{type(last).__name__} has no kernel"
        return why_not(main) or (shortcut is not None and why_not([shortcut])) or None

    def forward(self, x):
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return self.replaces.forward(self, x)
        (*chain, end), shortcut, last = weights
        residual = x if shortcut is None else run(shortcut, x)
        return end.run(run(chain, x), last, residual)

    def derive(self):
        main, shortcut, last = self.parts(self)
        if not one_dtype_in([*main, shortcut]):
            return None
        side = None if shortcut is None else steps([shortcut])
        return steps(main), side, activation_name(last)


_CONTAINERS = {
    "torch.nn.modules.container:Sequential",
    "torch.nn.modules.linear:Identity",
    "timm.models.resnetv2:ResNetStage",
}


def takes_pieces(body: Iterable[nn.Module], x: Tensor) -> bool:
    """Whether a body may get its batch in pieces: nobody sees it, and no image another's numbers.

    So it is where calling these modules is nothing but calling Residuals, and pools.
    """
    left: list[Any] = list(body)
    while left:
        module = left.pop()
        path = path_of(module)
        if is_hooked(module):
            return False
        if isinstance(module, Residual):
            if not getattr(module, PLAN).folds(module, x):
                return False
        elif path in _CONTAINERS:
            left.extend(module._modules.values())
        elif path not in _CALLED:
            return False
    return True


class Chain(Fast):
    """Base of the rules whose module is nothing but its chain."""

    channels_last = True

    @classmethod
    def parts(cls, module: Any) -> list[nn.Module | None]:
        return list(module._modules.values())  # children() drops one used twice

    @classmethod
    def unserved(cls, module, mode):
        return TRAINING if mode == "train" else why_not(cls.parts(module))

    def forward(self, x):
        chain = self._hybridops_plan.derived(self, x)
        return self.replaces.forward(self, x) if chain is None else run(chain, x)

    def derive(self):
        parts = self.parts(self)
        return steps(parts) if one_dtype_in(parts) else None


class Stem(Fast):
    """Base of the rules for whole networks: the stem's convolutions fused, the rest as it is."""

    channels_last = True
    names: tuple[str, ...] = ()  # children of the stem, in order

    @classmethod
    def bypassed(cls, module):
        return [getattr(module, name) for name in cls.names]

    @classmethod
    def unserved(cls, module, mode):
        return TRAINING if mode == "train" else why_not(cls.bypassed(module))

    def derive(self):
        parts = self.bypassed(self)
        return steps(parts) if one_dtype_in(parts) else None


class StandardisedConv(Fast):
    """The weight is standardised once, not in every call."""

    channels_last = True

    @classmethod
    def unserved(cls, module, mode):
        return TRAINING if mode == "train" else not_bare_conv(module)

    def forward(self, x):
        conv = self._hybridops_plan.derived(self, x)
        return self.replaces.forward(self, x) if conv is None else conv(x)

    def derive(self):
        return folded_conv(self, None, standardised=True)


class ActivatedGroupNorm(Fast):
    """A GroupNorm and an activation in one pass, where the image is channels_last already."""

    behind: ClassVar[str]  # the name of the activation

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the norm as it is"
        return not_activation(cls.behind, getattr(module, cls.behind))

    @classmethod
    def facts(cls, module):
        return activation_name(getattr(module, cls.behind))

    def forward(self: Any, x):
        plan = self._hybridops_plan
        if not plan.folds(self, x) or x.ndim != 4 or x.is_contiguous():
            return self.replaces.forward(self, x)
        weight, bias = self.weight, self.bias
        return group_norm(x, self.num_groups, weight, bias, self.eps, activation=plan.facts)
