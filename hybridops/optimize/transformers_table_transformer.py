"""transformers' Table Transformer: DETR with its norms in front."""

from __future__ import annotations

import torch
from transformers.models.table_transformer.modeling_table_transformer import (
    TableTransformerAttention,
    TableTransformerConvEncoder,
    TableTransformerDecoderLayer,
    TableTransformerEncoderLayer,
)

from . import detr_layers as shape
from .transformers_backbone import ConvEncoder
from .transformers_block import AttentionRule


class FastConvEncoder(ConvEncoder, TableTransformerConvEncoder):
    pass


class FastAttention(AttentionRule, TableTransformerAttention):
    """Of the tokens among themselves, or to key_value_states."""

    projections = ("q_proj", "k_proj", "v_proj", "out_proj")

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        object_queries=None,
        key_value_states=None,
        spatial_position_embeddings=None,
        output_attentions=False,
    ):
        x, memory = hidden_states, key_value_states
        # without positions theirs does not find its values
        placed = object_queries is not None and (memory is None) == (
            spatial_position_embeddings is None
        )
        w = None
        if placed and _fits(attention_mask, x, memory):
            w = self._weights(x, {"output_attentions": output_attentions})
        if w is None:
            return TableTransformerAttention.forward(
                self,
                x,
                attention_mask,
                object_queries,
                memory,
                spatial_position_embeddings,
                output_attentions,
            )
        own, cross = w
        q = x + object_queries
        if memory is None:
            return shape.attend(self, own, q, q, x, attention_mask), None
        k = memory + spatial_position_embeddings
        return shape.attend(self, cross, q, k, memory, attention_mask), None

    def derive(self):
        """Whether it is called with key_value_states, only its calls tell."""
        names = self.projections
        return shape.self_projections(self, names), shape.cross_projections(self, names)


def _fits(mask, x, memory):
    """Whether a mask is what this class takes: of floats (a bool one says where not to look)."""
    if mask is None:
        return True
    B, N, _ = x.shape
    whole = mask.shape == (B, 1, N, N if memory is None else memory.shape[1])
    return whole and mask.dtype != torch.bool


class FastEncoderLayer(shape.Layer, TableTransformerEncoderLayer):
    attentions = (("self_attn", "self_attn_layer_norm", FastAttention),)
    norm_in_front = True

    def forward(self, hidden_states, attention_mask, object_queries=None, output_attentions=False):
        x, positions, weights = hidden_states, object_queries, None
        if positions is not None and _fits(attention_mask, x, None):
            weights = self._served(x, output_attentions)
        if weights is None:
            return TableTransformerEncoderLayer.forward(
                self, x, attention_mask, positions, output_attentions
            )
        return (self._encoded(x, attention_mask, positions, weights),)


class FastDecoderLayer(shape.Layer, TableTransformerDecoderLayer):
    attentions = (
        ("self_attn", "self_attn_layer_norm", FastAttention),
        ("encoder_attn", "encoder_attn_layer_norm", FastAttention),
    )
    norm_in_front = True

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        object_queries=None,
        query_position_embeddings=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        output_attentions=False,
    ):
        x, positions, memory = hidden_states, query_position_embeddings, encoder_hidden_states
        weights = None
        if all(t is not None for t in (object_queries, positions, memory)):
            fits = _fits(attention_mask, x, None) and _fits(encoder_attention_mask, x, memory)
            weights = self._served(x, output_attentions) if fits else None
        if weights is None:
            return TableTransformerDecoderLayer.forward(
                self,
                x,
                attention_mask,
                object_queries,
                positions,
                memory,
                encoder_attention_mask,
                output_attentions,
            )
        memory = memory, object_queries
        y = self._decoded(x, attention_mask, positions, memory, encoder_attention_mask, weights)
        return (y,)
