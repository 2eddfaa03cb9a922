"""Convolutions in Triton as implicit matrix products: image in, tokens out, no im2col.

    t[b, (ho, wo), co] = activation(sum over ci, i, j of image[b, ci, ho S + i - top, ...] weight)

One kernel serves every layer of a stem (norm folded by the caller, activation in the epilogue) and
patch embedding, whose position embedding and LayerNorm are further epilogues of it. Between layers
the tokens (B, H*W, C) are read as the channels_last image they are. The gradients are in
conv_backward.py.
"""

import triton
import triton.language as tl

from . import tuned
from .activation import activate
from .window import corners, look, on_image, taps


@triton.jit
def _conv_kernel(
    image_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    pos_ptr,
    y_ptr,
    image_stride,
    sight,
    M,
    Co,
    K,
    y_stride_b,
    pos_stride,
    eps,
    KH: tl.constexpr,
    KW: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M cells of all images, BLOCK_N output channels. With a norm, BLOCK_N covers them all.

    The weight is (Co, K) with K in the order of the window's taps.
    """
    n_blocks = tl.cdiv(Co, BLOCK_N)
    rows = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b, cell, h, w, corner = corners(rows, image_stride, sight)
    exists = rows < M
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        i, j, tap = taps(k, image_stride, sight, KH, KW, CHANNELS_FIRST)
        seen = exists[:, None] & (k[None, :] < K) & on_image(h, w, i, j, sight)
        x = tl.load(image_ptr + (corner[:, None] + tap[None, :]), seen, 0)
        w_inside = (cols[:, None] < Co) & (k[None, :] < K)
        w_at = cols[:, None].to(tl.int64) * K + k[None, :]
        weight = tl.load(weight_ptr + w_at, w_inside, 0.0)
        acc = tl.dot(x.to(weight.dtype), tl.trans(weight), acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, cols < Co, 0.0).to(tl.float32)[None, :]
    y = activate(acc, ACTIVATION)
    if norm_weight_ptr is not None:
        used = cols[None, :] < Co
        mean = tl.sum(tl.where(used, y, 0.0), 1) / Co
        off = tl.where(used, y - mean[:, None], 0.0)
        y = off / tl.sqrt(tl.sum(off * off, 1) / Co + eps)[:, None]
        y *= tl.load(norm_weight_ptr + cols, cols < Co, 0.0).to(tl.float32)[None, :]
        if norm_bias_ptr is not None:
            y += tl.load(norm_bias_ptr + cols, cols < Co, 0.0).to(tl.float32)[None, :]
    inside = exists[:, None] & (cols[None, :] < Co)
    if pos_ptr is not None:
        pos = pos_ptr + cell[:, None] * pos_stride[0] + cols[None, :] * pos_stride[1]
        y += tl.load(pos, inside, 0.0).to(tl.float32)
    out = y_ptr + b[:, None] * y_stride_b + cell[:, None] * Co + cols[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), inside)


LARGEST_NORM = 256  # channels whose row of fp32 sums a program can hold beside its operands


def conv(image, weight, bias, stride, padding, activation, y, norm=(None, None, 0.0), pos=None):
    """Writes y (B, Ho*Wo, Co): rows of Co, images y.stride(0) apart. Returns y.

    image any strides, float or uint8; pos (Ho*Wo, Co) or None; norm (weight, bias, eps) for at
    most LARGEST_NORM channels.
    """
    Co, Ci, KH, KW = weight.shape
    if y.numel() == 0:
        return y
    M, K = y.shape[0] * y.shape[1], Ci * KH * KW
    sight, _, channels_first = look(image, weight, stride, padding)
    rows = weight if channels_first else weight.permute(0, 2, 3, 1)
    vectors = [None if t is None else t.contiguous() for t in (bias, *norm[:2])]
    entry = tuned.config("conv_forward", weight, Co)
    blocks = {
        "BLOCK_M": min(entry.pop("BLOCK_M"), max(16, triton.next_power_of_2(M))),
        "BLOCK_N": min(entry.pop("BLOCK_N"), max(16, triton.next_power_of_2(Co))),
        "BLOCK_K": entry.pop("BLOCK_K"),
    }
    if norm[0] is not None:
        blocks["BLOCK_N"] = max(16, triton.next_power_of_2(Co))
        blocks["BLOCK_M"] = min(blocks["BLOCK_M"], 64)
    grid = (triton.cdiv(M, blocks["BLOCK_M"]) * triton.cdiv(Co, blocks["BLOCK_N"]),)
    _conv_kernel[grid](
        image,
        rows.contiguous(),
        *vectors,
        pos,
        y,
        image.stride(),
        sight,
        M,
        Co,
        K,
        y.stride(0),
        (0, 0) if pos is None else pos.stride(),
        norm[2],
        KH=KH,
        KW=KW,
        CHANNELS_FIRST=channels_first,
        ACTIVATION=activation,
        PRECISION=tuned.precision(weight),
        **blocks,
        **entry,
    )
    return y


@triton.jit
def _pool_kernel(
    x_ptr,
    y_ptr,
    n,
    H,
    W,
    Ho,
    Wo,
    C,
    stride,
    top,
    left,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Max-pool of tokens (B, H*W, C) into tokens (B, Ho*Wo, C); NaN wins, padding never does."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c, cell, b = at % C, at // C % (Ho * Wo), at // C // (Ho * Wo)
    h0, w0 = cell // Wo * stride - top, cell % Wo * stride - left
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for i in range(KERNEL):
        for j in range(KERNEL):
            h, w = h0 + i, w0 + j
            inside = (at < n) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x = tl.load(x_ptr + ((b * H + h) * W + w) * C + c, inside, float("-inf"))
            x = x.to(tl.float32)
            highest = tl.where((x > highest) | (x != x), x, highest)
    tl.store(y_ptr + at, highest.to(y_ptr.dtype.element_ty), at < n)


def forward(image, weights, biases, packed, strides, paddings, activations, pool):
    """Tokens (B, Ho*Wo, C), contiguous. packed is the CPU's and stays unread."""
    x, B = image, image.shape[0]
    tokens, (H, W) = None, image.shape[2:]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        padding = paddings[4 * i : 4 * i + 4]
        (Co, _, KH, KW), (top, left, bottom, right) = weight.shape, padding
        H, W = (H + top + bottom - KH) // strides[i] + 1, (W + left + right - KW) // strides[i] + 1
        tokens = weight.new_empty((B, H * W, Co))
        conv(x, weight, bias, strides[i], padding, activations[i], tokens)
        x = tokens.unflatten(1, (H, W)).permute(0, 3, 1, 2)
    if not len(pool):
        return tokens
    kernel, stride, top, left, bottom, right = pool
    Ho, Wo = (H + top + bottom - kernel) // stride + 1, (W + left + right - kernel) // stride + 1
    y = tokens.new_empty((B, Ho * Wo, tokens.shape[2]))
    if y.numel():
        _pool_kernel[(triton.cdiv(y.numel(), 1024),)](
            tokens,
            y,
            y.numel(),
            H,
            W,
            Ho,
            Wo,
            y.shape[2],
            stride,
            top,
            left,
            KERNEL=kernel,
            BLOCK=1024,
            num_warps=4,
            **tuned.FUSED,
        )
    return y
