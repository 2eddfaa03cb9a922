"""The models that `hybridops parity` looks into: real ones, cut down so that each takes seconds.

One line per model: its name as for explain() (or torchvision:NAME), the side of its images, and
what its constructor is told. Whatever classes it is made of are measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Small(NamedTuple):
    """name, side of the square images, arguments of the constructor."""

    name: str
    size: int
    options: dict[str, Any] = {}


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
_HYBRID = {"embed_dim": 48, "depth": 1, "num_heads": 3}
_LEVIT = {"embed_dim": (32, 48), "key_dim": 8, "num_heads": (2, 3), "depth": (1, 1)}
_TWINS = {"embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1)}
_DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_queries": 6,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
_RESNET = {"layers": (1, 1, 1, 1)}

MODELS = [
    Small("timm:vit_tiny_patch16_224", 32, _VIT),
    Small("timm:levit_128s", 64, {**_LEVIT, "img_size": 64}),
    Small("timm:levit_384_s8", 64, {**_LEVIT, "img_size": 64}),
    Small("timm:resnet18", 64, _RESNET),
    Small("timm:resnet26", 64, _RESNET),
    Small("timm:resnetv2_50x1_bit", 64),
    Small("timm:vit_small_r26_s32_224", 64, {**_HYBRID, "img_size": 64}),
    Small("timm:vit_small_resnet26d_224", 64, {**_HYBRID, "img_size": 64}),
    Small("timm:vit_base_mci_224", 64, {"depth": 1, "img_size": 64}),
    Small("timm:twins_svt_small", 64, {**_TWINS, "img_size": 64}),
    Small("timm:twins_pcpvt_small", 64, {**_TWINS, "img_size": 64}),
    Small("torchvision:resnet18", 64),
    Small("torchvision:resnet50", 64),
    Small("hf:detr", 64, _DETR),
    Small("hybridops:levit_128s", 64, {**_LEVIT, "img_size": 64}),
    Small("hybridops:cpvt_tiny", 32, {"depth": 2, "patch_size": 8}),
    Small("hybridops:vit_small_r26_s32_224", 64, {"img_size": 64}),
    Small("hybridops:detr_resnet50", 64, {"depths": (1, 1, 1, 1), "dim": 32, "layers": (1, 1)}),
]
