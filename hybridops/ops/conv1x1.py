"""A 1 x 1 convolution, for inference: y = activation(group_norm(conv(x) + bias) + residual).

The kernel is the product of `linear`, on the pixels of an image in channels_last where they lie. Of
a GroupNorm behind it each thread adds up the statistics of what it has just computed, so that scale
and shift are the only pass over the image.
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
from .group_norm import check_group_norm, group_norm_reference
from .linear import pack_linear

GroupNorm = tuple[int, Tensor | None, Tensor | None, float]  # groups, weight, bias, eps
_NO_NORM = (None, None, None, 0.0)


# meaning
def conv1x1_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    activation: str,
    residual: Tensor | None,
    norm: GroupNorm | None,
) -> Tensor:
    y = conv_reference(x, weight, bias, stride, (0, 0, 0, 0))
    if norm is not None:
        return group_norm_reference(y, *norm, activation, residual)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


# contract: the kernel's result is (B, H', W', N)
library.define(
    "conv1x1(Tensor x, Tensor packed, int channels, int stride, Tensor? bias, int activation, "
    "Tensor? residual, int? groups, Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor"
)
library.define(
    "conv1x1_(Tensor(a!) residual, Tensor x, Tensor packed, int stride, Tensor? bias, "
    "int activation) -> ()"
)


@torch.library.register_fake("hybridops::conv1x1", lib=library)
def _(x, packed, channels, stride, *args):
    check_one_device("conv1x1", x, packed, *args)
    high, wide = ((n - 1) // stride + 1 for n in x.shape[2:])
    return x.new_empty((x.shape[0], high, wide, channels))


@torch.library.register_fake("hybridops::conv1x1_", lib=library)
def _(residual, x, packed, *args):
    check_one_device("conv1x1_", residual, x, packed, *args)


_conv1x1 = torch.ops.hybridops.conv1x1.default
_conv1x1_in_place = torch.ops.hybridops.conv1x1_.default


# door
def conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
    group_norm: GroupNorm | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """x (B, C, H, W), weight (N, C, 1, 1), bias (N,), residual like the result -> (B, N, H', W').

    H' = ceil(H / stride). group_norm: (groups, weight (N,), bias (N,), eps), weight and bias may be
    None. packed: pack_conv1x1(weight) or None; with it the result is channels_last, and the kernel
    serves fp32 in inference on a CPU. Raises ValueError for shapes, strides, groups and activations
    that do not fit, TypeError for dtypes, RuntimeError for a `packed` of another size.
    """
    end = (bias, stride, activation, residual, group_norm)
    if packed is not None and backend.runs_at_once(x) and x.ndim == 4:
        with suppress(*REFUSALS), backend.below_autograd():
            return run_conv1x1(x, packed, weight.shape[0], *end)
    check_tensor("conv1x1", "x", x, 4)
    check_tensor("conv1x1", "weight", weight, 4, x)
    N, C = weight.shape[0], x.shape[1]
    check_shape("conv1x1", "weight", weight, (N, C, 1, 1))
    if bias is not None:
        check_tensor("conv1x1", "bias", bias, 1, x)
        check_shape("conv1x1", "bias", bias, (N,))
    check_int("conv1x1", "stride", stride, 1)
    if 0 in x.shape[2:]:
        raise ValueError(f"conv1x1: x must have pixels, got {tuple(x.shape)}")
    activation_code("conv1x1", activation)
    if residual is not None:
        check_tensor("conv1x1", "residual", residual, 4, x)
        shape = (x.shape[0], N, *(-(-n // stride) for n in x.shape[2:]))
        check_shape("conv1x1", "residual", residual, shape)
    if group_norm is not None:
        if not isinstance(group_norm, tuple) or len(group_norm) != 4:
            raise ValueError("conv1x1: group_norm must be (groups, weight, bias, eps)")
        check_group_norm("conv1x1", N, *group_norm, like=x)
    if packed is not None:
        check_tensor("conv1x1", "packed", packed, 1, x)
    due = not (torch.is_grad_enabled() or is_autocast_on(x) or backend.is_captured())
    due = due and x.shape[1] > 0
    if packed is not None and due and backend.which("conv1x1", x) == "cpu":  # which counts
        return run_conv1x1(x, packed, N, *end)
    return conv1x1_reference(x, weight, *end)


def run_conv1x1(
    x: Tensor,
    packed: Tensor,
    channels: int,
    bias: Tensor | None,
    stride: int,
    activation: str,
    residual: Tensor | None,
    norm: GroupNorm | None = None,
    overwrite: bool = False,
) -> Tensor:
    """The kernel, whose checks refuse what does not fit: (B, N, H', W') in channels_last.

    overwrite: without a norm, the result may lie in the residual's memory.
    """
    image, code = x.contiguous(memory_format=torch.channels_last), CODES[activation]
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
        if overwrite and norm is None:
            _conv1x1_in_place(residual, image, packed, stride, bias, code)
            return residual
    end = (code, residual, *(norm or _NO_NORM))
    return _conv1x1(image, packed, channels, stride, bias, *end).permute(0, 3, 1, 2)


def pack_conv1x1(weight: Tensor) -> Tensor | None:
    """weight (N, C, 1, 1) of fp32 as the kernel reads it, or None where no kernel does.

    Raises as pack_linear does.
    """
    check_tensor("pack_conv1x1", "weight", weight, 4)
    check_shape("pack_conv1x1", "weight", weight, (*weight.shape[:2], 1, 1))
    return pack_linear(weight.flatten(1)) if weight.dtype == torch.float32 else None
