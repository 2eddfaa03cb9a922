"""XCiT's stem: the real class, odd sizes, both patch sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from check import accurate
from parity import doubled, parity, run, wake
from torch import nn

from hybridops import optimize, report
from hybridops.optimize import Fast

SIZE = (45, 83)


@pytest.fixture(params=[16, 8], ids=["p16", "p8"])
def stem(timm, request):
    from timm.models.xcit import ConvPatchEmbed

    return ConvPatchEmbed(64, request.param, 3, 40)


def test_parity(stem):
    x = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        size = stem.eval()(x)[1]
        assert optimize(copy.deepcopy(stem))(x)[1] == size
    parity(stem, x, gradients=False)


def test_bfloat16_and_channels_last(stem):
    x = torch.randn(2, 3, *SIZE)
    wake(stem, (x,))
    stem, x = stem.bfloat16(), x.bfloat16()
    exact = run(copy.deepcopy(stem).double(), doubled((x,)))
    torchs = run(stem, (x,))
    optimize(stem)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        accurate(run(stem, (image,))[0], torchs[0], exact[0], "bf16")


def test_gradients_in_eval_mode_are_torchs(stem):
    x = torch.randn(2, 3, *SIZE)
    wake(stem, (x,))
    twin = copy.deepcopy(stem)
    for module in (optimize(stem), twin):
        module(x)[0].square().sum().backward()
    for (name, ours), theirs in zip(stem.named_parameters(), twin.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.mark.filterwarnings("ignore:no rule serves")
@pytest.mark.parametrize(
    ("where", "what"),
    [
        ((1,), nn.Tanh()),
        ((0, 1), nn.GroupNorm(1, 5)),
        ((0, 0), nn.Conv2d(3, 5, 3, padding_mode="circular")),
    ],
    ids=["activation", "norm", "conv"],
)
def test_what_is_left_alone_says_why(timm, where, what):
    from timm.models.xcit import ConvPatchEmbed

    stem = ConvPatchEmbed(64, 16, 3, 40)
    parent = stem.proj if len(where) == 1 else stem.proj[where[0]]
    parent[where[-1]] = what
    optimize(stem, strict=False)
    assert not isinstance(stem, Fast)
    named = {"Tanh", "GroupNorm", "padding_mode"}
    assert any(word in report(stem).layers[0].reason for word in named)
