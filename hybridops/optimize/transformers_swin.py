"""transformers' Swin: attention in windows, with a bias table and the shift's mask."""

from __future__ import annotations

import torch
from transformers.models.swin.modeling_swin import SwinAttention, SwinMLP, SwinPatchMerging

from ..ops import attention_layer
from .fast import Fast, first, norm_of, not_layer_norm, not_plain_linear, one_dtype, scaled
from .grid import squares
from .qkv import tiled
from .transformers_block import Perceptron, SelfAttention, product


class FastAttention(SelfAttention, SwinAttention):
    def derive(self):
        return *super().derive(), self.relative_position_bias()

    def _attend(self, x, mask, qkv, out, bias):
        if mask is not None:  # (windows of an image, N, N)
            bias = bias + mask[:, None]
        bias = tiled(bias, x.shape[0])
        settings = {"heads": self.num_attention_heads, "key_dim": self.head_dim}
        settings |= {"scale": self.scaling, "bias": bias}
        if bias.shape[0] == 1 or bias.shape[0] == x.shape[0]:
            return attention_layer(x, qkv, out, **settings)
        images = x.split(len(bias))  # the same rows for every image: no copy of them for each
        return torch.cat([attention_layer(image, qkv, out, **settings) for image in images])


class FastMLP(Perceptron, SwinMLP):
    pass


class FastPatchMerging(Fast, SwinPatchMerging):
    @classmethod
    def unserved(cls, module, mode):
        return first(
            (
                not_plain_linear("reduction", module.reduction),
                not_layer_norm("norm", module.norm),
            )
        )

    def forward(self, input_feature, input_dimensions):
        plan = self._hybridops_plan
        w = plan.derived(self, input_feature)
        if w is None and not plan.intact():
            return SwinPatchMerging.forward(self, input_feature, input_dimensions)
        x = squares(input_feature.unflatten(1, input_dimensions)).flatten(1, 2)
        if w is None:
            return product(self.norm(x), scaled(self.reduction))
        return product(x, w, norm=norm_of(self.norm))

    def derive(self):
        same = one_dtype((self.norm.weight, self.reduction.weight))
        return scaled(self.reduction) if same else None
