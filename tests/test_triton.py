"""Triton's kernels, forward and backward, on the shared cases, through Triton's interpreter.

The interpreter runs a program in about a millisecond, so a case runs here when its work is small
(`work`); `make wide` runs those up to LARGEST too. Away from a GPU it proves the arithmetic, the
masks and the strides; races and registers are for test_triton_aot.py and `make gpu`.
"""

from __future__ import annotations

import functools
import os

import check
import interpreter
import pytest
import torch
from cases import CASES, Attention, Conv, ConvStem, Linear, PatchEmbed, Peg, all_cases, find

import hybridops
from hybridops import BackendUnavailable, backend, ops
from hybridops.bench.case import lay_out

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.usefixtures("nan_filled", "_on_cpu"),
    pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="Triton compiles here"),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL, LARGEST = 6_000, 600_000
GRADIENT = {op: f"{op}_backward" for op in CASES}
GRADIENT |= {"patch_embed": "conv_backward", "conv_stem": "conv_backward"}


@pytest.fixture(scope="module")
def _on_cpu():
    with interpreter.serving():
        yield


@functools.cache  # it draws the case's inputs
def work(case) -> int:
    """Roughly the elements that a case's kernels touch: what the interpreter's time follows."""
    shapes = {name: tuple(t.shape) for name, t in case.make_inputs(torch.float32).items()}
    numel = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    match case.op:
        case "attention":
            return case.B * case.H * case.Nq * (case.Nq if case.Nk is None else case.Nk)
        case "peg":
            return numel["x"] * case.K**2 // 4
        case "linear":
            return max(numel["x"], numel["x"] // max(case.K, 1) * case.N)
        case _:
            weights = sum(n for name, n in numel.items() if name.startswith("weight"))
            return max(numel["image"], weights)


def cases_and_dtypes():
    """Small cases in fp32, every sixth also in bf16, fewer in fp16; all of them by `make wide`."""
    for op in CASES:
        for i, case in enumerate(sorted(CASES[op], key=work)):
            for j, name in enumerate(DTYPES):
                chosen = (True, i % 6 == 1, i % 12 == 5)[j]
                quick = work(case) <= SMALL and chosen
                marks = () if quick else pytest.mark.wide
                if work(case) <= LARGEST and not case.unserved:
                    yield pytest.param(case, DTYPES[name], marks=marks, id=f"{case}-{name}")


@pytest.mark.parametrize(("case", "dtype"), cases_and_dtypes())
def test_matches(case, dtype):
    ran = [(case.op, "triton"), (GRADIENT[case.op], "triton")]
    before = [backend.served[op] for op in ran]
    check.outputs_and_gradients(case, dtype, "triton")
    assert all(backend.served[op] > n for op, n in zip(ran, before, strict=True)), (
        "something else served this case"
    )


LAYOUTS = {
    "attention-odd_dims": ("transposed", "sliced"),
    "attention-bias_queries": ("sliced_rows", "expanded"),
    "attention-levit_32_64": ("offset", "sliced"),
    "linear-everything": ("transposed", "sliced"),
    "peg-c8": ("transposed", "sliced"),
    "patch_embed-pos_all": ("sliced", "transposed"),
    "conv_stem-odd_channels": ("sliced", "offset"),
}


@pytest.mark.parametrize("grad_layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_strides(name, grad_layout):
    layout = LAYOUTS[name][grad_layout == "sliced"]
    check.outputs_and_gradients(find(name), torch.float32, "triton", layout, grad_layout)


SPLIT = Attention("split", B=1, H=1, Nq=20, Nk=600, D=24, mask="tail", activation="silu")


def test_few_queries_split_the_keys():
    from hybridops.kernels import attention

    assert attention._splits(1, 10) > 1
    check.outputs_and_gradients(SPLIT, torch.float32, "triton")


@pytest.mark.parametrize("bias", [(1, 1, 20, 40), "table"], ids=str)
def test_padded_keys_beside_a_bias(bias):
    """Smaller than the shared cases of both, which are for `make wide`."""
    case = Attention("padded", B=2, H=1, Nq=20, Nk=40, D=16, bias=bias, mask="tail")
    check.outputs_and_gradients(case, torch.float32, "triton")


def test_gradients_in_fp32_do_not_trust_the_last_places_of_lse():
    """What is off by one factor along a row is divided out, in all four gradients."""
    from hybridops.kernels import attention, attention_backward

    case = Attention("off", B=1, H=2, Nq=3, Nk=20, D=16, bias=(1, 2, 3, 20), mask="tail")
    t = case.make_inputs(torch.float32)
    given = (*(t[n] for n in "qkv"), t["bias"], None, t["key_padding_mask"])
    out, lse = attention.forward(*given, 0.25, 0)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    right = attention_backward.backward(dy, *given, out, lse, 0.25, True)
    off = attention_backward.backward(dy, *given, out, lse + 0.125, 0.25, True)
    for a, b in zip(off, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [(1, 2, 20, 33), (1, 1, 1, 33), (2, 1, 20, 33)], ids=str)
def test_gradient_of_the_bias_does_not_depend_on_how_it_is_cut(bias, monkeypatch):
    from hybridops.kernels import tuned

    case = Attention("cut", B=2, H=2, Nq=20, Nk=33, D=16, bias=bias)
    for programs in (1, 1000):
        monkeypatch.setattr(tuned, "TARGET_PROGRAMS", programs)
        check.outputs_and_gradients(case, torch.float32, "triton")


SLICED = [
    Linear("sliced", M=(3, 50), N=37, K=130),
    ConvStem("sliced", H=12, W=11, layers=(Conv(5, 3, 1), Conv(9, 2, 2, 1))),
    PatchEmbed("sliced", H=36, W=33, C=5, kernel=(3, 3), prefix=1),
]


@pytest.mark.parametrize("case", SLICED, ids=str)
def test_sums_over_rows_cut_into_many_slices(case, monkeypatch):
    """As many as there are blocks of rows, the last of them shorter."""
    from hybridops.kernels import gradient, tuned

    monkeypatch.setattr(gradient, "SHORTEST", 1)
    monkeypatch.setattr(tuned, "TARGET_PROGRAMS", 1000)
    check.outputs_and_gradients(case, torch.float32, "triton")
    check.outputs_and_gradients(case, torch.bfloat16, "triton", grad_layout="sliced")


STRIDED = [  # (image, weight, stride, padding): kinds of pixels without a tap, with one, with more
    ((2, 3, 9, 8), (5, 3, 2, 3), 4, (0, 0, 0, 0)),
    ((2, 3, 8, 8), (5, 3, 4, 2), 2, (0, 1, 2, 1)),
    ((1, 4, 7, 9), (6, 4, 5, 3), 3, (3, 0, 1, 2)),
    ((1, 2, 5, 5), (3, 2, 2, 2), 1000, (1, 0, 1, 0)),
]


@pytest.mark.parametrize(("image", "weight", "stride", "padding"), STRIDED)
def test_the_gradients_of_a_convolution(image, weight, stride, padding):
    """dz as it comes, expanded too, gives the bits of its contiguous copy, and those are right."""
    from hybridops.ops import _by_torch

    top, left, bottom, right = padding
    cells = (image[2] + top + bottom - weight[2]) // stride + 1
    cells *= (image[3] + left + right - weight[3]) // stride + 1
    x, taps = torch.randn(image, dtype=torch.float64), torch.randn(weight, dtype=torch.float64)
    dz = torch.randn(image[0], cells, weight[0], dtype=torch.float64)
    single = [t.float() for t in (dz, x, taps)]
    wide = [t.double() for t in single]
    with hybridops.use("triton"):
        ours = torch.ops.hybridops.conv_backward(*single, stride, padding, True)
        for layout in check.GRAD_LAYOUTS[1:]:
            given = single[0][:, :1, :1] if layout == "expanded" else single[0]
            given = given.expand(dz.shape) if layout == "expanded" else lay_out(given, layout)
            found, same = (
                torch.ops.hybridops.conv_backward(t, *single[1:], stride, padding, True)
                for t in (given, given.contiguous())
            )
            assert all(check.same_bits(a, b) for a, b in zip(found, same, strict=True))
    torchs = _by_torch.conv_backward(*single, stride, padding, True)
    right_ones = _by_torch.conv_backward(*wide, stride, padding, True)
    for name, *three in zip(("image", "weight", "bias"), ours, torchs, right_ones, strict=True):
        check.accurate(*three, f"gradient of {name}", factor=3)


def test_no_kernel_runs_where_the_reference_is_asked_for():
    q = torch.randn(1, 3, 1, 8, requires_grad=True)
    with hybridops.use("triton"):
        y = ops.attention(q, q, q)
    before = backend.served.copy()
    with (
        hybridops.use("reference"),
        pytest.raises(BackendUnavailable, match=r"attention_backward: .*: inside use\('reference'"),
    ):
        y.sum().backward()
    x, weight = torch.randn(1, 4, 8).double(), torch.randn(8, 1, 3, 3).double()
    reason = "no GPU kernel for float64"
    with pytest.raises(BackendUnavailable, match=f"peg: .*: {reason}"):
        torch.ops.hybridops.peg(x, weight, None, 2, 2, 0, 1, 1, True, 0, False)
    assert backend.fallbacks["peg", reason]
    assert backend.served == before


def _by_the_old_api(how):
    torch.set_float32_matmul_precision("highest" if how == "ieee" else "high")


def _by_the_new_api(how):
    torch.backends.cuda.matmul.fp32_precision = how


def _for_all_of_torch(how):
    torch.backends.fp32_precision = how


@pytest.mark.parametrize("choose", [_by_the_old_api, _by_the_new_api, _for_all_of_torch])
def test_fp32_is_multiplied_as_torch_does_and_its_settings_stay(choose):
    from hybridops.kernels import tuned
    from hybridops.ops import _by_torch

    kept = [m.fp32_precision for m in (torch.backends, torch.backends.cuda.matmul)]
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    try:
        for how in ("tf32", "ieee"):
            choose(how)
            assert tuned.precision(x) == how
            assert tuned.precision(x.bfloat16()) == "ieee"
            with hybridops.use("triton"):
                torch.testing.assert_close(ops.linear(x, weight), x @ weight.t())
            dz, image, taps = torch.randn(1, 4, 2), torch.randn(1, 3, 2, 2), torch.randn(2, 3, 1, 1)
            _by_torch.conv_backward(dz, image, taps, 1, [0] * 4, True)
            assert not torch.backends.cudnn.deterministic
            assert torch.backends.cuda.matmul.fp32_precision == how
    finally:
        choose("ieee")  # the old API's own memory of it
        torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = kept


@pytest.mark.parametrize("layout", check.GRAD_LAYOUTS[1:])
def test_the_gradients_of_a_product_take_any_strides(layout):
    def laid_out(t):
        return t[:1].expand(t.shape) if layout == "expanded" else lay_out(t, layout)

    given = [laid_out(torch.randn(shape)) for shape in ((3, 7, 33), (3, 7, 20), (33, 20))]
    with hybridops.use("triton"):
        found = torch.ops.hybridops.linear_backward(*given)
        same = torch.ops.hybridops.linear_backward(*(t.contiguous() for t in given))
    assert all(check.same_bits(a, b) for a, b in zip(found, same, strict=True))


@pytest.mark.parametrize("queries", [4, 40], ids=["keys split", "keys whole"])
def test_wholly_padded_blocks_are_not_read(queries):
    """NaN in what only padded blocks hold, between live ones too, leaves no trace."""
    case = Attention("skip", B=2, H=1, Nq=queries, Nk=200, D=16)
    inputs = case.make_inputs(torch.float32)
    padding = torch.ones(2, 200, dtype=torch.bool)
    padding[0, [5, 100, 101, 130]] = False  # in blocks 0, 3 and 4 of 32 keys each
    padding[1, 70:80] = False
    dead = torch.ones(2, 200, dtype=torch.bool)
    dead[0, :32] = dead[0, 96:160] = dead[1, 64:96] = False
    dy = torch.randn(2, queries, 1, 16)

    def run():
        leaves = [inputs[name].clone().requires_grad_() for name in "qkv"]
        with hybridops.use("triton"):
            y = ops.attention(*leaves, key_padding_mask=padding)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    clean = run()
    for name in "kv":
        inputs[name][dead] = torch.nan
    for a, b in zip(run(), clean, strict=True):
        assert check.same_bits(a, b)


def test_an_index_outside_the_table_gives_nan_and_reads_nothing():
    q, table = torch.randn(1, 4, 1, 8), torch.randn(1, 9)
    index = torch.zeros(4, 4, dtype=torch.int64)
    index[2, 1], index[3, 0] = 9, -1
    with hybridops.use("triton"):
        y = ops.attention(q, q, q, bias=table, bias_index=index)
    assert y[:, 2:].isnan().all()
    assert y[:, :2].isfinite().all()


def test_wide_offsets_give_the_same_bits(monkeypatch):
    from hybridops.kernels import tuned

    case = find("attention-odd_dims")
    inputs = case.make_inputs(torch.float32)
    narrow = check.run(case, inputs, "triton")[0]
    monkeypatch.setattr(tuned, "is_wide", lambda *tensors: True)
    assert check.same_bits(check.run(case, inputs, "triton")[0], narrow)


def test_what_is_wide():
    from hybridops.kernels import tuned

    small, virtual = torch.empty(2, 7), torch.empty(1).expand(2, 1 << 20, 1 << 11)
    assert not tuned.is_wide(small, None, virtual)
    assert tuned.is_wide(
        small, torch.empty(1, device="meta").as_strided((2, 3, 4), (0, 1 << 30, 1))
    )


def test_float64_is_refused_by_name():
    case = Peg("double", H=3, W=3, C=4)
    with hybridops.use("triton"), pytest.raises(BackendUnavailable, match="no GPU kernel for flo"):
        case.call(case.make_inputs(torch.float64))


def test_most_cases_are_small_enough_to_run_here():
    for op, cases in CASES.items():
        assert sum(work(case) <= SMALL for case in cases) >= len(cases) // 2, op
    assert [case.name for case in all_cases() if work(case) > LARGEST] == ["detr_850"]


def test_a_norm_wider_than_one_program_takes_a_second_pass():
    from hybridops.kernels.patch_embed import LARGEST_NORM

    case = PatchEmbed("wide", H=8, W=8, C=300, kernel=(4, 4), norm="affine", pos=5, prefix=1)
    assert case.C > LARGEST_NORM
    check.outputs_and_gradients(case, torch.float32, "triton")
