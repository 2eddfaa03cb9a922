"""Small models for the tests of composability: ours, and one of timm's after optimize()."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

import hybridops
from hybridops.compat import import_timm
from hybridops.models import Cpvt, Detr, Levit
from hybridops.optimize.gates import make_live

with suppress(ImportError):  # also in a worker that is about to unpickle a model of timm's
    import_timm()


def cpvt(mode="inference") -> nn.Module:
    # two blocks: behind the last one a PEG moves no class token, and so no output
    return Cpvt(48, 3, 2, num_classes=5, patch_size=8)


def levit(mode="inference") -> nn.Module:
    shape = {"embed_dim": (32, 48), "key_dim": 8, "num_heads": (2, 3), "depth": (1, 1)}
    return Levit(img_size=64, num_classes=5, **shape)


def vit(mode="inference") -> nn.Module:
    """timm's ViT, optimized."""
    shape = {"embed_dim": 48, "depth": 1, "num_heads": 3, "patch_size": 8, "img_size": 32}
    net = import_timm().create_model("vit_tiny_patch16_224", num_classes=5, **shape)
    return hybridops.optimize(net.eval(), mode)


def detr(mode="inference") -> nn.Module:
    shape = {"num_queries": 5, "dim": 32, "heads": 4, "hidden": 48, "layers": (1, 1)}
    return Detr((1, 1, 1, 1), num_classes=3, drop_rate=0.0, **shape)


MODELS = {"cpvt": cpvt, "levit": levit, "vit": vit, "detr": detr}


class Built(NamedTuple):
    model: nn.Module
    images: Tensor

    def __call__(self, images: Tensor | None = None) -> Tensor:
        return first(self.model(self.images if images is None else images))


def build(name: str, mode: str = "inference") -> Built:
    """The model in eval mode with live weights, always the same, and images that it takes."""
    torch.manual_seed(0)
    model = MODELS[name](mode).eval()
    images = torch.randn(2, 3, *((32, 32) if name == "vit" else (64, 64)))
    if mode == "inference":
        with torch.no_grad():
            make_live(model, images)
    return Built(model, images)


def first(results) -> Tensor:
    while isinstance(results, (tuple, list)):
        results = results[0]
    return results
