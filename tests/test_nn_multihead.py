"""MultiheadAttention against torch's, over everything its forward accepts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hybridops import backend
from hybridops import nn as hnn

E, HEADS, B, L, S = 24, 3, 2, 5, 7


def pair(**kwargs):
    original = nn.MultiheadAttention(E, HEADS, **kwargs)
    for bias in (original.in_proj_bias, original.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    ours = hnn.MultiheadAttention(E, HEADS, **kwargs)
    ours.load_state_dict(original.state_dict())
    return ours.eval(), original.eval()


def same(ours, original, *args, **kwargs):
    """Outputs and weights alike, with gradients enabled and cached without."""
    expected, weights = original(*args, **kwargs)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            y, w = ours(*args, **kwargs)
            assert y.shape == expected.shape
            torch.testing.assert_close(y, expected.detach())
            assert (w is None) == (weights is None)
            if w is not None:
                torch.testing.assert_close(w, weights.detach())
    return expected


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("inputs", ["self", "cross", "three", "unbatched"])
@pytest.mark.parametrize("bias", [True, False])
def test_inputs(inputs, batch_first, need_weights, bias):
    ours, original = pair(batch_first=batch_first, bias=bias)

    def tokens(n):
        if inputs == "unbatched":
            return torch.randn(n, E)
        return torch.randn((B, n, E) if batch_first else (n, B, E))

    q, k, v = tokens(L), tokens(S), tokens(S)
    if inputs == "self":
        k = v = q
    elif inputs == "cross":
        v = k
    for average in (True, False):
        same(
            ours,
            original,
            q,
            k,
            v,
            need_weights=need_weights,
            average_attn_weights=average,
        )


PADDING = {
    "none": None,
    "bool": torch.arange(S) >= torch.tensor([[S], [4]]),
    "float": torch.linspace(-2, 2, B * S).view(B, S),
}
MASKS = {
    "none": None,
    "bool": torch.ones(L, S, dtype=torch.bool).triu(2),
    "float": torch.linspace(-3, 3, L * S).view(L, S),
    "per_head": torch.linspace(-3, 3, B * HEADS * L * S).view(B * HEADS, L, S),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks(padding, mask, need_weights):
    ours, original = pair(batch_first=True)
    q, k = torch.randn(B, L, E), torch.randn(B, S, E)
    masks = {"key_padding_mask": PADDING[padding], "attn_mask": MASKS[mask]}
    same(ours, original, q, k, k, need_weights=need_weights, **masks)


def test_causal():
    ours, original = pair(batch_first=True)
    x = torch.randn(B, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    same(ours, original, x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    with pytest.raises(RuntimeError, match="attn_mask"):
        ours(x, x, x, is_causal=True)


@pytest.mark.parametrize("kwargs", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_rare_options_run_in_torch_and_are_counted(kwargs):
    ours, original = pair(batch_first=True, **kwargs)
    before = backend.fallbacks.total()
    x = torch.randn(B, L, E)
    same(ours, original, x, x, x)
    assert backend.fallbacks.total() > before


def test_dropout_while_training():
    ours, original = pair(dropout=0.5)
    x = torch.randn(L, B, E)
    ours.train(), original.train()
    torch.manual_seed(3)
    y, weights = ours(x, x, x)
    torch.manual_seed(3)
    expected, expected_weights = original(x, x, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(weights, expected_weights)
    assert not torch.equal(ours(x, x, x, need_weights=False)[0], ours(x, x, x)[0])


def test_gradients_with_masks():
    ours, original = pair(batch_first=True)
    q, k = torch.randn(B, L, E), torch.randn(B, S, E)
    dy = torch.randn(B, L, E)
    masks = {"key_padding_mask": PADDING["bool"], "attn_mask": MASKS["bool"]}
    for need_weights in (True, False):
        got, expected = (
            torch.autograd.grad(
                m(q, k, k, need_weights=need_weights, **masks)[0], list(m.parameters()), dy
            )
            for m in (ours, original)
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_in_a_transformer_layer():
    layer = nn.TransformerDecoderLayer(E, HEADS, 48, dropout=0.0, batch_first=True)
    x, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    expected = layer(x, memory)
    for name in ("self_attn", "multihead_attn"):
        ours = hnn.MultiheadAttention(E, HEADS, batch_first=True)
        ours.load_state_dict(getattr(layer, name).state_dict())
        setattr(layer, name, ours)
    torch.testing.assert_close(layer(x, memory), expected)


@pytest.mark.parametrize(
    ("query", "key", "kwargs", "message"),
    [
        ((B, L, E), (S, E), {}, "all 3-D"),
        ((B, L, E + 1), (B, S, E), {}, "24 features"),
        ((B, L, E), (B, S, E), {"attn_mask": torch.zeros(L, S + 1)}, "attn_mask must be"),
        ((B, L, E), (B, S, E), {"attn_mask": torch.zeros(B, L, S)}, "attn_mask must be"),
        ((B, L, E), (B, S, E), {"key_padding_mask": torch.zeros(S, B)}, "key_padding_mask must"),
    ],
)
def test_wrong_inputs(query, key, kwargs, message):
    ours, _ = pair(batch_first=True)
    q, k = torch.randn(query), torch.randn(key)
    with pytest.raises(ValueError, match=message):
        ours(q, k, k, **kwargs)
