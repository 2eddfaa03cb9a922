"""Patch embedding in Triton: the convolution of conv_stem, straight from the image into tokens.

    tokens = [prefix, norm(conv(image) + bias)] + pos_embed

Bias, LayerNorm (up to 256 channels; wider ones take a second pass over the rows) and position
embedding are the convolution's epilogue. Its gradient is that of the convolution
(conv_backward.py) and of torch's LayerNorm.
"""

import triton
import triton.language as tl

from . import tuned
from .conv_stem import LARGEST_NORM, conv


@triton.jit
def _norm_kernel(
    y_ptr,
    weight_ptr,
    bias_ptr,
    pos_ptr,
    y_stride_b,
    pos_stride,
    cells,
    C,
    eps,
    BLOCK: tl.constexpr,
):
    """LayerNorm of one row in place, plus its position embedding."""
    row = tl.program_id(0).to(tl.int64)
    b, cell = row // cells, row % cells
    c = tl.arange(0, BLOCK)
    inside = c < C
    at = y_ptr + b * y_stride_b + cell * C + c
    x = tl.load(at, inside, 0.0).to(tl.float32)
    off = tl.where(inside, x - tl.sum(x, 0) / C, 0.0)
    y = off / tl.sqrt(tl.sum(off * off, 0) / C + eps)
    y *= tl.load(weight_ptr + c, inside, 0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, inside, 0.0).to(tl.float32)
    if pos_ptr is not None:
        pos = pos_ptr + cell * pos_stride[0] + c * pos_stride[1]
        y += tl.load(pos, inside, 0.0).to(tl.float32)
    tl.store(at, y.to(y_ptr.dtype.element_ty), inside)


def forward(
    image, weight, bias, packed, norm_weight, norm_bias, eps, pos_embed, prefix, stride, padding
):
    """Tokens (B, P + Ho*Wo, C), contiguous. packed is the CPU's and stays unread."""
    (B, _, H, W), (C, _, KH, KW) = image.shape, weight.shape
    top, left, bottom, right = padding
    Ho, Wo = (H + top + bottom - KH) // stride + 1, (W + left + right - KW) // stride + 1
    cells, P = Ho * Wo, 0 if prefix is None else prefix.shape[0]
    out = weight.new_empty((B, P + cells, C))
    pos = pos_embed
    if pos_embed is not None and pos_embed.shape[0] != cells:
        pos = pos_embed[P:]
        out[:, :P] = prefix + pos_embed[:P]
    elif P:
        out[:, :P] = prefix
    y = out[:, P:]
    if norm_weight is None or C <= LARGEST_NORM:
        conv(image, weight, bias, stride, padding, 0, y, (norm_weight, norm_bias, eps), pos)
        return out
    conv(image, weight, bias, stride, padding, 0, y)
    _norm_kernel[(B * cells,)](
        y,
        norm_weight.contiguous(),
        None if norm_bias is None else norm_bias.contiguous(),
        pos,
        y.stride(0),
        (0, 0) if pos is None else pos.stride(),
        cells,
        C,
        eps,
        BLOCK=triton.next_power_of_2(C),
        num_warps=4,
        **tuned.FUSED,
    )
    return out
