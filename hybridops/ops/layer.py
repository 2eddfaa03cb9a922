"""Whole layers in one dispatch, for inference: an attention layer or MLP, norm to residual.

    attention_layer: y = linear(attention(heads of linear(norm(x)))) + x
    mlp_layer:       y = linear(activation(linear(norm(x)))) + x

They mean exactly what the five ops mean when put together, and are put together from them wherever
one dispatch cannot serve: while gradients are recorded, while compiling, under autocast, on other
backends and dtypes. At batch 1 every dispatch costs about as much as a small product (10 us), and a
transformer block has five of them.
"""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend
from ._contract import (
    CODES,
    REFUSALS,
    check_int,
    check_one_device,
    check_tensor,
    is_plain,
    library,
)
from .attention import attention
from .linear import linear


class Weights(NamedTuple):
    """A linear layer: weight (N, K), bias (N,) or None, and pack_linear(weight) or None."""

    weight: Tensor
    bias: Tensor | None = None
    packed: Tensor | None = None


Norm = tuple[Tensor, Tensor | None, float]

# contract
library.define(
    "attention_layer(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor "
    "weight_qkv, "
    "Tensor? bias_qkv, Tensor? packed_qkv, Tensor? bias, int heads, int key_dim, bool "
    "interleaved, float scale, "
    "int activation, Tensor weight_out, Tensor? bias_out, Tensor? packed_out, bool residual) -> "
    "Tensor"
)
library.define(
    "mlp_layer(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight1, "
    "Tensor? bias1, "
    "Tensor? packed1, int activation, Tensor weight2, Tensor? bias2, Tensor? packed2, bool "
    "residual) -> Tensor"
)


@torch.library.register_fake("hybridops::attention_layer", lib=library)
def _(x, *args):
    check_one_device("attention_layer", x, *args)
    return x.new_empty((*x.shape[:2], args[12].shape[0]))


@torch.library.register_fake("hybridops::mlp_layer", lib=library)
def _(x, *args):
    check_one_device("mlp_layer", x, *args)
    return x.new_empty((*x.shape[:-1], args[7].shape[0]))


_attention_layer = torch.ops.hybridops.attention_layer.default
_mlp_layer = torch.ops.hybridops.mlp_layer.default
NO_NORM = (None, None, 0.0)
REFUSED = "refused as one dispatch, made of single ops"


# doors
def attention_layer(
    x: Tensor,
    qkv: Weights,
    out: Weights,
    *,
    heads: int,
    key_dim: int,
    scale: float | None = None,
    interleaved: bool = False,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: bool = False,
) -> Tensor:
    """x (B, N, C), qkv.weight (H * (2 * key_dim + Dv), C), out.weight (Co, H * Dv) -> (B, N, Co).

    The rows of qkv.weight are all heads' q, then k, then v; or, interleaved, q, k and v head by
    head (LeViT). norm, bias, scale, activation as in `linear` and `attention`; activation stands
    between attention and `out`. Raises what `linear` and `attention` raise.
    """
    if backend.runs_at_once(x) and is_plain(scale):
        with suppress(*REFUSALS), backend.below_autograd():
            factor = key_dim**-0.5 if scale is None else scale
            return _attention_layer(
                x,
                *(norm or NO_NORM),
                *qkv,
                bias,
                heads,
                key_dim,
                interleaved,
                factor,
                CODES[activation],
                *out,
                residual,
            )
        backend.fallbacks["attention_layer", REFUSED] += 1
    check_tensor("attention_layer", "x", x, 3)
    check_int("attention_layer", "heads", heads, 1)
    check_int("attention_layer", "key_dim", key_dim, 1)
    projected = linear(x, qkv.weight, qkv.bias, norm=norm, packed=qkv.packed)
    B, N, width = projected.shape
    Dv = width // heads - 2 * key_dim
    if width % heads or Dv < 1:
        raise ValueError(
            f"attention_layer: qkv.weight must have {heads} * (2 * {key_dim} + Dv) rows, "
            f"got {width}"
        )
    if interleaved:
        q, k, v = projected.view(B, N, heads, -1).split([key_dim, key_dim, Dv], dim=3)
    else:
        parts = projected.split([heads * key_dim, heads * key_dim, heads * Dv], dim=2)
        q, k, v = (part.unflatten(2, (heads, -1)) for part in parts)
    mixed = attention(q, k, v, bias=bias, scale=scale, activation=activation)
    return linear(
        mixed.flatten(2), out.weight, out.bias, residual=x if residual else None, packed=out.packed
    )


def mlp_layer(
    x: Tensor,
    up: Weights,
    down: Weights,
    *,
    activation: str,
    norm: Norm | None = None,
    residual: bool = False,
) -> Tensor:
    """x (..., C), up.weight (hidden, C), down.weight (Co, hidden) -> (..., Co).

    Raises what `linear` raises.
    """
    if backend.runs_at_once(x):
        with suppress(*REFUSALS), backend.below_autograd():
            return _mlp_layer(x, *(norm or NO_NORM), *up, CODES[activation], *down, residual)
        backend.fallbacks["mlp_layer", REFUSED] += 1
    hidden = linear(x, up.weight, up.bias, norm=norm, activation=activation, packed=up.packed)
    return linear(
        hidden, down.weight, down.bias, residual=x if residual else None, packed=down.packed
    )
