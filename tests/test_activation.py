"""An activation by itself: the bits of the fused one, its gradient, and who takes it."""

from __future__ import annotations

import pytest
import torch
from check import accurate, same_bits
from torch.utils.checkpoint import checkpoint

import hybridops as ho
from hybridops import ops
from hybridops.ops._contract import ACTIVATION_NAMES

SHAPES = [(7, 37), (3, 5, 192), (1, 1), (0, 4), (9001,)]


@pytest.mark.parametrize("kind", ACTIVATION_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_right_as_torch(shape, dtype, kind, cpu_library, nan_filled):
    x, dy = (torch.randn(shape) * 3).to(dtype), torch.randn(shape).to(dtype)

    def run(backend, x):
        with ho.use(backend):
            leaf = x.clone().requires_grad_()
            y = ops.activation(leaf, kind)
            y.backward(dy.to(y.dtype))
        return y.detach(), leaf.grad

    ours, torchs, exact = run("cpu", x), run("reference", x), run("reference", x.double())
    for a, b, c in zip(ours, torchs, exact, strict=True):
        assert a.dtype == dtype
        assert a.shape == x.shape
        accurate(a, b, c, f"{kind} {shape}")


@pytest.mark.parametrize("kind", ACTIVATION_NAMES)
@pytest.mark.parametrize("columns", [5, 24, 200])
def test_has_the_bits_of_the_fused_one(kind, columns, cpu_library):
    x, weight, bias = torch.randn(50, 30) * 4, torch.randn(columns, 30), torch.randn(columns)
    x[3] = torch.tensor([-0.0, 0.0, float("inf")]).repeat(10)
    x[4, 2] = float("nan")
    fused = ops.linear(x, weight, bias, activation=kind)
    assert same_bits(ops.activation(ops.linear(x, weight, bias), kind), fused)


def test_corners_and_strides(cpu_library):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -30.0, 1e-40])
    y = ops.activation(x, "gelu")
    assert y[0].isnan()
    assert y[1] == float("inf")
    assert (y[3:6] == 0).all()
    wide = torch.randn(40, 30)
    assert same_bits(
        ops.activation(wide.t()[3:, ::2], "silu"),
        ops.activation(wide.t()[3:, ::2].contiguous(), "silu"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_ends_where_a_number_is_its_own(dtype, cpu_library):
    x = torch.linspace(5.7, 6.0, 200).to(dtype)
    x = torch.cat([x, torch.tensor([20, 3e4, 1e30, torch.finfo(dtype).max], dtype=dtype)])
    assert same_bits(ops.activation(x, "gelu"), x)
    assert (ops.activation(-x, "gelu") == 0).all()


@pytest.mark.parametrize("op", ["linear", "attention"])
@pytest.mark.parametrize("kind", ["relu", "gelu", "hardswish"])
def test_a_layer_that_records_keeps_its_product(kind, op, cpu_library):
    """So that its gradient does not compute it again, with the numbers of one that records none."""
    up, x = torch.nn.Linear(24, 40), torch.randn(2, 9, 24)
    seen = []

    def run(x):
        if op == "linear":
            y = ops.linear(x, up.weight, up.bias, activation=kind)
        else:
            q = ops.linear(x, up.weight, up.bias).view(2, 9, 4, 10)
            y = ops.attention(q, q, q, activation=kind)
        seen.append(y.grad_fn and y.grad_fn.name())
        return y

    with torch.no_grad():
        fused = run(x)
    apart = run(x)
    assert same_bits(fused, apart.detach())
    assert seen[0] is None
    assert ("Relu" if kind == "relu" else "activation") in seen[1]
    apart.square().sum().backward()
    kept = up.weight.grad.clone()
    up.weight.grad = None
    checkpoint(run, x.clone().requires_grad_(), use_reentrant=True).square().sum().backward()
    assert same_bits(up.weight.grad, kept)


def test_bad_input():
    with pytest.raises(ValueError, match="must be one of none, relu"):
        ops.activation(torch.randn(3), "swish")
    with pytest.raises(TypeError, match="must be a Tensor, got list"):
        ops.activation([1.0], "relu")
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        ops.activation(torch.arange(3), "relu")


def test_opcheck(cpu_library):
    x = torch.randn(3, 10, requires_grad=True)
    torch.library.opcheck(torch.ops.hybridops.activation.default, (x, 2))
