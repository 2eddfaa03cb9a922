"""Layers one behind the other in one dispatch: as right as the layers called one by one."""

import copy
import gc

import pytest
import torch
from check import accurate
from test_ops_layer import in_float64, needs_library, weights
from torch._subclasses.fake_tensor import FakeTensorMode

import hybridops as ho
from hybridops import backend
from hybridops.ops.chain import (
    Chain,
    attention_step,
    linear_step,
    mean_step,
    mlp_step,
    subsample_step,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def same(w):
    return w


def levit_like(dtype):
    """A block, a subsampling from 5 x 7 to 3 x 4 tokens, and a perceptron, as make(convert)."""
    C, Co, heads, D, Dv = 37, 24, 3, 8, 20
    qkv, out = weights(heads * (2 * D + Dv), C, dtype), weights(C, heads * Dv, dtype)
    kv, q = weights(heads * (D + Dv), C, dtype), weights(heads * D, C, dtype, bias=False)
    proj, up, down = (
        weights(n, k, dtype) for n, k in ((Co, heads * Dv), (2 * Co, Co), (Co, 2 * Co))
    )
    scores = torch.randn(1, heads, 35, 35).to(dtype)
    fewer = torch.randn(1, heads, 12, 35).to(dtype)
    gamma = torch.randn(Co).to(dtype)

    def make(convert, number):
        shape = {"heads": heads, "key_dim": D, "scale": 0.3, "activation": "hardswish"}
        return Chain(
            [
                attention_step(
                    convert(qkv),
                    convert(out),
                    interleaved=True,
                    residual=True,
                    bias=number(scores),
                    **shape,
                ),
                subsample_step(
                    convert(kv),
                    convert(q),
                    convert(proj),
                    grid=(5, 7),
                    stride=2,
                    bias=number(fewer),
                    **shape,
                ),
                mlp_step(
                    convert(up),
                    convert(down),
                    activation="gelu",
                    norm=(number(gamma), None, 1e-6),
                    residual=True,
                ),
            ]
        )

    return make


@needs_library
@DTYPES
@pytest.mark.parametrize("B", [1, 3])
def test_as_right_as_torch(dtype, B):
    make = levit_like(dtype)
    x = torch.randn(B, 35, 64).to(dtype)[..., :37]  # a slice of wider rows, read where it lies
    with torch.inference_mode():
        counted = backend.fallbacks.total()
        ours = make(same, same)(x)
        assert backend.fallbacks.total() == counted
        with ho.use("reference"):
            torchs = make(same, same)(x)
            exact = make(in_float64, torch.Tensor.double)(x.double())
    assert ours.shape == (B, 12, 24)
    accurate(ours, torchs, exact, "chain")


def assert_alone_as_together(chain, x):
    """Images go through on their own, where that shares out evenly: the bits must not tell."""
    with torch.inference_mode():
        together = chain(x)
        alone = [chain(image) for image in x.split(1)]
    assert together.is_inference()
    assert torch.equal(together, torch.cat(alone))


@needs_library
@DTYPES
@pytest.mark.parametrize("B", [2, 5, 16, 17])
def test_images_alone_and_together(B, dtype, threads):
    chain = levit_like(dtype)(same, same)
    assert_alone_as_together(chain, torch.randn(B, 35, 64).to(dtype)[..., :37])
    wide = 300_000 // 64  # more than a thread's cache is to hold of images
    up, down = weights(24, 16, dtype), weights(16, 24, dtype)
    chain = Chain([mlp_step(up, down, activation="relu", residual=True)])
    assert_alone_as_together(chain, torch.randn(B, wide, 16).to(dtype))


@needs_library
@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens_of_many_images(tokens, threads):
    """Products of few rows sum in shorter chains, so these images must stay together."""
    up, down = weights(600, 500, torch.float32), weights(500, 600, torch.float32)
    chain = Chain([mlp_step(up, down, activation="none")])
    x = torch.randn(8, tokens, 500)
    with torch.inference_mode():
        assert torch.equal(chain(x), chain(x.view(1, -1, 500)).view_as(x))


@needs_library
def test_a_bias_for_each_image(threads):
    C, heads, D, B = 24, 3, 8, 8
    qkv, out = weights(3 * C, C, torch.float32), weights(C, C, torch.float32)
    bias = torch.randn(B, heads, 9, 9)
    step = attention_step(qkv, out, heads=heads, key_dim=D, bias=bias)
    x = torch.randn(B, 9, C)
    counted = backend.fallbacks.total()
    with torch.inference_mode():
        together = Chain([step])(x)
        assert backend.fallbacks.total() == counted
        for i in range(B):
            one = attention_step(qkv, out, heads=heads, key_dim=D, bias=bias[i : i + 1])
            assert torch.equal(Chain([one])(x[i : i + 1])[0], together[i])


@needs_library
@DTYPES
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("B", "N"), [(1, 1), (1, 16), (3, 49), (20, 197)])
def test_the_mean_token_and_a_linear_layer(B, N, normed, dtype):
    C = 37
    w, gamma, beta = weights(11, C, dtype), torch.randn(C).to(dtype), torch.randn(C).to(dtype)
    x = (torch.randn(B, N, 64) + 1).to(dtype)[..., :C]

    def run(convert, number):
        norm = (number(gamma), number(beta), 1e-6) if normed else None
        return Chain([mean_step(), linear_step(convert(w), norm=norm)])(number(x))

    with torch.inference_mode():
        counted = backend.fallbacks.total()
        ours = run(same, same)
        assert backend.fallbacks.total() == counted
        with ho.use("reference"):
            torchs, exact = run(same, same), run(in_float64, torch.Tensor.double)
    assert ours.shape == (B, 1, 11)
    accurate(ours, torchs, exact, "mean, linear")


@needs_library
def test_the_mean_of_no_tokens_is_torchs():
    chain = Chain([mean_step(), linear_step(weights(3, 5, torch.float32))])
    with torch.inference_mode():
        assert chain(torch.ones(2, 0, 5)).isnan().all()
        assert chain(torch.ones(0, 4, 5)).shape == (0, 1, 3)


@needs_library
def test_is_one_dispatch():
    chain = levit_like(torch.float32)(same, same)
    with torch.inference_mode():
        chain(torch.randn(2, 35, 37))  # plans
    with torch.inference_mode(), torch.profiler.profile() as seen:
        chain(torch.randn(2, 35, 37))
    names = [event.key for event in seen.key_averages() if event.key.startswith("hybridops::")]
    assert names == ["hybridops::chain"]


def test_gradients_take_single_layers():
    chain = levit_like(torch.float32)(same, same)
    x = torch.randn(1, 35, 37, requires_grad=True)
    chain(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_no_layers():
    with pytest.raises(ValueError, match="one layer at least"):
        Chain([])


@needs_library
@pytest.mark.parametrize("N", [1, 34, 36])
def test_tokens_that_do_not_fit_their_grid(N):
    """The kernel refuses; the single layers then say why."""
    chain = levit_like(torch.float32)(same, same)
    counted = backend.fallbacks.total()
    with torch.inference_mode(), pytest.raises((ValueError, RuntimeError)):
        chain(torch.randn(1, N, 37))
    assert backend.fallbacks.total() > counted


@needs_library
@pytest.mark.parametrize(
    ("codes", "tensors", "ints", "floats"),
    [
        ([], 0, 0, 0),
        ([8], 0, 0, 0),
        ([6], 5, 0, 0),
        ([6], 4, 0, 1),
        ([-1], 0, 0, 0),
        ([0], 9, 4, 2),
        ([0], 8, 5, 2),
        ([1], 8, 2, 0),
        ([2], 10, 6, 0),
        ([2], 0, 0, 0),
    ],
)
def test_too_few_operands_are_refused(codes, tensors, ints, floats):
    plan = torch.ops.hybridops.chain_plan
    with pytest.raises(RuntimeError, match="chain|layer|fit"):
        plan(codes, [torch.randn(12, 4)] * tensors, [1] * ints, [1.0] * floats)


@needs_library
@DTYPES
def test_opcheck(dtype):
    chain = levit_like(dtype)(same, same)
    x = torch.randn(2, 35, 37).to(dtype)
    with torch.no_grad():
        chain(x)
        op, arguments = torch.ops.hybridops.chain.default, (x, chain._plan.number)
        torch.library.opcheck(op, arguments, test_utils=("test_schema",))


@needs_library
def test_fake_tensors_take_single_layers():
    chain = levit_like(torch.float32)(same, same)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        assert chain(fake.from_tensor(torch.randn(2, 35, 37))).shape == (2, 12, 24)
    assert chain._plan is None


@needs_library
def test_a_plan_goes_with_its_chain():
    chain, x = levit_like(torch.float32)(same, same), torch.randn(1, 35, 37)
    with torch.inference_mode():
        chain(x)
        number = chain._plan.number
        torch.ops.hybridops.chain(x, number)
        copied = copy.deepcopy(chain)
        assert copied._plan is None
        assert torch.equal(copied(x), chain(x))
        assert copied._plan.number != number
        del chain
        gc.collect()
        with pytest.raises(RuntimeError, match="no such plan"):
            torch.ops.hybridops.chain(x, number)
        for unknown in (-1, 0, 2**63 - 1):
            with pytest.raises(RuntimeError, match="no such plan"):
                torch.ops.hybridops.chain(x, unknown)


@needs_library
def test_a_plan_keeps_the_numbers_it_was_made_of():
    """Parameters that get other data leave it with the old, not with freed memory."""
    shift = torch.nn.Parameter(torch.randn(37))
    up, down = weights(48, 37, torch.float32), weights(37, 48, torch.float32)
    norm = (torch.ones(37), shift, 1e-5)
    chain = Chain([mlp_step(up, down, activation="gelu", norm=norm)])
    x = torch.randn(1, 35, 37)
    with torch.inference_mode():
        before = chain(x)
        shift.data = torch.full((37,), 7.0)
        gc.collect()
        assert torch.equal(chain(x), before)


HUGE = [2**40, 2**61, 2**62, 2**63 - 1]
BAD = [
    *((heads, key_dim, 2) for heads in (1, 2, 3, 4, *HUGE) for key_dim in (-1, 0, *HUGE)),
    *((heads, 8, 2) for heads in (-1, 0, 5, *HUGE)),
    *((1, 8, stride) for stride in (-(2**63), -1, 0, 2**63 - 1)),
]


@needs_library
@pytest.mark.parametrize(("heads", "key_dim", "stride"), BAD)
def test_hostile_integers_are_refused_by_the_kernel(heads, key_dim, stride):
    """Products of them overflow: 4 * 2**62 is 0, which a weight without rows would fit."""
    kv, q, out = (torch.randn(n, 16) for n in (48, 8, 16))
    plan, bias = torch.ops.hybridops.chain_plan, torch.zeros(1, 1, 12, 35)
    for queries, width in ((q, 40), (q[:0], 48)):  # values: 48 rows less heads * key_dim
        mixed = torch.randn(16, width)
        tensors = [kv, None, None, queries, None, None, bias, mixed, None, None]
        with pytest.raises(RuntimeError, match="chain|layer"):
            plan([2], tensors, [heads, key_dim, 5, 7, stride, 0], [1.0])
    if stride == 2:
        tensors = [None, None, kv, None, None, None, out, None, None]
        with pytest.raises(RuntimeError, match="layer"):
            plan([0], tensors, [heads, key_dim, 0, 0, 0], [0.0, 1.0])


@pytest.mark.parametrize("wrong", [{"heads": 0}, {"key_dim": 2**62}, {"stride": -1}])
def test_a_subsampling_that_cannot_be_is_refused_when_it_is_made(wrong):
    linear = weights(8, 8, torch.float32)
    options = {"heads": 1, "key_dim": 8, "grid": (5, 7), "stride": 2, **wrong}
    with pytest.raises(ValueError, match="subsample_step: .* must be in"):
        subsample_step(linear, linear, linear, scale=1, bias=None, activation="none", **options)
