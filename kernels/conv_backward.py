"""Gradients of one convolution in Triton, for conv_stem and patch_embed, as implicit products.

dweight and dbias are sums over the output's cells (gradient.py). dimage is gathered, without
atomics. Pixels that lie alike between the strides are a kind: those with (h + top) % S = r see the
taps i = r, r + S, r + 2S, ..., and tap r + S u of pixel S q + r - top meets the output's row q - u:

    dimage[(b, qh, qw), (rh, rw, ci)] = sum over uh, uw, co of
        dz[b, (qh - uh, qw - uw), co] weight[co, ci, rh + S uh, rw + S uw]
"""

import triton
import triton.language as tl

from . import tuned
from .gradient import weight_gradient
from .window import look


@triton.jit
def _dimage_kernel(
    dz_ptr,
    weight_ptr,
    dimage_ptr,
    dz_stride,
    Ci,
    H,
    W,
    Ho,
    Wo,
    Co,
    Qh,
    Qw,
    M,
    Sh,
    Sw,
    stride,
    top,
    left,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M places (b, qh, qw), BLOCK_N columns (rh, rw, ci): `width` columns for each kind.

    The weight is (KH, KW, Co, Ci). All columns of a block have the same number of taps.
    """
    columns = Sh * Sw * width
    n_blocks = tl.cdiv(columns, BLOCK_N)
    rows = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % n_blocks * BLOCK_N
    Uh = (KH - column // (width * Sw) + stride - 1) // stride
    Uw = (KW - column // width % Sw + stride - 1) // stride
    cols = column + tl.arange(0, BLOCK_N)
    ci, rh, rw = cols % width, cols // (width * Sw), cols // width % Sw
    used = (ci < Ci) & (cols < columns)
    b, place = rows // (Qh * Qw), (rows % (Qh * Qw)).to(tl.int32)
    qh, qw = place // Qw, place % Qw
    exists = rows < M
    dz_row = b * dz_stride[0] + (qh * Wo + qw).to(tl.int64) * dz_stride[1]
    w_col = (rh * KW + rw).to(tl.int64) * Co * Ci + ci
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, Uh * Uw * Co, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        co, uh, uw = k % Co, k // (Uw * Co), k // Co % Uw
        inner = k < Uh * Uw * Co
        ho, wo = qh[:, None] - uh[None, :], qw[:, None] - uw[None, :]
        seen = exists[:, None] & inner[None, :] & (ho >= 0) & (ho < Ho) & (wo >= 0) & (wo < Wo)
        dz_at = co.to(tl.int64) * dz_stride[2] - (uh * Wo + uw).to(tl.int64) * dz_stride[1]
        dz = tl.load(dz_ptr + (dz_row[:, None] + dz_at[None, :]), seen, 0.0)
        w_at = ((uh * KW + uw) * stride).to(tl.int64) * Co * Ci + co.to(tl.int64) * Ci
        w_inside = inner[:, None] & used[None, :]
        taps = tl.load(weight_ptr + (w_at[:, None] + w_col[None, :]), w_inside, 0.0)
        acc = tl.dot(dz, taps, acc, input_precision=PRECISION)
    h, w = qh * stride - top, qw * stride - left
    y, x = h[:, None] + rh[None, :], w[:, None] + rw[None, :]
    inside = exists[:, None] & used[None, :] & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    to_row = (b * H + h) * W * Ci + w.to(tl.int64) * Ci
    to_col = (rh * W + rw).to(tl.int64) * Ci + ci
    to = dimage_ptr + (to_row[:, None] + to_col[None, :])
    tl.store(to, acc.to(dimage_ptr.dtype.element_ty), inside)


def _image_gradient(dz, image, weight, stride, padding):
    """(B, H, W, Ci), contiguous."""
    (B, Ci, H, W), (Co, _, KH, KW), (top, left, _, _) = image.shape, weight.shape, padding
    sight, cells, _ = look(image, weight, stride, padding)
    Wo = sight[4]
    dimage = dz.new_empty((B, H, W, Ci))
    if dimage.numel() == 0:
        return dimage
    Qh, Qw = (H - 1 + top) // stride + 1, (W - 1 + left) // stride + 1
    Sh, Sw, M = min(stride, H + top), min(stride, W + left), B * Qh * Qw
    entry = tuned.config("conv_dimage", dz, Ci)
    # Kinds with equally many taps may share a block of columns; others begin a block of their own.
    alike = KH % stride == 0 and KW % stride == 0
    columns = Sh * Sw * Ci if alike else Ci
    blocks = {
        "BLOCK_M": min(entry.pop("BLOCK_M"), max(16, triton.next_power_of_2(M))),
        "BLOCK_N": min(entry.pop("BLOCK_N"), max(16, triton.next_power_of_2(columns))),
        "BLOCK_K": entry.pop("BLOCK_K"),
    }
    width = Ci if alike else triton.cdiv(Ci, blocks["BLOCK_N"]) * blocks["BLOCK_N"]
    n_blocks = triton.cdiv(Sh * Sw * width, blocks["BLOCK_N"])
    _dimage_kernel[(triton.cdiv(M, blocks["BLOCK_M"]) * n_blocks,)](
        dz,
        weight.permute(2, 3, 0, 1).contiguous(),
        dimage,
        dz.stride(),
        Ci,
        H,
        W,
        cells // Wo,
        Wo,
        Co,
        Qh,
        Qw,
        M,
        Sh,
        Sw,
        stride,
        top,
        left,
        width,
        KH=KH,
        KW=KW,
        PRECISION=tuned.precision(dz),
        **blocks,
        **entry,
    )
    return dimage


def backward(dz, image, weight, stride, padding, needs_dimage):
    """(dimage (B, H, W, Ci) or empty, dweight, dbias), contiguous. dz and image: any strides."""
    sight, cells, channels_first = look(image, weight, stride, padding)
    dweight, dbias = weight_gradient(
        "conv_dweight",
        dz,
        image,
        weight,
        dz.stride(),
        image.shape[0] * cells,
        sight,
        channels_first,
    )
    if not needs_dimage:
        return dz.new_empty(0), dweight, dbias
    return _image_gradient(dz, image, weight, stride, padding), dweight, dbias
