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

from .fast import not_one_of
from .transformers_block import Layer, PatchEmbeddings, Perceptron, SelfAttention, vit_parts


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
        scales = module.layer_scale1, module.layer_scale2
        parts = vit_parts(module, Dinov2Attention, Dinov2MLP)
        reason = next(
            filter(None, (not_one_of("a scale", s, Dinov2LayerScale) for s in scales)), None
        )
        if reason or isinstance(parts, str):
            return reason or parts
        return parts._replace(gammas=tuple(s.lambda1 for s in scales))
