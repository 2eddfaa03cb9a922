"""transformers' DINOv2 with registers: its layers are DINOv2's."""

from __future__ import annotations

from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersAttention,
    Dinov2WithRegistersDropPath,
    Dinov2WithRegistersLayer,
    Dinov2WithRegistersLayerScale,
    Dinov2WithRegistersMLP,
    Dinov2WithRegistersPatchEmbeddings,
)

from .transformers_block import Layer, PatchEmbeddings, Perceptron, SelfAttention, scaled_parts


class FastAttention(SelfAttention, Dinov2WithRegistersAttention):
    pass


class FastMLP(Perceptron, Dinov2WithRegistersMLP):
    pass


class FastPatchEmbeddings(PatchEmbeddings, Dinov2WithRegistersPatchEmbeddings):
    pass


class FastLayer(Layer, Dinov2WithRegistersLayer):
    norms = ("norm1", "norm2")
    drops = {"drop_path": (Dinov2WithRegistersDropPath,)}

    @classmethod
    def parts(cls, module):
        return scaled_parts(
            module,
            Dinov2WithRegistersAttention,
            Dinov2WithRegistersMLP,
            Dinov2WithRegistersLayerScale,
        )
