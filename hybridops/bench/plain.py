"""Our own ops and modules as a torch user would write them: what ours is measured against."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .. import backend, ops
from ..ops._contract import CODES, activate
from ..ops.conv1x1 import conv1x1_reference
from ..ops.conv3x3 import conv3x3_reference
from ..ops.conv_stem import conv_stem_reference, resolve_padding, stem_image
from ..ops.linear import linear_reference
from ..ops.patch_embed import patch_embed_reference
from ..ops.peg import peg_reference

CHECKED = {name: getattr(ops, name) for name in ("conv_stem", "patch_embed")}


@contextmanager
def plain_torch(fused_attention: str | Callable = "unbiased") -> Iterator[None]:
    """The reference ops while the block runs, without our checks, and attention as users have it.

    The checks of an op's door take 25 to 200 us of a call, and the reference of attention also
    serves rows without any key, which costs two passes over the scores: timed against these, our
    speed-up would be flattered.

    fused_attention: where torch's scaled_dot_product_attention is taken: "unbiased" (no bias and no
    mask, as timm does; with a bias the spelled-out scores are mostly faster on CPUs), "always" or
    "never". Or a function of (q, k, v, bias, bias_index, key_padding_mask, scale), q, k and v being
    (B, H, N, D), that is taken instead.
    """
    attend = partial(_attend, fused_attention)

    def attention(q, k, v, bias=None, bias_index=None, key_padding_mask=None, scale=None, **rest):
        scale = (q.shape[3] or 1) ** -0.5 if scale is None else scale
        code = CODES[rest.get("activation", "none")]
        return attend(q, k, v, bias, bias_index, key_padding_mask, scale, code)

    file: Any = importlib.import_module("hybridops.ops.attention")
    plain: dict[tuple[Any, str], Any] = {(ops, name): function for name, function in PLAIN.items()}
    plain |= {(ops, "attention"): attention, (file, "attention_reference"): attend}
    before = {(where, name): getattr(where, name) for where, name in plain}
    try:
        _set(plain)
        with backend.use("reference"):
            yield
    finally:
        _set(before)


def _set(functions: dict[tuple[Any, str], Callable]) -> None:
    for (where, name), function in functions.items():
        setattr(where, name, function)


def _attend(fused, q, k, v, bias, bias_index, key_padding_mask, scale, activation):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if callable(fused):
        out = fused(q, k, v, bias, bias_index, key_padding_mask, scale)
        return activate(out.transpose(1, 2).contiguous(), activation)
    if bias_index is not None:
        bias = bias[:, bias_index.long()]
    if key_padding_mask is not None:
        shut = torch.zeros(key_padding_mask.shape, dtype=q.dtype, device=q.device)
        shut = shut.masked_fill(key_padding_mask, -torch.inf)[:, None, None]
        bias = shut if bias is None else bias + shut
    if fused == "always" or (fused == "unbiased" and bias is None):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    else:
        scores = (q * scale) @ k.transpose(-2, -1)
        out = (scores if bias is None else scores + bias).softmax(-1) @ v
    return activate(out.transpose(1, 2).contiguous(), activation)


# The ops' own arguments; `packed` is for our kernels.
def _linear(x, weight, bias=None, *, norm=None, activation="none", residual=None, packed=None):
    norm = norm or (None, None, 0.0)
    return linear_reference(x, weight, bias, *norm, residual, CODES[activation])


def _mlp_layer(x, up, down, *, activation, norm=None, residual=False):
    hidden = _linear(x, up.weight, up.bias, norm=norm, activation=activation)
    return _linear(hidden, down.weight, down.bias, residual=x if residual else None)


def _peg(x, weight, bias=None, *, grid, prefix=0, stride=1, padding=None, **rest):
    padding = weight.shape[3] // 2 if padding is None else padding
    residual, gate = rest.get("residual", True), rest.get("gate", False)
    code = CODES[rest.get("activation", "none")]
    return peg_reference(x, weight, bias, *grid, prefix, stride, padding, residual, code, gate)


def _patch_embed(image, weight, bias=None, **rest):
    if rest.get("mean") is not None:  # which is folded
        return CHECKED["patch_embed"](image, weight, bias, **rest)
    stride = rest.get("stride") or weight.shape[2]
    padding = rest.get("padding", 0)
    if padding == "same":
        padding = resolve_padding("patch_embed", padding, weight.shape[2:], stride, image.shape[2:])
    sides = padding if isinstance(padding, tuple) else (padding,) * 4
    norm = rest.get("norm") or (None, None, 0.0)
    pos, prefix = (
        x[0] if x is not None and x.ndim == 3 else x
        for x in (rest.get("pos_embed"), rest.get("prefix"))
    )
    return patch_embed_reference(image, weight, bias, *norm, pos, prefix, stride, sides)


def _conv_stem(image, layers, *, pool=None, layout="tokens"):
    if any(x.padding == "same" for x in (*layers, *([pool] if pool else []))):  # sizes to find out
        return CHECKED["conv_stem"](image, layers, pool=pool, layout=layout)
    plan = []
    for weight, bias, stride, padding, activation, _, group_norm, affine in layers:
        sides = padding if isinstance(padding, tuple) else (padding,) * 4
        plan.append((weight, bias, stride, sides, CODES[activation], group_norm, affine))
    if pool is not None:
        sides = pool.padding if isinstance(pool.padding, tuple) else (pool.padding,) * 4
        pool = (pool.kernel, pool.stride, sides)
    stem = conv_stem_reference if layout == "tokens" else stem_image
    return stem(image.to(plan[0][0].dtype), plan, pool)


def _conv1x1(x, weight, bias=None, *, stride=1, activation="none", residual=None, packed=None):
    return conv1x1_reference(x, weight, bias, stride, activation, residual, None)


def _conv3x3(x, weight, bias=None, *, stride=1, activation="none", residual=None, packed=None):
    return conv3x3_reference(x, weight, bias, stride, (1, 1, 1, 1), activation, residual)


PLAIN = {
    "linear": _linear,
    "mlp_layer": _mlp_layer,
    "peg": _peg,
    "patch_embed": _patch_embed,
    "conv_stem": _conv_stem,
    "conv1x1": _conv1x1,
    "conv3x3": _conv3x3,
    **dict.fromkeys(
        ("pack_linear", "pack_conv", "pack_patch", "pack_conv1x1", "pack_conv3x3"),
        lambda *_, **__: None,
    ),
}
