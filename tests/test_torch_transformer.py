"""optimize() on torch.nn's attention and transformer layers, over what their forwards accept."""

from __future__ import annotations

import copy

import pytest
import torch
from check import accurate, same_bits
from parity import doubled, parity, reasons, run
from torch import nn

import hybridops
from hybridops import NothingToOptimize, backend, optimize, report, restore
from hybridops.optimize import Fast
from hybridops.optimize import torch_transformer as rules

E, HEADS, B, L, S = 24, 4, 2, 5, 7
PADDING = torch.arange(S) >= torch.tensor([[S], [4]])
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)


class Attend(nn.Module):
    """An nn.MultiheadAttention in a model that passes the same keywords at every call."""

    def __init__(self, need_weights=False, masks=None, **kwargs):
        super().__init__()
        self.attn = nn.MultiheadAttention(E, HEADS, **kwargs)
        self.need_weights, self.masks = need_weights, masks or {}

    def forward(self, *inputs):
        masks = {
            k: m.to(inputs[0].dtype) if m.is_floating_point() else m for k, m in self.masks.items()
        }
        y, weights = self.attn(*inputs, need_weights=self.need_weights, **masks)
        return (y, weights) if self.need_weights else y


MASKS = {
    "none": {},
    "bool padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": torch.linspace(-2, 2, B * S).view(B, S)},
    "2-D": {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(2)},
    "3-D": {"attn_mask": torch.linspace(-3, 3, B * HEADS * L * S).view(B * HEADS, L, S)},
    "both": {"key_padding_mask": PADDING, "attn_mask": torch.ones(L, S, dtype=torch.bool).triu(3)},
}


def tokens(*sizes, batch_first=True, width=E):
    return [torch.randn((B, n, width) if batch_first else (n, B, width)) for n in sizes]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", MASKS)
def test_masks(masks, need_weights):
    q, k = tokens(L, S)
    parity(Attend(need_weights, MASKS[masks], batch_first=True), q, k, k)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("inputs", ["self", "cross", "three", "unbatched", "kdim"])
def test_inputs(inputs, batch_first):
    q, k, v = tokens(L, S, S, batch_first=batch_first)
    sizes = {}
    if inputs == "self":
        k = v = q
    elif inputs == "cross":
        v = k
    elif inputs == "unbatched":
        q, k, v = q[0], k[0], v[0]
    elif inputs == "kdim":
        k, v = k[..., :9], v[..., :13]
        sizes = {"kdim": 9, "vdim": 13}
    parity(Attend(batch_first=batch_first, **sizes), q, k, v)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_what_is_left_alone(option):
    with pytest.raises(NothingToOptimize, match="bias_k|add_zero_attn"):
        optimize(Attend(**{option: True}))


def test_dropout_in_training_is_left_alone():
    with pytest.raises(NothingToOptimize, match="dropout 0.1 in training"):
        optimize(Attend(dropout=0.1), mode="train")


def test_weights_are_served_to_whoever_asks_and_counted():
    model = optimize(nn.MultiheadAttention(E, HEADS).eval())
    x = torch.randn(L, B, E)
    before = backend.fallbacks["attention", "need_weights"]
    y, weights = model(x, x, x)
    assert weights.shape == (B, L, L)
    assert backend.fallbacks["attention", "need_weights"] == before + 1
    expected, expected_weights = restore(model)(x, x, x)
    torch.testing.assert_close((y, weights), (expected, expected_weights))


def test_our_own_module_keeps_its_own_reason():
    model = nn.Sequential(hybridops.nn.MultiheadAttention(E, HEADS), nn.MultiheadAttention(E, 2))
    optimize(model)
    assert reasons(model) == {"0": "runs on hybridops kernels already", "1": None}


def test_projections_of_other_widths_are_packed_once(monkeypatch):
    from hybridops.nn import _derived

    packed = []
    pack = _derived.pack_linear
    monkeypatch.setattr(_derived, "pack_linear", lambda w: packed.append(w) or pack(w))
    model = optimize(nn.MultiheadAttention(E, HEADS, kdim=9, vdim=13).eval())
    inputs = (torch.randn(L, B, E), torch.randn(S, B, 9), torch.randn(S, B, 13))
    with torch.no_grad():
        for _ in range(2):
            model(*inputs, need_weights=False)
    assert len(packed) == 4


OPTIONS = [
    {},
    {"norm_first": True},
    {"batch_first": True, "activation": "gelu"},
    {"batch_first": True, "norm_first": True, "bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_encoder_layer(options):
    (x,) = tokens(L, batch_first=options.get("batch_first", False))
    parity(nn.TransformerEncoderLayer(E, HEADS, 40, dropout=0.0, **options), x)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decoder_layer(options):
    x, memory = tokens(L, S, batch_first=options.get("batch_first", False))
    parity(nn.TransformerDecoderLayer(E, HEADS, 40, dropout=0.0, **options), x, memory)


@pytest.mark.parametrize("norm_first", [True, False])
def test_masks_of_layers(norm_first):
    x, memory = tokens(L, S)
    kwargs = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    parity(nn.TransformerEncoderLayer(E, HEADS, 40, **kwargs), x, CAUSAL, PADDING[:, -L:])
    args = (x, memory, CAUSAL, None, None, PADDING)
    parity(nn.TransformerDecoderLayer(E, HEADS, 40, **kwargs), *args)


def test_the_whole_transformer_and_its_fast_path():
    """Torch's fast path of an encoder layer bypasses its children: ours must not be among them."""
    model = nn.Transformer(E, HEADS, 2, 2, 40, dropout=0.0, batch_first=True)
    x, y = tokens(S, L)
    optimize(model.eval())
    left = {reason for reason in reasons(model).values() if reason}
    assert not left
    calls = []
    fused = rules.FastMultiheadAttention._fused

    def counted(*args, **kwargs):
        calls.append(args)
        return fused(*args, **kwargs)

    rules.FastMultiheadAttention._fused = counted
    try:
        run(model, (x, y))
    finally:
        rules.FastMultiheadAttention._fused = fused
    assert len(calls) == 2 + 2 * 2
    restore(model)
    parity(model, x, y)


def test_nested_tensors_go_to_torch_and_are_counted():
    layer = nn.TransformerEncoderLayer(E, HEADS, 40, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    (x,) = tokens(S)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
        optimize(model)
        y = model(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(y, expected)
    assert report(model).fallbacks["TransformerEncoderLayer", "nested tensor"] == 2


def test_dropout_while_training_is_drawn_as_before():
    layer = nn.TransformerEncoderLayer(E, HEADS, 40, dropout=0.5)
    layer.self_attn.dropout = 0.0
    x = torch.randn(L, B, E)
    expected = same_seed(layer.train(), x)
    torch.testing.assert_close(same_seed(optimize(layer, mode="train"), x), expected)


def same_seed(model, x):
    torch.manual_seed(3)
    return model(x)


def test_hooks_on_attention_fire_with_what_it_returns():
    layer = nn.TransformerEncoderLayer(E, HEADS, 40).eval()
    x = torch.randn(L, B, E)
    before = run(optimize(layer), (x,))[0]
    seen = []
    handle = layer.self_attn.register_forward_hook(lambda m, args, out: seen.append(out[0].shape))
    torch.testing.assert_close(run(layer, (x,))[0], before)
    assert seen == [x.shape]
    handle.remove()
    assert same_bits(run(layer, (x,))[0], before)


def test_reasons():
    strange = nn.TransformerEncoderLayer(E, HEADS, 40, activation=torch.tanh)

    class Own(nn.TransformerEncoderLayer):
        pass

    model = nn.ModuleList([strange, Own(E, HEADS, 40)])
    optimize(model)
    found = reasons(model)
    assert found["0"] == "activation is tanh, which no kernel applies"
    assert "subclass of torch.nn.modules.transformer:TransformerEncoderLayer" in found["1"]
    assert found["0.self_attn"] is found["1.self_attn"] is None
    assert "excluded" in reasons(optimize(restore(model), exclude="0"))["0.self_attn"]


def test_bare_causal_hints_are_refused_as_before():
    layer = optimize(nn.TransformerEncoderLayer(E, HEADS, 40).eval())
    with pytest.raises(RuntimeError, match="attn_mask"):
        layer(torch.randn(L, B, E), is_causal=True)
    with pytest.raises(TypeError, match="a mask must be bool or float"):
        layer(torch.randn(L, B, E), CAUSAL.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_and_bf16(dtype):
    layer = nn.TransformerEncoderLayer(E, HEADS, 40, dropout=0.0, batch_first=True).eval()
    (x,) = tokens(L)
    fast = optimize(copy.deepcopy(layer).to(dtype))
    if dtype == torch.bfloat16:
        plain = copy.deepcopy(layer).to(dtype)
        exact = run(copy.deepcopy(plain).double(), doubled((x.to(dtype),)))
        torchs = run(plain, (x.to(dtype),))
        accurate(run(fast, (x.to(dtype),))[0], torchs[0], exact[0], "bf16")
        return
    with torch.autocast("cpu", torch.bfloat16):
        ours, torchs = run(fast, (x,))[0], run(layer, (x,))[0]
    accurate(ours, torchs, run(copy.deepcopy(layer).double(), doubled((x,)))[0], "autocast")


def test_compiles_as_one_graph():
    layer = nn.TransformerEncoderLayer(E, HEADS, 40, dropout=0.0).eval()
    x = torch.randn(L, B, E)
    optimize(layer)
    assert isinstance(layer, Fast)
    expected = run(layer, (x,))[0]
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
