"""Positional encoding generator (CPVT, Chu et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import backend, ops
from ._fusion import CONVS, is_plain, keeps_fp32


class PEG(nn.Module):
    """A depthwise convolution on the token grid, plus the tokens themselves; child `pos`.

    residual: default where stride is 1, as in CPVT and Twins.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
        residual: bool | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.residual = stride == 1 if residual is None else residual
        if self.residual and (stride != 1 or kernel_size % 2 == 0):
            raise ValueError(
                "PEG: residual needs stride 1 and an odd kernel_size, "
                f"got stride {stride}, kernel_size {kernel_size}"
            )
        self.pos = nn.Conv2d(
            dim,
            dim,
            kernel_size,
            stride,
            kernel_size // 2,
            groups=dim,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, grid: tuple[int, int], prefix: int = 0) -> Tensor:
        """x (B, prefix + H*W, dim) of a grid (H, W) -> the same, H and W divided by the stride.

        The first `prefix` tokens (a class token) pass through unchanged.
        """
        conv = self.pos
        if not backend.reference_forced() and is_plain(conv, CONVS):
            return position_encoding(
                x,
                conv.weight,
                conv.bias,
                grid=grid,
                prefix=prefix,
                stride=conv.stride[0],
                padding=conv.padding[0],
                residual=self.residual,
            )
        head, tokens = x[:, :prefix], x[:, prefix:]
        image = tokens.transpose(1, 2).unflatten(2, grid)
        y = conv(image) + image if self.residual else conv(image)
        y = y.flatten(2).transpose(1, 2)
        return torch.cat([head, y], dim=1) if prefix else y


def position_encoding(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    prefix: int = 0,
    residual: bool,
    **options: Any,
) -> Tensor:
    """ops.peg, but under autocast the residual stays in x's dtype, as plain torch has it.

    A residual stream that is rounded to bf16 here makes LayerNorm behind it train in bf16: its
    bias's gradient was 40 times worse.
    """
    if not residual or not keeps_fp32(x):
        return ops.peg(x, weight, bias, prefix=prefix, residual=residual, **options)
    y = ops.peg(x, weight, bias, prefix=prefix, residual=False, **options)
    if prefix == 0:
        return x + y
    return torch.cat([x[:, :prefix], x[:, prefix:] + y[:, prefix:]], dim=1)
