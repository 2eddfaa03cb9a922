"""hybridops.models: built on our kernels already; what is left is work that inference can skip."""

from __future__ import annotations

from torch import nn

from .. import backend
from ..models.cpvt import Cpvt
from ..models.hybrid_vit import HybridVit
from ..models.levit import Levit
from ..nn import Attention, Block, Mlp
from ..nn._derived import fold_in_front
from ..ops import linear
from .block import block_weights, run_block
from .fast import (
    Fast,
    activation_name,
    first,
    not_activation,
    not_layer_norm,
    not_one_of,
    not_plain_linear,
    packed_linear,
)


def averaged_heads(heads):
    """NormLinear heads whose outputs are averaged, as one linear layer."""
    folded = [fold_in_front(h.linear.weight, h.linear.bias, h.bn) for h in heads]
    return packed_linear(*(sum(parts) / len(parts) for parts in zip(*folded, strict=True)))


class FastLevit(Fast, Levit):
    """The two heads averaged at inference, (a + b) / 2, are one product."""

    overrides = "forward_head"

    @classmethod
    def bypassed(cls, module):
        return [head for head in (module.head, module.head_dist) if head is not None]

    def forward_head(self, x):
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return Levit.forward_head(self, x)
        return linear(x.mean(1), weights.weight, weights.bias, packed=weights.packed)

    def derive(self):
        return averaged_heads(self.bypassed(self))


class FastBlock(Fast, Block):
    """The block of our transformers: two dispatches."""

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "its parts are our kernels already"
        attn, mlp = module.attn, module.mlp
        if getattr(attn, "gate", None) is not None:
            return "gated attention runs in its own kernels"
        if any(type(part.norm) is not nn.Identity for part in (attn, mlp)):
            return "a norm inside attn or mlp; those run in their own kernels"
        return first(
            (
                not_one_of("attn", attn, Attention),
                not_one_of("mlp", mlp, Mlp),
                *(not_plain_linear(n, p) for n, p in (("qkv", attn.qkv), ("proj", attn.proj))),
                *(not_plain_linear(n, p) for n, p in (("fc1", mlp.fc1), ("fc2", mlp.fc2))),
                not_activation("act", mlp.act),
                not_layer_norm("norm1", module.norm1),
                not_layer_norm("norm2", module.norm2),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.mlp.act)

    def forward(self, x, attn_mask=None, is_causal=False):
        plan = self._hybridops_plan
        plain = attn_mask is None and not is_causal and not backend.reference_forced()
        weights = plan.derived(self, x) if plain else None
        if weights is None:
            return Block.forward(self, x, attn_mask, is_causal)
        return run_block(self, x, weights, plan.facts, self.attn.scale)

    def derive(self):
        return block_weights(self)


class _Pruned(Fast):
    """Base of the rules for classifiers: the last block computes what the class token needs."""

    @classmethod
    def bypassed(cls, module):
        return ()  # Classifier looks after hooks itself

    @classmethod
    def facts(cls, module):
        return module.prune_last_block

    @classmethod
    def on_swap(cls, module):
        module.prune_last_block = True

    @classmethod
    def on_restore(cls, module):
        module.prune_last_block = module._hybridops_plan.facts


class FastCpvt(_Pruned, Cpvt):
    pass


class FastHybridVit(_Pruned, HybridVit):
    channels_last = True
