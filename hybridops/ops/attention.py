"""Flash-style multi-head attention: never materialises the Nq x Nk scores.

    out = activation(softmax(scale * q @ k.T + bias, over the keys that are not padding) @ v)

The bias is dense and broadcastable, or a table read through an index (LeViT, Swin); both have a
deterministic gradient. A row whose keys are all masked gives zeros, as torch's
scaled_dot_product_attention does. FlashAttention-2 (Dao 2023) is the source of the backward: P is
recomputed from the saved log-sum-exp.
"""

from __future__ import annotations

import math
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend
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
    is_plain,
    library,
    on_gpu,
)
from .activation import behind, follows, has_fused_bits

LARGEST_GPU_HEAD = 128  # what kernels/tuned_sm*.json list


# meaning
def attention_reference(q, k, v, bias, bias_index, key_padding_mask, scale, activation):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + (bias if bias_index is None else _spread(bias, bias_index))
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask[:, None, None, :], -math.inf)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    p = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    return activate((p @ v).transpose(1, 2).contiguous(), activation)


def _spread(table, index):
    """The table's bias of each score (H, Nq, Nk). On a GPU, where nobody has looked at the index,
    NaN where it points outside, as the kernels have it."""
    index = index.long()
    return _nan_outside(table, index) if table.is_cuda else table[:, index]


def _nan_outside(table, index):
    inside = index.clamp(0, table.shape[1] - 1)
    return table[:, inside].masked_fill(inside != index, math.nan)


def attention_by_torch(q, k, v, bias, bias_index, key_padding_mask, scale, activation):
    """The same by torch's scaled_dot_product_attention: its best on a GPU without our kernels."""
    mask = bias if bias_index is None else _spread(bias, bias_index)[None]
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        mask = ~padding if mask is None else mask.masked_fill(padding, -math.inf)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return activate(y.transpose(1, 2).contiguous(), activation)


# contract
ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? bias_index, Tensor? key_padding_mask, "
    "float scale, "
    "int activation"
)
define("attention", f"({ARGS}) -> (Tensor, Tensor)")
define(
    "attention_backward",
    "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? bias_index, "
    "Tensor? key_padding_mask, Tensor out, Tensor lse, float scale, bool needs_dbias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("hybridops::attention", lib=library)
def _(q, k, v, *args):
    check_one_device("attention", q, k, v, *args)
    B, Nq, H, _ = q.shape
    return q.new_empty((B, Nq, H, v.shape[3])), q.new_empty((B, H, Nq), dtype=torch.float32)


@torch.library.register_fake("hybridops::attention_backward", lib=library)
def _(dy, q, k, v, bias, bias_index, key_padding_mask, out, lse, scale, needs_dbias):
    dbias = q.new_empty(bias.shape if needs_dbias else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


on_gpu("attention", "attention.forward", lambda q, k, *_: (q, k.shape[1]))
on_gpu("attention_backward", "attention_backward.backward", lambda dy, q, k, *_: (q, k.shape[1]))


# gradient
def _setup(ctx, inputs, output):
    q, k, v, bias, bias_index, key_padding_mask, ctx.scale, ctx.activation = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # else zeros for lse, in every call
    ctx.save_for_backward(q, k, v, bias, bias_index, key_padding_mask, out, lse)


def _gradient(ctx, dy, _):
    q, k, v, bias, bias_index, key_padding_mask, out, lse = ctx.saved_tensors
    if ctx.activation:  # the kernel stored activation(out): get out back
        out, lse = _forward(q, k, v, bias, bias_index, key_padding_mask, ctx.scale, 0)
        dy = activation_backward(dy.contiguous(), out, ctx.activation)
    needs_dbias = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias = _backward(
        dy, q, k, v, bias, bias_index, key_padding_mask, out, lse, ctx.scale, needs_dbias
    )
    return dq, dk, dv, dbias.to(bias.dtype) if needs_dbias else None, None, None, None, None


_recorded = differentiable("attention", _setup, _gradient)
_backward = differentiable_once("attention_backward")

_forward = torch.ops.hybridops.attention.default


# door
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    bias_index: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    activation: str = "none",
) -> Tensor:
    """q (B, Nq, H, D), k (B, Nk, H, D), v (B, Nk, H, Dv), any strides -> (B, Nq, H, Dv).

    bias: (1 or B, 1 or H, Nq, Nk) or (H, Nq, Nk), added to the scaled scores; or, with bias_index
    (Nq, Nk) of integers in [0, T), a table (H, T) of which score [h, i, j] takes bias[h,
    bias_index[i, j]]. key_padding_mask: (B, Nk) bool, True where the key is padding. scale: default
    D**-0.5. activation is applied to the output (LeViT's Hardswish): none, relu, gelu, gelu_tanh,
    silu, hardswish.

    fp32 and bf16 (fp32 accumulation) have a CPU kernel, and with fp16 a GPU one; other dtypes go to
    the reference (on a GPU, to torch's scaled_dot_product_attention).
    Raises ValueError for shapes that do not fit, TypeError for dtypes, IndexError for a bias_index
    outside the table; on a GPU, where looking would stop the stream, such a score is NaN.
    """
    if backend.runs_at_once(q) and is_plain(scale):
        with suppress(*REFUSALS), backend.below_autograd():
            factor = q.shape[3] ** -0.5 if scale is None else scale
            y, _ = _forward(q, k, v, bias, bias_index, key_padding_mask, factor, CODES[activation])
            return y
    elif backend.records_at_once(q) and is_plain(scale):
        with suppress(*REFUSALS):
            factor = q.shape[3] ** -0.5 if scale is None else scale
            return _record(q, k, v, bias, bias_index, key_padding_mask, factor, CODES[activation])
    code = activation_code("attention", activation)
    if is_autocast_on(q):
        q, k, v, bias = autocast(q, k, v, bias)
    check_tensor("attention", "q", q, 4)
    check_tensor("attention", "k", k, 4, like=q)
    check_tensor("attention", "v", v, 4, like=q)
    (B, Nq, H, D), (Bk, Nk, Hk, Dk), (Bv, Nv, Hv, _) = q.shape, k.shape, v.shape
    if (Bk, Hk, Dk) != (B, H, D):
        raise ValueError(f"attention: k must be ({B}, Nk, {H}, {D}) like q, got {tuple(k.shape)}")
    if (Bv, Nv, Hv) != (B, Nk, H):
        raise ValueError(f"attention: v must be ({B}, {Nk}, {H}, Dv) like k, got {tuple(v.shape)}")
    if bias_index is not None:
        bias_index = _check_index(bias, bias_index, q, (H, Nq, Nk))
    elif bias is not None:
        bias = _check_bias(bias, q, (B, H, Nq, Nk))
    if key_padding_mask is not None:
        if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
            raise TypeError(
                "attention: key_padding_mask must be a bool tensor, True where the key is padding"
            )
        check_shape("attention", "key_padding_mask", key_padding_mask, (B, Nk))
    if scale is None:
        scale = D**-0.5 if D else 1.0
    elif not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"attention: scale must be a number, got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:  # as in check_eps, for symbols too
        raise ValueError(f"attention: scale must be finite, got {scale}")
    if backend.which("attention", q, _unserved(q, v)) == "reference":
        on_gpu = q.device.type == "cuda"
        if bias_index is not None and not on_gpu:
            _check_range(bias, bias_index)
        plain = backend.reference_forced() or not on_gpu
        torchs = attention_reference if plain else attention_by_torch
        return torchs(q, k, v, bias, bias_index, key_padding_mask, scale, code)
    try:
        return _record(q, k, v, bias, bias_index, key_padding_mask, float(scale), code)
    except (
        RuntimeError
    ):  # the kernel looks at every index as it reads it; asking first would cost 30 us a call
        if bias_index is not None:
            _check_range(bias, bias_index)
        raise


def _record(q, k, v, bias, bias_index, key_padding_mask, scale, code):
    apart = follows(code, q, k, v, bias) and has_fused_bits(code, q)
    masks = (bias, bias_index, key_padding_mask)
    y, _ = _recorded(q, k, v, *masks, scale, 0 if apart else code)
    return behind(y, code) if apart else y


def _unserved(q, v):
    wide = q.device.type == "cuda" and max(q.shape[3], v.shape[3]) > LARGEST_GPU_HEAD
    return f"head size over {LARGEST_GPU_HEAD}" if wide else None


def _check_bias(bias, q, expected):
    check_tensor("attention", "bias", bias, None, like=q)
    if bias.ndim == 3:
        bias = bias[None]
    fits = bias.ndim == 4 and all(
        have == 1 or have == want  # not "in": tracing does not see symbols there
        for have, want in zip(bias.shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"attention: bias must broadcast to {expected}, got {tuple(bias.shape)}")
    return bias


def _check_index(bias, bias_index, q, expected):
    H, Nq, Nk = expected
    if bias is None:
        raise ValueError("attention: bias_index needs bias, the table (H, T) it points into")
    check_tensor("attention", "bias", bias, 2, like=q)
    if bias.shape[0] != H:
        raise ValueError(
            f"attention: bias must be a table ({H}, T) beside bias_index, got {tuple(bias.shape)}"
        )
    if not isinstance(bias_index, Tensor) or bias_index.dtype not in (torch.int64, torch.int32):
        raise TypeError("attention: bias_index must be an int64 or int32 tensor")
    check_shape("attention", "bias_index", bias_index, (Nq, Nk))
    return bias_index


def _check_range(table, bias_index):
    if torch.compiler.is_compiling() or bias_index.is_meta or bias_index.numel() == 0:
        return
    low, high = (int(x) for x in bias_index.aminmax())
    if low < 0 or high >= table.shape[1]:
        raise IndexError(
            f"attention: bias_index must be in [0, {table.shape[1]}), got {low} to {high}"
        )
