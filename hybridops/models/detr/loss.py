"""DETR's set loss: every object is matched with one query, and the others must say "nothing".

    cost[query, object] = -p(class) + 5 |box - box'|_1 - 2 giou(box, box')        (weights: Weights)

The cheapest matching (Hungarian method) decides which query answers for which object; the loss is
then cross-entropy over all queries, and L1 and GIoU over the matched boxes, for the last decoder
layer and again for each layer in front of it. Carion et al. 2020, sections 3.1 and A.4.

Boxes are (centre x, centre y, width, height) in fractions of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Prediction

Target = Mapping[str, Tensor]  # labels (n,) int64, boxes (n, 4), masks (n, H, W) where predicted
Matches = list[tuple[Tensor, Tensor]]  # per image: queries, and the objects they answer for


class Weights(NamedTuple):
    """How much each part counts, in the matching and in the loss; nothing: of the empty class."""

    classes: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    nothing: float = 0.1
    mask: float = 1.0
    dice: float = 1.0


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height -> left, top, right, bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU (Rezatofighi et al. 2019) of boxes as corners (..., 4), broadcast -> (...)."""

    def area(top_left, bottom_right):
        return (bottom_right - top_left).clamp(min=0).prod(-1)

    (a0, a1), (b0, b1) = a.split(2, -1), b.split(2, -1)
    inner = area(torch.max(a0, b0), torch.min(a1, b1))
    union = area(a0, a1) + area(b0, b1) - inner
    hull = area(torch.min(a0, b0), torch.max(a1, b1))
    return inner / union - (hull - union) / hull


@torch.no_grad()
def match(prediction: Prediction, targets: Sequence[Target], weights: Weights) -> Matches:
    """The cheapest matching of queries and objects, image by image.

    Raises ImportError, with the command that helps, where scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ImportError("matching needs scipy: pip install scipy", name="scipy") from None
    matches = []
    for logits, boxes, target in zip(prediction.logits, prediction.boxes, targets, strict=True):
        probability = logits.float().softmax(-1)[:, target["labels"]]
        a, b = boxes.float(), target["boxes"].float()
        giou = generalized_iou(corners(a)[:, None], corners(b))
        cost = weights.l1 * torch.cdist(a, b, p=1) - weights.classes * probability
        cost = cost - weights.giou * giou
        worst = torch.finfo(cost.dtype).max  # what is not finite is matched last
        cost = cost.nan_to_num(nan=worst, posinf=worst, neginf=worst)
        pairs = linear_sum_assignment(cost.cpu().numpy())
        queries, objects = (torch.as_tensor(i, device=logits.device) for i in pairs)
        matches.append((queries, objects))
    return matches


def set_loss(
    prediction: Prediction, targets: Sequence[Target], weights: Weights | None = None
) -> dict[str, Tensor]:
    """{"loss": the weighted sum, and its parts: "classes", "l1", "giou", "classes_0", ...}.

    targets: one per image. The suffix counts the auxiliary layers; "mask" and "dice" come with
    predicted masks, of the last layer alone.
    Raises ValueError for targets that do not fit the prediction, TypeError for their dtypes.
    """
    weights = weights or Weights()
    _check(prediction, targets)
    count = _mean_objects(targets, prediction.logits)
    parts: dict[str, Tensor] = {}
    for suffix, layer in (
        ("", prediction),
        *((f"_{i}", layer) for i, layer in enumerate(prediction.auxiliary)),
    ):
        matches = match(layer, targets, weights)
        for name, value in _layer_loss(layer, targets, matches, weights, count).items():
            parts[name + suffix] = value
    total = sum(getattr(weights, name.partition("_")[0]) * part for name, part in parts.items())
    return {"loss": torch.as_tensor(total), **parts}


def _layer_loss(layer, targets, matches, weights, count):
    image, query = _positions(matches)
    labels, boxes = (
        torch.cat([t[key][objects] for t, (_, objects) in zip(targets, matches, strict=True)])
        for key in ("labels", "boxes")
    )
    B, Q, classes = layer.logits.shape
    wanted = labels.new_full((B, Q), classes - 1)  # the last class is "nothing"
    wanted[image, query] = labels
    balance = layer.logits.new_ones(classes)
    balance[-1] = weights.nothing
    found, boxes = layer.boxes[image, query], boxes.to(layer.boxes.dtype)
    parts = {
        "classes": F.cross_entropy(layer.logits.flatten(0, 1), wanted.flatten(), balance),
        "l1": (found - boxes).abs().sum() / count,
        "giou": (1 - generalized_iou(corners(found), corners(boxes))).sum() / count,
    }
    if layer.masks is not None:
        masks = _matched_masks(targets, matches, layer.masks)
        parts |= _mask_loss(layer.masks[image, query], masks, count)
    return parts


def _positions(matches):
    """(image, query) of every matched query of the batch."""
    image = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(matches)])
    return image, torch.cat([queries for queries, _ in matches])


def _matched_masks(targets, matches, like):
    """The objects' masks, smaller images filled up with zeros: (n, H, W)."""
    H, W = (max(t["masks"].shape[axis] for t in targets) for axis in (1, 2))
    return torch.cat(
        [
            F.pad(masks[objects].to(like), (0, W - masks.shape[2], 0, H - masks.shape[1]))
            for masks, (_, objects) in zip((t["masks"] for t in targets), matches, strict=True)
        ]
    )


def _mask_loss(logits, masks, count, alpha=0.25):
    """Focal loss (Lin et al. 2017, gamma 2) and dice loss (Milletari et al. 2016)."""
    logits = F.interpolate(logits[:, None], masks.shape[1:], mode="bilinear")[:, 0].flatten(1)
    masks = masks.flatten(1)
    p = logits.sigmoid()
    wrong = p * (1 - masks) + (1 - p) * masks
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    balance = alpha * masks + (1 - alpha) * (1 - masks)
    overlap = (2 * (p * masks).sum(1) + 1) / (p.sum(1) + masks.sum(1) + 1)
    return {
        "mask": (balance * wrong.square() * entropy).mean(1).sum() / count,
        "dice": (1 - overlap).sum() / count,
    }


def _mean_objects(targets, like):
    """Objects per process, at least 1: the losses' denominator."""
    count = like.new_tensor(sum(len(t["labels"]) for t in targets), dtype=torch.float32)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count /= torch.distributed.get_world_size()
    return count.clamp(min=1)


def _check(prediction, targets):
    B, _, classes = prediction.logits.shape
    if len(targets) != B:
        raise ValueError(f"set_loss: {B} images need {B} targets, got {len(targets)}")
    for i, target in enumerate(targets):
        for key in ["labels", "boxes", "masks"][: 2 if prediction.masks is None else 3]:
            if key not in target:
                raise ValueError(f"set_loss: the target of image {i} has no {key}")
        _check_labels(i, target["labels"], classes)
        n = len(target["labels"])
        _check_boxes(i, target["boxes"], n)
        shape = tuple(target["masks"].shape) if prediction.masks is not None else (n, 1, 1)
        if len(shape) != 3 or shape[0] != n:
            raise ValueError(f"set_loss: masks of image {i} must be ({n}, H, W), got {shape}")


def _check_labels(i, labels, classes):
    if labels.dtype != torch.int64:
        raise TypeError(f"set_loss: labels of image {i} must be int64, got {labels.dtype}")
    if labels.ndim != 1:
        shape = tuple(labels.shape)
        raise ValueError(f"set_loss: labels of image {i} must be (n,), got {shape}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes - 1:
        raise ValueError(
            f"set_loss: labels of image {i} must be in 0 ... {classes - 2}, got {labels.tolist()}"
        )


def _check_boxes(i, boxes, n):
    if tuple(boxes.shape) != (n, 4):
        shape = tuple(boxes.shape)
        raise ValueError(f"set_loss: boxes of image {i} must be ({n}, 4), got {shape}")
    if not boxes.is_floating_point():
        raise TypeError(f"set_loss: boxes of image {i} must be floating-point, got {boxes.dtype}")
    # 2: a crop may cut an object off, but no fraction is as large as a pixel's number
    wrong = ~boxes.isfinite().all(1) | (boxes[:, 2:] < 0).any(1) | (boxes > 2).any(1)
    if wrong.any():
        raise ValueError(
            f"set_loss: boxes of image {i} must be finite (centre x, centre y, width, height), in "
            f"fractions of the image, got {boxes[wrong][0].tolist()}"
        )
