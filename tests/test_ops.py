"""Every op, case, dtype and backend against float64; and what the references themselves mean."""

from __future__ import annotations

import sys

import check
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, all_cases, find

import hybridops
from hybridops import BackendUnavailable, backend, ops

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("nan_filled")


def dtype_name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def assert_served_by_kernel(case, dtype) -> None:
    """The C++ op, with its own gradient, stands behind the output: no fallback can pass as it."""
    inputs = case.make_inputs(dtype)
    leaves = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()}
    x = next(t for t in leaves.values() if t.is_floating_point())
    with hybridops.use("cpu"):
        assert backend.which(case.op, x) == "cpu"
        node, seen = case.call(leaves).grad_fn, []
        while node is not None and len(seen) < 6:  # views may stand behind it
            seen.append(node.name())
            node = node.next_functions[0][0] if node.next_functions else None
    assert any(f"hybridops_{case.op}_" in name for name in seen), seen


@pytest.mark.parametrize("case", all_cases(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_matches(case, dtype, each_backend):
    if each_backend == "cpu" and case.unserved:
        with hybridops.use("cpu"), pytest.raises(BackendUnavailable, match=case.unserved):
            case.call(case.make_inputs(dtype))
        return
    if each_backend == "cpu":
        assert_served_by_kernel(case, dtype)
    check.outputs_and_gradients(case, dtype, each_backend)


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_case_can_fail(case):
    """Its result is neither constant nor tiny, so an output of zeros could not pass."""
    y, _ = check.run(case, case.make_inputs(torch.float64), "reference")
    if y.numel() == 0 or case.name.startswith("empty"):
        return
    assert 0.01 < check.rms(y) < 1e4
    assert y.count_nonzero() >= 0.25 * y.numel()
    with pytest.raises(AssertionError, match="error"):
        check.accurate(torch.zeros_like(y), y, y, "zeros")


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=dtype_name)
def test_other_dtypes_go_to_the_reference_and_are_counted(op, dtype):
    case = next(c for c in CASES[op] if not c.unserved)
    inputs = case.make_inputs(dtype)
    before = backend.fallbacks.copy()
    y = case.call(inputs)
    (found,) = (backend.fallbacks - before).items()
    reason = f"no CPU kernel for {dtype_name(dtype)}" if backend.ISA else "no C++ library"
    assert found == ((op, reason), 1)
    assert check.same_bits(y, check.run(case, inputs, "reference")[0])
    if backend.ISA:
        with hybridops.use("cpu"), pytest.raises(BackendUnavailable, match=f"{op}.*{reason}"):
            case.call(inputs)


@pytest.mark.parametrize("case", [c for c in all_cases() if c.unserved], ids=str)
def test_unserved_options_go_to_the_reference_and_are_counted(case):
    before = backend.fallbacks.copy()
    case.call(case.make_inputs(torch.float32))
    (found,) = (backend.fallbacks - before).items()
    assert found == ((case.op, case.unserved), 1)


SMALL = [
    "attention-odd_dims",
    "attention-act_gelu",
    "attention-levit_wide",
    "attention-mask_and_table",
    "attention-bias_queries",
    "linear-everything",
    "linear-act_hardswish",
    "peg-k5",
    "peg-stride2",
    "peg-gate",
    "peg-gate_act",
    "peg-act_no_residual",
    "patch_embed-pos_all",
    "patch_embed-overlap_k3s2",
    "patch_embed-uint8_normalised",
    "conv_stem-odd_channels",
    "conv_stem-same",
    "conv_stem-resnet_odd",
    "conv_stem-cmt_affine",
    "conv_stem-bit_group_norm",
]


@pytest.mark.parametrize("name", SMALL)
def test_gradcheck_of_the_reference(name):
    case = find(name)
    inputs = case.make_inputs(torch.float64)
    names = [n for n, t in inputs.items() if t.is_floating_point()]
    leaves = [inputs[n].requires_grad_() for n in names]

    def call(*leaves):
        return case.call(inputs | dict(zip(names, leaves, strict=True)))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True, atol=1e-4)


# The references against torch's own functions, written the other way round.


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def test_attention_means_scaled_dot_product_attention():
    q, k, v, bias = draw(2, 7, 3, 8), draw(2, 11, 3, 8), draw(2, 11, 3, 5), draw(2, 3, 7, 11)
    padding = torch.arange(11).expand(2, 11) >= torch.tensor([[11], [6]])
    mask = bias.masked_fill(padding[:, None, None, :], -torch.inf)
    theirs = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), mask, scale=0.3
    )
    ours = ops.attention(q, k, v, bias=bias, key_padding_mask=padding, scale=0.3)
    close(ours, theirs.transpose(1, 2))
    hardswish = ops.attention(q, k, v, bias=mask, scale=0.3, activation="hardswish")
    close(hardswish, F.hardswish(theirs.transpose(1, 2)))


@pytest.mark.parametrize(
    "name", ["mask_and_bias", "mask_and_table", "bias_head_3d", "odd_dims", "act_silu", "detr_850"]
)
def test_torchs_best_attention_means_the_same(name, monkeypatch):
    """What serves a GPU without kernels, here on CPU tensors."""
    case = find(f"attention-{name}")
    inputs = case.make_inputs(torch.float64)
    with hybridops.use("reference"):
        expected = case.call(inputs)
        module = sys.modules["hybridops.ops.attention"]
        monkeypatch.setattr(module, "attention_reference", module.attention_by_torch)
        close(case.call(inputs), expected)


def test_torchs_best_attention_gives_nan_where_an_index_points_outside_the_table(monkeypatch):
    """On a GPU nobody looks at the index first; here on CPU tensors."""
    module = sys.modules["hybridops.ops.attention"]
    monkeypatch.setattr(module, "_spread", module._nan_outside)
    q, table, index = draw(1, 3, 2, 8), draw(2, 9), torch.tensor([[0, 8, 1], [0, 9, 1], [-1, 2, 3]])
    y = module.attention_by_torch(q, q, q, table, index, None, 0.125, 0)
    assert y.isnan().flatten(2).all(2).tolist() == [[False, True, True]]
    close(y[:, 0], module.attention_reference(q, q, q, table, index % 9, None, 0.125, 0)[:, 0])


def test_attention_of_a_row_without_keys_is_zero_as_in_torch():
    q, k, v = (draw(2, 5, 1, 4) for _ in range(3))
    padding = torch.tensor([[True] * 5, [False] * 5])
    mask = torch.zeros(2, 1, 5, 5).double().masked_fill(padding[:, None, None, :], -torch.inf)
    theirs = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask)
    assert not theirs[0].any()
    close(ops.attention(q, k, v, key_padding_mask=padding), theirs.transpose(1, 2))


def test_attention_table_is_the_gathered_bias():
    q, k, v = draw(1, 4, 2, 8), draw(1, 6, 2, 8), draw(1, 6, 2, 8)
    table, index = draw(2, 9), torch.randint(9, (4, 6))
    dense = torch.stack([table[h].take(index) for h in range(2)])
    close(ops.attention(q, k, v, bias=table, bias_index=index), ops.attention(q, k, v, bias=dense))


def test_linear_means_layer_norm_linear_activation_residual():
    x, residual, fc, norm = (
        draw(2, 5, 12),
        draw(2, 5, 7),
        torch.nn.Linear(12, 7),
        torch.nn.LayerNorm(12),
    )
    fc, norm = fc.double(), norm.double()
    norm.weight.data, norm.bias.data = draw(12), draw(12)
    ours = ops.linear(
        x,
        fc.weight,
        fc.bias,
        norm=(norm.weight, norm.bias, norm.eps),
        activation="gelu",
        residual=residual,
    )
    close(ours, F.gelu(fc(norm(x))) + residual)


@pytest.mark.parametrize("gate", [False, True])
def test_peg_means_depthwise_conv_on_the_grid(gate):
    x, conv = draw(2, 1 + 35, 6), torch.nn.Conv2d(6, 6, 3, padding=1, groups=6).double()
    image = x[:, 1:].transpose(1, 2).reshape(2, 6, 5, 7)
    z = conv(image)
    y = image * z.sigmoid() if gate else image + z
    ours = ops.peg(x, conv.weight, conv.bias, grid=(5, 7), prefix=1, gate=gate)
    close(ours[:, 1:], y.flatten(2).transpose(1, 2))
    close(ours[:, :1], x[:, :1])


def test_peg_of_more_than_a_cache_holds_is_that_of_its_images():
    x, weight = torch.randn(9, 1 + 56 * 57, 64), torch.randn(64, 1, 3, 3)
    whole = ops.peg(x, weight, grid=(56, 57), prefix=1)  # fetched ahead, on the CPU
    apart = [ops.peg(image, weight, grid=(56, 57), prefix=1) for image in x.split(1)]
    assert torch.equal(whole, torch.cat(apart))


@pytest.mark.parametrize("padding", [0, 1])
def test_patch_embed_means_normalise_conv_norm_position_prefix(padding):
    pixels = torch.randint(256, (2, 3, 12, 8), dtype=torch.uint8)
    conv, norm = torch.nn.Conv2d(3, 6, 4, 4, padding).double(), torch.nn.LayerNorm(6).double()
    mean, std, prefix = draw(3) * 0.1 + 0.5, draw(3).abs() + 0.2, draw(2, 6)
    image = (pixels.double() / 255 - mean[:, None, None]) / std[:, None, None]
    t = norm(conv(image).flatten(2).transpose(1, 2))
    pos = draw(2 + t.shape[1], 6)
    ours = ops.patch_embed(
        pixels,
        conv.weight,
        conv.bias,
        padding=padding,
        norm=(norm.weight, norm.bias, norm.eps),
        pos_embed=pos,
        prefix=prefix,
        mean=mean,
        std=std,
    )
    close(ours, torch.cat([prefix.expand(2, 2, 6), t], 1) + pos)


def test_conv_stem_means_its_chain_of_layers():
    image, convs = draw(2, 3, 21, 18), [torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Conv2d(8, 5, 3)]
    chain = torch.nn.Sequential(
        convs[0], torch.nn.Hardswish(), convs[1], torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1)
    ).double()
    layers = [
        ops.ConvLayer(convs[0].weight, convs[0].bias, 2, 1, "hardswish"),
        ops.ConvLayer(convs[1].weight, convs[1].bias, 1, 0, "relu"),
    ]
    ours = ops.conv_stem(image, layers, pool=ops.MaxPool(3, 2, 1), layout="image")
    close(ours, chain(image))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 2, 1), (2, 3, 0), (5, 1, 2), (1, 4, 0), (4, 2, 2)]
)
def test_a_pool_behind_a_stem_in_bands_of_rows(kernel, stride, padding, dtype, cpu_library):
    """Whatever rows two bands share, and whatever rows no window reads."""
    image = torch.randn(2, 3, 150, 300).to(dtype)
    layer = ops.ConvLayer(torch.randn(70, 3, 7, 7).to(dtype), torch.randn(70).to(dtype), 2, 3)
    with torch.inference_mode():
        pool = ops.MaxPool(kernel, stride, padding)
        ours = ops.conv_stem(image, [layer], pool=pool, layout="image")
        before = ops.conv_stem(image, [layer], layout="image").float()
        pooled = F.max_pool2d(before, kernel, stride, padding).to(dtype)
    assert torch.equal(ours, pooled)


@pytest.mark.parametrize(
    ("pool", "match"),
    [
        ([3, 0, 1, 1, 1, 1], "no such pool"),
        ([0, 2, 1, 1, 1, 1], "no such pool"),
        ([3, -(2**63), 1, 1, 1, 1], "no such pool"),
        ([3, 2, 1], "no such pool"),
        ([3, 2, -1, 1, 1, 1], "bad padding"),
        ([3, 2, 1, 1, 2**62, 1], "bad padding"),
        ([8, 2, 0, 1, 1, 1], "does not fit"),
        ([8, 2, 1, 0, 1, 0], "does not fit"),
        ([2**63 - 1, 2, 1, 1, 1, 1], "does not fit"),
    ],
)
def test_hostile_pools_are_refused_by_the_kernel(pool, match, cpu_library):
    image, weight, bias = torch.randn(1, 3, 6, 7), torch.randn(4, 3, 1, 1), torch.randn(4)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.hybridops.conv_stem(image, [weight], [bias], [], [1], [0] * 4, [0], pool)


@pytest.mark.parametrize("stride", [6, 20, 2**31, 2**62, 2**63 - 1])
def test_strides_of_a_pool_longer_than_the_image(stride, cpu_library):
    image, weight, bias = torch.randn(1, 3, 5, 29), torch.randn(4, 3, 1, 1), torch.randn(4)
    layer = [image, [weight], [bias], [], [1], [0] * 4, [0]]
    with torch.inference_mode():
        ours = torch.ops.hybridops.conv_stem(*layer, [3, stride, 1, 1, 1, 1])
        before = torch.ops.hybridops.conv_stem(*layer, []).view(1, 5, 29, 4).permute(0, 3, 1, 2)
        pooled = F.max_pool2d(before, 3, min(stride, 64), 1)
    assert torch.equal(ours, pooled.flatten(2).transpose(1, 2))


def test_conv_stem_same_padding_is_tensorflows():
    image, weight = draw(1, 2, 10, 11), draw(4, 2, 3, 3)
    ours = ops.conv_stem(image, [ops.ConvLayer(weight, stride=2, padding="same")], layout="image")
    padded = F.pad(image, (1, 1, 0, 1))  # 11 columns need 2 more, 10 rows only 1, at the end
    close(ours, F.conv2d(padded, weight, stride=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_all_keys_share_cancels_in_the_queries_gradient(dtype, cpu_library):
    """A row of score gradients sums to zero; from a rounded output it would not."""
    q, k, v, dy = (torch.randn(2, 70, 3, 32, dtype=torch.float64) for _ in range(4))
    k, v = (0.1 * x + 8 * torch.randn(1, 1, 3, 32, dtype=torch.float64) for x in (k, v))
    inputs = [x.to(dtype) for x in (0.01 * q, k, v)]

    def gradients(convert, backend):
        leaves = [convert(x).requires_grad_() for x in inputs]
        with hybridops.use(backend):
            y = hybridops.ops.attention(*leaves, scale=0.05)
            return torch.autograd.grad(y, leaves, convert(dy.to(dtype)))

    ours = gradients(torch.clone, "cpu")
    torchs = gradients(torch.clone, "reference")
    exact = gradients(torch.Tensor.double, "reference")
    for name, *three in zip(("dq", "dk", "dv"), ours, torchs, exact, strict=True):
        check.accurate(*three, name, factor=3)
