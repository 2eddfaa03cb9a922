"""torchvision's Swin transformers: attention in shifted windows, cosine attention in version 2."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformerBlock,
    _patch_merging_pad,
)
from torchvision.ops.misc import MLP
from torchvision.ops.stochastic_depth import StochasticDepth

from ..nn._derived import Weights
from ..ops import attention, linear, mlp_layer
from .fast import (
    Fast,
    activation_name,
    first,
    norm_of,
    not_layer_norm,
    not_one_of,
    not_plain_linear,
    packed_linear,
    scaled,
)
from .torchvision_vit import FastMLP

MASKED = -100.0  # what torchvision adds to the scores of tokens that only the shift made neighbours
_SIZES = 2  # grids whose shifted biases are kept


class _Attention(NamedTuple):
    """What a window attention computes with."""

    qkv: Weights
    proj: Weights
    bias: Tensor  # (1, heads, N, N), from the table
    scale: Tensor | None  # (heads, 1), of cosine attention
    shifted: dict[tuple[int, int], Tensor]  # bias and mask by grid, (windows, heads, N, N)


class _WindowAttention(Fast):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train" and module.attention_dropout > 0:
            return f"attention dropout {module.attention_dropout} in training"
        return not_plain_linear("qkv", module.qkv) or not_plain_linear("proj", module.proj)

    def forward(self, x):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is None:
            if (self.training and self.attention_dropout > 0) or not plan.intact():
                return self.replaces.forward(self, x)
            weights = self._weights(lambda weight, bias: Weights(weight, bias, None))
        return self._attend(x, weights)

    def derive(self):
        return self._weights(packed_linear)

    def _weights(self: Any, pack: Any) -> _Attention:
        qkv, proj = self.qkv, self.proj
        packed = pack(qkv.weight, self._qkv_bias()), pack(proj.weight, proj.bias)
        return _Attention(*packed, self.get_relative_position_bias(), self._scale(), {})

    def _qkv_bias(self):
        return self.qkv.bias

    def _scale(self):
        return None

    def _attend(self: Any, x: Tensor, w: _Attention) -> Tensor:
        _, H, W, _ = x.shape
        window = tuple(self.window_size)
        bottom, right = -H % window[0], -W % window[1]
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        B, *grid, C = x.shape
        shift = [
            0 if w >= side else s for w, side, s in zip(window, grid, self.shift_size, strict=True)
        ]
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        tokens = into_windows(x, window)
        qkv = linear(tokens, w.qkv.weight, w.qkv.bias, packed=w.qkv.packed)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        scale = None
        if w.scale is not None:
            q, k, scale = F.normalize(q, dim=-1) * w.scale, F.normalize(k, dim=-1), 1.0
        bias = self._shifted(w, (grid[0], grid[1]), shift) if any(shift) else w.bias
        out = linear(_by_image(q, k, v, bias, scale, B).flatten(2), *w.proj[:2], packed=w.proj[2])
        out = F.dropout(out, self.dropout, self.training)
        out = from_windows(out, window, (B, *grid, C))
        if any(shift):
            out = out.roll((shift[0], shift[1]), (1, 2))
        return out[:, :H, :W].contiguous()

    def _shifted(self, w, grid, shift):
        bias = w.shifted.get(grid)
        if bias is None:
            bias = w.bias + shift_mask(w.bias, grid, self.window_size, shift)[:, None]
            while len(w.shifted) >= _SIZES:
                w.shifted.pop(next(iter(w.shifted)))
            w.shifted[grid] = bias
        return bias


class FastAttention(_WindowAttention, ShiftedWindowAttention):
    pass


class FastAttentionV2(_WindowAttention, ShiftedWindowAttentionV2):
    """Cosine attention: queries and keys of length one, the heads' scales in the queries."""

    def _qkv_bias(self):
        bias = self.qkv.bias
        if bias is None:
            return None
        q, k, v = bias.chunk(3)
        return torch.cat([q, torch.zeros_like(k), v])

    def _scale(self):
        return self.logit_scale.clamp(max=math.log(100.0)).exp().flatten(1)


def into_windows(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """(B, H, W, C) -> (B * windows, tokens of a window, C); H and W are multiples of window."""
    B, H, W, C = x.shape
    h, w = window
    x = x.reshape(B, H // h, h, W // w, w, C).transpose(2, 3)
    return x.reshape(-1, h * w, C)


def from_windows(x: Tensor, window: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The inverse of into_windows; shape: (B, H, W, C)."""
    B, H, W, C = shape
    h, w = window
    x = x.reshape(B, H // h, W // w, h, w, C).transpose(2, 3)
    return x.reshape(shape)


def shift_mask(like: Tensor, grid: Any, window: Any, shift: Any) -> Tensor:
    """(windows, N, N): MASKED between tokens that come from different sides of the image."""
    regions = like.new_zeros((1, *grid, 1))
    count = 0
    sides = [
        (slice(0, -w), slice(-w, -s if s else None), slice(-s, None) if s else slice(0, 0))
        for w, s in zip(window, shift, strict=True)
    ]
    for rows in sides[0]:
        for columns in sides[1]:
            regions[:, rows, columns] = count
            count += 1
    of = into_windows(regions, tuple(window)).squeeze(2)
    return torch.where(of[:, None] == of[:, :, None], 0.0, MASKED).to(like.dtype)


def _by_image(q, k, v, bias, scale, B):
    """attention; a bias for each window of an image is shared by the images, so one call each.

    On a GPU launches cost more than the copies of the bias.
    """
    if bias.shape[0] == 1 or B == 1:
        return attention(q, k, v, bias=bias, scale=scale)
    if q.device.type != "cpu":
        return attention(q, k, v, bias=bias.repeat(B, 1, 1, 1), scale=scale)
    images = zip(*(t.chunk(B) for t in (q, k, v)), strict=True)
    return torch.cat([attention(*image, bias=bias, scale=scale) for image in images])


class FastBlock(Fast, SwinTransformerBlock):
    """The perceptron with its norm and residual as one dispatch; attention is served on its own."""

    @classmethod
    def bypassed(cls, module):
        return module.norm2, module.mlp, module.stochastic_depth

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the block as it is; attn and mlp are served"
        return first(
            (
                not_one_of("mlp", module.mlp, MLP) or FastMLP.unserved(module.mlp, mode),
                not_layer_norm("norm2", module.norm2),
                not_one_of("stochastic_depth", module.stochastic_depth, StochasticDepth),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.mlp[1])

    def forward(self, x):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is None:
            return SwinTransformerBlock.forward(self, x)
        x = x + self.attn(self.norm1(x))
        norm = norm_of(self.norm2)
        return mlp_layer(x, *weights, norm=norm, activation=plan.facts, residual=True)

    def derive(self):
        mlp = self.mlp
        same = mlp[0].weight.dtype == self.norm2.weight.dtype
        return (scaled(mlp[0]), scaled(mlp[3])) if same else None


class FastPatchMerging(Fast, PatchMerging):
    @classmethod
    def unserved(cls, module, mode):
        return not_layer_norm("norm", module.norm) or not_plain_linear(
            "reduction", module.reduction
        )

    def forward(self, x):
        plan, reduction = self._hybridops_plan, self.reduction
        weights = plan.derived(self, x)
        if weights is not None:
            x = _patch_merging_pad(x)
            weight, bias, packed = weights
            return linear(x, weight, bias, norm=norm_of(self.norm), packed=packed)
        if not plan.intact():
            return PatchMerging.forward(self, x)
        return linear(self.norm(_patch_merging_pad(x)), reduction.weight, reduction.bias)

    def derive(self):
        same = self.reduction.weight.dtype == self.norm.weight.dtype
        return scaled(self.reduction) if same else None


class FastPatchMergingV2(Fast, PatchMergingV2):
    @classmethod
    def bypassed(cls, module):
        return (module.reduction,)

    @classmethod
    def unserved(cls, module, mode):
        return not_plain_linear("reduction", module.reduction)

    def forward(self, x):
        plan, reduction = self._hybridops_plan, self.reduction
        weights = plan.derived(self, x)
        if weights is None:
            if not plan.intact():
                return PatchMergingV2.forward(self, x)
            weights = Weights(reduction.weight, reduction.bias, None)
        x = _patch_merging_pad(x)
        return self.norm(linear(x, weights.weight, weights.bias, packed=weights.packed))

    def derive(self):
        return scaled(self.reduction)
