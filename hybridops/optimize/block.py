"""A pre-norm transformer block as two layers of a chain: what timm's Block and ours share."""

from __future__ import annotations

from typing import Any

from ..ops.chain import Layer, attention_step, mlp_step
from .fast import norm_of, one_dtype, scaled


def block_layers(block: Any, activation: str, scale: float | None) -> list[Layer] | None:
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))), LayerScale folded into the products.

    None where the block's dtypes differ.
    """
    attn, mlp = block.attn, block.mlp
    layers = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2, block.norm1, block.norm2)
    if not one_dtype(layer.weight for layer in layers):
        return None
    gammas = [getattr(ls, "gamma", None) for ls in (block.ls1, block.ls2)]
    return [
        attention_step(
            scaled(attn.qkv),
            scaled(attn.proj, gammas[0]),
            heads=attn.num_heads,
            key_dim=attn.head_dim,
            scale=scale,
            norm=norm_of(block.norm1),
            residual=True,
        ),
        mlp_step(
            scaled(mlp.fc1),
            scaled(mlp.fc2, gammas[1]),
            activation=activation,
            norm=norm_of(block.norm2),
            residual=True,
        ),
    ]
