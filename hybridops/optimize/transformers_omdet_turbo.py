"""transformers' OmDet-Turbo: attention, the encoder's layers and convolutions."""

from __future__ import annotations

import torch
from transformers.models.omdet_turbo.modeling_omdet_turbo import (
    OmDetTurboConvNormLayer,
    OmDetTurboEncoderLayer,
    OmDetTurboMultiheadAttention,
    OmDetTurboRepVggBlock,
)

from . import convs
from . import detr_layers as shape
from .transformers_block import AttentionRule
from .transformers_rt_detr import TwoBranches


class FastMultiheadAttention(AttentionRule, OmDetTurboMultiheadAttention):
    projections = ("query", "key", "value", "out_proj")

    def forward(self, queries, keys, values, attention_mask=None, output_attentions=False):
        w = None
        if _adds(attention_mask):
            w = self._weights(queries, {"output_attentions": output_attentions})
        if w is None:
            return OmDetTurboMultiheadAttention.forward(
                self, queries, keys, values, attention_mask, output_attentions
            )
        return (shape.attend(self, w, queries, keys, values, attention_mask),)

    def derive(self):
        return shape.cross_projections(self, self.projections)


def _adds(mask):
    """Whether a mask is added to the scores as it is: a bool one would be, as ones and zeros."""
    return mask is None or (mask.dtype != torch.bool and mask.ndim == 4)


class FastEncoderLayer(shape.Layer, OmDetTurboEncoderLayer):
    attentions = (("self_attn", "self_attn_layer_norm", FastMultiheadAttention),)

    def forward(
        self, hidden_states, attention_mask, position_embeddings=None, output_attentions=False
    ):
        x, positions = hidden_states, position_embeddings
        weights = self._served(x, output_attentions or not _adds(attention_mask))
        if weights is None:
            return OmDetTurboEncoderLayer.forward(
                self, x, attention_mask, positions, output_attentions
            )
        return (self._encoded(x, attention_mask, positions, weights),)


class FastConvNormLayer(convs.Chain, OmDetTurboConvNormLayer):
    pass


class FastRepVggBlock(TwoBranches, OmDetTurboRepVggBlock):
    pass
