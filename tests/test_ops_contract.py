"""What torch relies on behind each public op: schema, fake, gradient, repeatability, NaN."""

from __future__ import annotations

import threading
import warnings
from contextlib import nullcontext

import check
import pytest
import torch
from cases import CASES, find
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import hybridops
from hybridops import backend, ops
from hybridops.bench import case as cases

pytestmark = pytest.mark.usefixtures("nan_filled")


class Recorder(TorchDispatchMode):
    """Notes every call of our own ops, forward and backward, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hybridops":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(case, layout, dtype=torch.float32, grad_layout="contiguous"):
    """The raw calls behind a case: one forward, and those of its backward."""
    inputs = case.make_inputs(dtype, layout)
    dy = check.make_dy(case, inputs, grad_layout)
    with Recorder() as recorder:
        check.run(case, inputs, "cpu", dy)
    return recorder.calls


# Eight samples of each raw op: plain, permuted dense, sliced, odd offset, expanded, empty, bf16.
OPCHECK = {
    "attention": ("levit_32_64", "mask_and_bias", "odd_dims", "empty_queries"),
    "linear": ("everything", "n17_k7", "vector", "empty_rows"),
    "peg": ("k5", "stride2", "gate", "empty_batch"),
    "patch_embed": ("pos_all", "overlap_k3s2", "uint8_normalised", "empty_batch"),
    "conv_stem": ("odd_channels", "resnet_odd", "same", "empty_batch"),
}
SAMPLES = [
    (f"{op}-{name}", layout, dtype)
    for op, names in OPCHECK.items()
    for name, layouts in zip(
        names,
        (
            ("contiguous", "transposed"),
            ("sliced", "channels_last"),
            ("offset", "expanded"),
            ("contiguous",),
        ),
        strict=True,
    )
    for layout, dtype in zip(layouts, (torch.float32, torch.bfloat16), strict=False)
] + [(f"{op}-{names[0]}", "sliced_rows", torch.float32) for op, names in OPCHECK.items()]


@pytest.mark.parametrize(("name", "layout", "dtype"), SAMPLES)
def test_opcheck(name, layout, dtype, cpu_library):
    calls = recorded(find(name), layout, dtype)
    assert len(calls) >= 2, "a forward and a backward"
    for func, args in calls:
        args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        if func._opname == "pack_linear":  # its layout belongs to the library, so it has no fake
            continue
        if "backward" not in func._opname:
            args = torch.utils._pytree.tree_map_only(torch.Tensor, _requires_grad, args)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # opcheck reads .grad of views on its own account
            results = torch.library.opcheck(func, args, raise_exception=False)
        assert set(results.values()) == {"SUCCESS"}, (func, results)


def _requires_grad(t):
    return t.requires_grad_() if t.is_floating_point() else t


REPEATED = [
    "attention-mask_and_table",
    "attention-n197_d64",
    "linear-mlp_in",
    "linear-n577_k192",
    "peg-cpvt",
    "peg-gate",
    "patch_embed-patch4",
    "conv_stem-resnet",
    "conv_stem-levit",
]


def bits(case, inputs, dy):
    """Output and gradients, but for LayerNorm's: torch's own kernel adds those up per thread."""
    y, grads = check.run(case, inputs, "cpu", dy)
    return {"y": y} | {name: dx for name, dx in grads.items() if "norm" not in name}


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("float32", "bfloat16"))
def test_twenty_runs_and_any_number_of_threads_give_the_same_bits(name, dtype, cpu_library):
    case = find(name)
    inputs = case.make_inputs(dtype)
    dy = check.make_dy(case, inputs)
    expected, threads = bits(case, inputs, dy), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            for _ in range(5):
                got = bits(case, inputs, dy)
                other = [n for n in expected if not check.same_bits(expected[n], got[n])]
                assert not other, f"other bits with {count} threads: {other}"
    finally:
        torch.set_num_threads(threads)


def leave_nan_behind():
    """NaN in the scratch memory that each thread keeps between calls."""
    x = torch.full((4, 300, 2, 64), torch.nan)
    padding = torch.arange(300).expand(4, 300) % 3 == 0
    image = torch.full((2, 8, 40, 40), torch.nan)
    layers = [ops.ConvLayer(torch.full((32, 8, 3, 3), torch.nan), activation="gelu")]
    ops.attention(x.requires_grad_(), x, x, bias=torch.zeros(1, 1, 1, 1)).sum().backward()
    ops.attention(x, x, x, key_padding_mask=padding)
    ops.linear(x.detach().flatten(2).bfloat16(), x.detach().flatten(2)[0, :128].bfloat16())
    ops.conv_stem(image, layers, pool=ops.MaxPool())


@pytest.mark.parametrize("op", CASES)
def test_scratch_that_an_earlier_call_left_is_never_read(op, cpu_library):
    for case in CASES[op]:
        if case.unserved:
            continue
        inputs = case.make_inputs(torch.float32)
        dy = check.make_dy(case, inputs)
        expected = bits(case, inputs, dy)
        leave_nan_behind()
        got = bits(case, inputs, dy)
        assert all(check.same_bits(expected[name], got[name]) for name in expected), case


def test_calls_from_several_threads_do_not_meet(cpu_library):
    plans, wrong = [], []
    for name in REPEATED:
        case = find(name)
        inputs = case.make_inputs(torch.float32)
        y, _ = check.run(case, inputs, "cpu")
        plans.append((case, inputs, y))

    def work():
        for _ in range(5):
            for case, inputs, expected in plans:
                if not check.same_bits(case.call(inputs), expected):
                    wrong.append(str(case))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize(
    "name",
    [
        "attention-act_silu",
        "linear-everything",
        "peg-gate",
        "patch_embed-pos_all",
        "conv_stem-odd_channels",
    ],
)
def test_second_derivative_is_right_or_refused(name, best_backend):
    case = find(name)

    def penalty(dtype, backend):
        inputs = case.make_inputs(dtype)
        leaves = {n: t.requires_grad_() for n, t in inputs.items() if t.is_floating_point()}
        with hybridops.use(backend):
            y = case.call(inputs)
            first = torch.autograd.grad(y.square().sum(), [*leaves.values()], create_graph=True)
            total = sum(g.square().sum() for g in first)
            return torch.autograd.grad(total, [*leaves.values()])

    if best_backend == "cpu":
        with pytest.raises(RuntimeError, match="differentiable once"):
            penalty(torch.float32, "cpu")
        return
    for ours, theirs in zip(
        penalty(torch.float32, "reference"), penalty(torch.float64, "reference"), strict=True
    ):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("attention-levit_32_64", torch.float32),
        ("linear-residual", torch.float32),
        ("linear-everything", torch.bfloat16),  # in fp32 its activation is an op of its own
        ("peg-gate", torch.float32),
        ("patch_embed-pos_all", torch.float32),
    ],
)
def test_a_door_records_in_one_step_what_torch_records(name, dtype, cpu_library):
    """torch's way to record a registered gradient, through the raw op, stays that of graphs."""
    case = find(name)
    inputs = case.make_inputs(dtype)
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    with Recorder() as recorder:
        y = case.call(leaves)
    assert y.grad_fn is not None
    dy = torch.randn_like(y)
    wanted = [t for t in leaves.values() if t.requires_grad]
    direct = torch.autograd.grad(y, wanted, dy)
    raw = getattr(torch.ops.hybridops, case.op).default
    (arguments,) = (arguments for op, arguments in recorder.calls if op == raw)
    z = raw(*arguments)
    z = z[0] if isinstance(z, tuple) else z
    assert "GeneratedBackward" in z.grad_fn.name()
    assert "GeneratedBackward" not in y.grad_fn.name()
    assert all(map(check.same_bits, direct, torch.autograd.grad(z, wanted, dy)))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "attention-levit_32_64",
        "linear-everything",
        "peg-gate",
        "patch_embed-pos_all",
        "conv_stem-levit",
    ],
)
def test_tangents_are_never_dropped(name, grad, cpu_library):
    """The kernels know none, so that inside dual_level() the reference serves."""
    case = find(name)
    inputs = case.make_inputs(torch.float32)
    before = sum(backend.fallbacks.values())

    def tangent(forced):
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            duals = {
                n: forward_ad.make_dual(t, torch.randn_like(t)) if t.is_floating_point() else t
                for n, t in inputs.items()
            }
            with hybridops.use("reference") if forced else nullcontext():
                return forward_ad.unpack_dual(case.call(duals)).tangent

    assert check.same_bits(tangent(False), tangent(True))
    assert sum(backend.fallbacks.values()) > before


NAN_CASES = [
    (cases.Attention("nan", Nq=19, Nk=35, D=20, B=1), ("q", "k", "v")),
    (cases.Attention("nan_bias", Nq=19, Nk=35, D=16, bias=(2, 2, 19, 35)), ("q", "bias")),
    (cases.Linear("nan", M=13, N=37, K=20), ("x", "weight", "bias")),
    (cases.Linear("nan_norm", M=13, N=37, K=20, norm="affine", residual=True), ("x", "residual")),
    *(
        (cases.Linear(f"nan_{act}", M=13, N=37, K=20, activation=act), ("x", "weight"))
        for act in ("relu", "gelu", "gelu_tanh", "silu", "hardswish")
    ),
    (cases.Peg("nan", H=5, W=7, C=37, K=3, prefix=1), ("x", "weight", "bias")),
    (cases.Peg("nan_relu", H=5, W=7, C=37, K=5, activation="relu", prefix=1), ("x",)),
    (cases.PatchEmbed("nan", H=16, W=16, C=19, kernel=(8, 8)), ("image", "bias")),
    (cases.PatchEmbed("nan_norm", H=16, W=16, C=19, kernel=(4, 4), norm="affine"), ("image",)),
    (cases.ConvStem("nan", H=11, W=11, layers=(cases.Conv(20, activation="relu"),)), ("image",)),
    (
        cases.ConvStem("nan_pool", H=16, W=16, layers=(cases.Conv(20),), pool=(3, 2, 1)),
        ("image", "bias0"),
    ),
]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("case", "names"), NAN_CASES, ids=lambda v: v if type(v) is tuple else str(v)
)
def test_nan_and_inf_appear_where_torch_has_them(case, names, value, cpu_library):
    for name in names:
        inputs = case.make_inputs(torch.float32)
        planted = inputs[name].view(-1)
        planted[planted.numel() // 2] = float(value)
        ours, _ = check.run(case, inputs, "cpu")
        # In float64: torch's fp32 GELU of infinity is infinity or NaN, as the CPU has it.
        torchs, _ = check.run(case, {n: t.double() for n, t in inputs.items()}, "reference")
        for test in (torch.isnan, torch.isposinf, torch.isneginf):
            differs = test(ours) != test(torchs)
            where = differs.nonzero()[:3].tolist()
            assert not differs.any(), f"{value} in {name}: {test.__name__} differs at {where}"
