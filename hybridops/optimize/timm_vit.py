"""timm's vision_transformer.Block: a chain of two layers, and its blocks one chain."""

from __future__ import annotations

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import nn

from .block import block_layers
from .chained import Chained
from .fast import activation_name, fall_back
from .qkv import scale_of
from .timm_block import PARTS, not_pre_norm
from .timm_layers import FastAttention


class FastBlock(Chained, Block):
    invisible = FastAttention.invisible

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return PARTS
        reason = not_pre_norm(module, {Attention: FastAttention})
        norms = (module.attn.norm, module.attn.q_norm, module.attn.k_norm)
        if reason or all(type(norm) is nn.Identity for norm in norms):
            return reason
        return "a norm inside attn; the parts are served"

    @classmethod
    def facts(cls, module):
        return activation_name(module.mlp.act)

    def forward(self, x, attn_mask=None, is_causal=False):
        if attn_mask is not None or is_causal:
            fall_back("timm Block", "mask")
            return Block.forward(self, x, attn_mask, is_causal)
        return Chained.forward(self, x)

    def layers(self):
        return block_layers(self, self._hybridops_plan.facts, scale_of(self.attn))
