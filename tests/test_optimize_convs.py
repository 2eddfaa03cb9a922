"""Rules for convolution bodies: timm's hybrids and ResNets, torchvision's ResNets."""

import copy

import pytest
import torch
from check import accurate
from torch import nn
from torch.nn.utils import parametrize

from hybridops import backend, explain, optimize, report, restore, verify
from hybridops.optimize import Fast
from hybridops.optimize.gates import make_live

HYBRIDS = ("vit_tiny_r_s16_p8_224", "vit_small_r26_s32_224", "vit_small_resnet26d_224")
NAMES = (*HYBRIDS, "vit_base_mci_224", "resnet18d", "torchvision")


def build(timm, name):
    """A real model whose every branch counts: a fresh ResNet's end in BatchNorm weights of 0."""
    torch.manual_seed(0)
    if name == "torchvision":
        model = pytest.importorskip("torchvision").models.resnet18()
    else:
        options = {"img_size": 64, "depth": 1} if name.startswith("vit") else {}
        model = timm.create_model(name, **options)
    make_live(model, images(2))
    return model


def images(batch=1):
    return torch.randn(batch, 3, 64, 64)


@pytest.mark.parametrize("name", NAMES)
def test_every_replaced_layer_is_as_exact_as_torch(timm, name):
    result = verify(optimize(build(timm, name)), images())
    assert result.ok, str(result)


@pytest.mark.parametrize("name", ["vit_small_r26_s32_224", "resnet18d"])
def test_bfloat16(timm, name):
    result = verify(optimize(build(timm, name).bfloat16()), images().bfloat16())
    assert result.ok, str(result)


def test_an_activation_used_twice_is_applied_twice(timm):
    """children() names it once."""
    resnet = build(timm, "resnet18d")
    resnet.conv1[5] = resnet.conv1[2]
    xcit = timm.create_model("xcit_nano_12_p16_224", img_size=64, depth=1).eval()
    chain = xcit.patch_embed.proj
    for i, layer in enumerate(chain):
        if type(layer) is nn.GELU:
            chain[i] = chain[1]
    for model in (resnet, xcit):
        result = verify(optimize(model), images())
        assert result.ok, str(result)


@pytest.mark.models
def test_vit_base_r50(timm):
    model = timm.create_model("vit_base_r50_s16_224", img_size=64).eval()
    assert verify(optimize(model), images()).ok


@pytest.mark.parametrize("name", NAMES)
def test_restore_is_bit_exact_and_training_is_untouched(timm, name):
    model = build(timm, name)
    x, keys = images(2), list(model.state_dict())
    with torch.no_grad():
        before = model(x)
        y = optimize(model)(x)
        assert not torch.equal(y, before)  # something did run otherwise
        torch.testing.assert_close(y, before, rtol=1e-3, atol=1e-4)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(restore(model)(x), before)
    twin = copy.deepcopy(model).train()
    exact = copy.deepcopy(twin).double()
    optimize(model).train()
    for m in (twin, model, exact):
        torch.manual_seed(1)
        m(x.double() if m is exact else x).square().sum().backward()
    grads = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, twin, exact)]
    accurate(*grads, f"{name}: gradients", factor=3)


def test_gradients_in_eval_mode(timm):
    model = build(timm, "vit_tiny_r_s16_p8_224")
    twin, x = copy.deepcopy(model), images()
    for m in (twin, optimize(model)):
        m(x).sum().backward()
    conv, other = model.patch_embed.backbone.conv, twin.patch_embed.backbone.conv
    scale = float(other.weight.grad.abs().max())
    torch.testing.assert_close(conv.weight.grad, other.weight.grad, rtol=1e-3, atol=1e-4 * scale)


def reason(model, fqn):
    return next(layer.reason for layer in report(optimize(model)).layers if layer.fqn == fqn)


def test_what_is_left_alone_says_why(timm):
    hooked = build(timm, "resnet18d")
    hooked.layer1[0].conv2.register_forward_hook(lambda *_: None)
    assert "layer1.0.conv2 is hooked" in reason(hooked, "layer1.0")

    odd = build(timm, "resnet18d")
    odd.layer2[0].act2 = nn.Tanh()
    assert "Tanh has no kernel" in reason(odd, "layer2.0")
    odd.layer3[0].bn1 = nn.InstanceNorm2d(256)
    assert "InstanceNorm2d" in reason(restore(odd), "layer3.0")
    parametrised = build(timm, "resnet18d")
    parametrize.register_parametrization(parametrised.layer1[1].conv1, "weight", nn.Identity())
    assert "no kernel" in reason(parametrised, "layer1.1") or "parametrised" in reason(
        parametrised, "layer1.1"
    )
    attention = timm.create_model("seresnet18" if timm.is_model("seresnet18") else "seresnet50")
    assert "attention layer" in reason(attention.eval(), "layer1.0")


def test_hooks_and_changes_after_optimize_are_followed(timm):
    model, x = optimize(build(timm, "resnet18d")), images()
    with torch.no_grad():
        first = model(x)
        seen = []
        handle = model.layer1[0].bn1.register_forward_hook(lambda *_: seen.append(1))
        model(x)
        assert seen
        handle.remove()
        model.layer1[0].bn1.running_mean.add_(1)
        model.layer2[0].conv1.weight.mul_(2)
        changed = model(x)
        assert not torch.allclose(changed, first)
        torch.testing.assert_close(restore(model)(x), changed, rtol=1e-3, atol=1e-4)


def test_the_pool_behind_a_stem(timm):
    """One kernel with the stem, until it has a hook or is another module."""
    model, x = optimize(build(timm, "resnet18")), images()
    seen = []
    with torch.no_grad():
        restored = restore(copy.deepcopy(model))
        torch.testing.assert_close(model(x), restored(x), rtol=1e-3, atol=1e-4)
        with torch.profiler.profile() as profile:
            model(x)
        assert backend.ISA is None or any("conv_stem" in e.key for e in profile.key_averages())
        handle = model.maxpool.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(model(x), restored(x), rtol=1e-3, atol=1e-4)
        assert seen == [1]
        handle.remove()
        model.maxpool = restored.maxpool = nn.AvgPool2d(3, 2, 1)
        torch.testing.assert_close(model(x), restored(x), rtol=1e-3, atol=1e-4)


def test_one_layer_in_two_blocks(timm):
    """Folded for each use by itself: the weight stays what it is."""
    model, x = build(timm, "resnet18d"), images()
    model.layer1[1].conv1 = model.layer1[0].conv1
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(optimize(model)(x), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", HYBRIDS[:2])
def test_compiles_as_one_graph(timm, name):
    model, x = optimize(build(timm, name)), images()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-4)


def test_explain_names_every_hot_layer():
    layers = explain("timm:vit_small_r26_s32_224").layers
    left = {layer.fqn: layer.reason for layer in layers if layer.rule is None}
    assert list(left) == ["head"]
    assert left["head"].startswith("by itself")
    names = {layer.fqn for layer in layers}
    assert {f"patch_embed.backbone.stages.{i}.blocks.1" for i in range(4)} <= names


def test_bodies_stay_channels_last(timm):
    model = optimize(build(timm, "vit_small_r26_s32_224"))
    seen = []
    model.patch_embed.backbone.stages[2].register_forward_hook(lambda m, a, y: seen.append(y))
    with torch.no_grad():
        model(images(2))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert isinstance(model.patch_embed.backbone.stages[2].blocks[0], Fast)


IN_PIECES = ("vit_small_r26_s32_224", "resnet18d", "torchvision")


@pytest.fixture
def pieces(monkeypatch):
    """Bodies take two images of 64 x 64 at most; gives the sizes of all pieces that were made."""
    from hybridops.nn import _pieces

    sizes, cat = [], torch.cat

    def concatenate(tensors, *args, **kwargs):
        sizes.extend(len(t) for t in tensors if t.ndim == 4)
        return cat(tensors, *args, **kwargs)

    monkeypatch.setattr(_pieces, "_LARGEST", 2 * 16 * 64 * 64 * 4)
    monkeypatch.setattr(torch, "cat", concatenate)
    return sizes


@pytest.mark.parametrize("name", IN_PIECES)
def test_a_batch_in_pieces(timm, name, pieces):
    model, x = optimize(build(timm, name)), images(5)
    with torch.inference_mode():
        y = model(x)
        assert pieces == [2, 2, 1]
        apart = torch.cat([model(some) for some in x.tensor_split(3)])
    torch.testing.assert_close(y, apart, rtol=1e-5, atol=1e-5)  # behind the body all come at once


def test_a_wrong_rank_is_refused(timm, pieces):
    model = optimize(build(timm, "torchvision"))
    with torch.inference_mode(), pytest.raises(ValueError, match="must have 4 dimensions"):
        model(images(5)[0])


def test_our_own_bodies_take_pieces(pieces):
    from hybridops.models.hybrid_vit.backbones import BiT, ResNetD

    x = images(5)
    for body in (BiT((1, 1)).eval(), ResNetD((1, 1)).eval()):
        with torch.inference_mode():
            y = body(x)
            assert torch.equal(y, torch.cat([body(some) for some in x.tensor_split(3)]))
        assert pieces[:3] == [2, 2, 1]
        pieces.clear()
        body(x)  # records gradients
        norm = next(m for m in body.modules() if type(m) in (nn.GroupNorm, nn.BatchNorm2d))
        with torch.inference_mode():
            handle = norm.register_forward_hook(lambda *_: None)
            body(x)
            handle.remove()
            norm.train()
            body(x)
        assert pieces == []


@pytest.mark.parametrize("name", IN_PIECES)
def test_no_pieces_where_somebody_sees_them_or_images_meet(timm, name, pieces):
    model, x, seen = optimize(build(timm, name)), images(5), []
    net = model.patch_embed.backbone if name.startswith("vit") else model
    stage = net.stages[1] if name.startswith("vit") else net.layer2
    blocks = stage.blocks if name.startswith("vit") else stage
    with torch.no_grad():
        for watched in (stage, blocks[0], blocks[1].conv1):
            handle = watched.register_forward_hook(lambda _, args, y: seen.append(len(y)))
            model(x)
            handle.remove()
        assert seen == [5, 5, 5]
        blocks[0].train()
        model(x)
        blocks[0].eval()
        kept = blocks[1]
        channels = kept.conv1.in_channels
        blocks[1] = nn.BatchNorm2d(channels, track_running_stats=False).eval()
        model(x)
        blocks[1] = kept
        assert pieces == []
        model(x)
        assert pieces == [2, 2, 1]
    pieces.clear()
    model(x).sum().backward()
    assert pieces == []
