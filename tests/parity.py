"""What every rule is held to, on a small model of the real class: see `parity`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from check import accurate, rms, same_bits
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hybridops import optimize, report, restore, verify
from hybridops.optimize import Fast
from hybridops.optimize.gates import fit_statistics, randomise_gates
from hybridops.optimize.measure import ChannelsLast

KEY_BIASES = ("key.bias", "k_proj.bias", "projection_key.bias")


def wake(model: nn.Module, args: tuple[Any, ...]) -> nn.Module:
    """The model in eval mode, with gates, biases, tables and statistics of ordinary size."""
    model.eval()
    randomise_gates(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Flash's backward takes the rows' sums of dP * P from the output, so its dS sum to zero
            # but for rounding, which a part that all keys share carries into dq. torch's own flash
            # does so too; the softmax of models without it does not, and is no measure of that.
            if name.endswith(KEY_BIASES):
                parameter.mul_(0.1)
    fit_statistics(model, args, 0)
    model.train()
    return model.eval()  # transformers' LeViT returns nothing from train()


def parity(
    model: nn.Module,
    *args: Any,
    gradients: bool = True,
    check: bool = True,
    channels_last: bool = False,
) -> None:
    """optimize(model) means what the model did: outputs, state_dict, gradients, verify, restore.

    gradients: whether mode="train" serves a part of it. check: whether to run verify(), which
    calls the model with args alone. channels_last: rules run oneDNN's convolutions of that layout,
    so that torch's are measured in it too.
    """
    wake(model, args)
    plain = copy.deepcopy(model).train().eval()
    before, exact = run(model, args), run(copy.deepcopy(plain).double(), doubled(args))
    own = before
    if channels_last:
        with ChannelsLast():
            own = run(model, args)
    classes, attributes = look(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for options in ({}, {"fold": False}, *([{"mode": "train"}] if gradients else [])):
        optimize(model, **options)
        assert any(isinstance(m, Fast) for m in model.modules())
        for ours, torchs, y64 in zip(run(model, args), own, exact, strict=True):
            accurate(ours, torchs, y64, f"output, {options}")
        served = [m for m in model.modules() if isinstance(m, Fast)]
        assert all(m._hybridops_plan.settled() for m in served)  # a call sets nothing
        now = model.state_dict()
        assert list(now) == list(state)
        assert all(same_bits(v, state[k]) for k, v in now.items())
        if check and "fold" not in options:
            result = verify(model, args)
            assert result.ok, result
        if "mode" in options:
            _gradients(copy.deepcopy(model), copy.deepcopy(plain), args)
        restore(model.train().eval())
        assert look(model) == (classes, attributes)
        for ours, torchs in zip(run(model, args), before, strict=True):
            assert same_bits(ours, torchs)


def look(model: nn.Module) -> tuple[list[type], list[list[str]]]:
    modules = list(model.modules())
    return [type(m) for m in modules], [sorted(vars(m)) for m in modules]


def doubled(args: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, args)


@torch.no_grad()
def run(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    return leaves(model(*args))


def leaves(tree: Any) -> list[Tensor]:
    found = tree.to_tuple() if hasattr(tree, "to_tuple") else tree
    return [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point()]


def _gradients(fast: nn.Module, plain: nn.Module, args: tuple[Any, ...]) -> None:
    """Every parameter's gradient while training, against float64, three times torch's error."""
    dys = [torch.randn(y.shape) for y in run(fast, args)]

    def gradients(model, args):
        model.train()
        torch.manual_seed(0)
        ys = leaves(model(*args))
        sum((y * dy.to(y.dtype)).sum() for y, dy in zip(ys, dys, strict=True)).backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        return grads

    ours, torchs = gradients(fast, args), gradients(plain, args)
    exact = gradients(copy.deepcopy(plain).double(), doubled(args))
    assert [n for n, g in ours.items() if g is None] == [n for n, g in torchs.items() if g is None]
    largest = max(rms(g) for g in exact.values() if g is not None)
    # a gradient that is zero but for rounding has no relative error
    live = {n: g for n, g in exact.items() if g is not None and rms(g) > 1e-5 * largest}
    worst = max(_error(torchs[n], y64) for n, y64 in live.items())
    for name, y64 in live.items():  # a single one of torch's may be right by chance
        error = _error(ours[name], y64)
        assert error <= 3 * worst + 12 * torch.finfo(ours[name].dtype).eps, name


def _error(grad: Tensor, y64: Tensor) -> float:
    return ((grad.double() - y64).abs().max() / rms(y64)).item()


def reasons(model: nn.Module) -> dict[str, str | None]:
    """Of an optimized model's hot layers, why each was left alone; None for those replaced."""
    return {layer.fqn: layer.reason for layer in report(model).layers}
