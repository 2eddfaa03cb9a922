"""transformers' ViT."""

from __future__ import annotations

from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTLayer,
    ViTMLP,
    ViTPatchEmbeddings,
)

from .transformers_block import Layer, PatchEmbeddings, Perceptron, SelfAttention, vit_parts


class FastAttention(SelfAttention, ViTAttention):
    pass


class FastMLP(Perceptron, ViTMLP):
    pass


class FastPatchEmbeddings(PatchEmbeddings, ViTPatchEmbeddings):
    pass


class FastLayer(Layer, ViTLayer):
    drops = {"dropout": ()}

    @classmethod
    def parts(cls, module):
        return vit_parts(module, ViTAttention, ViTMLP)
