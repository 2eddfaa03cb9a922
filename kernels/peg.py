"""PEG in Triton: a depthwise K x K conv on the token grid, residual, activation and gate fused.

Tokens are (B, prefix + H*W, C) with any strides; prefix tokens pass through. Backward: dx by the
transposed stencil, and dweight with dbias in two stages, first over chunks of the output cells,
then over the chunks in ascending order, so no float atomics.
"""

import torch
import triton
import triton.language as tl

from . import tuned
from .activation import activate


@triton.jit
def _cells(program, n, n_blocks, BLOCK: tl.constexpr):
    """(image, rows of its block, which of them exist)"""
    rows = program % n_blocks * BLOCK + tl.arange(0, BLOCK)
    return (program // n_blocks).to(tl.int64), rows, rows < n


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    x_stride,
    weight_stride,
    H,
    W,
    Ho,
    Wo,
    C,
    prefix,
    stride,
    padding,
    KH: tl.constexpr,
    KW: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y of BLOCK_M output tokens and BLOCK_C channels."""
    N = prefix + Ho * Wo
    b, rows, exists = _cells(tl.program_id(0), N, tl.cdiv(N, BLOCK_M), BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = exists[:, None] & (c[None, :] < C)
    cell = tl.maximum(rows - prefix, 0)
    is_cell = rows >= prefix
    top, left = cell // Wo * stride - padding, cell % Wo * stride - padding
    channel = c[None, :].to(tl.int64) * x_stride[2]
    base = x_ptr + b * x_stride[0] + channel
    z = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + c, c < C, 0.0).to(tl.float32)[None, :]
    for i in range(KH):  # unrolled too, 49 taps spill
        for j in tl.static_range(KW):
            h, w = top + i, left + j
            on_grid = is_cell & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            at = (prefix + h * W + w).to(tl.int64) * x_stride[1]
            x = tl.load(base + at[:, None], inside & on_grid[:, None], 0.0)
            tap = weight_ptr + c * weight_stride[0] + i * weight_stride[2] + j * weight_stride[3]
            z += x.to(tl.float32) * tl.load(tap, c < C, 0.0).to(tl.float32)[None, :]
    z = activate(z, ACTIVATION)
    # Without a residual or gate only the prefix is read here: its token is itself.
    needs_x = inside if RESIDUAL or GATE else inside & (is_cell[:, None] == 0)
    own = tl.load(base + rows[:, None].to(tl.int64) * x_stride[1], needs_x, 0.0).to(tl.float32)
    if GATE:
        z = own * tl.sigmoid(z)
    elif RESIDUAL:
        z += own
    y = tl.where(is_cell[:, None], z, own)
    at = (b * N + rows[:, None]) * C + c[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


def forward(x, weight, bias, H, W, prefix, stride, padding, residual, activation, gate):
    """y (B, prefix + Ho*Wo, C), contiguous."""
    (B, _, C), (KH, KW) = x.shape, weight.shape[2:]
    Ho, Wo = _output_size(H, KH, stride, padding), _output_size(W, KW, stride, padding)
    y = x.new_empty((B, prefix + Ho * Wo, C))
    if y.numel() == 0:
        return y
    blocks, options = _blocks("peg_forward", x, KH)
    grid = (triton.cdiv(y.shape[1], blocks["BLOCK_M"]) * B, triton.cdiv(C, blocks["BLOCK_C"]))
    _forward_kernel[grid](
        x,
        weight,
        None if bias is None else bias.contiguous(),
        y,
        x.stride(),
        weight.stride(),
        H,
        W,
        Ho,
        Wo,
        C,
        prefix,
        stride,
        padding,
        KH=KH,
        KW=KW,
        RESIDUAL=residual,
        ACTIVATION=activation,
        GATE=gate,
        **blocks,
        **options,
    )
    return y


def _output_size(size, K, stride, padding):
    return (size + 2 * padding - K) // stride + 1


def _blocks(kernel, x, K):
    """(block sizes, launch options): the table's, no wider than the channels."""
    entry = tuned.config(kernel, x, K)
    C = min(entry.pop("BLOCK_C"), max(16, triton.next_power_of_2(x.shape[2])))
    return {"BLOCK_M": entry.pop("BLOCK_M"), "BLOCK_C": C}, entry


@triton.jit
def _dx_kernel(
    dy_ptr,
    weight_ptr,
    dx_ptr,
    dy_stride,
    weight_stride,
    H,
    W,
    Ho,
    Wo,
    C,
    prefix,
    stride,
    padding,
    KH: tl.constexpr,
    KW: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx of BLOCK_M input tokens and BLOCK_C channels."""
    N = prefix + H * W
    b, rows, exists = _cells(tl.program_id(0), N, tl.cdiv(N, BLOCK_M), BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = exists[:, None] & (c[None, :] < C)
    cell = tl.maximum(rows - prefix, 0)
    is_cell = rows >= prefix
    base = dy_ptr + b * dy_stride[0] + c[None, :].to(tl.int64) * dy_stride[2]
    needs_dy = inside if RESIDUAL else inside & (is_cell[:, None] == 0)
    own = base + rows[:, None].to(tl.int64) * dy_stride[1]
    dx = tl.load(own, needs_dy, 0.0).to(tl.float32)
    for i in range(KH):  # unrolled too, 49 taps spill
        for j in tl.static_range(KW):
            h, w = cell // W + padding - i, cell % W + padding - j  # stride times the output cell
            hit = is_cell & (h >= 0) & (w >= 0) & (h % stride == 0) & (w % stride == 0)
            ho, wo = h // stride, w // stride
            hit = hit & (ho < Ho) & (wo < Wo)
            at = (prefix + ho * Wo + wo).to(tl.int64) * dy_stride[1]
            dy = tl.load(base + at[:, None], inside & hit[:, None], 0.0)
            tap = weight_ptr + c * weight_stride[0] + i * weight_stride[2] + j * weight_stride[3]
            dx += dy.to(tl.float32) * tl.load(tap, c < C, 0.0).to(tl.float32)[None, :]
    at = (b * N + rows[:, None]) * C + c[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), inside)


@triton.jit
def _dweight_kernel(
    dy_ptr,
    x_ptr,
    part_ptr,
    dy_stride,
    x_stride,
    H,
    W,
    Ho,
    Wo,
    C,
    prefix,
    stride,
    padding,
    cells,
    chunk,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tap (or, as the last one, the bias) over one chunk of the B * Ho * Wo output cells.

    part is (chunks, KH * KW + 1, C) in fp32. The taps of a chunk are neighbouring programs, so that
    all but the first find dy and x in L2.
    """
    taps = KH * KW + 1
    tap, part = tl.program_id(0) % taps, (tl.program_id(0) // taps).to(tl.int64)
    i, j = tap // KW, tap % KW
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = c[None, :].to(tl.int64)
    acc = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, chunk, BLOCK_M):
        at = part * chunk + start + tl.arange(0, BLOCK_M)
        exists = (at < cells) & (start + tl.arange(0, BLOCK_M) < chunk)
        b, cell = at // (Ho * Wo), at % (Ho * Wo)
        h, w = cell // Wo * stride - padding + i, cell % Wo * stride - padding + j
        is_bias = (at * 0 + tap) == KH * KW
        used = exists & (is_bias | ((h >= 0) & (h < H) & (w >= 0) & (w < W)))
        mask = used[:, None] & (c[None, :] < C)
        rows = b * dy_stride[0] + (prefix + cell) * dy_stride[1]
        dy = tl.load(dy_ptr + rows[:, None] + channel * dy_stride[2], mask, 0.0).to(tl.float32)
        rows = b * x_stride[0] + (prefix + h * W + w) * x_stride[1]
        x_mask = mask & (is_bias[:, None] == 0)
        x = tl.load(x_ptr + rows[:, None] + channel * x_stride[2], x_mask, 1.0).to(tl.float32)
        acc += tl.sum(dy * x, 0)
    tl.store(part_ptr + (part * taps + tap) * C + c, acc, c < C)


def backward(dy, x, weight, H, W, prefix, stride, padding, residual):
    """(dx, dweight, dbias), contiguous."""
    (B, _, C), (KH, KW) = x.shape, weight.shape[2:]
    Ho, Wo = _output_size(H, KH, stride, padding), _output_size(W, KW, stride, padding)
    dx = x.new_empty(x.shape)
    cells = B * Ho * Wo
    if x.numel() == 0 or cells == 0:
        return dx.zero_(), weight.new_zeros(weight.shape), weight.new_zeros(C)
    sizes = (H, W, Ho, Wo, C, prefix, stride, padding)
    blocks, options = _blocks("peg_dx", x, KH)
    c_blocks = triton.cdiv(C, blocks["BLOCK_C"])
    _dx_kernel[(triton.cdiv(x.shape[1], blocks["BLOCK_M"]) * B, c_blocks)](
        dy,
        weight,
        dx,
        dy.stride(),
        weight.stride(),
        *sizes,
        KH=KH,
        KW=KW,
        RESIDUAL=residual,
        **blocks,
        **options,
    )
    blocks, options = _blocks("peg_dweight", x, KH)
    taps, c_blocks = KH * KW + 1, triton.cdiv(C, blocks["BLOCK_C"])
    chunks = triton.cdiv(4 * tuned.TARGET_PROGRAMS, taps * c_blocks)
    chunk = triton.cdiv(triton.cdiv(cells, chunks), blocks["BLOCK_M"]) * blocks["BLOCK_M"]
    chunks = triton.cdiv(cells, chunk)
    parts = dx.new_empty((chunks, taps, C), dtype=torch.float32)
    _dweight_kernel[(chunks * taps, c_blocks)](
        dy,
        x,
        parts,
        dy.stride(),
        x.stride(),
        *sizes,
        cells,
        chunk,
        KH=KH,
        KW=KW,
        **blocks,
        **options,
    )
    total = parts.sum(0).to(weight.dtype)
    return dx, total[:-1].t().reshape(weight.shape).contiguous(), total[-1].contiguous()
