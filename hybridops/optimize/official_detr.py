"""The authors' DETR (known by shape): its layers on nn.MultiheadAttention, with positions.

They throw attention's weights away, which it computes by default; these rules ask for none.
"""

from __future__ import annotations

import torch

from .shapes import Shaped
from .torch_transformer import TransformerLayer


def _plus(x, positions):
    return x if positions is None else x + positions


class _Layer(Shaped, TransformerLayer):
    pre_norm = "normalize_before"

    @classmethod
    def tokens(cls, module, generator, *counts):
        width = module.self_attn.embed_dim
        batch = [(2, n) if module.self_attn.batch_first else (n, 2) for n in counts]
        return [torch.randn(*size, width, generator=generator) for size in batch]


class EncoderLayer(_Layer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        if not self._serves(src, False):
            return self.replaces.forward(self, src, src_mask, src_key_padding_mask, pos)

        def inputs(x):
            q = _plus(x, pos)
            return q, q, x, src_key_padding_mask, src_mask

        return self._run(src, inputs)

    @classmethod
    def example(cls, module, generator):
        src, pos = cls.tokens(module, generator, 5, 5)
        return src, None, torch.arange(5) >= torch.tensor([[5], [3]]), pos


class DecoderLayer(_Layer):
    attentions = ("self_attn", "multihead_attn")

    def forward(
        self,
        tgt,
        memory,
        tgt_mask=None,
        memory_mask=None,
        tgt_key_padding_mask=None,
        memory_key_padding_mask=None,
        pos=None,
        query_pos=None,
    ):
        if not self._serves(tgt, False):
            masks = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
            return self.replaces.forward(self, tgt, memory, *masks, pos, query_pos)
        keys = _plus(memory, pos)

        def own(x):
            q = _plus(x, query_pos)
            return q, q, x, tgt_key_padding_mask, tgt_mask

        def cross(x):
            return _plus(x, query_pos), keys, memory, memory_key_padding_mask, memory_mask

        return self._run(tgt, own, cross)

    @classmethod
    def example(cls, module, generator):
        tgt, memory, pos, query_pos = cls.tokens(module, generator, 3, 5, 5, 3)
        padding = torch.arange(5) >= torch.tensor([[5], [3]])
        return tgt, memory, None, None, None, padding, pos, query_pos
