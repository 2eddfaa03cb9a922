"""LeViT's attentions and perceptron as layers of a chain, BatchNorm folded: timm's and ours.

Both keep timm's names: a product is `linear` (a convolution of one pixel in timm's conv variants)
and `bn`; biases stand in a table with its index.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..nn._derived import fold_behind
from ..ops.chain import Layer, attention_step, mlp_step, subsample_step
from ..ops.layer import Weights
from .fast import packed_linear


def product(layer: Any) -> Weights:
    """A linear layer, or a convolution of one pixel, with the BatchNorm behind it."""
    linear = layer.linear
    return packed_linear(*fold_behind(linear.weight.flatten(1), linear.bias, layer.bn))


def spread_out(attn: Any) -> Tensor:
    """The bias of every score, (1, H, Nq, Nk)."""
    return attn.attention_biases[:, attn.attention_bias_idxs][None]


def attention_layers(attn: Any, activation: str, residual: bool) -> list[Layer]:
    """proj(activation(attention(qkv(x)))), + x where it is a residual."""
    layer = attention_step(
        product(attn.qkv),
        product(attn.proj.ln),
        heads=attn.num_heads,
        key_dim=attn.key_dim,
        scale=attn.scale,
        interleaved=True,
        bias=spread_out(attn),
        activation=activation,
        residual=residual,
    )
    return [layer]


def _averages(down: Any) -> bool:
    """Whether the queries' tokens are averages, not every stride-th token."""
    return down.kernel_size != 1 if isinstance(down, nn.AvgPool2d) else down.pool is not None


def subsample_layers(attn: Any, activation: str) -> list[Layer] | None:
    """The attention between two stages; None where its queries are averages."""
    if _averages(attn.q.down):
        return None
    layer = subsample_step(
        *(product(part) for part in (attn.kv, attn.q.ln, attn.proj.ln)),
        heads=attn.num_heads,
        key_dim=attn.key_dim,
        scale=attn.scale,
        grid=tuple(attn.resolution),
        stride=attn.stride,
        bias=spread_out(attn),
        activation=activation,
    )
    return [layer]


def mlp_layers(mlp: Any, activation: str, residual: bool) -> list[Layer]:
    up, down = product(mlp.ln1), product(mlp.ln2)
    return [mlp_step(up, down, activation=activation, residual=residual)]
