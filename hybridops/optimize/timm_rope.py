"""timm's attention with rotary embeddings: q and k normed and rotated before their product."""

from __future__ import annotations

import torch
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention

from ..nn._derived import Weights
from .fast import fall_back, first, not_plain_linear
from .qkv import QkvAttention, as_they_are, dropout_in_training, split_bias


class _RopeAttention(QkvAttention):
    changes_qk = True
    invisible = ("k_bias", "k_proj.bias", "k_norm.bias")  # without rope softmax cancels them

    @classmethod
    def unserved(cls, module, mode):
        if module.gate is not None:
            return "gated"
        if getattr(module, "num_kv_groups", 1) != 1:
            return "keys and values shared by several heads"
        if module.qkv is not None:
            return super().unserved(module, mode)
        return dropout_in_training(module, mode) or first(
            not_plain_linear(name, getattr(module, name))
            for name in ("q_proj", "k_proj", "v_proj", "proj")
        )

    @classmethod
    def facts(cls, module):
        return module.num_heads, module.head_dim

    def qkv_product(self):
        return as_they_are(self.qkv)

    def products(self):
        if self.qkv is not None:
            return self.qkv_product(), as_they_are(self.proj)
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        bias = None
        if q.bias is not None:  # EVA's k has none
            middle = torch.zeros_like(q.bias) if k.bias is None else k.bias
            bias = torch.cat([q.bias, middle, v.bias])
        weight = torch.cat([q.weight, k.weight, v.weight])
        return Weights(weight, bias, None), as_they_are(self.proj)

    def changed(self, q, k, rope=None):
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k) if rope is None else (self._rotated(q, rope), self._rotated(k, rope))

    def _rotated(self, x, rope):
        half, prefix = getattr(self, "rotate_half", False), self.num_prefix_tokens
        x = x.transpose(1, 2)  # rope is (tokens, features), or one for each image and head
        rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)
        return torch.cat([x[:, :, :prefix], rotated], dim=2).type_as(x).transpose(1, 2)

    def between(self, out):
        return self.norm(out)

    def forward(self, x, rope=None, attn_mask=None, is_causal=False):
        if attn_mask is not None or is_causal:
            fall_back(f"timm {self.replaces.__name__}", "mask")
            return self.replaces.forward(self, x, rope, attn_mask, is_causal)
        y = self.attended(x, how=(rope,))
        return self.replaces.forward(self, x, rope) if y is None else y


class FastAttentionRope(_RopeAttention, AttentionRope):
    pass


class FastEvaAttention(_RopeAttention, EvaAttention):
    def qkv_product(self):
        return split_bias(self)
