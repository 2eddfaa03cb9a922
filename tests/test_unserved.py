"""Classes that no kernel can serve are named in the report, each with its reason."""

from __future__ import annotations

import importlib

import pytest
from torch import nn

from hybridops import explain
from hybridops.optimize import rules


def load(path: str) -> type[nn.Module]:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("path", rules.UNSERVED)
def test_it_exists_and_has_no_rule_beside_its_reason(timm, path):
    assert issubclass(load(path), nn.Module)
    assert path not in rules.RULES
    assert rules.UNSERVED[path]


def test_the_report_gives_the_reason(monkeypatch):
    monkeypatch.setitem(rules.UNSERVED, "torch.nn.modules.rnn:LSTM", "it is recurrent")
    attention = nn.Module()
    attention.qkv = nn.Linear(4, 4)
    monkeypatch.setitem(rules.UNSERVED, "torch.nn.modules.module:Module", "it is empty")
    model = nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4), nn.Conv2d(4, 4, 1), attention)
    reasons = {layer.fqn: layer.reason for layer in explain(model).layers}
    assert reasons == {
        "0": "it is recurrent",
        "1": "by itself: nothing to fuse, and torch's product is as fast",
        "2": "by itself: the convolution is torch's",
        "3": "it is empty",
        "3.qkv": "part of 3, which is torch's",
    }


class ForeignAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)


class ForeignAttentionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.fc = ForeignAttention(), nn.Linear(4, 4)


def test_an_attention_without_a_rule_is_named_with_its_parts(timm):
    from timm.layers import Attention

    class ServedAttention(ForeignAttentionBlock):
        def __init__(self):
            super().__init__()
            self.attn = Attention(16, 2)

    model = nn.Sequential(ForeignAttentionBlock(), ServedAttention())
    reasons = {layer.fqn: layer.reason for layer in explain(model).layers}
    alone = "by itself: nothing to fuse, and torch's product is as fast"
    assert reasons == {
        "0.attn": "no rule for this kind of attention",
        "0.attn.qkv": "part of 0.attn, which is torch's",
        "0.fc": alone,
        "1.attn": None,
        "1.fc": alone,
    }


class Mixer(nn.Module):
    """An attention that is called something else."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


class Classifier(nn.Module):
    """Softmax alone makes no attention."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x).softmax(-1)


def test_an_attention_is_known_by_what_it_computes(timm):
    from timm.layers import AttentionPoolLatent, SimPool1d
    from timm.models.iformer import SHMA
    from timm.models.shvit import SHSA

    none, alone = "no rule for this kind of attention", "by itself: nothing to fuse, and torch's"
    layers = {layer.fqn: layer.reason for layer in explain(nn.Sequential(Mixer())).layers}
    assert layers == {"0": none, "0.qkv": "part of 0, which is torch's"}
    assert explain(nn.Sequential(Classifier())).layers[0].reason.startswith(alone)
    for module in (AttentionPoolLatent(16, num_heads=2), SimPool1d(16), SHMA(16), SHSA(16, 8, 8)):
        first, *parts = explain(module).layers
        assert (first.fqn, first.reason) == ("", none), type(module).__name__
        assert all(p.rule or p.reason == "part of the model, which is torch's" for p in parts)
