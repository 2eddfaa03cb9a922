"""A pre-norm transformer block as two layers of a chain: what all of its rules have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..ops.chain import Layer, attention_step, mlp_step
from ..ops.layer import Norm, Weights
from .fast import norm_of, one_dtype, scaled


class BlockWeights(NamedTuple):
    qkv: Weights
    proj: Weights
    fc1: Weights
    fc2: Weights


def fused_layers(
    weights: BlockWeights,
    norms: tuple[Norm, Norm],
    heads: int,
    key_dim: int,
    activation: str,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> list[Layer]:
    """x + attn(norm1(x)), then x + mlp(norm2(x)); norms as norm_of gives them.

    bias, (1 or windows, heads, N, N), is added to the scores.
    """
    return [
        attention_step(
            weights.qkv,
            weights.proj,
            heads=heads,
            key_dim=key_dim,
            scale=scale,
            norm=norms[0],
            bias=bias,
            residual=True,
        ),
        mlp_step(weights.fc1, weights.fc2, activation=activation, norm=norms[1], residual=True),
    ]


def block_weights(block: Any) -> BlockWeights | None:
    """Of timm's Block or ours, LayerScale folded into the products; None where dtypes differ."""
    attn, mlp = block.attn, block.mlp
    layers = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2, block.norm1, block.norm2)
    if not one_dtype(layer.weight for layer in layers):
        return None
    gammas = [getattr(ls, "gamma", None) for ls in (block.ls1, block.ls2)]
    return BlockWeights(
        scaled(attn.qkv), scaled(attn.proj, gammas[0]), scaled(mlp.fc1), scaled(mlp.fc2, gammas[1])
    )


def block_layers(block: Any, activation: str, scale: float | None) -> list[Layer] | None:
    """timm's Block or ours as layers of a chain."""
    weights, attn = block_weights(block), block.attn
    if weights is None:
        return None
    norms = norm_of(block.norm1), norm_of(block.norm2)
    return fused_layers(weights, norms, attn.num_heads, attn.head_dim, activation, scale)
