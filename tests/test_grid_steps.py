"""Steps of a chain that know the grid: as right as the single ops, and refused where unfit."""

import copy

import pytest
import torch
from check import accurate
from test_chain import assert_alone_as_together
from test_ops_layer import in_float64, needs_library, weights

import hybridops as ho
from hybridops import backend
from hybridops.ops import pack_patch
from hybridops.ops.chain import Chain, mlp_step
from hybridops.ops.grid_steps import positions_step, reduced_step, windows_step
from hybridops.ops.layer import Weights

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
C, GRID = 24, (6, 8)


def same(w):
    return w


def exactly(w):
    return in_float64(w) if isinstance(w, Weights) else w.double()


def perceptron(dtype):
    up, down = weights(2 * C, C, dtype), weights(C, 2 * C, dtype)
    return lambda to: mlp_step(to(up), to(down), activation="gelu", residual=True)


def windowed(dtype):
    mlp = perceptron(dtype)

    def make(to):
        there, back = windows_step(GRID, (3, 2)), windows_step(GRID, (3, 2), back=True)
        return [there, mlp(to), back]

    return make


def windows_alone(dtype):
    """What a window's tokens are shows in which of them the convolution takes together."""
    taps = torch.randn(C, 1, 3, 3).to(dtype)
    mlp = perceptron(dtype)

    def make(to):
        return [
            windows_step(GRID, (3, 4)),
            positions_step(to(taps), None, grid=(3, 4)),
            windows_step(GRID, (3, 4), back=True),
            mlp(to),
        ]

    return make


def positions(kernel):
    def case(dtype):
        taps = torch.randn(C, 1, kernel, kernel).to(dtype)
        bias = torch.randn(C).to(dtype)
        return lambda to: [positions_step(to(taps), to(bias), grid=GRID)]

    return case


def reduced(r, norm_bias=True, residual=True, heads=3):
    def case(dtype):
        wide = 16 if r == 1 else C  # what the reduction gives
        q, kv, out = weights(C, C, dtype), weights(2 * C, wide, dtype), weights(C, C, dtype)
        kernel = (torch.randn(wide, C, r, r) / (r * C**0.5)).to(dtype)
        shift = torch.randn(wide).to(dtype)
        vectors = [torch.randn(n).to(dtype) for n in (C, C, wide, wide)]

        def make(to):
            g, b, g_r, b_r = map(to, vectors)
            packed = pack_patch(kernel) if to is same and backend.packs(kernel) else None
            return [
                reduced_step(
                    to(q),
                    Weights(to(kernel), to(shift), packed),
                    to(kv),
                    to(out),
                    grid=GRID,
                    heads=heads,
                    norm=(g, b if norm_bias else None, 1e-6),
                    reduction_norm=(g_r, b_r if norm_bias else None, 1e-5),
                    residual=residual,
                )
            ]

        return make

    return case


CASES = {
    "windows around a perceptron": windowed,
    "windows around a convolution": windows_alone,
    "positions 3x3": positions(3),
    "positions 5x5": positions(5),
    "reduced by 2": reduced(2),
    "reduced by 1": reduced(1),
    "without biases of norms": reduced(2, norm_bias=False),
    "without residual": reduced(2, residual=False, heads=1),
}


@needs_library
@DTYPES
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_as_right_as_torch(case, dtype, B):
    make = CASES[case](dtype)
    x = torch.randn(B, 48, 40).to(dtype)[..., 3 : C + 3]  # rows of wider ones
    with torch.inference_mode():
        counted = backend.fallbacks.total()
        ours = Chain(make(same))(x)
        assert backend.fallbacks.total() == counted
        with ho.use("reference"):
            torchs = Chain(make(same))(x)
            exact = Chain(make(exactly))(x.double())
    assert ours.shape == (B, 48, C)
    accurate(ours, torchs, exact, case)


@needs_library
@pytest.mark.parametrize("B", [2, 7, 16])
@pytest.mark.parametrize("case", CASES)
def test_images_alone_and_together(case, B, threads):
    assert_alone_as_together(Chain(CASES[case](torch.float32)(same)), torch.randn(B, 48, C))


@needs_library
def test_windows_that_make_up_an_image_stay_together(threads):
    """A chain that begins with them: eight windows to an image."""
    mlp = perceptron(torch.float32)(same)
    there, back = windows_step(GRID, (3, 2)), windows_step(GRID, (3, 2), back=True)
    x = torch.randn(5, 48, C)
    counted = backend.fallbacks.total()
    with torch.inference_mode():
        windows = there.call(x)
        assert torch.equal(Chain([back, mlp])(windows), Chain([mlp])(x))
    assert backend.fallbacks.total() == counted


@needs_library
def test_no_images():
    steps = [*windowed(torch.float32)(same), *positions(3)(torch.float32)(same)]
    steps += reduced(2)(torch.float32)(same)
    with torch.inference_mode():
        assert Chain(steps)(torch.randn(0, 48, C)).shape == (0, 48, C)


@needs_library
@pytest.mark.parametrize("case", CASES)
def test_tokens_that_do_not_fit_their_grid(case):
    chain = Chain(CASES[case](torch.float32)(same))
    counted = backend.fallbacks.total()
    with torch.inference_mode(), pytest.raises((ValueError, RuntimeError)):
        chain(torch.randn(1, 47, C))
    assert backend.fallbacks.total() > counted


def test_windows_must_fill_their_grid():
    with pytest.raises(ValueError, match="do not fill a grid"):
        windows_step(GRID, (4, 4))
    for bad in (0, -1, 2**62):
        with pytest.raises(ValueError, match="must be in"):
            windows_step((bad, 8), (1, 1))
        with pytest.raises(ValueError, match="must be in"):
            positions_step(torch.randn(C, 1, 3, 3), None, grid=(6, bad))


HUGE = [0, -1, 2**31, 2**62, 2**63 - 1]


@needs_library
@pytest.mark.parametrize("bad", HUGE)
def test_hostile_integers_are_refused_by_the_kernel(bad):
    plan, vector = torch.ops.hybridops.chain_plan, torch.ones(C)
    taps = torch.randn(C, 1, 3, 3)
    q, kv, kernel = torch.randn(C, C), torch.randn(2 * C, C), torch.randn(C, C, 2, 2)
    packed = pack_patch(kernel)
    linear = [vector, None, q, None, None, kernel, None, packed, vector, None]
    linear += [kv, None, None, q, None, None]
    for at in range(4):
        ints = [6, 8, 3, 2]
        ints[at] = bad
        with pytest.raises(RuntimeError, match="chain"):
            plan([3, 5], [taps, None], [*ints, 0, 6, 8], [])
    for at in range(2):
        ints = [6, 8]
        ints[at] = bad
        with pytest.raises(RuntimeError, match="chain"):
            plan([5], [taps, None], ints, [])
    for at in range(3):
        ints = [3, 6, 8]
        ints[at] = bad
        with pytest.raises(RuntimeError, match="chain"):
            plan([4], linear, [*ints, 1], [1e-5, 1e-5, 0.3])


@needs_library
@pytest.mark.parametrize("wrong", range(16))
def test_weights_that_do_not_fit_are_refused(wrong):
    """Each of the operands in turn with another number of features than the others have."""
    plan, vector = torch.ops.hybridops.chain_plan, torch.ones(C)
    kernel = torch.randn(C, C, 2, 2)
    q, kv = torch.randn(C, C), torch.randn(2 * C, C)
    linear = [vector, vector, q, vector, None, kernel, vector, pack_patch(kernel), vector, vector]
    linear += [kv, torch.ones(2 * C), None, q, vector, None]
    if linear[wrong] is None:
        return
    other = {1: (C + 1,), 2: (C + 1, C + 1), 4: (C + 1, C + 1, 2, 2)}[linear[wrong].dim()]
    linear[wrong] = torch.ones(other)
    with pytest.raises(RuntimeError, match="fit|channels|pack_patch"):
        plan([4], linear, [3, 6, 8, 1], [1e-5, 1e-5, 0.3])


@needs_library
def test_a_stage_of_twins_is_one_dispatch(timm):
    options = {"num_classes": 7, "img_size": 64, "wss": [2, 2, 2, 2]}
    model = timm.create_model("twins_svt_small", **options).eval()
    x = torch.randn(2, 3, 64, 64)
    ho.optimize(model)
    with torch.inference_mode():
        expected = ho.restore(copy.deepcopy(model))(x)
        model(x)
        with torch.profiler.profile() as seen:
            ours = model(x)
        counts = {e.key: e.count for e in seen.key_averages() if e.key.startswith("hybridops::")}
        assert counts == {"hybridops::patch_embed": 4, "hybridops::chain": 4}
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
        other = torch.randn(1, 3, 96, 96)  # windows of 2 do not fill the last grid, of 3 x 3
        expected = ho.restore(copy.deepcopy(model))(other)
        torch.testing.assert_close(model(other), expected, rtol=1e-3, atol=1e-4)


@needs_library
def test_chains_of_many_sizes_do_not_pile_up(timm, monkeypatch):
    from hybridops.optimize import timm_twins

    monkeypatch.setattr(timm_twins, "_CHAINS", 4)
    model = timm.create_model("twins_svt_small", num_classes=7, wss=[1, 1, 1, 1]).eval()
    ho.optimize(model)
    images = [torch.randn(1, 3, n, n) for n in (32, 64, 96)]
    with torch.inference_mode():
        for x in (*images, *images):
            expected = ho.restore(copy.deepcopy(model))(x)
            torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    kept = [v for v in vars(model).values() if isinstance(v, dict) and "plan" in v]
    assert len(kept[0]["plan"].value._chains) == 4
