"""transformers: attn_implementation="hybridops", and optimize() on its DETR."""

from __future__ import annotations

import copy

import pytest
import torch
from check import accurate
from test_detr import batch, pair, pixel_mask

import hybridops
from hybridops import backend, compat, explain, optimize, report, restore, verify

transformers = pytest.importorskip("transformers")


@pytest.fixture
def detr(timm):
    compat.register_transformers()
    return pair(transformers)[1]


def run(model, padded=True, **kwargs):
    images, mask = batch(padded)
    with torch.no_grad():
        return model(images, pixel_mask(mask), **kwargs)


def same_seed(model, *args, **kwargs):
    torch.manual_seed(3)
    return run(model, *args, **kwargs)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_attention_by_name(detr, padded):
    before = same_seed(detr, padded)
    detr.set_attn_implementation("hybridops")
    counted = backend.fallbacks.total()
    after = same_seed(detr, padded)
    assert backend.fallbacks.total() == counted
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.pred_boxes, before.pred_boxes, rtol=1e-4, atol=1e-4)
    if padded:  # a mask that gets lost shows
        images, _ = batch(True)
        torch.manual_seed(3)
        images, mask = batch(True)
        with torch.no_grad():
            lost = detr(images, torch.ones(2, 96, 160))
        assert (lost.logits[1] - after.logits[1]).abs().max() > 1e-2


def test_weights_asked_for_and_dropout_run_in_plain_torch_and_are_counted(detr):
    detr.set_attn_implementation("eager")
    expected = same_seed(detr, output_attentions=True)
    detr.set_attn_implementation("hybridops")
    counted = backend.fallbacks["attention", "output_attentions"]
    got = same_seed(detr, output_attentions=True)
    assert backend.fallbacks["attention", "output_attentions"] > counted
    assert len(got.encoder_attentions) == len(expected.encoder_attentions) == 2
    for name in ("encoder_attentions", "cross_attentions"):
        for ours, theirs in zip(getattr(got, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for layer in detr.model.encoder.layers:
        layer.self_attn.attention_dropout = 0.5
    counted = backend.fallbacks["attention", "dropout while training"]
    run(detr.train())
    assert backend.fallbacks["attention", "dropout while training"] == counted + 2


def test_gradients_by_name(detr):
    images, mask = batch(True)
    grads = []
    for name in ("eager", "hybridops"):
        detr.set_attn_implementation(name)
        detr.zero_grad()
        detr(images, pixel_mask(mask)).logits.square().sum().backward()
        grads.append(detr.model.encoder.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3 * grads[0].abs().max())


def test_a_vision_transformer_by_name(timm):
    compat.register_transformers()
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        attn_implementation="hybridops",
    )
    model = transformers.ViTModel(config).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        y = model(x).last_hidden_state
        model.set_attn_implementation("eager")
        torch.testing.assert_close(y, model(x).last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "hybridops"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("options", [{}, {"fold": False}, {"mode": "train"}], ids=str)
def test_optimized(detr, options, padded, implementation):
    exact = same_seed_exact(detr, padded)
    before = same_seed(detr, padded)
    detr.set_attn_implementation(implementation)
    optimize(detr, **options)
    after = same_seed(detr, padded)
    accurate(after.logits, before.logits, exact.logits, "logits")
    accurate(after.pred_boxes, before.pred_boxes, exact.pred_boxes, "boxes")
    restore(detr)
    detr.set_attn_implementation("sdpa")
    assert torch.equal(same_seed(detr, padded).logits, before.logits)


def same_seed_exact(model, padded):
    torch.manual_seed(3)
    images, mask = batch(padded)
    with torch.no_grad():
        return copy.deepcopy(model).double()(images.double(), pixel_mask(mask))


def test_bfloat16(detr):
    detr = detr.bfloat16()
    images, mask = batch(True)
    with torch.no_grad():
        exact = copy.deepcopy(detr).double()(images.bfloat16().double(), pixel_mask(mask))
        before = detr(images.bfloat16(), pixel_mask(mask))
        after = optimize(detr)(images.bfloat16(), pixel_mask(mask))
    accurate(after.logits, before.logits, exact.logits, "logits")


def test_every_layer_has_its_rule_and_verifies(detr):
    optimize(detr)
    rules = {layer.rule.partition(":")[2] for layer in report(detr).layers if layer.rule}
    assert rules >= {
        "FastConvEncoder",
        "FastEncoderLayer",
        "FastDecoderLayer",
        "FastSelfAttention",
        "FastCrossAttention",
        "FastMLP",
    }
    images, mask = batch(True)
    result = verify(detr, (images, pixel_mask(mask)))
    assert result.ok, str(result)


def test_gradients_of_the_optimized_model(detr):
    images, mask = batch(True)
    detr.train()

    def gradient(model):
        model.zero_grad()
        model(images, pixel_mask(mask)).logits.square().sum().backward()
        attn = model.model.decoder.layers[1].encoder_attn
        return [
            p.grad.clone() for p in (attn.k_proj.weight, model.model.backbone.model.conv1.weight)
        ]

    expected = gradient(detr)
    for options in ({"mode": "train"}, {}):
        optimize(detr, **options)
        for got, want in zip(gradient(detr), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
        restore(detr)


def test_attentions_of_the_optimized_model(detr):
    detr.set_attn_implementation("eager")
    expected = same_seed(detr, output_attentions=True).cross_attentions
    got = same_seed(optimize(detr), output_attentions=True).cross_attentions
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_explained_without_weights(timm):
    text = str(explain("hf:detr"))
    assert "FastConvEncoder" in text
    assert text.count("FastDecoderLayer") == 6
    assert hybridops.compat.register_transformers() is None
