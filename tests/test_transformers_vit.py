"""optimize() on transformers' ViT, DeiT, DINOv2, BEiT and DPT."""

from __future__ import annotations

import copy

import pytest
import torch
from check import accurate
from parity import doubled, parity, reasons, run, wake

from hybridops import backend, explain, optimize, report

transformers = pytest.importorskip("transformers")
OPTIONS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 24}
OPTIONS |= {"intermediate_size": 70, "patch_size": 8, "hidden_dropout_prob": 0.0}
OPTIONS |= {"attention_probs_dropout_prob": 0.0}


def build(name, **kwargs):
    options = OPTIONS | kwargs
    if name == "dpt":
        return transformers.DPTModel(transformers.DPTConfig(**options, backbone_out_indices=[0, 1]))
    if name == "beit":
        options = {"layer_scale_init_value": 0.1, "drop_path_rate": 0.0} | options
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **options))


MODELS = {
    "vit": {},
    "vit tanh": {"hidden_act": "gelu_pytorch_tanh", "qkv_bias": False},
    "deit": {},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2},
    "beit": {"use_relative_position_bias": True},
    "beit plain": {},
    "dpt": {},
}


def model_of(key, **kwargs):
    return build(key.split()[0], **MODELS[key] | kwargs)


@pytest.fixture(autouse=True)
def _importable(timm):
    """timm makes torchvision importable, which transformers imports."""


def image(n=2):
    return torch.randn(n, 3, 24, 24)


@pytest.mark.parametrize("key", MODELS)
def test_parity(key):
    parity(model_of(key), image())


@pytest.mark.parametrize("key", MODELS)
def test_what_explain_says(key):
    found = {layer.fqn: layer.reason for layer in explain(model_of(key)).layers}
    left = {fqn: reason for fqn, reason in found.items() if reason}
    alone = {fqn for fqn, reason in left.items() if reason.startswith("by itself")}
    assert all("pooler" in fqn for fqn in alone)
    assert {left[fqn] for fqn in left.keys() - alone} <= {
        "its bias of relative positions follows the resolution; its parts are served"
    }


@pytest.mark.parametrize("key", ["vit", "beit"])
def test_bfloat16(key):
    model, x = model_of(key), image()
    wake(model, (x,))
    model, x = model.bfloat16(), x.bfloat16()
    exact, torchs = run(copy.deepcopy(model).double(), doubled((x,))), run(model, (x,))
    accurate(run(optimize(model), (x,))[0], torchs[0], exact[0], "bf16")


@pytest.mark.parametrize("kind", ["padding", "per query"])
@pytest.mark.parametrize("key", ["vit", "dinov2"])
def test_masks(key, kind):
    model, x = model_of(key), image()
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 4:] = False
    if kind == "per query":
        mask = torch.rand(2, 1, 10, 10) > 0.3
    wake(model, (x,))

    def masked(model, x):
        with torch.no_grad():
            return model(x, attention_mask=mask).last_hidden_state

    exact, torchs = masked(copy.deepcopy(model).double(), x.double()), masked(model, x)
    assert not torch.allclose(torchs, run(model, (x,))[0], atol=1e-3)
    accurate(masked(optimize(model), x), torchs, exact, kind)


def test_padding_that_all_queries_share_stays_padding(monkeypatch):
    from hybridops.optimize import transformers_block

    model, x = model_of("vit"), torch.randn(2, 10, 48)
    wake(model, (image(),))
    mask = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    mask[1, ..., 4:] = False
    with torch.no_grad():
        expected, _ = model.layers[0].attention(x, mask)
        seen = []
        attention = transformers_block.attention
        monkeypatch.setattr(
            transformers_block, "attention", lambda *a, **kw: seen.append(kw) or attention(*a, **kw)
        )
        y, _ = optimize(model).layers[0].attention(x, mask)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert seen[0]["bias"] is None
    assert seen[0]["key_padding_mask"].shape == (2, 10)


def test_weights_that_are_asked_for_come_from_the_original():
    model, x = model_of("vit", attn_implementation="eager"), image()
    wake(model, (x,))
    with torch.no_grad():
        expected = model(x, output_attentions=True).attentions
        optimize(model)
        got = model(x, output_attentions=True).attentions
    assert len(got) == len(expected) == 2
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert report(model).fallbacks["ViTAttention", "output_attentions"] == 2


def test_hidden_states_are_captured_as_before():
    model, x = model_of("vit"), image()
    wake(model, (x,))
    with torch.no_grad():
        expected = model(x, output_hidden_states=True).hidden_states
        got = optimize(model)(x, output_hidden_states=True).hidden_states
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_dropout_in_training_is_left_alone_with_a_reason():
    model = model_of("vit", attention_probs_dropout_prob=0.1)
    found = reasons(optimize(model, mode="train"))
    assert found["layers.0.attention"] == "attention dropout 0.1 in training"
    assert found["layers.0.mlp"] is None


def test_gradient_checkpointing_still_recomputes():
    model, x = model_of("vit"), image()
    wake(model, (x,))
    model.train()
    optimize(model, mode="train")
    model.gradient_checkpointing_enable()
    counted = backend.fallbacks.total()
    model(x).last_hidden_state.sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model(x).last_hidden_state.sum().backward()
    for name, grad in expected.items():
        torch.testing.assert_close(grad, dict(model.named_parameters())[name].grad)
    assert backend.fallbacks.total() == counted


def test_wrong_images_are_refused_as_before():
    model = optimize(model_of("vit").eval())
    with pytest.raises(ValueError, match="channel dimension"):
        model(torch.randn(1, 4, 24, 24))
    with pytest.raises(ValueError, match="doesn't match model"):
        model(torch.randn(1, 3, 32, 24))
