"""Tokens of a grid, images and windows: views where the memory allows it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.grid_steps import Size, from_windows, into_windows


def in_windows(
    layer: Callable[[Tensor], Tensor | None], x: Tensor, size: Size, window: Size
) -> Tensor | None:
    """layer(windows of x), put back. Zeros that fill the last windows join them as tokens.

    None where layer gives None.
    """
    (H, W), (h, w), (B, _, C) = size, window, x.shape
    bottom, right = -H % h, -W % w
    if bottom or right:
        x = F.pad(x.reshape(B, H, W, C), (0, 0, 0, right, 0, bottom)).flatten(1, 2)
    padded = (H + bottom, W + right)
    windows = layer(into_windows(x, padded, window))
    if windows is None:
        return None
    y = from_windows(windows, padded, window)
    return y.unflatten(1, padded)[:, :H, :W].flatten(1, 2) if bottom or right else y


def into_grids(x: Tensor, size: Size, grid: Size) -> Tensor:
    """Like into_windows, of tokens that are H / h rows and W / w columns apart (MaxViT)."""
    B, _, C = x.shape
    (H, W), (h, w) = size, grid
    x = x.reshape(B, h, H // h, w, W // w, C).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, h * w, C)


def from_grids(x: Tensor, size: Size, grid: Size) -> Tensor:
    """The inverse of into_grids."""
    C, (H, W), (h, w) = x.shape[2], size, grid
    x = x.reshape(-1, H // h, W // w, h, w, C).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, H * W, C)


def squares(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H/2, W/2, 4*C), column by column; an odd side is filled with zeros."""
    _, H, W, _ = x.shape
    if H % 2 or W % 2:
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
    B, H, W, C = x.shape
    return x.reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)


def tokens_of(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C): a view, contiguous where the image is channels_last."""
    return image.flatten(2).transpose(1, 2)


def image_of(tokens: Tensor, like: Tensor, size: Size | None = None) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W) in the memory format of `like`, whose size is the default.

    Who calls a layer may view its result in the layout that torch's own would have.
    """
    image = tokens.transpose(1, 2).unflatten(2, like.shape[2:] if size is None else size)
    return image if is_channels_last(like) else image.contiguous()


def is_channels_last(image: Tensor) -> bool:
    return image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
