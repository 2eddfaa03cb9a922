"""timm's vision_transformer.Block: a chain of two layers, and its blocks one chain."""

from __future__ import annotations

from timm.layers import DropPath, LayerScale
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import nn

from .block import block_layers
from .chained import Chained
from .fast import (
    activation_name,
    fall_back,
    first,
    not_layer_norm,
    not_one_of,
)
from .timm_layers import FastAttention, FastMlp


class FastBlock(Chained, Block):
    @classmethod
    def unserved(cls, module, mode):
        attn, mlp = module.attn, module.mlp
        reason = first(
            (
                not_one_of("attn", attn, Attention),
                not_one_of("mlp", mlp, Mlp),
                not_layer_norm("norm1", module.norm1, LayerNorm),
                not_layer_norm("norm2", module.norm2, LayerNorm),
                not_one_of("ls1", module.ls1, nn.Identity, LayerScale),
                not_one_of("ls2", module.ls2, nn.Identity, LayerScale),
                not_one_of("drop_path1", module.drop_path1, nn.Identity, DropPath),
                not_one_of("drop_path2", module.drop_path2, nn.Identity, DropPath),
            )
        )
        if reason:
            return reason
        reason = FastAttention.unserved(attn, "inference")
        if reason:
            return f"attn: {reason}"
        reason = FastMlp.unserved(mlp, "inference")
        if reason:
            return f"mlp: {reason}"
        inner = (attn.norm, attn.q_norm, attn.k_norm, mlp.norm)
        if any(type(norm) is not nn.Identity for norm in inner):
            return "a norm inside attn or mlp; those are served on their own"
        return (
            "training keeps the block as it is; attn and mlp are served"
            if mode == "train"
            else None
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.mlp.act)

    def forward(self, x, attn_mask=None, is_causal=False):
        if attn_mask is not None or is_causal:
            fall_back("timm Block", "mask")
            return Block.forward(self, x, attn_mask, is_causal)
        return Chained.forward(self, x)

    def layers(self):
        # torch's fused attention takes no scale from timm, so neither do we
        scale = None if self.attn.fused_attn else self.attn.scale
        return block_layers(self, self._hybridops_plan.facts, scale)
