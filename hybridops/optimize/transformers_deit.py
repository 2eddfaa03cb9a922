"""transformers' DeiT."""

from __future__ import annotations

from transformers.models.deit.modeling_deit import (
    DeiTAttention,
    DeiTLayer,
    DeiTMLP,
    DeiTPatchEmbeddings,
)

from .transformers_block import Layer, PatchEmbeddings, Perceptron, SelfAttention, vit_parts


class FastAttention(SelfAttention, DeiTAttention):
    pass


class FastMLP(Perceptron, DeiTMLP):
    pass


class FastPatchEmbeddings(PatchEmbeddings, DeiTPatchEmbeddings):
    pass


class FastLayer(Layer, DeiTLayer):
    drops = {"dropout": ()}

    @classmethod
    def parts(cls, module):
        return vit_parts(module, DeiTAttention, DeiTMLP)
