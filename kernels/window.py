"""An image as the left side of a matrix product, read in place: no im2col.

    x[(b, ho, wo), (ci, i, j)] = image[b, ci, ho S + i - top, wo S + j - left],  0 off the image

Rows are output cells, columns the taps of their windows: in the order (ci, i, j), or (i, j, ci)
where the image's channels lie together. `sight` is (Ci, H, W, cells, Wo, stride, top, left). An
element's offset is one of its row plus one of its column.
"""

import triton
import triton.language as tl


def look(image, weight, stride, padding):
    """(sight, output cells of an image, whether columns are in the order (ci, i, j))"""
    (_, Ci, H, W), (KH, KW), (top, left, bottom, right) = image.shape, weight.shape[2:], padding
    Ho, Wo = (H + top + bottom - KH) // stride + 1, (W + left + right - KW) // stride + 1
    sight = (max(Ci, 1), H, W, Ho * Wo, Wo, stride, top, left)  # Ci divides
    return sight, Ho * Wo, image.stride(1) != 1


@triton.jit
def taps(k, image_stride, sight, KH: tl.constexpr, KW: tl.constexpr, CHANNELS_FIRST: tl.constexpr):
    """(i, j, offset) of columns k."""
    if CHANNELS_FIRST:
        j, i, ci = k % KW, k // KW % KH, k // (KW * KH)
    else:
        ci, j, i = k % sight[0], k // sight[0] % KW, k // (sight[0] * KW)
    at = i.to(tl.int64) * image_stride[2] + j.to(tl.int64) * image_stride[3]
    return i, j, at + ci.to(tl.int64) * image_stride[1]


@triton.jit
def corners(rows, image_stride, sight):
    """(image, cell in it, top row and left column of its window, offset of that corner)"""
    b, cell = (rows // sight[3]).to(tl.int64), (rows % sight[3]).to(tl.int32)
    h, w = cell // sight[4] * sight[5] - sight[6], cell % sight[4] * sight[5] - sight[7]
    at = h.to(tl.int64) * image_stride[2] + w.to(tl.int64) * image_stride[3]
    return b, cell.to(tl.int64), h, w, at + b * image_stride[0]


@triton.jit
def on_image(h, w, i, j, sight):
    """Which taps (i, j) of the windows at (h, w) lie on the image."""
    y, x = h[:, None] + i[None, :], w[:, None] + j[None, :]
    return (y >= 0) & (y < sight[1]) & (x >= 0) & (x < sight[2])
