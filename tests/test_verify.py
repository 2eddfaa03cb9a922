"""verify(): right layers pass, wrong ones fail, and a check that sees nothing says so."""

from __future__ import annotations

import copy
from collections import UserDict

import pytest
import torch
from test_optimize import NAMES, build, image, run
from torch import nn

import hybridops
from hybridops import optimize, report, verify
from hybridops.optimize import Fast, VerificationError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "levit_conv"])
def test_every_replaced_layer_is_as_exact_as_torch(timm, name, dtype):
    model = optimize(build(timm, name, awake=False).to(dtype))  # zero gates: verify wakes them
    state = copy.deepcopy(model.state_dict())
    x = image(model).to(dtype)
    result = verify(model, x)
    assert result.ok, result
    assert {c.fqn for c in result.checks} == {
        fqn for fqn, m in model.named_modules() if isinstance(m, Fast)
    }
    assert result.planted > len({c.rule for c in result.checks})
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("options", [{"mode": "train"}, {"fold": False}], ids=str)
def test_unfolded_layers(timm, options):
    model = optimize(build(timm, "levit", awake=False), **options)
    assert verify(model, image(model)).ok


def test_real_levit(timm):
    model = timm.create_model("levit_128s")
    optimize(model, example=torch.randn(1, 3, 224, 224), verify=True)
    shown = report(model)
    assert len(shown.errors) == shown.replaced == 94
    assert "torch's" in str(shown)


def wrong_scale(monkeypatch):
    from hybridops.optimize import levit_layers

    step = levit_layers.attention_step
    monkeypatch.setattr(
        levit_layers, "attention_step", lambda *a, scale, **kw: step(*a, scale=scale * 1.001, **kw)
    )


def dropped_bias(monkeypatch):
    from hybridops.optimize import levit_layers

    step = levit_layers.attention_step
    monkeypatch.setattr(levit_layers, "attention_step", lambda *a, bias, **kw: step(*a, **kw))


def shifted_norm(monkeypatch):
    from hybridops.optimize import timm_levit

    fold = timm_levit.batch_normed

    def wrong(linear, norm):
        weights = fold(linear, norm)
        return weights._replace(bias=weights.bias + 1e-4)

    monkeypatch.setattr(timm_levit, "batch_normed", wrong)


def unscaled_head(monkeypatch):
    from hybridops.optimize import timm_levit

    heads = timm_levit.averaged_heads
    monkeypatch.setattr(timm_levit, "averaged_heads", lambda pair: heads(pair[:1]))


@pytest.mark.parametrize("fault", [wrong_scale, dropped_bias, shifted_norm, unscaled_head])
def test_faults_of_a_rule_fail(timm, monkeypatch, fault):
    fault(monkeypatch)
    model = optimize(build(timm, "levit", awake=False))
    x = image(model)
    result = verify(model, x)
    assert not result.ok
    assert result.trusted
    assert "FAILED" in str(result)
    with pytest.raises(VerificationError, match="not as exact"):
        verify(model, x, raises=True)


def test_optimize_restores_what_fails(timm, monkeypatch):
    wrong_scale(monkeypatch)
    model = build(timm, "levit")
    x = image(model)
    before = run(model, x)
    with pytest.raises(VerificationError):
        optimize(model, example=x, verify=True)
    assert not any(isinstance(m, Fast) for m in model.modules())
    assert torch.equal(run(model, x), before)


def test_asleep_gates_are_mistrusted(timm, monkeypatch):
    """Without waking the gates a LeViT's output hides its attention: the planted faults tell."""
    from hybridops.optimize import verify as _  # noqa: F401  the function; its module is in sys.modules

    module = __import__("sys").modules["hybridops.optimize.verify"]
    monkeypatch.setattr(module, "randomise_gates", lambda model, seed: None)
    model = optimize(build(timm, "levit", awake=False))
    result = verify(model, image(model))
    assert not result.trusted
    assert not result.ok
    assert "MISTRUSTED" in str(result)


class ToEqualTokens(nn.Module):
    """Which of them its queries choose does not show, as in DETR's first decoder layer."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(24, 3, kdim=16, vdim=16, batch_first=True)

    def forward(self, x):
        tokens = x.new_ones(x.shape[0], 7, 16)
        return self.attn(x, tokens, tokens, need_weights=False)[0]


def test_what_equal_tokens_hide_is_measured_on_others(monkeypatch):
    from hybridops.optimize.torch_transformer import FastMultiheadAttention

    model, x = optimize(ToEqualTokens().eval()), torch.randn(2, 5, 24)
    result = verify(model, x)
    assert result.ok, result
    forward = FastMultiheadAttention.forward

    def faulty(self, query, *args, **kwargs):
        return forward(self, 1.01 * query, *args, **kwargs)

    monkeypatch.setattr(FastMultiheadAttention, "forward", faulty)
    result = verify(model, x)
    assert result.trusted
    assert not result.ok


def test_wrong_shape_and_nan_are_problems(timm, monkeypatch):
    from hybridops.optimize import timm_layers

    model = optimize(build(timm, "vit", awake=False))
    forward = timm_layers.FastMlp.forward
    monkeypatch.setattr(timm_layers.FastMlp, "forward", lambda self, x: forward(self, x)[:1])
    problems = {c.fqn: c.problem for c in verify(model, image(model)).checks}
    assert "returns" in problems["blocks.0.mlp"]
    monkeypatch.setattr(
        timm_layers.FastMlp, "forward", lambda self, x: forward(self, x) * torch.nan
    )
    problems = {c.fqn: c.problem for c in verify(model, image(model)).checks}
    assert "NaN" in problems["blocks.0.mlp"]


def test_layers_that_do_not_run_are_not_ok(timm):
    model = build(timm, "vit")
    model.spare = copy.deepcopy(model.blocks[0])
    optimize(model)
    result = verify(model, image(model))
    assert not result.ok
    assert {c.fqn for c in result.checks if not c.ok} == {"spare", "spare.attn", "spare.mlp"}


def test_keyword_arguments():
    """A model of transformers', given what its processors return."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True)

        def forward(self, *, tokens, mask):
            return self.layer(tokens, src_key_padding_mask=mask)

    mask = torch.arange(5) >= torch.tensor([[5], [3]])
    model = Masked().eval()
    example = UserDict(tokens=torch.randn(2, 5, 24), mask=mask)
    optimize(model, example=example, verify=True)
    assert verify(model, dict(example)).ok


def test_what_cannot_be_verified(timm):
    model = build(timm, "vit")
    with pytest.raises(ValueError, match=r"optimize\(model\) first"):
        verify(model, image(model))
    with pytest.raises(TypeError, match="float64"):
        verify(optimize(model.double()), image(model).double())


@pytest.mark.parametrize("name", ["levit_128s", "cpvt_tiny"])
def test_our_own_models(name):
    from hybridops import models

    kwargs = {"img_size": 64} if name.startswith("levit") else {}
    model = optimize(models.create_model(name, num_classes=10, **kwargs).eval())
    assert verify(model, torch.randn(1, 3, 64, 64)).ok


def test_one_result_per_call_and_seeded(timm):
    model = optimize(build(timm, "vit", awake=False))
    x = image(model)
    assert str(verify(model, x)) == str(verify(model, x))
    assert hybridops.report(model).errors


def test_a_frozen_norm_of_zero_is_woken():
    """As timm's ResNets have it inside transformers' DETRs: it hides all that stands before it."""
    from hybridops.nn.conv_body import FrozenBatchNorm2d
    from hybridops.optimize.gates import randomise_gates

    asleep, trained = FrozenBatchNorm2d(4), FrozenBatchNorm2d(4)
    asleep.weight.zero_()
    trained.weight.fill_(2.0)
    randomise_gates(torch.nn.Sequential(asleep, trained), 0)
    assert asleep.weight.min() >= 0.1
    assert (trained.weight == 2).all()
