"""Flash attention in Triton: online softmax forward, and a backward without float atomics.

    out = activation(softmax(scale q k^T + bias, over the keys that are not padding) v)

Forward: one program per block of queries walks over the keys; with few queries the keys are split
over several programs, whose parts are combined in a fixed order. Backward: one kernel per block of
queries (dq, and delta = sum(dy * out)), one per block of keys (dk, dv), one per tile of the bias,
which sums over the images inside the program. Softmax is base 2, on scores times log2(e).
q, k, v are (B, N, H, D) with any strides; blocks of head dimensions are padded with zeros.
"""

import torch
import triton
import triton.language as tl

from . import tuned
from .activation import activate

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _indices(start, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    if WIDE:
        offsets = offsets.to(tl.int64)
    return start + offsets


@triton.jit
def _tile(base, rows, n_rows, row_stride, cols, col_stride, N_COLS: tl.constexpr):
    """rows x cols of a matrix whose head dimension is N_COLS long; zero outside."""
    inside = rows[:, None] < n_rows
    if cols.shape[0] != N_COLS:
        inside = inside & (cols[None, :] < N_COLS)
    return tl.load(base + rows[:, None] * row_stride + cols[None, :] * col_stride, inside, 0.0)


@triton.jit
def _store(base, x, rows, n_rows, row_stride, cols, N_COLS: tl.constexpr):
    inside = rows[:, None] < n_rows
    if cols.shape[0] != N_COLS:
        inside = inside & (cols[None, :] < N_COLS)
    pointers = base + rows[:, None] * row_stride + cols[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), inside)


@triton.jit
def _scores(
    q,
    k,
    rows,
    cols,
    Nq,
    Nk,
    scale2,
    bias_ptr,
    bias_stride,
    index_ptr,
    index_stride,
    T,
    mask_ptr,
    mask_stride,
    PRECISION: tl.constexpr,
):
    """scale2 q k^T + log2(e) bias; -inf where the key is padding or past the end.

    bias_ptr and mask_ptr stand at this image and head. An index outside the table gives NaN.
    """
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
    keep = cols < Nk
    if bias_ptr is not None:
        inside = (rows[:, None] < Nq) & keep[None, :]
        if index_ptr is not None:
            where = rows[:, None] * index_stride[0] + cols[None, :] * index_stride[1]
            index = tl.load(index_ptr + where, inside, 0).to(tl.int64)
            known = (index >= 0) & (index < T)
            bias = tl.load(bias_ptr + index * bias_stride[3], inside & known, 0.0).to(tl.float32)
            bias = tl.where(inside & (known == 0), float("nan"), bias)
        else:
            where = rows[:, None] * bias_stride[2] + cols[None, :] * bias_stride[3]
            bias = tl.load(bias_ptr + where, inside, 0.0).to(tl.float32)
        s += bias * _LOG2E
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + cols * mask_stride[1], keep, 1) == 0)
    return tl.where(keep[None, :], s, float("-inf"))


@triton.jit
def _live(mask_ptr, mask_stride, Nk, BLOCK: tl.constexpr):
    """[first, last) holds every key that is not padding: whole blocks outside it are skipped."""
    last = tl.program_id(0) * 0  # a tensor, also where Nk is the constant 1
    first = last + Nk
    for start in range(0, Nk, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        keep = tl.load(mask_ptr + cols * mask_stride[1], cols < Nk, 1) == 0
        first = tl.minimum(first, tl.min(tl.where(keep, cols, Nk)))
        last = tl.maximum(last, tl.max(tl.where(keep, cols + 1, 0)))
    return first, last


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    index_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    q_stride,
    k_stride,
    v_stride,
    bias_stride,
    index_stride,
    mask_stride,
    H,
    Nq,
    Nk,
    T,
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
    m_blocks = tl.cdiv(Nq, BLOCK_M)
    program = tl.program_id(0)
    split = program // m_blocks % SPLITS
    bh = (program // m_blocks // SPLITS).to(tl.int64)
    b, h = bh // H, bh % H
    rows = _indices(program % m_blocks * BLOCK_M, BLOCK_M, WIDE)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_base = k_ptr + b * k_stride[0] + h * k_stride[2]
    v_base = v_ptr + b * v_stride[0] + h * v_stride[2]
    if bias_ptr is not None:
        bias_ptr += b * bias_stride[0] + h * bias_stride[1]
    first, last = 0, Nk
    if mask_ptr is not None:
        mask_ptr += b * mask_stride[0]
        first, last = _live(mask_ptr, mask_stride, Nk, 1024)
    begin, end = first // BLOCK_N * BLOCK_N, last
    if SPLITS > 1:
        per_split = tl.cdiv(tl.cdiv(last - begin, BLOCK_N), SPLITS) * BLOCK_N
        begin += split * per_split
        end = tl.minimum(last, begin + per_split)

    q_base = q_ptr + b * q_stride[0] + h * q_stride[2]
    q = _tile(q_base, rows, Nq, q_stride[1], d, q_stride[3], D)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(begin, end, BLOCK_N):
        cols = _indices(start, BLOCK_N, WIDE)
        k = _tile(k_base, cols, Nk, k_stride[1], d, k_stride[3], D)
        s = _scores(
            q,
            k,
            rows,
            cols,
            Nq,
            Nk,
            scale2,
            bias_ptr,
            bias_stride,
            index_ptr,
            index_stride,
            T,
            mask_ptr,
            mask_stride,
            PRECISION,
        )
        above = tl.maximum(highest, tl.max(s, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)  # no key yet: exp2(-inf) stays 0
        p = tl.exp2(s - shift[:, None])
        fade = tl.exp2(highest - shift)
        total = total * fade + tl.sum(p, 1)
        v = _tile(v_base, cols, Nk, v_stride[1], dv, v_stride[3], DV)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        highest = above
    lse = (highest + tl.log2(total)) * LN2
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLITS > 1:  # parts are (SPLITS, B * H, Nq, ...)
        part = split * (tl.num_programs(0) // m_blocks // SPLITS).to(tl.int64) + bh
        tl.store(part_lse + part * Nq + rows, lse, rows < Nq)
        _store(part_out + part * Nq * DV, out, rows, Nq, DV, dv, DV)
    else:
        tl.store(lse_ptr + bh * Nq + rows, lse, rows < Nq)
        base = out_ptr + b * Nq * H * DV + h * DV
        _store(base, activate(out, ACTIVATION), rows, Nq, H * DV, dv, DV)


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
        acc += weight[:, None] * _tile(part_out + part * Nq * DV, rows, Nq, DV, dv, 1, DV)
    tl.store(lse_ptr + bh * Nq + rows, highest + tl.log2(total) * LN2, rows < Nq)
    out = activate(acc / tl.where(total == 0.0, 1.0, total)[:, None], ACTIVATION)
    base = out_ptr + bh // H * Nq * H * DV + bh % H * DV
    _store(base, out, rows, Nq, H * DV, dv, DV)


def forward(q, k, v, bias, bias_index, key_padding_mask, scale, activation):
    """out (B, Nq, H, Dv) in q's dtype, and the natural log-sum-exp (B, H, Nq) in fp32."""
    (B, Nq, H, D), Nk, DV = q.shape, k.shape[1], v.shape[3]
    out = q.new_empty((B, Nq, H, DV))
    lse = q.new_empty((B, H, Nq), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    # Tiles of an int64 index beside those of a bias: at 128 x 64 they spill and fill shared memory.
    kernel = "attention_forward" if bias is None else "attention_forward_bias"
    blocks, options = _blocks(kernel, q, Nq, Nk, D, DV)
    m_blocks = triton.cdiv(Nq, blocks["BLOCK_M"])
    splits = _splits(B * H * m_blocks, triton.cdiv(Nk, blocks["BLOCK_N"]))
    parts = (None, None)
    if splits > 1:
        parts = (lse.new_empty((splits, B * H, Nq, DV)), lse.new_empty((splits, B * H, Nq)))
    _forward_kernel[(m_blocks * splits * B * H,)](
        q,
        k,
        v,
        *_extras(bias, bias_index, key_padding_mask),
        out,
        lse,
        q.stride(),
        k.stride(),
        v.stride(),
        *_extra_strides(bias, bias_index, key_padding_mask, (B, H, Nq, Nk)),
        H,
        Nq,
        Nk,
        0 if bias_index is None else bias.shape[1],
        scale * LOG2E,
        *parts,
        D=D,
        DV=DV,
        SPLITS=splits,
        ACTIVATION=activation,
        PRECISION=tuned.precision(q),
        WIDE=tuned.is_wide(q, k, v, bias),
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
        )
    return out, lse


def _blocks(kernel, q, Nq, Nk, D, DV):
    """(block sizes, launch options): the table's, no larger than what there is to do."""
    entry = tuned.config(kernel, q, max(D, DV))
    M, N = entry.pop("BLOCK_M"), entry.pop("BLOCK_N")
    full, M = M * N, min(M, max(16, triton.next_power_of_2(Nq)))
    N = min(N, max(16, triton.next_power_of_2(Nk)))
    entry["num_warps"] = max(1, entry["num_warps"] * M * N // full)  # as many scores per thread
    sizes = {"BLOCK_D": D, "BLOCK_DV": DV}
    padded = {name: max(16, triton.next_power_of_2(n)) for name, n in sizes.items()}
    return {"BLOCK_M": M, "BLOCK_N": N, **padded}, entry


def _splits(programs, n_blocks):
    """Into how many parts the keys go, so that few queries still fill the GPU."""
    if 2 * programs > tuned.TARGET_PROGRAMS:
        return 1
    wanted = min(tuned.TARGET_PROGRAMS // programs, n_blocks // 2, 32)
    return 1 << max(wanted, 1).bit_length() - 1


def _extras(bias, bias_index, key_padding_mask):
    mask = None if key_padding_mask is None else key_padding_mask.view(torch.uint8)
    return bias, bias_index, mask


def _extra_strides(bias, bias_index, key_padding_mask, shape):
    """Strides of bias (B, H, Nq, Nk), where a size of 1 stands still; of the index; of the mask."""
    if bias is None:
        strides = (0, 0, 0, 0)
    elif bias_index is not None:
        strides = (0, bias.stride(0), 0, bias.stride(1))
    else:
        strides = bias.expand(shape).stride()
    index = (0, 0) if bias_index is None else bias_index.stride()
    return strides, index, (0, 0) if key_padding_mask is None else key_padding_mask.stride()


@triton.jit
def _dscores(s, dy, v, lse, delta, PRECISION: tl.constexpr):
    """(p, ds): the probabilities, and the gradient of scale q k^T + bias. All in fp32."""
    p = tl.exp2(s - lse[:, None])
    dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
    return p, p * (dp - delta[:, None])


@triton.jit
def _row_sums(lse_ptr, delta_ptr, rows, Nq):
    """(log2-sum-exp, delta). Rows without keys, and those past the end, get p = 0 by +inf."""
    lse = tl.load(lse_ptr + rows, rows < Nq, float("-inf")) * _LOG2E
    delta = tl.load(delta_ptr + rows, rows < Nq, 0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse), delta


@triton.jit
def _dq_kernel(
    dy_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    index_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dy_stride,
    q_stride,
    k_stride,
    v_stride,
    bias_stride,
    index_stride,
    mask_stride,
    out_stride,
    H,
    Nq,
    Nk,
    T,
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
    """dq of one block of queries, and delta = sum(dy * out) for the kernels that follow."""
    m_blocks = tl.cdiv(Nq, BLOCK_M)
    bh = (tl.program_id(0) // m_blocks).to(tl.int64)
    b, h = bh // H, bh % H
    rows = _indices(tl.program_id(0) % m_blocks * BLOCK_M, BLOCK_M, WIDE)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    dy_base = dy_ptr + b * dy_stride[0] + h * dy_stride[2]
    dy = _tile(dy_base, rows, Nq, dy_stride[1], dv, dy_stride[3], DV)
    out_base = out_ptr + b * out_stride[0] + h * out_stride[2]
    out = _tile(out_base, rows, Nq, out_stride[1], dv, out_stride[3], DV)
    delta = tl.sum(dy.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + bh * Nq + rows, delta, rows < Nq)
    lse = tl.load(lse_ptr + bh * Nq + rows, rows < Nq, float("-inf")) * _LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)

    q_base = q_ptr + b * q_stride[0] + h * q_stride[2]
    q = _tile(q_base, rows, Nq, q_stride[1], d, q_stride[3], D)
    k_base = k_ptr + b * k_stride[0] + h * k_stride[2]
    v_base = v_ptr + b * v_stride[0] + h * v_stride[2]
    if bias_ptr is not None:
        bias_ptr += b * bias_stride[0] + h * bias_stride[1]
    first, last = 0, Nk
    if mask_ptr is not None:
        mask_ptr += b * mask_stride[0]
        first, last = _live(mask_ptr, mask_stride, Nk, 1024)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(first // BLOCK_N * BLOCK_N, last, BLOCK_N):
        cols = _indices(start, BLOCK_N, WIDE)
        k = _tile(k_base, cols, Nk, k_stride[1], d, k_stride[3], D)
        v = _tile(v_base, cols, Nk, v_stride[1], dv, v_stride[3], DV)
        s = _scores(
            q,
            k,
            rows,
            cols,
            Nq,
            Nk,
            scale2,
            bias_ptr,
            bias_stride,
            index_ptr,
            index_stride,
            T,
            mask_ptr,
            mask_stride,
            PRECISION,
        )
        _, ds = _dscores(s, dy, v, lse, delta, PRECISION)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    _store(dq_ptr + b * Nq * H * D + h * D, dq * scale, rows, Nq, H * D, d, D)


@triton.jit
def _dkv_kernel(
    dy_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    index_ptr,
    mask_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    dy_stride,
    q_stride,
    k_stride,
    v_stride,
    bias_stride,
    index_stride,
    mask_stride,
    H,
    Nq,
    Nk,
    T,
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
    n_blocks = tl.cdiv(Nk, BLOCK_N)
    bh = (tl.program_id(0) // n_blocks).to(tl.int64)
    b, h = bh // H, bh % H
    cols = _indices(tl.program_id(0) % n_blocks * BLOCK_N, BLOCK_N, WIDE)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    dy_base = dy_ptr + b * dy_stride[0] + h * dy_stride[2]
    q_base = q_ptr + b * q_stride[0] + h * q_stride[2]
    k_base = k_ptr + b * k_stride[0] + h * k_stride[2]
    v_base = v_ptr + b * v_stride[0] + h * v_stride[2]
    k = _tile(k_base, cols, Nk, k_stride[1], d, k_stride[3], D)
    v = _tile(v_base, cols, Nk, v_stride[1], e, v_stride[3], DV)
    if bias_ptr is not None:
        bias_ptr += b * bias_stride[0] + h * bias_stride[1]
    last = Nq
    if mask_ptr is not None:
        mask_ptr += b * mask_stride[0]
        padding = tl.load(mask_ptr + cols * mask_stride[1], cols < Nk, 1)
        last = tl.where(tl.min(padding.to(tl.int32)) == 0, Nq, 0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for start in range(0, last, BLOCK_M):
        rows = _indices(start, BLOCK_M, WIDE)
        q = _tile(q_base, rows, Nq, q_stride[1], d, q_stride[3], D)
        dy = _tile(dy_base, rows, Nq, dy_stride[1], e, dy_stride[3], DV)
        lse, delta = _row_sums(lse_ptr + bh * Nq, delta_ptr + bh * Nq, rows, Nq)
        s = _scores(
            q,
            k,
            rows,
            cols,
            Nq,
            Nk,
            scale2,
            bias_ptr,
            bias_stride,
            index_ptr,
            index_stride,
            T,
            mask_ptr,
            mask_stride,
            PRECISION,
        )
        p, ds = _dscores(s, dy, v, lse, delta, PRECISION)
        dv = tl.dot(tl.trans(p.to(dy.dtype)), dy, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    _store(dk_ptr + b * Nk * H * D + h * D, dk * scale, cols, Nk, H * D, d, D)
    _store(dv_ptr + b * Nk * H * DV + h * DV, dv, cols, Nk, H * DV, e, DV)


@triton.jit
def _dbias_kernel(
    dy_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    index_ptr,
    mask_ptr,
    lse_ptr,
    delta_ptr,
    part_ptr,
    dy_stride,
    q_stride,
    k_stride,
    v_stride,
    bias_stride,
    index_stride,
    mask_stride,
    B,
    H,
    Nq,
    Nk,
    T,
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
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    if KEEP_M:
        m_first, m_last = m_tile * BLOCK_M, m_tile * BLOCK_M + 1
    else:
        m_first, m_last = 0, Nq
    cols = _indices(n_tile * BLOCK_N, BLOCK_N, WIDE)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in range(part * chunk, tl.minimum(R, part * chunk + chunk)):
        b = (g // Gh if KEEP_B else r // Rh).to(tl.int64)
        h = (g % Gh if KEEP_H else r % Rh).to(tl.int64)
        bh = b * H + h
        bias_base = bias_ptr + b * bias_stride[0] + h * bias_stride[1]
        mask_base = mask_ptr
        if mask_ptr is not None:
            mask_base += b * mask_stride[0]
        k_base = k_ptr + b * k_stride[0] + h * k_stride[2]
        k = _tile(k_base, cols, Nk, k_stride[1], d, k_stride[3], D)
        v_base = v_ptr + b * v_stride[0] + h * v_stride[2]
        v = _tile(v_base, cols, Nk, v_stride[1], e, v_stride[3], DV)
        for m in range(m_first, m_last, BLOCK_M):
            rows = _indices(m, BLOCK_M, WIDE)
            q_base = q_ptr + b * q_stride[0] + h * q_stride[2]
            q = _tile(q_base, rows, Nq, q_stride[1], d, q_stride[3], D)
            dy_base = dy_ptr + b * dy_stride[0] + h * dy_stride[2]
            dy = _tile(dy_base, rows, Nq, dy_stride[1], e, dy_stride[3], DV)
            lse, delta = _row_sums(lse_ptr + bh * Nq, delta_ptr + bh * Nq, rows, Nq)
            s = _scores(
                q,
                k,
                rows,
                cols,
                Nq,
                Nk,
                scale2,
                bias_base,
                bias_stride,
                index_ptr,
                index_stride,
                T,
                mask_base,
                mask_stride,
                PRECISION,
            )
            _, ds = _dscores(s, dy, v, lse, delta, PRECISION)
            acc += ds
    base = part_ptr + (part * G + g).to(tl.int64) * (Nq if KEEP_M else 1) * Nk
    if KEEP_M:
        rows = _indices(m_tile * BLOCK_M, BLOCK_M, WIDE)
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
    (B, Nq, H, D), Nk, DV = q.shape, k.shape[1], v.shape[3]
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    dbias = lse.new_zeros(bias.shape if needs_dbias else (0,))
    if 0 in (B, Nq, H, Nk):
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    inputs = (q, k, v, *_extras(bias, bias_index, key_padding_mask))
    extras = _extra_strides(bias, bias_index, key_padding_mask, (B, H, Nq, Nk))
    strides = (dy.stride(), q.stride(), k.stride(), v.stride(), *extras)
    T = 0 if bias_index is None else bias.shape[1]
    scales = (scale, scale * LOG2E)
    fixed = {"D": D, "DV": DV, "PRECISION": tuned.precision(q)}
    fixed["WIDE"] = tuned.is_wide(dy, q, k, v, bias, out)
    blocks, options = _blocks("attention_dq", q, Nq, Nk, D, DV)
    grid = (triton.cdiv(Nq, blocks["BLOCK_M"]) * B * H,)
    _dq_kernel[grid](
        dy,
        *inputs,
        out,
        lse,
        delta,
        dq,
        *strides,
        out.stride(),
        H,
        Nq,
        Nk,
        T,
        *scales,
        **fixed,
        **blocks,
        **options,
    )
    blocks, options = _blocks("attention_dkv", q, Nq, Nk, D, DV)
    grid = (triton.cdiv(Nk, blocks["BLOCK_N"]) * B * H,)
    _dkv_kernel[grid](
        dy,
        *inputs,
        lse,
        delta,
        dk,
        dv,
        *strides,
        H,
        Nq,
        Nk,
        T,
        *scales,
        **fixed,
        **blocks,
        **options,
    )
    if not needs_dbias or (bias_index is None and bias.shape[3] == 1):
        return dq, dk, dv, dbias  # what is added to all scores of a row changes no probability

    shape = (1, H, Nq, Nk) if bias_index is not None else bias.shape
    kept = [n != 1 or full == 1 for n, full in zip(shape[:3], (B, H, Nq), strict=True)]
    blocks, options = _blocks("attention_dbias", q, Nq, Nk, D, DV)
    tiles = B ** kept[0] * H ** kept[1]
    tiles *= triton.cdiv(Nq, blocks["BLOCK_M"]) ** kept[2]
    tiles *= triton.cdiv(Nk, blocks["BLOCK_N"])
    shared = B ** (not kept[0]) * H ** (not kept[1])
    chunk = triton.cdiv(shared, min(shared, triton.cdiv(tuned.TARGET_PROGRAMS, tiles)))
    chunks = triton.cdiv(shared, chunk)
    parts = lse.new_empty((chunks, *shape))
    _dbias_kernel[(tiles * chunks,)](
        dy,
        *inputs,
        lse,
        delta,
        parts,
        *strides,
        B,
        H,
        Nq,
        Nk,
        T,
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
    bounds = torch.searchsorted(index, torch.arange(T + 1, device=q.device, dtype=index.dtype))
    if T:
        _dtable_kernel[(T, H)](dense, order, bounds, dbias, Nq * Nk, T, BLOCK=256, num_warps=4)
    return dq, dk, dv, dbias
