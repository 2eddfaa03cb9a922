"""timm's vision_transformer.Block: a chain of two layers, and its blocks one chain.

With norms inside its attention (qk_norm, scale_norm) a block is no chain: the norms around the
attention and the residuals run in its products, those inside are torch's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..ops import linear, mlp_layer
from .block import BlockWeights, block_layers, block_weights
from .chained import Chained
from .fast import activation_name, fall_back, norm_of
from .qkv import scale_of
from .timm_block import PARTS, not_pre_norm
from .timm_layers import FastAttention, attend


def _norms_inside(attn: Any) -> bool:
    norms = (attn.norm, attn.q_norm, attn.k_norm)
    return not all(type(norm) is nn.Identity for norm in norms)


class FastBlock(Chained, Block):
    invisible = FastAttention.invisible

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return PARTS
        return not_pre_norm(module, {Attention: FastAttention})

    @classmethod
    def links(cls, module):
        return not _norms_inside(module.attn)

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

    def derive(self):
        if not _norms_inside(self.attn):
            return Chained.derive(self)
        weights = block_weights(self)
        return None if weights is None else partial(self._apart, weights)

    def _apart(self, w: BlockWeights, x: Tensor) -> Tensor:
        """The block around an attention with norms inside."""
        attn: Any = self.attn
        norm1, norm2 = norm_of(self.norm1), norm_of(self.norm2)
        qkv = linear(x, w.qkv.weight, w.qkv.bias, norm=norm1, packed=w.qkv.packed)
        y = attn.norm(attend(attn, qkv))
        x = linear(y, w.proj.weight, w.proj.bias, residual=x, packed=w.proj.packed)
        activation = self._hybridops_plan.facts
        return mlp_layer(x, w.fc1, w.fc2, norm=norm2, activation=activation, residual=True)
