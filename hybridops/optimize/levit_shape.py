"""LeViT outside timm: what transformers' classes and the authors' own have in common.

A product and the BatchNorm behind it are one module of two children, in that order, whatever their
names. In inference BatchNorm goes into the weights; in training the modules are called, and
attention reads its bias through the index, so that the table gets its gradient.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from ..nn._derived import fold_behind, fold_in_front, packed_weights
from ..ops import ConvLayer, attention, conv_stem, linear, pack_conv
from ..ops.chain import Layer, attention_step, mlp_step, subsample_step
from .chained import Chained
from .convs import TRAINING
from .fast import (
    Fast,
    activation_name,
    batch_normed,
    first,
    not_activation,
    not_foldable_norm,
    not_plain_conv,
    not_plain_linear,
    packed_linear,
)
from .levit_layers import spread_out


def pair(layer: Any) -> tuple[Any, Any]:
    """The two children of a product with its norm."""
    one, other = layer._modules.values()
    return one, other


def not_linear_norm(name: str, layer: Any) -> str | None:
    """Why `layer` is not an nn.Linear with a BatchNorm behind it."""
    if len(layer._modules) != 2:
        return f"{name} is not a Linear and its BatchNorm"
    product, norm = pair(layer)
    return not_plain_linear(name, product) or not_foldable_norm(name, norm, nn.BatchNorm1d)


def folded(layer: Any) -> Any:
    return batch_normed(*pair(layer))


class LinearNorm(Fast):
    @classmethod
    def unserved(cls, module, mode):
        return not_linear_norm("it", module)

    def forward(self, x):
        plan = self._hybridops_plan
        w = plan.derived(self, x)
        if w is not None:
            return linear(x, w.weight, w.bias, packed=w.packed)
        if not plan.intact():
            return self.replaces.forward(self, x)
        product, norm = pair(self)
        x = linear(x, product.weight, product.bias)
        return norm(x.flatten(0, 1)).reshape_as(x)

    def derive(self):
        return folded(self)


class NormLinear(Fast):
    """A head: BatchNorm, then the product."""

    @classmethod
    def unserved(cls, module, mode):
        norm, product = pair(module)
        return not_foldable_norm("the norm", norm, nn.BatchNorm1d) or not_plain_linear(
            "the product", product
        )

    def forward(self, x):
        plan = self._hybridops_plan
        w = plan.derived(self, x) if x.ndim == 2 else None
        if w is not None:
            return linear(x, w.weight, w.bias, packed=w.packed)
        if not plan.intact():
            return self.replaces.forward(self, x)
        norm, product = pair(self)
        return linear(norm(x), product.weight, product.bias)

    def derive(self):
        norm, product = pair(self)
        return packed_linear(*fold_in_front(product.weight, product.bias, norm))


def conv_layer(layer: Any, activation: str) -> ConvLayer:
    """A convolution, the BatchNorm behind it and the activation behind that."""
    conv, norm = pair(layer)
    w = packed_weights(*fold_behind(conv.weight, conv.bias, norm), pack_conv)
    return ConvLayer(w.weight, w.bias, conv.stride[0], conv.padding[0], activation, w.packed)


def not_conv_norm(name: str, layer: Any) -> str | None:
    conv, norm = pair(layer)
    return not_plain_conv(name, conv) or not_foldable_norm(name, norm, nn.BatchNorm2d)


class ConvNorm(Fast):
    @classmethod
    def unserved(cls, module, mode):
        return TRAINING if mode == "train" else not_conv_norm("it", module)

    def forward(self, x):
        layer = self._hybridops_plan.derived(self, x)
        if layer is None:
            return self.replaces.forward(self, x)
        y = conv_stem(x, [layer], layout="image")
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return y if channels_last else y.contiguous()  # callers may view the result

    def derive(self):
        return conv_layer(self, "none")


class Parts(NamedTuple):
    """An attention's layers: LinearNorms, the activation between, and how many heads there are."""

    products: tuple[Any, ...]  # qkv and proj, or kv, q and proj
    activation: Any
    heads: int


class Attention(Chained):
    """Queries, keys and values head by head, a bias from a table, an activation behind."""

    @classmethod
    def parts(cls, module: Any) -> Parts:
        raise NotImplementedError

    @classmethod
    def unserved(cls, module, mode):
        parts = cls.parts(module)
        return not_activation("the activation", parts.activation) or first(
            not_linear_norm("a product", layer) for layer in parts.products
        )

    @classmethod
    def facts(cls, module):
        parts = cls.parts(module)
        return activation_name(parts.activation), parts.heads

    def forward(self, x):
        plan = self._hybridops_plan
        chain = plan.derived(self, x)
        if chain is not None:
            return chain(x)
        return self.unfolded(x) if plan.intact() else self.replaces.forward(self, x)

    def unfolded(self: Any, x):
        """The layer on the modules of its products, which train."""
        qkv, proj = self.parts(self).products
        q, k, v = (
            qkv(x)
            .unflatten(2, (self._hybridops_plan.facts[1], -1))
            .tensor_split([self.key_dim, 2 * self.key_dim], 3)
        )
        return proj(attend(self, q, k, v))

    def layers(self: Any, residual: bool = False) -> list[Layer] | None:
        qkv, proj = map(folded, self.parts(self).products)
        activation, heads = self._hybridops_plan.facts
        layer = attention_step(
            qkv,
            proj,
            heads=heads,
            key_dim=self.key_dim,
            scale=self.scale,
            interleaved=True,
            bias=spread_out(self),
            activation=activation,
            residual=residual,
        )
        return [layer]


class AttentionSubsample(Attention):
    """Queries of every other row and column; keys and values of all."""

    @classmethod
    def subsample(cls, module: Any) -> Any:
        """What keeps every `stride`-th row and column of its square of side `resolution`."""
        raise NotImplementedError

    def unfolded(self: Any, x):
        to_kv, to_q, to_out = self.parts(self).products
        heads, few = self._hybridops_plan.facts[1], self.subsample(self)(x)
        k, v = to_kv(x).unflatten(2, (heads, -1)).tensor_split([self.key_dim], 3)
        return to_out(attend(self, to_q(few).unflatten(2, (heads, -1)), k, v))

    def layers(self: Any, residual: bool = False) -> list[Layer] | None:
        few = self.subsample(self)
        side, stride = getattr(few, "resolution", None), getattr(few, "stride", None)
        if type(side) is not int or type(stride) is not int or residual:
            return None
        kv, q, proj = map(folded, self.parts(self).products)
        activation, heads = self._hybridops_plan.facts
        layer = subsample_step(
            kv,
            q,
            proj,
            heads=heads,
            key_dim=self.key_dim,
            scale=self.scale,
            grid=(side, side),
            stride=stride,
            bias=spread_out(self),
            activation=activation,
        )
        return [layer]


def attend(attn: Any, q: Any, k: Any, v: Any) -> Any:
    activation, _ = attn._hybridops_plan.facts
    bias, index = attn.attention_biases, attn.attention_bias_idxs
    y = attention(q, k, v, bias=bias, bias_index=index, scale=attn.scale, activation=activation)
    return y.flatten(2)


def mlp_reason(up: Any, activation: Any, down: Any) -> str | None:
    return (
        not_linear_norm("the first product", up)
        or not_activation("the activation", activation)
        or not_linear_norm("the second product", down)
    )


def mlp_layers(mlp: Any, residual: bool) -> list[Layer]:
    """Of LinearNorm, activation, LinearNorm: the three children, in order."""
    up, activation, down = mlp.children()
    name = activation_name(activation)
    assert name is not None
    return [mlp_step(folded(up), folded(down), activation=name, residual=residual)]


class Mlp(Chained):
    """LinearNorm, activation, LinearNorm: its three children, in order."""

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the norms between the products, which are served"
        return mlp_reason(*module.children())

    def layers(self: Any) -> list[Layer] | None:
        return mlp_layers(self, False)


class Residual(Chained):
    """x + inner(x): an attention, or LinearNorm, activation, LinearNorm."""

    inner: ClassVar[str] = "m"

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the sum as it is; what it holds is served"
        inner = getattr(module, cls.inner)
        if cls.is_attention(inner):
            return None  # its own rule decides, and layers() asks again
        if len(inner._modules) != 3:
            return f"holds a {type(inner).__name__}"
        return mlp_reason(*inner.children())

    @classmethod
    def is_attention(cls, inner: Any) -> bool:
        return hasattr(inner, "attention_biases")

    def layers(self: Any) -> list[Layer] | None:
        inner = getattr(self, self.inner)
        if self.is_attention(inner):
            return inner.layers(True) if isinstance(inner, Attention) else None
        return mlp_layers(inner, True)
