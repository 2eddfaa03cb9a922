"""report() and explain(), and the rules that they name: our own and those of others."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from test_optimize import build, image, run
from torch import nn

import hybridops
from hybridops import NothingToOptimize, explain, optimize, report, restore
from hybridops.optimize import Fast, register, rules


def test_report(timm):
    model = build(timm, "twins")
    optimize(model)
    run(model, image(model))
    shown = report(model)
    assert "FastLocallyGroupedAttn" in str(shown)
    assert "left alone: by itself" in str(shown)
    assert f"Twins: {shown.replaced} of {len(shown.layers)} hot layers" in str(shown)
    assert shown.markdown().startswith("| layer | was | now |\n| --- |")
    content = json.loads(shown.json())
    assert content["options"]["mode"] == "inference"
    assert len(content["layers"]) == len(shown.layers)
    with hybridops.use("reference"):
        run(model, image(model))
    served = any("C++" in reason for _, reason in report(model).fallbacks)
    assert served == (hybridops.backend.ISA is None)


def test_explain(timm):
    shown = explain("timm:levit_128s")
    rule = {layer.fqn: layer.rule for layer in shown.layers}
    assert rule["stages.0.blocks.0"] == "hybridops.optimize.timm_levit:FastLevitBlock"
    assert rule["stem"].endswith("FastStem16")
    model = build(timm, "vit")
    assert explain(model).replaced == 8
    assert not any(isinstance(m, Fast) for m in model.modules())
    conv = explain("timm:levit_conv_128s", mode="train")
    assert any("use_conv" in str(layer.reason) for layer in conv.layers)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("levit_256", "timm:NAME"),
        ("timm:", "timm:NAME"),
        ("timm:levit_2567", "no model 'levit_2567'; it has levit_128"),
        ("hybridops:nothing", "cpvt_tiny"),
    ],
)
def test_explain_of_unknown_names(timm, name, match):
    with pytest.raises(ValueError, match=match):
        explain(name)


def test_explain_says_what_else_helps(timm):
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**options, num_hidden_layers=1, image_size=32)
    layers = explain(transformers.CLIPVisionModel(config)).layers
    (reason,) = (layer.reason for layer in layers if layer.old.endswith("CLIPAttention"))
    assert reason == 'no rule; attn_implementation="hybridops" gives it the attention kernel'
    with pytest.raises(ValueError, match="class of it .* 'transformers:DepthAnythingFor"):
        explain("hf:depth_anything")


def test_explain_builds_what_reads_numbers_on_the_cpu(timm):
    assert explain("torchvision:regnet_y_400mf").layers


def test_explain_transformers():
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert explain("transformers:vit", num_hidden_layers=1).replaced == 4
        with pytest.raises(ValueError, match="nothing is downloaded"):
            explain("transformers:nobody/nothing")


def test_rules_of_others():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return x * self.factor

    path = f"{Scale.__module__}:{Scale.__qualname__}"

    @register(path)
    class FastScale(Fast, Scale):
        @classmethod
        def unserved(cls, module, mode):
            return "training" if mode == "train" else None

        def forward(self, x):
            return x * self.factor + 0

    try:
        model = optimize(nn.Sequential(Scale()))
        assert type(model[0]) is FastScale
        assert type(restore(model)[0]) is Scale
        with pytest.raises(NothingToOptimize, match="training"):
            optimize(model, mode="train")
    finally:
        del rules.RULES[path]
    with pytest.raises(ValueError, match="package.module:Class"):
        register("timm.models.levit.Attention")


def test_plugins_load_once_and_may_fail(monkeypatch):
    class Entry:
        value = "somebody:rules"
        loads = 0

        def load(self):
            Entry.loads += 1
            raise RuntimeError("broken")

    monkeypatch.setattr(rules, "_plugins_loaded", False)
    monkeypatch.setattr(rules, "entry_points", lambda group: [Entry()])
    with pytest.warns(RuntimeWarning, match="somebody:rules do not load: broken"):
        rules.load_plugins()
    rules.load_plugins()
    assert Entry.loads == 1
