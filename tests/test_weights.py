"""Weights files: what loads, and that what does not leaves the model as it was."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from check import same_bits
from test_models import official, small_cpvt, small_hybrid, small_levit

from hybridops import models
from hybridops.models import WeightsError, create_model, load_weights


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def refused(model, source, *needles):
    """Loading raises a WeightsError that says so, and changes nothing."""
    before = snapshot(model)
    with pytest.raises(WeightsError) as caught:
        load_weights(model, source)
    for needle in needles:
        assert needle in str(caught.value), str(caught.value)
    for name, value in model.state_dict().items():
        assert same_bits(value, before[name]), name
    return caught.value


@pytest.mark.parametrize("make", [small_levit, small_cpvt, small_hybrid])
@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_files(make, wrap, tmp_path):
    model, other = make(), make()
    state = model.state_dict()
    path = tmp_path / "weights.pth"
    torch.save(state if wrap is None else {wrap: state, "epoch": 3}, path)
    load_weights(other, path)
    for name, value in other.state_dict().items():
        assert same_bits(value, state[name])


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = small_levit(), small_levit()
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(official_like(model), path)
    assert load_weights(other, str(path)) == "official"
    for name, value in other.state_dict().items():
        assert same_bits(value, model.state_dict()[name])
    path.write_bytes(path.read_bytes()[:1000])
    refused(other, path, str(path), "truncated")


def official_like(model):
    return {name: value.contiguous() for name, value in official(model).items()}


def test_create_model_from_a_checkpoint(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(create_model("levit_128s", num_classes=5).state_dict(), path)
    create_model("levit_128s", checkpoint=path, num_classes=5)
    with pytest.raises(WeightsError, match="head.linear.weight is"):
        create_model("levit_128s", checkpoint=path)


@pytest.mark.parametrize("size", [0, 10, 5000])
def test_truncated_file(size, tmp_path):
    model = small_levit()
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:size])
    refused(model, path, str(path))


def test_no_file(tmp_path):
    refused(small_levit(), tmp_path / "absent.pth", "there is no such file")
    refused(small_levit(), tmp_path, "there is no such file")


class Code:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (self.flag,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(zipped, tmp_path):
    flag, path = str(tmp_path / "ran"), tmp_path / "weights.pth"
    content = {"model": Code(flag)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    refused(small_levit(), path, str(path), "holds more than tensors")
    assert not os.path.exists(flag)


def test_missing_unexpected_and_wrong_shapes():
    model = small_levit()
    state = model.state_dict()
    del state["stages.1.blocks.0.attn.qkv.linear.weight"]
    state["surprise"] = torch.zeros(1)
    state["head.linear.weight"] = torch.zeros(5, 64)
    error = refused(model, state, "Levit", "1 missing", "1 unexpected (surprise)", "needs (11, 64)")
    assert error.missing == ("stages.1.blocks.0.attn.qkv.linear.weight",)
    assert error.unexpected == ("surprise",)
    assert error.mismatched == {"head.linear.weight": ((11, 64), (5, 64))}


def test_one_head_does_not_fill_two():
    error = refused(small_levit(), small_levit(distilled=False).state_dict(), "missing")
    assert all(name.startswith("head_dist.") for name in error.missing)


def test_missing_in_the_official_naming():
    model = small_levit()
    state = official(model)
    del state["blocks.0.m.qkv.c.weight"]
    error = refused(model, state, "1 missing")
    assert error.missing == ("stages.0.blocks.0.attn.qkv.linear.weight",)


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        ({}, "no state dict"),
        (torch.zeros(3), "no state dict"),
        ({"conv1.weight": torch.zeros(1)}, "knows, neither by our keys"),
        ({"stem.conv1.linear.weight": 3.0}, "no tensor at stem.conv1.linear.weight"),
        ({1: torch.zeros(1)}, "no tensor at 1"),
    ],
)
@pytest.mark.parametrize("make", [small_levit, small_cpvt, small_hybrid])
def test_not_ours(make, content, needle, tmp_path):
    refused(make(), content, needle)
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    refused(make(), path, str(path), needle)


@pytest.mark.parametrize(
    ("spoil", "needle"),
    [
        (lambda t: t.to("meta"), "without data"),
        (lambda t: t.to_sparse(), "sparse_coo"),
        (lambda t: t.to(torch.complex64), "torch.complex64 for torch.float32"),
        (lambda t: t.to(torch.int32), "torch.int32 for torch.float32"),
    ],
    ids=["meta", "sparse", "complex", "integer"],
)
def test_tensors_of_no_use(spoil, needle):
    """The first tensors are fine: they, too, must not get in."""
    model, state = small_levit(), small_levit().state_dict()
    name = "head.linear.weight"
    state[name] = spoil(state[name])
    error = refused(model, state, f"1 of no use ({name} is {needle}")
    assert error.unusable == (name,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_precision_is_rounded_to_the_models(dtype):
    model, state = small_levit(), small_levit().state_dict()
    load_weights(model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()})
    assert model.head.linear.weight.dtype == torch.float32
    expected = state["head.linear.weight"].to(dtype).float()
    assert same_bits(model.head.linear.weight.detach(), expected)


def test_the_download_folder_is_its_owners(monkeypatch, tmp_path):
    hub = tmp_path / "hub"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    seen = []

    def load(url, **kwargs):
        seen.append((hub / "checkpoints").stat().st_mode & 0o777)
        return {"model": official(create_model("levit_128s"))}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    create_model("levit_128s", pretrained=True)
    assert seen == [0o700]


def test_pretrained(monkeypatch):
    source = create_model("levit_128s")
    asked = {}

    def load(url, **kwargs):
        asked[url] = kwargs
        return {"model": official(source)}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    model = create_model("levit_128s", pretrained=True)
    assert list(asked) == [models.levit.PRETRAINED["levit_128s"]]
    options = asked.popitem()[1]
    assert options["weights_only"] is options["check_hash"] is True
    for name, value in model.state_dict().items():
        assert same_bits(value, source.state_dict()[name])


def test_pretrained_without_a_network(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(WeightsError, match="LeViT-256.*cannot be had: no route to host"):
        create_model("levit_256", pretrained=True)
