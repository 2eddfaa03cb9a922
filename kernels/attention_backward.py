"""Gradients of attention in Triton, without float atomics.

One kernel per block of queries (dq, and delta, which the other two need), one per block of keys
(dk, dv), one per tile of the bias, which sums over the images inside the program.

The probabilities come back as exp2(s - lse). An lse near 8 in fp32 is off by up to half a unit in
its last place, which makes all probabilities of a row wrong by one factor: up to 5e-7, more than
all of torch's own error. So dq, which sees whole rows, divides by the sum of what came back, and
leaves 1 / sum for the others, who scale dy and delta by it: as good as scaling p, and fewer
numbers. Only in fp32, as half precision cannot tell.
"""

import torch
import triton
import triton.language as tl

from . import tuned
from .attention_tiles import (
    _LOG2E,
    LOG2E,
    Call,
    block_start,
    head,
    indices,
    is_key,
    live_count,
    live_list,
    scores,
    store,
    tile,
)


@triton.jit
def _log2_sums(lse_ptr, rows, Nq):
    """log2 of the rows' sums. Rows without keys, and those past the end, get p = 0 by +inf."""
    lse = tl.load(lse_ptr + rows, rows < Nq, float("-inf")) * _LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _dscores(s, dy, v, lse, delta, PRECISION: tl.constexpr):
    """(p, ds): the probabilities, and the gradient of scale q k^T + bias. All in fp32."""
    p = tl.exp2(s - lse[:, None])
    dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
    return p, p * (dp - delta[:, None])


@triton.jit
def _gradient_of_scores(
    tensors,
    strides,
    dy_ptr,
    dy_stride,
    sums,
    k,
    v,
    b,
    h,
    rows,
    cols,
    sizes,
    scale2,
    d,
    e,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(q, dy, p, ds) of a tile of queries. sums: lse, and _dq_kernel's delta and, in fp32, 1 / sum.

    There dy is already divided by the row's sum, and so is ds.
    """
    H, Nq, _, _ = sizes
    at = (b * H + h) * Nq
    q = tile(head(tensors[0][0], strides[0][0], b, h), rows, Nq, strides[0][0], d, D)
    dy = tile(head(dy_ptr, dy_stride, b, h), rows, Nq, dy_stride, e, DV)
    delta = tl.load(sums[1] + at + rows, rows < Nq, 0.0)
    if sums[2] is not None:
        inverse = tl.load(sums[2] + at + rows, rows < Nq, 0.0)
        dy *= inverse[:, None]
        delta *= inverse
    s = scores(*(q, k, b, h, rows, cols, sizes, scale2, tensors[1], strides[1], PRECISION))
    p, ds = _dscores(s, dy, v, _log2_sums(sums[0] + at, rows, Nq), delta, PRECISION)
    return q, dy, p, ds


@triton.jit
def _dq_kernel(
    tensors,
    strides,
    live_ptr,
    dy_ptr,
    dy_stride,
    out_ptr,
    out_stride,
    sums,
    dq_ptr,
    sizes,
    scale,
    scale2,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """dq of one block of queries; delta = sum(dy * out) and 1 / sum for the kernels that follow."""
    H, Nq, Nk, _ = sizes
    q_stride, k_stride, v_stride = strides[0]
    m_blocks = tl.cdiv(Nq, BLOCK_M)
    bh = (tl.program_id(0) // m_blocks).to(tl.int64)
    b, h = bh // H, bh % H
    rows = indices(tl.program_id(0) % m_blocks * BLOCK_M, BLOCK_M, WIDE)
    d, dv = indices(0, BLOCK_D, WIDE), indices(0, BLOCK_DV, WIDE)
    dy = tile(head(dy_ptr, dy_stride, b, h), rows, Nq, dy_stride, dv, DV)
    out = tile(head(out_ptr, out_stride, b, h), rows, Nq, out_stride, dv, DV)
    delta = tl.sum(dy.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(sums[1] + bh * Nq + rows, delta, rows < Nq)
    lse = _log2_sums(sums[0] + bh * Nq, rows, Nq)

    q = tile(head(tensors[0][0], q_stride, b, h), rows, Nq, q_stride, d, D)
    k_base = head(tensors[0][1], k_stride, b, h)
    v_base = head(tensors[0][2], v_stride, b, h)
    count = live_count(live_ptr, b, Nk, BLOCK_N)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for i in range(count):
        cols = indices(block_start(live_ptr, b, i, Nk, BLOCK_N), BLOCK_N, WIDE)
        k = tile(k_base, cols, Nk, k_stride, d, D)
        v = tile(v_base, cols, Nk, v_stride, dv, DV)
        s = scores(*(q, k, b, h, rows, cols, sizes, scale2, tensors[1], strides[1], PRECISION))
        p, ds = _dscores(s, dy, v, lse, delta, PRECISION)
        total += tl.sum(p, 1)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    if sums[2] is not None:
        tl.store(sums[2] + bh * Nq + rows, inverse, rows < Nq)
    dq *= (scale * inverse)[:, None]
    store(dq_ptr + b * Nq * H * D + h * D, dq, rows, Nq, H * D, d, D)


@triton.jit
def _dkv_kernel(
    tensors,
    strides,
    dy_ptr,
    dy_stride,
    sums,
    dk_ptr,
    dv_ptr,
    sizes,
    scale,
    scale2,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """dk and dv of one block of keys: a walk over the queries, none where all keys are padding."""
    H, Nq, Nk, _ = sizes
    n_blocks = tl.cdiv(Nk, BLOCK_N)
    bh = (tl.program_id(0) // n_blocks).to(tl.int64)
    b, h = bh // H, bh % H
    cols = indices(tl.program_id(0) % n_blocks * BLOCK_N, BLOCK_N, WIDE)
    d, e = indices(0, BLOCK_D, WIDE), indices(0, BLOCK_DV, WIDE)
    k = tile(head(tensors[0][1], strides[0][1], b, h), cols, Nk, strides[0][1], d, D)
    v = tile(head(tensors[0][2], strides[0][2], b, h), cols, Nk, strides[0][2], e, DV)
    last = _rows_that_look(tensors, strides, b, cols, Nk, Nq)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for start in range(0, last, BLOCK_M):
        rows = indices(start, BLOCK_M, WIDE)
        q, dy, p, ds = _gradient_of_scores(
            *(tensors, strides, dy_ptr, dy_stride, sums, k, v, b, h, rows, cols),
            *(sizes, scale2, d, e, D, DV, PRECISION),
        )
        dv = tl.dot(tl.trans(p.to(dy.dtype)), dy, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    store(dk_ptr + b * Nk * H * D + h * D, dk * scale, cols, Nk, H * D, d, D)
    store(dv_ptr + b * Nk * H * DV + h * DV, dv, cols, Nk, H * DV, e, DV)


@triton.jit
def _rows_that_look(tensors, strides, b, cols, Nk, last):
    """`last`, or 0 where all these keys are padding."""
    if tensors[1][2] is not None:
        keys = tl.max(is_key(tensors[1][2], strides[1][2], b, cols, Nk).to(tl.int32))
        last = tl.where(keys == 1, last, 0)
    return last


@triton.jit
def _dbias_kernel(
    tensors,
    strides,
    dy_ptr,
    dy_stride,
    sums,
    part_ptr,
    B,
    sizes,
    scale2,
    chunk,
    KEEP_B: tl.constexpr,
    KEEP_H: tl.constexpr,
    KEEP_M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One tile of the bias' gradient, summed over `chunk` of the images and heads that share it.

    A dimension that is not kept is summed inside the program, in ascending order. part is (chunks,
    kept images, kept heads, kept queries, Nk).
    """
    H, Nq, Nk, _ = sizes
    m_tiles = tl.cdiv(Nq, BLOCK_M) if KEEP_M else 1
    n_tiles = tl.cdiv(Nk, BLOCK_N)
    program = tl.program_id(0)
    n_tile = program % n_tiles
    m_tile = program // n_tiles % m_tiles
    Gh = H if KEEP_H else 1
    G = (B if KEEP_B else 1) * Gh
    g = program // n_tiles // m_tiles % G
    part = program // n_tiles // m_tiles // G
    Rh = 1 if KEEP_H else H
    R = (1 if KEEP_B else B) * Rh
    d, e = indices(0, BLOCK_D, WIDE), indices(0, BLOCK_DV, WIDE)
    if KEEP_M:
        m_first, m_last = m_tile * BLOCK_M, m_tile * BLOCK_M + 1
    else:
        m_first, m_last = 0, Nq
    cols = indices(n_tile * BLOCK_N, BLOCK_N, WIDE)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in range(part * chunk, tl.minimum(R, part * chunk + chunk)):
        b = (g // Gh if KEEP_B else r // Rh).to(tl.int64)
        h = (g % Gh if KEEP_H else r % Rh).to(tl.int64)
        k = tile(head(tensors[0][1], strides[0][1], b, h), cols, Nk, strides[0][1], d, D)
        v = tile(head(tensors[0][2], strides[0][2], b, h), cols, Nk, strides[0][2], e, DV)
        for m in range(m_first, _rows_that_look(tensors, strides, b, cols, Nk, m_last), BLOCK_M):
            rows = indices(m, BLOCK_M, WIDE)
            q, dy, p, ds = _gradient_of_scores(
                *(tensors, strides, dy_ptr, dy_stride, sums, k, v, b, h, rows, cols),
                *(sizes, scale2, d, e, D, DV, PRECISION),
            )
            acc += ds
    base = part_ptr + (part * G + g).to(tl.int64) * (Nq if KEEP_M else 1) * Nk
    if KEEP_M:
        rows = indices(m_tile * BLOCK_M, BLOCK_M, WIDE)
        inside = (rows[:, None] < Nq) & (cols[None, :] < Nk)
        tl.store(base + rows[:, None].to(tl.int64) * Nk + cols[None, :], acc, inside)
    else:
        tl.store(base + cols, tl.sum(acc, 0), cols < Nk)


@triton.jit
def _dtable_kernel(dense_ptr, order_ptr, bounds_ptr, dtable_ptr, NN, T, BLOCK: tl.constexpr):
    """dtable[h, t] = the sum of dense[h] over the positions that the index sends to t."""
    t, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, last = tl.load(bounds_ptr + t), tl.load(bounds_ptr + t + 1)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        position = tl.load(order_ptr + at, at < last, 0)
        acc += tl.load(dense_ptr + h * NN + position, at < last, 0.0)
    tl.store(dtable_ptr + h * T + t, tl.sum(acc, 0))


def backward(dy, q, k, v, bias, bias_index, key_padding_mask, out, lse, scale, needs_dbias):
    """(dq, dk, dv, dbias in fp32, or empty where it is not needed), all contiguous."""
    (B, Nq, H, _), Nk = q.shape, k.shape[1]
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    dbias = lse.new_zeros(bias.shape if needs_dbias else (0,))
    if 0 in (B, Nq, H, Nk):
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias
    call = Call(q, k, v, bias, bias_index, key_padding_mask, dy, out, dq, dk, dv)
    lse = lse.contiguous()
    inverse = torch.empty_like(lse) if q.dtype == torch.float32 else None
    sums = (lse, torch.empty_like(lse), inverse)
    scales = (scale, scale * LOG2E)
    fixed = {"PRECISION": tuned.precision(q), "WIDE": call.wide}
    blocks, options = call.blocks("attention_dq")
    _dq_kernel[(triton.cdiv(Nq, blocks["BLOCK_M"]) * B * H,)](
        *call.tensors,
        live_list(key_padding_mask, blocks["BLOCK_N"]),
        dy,
        dy.stride(),
        out,
        out.stride(),
        sums,
        dq,
        call.sizes,
        *scales,
        **fixed,
        **blocks,
        **options,
    )
    given = (*call.tensors, dy, dy.stride(), sums)
    blocks, options = call.blocks("attention_dkv")
    _dkv_kernel[(triton.cdiv(Nk, blocks["BLOCK_N"]) * B * H,)](
        *given, dk, dv, call.sizes, *scales, **fixed, **blocks, **options
    )
    if not needs_dbias or (bias_index is None and bias.shape[3] == 1):
        return dq, dk, dv, dbias  # what is added to all scores of a row changes no probability

    shape = (1, H, Nq, Nk) if bias_index is not None else bias.shape
    kept = [n != 1 or full == 1 for n, full in zip(shape[:3], (B, H, Nq), strict=True)]
    blocks, options = call.blocks("attention_dbias")
    tiles = B ** kept[0] * H ** kept[1]
    tiles *= triton.cdiv(Nq, blocks["BLOCK_M"]) ** kept[2]
    tiles *= triton.cdiv(Nk, blocks["BLOCK_N"])
    shared = B ** (not kept[0]) * H ** (not kept[1])
    chunk = triton.cdiv(shared, min(shared, triton.cdiv(tuned.TARGET_PROGRAMS, tiles)))
    chunks = triton.cdiv(shared, chunk)
    parts = lse.new_empty((chunks, *shape))
    _dbias_kernel[(tiles * chunks,)](
        *given,
        parts,
        B,
        call.sizes,
        scale * LOG2E,
        chunk,
        **dict(zip(("KEEP_B", "KEEP_H", "KEEP_M"), kept, strict=True)),
        **fixed,
        **blocks,
        **options,
    )
    dense = parts[0] if chunks == 1 else parts.sum(0)
    if bias_index is None:
        return dq, dk, dv, dense
    index, order = bias_index.flatten().sort(stable=True)
    T = bias.shape[1]
    bounds = torch.searchsorted(index, torch.arange(T + 1, device=q.device, dtype=index.dtype))
    if T:
        _dtable_kernel[(T, H)](
            dense, order, bounds, dbias, Nq * Nk, T, BLOCK=256, num_warps=4, **tuned.FUSED
        )
    return dq, dk, dv, dbias
