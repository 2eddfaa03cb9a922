"""transformers' DETR: attention with padding masks, perceptrons, and whole post-norm layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.detr.modeling_detr import (
    DetrCrossAttention,
    DetrDecoderLayer,
    DetrEncoderLayer,
    DetrMLP,
    DetrSelfAttention,
)

from ..hf import key_padding
from ..nn.attention import split_mask
from ..ops import attention, linear, mlp_layer
from ..ops.layer import Weights
from .fast import (
    Fast,
    activation_name,
    fall_back,
    first,
    not_activation,
    not_layer_norm,
    not_one_of,
    not_plain_linear,
    packed_linear,
    scaled,
)

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Projections(NamedTuple):
    """qk: queries and keys at once where both are made from the same input, else queries."""

    qk: Weights
    k: Weights | None
    v: Weights
    o: Weights


def _joined(*layers: Any) -> Weights:
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return packed_linear(torch.cat([layer.weight for layer in layers]), bias)


def self_projections(attn: Any) -> Projections:
    return Projections(
        _joined(attn.q_proj, attn.k_proj), None, scaled(attn.v_proj), scaled(attn.o_proj)
    )


def cross_projections(attn: Any) -> Projections:
    return Projections(*(scaled(getattr(attn, name)) for name in _PROJECTIONS))


def attend(
    attn: Any,
    w: Projections,
    q_input: Tensor,
    k_input: Tensor,
    v_input: Tensor,
    mask: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + the attention layer, its inputs (B, N, C) with their positions added."""
    q = _product(q_input, w.qk)
    if w.k is None:
        q, k = q.chunk(2, dim=-1)
    else:
        k = _product(k_input, w.k)
    q, k, v = (x.unflatten(2, (-1, attn.head_dim)) for x in (q, k, _product(v_input, w.v)))
    padding = key_padding(mask)
    bias = None if padding is not None else split_mask(mask, q)[0]
    out = attention(q, k, v, bias=bias, key_padding_mask=padding, scale=attn.scaling)
    return _product(out.flatten(2), w.o, residual)


def _product(x, w, residual=None):
    return linear(x, w.weight, w.bias, packed=w.packed, residual=residual)


def _plus(x: Tensor, positions: Tensor | None) -> Tensor:
    return x if positions is None else x + positions


def _not_plain_attention(name: str, attn: Any, cls: type) -> str | None:
    reason = not_one_of(name, attn, cls)
    return reason or first(not_plain_linear(n, getattr(attn, n)) for n in _PROJECTIONS)


class _FastAttention(Fast):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train" and module.attention_dropout > 0:
            return f"attention dropout {module.attention_dropout} in training"
        return first(not_plain_linear(n, getattr(module, n)) for n in _PROJECTIONS)

    def _weights(self, x, kwargs):
        """The projections for this call, or None where the original must be called."""
        if kwargs.get("output_attentions") or self.config.output_attentions:
            fall_back(type(self).replaces.__name__, "output_attentions")
            return None
        weights = self._hybridops_plan.derived(self, x)
        if weights is not None:
            return weights
        if (self.training and self.attention_dropout > 0) or not self._hybridops_plan.intact():
            fall_back(type(self).replaces.__name__, "dropout while training, or hooked")
            return None
        return self.derive()


class FastSelfAttention(_FastAttention, DetrSelfAttention):
    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        w = self._weights(hidden_states, kwargs)
        if w is None:
            return DetrSelfAttention.forward(
                self, hidden_states, attention_mask, position_embeddings, **kwargs
            )
        q = _plus(hidden_states, position_embeddings)
        return attend(self, w, q, q, hidden_states, attention_mask), None

    def derive(self):
        return self_projections(self)


class FastCrossAttention(_FastAttention, DetrCrossAttention):
    def forward(
        self,
        hidden_states,
        key_value_states,
        attention_mask=None,
        position_embeddings=None,
        encoder_position_embeddings=None,
        **kwargs,
    ):
        w = self._weights(hidden_states, kwargs)
        if w is None:
            return DetrCrossAttention.forward(
                self,
                hidden_states,
                key_value_states,
                attention_mask,
                position_embeddings,
                encoder_position_embeddings,
                **kwargs,
            )
        q = _plus(hidden_states, position_embeddings)
        k = _plus(key_value_states, encoder_position_embeddings)
        return attend(self, w, q, k, key_value_states, attention_mask), None

    def derive(self):
        return cross_projections(self)


class FastMLP(Fast, DetrMLP):
    @classmethod
    def unserved(cls, module, mode):
        reason = not_activation("activation_fn", module.activation_fn)
        if reason:
            return reason
        dropout = module.dropout or module.activation_dropout
        if mode == "train" and dropout:
            return f"dropout {dropout} in training"
        return first(not_plain_linear(n, getattr(module, n)) for n in ("fc1", "fc2"))

    @classmethod
    def facts(cls, module):
        return activation_name(module.activation_fn)

    def forward(self, hidden_states):
        plan = self._hybridops_plan
        weights = plan.derived(self, hidden_states)
        if weights is None:
            drops = self.training and (self.dropout or self.activation_dropout)
            if drops or not plan.intact():
                return DetrMLP.forward(self, hidden_states)
            weights = self.derive()
        return mlp_layer(hidden_states, *weights, activation=plan.facts)

    def derive(self):
        return scaled(self.fc1), scaled(self.fc2)


class _FastLayer(Fast):
    """A post-norm layer: residuals and the perceptron inside the products."""

    attentions: tuple[tuple[str, str, type], ...]  # name, its norm, its class

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the layer as it is; attention and perceptron are served"
        norms = [norm for _, norm, _ in cls.attentions]
        return first(
            (
                *(_not_plain_attention(n, getattr(module, n), c) for n, _, c in cls.attentions),
                *(not_layer_norm(n, getattr(module, n)) for n in (*norms, "final_layer_norm")),
                not_one_of("mlp", module.mlp, DetrMLP) or FastMLP.unserved(module.mlp, "inference"),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.mlp.activation_fn)

    def _weights(self, x, kwargs):
        if kwargs.get("output_attentions"):
            return None
        return self._hybridops_plan.derived(self, x)

    def _perceive(self, x, weights):
        y = mlp_layer(x, *weights, activation=self._hybridops_plan.facts, residual=True)
        return self.final_layer_norm(y)


class FastEncoderLayer(_FastLayer, DetrEncoderLayer):
    attentions = (("self_attn", "self_attn_layer_norm", DetrSelfAttention),)

    def forward(self, hidden_states, attention_mask, spatial_position_embeddings=None, **kwargs):
        weights = self._weights(hidden_states, kwargs)
        if weights is None:
            return DetrEncoderLayer.forward(
                self, hidden_states, attention_mask, spatial_position_embeddings, **kwargs
            )
        x, (attn, mlp) = hidden_states, weights
        q = _plus(x, spatial_position_embeddings)
        x = self.self_attn_layer_norm(attend(self.self_attn, attn, q, q, x, attention_mask, x))
        return self._perceive(x, mlp)

    def derive(self):
        return self_projections(self.self_attn), (scaled(self.mlp.fc1), scaled(self.mlp.fc2))


class FastDecoderLayer(_FastLayer, DetrDecoderLayer):
    attentions = (
        ("self_attn", "self_attn_layer_norm", DetrSelfAttention),
        ("encoder_attn", "encoder_attn_layer_norm", DetrCrossAttention),
    )

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        spatial_position_embeddings=None,
        object_queries_position_embeddings=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        **kwargs,
    ):
        weights = None
        if encoder_hidden_states is not None:
            weights = self._weights(hidden_states, kwargs)
        if weights is None:
            return DetrDecoderLayer.forward(
                self,
                hidden_states,
                attention_mask,
                spatial_position_embeddings,
                object_queries_position_embeddings,
                encoder_hidden_states,
                encoder_attention_mask,
                **kwargs,
            )
        (own, cross, mlp), x, positions = weights, hidden_states, object_queries_position_embeddings
        q = _plus(x, positions)
        x = self.self_attn_layer_norm(attend(self.self_attn, own, q, q, x, attention_mask, x))
        q, memory = _plus(x, positions), encoder_hidden_states
        k = _plus(memory, spatial_position_embeddings)
        y = attend(self.encoder_attn, cross, q, k, memory, encoder_attention_mask, x)
        return self._perceive(self.encoder_attn_layer_norm(y), mlp)

    def derive(self):
        own, cross = self_projections(self.self_attn), cross_projections(self.encoder_attn)
        return own, cross, (scaled(self.mlp.fc1), scaled(self.mlp.fc2))
