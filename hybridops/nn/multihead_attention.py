"""torch.nn.MultiheadAttention with the projections and the core in our ops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend, ops
from ._derived import weight_rows
from ._fusion import LINEARS, fused_linear, is_ours, is_plain
from .attention import torch_attention


class MultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention: the same constructor, forward, state_dict and results.

    need_weights=True (the default, as in torch) materialises the weights and so cannot be fused:
    pass need_weights=False for speed. bias_k / bias_v, add_zero_attn and nested tensors run in
    torch's implementation, dropout while training in its scaled_dot_product_attention;
    `backend.fallbacks` counts them.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query (L, B, E), key (S, B, kdim), value (S, B, vdim); B first with batch_first, or no B.

        key_padding_mask (B, S) and attn_mask (L, S) or (B * heads, L, S): bool, True = leave out,
        or float, added to the scores. Returns the output, and the weights (B, L, S), or
        (B, heads, L, S) with average_attn_weights=False, or None.
        """
        reason = self._torch_only(query, is_causal and attn_mask is None)
        if reason is not None or backend.reference_forced():
            backend.which("attention", query, reason)
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        dropout = self.dropout if self.training else 0.0
        fused = not dropout and (not need_weights or self._weights_are_dropped())
        if fused and not (need_weights and torch.compiler.is_dynamo_compiling()):
            return self._fused(query, key, value, key_padding_mask, attn_mask), None
        q, k, v, bias, padding = self._heads(query, key, value, key_padding_mask, attn_mask)
        weights = None
        if need_weights:
            if fused:  # a graph loses the weights, apart from the output, where nobody reads them
                out = ops.attention(q, k, v, bias=bias, key_padding_mask=padding)
                weights = _weights(q, k, bias, padding)
            else:
                backend.which("attention", q, "need_weights")
                weights = nn.functional.dropout(_weights(q, k, bias, padding), dropout, dropout > 0)
                out = (weights @ v.transpose(1, 2)).transpose(1, 2)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if query.ndim == 2 else weights
        else:
            bias = _add(bias, padding, q)
            out = torch_attention(q, k, v, bias, dropout, False, self.head_dim**-0.5)
        return fused_linear(self, "out_proj", self._tokens(out, query)), weights

    def _weights_are_dropped(self):
        """Whether the caller, known to optimize(), throws away the weights that it asks for."""
        return False

    def _fused(self, query, key, value, key_padding_mask=None, attn_mask=None, residual=None):
        """residual + the output, in query's layout, by our ops alone: no weights, no dropout."""
        q, k, v, bias, padding = self._heads(query, key, value, key_padding_mask, attn_mask)
        out = ops.attention(q, k, v, bias=bias, key_padding_mask=padding)
        return fused_linear(self, "out_proj", self._tokens(out, query), residual=residual)

    def _heads(self, query, key, value, key_padding_mask, attn_mask):
        """q, k, v (B, N, heads, D), the additive mask and the padding."""
        _check(query, key, value, self)
        q, k, v = self._project(query, key, value)
        if query.ndim == 2:
            q, k, v = q[None], k[None], v[None]
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask[None]
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)) for x in (q, k, v))
        return q, k, v, *_masks(attn_mask, key_padding_mask, q, k)

    def _tokens(self, out, query):
        """out (B, L, heads, D) as tokens in query's layout."""
        out = out.flatten(2)
        if query.ndim == 2:
            return out[0]
        return out if self.batch_first else out.transpose(0, 1)

    def _torch_only(self, query, bare_causal):
        if self.bias_k is not None or self.bias_v is not None:
            return "bias_k and bias_v"
        if self.add_zero_attn:
            return "add_zero_attn"
        if query.is_nested:
            return "nested tensor"
        if not is_plain(self.out_proj, LINEARS):  # torch reads its weight; it never calls it either
            return "out_proj is not a plain Linear"
        return "is_causal without attn_mask" if bare_causal else None

    def _project(self, query, key, value):
        """Three products, or fewer where inputs are the same tensor and the weight is packed."""
        E, bias = self.embed_dim, self.in_proj_bias
        packed = self.in_proj_weight
        if packed is None:
            layers = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            inputs = zip("qkv", layers, (query, key, value), range(3), strict=True)
            return [
                _linear(x, weight_rows(self, name, weight, bias, 0, E, bias_start=i * E))
                for name, weight, x, i in inputs
            ]
        if query is key and key is value:
            qkv = _linear(query, weight_rows(self, "qkv", packed, bias, 0, 3 * E))
            return qkv.split(E, dim=-1)
        if query is key:
            qk = _linear(query, weight_rows(self, "qk", packed, bias, 0, 2 * E))
            v = _linear(value, weight_rows(self, "v", packed, bias, 2 * E, 3 * E))
            return *qk.split(E, dim=-1), v
        q = _linear(query, weight_rows(self, "q", packed, bias, 0, E))
        if key is value:
            kv = _linear(key, weight_rows(self, "kv", packed, bias, E, 3 * E))
            return q, *kv.split(E, dim=-1)
        k = _linear(key, weight_rows(self, "k", packed, bias, E, 2 * E))
        return q, k, _linear(value, weight_rows(self, "v", packed, bias, 2 * E, 3 * E))


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + module(query, key, value)[0], batch first, with the sum inside the last product.

    query (B, L, E), key and value (B, S, E), key_padding_mask (B, S) bool, True = leave out.
    """
    plain = is_ours(module, MultiheadAttention) and module._torch_only(query, False) is None
    dropout = module.training and module.dropout
    if not plain or dropout or backend.reference_forced():
        if not module.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        y, _ = module(query, key, value, key_padding_mask, need_weights=False)
        y = y if module.batch_first else y.transpose(0, 1)
        return y if residual is None else residual + y
    _check(query, key, value, module)
    heads = (module.num_heads, module.head_dim)
    q, k, v = (x.unflatten(2, heads) for x in module._project(query, key, value))
    out = ops.attention(q, k, v, key_padding_mask=key_padding_mask).flatten(2)
    return fused_linear(module, "out_proj", out, residual=residual)


def _linear(x, w):
    return ops.linear(x, w.weight, w.bias, packed=w.packed)


def _check(query, key, value, module):
    if query.ndim not in (2, 3) or key.ndim != query.ndim or value.ndim != query.ndim:
        raise ValueError(
            "MultiheadAttention: query, key and value must all be 2-D or all 3-D, "
            f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if query.shape[-1] != module.embed_dim:
        raise ValueError(
            f"MultiheadAttention: query must have {module.embed_dim} features, "
            f"got {tuple(query.shape)}"
        )


def _masks(attn_mask, key_padding_mask, q, k):
    """torch's two masks as (additive bias (B or 1, H or 1, L, S), key_padding_mask (B, S))."""
    (B, L, H, _), S = q.shape, k.shape[1]
    bias = None
    if attn_mask is not None:
        bias = _additive(attn_mask, q)
        if bias.shape == (L, S):
            bias = bias[None, None]
        elif bias.shape == (B * H, L, S):
            bias = bias.view(B, H, L, S)
        else:
            raise ValueError(
                f"MultiheadAttention: attn_mask must be ({L}, {S}) or ({B * H}, {L}, {S}), "
                f"got {tuple(attn_mask.shape)}"
            )
    if key_padding_mask is None:
        return bias, None
    if key_padding_mask.shape != (B, S):
        raise ValueError(
            f"MultiheadAttention: key_padding_mask must be ({B}, {S}), "
            f"got {tuple(key_padding_mask.shape)}"
        )
    if key_padding_mask.dtype == torch.bool:
        return bias, key_padding_mask
    extra = _additive(key_padding_mask, q)[:, None, None]
    return extra if bias is None else bias + extra, None


def _additive(mask, like):
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise TypeError(f"MultiheadAttention: a mask must be bool or float, got {mask.dtype}")
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)


def _add(bias, padding, q):
    if padding is None:
        return bias
    extra = _additive(padding, q)[:, None, None]
    return extra if bias is None else bias + extra


def _weights(q, k, bias, padding):
    """The weights (B, H, L, S)."""
    bias = _add(bias, padding, q)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1)
