"""A 3 x 3 convolution of many channels, for inference: y = activation(conv(x) + bias + residual).

conv has stride 1 and pads by one pixel of zeros. The kernel is Winograd's minimal filtering
F(2 x 4, 3 x 3): every 2 x 4 pixels are made of a patch of 4 x 6, as 24 products a pair of channels
where the sum itself takes 72 (Winograd 1980; Lavin and Gray, "Fast Algorithms for Convolutional
Neural Networks", 2015). Its errors are between a third of oneDNN's convolution's and as large. Of
a single small image torch makes columns and takes MKL's product, two to six times as exact as both:
there torch's serves. A number that is not finite reaches all pixels of the tiles that it is in.
"""

from __future__ import annotations

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend
from ._contract import (
    ACTIVATIONS,
    CODES,
    REFUSALS,
    activation_code,
    check_one_device,
    check_shape,
    check_tensor,
    library,
)
from .linear import pack_linear


# meaning
def conv3x3_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    y = F.conv2d(x, weight, bias, padding=1)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


# contract: the kernel's result is (B, H, W, N)
library.define(
    "conv3x3(Tensor x, Tensor packed, int channels, Tensor? bias, int activation, "
    "Tensor? residual) -> Tensor"
)


@torch.library.register_fake("hybridops::conv3x3", lib=library)
def _(x, packed, channels, *args):
    check_one_device("conv3x3", x, packed, *args)
    B, _, H, W = x.shape
    return x.new_empty((B, H, W, channels))


_conv3x3 = torch.ops.hybridops.conv3x3.default


# door
def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """x (B, C, H, W), weight (N, C, 3, 3), bias (N,), residual (B, N, H, W) -> like the residual.

    packed: pack_conv3x3(weight) or None; with it the result is channels_last, and the kernel
    serves in inference on a CPU. Raises ValueError for shapes and activations that do not fit,
    TypeError for dtypes.
    """
    if packed is not None and backend.runs_at_once(x) and x.ndim == 4 and not is_small(x):
        with suppress(*REFUSALS), backend.below_autograd():
            return run_packed(x, packed, weight.shape[0], bias, activation, residual)
    check_tensor("conv3x3", "x", x, 4)
    check_tensor("conv3x3", "weight", weight, 4, x)
    N, C = weight.shape[0], x.shape[1]
    check_shape("conv3x3", "weight", weight, (N, C, 3, 3))
    if bias is not None:
        check_tensor("conv3x3", "bias", bias, 1, x)
        check_shape("conv3x3", "bias", bias, (N,))
    activation_code("conv3x3", activation)
    if packed is not None:
        check_tensor("conv3x3", "packed", packed, 1, x)
    if residual is not None:
        check_tensor("conv3x3", "residual", residual, 4, x)
        check_shape("conv3x3", "residual", residual, (x.shape[0], N, *x.shape[2:]))
    if packed is not None and not torch.is_grad_enabled() and not is_small(x):
        backend.which("conv3x3", x)  # counts the call, or raises where the kernel was forced
    return conv3x3_reference(x, weight, bias, activation, residual)


def is_small(x: Tensor) -> bool:
    """Whether torch's own convolution is as exact as no other: the size is torch's choice."""
    return x.shape[0] == 1 and x.numel() <= 20 * 32 * 32


def run_packed(x, packed, channels, bias, activation, residual):
    """The kernel, whose checks refuse what does not fit: (B, N, H, W) in channels_last."""
    image = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    y = _conv3x3(image, packed, channels, bias, CODES[activation], residual)
    return y.permute(0, 3, 1, 2)


def _points(nodes: tuple[float, ...]) -> Tensor:
    """The paper's G: a kernel's polynomial at these nodes and infinity, (len(nodes) + 1, 3).

    Each row over the product of the node's distances to the others (Lagrange's interpolation).
    """
    x = torch.tensor(nodes, dtype=torch.float64)
    apart = x[:, None] - x + torch.eye(len(nodes), dtype=torch.float64)
    powers = x[:, None] ** torch.arange(3)
    return torch.cat([powers / apart.prod(1, keepdim=True), powers.new_tensor([[0, 0, 1.0]])])


_ROWS = _points((0.0, 1.0, -1.0))
_COLUMNS = _points((0.0, 0.75, -0.75, 1.5, -1.5))  # csrc/simd/winograd.cpp has the same, and why


def pack_conv3x3(weight: Tensor) -> Tensor | None:
    """weight (N, C, 3, 3) of fp32 as the kernel reads it, or None where no kernel does.

    24 numbers for every 9, computed in float64. Raises as pack_linear does.
    """
    check_tensor("pack_conv3x3", "weight", weight, 4)
    check_shape("pack_conv3x3", "weight", weight, (*weight.shape[:2], 3, 3))
    if weight.dtype != torch.float32 or not backend.packs(weight):
        return None
    wide = weight.detach().double()
    points = torch.einsum("ri,ncij,sj->nrsc", _ROWS, wide, _COLUMNS)
    return pack_linear(points.flatten(1).float())
