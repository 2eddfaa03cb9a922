"""Every module against the class it replaces: outputs, gradients, keys, copies, fresh caches."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from check import accurate, same_bits
from torch import nn

import hybridops
from hybridops import backend
from hybridops import nn as hnn
from hybridops.compat import import_timm

try:
    import_timm()
except ImportError as missing:
    pytest.skip(str(missing), allow_module_level=True)
from timm.layers import PatchEmbed as TimmPatchEmbed
from timm.models import levit as timm_levit
from timm.models import vision_transformer as timm_vit


class Pair(NamedTuple):
    ours: Callable[[], nn.Module]
    original: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]


class PlainPEG(nn.Module):
    """Algorithm 1 of CPVT on a 4 x 5 grid behind one class token."""

    def __init__(self):
        super().__init__()
        self.pos = nn.Conv2d(24, 24, 3, 1, 1, groups=24)

    def forward(self, x):
        cls_token, feat_token = x[:, 0], x[:, 1:]
        cnn_feat = feat_token.transpose(1, 2).view(x.shape[0], x.shape[2], 4, 5)
        x = self.pos(cnn_feat) + cnn_feat
        return torch.cat((cls_token.unsqueeze(1), x.flatten(2).transpose(1, 2)), dim=1)


class GriddedPEG(hnn.PEG):
    def forward(self, x):
        return super().forward(x, (4, 5), prefix=1)


def _both(ours, original, *args, shapes, **kwargs):
    return Pair(lambda: ours(*args, **kwargs), lambda: original(*args, **kwargs), shapes)


def _resnet_stem():
    layers = {"linear": nn.Conv2d(3, 16, 7, 2, 3, bias=False), "bn": nn.BatchNorm2d(16)}
    conv = nn.Sequential()
    for name, layer in layers.items():
        conv.add_module(name, layer)
    stem = nn.Sequential()
    stem.add_module("conv1", conv)
    stem.add_module("act1", nn.ReLU())
    stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
    stem.add_module("tokens", nn.Flatten(2))
    return stem


def _levit_attention(cls, *args):
    return lambda: cls(*args, act_layer=nn.Hardswish)


TOKENS = ((2, 16, 24),)
EVERYTHING = {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "gated": True}
PAIRS = {
    "linear": _both(hnn.Linear, nn.Linear, 24, 37, shapes=TOKENS),
    "linear_norm": _both(hnn.LinearNorm, timm_levit.LinearNorm, 24, 37, shapes=TOKENS),
    "norm_linear": _both(hnn.NormLinear, timm_levit.NormLinear, 24, 37, shapes=((7, 24),)),
    "conv_norm": _both(hnn.ConvNorm, timm_levit.ConvNorm, 3, 9, 3, 2, 1, shapes=((2, 3, 9, 11),)),
    "conv_norm_grouped": _both(
        hnn.ConvNorm, timm_levit.ConvNorm, 8, 8, 3, 1, 1, 1, 4, shapes=((2, 8, 5, 5),)
    ),
    "levit_stem": Pair(
        lambda: hnn.ConvStem(3, (4, 8, 16, 32), layout="image"),
        lambda: timm_levit.Stem16(3, 32, nn.Hardswish),
        ((2, 3, 48, 32),),
    ),
    "mlp": _both(hnn.Mlp, timm_vit.Mlp, 24, 50, shapes=TOKENS),
    "mlp_normed": _both(
        hnn.Mlp, timm_vit.Mlp, 24, 50, act_layer=nn.Tanh, norm_layer=nn.LayerNorm, shapes=TOKENS
    ),
    "attention": _both(hnn.Attention, timm_vit.Attention, 24, 3, qkv_bias=True, shapes=TOKENS),
    "attention_everything": _both(
        hnn.Attention,
        timm_vit.Attention,
        24,
        3,
        norm_layer=nn.LayerNorm,
        shapes=TOKENS,
        **EVERYTHING,
    ),
    "block": _both(hnn.Block, timm_vit.Block, 24, 3, qkv_bias=True, shapes=TOKENS),
    "block_scaled": _both(
        hnn.Block, timm_vit.Block, 24, 3, qk_norm=True, init_values=0.5, shapes=TOKENS
    ),
    "rel_pos": Pair(
        lambda: hnn.RelPosAttention(24, 8, 3, 2.0, 4),
        _levit_attention(timm_levit.Attention, 24, 8, 3, 2.0, 4),
        TOKENS,
    ),
    "rel_pos_oblong": Pair(
        lambda: hnn.RelPosAttention(24, 8, 3, 2.0, (2, 8)),
        _levit_attention(timm_levit.Attention, 24, 8, 3, 2.0, (2, 8)),
        TOKENS,
    ),
    "rel_pos_downsample": Pair(
        lambda: hnn.RelPosAttentionDownsample(24, 40, 8, 3, 4.0, 2, (5, 7)),
        _levit_attention(timm_levit.AttentionDownsample, 24, 40, 8, 3, 4.0, 2, (5, 7)),
        ((2, 35, 24),),
    ),
    "rel_pos_pooled": Pair(
        lambda: hnn.RelPosAttentionDownsample(24, 40, 8, 3, 4.0, 2, 4, True),
        _levit_attention(timm_levit.AttentionDownsample, 24, 40, 8, 3, 4.0, 2, 4, False, True),
        TOKENS,
    ),
    "patch_embed": _both(
        hnn.PatchEmbed,
        TimmPatchEmbed,
        (16, 32),
        8,
        3,
        24,
        norm_layer=nn.LayerNorm,
        shapes=((2, 3, 16, 32),),
    ),
    "patch_embed_padded": _both(
        hnn.PatchEmbed,
        TimmPatchEmbed,
        None,
        8,
        3,
        24,
        flatten=False,
        dynamic_img_pad=True,
        shapes=((2, 3, 13, 20),),
    ),
    "peg": Pair(lambda: GriddedPEG(24), PlainPEG, ((2, 21, 24),)),
    "multihead": _both(hnn.MultiheadAttention, nn.MultiheadAttention, 24, 3, shapes=TOKENS * 3),
    "multihead_kdim": _both(
        hnn.MultiheadAttention,
        nn.MultiheadAttention,
        24,
        3,
        kdim=20,
        vdim=28,
        batch_first=True,
        shapes=((2, 16, 24), (2, 9, 20), (2, 9, 28)),
    ),
}
MODES = ("eval", "train")


def randomize(module: nn.Module) -> nn.Module:
    """Live gates and statistics: at their initial 0 and 1, BatchNorm hides what is wrong."""
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        if x.is_floating_point():
            with torch.no_grad():
                if "running_var" in name or ("bn" in name and name.endswith("weight")):
                    x.uniform_(0.5, 1.5)
                elif x.ndim == 1 or "attention_biases" in name:
                    x.normal_(0, 0.3)
    return module


def build(name: str, mode: str = "eval") -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    pair = PAIRS[name]
    original, ours = randomize(pair.original()), pair.ours()
    ours.load_state_dict(original.state_dict())
    inputs = [torch.randn(shape) for shape in pair.shapes]
    for module in (ours, original):
        module.train(mode == "train")  # timm's own train() returns nothing at times
    return ours, original, inputs


def first(y):
    return y[0] if isinstance(y, tuple) else y


def gradients(module, inputs):
    """(output, {name: gradient}) for a dy that depends on the output's shape alone"""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = first(module(*inputs))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    names, leaves = zip(*module.named_parameters(), strict=True)
    names = (*names, *(f"input {i}" for i in range(len(inputs))))
    found = torch.autograd.grad(
        y, (*leaves, *inputs), dy, allow_unused=True, materialize_grads=True
    )
    return y.detach(), dict(zip(names, found, strict=True))


def forced(how: str):
    return hybridops.use("reference") if how == "plain" else nullcontext()


@pytest.mark.parametrize("how", ["fused", "plain"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PAIRS)
def test_output_and_gradients(name, mode, how):
    ours, original, inputs = build(name, mode)
    wide = copy.deepcopy(original).double()
    y64, grads64 = gradients(wide, [x.double() for x in inputs])
    torchs, torchs_grads = gradients(original, inputs)
    with forced(how):
        y, grads = gradients(ours, inputs)
    accurate(y, torchs, y64, name)
    for key, grad in grads.items():
        accurate(grad, torchs_grads[key], grads64[key], f"{name} d{key}", factor=3, scale=1.0)
    for key, value in original.named_buffers():  # running statistics moved alike
        torch.testing.assert_close(ours.get_buffer(key), value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PAIRS)
def test_exact_in_float64(name, mode):
    ours, original, inputs = (x for x in build(name, mode))
    wide = [x.double() for x in inputs]
    y, grads = gradients(ours.double(), wide)
    expected, expected_grads = gradients(original.double(), wide)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", PAIRS)
def test_same_keys(name):
    ours, original, _ = build(name)
    assert list(ours.state_dict()) == list(original.state_dict())
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in original.named_buffers()]


@pytest.mark.parametrize("name", PAIRS)
def test_inference_equals_evaluation_with_gradients(name):
    ours, _, inputs = build(name)
    y = first(ours(*inputs))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for _ in range(2):  # made, then cached
                torch.testing.assert_close(first(ours(*inputs)), y.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_copies(name):
    ours, _, inputs = build(name)
    with torch.inference_mode():
        y = first(ours(*inputs))
    twin = copy.deepcopy(ours)
    stored = io.BytesIO()
    torch.save(ours, stored)
    stored.seek(0)
    unpickled = torch.load(stored, weights_only=False)
    for other in (twin, unpickled):
        with torch.no_grad():
            assert same_bits(first(other(*inputs)), y)
            for p in other.parameters():
                p.mul_(1.5)
            assert not same_bits(first(other(*inputs)), y)
            assert same_bits(first(ours(*inputs)), y)


def _in_place(module):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.3)


def _load(module):
    module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()})


def _step(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def _data(module):
    for p in module.parameters():
        p.data = p.data * 1.3


def _through_float64(module):
    module.double()
    _in_place(module)
    module.float()


@pytest.mark.parametrize("change", [_in_place, _load, _step, _data, _through_float64])
@pytest.mark.parametrize("name", PAIRS)
def test_changed_weights_are_seen(name, change):
    ours, original, inputs = build(name)
    with torch.inference_mode():
        before = first(ours(*inputs))
    change(ours)
    original.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        y, expected = first(ours(*inputs)), first(original(*inputs))
    assert not same_bits(y, before)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear_norm", "norm_linear", "levit_stem", "rel_pos"])
def test_statistics_moved_by_training_are_seen(name):
    ours, original, inputs = build(name)
    with torch.no_grad():
        ours(*inputs)
        for module in (ours, original):
            module.train()
            module(*inputs)
            module.eval()
        torch.testing.assert_close(ours(*inputs), original(*inputs), rtol=1e-4, atol=1e-5)


def test_batch_statistics_of_wide_images():
    original, ours = (randomize(m.ConvNorm(3, 8, 3, 2, 1)) for m in (timm_levit, hnn))
    ours.load_state_dict(original.state_dict())
    x = torch.randn(2, 3, 128, 96) + 1
    with torch.no_grad():
        y64 = copy.deepcopy(original).double()(x.double())
        accurate(ours(x), original(x), y64, "ConvNorm")


def test_frozen_batch_norm_while_training():
    ours, original, inputs = build("rel_pos", "train")
    for module in (ours, original):
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d):
                part.eval()
    y, grads = gradients(ours, inputs)
    expected, expected_grads = gradients(original, inputs)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "hardswish"])
def test_linear_activation(activation):
    layer, x = hnn.Linear(8, 5, activation=activation), torch.randn(3, 8)
    act = {"gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}.get(activation)
    act = act or getattr(F, activation)
    torch.testing.assert_close(layer(x), act(F.linear(x, layer.weight, layer.bias)))
    with pytest.raises(ValueError, match="activation must be one of"):
        hnn.Linear(8, 5, activation="tanh")


@pytest.mark.parametrize("channels", [(16,), (8, 16)])
def test_stem_with_pool_gives_tokens(channels):
    stem = hnn.ConvStem(3, channels, 3, act_layer=nn.ReLU, last_act=True, pool=True).eval()
    randomize(stem)
    x = torch.randn(2, 3, 37, 64)
    y = stem(x)
    with hybridops.use("reference"):
        torch.testing.assert_close(y, stem(x))
    image = hnn.ConvStem(
        3, channels, 3, act_layer=nn.ReLU, last_act=True, pool=True, layout="image"
    )
    image.eval().load_state_dict(stem.state_dict())
    assert image(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(image(x).flatten(2).transpose(1, 2), y)


def test_plain_stem_without_norm():
    stem, x = hnn.ConvStem(3, (4, 8), stride=(2, 1), norm=False, act_layer=nn.GELU), None
    x = torch.randn(1, 3, 10, 10)
    y = stem.conv2(F.gelu(stem.conv1(x))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(stem(x), y)


@pytest.mark.parametrize("drop", ["attention", "mlp", "block"])
def test_dropout_draws_like_the_original(drop):
    make = {
        "attention": lambda m: m.Attention(24, 3, attn_drop=0.0, proj_drop=0.4),
        "mlp": lambda m: m.Mlp(24, 48, drop=(0.3, 0.5)),
        "block": lambda m: m.Block(24, 3, drop_path=0.5, proj_drop=0.2),
    }[drop]
    ours, original = make(hnn).train(), make(timm_vit).train()
    ours.load_state_dict(original.state_dict())
    x = torch.randn(4, 9, 24)
    torch.manual_seed(3)
    y = ours(x)
    torch.manual_seed(3)
    torch.testing.assert_close(y, original(x))
    torch.testing.assert_close(ours.eval()(x), original.eval()(x))


def test_what_torch_serves_is_counted():
    attention = hnn.Attention(24, 3, attn_drop=0.5)
    x = torch.randn(1, 9, 24)
    before = backend.fallbacks.copy()
    attention(x)
    attention.eval()(x, is_causal=True)
    reasons = {reason for _, reason in backend.fallbacks - before}
    assert {"causal", "dropout while training"} <= reasons


MASKS = {
    "float": lambda: torch.randn(16, 16),
    "bool": lambda: torch.rand(16, 16) > 0.3,
    "per_sample": lambda: torch.randn(2, 1, 16, 16),
    "per_head": lambda: torch.rand(2, 3, 16, 16) > 0.3,
    "padding": lambda: (torch.arange(16) < 11).expand(2, 1, 1, 16),
}


@pytest.mark.parametrize("mask", [*MASKS, "causal"])
def test_attention_mask(mask):
    ours, original, (x,) = build("attention")
    kwargs = {"is_causal": True} if mask == "causal" else {"attn_mask": MASKS[mask]()}
    torch.testing.assert_close(ours(x, **kwargs), original(x, **kwargs))
    block, original_block, _ = build("block")
    torch.testing.assert_close(block(x, **kwargs), original_block(x, **kwargs))


@pytest.mark.parametrize("prefix", [0, 1])
def test_autocast_keeps_pegs_residual_stream_in_fp32(prefix):
    """As plain torch has it; LayerNorm's gradients behind a stream in bf16 were 40 times worse."""
    module = randomize(hnn.PEG(24))
    x = torch.randn(2, prefix + 35, 24)
    with torch.autocast("cpu", torch.bfloat16):
        ours = module(x, (5, 7), prefix)
        with hybridops.use("reference"):
            torchs = module(x, (5, 7), prefix)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(x.double(), (5, 7), prefix)
    assert ours.dtype == torchs.dtype == torch.float32
    assert torch.equal(ours[:, :prefix], x[:, :prefix])
    accurate(ours.detach(), torchs.detach(), exact, "peg under autocast")
