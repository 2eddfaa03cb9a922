"""Flash attention in Triton, forward: online softmax (attention_backward.py has the gradients).

    out = activation(softmax(scale q k^T + bias, over the keys that are not padding) v)

One program per block of queries walks over the keys; with few queries the keys are split over
several programs, whose parts are combined in a fixed order. Softmax is base 2, on scores times
log2(e). q, k, v are (B, N, H, D) with any strides; blocks of head dimensions are padded with zeros.
"""

import torch
import triton
import triton.language as tl

from . import tuned
from .activation import activate
from .attention_tiles import (
    _LOG2E,
    LN2,
    LOG2E,
    Call,
    block_start,
    head,
    indices,
    live_count,
    live_list,
    scores,
    store,
    tile,
)


@triton.jit
def _forward_kernel(
    tensors,
    strides,
    live_ptr,
    out_ptr,
    lse_ptr,
    sizes,
    scale2,
    part_out,
    part_lse,
    D: tl.constexpr,
    DV: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One block of queries; SPLITS > 1: over one part of the keys, into that part's buffer."""
    H, Nq, Nk, _ = sizes
    q_stride, k_stride, v_stride = strides[0]
    m_blocks = tl.cdiv(Nq, BLOCK_M)
    program = tl.program_id(0)
    split = program // m_blocks % SPLITS
    bh = (program // m_blocks // SPLITS).to(tl.int64)
    b, h = bh // H, bh % H
    rows = indices(program % m_blocks * BLOCK_M, BLOCK_M, WIDE)
    d, dv = indices(0, BLOCK_D, WIDE), indices(0, BLOCK_DV, WIDE)
    k_base = head(tensors[0][1], k_stride, b, h)
    v_base = head(tensors[0][2], v_stride, b, h)
    count = live_count(live_ptr, b, Nk, BLOCK_N)
    begin, end = 0, count
    if SPLITS > 1:
        per_split = tl.cdiv(count, SPLITS)
        begin = split * per_split
        end = tl.minimum(count, begin + per_split)

    q = tile(head(tensors[0][0], q_stride, b, h), rows, Nq, q_stride, d, D)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in range(begin, end):
        cols = indices(block_start(live_ptr, b, i, Nk, BLOCK_N), BLOCK_N, WIDE)
        k = tile(k_base, cols, Nk, k_stride, d, D)
        s = scores(*(q, k, b, h, rows, cols, sizes, scale2, tensors[1], strides[1], PRECISION))
        above = tl.maximum(highest, tl.max(s, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)  # no key yet: exp2(-inf) stays 0
        p = tl.exp2(s - shift[:, None])
        fade = tl.exp2(highest - shift)
        total = total * fade + tl.sum(p, 1)
        v = tile(v_base, cols, Nk, v_stride, dv, DV)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        highest = above
    lse = (highest + tl.log2(total)) * LN2
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLITS > 1:  # parts are (SPLITS, B * H, Nq, ...)
        part = split * (tl.num_programs(0) // m_blocks // SPLITS).to(tl.int64) + bh
        tl.store(part_lse + part * Nq + rows, lse, rows < Nq)
        store(part_out + part * Nq * DV, out, rows, Nq, DV, dv, DV)
    else:
        tl.store(lse_ptr + bh * Nq + rows, lse, rows < Nq)
        base = out_ptr + b * Nq * H * DV + h * DV
        store(base, activate(out, ACTIVATION), rows, Nq, H * DV, dv, DV)


@triton.jit
def _combine_kernel(
    part_out,
    part_lse,
    out_ptr,
    lse_ptr,
    H,
    Nq,
    DV: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The parts of a split forward, weighted by their sums, in ascending order."""
    m_blocks = tl.cdiv(Nq, BLOCK_M)
    bh = (tl.program_id(0) // m_blocks).to(tl.int64)
    heads = (tl.num_programs(0) // m_blocks).to(tl.int64)
    rows, dv = tl.program_id(0) % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in range(SPLITS):
        part = split * heads + bh
        lse = tl.load(part_lse + part * Nq + rows, rows < Nq, float("-inf"))
        highest = tl.maximum(highest, lse)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for split in range(SPLITS):
        part = split * heads + bh
        lse = tl.load(part_lse + part * Nq + rows, rows < Nq, float("-inf"))
        weight = tl.exp2((lse - shift) * _LOG2E)
        total += weight
        acc += weight[:, None] * tile(part_out + part * Nq * DV, rows, Nq, (0, DV, 0, 1), dv, DV)
    tl.store(lse_ptr + bh * Nq + rows, highest + tl.log2(total) * LN2, rows < Nq)
    out = activate(acc / tl.where(total == 0.0, 1.0, total)[:, None], ACTIVATION)
    base = out_ptr + bh // H * Nq * H * DV + bh % H * DV
    store(base, out, rows, Nq, H * DV, dv, DV)


def forward(q, k, v, bias, bias_index, key_padding_mask, scale, activation):
    """out (B, Nq, H, Dv) in q's dtype, and the natural log-sum-exp (B, H, Nq) in fp32."""
    (B, Nq, H, _), Nk, DV = q.shape, k.shape[1], v.shape[3]
    out = q.new_empty((B, Nq, H, DV))
    lse = q.new_empty((B, H, Nq), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    call = Call(q, k, v, bias, bias_index, key_padding_mask, out)
    blocks, options = call.blocks("attention_forward")
    m_blocks = triton.cdiv(Nq, blocks["BLOCK_M"])
    splits = _splits(B * H * m_blocks, triton.cdiv(Nk, blocks["BLOCK_N"]))
    parts = (None, None)
    if splits > 1:
        parts = (lse.new_empty((splits, B * H, Nq, DV)), lse.new_empty((splits, B * H, Nq)))
    _forward_kernel[(m_blocks * splits * B * H,)](
        *call.tensors,
        live_list(key_padding_mask, blocks["BLOCK_N"]),
        out,
        lse,
        call.sizes,
        scale * LOG2E,
        *parts,
        SPLITS=splits,
        ACTIVATION=activation,
        PRECISION=tuned.precision(q),
        WIDE=call.wide,
        **blocks,
        **options,
    )
    if splits > 1:
        _combine_kernel[(triton.cdiv(Nq, 16) * B * H,)](
            *parts,
            out,
            lse,
            H,
            Nq,
            DV=DV,
            SPLITS=splits,
            ACTIVATION=activation,
            BLOCK_M=16,
            BLOCK_DV=blocks["BLOCK_DV"],
            **tuned.FUSED,
        )
    return out, lse


def _splits(programs, n_blocks):
    """Into how many parts the keys go, so that few queries still fill the GPU."""
    if 2 * programs > tuned.TARGET_PROGRAMS:
        return 1
    wanted = min(tuned.TARGET_PROGRAMS // programs, n_blocks // 2, 32)
    return 1 << max(wanted, 1).bit_length() - 1
