"""Every memory layout of inputs and of the incoming gradient: where fused kernels usually go wrong.

A gradient from `y.sum().backward()` has stride 0 and still counts as an ordinary tensor; packed
projections, transposed maps and slices reach an op as views. Gaps between elements hold NaN.
"""

from __future__ import annotations

import check
import pytest
import torch

from hybridops.bench import case as cases

LAYOUTS = cases.INPUT_LAYOUTS
IMAGE_LAYOUTS = (*LAYOUTS, "channels_last")
SAMPLES = [
    (cases.Attention("matrix", Nq=17, Nk=19, D=16, Dv=24, bias=(2, 2, 17, 19)), LAYOUTS),
    (cases.Attention("matrix_table", Nq=16, D=16, bias="table", mask="tail"), LAYOUTS),
    (
        cases.Linear("matrix", M=(3, 7), N=21, K=35, norm="affine", residual=True),
        LAYOUTS,
    ),
    (cases.Linear("matrix_act", M=(3, 7), N=16, K=48, activation="gelu"), LAYOUTS),
    (cases.Peg("matrix", H=5, W=6, C=19, prefix=1), LAYOUTS),
    (cases.Peg("matrix_stride", H=7, W=6, C=16, K=5, stride=2, residual=False), LAYOUTS),
    (
        cases.PatchEmbed("matrix", H=16, W=8, C=19, kernel=(4, 4), prefix=2, pos=10),
        IMAGE_LAYOUTS,
    ),
    (
        cases.PatchEmbed("matrix_wide", H=16, W=16, C=24, kernel=(8, 8), norm="affine"),
        IMAGE_LAYOUTS,
    ),
    (
        cases.PatchEmbed("matrix_uint8", H=16, W=16, C=24, kernel=(8, 8), uint8=True),
        IMAGE_LAYOUTS,
    ),
    (
        cases.ConvStem(
            "matrix", H=11, W=12, layers=(cases.Conv(8, activation="hardswish"), cases.Conv(11))
        ),
        IMAGE_LAYOUTS,
    ),
    (
        cases.ConvStem(
            "matrix_pool", H=12, W=12, layers=(cases.Conv(8, activation="relu"),), pool=(3, 2, 1)
        ),
        IMAGE_LAYOUTS,
    ),
]
MATRIX = [
    pytest.param(case, layout, id=f"{case}-{layout}") for case, every in SAMPLES for layout in every
]
pytestmark = pytest.mark.usefixtures("nan_filled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("float32", "bfloat16"))
@pytest.mark.parametrize(("case", "layout"), MATRIX)
@pytest.mark.parametrize("grad_layout", check.GRAD_LAYOUTS)
def test_layout_matches(case, layout, grad_layout, dtype, best_backend):
    check.outputs_and_gradients(case, dtype, best_backend, layout, grad_layout)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "sliced_rows", "offset", "expanded"])
@pytest.mark.parametrize("case", [case for case, _ in SAMPLES], ids=str)
def test_layout_is_what_it_says(case, layout):
    plain = case.make_inputs(torch.float32)
    other = case.make_inputs(torch.float32, layout)
    assert any(t.stride() != plain[n].stride() or t.storage_offset() % 2 for n, t in other.items())
    if layout != "expanded":
        assert all(torch.equal(t, plain[n]) for n, t in other.items())


VIEWS = [
    cases.Attention("qkv", Nq=33, D=16, H=3, view="packed"),
    cases.Attention("interleaved", Nq=33, D=16, Dv=24, H=3, view="interleaved", bias="table"),
    cases.Attention("maps", Nq=33, Nk=17, D=16, view="maps"),
]


@pytest.mark.parametrize("case", VIEWS, ids=str)
@pytest.mark.parametrize("grad_layout", check.GRAD_LAYOUTS)
def test_views_of_one_projection_match(case, grad_layout, best_backend):
    """q, k and v share a tensor, whose gradient gathers all three; and nothing is copied first."""
    check.outputs_and_gradients(case, torch.float32, best_backend, grad_layout=grad_layout)


@pytest.mark.parametrize("offset", range(16))
def test_any_alignment_matches(offset, cpu_library):
    """Vectors load from any address: each input starts `offset` elements into its storage."""
    for case in (
        cases.Linear("aligned", M=5, N=33, K=35, residual=True),
        cases.Attention("aligned", Nq=9, D=17, B=1),
        cases.Peg("aligned", H=3, W=4, C=35),
        cases.PatchEmbed("aligned", B=1, H=8, W=16, C=18, kernel=(8, 8)),
        cases.ConvStem("aligned", B=1, H=7, W=7, layers=(cases.Conv(17),)),
    ):
        inputs = case.make_inputs(torch.float32)
        expected, _ = check.run(case, inputs, "cpu")
        for name, value in inputs.items():
            storage = torch.full((value.numel() + offset,), torch.nan)
            inputs[name] = storage[offset:].view(value.shape).copy_(value)
        assert check.same_bits(check.run(case, inputs, "cpu")[0], expected)
