"""torch.nn's MultiheadAttention, TransformerEncoderLayer and TransformerDecoderLayer.

The layers are the case in which nobody reads attention's weights: their rules say so to it. Where
a method of another class throws them away (callers.py), its calls of an nn.MultiheadAttention go
without. Any other caller gets the weights that it asks for, by default too, in plain torch, which
`backend.fallbacks` counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..nn._derived import Weights
from ..nn._fusion import is_off, keeps_fp32
from ..nn.multihead_attention import MultiheadAttention
from ..ops import linear, mlp_layer
from .callers import callers, is_called_from
from .fast import (
    Fast,
    activation_name,
    fall_back,
    first,
    is_watched,
    norm_of,
    not_layer_norm,
    not_one_of,
    not_plain_linear,
    scaled,
)

FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class FastMultiheadAttention(Fast, MultiheadAttention):
    replaces = nn.MultiheadAttention

    @classmethod
    def unserved(cls, module, mode):
        if module.bias_k is not None or module.bias_v is not None:
            return "bias_k and bias_v: keys beside those that are projected"
        if module.add_zero_attn:
            return "add_zero_attn: a key of zeros"
        if mode == "train" and module.dropout > 0:
            return f"attention dropout {module.dropout} in training"
        weights = (
            module.in_proj_weight,
            module.q_proj_weight,
            module.k_proj_weight,
            module.v_proj_weight,
        )
        odd = next((w for w in weights if type(w) not in (type(None), nn.Parameter, Tensor)), None)
        if odd is not None:
            return f"a projection's weight is a {type(odd).__name__}"
        return not_one_of("out_proj", module.out_proj, nn.Linear, NonDynamicallyQuantizableLinear)

    @classmethod
    def facts(cls, module):
        return frozenset()  # the callers that throw the weights away: see learn()

    @classmethod
    def learn(cls, module, holders):
        module._hybridops_plan.facts = callers(holders).frugal

    @classmethod
    def note(cls, module, holders):
        reader = callers(holders).reader if holders else None
        return reader and f"attention weights are computed where asked for: {reader}"

    def _weights_are_dropped(self: Any) -> bool:
        sites = self._hybridops_plan.facts
        if not sites or torch.compiler.is_dynamo_compiling():  # its graph keeps what is read
            return bool(sites)
        return not is_watched(self) and is_called_from(sites)

    def as_called(self: Any, args, kwargs):
        if not is_called_from(self._hybridops_plan.facts):
            return args, kwargs
        if len(args) > 4:  # query, key, value, key_padding_mask, need_weights
            return (*args[:4], False, *args[5:]), kwargs
        return args, kwargs | {"need_weights": False}


class TransformerLayer(Fast):
    """Base of the rules for layers of attentions and a perceptron, each with a norm and a residual.

    The names of the children are torch's: norm1, dropout1 and so on, linear1, dropout, linear2.
    """

    attentions: ClassVar[tuple[str, ...]] = ("self_attn",)
    pre_norm: ClassVar[str] = "norm_first"  # the attribute that puts the norms first

    @classmethod
    def unserved(cls, module, mode):
        if activation_of(module.activation) is None:
            name = getattr(module.activation, "__name__", type(module.activation).__name__)
            return f"activation is {name}, which no kernel applies"
        last = len(cls.attentions) + 1
        dropouts = ["dropout", *(f"dropout{i}" for i in range(1, last + 1))]
        return first(
            (
                *(_not_served(name, getattr(module, name), mode) for name in cls.attentions),
                *(not_plain_linear(name, getattr(module, name)) for name in ("linear1", "linear2")),
                *(not_layer_norm(f"norm{i}", getattr(module, f"norm{i}")) for i in range(1, last)),
                not_layer_norm(f"norm{last}", getattr(module, f"norm{last}")),
                *(not_one_of(name, getattr(module, name), nn.Dropout) for name in dropouts),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_of(module.activation)

    def derive(self):
        return scaled(self.linear1), scaled(self.linear2)

    def _serves(self: Any, x: Tensor, causal: bool) -> bool:
        """Whether this call may bypass the children. causal: a hint without its mask, an error."""
        if x.is_nested:
            fall_back(type(self).replaces.__name__, "nested tensor")
            return False
        # autocast keeps norms and sums in fp32
        return not (causal or keeps_fp32(x)) and self._hybridops_plan.intact()

    def _run(self: Any, x: Tensor, *inputs: Callable[[Tensor], Inputs]) -> Tensor:
        """The layer; inputs: what each attention reads, its masks too, from the (normed) tokens."""
        pre = getattr(self, self.pre_norm)
        for i, (name, read) in enumerate(zip(self.attentions, inputs, strict=True), 1):
            norm, dropout = self._modules[f"norm{i}"], self._modules[f"dropout{i}"]
            attn: Any = self._modules[name]
            query, key, value, padding, mask = read(norm(x) if pre else x)
            drops = attn.training and attn.dropout > 0
            if isinstance(attn, MultiheadAttention) and not drops and is_off(dropout):
                x = attn._fused(query, key, value, padding, mask, residual=x)
            else:
                y, _ = attn(query, key, value, padding, need_weights=False, attn_mask=mask)
                x = x + dropout(y)
            x = x if pre else norm(x)
        return self._perceive(x, len(inputs) + 1, pre)

    def _perceive(self, x, i, pre):
        up, down = self._hybridops_plan.derived(self, x) or (
            Weights(layer.weight, layer.bias, None) for layer in (self.linear1, self.linear2)
        )
        outer, activation = self._modules[f"dropout{i}"], self._hybridops_plan.facts
        norm = self._modules[f"norm{i}"]
        fused = norm_of(norm) if pre else None
        if is_off(self.dropout) and is_off(outer):
            y = mlp_layer(x, up, down, norm=fused, activation=activation, residual=True)
        else:
            h = linear(x, up.weight, up.bias, norm=fused, activation=activation)
            y = x + outer(linear(self.dropout(h), down.weight, down.bias))
        return y if pre else norm(y)


def activation_of(activation: Any) -> str | None:
    """The kernels' name for an activation, a module or a function, or None."""
    if isinstance(activation, nn.Module):
        return activation_name(activation)
    return FUNCTIONS.get(activation)


def _not_served(name, attn, mode):
    reason = not_one_of(name, attn, nn.MultiheadAttention)
    if reason is None:
        reason = FastMultiheadAttention.unserved(attn, mode)
        reason = reason and f"{name}: {reason}"
    return reason


class FastEncoderLayer(TransformerLayer, nn.TransformerEncoderLayer):
    """Torch's own fast path of this layer, one op that calls no child, is not taken."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        if not self._serves(src, is_causal and src_mask is None):
            return nn.TransformerEncoderLayer.forward(
                self, src, src_mask, src_key_padding_mask, is_causal
            )
        return self._run(src, lambda x: (x, x, x, src_key_padding_mask, src_mask))


class FastDecoderLayer(TransformerLayer, nn.TransformerDecoderLayer):
    attentions = ("self_attn", "multihead_attn")

    def forward(
        self,
        tgt,
        memory,
        tgt_mask=None,
        memory_mask=None,
        tgt_key_padding_mask=None,
        memory_key_padding_mask=None,
        tgt_is_causal=False,
        memory_is_causal=False,
    ):
        bare = tgt_is_causal and tgt_mask is None or memory_is_causal and memory_mask is None
        if not self._serves(tgt, bare):
            return nn.TransformerDecoderLayer.forward(
                self,
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        return self._run(
            tgt,
            lambda x: (x, x, x, tgt_key_padding_mask, tgt_mask),
            lambda x: (x, memory, memory, memory_key_padding_mask, memory_mask),
        )
