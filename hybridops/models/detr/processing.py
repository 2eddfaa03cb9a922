"""Photographs to a batch for DETR, and its predictions to objects in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss import corners
from .model import Prediction

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
Size = tuple[int, int]  # height, width


class Batch(NamedTuple):
    """images (B, 3, H, W), normalised; padding_mask (B, H, W), True where an image was filled up,
    None where all have one size; sizes: of the photographs; resized: of the images in the batch.
    """

    images: Tensor
    padding_mask: Tensor | None
    sizes: list[Size]
    resized: list[Size]


class Objects(NamedTuple):
    """What an image shows: scores (n,), labels (n,) int64, boxes (n, 4) in pixels (left, top,
    right, bottom), masks (n, height, width) bool of models with a mask head; best first.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    masks: Tensor | None = None


def resized_shape(size: Size, shortest: int = 800, longest: int = 1333) -> Size:
    """(height, width) with the shorter side `shortest`, unless the longer would pass `longest`."""
    small, large = min(size), max(size)
    exact = min(float(shortest), longest * small / large)
    short = max(round(exact), 1)  # of a strip too
    if short == small:
        return size
    long = int((exact if exact < shortest else short) * large / small)
    return (short, long) if size[0] <= size[1] else (long, short)


def preprocess(
    photographs: Sequence[Tensor],
    shortest: int = 800,
    longest: int = 1333,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """RGB photographs, each (3, height, width) uint8, any sizes -> Batch.

    Raises ValueError for shapes, TypeError for dtypes.
    """
    for photograph in photographs:
        if photograph.ndim != 3 or photograph.shape[0] != 3 or 0 in photograph.shape:
            shape = tuple(photograph.shape)
            raise ValueError(f"preprocess: photographs must be (3, height, width), got {shape}")
        if photograph.dtype != torch.uint8:
            raise TypeError(f"preprocess: photographs must be uint8, got {photograph.dtype}")
    if not photographs:
        raise ValueError("preprocess: at least one photograph is needed, got none")
    sizes = [(p.shape[1], p.shape[2]) for p in photographs]
    resized = [resized_shape(size, shortest, longest) for size in sizes]
    H, W = (max(size[axis] for size in resized) for axis in (0, 1))
    images = torch.zeros(len(sizes), 3, H, W, dtype=dtype, device=photographs[0].device)
    mask = torch.ones(len(sizes), H, W, dtype=torch.bool, device=images.device)
    for i, (photograph, (h, w)) in enumerate(zip(photographs, resized, strict=True)):
        images[i, :, :h, :w] = _normalised(photograph, (h, w))
        mask[i, :h, :w] = False
    return Batch(images, mask if mask.any() else None, sizes, resized)


def _normalised(photograph, size):
    pixels = F.interpolate(photograph[None], size, mode="bilinear", antialias=True)[0]
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (MEAN, STD))
    return (pixels / 255 - mean) / std


@torch.no_grad()
def detections(prediction: Prediction, batch: Batch, threshold: float = 0.7) -> list[Objects]:
    """The objects of each photograph of the batch whose score reaches the threshold."""
    found = []
    probability = prediction.logits.float().softmax(-1)[..., :-1]  # without "nothing"
    for i, (height, width) in enumerate(batch.sizes):
        scores, labels = probability[i].max(-1)
        order = scores.argsort(descending=True)
        order = order[scores[order] >= threshold]
        scale = prediction.boxes.new_tensor([width, height, width, height], dtype=torch.float32)
        boxes = corners(prediction.boxes[i, order].float()) * scale
        masks = None
        if prediction.masks is not None:
            masks = _masks(prediction.masks[i, order], batch, i)
        found.append(Objects(scores[order], labels[order], boxes, masks))
    return found


def _masks(logits, batch, i):
    """Mask logits of a padded image -> (n, height, width) bool of the photograph."""
    if len(logits) == 0:
        return logits.new_zeros((0, *batch.sizes[i]), dtype=torch.bool)
    h, w = batch.resized[i]
    size = batch.images.shape[-2:]
    full = F.interpolate(logits[:, None].float(), size, mode="bilinear")[..., :h, :w]
    return F.interpolate(full, batch.sizes[i], mode="bilinear")[:, 0] > 0
