"""transformers' LeViT."""

from __future__ import annotations

from transformers.models.levit.modeling_levit import (
    LevitAttention,
    LevitAttentionSubsample,
    LevitClassificationLayer,
    LevitConvEmbeddings,
    LevitMLPLayer,
    LevitPatchEmbeddings,
    LevitResidualLayer,
    LevitStage,
    MLPLayerWithBN,
)

from ..ops import conv_stem
from ..ops.chain import Chain
from . import levit_shape as shape
from .chained import is_apart, layers_of, not_chained
from .convs import TRAINING
from .fast import Fast, activation_name, first, not_activation, not_one_of


class FastLinearNorm(shape.LinearNorm, MLPLayerWithBN):
    pass


class FastHead(shape.NormLinear, LevitClassificationLayer):
    pass


class FastMlp(shape.Mlp, LevitMLPLayer):
    pass


class FastAttention(shape.Attention, LevitAttention):
    @classmethod
    def parts(cls, module):
        products = module.queries_keys_values, module.projection
        return shape.Parts(products, module.activation, module.num_attention_heads)


class FastAttentionSubsample(shape.AttentionSubsample, LevitAttentionSubsample):
    @classmethod
    def parts(cls, module):
        products = module.keys_values, module.queries, module.projection
        return shape.Parts(products, module.activation, module.num_attention_heads)

    @classmethod
    def subsample(cls, module):
        return module.queries_subsample


class FastResidual(shape.Residual, LevitResidualLayer):
    inner = "module"


class FastStage(Fast, LevitStage):
    """Its blocks as one chain; no Chained, whose `layers` is the name of a child here."""

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the layers as they are; their parts are served"
        return first(not_chained(name, part, mode) for name, part in module.layers.named_children())

    @classmethod
    def bypassed(cls, module):
        return [module.layers]

    def forward(self, hidden_state):
        chain = None if is_apart() else self._hybridops_plan.derived(self, hidden_state)
        return LevitStage.forward(self, hidden_state) if chain is None else chain(hidden_state)

    def derive(self):
        found = layers_of(*self.layers)
        return Chain(found) if found else None


class FastPatchEmbeddings(Fast, LevitPatchEmbeddings):
    """Four convolutions with norm and activation, and tokens, as one op."""

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return TRAINING
        return first(
            not_activation(name, child)
            if name.startswith("activation")
            else not_one_of(name, child, LevitConvEmbeddings) or shape.not_conv_norm(name, child)
            for name, child in module.named_children()
        )

    @classmethod
    def facts(cls, module):
        """Each convolution's name, and the activation behind it."""
        behind = [activation_name(getattr(module, f"activation_layer_{i}")) for i in (1, 2, 3)]
        return [(f"embedding_layer_{i}", a) for i, a in enumerate([*behind, "none"], 1)]

    def forward(self, pixel_values):
        layers = self._hybridops_plan.derived(self, pixel_values)
        if layers is None or pixel_values.shape[1] != self.num_channels:
            return LevitPatchEmbeddings.forward(self, pixel_values)
        return conv_stem(pixel_values, layers)

    def derive(self):
        facts = self._hybridops_plan.facts
        return [shape.conv_layer(getattr(self, name), activation) for name, activation in facts]
