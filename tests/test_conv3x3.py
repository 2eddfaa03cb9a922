"""Winograd's 3 x 3 convolution: as right as torch's own, for any size, however it is shared out."""

import pytest
import torch
import torch.nn.functional as F
from check import accurate, same_bits

import hybridops as ho
from hybridops import backend
from hybridops.nn.conv import Conv
from hybridops.ops import conv3x3, pack_conv3x3

#          B, C, N, H, W
SHAPES = [
    (1, 64, 64, 19, 18),
    (2, 37, 19, 5, 9),
    (2, 1, 1, 1, 1),
    (3, 8, 24, 2, 3),
    (2, 130, 70, 7, 7),
    (2, 16, 50, 1, 17),
    (2, 12, 20, 8, 22),
    (3, 12, 20, 10, 23),
    (2, 24, 25, 33, 2),
    (2, 300, 17, 6, 8),
    (0, 8, 8, 4, 4),
]


def case(shape, mean=0.0):
    B, C, N, H, W = shape
    weight = torch.randn(N, C, 3, 3) * (9 * C) ** -0.5
    return torch.randn(B, C, H, W) + mean, weight, torch.randn(N)


GEOMETRIES = [(1, 1), (2, 1), (2, (0, 0, 1, 1)), (1, (2, 1, 0, 2)), (2, (2, 2, 1, 0))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("stride", "padding"), GEOMETRIES, ids=str)
@pytest.mark.parametrize(
    ("activation", "with_residual", "mean"),
    [("none", False, 0.0), ("relu", True, 0.0), ("gelu", True, 0.0), ("none", False, 30.0)],
)
def test_is_as_right_as_torch(
    shape, stride, padding, activation, with_residual, mean, cpu_library, nan_filled
):
    x, weight, bias = case(shape, mean)
    if mean:
        bias = None
    given = {"stride": stride, "padding": padding}
    try:
        size = conv3x3(x, weight, **given).shape
    except ValueError:
        pytest.skip("no such output")
    given |= {"activation": activation, "residual": None}
    if with_residual:
        given["residual"] = torch.randn(size)
    wide = dict(given)
    if with_residual:
        wide["residual"] = given["residual"].double()
    with torch.inference_mode():
        ours = conv3x3(x, weight, bias, packed=pack_conv3x3(weight, stride), **given)
        assert ours.permute(0, 2, 3, 1).is_contiguous()
        torchs = conv3x3(x, weight, bias, **given)
        exact = conv3x3(x.double(), weight.double(), None if mean else bias.double(), **wide)
    accurate(ours, torchs, exact, f"conv3x3 {shape}")


@pytest.mark.parametrize("shape", [(5, 48, 33, 23, 19), (4, 200, 9, 3, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_neither_threads_nor_the_batch_change_a_bit(shape, stride, cpu_library):
    x, weight, bias = case(shape)
    packed, threads = pack_conv3x3(weight, stride), torch.get_num_threads()
    given = {"stride": stride, "packed": packed}
    with torch.inference_mode():
        try:
            torch.set_num_threads(1)
            one = conv3x3(x, weight, bias, **given)
            for n in (2, 3, 8):
                torch.set_num_threads(n)
                assert same_bits(one, conv3x3(x, weight, bias, **given))
        finally:
            torch.set_num_threads(threads)
        pieces = [conv3x3(piece, weight, bias, **given) for piece in x.split(2)]
    assert same_bits(one, torch.cat(pieces))


@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_not_finite_is_never_lost(stride, cpu_library):
    x, weight, _ = case((2, 9, 20, 11, 13))
    x[0, 3, 5, 6], x[0, 0, 0, 12], x[0, 8, 10, 0] = float("nan"), float("inf"), -float("inf")
    with torch.inference_mode():
        ours = conv3x3(x, weight, stride=stride, packed=pack_conv3x3(weight, stride))
        due = ~F.conv2d(x, weight, stride=stride, padding=1).isfinite()
    assert not ours[due].isfinite().any()
    reach = (7, 11), stride, (3, 5)  # no farther than a tile's patch
    spread = F.max_pool2d((~x.isfinite()).any(1).float(), *reach) > 0
    assert ours.movedim(1, 0)[:, ~spread].isfinite().all()


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
        ours = conv3x3(view, weight, bias, packed=pack_conv3x3(weight))
        again = conv3x3(view.clone(), weight, bias, packed=pack_conv3x3(weight))
    assert same_bits(ours, again)


@pytest.mark.parametrize("grad", [False, True])
def test_refuses_what_does_not_fit(grad, cpu_library):
    x, weight, bias = case((2, 8, 12, 6, 5))
    packed = pack_conv3x3(weight)
    residual = torch.randn(2, 12, 6, 5)
    with torch.set_grad_enabled(grad):
        for error, call in (
            (ValueError, lambda: conv3x3(x[0], weight, packed=packed)),
            (ValueError, lambda: conv3x3(x[:, :7], weight, packed=packed)),
            (ValueError, lambda: conv3x3(x, weight[..., :2], packed=packed[:1])),
            (ValueError, lambda: conv3x3(x, weight, bias[:7], packed=packed)),
            (TypeError, lambda: conv3x3(x, weight, bias.double(), packed=packed)),
            (ValueError, lambda: conv3x3(x, weight, activation="tanh", packed=packed)),
            (ValueError, lambda: conv3x3(x, weight, residual=residual[:1], packed=packed)),
            (TypeError, lambda: conv3x3(x, weight, residual=residual.double(), packed=packed)),
            (TypeError, lambda: conv3x3(x.long(), weight, packed=packed)),
            (TypeError, lambda: conv3x3(x, weight, packed=packed.double())),
            (ValueError, lambda: conv3x3(x, weight, stride=3, packed=packed)),
            (ValueError, lambda: conv3x3(x, weight, padding=3, packed=packed)),
            (ValueError, lambda: conv3x3(x, weight, padding=(1, 1), packed=packed)),
            (TypeError, lambda: conv3x3(x, weight, padding=(1, 1, 1, 0.5), packed=packed)),
            (ValueError, lambda: conv3x3(x[..., :2], weight, padding=0, packed=packed)),
        ):
            with pytest.raises(error, match="conv3x3"):
                call()
    with torch.no_grad(), pytest.raises(RuntimeError, match="packed does not fit"):
        conv3x3(x, weight, stride=2, packed=packed)
    with pytest.raises(ValueError, match="weight must have shape"):
        pack_conv3x3(weight[..., :2])


@pytest.mark.parametrize("channels", [-1, 0, 24, 2**40, 2**62, 2**61 + 16])
def test_the_kernel_refuses_hostile_sizes(channels, cpu_library):
    x, weight, _ = case((1, 8, 12, 4, 4))
    x = x.contiguous(memory_format=torch.channels_last)
    kernel = torch.ops.hybridops.conv3x3.default
    with pytest.raises(RuntimeError, match="packed does not fit"), torch.no_grad():
        kernel(x, pack_conv3x3(weight), channels, 1, 1, 1, 1, 1, None, 0, None)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(1, 8, 4, 4)}, "channels_last"),
        ({"x": torch.zeros(8, 4, 4)}, "channels_last"),
        ({"stride": 0}, "stride"),
        ({"stride": -(2**63)}, "stride"),
        ({"stride": 2}, "packed does not fit"),
        ({"top": -1}, "padding"),
        ({"right": 2**62}, "padding"),
        ({"x": torch.zeros(1, 1, 1, 8).permute(0, 3, 1, 2), "top": 0}, "larger than the image"),
        ({"residual": torch.zeros(1, 4, 4, 11).permute(0, 3, 1, 2)}, "residual"),
        ({"bias": torch.zeros(11)}, "bias"),
    ],
    ids=str,
)
def test_the_kernel_refuses_what_no_door_lets_through(change, match, cpu_library):
    given = {"x": torch.zeros(1, 4, 4, 8).permute(0, 3, 1, 2)}
    given |= {"packed": pack_conv3x3(torch.zeros(12, 8, 3, 3)), "channels": 12, "stride": 1}
    given |= dict.fromkeys(("top", "left", "bottom", "right"), 1)
    given |= {"bias": None, "activation": 0, "residual": None, **change}
    with pytest.raises(RuntimeError, match=match), torch.no_grad():
        torch.ops.hybridops.conv3x3.default(*given.values())


def test_trains_as_torch():
    x, weight, bias = case((2, 8, 12, 6, 5))
    x.requires_grad_(), weight.requires_grad_()
    y = conv3x3(x, weight, bias, activation="relu", packed=pack_conv3x3(weight))
    ours = torch.autograd.grad(y.square().sum(), (x, weight))
    z = F.conv2d(x, weight, bias, padding=1).relu()
    torchs = torch.autograd.grad(z.square().sum(), (x, weight))
    assert all(map(torch.equal, ours, torchs))


def test_opcheck(cpu_library):
    x, weight, bias = case((2, 8, 12, 6, 5))
    x, like = (
        t.contiguous(memory_format=torch.channels_last) for t in (x, torch.randn(2, 12, 6, 5))
    )
    for stride, residual in ((1, like), (2, None)):
        arguments = (x, pack_conv3x3(weight, stride), 12, stride, 1, 1, 1, 1, bias, 1, residual)
        torch.library.opcheck(torch.ops.hybridops.conv3x3.default, arguments)


def test_conv_runs_it_where_it_is_faster(cpu_library):
    x, weight, bias = case((2, 64, 24, 9, 12))
    for stride in (1, 2):
        for padding in ((1, 1), (0, 2), "SAME"):
            conv = Conv(weight, bias, (stride, stride), padding)
            with torch.inference_mode():
                y = conv(x, "relu")
                with ho.use("reference"):
                    expected = conv(x, "relu")
            assert conv._points is not None
            assert not conv._packings
            torch.testing.assert_close(y, expected)
    large = Conv(torch.randn(512, 512, 3, 3), padding=(1, 1))
    others = [
        Conv(weight, bias, (3, 3), (1, 1)),
        Conv(weight, bias, (1, 2), (1, 1)),
        Conv(weight, bias, padding=(3, 3)),
        Conv(weight, bias, padding=(2, 2), dilation=(2, 2)),
        Conv(weight.bfloat16(), bias.bfloat16(), padding=(1, 1)),
        Conv(weight[:, :32], bias, padding=(1, 1), groups=2),
    ]
    with torch.inference_mode():
        large(torch.randn(1, 512, 7, 7))  # its 25 MB of points would come from DRAM
        for conv in others:
            conv(x.to(conv.dtype))
        small = Conv(weight, bias, padding=(1, 1))
        small(x[:1])  # torch's own is more exact there, and where sums are short
        others.append(Conv(weight[:, :63], bias, padding=(1, 1)))
        others[-1](x[:, :63])
    assert all(conv._points is None for conv in (large, small, *others))


def test_counts_what_it_cannot_serve(cpu_library):
    x, weight, _ = case((2, 4, 4, 3, 3))
    with torch.no_grad(), ho.use("reference"):
        conv3x3(x, weight, packed=pack_conv3x3(weight))
    before = backend.fallbacks.total()
    with torch.no_grad():
        conv3x3(x.double(), weight.double(), packed=pack_conv3x3(weight).double())
    assert backend.fallbacks.total() == before + 1
