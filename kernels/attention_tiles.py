"""What attention's forward and backward share: tiles, scores, live blocks; block sizes, strides.

Kernels take what belongs together in tuples: tensors ((q, k, v), (bias, index, mask)), strides
likewise, sizes (H, Nq, Nk, T) with the table's length T. (Triton 3.6 lets no function of a
kernel return a None among others, so what may be None is reached through these.)
"""

import torch
import triton
import triton.language as tl

from . import tuned

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def indices(start, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    if WIDE:
        offsets = offsets.to(tl.int64)
    return start + offsets


@triton.jit
def head(ptr, stride, b, h):
    """Where image b and head h of a (B, N, H, D) tensor begin."""
    return ptr + b * stride[0] + h * stride[2]


@triton.jit
def tile(base, rows, n_rows, stride, cols, N_COLS: tl.constexpr):
    """rows x cols of one head of a (B, N, H, D) tensor, D being N_COLS; zero outside."""
    inside = rows[:, None] < n_rows
    if cols.shape[0] != N_COLS:
        inside = inside & (cols[None, :] < N_COLS)
    return tl.load(base + rows[:, None] * stride[1] + cols[None, :] * stride[3], inside, 0.0)


@triton.jit
def store(base, x, rows, n_rows, row_stride, cols, N_COLS: tl.constexpr):
    inside = rows[:, None] < n_rows
    if cols.shape[0] != N_COLS:
        inside = inside & (cols[None, :] < N_COLS)
    pointers = base + rows[:, None] * row_stride + cols[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), inside)


@triton.jit
def scores(q, k, b, h, rows, cols, sizes, scale2, extras, strides, PRECISION: tl.constexpr):
    """scale2 q k^T + log2(e) bias; -inf where the key is padding or past the end.

    An index outside the table gives NaN.
    """
    bias_ptr, index_ptr, mask_ptr = extras
    _, Nq, Nk, T = sizes
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
    keep = cols < Nk
    if bias_ptr is not None:
        bias_ptr += b * strides[0][0] + h * strides[0][1]
        inside = (rows[:, None] < Nq) & keep[None, :]
        if index_ptr is not None:
            where = rows[:, None] * strides[1][0] + cols[None, :] * strides[1][1]
            index = tl.load(index_ptr + where, inside, 0).to(tl.int64)
            known = (index >= 0) & (index < T)
            bias = tl.load(bias_ptr + index * strides[0][3], inside & known, 0.0).to(tl.float32)
            bias = tl.where(inside & (known == 0), float("nan"), bias)
        else:
            where = rows[:, None] * strides[0][2] + cols[None, :] * strides[0][3]
            bias = tl.load(bias_ptr + where, inside, 0.0).to(tl.float32)
        s += bias * _LOG2E
    if mask_ptr is not None:
        keep = keep & is_key(mask_ptr, strides[2], b, cols, Nk)
    return tl.where(keep[None, :], s, float("-inf"))


@triton.jit
def is_key(mask_ptr, stride, b, cols, Nk):
    """Which of these keys of image b exist and are not padding."""
    return tl.load(mask_ptr + b * stride[0] + cols * stride[1], cols < Nk, 1) == 0


@triton.jit
def _live_kernel(mask_ptr, live_ptr, stride, Nk, n_blocks, BLOCK_N: tl.constexpr, AT: tl.constexpr):
    """One image's list of the blocks that hold a key which is not padding, behind their number."""
    b = tl.program_id(0).to(tl.int64)
    live_ptr += b * (n_blocks + 1)
    found = tl.program_id(0) * 0
    for start in range(0, n_blocks, AT):
        blocks = start + tl.arange(0, AT)
        cols = blocks[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        live = tl.max(is_key(mask_ptr, stride, b, cols, Nk).to(tl.int32), 1)
        at = found + tl.cumsum(live, 0)
        tl.store(live_ptr + at, blocks, live == 1)
        found += tl.sum(live)
    tl.store(live_ptr, found)


@triton.jit
def live_count(live_ptr, b, Nk, BLOCK_N: tl.constexpr):
    """How many key blocks of image b there are to walk over."""
    count = tl.cdiv(Nk, BLOCK_N)
    if live_ptr is not None:
        count = tl.load(live_ptr + b * (count + 1))
    return count


@triton.jit
def block_start(live_ptr, b, i, Nk, BLOCK_N: tl.constexpr):
    """The first key of the i-th block that is walked over."""
    if live_ptr is not None:
        i = tl.load(live_ptr + b * (tl.cdiv(Nk, BLOCK_N) + 1) + (i + 1))
    return i * BLOCK_N


def live_list(key_padding_mask, block):
    """int32 (B, 1 + blocks): per image how many key blocks are not all padding, and which; or None.

    So no program reads a block that is, wherever it lies. None also where one block holds all keys.
    """
    if key_padding_mask is None or key_padding_mask.shape[1] <= block:
        return None
    B, Nk = key_padding_mask.shape
    n_blocks = triton.cdiv(Nk, block)
    live = torch.empty((B, n_blocks + 1), dtype=torch.int32, device=key_padding_mask.device)
    mask = key_padding_mask.view(torch.uint8)
    blocks = {"BLOCK_N": block, "AT": min(64, 4096 // block)}
    _live_kernel[(B,)](mask, live, mask.stride(), Nk, n_blocks, **blocks, **tuned.FUSED)
    return live


class Call:
    """One call's tensors and numbers, as the kernels' leading arguments have them.

    others: what else a kernel of the call reads or writes, shaped like q, k or v.
    """

    def __init__(self, q, k, v, bias, bias_index, key_padding_mask, *others):
        (B, Nq, H, D), (Nk, DV) = q.shape, (k.shape[1], v.shape[3])
        self.q, self.shape, self.widths = q, (B, H, Nq, Nk), {"D": D, "DV": DV}
        self.mask = key_padding_mask
        # What takes registers beside the products: a bias (and its index, in 64 bits), columns to
        # mask in every tile, offsets in 64 bits. In the tiles of the others it spills.
        self.wide = tuned.is_wide(q, k, v, bias, *others)
        ragged = any(width & (width - 1) for width in self.widths.values())
        self.lean = bias is not None or ragged or self.wide
        self.sizes = (H, Nq, Nk, 0 if bias_index is None else bias.shape[1])
        mask = None if key_padding_mask is None else key_padding_mask.view(torch.uint8)
        self.tensors = (
            ((q, k, v), (bias, bias_index, mask)),
            ((q.stride(), k.stride(), v.stride()), self._extra_strides(bias, bias_index, mask)),
        )

    def _extra_strides(self, bias, bias_index, mask):
        """Those of bias (B, H, Nq, Nk), a size of 1 standing still; of the index; of the mask."""
        if bias is None:
            strides = (0, 0, 0, 0)
        elif bias_index is not None:
            strides = (0, bias.stride(0), 0, bias.stride(1))
        else:
            strides = bias.expand(self.shape).stride()
        index = (0, 0) if bias_index is None else bias_index.stride()
        return strides, index, (0, 0) if mask is None else mask.stride()

    def blocks(self, kernel):
        """(block sizes, launch options): the table's, no larger than what there is to do.

        A kernel that has smaller tiles for what is lean has them as `kernel`_lean.
        """
        _, _, Nq, Nk = self.shape
        kernel += "_lean" * (self.lean and kernel != "attention_dbias")
        entry = tuned.config(kernel, self.q, max(self.widths.values()))
        M, N = entry.pop("BLOCK_M"), entry.pop("BLOCK_N")
        full, M = M * N, min(M, max(16, triton.next_power_of_2(Nq)))
        N = min(N, max(16, triton.next_power_of_2(Nk)))
        entry["num_warps"] = max(1, entry["num_warps"] * M * N // full)  # as many scores per thread
        padded = {f"BLOCK_{n}": max(16, triton.next_power_of_2(w)) for n, w in self.widths.items()}
        return {"BLOCK_M": M, "BLOCK_N": N, **padded, **self.widths}, entry
