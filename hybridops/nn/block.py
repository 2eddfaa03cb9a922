"""Pre-norm transformer block: norms and residuals run inside the products of attention and MLP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._fusion import is_off, is_ours
from .attention import Attention, first_tokens_attention, self_attention
from .mlp import Mlp, mlp

NORM = partial(nn.LayerNorm, eps=1e-6)  # of every vision transformer since the first


class DropPath(nn.Module):
    """Stochastic depth per sample: drops a residual branch while training, scaled by 1 / keep."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0], *[1] * (x.ndim - 1))).bernoulli_(keep)
        return x * (mask.div_(keep) if keep > 0 else mask)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (CaiT)."""

    def __init__(self, dim: int, init_values: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """timm's vision transformer Block on x (B, N, dim): x + attn(norm1(x)), x + mlp(norm2(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = NORM,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **where)
        self.attn = Attention(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            **where,
        )
        self.ls1 = LayerScale(dim, init_values, **where) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **where)
        self.mlp = Mlp(
            dim, int(dim * mlp_ratio), act_layer=act_layer, bias=proj_bias, drop=proj_drop, **where
        )
        self.ls2 = LayerScale(dim, init_values, **where) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return block(self, x, attn_mask, is_causal)


def block(
    module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """The forward of a pre-norm block (timm's or ours)."""
    m = module._modules
    attn = m["attn"]
    if _is_bare(m, "ls1", "drop_path1") and is_ours(attn, Attention):
        x = self_attention(attn, x, m["norm1"], x, attn_mask, is_causal)
    else:
        y = attn(m["norm1"](x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + m["drop_path1"](m["ls1"](y))
    return _mlp_branch(m, x)


def _is_bare(m, scale, drop):
    return type(m[scale]) is nn.Identity and is_off(m[drop])


def _mlp_branch(m, x):
    inner = m["mlp"]
    if _is_bare(m, "ls2", "drop_path2") and is_ours(inner, Mlp):
        return mlp(inner, x, m["norm2"], x)
    return x + m["drop_path2"](m["ls2"](inner(m["norm2"](x))))


def first_tokens(module: Any, x: Tensor, count: int = 1) -> Tensor:
    """block(module, x)[:, :count], computing for the other tokens no more than keys and values."""
    m = module._modules
    attn = m["attn"]
    y = None
    if _is_bare(m, "ls1", "drop_path1") and is_ours(attn, Attention):
        y = first_tokens_attention(attn, x, m["norm1"], count)
    return block(module, x)[:, :count] if y is None else _mlp_branch(m, y)
