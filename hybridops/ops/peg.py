"""Positional encoding generator (CPVT, Chu et al. 2021): a depthwise K x K conv on the token grid.

    z = bias + sum_ij weight[i, j] * x[h * stride + i - padding, w * stride + j - padding]    per
    image and channel y = activation(z) + x        (residual)        or        y = x * sigmoid(z)
    (gate, ResT)

Zero outside the grid. The first `prefix` tokens (a class token, say) pass through unchanged.
The same op serves CMT's LPU, CvT's projections, CoaT's and Twins' position convolutions, depthwise
layers of MobileNet.
"""

from __future__ import annotations

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend
from ._contract import (
    CODES,
    LARGEST_PADDING,
    REFUSALS,
    activate,
    activation_backward,
    activation_code,
    are_plain,
    autocast,
    check_flag,
    check_int,
    check_one_device,
    check_shape,
    check_tensor,
    define,
    differentiable,
    differentiable_once,
    is_autocast_on,
    library,
    on_gpu,
)


# meaning
def peg_reference(x, weight, bias, H, W, prefix, stride, padding, residual, activation, gate):
    head, grid = x[:, :prefix], x[:, prefix:]
    image = grid.transpose(1, 2).unflatten(2, (H, W))
    if 0 in image.shape[1:]:  # torch's conv2d refuses these
        z = weight.sum((1, 2, 3)) if bias is None else weight.sum((1, 2, 3)) + bias
        cells = output_size(H, weight.shape[2], stride, padding) * output_size(
            W, weight.shape[3], stride, padding
        )
        z = z.expand(x.shape[0], cells, -1)
    else:
        z = F.conv2d(image, weight, bias, stride=stride, padding=padding, groups=x.shape[2])
        z = z.flatten(2).transpose(1, 2)
    z = activate(z, activation)
    y = grid * z.sigmoid() if gate else grid + z if residual else z
    return torch.cat([head, y], dim=1)


def output_size(size, K, stride, padding):
    """Cells along one side of the output grid."""
    return (size + 2 * padding - K) // stride + 1


# contract
ARGS = (
    "Tensor x, Tensor weight, Tensor? bias, SymInt H, SymInt W, int prefix, int stride, int "
    "padding, bool residual, "
    "int activation, bool gate"
)
define("peg", f"({ARGS}) -> Tensor")
define(
    "peg_backward",
    "(Tensor dy, Tensor x, Tensor weight, SymInt H, SymInt W, int prefix, int stride, "
    "int padding, "
    "bool residual) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("hybridops::peg", lib=library)
def _(x, weight, bias, H, W, prefix, stride, padding, *args):
    check_one_device("peg", x, weight, bias)
    K = weight.shape[-1]
    N = prefix + output_size(H, K, stride, padding) * output_size(W, K, stride, padding)
    return x.new_empty((x.shape[0], N, x.shape[2]))


@torch.library.register_fake("hybridops::peg_backward", lib=library)
def _(dy, x, weight, *args):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


on_gpu("peg", "peg.forward", lambda x, weight, *_: (x, weight.shape[-1]))
on_gpu("peg_backward", "peg.backward", lambda dy, x, weight, *_: (x, weight.shape[-1]))


# gradient: dx, dweight and dbias of the plain conv (+ residual) in one pass; activation and gate,
# rarer, in torch
def _setup(ctx, inputs, output):
    (
        x,
        weight,
        bias,
        ctx.H,
        ctx.W,
        ctx.prefix,
        ctx.stride,
        ctx.padding,
        ctx.residual,
        ctx.activation,
        ctx.gate,
    ) = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradient(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    P, where = ctx.prefix, (ctx.H, ctx.W, ctx.prefix, ctx.stride, ctx.padding)
    if ctx.activation or ctx.gate:
        z = _forward(x, weight, bias, *where, False, 0, False)[:, P:]
        head, d = dy[:, :P], dy[:, P:].contiguous()
        if ctx.gate:
            s = activate(z, ctx.activation).sigmoid()
            d, through = d * x[:, P:] * s * (1 - s), d * s
        else:
            through = d
        d = activation_backward(d, z, ctx.activation)
        dx, dweight, dbias = _backward(torch.cat([head, d], 1), x, weight, *where, False)
        if ctx.gate or ctx.residual:
            dx = torch.cat([dx[:, :P], dx[:, P:] + through], 1)
    else:
        dx, dweight, dbias = _backward(dy, x, weight, *where, ctx.residual)
    return (dx, dweight, dbias if bias is not None else None, *[None] * 8)


_recorded = differentiable("peg", _setup, _gradient)
_backward = differentiable_once("peg_backward")

_forward = torch.ops.hybridops.peg.default


# door
def peg(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    prefix: int = 0,
    stride: int = 1,
    padding: int | None = None,
    residual: bool = True,
    activation: str = "none",
    gate: bool = False,
) -> Tensor:
    """x (B, prefix + H*W, C), weight (C, 1, K, K), bias (C,) -> (B, prefix + Ho*Wo, C).

    padding: default K // 2. residual needs an output grid like the input's (stride 1 and padding K
    // 2), and so does gate, which gives x * sigmoid(z) in place of the residual. activation applies
    to the convolution's output z.

    fp32 and bf16 (fp32 accumulation) have a CPU kernel, and with fp16 a GPU one; other dtypes go to
    the reference.
    Raises ValueError for shapes that do not fit, TypeError for dtypes and for anything but ints
    where ints belong.
    """
    if backend.runs_at_once(x):
        with suppress(*REFUSALS), backend.below_autograd():
            end = (prefix, stride, padding, residual, activation, gate)
            return _at_once(_forward, x, weight, bias, *grid, *end)
    elif backend.records_at_once(x):
        with suppress(*REFUSALS):
            end = (prefix, stride, padding, residual, activation, gate)
            return _at_once(_recorded, x, weight, bias, *grid, *end)
    code = activation_code("peg", activation)
    if is_autocast_on(x):
        x, weight, bias = autocast(x, weight, bias)
    check_tensor("peg", "x", x, 3)
    check_tensor("peg", "weight", weight, 4, like=x)
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"peg: grid must be (H, W), got {grid!r}")
    (_, N, C), (H, W), K = x.shape, grid, weight.shape[-1]
    check_int("peg", "grid height", H, 0)
    check_int("peg", "grid width", W, 0)
    check_int("peg", "prefix", prefix, 0)
    check_int("peg", "stride", stride, 1)
    if prefix + H * W != N:
        raise ValueError(f"peg: x must be (B, {prefix} + {H}*{W}, C), got {tuple(x.shape)}")
    if weight.shape != (C, 1, K, K) or K == 0:
        raise ValueError(f"peg: weight must be ({C}, 1, K, K), got {tuple(weight.shape)}")
    check_flag("peg", "residual", residual)
    check_flag("peg", "gate", gate)
    padding = K // 2 if padding is None else padding
    check_int("peg", "padding", padding, 0, LARGEST_PADDING)
    if bias is not None:
        check_tensor("peg", "bias", bias, 1, like=x)
        check_shape("peg", "bias", bias, (C,))
    Ho, Wo = output_size(H, K, stride, padding), output_size(W, K, stride, padding)
    fits = (
        (Ho == 0 or Wo == 0) if H == 0 or W == 0 else (Ho > 0 and Wo > 0)
    )  # an empty grid stays empty
    if Ho < 0 or Wo < 0 or not fits:
        raise ValueError(
            f"peg: a {K}x{K} kernel with padding {padding} does not fit the {H}x{W} grid"
        )
    if (residual or gate) and (Ho, Wo) != (H, W):
        raise ValueError(
            f"peg: residual and gate need an output grid like the input's {H}x{W}, "
            f"but stride {stride} and padding {padding} give {Ho}x{Wo}"
        )
    if backend.which("peg", x, _unserved(x, H, W), size=K) == "reference":
        return peg_reference(x, weight, bias, H, W, prefix, stride, padding, residual, code, gate)
    return _recorded(x, weight, bias, H, W, prefix, stride, padding, residual, code, gate)


def _at_once(run, x, weight, bias, H, W, prefix, stride, padding, residual, activation, gate):
    """Raises one of REFUSALS for what does not fit: the door's own checks then say why."""
    padding = weight.shape[3] // 2 if padding is None else padding
    plain = are_plain(H, W, prefix, stride, padding)
    if not plain or type(residual) is not bool or type(gate) is not bool:
        raise TypeError("not plain")
    code = CODES[activation]
    return run(x, weight, bias, H, W, prefix, stride, padding, residual, code, gate)


def _unserved(x, H, W):
    return "empty grid" if H == 0 or W == 0 else None
