"""nn.MultiheadAttention asked for weights that its caller throws away: they are not computed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from parity import parity, run
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from hybridops import backend, explain, optimize, report, restore, verify

E, HEADS, B, L = 24, 4, 2, 5
FELL = "attention", "need_weights"


class Holds(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attn = nn.MultiheadAttention(E, HEADS, **kwargs)


class First(Holds):
    def forward(self, x):
        return x + self.attn(x, x, x)[0]


class Unpacks(Holds):
    def forward(self, x):
        y, _ = self.attn(x, x, value=x, need_weights=True)
        for _ in range(self.attn.num_heads - 3):
            y = y + x
        return y


class Inherits(Unpacks):
    """A subclass whose own method takes the weights; the one that it inherits does not."""

    def weights(self, x):
        return self.attn(x, x, x)[1]


class Says(Holds):
    def forward(self, x):
        both = self.attn(x, x, x, need_weights=False)
        return both[0]


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = First()

    def forward(self, x):
        return self.block(x)


class Reads(Holds):
    def forward(self, x):
        y, w = self.attn(x, x, x)
        return y + w.sum()


class ReadsLater(Holds):
    def forward(self, x):
        y, _ = self.attn(x, x, x)
        return y * _.sum()


class Second(Holds):
    def forward(self, x):
        return self.attn(x, x, x)[1].sum() + self.attn(x, x, x)[0]


class Renames(Holds):
    def forward(self, x):
        attn = self.attn
        y, w = attn(x, x, x)
        return self.attn(x, x, x)[0] + y + w.sum()


class ByName(Holds):
    def forward(self, x):
        return self.attn(x, x, x)[0] + getattr(self, "attn")(x, x, x)[1].sum()  # noqa: B009


class Direct(Holds):
    def forward(self, x):
        return self.attn.forward(x, x, x)[0]


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.MultiheadAttention(E, HEADS)])

    def forward(self, x):
        for layer in self.layers:
            x, _ = layer(x, x, x)
        return x


def fell_back(model, x):
    before = backend.fallbacks[FELL]
    run(model, (x,))
    return backend.fallbacks[FELL] - before


@pytest.mark.parametrize("cls", [First, Unpacks, Inherits, Says, Nested])
def test_weights_that_nobody_reads_are_not_computed(cls):
    x = torch.randn(B, L, E)
    model = cls().eval()
    if cls is First:
        parity(copy.deepcopy(model), x)
    optimize(model)
    assert fell_back(model, x) == 0
    assert (report(model).layers[-1].note is None) == (cls is not Inherits)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fell_back(twin, x) == 0
    assert "_hybridops_plan" not in str([vars(m) for m in restore(model).modules()])


@pytest.mark.parametrize(
    "cls", [Reads, ReadsLater, Second, Renames, ByName, Direct, Listed], ids=lambda c: c.__name__
)
def test_weights_that_may_be_read_are_computed(cls):
    model, x = cls().eval(), torch.randn(B, L, E)
    expected = run(copy.deepcopy(model), (x,))[0]
    optimize(model)
    assert fell_back(model, x) > 0
    torch.testing.assert_close(run(model, (x,))[0], expected)


def test_others_who_call_it_get_their_weights():
    """The user, a method of a subclass, a hook: all but the method that throws them away."""
    model, x = optimize(Inherits().eval()), torch.randn(B, L, E)
    assert model.attn(x, x, x)[1].shape == model.weights(x).shape == (L, B, B)
    seen = []
    handle = model.attn.register_forward_hook(lambda m, args, out: seen.append(out[1].shape))
    assert fell_back(model, x) == 1
    assert seen == [(L, B, B)]
    handle.remove()
    assert fell_back(model, x) == 0


def test_a_graph_drops_weights_that_nobody_reads():
    """torch.compile cannot ask who calls: it computes them apart, and reads them or not."""
    x, softmaxes = torch.randn(B, L, E), []
    model = optimize(First().eval())

    def count(graph, example):
        softmaxes.append(sum("softmax" in str(node.target) for node in graph.graph.nodes))
        return graph

    def both(x):
        return model(x), model.attn(x, x, x)[1]

    with torch.no_grad():
        expected = both(x)
        exported = torch.export.export(model, (x,)).graph
        for function, results in ((model, expected[0]), (both, expected)):
            compiled = torch.compile(
                function, fullgraph=True, backend=aot_autograd(fw_compiler=count)
            )
            torch.testing.assert_close(compiled(x), results)
    assert softmaxes == [0, 1]
    assert "softmax" not in str(exported)


def test_the_report_says_who_may_read_them(monkeypatch):
    names = {cls: explain(cls()).layers[0].note for cls in (First, Reads, Renames, Listed)}
    asked = "attention weights are computed where asked for: "
    assert names == {
        First: None,
        Reads: f"{asked}Reads.forward may read them",
        Renames: f"{asked}Renames.forward may read them",
        Listed: f"{asked}nothing in ModuleList calls it by its name",
    }
    assert "Reads.forward may read them" in str(explain(Reads()))
    scope = {"Holds": Holds}
    exec(
        "class Typed(Holds):\n    def forward(self, x):\n        return self.attn(x, x, x)[0]",
        scope,
    )
    typed, x = scope["Typed"]().eval(), torch.randn(B, L, E)
    assert "Typed.forward may read them" in explain(typed).layers[0].note
    assert fell_back(optimize(typed), x) == 1


def test_verify_measures_what_the_caller_runs(monkeypatch):
    """A fault of the path without weights would not show in one with them."""
    model, x = optimize(First().eval()), torch.randn(B, L, E)
    assert verify(model, x).ok
    rule = type(model.attn)
    healthy = rule._fused
    monkeypatch.setattr(rule, "_fused", lambda *args, **kwargs: healthy(*args, **kwargs) * 1.01)
    assert not verify(model, x).ok
