"""The authors' LeViT (known by shape): Linear_BN, Conv2d_BN, BN_Linear, Attention and Residual."""

from __future__ import annotations

import torch

from . import levit_shape as shape
from .shapes import Shaped


class LinearBN(Shaped, shape.LinearNorm):
    @classmethod
    def example(cls, module, generator):
        return (torch.randn(2, 3, module.c.in_features, generator=generator),)


class BNLinear(Shaped, shape.NormLinear):
    @classmethod
    def example(cls, module, generator):
        return (torch.randn(2, module.l.in_features, generator=generator),)


class ConvBN(Shaped, shape.ConvNorm):
    @classmethod
    def example(cls, module, generator):
        side = max(module.c.kernel_size) + 4
        return (torch.randn(1, module.c.in_channels, side, side, generator=generator),)


class Attention(Shaped, shape.Attention):
    @classmethod
    def parts(cls, module):
        activation, proj = module.proj
        return shape.Parts((module.qkv, proj), activation, module.num_heads)

    @classmethod
    def unserved(cls, module, mode):
        if len(module.proj) != 2:
            return f"proj has {len(module.proj)} layers, not an activation and a Linear_BN"
        return super().unserved(module, mode)

    @classmethod
    def example(cls, module, generator):
        N = module.attention_bias_idxs.shape[1]
        return (torch.randn(1, N, module.qkv.c.in_features, generator=generator),)


class AttentionSubsample(Shaped, shape.AttentionSubsample):
    @classmethod
    def parts(cls, module):
        activation, proj = module.proj
        return shape.Parts((module.kv, module.q[1], proj), activation, module.num_heads)

    @classmethod
    def subsample(cls, module):
        return module.q[0]

    @classmethod
    def unserved(cls, module, mode):
        if len(module.proj) != 2 or len(module.q) != 2:
            return "q and proj are not two layers each"
        return super().unserved(module, mode)

    @classmethod
    def example(cls, module, generator):
        N = module.attention_bias_idxs.shape[1]
        return (torch.randn(1, N, module.kv.c.in_features, generator=generator),)


class Residual(Shaped, shape.Residual):
    @classmethod
    def example(cls, module, generator):
        inner = module.m
        if cls.is_attention(inner):
            return Attention.example(inner, generator)
        return (torch.randn(2, 3, inner[0].c.in_features, generator=generator),)
