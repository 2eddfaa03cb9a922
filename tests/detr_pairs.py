"""Small DETRs of ours and of transformers' with the same weights, and what goes into them."""

from __future__ import annotations

import torch
from torch import nn

from hybridops.models import load_weights
from hybridops.models.detr import Detr, Prediction

SMALL = {"num_classes": 11, "num_queries": 12, "dim": 64, "heads": 8, "hidden": 96}


def small(depth=2, **options) -> Detr:
    options = SMALL | {"layers": (2, 2), "drop_rate": 0.0} | options
    return Detr((depth,) * 4, **options).eval()


def awake(model: nn.Module) -> nn.Module:
    """Weights, biases and frozen statistics by which every part counts in the output."""
    generator = torch.Generator().manual_seed(0)

    def uniform(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "running_mean" in name:
                uniform(tensor, -0.2, 0.2)
            elif "running_var" in name:
                uniform(tensor, 0.8, 1.2)
            elif "bn3.weight" in name:
                uniform(tensor, 0.1, 0.3)
            elif name.endswith(".weight") and tensor.ndim == 1:
                uniform(tensor, 0.5, 1.5)
            elif name.endswith("bias"):
                uniform(tensor, -0.3, 0.3)
            elif tensor.ndim == 2 or "input_proj" in name:  # theirs start too faint to matter
                values = torch.randn(tensor.shape, generator=generator)
                size = 1.0 if "query" in name else 1.5 / tensor.shape[1] ** 0.5
                tensor.copy_(values * size)
    return model


def pair(hf, masks=False, dilated=False):
    """A small DETR of ours and of transformers' with the same weights."""
    config = hf.DetrConfig(
        backbone="resnet26",
        num_labels=11,
        num_queries=12,
        d_model=64,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        encoder_layers=2,
        decoder_layers=2,
        dropout=0.0,
        dilation=dilated,
    )
    cls = hf.DetrForSegmentation if masks else hf.DetrForObjectDetection
    theirs = awake(cls(config)).eval()
    ours = small(masks=masks, dilated=dilated)
    assert load_weights(ours, theirs.state_dict()) == "transformers"
    return ours, theirs


def batch(padded: bool):
    """Two images, the second smaller where padded, and the mask."""
    images = torch.randn(2, 3, 96, 160)
    if not padded:
        return images, None
    mask = torch.zeros(2, 96, 160, dtype=torch.bool)
    mask[1, 70:] = mask[1, :, 90:] = True
    return images.masked_fill(mask[:, None], 0.0), mask


def targets(masks=False):
    found = []
    for n in (3, 0):
        centre, size = torch.rand(n, 2) * 0.4 + 0.3, torch.rand(n, 2) * 0.3 + 0.1
        target = {"labels": torch.randint(0, 11, (n,)), "boxes": torch.cat([centre, size], 1)}
        if masks:
            target["masks"] = torch.rand(n, 40 + n, 64 - n) > 0.5
        found.append(target)
    return found


def theirs_of(target):
    return {"class_labels" if k == "labels" else k: v for k, v in target.items()}


def pixel_mask(mask):
    return None if mask is None else (~mask).long()


def random_prediction(masks=False, layers=1):
    def layer():
        boxes = torch.cat([torch.rand(2, 12, 2), torch.rand(2, 12, 2) * 0.5 + 0.01], -1)
        return torch.randn(2, 12, 12, requires_grad=True), boxes.requires_grad_()

    shown = torch.randn(2, 12, 24, 40, requires_grad=True) if masks else None
    *auxiliary, last = (Prediction(*layer()) for _ in range(layers))
    return last._replace(auxiliary=tuple(auxiliary), masks=shown)
