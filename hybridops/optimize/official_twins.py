"""The authors' Twins and PVT (known by shape): attention in groups and subsampled, PosCNN."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..nn._derived import Weights
from ..nn.peg import position_encoding
from ..ops import attention, patch_embed
from .fast import (
    first,
    norm_of,
    not_layer_norm,
    not_one_of,
    not_plain_conv,
    not_plain_linear,
    packed_patch,
    scaled,
)
from .shapes import Shaped
from .transformers_block import product


class _Attention(Shaped):
    products: tuple[str, ...] = ()

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train" and module.attn_drop.p > 0:
            return f"attention dropout {module.attn_drop.p} in training"
        return first(not_plain_linear(n, getattr(module, n)) for n in (*cls.products, "proj"))

    def _weights(self: Any, x) -> Any:
        """What derive() gives, and whether it was folded; None: the original is called."""
        weights = self._hybridops_plan.derived(self, x)
        if weights is not None:
            return weights
        drops = self.attn_drop.training and self.attn_drop.p > 0
        return None if drops or not self._hybridops_plan.intact() else self.derive()

    @classmethod
    def example(cls, module, generator):
        side = 2 * (getattr(module, "ws", 0) or module.sr_ratio)
        width = getattr(module, cls.products[0]).in_features
        return torch.randn(1, side * side, width, generator=generator), side, side


class GroupAttention(_Attention):
    """Grids of whole windows; others go to the original, which may pad them, or refuse."""

    products = ("qkv",)

    def forward(self, x, H, W):
        ws = self.ws
        w = None if H % ws or W % ws else self._weights(x)
        if w is None:
            return self.replaces.forward(self, x, H, W)
        (qkv, proj), (B, N, C) = w, x.shape
        windows = x.reshape(B, H // ws, ws, W // ws, ws, C).transpose(2, 3).reshape(-1, ws * ws, C)
        q, k, v = product(windows, qkv).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        y = attention(q, k, v, scale=self.scale)
        y = y.reshape(B, H // ws, W // ws, ws, ws, C).transpose(2, 3).reshape(B, N, C)
        return self.proj_drop(product(y, proj))

    def derive(self):
        return scaled(self.qkv), scaled(self.proj)


class Attention(_Attention):
    products = ("q", "kv")

    @classmethod
    def unserved(cls, module, mode):
        reason = super().unserved(module, mode)
        if reason or module.sr_ratio == 1:
            return reason
        sr = module.sr
        if sr.kernel_size != sr.stride or sr.padding != (0, 0):
            return f"sr has kernel {sr.kernel_size}, stride {sr.stride} and padding {sr.padding}"
        return not_plain_conv("sr", sr) or not_layer_norm("norm", module.norm)

    def forward(self, x, H, W):
        w = self._weights(x)
        if w is None:
            return self.replaces.forward(self, x, H, W)
        (q, kv, proj, sr), (B, N, C) = w, x.shape
        queries = product(x, q).unflatten(2, (self.num_heads, -1))
        if sr is not None:
            image = x.unflatten(1, (H, W)).permute(0, 3, 1, 2)
            x = reduced(image, sr, self.sr, self.norm)
        k, v = product(x, kv).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        y = attention(queries, k, v, scale=self.scale).view(B, N, C)
        return self.proj_drop(product(y, proj))

    def derive(self):
        sr = packed_patch(self.sr) if self.sr_ratio > 1 else None
        return scaled(self.q), scaled(self.kv), scaled(self.proj), sr


def reduced(image: Any, w: Weights, conv: Any, norm: Any) -> Any:
    """Norm(conv(image)) as tokens: what PVT's keys and values are made from."""
    fuses = norm.weight.dtype == w.weight.dtype
    fused, stride = norm_of(norm) if fuses else None, conv.stride[0]
    tokens = patch_embed(image, w.weight, w.bias, stride=stride, norm=fused, packed=w.packed)
    return tokens if fuses else norm(tokens)


class PosCNN(Shaped):
    @classmethod
    def unserved(cls, module, mode):
        if len(module.proj) != 1:
            return f"proj has {len(module.proj)} layers"
        conv = module.proj[0]
        reason = not_one_of("proj.0", conv, nn.Conv2d)
        if reason:
            return reason
        if not conv.groups == conv.in_channels == conv.out_channels:
            return "proj.0 is not depthwise"
        square = len({*conv.kernel_size}) == len({*conv.stride}) == len({*conv.padding}) == 1
        same = conv.padding_mode == "zeros" and conv.dilation == (1, 1)
        return None if square and same else "proj.0 is dilated, not square or not zero-padded"

    def forward(self, x, H, W):
        if not self._hybridops_plan.intact():
            return self.replaces.forward(self, x, H, W)
        conv = self.proj[0]
        return position_encoding(
            x,
            conv.weight,
            conv.bias,
            grid=(H, W),
            stride=conv.stride[0],
            padding=conv.padding[0],
            residual=self.s == 1,
        )

    @classmethod
    def example(cls, module, generator):
        return torch.randn(1, 30, module.proj[0].in_channels, generator=generator), 5, 6
