"""`attn_implementation="hybridops"` of transformers: our attention, and the mask it needs.

A name without a mask function gets no mask at all from transformers, silently: DETR's padding would
be attended to. So both are registered, or neither.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import backend, ops
from .nn.attention import split_mask

NAME = "hybridops"


def register() -> None:
    """Make `attn_implementation="hybridops"` known. Raises ImportError without transformers."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        raise ImportError(
            "transformers 5 is not installed: pip install transformers", name="transformers"
        ) from None
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query, key, value (B, heads, N, D) -> (B, N, heads, D), and the weights or None.

    attention_mask: (B, 1 or heads, Nq, Nk) bool, True = attend, or float, added. Weights that are
    asked for, dropout, a causal call and grouped heads run in plain torch; `backend.fallbacks`
    counts them.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[2] > 1
    bias = _bias(attention_mask, position_bias, query)
    reason = None
    if kwargs.get("output_attentions") or getattr(
        getattr(module, "config", None), "output_attentions", False
    ):
        reason = "output_attentions"
    elif dropout:
        reason = "dropout while training"
    elif causal:
        reason = "causal"
    elif key.shape[1] != query.shape[1]:
        reason = "grouped heads"
    if reason is not None:
        backend.which("attention", query, reason)
        return _plainly(query, key, value, bias, dropout, scaling, causal)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    padding = key_padding(bias)
    if padding is not None:
        bias = None
    else:
        bias, _ = split_mask(bias, q)
    return ops.attention(q, k, v, bias=bias, key_padding_mask=padding, scale=scaling), None


def key_padding(mask: Tensor | None) -> Tensor | None:
    """The (B, Nk) padding, True = leave out, behind a bool mask (B, 1, Nq, Nk) whose rows are one;
    None for any other mask. transformers expands such a row, which its strides tell.
    """
    if mask is None or mask.dtype != torch.bool or mask.shape[1] != 1:
        return None
    return ~mask[:, 0, 0] if mask.shape[2] == 1 or mask.stride(2) == 0 else None


def _bias(mask, position_bias, query):
    if position_bias is None:
        return mask
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
    return mask + position_bias


def _plainly(q, k, v, bias, dropout, scaling, causal):
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if causal:
        bias = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, torch.finfo(scores.dtype).min)
    elif bias is not None:
        scores = scores + bias
    weights = nn.functional.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    return (weights @ v).transpose(1, 2).contiguous(), weights
