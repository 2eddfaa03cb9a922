"""DETR's predictions to one segment per pixel: things apart, and each kind of stuff as one."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Prediction
from .processing import Batch

STUFF = range(91, 201)  # COCO's labels of what cannot be counted: sky, grass, wall ...


class Segments(NamedTuple):
    """Who owns each pixel: map (height, width) int32, 0 for nobody, else i + 1 for the segment of
    label labels[i] and score scores[i]; labels (n,) int64, scores (n,).
    """

    map: Tensor
    labels: Tensor
    scores: Tensor


@torch.no_grad()
def segments(
    prediction: Prediction,
    batch: Batch,
    threshold: float = 0.85,
    mask_threshold: float = 0.5,
    overlap_threshold: float = 0.8,
    stuff: Container[int] = STUFF,
) -> list[Segments]:
    """The panoptic segmentation of each photograph of the batch.

    Queries that see something, with a score above `threshold`, compete: a pixel goes to the highest
    score times mask probability. A query that keeps less than `overlap_threshold` of the pixels
    above `mask_threshold` gets none, and its pixels stay nobody's. Queries of one label in `stuff`
    are one segment, of their best score. Raises ValueError for a model without a mask head.
    """
    if prediction.masks is None:
        raise ValueError("segments: this model has no mask head (detr_*_panoptic have one)")
    scores, labels = prediction.logits.float().softmax(-1).max(-1)
    kept = (labels < prediction.logits.shape[-1] - 1) & (scores > threshold)
    found = []
    for i, (masks, seen) in enumerate(zip(prediction.masks, kept, strict=True)):
        maps = _spread(masks[seen].float().sigmoid(), batch, i)
        limits = mask_threshold, overlap_threshold
        found.append(_merged(maps, scores[i, seen], labels[i, seen], *limits, stuff))
    return found


def _spread(maps, batch, i):
    """Maps (n, H/4, W/4) of a padded image -> (n, height, width) of the photograph."""
    size, (h, w) = tuple(batch.images.shape[-2:]), batch.resized[i]
    if len(maps) == 0:
        return maps.new_zeros((0, *batch.sizes[i]))
    maps = maps[:, None]
    if (h, w) != size:  # what fills up the image is cut off at full size
        maps = F.interpolate(maps, size, mode="bilinear")[..., :h, :w]
    return F.interpolate(maps, batch.sizes[i], mode="bilinear")[:, 0]


def _merged(maps, scores, labels, mask_threshold, overlap_threshold, stuff):
    n = len(maps)
    if n == 0:
        nobody = torch.zeros(maps.shape[1:], dtype=torch.int32, device=maps.device)
        return Segments(nobody, labels, scores)
    maps = maps * scores[:, None, None]
    owner = maps.argmax(0)
    own = torch.bincount(owner.flatten(), minlength=n)
    whole = (maps >= mask_threshold).sum((1, 2))
    valid = (own > 0) & (whole > 0) & (own / whole > overlap_threshold)
    numbers = torch.zeros(n, dtype=torch.int32)
    first: dict[int, int] = {}  # the first query of a kind of stuff
    segment_of: list[int] = []  # the query that names each segment
    for k in valid.nonzero().flatten().tolist():
        label = int(labels[k])
        if label in stuff and label in first:
            numbers[k] = numbers[first[label]]
            continue
        first[label] = k
        segment_of.append(k)
        numbers[k] = len(segment_of)
    numbers = numbers.to(maps.device)
    best = scores.new_zeros(len(segment_of) + 1)
    best.scatter_reduce_(0, numbers.long(), scores, "amax")
    return Segments(numbers[owner], labels[segment_of], best[1:])
