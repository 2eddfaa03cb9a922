"""optimize() on transformers' DETRs beside DETR itself, with padding masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from check import accurate
from parity import doubled, parity, reasons, run, wake
from torch import nn

from hybridops import explain, optimize

transformers = pytest.importorskip("transformers")
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


def backbone(kind="resnet", **options) -> Any:
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


@pytest.fixture(autouse=True)
def _importable(timm):
    """timm makes torchvision importable, which transformers imports."""


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images, the second of 3/4 the height and half the width."""
    mask = torch.ones(2, 128, 160)
    mask[1, 96:], mask[1, :, 80:] = 0, 0
    return torch.randn(2, 3, 128, 160), mask


MODELS = {
    "conditional_detr": "EncoderLayer DecoderLayer SelfAttention DecoderCrossAttention MLP",
    "table-transformer": "EncoderLayer DecoderLayer Attention",
    "dab-detr": "EncoderLayer DecoderLayer Attention",
    "deformable_detr": "SelfAttention MLP",
    "rt_detr": "EncoderLayer SelfAttention MLP ConvNormLayer RepVggBlock ResNetBottleNeckLayer",
    "rt_detr_v2": "EncoderLayer SelfAttention MLP ConvNormLayer RepVggBlock",
}


@pytest.mark.parametrize("name", MODELS)
def test_parity(name):
    """Each layer's verify() is below: here the decoders' first tokens are zeros."""
    model = build(name)
    found = {layer.rule.partition(":Fast")[2] for layer in explain(model).layers if layer.rule}
    assert found >= set(MODELS[name].split())
    if name == "dab-detr":  # theirs does not run in float64
        return
    parity(model, *batch(), channels_last=True, check=name.startswith("rt"))


@pytest.mark.parametrize("name", ["conditional_detr", "table-transformer", "rt_detr"])
def test_bfloat16(name):
    model, args = build(name), batch()
    wake(model, args)
    model, args = model.bfloat16(), (args[0].bfloat16(), args[1])
    exact, torchs = run(copy.deepcopy(model).double(), doubled(args)), run(model, args)
    ours = run(optimize(model), args)
    accurate(ours[0], torchs[0], exact[0], "bf16")


@pytest.mark.parametrize("name", ["conditional_detr", "table-transformer", "dab-detr"])
def test_the_padding_is_not_attended_to(name):
    model, (images, mask) = build(name), batch()
    optimize(wake(model, (images, mask)))
    lost = run(model, (images, torch.ones_like(mask)))[0]
    kept = run(model, (images, mask))[0]
    assert (lost[1] - kept[1]).abs().max() > 1e-3
    torch.testing.assert_close(lost[0], kept[0], rtol=1e-4, atol=1e-5)


def padding(B: int, N: int, M: int) -> torch.Tensor:
    """transformers' mask of keys, True where it looks: of the last image only three quarters."""
    keys = torch.ones(B, M, dtype=torch.bool)
    keys[-1, 3 * M // 4 :] = False
    return keys[:, None, None].expand(B, 1, N, M)


def added(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("as_floats", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
def test_conditional_decoder_layer(is_first, as_floats):
    layer = build("conditional_detr").decoder.layers[0]
    x, positions, sine = torch.randn(3, 2, 7, 32)
    memory, places = torch.randn(2, 2, 11, 32)
    mask = added(padding(2, 7, 11)) if as_floats else padding(2, 7, 11)
    args = x, None, places, positions, sine, memory, mask, is_first
    parity(layer, *args, check=is_first)  # later ones do not use q_pos_proj


def table(decodes: bool) -> tuple[nn.Module, list[Any]]:
    model = build("table-transformer")
    x, positions = torch.randn(2, 2, 7, 32)
    if not decodes:
        return model.encoder.layers[0], [x, added(padding(2, 7, 7)), positions]
    memory, places = torch.randn(2, 2, 11, 32)
    masks = added(padding(2, 7, 7)), added(padding(2, 7, 11))
    return model.decoder.layers[0], [x, masks[0], places, positions, memory, masks[1]]


@pytest.mark.parametrize("decodes", [False, True], ids=["encoder", "decoder"])
def test_table_transformer_layers(decodes):
    layer, args = table(decodes)
    parity(layer, *args)


def test_table_transformer_masks_of_bools_are_theirs():
    """True is where not to look, in this class alone."""
    layer, (x, mask, positions) = table(False)
    wake(layer, (x, mask, positions))
    expected = run(layer, (x, mask < 0, positions))
    assert torch.equal(run(optimize(layer), (x, mask < 0, positions))[0], expected[0])
    torch.testing.assert_close(run(layer, (x, mask, positions))[0], expected[0])


@pytest.mark.parametrize("activation", ["prelu", "relu"])
def test_dab_layers(activation):
    model = build("dab-detr", activation_function=activation)
    x, positions, sine = torch.randn(3, 2, 7, 32)
    memory, places = torch.randn(2, 2, 11, 32)
    parity(model.encoder.layers[0], x, added(padding(2, 7, 7)), positions)
    args = x, None, places, positions, sine, memory, added(padding(2, 7, 11))
    for layer in model.decoder.layers:
        parity(layer, *args, gradients=False)


@pytest.mark.parametrize("place", [0, 1])
def test_dab_layers_in_bfloat16(place):
    model = build("dab-detr")
    x, positions, sine = torch.randn(3, 2, 7, 32)
    memory, places = torch.randn(2, 2, 11, 32)
    layer = model.decoder.layers[place]
    args: tuple[Any, ...] = (x, None, places, positions, sine, memory, added(padding(2, 7, 11)))
    wake(layer, args)
    layer = layer.bfloat16()
    args = tuple(None if t is None else t.bfloat16() for t in args)
    exact, torchs = run(copy.deepcopy(layer).double(), doubled(args)), run(layer, args)
    accurate(run(optimize(layer), args)[0], torchs[0], exact[0], "bf16")


def omdet(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers.models.omdet_turbo import modeling_omdet_turbo as theirs

    config = transformers.OmDetTurboConfig(encoder_hidden_dim=32, num_attention_heads=4)
    config.encoder_dim_feedforward = 48
    x, y = torch.randn(2, 2, 9, 32)
    if name == "attention":
        layer = theirs.OmDetTurboMultiheadAttention(config, 32, 4, 0.0)
        return layer, (x, y, x + y, added(padding(2, 9, 9)))
    if name == "layer":
        return theirs.OmDetTurboEncoderLayer(config), (x, added(padding(2, 9, 9)), y)
    return theirs.OmDetTurboRepVggBlock(config), (torch.randn(2, 32, 9, 7),)


@pytest.mark.parametrize("name", ["attention", "layer", "convolutions"])
def test_omdet(name):
    layer, args = omdet(name)
    parity(layer, *args, gradients=name == "attention", channels_last=name == "convolutions")


def test_d_fine():
    from transformers.models.d_fine import modeling_d_fine as theirs

    config = transformers.DFineConfig(attn_implementation="sdpa")
    block = theirs.DFineRepVggBlock(config, 20, 20)
    parity(block, torch.randn(2, 20, 9, 7), gradients=False, channels_last=True)
    x, positions = torch.randn(2, 2, 9, 32)
    parity(theirs.DFineSelfAttention(config, 32, 4), x, padding(2, 9, 9), positions)


def test_maskformer_decoder_layer():
    from transformers.models.maskformer import modeling_maskformer as theirs

    options = SIZES | {"backbone_config": backbone(out_features=["stage4"])}
    config = transformers.DetrConfig(**options, attn_implementation="sdpa")
    layer = theirs.MaskFormerDetrDecoderLayer(config)
    x, positions = torch.randn(2, 2, 7, 32)
    memory, places = torch.randn(2, 2, 11, 32)
    parity(layer, x, None, places, positions, memory, padding(2, 7, 11))


def test_resnet():
    config = transformers.ResNetConfig(**RESNET, layer_type="basic")
    parity(transformers.ResNetModel(config), batch()[0], gradients=False, channels_last=True)


def test_what_no_kernel_serves_says_why():
    model = build("deformable_detr")
    found = reasons(optimize(model))
    assert "deformable attention" in str(found["encoder.layers.0.self_attn"])
    layer = build("rt_detr", normalize_before=True).encoder.aifi[0].layers[0]
    assert "normalize_before" in str(reasons(optimize(layer))[""])


@pytest.mark.parametrize(
    "name", ["ConditionalDetr", "TableTransformer", "DeformableDetr", "DabDetr"]
)
def test_timms_resnet_as_backbone(name):
    import importlib

    model = {"DabDetr": "dab_detr", "TableTransformer": "table_transformer"}.get(
        name, name.replace("Detr", "_detr").lower()
    )
    theirs = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    config = getattr(transformers, f"{name}Config")(backbone="resnet26")
    encoder = getattr(theirs, f"{name}ConvEncoder")(config).eval()
    found = {layer.rule.partition(":Fast")[2] for layer in explain(encoder).layers if layer.rule}
    assert found >= ({"Bottleneck"} if name == "DabDetr" else {"ConvEncoder", "Bottleneck"})
    x, mask = torch.randn(1, 3, 64, 96), torch.ones(1, 64, 96)
    before = run(encoder, (x, mask))
    optimize(encoder)
    for ours, torchs in zip(run(encoder, (x, mask)), before, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-3 * float(torchs.abs().max()))
