"""Convolution bodies: oneDNN's packed convolution and group_norm are as right as torch's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from check import accurate, same_bits
from torch import nn

import hybridops as ho
from hybridops import backend
from hybridops.nn.conv import Conv, conv_of, folded_conv
from hybridops.ops import group_norm

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
#        B, Ci, Co, k, stride, padding, dilation, groups, H, W
CONVS = [
    (1, 16, 40, 1, 1, (0, 0), 1, 1, 7, 7),
    (2, 16, 24, 3, 1, (1, 1), 1, 1, 9, 5),
    (1, 16, 16, 3, 2, (1, 0), 1, 1, 8, 11),
    (2, 16, 24, 3, 1, (2, 2), 2, 1, 9, 9),
    (1, 16, 32, 3, 1, (1, 1), 1, 4, 6, 7),
    (1, 3, 13, 7, 2, "SAME", 1, 1, 15, 22),
    (1, 8, 8, 3, 2, "SAME", 1, 1, 8, 8),
]


def conv_case(shape, dtype):
    B, Ci, Co, k, stride, padding, dilation, groups, H, W = shape
    x = torch.randn(B, Ci, H, W).to(dtype)
    weight = (torch.randn(Co, Ci // groups, k, k) * (Ci // groups * k * k) ** -0.5).to(dtype)
    geometry = ((stride, stride), padding, (dilation, dilation), groups)
    return x, weight, torch.randn(Co).to(dtype), geometry


def plain(x, weight, bias, geometry, activation, residual):
    """What Conv means, by torch alone."""
    with ho.use("reference"):
        return Conv(weight, bias, *geometry)(x, activation, residual)


@DTYPES
@pytest.mark.parametrize("shape", CONVS, ids=str)
@pytest.mark.parametrize(
    ("activation", "with_residual"),
    [("none", False), ("relu", True), ("gelu", False), ("gelu_tanh", False), ("silu", True)],
)
def test_conv_is_as_right_as_torch(shape, dtype, activation, with_residual):
    x, weight, bias, geometry = conv_case(shape, dtype)
    conv = Conv(weight, bias, *geometry)
    with torch.inference_mode():
        residual = torch.randn_like(conv(x)) if with_residual else None
        ours = conv(x, activation, residual)
        torchs = plain(x, weight, bias, geometry, activation, residual)
        wide = None if residual is None else residual.double()
        exact = plain(x.double(), weight.double(), bias.double(), geometry, activation, wide)
        assert same_bits(ours, conv(x, activation, residual))
    accurate(ours, torchs, exact, f"conv {shape}")


POOLED = [
    CONVS[0],
    CONVS[5],
    (2, 3, 24, 7, 2, (3, 2), 1, 1, 40, 33),
    (1, 4, 9, 3, 1, (0, 0), 1, 1, 9, 9),
]
POOLED += [(1, 3, 8, 3, 1, (2, 2), 2, 1, 12, 9), (1, 3, 9, 3, 1, (1, 1), 1, 3, 9, 9)]


@DTYPES
@pytest.mark.parametrize("shape", POOLED, ids=str)
def test_a_convolution_with_the_pool_behind_it(shape, dtype):
    """Whether one kernel serves both or not."""
    x, weight, bias, geometry = conv_case(shape, dtype)
    pool, conv = nn.MaxPool2d(3, 2, 1), Conv(weight, bias, *geometry)
    with torch.inference_mode():
        ours = conv.pooled(x, "relu", pool)
        torchs = pool(plain(x, weight, bias, geometry, "relu", None))
        wide = plain(x.double(), weight.double(), bias.double(), geometry, "relu", None)
        assert same_bits(ours, conv.pooled(x, "relu", pool))
    accurate(ours, torchs, pool(wide), f"pooled {shape}")


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.MaxPool2d((2, 3), 2),
        nn.MaxPool2d(3, 2, dilation=2),
        nn.MaxPool2d(2, 1),
    ],
    ids=str,
)
def test_pools_of_every_kind_behind_a_convolution(pool):
    x, weight = torch.randn(1, 3, 20, 24), torch.randn(16, 3, 3, 3)
    conv = Conv(weight)
    with torch.inference_mode():
        expected = pool(conv(x))
        torch.testing.assert_close(conv.pooled(x, "none", pool), expected, rtol=1e-5, atol=1e-5)


def test_a_pool_that_torch_refuses_is_refused():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="pad should be at most half"):
        Conv(torch.randn(8, 3, 3, 3)).pooled(torch.randn(1, 3, 9, 9), "relu", nn.MaxPool2d(2, 2, 2))


def test_same_padding_is_tensorflows(timm):
    from timm.layers.padding import pad_same

    from hybridops.nn.conv import same_pad

    for size, kernel, stride in [(8, 3, 2), (9, 3, 2), (224, 7, 2), (5, 1, 2), (7, 2, 3)]:
        x = torch.randn(1, 1, size, size + 1)
        sides = (kernel, kernel), (stride, stride)
        assert torch.equal(same_pad(x, *sides), pad_same(x, *sides))


@pytest.mark.parametrize("kernel", [1, 3])
def test_what_does_not_fit_is_refused_in_torchs_words(kernel):
    conv = Conv(torch.randn(16, 8, kernel, kernel))
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="to have 8 channels, but got 9"):
            conv(torch.randn(2, 9, 8, 8))
        with pytest.raises(RuntimeError, match="rank 4"):  # as a norm folded into it would
            conv(torch.randn(8, 8, 8))
        if kernel == 3:
            for padding in ((0, 0), (1, 0)):
                with pytest.raises(RuntimeError, match="greater than actual input size"):
                    Conv(torch.randn(64, 64, 3, 3), padding=padding)(torch.randn(2, 64, 9, 2))


def test_tokens_are_a_view():
    y = Conv(torch.randn(8, 16, 1, 1))(torch.randn(2, 16, 7, 7))
    tokens = y.flatten(2).transpose(1, 2)
    assert tokens.is_contiguous()
    assert tokens.data_ptr() == y.data_ptr()


def test_packed_only_where_nothing_is_recorded():
    x = torch.randn(1, 16, 7, 7)
    conv, weight = nn.Conv2d(16, 8, 3, padding=1), torch.randn(8, 16, 3, 3)
    body = folded_conv(conv)  # its weight wants gradients
    y = body(x)
    y.sum().backward()
    assert conv.weight.grad is not None
    assert not body._packings
    frozen = Conv(weight)
    grad = x.clone().requires_grad_()
    frozen(grad).sum().backward()
    assert grad.grad is not None
    assert not frozen._packings
    with ho.use("reference"):
        frozen(x)
    with torch.backends.mkldnn.flags(enabled=False):
        frozen(x)
    assert not frozen._packings
    frozen(x.double().float())
    assert len(frozen._packings) == 1
    frozen(x[:0])  # nothing to compute
    for side in (8, 9, 10):
        assert torch.allclose(
            frozen(x[..., :6, :side]), F.conv2d(x[..., :6, :side], weight), atol=1e-5
        )
    assert len(frozen._packings) == 2
    assert torch.allclose(
        torch.compile(frozen, fullgraph=True, backend="eager")(x), frozen(x), atol=1e-5
    )


def test_folded_copies_follow_their_sources():
    conv, norm = nn.Conv2d(16, 8, 3, bias=False).eval(), nn.BatchNorm2d(8).eval()
    owner, x = nn.Module(), torch.randn(1, 16, 5, 5)
    with torch.no_grad():
        first = conv_of(owner, "conv", conv, norm)
        assert conv_of(owner, "conv", conv, norm) is first
        norm.running_mean.add_(1)
        conv.weight.mul_(2)
        y = conv_of(owner, "conv", conv, norm)(x, "relu")
        assert torch.allclose(y, norm(conv(x)).relu(), atol=1e-5)
        assert not copy.deepcopy(owner).__dict__["_hybridops_derived"]


GROUP_NORMS = [  # B, C, groups, H, W
    (1, 64, 32, 7, 9),
    (2, 96, 32, 14, 14),
    (3, 37, 1, 5, 3),
    (1, 24, 8, 1, 1),
    (1, 512, 32, 20, 20),
    (0, 8, 2, 3, 3),
]


@DTYPES
@pytest.mark.parametrize("shape", GROUP_NORMS, ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_group_norm_is_as_right_as_torch(shape, dtype, affine, mean, cpu_library, nan_filled):
    B, C, groups, H, W = shape
    x = (torch.randn(B, C, H, W) + mean).to(dtype)
    residual = torch.randn(B, H, W, C).to(dtype).permute(0, 3, 1, 2) if affine else None
    vectors = (torch.randn(C).to(dtype), torch.randn(C).to(dtype)) if affine else (None, None)
    options = {"activation": "relu" if affine else "none"}

    def run(wide, backend):
        def as_wide(t):
            return t.double() if wide and t is not None else t

        with ho.use(backend):
            return group_norm(
                as_wide(x),
                groups,
                *map(as_wide, vectors),
                residual=as_wide(residual),
                **options,
            )

    with torch.inference_mode():
        ours, torchs, exact = run(False, "cpu"), run(False, "reference"), run(True, "reference")
        assert same_bits(ours, run(False, "cpu"))
    accurate(ours, torchs, exact, f"group_norm {shape}")


def test_group_norm_in_place(cpu_library):
    x, residual = torch.randn(2, 2, 64, 9, 7).unbind()
    x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    given = (32, torch.randn(64), torch.randn(64))
    with torch.inference_mode():
        apart = group_norm(x, *given, activation="relu", residual=residual)
        kept = x.clone()
        assert not same_bits(apart, kept)
        within = group_norm(x, *given, activation="relu", residual=residual, overwrite=True)
    assert same_bits(within, apart)
    assert within.data_ptr() == x.data_ptr() != apart.data_ptr()


def test_group_norm_does_not_depend_on_threads(cpu_library):
    x, threads = torch.randn(2, 64, 30, 30), torch.get_num_threads()
    with torch.inference_mode():
        try:
            torch.set_num_threads(1)
            one = group_norm(x, 32)
            torch.set_num_threads(2)
            assert same_bits(one, group_norm(x, 32))
        finally:
            torch.set_num_threads(threads)


def test_group_norm_trains_as_torch():
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    y = group_norm(x, 4, weight, None, residual=x, activation="relu")
    ours = torch.autograd.grad(y.square().sum(), (x, weight))
    z = (F.group_norm(x, 4, weight) + x).relu()
    torchs = torch.autograd.grad(z.square().sum(), (x, weight))
    assert all(map(torch.equal, ours, torchs))


@pytest.mark.parametrize("grad", [False, True])
def test_group_norm_refuses_what_does_not_fit(grad):
    x, v = torch.randn(2, 8, 3, 3), torch.randn(8)
    with torch.set_grad_enabled(grad):
        for error, call in (
            (ValueError, lambda: group_norm(x, 3)),
            (ValueError, lambda: group_norm(x[0], 2)),
            (ValueError, lambda: group_norm(x, 2, v[:7])),
            (TypeError, lambda: group_norm(x, 2, v.double())),
            (ValueError, lambda: group_norm(x, 2, v, v, float("nan"))),
            (ValueError, lambda: group_norm(x, 2, activation="tanh")),
            (ValueError, lambda: group_norm(x, 2, residual=x[:1])),
            (TypeError, lambda: group_norm(x, 2, residual=x.bfloat16())),
            (TypeError, lambda: group_norm(x.long(), 2)),
        ):
            with pytest.raises(error, match="group_norm"):
                call()


def test_group_norm_opcheck(cpu_library):
    x = torch.randn(2, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    v = torch.randn(8)
    torch.library.opcheck(torch.ops.hybridops.group_norm.default, (x, 4, v, v, 1e-5, 1, x))
    more = torch.randn_like(x)
    torch.library.opcheck(torch.ops.hybridops.group_norm_.default, (x, 4, v, v, 1e-5, 1, more))


def test_group_norm_counts_what_it_cannot_serve():
    with torch.no_grad():
        before = backend.fallbacks.total()
        group_norm(torch.randn(1, 4, 2, 2, dtype=torch.float64), 2)
    assert backend.fallbacks.total() == before + 1
