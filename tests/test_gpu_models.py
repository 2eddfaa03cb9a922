"""Whole models on a GPU: what serves them, their error, graphs, no hidden synchronisation.

Three ways, two of them without a GPU: models of real size on a GPU in name only (named_gpu.py);
tiny ones, forward and backward, through Triton's interpreter and on the emulated GPU; and, by
`make gpu`, models of real size on a GPU through both back ends.
"""

from __future__ import annotations

import contextlib
from copy import deepcopy
from functools import partial
from itertools import product

import check
import emulated_gpu
import interpreter
import named_gpu
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hybridops
from hybridops import backend, ops
from hybridops.bench.model_task import without_dropout
from hybridops.bench.task import tensors
from hybridops.compat import import_timm
from hybridops.models import Cpvt, Detr
from hybridops.ops._contract import ON_GPU
from hybridops.optimize.explain import create
from hybridops.optimize.gates import make_live

HAS_GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU")
pytestmark = pytest.mark.filterwarnings("ignore:no rule serves any layer of")
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "convolution", "_softmax", "_native_multi_head"}

# model: (side of the image, attentions, products left to torch in inference)
NAMED = {
    "timm:levit_128s": (224, 11, {}),
    "timm:deit_small_patch16_224": (224, 12, {"addmm": 1}),  # the head
    "timm:vit_small_r26_s32_224": (224, 12, {"convolution": 30, "addmm": 1}),
    "timm:twins_svt_small": (224, 18, {"addmm": 1}),
    "hybridops:levit_128s": (224, 11, {}),
    "hybridops:cpvt_tiny": (224, 12, {}),
    "hybridops:vit_small_r26_s32_224": (224, 12, {"convolution": 29}),
    "hybridops:detr_resnet50": (256, 18, {"convolution": 53}),
    "hf:detr": (256, 18, {"convolution": 54}),
}


def without_memory(name: str, mode: str) -> nn.Module:
    """The optimized model on the meta device."""
    with torch.device("meta"):
        try:
            model = create(name)
        except ImportError as reason:
            pytest.skip(str(reason))
    model = without_dropout(model).train(mode == "train")
    return hybridops.optimize(model, mode, strict=False)


def products_of(counts) -> dict[str, int]:
    found = {name.split("::")[-1].split(".")[1]: n for name, n in counts.items() if "aten" in name}
    return {name: n for name, n in found.items() if name in PRODUCTS or "attention" in name}


@pytest.mark.parametrize("name", NAMED)
def test_every_layer_of_a_model_on_a_gpu_comes_to_our_ops(name):
    side, attentions, left = NAMED[name]
    model = without_memory(name, "inference")
    with named_gpu.present(), torch.no_grad():
        model = named_gpu.moved(model)
        images = torch.empty(2, 3, side, side, device="cuda")
        model(images)  # folds the norms
        with named_gpu.Calls() as calls:
            model(images)
    assert calls.counts["hybridops.attention"] == attentions
    assert products_of(calls.counts) == left
    assert not calls.counts["aten.rsqrt"], "norms are folded again in every call"


@pytest.mark.parametrize("forced", [None, "reference"])
@pytest.mark.parametrize("D", [128, 160])
def test_no_head_size_with_a_table_waits_for_the_gpu(D, forced):
    use = hybridops.use(forced) if forced else contextlib.nullcontext()
    with named_gpu.present(), torch.no_grad(), use, named_gpu.Calls() as calls:
        q, table = (torch.empty(s, device="cuda") for s in ((2, 9, 3, D), (3, 5)))
        index = torch.zeros(9, 9, dtype=torch.int64, device="cuda")
        ops.attention(q, q, q, bias=table, bias_index=index)
    assert calls.counts["hybridops.attention"] == (D <= 128 and not forced)


class Unasked(TorchDispatchMode):
    """Refuses to ask a tensor for its value: on a GPU that waits for everything before it.

    inside: op -> its implementation in Python, which is looked into as well.
    """

    WAITING = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "masked_select")

    def __init__(self, inside) -> None:
        super().__init__()
        self.inside = inside

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, _, name = function.name().partition("::")
        assert name.partition(".")[0] not in self.WAITING, function
        if space == "hybridops" and name in self.inside:
            with self:
                return self.inside[name](*args)
        return function(*args, **(kwargs or {}))


def tiny_levit() -> nn.Module:
    try:
        levit = import_timm().models.levit
    except ImportError as reason:
        pytest.skip(str(reason))
    options = {"embed_dim": (16, 24), "key_dim": 8, "num_heads": (2, 3), "depth": (1, 1)}
    return levit.LevitDistilled(img_size=32, stem_type="s8", num_classes=5, **options)


def tiny_cpvt() -> nn.Module:
    return Cpvt(32, 2, 2, patch_size=8, num_classes=5)


def tiny_detr() -> nn.Module:
    options = {"num_queries": 5, "dim": 32, "heads": 4, "hidden": 48, "layers": (1, 1)}
    return Detr((1, 1, 1, 1), num_classes=3, drop_rate=0.0, **options)


TINY = {"cpvt": tiny_cpvt, "levit": tiny_levit, "detr": tiny_detr}
WAYS = {"triton": interpreter.serving, "cuda": emulated_gpu.serving}


def prepared(model: nn.Module, images: Tensor) -> nn.Module:
    """In eval mode, without dropout, every branch of it awake."""
    model = without_dropout(model).eval()
    with hybridops.use("reference"), torch.no_grad():
        make_live(model, images)
    return model


def results(model: nn.Module, images: Tensor, mode: str) -> list[Tensor]:
    """The outputs, and all gradients as one vector where mode is "train"."""
    if mode == "inference":
        with torch.inference_mode():
            return tensors(model(images))
    outputs = tensors(model.train()(images))
    loss = sum((y.double().square().mean() for y in outputs), torch.zeros((), device=images.device))
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss.to(outputs[0].dtype).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return [*outputs, torch.cat([g.flatten() for g in found])]


def is_accurate(model: nn.Module, images: Tensor, mode: str, serving) -> nn.Module:
    """Fails unless the optimized model is as near to float64 as torch is; returns it.

    Errors add up along a model in any order, so torch's own may be exceeded three times.
    """
    with hybridops.use("reference"):
        exact = results(deepcopy(model).double(), images.double(), mode)
        torchs = results(deepcopy(model), images, mode)
    optimized = hybridops.optimize(deepcopy(model), mode, strict=False)
    with serving():
        found = results(optimized, images, mode)
    for i, (y, own, y64) in enumerate(zip(found, torchs, exact, strict=True)):
        check.accurate(y.detach(), own.detach(), y64.detach(), f"{mode} result {i}", factor=3)
    return optimized


def ways():
    """Each model each way; by `make wide` what takes longer than it tells."""
    for way, name, mode in product(WAYS, TINY, ("inference", "train")):
        quick = name != "detr" or (way, mode) == ("cuda", "train")
        marks = () if quick else pytest.mark.wide
        yield pytest.param(way, mode, name, marks=marks, id=f"{way}-{name}-{mode}")


@pytest.mark.parametrize(("way", "mode", "name"), list(ways()))
def test_a_tiny_model_runs_on_the_kernels_alone(way, mode, name, nan_filled):
    if HAS_GPU:
        pytest.skip("there is a GPU: real models run there")
    side = 64 if name == "detr" else 32
    images = torch.randn(2, 3, side, side)
    model = prepared(TINY[name](), images)
    with WAYS[way]():
        before, fallbacks = backend.served.copy(), backend.fallbacks.copy()
        inside = ON_GPU if way == "triton" else {}
        optimized = is_accurate(model, images, mode, partial(Unasked, inside))
        served = backend.served - before
        assert backend.fallbacks == fallbacks
    wanted = {"attention", "linear"} | ({"attention_backward"} if mode == "train" else set())
    assert wanted <= {op for op, what in served if what == way}
    if name != "detr":  # built of our modules: nothing to replace, and no report
        told = str(hybridops.report(optimized))
        assert f"attention: {served['attention', way]} calls on a GPU served by {way}" in told


# On a GPU: model, side of the image. timm's are skipped where it is not installed.
REAL = {
    "timm:levit_128s": 224,
    "timm:vit_small_r26_s32_224": 224,
    "hybridops:levit_128s": 224,
    "hybridops:cpvt_tiny": 224,
    "hybridops:vit_small_r26_s32_224": 224,
    "hybridops:detr_resnet50": 256,
}


def real(name: str) -> tuple[nn.Module, Tensor]:
    """The model in fp32 with live weights, and two images, on the GPU."""
    torch.manual_seed(0)
    try:
        model = create(name)
    except ImportError as reason:
        pytest.skip(str(reason))
    images = torch.randn(2, 3, REAL[name], REAL[name])
    return prepared(model, images).cuda(), images.cuda()


@contextlib.contextmanager
def unasked_gpu():
    """torch raises where a call waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("mode", ["inference", "train"])
def test_a_real_model_is_as_exact_as_torch_on_a_gpu(name, mode, gpu_backend, torchs_fp32):
    model, images = real(name)

    before = backend.served.copy()
    optimized = is_accurate(model, images, mode, partial(hybridops.use, gpu_backend))
    ran = {what for _, what in backend.served - before}
    assert gpu_backend in ran
    with hybridops.use(gpu_backend), unasked_gpu():  # all is compiled and folded by now
        if mode == "inference":
            with torch.inference_mode():
                optimized(images)
        else:
            tensors(optimized(images))[0].square().mean().backward()
    if name.startswith("timm:"):
        assert f"served by {gpu_backend}" in str(hybridops.report(optimized))


@on_gpu
@pytest.mark.parametrize("name", REAL)
def test_every_replaced_layer_verifies_on_a_gpu(name, torchs_fp32):
    model, images = real(name)
    optimized = hybridops.optimize(model, strict=False)
    if hybridops.report(optimized).replaced:
        assert hybridops.verify(optimized, images).ok


@on_gpu
@pytest.mark.parametrize("name", REAL)
def test_a_captured_model_follows_new_images(name, gpu_backend):
    model, images = real(name)
    optimized = hybridops.optimize(model, strict=False)
    fresh = torch.randn_like(images)
    with torch.inference_mode(), hybridops.use(gpu_backend):
        expected = [y.clone() for y in tensors(optimized(fresh))]  # also compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = tensors(optimized(images))
        images.copy_(fresh)
        graph.replay()
    torch.cuda.synchronize()
    for y, e in zip(captured, expected, strict=True):
        assert check.same_bits(y, e)
