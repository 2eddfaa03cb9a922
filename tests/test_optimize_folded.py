"""A BatchNorm behind a convolution or a product in any nn.Sequential: folded, or left alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from parity import parity, reasons
from torch import nn
from torch.nn.utils import parametrize

from hybridops import explain, optimize, report, restore, verify
from hybridops.optimize import Fast, folded
from hybridops.optimize.gates import fit_statistics, randomise_gates


class ConvNormAct(nn.Sequential):
    """As many repositories have it: a subclass that adds no more than its constructor."""

    def __init__(self, width, out, stride=1, groups=1, norm=nn.BatchNorm2d, act=nn.ReLU):
        conv = nn.Conv2d(width, out, 3, stride, 1, groups=groups, bias=False)
        super().__init__(conv, norm(out), act())


class Reshaped(nn.Module):
    """A network of its own code, which views what its layers return."""

    def __init__(self):
        super().__init__()
        self.first = ConvNormAct(3, 8, stride=2)
        body = (ConvNormAct(8, 8, groups=groups, act=nn.Hardswish) for groups in (1, 8, 2))
        self.body = nn.Sequential(*body)
        self.fc = nn.Sequential(nn.Linear(8 * 64, 12), nn.BatchNorm1d(12), nn.GELU())

    def forward(self, x):
        x = self.first(x)
        return self.fc((x + self.body(x)).view(len(x), -1))


class Foreign(nn.Module):
    """No Sequential may know what this makes of its image."""

    def forward(self, x):
        return x.view(len(x), -1).view(x.shape) * 2


def whole():
    """A whole network in one Sequential."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        ConvNormAct(8, 16, 2, groups=4, act=nn.SiLU),
        *(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16, affine=False), nn.ReLU6(inplace=True)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12)),
        *(nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 4)),
    )


def mixed():
    conv = nn.Conv2d(3, 8, 5, dilation=2, padding=4)
    return nn.Sequential(
        Foreign(), conv, nn.BatchNorm2d(8), nn.LeakyReLU(), Foreign(), ConvNormAct(8, 8), Foreign()
    )


NETWORKS = (whole, mixed, Reshaped)


def image(side=16):
    return torch.randn(2, 3, side, side)


def build(make=whole):
    torch.manual_seed(0)
    model = make().eval()
    randomise_gates(model, 0)
    fit_statistics(model, (image(),), 0)
    return model


@torch.no_grad()
def run(model, x):
    return model(x)


@pytest.mark.parametrize("make", NETWORKS)
def test_parity(make):
    torch.manual_seed(0)
    parity(make(), image(), gradients=False, channels_last=make is whole)


@pytest.mark.parametrize("make", NETWORKS)
def test_bfloat16(make):
    model = build(make).bfloat16()
    result = verify(optimize(model), image().bfloat16())
    assert result.ok, str(result)


def test_nothing_but_the_folded_weights_runs(monkeypatch):
    model = optimize(build())
    x = image()
    monkeypatch.setattr(nn.BatchNorm2d, "forward", None)
    monkeypatch.setattr(nn.BatchNorm1d, "forward", None)
    run(model, x)
    assert [layer.fqn for layer in report(model).layers] == ["", "14"]


def test_a_fault_in_the_fold_is_noticed(monkeypatch):
    """verify() would tell if the norm's shift were forgotten."""
    fold = folded.folded_conv

    def forgetful(conv, norm, **options):
        made = fold(conv, norm, **options)
        made.bias = made.bias * 0
        return made

    model = optimize(build())
    monkeypatch.setattr(folded, "folded_conv", forgetful)
    assert not verify(model, image()).ok


def test_the_memory_format_is_torchs():
    model, last = build(Reshaped), torch.channels_last
    body = model.body
    for x in (torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8).contiguous(memory_format=last)):
        expected = run(body, x)
        y = run(optimize(body), x)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        restore(body)


def test_an_input_that_a_member_writes_to_is_written():
    convs = [nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(3)]
    pairs = [m for conv in convs for m in (conv, nn.BatchNorm2d(3))]
    model = optimize(nn.Sequential(nn.ReLU(inplace=True), *pairs).eval())
    assert isinstance(model, Fast)
    x = image()
    expected = x.relu()
    run(model, x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (whole, torch.randn(3, 16, 16)),
        (whole, torch.randn(2, 4, 16, 16)),
        (whole, torch.randn(2, 3, 16, 16, dtype=torch.float64)),
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), torch.randn(2, 3, 4)),
    ],
    ids=["no batch", "channels", "dtype", "tokens"],
)
def test_errors_are_torchs(model, x):
    model = model().eval()
    with pytest.raises((RuntimeError, ValueError)) as expected:
        run(model, x)
    with pytest.raises(expected.type) as found:
        run(optimize(model), x)
    assert str(found.value) == str(expected.value)


def test_tokens_of_batchnorms_own_channels():
    """BatchNorm1d normalises the second dimension: of (B, N, C) that is N."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval()
    fit_statistics(model, (torch.randn(9, 4),), 0)
    x = torch.randn(2, 5, 4)
    expected = run(model, x)
    assert torch.equal(run(optimize(model), x), expected)


def hooked(model):
    model[0].register_forward_hook(lambda *_: None)


def hooked_before(model):
    model[1].register_forward_pre_hook(lambda *_: None)


def hooked_backward(model):
    model[1].register_full_backward_hook(lambda *_: None)


def parametrised(model):
    parametrize.register_parametrization(model[0], "weight", nn.Identity())


def parametrised_norm(model):
    parametrize.register_parametrization(model[1], "weight", nn.Identity())


def overridden(model):
    model[1].forward = lambda x: x


def without_statistics(model):
    model[1] = nn.BatchNorm2d(8, track_running_stats=False).eval()


def in_training(model):
    model[1].train()


def of_other_dtype(model):
    model[1].double()


def padded(model):
    model[0].padding_mode = "reflect"


def of_other_size(model):
    model[1] = nn.BatchNorm2d(4).eval()


def synchronised(model):
    model[1] = nn.SyncBatchNorm(8).eval()


def used_twice(model):
    model.append(model[0])


def used_elsewhere(model):
    model.norm = nn.Sequential(nn.Identity(), model[1])


LEFT = {
    hooked: "the Conv2d is hooked",
    hooked_before: "the BatchNorm2d is hooked",
    hooked_backward: "the BatchNorm2d is hooked",
    parametrised: "ParametrizedConv2d, not Conv2d",
    parametrised_norm: "parametrised",
    overridden: "the BatchNorm2d is hooked",
    without_statistics: "without running statistics",
    in_training: "the norm alone is in training mode",
    of_other_dtype: "its dtype is torch.float32, torch.float64",
    padded: "padding_mode 'reflect'",
    of_other_size: "it takes 4 channels, not 8",
    synchronised: "SyncBatchNorm has no kernel",
    used_twice: "0 stands in two places",
    used_elsewhere: "1 stands in two places",
}


@pytest.mark.parametrize("change", LEFT)
def test_what_is_left_alone_says_why(change):
    conv = nn.Conv2d(3, 8, 3, padding=1)
    model = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), ConvNormAct(8, 8)).eval()
    change(model)
    x, before = image(), None
    if change not in (of_other_dtype, of_other_size, used_twice):
        before = run(model, x)
    optimize(model)
    found = reasons(model)
    assert found["0"].startswith("a BatchNorm follows, not folded: ")
    assert LEFT[change] in found["0"]
    assert isinstance(model, Fast) != isinstance(model[3], Fast)  # the rest is served
    if before is not None:
        torch.testing.assert_close(run(model, x), before, rtol=1e-4, atol=1e-5)


class Doubled(nn.Sequential):
    def forward(self, input):
        return super().forward(input) * 2


class Backwards(nn.Sequential):
    def __iter__(self):
        return reversed(list(self._modules.values()))


@pytest.mark.parametrize(("cls", "what"), [(Doubled, "forward"), (Backwards, "__iter__")])
def test_a_subclass_with_an_order_of_its_own_is_left_alone(cls, what):
    model = nn.Sequential(ConvNormAct(3, 3), cls(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).eval()
    model[1][1].running_mean.add_(1)
    x = image()
    before = run(model, x)
    optimize(model)
    assert reasons(model)["1.0"].endswith(f"{cls.__name__} has a {what} of its own")
    torch.testing.assert_close(run(model, x), before, rtol=1e-4, atol=1e-5)


def test_options_say_why_too():
    found = {line.fqn: line.reason for line in explain(build(), mode="train").layers}
    assert "training keeps" in found["0"]
    model = optimize(build(), exclude="5", strict=False)
    assert reasons(model)["0"] == "a BatchNorm follows, not folded: holds the excluded 5"
    assert isinstance(model[4], Fast)


def test_a_conv_that_another_member_follows_stands_by_itself():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3), ConvNormAct(3, 3))
    assert reasons(optimize(model.eval()))["0"].startswith("by itself")


def test_what_a_rule_bypasses_is_no_matter_of_this_one(timm):
    model = optimize(timm.create_model("resnet18d").eval())
    assert not any(isinstance(m, folded.FastFoldedSequential) for m in model.modules())


def test_changes_are_followed():
    model, x = optimize(build()), image()
    first = run(model, x)
    with torch.no_grad():
        model[1].running_mean.add_(1)
        model[4][0].weight.mul_(1.5)
    changed = run(model, x)
    assert not torch.allclose(changed, first)
    model[2] = nn.Tanh()
    other = run(model, x)
    assert not torch.allclose(other, changed)
    handle = model[4][2].register_forward_hook(lambda m, args, y: y * 0)
    assert not torch.allclose(run(model, x), other)
    handle.remove()
    del model[14]
    longer = run(model, x)
    assert longer.shape == (2, 12)
    torch.testing.assert_close(run(restore(model), x), longer, rtol=1e-4, atol=1e-5)


def test_members_of_a_mixed_one_may_be_replaced():
    model, x = optimize(build(mixed)), image()
    run(model, x)
    model[4] = nn.Sigmoid()
    changed = run(model, x)
    torch.testing.assert_close(run(restore(model), x), changed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", NETWORKS)
def test_copies_pickles_and_parts(make):
    model, x = optimize(build(make)), image()
    before = run(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, x), before)
        assert not any(isinstance(m, Fast) for m in restore(twin).modules())
    if make is whole:
        part = model[:4]
        assert type(part) is nn.Sequential
        assert part[0] is model[0]


@pytest.mark.parametrize("make", NETWORKS)
def test_a_graph_holds_the_layers_themselves(make):
    model, x = build(make), image()
    expected = run(model, x)
    optimize(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
        exported = torch.export.export(model, (x,)).module()(x)
    for y in (compiled, exported):
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trains", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", NETWORKS)
def test_gradients_are_torchs(make, trains):
    model, x = build(make).train(trains), image()
    twin = optimize(copy.deepcopy(model))
    for m in (model, twin):
        torch.manual_seed(0)
        m(x).square().sum().backward()
    for ours, torchs in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, torchs.grad)


def test_gradients_of_the_input_of_frozen_layers():
    model, x = build(mixed).requires_grad_(False), image()
    twin, grads = optimize(copy.deepcopy(model)), []
    for m in (model, twin):
        leaf = x.clone().requires_grad_()
        m(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * float(grads[0].abs().max()))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_trace_holds_the_layers_themselves():
    model, x = build(), image()
    with torch.no_grad():
        expected = model(x)
        traced = torch.jit.trace(optimize(model), x)(x)
    torch.testing.assert_close(traced, expected, rtol=1e-5, atol=1e-6)


BLOCKS = {
    "ConvBnAct": {"skip": True, "kernel_size": 3},
    "DepthwiseSeparableConv": {"pw_act": True},
    "InvertedResidual": {"exp_ratio": 2.0, "drop_path_rate": 0.5},
    "EdgeResidual": {"exp_ratio": 2.0},
}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_timm(timm, name, stride):
    """With a shortcut or without, squeeze-and-excitation, TensorFlow's padding."""
    from timm.models import _efficientnet_blocks as blocks

    options = {"se_layer": blocks.SqueezeExcite} if name != "ConvBnAct" else {}
    options |= {"stride": stride, "pad_type": "same", "act_layer": nn.SiLU} | BLOCKS[name]
    block = getattr(blocks, name)(8, 8, **options)
    parity(block, torch.randn(2, 8, 9, 9), gradients=False, channels_last=True)
    assert type(optimize(block)).__name__ == f"Fast{name}"


def test_blocks_that_cannot_be_fused_say_why(timm):
    from timm.models import _efficientnet_blocks as blocks

    several = blocks.InvertedResidual(8, 8, dw_kernel_size=[3, 5], exp_ratio=2.0)
    deep = blocks.InvertedResidual(8, 8, s2d=1)
    for block, reason in (
        (several, "MixedConv2d has no kernel"),
        (deep, "space to depth in front"),
    ):
        assert {line.fqn: line.reason for line in explain(block).layers}[""] == reason
