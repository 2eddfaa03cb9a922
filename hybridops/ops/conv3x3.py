"""A 3 x 3 convolution of many channels, for inference: y = activation(conv(x) + bias + residual).

The kernel is Winograd's minimal filtering (Winograd 1980; Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", 2015): for stride 1 F(2 x 4, 3 x 3), where a patch of 4 x 6 yields
2 x 4 pixels with 24 products a pair of channels and the sum itself takes 72; for stride 2 a patch
of 5 x 5 yields 2 x 2 with 25 for 36. Its errors are between a fifth of oneDNN's convolution's and
as large. Of a single small image torch makes columns and takes MKL's product, two to six times as
exact as both: there torch's serves. A number that is not finite reaches all pixels of the tiles
that it is in.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from .. import backend
from ._contract import (
    ACTIVATIONS,
    CODES,
    REFUSALS,
    activation_code,
    check_int,
    check_one_device,
    check_shape,
    check_tensor,
    is_autocast_on,
    library,
)
from .conv_stem import conv_reference
from .linear import pack_linear

Sides = tuple[int, int, int, int]  # padding: top, left, bottom, right


# meaning
def conv3x3_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sides,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    y = conv_reference(x, weight, bias, stride, padding)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


# contract: the kernel's result is (B, H', W', N)
library.define(
    "conv3x3(Tensor x, Tensor packed, int channels, int stride, int top, int left, int bottom, "
    "int right, Tensor? bias, int activation, Tensor? residual) -> Tensor"
)


@torch.library.register_fake("hybridops::conv3x3", lib=library)
def _(x, packed, channels, stride, top, left, bottom, right, *args):
    check_one_device("conv3x3", x, packed, *args)
    high, wide = x.shape[2] + top + bottom - 3, x.shape[3] + left + right - 3
    return x.new_empty((x.shape[0], high // stride + 1, wide // stride + 1, channels))


_conv3x3 = torch.ops.hybridops.conv3x3.default


# door
def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | Sides = 1,
    activation: str = "none",
    residual: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """x (B, C, H, W), weight (N, C, 3, 3), bias (N,), residual like the result -> (B, N, H', W').

    stride 1 or 2. padding: zeros on all sides, or (top, left, bottom, right) of them, 0 to 2 each.
    packed: pack_conv3x3(weight, stride) or None; with it the result is channels_last, and the
    kernel serves in inference on a CPU. Raises ValueError for shapes, strides, paddings and
    activations that do not fit, TypeError for dtypes, RuntimeError for a `packed` of another size
    or stride.
    """
    sides = (padding,) * 4 if isinstance(padding, int) else padding
    if packed is not None and backend.runs_at_once(x) and x.ndim == 4 and not is_small(x):
        with suppress(*REFUSALS), backend.below_autograd():
            end = (bias, stride, sides, activation, residual)
            return run_conv3x3(x, packed, weight.shape[0], *end)
    check_tensor("conv3x3", "x", x, 4)
    check_tensor("conv3x3", "weight", weight, 4, x)
    N, C = weight.shape[0], x.shape[1]
    check_shape("conv3x3", "weight", weight, (N, C, 3, 3))
    if bias is not None:
        check_tensor("conv3x3", "bias", bias, 1, x)
        check_shape("conv3x3", "bias", bias, (N,))
    check_int("conv3x3", "stride", stride, 1, 2)
    if not isinstance(sides, tuple) or len(sides) != 4:
        raise ValueError(f"conv3x3: padding must be an int or four ints, got {padding!r}")
    for side in sides:
        check_int("conv3x3", "padding", side, 0, 2)
    size = [n + a + b - 3 for n, a, b in zip(x.shape[2:], sides[:2], sides[2:], strict=True)]
    if min(size) < 0:
        raise ValueError(f"conv3x3: the kernel is larger than the padded image {tuple(x.shape)}")
    activation_code("conv3x3", activation)
    if packed is not None:
        check_tensor("conv3x3", "packed", packed, 1, x)
    if residual is not None:
        check_tensor("conv3x3", "residual", residual, 4, x)
        shape = (x.shape[0], N, *(n // stride + 1 for n in size))
        check_shape("conv3x3", "residual", residual, shape)
    due = packed is not None and not is_small(x) and not torch.is_grad_enabled()
    due = due and not is_autocast_on(x) and not backend.is_captured()
    if due and backend.which("conv3x3", x) == "cpu":  # counts a call that no kernel serves
        return run_conv3x3(x, packed, N, bias, stride, sides, activation, residual)
    return conv3x3_reference(x, weight, bias, stride, sides, activation, residual)


def is_small(x: Tensor) -> bool:
    """Whether torch makes columns of this image, as it does up to that size: see above."""
    return x.shape[0] == 1 and x.numel() <= 20 * 32 * 32


def run_conv3x3(x, packed, channels, bias, stride, sides, activation, residual):
    """The kernel, whose checks refuse what does not fit: (B, N, H', W') in channels_last."""
    image = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    code = CODES[activation]
    y = _conv3x3(image, packed, channels, stride, *sides, bias, code, residual)
    return y.permute(0, 3, 1, 2)


def _at_points(nodes: tuple[float, ...]) -> Tensor:
    """The paper's G: a kernel's polynomial at these nodes and infinity, (len(nodes) + 1, 3).

    Each row over the product of the node's distances to the others (Lagrange's interpolation).
    """
    x = torch.tensor(nodes, dtype=torch.float64)
    apart = x[:, None] - x + torch.eye(len(nodes), dtype=torch.float64)
    powers = x[:, None] ** torch.arange(3)
    return torch.cat([powers / apart.prod(1, keepdim=True), powers.new_tensor([[0, 0, 1.0]])])


# csrc/simd/winograd.cpp has the counterparts, and the reasons.
_ROWS = _at_points((0.0, 1.0, -1.0))
_COLUMNS = _at_points((0.0, 0.75, -0.75, 1.5, -1.5))
_HALVING = torch.tensor(  # by operand: (w0, w1), w0 + w2, (w2, w1)
    [[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 1], [0, 1, 0]], dtype=torch.float64
)
_OPERANDS = ((0, 1), (2,), (3, 4))


def pack_conv3x3(weight: Tensor, stride: int = 1) -> Tensor | None:
    """weight (N, C, 3, 3) of fp32 as the kernel reads it, or None where no kernel does.

    24 numbers (stride 2: 25) for every 9, computed in float64. Raises as pack_linear does.
    """
    check_tensor("pack_conv3x3", "weight", weight, 4)
    check_shape("pack_conv3x3", "weight", weight, (*weight.shape[:2], 3, 3))
    check_int("pack_conv3x3", "stride", stride, 1, 2)
    if weight.dtype != torch.float32 or not backend.packs(weight):
        return None
    rows, columns = (_ROWS, _COLUMNS) if stride == 1 else (_HALVING, _HALVING)
    points = torch.einsum("ri,ncij,sj->nrsc", rows, weight.detach().double(), columns)
    if stride == 2:  # side by side what one operand has
        order = [(r, s) for i in _OPERANDS for j in _OPERANDS for r in i for s in j]
        points = torch.stack([points[:, r, s] for r, s in order], 1)
    return pack_linear(points.flatten(1).float())
