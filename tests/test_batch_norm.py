"""BatchNorm that trains: as right as torch's, running statistics included."""

from __future__ import annotations

import copy

import pytest
import torch
from check import accurate, rms, same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import hybridops as ho
from hybridops.nn._fusion import norm_batch
from hybridops.nn.conv_stem import ConvStem
from hybridops.ops import batch_norm, group_norm, linear

CASES = [  # shape, activation, mean
    ((2, 57, 16), "hardswish", 0.0),
    ((300, 24), "none", 30.0),
    ((3, 5, 37), "relu", 0.0),
    ((2, 9), "silu", 0.0),
    ((4, 70, 256), "gelu", 0.0),
]


def graded(call, tensors, dy):
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    y = call(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(t.grad for t in leaves if t is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "mixed"], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_right_as_torch(case, dtype, cpu_library, nan_filled):
    shape, activation, mean = case
    torch.manual_seed(0)
    narrow = torch.bfloat16 if dtype == "mixed" else dtype
    x, dy = (torch.randn(shape) + mean).to(narrow), torch.randn(shape).to(narrow)
    dtype = torch.float32 if dtype == "mixed" else dtype
    vectors = [(torch.rand(shape[-1]) + 0.5).to(dtype), torch.randn(shape[-1]).to(dtype)]
    vectors = [None, None] if activation == "none" else vectors

    def run(backend, wide=False):
        with ho.use(backend):
            tensors = [t.double() if wide and t is not None else t for t in (x, *vectors)]
            return graded(lambda *t: batch_norm(*t, 1e-5, activation=activation)[0], tensors, dy)

    ours, torchs, exact = run("cpu"), run("reference"), run("reference", True)
    for i, (a, b, c) in enumerate(zip(ours, torchs, exact, strict=True)):
        factor, scale = (2, 0.0) if i == 0 else (3, rms(dy.double()))
        accurate(a, b, c, f"{case} {['y', 'x', 'weight', 'bias'][i]}", factor, scale)
    assert all(map(same_bits, ours, run("cpu")))


def test_does_not_depend_on_threads(cpu_library):
    x, dy, threads = torch.randn(999, 40), torch.randn(999, 40), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(graded(lambda t: batch_norm(t, activation="relu")[0], [x], dy))
    finally:
        torch.set_num_threads(threads)
    assert all(map(same_bits, *found))


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("affine", [False, True])
def test_running_statistics_move_as_torchs(momentum, affine, cpu_library):
    plain = nn.BatchNorm1d(6, momentum=momentum, affine=affine).double()
    ours = copy.deepcopy(plain).float()
    for _ in range(3):
        x = (torch.randn(2, 6, 5) * 3 + 1).transpose(1, 2)  # strided, as channels_last is
        expected = plain(x.double().flatten(0, 1)).view(x.shape).relu()
        assert torch.allclose(norm_batch(ours, x, "relu").double(), expected, atol=1e-5)
    for name, value in ours.state_dict().items():
        assert torch.allclose(value.double(), plain.state_dict()[name].double(), rtol=1e-6), name
    assert ours.num_batches_tracked == 3


def hooked(norm):
    norm.register_forward_hook(lambda module, args, y: y * 2)
    return norm


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4).eval(), nn.SyncBatchNorm(4), hooked(nn.BatchNorm1d(4))], ids=str
)
def test_what_the_op_is_not_for_is_torchs(norm, cpu_library, monkeypatch):
    monkeypatch.setattr(ho.ops, "batch_norm", None)
    x, twin = torch.randn(3, 4), copy.deepcopy(norm)
    assert same_bits(norm_batch(norm, x), twin(x))
    assert all(map(same_bits, norm.state_dict().values(), twin.state_dict().values()))


def test_too_few_rows_are_torchs(cpu_library):
    norm, twin = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    for call in (lambda x: norm_batch(norm, x), twin):
        with pytest.raises(ValueError, match="more than 1 value"):
            call(torch.randn(1, 4))
    x = torch.empty(0, 4)
    assert same_bits(norm_batch(norm, x), twin(x))
    assert all(map(same_bits, norm.state_dict().values(), twin.state_dict().values()))


def test_without_running_statistics_and_with_nan(cpu_library):
    norm, x = nn.BatchNorm1d(4, track_running_stats=False), torch.randn(7, 4)
    y = norm(x)
    for module in (norm, norm.eval()):  # the batch's in eval mode too
        assert torch.allclose(norm_batch(module, x), y, atol=1e-6)
    x[3, 1] = float("nan")
    ours, twin = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    assert torch.allclose(norm_batch(ours, x, "relu"), twin(x).relu(), atol=1e-6, equal_nan=True)
    assert torch.allclose(ours.running_var, twin.running_var, equal_nan=True)


def test_reference_and_compiled(cpu_library):
    x = torch.randn(2, 5, 4)
    found = []
    for call in (norm_batch, torch.compile(norm_batch, backend="aot_eager", fullgraph=True)):
        norm = nn.BatchNorm1d(4)
        leaf = x.clone().requires_grad_()
        y = call(norm, leaf, "relu")
        y.square().sum().backward()
        found.append([y, leaf.grad, norm.running_mean, norm.running_var, norm.weight.grad])
    assert all(map(same_bits, *found))
    norm, twin = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    with ho.use("reference"):
        assert same_bits(norm_batch(norm, x), twin(x.flatten(0, 1)).view(x.shape))
        y, mean, var = batch_norm(x)
    assert y.shape == x.shape
    assert mean.shape == var.shape == (4,)


def test_counts_what_it_cannot_serve(cpu_library):
    ho.backend.fallbacks.clear()
    batch_norm(torch.randn(3, 4, dtype=torch.float64))
    batch_norm(torch.randn(3, 4))
    assert [op for op, _ in ho.backend.fallbacks.elements()] == ["batch_norm"]


def test_a_stem_trains_as_torchs(cpu_library):
    stem = ConvStem(3, (8, 16), last_act=True)
    plain = copy.deepcopy(stem)
    x = torch.randn(2, 3, 17, 20)
    y = stem(x)
    with ho.use("reference"):
        z = plain(x)
    assert torch.allclose(y, z, atol=1e-5)
    dy = torch.randn_like(y)
    y.backward(dy)
    z.backward(dy)
    for ours, torchs in zip(stem.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, torchs.grad, atol=1e-4)
    assert torch.allclose(stem.conv2.bn.running_var, plain.conv2.bn.running_var, atol=1e-5)


def test_autocast_and_checkpoint(cpu_library):
    norm, x = nn.BatchNorm1d(8), torch.randn(4, 6, 8, requires_grad=True)
    weight = torch.randn(8, 8, requires_grad=True)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return norm_batch(norm, linear(x, weight, activation="relu"), "hardswish")

    y = run(x)
    assert y.dtype == torch.bfloat16
    dy = torch.randn(y.shape).bfloat16()
    direct = torch.autograd.grad(y, (x, weight, norm.weight), dy)
    again = checkpoint(run, x, use_reentrant=False)
    found = torch.autograd.grad(again, (x, weight, norm.weight), dy)
    assert all(map(same_bits, direct, found))


def test_second_derivative_is_refused(cpu_library):
    x = torch.randn(5, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(batch_norm(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_opcheck(cpu_library):
    x, v = torch.randn(6, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    torch.library.opcheck(torch.ops.hybridops.batch_norm.default, (x, v, v, 1e-5, 5))


def test_refuses_what_does_not_fit():
    x, v = torch.randn(4, 3), torch.randn(3)
    for error, call in (
        (ValueError, lambda: batch_norm(x[:1])),
        (ValueError, lambda: batch_norm(x[0])),
        (ValueError, lambda: batch_norm(x, v[:2])),
        (TypeError, lambda: batch_norm(x, v.double())),
        (ValueError, lambda: batch_norm(x, v, v, float("nan"))),
        (ValueError, lambda: batch_norm(x, activation="tanh")),
        (TypeError, lambda: batch_norm(x.long())),
    ):
        with pytest.raises(error, match="batch_norm"):
            call()


@pytest.mark.parametrize("value", [0.3, -1e4 / 3, 7e-9])
@pytest.mark.parametrize("n", [1, 8, 197, 768, 3001])
def test_what_is_constant_becomes_the_bias(value, n, cpu_library):
    """Of every norm: a difference that rounding left would be multiplied by 1 / sqrt(eps)."""
    rows, pixels = torch.full((5, n), value), torch.full((2, 8, n, 3), value)
    scale, shift = torch.randn(n), torch.randn(n)
    of_group, of_batch = (torch.randn(8), torch.randn(8)), (torch.randn(n), torch.randn(n))
    with torch.inference_mode():
        y = linear(rows, torch.eye(n), norm=(scale, shift, 1e-6))
        assert torch.equal(y, shift.expand(5, n))
        y = group_norm(pixels, 4, *of_group, eps=1e-6)
        assert torch.equal(y, of_group[1][:, None, None].expand_as(y))
        y, *_ = batch_norm(rows, *of_batch, 1e-6)
        assert torch.equal(y, of_batch[1].expand_as(y))
