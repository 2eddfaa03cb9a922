"""What transformers' vision transformers have in common; a file per family names its classes.

Two shapes: ViT's since transformers 5 (`attention.q_proj`, `mlp.fc1`), and the older one
(`attention.attention.query`, `attention.output.dense`, `intermediate.dense`, `output.dense`).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..hf import key_padding
from ..nn._derived import Weights
from ..nn.attention import split_mask
from ..ops import attention, attention_layer, linear, mlp_layer, patch_embed
from ..ops.chain import Chain
from .block import BlockWeights, fused_layers
from .fast import (
    Fast,
    activation_name,
    fall_back,
    first,
    norm_of,
    not_activation,
    not_layer_norm,
    not_one_of,
    not_plain_conv,
    not_plain_linear,
    one_dtype,
    packed_linear,
    packed_patch,
    scaled,
)

# softmax takes away what a key's bias adds: the same to every score of a query
KEY_BIASES = ("k_proj.bias", "key.bias", "projection_key.bias")
_DROPOUTS = ("attention_dropout", "dropout_prob", "attn_drop", "dropout")  # of attention weights


def joined(*layers: Any) -> Weights:
    """Linear layers of one input as one; a missing bias (BEiT's keys) is zeros."""
    weight = torch.cat([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers]
    if all(bias is None for bias in biases):
        return packed_linear(weight, None)
    zeros = [weight.new_zeros(len(layer.weight)) for layer in layers]
    return packed_linear(
        weight,
        torch.cat([z if b is None else b for b, z in zip(biases, zeros, strict=True)]),
    )


def product(x: Tensor, w: Weights, **kwargs: Any) -> Tensor:
    return linear(x, w.weight, w.bias, packed=w.packed, **kwargs)


def masked_attention(q: Any, k: Any, v: Any, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention under transformers' mask, True or 0 where it looks: (B, Nq, heads * Dv)."""
    padding = key_padding(mask)
    bias = None if padding is not None else split_mask(mask, q)[0]
    return attention(q, k, v, bias=bias, key_padding_mask=padding, scale=scale).flatten(2)


def dropout_of(attn: Any) -> tuple[float, bool]:
    """The dropout of attention weights: its probability, and whether it is on now."""
    found = next(getattr(attn, name) for name in _DROPOUTS if hasattr(attn, name))
    if isinstance(found, nn.Module):
        return float(found.p), bool(found.training)  # type: ignore[arg-type]
    return float(found), attn.training


def wants_attentions(module: Any, kwargs: dict[str, Any]) -> bool:
    config = getattr(module, "config", None)
    return bool(kwargs.get("output_attentions") or getattr(config, "output_attentions", False))


class AttentionRule(Fast):
    """Base of the attention rules: when a call is served, and with which weights."""

    invisible: ClassVar[tuple[str, ...]] = KEY_BIASES
    projections: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")

    @classmethod
    def unserved(cls, module, mode):
        p, _ = dropout_of(module)
        if mode == "train" and p > 0:
            return f"attention dropout {p} in training"
        return first(not_plain_linear(n, getattr(module, n)) for n in cls.projections)

    def _weights(self: Any, x: Tensor, kwargs: dict[str, Any]) -> Any:
        """What derive() gives, for this call; None where the original must be called."""
        name = type(self).replaces.__name__
        if wants_attentions(self, kwargs):
            fall_back(name, "output_attentions")
            return None
        weights = self._hybridops_plan.derived(self, x)
        if weights is not None:
            return weights
        p, drops = dropout_of(self)
        if (p > 0 and drops) or not self._hybridops_plan.intact() or x.ndim != 3:
            fall_back(name, "dropout while training, or hooked")
            return None
        return self.derive()


class SelfAttention(AttentionRule):
    """Queries, keys and values of one input; the last of four projections is the output's."""

    as_tuple: ClassVar[bool] = True  # it returns (output, None)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        w = self._weights(hidden_states, kwargs)
        if w is None:
            mask = {} if attention_mask is None else {"attention_mask": attention_mask}
            return self.replaces.forward(self, hidden_states, **mask, **kwargs)
        y = self._attend(hidden_states, attention_mask, *w)
        return (y, None) if self.as_tuple else y

    def derive(self):
        q, k, v, *out = (getattr(self, name) for name in self.projections)
        return joined(q, k, v), *map(scaled, out)

    def _attend(self: Any, x, mask, qkv, out=None):
        heads, scale = self.num_attention_heads, getattr(self, "scaling", None)
        D = len(qkv.weight) // 3 // heads
        if mask is None and out is not None:
            return attention_layer(x, qkv, out, heads=heads, key_dim=D, scale=scale)
        q, k, v = product(x, qkv).unflatten(2, (3, heads, D)).unbind(2)
        y = masked_attention(q, k, v, mask, scale)
        return y if out is None else product(y, out)


class Perceptron(Fast):
    """fc2(activation(fc1(x)))"""

    layers: ClassVar[tuple[str, str, str]] = ("fc1", "activation_fn", "fc2")

    @classmethod
    def unserved(cls, module, mode):
        up, activation, down = cls.layers
        return first(
            (
                not_plain_linear(up, getattr(module, up)),
                not_activation(activation, getattr(module, activation)),
                not_plain_linear(down, getattr(module, down)),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(getattr(module, cls.layers[1]))

    def forward(self, hidden_states):
        plan = self._hybridops_plan
        weights = plan.derived(self, hidden_states)
        if weights is None:
            if not plan.intact():
                return self.replaces.forward(self, hidden_states)
            weights = self.derive()
        return mlp_layer(hidden_states, *weights, activation=plan.facts)

    def derive(self):
        return scaled(getattr(self, self.layers[0])), scaled(getattr(self, self.layers[2]))


class Dense(Fast):
    """The older perceptron's first half: activation(dense(x))."""

    behind: ClassVar[str] = "intermediate_act_fn"  # the activation's name

    @classmethod
    def unserved(cls, module, mode):
        reason = not_plain_linear("dense", module.dense)
        return reason or not_activation(cls.behind, getattr(module, cls.behind))

    @classmethod
    def facts(cls, module):
        return activation_name(getattr(module, cls.behind))

    def forward(self, hidden_states):
        plan = self._hybridops_plan
        w = plan.derived(self, hidden_states)
        if w is None:
            if not plan.intact():
                return self.replaces.forward(self, hidden_states)
            w = self.derive()
        return product(hidden_states, w, activation=plan.facts)

    def derive(self):
        return scaled(self.dense)


class DenseResidual(Fast):
    """The older perceptron's second half: dropout(dense(x)) + input; or attention's, without it."""

    adds: ClassVar[bool] = True

    @classmethod
    def unserved(cls, module, mode):
        return not_plain_linear("dense", module.dense) or not_one_of(
            "dropout", module.dropout, nn.Dropout
        )

    def forward(self, hidden_states, *input_tensor):
        plan = self._hybridops_plan
        w = plan.derived(self, hidden_states)
        residual = input_tensor[0] if self.adds else None
        if w is not None:
            return product(hidden_states, w, residual=residual)
        if not plan.intact():
            return self.replaces.forward(self, hidden_states, *input_tensor)
        y = self.dropout(product(hidden_states, self.derive()))
        return y if residual is None else y + residual

    def derive(self):
        return scaled(self.dense)


class PatchEmbeddings(Fast):
    """A convolution that cuts patches, straight into tokens."""

    @classmethod
    def unserved(cls, module, mode):
        proj = module.projection
        reason = not_plain_conv("projection", proj)
        if reason is None and (proj.kernel_size != proj.stride or proj.padding != (0, 0)):
            geometry = proj.kernel_size, proj.stride, proj.padding
            return "projection has kernel {}, stride {} and padding {}".format(*geometry)
        return reason

    def forward(self, pixel_values, *args, **kwargs):
        plan, proj = self._hybridops_plan, self.projection
        weights = plan.derived(self, pixel_values)
        fits = pixel_values.dtype == proj.weight.dtype and pixel_values.ndim == 4
        fits = fits and pixel_values.shape[1] == self.num_channels
        if not fits or args or kwargs or weights is None and not plan.intact():
            return self.replaces.forward(self, pixel_values, *args, **kwargs)
        weight, bias, packed = weights or (proj.weight, proj.bias, None)
        return patch_embed(pixel_values, weight, bias, stride=proj.stride[0], packed=packed)

    def derive(self):
        return packed_patch(self.projection)


class Parts(NamedTuple):
    """A block's layers, wherever its class keeps them."""

    attention: Any  # the module that knows heads and scale
    projections: tuple[Any, Any, Any, Any]
    fc1: Any
    activation: Any
    fc2: Any
    gammas: tuple[Tensor | None, Tensor | None] = (None, None)


class Layer(Fast):
    """A pre-norm block in one dispatch, in inference without a mask."""

    invisible = KEY_BIASES
    norms: ClassVar[tuple[str, str]] = ("layernorm_before", "layernorm_after")
    drops: ClassVar[dict[str, tuple[type, ...]]] = {}  # children that do nothing in inference

    @classmethod
    def parts(cls, module: Any) -> Parts | str:
        """The block's layers, or why it has others."""
        raise NotImplementedError

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the layer as it is; attention and perceptron are served"
        parts = cls.parts(module)
        if isinstance(parts, str):
            return parts
        return first(
            (
                *(not_plain_linear("a projection", layer) for layer in parts.projections),
                not_plain_linear("fc1", parts.fc1),
                not_plain_linear("fc2", parts.fc2),
                not_activation("the activation", parts.activation),
                *(not_layer_norm(name, getattr(module, name)) for name in cls.norms),
                *(
                    not_one_of(n, getattr(module, n), nn.Dropout, nn.Identity, *allowed)
                    for n, allowed in cls.drops.items()
                ),
            )
        )

    @classmethod
    def facts(cls, module):
        parts = cls.parts(module)
        assert isinstance(parts, Parts)
        attn = parts.attention
        scale = getattr(attn, "scaling", None)
        return activation_name(parts.activation), attn.num_attention_heads, scale

    def forward(self, hidden_states, *args, **kwargs):
        plan = self._hybridops_plan
        masked = args and args[0] is not None or kwargs.get("attention_mask") is not None
        chain = None
        if not masked and hidden_states.ndim == 3 and not wants_attentions(self._of(), kwargs):
            chain = plan.derived(self, hidden_states)
        if chain is None:
            return self.replaces.forward(self, hidden_states, *args, **kwargs)
        return chain(hidden_states)

    def _of(self):
        """The attention, which has the config."""
        return self.parts(self).attention

    def derive(self):
        _, (q, k, v, o), fc1, _, fc2, (gamma1, gamma2) = self.parts(self)
        norms = [getattr(self, name) for name in self.norms]
        if not one_dtype(layer.weight for layer in (q, k, v, o, fc1, fc2, *norms)):
            return None
        activation, heads, scale = self._hybridops_plan.facts
        weights = BlockWeights(joined(q, k, v), scaled(o, gamma1), scaled(fc1), scaled(fc2, gamma2))
        gammas = norm_of(norms[0]), norm_of(norms[1])
        D = len(weights.qkv.weight) // 3 // heads
        return Chain(fused_layers(weights, gammas, heads, D, activation, scale))


def vit_parts(module: Any, attention: type, mlp: type) -> Parts | str:
    """The layers of a block of ViT's shape."""
    attn, perceptron = module.attention, module.mlp
    reason = not_one_of("attention", attn, attention) or not_one_of("mlp", perceptron, mlp)
    if reason:
        return reason
    projections = attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj
    return Parts(attn, projections, perceptron.fc1, perceptron.activation_fn, perceptron.fc2)


def scaled_parts(module: Any, attention: type, mlp: type, scale: type) -> Parts | str:
    """The same with a LayerScale behind each half (DINOv2)."""
    scales = module.layer_scale1, module.layer_scale2
    reason = first(not_one_of("a scale", s, scale) for s in scales)
    parts = vit_parts(module, attention, mlp)
    if reason or isinstance(parts, str):
        return reason or parts
    return parts._replace(gammas=tuple(s.lambda1 for s in scales))


def older_parts(module: Any, *classes: type) -> Parts | str:
    """The layers of a block of the older shape; classes: SelfAttention, SelfOutput, Intermediate,
    Output."""
    outer = module.attention
    children = {
        "attention.attention": outer.attention,
        "attention.output": outer.output,
        "intermediate": module.intermediate,
        "output": module.output,
    }
    reason = first(
        not_one_of(name, child, cls)
        for (name, child), cls in zip(children.items(), classes, strict=True)
    )
    if reason:
        return reason
    attn, up = outer.attention, module.intermediate
    projections = attn.query, attn.key, attn.value, outer.output.dense
    return Parts(attn, projections, up.dense, up.intermediate_act_fn, module.output.dense)
