"""optimize() on transformers' DETRs beside DETR itself, with padding masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from check import accurate
from parity import doubled, parity, reasons, run, wake
from torch import nn

from hybridops import explain, optimize, verify

pytest.importorskip("transformers")

from detrs import MODELS, added, batch, build, padding, timms_resnet


@pytest.fixture(autouse=True)
def _importable(timm):
    """timm makes torchvision importable, which transformers imports."""


RULES = {
    "conditional_detr": "EncoderLayer DecoderLayer SelfAttention DecoderCrossAttention MLP",
    "table-transformer": "EncoderLayer DecoderLayer Attention",
    "dab-detr": "EncoderLayer DecoderLayer Attention",
    "deformable_detr": "SelfAttention MLP",
    "rt_detr": "EncoderLayer SelfAttention MLP ConvNormLayer RepVggBlock ResNetBottleNeckLayer",
    "rt_detr_v2": "EncoderLayer SelfAttention MLP ConvNormLayer RepVggBlock",
}


@pytest.mark.parametrize("name", RULES)
def test_parity(name):
    model = build(name)
    found = {layer.rule.partition(":Fast")[2] for layer in explain(model).layers if layer.rule}
    assert found >= set(RULES[name].split())
    if name == "dab-detr":  # theirs does not run in float64, its layers do
        args = batch()
        result = verify(optimize(wake(model, args)), args)
        assert result.ok, result
    else:
        parity(model, *batch(), channels_last=True)


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


PARTS = {  # of models, with what parity() is told of each
    "omdet_turbo attention": {},
    "omdet_turbo layer": {"gradients": False},
    "omdet_turbo convolutions": {"gradients": False, "channels_last": True},
    "d_fine attention": {},
    "d_fine convolutions": {"gradients": False, "channels_last": True},
    "maskformer layer": {},
    "resnet": {"gradients": False, "channels_last": True},
    "rt_detr backbone": {"gradients": False, "channels_last": True},
}


@pytest.mark.parametrize("name", PARTS)
def test_parts(name):
    make, arguments = MODELS[name]
    parity(make(), *arguments(), **PARTS[name])


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
    model = {"DabDetr": "dab_detr", "TableTransformer": "table_transformer"}.get(
        name, name.replace("Detr", "_detr").lower()
    )
    encoder = timms_resnet(model, name).eval()
    found = {layer.rule.partition(":Fast")[2] for layer in explain(encoder).layers if layer.rule}
    assert found >= ({"Bottleneck"} if name == "DabDetr" else {"ConvEncoder", "Bottleneck"})
    x, mask = torch.randn(1, 3, 64, 96), torch.ones(1, 64, 96)
    before = run(encoder, (x, mask))
    optimize(encoder)
    for ours, torchs in zip(run(encoder, (x, mask)), before, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-3 * float(torchs.abs().max()))
