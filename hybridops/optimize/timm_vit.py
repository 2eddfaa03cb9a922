"""timm's vision_transformer.Block: norm, product, activation and residual as one kernel each."""

from __future__ import annotations

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import nn

from .block import block_weights, run_block
from .fast import Fast, activation_name, fall_back
from .timm_block import PARTS, not_pre_norm
from .timm_layers import FastAttention


class FastBlock(Fast, Block):
    immaterial = FastAttention.immaterial

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return PARTS
        reason = not_pre_norm(module, {Attention: FastAttention})
        if reason or type(module.attn.norm) is nn.Identity:
            return reason
        return "a norm inside attn; the parts are served"

    @classmethod
    def facts(cls, module):
        return activation_name(module.mlp.act)

    def forward(self, x, attn_mask=None, is_causal=False):
        plan = self._hybridops_plan
        if attn_mask is not None or is_causal:
            fall_back("timm Block", "mask")
            return Block.forward(self, x, attn_mask, is_causal)
        weights = plan.derived(self, x)
        if weights is None:
            return Block.forward(self, x)
        attn = self.attn
        # torch's fused attention takes no scale from timm, so neither do we
        return run_block(self, x, weights, plan.facts, None if attn.fused_attn else attn.scale)

    def derive(self):
        return block_weights(self)
