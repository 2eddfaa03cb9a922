"""What optimize() leaves alone, and why: hooks, subclasses, parametrizations, options, sharing."""

from __future__ import annotations

import copy

import pytest
import torch
from check import same_bits
from parity import reasons
from test_optimize import NAMES, assert_close, build, image, run
from torch import nn

from hybridops import optimize, report, restore
from hybridops.optimize import Fast


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_bypassed_while_hooked(timm, name):
    """Every module's hook fires as often as in the original, with the hook set after optimize()."""
    model = build(timm, name)
    x = image(model)

    def calls(model):
        seen: dict[str, int] = {}

        def count(fqn):
            def hook(*_):
                seen[fqn] = seen.get(fqn, 0) + 1

            return hook

        handles = [m.register_forward_hook(count(fqn)) for fqn, m in model.named_modules()]
        run(model, x)
        for handle in handles:
            handle.remove()
        return seen

    before = calls(model)
    optimize(model)
    fused = run(model, x)
    assert calls(model) == before
    assert torch.equal(run(model, x), fused)  # and fused again once they are gone


def test_hooks_change_results(timm):
    model = optimize(build(timm, "vit"))
    x = image(model)
    before = run(model, x)
    handle = model.blocks[1].mlp.act.register_forward_hook(lambda m, args, y: y * 0)
    assert not torch.allclose(run(model, x), before)
    handle.remove()
    with torch.no_grad():
        zeroed = copy.deepcopy(model)
        zeroed.blocks[1].mlp.act.forward = lambda h: h * 0
        assert not torch.allclose(zeroed(x), before)


def test_hooked_before_is_left_alone_with_a_reason(timm):
    model = build(timm, "vit")
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: None)
    optimize(model)
    why = reasons(model)
    assert "blocks.0.attn.qkv is hooked" in why["blocks.0"]
    assert why["blocks.1"] is None


def test_replaced_child_is_used(timm):
    """LoRA and the like replace a layer after optimize()."""

    class Zero(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0

    model = optimize(build(timm, "vit"))
    x = image(model)
    before = run(model, x)
    old = model.blocks[1].attn.proj
    model.blocks[1].attn.proj = Zero(old.in_features, old.out_features)
    changed = run(model, x)
    assert not torch.allclose(changed, before)
    assert torch.allclose(run(restore(model), x), changed, atol=1e-5)


def test_subclass_is_left_alone(timm):
    from timm.layers import Mlp

    class Halved(Mlp):
        def forward(self, x):
            return super().forward(x) / 2

    model = build(timm, "vit", mlp_layer=Halved)
    x = image(model)
    before = run(model, x)
    optimize(model)
    torch.testing.assert_close(run(model, x), before, rtol=1e-4, atol=1e-5)
    why = reasons(model)
    assert "a subclass of timm.layers.mlp:Mlp" in why["blocks.0.mlp"]
    assert why["blocks.0"] == "mlp is Halved, not Mlp"


def test_parametrized_and_overridden_layers_are_left_alone(timm):
    model = build(timm, "vit")
    nn.utils.parametrizations.weight_norm(model.blocks[0].attn.qkv)
    forward = model.blocks[1].mlp.forward
    model.blocks[1].mlp.forward = lambda x: forward(x) * 2
    x = image(model)
    before = run(model, x)
    optimize(model)
    torch.testing.assert_close(run(model, x), before, rtol=1e-4, atol=1e-5)
    why = reasons(model)
    assert "ParametrizedLinear" in why["blocks.0.attn"]
    assert "overridden" in why["blocks.1.mlp"]


def test_parametrized_after_optimize(timm):
    model = optimize(build(timm, "vit"))
    x = image(model)
    run(model, x)
    nn.utils.parametrizations.weight_norm(model.blocks[0].attn.qkv)
    with torch.no_grad():
        model.blocks[0].attn.qkv.parametrizations.weight.original0.mul_(2)
    after = run(model, x)
    torch.testing.assert_close(run(restore(model), x), after, rtol=1e-4, atol=1e-5)


class Halving(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_a_parametrization_since_outlives_restore():
    model, x = nn.TransformerEncoderLayer(24, 4, 40).eval(), torch.randn(5, 2, 24)
    plain = copy.deepcopy(model)
    nn.utils.parametrize.register_parametrization(plain.self_attn, "in_proj_weight", Halving())
    optimize(model)
    nn.utils.parametrize.register_parametrization(model.self_attn, "in_proj_weight", Halving())
    torch.testing.assert_close(run(model, x), run(plain, x), rtol=1e-4, atol=1e-5)
    restore(model)
    assert type(model.self_attn).__name__ == "ParametrizedMultiheadAttention"
    assert not any(isinstance(module, Fast) for module in model.modules())
    assert same_bits(run(model, x), run(plain, x))
    nn.utils.parametrize.remove_parametrizations(model.self_attn, "in_proj_weight")
    assert type(model.self_attn) is nn.MultiheadAttention
    torch.testing.assert_close(run(optimize(model), x), run(plain, x), rtol=1e-4, atol=1e-5)


def test_a_class_made_from_a_rules_outlives_restore():
    model = optimize(nn.Sequential(*(nn.TransformerEncoderLayer(24, 4, 40) for _ in range(2))))
    rule = type(model[0])

    class Named:
        def name(self):
            return "named"

    class Calling(rule):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model[0].__class__ = type("Sharded", (Named, rule), {})
    model[1].__class__ = Calling
    classes = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=r"Calling is made from .*forward\(\) calls super\(\); set"):
        restore(model)
    assert [type(module) for module in model.modules()] == classes
    model[1].__class__ = rule
    restore(model)
    assert type(model[1]) is nn.TransformerEncoderLayer
    assert type(model[0]).__bases__ == (Named, nn.TransformerEncoderLayer)
    assert model[0].name() == "named"


@pytest.mark.parametrize(
    ("kwargs", "fqn", "match"),
    [
        ({"act_layer": nn.Tanh}, "blocks.0.mlp", "Tanh, which no kernel applies"),
        ({"scale_mlp_norm": True}, "blocks.0", "a norm inside"),
        ({"patch_size": (8, 4)}, "patch_embed", "stride"),
        ({"dynamic_img_size": True}, "patch_embed", "output format|^None"),
    ],
)
def test_unserved_options_have_a_reason(timm, kwargs, fqn, match):
    model = build(timm, "vit", **kwargs)
    x = image(model)
    before = run(model, x)
    optimize(model)
    torch.testing.assert_close(run(model, x), before, rtol=1e-4, atol=1e-5)
    reason = next(layer.reason for layer in report(model).layers if layer.fqn == fqn)
    assert pytest.importorskip("re").search(match, str(reason))


@pytest.mark.parametrize(
    "kwargs", [{"qk_norm": True}, {"qkv_bias": False}, {"pre_norm": True}], ids=str
)
def test_served_options(timm, kwargs):
    model = build(timm, "vit", **kwargs)
    x = image(model)
    before, exact = run(model, x), run(copy.deepcopy(model).double(), x.double())
    optimize(model)
    assert isinstance(model.blocks[0].attn, Fast)
    assert_close(run(model, x), before, exact)


def test_attention_mask_goes_to_the_original(timm):
    model = build(timm, "vit")
    tokens, mask = torch.randn(1, 7, 48), torch.zeros(7, 7).fill_diagonal_(-1e4)
    with torch.no_grad():
        before = model.blocks[0](tokens, attn_mask=mask)
        optimize(model)
        assert torch.allclose(model.blocks[0](tokens, attn_mask=mask), before, atol=1e-5)
    assert ("timm Block", "mask") in report(model).fallbacks


def test_train_mode_leaves_attention_dropout_alone(timm):
    model = build(timm, "vit", attn_drop_rate=0.1)
    optimize(model, mode="train")
    why = reasons(model)
    assert why["blocks.0.attn"] == "attention dropout 0.1 in training"
    assert why["blocks.0.mlp"] is None


def test_a_module_used_twice(timm):
    model = build(timm, "vit")
    model.blocks[1] = model.blocks[0]
    x = image(model)
    before, exact = run(model, x), run(copy.deepcopy(model).double(), x.double())
    optimize(model)
    assert_close(run(model, x), before, exact)
    restore(model)
    assert torch.equal(run(model, x), before)


def test_shared_parameters(timm):
    model = build(timm, "vit")
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    x = image(model)
    run(optimize(model), x)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(1.5)
    after = run(model, x)
    assert torch.allclose(after, run(restore(model), x), atol=1e-5)
