"""transformers' pyramids (PVT, PVTv2, Segformer): what their classes have in common.

Keys and values come from tokens that a strided convolution reduces, patches overlap, and in two of
the three a depthwise convolution stands between the products of the perceptron.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..nn._derived import Weights
from ..ops import attention, linear, patch_embed, peg
from .fast import (
    Fast,
    activation_name,
    first,
    norm_of,
    not_activation,
    not_layer_norm,
    not_one_of,
    not_plain_conv,
    not_plain_linear,
    one_dtype,
    packed_patch,
    scaled,
)
from .transformers_block import AttentionRule, joined, product


def not_embedding(conv: Any, norm: Any) -> str | None:
    return not_plain_conv("the convolution", conv) or not_layer_norm("layer_norm", norm)


def embed(image: Any, conv: Any, norm: Any, w: Weights, fuse: bool) -> Any:
    """norm(conv(image)) as tokens; fuse: the norm may run inside the convolution."""
    fused = norm_of(norm) if fuse and one_dtype((w.weight, norm.weight)) else None
    stride, padding = conv.stride[0], conv.padding[0]
    tokens = patch_embed(
        image, w.weight, w.bias, stride=stride, padding=padding, norm=fused, packed=w.packed
    )
    return norm(tokens) if fused is None else tokens


class OverlapEmbeddings(Fast):
    """Overlapping patches and their LayerNorm: (tokens, height, width)."""

    @classmethod
    def unserved(cls, module, mode):
        return not_embedding(module.proj, module.layer_norm)

    def forward(self, pixel_values):
        plan, conv = self._hybridops_plan, self.proj
        w = plan.derived(self, pixel_values)
        if w is None and not plan.intact():
            return self.replaces.forward(self, pixel_values)
        plain = Weights(conv.weight, conv.bias, None)
        tokens = embed(pixel_values, conv, self.layer_norm, w or plain, w is not None)
        sides = zip(pixel_values.shape[2:], conv.kernel_size, strict=True)
        step, pad = conv.stride[0], conv.padding[0]
        return tokens, *((n + 2 * pad - k) // step + 1 for n, k in sides)

    def derive(self):
        return packed_patch(self.proj)


class ReducedAttention(AttentionRule):
    """Attention whose keys and values come from fewer tokens.

    The three projections; behind them, where the class has one, the output's.
    """

    @classmethod
    def reduction(cls, module: Any) -> tuple[Any, Any] | None:
        """The strided convolution and its LayerNorm, or None."""
        raise NotImplementedError

    @classmethod
    def unserved(cls, module, mode):
        reason = super().unserved(module, mode)
        reduction = None if reason else cls.reduction(module)
        return reason if reduction is None else not_embedding(*reduction)

    def forward(self, hidden_states, height, width, *args, **kwargs):
        asked = (args and args[0] is True) or kwargs.get("output_attentions")
        masked = not asked and ((args and args[0] is not None) and args[0] is not False)
        masked = masked or kwargs.get("attention_mask") is not None
        w = None if masked else self._weights(hidden_states, {"output_attentions": asked})
        if w is None:
            return self.replaces.forward(self, hidden_states, height, width, *args, **kwargs)
        return self._packed(self._attend(hidden_states, (height, width), *w))

    def _packed(self, y):
        """What the class returns beside its output."""
        return (y,)

    def _attend(self: Any, x, grid, q, kv, reduce, *out):
        heads = self.num_attention_heads
        queries = product(x, q).unflatten(2, (heads, -1))
        if reduce is not None:
            image = x.unflatten(1, grid).permute(0, 3, 1, 2)
            conv, norm = self.reduction(self)
            x = embed(image, conv, norm, reduce, True)
        k, v = product(x, kv).unflatten(2, (2, heads, -1)).unbind(2)
        y = attention(queries, k, v).flatten(2)
        if not out:
            return y
        y = product(y, *out)
        drop = getattr(self, "proj_drop", None)
        return y if drop is None else drop(y)

    def derive(self):
        q, k, v, *out = (getattr(self, name) for name in self.projections)
        reduction = self.reduction(self)
        reduce = None if reduction is None else packed_patch(reduction[0])
        return scaled(q), joined(k, v), reduce, *map(scaled, out)


class ConvPerceptron(Fast):
    """Product, depthwise convolution on the grid, activation, product; dropouts behind two."""

    layers: ClassVar[tuple[str, str, str]] = ("fc1", "activation_fn", "fc2")

    @classmethod
    def unserved(cls, module, mode):
        up, activation, down = (getattr(module, name) for name in cls.layers)
        conv = module.dwconv.dwconv
        reason = first(
            (
                not_plain_linear(cls.layers[0], up),
                not_activation(cls.layers[1], activation),
                not_plain_linear(cls.layers[2], down),
                not_one_of("dwconv", conv, nn.Conv2d),
            )
        )
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        plain = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
        same = conv.kernel_size == (3, 3) and conv.padding == (1, 1)
        return reason or (None if depthwise and plain and same else "dwconv is not a depthwise 3x3")

    @classmethod
    def facts(cls, module):
        between = activation_name(getattr(module, "relu", nn.Identity()))  # PVTv2's linear variant
        return activation_name(getattr(module, cls.layers[1])), between

    def forward(self, hidden_states, height, width):
        plan = self._hybridops_plan
        weights = plan.derived(self, hidden_states)
        if weights is None:
            if not plan.intact():
                return self.replaces.forward(self, hidden_states, height, width)
            weights = self.derive()
        (up, down), (activation, between) = weights, plan.facts
        conv = self.dwconv.dwconv
        x = product(hidden_states, up, activation=between)
        grid = (height, width)
        x = peg(x, conv.weight, conv.bias, grid=grid, residual=False, activation=activation)
        x = self.dropout(x)
        return self.dropout(linear(x, down.weight, down.bias, packed=down.packed))

    def derive(self):
        return scaled(getattr(self, self.layers[0])), scaled(getattr(self, self.layers[2]))
