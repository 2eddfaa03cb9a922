"""The CUDA kernels on the emulated GPU: every case, the same error rule, forward and backward.

How such a call comes to them: emulated_gpu.py.
"""

from __future__ import annotations

import functools

import check
import emulated_gpu
import pytest
import torch
from cases import CASES

from hybridops import ops
from hybridops.bench import case as cases

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("nan_filled", "emulated")


@pytest.fixture(scope="module")
def emulated():
    with emulated_gpu.serving():
        yield


@functools.cache  # it draws the case's inputs
def work(case) -> int:
    """Multiplications of a forward: the emulation does some 20 million a second."""
    t = case.make_inputs(torch.float32)
    if case.op == "peg":
        return t["x"].numel() * case.K**2
    if case.op == "linear":
        return t["x"].numel() * case.N
    if case.op == "patch_embed":
        stride = case.stride or case.kernel[0]
        return t["image"].numel() * case.kernel[0] * case.kernel[1] * case.C // stride**2
    if case.op == "conv_stem":
        products, cells, Ci = 0, case.B * case.H * case.W, case.Ci
        for layer in case.layers:
            cells //= layer.stride**2
            products += cells * Ci * layer.K**2 * layer.Co
            Ci = layer.Co
        return products
    q, v = t.get("q", t.get("qkv")), t.get("v", t.get("qkv"))
    return q.numel() * (case.Nk or case.Nq) + v.numel() * case.Nq


SMALL = 1e6


def cases_and_dtypes():
    """Small cases in fp32 and bf16, every eighth also in fp16; the rest by `make wide`."""
    served = (case for op in emulated_gpu.SERVED for case in CASES[op] if not case.unserved)
    for i, case in enumerate(served):
        for dtype in DTYPES:
            quick = work(case) <= SMALL and (dtype != torch.float16 or i % 8 == 5)
            name = f"{case}-{str(dtype).removeprefix('torch.')}"
            yield pytest.param(case, dtype, marks=() if quick else pytest.mark.wide, id=name)


@pytest.mark.parametrize(("case", "dtype"), cases_and_dtypes())
def test_matches(case, dtype):
    check.outputs_and_gradients(case, dtype, "cpu")


LAYOUTS = [
    cases.Attention("matrix", Nq=17, Nk=19, D=16, Dv=24, bias=(2, 2, 17, 19)),
    cases.Attention("matrix_table", Nq=16, D=16, bias="table", mask="tail"),
    cases.Linear("matrix", M=(3, 7), N=21, K=35, norm="affine", residual=True),
    cases.Linear("matrix_act", M=(3, 7), N=16, K=48, activation="gelu"),
    cases.Peg("matrix", H=5, W=6, C=16, prefix=1),
    cases.Peg("matrix_stride", H=7, W=6, C=16, K=5, stride=2, residual=False),
    cases.PatchEmbed("matrix", H=16, W=16, C=24, kernel=(8, 8), prefix=2, pos=6, norm="affine"),
    cases.PatchEmbed("matrix_overlap", H=9, W=7, Ci=8, C=9, kernel=(3, 3), stride=2, padding=1),
    cases.ConvStem("matrix", H=12, W=9, layers=(cases.Conv(16, activation="gelu"), cases.Conv(9))),
]


def pairs_of_layouts():
    """Each layout of the inputs with one of the gradient, in turn; all pairs by `make wide`."""
    for i, layout in enumerate(cases.INPUT_LAYOUTS):
        for j, grad_layout in enumerate(check.GRAD_LAYOUTS):
            marks = () if i % len(check.GRAD_LAYOUTS) == j else pytest.mark.wide
            yield pytest.param(layout, grad_layout, marks=marks)


@pytest.mark.parametrize(("layout", "grad_layout"), pairs_of_layouts())
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layout_matches(case, layout, grad_layout):
    check.outputs_and_gradients(case, torch.bfloat16, "cpu", layout, grad_layout)


CHUNKED = [  # a head does not fit the shared memory of the smallest GPU: keys pass in chunks
    cases.Attention("chunks", B=1, H=1, Nq=33, Nk=449, D=64),
    cases.Attention("chunks_table", B=2, H=1, Nq=17, Nk=300, D=96, Dv=128, bias="table"),
    cases.Attention("chunks_mask", B=3, H=1, Nq=20, Nk=400, D=64, mask="blocks"),
]


@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_heads_that_do_not_fit_shared_memory_match(case):
    check.outputs_and_gradients(case, torch.float32, "cpu")


LARGER_TILES = [
    cases.Linear("large", M=257, N=257, K=72, norm="affine", activation="gelu"),
    cases.PatchEmbed("large", H=24, W=25, Ci=1, C=130, kernel=(2, 2), norm="affine", pos=144),
    cases.PatchEmbed("large_norm", H=24, W=24, Ci=5, C=127, kernel=(2, 2), norm="no_bias", pos=144),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGER_TILES, ids=str)
def test_the_larger_tile_matches(case, dtype):
    check.outputs_and_gradients(case, dtype, "cpu")


def test_a_head_too_wide_is_refused_by_name():
    x = torch.zeros(1, 2, 1, 129)
    with pytest.raises(RuntimeError, match="head sizes up to 128, got 129"):
        torch.ops.hybridops_cuda.attention(x, x, x, None, None, None, 1.0, 0)


def test_a_kernel_too_large_is_refused_by_name():
    x, weight = torch.zeros(1, 4, 8), torch.zeros(8, 1, 17, 17)
    with pytest.raises(RuntimeError, match="K up to 16, got 17"):
        torch.ops.hybridops_cuda.peg(x, weight, None, 2, 2, 0, 1, 8, True, 0, False)


def test_nan_wins_in_the_pool():
    image, weight = torch.randn(1, 1, 8, 8).bfloat16().float(), torch.ones(1, 1, 1, 1)
    image[0, 0, 3, 3] = float("nan")
    layers, pool = [ops.ConvLayer(weight)], ops.MaxPool(3, 2, 1)
    found = ops.conv_stem(image, layers, pool=pool, layout="image")
    expected = torch.nn.functional.max_pool2d(image, 3, 2, 1)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


PAIRS = [  # (image, layers): two layers in one launch, tiles that end inside and beyond the grids
    ((2, 3, 37, 21), (cases.Conv(16, activation="hardswish"), cases.Conv(33))),
    ((1, 4, 9, 20), (cases.Conv(32, 1, 1, 0), cases.Conv(7, 5, 1, (2, 0, 3, 1), "gelu"))),
    ((1, 1, 18, 17), (cases.Conv(8, 4, 3, (0, 2, 1, 0), "relu"), cases.Conv(64, 4, 2, "same"))),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "pair"), PAIRS)
def test_two_layers_in_one_launch_give_the_bits_of_two(shape, pair, dtype):
    case = cases.ConvStem("pair", B=shape[0], Ci=shape[1], H=shape[2], W=shape[3], layers=pair)
    t = case.make_inputs(dtype)
    layers = [
        ops.ConvLayer(t[f"weight{i}"], t[f"bias{i}"], layer.stride, layer.padding, layer.activation)
        for i, layer in enumerate(pair)
    ]
    between = ops.conv_stem(t["image"], layers[:1], layout="image")
    apart = ops.conv_stem(between, layers[1:])
    same = check.same_bits(ops.conv_stem(t["image"], layers), apart)
    assert same, "other bits in one launch"


def test_a_stride_beyond_the_image_costs_no_more_than_the_image():
    """Once one step per kind of pixel, stride^2 of them: for this one the age of the universe."""
    image = torch.randn(1, 3, 5, 4, requires_grad=True)
    weight = torch.randn(8, 3, 2, 2)
    y = ops.patch_embed(image, weight, stride=10**9)
    y.sum().backward()
    expected = torch.zeros(1, 3, 5, 4)
    expected[:, :, :2, :2] = weight.sum(0)
    torch.testing.assert_close(image.grad, expected)
