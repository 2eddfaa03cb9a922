"""Steps of a chain that know where on the grid of an image a token lies: Twins' and PVT's.

Tokens x are (B, H*W, C), row by row. Each step means what its `call` computes with single ops.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._contract import LARGEST_PADDING, check_int
from .attention import attention
from .chain import Layer, Step
from .layer import Norm, Weights
from .linear import linear
from .patch_embed import patch_embed
from .peg import peg

Size = tuple[int, int]


def into_windows(x: Tensor, size: Size, window: Size) -> Tensor:
    """Tokens (B, H*W, C) -> (windows, window tokens, C); H and W are multiples of the window."""
    B, _, C = x.shape
    (H, W), (h, w) = size, window
    x = x.reshape(B, H // h, h, W // w, w, C).transpose(2, 3)
    return x.reshape(-1, h * w, C)


def from_windows(x: Tensor, size: Size, window: Size) -> Tensor:
    """The inverse of into_windows."""
    C, (H, W), (h, w) = x.shape[2], size, window
    x = x.reshape(-1, H // h, W // w, h, w, C).transpose(2, 3)
    return x.reshape(-1, H * W, C)


def windows_step(grid: Size, window: Size, *, back: bool = False) -> Layer:
    """into_windows(x, grid, window), or from_windows where `back`.

    Raises ValueError for a window that does not fill the grid.
    """
    _check_grid("windows_step", grid)
    _check_grid("windows_step", window)
    if grid[0] % window[0] or grid[1] % window[1]:
        raise ValueError(f"windows_step: windows of {window} do not fill a grid of {grid}")

    def call(x: Tensor) -> Tensor:
        return (from_windows if back else into_windows)(x, grid, window)

    return Layer(call, Step.WINDOWS, (), (*grid, *window, int(back)), ())


def positions_step(weight: Tensor, bias: Tensor | None, *, grid: Size) -> Layer:
    """x + the depthwise convolution of x: `peg` with weight (C, 1, k, k), k odd."""
    _check_grid("positions_step", grid)
    padding = weight.shape[-1] // 2

    def call(x: Tensor) -> Tensor:
        return peg(x, weight, bias, grid=grid, padding=padding, residual=True)

    return Layer(call, Step.POSITIONS, (weight, bias), grid, ())


def reduced_step(
    q: Weights,
    reduction: Weights,
    kv: Weights,
    out: Weights,
    *,
    grid: Size,
    heads: int,
    scale: float | None = None,
    norm: Norm,
    reduction_norm: Norm,
    residual: bool = False,
) -> Layer:
    """Attention whose keys and values come from fewer tokens, in front of the product `out`.

    Queries are q(norm(x)). reduction.weight (C', C, r, r), packed, is a convolution of norm(x) with
    stride r, of which reduction_norm and kv make keys and values; kv.weight's rows are all heads'
    k, then all heads' v.
    """
    _check_grid("reduced_step", grid)
    check_int("reduced_step", "heads", heads, 1, LARGEST_PADDING)
    stride = reduction.weight.shape[-1]

    def call(x: Tensor) -> Tensor:
        gamma, beta, eps = norm
        tokens = F.layer_norm(x, x.shape[-1:], gamma, beta, eps)
        queries = linear(tokens, q.weight, q.bias, packed=q.packed).unflatten(2, (heads, -1))
        image = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
        weight, bias, packed = reduction
        fewer = patch_embed(image, weight, bias, stride=stride, norm=reduction_norm, packed=packed)
        keys = linear(fewer, kv.weight, kv.bias, packed=kv.packed)
        k, v = keys.unflatten(2, (2, heads, -1)).unbind(2)
        mixed = attention(queries, k, v, scale=scale).flatten(2)
        added = x if residual else None
        return linear(mixed, out.weight, out.bias, residual=added, packed=out.packed)

    (gamma, beta, eps), (gamma_r, beta_r, eps_r) = norm, reduction_norm
    tensors = (gamma, beta, *q, *reduction, gamma_r, beta_r, *kv, *out)
    factor = (q.weight.shape[0] // heads) ** -0.5 if scale is None else scale
    return Layer(call, Step.REDUCED, tensors, (heads, *grid, int(residual)), (eps, eps_r, factor))


def _check_grid(op: str, grid: Size) -> None:
    for name, side in zip(("height", "width"), grid, strict=True):
        check_int(op, name, side, 1, LARGEST_PADDING)
