"""BatchNorm by the batch's own statistics (training), with the activation behind it.

x (..., C), each of its C channels normalised over all rows, then weight and bias per channel:

    y = activation((x - mean) / sqrt(var + eps) * weight + bias)

Beside y come mean and var (biased), in fp32, for the caller's running statistics. The kernel sums
differences to a sample's mean, in fp64 over chunks of rows that no number of threads changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend
from ._contract import (
    activate,
    activation_code,
    check_eps,
    check_one_device,
    check_shape,
    check_tensor,
    differentiable,
    differentiable_once,
    library,
)

_IN_KERNEL = ("none", "relu", "silu", "hardswish")  # the others follow in torch


# meaning
def batch_norm_reference(x, weight, bias, eps, activation):
    rows = x.flatten(0, -2)
    wide = rows.float() if rows.dtype != torch.float64 else rows
    var, mean = torch.var_mean(wide.detach(), 0, correction=0)
    y = F.batch_norm(rows, None, None, weight, bias, True, 0.0, eps).view(x.shape)
    return activate(y, activation), mean, var


# contract
library.define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, int activation) "
    "-> (Tensor, Tensor, Tensor)"
)
library.define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, float eps, int activation) -> (Tensor, Tensor, Tensor)"
)


def _vector(x):
    return x.new_empty(x.shape[-1:], dtype=torch.float32)


@torch.library.register_fake("hybridops::batch_norm", lib=library)
def _(x, weight, bias, eps, activation):
    check_one_device("batch_norm", x, weight, bias)
    return x.new_empty(x.shape), _vector(x), _vector(x)


@torch.library.register_fake("hybridops::batch_norm_backward", lib=library)
def _(dy, x, *args):
    return x.new_empty(x.shape), _vector(x), _vector(x)


# gradient
def _setup(ctx, inputs, output):
    x, weight, bias, ctx.eps, ctx.activation = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, bias, mean, var)


def _gradient(ctx, dy, *_):
    x, weight, bias, mean, var = ctx.saved_tensors
    dx, dweight, dbias = _backward(dy, x, weight, bias, mean, var, ctx.eps, ctx.activation)
    dweight = None if weight is None else dweight.to(weight.dtype)
    return dx, dweight, None if bias is None else dbias.to(bias.dtype), None, None


_recorded = differentiable("batch_norm", _setup, _gradient)
_backward = differentiable_once("batch_norm_backward")


# door
def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., C) -> (activation(norm(x)) like x, contiguous; mean (C,); var (C,), biased).

    weight and bias (C,), in x's dtype or fp32; mean and var carry no gradient. fp32 and bf16 have a
    CPU kernel; the rest, and any GPU, go to torch. Raises ValueError for shapes, too few rows and
    activations, TypeError for dtypes.
    """
    code = activation_code("batch_norm", activation)
    check_tensor("batch_norm", "x", x, None)
    if x.ndim < 2 or x.shape[:-1].numel() < 2:
        raise ValueError(f"batch_norm: x must hold two rows at least, got shape {tuple(x.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            mixed = isinstance(vector, Tensor) and vector.dtype == torch.float32
            check_tensor("batch_norm", name, vector, 1, None if mixed else x)
            check_shape("batch_norm", name, vector, x.shape[-1:])
    check_eps("batch_norm", "eps", eps)
    if x.is_cuda or backend.which("batch_norm", x) == "reference":
        return batch_norm_reference(x, weight, bias, eps, code)
    inside = code if activation in _IN_KERNEL else 0
    y, mean, var = _recorded(x, weight, bias, float(eps), inside)
    return y if inside == code else activate(y, code), mean, var
