"""What transformers' DETRs have in common; a file per family names its classes.

Queries and keys carry positions that values do not. A layer puts its norms behind its parts (DETR,
Conditional DETR, RT-DETR) or in front of them (Table Transformer).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..ops import mlp_layer
from ..ops.layer import Weights
from .fast import (
    Fast,
    activation_name,
    first,
    norm_of,
    not_activation,
    not_layer_norm,
    not_one_of,
    not_plain_linear,
    one_dtype,
    scaled,
)
from .transformers_block import AttentionRule, joined, masked_attention, product

PARTS = "training keeps the layer as it is; attention and perceptron are served"


class Projections(NamedTuple):
    """qk: queries and keys at once where both are made from the same input, else queries."""

    qk: Weights
    k: Weights | None
    v: Weights
    o: Weights


def plus(x: Tensor, positions: Tensor | None) -> Tensor:
    return x if positions is None else x + positions


def self_projections(attn: Any, names: tuple[str, ...]) -> Projections:
    q, k, v, o = (getattr(attn, name) for name in names)
    return Projections(joined(q, k), None, scaled(v), scaled(o))


def cross_projections(attn: Any, names: tuple[str, ...]) -> Projections:
    return Projections(*(scaled(getattr(attn, name)) for name in names))


_MAKERS = (self_projections, cross_projections)  # a layer's attentions, in order


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
    q = product(q_input, w.qk)
    if w.k is None:
        q, k = q.chunk(2, dim=-1)
    else:
        k = product(k_input, w.k)
    D = getattr(attn, "head_dim", None) or attn.attention_head_size
    q, k, v = (x.unflatten(2, (-1, D)) for x in (q, k, product(v_input, w.v)))
    y = masked_attention(q, k, v, mask, getattr(attn, "scaling", None))
    return product(y, w.o, residual=residual)


class SelfAttention(AttentionRule):
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        w = self._weights(hidden_states, kwargs)
        if w is None:
            return self.replaces.forward(
                self, hidden_states, attention_mask, position_embeddings, **kwargs
            )
        q = plus(hidden_states, position_embeddings)
        return attend(self, w, q, q, hidden_states, attention_mask), None

    def derive(self):
        return self_projections(self, self.projections)


class CrossAttention(AttentionRule):
    projections = SelfAttention.projections

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
            return self.replaces.forward(
                self,
                hidden_states,
                key_value_states,
                attention_mask,
                position_embeddings,
                encoder_position_embeddings,
                **kwargs,
            )
        q = plus(hidden_states, position_embeddings)
        k = plus(key_value_states, encoder_position_embeddings)
        return attend(self, w, q, k, key_value_states, attention_mask), None

    def derive(self):
        return cross_projections(self, self.projections)


class Perceptron(Fast):
    """fc2(activation(fc1(x))), its dropouts in two numbers."""

    @classmethod
    def unserved(cls, module, mode):
        dropout = module.dropout or module.activation_dropout
        if mode == "train" and dropout:
            return f"dropout {dropout} in training"
        return not_perceptron(module)

    @classmethod
    def facts(cls, module):
        return activation_name(module.activation_fn)

    def forward(self, hidden_states):
        plan = self._hybridops_plan
        weights = plan.derived(self, hidden_states)
        if weights is None:
            drops = self.training and (self.dropout or self.activation_dropout)
            if drops or not plan.intact():
                return self.replaces.forward(self, hidden_states)
            weights = self.derive()
        return mlp_layer(hidden_states, *weights, activation=plan.facts)

    def derive(self):
        return scaled(self.fc1), scaled(self.fc2)


def not_perceptron(module: Any) -> str | None:
    reason = not_activation("activation_fn", module.activation_fn)
    return reason or first(not_plain_linear(n, getattr(module, n)) for n in ("fc1", "fc2"))


def called(layer: Any) -> tuple[str, ...]:
    """The children of a layer with a perceptron of its own that are called, not bypassed."""
    own = hasattr(layer, "fc1") and not_perceptron(layer) is not None
    return ("fc1", "activation_fn", "fc2") if own else ()


class Layer(Fast):
    """Base of the rules for whole layers: residuals and perceptron inside the products.

    Inference only. fc1, activation_fn and fc2 are the layer's own or those of its `mlp`; an
    activation that no kernel applies (DAB-DETR's PReLU) leaves the three to torch.
    """

    attentions: ClassVar[tuple[tuple[str, str, type[Any]], ...]]  # name, its norm's, its rule
    perceptron: ClassVar[type[Fast] | None] = None  # the rule of `mlp`
    norm_in_front: ClassVar[bool] = False

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return PARTS
        if getattr(module, "normalize_before", False):
            return "normalize_before: its residual is behind the norm; the parts are served"
        norms = [norm for _, norm, _ in cls.attentions]
        return first(
            (
                *(_not_served(n, getattr(module, n), rule) for n, _, rule in cls.attentions),
                *(not_layer_norm(n, getattr(module, n)) for n in (*norms, "final_layer_norm")),
                _not_served("mlp", module.mlp, cls.perceptron) if cls.perceptron else None,
            )
        )

    @classmethod
    def facts(cls, module):
        """The activation's name; None where the perceptron is left to torch."""
        holder = cls._holder(module)
        return None if not_perceptron(holder) else activation_name(holder.activation_fn)

    @classmethod
    def bypassed(cls, module):
        return [c for name, c in module.named_children() if name not in called(module)]

    @classmethod
    def _holder(cls, module: Any) -> Any:
        return module.mlp if cls.perceptron else module

    def derive(self):
        """The attentions' projections, in order, and the perceptron's."""
        holder = self._holder(self)
        if self.norm_in_front and not one_dtype((holder.fc1.weight, self.final_layer_norm.weight)):
            return None
        fused = self._hybridops_plan.facts is not None
        mlp = (scaled(holder.fc1), scaled(holder.fc2)) if fused else None
        return *self.projected(), mlp

    def projected(self):
        """The attentions' part of it."""
        for make, (name, _, rule) in zip(_MAKERS, self.attentions, strict=False):
            yield make(getattr(self, name), rule.projections)

    def _served(self: Any, x: Tensor, asks: Any) -> Any:
        """What derive() gives; None where the original must be called."""
        return None if asks else self._hybridops_plan.derived(self, x)

    def _attended(self: Any, index: int, w: Projections, x: Tensor, attend_to: Any, mask: Any):
        """x + attention of norm(x), or norm(x + attention of x); attend_to gives q, k, v."""
        name, norm, _ = self.attentions[index]
        norm = getattr(self, norm)
        q, k, v = attend_to(norm(x) if self.norm_in_front else x)
        y = attend(getattr(self, name), w, q, k, v, mask, x)
        return y if self.norm_in_front else norm(y)

    def _perceived(self: Any, x: Tensor, mlp: tuple[Weights, Weights] | None) -> Tensor:
        norm = self.final_layer_norm
        if mlp is None:
            h = norm(x) if self.norm_in_front else x
            holder = self._holder(self)
            y = x + holder.fc2(holder.activation_fn(holder.fc1(h)))
        else:
            fused = norm_of(norm) if self.norm_in_front else None
            activation = self._hybridops_plan.facts
            y = mlp_layer(x, *mlp, activation=activation, norm=fused, residual=True)
        return y if self.norm_in_front else norm(y)

    def _encoded(self, x: Tensor, mask: Any, positions: Any, weights: Any) -> Tensor:
        """An encoder's layer."""
        attn, mlp = weights
        x = self._attended(0, attn, x, _among(positions), mask)
        return self._perceived(x, mlp)

    def _decoded(
        self, x: Tensor, mask: Any, positions: Any, memory: Any, memory_mask: Any, weights: Any
    ) -> Tensor:
        """A decoder's layer; memory: the encoder's output, and its positions."""
        own, cross, mlp = weights
        x = self._attended(0, own, x, _among(positions), mask)
        values, where = memory
        keys = plus(values, where)
        x = self._attended(1, cross, x, lambda x: (plus(x, positions), keys, values), memory_mask)
        return self._perceived(x, mlp)


def _among(positions):
    """Queries and keys with positions, values without."""

    def inputs(x):
        q = plus(x, positions)
        return q, q, x

    return inputs


def _not_served(name: str, module: Any, rule: type[Any]) -> str | None:
    reason = not_one_of(name, module, rule.replaces) or rule.unserved(module, "inference")
    return reason and (reason if reason.startswith(name) else f"{name}: {reason}")


class EncoderLayer(Layer):
    def forward(self, hidden_states, attention_mask, spatial_position_embeddings=None, **kwargs):
        x, positions = hidden_states, spatial_position_embeddings
        weights = self._served(x, kwargs.get("output_attentions"))
        if weights is None:
            return self.replaces.forward(self, x, attention_mask, positions, **kwargs)
        return self._encoded(x, attention_mask, positions, weights)


class DecoderLayer(Layer):
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
        x, memory = hidden_states, (encoder_hidden_states, spatial_position_embeddings)
        asks = encoder_hidden_states is None or kwargs.get("output_attentions")
        weights = self._served(x, asks)
        if weights is None:
            return self.replaces.forward(
                self,
                x,
                attention_mask,
                spatial_position_embeddings,
                object_queries_position_embeddings,
                encoder_hidden_states,
                encoder_attention_mask,
                **kwargs,
            )
        positions = object_queries_position_embeddings
        return self._decoded(x, attention_mask, positions, memory, encoder_attention_mask, weights)
