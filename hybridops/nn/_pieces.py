"""A convolutional body in inference, some images of a batch at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import backend

# The largest array of a body at a time: below 32 MB glibc keeps memory that it was given back, and
# what one layer writes is still in L3 when the next one reads it.
_LARGEST = 1 << 24


def in_pieces(body: Callable[[Tensor], Tensor], x: Tensor, alone: Callable[[], bool]) -> Tensor:
    """body(x) for images x (B, C, H, W), or the same of equal parts of the batch, concatenated.

    body: a ResNet's stem and stages, whose largest array has 16 numbers for each of an image's
    pixels. alone(): whether each image's result is its own, and nobody sees how many come at a
    time; asked for where that would matter. vit_small_r26_s32_224, 16 images: 1.2 times as fast,
    and not one of 150,000 page faults.
    """
    if torch.is_grad_enabled() or backend.is_captured() or backend.reference_forced():
        return body(x)
    if x.ndim != 4 or not x.is_cpu or not x.numel():
        return body(x)
    B, _, H, W = x.shape
    at_once = max(_LARGEST // (16 * H * W * x.element_size()), 1)
    pieces = -(-B // at_once)
    if pieces == 1 or not alone():
        return body(x)
    return torch.cat([body(piece) for piece in x.tensor_split(pieces)])
