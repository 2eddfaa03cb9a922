"""transformers' Segformer."""

from __future__ import annotations

from transformers.models.segformer.modeling_segformer import (
    SegformerAttention,
    SegformerMixMLP,
    SegformerOverlapPatchEmbeddings,
)

from .pyramid import ConvPerceptron, OverlapEmbeddings, ReducedAttention


class FastPatchEmbeddings(OverlapEmbeddings, SegformerOverlapPatchEmbeddings):
    pass


class FastAttention(ReducedAttention, SegformerAttention):
    @classmethod
    def reduction(cls, module):
        if module.sequence_reduction_ratio == 1:
            return None
        return module.sequence_reduction.sequence_reduction, module.sequence_reduction.layer_norm

    def _packed(self, y):
        return y, None


class FastMLP(ConvPerceptron, SegformerMixMLP):
    pass
