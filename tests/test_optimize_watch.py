"""Calls of an optimized model that find nothing changed, and every change that they find."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from hybridops import optimize, refresh, restore, verify
from hybridops.compat import import_timm
from hybridops.optimize import plan as plans
from hybridops.optimize import watch as watches
from hybridops.optimize.gates import make_live

needs_host = pytest.mark.skipif(watches.unchanged is None, reason="hybridops._host was not built")
pytestmark = pytest.mark.usefixtures("timm")  # or skipped


def build() -> tuple[nn.Module, torch.Tensor]:
    options = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 7}
    model = import_timm().create_model("vit_tiny_patch16_224", **options).eval()
    x = torch.randn(2, 3, 32, 32)
    make_live(model, x)
    return model, x


def warm(freeze: bool = False) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """An optimized model after two calls, its input and what it gave."""
    model, x = build()
    optimize(model, freeze=freeze)
    with torch.inference_mode():
        model(x)
        return model, x, model(x).clone()


@pytest.fixture
def asked(monkeypatch):
    """How often plans asked their own questions."""
    calls = []
    own = plans.Plan.folds
    monkeypatch.setattr(plans.Plan, "folds", lambda *a: calls.append(a) or own(*a))
    return calls


@needs_host
def test_nothing_is_asked_where_nothing_has_changed(asked):
    model, x, y = warm()
    asked.clear()
    with torch.inference_mode():
        assert torch.equal(model(x), y)
    assert not asked


@needs_host
def test_without_the_host_module_plans_ask_for_themselves(asked, monkeypatch):
    monkeypatch.setattr(plans, "unchanged", None)
    model, x, y = warm()
    asked.clear()
    with torch.inference_mode():
        assert torch.equal(model(x), y)
    assert asked
    test_changes_are_followed("written in place")


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * nn.Linear.forward(self, x)


def written(model):
    model.blocks[0].mlp.fc1.weight.mul_(1.5)


def given_data(model):
    model.blocks[0].mlp.fc1.weight.data = torch.randn(96, 24)


def another_view(model):
    weight = model.blocks[0].attn.proj.weight  # square: nothing but its strides change
    weight.data = weight.data.t()


def fewer_features(model):  # pointers, strides and versions stay
    mlp = model.blocks[0].mlp
    mlp.fc1.weight.data = mlp.fc1.weight.data[:48]
    mlp.fc1.bias.data = mlp.fc1.bias.data[:48]
    mlp.fc2.weight.data = mlp.fc2.weight.data[:, :48]


def loaded(model):
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})


def another_parameter(model):
    model.blocks[1].norm1.weight = nn.Parameter(torch.randn(24))


def no_bias(model):
    model.blocks[0].mlp.fc2.bias = None


def another_child(model):
    model.blocks[0].mlp.fc1 = nn.Linear(24, 96)


def another_class(model):
    model.blocks[0].mlp.fc1.__class__ = Doubled


def overridden(model):
    fc1 = model.blocks[0].mlp.fc1
    fc1.forward = lambda x: 3 * nn.Linear.forward(fc1, x)


def hooked(model):
    model.blocks[1].mlp.fc1.register_forward_hook(lambda m, args, y: y * 2)


def pre_hooked(model):
    model.blocks[1].mlp.fc1.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def set_anew(model):
    model.blocks[0].norm1.eps = 0.5


def one_child_trains(model):
    model.blocks[0].mlp.drop1.train()
    model.blocks[0].mlp.drop1.p = 0.0
    written(model)


def more_blocks(model):
    model.blocks.append(copy.deepcopy(restore(copy.deepcopy(model.blocks[0]))))


def another_dict(model):
    norm = model.blocks[0].norm1
    norm.__dict__ = {**vars(norm), "eps": 0.5}


CHANGES = {
    "written in place": written,
    "given other data": given_data,
    "another view of its data": another_view,
    "fewer features of its data": fewer_features,
    "load_state_dict": loaded,
    "another parameter": another_parameter,
    "no bias any more": no_bias,
    "another child": another_child,
    "another class": another_class,
    "forward overridden": overridden,
    "a hook": hooked,
    "a hook in front": pre_hooked,
    "a setting": set_anew,
    "a child that trains": one_child_trains,
    "another block": more_blocks,
    "another __dict__": another_dict,
}


def change(model: nn.Module, name: str) -> None:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        CHANGES[name](model)


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_followed(name):
    model, x, before = warm()
    change(model, name)
    with torch.inference_mode():
        ours = model(x)
        assert torch.equal(model(x), ours)
        torchs = restore(copy.deepcopy(model))(x)
    torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ours, before, rtol=1e-3, atol=1e-4)


def test_a_setting_of_the_class_is_followed(monkeypatch):
    """One that nobody can watch on the module: plans go on asking."""
    model, x, _ = warm()
    norm = model.blocks[0].norm1
    monkeypatch.setattr(type(norm), "eps", norm.eps, raising=False)
    del norm.eps
    with torch.inference_mode():
        model(x)
        norm.eps = 0.5
        ours = model(x)
        torchs = restore(copy.deepcopy(model))(x)
    torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-4)


def test_a_hook_on_all_modules_is_followed():
    model, x, _ = warm()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        with torch.inference_mode():
            model(x)
    finally:
        handle.remove()
    assert model.blocks[0].mlp.act in seen


def test_what_is_not_plain_inference_is_asked_each_time(asked):
    model, x, y = warm()
    asked.clear()
    assert torch.allclose(model(x), y, atol=1e-5)  # gradients are recorded
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert asked


@needs_host
def test_a_watch_goes_with_its_model():
    model, _, _ = warm()
    gone = weakref.ref(model.blocks[0])
    del model
    gc.collect()
    assert gone() is None


@needs_host
@pytest.mark.parametrize("bad", [(), (1, 2), ((),) * 16, ((1,), *((),) * 16), ([], *((),) * 16)])
def test_what_is_no_watch_is_refused(bad):
    with pytest.raises((TypeError, ValueError), match="unchanged"):
        watches.unchanged(bad)


# freeze


def test_a_frozen_model_is_a_snapshot():
    model, x, before = warm(freeze=True)
    with torch.inference_mode():
        for name in ("written in place", "a setting", "a hook", "given other data"):
            change(model, name)
            assert torch.equal(model(x), before), name
        assert refresh(model) is model
        after = model(x)
        torchs = restore(copy.deepcopy(model))(x)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after, torchs, rtol=1e-3, atol=1e-4)


def test_loading_weights_takes_a_new_snapshot():
    model, x, before = warm(freeze=True)
    model = copy.deepcopy(model)
    with torch.inference_mode():
        model(x)
        change(model, "load_state_dict")
        ours, torchs = model(x), restore(copy.deepcopy(model))(x)
    torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ours, before, rtol=1e-3, atol=1e-4)
    assert not restore(model)._load_state_dict_post_hooks


def test_a_frozen_model_can_be_verified():
    model, x, before = warm(freeze=True)
    assert verify(model, x).ok
    with torch.inference_mode():
        change(model, "a setting")
        assert torch.equal(model(x), before)  # and is frozen still


def test_a_frozen_model_asks_nothing(asked):
    model, x, _ = warm(freeze=True)
    asked.clear()
    with torch.inference_mode():
        model(x)
    assert not asked


def test_a_call_while_it_trains_ends_a_snapshot():
    model, x, before = warm(freeze=True)
    change(model, "written in place")
    with torch.inference_mode():
        model.train()
        model(x)
        model.eval()
        after = model(x)
        torchs = restore(copy.deepcopy(model))(x)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after, torchs, rtol=1e-3, atol=1e-4)


def test_copies_of_a_frozen_model_take_their_own_snapshot():
    model, x, before = warm(freeze=True)
    copied = copy.deepcopy(model)
    change(copied, "written in place")
    with torch.inference_mode():
        assert not torch.allclose(copied(x), before, rtol=1e-3, atol=1e-4)
        assert torch.equal(model(x), before)


def test_gradients_of_a_frozen_model_are_of_its_weights():
    model, x, _ = warm(freeze=True)
    change(model, "written in place")
    torchs = restore(copy.deepcopy(model))
    model(x).square().sum().backward()
    torchs(x).square().sum().backward()
    found, expected = model.blocks[0].mlp.fc1.weight.grad, torchs.blocks[0].mlp.fc1.weight.grad
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"mode": "train"}, {"fold": False}])
def test_only_what_is_folded_can_be_frozen(options):
    with pytest.raises(ValueError, match="freeze=True needs"):
        optimize(build()[0], freeze=True, **options)


def test_refresh_leaves_other_models_alone():
    model, x = build()
    assert refresh(model) is model
    assert optimize(model) is model
    with pytest.raises(ValueError, match="already optimized"):
        optimize(model, freeze=True)
