"""transformers' BEiT: ViT with LayerScale, keys without bias, and a bias of relative positions.

The bias comes as attention's mask; layers that make their own keep their original forward, whose
attention and perceptron are served.
"""

from __future__ import annotations

from torch import Tensor
from transformers.models.beit.modeling_beit import (
    BeitAttention,
    BeitDropPath,
    BeitLayer,
    BeitMLP,
    BeitPatchEmbeddings,
)

from .transformers_block import Layer, PatchEmbeddings, Perceptron, SelfAttention, vit_parts


class FastAttention(SelfAttention, BeitAttention):
    pass


class FastMLP(Perceptron, BeitMLP):
    pass


class FastPatchEmbeddings(PatchEmbeddings, BeitPatchEmbeddings):
    pass


class FastLayer(Layer, BeitLayer):
    drops = {"dropout": (), "drop_path": (BeitDropPath,)}

    @classmethod
    def parts(cls, module):
        if module.relative_position_bias is not None:
            return "its bias of relative positions follows the resolution; its parts are served"
        parts = vit_parts(module, BeitAttention, BeitMLP)
        if isinstance(parts, str):
            return parts
        scales = module.lambda_1, module.lambda_2  # 1.0 where there are none
        return parts._replace(gammas=tuple(s if isinstance(s, Tensor) else None for s in scales))
