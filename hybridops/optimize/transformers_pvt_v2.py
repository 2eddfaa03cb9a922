"""transformers' PVTv2."""

from __future__ import annotations

from transformers.models.pvt_v2.modeling_pvt_v2 import (
    PvtV2ConvFeedForwardNetwork,
    PvtV2OverlapPatchEmbeddings,
    PvtV2SelfAttention,
)

from .pyramid import ConvPerceptron, OverlapEmbeddings, ReducedAttention


class FastPatchEmbeddings(OverlapEmbeddings, PvtV2OverlapPatchEmbeddings):
    pass


class FastAttention(ReducedAttention, PvtV2SelfAttention):
    projections = ("query", "key", "value", "proj")

    @classmethod
    def unserved(cls, module, mode):
        if module.linear_attention:
            return "linear_attention: keys and values are pooled, then pass a norm and a GELU"
        return super().unserved(module, mode)

    @classmethod
    def reduction(cls, module):
        if module.spatial_reduction_ratio == 1:
            return None
        return module.spatial_reduction, module.layer_norm


class FastMLP(ConvPerceptron, PvtV2ConvFeedForwardNetwork):
    layers = ("dense1", "intermediate_act_fn", "dense2")
