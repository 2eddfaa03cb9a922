"""hybridops.models: built on our kernels already; what is left is work that inference can skip."""

from __future__ import annotations

from torch import nn

from .. import backend
from ..models.cpvt import Cpvt
from ..models.hybrid_vit import HybridVit
from ..models.levit import Levit, LevitBlock, LevitDownsample, LevitMlp, LevitStage
from ..nn import (
    Attention,
    Block,
    DropPath,
    LinearNorm,
    Mlp,
    RelPosAttention,
    RelPosAttentionDownsample,
)
from ..nn._derived import fold_in_front
from ..nn.rel_pos_attention import Subsample
from ..ops.chain import Chain, linear_step, mean_step
from .block import block_layers
from .chained import Chained, Container, Runs, is_apart
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
from .levit_layers import attention_layers, mlp_layers, subsample_layers


def averaged_heads(heads):
    """NormLinear heads, averaged, of the mean token: (B, N, C) -> (B, 1, classes), one dispatch."""
    folded = [fold_in_front(h.linear.weight, h.linear.bias, h.bn) for h in heads]
    weights = packed_linear(*(sum(parts) / len(parts) for parts in zip(*folded, strict=True)))
    return Chain([mean_step(), linear_step(weights)])


class FastLevit(Fast, Levit):
    """The two heads averaged at inference, (a + b) / 2, are one product."""

    overrides = "forward_head"

    @classmethod
    def bypassed(cls, module):
        return [head for head in (module.head, module.head_dist) if head is not None]

    def forward_head(self, x):
        chain = self._hybridops_plan.derived(self, x)
        return Levit.forward_head(self, x) if chain is None else chain(x).squeeze(1)

    def derive(self):
        return averaged_heads(self.bypassed(self))


_LEVIT = {
    *(LevitBlock, LevitDownsample, LevitMlp, RelPosAttention, RelPosAttentionDownsample, Subsample),
    *(LinearNorm, DropPath, nn.Linear, nn.BatchNorm1d, nn.Hardswish, nn.Dropout),
    *(nn.Sequential, nn.Identity),
}


class FastLevitStage(Container, LevitStage):
    """A stage's layers run on our kernels one by one; here they are one dispatch."""

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "its parts are our kernels already"
        parts = [(name, part) for name, part in module.named_modules() if name]
        return first(not_one_of(name, part, *_LEVIT) for name, part in parts)

    def layers(self):
        layers, down = [], self.downsample
        if isinstance(down, LevitDownsample):
            attn = subsample_layers(down.attn_downsample, "hardswish")
            if attn is None:
                return None
            layers += attn + mlp_layers(down.mlp, "hardswish", True)
        for block in self.blocks:
            layers += attention_layers(block.attn, "hardswish", True)
            layers += mlp_layers(block.mlp, "hardswish", True)
        return layers


class FastBlock(Chained, Block):
    """The block of our transformers."""

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "its parts are our kernels already"
        attn, mlp = module.attn, module.mlp
        if getattr(attn, "gate", None) is not None:
            return "gated attention runs in its own kernels"
        inner = (attn.norm, attn.q_norm, attn.k_norm, mlp.norm)
        if any(type(norm) is not nn.Identity for norm in inner):
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
        if attn_mask is not None or is_causal or backend.reference_forced():
            return Block.forward(self, x, attn_mask, is_causal)
        return Chained.forward(self, x)

    def layers(self):
        return block_layers(self, self._hybridops_plan.facts, self.attn.scale)


class _Classifier(Fast):
    """Base of the rules for classifiers: the blocks between two PEGs are one dispatch.

    The last block computes what the class token needs, by itself.
    """

    @classmethod
    def bypassed(cls, module):
        return (module.blocks,)

    @classmethod
    def facts(cls, module):
        return module.prune_last_block

    @classmethod
    def on_swap(cls, module):
        module.prune_last_block = True

    @classmethod
    def on_restore(cls, module):
        module.prune_last_block = module._hybridops_plan.facts

    def _run(self, x):
        runs = (
            None
            if backend.reference_forced() or is_apart()
            else self._hybridops_plan.derived(self, x)
        )
        return self._run_blocks if runs is None else runs

    def derive(self):
        return Runs.of(self.blocks)


class FastCpvt(_Classifier, Cpvt):
    pass


class FastHybridVit(_Classifier, HybridVit):
    channels_last = True
