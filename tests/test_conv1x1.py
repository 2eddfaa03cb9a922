"""The 1 x 1 convolution, and a GroupNorm behind it: as right as torch's own, for any size."""

import pytest
import torch
import torch.nn.functional as F
from check import accurate, same_bits
from torch import nn

import hybridops as ho
from hybridops import backend
from hybridops.nn.conv import Conv
from hybridops.nn.conv_body import conv_norm
from hybridops.ops import conv1x1, pack_conv1x1

#          B, C, N, H, W
SHAPES = [
    (1, 64, 96, 19, 18),
    (3, 37, 20, 5, 9),
    (2, 1, 4, 1, 1),
    (1, 24, 8, 1, 1),
    (2, 300, 68, 7, 7),
    (2, 16, 52, 1, 17),
    (1, 130, 12, 14, 14),
    (1, 48, 100, 7, 7),
    (1, 2048, 64, 1, 2),
    (3, 12, 200, 11, 23),
    (2, 0, 8, 3, 3),
    (2, 8, 0, 4, 4),
    (0, 8, 8, 4, 4),
]


def case(shape, mean=0.0):
    B, C, N, H, W = shape
    weight = torch.randn(N, C, 1, 1) * max(C, 1) ** -0.5
    return torch.randn(B, C, H, W) + mean, weight, torch.randn(N)


def norm_of(N, groups=4, affine=True):
    if not affine:
        return groups, None, None, 1e-5
    return groups, torch.randn(N), torch.randn(N), 1e-5


def wide(x):
    if isinstance(x, tuple):
        return tuple(wide(item) for item in x)
    return x.double() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("norm", [None, "plain", "affine"])
@pytest.mark.parametrize(
    ("activation", "with_residual", "mean"),
    [("none", False, 0.0), ("relu", True, 0.0), ("gelu", True, 0.0), ("none", False, 30.0)],
)
def test_is_as_right_as_torch(
    shape, stride, norm, activation, with_residual, mean, cpu_library, nan_filled
):
    x, weight, bias = case(shape, mean)
    given = {"stride": stride, "activation": activation, "residual": None, "group_norm": None}
    if norm is not None:
        given["group_norm"] = norm_of(len(weight), affine=norm == "affine")
        if mean:
            bias = bias + 100  # a mean that would cancel
    if with_residual:
        size = (len(x), len(weight), *(-(-n // stride) for n in x.shape[2:]))
        given["residual"] = torch.randn(size)
    with torch.inference_mode():
        ours = conv1x1(x, weight, bias, packed=pack_conv1x1(weight), **given)
        assert ours.permute(0, 2, 3, 1).is_contiguous() or shape[1] == 0  # torch serves there
        torchs = conv1x1(x, weight, bias, **given)
        exact = conv1x1(*wide((x, weight, bias)), **{k: wide(v) for k, v in given.items()})
    accurate(ours, torchs, exact, f"conv1x1 {shape}")


@pytest.mark.parametrize("shape", [(5, 48, 36, 23, 19), (4, 200, 100, 3, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("normed", [False, True])
def test_neither_threads_nor_the_batch_change_a_bit(shape, stride, normed, cpu_library):
    x, weight, bias = case(shape)
    threads = torch.get_num_threads()
    given = {"stride": stride, "packed": pack_conv1x1(weight)}
    given["group_norm"] = norm_of(len(weight)) if normed else None
    with torch.inference_mode():
        try:
            torch.set_num_threads(1)
            one = conv1x1(x, weight, bias, **given)
            for n in (2, 3, 8):
                torch.set_num_threads(1)
                conv1x1(x - 1, weight, bias, **given)  # so that no sums of before are right
                torch.set_num_threads(n)
                assert same_bits(one, conv1x1(x, weight, bias, **given))
        finally:
            torch.set_num_threads(threads)
        pieces = [conv1x1(piece, weight, bias, **given) for piece in x.split(2)]
    assert same_bits(one, torch.cat(pieces))


@pytest.mark.parametrize("order", ["sliced", "contiguous", "expanded"])
def test_any_strides(order, cpu_library):
    x, weight, bias = case((2, 16, 24, 9, 10))
    whole = torch.randn(2, 20, 12, 10)
    views = {
        "sliced": whole[:, 2:18, 1:10],
        "contiguous": x,
        "expanded": x[:1, :1].expand(2, 16, 9, 10),
    }
    view = views[order]
    with torch.inference_mode():
        ours = conv1x1(view, weight, bias, packed=pack_conv1x1(weight))
        again = conv1x1(view.clone(), weight, bias, packed=pack_conv1x1(weight))
    assert same_bits(ours, again)


@pytest.mark.parametrize("grad", [False, True])
def test_refuses_what_does_not_fit(grad, cpu_library):
    x, weight, bias = case((2, 8, 12, 6, 5))
    packed = pack_conv1x1(weight)
    residual = torch.randn(2, 12, 6, 5)
    few = torch.ones(3)
    with torch.set_grad_enabled(grad):
        for error, call in (
            (ValueError, lambda: conv1x1(x[0], weight, packed=packed)),
            (ValueError, lambda: conv1x1(x[:, :7], weight, packed=packed)),
            (ValueError, lambda: conv1x1(x[:, :, :0], weight, packed=packed)),
            (ValueError, lambda: conv1x1(x, weight[..., 0], packed=packed[:1])),
            (ValueError, lambda: conv1x1(x, weight, bias[:7], packed=packed)),
            (TypeError, lambda: conv1x1(x, weight, bias.double(), packed=packed)),
            (ValueError, lambda: conv1x1(x, weight, activation="tanh", packed=packed)),
            (ValueError, lambda: conv1x1(x, weight, residual=residual[:1], packed=packed)),
            (TypeError, lambda: conv1x1(x, weight, residual=residual.double(), packed=packed)),
            (TypeError, lambda: conv1x1(x.long(), weight, packed=packed)),
            (TypeError, lambda: conv1x1(x, weight, packed=packed.double())),
            (ValueError, lambda: conv1x1(x, weight, stride=0, packed=packed)),
            (TypeError, lambda: conv1x1(x, weight, stride=1.5, packed=packed)),
            (ValueError, lambda: conv1x1(x, weight, packed=packed, group_norm=(5, None, None, 0))),
            (ValueError, lambda: conv1x1(x, weight, packed=packed, group_norm=(0, None, None, 0))),
            (ValueError, lambda: conv1x1(x, weight, packed=packed, group_norm=(3, few, None, 0))),
            (ValueError, lambda: conv1x1(x, weight, packed=packed, group_norm=(3, None, None, -1))),
            (ValueError, lambda: conv1x1(x, weight, packed=packed, group_norm=(3, None))),
        ):
            with pytest.raises(error, match="conv1x1"):
                call()
    with torch.no_grad(), pytest.raises(RuntimeError, match="packed does not fit"):
        conv1x1(x, weight, packed=packed[:-1])
    with pytest.raises(ValueError, match="weight must have shape"):
        pack_conv1x1(weight.expand(12, 8, 1, 2))


@pytest.mark.parametrize("channels", [-1, 0, 48, 2**40, 2**62, 2**61 + 16])
def test_the_kernel_refuses_hostile_sizes(channels, cpu_library):
    x, weight, _ = case((1, 8, 12, 4, 4))
    x = x.contiguous(memory_format=torch.channels_last)
    end = (1, None, 0, None, None, None, None, 0.0)
    with pytest.raises(RuntimeError, match="packed does not fit"), torch.no_grad():
        torch.ops.hybridops.conv1x1.default(x, pack_conv1x1(weight), channels, *end)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(1, 8, 4, 4)}, "channels_last"),
        ({"x": torch.zeros(8, 4, 4)}, "channels_last"),
        ({"x": torch.zeros(1, 0, 4, 8).permute(0, 3, 1, 2)}, "no pixels"),
        ({"stride": 0}, "stride"),
        ({"stride": -(2**63)}, "stride"),
        ({"residual": torch.zeros(1, 4, 4, 11).permute(0, 3, 1, 2)}, "residual"),
        ({"bias": torch.zeros(11)}, "bias"),
        ({"groups": 0}, "groups do not fit"),
        ({"groups": 5}, "groups do not fit"),
        ({"groups": -(2**63)}, "groups do not fit"),
        ({"groups": 2, "eps": float("nan")}, "eps"),
        ({"groups": 2, "norm_weight": torch.zeros(11)}, "vector does not fit"),
    ],
    ids=str,
)
def test_the_kernel_refuses_what_no_door_lets_through(change, match, cpu_library):
    given = {"x": torch.zeros(1, 4, 4, 8).permute(0, 3, 1, 2)}
    given |= {"packed": pack_conv1x1(torch.zeros(12, 8, 1, 1)), "channels": 12, "stride": 1}
    given |= {"bias": None, "activation": 0, "residual": None, "groups": None}
    given |= {"norm_weight": None, "norm_bias": None, "eps": 1e-5, **change}
    with pytest.raises(RuntimeError, match=match), torch.no_grad():
        torch.ops.hybridops.conv1x1.default(*given.values())


def test_of_one_row_any_stride_is_as_good(cpu_library):
    x, weight, bias = case((2, 8, 12, 6, 5))
    with torch.inference_mode():
        y = conv1x1(x, weight, bias, stride=2**31 - 1, packed=pack_conv1x1(weight))
        assert same_bits(y, conv1x1(x, weight, bias, stride=6, packed=pack_conv1x1(weight)))
    assert y.shape == (2, 12, 1, 1)


def test_what_is_not_finite_stays_in_its_image(cpu_library):
    x, weight, bias = case((3, 8, 12, 11, 13))
    x[1, 3, 5, 6] = float("nan")
    with torch.inference_mode():
        bare = conv1x1(x, weight, bias, packed=pack_conv1x1(weight))
        normed = conv1x1(x, weight, bias, packed=pack_conv1x1(weight), group_norm=norm_of(12))
    assert bare.isnan().sum() == 12
    assert bare[1, :, 5, 6].isnan().all()
    assert normed[1].isnan().all()
    assert normed[::2].isfinite().all()


def test_trains_as_torch():
    x, weight, bias = case((2, 8, 12, 6, 5))
    x.requires_grad_(), weight.requires_grad_()
    y = conv1x1(x, weight, bias, activation="relu", packed=pack_conv1x1(weight))
    ours = torch.autograd.grad(y.square().sum(), (x, weight))
    torchs = torch.autograd.grad(F.conv2d(x, weight, bias).relu().square().sum(), (x, weight))
    assert all(map(torch.equal, ours, torchs))


def test_opcheck(cpu_library):
    x, weight, bias = case((2, 8, 12, 6, 5))
    x, like = (
        t.contiguous(memory_format=torch.channels_last) for t in (x, torch.randn(2, 12, 3, 3))
    )
    packed = pack_conv1x1(weight)
    kernel = torch.ops.hybridops.conv1x1.default
    torch.library.opcheck(kernel, (x, packed, 12, 2, bias, 1, like, *norm_of(12)))
    torch.library.opcheck(kernel, (x, packed, 12, 1, None, 1, None, None, None, None, 0.0))
    torch.library.opcheck(torch.ops.hybridops.conv1x1_.default, (like, x, packed, 2, bias, 1))


@pytest.mark.parametrize("padding", [(0, 0), "SAME"])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_runs_it_where_it_is_faster(stride, padding, cpu_library):
    x, weight, bias = case((2, 36, 40, 9, 12))
    conv = Conv(weight, bias, (stride, stride), padding)
    with torch.inference_mode():
        residual = torch.randn_like(conv.plain(x)).contiguous(memory_format=torch.channels_last)
        given = residual.clone(memory_format=torch.channels_last)
        with ho.use("reference"):
            expected = conv(x, "relu", residual)
            norm = norm_of(40)
            normed = conv.normed(x, norm, "relu", residual)
        if cpu_library == "avx2":
            assert conv.multiplies(x)
        torch.testing.assert_close(conv(x, "relu", residual), expected)
        torch.testing.assert_close(conv.normed(x, norm, "relu", residual), normed)
        assert same_bits(given, residual)
        y = conv(x, "relu", given, overwrite=True)
        torch.testing.assert_close(y, expected)
        if cpu_library == "avx2":
            assert y.data_ptr() == given.data_ptr()
            assert not conv._packings
    others = [
        Conv(weight, bias, (1, 2)),
        Conv(weight, bias, padding=(1, 1)),
        Conv(weight.bfloat16(), bias.bfloat16()),
        Conv(weight[:, :18], bias, groups=2),
        Conv(torch.randn(40, 36, 1, 3)),
    ]
    with torch.inference_mode():
        for other in others:
            other(x.to(other.dtype))
            assert not other.multiplies(x)
        assert not Conv(weight[:, :32], bias).multiplies(x[:, :32])  # short sums are oneDNN's


def test_modules_run_it_in_inference(cpu_library):
    conv, norm = nn.Conv2d(48, 40, 1, bias=False), nn.GroupNorm(8, 40)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 48, 9, 12)
    with torch.inference_mode():
        expected = F.relu(norm(conv(x)))
        torch.testing.assert_close(conv_norm(conv, norm, x, "relu"), expected)
        conv.weight += 1  # which makes the packed copy anew
        torch.testing.assert_close(conv_norm(conv, norm, x, "relu"), F.relu(norm(conv(x))))


def test_a_norm_that_learns_gets_its_gradient(cpu_library):
    """Behind a frozen convolution, of an image that needs none."""
    conv, norm = nn.Conv2d(48, 40, 1, bias=False).requires_grad_(False), nn.GroupNorm(8, 40)
    x = torch.randn(2, 48, 9, 12)
    y = conv_norm(conv, norm, x, "relu")
    ours = torch.autograd.grad(y.square().sum(), (norm.weight, norm.bias))
    torchs = torch.autograd.grad(F.relu(norm(conv(x))).square().sum(), (norm.weight, norm.bias))
    torch.testing.assert_close(ours, torchs)
    with torch.no_grad(), pytest.raises(TypeError, match="weight"):
        conv_norm(conv, norm.double(), x)


def test_counts_what_it_cannot_serve(cpu_library):
    x, weight, _ = case((2, 4, 4, 3, 3))
    with torch.no_grad(), ho.use("reference"):
        conv1x1(x, weight, packed=pack_conv1x1(weight))
    before = backend.fallbacks.total()
    with torch.no_grad():
        conv1x1(x.double(), weight.double(), packed=pack_conv1x1(weight).double())
    assert backend.fallbacks.total() == before + 1
