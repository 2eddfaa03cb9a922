"""A pre-norm transformer block in two dispatches: what all of its rules have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..ops import attention, attention_layer, linear, mlp_layer
from ..ops.layer import Weights
from .fast import norm_of, one_dtype, scaled


class BlockWeights(NamedTuple):
    qkv: Weights
    proj: Weights
    fc1: Weights
    fc2: Weights


def block_weights(block: Any) -> BlockWeights | None:
    """The block's products, LayerScale folded in; None where its dtypes differ."""
    attn, mlp = block.attn, block.mlp
    layers = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2, block.norm1, block.norm2)
    if not one_dtype(layer.weight for layer in layers):
        return None
    gammas = [getattr(ls, "gamma", None) for ls in (block.ls1, block.ls2)]
    qkv, fc1 = scaled(attn.qkv), scaled(mlp.fc1)
    return BlockWeights(qkv, scaled(attn.proj, gammas[0]), fc1, scaled(mlp.fc2, gammas[1]))


def run_block(
    block: Any, x: Tensor, weights: BlockWeights, activation: str, scale: float | None
) -> Tensor:
    """x + attn(norm1(x)), then x + mlp(norm2(x))"""
    qkv, proj, fc1, fc2 = weights
    attn, norms = block.attn, (norm_of(block.norm1), norm_of(block.norm2))
    if type(attn.q_norm) is nn.Identity:
        return fused_block(x, weights, norms, attn.num_heads, attn.head_dim, activation, scale)
    packed = linear(x, qkv.weight, qkv.bias, norm=norms[0], packed=qkv.packed)
    q, k, v = packed.unflatten(2, (3, attn.num_heads, attn.head_dim)).unbind(2)
    out = attention(attn.q_norm(q), attn.k_norm(k), v, scale=scale).flatten(2)
    x = linear(out, proj.weight, proj.bias, residual=x, packed=proj.packed)
    return mlp_layer(x, fc1, fc2, norm=norms[1], activation=activation, residual=True)


def fused_block(
    x: Tensor,
    weights: BlockWeights,
    norms: tuple[Any, Any],
    heads: int,
    key_dim: int,
    activation: str,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The block in two dispatches; norms as norm_of gives them, bias is added to the scores."""
    x = attention_layer(
        x,
        weights.qkv,
        weights.proj,
        heads=heads,
        key_dim=key_dim,
        scale=scale,
        norm=norms[0],
        bias=bias,
        residual=True,
    )
    fc1, fc2 = weights.fc1, weights.fc2
    return mlp_layer(x, fc1, fc2, norm=norms[1], activation=activation, residual=True)
