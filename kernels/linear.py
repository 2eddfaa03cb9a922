"""The fused linear layer in Triton: y = activation(norm(x) @ weight^T + bias) + residual.

A LayerNorm in front costs no pass of its own: every program takes mean and variance of its rows
(two passes over values that its products then find in L2) and normalises while it loads.
Backward is the same product again for dx, and gradient.py's sums over rows for the rest.
"""

import triton
import triton.language as tl

from . import tuned
from .activation import activate
from .gradient import weight_gradient


@triton.jit
def _statistics(x_base, rows, M, K, x_row, x_col, eps, BLOCK_K: tl.constexpr):
    """(mean, 1 / standard deviation) per row, the variance around the mean."""
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros([rows.shape[0], BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = (rows[:, None] < M) & (start + k[None, :] < K)
        at = rows[:, None].to(tl.int64) * x_row + (start + k[None, :]).to(tl.int64) * x_col
        sums += tl.load(x_base + at, inside, 0.0).to(tl.float32)
    mean = tl.sum(sums, 1) / K
    squares = tl.zeros([rows.shape[0], BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = (rows[:, None] < M) & (start + k[None, :] < K)
        at = rows[:, None].to(tl.int64) * x_row + (start + k[None, :]).to(tl.int64) * x_col
        off = tl.load(x_base + at, inside, 0.0).to(tl.float32) - mean[:, None]
        squares += tl.where(inside, off * off, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(squares, 1) / K + eps)


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    residual_ptr,
    y_ptr,
    x_stride,
    weight_stride,
    residual_stride,
    M,
    N,
    K,
    eps,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One BLOCK_M x BLOCK_N tile of y; GROUP row blocks share their weights in L2."""
    m_blocks, n_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * n_blocks)
    height = tl.minimum(m_blocks - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * n_blocks)
    rows = (group * GROUP + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    if norm_weight_ptr is not None:
        mean, scale = _statistics(x_ptr, rows, M, K, x_stride[0], x_stride[1], eps, BLOCK_K)
    x_row = x_ptr + rows[:, None].to(tl.int64) * x_stride[0]
    w_row = weight_ptr + cols[:, None].to(tl.int64) * weight_stride[0]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_inside = (rows[:, None] < M) & (k[None, :] < K)
        x = tl.load(x_row + k[None, :].to(tl.int64) * x_stride[1], x_inside, 0.0)
        if norm_weight_ptr is not None:
            gain = tl.load(norm_weight_ptr + k, k < K, 0.0).to(tl.float32)
            normed = (x.to(tl.float32) - mean[:, None]) * scale[:, None] * gain[None, :]
            if norm_bias_ptr is not None:
                normed += tl.load(norm_bias_ptr + k, k < K, 0.0).to(tl.float32)[None, :]
            x = tl.where(x_inside, normed, 0.0).to(x.dtype)
        w_inside = (cols[:, None] < N) & (k[None, :] < K)
        w = tl.load(w_row + k[None, :].to(tl.int64) * weight_stride[1], w_inside, 0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, cols < N, 0.0).to(tl.float32)[None, :]
    y = activate(acc, ACTIVATION)
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    if residual_ptr is not None:
        at = cols[None, :].to(tl.int64) * residual_stride[1]
        at += rows[:, None].to(tl.int64) * residual_stride[0]
        y += tl.load(residual_ptr + at, inside, 0.0).to(tl.float32)
    at = rows[:, None].to(tl.int64) * N + cols[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


def _product(kernel, rows, weight, y, vectors=(None,) * 3, eps=0.0, residual=None, activation=0):
    """y (M, N) by the table's entry of `kernel`; rows (M, K) and weight (N, K) have any strides."""
    (M, K), N = rows.shape, weight.shape[0]
    entry = tuned.config(kernel, rows, N)
    blocks = {
        "BLOCK_M": min(entry.pop("BLOCK_M"), max(16, triton.next_power_of_2(M))),
        "BLOCK_N": min(entry.pop("BLOCK_N"), max(16, triton.next_power_of_2(N))),
        "BLOCK_K": min(entry.pop("BLOCK_K"), max(16, triton.next_power_of_2(K))),
    }
    grid = (triton.cdiv(M, blocks["BLOCK_M"]) * triton.cdiv(N, blocks["BLOCK_N"]),)
    _forward_kernel[grid](
        rows,
        weight,
        *vectors,
        residual,
        y,
        rows.stride(),
        weight.stride(),
        (0, 0) if residual is None else residual.stride(),
        M,
        N,
        K,
        eps,
        ACTIVATION=activation,
        PRECISION=tuned.precision(rows),
        GROUP=8,
        **blocks,
        **entry,
    )


def forward(x, weight, bias, packed, norm_weight, norm_bias, eps, residual, activation):
    """y (..., N), contiguous. packed is the CPU's and stays unread."""
    N, K = weight.shape
    y = x.new_empty((*x.shape[:-1], N))
    if y.numel() == 0:
        return y
    M = y.numel() // N
    more = None if residual is None else residual.reshape(M, N)
    vectors = [None if t is None else t.contiguous() for t in (bias, norm_weight, norm_bias)]
    _product("linear_forward", x.reshape(M, K), weight, y, vectors, eps, more, activation)
    return y


def backward(dy, x, weight):
    """(dx, dweight, dbias), contiguous."""
    N, K = weight.shape
    M = x.shape[:-1].numel()
    dy, rows, dx = dy.reshape(M, N), x.reshape(M, K), x.new_empty(x.shape)
    if dx.numel():
        _product("linear_dx", dy, weight.t(), dx)
    strides = (dy.stride(0), 0, dy.stride(1))
    return dx, *weight_gradient("linear_dweight", dy, rows, weight, strides, M)
