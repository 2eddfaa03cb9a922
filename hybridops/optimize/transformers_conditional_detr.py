"""transformers' Conditional DETR."""

from __future__ import annotations

from transformers.models.conditional_detr.modeling_conditional_detr import (
    ConditionalDetrConvEncoder,
    ConditionalDetrDecoderCrossAttention,
    ConditionalDetrDecoderLayer,
    ConditionalDetrDecoderSelfAttention,
    ConditionalDetrEncoderLayer,
    ConditionalDetrMLP,
    ConditionalDetrSelfAttention,
)

from . import conditional_detr_layers as two
from . import detr_layers as shape
from .transformers_backbone import ConvEncoder
from .transformers_block import AttentionRule


class FastSelfAttention(shape.SelfAttention, ConditionalDetrSelfAttention):
    pass


class FastMLP(shape.Perceptron, ConditionalDetrMLP):
    pass


class FastEncoderLayer(shape.EncoderLayer, ConditionalDetrEncoderLayer):
    attentions = (("self_attn", "self_attn_layer_norm", FastSelfAttention),)
    perceptron = FastMLP


class FastConvEncoder(ConvEncoder, ConditionalDetrConvEncoder):
    pass


class FastDecoderSelfAttention(AttentionRule, ConditionalDetrDecoderSelfAttention):
    projections = two.OWN
    invisible = ("k_content_proj.bias", "k_pos_proj.bias")  # as KEY_BIASES

    def forward(self, hidden_states, query_position_embeddings, attention_mask=None, **kwargs):
        x, positions = hidden_states, query_position_embeddings
        w = self._weights(x, kwargs)
        if w is None:
            return self.replaces.forward(self, x, positions, attention_mask, **kwargs)
        heads = self.hidden_size // self.head_dim
        return two.attend_own(w, heads, self.scaling, x, positions, attention_mask), None

    def derive(self):
        return two.own(*(getattr(self, name) for name in self.projections))


class FastDecoderCrossAttention(AttentionRule, ConditionalDetrDecoderCrossAttention):
    projections = two.CROSS
    invisible = FastDecoderSelfAttention.invisible

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        query_sine_embed,
        encoder_position_embeddings,
        query_position_embeddings=None,
        attention_mask=None,
        **kwargs,
    ):
        w = self._weights(hidden_states, kwargs)
        if w is None:
            return self.replaces.forward(
                self,
                hidden_states,
                encoder_hidden_states,
                query_sine_embed,
                encoder_position_embeddings,
                query_position_embeddings,
                attention_mask,
                **kwargs,
            )
        y = two.attend_cross(
            w,
            self.num_attention_heads,
            self.scaling,
            hidden_states,
            (encoder_hidden_states, encoder_position_embeddings),
            query_sine_embed,
            query_position_embeddings,
            attention_mask,
        )
        return y, None

    def derive(self):
        return two.cross(*(getattr(self, name) for name in self.projections))


class FastDecoderLayer(shape.Layer, ConditionalDetrDecoderLayer):
    attentions = (
        ("self_attn", "self_attn_layer_norm", FastDecoderSelfAttention),
        ("encoder_attn", "encoder_attn_layer_norm", FastDecoderCrossAttention),
    )
    perceptron = FastMLP

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        spatial_position_embeddings=None,
        query_position_embeddings=None,
        query_sine_embed=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        is_first=False,
        **kwargs,
    ):
        x, positions, memory = hidden_states, query_position_embeddings, encoder_hidden_states
        weights = self._served(x, memory is None or kwargs.get("output_attentions"))
        if weights is None:
            return ConditionalDetrDecoderLayer.forward(
                self,
                x,
                attention_mask,
                spatial_position_embeddings,
                positions,
                query_sine_embed,
                memory,
                encoder_attention_mask,
                is_first,
                **kwargs,
            )
        (own, cross, mlp), attn, other = weights, self.self_attn, self.encoder_attn
        heads = other.num_attention_heads
        y = two.attend_own(own, heads, attn.scaling, x, positions, attention_mask, x)
        x = self.self_attn_layer_norm(y)
        y = two.attend_cross(
            cross,
            heads,
            other.scaling,
            x,
            (memory, spatial_position_embeddings),
            query_sine_embed,
            positions if is_first else None,
            encoder_attention_mask,
            x,
        )
        return self._perceived(self.encoder_attn_layer_norm(y), mlp)

    def projected(self):
        own, cross = self.self_attn, self.encoder_attn
        yield two.own(*(getattr(own, name) for name in two.OWN))
        yield two.cross(*(getattr(cross, name) for name in two.CROSS))
