"""Settings that somebody changes after optimize(): eps, scale and heads are followed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hybridops import optimize, restore
from hybridops.optimize import Fast
from hybridops.optimize.gates import make_live

TIMM = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}),
    "levit": ("levit_128s", {"img_size": 112}),
    "resnet": ("resnet18", {}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1, 1, 1)}),
    "xcit": ("xcit_nano_12_p16_224", {"img_size": 32, "depth": 1}),
}
CHANGES = [
    ("vit", "blocks.0.norm1", {"eps": 0.5}),
    ("vit", "blocks.1.attn", {"num_heads": 2, "head_dim": 12}),
    ("levit", "stages.0.blocks.1.attn", {"scale": 0.7}),
    ("levit", "stages.1.blocks.0.mlp.ln1.bn", {"eps": 0.5}),
    ("levit", "stem.conv2.bn", {"eps": 0.5}),
    ("resnet", "layer1.0.bn2", {"eps": 0.5}),
    ("swin", "layers.0.blocks.0.norm2", {"eps": 0.5}),
    ("xcit", "patch_embed.proj.2.1", {"eps": 0.5}),
]


def build(timm: Any, key: str) -> tuple[nn.Module, torch.Tensor]:
    name, options = TIMM[key]
    size = options.get("img_size", 64)
    x = torch.randn(2, 3, size, size)
    model = timm.create_model(name, num_classes=7, **options).eval()
    make_live(model, x)
    return model, x


def change(model: nn.Module, path: str, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(model.get_submodule(path), name, value)


def forget(model: nn.Module) -> nn.Module:
    """LeViT keeps its biases in eval mode."""
    model.train()
    model.eval()
    return model


def close(ours: torch.Tensor, torchs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("key", "path", "settings"), CHANGES, ids=lambda v: str(v)[:30])
@torch.no_grad()
def test_a_change_is_followed(timm, key, path, settings):
    model, x = build(timm, key)
    before = model(x)
    fast = optimize(copy.deepcopy(model))
    close(fast(x), before)
    change(fast, path, settings)
    change(model, path, settings)
    after = forget(model)(x)
    assert (after - before).abs().max() > 1e-3
    close(fast(x), after)
    # the next optimize() takes it over
    optimize(fast)
    served = [m for m in fast.modules() if isinstance(m, Fast)]
    assert all(m._hybridops_plan.settled() for m in served)
    close(fast(x), after)
    assert not any(isinstance(m, Fast) for m in restore(fast).modules())
    close(fast(x), after)


@torch.no_grad()
def test_copies_follow_their_own_settings(timm):
    model, x = build(timm, "vit")
    first = optimize(model)(x)
    twin = copy.deepcopy(model)
    change(twin, "blocks.0.norm1", {"eps": 0.5})
    assert torch.equal(model(x), first)
    assert not torch.allclose(twin(x), first, atol=1e-3)
    change(twin, "blocks.0.norm1", {"eps": model.blocks[0].norm1.eps})
    assert torch.equal(twin(x), first)


@torch.no_grad()
def test_a_compiled_block_follows(timm):
    model, _ = build(timm, "vit")
    x = torch.randn(2, 5, 24)
    fast, plain = optimize(copy.deepcopy(model)).blocks[0], model.blocks[0]
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    close(compiled(x), plain(x))
    for block in (fast, plain):
        block.norm1.eps = 0.5
    close(compiled(x), plain(x))


@torch.no_grad()
def test_transformers_scaling_is_followed(timm):
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    options |= {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
    model = transformers.ViTModel(transformers.ViTConfig(**options)).eval()
    x = torch.randn(2, 3, 32, 32)
    make_live(model, x)
    fast = optimize(copy.deepcopy(model))
    before = fast(x).last_hidden_state
    for m in (fast, model):
        m.layers[0].attention.scaling = 2.0
    after = model(x).last_hidden_state
    assert (after - before).abs().max() > 1e-3
    close(fast(x).last_hidden_state, after)
