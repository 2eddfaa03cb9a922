"""Gradients by torch's own products, where `backend.GPU` names "torch"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F


def linear_backward(dy, x, weight):
    """(dx, dweight, dbias), contiguous: torch's own products."""
    N, K = weight.shape
    M = x.shape[:-1].numel()
    dy, rows = dy.reshape(M, N), x.reshape(M, K)
    dx = (dy @ weight).view(x.shape)
    return dx, dy.t() @ rows, dy.sum(0, dtype=torch.float32).to(weight.dtype)


@contextmanager
def _deterministic() -> Iterator[None]:
    """That alone: cudnn.flags() would read and set how fp32 is multiplied too, and raise where the
    user chose it by fp32_precision."""
    kept = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = kept


def conv_backward(dz, image, weight, stride, padding, needs_dimage):
    """(dimage as (B, H, W, Ci) or empty, dweight, dbias) by torch, as deterministic as cuDNN is."""
    (B, Ci, H, W), (Co, _, KH, KW) = image.shape, weight.shape
    top, left, bottom, right = padding
    Ho, Wo = (H + top + bottom - KH) // stride + 1, (W + left + right - KW) // stride + 1
    if 0 in (B, Ci, Co, H, W):
        dimage = dz.new_zeros((B, H, W, Ci) if needs_dimage else (0,))
        return dimage, weight.new_zeros(weight.shape), dz.sum((0, 1))
    same = (top, left) == (bottom, right)  # else the padding is made, and cut off again
    around = (top, left) if same else (0, 0)
    x = image.to(weight.dtype)
    x = x if same else F.pad(x, (left, right, top, bottom))
    with _deterministic():
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            dz.unflatten(1, (Ho, Wo)).permute(0, 3, 1, 2),
            x,
            weight,
            [Co],
            [stride, stride],
            around,
            [1, 1],
            False,
            [0, 0],
            1,
            [needs_dimage, True, True],
        )
    if not needs_dimage:
        return dz.new_empty(0), dweight.contiguous(), dbias
    dx = dx if same else dx[:, :, top : top + H, left : left + W]
    return dx.permute(0, 2, 3, 1).contiguous(), dweight.contiguous(), dbias
