"""The models that `hybridops parity` looks into: real ones, cut down so that each takes seconds.

One line per model: its name as for explain(), the side of its images, and what its constructor is
told. torchvision:NAME is a model or a class of torchvision, torch:NAME a class of torch.nn, nn:NAME
one of hybridops.nn. Whatever classes a model is made of are measured. `of_file` takes more from a
file: the authors' own code is no package.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


class Small(NamedTuple):
    """name, side of the square images, arguments of the constructor, what else is the input.

    inputs: shapes of tensors, or a function that makes the arguments. make: the constructor, where
    the name does not tell it.
    """

    name: str
    size: int = 0
    options: dict[str, Any] = {}
    inputs: tuple[tuple[int, ...], ...] | Callable[[], tuple[Any, ...]] = ()
    make: Callable[..., nn.Module] | None = None

    def arguments(self) -> tuple[Any, ...]:
        if callable(self.inputs):
            return self.inputs()
        return tuple(map(torch.randn, self.inputs or ((2, 3, self.size, self.size),)))


def of_file(path: str | Path) -> list[Small]:
    """The models of a Python file's MODELS, {name: (constructor, function giving its arguments)}.

    The file is run. Raises ValueError for one that holds no such thing, and whatever it raises.
    """
    path = Path(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: not a Python file")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, "MODELS", None)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no MODELS, {{name: (constructor, arguments)}}")
    return [
        Small(f"{path.stem}:{name}", inputs=arguments, make=make)
        for name, (make, arguments) in found.items()
    ]


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
_TORCH = {"d_model": 48, "nhead": 3, "num_encoder_layers": 1, "num_decoder_layers": 1}
_TORCH |= {"dim_feedforward": 96, "batch_first": True}
_BLOCK = {"dim": 48, "num_heads": 3, "qkv_bias": True, "qk_norm": True, "init_values": 0.5}
_RESNET = {"layers": (1, 1, 1, 1)}
_VISION = {"image_size": 32, "patch_size": 8, "hidden_dim": 48, "num_layers": 1}
_VISION |= {"num_heads": 3, "mlp_dim": 96}
_MAXVIT = {"input_size": (64, 64), "stem_channels": 16, "partition_size": 4, "head_dim": 16}
_MAXVIT |= {"block_channels": [32, 48], "block_layers": [1, 1], "stochastic_depth_prob": 0.0}
_BERT = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
_BERT |= {"intermediate_size": 96, "image_size": 32, "patch_size": 8}
_SWIN = {"embed_dim": 24, "depths": [1, 2, 1], "num_heads": [2, 3, 4]}

MODELS = [
    Small("timm:vit_tiny_patch16_224", 32, _VIT),
    Small("timm:levit_128s", 64, {**_LEVIT, "img_size": 64}),
    Small("timm:levit_384_s8", 64, {**_LEVIT, "img_size": 64}),
    Small("timm:resnet18", 64, _RESNET),
    Small("timm:resnet26", 64, _RESNET),
    Small("timm:resnetv2_50x1_bit", 64),
    Small("timm:mobilenetv3_small_050", 64),
    Small("timm:test_efficientnet", 64),
    Small("timm:vit_small_r26_s32_224", 64, {**_HYBRID, "img_size": 64}),
    Small("timm:vit_small_resnet26d_224", 64, {**_HYBRID, "img_size": 64}),
    Small("timm:vit_base_mci_224", 64, {"depth": 1, "img_size": 64}),
    Small("timm:twins_svt_small", 64, {**_TWINS, "img_size": 64}),
    Small("timm:twins_pcpvt_small", 64, {**_TWINS, "img_size": 64}),
    Small("timm:levit_conv_128s", 64, {**_LEVIT, "img_size": 64}),
    Small("timm:swin_tiny_patch4_window7_224", 112, {"img_size": 112, "depths": (1, 2, 1, 1)}),
    Small("timm:swinv2_tiny_window8_256", 128, {"img_size": 128, "depths": (1, 2, 1, 1)}),
    Small("timm:swinv2_cr_tiny_224", 112, {"img_size": 112, "depths": (1, 2, 1, 1)}),
    Small("timm:pvt_v2_b0", 64),
    Small("timm:pvt_v2_b2_li", 64, {"depths": (1, 1, 1, 1)}),
    Small("timm:maxvit_pico_rw_256", 64, {"img_size": 64}),
    Small("timm:maxvit_rmlp_pico_rw_256", 64, {"img_size": 64}),
    Small("timm:coatnet_pico_rw_224", 64, {"img_size": 64}),
    Small("timm:tiny_vit_5m_224", 96),
    Small("timm:davit_tiny", 64, {"depths": (1, 1, 1, 1)}),
    Small("timm:fastvit_sa12", 64),
    Small("timm:efficientformer_l1", 224),
    Small("timm:xcit_nano_12_p16_224", 64, {"img_size": 64, "depth": 1}),
    Small("timm:coat_lite_tiny", 64, {"img_size": 64}),
    Small("timm:cait_xxs24_224", 64, {"img_size": 64, "depth": 1}),
    Small("timm:crossvit_tiny_240", 240),
    Small("timm:beit_base_patch16_224", 64, {"img_size": 64, "depth": 1}),
    Small("timm:eva02_tiny_patch14_224", 56, {"img_size": 56, "depth": 1}),
    Small("timm:vit_pe_core_tiny_patch16_384", 64, {"img_size": 64, "depth": 1}),
    Small("timm:vit_relpos_small_patch16_224", 64, {"img_size": 64, "depth": 1}),
    Small("timm:eva02_base_patch14_448", 56, {**_HYBRID, "img_size": 56}),
    Small("timm:nest_tiny", 64, {"img_size": 64}),
    Small("timm:caformer_s18", 64),
    Small("timm:visformer_tiny", 64, {"img_size": 64}),
    Small("timm:volo_d1_224", 64, {"img_size": 64}),
    Small("timm:gcvit_xxtiny", 128, {"img_size": 128}),
    Small("timm:hiera_tiny_224", 224, {"stages": (1, 1, 1, 1)}),
    Small("torchvision:VisionTransformer", 32, _VISION),
    Small("torchvision:swin_t", 64),
    Small("torchvision:swin_v2_t", 64),
    Small("torchvision:MaxVit", 64, _MAXVIT),
    Small("hf:vit", 32, _BERT),
    Small("hf:deit", 32, _BERT),
    Small("hf:beit", 32, _BERT),
    Small("hf:dinov2", 32, _BERT),
    Small("hf:dinov2_with_registers", 32, _BERT),
    Small("hf:swin", 112, {**_SWIN, "image_size": 112}),
    Small("hf:dpt", 32, {**_BERT, "is_hybrid": False}),
    Small(
        "hf:LevitForImageClassification",
        64,
        {"image_size": 64, "depths": (1, 1, 1)},
        ((8, 3, 64, 64),),
    ),
    Small("hf:cvt", 64),
    Small("hf:pvt", 64, {"image_size": 64}),
    Small("hf:pvt_v2", 64, {"image_size": 64}),
    Small("hf:segformer", 64),
    Small("hf:mobilevit", 64, {"image_size": 64}),
    Small("torchvision:resnet18", 64),
    Small("torchvision:resnet50", 64),
    Small("torchvision:mobilenet_v2", 64),
    Small("hf:detr", 64, _DETR),
    Small("torch:Transformer", options=_TORCH, inputs=((2, 9, 48), (2, 5, 48))),
    Small("nn:Block", options=_BLOCK, inputs=((2, 9, 48),)),
    Small("nn:Linear", options={"in_features": 48, "out_features": 31}, inputs=((2, 9, 48),)),
    Small("hf:conditional_detr", 64, _DETR),
    Small("hf:table-transformer", 64, _DETR),
    Small("hf:resnet", 64),
    Small("hf:bit", 64, {"depths": [1, 2], "hidden_sizes": [128, 256]}),
    Small("hybridops:levit_128s", 64, {**_LEVIT, "img_size": 64}),
    Small("hybridops:cpvt_tiny", 32, {"depth": 2, "patch_size": 8}),
    Small("hybridops:vit_small_r26_s32_224", 64, {"img_size": 64}),
    Small("hybridops:detr_resnet50", 64, {"depths": (1, 1, 1, 1), "dim": 32, "layers": (1, 1)}),
]
