"""DETR, from photographs to objects: the model, its processing, its training loss.

model = create_model("detr_resnet50", pretrained=True).eval()
batch = detr.preprocess(photographs)                      # (3, height, width) uint8, any sizes
objects = detr.detections(model(batch.images, batch.padding_mask), batch)
segments = detr.segments(panoptic(batch.images, batch.padding_mask), batch)  # detr_*_panoptic
loss = detr.set_loss(model.train()(images, padding_mask), targets)["loss"]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .labels import COCO
from .loss import Weights, match, set_loss
from .model import Detr, Prediction
from .panoptic import STUFF, Segments, segments
from .processing import Batch, Objects, detections, preprocess

__all__ = [
    "COCO",
    "MODELS",
    "PRETRAINED",
    "STUFF",
    "Batch",
    "Detr",
    "Objects",
    "Prediction",
    "Segments",
    "Weights",
    "detections",
    "match",
    "preprocess",
    "segments",
    "set_loss",
]

_R101: dict[str, Any] = {"depths": (3, 4, 23, 3)}
_PANOPTIC: dict[str, Any] = {"num_classes": 250, "masks": True}
MODELS: dict[str, Callable[..., nn.Module]] = {
    "detr_resnet50": Detr,
    "detr_resnet50_dc5": partial(Detr, dilated=True),
    "detr_resnet101": partial(Detr, **_R101),
    "detr_resnet101_dc5": partial(Detr, **_R101, dilated=True),
    "detr_resnet50_panoptic": partial(Detr, **_PANOPTIC),
    "detr_resnet50_dc5_panoptic": partial(Detr, **_PANOPTIC, dilated=True),
    "detr_resnet101_panoptic": partial(Detr, **_R101, **_PANOPTIC),
}
_OFFICIAL = "https://dl.fbaipublicfiles.com/detr/detr-{}.pth"
PRETRAINED = {
    "detr_resnet50": _OFFICIAL.format("r50-e632da11"),
    "detr_resnet50_dc5": _OFFICIAL.format("r50-dc5-f0fb7ef5"),
    "detr_resnet101": _OFFICIAL.format("r101-2c7b67e5"),
    "detr_resnet101_dc5": _OFFICIAL.format("r101-dc5-a2e86def"),
    "detr_resnet50_panoptic": _OFFICIAL.format("r50-panoptic-00ce5173"),
    "detr_resnet50_dc5_panoptic": _OFFICIAL.format("r50-dc5-panoptic-da08f1b1"),
    "detr_resnet101_panoptic": _OFFICIAL.format("r101-panoptic-40021d53"),
}
