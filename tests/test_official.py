"""optimize() on classes that are known by their shape alone, and on those that only look alike."""

from __future__ import annotations

import copy
import pickle

import official
import pytest
import torch
from check import same_bits
from official import MODELS
from parity import parity, reasons, run, wake
from torch import nn

from hybridops import NothingToOptimize, backend, explain, optimize, report, restore
from hybridops.optimize import Fast


def tokens(*shape):
    return torch.randn(shape)


@pytest.mark.parametrize("name", MODELS)
def test_parity(name):
    build, args = MODELS[name]
    parity(build(), *args())


@pytest.mark.parametrize("name", MODELS)
def test_every_hot_layer_is_served(name):
    build, _ = MODELS[name]
    assert not {layer.fqn: layer.reason for layer in explain(build()).layers if layer.reason}


@pytest.mark.parametrize("name", MODELS)
def test_copies_pickles_and_a_second_optimize(name):
    build, args = MODELS[name]
    model, args = build(), args()
    wake(model, args)
    if name == "twins":  # its attention class has no place to be pickled from
        del model.far, model.near
        model.far = model.near = official.GroupAttention(24, 3, 3).eval()
    before = run(optimize(model), args)[0]
    classes = [type(m) for m in model.modules()]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), optimize(model)):
        assert [type(m) for m in twin.modules()] == classes
        assert same_bits(run(twin, args)[0], before)
    assert not any(isinstance(m, Fast) for m in restore(model).modules())


def test_attention_of_detr_computes_no_weights_unless_somebody_looks():
    build, args = MODELS["detr"]
    model, args = build(), args()
    optimize(model.eval())
    before = backend.fallbacks["attention", "need_weights"]
    run(model, args)
    assert backend.fallbacks["attention", "need_weights"] == before
    seen = []
    hook = lambda module, args, output: seen.append(output[1])  # noqa: E731
    model.decoder.multihead_attn.register_forward_hook(hook)
    run(model, args)
    assert seen[0].shape == (2, 5, 7)


def test_grids_that_windows_do_not_cover_go_to_the_original():
    model = optimize(official.GroupAttention(24, 3, 3).eval())
    with pytest.raises(RuntimeError):
        model(tokens(1, 20, 24), 5, 4)
    assert model(tokens(1, 0, 24), 0, 3).shape == (1, 0, 24)


class Doubled(official.GroupAttention):
    def forward(self, x, H, W):
        return 2 * super().forward(x, H, W)


class Wider(official.GroupAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.extra = nn.Linear(4, 4)


class Masked(official.GroupAttention):
    def forward(self, x, H, W, mask=None):
        return super().forward(x, H, W)


class Scaled(official.Residual):
    """The sum of LeViT's, but for half of the branch."""

    def forward(self, x):
        return x + self.m(x) / 2


def named(cls, name):
    cls.__name__ = name
    return cls


def test_what_only_looks_alike_is_left_alone_with_a_reason():
    attention = official.Attention(32, 8, 3, 2, nn.Hardswish, 5)
    model = nn.ModuleDict(
        {
            "doubled": named(Doubled, "GroupAttention")(24, 3, 3),
            "wider": named(Wider, "GroupAttention")(24, 3, 3),
            "masked": named(Masked, "GroupAttention")(24, 3, 3),
            "residual": named(Scaled, "Residual")(attention),
            "activation": official.Attention(32, 8, 3, 2, nn.Tanh, 5),
            "good": official.GroupAttention(24, 3, 3),
        }
    ).eval()
    found = reasons(optimize(model))
    assert "but computes something else" in found["doubled"]
    assert "not Twins' GroupAttention: its children are" in found["wider"]
    assert "forward takes x H W mask" in found["masked"]
    assert "but computes something else" in found["residual"]
    assert "Tanh, which no kernel applies" in found["activation"]
    assert found["good"] is None
    assert found["residual.m"] is None
    assert not isinstance(model["doubled"], Fast)


def test_the_check_changes_nothing_and_draws_no_random_numbers():
    model = official.LeViT().eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    counted = backend.fallbacks.total()
    explain(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert backend.fallbacks.total() == counted
    assert not any(isinstance(m, Fast) for m in model.modules())


def test_dropout_of_attention_in_training_is_named():
    with pytest.raises(NothingToOptimize, match="attention dropout 0.2 in training"):
        optimize(official.GroupAttention(24, 3, 3, attn_drop=0.2), mode="train")


def test_the_report_names_the_rules():
    model = optimize(official.LeViT().eval())
    rules = {layer.rule for layer in report(model).layers if layer.rule}
    assert "hybridops.optimize.official_levit:Residual" in rules
    assert "hybridops.optimize.chained:FastSequential" in rules  # its blocks are one chain
    assert len(model.blocks.derive().layers) == len(model.blocks)
