"""Whole models under what PyTorch offers around them: compilers, exporters, copies, workers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from check import accurate, same_bits
from composed import MODELS, build, first
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import hybridops
from hybridops import backend, optimize, restore

ALL = list(MODELS)


@pytest.fixture(autouse=True)
def _fresh_compiler(timm):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_one_graph_serves_any_batch_and_size(train):
    """Recompiled once at most, however many sizes there are."""
    model = build("cpvt").model.train(train)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 64, 56), (3, 48, 40), (7, 80, 80)):
        images = torch.randn(shape[0], 3, *shape[1:])
        ours, theirs = compiled(images), model(images)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        if train:
            names, weights = zip(*model.named_parameters(), strict=True)
            pairs = (torch.autograd.grad(y.square().sum(), weights) for y in (ours, theirs))
            for name, mine, expected in zip(names, *pairs, strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4, msg=name)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["levit", "vit"])
def test_one_graph_serves_any_batch(name):
    built = build(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(built.model, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 5, 9):
        images = torch.randn(batch, *built.images.shape[1:])
        torch.testing.assert_close(compiled(images), built(images), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", [*ALL[:3], pytest.param("detr", marks=pytest.mark.models)])
def test_exports_and_loads_with_a_free_batch(name, tmp_path):
    built = build(name)
    sizes = ({0: torch.export.Dim("batch", max=64)},)
    with torch.no_grad():
        program = torch.export.export(built.model, (built.images,), dynamic_shapes=sizes)
        torch.export.save(program, tmp_path / "model.pt2")
        again = torch.export.load(tmp_path / "model.pt2").module()
        more = torch.randn(5, *built.images.shape[1:])
        for images in (built.images, more):
            torch.testing.assert_close(first(again(images)), built(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpvt", pytest.param("vit", marks=pytest.mark.models)])
def test_aot_inductor_package_gives_the_same(name, tmp_path):
    built = build(name)
    with torch.no_grad():
        program = torch.export.export(built.model, (built.images,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        ours = first(torch._inductor.aoti_load_package(path)(built.images))
        torch.testing.assert_close(ours, built(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["cpvt", "vit", *(pytest.param(n, marks=pytest.mark.models) for n in ("levit", "detr"))],
)
def test_runs_in_onnxruntime(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    built = build(name)
    program = torch.onnx.export(built.model, (built.images,), dynamo=True, verbose=False)
    domains = {node.domain for node in program.model.graph}
    assert "hybridops" not in domains
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: built.images.numpy()}
    ours = torch.from_numpy(session.run(None, feed)[0])
    torch.testing.assert_close(ours, built(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # and nothing is left behind: our kernels serve again
        assert backend.which("linear", built.images) == backend.available()[0]


@pytest.mark.parametrize(("name", "far"), [*((name, 0) for name in ALL), ("cpvt", 64), ("vit", 64)])
def test_autocast_is_as_exact_as_torchs(name, far):
    """far: where the class token starts. Its norms take that off again, as torch keeps the stream
    of tokens in fp32; one in bf16 would lose there what the blocks add.
    """
    built = build(name)
    with torch.no_grad():
        if far:
            built.model.cls_token.add_(far)
        plain = hybridops.restore(copy.deepcopy(built.model))
        exact = copy.deepcopy(plain).double()
        with torch.autocast("cpu", torch.bfloat16):
            ours = built()
            with hybridops.use("reference"):
                theirs = first(plain(built.images))
        with hybridops.use("reference"):
            truth = first(exact(built.images.double()))
    assert ours.dtype == theirs.dtype
    accurate(ours, theirs, truth, name)


def gradients(model, run):
    model.zero_grad()
    outputs = [y for y in tree_leaves(run()) if isinstance(y, torch.Tensor)]
    sum(y.square().sum() for y in outputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("grad", [False, True])
def test_tangents_go_through_the_children(grad):
    """Not through kernels, which would drop them, nor through weights that only kernels read."""
    levit, images = build("levit")
    wide, direction = copy.deepcopy(levit).double(), torch.randn_like(images)

    def dual(model, dtype=torch.float32):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            x = forward_ad.make_dual(images.to(dtype), direction.to(dtype))
            return forward_ad.unpack_dual(model(x))

    with torch.no_grad():
        levit(images)  # packs the weights
    ours, exact = dual(levit), dual(wide, torch.float64)
    with hybridops.use("reference"):
        torchs = dual(levit)
    accurate(ours.primal, torchs.primal, exact.primal, "primal")
    accurate(ours.tangent, torchs.tangent, exact.tangent, "tangent")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["cpvt", "vit", "detr"])
def test_activation_checkpointing_gives_the_same_gradients(name, reentrant):
    model, images = build(name, "train")
    model.train()
    images.requires_grad_()  # or the re-entrant kind would record nothing
    plain = gradients(model, lambda: model(images))
    dx = images.grad.clone()
    images.grad = None
    saved = gradients(model, lambda: checkpoint(model, images, use_reentrant=reentrant))
    assert set(saved) == set(plain)
    plain["images"], saved["images"] = dx, images.grad
    if not reentrant or name != "detr":
        assert all(same_bits(grad, plain[key]) for key, grad in saved.items())
        return
    # The re-entrant kind's first forward records nothing, so DETR's body takes its convolutions for
    # inference there, which round otherwise.
    wide, x = copy.deepcopy(model).double(), images.detach().double().requires_grad_()
    exact = gradients(wide, lambda: wide(x)) | {"images": x.grad}
    for key, grad in saved.items():
        accurate(grad, plain[key], exact[key], key, factor=3)


@pytest.mark.parametrize("name", ALL)
def test_memory_format_changes_nothing(name):
    built = build(name)
    assert same_bits(built(built.images.contiguous(memory_format=torch.channels_last)), built())
    sliced = torch.randn(4, 3, 70, 70)[::2, :, 1 : 1 + built.images.shape[2], 3:]
    sliced = sliced[..., : built.images.shape[3]]
    assert same_bits(built(sliced), built(sliced.contiguous()))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_torch_save]
)
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()  # or nothing is cached
def test_copies_are_equal_and_apart(name, copied):
    built = build(name)
    before = built()  # fills every cache first
    twin = copied(built.model)
    assert same_bits(first(twin(built.images)), before)
    for parameter in twin.parameters():
        parameter.mul_(1.5)
    scaled = first(twin(built.images))
    assert not torch.equal(scaled, before)
    assert same_bits(built(), before)
    anew = build(name).model
    anew.load_state_dict(twin.state_dict())
    assert same_bits(first(anew(built.images)), scaled)


@pytest.mark.parametrize("name", ALL)
def test_moves_between_dtypes_and_to_meta(name):
    model, images = build(name)
    with torch.no_grad():
        expected = first(model(images))
        half = first(model.bfloat16()(images.bfloat16()))
        assert half.dtype == torch.bfloat16
        assert half.shape == expected.shape
        wide = first(model.double()(images.double()))
        assert wide.dtype == torch.float64
        shape = first(model.to("meta")(images.double().to("meta"))).shape
        assert shape == expected.shape


class Embedded(Dataset):
    """Features made in the worker: a model, as in distillation or caching."""

    def __init__(self, model, images):
        self.model, self.images = model, images

    def __len__(self):
        return len(self.images)

    @torch.no_grad()
    def __getitem__(self, i):
        return first(self.model(self.images[i : i + 1]))[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("name", ["cpvt", "vit"])
def test_runs_in_the_workers_of_a_data_loader(name, start):
    model, images = build(name)
    dataset = Embedded(model, images)
    expected = torch.stack([dataset[i] for i in range(len(dataset))])  # kernels ran before a fork
    loader = DataLoader(
        dataset, batch_size=2, num_workers=1, multiprocessing_context=start, timeout=240
    )
    (found,) = list(loader)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # one thread there, two here


def test_a_trace_keeps_the_parameters_and_the_rest_needs_restore(tmp_path):
    """torch.jit.trace used to take folded weights of an earlier call for constants, and crashed."""
    layer, x = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True).eval(), torch.randn(2, 5, 24)
    optimize(layer)
    with torch.no_grad():
        expected = layer(x)
        torch.jit.trace(layer, x).save(tmp_path / "layer.pt")
        torch.testing.assert_close(torch.jit.load(tmp_path / "layer.pt")(x), expected)
        assert same_bits(layer(x), expected)  # nothing of the graph was kept

    def gradients(model):
        parameters = dict(model.named_parameters())
        return torch.func.grad(lambda p: functional_call(model, p, (x,)).sum())(parameters)

    with pytest.raises(RuntimeError, match="functorch transforms"):
        gradients(layer)
    assert len(gradients(restore(layer))) == 12
