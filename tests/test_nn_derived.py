"""What inference keeps beside parameters: every weight once, packed, and itself for its readers."""

import copy

import pytest
import torch
from check import accurate
from torch import nn

import hybridops as ho
from hybridops.nn import ConvStem, LinearNorm, PatchEmbed
from hybridops.nn.conv_body import conv_norm

KEY = "_hybridops_derived"
pytestmark = pytest.mark.usefixtures("cpu_library")


class Body(nn.Module):
    """A convolution and its norm in one call of oneDNN's."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64)

    def forward(self, x):
        return conv_norm(self.conv, self.bn, x, "relu")


MODULES = {
    "linear": (lambda: LinearNorm(96, 192), (2, 5, 96)),
    "stem": (lambda: ConvStem(32, (48, 96)), (1, 32, 9, 9)),
    "patch": (lambda: PatchEmbed(16, 8, 3, 96, mean=(0.4,) * 3, std=(0.2,) * 3), (1, 3, 16, 16)),
    "body": (Body, (1, 32, 9, 9)),
    "optimized": (lambda: ho.optimize(plain_blocks()), (2, 3, 32, 32)),
}


def plain_blocks():
    from timm.models.levit import LevitDistilled

    sizes = {"embed_dim": (32, 64), "key_dim": 16, "depth": (1, 1), "num_heads": (2, 4)}
    return LevitDistilled(img_size=32, num_classes=40, **sizes).eval()


@pytest.fixture(params=MODULES)
def case(request, timm):
    """A module in inference, with statistics that are not trivial, and its input."""
    make, shape = MODULES[request.param]
    torch.manual_seed(0)
    module = make().eval()
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
    return module, torch.randn(shape)


def kept(module):
    """Everything that stands in the module's caches, down to the tensors."""
    todo = [e.value for m in module.modules() for e in m.__dict__.get(KEY, {}).values()]
    while todo:
        found = todo.pop()
        yield found
        if isinstance(found, (tuple, list, dict)):
            todo += found.values() if isinstance(found, dict) else found
        elif type(found).__module__.startswith("hybridops."):
            todo += vars(found).values()


def test_no_weight_is_kept_twice(case):
    module, x = case
    with torch.inference_mode():
        first = module(x)
        assert torch.equal(module(x), first)
    found = list(kept(module))
    tensors = [t for t in found if isinstance(t, torch.Tensor)]
    assert any(t.layout != torch.strided or t.ndim == 1 and len(t) > 192 for t in tensors)  # packed
    weights = [t for t in tensors if t.layout == torch.strided and t.ndim > 1 and len(t) > 1]
    assert bool(weights) != isinstance(module, Body)
    assert all(t.untyped_storage().nbytes() == t.element_size() for t in weights)


def exactly(module, x):
    """What the module means, in float64 and plain torch."""
    twin = copy.deepcopy(module).double()
    with ho.use("reference"):
        return twin(x.double())


def test_the_reference_reads_the_weight(case):
    module, x = case
    with torch.inference_mode():
        exact = exactly(module, x)
        module(x)
        with ho.use("reference"):
            torchs = module(x)
        accurate(module(x), torchs, exact, "ours behind the reference")
        assert torch.allclose(torchs.double(), exact, atol=1e-4)


def test_gradients_read_frozen_weights(case):
    module, x = case
    module.requires_grad_(False)
    with torch.no_grad():
        module(x)

    def gradient(module, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(module(x).square().sum(), x)[0]

    with ho.use("reference"):
        exact = gradient(copy.deepcopy(module).double(), x.double())
    assert torch.allclose(gradient(module, x).double(), exact, rtol=1e-3, atol=1e-3)
    with torch.no_grad():  # and what was made for gradients serves inference
        made = [e for m in module.modules() for e in m.__dict__.get(KEY, {}).values()]
        module(x)
        again = [e for m in module.modules() for e in m.__dict__.get(KEY, {}).values()]
    assert all(a is b for a, b in zip(made, again, strict=True))


def test_changed_weights_are_seen(case):
    module, x = case
    with torch.inference_mode():
        module(x)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)
        assert torch.allclose(module(x).double(), exactly(module, x), rtol=1e-3, atol=1e-4)


def test_autocast_reads_its_own_packed_copy(case):
    module, x = case
    with torch.inference_mode():
        exact = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = module(x)
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_convolution_takes_another_size_after_its_weight_is_gone():
    body = Body().eval()
    with torch.inference_mode():
        for side in (9, 12, 9, 15):
            x = torch.randn(1, 32, side, side)
            assert torch.allclose(body(x), body.bn(body.conv(x)).relu(), atol=1e-5)
