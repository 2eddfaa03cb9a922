"""Self-attention of vision transformers: qkv, the fused core on strided views of it, proj."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backend, ops
from ._derived import weight_rows
from ._fusion import LINEARS, fused_linear, is_off, is_plain, keeps_fp32, norm_args, plain_linears


class Attention(nn.Module):
    """timm's Attention: x (B, N, dim) -> (B, N, dim_out).

    `is_causal`, and dropout on the attention weights while training, run in torch's
    scaled_dot_product_attention; `backend.fallbacks` counts them.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"Attention: dim {dim} must be a multiple of num_heads {num_heads}")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("Attention: qk_norm and scale_norm need a norm_layer, got None")
        where = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = inner = num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, inner * 3, bias=qkv_bias, **where)
        self.q_norm = _norm(norm_layer if qk_norm else None, self.head_dim, where)
        self.k_norm = _norm(norm_layer if qk_norm else None, self.head_dim, where)
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = _norm(norm_layer if scale_norm else None, inner, where)
        self.gate = nn.Linear(dim, inner, bias=qkv_bias, **where) if gated else None
        self.proj = nn.Linear(inner, dim_out or dim, bias=proj_bias, **where)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """attn_mask: bool (True = attend) or additive float, broadcastable to (B, heads, N, N)."""
        return self_attention(self, x, attn_mask=attn_mask, is_causal=is_causal)


_NOTHING = (nn.Identity, type(None))


def _norm(layer, features, where):
    return nn.Identity() if layer is None else layer(features, **where)


def self_attention(
    module: Any,
    x: Tensor,
    norm: nn.Module | None = None,
    residual: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """module(norm(x)) + residual for an Attention (timm's or ours)."""
    if attn_mask is None and not is_causal and backend.runs_at_once(x):
        y = _at_once(module, x, norm, residual)
        if y is not None:
            return y
    B, N, _ = x.shape
    gated = module._modules.get("gate") is not None
    if gated and norm is not None:
        x, norm = norm(x), None
    qkv = fused_linear(module, "qkv", x, norm=norm)
    q, k, v = qkv.view(B, N, 3, module.num_heads, -1).unbind(2)
    out = _core(module, q, k, v, attn_mask, is_causal).flatten(2)
    if gated:
        out = module.norm(out) * module.gate(x).sigmoid()
    return _project(module, out, None if gated else module._modules.get("norm"), residual)


def _at_once(module, x, norm, residual):
    """self_attention() without a mask in one dispatch, or None where it takes several."""
    children = module._modules
    if residual is not None and residual is not x:
        return None
    if not all(type(children.get(n)) in _NOTHING for n in ("q_norm", "k_norm", "norm", "gate")):
        return None
    if not (is_off(children.get("attn_drop")) and is_off(children.get("proj_drop"))):
        return None
    affine = None if norm is None else norm_args(norm, x)
    layers = plain_linears(module, "qkv", "proj")
    if layers is None or (norm is not None and affine is None):
        return None
    heads = module.num_heads
    return ops.attention_layer(
        x,
        *layers,
        heads=heads,
        key_dim=layers[0].weight.shape[0] // (3 * heads),
        scale=module.scale,
        norm=affine,
        residual=residual is not None,
    )


def first_tokens_attention(module: Any, x: Tensor, norm: nn.Module, count: int) -> Tensor | None:
    """(x + module(norm(x)))[:, :count], with queries, proj and residual of those tokens alone.

    None where that takes more than a qkv to slice: a stand-in for it, a gate, autocast.
    """
    qkv = module._modules["qkv"]
    if not is_plain(qkv, LINEARS) or module._modules.get("gate") is not None or keeps_fp32(x):
        return None
    affine = norm_args(norm, x)
    if affine is None or backend.reference_forced():
        return None
    (B, N, _), H = x.shape, module.num_heads
    inner, (weight, bias) = qkv.out_features // 3, (qkv.weight, qkv.bias)
    wq = weight_rows(module, "q", weight, bias, 0, inner)
    wkv = weight_rows(module, "kv", weight, bias, inner, 3 * inner)
    first = x[:, :count]
    q = ops.linear(first, wq.weight, wq.bias, norm=affine, packed=wq.packed)
    kv = ops.linear(x, wkv.weight, wkv.bias, norm=affine, packed=wkv.packed)
    k, v = kv.view(B, N, 2, H, -1).unbind(2)
    out = _core(module, q.view(B, count, H, -1), k, v, None, False).flatten(2)
    return _project(module, out, module._modules.get("norm"), first)


def _project(module, out, norm, residual):
    if norm is not None and type(norm) is nn.Identity:
        norm = None
    drop = module._modules.get("proj_drop")
    if is_off(drop):
        return fused_linear(module, "proj", out, norm=norm, residual=residual)
    y = drop(fused_linear(module, "proj", out, norm=norm))
    return y if residual is None else residual + y


def _core(module, q, k, v, attn_mask, is_causal):
    """q (B, Nq, H, D), k and v (B, Nk, H, D) -> (B, Nq, H, D)"""
    q_norm, k_norm = module._modules.get("q_norm"), module._modules.get("k_norm")
    if q_norm is not None and type(q_norm) is not nn.Identity:
        q = q_norm(q)
    if k_norm is not None and type(k_norm) is not nn.Identity:
        k = k_norm(k)
    drop = module._modules.get("attn_drop")
    dropout = drop.p if drop is not None and drop.training else 0.0
    if is_causal or dropout or backend.reference_forced():
        return torch_attention(q, k, v, attn_mask, dropout, is_causal, module.scale)
    bias, padding = split_mask(attn_mask, q)
    return ops.attention(q, k, v, bias=bias, key_padding_mask=padding, scale=module.scale)


def torch_attention(q, k, v, attn_mask, dropout, is_causal, scale):
    """torch's own, on (B, N, H, D): for what our op does not do, and inside `use("reference")`."""
    if is_causal or dropout:
        backend.which("attention", q, "causal" if is_causal else "dropout while training")
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=scale
    )
    return out.transpose(1, 2)


def split_mask(attn_mask: Tensor | None, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """SDPA's mask as (additive bias, key_padding_mask) of ops.attention."""
    if attn_mask is None:
        return None, None
    if attn_mask.dtype != torch.bool:
        bias = attn_mask
    elif attn_mask.ndim == 4 and attn_mask.shape[1] == attn_mask.shape[2] == 1:
        return None, attn_mask[:, 0, 0].logical_not().expand(q.shape[0], -1)
    else:
        bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -math.inf)
    return (bias[None] if bias.ndim == 2 else bias), None
