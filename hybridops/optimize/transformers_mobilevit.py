"""transformers' MobileViT: its transformer layers, and its convolutions with their norms."""

from __future__ import annotations

from transformers.models.mobilevit.modeling_mobilevit import (
    MobileViTConvLayer,
    MobileViTIntermediate,
    MobileViTOutput,
    MobileViTSelfAttention,
    MobileViTSelfOutput,
    MobileViTTransformerLayer,
)

from .convs import Chain
from .transformers_block import Dense, DenseResidual, Layer, SelfAttention, older_parts


class FastSelfAttention(SelfAttention, MobileViTSelfAttention):
    projections = ("query", "key", "value")
    as_tuple = False


class FastSelfOutput(DenseResidual, MobileViTSelfOutput):
    adds = False  # the layer does


class FastIntermediate(Dense, MobileViTIntermediate):
    pass


class FastOutput(DenseResidual, MobileViTOutput):
    pass


class FastLayer(Layer, MobileViTTransformerLayer):
    @classmethod
    def parts(cls, module):
        return older_parts(
            module,
            MobileViTSelfAttention,
            MobileViTSelfOutput,
            MobileViTIntermediate,
            MobileViTOutput,
        )


class FastConvLayer(Chain, MobileViTConvLayer):
    pass
