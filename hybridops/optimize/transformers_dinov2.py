"""transformers' DINOv2: ViT with LayerScale, which goes into the products before it."""

from __future__ import annotations

from transformers.models.dinov2.modeling_dinov2 import (
    Dinov2Attention,
    Dinov2DropPath,
    Dinov2Layer,
    Dinov2LayerScale,
    Dinov2MLP,
    Dinov2PatchEmbeddings,
)

from .transformers_block import Layer, PatchEmbeddings, Perceptron, SelfAttention, scaled_parts


class FastAttention(SelfAttention, Dinov2Attention):
    pass


class FastMLP(Perceptron, Dinov2MLP):
    pass


class FastPatchEmbeddings(PatchEmbeddings, Dinov2PatchEmbeddings):
    pass


class FastLayer(Layer, Dinov2Layer):
    norms = ("norm1", "norm2")
    drops = {"drop_path": (Dinov2DropPath,)}

    @classmethod
    def parts(cls, module):
        return scaled_parts(module, Dinov2Attention, Dinov2MLP, Dinov2LayerScale)
