"""Gradients of a weight and a bias in Triton: sums over all rows, for linear and the convolutions.

    dweight[n, k] = sum over m of dy[m, n] x[m, k]          dbias[n] = sum over m of dy[m, n]

The rows are cut into slices. A program sums one tile of one slice in fp32; another kernel adds up
the slices, always in the same order. No atomics, so the same bits every time.
"""

import torch
import triton
import triton.language as tl

from . import tuned
from .window import corners, on_image, taps

SHORTEST = 256  # rows of a slice: a partial sum costs its program as much as reading a few tiles


@triton.jit
def _slices_kernel(
    dy_ptr,
    x_ptr,
    weight_part_ptr,
    bias_part_ptr,
    dy_stride,
    x_stride,
    sight,
    M,
    N,
    K,
    length,
    KH: tl.constexpr,
    KW: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of dweight over one slice: (slices, N, K); dbias: (slices, tiles of K, N).

    x is a matrix, or an image seen through windows where there is a sight. The tiles of a slice are
    neighbours, so that they find its rows in L2, and share out the sums of its rows.
    """
    n_tiles, k_tiles = tl.cdiv(N, BLOCK_N), tl.maximum(tl.cdiv(K, BLOCK_K), 1)
    k_tile = tl.program_id(0) % k_tiles
    n_tile = tl.program_id(0) // k_tiles % n_tiles
    part = tl.program_id(0) // k_tiles // n_tiles
    first = (part.to(tl.int64) if WIDE else part) * length
    last = tl.minimum(first + length, M)
    cols = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    n_at = cols.to(tl.int64) * dy_stride[2]
    if sight is not None:
        i, j, k_at = taps(k, x_stride, sight, KH, KW, CHANNELS_FIRST)
    else:
        k_at = k.to(tl.int64) * x_stride[1]
    weight = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    bias = tl.zeros([BLOCK_N], tl.float32)
    for step in range(tl.cdiv(last - first, BLOCK_M)):
        rows = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        exists = rows < last
        x_inside = exists[:, None] & (k[None, :] < K)
        if sight is not None:
            b, cell, h, w, x_at = corners(rows, x_stride, sight)
            x_inside &= on_image(h, w, i, j, sight)
            dy_at = b * dy_stride[0] + cell * dy_stride[1]
        else:
            x_at = rows.to(tl.int64) * x_stride[0]
            dy_at = rows.to(tl.int64) * dy_stride[0]
        dy_inside = exists[:, None] & (cols[None, :] < N)
        dy = tl.load(dy_ptr + (dy_at[:, None] + n_at[None, :]), dy_inside, 0.0)
        x = tl.load(x_ptr + (x_at[:, None] + k_at[None, :]), x_inside, 0)
        weight = tl.dot(tl.trans(dy), x.to(dy.dtype), weight, input_precision=PRECISION)
        if step % k_tiles == k_tile:
            bias += tl.sum(dy.to(tl.float32), 0)
    at = (part.to(tl.int64) * N + cols[:, None]) * K + k[None, :]
    inside = (cols[:, None] < N) & (k[None, :] < K)
    tl.store(weight_part_ptr + at, weight.to(weight_part_ptr.dtype.element_ty), inside)
    tl.store(bias_part_ptr + (part.to(tl.int64) * k_tiles + k_tile) * N + cols, bias, cols < N)


@triton.jit
def _add_kernel(
    part_ptr,
    to_ptr,
    parts,
    size,
    K,
    inner,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """to (size,) = the sum of part (parts, size). Each K of them, as (K / inner, inner), turn
    around."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p[:, None] < parts) & (i[None, :] < size)
        part = tl.load(part_ptr + (p[:, None].to(tl.int64) * size + i[None, :]), inside, 0.0)
        total += tl.sum(part, 0)
    k = i % K
    at = i - k + k % inner * (K // inner) + k // inner
    tl.store(to_ptr + at, total.to(to_ptr.dtype.element_ty), i < size)


def _add(parts, to, K, inner):
    count, size = parts.numel() // max(to.numel(), 1), to.numel()
    if size:
        options = {"BLOCK_P": 32, "BLOCK": 64, "num_warps": 4, **tuned.FUSED}
        _add_kernel[(triton.cdiv(size, 64),)](parts, to, count, size, K, inner, **options)


def weight_gradient(kernel, dy, x, weight, dy_stride, M, sight=None, channels_first=True):
    """(dweight like weight, dbias), contiguous, by the table's entry of `kernel`.

    M rows of dy at dy_stride (image, cell, column), or (row, 0, column) without a sight; x (M, K),
    or the image that sight looks at.
    """
    N, K = weight.shape[0], weight.shape[1:].numel()
    dweight, dbias = weight.new_empty(weight.shape), weight.new_empty(N)
    if N == 0 or M == 0:
        return dweight.zero_(), dbias.zero_()
    entry = tuned.config(kernel, dy, N)
    blocks = {
        "BLOCK_M": entry.pop("BLOCK_M"),
        "BLOCK_N": min(entry.pop("BLOCK_N"), max(16, triton.next_power_of_2(N))),
        "BLOCK_K": min(entry.pop("BLOCK_K"), max(16, triton.next_power_of_2(K))),
    }
    k_tiles = max(triton.cdiv(K, blocks["BLOCK_K"]), 1)
    tiles = triton.cdiv(N, blocks["BLOCK_N"]) * k_tiles
    wanted = triton.cdiv(tuned.TARGET_PROGRAMS * 8 // entry["num_warps"], tiles)
    length = max(triton.cdiv(M, wanted), SHORTEST)
    length = triton.cdiv(length, blocks["BLOCK_M"]) * blocks["BLOCK_M"]
    slices = triton.cdiv(M, length)
    inner = 1 if channels_first else weight.shape[1]
    whole = slices == 1 and inner == 1  # then the tiles are the gradient
    weight_parts = dweight if whole else dy.new_empty((slices, N, K), dtype=torch.float32)
    bias_parts = dy.new_empty((slices, k_tiles, N), dtype=torch.float32)
    KH, KW = weight.shape[2:] if sight else (1, 1)
    _slices_kernel[(slices * tiles,)](
        dy,
        x,
        weight_parts,
        bias_parts,
        dy_stride,
        x.stride(),
        sight,
        M,
        N,
        K,
        length,
        KH=KH,
        KW=KW,
        CHANNELS_FIRST=channels_first,
        PRECISION=tuned.precision(dy),
        WIDE=M + length >= 2**31,
        **blocks,
        **entry,
    )
    if not whole:
        _add(weight_parts, dweight, K, inner)
    _add(bias_parts, dbias, N, 1)
    return dweight, dbias
