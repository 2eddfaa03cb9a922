"""Hybrid ViT against timm's: outputs, gradients, keys, weights of every spelling, image sizes."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from check import accurate, same_bits
from test_nn import gradients, randomize
from test_weights import refused

import hybridops
from hybridops.models import HybridVit, WeightsError, create_model, list_models, load_weights
from hybridops.models.hybrid_vit import MODELS, BiT, BiTStem, MobileClipStem, ResNetD
from hybridops.nn import conv as nn_conv
from hybridops.nn.conv import StdConv2dSame
from hybridops.nn.conv_body import max_pool_same

PARAMETERS = {
    "vit_tiny_r_s16_p8_224": 6_337_704,
    "vit_tiny_r_s16_p8_384": 6_355_944,
    "vit_small_r26_s32_224": 36_431_912,
    "vit_small_r26_s32_384": 36_468_392,
    "vit_base_r26_s32_224": 101_383_976,
    "vit_base_r50_s16_224": 98_659_112,
    "vit_base_r50_s16_384": 98_950_952,
    "vit_large_r50_s32_224": 328_994_856,
    "vit_large_r50_s32_384": 329_092_136,
    "vit_small_resnet26d_224": 63_608_392,
    "vit_small_resnet50d_s16_224": 57_531_976,
    "vit_base_resnet26d_224": 101_403_208,
    "vit_base_resnet50d_224": 110_965_064,
    "vit_base_mci_224": 86_724_328,
}
BODIES = {
    "stem": partial(HybridVit, BiTStem, patch_size=8),
    "bit": partial(HybridVit, partial(BiT, (2, 1))),
    "resnetd": partial(HybridVit, partial(ResNetD, (2, 2))),
    "mci": partial(HybridVit, partial(MobileClipStem, 48), projects=False, class_position=False),
}


def ours(body, **kwargs):
    kwargs = {"img_size": 64, "num_classes": 10, **kwargs}
    return BODIES[body](embed_dim=48, depth=2, num_heads=3, **kwargs)


def timms(timm, body, **kwargs):
    """The same small model, composed of timm's own classes."""
    from timm.layers import HybridEmbed
    from timm.models import vision_transformer_hybrid as hybrid

    backbone = {
        "stem": partial(hybrid._resnetv2, ()),
        "bit": partial(hybrid._resnetv2, (2, 1)),
        "resnetd": partial(timm.create_model, "resnet26d", features_only=True, out_indices=[2]),
        "mci": partial(
            hybrid.ConvStem,
            channels=(12, 12, 48),
            stride=(4, 2, 2),
            kernel_size=(4, 2, 2),
            padding=0,
            act_layer=torch.nn.GELU,
        ),
    }[body]()
    is_mci = body == "mci"
    return timm.models.VisionTransformer(
        **{"img_size": 64, "num_classes": 10, **kwargs},
        patch_size=8 if body == "stem" else 1,
        embed_dim=48,
        depth=2,
        num_heads=3,
        no_embed_class=is_mci,
        embed_layer=partial(HybridEmbed, backbone=backbone, proj=not is_mci),
    )


def pair(timm, body, **kwargs):
    original = randomize(timms(timm, body, **kwargs)).eval()
    original.pos_embed.data.normal_()  # as loud as the tokens, or nobody hears it
    kwargs.pop("dynamic_img_size", None)
    model = ours(body, **kwargs).eval()
    assert load_weights(model, original.state_dict()) == "timm"
    return model, original


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_keys_and_parameter_count(timm, name, count):
    with torch.device("meta"):
        model, original = create_model(name), timm.create_model(name, num_classes=1000)
    shapes = [(key, value.shape) for key, value in model.state_dict().items()]
    assert shapes == [(key, value.shape) for key, value in original.state_dict().items()]
    assert sum(p.numel() for p in model.parameters()) == count


def test_names():
    assert set(PARAMETERS) == set(MODELS) == set(list_models("vit_*"))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("body", BODIES)
def test_output_and_gradients(timm, body, mode):
    model, original = pair(timm, body)
    x = torch.randn(3, 3, 64, 64)

    def at(net, dtype):
        net = copy.deepcopy(net).to(dtype)
        for part in net.modules():
            part.training = mode == "train"
        return gradients(net, [x.to(dtype)]), dict(net.named_buffers())

    (y64, grads64), buffers64 = at(original, torch.float64)
    (y, grads), buffers = at(model, torch.float64)
    torch.testing.assert_close(y, y64, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads, grads64, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(buffers, buffers64)

    (torchs, torchs_grads), _ = at(original, torch.float32)
    (y, grads), _ = at(model, torch.float32)
    accurate(y, torchs, y64, body)
    assert len(grads) == 1 + len(list(model.parameters()))
    for name, grad in grads.items():
        what = f"gradient of {name}"
        accurate(grad, torchs_grads[name], grads64[name], what, factor=3, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("body", BODIES)
def test_inference(timm, body, dtype):
    model, original = pair(timm, body)
    model, original, x = model.to(dtype), original.to(dtype), torch.randn(2, 3, 64, 64).to(dtype)
    with torch.inference_mode():
        y, torchs = model(x), original(x)
        accurate(y, torchs, copy.deepcopy(original).double()(x.double()), body)
        with hybridops.use("reference"):
            plain = model(x)
        if dtype == torch.float32:
            torch.testing.assert_close(plain, torchs, rtol=1e-4, atol=1e-5)
        channels_last = x.contiguous(memory_format=torch.channels_last)
        assert same_bits(model(channels_last), y)


@pytest.mark.models
@pytest.mark.parametrize("name", PARAMETERS)
def test_every_variant_gives_timms_logits(timm, name):
    original = randomize(timm.create_model(name, num_classes=1000)).eval()
    model = create_model(name).eval()
    assert load_weights(model, original.state_dict()) == "timm"
    x = torch.randn(1, 3, *original.patch_embed.img_size)
    with torch.inference_mode():
        y, torchs = model(x), original(x)
        accurate(y, torchs, original.double()(x.double()), name)


@pytest.mark.parametrize("size", [(96, 64), (64, 160), (67, 101)])
@pytest.mark.parametrize("body", BODIES)
def test_other_resolutions(timm, body, size):
    model, original = pair(timm, body, dynamic_img_size=True)
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        y, torchs = model.forward_features(x), original.forward_features(x)
        exact = copy.deepcopy(original).double().forward_features(x.double())
        accurate(y, torchs, exact, f"{body} {size}")


@pytest.mark.parametrize("body", ["bit", "mci"])
def test_a_checkpoint_of_another_resolution(timm, body):
    from timm.models.vision_transformer_hybrid import checkpoint_filter_fn

    state = randomize(timms(timm, body)).state_dict()
    model, original = ours(body, img_size=96), timms(timm, body, img_size=96)
    load_weights(model, state)
    expected = checkpoint_filter_fn(state, original)["pos_embed"]
    torch.testing.assert_close(model.pos_embed.data, expected)
    assert model.pos_embed.shape != state["pos_embed"].shape
    oblong = ours(body, img_size=(64, 128))
    load_weights(oblong, state)
    refused(ours(body), oblong.state_dict(), "pos_embed is")  # whose grid nobody can tell


def jax_arrays(model):
    """The model's weights as Flax names and lays them out, written after timm's loader."""
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    heads = model.blocks[0].attn.num_heads
    arrays = {}

    def conv(name, key):
        arrays[f"{name}/kernel"] = state[f"{key}.weight"].transpose(2, 3, 1, 0)

    def group_norm(name, key):
        arrays[f"{name}/scale"] = state[f"{key}.weight"].reshape(1, 1, 1, -1)
        arrays[f"{name}/bias"] = state[f"{key}.bias"].reshape(1, 1, 1, -1)

    def layer_norm(name, key):
        arrays[f"{name}/scale"], arrays[f"{name}/bias"] = (
            state[f"{key}.{leaf}"] for leaf in ("weight", "bias")
        )

    def dense(name, key):
        arrays[f"{name}/kernel"] = state[f"{key}.weight"].T
        arrays[f"{name}/bias"] = state[f"{key}.bias"]

    body = "patch_embed.backbone"
    stem = f"{body}.stem" if f"{body}.stem.conv.weight" in state else body
    conv("conv_root", f"{stem}.conv")
    group_norm("gn_root", f"{stem}.norm")
    for s, stage in enumerate(getattr(model.patch_embed.backbone, "stages", ())):
        for b, block in enumerate(stage.blocks):
            unit, key = f"block{s + 1}/unit{b + 1}", f"{body}.stages.{s}.blocks.{b}"
            for i in (1, 2, 3):
                conv(f"{unit}/conv{i}", f"{key}.conv{i}")
                group_norm(f"{unit}/gn{i}", f"{key}.norm{i}")
            if block.downsample is not None:
                conv(f"{unit}/conv_proj", f"{key}.downsample.conv")
                group_norm(f"{unit}/gn_proj", f"{key}.downsample.norm")
    conv("embedding", "patch_embed.proj")
    arrays["embedding/bias"] = state["patch_embed.proj.bias"]
    arrays["cls"] = state["cls_token"]
    arrays["Transformer/posembed_input/pos_embedding"] = state["pos_embed"]
    layer_norm("Transformer/encoder_norm", "norm")
    dense("head", "head")
    for i in range(len(model.blocks)):
        block, key = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        layer_norm(f"{block}/LayerNorm_0", f"{key}.norm1")
        layer_norm(f"{block}/LayerNorm_2", f"{key}.norm2")
        dense(f"{block}/MlpBlock_3/Dense_0", f"{key}.mlp.fc1")
        dense(f"{block}/MlpBlock_3/Dense_1", f"{key}.mlp.fc2")
        attn = f"{block}/MultiHeadDotProductAttention_1"
        weights = np.split(state[f"{key}.attn.qkv.weight"], 3)
        biases = np.split(state[f"{key}.attn.qkv.bias"], 3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attn}/{name}/kernel"] = weight.T.reshape(weight.shape[1], heads, -1)
            arrays[f"{attn}/{name}/bias"] = bias.reshape(heads, -1)
        out = state[f"{key}.attn.proj.weight"]
        arrays[f"{attn}/out/kernel"] = out.T.reshape(heads, -1, len(out))
        arrays[f"{attn}/out/bias"] = state[f"{key}.attn.proj.bias"]
    return arrays


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
@pytest.mark.parametrize("body", ["stem", "bit"])
def test_jax_weights(timm, body, prefix, tmp_path):
    from timm.models.vision_transformer import _load_weights

    source, model, path = randomize(ours(body)), ours(body), tmp_path / "weights.npz"
    arrays = {f"{prefix}{name}": value for name, value in jax_arrays(source).items()}
    np.savez(path, **arrays, **({"opt/state/step": np.int64(3)} if prefix else {}))
    assert load_weights(model, path) == "jax"
    original = timms(timm, body)
    with torch.no_grad():
        _load_weights(original, str(path))
    for name, value in source.state_dict().items():
        assert same_bits(model.state_dict()[name], value), name
        assert same_bits(original.state_dict()[name], value), name  # or the test spells it wrong


def test_damaged_jax_weights(tmp_path):
    path, arrays = tmp_path / "weights.npz", jax_arrays(ours("bit"))
    np.savez(path, **arrays)
    path.write_bytes(path.read_bytes()[:5000])
    refused(ours("bit"), path, str(path), "truncated")
    np.savez(path, **arrays, code=np.array([print], dtype=object))
    refused(ours("bit"), path, str(path), "allow_pickle=False")
    del arrays["Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/bias"]
    np.savez(path, **arrays, **{"pre_logits/bias": np.zeros(3)})
    error = refused(ours("bit"), path, "1 missing (blocks.1.attn.qkv.bias)", "pre_logits")
    assert set(error.unexpected) > {"blocks.1.attn.query.bias", "blocks.1.attn.value.bias"}


def mobileclip_names(model):
    """The model's weights as Apple's checkpoints name them."""
    renames = (
        ("blocks.", "transformer."),
        ("patch_embed.backbone.", "patch_emb."),
        (".bn.", ".block.norm."),
        (".conv.", ".block.conv."),
        (".norm1.", ".pre_norm_mha.0."),
        (".attn.qkv.", ".pre_norm_mha.1.qkv_proj."),
        (".attn.proj.", ".pre_norm_mha.1.out_proj."),
        (".norm2.", ".pre_norm_ffn.0."),
        (".mlp.fc1.", ".pre_norm_ffn.1."),
        (".mlp.fc2.", ".pre_norm_ffn.4."),
    )
    state = {"text_encoder.weight": torch.ones(1)}
    for key, value in model.state_dict().items():
        for name, theirs in renames:
            key = key.replace(name, theirs)
        key = f"post_transformer_{key}" if key.startswith("norm.") else key
        if key == "pos_embed":
            key, value = "pos_embed.pos_embed.pos_embed", value[None]
        if key == "head.weight":
            key, value = "classifier.proj", value.t()
        if key != "head.bias":
            state[f"image_encoder.model.{key}"] = value
    return state


def test_mobileclip_weights(timm):
    from timm.models.vision_transformer_hybrid import _convert_mobileclip

    source, model = randomize(ours("mci")), ours("mci")
    source.head.bias.data.zero_()
    state = mobileclip_names(source)
    assert load_weights(model, state) == "mobileclip"
    expected = _convert_mobileclip(state, model)
    for name, value in source.state_dict().items():
        assert same_bits(model.state_dict()[name], value), name
        assert same_bits(expected[name].contiguous(), value), name


SPOILS = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "integer": lambda t: t.int(),
    "number": lambda t: t.new_zeros(()),
    "five dimensions": lambda t: t.new_zeros((2, 3, 4, 5, 6)),
    "empty": lambda t: t.narrow(-1, 0, 0),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("body", ["stem", "mci"])
def test_whatever_cannot_be_laid_out_anew_is_named(body, spoil):
    """Each tensor in turn, in both spellings; no other error, nothing loaded."""
    model = ours(body)
    state = mobileclip_names(model) if body == "mci" else jax_arrays(model)
    state = {key: torch.as_tensor(value) for key, value in state.items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    odd = ("text_encoder", "block", "num_batches")  # not loaded; enough of others; an integer
    for key in [k for k in state if not k.startswith(odd[:2]) and odd[2] not in k]:
        with pytest.raises(WeightsError, match="do not fit HybridVit") as error:
            load_weights(model, state | {key: SPOILS[spoil](state[key])})
        names = error.value.missing + error.value.unusable + tuple(error.value.mismatched)
        assert len(names) in (1, 2), key  # 2: a head's bias is made of its weight
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


def test_weights_are_standardised_once(monkeypatch):
    model, x, calls = ours("bit").eval(), torch.randn(1, 3, 64, 64), []
    standardise = nn_conv.standardise
    monkeypatch.setattr(nn_conv, "standardise", lambda *args: calls.append(1) or standardise(*args))
    convs = [m for m in model.modules() if isinstance(m, StdConv2dSame)]
    with torch.inference_mode():
        first, again = model(x), model(x)
    assert len(calls) == len(convs)
    assert same_bits(first, again)
    with torch.no_grad():
        convs[0].weight.add_(torch.randn_like(convs[0].weight))
    with torch.inference_mode():
        changed = model(x)
        with hybridops.use("reference"):
            torch.testing.assert_close(model(x), changed, rtol=1e-4, atol=1e-5)
    assert len(calls) == len(convs) + 1
    assert not same_bits(changed, first)


def test_max_pool_same():
    for height, width in ((1, 2), (3, 4), (7, 10), (8, 8), (9, 5)):
        x = torch.randn(2, 3, height, width)
        padded = nn_conv.same_pad(x, (3, 3), (2, 2), value=-torch.inf)
        assert same_bits(max_pool_same(x), F.max_pool2d(padded, 3, 2))


@pytest.mark.parametrize("body", BODIES)
def test_optimize(body):
    model, x = randomize(ours(body)).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        y = model(x)
        fast = hybridops.optimize(model)(x)
        torch.testing.assert_close(fast, y, rtol=1e-4, atol=1e-5)
    result = hybridops.verify(model, x)
    assert result.ok, str(result)
    found = {layer.fqn: layer.rule or layer.reason for layer in hybridops.report(model).layers}
    assert found.pop("").endswith("FastHybridVit")
    assert found.pop("patch_embed") == "runs on hybridops kernels already"
    assert found.pop("head").startswith("by itself")
    assert all(rule.endswith("FastBlock") for rule in found.values())
    assert len(found) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ours("stem", img_size=16), "holds no whole patch"),
        (lambda: ours("stem")(torch.randn(1, 3, 16, 64)), "one whole patch at least, got"),
        (lambda: ours("bit")(torch.randn(1, 1, 64, 64)), r"must be \(B, 3, H, W\), got"),
        (lambda: ours("bit")(torch.randn(3, 64, 64)), r"must be \(B, 3, H, W\), got"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
