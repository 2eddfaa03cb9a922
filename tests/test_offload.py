"""optimize(freeze=True, offload=True): the same model, its weights in a file until read."""

import copy
import io
import os
import re
from pathlib import Path

import pytest
import torch
from check import same_bits
from torch import nn

import hybridops as ho
from hybridops import optimize, refresh, restore, verify
from hybridops.compat import import_timm
from hybridops.nn import _derived
from hybridops.optimize import offload

pytestmark = pytest.mark.skipif(not offload.is_possible(), reason="no files are mapped here")
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "num_heads": 3, "depth": 2}


@pytest.fixture
def model(timm):
    torch.manual_seed(0)
    return timm.models.VisionTransformer(num_classes=10, **SIZE).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32)


def called(model, x):
    with torch.inference_mode():
        return model(x)


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def unchanged(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(same_bits(now[n], t) for n, t in before.items())


def resident(tensor):
    """KiB in memory of the mapping that a tensor lies in, and whether that is a file's."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first = block.split("\n", 1)[0].split()
        begin, end = (int(a, 16) for a in first[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return int(re.search(r"^Rss:\s+(\d+)", block, re.M)[1]), first[4] != "0"
    raise AssertionError("mapped nowhere")


def test_computes_the_same_and_comes_back(model, x):
    before, parameters = bits(model), dict(model.named_parameters())
    expected = called(optimize(copy.deepcopy(model), freeze=True), x)
    assert optimize(model, freeze=True, offload=True) is model
    for _ in range(3):
        assert same_bits(called(model, x), expected)
    assert unchanged(model, before)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    restore(model)
    assert unchanged(model, before)
    assert not model._forward_hooks
    assert not any(resident(p)[1] for p in model.parameters())
    assert same_bits(called(model, x), called(restore(copy.deepcopy(model)), x))


def test_memory_holds_what_is_read_alone(model, x):
    optimize(model, freeze=True, offload=True)
    weight = model.blocks[0].mlp.fc1.weight
    called(model.train(), x)
    model.eval()
    large = sum(p.numel() * 4 for p in model.parameters() if p.numel() >= 1 << 14) // 1024
    called(model, x)
    in_memory, in_file = resident(weight)
    assert in_file
    assert in_memory == 0
    called(model, x)
    assert resident(weight)[0] < large // 4  # the head alone is torch's; pages come in groups
    bits(model)
    assert resident(weight)[0] >= large
    refresh(model)
    called(model, x)
    assert resident(weight)[0] == 0


def test_what_is_small_lies_together(model):
    """A page that is read brings its neighbours: biases would keep weights in memory."""
    optimize(model, freeze=True, offload=True)
    storages = (p.untyped_storage() for p in model.parameters() if resident(p)[1])
    sizes = [s.nbytes() for s in sorted(storages, key=lambda s: s.data_ptr())]
    assert len(set(sizes)) > 2
    assert sizes == sorted(sizes)


def test_nothing_that_was_packed_before_keeps_the_old_memory():
    block = ho.nn.Block(192, 3).eval()
    called(block, torch.randn(1, 5, 192))
    assert any(_derived._KEY in vars(m) for m in block.modules())
    optimize(block, freeze=True, offload=True, strict=False)
    assert not any(_derived._KEY in vars(m) for m in block.modules())


def test_new_weights_are_taken(model, x):
    torch.manual_seed(1)
    other = import_timm().models.VisionTransformer(num_classes=10, **SIZE).eval()
    expected = called(optimize(copy.deepcopy(other), freeze=True), x)
    optimize(model, freeze=True, offload=True)
    called(model, x)
    model.load_state_dict(other.state_dict())
    assert same_bits(called(model, x), expected)
    assert resident(model.blocks[0].mlp.fc1.weight)[0] == 0
    assert unchanged(restore(model), bits(other))


def test_tied_weights_and_views_stay_so(x):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = nn.Parameter(torch.randn(256, 192))
            self.part = nn.Parameter(self.whole.data[64:])  # its storage, further on
            self.again = nn.Linear(192, 256)
            self.again.weight = self.whole
            self.register_buffer("turned", self.whole.data.t())

        def forward(self, x):
            return self.again(x) @ self.turned.t()[:, :8]

    model = Tied()
    before = bits(model)
    optimize(model, freeze=True, offload=True, strict=False)
    for turn in (model, restore(model)):
        assert turn.again.weight is turn.whole
        assert unchanged(turn, before)
        storages = {t.untyped_storage().data_ptr() for t in (turn.whole, turn.part, turn.turned)}
        assert len(storages) == 1
        assert turn.turned.stride() == (1, 192)
    with torch.no_grad():
        model.whole.zero_()
    assert not model.part.any()


@pytest.mark.parametrize("way", ["deepcopy", "save"])
def test_copies_hold_weights_of_their_own(way, model, x):
    before = bits(model)
    optimize(model, freeze=True, offload=True)
    expected = called(model, x)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert not any(resident(p)[1] for p in other.parameters())
    assert same_bits(called(other, x), expected)
    assert unchanged(restore(other), before)
    assert not other._forward_hooks
    assert resident(model.blocks[0].mlp.fc1.weight)[1]  # its own are where they were


def test_an_offloaded_model_can_be_verified_and_trained(model, x):
    optimize(model, freeze=True, offload=True, example=x, verify=True)
    assert verify(model, x).ok
    model.train()
    model(x).sum().backward()
    assert model.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_a_second_call_and_ours(x):
    ours = nn.Sequential(nn.Linear(32, 1024), nn.Linear(1024, 8)).eval()
    optimize(ours, freeze=True, offload=True, strict=False)
    place = ours[0].weight.data_ptr()
    optimize(ours, freeze=True, offload=True, strict=False)
    assert ours[0].weight.data_ptr() == place
    assert len(ours._forward_hooks) == 1
    with pytest.raises(ValueError, match="already optimized"):
        optimize(ours, freeze=True, strict=False)


def test_what_cannot_be_offloaded_is_refused(model, x, monkeypatch):
    with pytest.raises(ValueError, match="offload=True needs freeze=True"):
        optimize(model, offload=True)
    with pytest.raises(ValueError, match="weights on the CPU, got meta"):
        optimize(copy.deepcopy(model).to("meta"), freeze=True, offload=True)
    before, classes = called(model, x), [type(m) for m in model.modules()]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            optimize(model, freeze=True, offload=True)
    assert [type(m) for m in model.modules()] == classes
    assert same_bits(called(model, x), before)
    monkeypatch.delattr(offload.mmap, "MADV_DONTNEED")
    with pytest.raises(ValueError, match="a system that maps files"):
        optimize(model, freeze=True, offload=True)
