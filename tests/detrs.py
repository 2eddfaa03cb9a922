"""transformers' DETRs beside DETR itself, small: whole, or the parts that rules name, alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from hybridops.compat import import_timm

with suppress(ImportError):
    import_timm()  # makes torchvision importable, which transformers imports
import transformers

SIZES = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SIZES |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 2}
SIZES |= {"num_queries": 7, "dropout": 0.0, "num_labels": 5}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
RT = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [24, 32, 40],
    "encoder_attention_heads": 4,
    "num_attention_heads": 4,
    "decoder_in_channels": [32, 32, 32],
    "decoder_n_points": 2,
    "num_denoising": 0,
    "eval_size": None,
    "hidden_expansion": 0.5,
}


def theirs(model: str) -> Any:
    """transformers' module of that name."""
    return import_module(f"transformers.models.{model}.modeling_{model}")


def backbone(kind: str = "resnet", **options: Any) -> Any:
    last = {"out_features": ["stage2", "stage3", "stage4"]} if kind != "resnet" else {}
    kinds = {"resnet": "ResNetConfig", "rt": "RTDetrResNetConfig"}
    return getattr(transformers, kinds[kind])(**RESNET | last | options)


def build(name: str, **kwargs: Any) -> nn.Module:
    options: dict[str, Any] = SIZES | kwargs
    last = {"backbone_config": backbone(out_features=["stage4"])}
    if name == "dab-detr":
        options |= last | {"hidden_size": options.pop("d_model")}
    elif name.startswith("rt_detr"):
        options |= RT | {"backbone_config": backbone("rt")}
    elif name == "deformable_detr":
        options |= {"backbone_config": backbone(out_features=["stage2", "stage3", "stage4"])}
        options |= {"num_feature_levels": 3, "encoder_n_points": 2, "decoder_n_points": 2}
    else:
        options |= last
    config = transformers.AutoConfig.for_model(name, **options)
    return transformers.AutoModel.from_config(config)


def batch() -> tuple[Tensor, Tensor]:
    """Two images, the second of 3/4 the height and half the width."""
    mask = torch.ones(2, 128, 160)
    mask[1, 96:], mask[1, :, 80:] = 0, 0
    return torch.randn(2, 3, 128, 160), mask


def padding(B: int, N: int, M: int) -> Tensor:
    """transformers' mask of keys, True where it looks: of the last image only three quarters."""
    keys = torch.ones(B, M, dtype=torch.bool)
    keys[-1, 3 * M // 4 :] = False
    return keys[:, None, None].expand(B, 1, N, M)


def added(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def timms_resnet(model: str, prefix: str) -> nn.Module:
    """timm's ResNet as that model wraps it; takes images and a mask."""
    config = getattr(transformers, f"{prefix}Config")(backbone="resnet26")
    return getattr(theirs(model), f"{prefix}ConvEncoder")(config)


def resnet() -> nn.Module:
    return transformers.ResNetModel(transformers.ResNetConfig(**RESNET, layer_type="basic"))


def rt_basic() -> nn.Module:
    """Of two 3 x 3 convolutions a block. Its first stage must not widen: theirs would halve it."""
    config = backbone("rt", layer_type="basic", hidden_sizes=[8, 24, 32, 40])
    return transformers.AutoBackbone.from_config(config)


def omdet(name: str) -> nn.Module:
    config = transformers.OmDetTurboConfig(encoder_hidden_dim=32, num_attention_heads=4)
    config.encoder_dim_feedforward = 48
    module = theirs("omdet_turbo")
    if name == "attention":
        return module.OmDetTurboMultiheadAttention(config, 32, 4, 0.0)
    if name == "layer":
        return module.OmDetTurboEncoderLayer(config)
    return module.OmDetTurboRepVggBlock(config)


def omdet_inputs(name: str) -> tuple[Any, ...]:
    x, y = torch.randn(2, 2, 9, 32)
    if name == "attention":
        return x, y, x + y, added(padding(2, 9, 9))
    if name == "layer":
        return x, added(padding(2, 9, 9)), y
    return (torch.randn(2, 32, 9, 7),)


def d_fine(name: str) -> nn.Module:
    config = transformers.DFineConfig(attn_implementation="sdpa")
    if name == "attention":
        return theirs("d_fine").DFineSelfAttention(config, 32, 4)
    return theirs("d_fine").DFineRepVggBlock(config, 20, 20)


def d_fine_inputs(name: str) -> tuple[Any, ...]:
    if name == "attention":
        x, positions = torch.randn(2, 2, 9, 32)
        return x, padding(2, 9, 9), positions
    return (torch.randn(2, 20, 9, 7),)


def maskformer() -> nn.Module:
    options = SIZES | {"backbone_config": backbone(out_features=["stage4"])}
    config = transformers.DetrConfig(**options, attn_implementation="sdpa")
    return theirs("maskformer").MaskFormerDetrDecoderLayer(config)


def maskformer_inputs() -> tuple[Any, ...]:
    x, positions = torch.randn(2, 2, 7, 32)
    memory, places = torch.randn(2, 2, 11, 32)
    return x, None, places, positions, memory, padding(2, 7, 11)


def images() -> tuple[Tensor]:
    return (batch()[0],)


WHOLE = ("conditional_detr", "table-transformer", "dab-detr", "deformable_detr")
WHOLE += ("rt_detr", "rt_detr_v2")
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    **{name: (partial(build, name), batch) for name in WHOLE},
    **{
        f"omdet_turbo {name}": (partial(omdet, name), partial(omdet_inputs, name))
        for name in ("attention", "layer", "convolutions")
    },
    **{
        f"d_fine {name}": (partial(d_fine, name), partial(d_fine_inputs, name))
        for name in ("attention", "convolutions")
    },
    "maskformer layer": (maskformer, maskformer_inputs),
    "deformable_detr backbone": (partial(timms_resnet, "deformable_detr", "DeformableDetr"), batch),
    "resnet": (resnet, images),
    "rt_detr backbone": (rt_basic, images),
}
