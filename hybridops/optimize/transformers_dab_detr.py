"""transformers' DAB-DETR. Its decoder's parts return weights in every call; its layers need not."""

from __future__ import annotations

from transformers.models.dab_detr.modeling_dab_detr import (
    DabDetrAttention,
    DabDetrDecoderLayer,
    DabDetrDecoderLayerCrossAttention,
    DabDetrDecoderLayerFFN,
    DabDetrDecoderLayerSelfAttention,
    DabDetrEncoderLayer,
    DetrAttention,
)

from ..ops import mlp_layer
from . import conditional_detr_layers as two
from . import detr_layers as shape
from .fast import Fast, activation_name, first, not_layer_norm, not_one_of, not_plain_linear, scaled
from .transformers_block import AttentionRule

_NAMES = ("query_content", "key_content", "value", "query_pos", "key_pos")
_OWN = tuple(f"self_attn_{name}_proj" for name in _NAMES)
_CROSS = tuple(f"cross_attn_{name}_proj" for name in _NAMES)
_SINE = "cross_attn_query_pos_sine_proj"


class FastAttention(AttentionRule, DetrAttention):
    """The encoder's."""

    projections = ("q_proj", "k_proj", "v_proj", "out_proj")

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        object_queries=None,
        key_value_states=None,
        output_attentions=False,
    ):
        x, w = hidden_states, None
        if object_queries is not None:  # theirs does not find its values
            w = self._weights(x, {"output_attentions": output_attentions})
        if w is None:
            return DetrAttention.forward(
                self, x, attention_mask, object_queries, key_value_states, output_attentions
            )
        q = x + object_queries
        return shape.attend(self, w, q, q, x, attention_mask), None

    def derive(self):
        return shape.self_projections(self, self.projections)


class FastEncoderLayer(shape.Layer, DabDetrEncoderLayer):
    attentions = (("self_attn", "self_attn_layer_norm", FastAttention),)

    def forward(self, hidden_states, attention_mask, object_queries, output_attentions=None):
        x, positions = hidden_states, object_queries
        weights = self._served(x, positions is None or output_attentions)
        if weights is None:
            return DabDetrEncoderLayer.forward(
                self, x, attention_mask, positions, output_attentions
            )
        return (self._encoded(x, attention_mask, positions, weights),)


class FastDecoderLayer(Fast, DabDetrDecoderLayer):
    invisible = ("key_content_proj.bias", "key_pos_proj.bias")  # as KEY_BIASES

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the layer as it is"
        own, cross, mlp = module.self_attn, module.cross_attn, module.mlp
        reason = first(
            (
                not_one_of("self_attn", own, DabDetrDecoderLayerSelfAttention),
                not_one_of("cross_attn", cross, DabDetrDecoderLayerCrossAttention),
                not_one_of("mlp", mlp, DabDetrDecoderLayerFFN),
            )
        )
        return reason or first(
            (
                not_one_of("self_attn.self_attn", own.self_attn, DabDetrAttention),
                not_one_of("cross_attn.cross_attn", cross.cross_attn, DabDetrAttention),
                *(not_plain_linear("a projection", p) for p in (*_own(own), *_cross(cross)) if p),
                not_layer_norm("self_attn_layer_norm", own.self_attn_layer_norm),
                not_layer_norm("cross_attn_layer_norm", cross.cross_attn_layer_norm),
                not_layer_norm("final_layer_norm", mlp.final_layer_norm),
            )
        )

    @classmethod
    def bypassed(cls, module):
        parts = [module.self_attn, module.cross_attn]
        return parts if shape.called(module.mlp) else [*parts, module.mlp]

    @classmethod
    def facts(cls, module):
        """The activation's name; None where the perceptron is left to torch."""
        mlp = module.mlp
        return None if shape.called(mlp) else activation_name(mlp.activation_fn)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        object_queries=None,
        query_position_embeddings=None,
        query_sine_embed=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        output_attentions=None,
    ):
        x, positions, memory = hidden_states, query_position_embeddings, encoder_hidden_states
        weights = None
        if memory is not None and not output_attentions:
            weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return DabDetrDecoderLayer.forward(
                self,
                x,
                attention_mask,
                object_queries,
                positions,
                query_sine_embed,
                memory,
                encoder_attention_mask,
                output_attentions,
            )
        own, cross, mlp = self.self_attn, self.cross_attn, self.mlp
        w_own, w_cross, w_mlp = weights
        attn = own.self_attn
        heads, scale = attn.attention_heads, attn.scaling
        y = two.attend_own(w_own, heads, scale, x, positions, attention_mask, x)
        x = own.self_attn_layer_norm(y)
        y = two.attend_cross(
            w_cross,
            cross.cross_attn.attention_heads,
            cross.cross_attn.scaling,
            x,
            (memory, object_queries),
            query_sine_embed,
            positions if cross.is_first or cross.keep_query_pos else None,
            encoder_attention_mask,
            x,
        )
        x = cross.cross_attn_layer_norm(y)
        if w_mlp is None:
            return (mlp(x),)
        y = mlp_layer(x, *w_mlp, activation=self._hybridops_plan.facts, residual=True)
        return (mlp.final_layer_norm(y),)

    def derive(self):
        mlp, weights = self.mlp, None
        if (
            self._hybridops_plan.facts is not None
        ):  # theirs is PReLU, unless its configuration differs
            weights = scaled(mlp.fc1), scaled(mlp.fc2)
        return two.own(*_own(self.self_attn)), two.cross(*_cross(self.cross_attn)), weights


def _own(part):
    return *(getattr(part, name) for name in _OWN), part.self_attn.output_proj


def _cross(part):
    products = (getattr(part, name) for name in _CROSS)
    return *products, part.cross_attn.output_proj, getattr(part, _SINE)
