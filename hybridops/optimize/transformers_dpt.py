"""transformers' DPT: the layers of its ViT."""

from __future__ import annotations

from transformers.models.dpt.modeling_dpt import (
    DPTSelfAttention,
    DPTViTIntermediate,
    DPTViTLayer,
    DPTViTOutput,
    DPTViTPatchEmbeddings,
    DPTViTSelfOutput,
)

from .transformers_block import (
    Dense,
    DenseResidual,
    Layer,
    PatchEmbeddings,
    SelfAttention,
    older_parts,
)


class FastSelfAttention(SelfAttention, DPTSelfAttention):
    projections = ("query", "key", "value")


class FastSelfOutput(DenseResidual, DPTViTSelfOutput):
    adds = False  # the layer does


class FastIntermediate(Dense, DPTViTIntermediate):
    pass


class FastOutput(DenseResidual, DPTViTOutput):
    pass


class FastPatchEmbeddings(PatchEmbeddings, DPTViTPatchEmbeddings):
    pass


class FastLayer(Layer, DPTViTLayer):
    @classmethod
    def parts(cls, module):
        return older_parts(
            module, DPTSelfAttention, DPTViTSelfOutput, DPTViTIntermediate, DPTViTOutput
        )
