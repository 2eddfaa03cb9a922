"""optimize() on transformers' LeViT."""

from __future__ import annotations

import copy

import pytest
import torch
from check import accurate
from parity import doubled, parity, reasons, run, wake

from hybridops import explain, optimize

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _importable(timm):
    """timm makes torchvision importable, which transformers imports."""


def build(**kwargs):
    options = {"image_size": 80, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4]}
    options |= {"depths": [1, 2, 1], "key_dim": [16, 16, 16], "num_labels": 7, "drop_path_rate": 0}
    options |= {"down_ops": [["Subsample", 16, 2, 4, 2, 2], ["Subsample", 16, 3, 4, 2, 2]]}
    return transformers.LevitForImageClassification(transformers.LevitConfig(**options | kwargs))


def image(n=3):
    return torch.randn(n, 3, 80, 80)


def test_parity():
    parity(build(), image())


def test_every_hot_layer_is_served():
    left = {layer.fqn: layer.reason for layer in explain(build()).layers if layer.reason}
    assert not left
    train = {layer.reason for layer in explain(build(), mode="train").layers if layer.reason}
    assert all(reason.startswith(("by itself", "training keeps")) for reason in train)


def test_bfloat16():
    model, x = build(), image()
    wake(model, (x,))
    model, x = model.bfloat16(), x.bfloat16()
    model.train()
    model.eval()  # drops the biases that it cached
    exact = copy.deepcopy(model).double()
    exact.train()
    exact.eval()
    torchs = run(model, (x,))
    accurate(run(optimize(model), (x,))[0], torchs[0], run(exact, doubled((x,)))[0], "bf16")


def test_stochastic_depth_while_training_is_drawn_as_before():
    model, x = build(), image()
    wake(model, (x,)).train()
    for module in model.modules():
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.5
    outputs = []
    for options in (None, {"mode": "train"}):
        if options:
            optimize(model, **options)
        torch.manual_seed(3)
        outputs.append(copy.deepcopy(model)(x).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-3)


def test_reasons():
    model = build()
    model.levit.patch_embeddings.activation_layer_2 = torch.nn.Tanh()
    model.levit.encoder.stages[0].layers[1].module.activation = torch.nn.Tanh()
    found = reasons(optimize(model))
    assert "Tanh, which no kernel applies" in found["levit.patch_embeddings"]
    assert "Tanh" in found["levit.encoder.stages.0.layers.1"]
    with pytest.raises(ValueError, match="channel dimension"):
        optimize(build().eval())(torch.randn(1, 4, 80, 80))


def test_a_stage_is_one_chain():
    model = build()
    optimize(wake(model, (image(),)))
    for stage in model.levit.encoder.stages:
        assert type(stage).__name__ == "FastStage"
        assert len(stage.derive().layers) == len(stage.layers)
