"""A module fuses across its children only where nobody can tell: hooks, stand-ins, autocast, ..."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from check import same_bits
from torch import nn
from torch.nn.utils import parametrizations, prune

import hybridops
from hybridops import nn as hnn
from hybridops.models import levit

x_tokens = (2, 16, 24)


def block():
    module = hnn.Block(24, 3, qkv_bias=True, init_values=None)
    for norm in (module.norm1, module.norm2):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
    return module.eval()


def live(module):
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            for t in (part.weight, part.running_var):
                nn.init.uniform_(t, 0.5, 1.5)
            for t in (part.bias, part.running_mean):
                nn.init.normal_(t, 0, 0.3)
    return module.eval()


def levit_block():
    return live(levit.LevitBlock(24, 8, 3, 2.0, 2.0, (4, 4)))


def levit_downsample():
    return live(levit.LevitDownsample(24, 32, 8, 3, 4.0, 2.0, (4, 4)))


BLOCKS = {"block": block, "levit": levit_block, "downsample": levit_downsample}


SILENT = (nn.Identity, nn.Dropout)  # off, they have nothing to see


def watched(name):
    modules = BLOCKS[name]().named_modules()
    return [n for n, m in modules if n and not isinstance(m, SILENT)]


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name in BLOCKS for path in watched(name)]
)
def test_hooks_see_what_they_would_in_plain_torch(name, path):
    module, x = BLOCKS[name](), torch.randn(x_tokens)
    seen = []
    fused = module(x)
    module.get_submodule(path).register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    hooked = module(x)
    with hybridops.use("reference"):
        plain = module(x)
    if len(seen) == 1:
        pytest.fail(f"a hook on {path} fires in plain torch, and not when fused")
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(hooked, plain)
    torch.testing.assert_close(fused, plain)


class LoRA(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.weight, self.bias = layer.weight, layer.bias  # as peft's do
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


LINEARS = [("block", n) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
LINEARS += [("levit", n) for n in ("attn.qkv.linear", "attn.proj.ln.linear", "mlp.ln1.linear")]
LINEARS += [("downsample", f"attn_downsample.{n}.linear") for n in ("kv", "q.ln")]


@pytest.mark.parametrize("how", ["lora", "weight_norm", "pruned", "patched"])
@pytest.mark.parametrize(("name", "path"), LINEARS)
def test_what_stands_in_for_a_linear_is_called(name, path, how):
    module, x = BLOCKS[name](), torch.randn(x_tokens)
    with torch.no_grad():
        before = module(x)
    parent, _, child = path.rpartition(".")
    parent, layer = module.get_submodule(parent), module.get_submodule(path)
    if how == "lora":
        setattr(parent, child, LoRA(layer))
    elif how == "weight_norm":
        parametrizations.weight_norm(layer)
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(1.5)
    elif how == "pruned":
        prune.random_unstructured(layer, "weight", 0.5)
    else:
        forward = layer.forward
        layer.forward = lambda x: 2 * forward(x)
    with torch.no_grad(), hybridops.use("reference"):
        plain = module(x)
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain)
        assert not torch.allclose(before, plain)


@pytest.mark.parametrize("name", BLOCKS)
def test_autocast_keeps_the_stream_in_fp32(name):
    module, x = BLOCKS[name](), torch.randn(x_tokens)
    exact = module.double()(x.double())
    module.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert same_bits(module(x), y)
        with hybridops.use("reference"):
            plain = module(x)
    assert y.dtype == plain.dtype == (torch.bfloat16 if name == "downsample" else torch.float32)
    assert (y - exact).square().mean() <= 4 * (plain - exact).square().mean()
    with torch.no_grad():  # and not what autocast has cached
        torch.testing.assert_close(module(x), exact.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BLOCKS)
def test_bfloat16(name):
    module, x = BLOCKS[name]().bfloat16(), torch.randn(x_tokens).bfloat16()
    with torch.no_grad():
        y = module(x)
        with hybridops.use("reference"):
            plain = module(x)
    exact = module.double()(x.double())
    assert y.dtype == torch.bfloat16
    assert (y - exact).square().mean() <= 4 * (plain - exact).square().mean()


COMPILED = {
    **BLOCKS,
    "stem": lambda: hnn.ConvStem(3, (8, 16), 3, pool=True).eval(),
    "patch_embed": lambda: hnn.PatchEmbed(16, 8, 3, 24, norm_layer=nn.LayerNorm),
    "multihead": lambda: hnn.MultiheadAttention(24, 3, batch_first=True),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name, grad):
    torch.compiler.reset()
    module = COMPILED[name]()
    image = name in ("stem", "patch_embed")
    x = torch.randn((2, 3, 16, 16) if image else x_tokens)
    inputs = (x, x, x) if name == "multihead" else (x,)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        y, expected = compiled(*inputs), module(*inputs)
        torch.testing.assert_close(y, expected)
        if grad:
            y = y[0] if isinstance(y, tuple) else y
            y.square().sum().backward()
            assert all(p.grad is not None for p in module.parameters())


def test_first_tokens_are_those_of_the_whole_block():
    module, x = block(), torch.randn(x_tokens)
    for count in (1, 3):
        y = hnn.block.first_tokens(module, x, count)
        torch.testing.assert_close(y, module(x)[:, :count])
    module.attn.qkv = LoRA(module.attn.qkv)
    torch.testing.assert_close(hnn.block.first_tokens(module, x, 2), module(x)[:, :2])


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("prefix", [0, 2])
def test_peg(kernel, stride, prefix):
    peg = hnn.PEG(24, kernel, stride, bias=prefix > 0)
    tokens = torch.randn(2, prefix + 63, 24)
    y = peg(tokens, (9, 7), prefix)
    with hybridops.use("reference"):
        torch.testing.assert_close(peg(tokens, (9, 7), prefix), y)
    image = tokens[:, prefix:].transpose(1, 2).unflatten(2, (9, 7))
    conv = F.conv2d(image, peg.pos.weight, peg.pos.bias, stride, kernel // 2, groups=24)
    conv = (conv + image if stride == 1 else conv).flatten(2).transpose(1, 2)
    torch.testing.assert_close(y[:, prefix:], conv)
    assert torch.equal(y[:, :prefix], tokens[:, :prefix])
    with pytest.raises(ValueError, match="peg: x must be"):
        peg(tokens, (9, 8), prefix)


def test_peg_needs_a_grid_like_the_input_for_its_residual():
    with pytest.raises(ValueError, match="stride 1 and an odd kernel_size"):
        hnn.PEG(24, 4)
    with pytest.raises(ValueError, match="stride 1 and an odd kernel_size"):
        hnn.PEG(24, 3, stride=2, residual=True)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("pads", [False, True])
def test_patch_embed_of_raw_images(pads, grad):
    module = hnn.PatchEmbed(None, 8, 3, 24, dynamic_img_pad=pads, mean=MEAN, std=STD)
    raw = torch.randint(0, 256, (2, 3, 16, 20 if pads else 24), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    plain = hnn.PatchEmbed(None, 8, 3, 24, dynamic_img_pad=pads)
    plain.load_state_dict(module.state_dict())
    expected = plain((raw / 255 - mean) / std)
    with torch.set_grad_enabled(grad):
        for image in (raw, raw / 255):
            torch.testing.assert_close(module(image), expected, rtol=1e-4, atol=1e-4)
            with hybridops.use("reference"):
                torch.testing.assert_close(module(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [6, 8])
def test_patch_embed_with_prefix_and_positions(rows):
    module = hnn.PatchEmbed((16, 24), 8, 3, 24, norm_layer=nn.LayerNorm)
    image, prefix, pos = torch.randn(2, 3, 16, 24), torch.randn(1, 2, 24), torch.randn(1, rows, 24)
    y = module(image, pos, prefix)
    tokens = module.norm(module.proj(image).flatten(2).transpose(1, 2))
    tokens = tokens + pos if rows == 6 else tokens
    expected = torch.cat([prefix.expand(2, -1, -1), tokens], 1)
    expected = expected + pos if rows == 8 else expected
    torch.testing.assert_close(y, expected)
    with hybridops.use("reference"):
        torch.testing.assert_close(module(image, pos, prefix), expected)


def test_patch_embed_sizes():
    module = hnn.PatchEmbed((16, 24), 8, 3, 24)
    assert (module.grid_size, module.num_patches, module.feat_ratio()) == ((2, 3), 6, 8)
    with pytest.raises(ValueError, match=r"image must be \(16, 24\), got \(24, 24\)"):
        module(torch.randn(1, 3, 24, 24))
    module.set_input_size((24, 24))
    assert module(torch.randn(1, 3, 24, 24)).shape == (1, 9, 24)
    loose = hnn.PatchEmbed((16, 24), 8, 3, 24, strict_img_size=False)
    assert loose(torch.randn(1, 3, 32, 8)).shape == (1, 4, 24)
    with pytest.raises(ValueError, match="multiple of the patch"):
        loose(torch.randn(1, 3, 33, 8))
    with pytest.raises(ValueError, match="mean and std come together"):
        hnn.PatchEmbed(mean=MEAN)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hnn.Attention(25, 3), "multiple of num_heads"),
        (lambda: hnn.Attention(24, 3, qk_norm=True), "need a norm_layer"),
        (lambda: hnn.ConvStem(3, (8,), layout="nhwc"), "layout must be"),
        (lambda: hnn.ConvStem(3, (8, 8), stride=(2,)), "2 channels need 2"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
