"""The demo end to end on real photographs, and the arithmetic behind its table."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import hybridops
from hybridops import backend
from hybridops.cli import main, measure
from hybridops.cli.images import sample_photographs, to_tensor
from hybridops.cli.models import Hub, load, make_live


@pytest.fixture(autouse=True)
def _offline(timm, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_demo(tmp_path, *arguments):
    out, figures = tmp_path / "chart.png", tmp_path / "figures.json"
    options = ["--quick", "--threads", "1", "--out", str(out), "--json", str(figures)]
    code = main(["demo", *arguments, *options])
    return code, out, json.loads(figures.read_text())


def test_demo_on_the_sample_photographs(tmp_path, capsys):
    code, out, figures = run_demo(tmp_path, "--models", "timm:levit_128s", "cpvt_tiny")
    assert code == 0
    with Image.open(out) as chart:
        assert chart.format == "PNG"
        assert min(chart.size) > 300
    assert figures["images"] == ["china.jpg", "flower.jpg"]
    assert figures["isa"] == backend.ISA
    assert [row["model"] for row in figures["models"]] == ["timm:levit_128s", "hybridops:cpvt_tiny"]
    for row in figures["models"]:
        assert row["within_rule"]
        assert len(row["eager_ms"]) == len(row["optimized_ms"]) == 3
        assert row["speedup"] == row["eager_median_ms"] / row["optimized_median_ms"]
        assert 0 < row["eager_error"] < 1e-3
        assert 0 < row["optimized_error"] <= row["error_limit"]
        assert (row["top5_shared"], row["top5_total"]) == (10, 10)
        assert "seeded random weights with live gates" in row["weights"]
    captured = capsys.readouterr()
    assert "HF_HUB_OFFLINE is set" in captured.err
    assert "[1/2] timm:levit_128s: timing\n" in captured.err  # plain lines in a pipe
    assert "\x1b" not in captured.err + captured.out
    assert f"chart:   {out}" in captured.out
    assert torch.__version__ in captured.out


def test_demo_takes_odd_pictures(tmp_path):
    paths = []
    for shape in [(1, 1), (3, 900, 4), (50, 60)]:
        paths.append(str(tmp_path / f"{len(paths)}.png"))
        Image.fromarray(np.full(shape, 99, np.uint8)).save(paths[-1])
    code, _, figures = run_demo(tmp_path, *paths, "--models", "levit_128s")
    assert code == 0
    assert figures["images"] == ["0.png", "1.png", "2.png"]


def test_demo_says_by_its_exit_code_that_the_rule_is_broken(tmp_path, monkeypatch, capsys):
    def spoil(model, **options):
        with torch.no_grad():
            next(model.parameters()).mul_(1.001)
        return model

    monkeypatch.setattr(hybridops, "optimize", spoil)
    code, _, figures = run_demo(tmp_path, "--models", "levit_128s")
    assert code == 1
    assert not figures["models"][0]["within_rule"]
    assert "BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize("batch", [[], ["--batch"]], ids=["each", "batch"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_optimize_command(dtype, batch, tmp_path, capsys):
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path, (_, image) in zip(paths, sample_photographs(), strict=True):
        image.save(path)
    command = ["optimize", "levit_128s", "--image", *paths, "--repeat", "1", "--dtype", dtype]
    assert main([*command, *batch]) == 0
    out = capsys.readouterr().out
    assert f"per call of {2 if batch else 1} image(s)" in out
    assert "hot layers replaced" in out
    assert "holds" in out


class _Fixed(nn.Module):
    """Gives these logits, whatever the image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def test_the_arithmetic_of_a_comparison(monkeypatch):
    def optimize(model, freeze, strict):
        with torch.no_grad():
            model.logits[0, 0] += 0.25
        return model

    monkeypatch.setattr(hybridops, "optimize", optimize)
    model = _Fixed([[8.0, 7.0, 6.0, 5.0, 4.0, 3.0]])
    images = [torch.zeros(1, 3, 2, 2)] * 2
    result, optimized = measure.compare(model, images, rounds=4)
    rms = model.logits.square().mean().sqrt().item()
    assert result.optimized_error == pytest.approx(0.25 / rms)
    assert result.eager_error == 0
    assert not result.within_rule
    assert (result.top5_shared, result.top5_total, result.top1) == (10, 10, [0, 0])
    assert len(result.eager_ms) == 4
    assert optimized is not model
    assert model.logits[0, 0] == 8  # the model given is left alone


def test_nan_breaks_the_rule(monkeypatch):
    def optimize(model, freeze, strict):
        with torch.no_grad():
            model.logits.fill_(torch.nan)
        return model

    monkeypatch.setattr(hybridops, "optimize", optimize)
    result, _ = measure.compare(_Fixed([[1.0, 2.0]]), [torch.zeros(1, 3, 2, 2)], rounds=1)
    assert not result.within_rule


def test_plain_torch_is_the_same_model_through_sdpa():
    model = hybridops.models.create_model("cpvt_tiny", depth=2, num_classes=10).eval()
    make_live(model, torch.randn(2, 3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    before = hybridops.ops.attention.__globals__["attention_reference"]
    with torch.no_grad():
        with hybridops.use("reference"):
            expected = model(x)
        with measure.plain_torch():
            got = model(x)
    torch.testing.assert_close(got, expected)
    assert hybridops.ops.attention.__globals__["attention_reference"] is before


def test_seeded_models_are_alive_and_repeat():
    photographs = sample_photographs()
    first, again = (load("timm:levit_128s", Hub(1), photographs) for _ in range(2))
    assert first.weights == "seeded"
    x = torch.cat(first.images)
    with torch.no_grad():
        y = first.model(x)
        assert torch.equal(y, again.model(x))
        assert (y[0] - y[1]).std() > 0.1 * y.std()  # the photographs can be told apart
        for name, module in again.model.named_modules():  # silencing any branch is noticed
            if name.endswith(("attn.proj.ln.bn", "mlp.ln2.bn")):
                kept = module.weight.clone()
                module.weight.zero_()
                assert (again.model(x) - y).abs().max() > 1e-2 * y.std(), name
                module.weight.copy_(kept)


def test_hub_weights_are_used_and_classes_named(tmp_path, monkeypatch, timm, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    net = timm.create_model("levit_128s")
    safetensors.save_file(net.state_dict(), path)
    monkeypatch.setattr(Hub, "fetch", lambda self, repository: (path, ""))
    loaded = load("timm:levit_128s", Hub(1), sample_photographs())
    assert loaded.detail == "hub weights timm/levit_128s.fb_dist_in1k"
    assert torch.equal(loaded.model.head.linear.weight, net.head.linear.weight)
    sample = tmp_path / "one.png"
    sample_photographs()[0][1].save(sample)
    assert main(["optimize", "levit_128s", "--image", str(sample), "--repeat", "1"]) == 0
    assert "  one.png: " in capsys.readouterr().out


def test_damaged_hub_weights_are_said_and_not_used(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"nothing of the kind")
    monkeypatch.setattr(Hub, "fetch", lambda self, repository: (path, ""))
    loaded = load("timm:levit_128s", Hub(1), sample_photographs())
    assert loaded.weights == "seeded"
    assert "does not load" in loaded.detail


def test_preparation_follows_the_model():
    photographs = sample_photographs()
    loaded = load("timm:levit_128s", Hub(1), photographs)  # timm crops LeViT at 0.9
    expected = to_tensor(photographs[0][1], 224, 0.9)
    torch.testing.assert_close(loaded.images[0], expected)
