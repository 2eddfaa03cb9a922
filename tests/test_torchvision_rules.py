"""optimize() on torchvision's vision transformers: ViT, Swin 1 and 2, MaxViT."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from check import accurate
from parity import doubled, parity, reasons, run, wake
from torch import nn

from hybridops import explain, optimize


@pytest.fixture
def models(timm):  # importing timm makes torchvision importable
    return pytest.importorskip("torchvision").models


def vit(models, **kwargs):
    options = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3}
    options |= {"hidden_dim": 48, "mlp_dim": 70, "num_classes": 7}
    return models.VisionTransformer(**options | kwargs)


def conv_stem(models):
    from torchvision.models.vision_transformer import ConvStemConfig

    layers = [ConvStemConfig(8, 3, 2), ConvStemConfig(12, 3, 2), ConvStemConfig(16, 3, 2)]
    return vit(models, conv_stem_configs=layers)


def swin(models, version=1, shape=(4, 4), **kwargs):
    from torchvision.models import swin_transformer as swins

    options = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    options |= {"window_size": list(shape), "num_classes": 7, "stochastic_depth_prob": 0.0}
    if version == 2:
        options["block"] = swins.SwinTransformerBlockV2
        options["downsample_layer"] = swins.PatchMergingV2
    return swins.SwinTransformer(**options | kwargs)


def maxvit(models, **kwargs):
    options = {"input_size": (48, 48), "stem_channels": 8, "partition_size": 3}
    options |= {"block_channels": [16, 32], "block_layers": [1, 1], "head_dim": 8}
    options |= {"stochastic_depth_prob": 0.0, "num_classes": 7}
    return models.MaxVit(**options | kwargs)


def test_vit(models):
    parity(vit(models), torch.randn(2, 3, 32, 32))


def test_vit_with_a_stem_of_convolutions(models):
    parity(conv_stem(models), torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("size", "shape"),
    [((32, 32), (4, 4)), ((36, 26), (4, 3)), ((8, 30), (4, 4))],
    ids=["whole windows", "padded", "one row of windows"],
)
def test_swin(models, version, size, shape):
    parity(swin(models, version, shape), torch.randn(2, 3, *size), check=size == (36, 26))


def test_maxvit(models):
    parity(maxvit(models), torch.randn(2, 3, 48, 48))


HOT = {  # what is left alone in inference
    vit: {"heads.head"},
    partial(swin, version=1): {"features.0.0", "head"},
    partial(swin, version=2): {"features.0.0", "head"},
}


@pytest.mark.parametrize("build", HOT, ids=["vit", "swin", "swin 2"])
def test_what_explain_says(models, build):
    found = {layer.fqn: layer.reason for layer in explain(build(models)).layers}
    left = {fqn for fqn, reason in found.items() if reason}
    blocks = {fqn for fqn in left if "SwinTransformerBlock" in found[fqn]}
    assert left - blocks == HOT[build]
    assert all(found[fqn].startswith("by itself") for fqn in HOT[build])


def test_what_explain_says_of_maxvit(models):
    found = {layer.fqn: layer.reason for layer in explain(maxvit(models)).layers}
    assert found["blocks.0.layers.0.layers.window_attention"] is None
    assert found["blocks.0.layers.0.layers.grid_attention.attn_layer.1"] is None
    assert not any("attention" in fqn for fqn, reason in found.items() if reason)


def test_reasons(models):
    model = vit(models, dropout=0.1, attention_dropout=0.1)
    model.encoder.layers[1].mlp[1] = nn.Tanh()
    model.encoder.layers[0].ln_1 = nn.Identity()
    found = reasons(optimize(model))
    assert "ln_1 is Identity" in found["encoder.layers.encoder_layer_0"]
    assert "Tanh, which no kernel applies" in found["encoder.layers.encoder_layer_1.mlp"]
    other = swin(models, attention_dropout=0.1)
    found = reasons(optimize(other, mode="train"))
    assert found["features.1.0.attn"] == "attention dropout 0.1 in training"


def test_dropout_while_training_is_drawn_as_before(models):
    model = swin(models, dropout=0.3)  # in ViT torch's attention gives memory of another order
    x = torch.randn(2, 3, 32, 32)
    wake(model, (x,)).train()
    outputs = []
    for options in (None, {"mode": "train"}):
        if options:
            optimize(model, **options)
        torch.manual_seed(3)
        outputs.append(model(x))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [vit, swin, partial(swin, version=2), maxvit])
def test_bfloat16(models, build):
    model = build(models)
    x = torch.randn(1, 3, *((48, 48) if build is maxvit else (32, 32)))
    wake(model, (x,))
    model, x = model.bfloat16(), x.bfloat16()
    exact, torchs = run(copy.deepcopy(model).double(), doubled((x,))), run(model, (x,))
    accurate(run(optimize(model), (x,))[0], torchs[0], exact[0], "bf16")


def test_a_head_of_cosine_attention_keeps_its_largest_scale(models):
    """torchvision clamps the logarithm of the scale to that of 100."""
    model = swin(models, version=2)
    x = torch.randn(1, 3, 32, 32)
    wake(model, (x,))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                parameter.fill_(math.log(400.0))
    exact, torchs = run(copy.deepcopy(model).double(), doubled((x,))), run(model, (x,))
    accurate(run(optimize(model), (x,))[0], torchs[0], exact[0], "clamped")


def test_images_of_another_size_are_refused_as_before(models):
    model = optimize(vit(models).eval())
    with pytest.raises(AssertionError, match="Wrong image height"):
        model(torch.randn(1, 3, 40, 32))


def test_changed_weights_and_sizes_are_followed(models):
    model = optimize(swin(models, 2).eval())
    plain = swin(models, 2).eval()
    with torch.no_grad():
        for _ in range(2):
            for p in plain.parameters():
                p.mul_(0.9)
            model.load_state_dict(plain.state_dict())
            for size in ((32, 32), (24, 36), (32, 40), (24, 36)):
                x = torch.randn(2, 3, *size)
                torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
