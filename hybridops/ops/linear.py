"""Fused linear layer: LayerNorm in front, bias, activation and residual behind, in one pass.

    y = activation(norm(x) @ weight.T + bias) + residual

A BatchNorm behind the product is folded into `weight` and `bias` by the caller. `packed` is
`pack_linear(weight)`: the same numbers in the kernel's panel order, made once for inference; it
never changes the result's meaning.
"""

from __future__ import annotations

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend
from . import _by_torch
from ._contract import (
    CODES,
    REFUSALS,
    activate,
    activation_backward,
    activation_code,
    autocast,
    check_one_device,
    check_shape,
    check_tensor,
    define,
    differentiable,
    differentiable_once,
    is_autocast_on,
    library,
    on_gpu,
    plain_norm,
    unpack_norm,
)
from .activation import behind, follows, has_fused_bits


# meaning
def linear_reference(x, weight, bias, norm_weight, norm_bias, eps, residual, activation):
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    y = activate(F.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


# contract
ARGS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? packed, Tensor? norm_weight, Tensor? "
    "norm_bias, float eps, "
    "Tensor? residual, int activation"
)
define("linear", f"({ARGS}) -> Tensor")
define("linear_backward", "(Tensor dy, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)")
library.define("pack_linear(Tensor weight, int runs) -> Tensor")


@torch.library.register_fake("hybridops::linear", lib=library)
def _(x, weight, *args):
    check_one_device("linear", x, weight, *args)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("hybridops::linear_backward", lib=library)
def _(dy, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _rows(x, weight):
    return x.numel() // max(weight.shape[1], 1)


on_gpu("linear", "linear.forward", lambda x, weight, *_: (x, _rows(x, weight)))
on_gpu(
    "linear_backward",
    "linear.backward",
    lambda dy, x, weight: (x, 0),
    torchs=("cuBLAS", _by_torch.linear_backward),
)


# gradient: the two matrix products in the kernel, norm and activation (recomputed, nothing extra is
# saved) in torch
def _setup(ctx, inputs, output):
    x, weight, bias, _, norm_weight, norm_bias, ctx.eps, residual, ctx.activation = inputs
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias)


def _gradient(ctx, dy):
    x, weight, bias, norm_weight, norm_bias = ctx.saved_tensors
    dx = dnorm_weight = dnorm_bias = None
    normed = x
    if norm_weight is not None:
        normed, mean, rstd = torch.native_layer_norm(
            x, x.shape[-1:], norm_weight, norm_bias, ctx.eps
        )
    dz = dy
    if ctx.activation:
        z = _forward(normed, weight, bias, None, None, None, 0.0, None, 0)
        dz = activation_backward(dy.contiguous(), z, ctx.activation)
    dnormed, dweight, dbias = _backward(dz, normed, weight)
    dx = dnormed
    if norm_weight is not None:
        mask = [True, True, norm_bias is not None]
        dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
            dnormed, x, x.shape[-1:], mean, rstd, norm_weight, norm_bias, mask
        )
    dresidual = dy if ctx.has_residual else None
    return (
        dx,
        dweight,
        dbias if ctx.has_bias else None,
        None,
        dnorm_weight,
        dnorm_bias,
        None,
        dresidual,
        None,
    )


_recorded = differentiable("linear", _setup, _gradient)
_backward = differentiable_once("linear_backward")

_forward = torch.ops.hybridops.linear.default


# door
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """activation(norm(x) @ weight.T + bias) + residual.

    x (..., K), weight (N, K), bias (N,), norm = (weight (K,), bias (K,) or None, eps) for a
    LayerNorm over K in front, residual (..., N), packed = pack_linear(weight) or None -> (..., N),
    contiguous, in x's dtype. activation: none, relu, gelu, gelu_tanh, silu, hardswish.

    fp32 and bf16 (fp32 accumulation) have a CPU kernel, and with fp16 a GPU one; other dtypes go to
    the reference.
    Raises ValueError for shapes that do not fit and unknown activations, TypeError for dtypes.
    """
    if backend.runs_at_once(x):
        with suppress(*REFUSALS), backend.below_autograd():
            end = (*plain_norm(norm), residual, CODES[activation])
            return _forward(x, weight, bias, packed, *end)
    elif backend.records_at_once(x):
        with suppress(*REFUSALS):
            end = (*plain_norm(norm), residual, CODES[activation])
            return _record(x, weight, bias, packed, *end)
    code = activation_code("linear", activation)
    norm_weight, norm_bias, eps = unpack_norm("linear", norm)
    if is_autocast_on(x):
        given = weight
        x, weight, bias, norm_weight, norm_bias, residual = autocast(
            x, weight, bias, norm_weight, norm_bias, residual
        )
        packed = packed if weight is given else None  # it packs the weight as it was
    check_tensor("linear", "x", x, None)
    if x.ndim == 0:
        raise ValueError("linear: x must have at least 1 dimension, got a scalar")
    check_tensor("linear", "weight", weight, 2, like=x)
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(
            f"linear: x must be (..., {K}) for weight {tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    if bias is not None:
        check_tensor("linear", "bias", bias, 1, like=x)
        check_shape("linear", "bias", bias, (N,))
    if norm_weight is not None:
        check_tensor("linear", "norm weight", norm_weight, 1, like=x)
        check_shape("linear", "norm weight", norm_weight, (K,))
        if norm_bias is not None:
            check_tensor("linear", "norm bias", norm_bias, 1, like=x)
            check_shape("linear", "norm bias", norm_bias, (K,))
    if packed is not None:
        check_tensor("linear", "packed", packed, None)
    if residual is not None:
        check_tensor("linear", "residual", residual, x.ndim, like=x)
        check_shape("linear", "residual", residual, (*x.shape[:-1], N))
    if backend.which("linear", x) == "reference":
        return linear_reference(x, weight, bias, norm_weight, norm_bias, eps, residual, code)
    return _record(x, weight, bias, packed, norm_weight, norm_bias, eps, residual, code)


def _record(x, weight, bias, packed, norm_weight, norm_bias, eps, residual, code):
    inputs = (x, weight, bias, norm_weight, norm_bias)
    if follows(code, *inputs) and has_fused_bits(code, x):
        y = behind(_recorded(x, weight, bias, packed, norm_weight, norm_bias, eps, None, 0), code)
        return y if residual is None else y + residual
    return _recorded(x, weight, bias, packed, norm_weight, norm_bias, eps, residual, code)


def pack_linear(weight: Tensor, runs: int = 1) -> Tensor | None:
    """weight (N, K) in the panel order of the loaded CPU library; None if none serves it.

    Pass it to `linear(packed=...)` beside the weight itself; make it again whenever the weight
    changes. Its bits mean something to that library only. runs: of equal length, into which K
    falls where the left-hand side is read in place (a convolution's kernel rows).
    """
    check_tensor("pack_linear", "weight", weight, 2)
    if not backend.packs(weight):
        return None
    return torch.ops.hybridops.pack_linear(weight.detach(), runs)
