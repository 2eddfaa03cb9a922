"""optimize() and restore() on small models of timm's classes, gates awake."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import hybridops
from hybridops import NothingToOptimize, explain, optimize, report, restore
from hybridops.optimize import Fast
from hybridops.optimize.gates import fit_statistics, randomise_gates

NAMES = ("vit", "levit", "twins")


def build(timm, name: str, awake: bool = True, **kwargs) -> nn.Module:
    """A model of real timm classes, small; awake: gates and statistics randomised."""
    from timm.models import levit, twins, vision_transformer

    match name:
        case "vit":
            options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
            options |= {"init_values": 1e-5, "num_classes": 10}
            model = vision_transformer.VisionTransformer(**options | kwargs)
        case "levit" | "levit_conv":
            options = {"img_size": 64, "embed_dim": (32, 48, 64), "key_dim": 16}
            options |= {"depth": (1, 2, 1), "num_heads": (2, 3, 4), "num_classes": 10}
            options |= {"use_conv": name == "levit_conv"}
            model = levit.LevitDistilled(**options | kwargs)
        case _:
            options = {"img_size": 64, "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 2, 2)}
            options |= {"depths": (2, 2, 2, 2), "sr_ratios": (4, 2, 2, 1), "wss": (4, 4, 3, 2)}
            model = twins.Twins(**options | {"num_classes": 10} | kwargs)
    model.eval()
    if awake:
        randomise_gates(model, 0)
        fit_statistics(model, (image(model),), 0)
        model.train().eval()  # drops the biases that LeViT cached
    return model


def image(model: nn.Module, batch: int = 2) -> torch.Tensor:
    side = 32 if hasattr(model, "cls_token") else 64
    return torch.randn(batch, 3, side, side)


def error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y.double() - reference).abs().max() / reference.square().mean().sqrt()).item()


def assert_close(ours, torchs, reference, factor: float = 2.0) -> None:
    """The acceptance rule of tests/check.py."""
    allowed = factor * error(torchs, reference) + 4 * torch.finfo(ours.dtype).eps
    assert ours.dtype == torchs.dtype
    assert error(ours, reference) <= allowed


@torch.no_grad()
def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


@pytest.mark.parametrize("name", [*NAMES, "levit_conv"])
@pytest.mark.parametrize("options", [{}, {"fold": False}, {"mode": "train"}], ids=str)
def test_same_results_and_state_dict(timm, name, options):
    model = build(timm, name)
    x = image(model)
    before, keys = run(model, x), list(model.state_dict())
    values = {k: v.clone() for k, v in model.state_dict().items()}
    exact = run(copy.deepcopy(model).double(), x.double())
    if name == "levit_conv" and "mode" in options:
        with pytest.raises(NothingToOptimize):  # in NCHW only the stem and what is folded gain
            optimize(model, **options, exclude=("head*", "stem*"))
        optimize(model, **options, exclude="head*")
        assert [n for n, m in model.named_modules() if isinstance(m, Fast)] == ["stem"]
        assert_close(run(model, x), before, exact)
        return
    assert optimize(model, **options) is model
    assert_close(run(model, x), before, exact)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    model.load_state_dict(values, strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(timm, name):
    model = build(timm, name)
    x = image(model)
    exact = run(copy.deepcopy(model).bfloat16().double(), x.bfloat16().double())
    half = model.bfloat16()
    before = run(half, x.bfloat16())
    assert_close(run(optimize(half), x.bfloat16()), before, exact)


@pytest.mark.parametrize("name", NAMES)
def test_restore_is_bit_exact(timm, name):
    model = build(timm, name)
    x = image(model)
    before = run(model, x)
    classes = [type(m) for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    optimize(model)
    assert [type(m) for m in model.modules()] != classes
    run(model, x)
    assert restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(run(model, x), before)
    first = run(optimize(model), x)
    restore(model)
    assert torch.equal(run(optimize(model), x), first)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_optimize_changes_nothing(timm, name):
    model = optimize(build(timm, name))
    x = image(model)
    classes, before = [type(m) for m in model.modules()], run(model, x)
    optimize(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(run(model, x), before)
    with pytest.raises(ValueError, match="restore"):
        optimize(model, mode="train")


def test_models_are_independent(timm):
    one, other = build(timm, "vit"), build(timm, "vit")
    optimize(one)
    assert not any(isinstance(m, Fast) for m in other.modules())
    optimize(other)
    restore(one)
    assert any(isinstance(m, Fast) for m in other.modules())


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(timm, name):
    model = optimize(build(timm, name))
    x = image(model)
    before = run(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin, type(model))
        assert torch.equal(run(twin, x), before)
        with torch.no_grad():
            next(iter(twin.parameters())).mul_(2)
        assert torch.equal(run(model, x), before)
        assert not any(isinstance(m, Fast) for m in restore(twin).modules())
    assert any(isinstance(m, Fast) for m in model.modules())


def change_by_step(model, x, fused=False):
    # The decay takes a quarter off: larger weights make scores at which rounding picks the winner.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=25, fused=fused)
    model.train()
    model(x).square().mean().backward()
    optimizer.step()
    model.eval()


def change_by_fused_step(model, x):  # which bumps no version by itself
    change_by_step(model, x, fused=True)


@torch.no_grad()
def change_in_place(model, x):
    for parameter in model.parameters():
        parameter.mul_(0.75)  # as change_by_step


def change_by_loading(model, x):
    state = {k: v * 0.75 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def change_by_assigning(model, x):
    state = {k: v * 0.75 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@torch.no_grad()
def change_data(model, x):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.75


@torch.no_grad()
def change_statistics(model, x):
    model.train()
    model(x * 3 + 1)
    model.eval()


CHANGES = (
    change_by_step,
    change_by_fused_step,
    change_in_place,
    change_by_loading,
    change_by_assigning,
    change_data,
    change_statistics,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_changed_weights_are_followed(timm, name, change):
    model = build(timm, name)
    x = image(model, 4)
    run(optimize(model), x)  # everything is folded and cached
    before = run(model, x)
    change(model, x)
    after = run(model, x)
    plain = restore(copy.deepcopy(model)).train().eval()
    if change is not change_statistics or name == "levit":
        assert not torch.allclose(after, before)
    assert_close(after, run(plain, x), run(copy.deepcopy(plain).double(), x.double()))


def test_dtype_and_mode_changes_are_followed(timm):
    model = build(timm, "levit")
    x = image(model)
    plain = copy.deepcopy(model)
    before = run(optimize(model), x)
    run(model.bfloat16(), x.bfloat16())
    model.float().load_state_dict(plain.state_dict())
    assert torch.equal(run(model, x), before)
    model.train()
    plain.train()
    torch.testing.assert_close(run(model, x), run(plain, x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(model.eval(), x), before)  # the statistics moved


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(timm, name, mode, training):
    plain = build(timm, name).train(training)
    x = image(plain, 4)
    fast = optimize(copy.deepcopy(plain), mode=mode)
    exact = copy.deepcopy(plain).double()
    weight = torch.randn(4, 10)

    def gradients(model, x):
        (model(x) * weight.to(x.dtype)).sum().backward()
        return {n: p.grad for n, p in model.named_parameters()}

    ours, torchs, best = gradients(fast, x), gradients(plain, x), gradients(exact, x.double())
    assert [n for n, g in ours.items() if g is None] == [n for n, g in torchs.items() if g is None]
    largest = max(g.abs().max() for g in best.values() if g is not None)
    # a gradient that is zero but for rounding has no relative error
    live = [n for n, g in best.items() if g is not None and g.abs().max() > 1e-5 * largest]
    assert len(live) > len(best) // 2
    allowed = 3 * max(error(torchs[n], best[n]) for n in live) + 12 * torch.finfo(x.dtype).eps
    assert max(error(ours[n], best[n]) for n in live) <= allowed


def test_dropout_alone_in_training_is_respected(timm):
    """Monte-Carlo dropout: the model in eval, its dropouts in training."""
    model = optimize(build(timm, "vit", proj_drop_rate=0.5, attn_drop_rate=0.5))
    x = image(model)
    assert torch.equal(run(model, x), run(model, x))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(run(model, x), run(model, x))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_as_exact_as_eager(timm, name):
    model = build(timm, name)
    x = image(model)
    exact = run(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        before = run(model, x)
        after = run(optimize(model), x)
    assert after.dtype == before.dtype
    assert error(after, exact) <= 2 * error(before, exact) + 4 * torch.finfo(torch.bfloat16).eps


def test_nothing_to_optimize():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(NothingToOptimize, match=r"Sequential.*hybridops.explain\(model\) names"):
        optimize(model)
    with pytest.warns(UserWarning, match="no rule serves"):
        assert optimize(model, strict=False) is model
    assert report(model).replaced == 0


def test_exclude_and_filter(timm):
    def now(**kwargs):
        model = optimize(build(timm, "vit"), **kwargs)
        return {fqn for fqn, m in model.named_modules() if isinstance(m, Fast)}

    everything = now()
    assert {"patch_embed", "blocks.0", "blocks.0.attn", "blocks.1.mlp"} <= everything
    apart = everything - {"blocks"}  # all blocks at once
    assert now(exclude="blocks.1*") == {n for n in apart if not n.startswith("blocks.1")}
    assert now(exclude=["blocks.0.attn"]) == apart - {"blocks.0", "blocks.0.attn"}
    assert now(exclude="*.fc1") == {"patch_embed", "blocks.0.attn", "blocks.1.attn"}
    assert now(filter_fn=lambda m, fqn: "mlp" in fqn) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert now(filter_fn=lambda m, fqn: fqn == "blocks.0") == {"blocks.0"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "fast"}, "mode must be one of"),
        ({"precision": "fast"}, "precision must be 'exact'"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"verify": True}, "needs example"),
        ({"exclude": ["head", "block.0"]}, "exclude='block.0' names no module.*close.* blocks.0"),
    ],
)
def test_bad_options(timm, options, match):
    with pytest.raises(ValueError, match=match):
        optimize(build(timm, "vit", awake=False), **options)


def test_bad_models():
    with pytest.raises(TypeError, match="nn.Module"):
        optimize("levit_256")
    with pytest.raises(ValueError, match="not optimized"):
        report(nn.Linear(2, 2))


def test_absent_backend_raises(timm):
    absent = next(b for b in ("triton", "cuda", "cpu") if b not in hybridops.backend.available())
    with pytest.raises(hybridops.BackendUnavailable):
        optimize(build(timm, "vit", awake=False), backend=absent)


def test_forced_backend_holds_while_the_model_runs(timm):
    model = build(timm, "vit")
    x = image(model)
    twin = copy.deepcopy(optimize(model, backend="reference"))
    seen = []
    handle = model.patch_embed.register_forward_hook(
        lambda *_: seen.append(hybridops.backend.reference_forced())
    )
    y = run(model, x)
    assert seen == [True]
    assert not hybridops.backend.reference_forced()
    with pytest.raises(AssertionError, match="doesn't match"):
        model(torch.randn(1, 3, 40, 32))
    assert not hybridops.backend.reference_forced()
    handle.remove()
    assert torch.equal(run(twin, x), y)
    restore(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_parts_keep_their_own_journal(timm):
    model = build(timm, "vit")
    x = image(model)
    before = run(model, x)
    optimize(model.blocks[0])
    optimize(model)
    assert report(model).replaced == 8
    restore(model.blocks[0])
    assert isinstance(model.blocks[1], Fast)
    restore(model)
    assert torch.equal(run(model, x), before)


def test_a_sequence_of_blocks_may_grow_shrink_and_be_sliced(timm):
    model = build(timm, "vit")
    x = torch.randn(2, 7, 48)
    with torch.no_grad():
        first, both = model.blocks[0](x), model.blocks(x)
        thrice = model.blocks[1](both)
        optimize(model)
        torch.testing.assert_close(model.blocks(x), both, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.blocks[:1](x), first, rtol=1e-4, atol=1e-5)
        model.blocks.append(model.blocks[1])
        torch.testing.assert_close(model.blocks(x), thrice, rtol=1e-4, atol=1e-5)
        del model.blocks[2], model.blocks[1]
        torch.testing.assert_close(model.blocks(x), first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_and_frozen_models(timm, name):
    model = build(timm, name).requires_grad_(False)
    x = image(model)
    before, exact = run(model, x), run(copy.deepcopy(model).double(), x.double())
    optimize(model)
    with torch.inference_mode():
        first, second = model(x), model(x)
    assert_close(first, before, exact)
    assert torch.equal(first, second)
    x.requires_grad_()
    assert model(x).sum().backward() is None
    assert x.grad is not None


def test_channels_last_images(timm):
    for name in (*NAMES, "levit_conv"):
        model = build(timm, name)
        x = image(model)
        exact = run(copy.deepcopy(model).double(), x.double())
        before = run(model, x)
        optimize(model)
        assert_close(run(model, x.contiguous(memory_format=torch.channels_last)), before, exact)


@pytest.mark.parametrize("name", ["levit_128s", "cpvt_tiny"])
def test_our_own_models(name):
    from hybridops import models

    kwargs = {"img_size": 64} if name.startswith("levit") else {}
    model = models.create_model(name, num_classes=10, **kwargs).eval()
    x = torch.randn(1, 3, 64, 64)
    randomise_gates(model, 0)
    fit_statistics(model, (x,), 0)
    before = run(model, x)
    exact = run(copy.deepcopy(model).double(), x.double())
    with hybridops.use("reference"):
        torchs = run(model, x)
    optimize(model)
    assert_close(run(model, x), torchs, exact)
    restore(model)
    assert torch.equal(run(model, x), before)
    assert explain(f"hybridops:{name}").replaced >= 1


@pytest.mark.parametrize("name", ["vit", "levit", "twins"])
def test_compile_fullgraph(timm, name):
    small = {"vit": {"depth": 1}, "levit": {"depth": (1, 0, 0)}, "twins": {}}[name]
    if name == "twins":
        small = {"depths": (2, 1, 1, 1)}
    model = optimize(build(timm, name, **small))
    x = image(model, 1)
    before = run(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x), before, rtol=1e-4, atol=1e-5)


def test_export(timm):
    model = optimize(build(timm, "vit", depth=1))
    x = image(model, 1)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("freeze", [True, False], ids=("frozen", "watched"))
def test_weights_made_in_inference_mode(timm, freeze):
    """They carry no version: a snapshot packs them once, and without one a warning says so."""
    if "cpu" not in hybridops.backend.available():
        pytest.skip("nothing packs without the C++ library")
    with torch.inference_mode():
        model = copy.deepcopy(build(timm, "levit"))
        x = image(model)
        expected = model(x)
        if freeze:
            optimize(model, freeze=True)
        else:
            with pytest.warns(UserWarning, match="made in inference mode carry no version"):
                optimize(model)
        assert_close(model(x), expected, copy.deepcopy(model).double()(x.double()))
        with torch.profiler.profile() as profile:
            model(x)
    packs = [e.count for e in profile.key_averages() if e.key == "hybridops::pack_linear"]
    assert bool(packs) != freeze
