"""transformers' PVT."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.pvt.modeling_pvt import (
    PvtEfficientSelfAttention,
    PvtFFN,
    PvtPatchEmbeddings,
    PvtSelfOutput,
)

from ..nn._derived import Weights
from ..ops import linear, mlp_layer
from .fast import Fast, not_one_of, packed_patch
from .pyramid import ReducedAttention, embed, not_embedding
from .transformers_block import DenseResidual, Perceptron


class FastAttention(ReducedAttention, PvtEfficientSelfAttention):
    projections = ("query", "key", "value")

    @classmethod
    def reduction(cls, module):
        if module.sequences_reduction_ratio == 1:
            return None
        return module.sequence_reduction, module.layer_norm


class FastSelfOutput(DenseResidual, PvtSelfOutput):
    adds = False  # the layer does


class FastMLP(Perceptron, PvtFFN):
    layers = ("dense1", "intermediate_act_fn", "dense2")

    @classmethod
    def unserved(cls, module, mode):
        reason = super().unserved(module, mode)
        return reason or not_one_of("dropout", module.dropout, nn.Dropout)

    def forward(self, hidden_states):
        plan = self._hybridops_plan
        weights = plan.derived(self, hidden_states)
        if weights is not None:
            return mlp_layer(hidden_states, *weights, activation=plan.facts)
        if not plan.intact():
            return PvtFFN.forward(self, hidden_states)
        up, down = self.dense1, self.dense2
        h = self.dropout(linear(hidden_states, up.weight, up.bias, activation=plan.facts))
        return self.dropout(linear(h, down.weight, down.bias))


class FastPatchEmbeddings(Fast, PvtPatchEmbeddings):
    @classmethod
    def unserved(cls, module, mode):
        reason = not_embedding(module.projection, module.layer_norm)
        return reason or not_one_of("dropout", module.dropout, nn.Dropout)

    def forward(self, pixel_values):
        plan, conv = self._hybridops_plan, self.projection
        w = plan.derived(self, pixel_values)
        fits = pixel_values.ndim == 4 and pixel_values.shape[1] == self.num_channels
        if not fits or w is None and not plan.intact():
            return PvtPatchEmbeddings.forward(self, pixel_values)
        plain = Weights(conv.weight, conv.bias, None)
        x = embed(pixel_values, conv, self.layer_norm, w or plain, w is not None)
        sides = zip(pixel_values.shape[2:], conv.kernel_size, strict=True)
        H, W = ((n - k) // conv.stride[0] + 1 for n, k in sides)
        positions = self.position_embeddings
        if self.cls_token is None:
            positions = self.interpolate_pos_encoding(positions, H, W)
        else:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
            rest = self.interpolate_pos_encoding(positions[:, 1:], H, W)
            positions = torch.cat((positions[:, :1], rest), dim=1)
        return self.dropout(x + positions), H, W

    def derive(self):
        return packed_patch(self.projection)
