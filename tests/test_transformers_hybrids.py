"""optimize() on transformers' PVT, PVTv2, Segformer, MobileViT, CvT and Swin."""

from __future__ import annotations

import copy

import pytest
import torch
from check import accurate
from parity import doubled, leaves, parity, reasons, run, wake

from hybridops import NothingToOptimize, explain, optimize

transformers = pytest.importorskip("transformers")
STAGES = {"depths": [1, 2], "num_encoder_blocks": 2, "hidden_sizes": [16, 24]}
STAGES |= {"mlp_ratios": [2, 2], "num_attention_heads": [2, 3], "hidden_dropout_prob": 0.0}
STAGES |= {"attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0, "patch_sizes": [4, 2]}
V2 = STAGES | {"patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1]}
OPTIONS = {
    "pvt": STAGES | {"image_size": 32, "strides": [4, 2], "sequence_reduction_ratios": [4, 1]},
    "pvt_v2": V2 | {"out_indices": None, "out_features": None},
    "segformer": V2,
    "mobilevit": {
        "hidden_sizes": [24, 32, 36],
        "neck_hidden_sizes": [8, 16, 16, 24, 32, 36, 40],
        "num_attention_heads": 2,
        "image_size": 64,
        "expand_ratio": 2.0,
        "hidden_dropout_prob": 0.0,
    },
}
OPTIONS["cvt"] = {
    "embed_dim": [16, 24, 32],
    "num_heads": [1, 2, 4],
    "depth": [1, 2, 3],  # theirs reads the rates by stage
    "drop_rate": [0.0, 0.0, 0.0],
    "drop_path_rate": [0.0, 0.0, 0.0],
    "mlp_ratio": [2.0, 2.0, 2.0],
}
OPTIONS["swin"] = {
    "embed_dim": 18,
    "depths": [2, 1],
    "num_heads": [2, 3],
    "window_size": 4,
    "patch_size": 4,
    "mlp_ratio": 2.0,
    "hidden_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
}  # 44 x 36 makes 11 x 9 tokens: padded windows, odd sides
SIZES = {"pvt": (32, 32), "mobilevit": (64, 64)}


@pytest.fixture(autouse=True)
def _importable(timm):
    """timm makes torchvision importable, which transformers imports."""


def build(name, **kwargs):
    config = transformers.AutoConfig.for_model(name, **OPTIONS[name] | kwargs)
    return transformers.AutoModel.from_config(config)


def image(name, n=2):
    return torch.randn(n, 3, *SIZES.get(name, (44, 36)))


@pytest.mark.parametrize("name", OPTIONS)
def test_parity(name):
    # Of 2 x 40 x 2 x 2 outputs the largest errors of two libraries that are as right as each other
    # (1.2e-5 on the average of 24 seeds) differ by more than twice now and then.
    images = image(name, 8 if name == "mobilevit" else 2)
    parity(build(name), images, channels_last=name == "mobilevit")


@pytest.mark.parametrize("name", OPTIONS)
def test_every_hot_layer_is_served(name):
    left = {layer.fqn: layer.reason for layer in explain(build(name)).layers if layer.reason}
    if name == "cvt":  # the convolutions of its projections are in their attention's rule
        assert all(reason.startswith("by itself") for reason in left.values())
        assert all("projection.convolution" in fqn for fqn in left)
        return
    assert set(left) == ({"embeddings.patch_embeddings.projection"} if name == "swin" else set())


@pytest.mark.parametrize("name", OPTIONS)
def test_bfloat16(name):
    model, x = build(name), image(name)
    wake(model, (x,))
    model, x = model.bfloat16(), x.bfloat16()
    exact, torchs = run(copy.deepcopy(model).double(), doubled((x,))), run(model, (x,))
    accurate(run(optimize(model), (x,))[0], torchs[0], exact[0], "bf16")


@pytest.mark.parametrize("name", ["pvt", "pvt_v2", "segformer"])
def test_weights_that_are_asked_for_come_from_the_original(name):
    model, x = build(name, attn_implementation="eager"), image(name)
    wake(model, (x,))
    with torch.no_grad():
        expected = model(x, output_attentions=True).attentions
        got = optimize(model)(x, output_attentions=True).attentions
    got, expected = leaves(got), leaves(expected)
    assert len(got) == len(expected) == 3
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pvt", "pvt_v2", "segformer"])
def test_dropout_in_training_is_left_alone_with_a_reason(name):
    model = build(name, attention_probs_dropout_prob=0.1)
    found = {r for r in reasons(optimize(model, mode="train")).values() if r}
    assert "attention dropout 0.1 in training" in found


def test_linear_attention_is_named():
    found = reasons(optimize(build("pvt_v2", linear_attention=True)))
    assert any("linear_attention: keys and values are pooled" in str(r) for r in found.values())


def test_mobilevit_2_is_named():
    config = transformers.MobileViTV2Config(image_size=64, width_multiplier=0.25)
    with pytest.raises(NothingToOptimize, match="linear attention: one softmax"):
        optimize(transformers.MobileViTV2Model(config))


@pytest.mark.parametrize("padding", [None, "SAME"])
def test_bit(padding):
    """Odd sides: SAME pads more behind than in front."""
    config = transformers.BitConfig(
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[1, 2],
        num_groups=4,
        global_padding=padding,
    )
    model = transformers.BitBackbone(config).eval()
    image = torch.randn(1, 3, 63, 50)
    parity(model, image, gradients=False, channels_last=True)
    found = reasons(optimize(model))
    assert not any(found.values()), found
    assert "bit.encoder.stages.0.layers.0.conv1" in found
