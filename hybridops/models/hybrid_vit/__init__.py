"""Hybrid ViT, every variant that timm has: create_model("vit_base_r50_s16_384").

s16 and s32: pixels between tokens; the last number: the image size of the position embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from .backbones import BiT, BiTStem, MobileClipStem, ResNetD
from .model import HybridVit, resize_positions

__all__ = ["MODELS", "BiT", "BiTStem", "HybridVit", "MobileClipStem", "ResNetD", "resize_positions"]

_TINY = partial(HybridVit, embed_dim=192, num_heads=3)
_SMALL = partial(HybridVit, embed_dim=384, num_heads=6)
_BASE = partial(HybridVit, embed_dim=768, num_heads=12)
_LARGE = partial(HybridVit, embed_dim=1024, num_heads=16, depth=24)
_WIDE_SMALL = partial(HybridVit, embed_dim=768, num_heads=8, depth=8, mlp_ratio=3.0)
_R26 = partial(BiT, (2, 2, 2, 2))
_R26D = partial(ResNetD, (2, 2, 2, 2))
_VARIANTS = {  # name: image sizes, model
    "vit_tiny_r_s16_p8": ((224, 384), partial(_TINY, backbone=BiTStem, patch_size=8)),
    "vit_small_r26_s32": ((224, 384), partial(_SMALL, backbone=_R26)),
    "vit_base_r26_s32": ((224,), partial(_BASE, backbone=_R26)),
    "vit_base_r50_s16": ((224, 384), partial(_BASE, backbone=partial(BiT, (3, 4, 9)))),
    "vit_large_r50_s32": ((224, 384), partial(_LARGE, backbone=partial(BiT, (3, 4, 6, 3)))),
    "vit_small_resnet26d": ((224,), partial(_WIDE_SMALL, backbone=_R26D)),
    "vit_small_resnet50d_s16": (
        (224,),
        partial(_WIDE_SMALL, backbone=partial(ResNetD, (3, 4, 6))),
    ),
    "vit_base_resnet26d": ((224,), partial(_BASE, backbone=_R26D)),
    "vit_base_resnet50d": ((224,), partial(_BASE, backbone=partial(ResNetD, (3, 4, 6, 3)))),
    "vit_base_mci": (
        (224,),
        partial(_BASE, backbone=MobileClipStem, projects=False, class_position=False),
    ),
}
MODELS: dict[str, Callable[..., nn.Module]] = {
    f"{name}_{size}": partial(make, img_size=size)
    for name, (sizes, make) in _VARIANTS.items()
    for size in sizes
}
