"""Our own ops and modules as a torch user would write them: what ours is measured against."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from .. import backend
from ..ops._contract import activate


@contextmanager
def plain_torch(fused_attention: str | Callable = "unbiased") -> Iterator[None]:
    """The reference ops while the block runs, with attention as users have it.

    The reference of attention also serves rows without any key, which costs two passes over the
    scores: timed against that, our speed-up would be flattered.

    fused_attention: where torch's scaled_dot_product_attention is taken: "unbiased" (no bias and no
    mask, as timm does; with a bias the spelled-out scores are mostly faster on CPUs), "always" or
    "never". Or a function of (q, k, v, bias, bias_index, key_padding_mask, scale), q, k and v being
    (B, H, N, D), that is taken instead.
    """

    def attention(q, k, v, bias, bias_index, key_padding_mask, scale, activation):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if callable(fused_attention):
            out = fused_attention(q, k, v, bias, bias_index, key_padding_mask, scale)
            return activate(out.transpose(1, 2).contiguous(), activation)
        if bias_index is not None:
            bias = bias[:, bias_index.long()]
        if key_padding_mask is not None:
            shut = torch.zeros(key_padding_mask.shape, dtype=q.dtype, device=q.device)
            shut = shut.masked_fill(key_padding_mask, -torch.inf)[:, None, None]
            bias = shut if bias is None else bias + shut
        if fused_attention == "always" or (fused_attention == "unbiased" and bias is None):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        else:
            scores = (q * scale) @ k.transpose(-2, -1)
            out = (scores if bias is None else scores + bias).softmax(-1) @ v
        return activate(out.transpose(1, 2).contiguous(), activation)

    file: Any = importlib.import_module("hybridops.ops.attention")
    reference, file.attention_reference = file.attention_reference, attention
    try:
        with backend.use("reference"):
            yield
    finally:
        file.attention_reference = reference
