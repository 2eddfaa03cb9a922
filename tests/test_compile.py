"""The public ops under torch.compile, torch.export and autocast: one graph, the same numbers."""

from __future__ import annotations

import check
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, find
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from hybridops import ops
from hybridops.bench import case as cases

SAMPLES = [
    "attention-levit",
    "attention-mask_and_bias",
    "attention-n49_d32_packed",
    "linear-everything",
    "linear-plain",
    "peg-cpvt",
    "peg-stride2",
    "peg-gate_act",
    "patch_embed-vit",
    "patch_embed-uint8_overlap",
    "conv_stem-levit",
    "conv_stem-resnet",
    "conv_stem-same",
    "conv_stem-cmt_affine",
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_order(case, inputs):
    """A function of tensors alone, as compile and export want it, and its arguments."""
    names = list(inputs)

    def call(*tensors):
        return case.call(dict(zip(names, tensors, strict=True)))

    return call, [inputs[name] for name in names]


def without_packing(case):
    return type(case)(**{**vars(case), "packed": False}) if hasattr(case, "packed") else case


def compiled_and_eager(case, dtype, compiler):
    call, tensors = in_order(case, case.make_inputs(dtype))
    for tensor in tensors:
        tensor.requires_grad_(tensor.is_floating_point())
    leaves = [t for t in tensors if t.requires_grad]
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    results = []
    for function in (compiled, call):
        y = function(*tensors)
        dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(y.dtype).view(y.shape)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    return results


@pytest.mark.parametrize("name", SAMPLES)
def test_compiles_into_one_graph_with_its_gradient(name):
    case = without_packing(find(name))
    compiled, eager = compiled_and_eager(case, torch.float32, "aot_eager")
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_gives_the_same_numbers():
    case = cases.Attention("inductor", Nq=17, D=16, bias="table", activation="hardswish")
    compiled, eager = compiled_and_eager(case, torch.float32, "inductor")
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", CASES)
def test_dynamic_sizes_share_a_graph(op):
    counter = CompileCounterWithBackend("aot_eager")
    layers = [ops.ConvLayer(torch.randn(8, 3, 3, 3), stride=2, activation="relu")]
    weight = {
        "attention": None,
        "linear": torch.randn(8, 12),
        "peg": torch.randn(8, 1, 3, 3),
        "patch_embed": torch.randn(12, 3, 8, 8),
        "conv_stem": None,
    }[op]

    def call(x):
        if op == "attention":
            return ops.attention(x, x, x, scale=0.3)
        if op == "linear":
            return ops.linear(x, weight, activation="gelu")
        if op == "peg":
            tokens = x.flatten(2).transpose(1, 2)
            return ops.peg(tokens, weight, grid=(x.shape[2], x.shape[3]))
        if op == "patch_embed":
            return ops.patch_embed(x, weight)
        return ops.conv_stem(x, layers, pool=ops.MaxPool(3, 2, 1))

    def make(n):
        shape = {
            "attention": (2, n, 2, 16),
            "linear": (2, n, 12),
            "peg": (2, 8, n, n + 1),
            "patch_embed": (2, 3, 16, 8 * n),
            "conv_stem": (2, 3, 16, 4 * n),
        }[op]
        return torch.randn(shape, requires_grad=True)

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for n in (4, 7, 14, 5, 9):
        x = make(n)
        ours, theirs = compiled(x), call(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        (dx,), (expected,) = (torch.autograd.grad(y.square().sum(), x) for y in (ours, theirs))
        torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


class Call(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *tensors):
        return self.call(*tensors)


@pytest.mark.parametrize("name", SAMPLES)
def test_exports_and_runs_again(name, tmp_path):
    case = without_packing(find(name))
    call, tensors = in_order(case, case.make_inputs(torch.float32))
    program = torch.export.export(Call(call), tuple(tensors))
    torch.export.save(program, tmp_path / "op.pt2")
    again = torch.export.load(tmp_path / "op.pt2").module()
    assert torch.equal(again(*tensors), call(*tensors))


def test_autocast_gives_the_dtype_that_torchs_own_layer_gives():
    image, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 2, 2)
    x, q = torch.randn(2, 16, 4), torch.randn(1, 5, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = {
            "linear": (ops.linear(x, torch.eye(4)), F.linear(x, torch.eye(4))),
            "attention": (ops.attention(q, q, q), F.scaled_dot_product_attention(q, q, q)),
            "peg": (ops.peg(x, torch.randn(4, 1, 3, 3), grid=(4, 4)), F.conv2d(image, weight)),
            "patch_embed": (ops.patch_embed(image, weight), F.conv2d(image, weight)),
            "conv_stem": (ops.conv_stem(image, [ops.ConvLayer(weight)]), F.conv2d(image, weight)),
        }
    for op, (ours, theirs) in pairs.items():
        assert ours.dtype == theirs.dtype == torch.bfloat16, op
    assert ops.linear(x, torch.eye(4)).dtype == torch.float32


@pytest.mark.parametrize("op", CASES)
def test_autocast_is_the_same_as_casting_and_trains(op):
    case = next(c for c in CASES[op] if not c.unserved and not getattr(c, "packed", False))
    inputs = case.make_inputs(torch.float32)
    leaves = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = case.call(leaves)
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves.values() if t.requires_grad)
    cast = {n: t.detach().bfloat16() if t.is_floating_point() else t for n, t in leaves.items()}
    assert check.same_bits(y.detach(), case.call(cast))


def test_autocast_leaves_float64_alone_and_compiles():
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, x).dtype == torch.float64
        counter = CompileCounter()
        compiled = torch.compile(ops.linear, fullgraph=True, backend=counter)
        assert compiled(x.float(), x.float()).dtype == torch.bfloat16
    assert counter.frame_count == 1


def test_a_bias_is_compared_with_symbols(timm):
    """One graph of an optimized LeViT, whose sizes are all symbols from the first call on."""
    from test_optimize import build, image

    from hybridops import optimize

    model, frames = optimize(build(timm, "levit")), []
    torch._dynamo.reset()
    compiled = torch.compile(
        model, fullgraph=True, dynamic=True, backend=lambda g, _: frames.append(g) or g.forward
    )
    with torch.no_grad():
        for batch in (2, 3, 5):
            images = image(model)[:1].repeat(batch, 1, 1, 1)
            assert check.same_bits(compiled(images), model(images))
    assert len(frames) == 1


def test_swins_masks_repeat_with_the_batch(timm):
    from hybridops import optimize

    options = {"img_size": 56, "window_size": 7, "depths": (2, 1), "num_heads": (2, 2)}
    name = "swin_tiny_patch4_window7_224"
    model = optimize(timm.create_model(name, embed_dim=16, num_classes=5, **options).eval())
    x, shapes = torch.randn(3, 3, 56, 56), ({0: torch.export.Dim("b", min=2, max=32)},)
    with torch.no_grad():
        exported = torch.export.export(model, (x[:2],), dynamic_shapes=shapes).module()
        assert check.same_bits(exported(x), model(x))
